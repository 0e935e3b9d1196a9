"""What torch calls the module of a leaf: `layers/attn/query/kernel` is the `weight` of `layers.{}.attn.query`.

A module's name here is a template: `{}` stands for the layer where the leaf is a stack of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jpeft.core.sites import Site, Sites

__all__ = ["match", "minimal", "module_name", "parameter"]

_PARAMETERS = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # Flax's names and torch's


def parameter(path: str) -> str:
    """Torch's name of the parameter that a path ends with; the rest of the path is the module's."""
    last = path.rpartition("/")[2]
    return _PARAMETERS.get(last, last)


def module_name(site: Site, sites: Sites | None, prefix: str) -> str:
    """The module of a leaf, with `prefix` before it unless it is the vocabulary's head or has the prefix already.

    The layer's number stands after the part of the path that holds the whole stack: the topmost that has nothing but
    stacked leaves below it. Without `sites` that is taken to be the first part after the prefix.

    Raises:
        ValueError: a leaf in no module; one stacked more than once.
    """
    parts = _module(site.path)
    own = [part for part in prefix.split(".") if part]
    stacks = site.axes.count("s")
    if len(parts) < 1 + bool(stacks):
        where = "in no module" if not parts else "stacked, and not in a module of its own"
        raise ValueError(f"{site.path} is {where}: torch's names are those of modules; expected a/b/kernel")
    if stacks > 1:
        raise ValueError(f"{site.path} is a stack of stacks ({site.axes}): torch numbers the layers of a module once")
    has_prefix = own == parts[: len(own)]
    if stacks:
        at = _stack_depth(parts, sites) if sites is not None else 1 + has_prefix * len(own)
        parts = [*parts[:at], "{}", *parts[at:]]
    return ".".join(parts if has_prefix or site.head else [*own, *parts])


def _stack_depth(parts: list[str], sites: Sites) -> int:
    """How many parts of a stacked leaf's path come before the layer's number."""
    for depth in range(1, len(parts)):
        below = [s for s in sites if _module(s.path)[:depth] == parts[:depth]]
        if all("s" in s.axes for s in below):
            modules = {tuple(_module(s.path)) for s in below}
            columns = [len(set(column)) == 1 for column in zip(*modules, strict=False)]
            if len(modules) > 1:
                depth = max(depth, [*columns, False].index(False))
            # T5's `block/layer/0`: a list that has a number of its own is inside the layer.
            return depth - 1 if 1 < depth < len(parts) and parts[depth].isdigit() else depth
    return len(parts) - 1


def match(module: str, sites: Iterable[Site]) -> tuple[Site, str] | None:
    """`(site, template)` of the site that a module's name means: the one that agrees in most of the last parts.

    What only one of the two names has in front (`model.`) does not count, unless there is a number in it.

    Raises:
        ValueError: several sites agree in as many parts.
    """
    parts = module.split(".")
    found: dict[str, tuple[int, Site, str]] = {}
    for site in sites:
        stacks = site.axes.count("s")
        numbers = [k for k, part in enumerate(parts) if part.isdigit() and k] if stacks else [None]
        for number in numbers if stacks < 2 else []:
            theirs = [part for k, part in enumerate(parts) if k != number]
            if agreed := _agreed(_module(site.path), theirs, number):
                template = ".".join("{}" if k == number else part for k, part in enumerate(parts))
                found[site.path] = (agreed, site, template)
    most = max((agreed for agreed, _, _ in found.values()), default=0)
    best = [(site, template) for agreed, site, template in found.values() if agreed == most]
    if len(best) > 1:
        raise ValueError(
            f"{module} may be {' or '.join(site.path for site, _ in best)}: the names agree in as many parts"
        )
    return best[0] if best else None


def _agreed(ours: list[str], theirs: list[str], number: int | None) -> int:
    """In how many of the last parts two names agree; 0 where they are of different modules."""
    shared = min(len(ours), len(theirs))
    front = ours[: len(ours) - shared] + theirs[: len(theirs) - shared]
    inside = number is None or number > len(theirs) - shared
    same = ours[len(ours) - shared :] == theirs[len(theirs) - shared :]
    return shared if same and inside and not any(part.isdigit() for part in front) else 0


def minimal(names: Mapping[str, str], layers: Mapping[str, int], paths: Iterable[str]) -> list[str]:
    """The shortest ends of module names by which PEFT finds the modules of `names` (`{path: template}`), and no other.

    `paths` are all of the tree's. Where an end long enough would hold the layer's number, all layers stand in full.
    """
    chosen = {tuple(_module(path)) for path in names}
    all_of = [_module(path) for path in paths]
    others = {tuple(parts[:k]) for parts in all_of for k in range(1, len(parts) + 1)} - chosen
    found: set[str] = set()
    for path, template in names.items():
        parts = template.split(".")
        ends = [tuple(parts[-k:]) for k in range(1, len(parts) + 1)]
        short = [e for e in ends if "{}" not in e and not any(other[-len(e) :] == e for other in others)]
        found |= {".".join(short[0])} if short else {template.format(k) for k in range(layers[path])}
    return sorted(found)


def _module(path: str) -> list[str]:
    return path.split("/")[:-1]
