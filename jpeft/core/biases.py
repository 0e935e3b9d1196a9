"""Which bias is added to the outputs of which kernel: for methods that change outputs, their bias included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jpeft.core.sites import Site, Sites
from jpeft.core.targets import Targets, select
from jpeft.core.weight import matrix_sizes

__all__ = ["Owned", "ends", "with_biases"]

_KERNELS = ("dense", "conv", "experts")


@dataclass(frozen=True)
class Owned(Site):
    """A kernel that has a bias, or that bias: one change of outputs for both. `owner` is the kernel's path.

    A bias has as many batch axes (experts) as its kernel, so that both give `(*stack, *batch, out)`.
    """

    owner: str = ""


def with_biases(chosen: Mapping[str, Site], sites: Sites) -> dict[str, Site]:
    """The chosen sites, then the biases of those that have one; both of a pair as `Owned`.

    A kernel's bias lies beside it (same parent in the tree) and has one number for each of its outputs.

    Raises:
        ValueError: a bias fits several kernels, or a kernel several biases.
    """
    kernels = {s.path: s for s in sites if s.kind in _KERNELS and "?" not in s.axes}
    biases = {s.path: s for s in sites if s.kind == "bias" and "?" not in s.axes}
    pairs = {bias: found for bias, found in _owners(biases, kernels).items() if any(k in chosen for k in found)}
    several = [f"{bias} may belong to {' or '.join(found)}" for bias, found in pairs.items() if len(found) > 1]
    owned = [found[0] for found in pairs.values()]
    several += [f"{k} may have several biases" for k in dict.fromkeys(owned) if owned.count(k) > 1]
    if several:
        raise ValueError("expected one bias to a kernel; leave these out of targets\n" + "\n".join(several[:5]))
    whole = {path: Owned(**vars(site), owner=path) if path in owned else site for path, site in chosen.items()}
    for bias, (kernel,) in pairs.items():
        axes = biases[bias].axes.replace("o", "b", kernels[kernel].axes.count("b"))
        whole[bias] = Owned(**vars(replace(biases[bias], axes=axes)), owner=kernel)
    return whole


def ends(sites: Sites, targets: Targets, kinds: Sequence[str]) -> dict[str, Site]:
    """Where the outputs of the targets are complete: at a kernel's bias, where it has one, else at the kernel.

    For methods that act on what a layer puts out. The targets select kernels of these kinds; a bias that they select
    stands for its kernel, and one that belongs to no kernel (a norm's) does not count.

    Raises:
        ValueError: as `select` and `with_biases`.
    """
    kernels = {s.path: s for s in sites if s.kind in _KERNELS and "?" not in s.axes}
    biases = {s.path: s for s in sites if s.kind == "bias" and "?" not in s.axes}
    owners = {bias: found for bias, found in _owners(biases, kernels).items() if found}
    seen = Sites(tuple(s for s in sites if s.kind != "bias" or s.path in owners))
    chosen = select(seen, targets, (*kinds, "bias"))
    named = {k: kernels[k] for path in chosen for k in (owners[path] if path in owners else [path])}
    whole = with_biases({path: site for path, site in named.items() if site.kind in kinds}, sites)
    return {path: site for path, site in whole.items() if not isinstance(site, Owned) or path != site.owner}


def _owners(biases: Mapping[str, Site], kernels: Mapping[str, Site]) -> dict[str, list[str]]:
    """`{bias: the kernels that it fits}`."""
    return {bias: [k for k, kernel in kernels.items() if _fits(b, kernel)] for bias, b in biases.items()}


def _fits(bias: Site, kernel: Site) -> bool:
    if bias.path.rpartition("/")[0] != kernel.path.rpartition("/")[0]:
        return False
    experts = kernel.axes.count("b")
    axes = bias.axes.replace("o", "b", experts)
    lead, _, n_out = matrix_sizes(kernel.shape, kernel.axes)
    return axes.count("b") == experts and matrix_sizes(bias.shape, axes) == (lead, 1, n_out)
