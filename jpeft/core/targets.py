"""Targets: which sites a method adapts. A preset, a regex searched in the path, a list of them, or a predicate."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.core.sites import Site, Sites

__all__ = ["Targets", "PRESETS", "select", "first_match", "refuse_unmatched"]

Targets = str | Sequence[str] | Callable[[Site], bool]

_ATTENTION = re.compile(  # RoBERTa's classifier has an out_proj, too
    r"attn|attention|(?<!classifier)(^|/)(q|k|v|o|query|key|value|out)(_proj|_einsum)?/", re.IGNORECASE
)
_MLP = re.compile(
    r"mlp|feed_?forward|ffn|DenseReluDense|(gate|up|down)_proj|intermediate|(?<!attention/)output/dense(/|$)",
    re.IGNORECASE,
)

_KEY_VALUE = re.compile(r"(^|/)(k|v|key|value)(_proj|_einsum)?(/|$)", re.IGNORECASE)
_DOWN = re.compile(
    r"(^|/)(down|down_proj|w2|fc2|fc_out|linear2|lin2|dense_4h_to_h)(/|$)"  # as Llama, Mixtral, OPT, DistilBERT, BLOOM
    r"|(mlp|ffn|feed_?forward|DenseReluDense)[^/]*/(wo|c_proj|output)(/|$)"  # as T5, GPT-2
    r"|(?<!attention/)output/dense(/|$)",  # as BERT, whose attention has one too
    re.IGNORECASE,
)
_OUTPUT = re.compile(
    r"(?<!classifier)(^|/)(o|out|o_proj|out_proj|out_lin)(_einsum)?/"  # as Llama, Flax, OPT, DistilBERT
    r"|(attn|attention)[^/]*/(c_proj|output/dense|dense)(/|$)"  # as GPT-2, BERT, BLOOM
    r"|(Self|EncDec)Attention/o(/|$)",  # as T5
    re.IGNORECASE,
)

PRESETS: dict[str, Callable[[Site], bool]] = {
    "all-linear": lambda site: site.kind == "dense" and not site.head,
    "attention": lambda site: site.kind == "dense" and not site.head and bool(_ATTENTION.search(site.path)),
    "mlp": lambda site: site.kind == "dense" and not site.head and bool(_MLP.search(site.path)),
    "key-value": lambda site: site.kind == "dense" and bool(_KEY_VALUE.search(site.path)),
    "down": lambda site: site.kind in ("dense", "experts") and not site.head and bool(_DOWN.search(site.path)),
    "embedding": lambda site: site.kind == "embedding",
    "conv": lambda site: site.kind == "conv",
    "experts": lambda site: site.kind == "experts",
    "norm": lambda site: site.kind == "scale",
    "bias": lambda site: site.kind == "bias",
    "attention-calls": lambda site: site.kind == "attention",
    "attention-output": lambda site: site.kind == "dense" and bool(_OUTPUT.search(site.path)),
}


def select(sites: Sites, targets: Targets, kinds: Sequence[str]) -> dict[str, Site]:
    """`{path: site}` of what the targets match, each leaf once: by the first of its uses whose kind is in `kinds`.

    Raises:
        ValueError: a target (or one of a list) matches nothing, or only sites of other kinds. All such targets are
            reported together with the nearest paths.
    """
    if callable(targets):
        wanted = [("the predicate", targets)]
    else:
        names: list[Any] = list(targets) if isinstance(targets, (list, tuple)) else [targets]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"expected targets as a string, a list of strings or a predicate on sites, got {targets!r}"
            )
        if not names:
            raise ValueError("expected at least one target, got an empty list; write targets='all-linear' or a regex")
        wanted = [(repr(name), PRESETS.get(name) or _searcher(name)) for name in names]
    chosen: dict[str, Site] = {}
    problems = []
    for name, matches in wanted:
        matched = [site for site in sites if matches(site)]
        usable = [site for site in matched if site.kind in kinds and "?" not in site.axes]
        if not usable:
            problems.append(_nothing(name, matched, sites, kinds))
        for site in usable:
            chosen.setdefault(site.path, site)
    if problems:
        raise ValueError("\n".join(problems))
    order = [s.path for s in sites]
    return {path: chosen[path] for path in sorted(chosen, key=order.index)}


def _searcher(pattern: str) -> Callable[[Site], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"target {pattern!r} is neither a preset ({', '.join(PRESETS)}) nor a regex: {error}"
        ) from error
    return lambda site: bool(compiled.search(site.path))


def _nothing(name: str, matched: list[Site], sites: Sites, kinds: Sequence[str]) -> str:
    if matched:
        found = ", ".join(sorted({f"{s.path} ({s.kind})" for s in matched})[:5])
        if any(s.kind in kinds for s in matched):
            return f"target {name} matches only {found}, used in more ways at once than axes have letters; leave it out"
        return f"target {name} matches only {found}; expected a site of kind {', '.join(kinds)}"
    if tuple(kinds) == ("attention",):
        return (
            f"target {name} matches no call of jpeft.attention, by which a model shows where its attention is; change "
            "one line of it:\n  nn.MultiHeadDotProductAttention(..., attention_fn=jpeft.attention)   in Linen or NNX\n"
            "  out = jpeft.attention(query, key, value, mask=mask)                  in a function of your own"
        )
    paths = list(dict.fromkeys(s.path for s in sites if s.kind in kinds))
    words = list(dict.fromkeys(word for path in paths for word in path.split("/")))
    known_words = [word for word in (*words, *PRESETS) if repr(word) != name]
    near = difflib.get_close_matches(name.strip("'"), known_words, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    known = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
    return f"target {name} matches no site{hint}\nthe sites are: {known}"


def first_match(patterns: Mapping[str, Any] | Sequence[tuple[str, Any]], path: str, default):
    """The value of the first pattern found in the path, else the default."""
    items = patterns.items() if isinstance(patterns, Mapping) else patterns
    return next((value for pattern, value in items if re.search(pattern, path)), default)


def refuse_unmatched(name: str, patterns: Sequence[tuple[str, Any]], paths: Sequence[str]) -> None:
    """Raise a ValueError unless each pattern of a method's field `name` is found in one of the adapted paths."""
    unmatched = [pattern for pattern, _ in patterns if not any(re.search(pattern, path) for path in paths)]
    if unmatched:
        raise ValueError(
            f"{name} has {', '.join(map(repr, unmatched[:5]))}, found in no adapted path; these are adapted: "
            f"{', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}"
        )
