"""Which bias is added to the outputs of which kernel: for methods that change outputs, their bias included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jpeft.core.sites import Site, Sites
from jpeft.core.weight import matrix_sizes

__all__ = ["Owned", "with_biases"]

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
    owners = {bias: [k for k, kernel in kernels.items() if _fits(b, kernel)] for bias, b in biases.items()}
    pairs = {bias: found for bias, found in owners.items() if any(k in chosen for k in found)}
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


def _fits(bias: Site, kernel: Site) -> bool:
    if bias.path.rpartition("/")[0] != kernel.path.rpartition("/")[0]:
        return False
    experts = kernel.axes.count("b")
    axes = bias.axes.replace("o", "b", experts)
    lead, _, n_out = matrix_sizes(kernel.shape, kernel.axes)
    return axes.count("b") == experts and matrix_sizes(bias.shape, axes) == (lead, 1, n_out)
