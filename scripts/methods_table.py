"""The two tables of the methods: what each one is (README.md), and what its forward costs (docs/methods.md).

    python scripts/methods_table.py            # prints both
    python scripts/methods_table.py --write    # puts them between their marks in README.md and docs/methods.md

Everything comes from the methods' own classes and from shapes: counts by `eval_shape` on the public configuration of
Llama-3.1-8B, at each method's defaults; costs from XLA's own analysis of the compiled product of 512 tokens with one
1024 x 1024 matrix, less what the product alone costs. No weights, no accelerator.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jpeft
from jpeft import models
from jpeft.core.method import Saved

ROOT = Path(__file__).parent.parent
LLAMA_8B = dict(
    model_type="llama",
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
TOKENS, WIDTH = 512, 1024
HANGS_ON = {"dense": "dense", "experts": "experts", "embedding": "embedding", "conv": "conv", "scale": "scales"}
HANGS_ON |= {"bias": "biases", "other": "other", "attention": "attention calls"}


def given_for(method, sites, params):
    """A calibration of the right shapes, for methods that start from data: counts do not depend on its numbers."""
    if not method.CALIBRATION:
        return None
    chosen = method.chosen(sites)
    if method.OBSERVES == "inputs":
        rows = lambda site: jax.random.normal(jax.random.key(1), (*_lead(site), 128, _inputs(site)))
        seen = {path: rows(site) for path, site in chosen.items()}
    else:
        leaves = dict(jpeft.core.tree.leaves_with_paths(params))
        seen = {path: leaves[path] for path in chosen}
    if method.OBSERVES == "weights":
        return seen
    return method.conclude({path: method.observe(None, x, chosen[path]) for path, x in seen.items()}, chosen)


def _lead(site):
    return jpeft.core.weight.matrix_sizes(site.shape, site.axes)[0]


def _inputs(site):
    return jpeft.core.weight.matrix_sizes(site.shape, site.axes)[1]


def reference(kind) -> str:
    """The arXiv numbers in the method's file, its own first."""
    found = re.findall(r"\b\d{4}\.\d{4,5}\b", inspect.getdoc(inspect.getmodule(kind)) or "")
    return ", ".join(dict.fromkeys(found[:1])) or "-"


def comparison() -> list[tuple[str, ...]]:
    """Rows of the README's table."""
    apply, shapes = models.abstract(LLAMA_8B)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    rows = [("method", "parameters, Llama-3.1-8B", "merges", "on NF4", "hangs on", "reference (arXiv)")]
    for name, kind in jpeft.methods().items():
        method = kind()
        rows.append(
            (
                f"`{name}`",
                _count(method, shapes, sites),
                "yes" if merges(kind) else "no",
                on_nf4(kind),
                ", ".join(HANGS_ON[k] for k in kind.KINDS),
                reference(kind),
            )
        )
    return rows


def _count(method, shapes, sites) -> str:
    def init(params):
        return method.init(jax.random.key(0), params, sites, saved_for(method, sites, params))

    try:
        trainable, _ = jax.eval_shape(init, shapes)
    except KeyError:
        return "by data"
    except ValueError as refusal:  # a model without biases, say; or a method that must be told what to train
        return "none there" if "matches" in str(refusal) else "as told"
    return f"{jpeft.count(trainable).total:,}"


def saved_for(method, sites, params):
    """What a saved adapter of LoRA's shapes gives in place of a calibration: for counts, which no number changes."""
    if not method.CALIBRATION or method.OBSERVES == "weights":
        return given_for(method, sites, params)
    like = jpeft.LoRA(rank=getattr(method, "rank", 8), targets=method.targets)
    factors, _ = like.init(jax.random.key(0), params, sites)
    chosen = method.chosen(sites)
    of = dict(jpeft.core.tree.leaves_with_paths(factors))
    start = lambda w: Saved(a=w.a, b=w.b, start_a=w.a, start_b=w.b)
    return {path: start(of[path]) if path in of else Saved() for path in chosen}


def small_case(kind):
    """The method on a model of two layers: an embedding, and in each an attention, a feed-forward layer, a scale."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    kernels = lambda seed, *names: {name: {"kernel": normal(seed + n, 64, 64)} for n, name in enumerate(names)}
    layer = lambda seed: {
        "attn": kernels(seed, "query", "key", "value", "out"),
        "mlp": kernels(seed + 4, "up_proj", "down_proj"),
        "scale": jnp.ones(64),
    }
    params = {"embedding": normal(3, 48, 64), "layers": [layer(10), layer(20)]}
    for n in range(2):
        params["layers"][n]["mlp"]["down_proj"]["bias"] = jnp.ones(64)

    def fn(p, x):
        h = p["embedding"][x]
        for layer in p["layers"]:
            attn, mlp = layer["attn"], layer["mlp"]
            q, k, v = ((h @ attn[name]["kernel"]).reshape(-1, 4, 16) for name in ("query", "key", "value"))
            h = h + jpeft.attention(q, k, v).reshape(h.shape) @ attn["out"]["kernel"]
            up = jnp.tanh(h @ mlp["up_proj"]["kernel"])
            h = (h + up @ mlp["down_proj"]["kernel"] + mlp["down_proj"]["bias"]) * layer["scale"]
        return h

    tokens = jnp.arange(8)
    small = {name: value for name, value in kind.SMALL.items() if name not in ("targets", "feedforward")}
    return kind(**small), fn, params, tokens, jpeft.find_sites(fn, params, tokens)


def merges(kind) -> bool:
    """Whether a bound Weight of the method has a dense form."""
    method, _, params, _, sites = small_case(kind)
    halves = method.init(jax.random.key(0), params, sites, given_for(method, sites, params))
    try:
        jpeft.merge(method.bind(*halves))
    except ValueError as refusal:
        if "cannot be merged" not in str(refusal):
            raise
        return False
    return True


def on_nf4(kind) -> str:
    """Whether the method goes on a packed base: "yes", "reads it densely", or "no" where it refuses."""
    method, fn, params, tokens, sites = small_case(kind)
    try:
        both = jpeft.chain(jpeft.NF4(targets="kernel", block_size=64), method)
        given = (None, given_for(method, sites, params))
        halves = both.init(jax.random.key(0), params, sites, given)
        jpeft.lift(fn)(both.bind(*halves), tokens)
    except (ValueError, TypeError):
        return "no"
    return "dense read" if method.FORMS_DENSE_UPDATE and "base" in method.FORMS_DENSE_UPDATE else "yes"


def costs() -> list[tuple[str, ...]]:
    """Rows of the table of what a forward costs."""
    fn = lambda p, x: x @ p["mlp"]["down_proj"]["kernel"]
    params = {"mlp": {"down_proj": {"kernel": jax.random.normal(jax.random.key(2), (WIDTH, WIDTH))}}}
    x = jnp.ones((TOKENS, WIDTH))
    sites = jpeft.find_sites(fn, params, x)
    analysis = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()
    plain = analysis(fn, params, x)
    rows = [("method", "FLOPs a token", "bytes a token", "dense update")]
    rows.append(
        ("the product alone", f"{plain['flops'] / TOKENS:,.0f}", f"{plain['bytes accessed'] / TOKENS:,.0f}", "")
    )
    for name, kind in jpeft.methods().items():
        method = kind()
        try:
            given = given_for(method, sites, params)
            halves = method.init(jax.random.key(0), params, sites, given)
        except ValueError:
            continue  # it hangs on something else than a matrix
        cost = analysis(lambda t, f, x, m=method: jpeft.lift(fn)(m.bind(t, f), x), *halves, x)
        more = lambda what, cost=cost: f"{(cost[what] - plain[what]) / TOKENS:+,.0f}"
        rows.append((f"`{name}`", more("flops"), more("bytes accessed"), method.FORMS_DENSE_UPDATE or "no"))
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def put(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- end of mark -->`."""
    before, after = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    content = page.read_text(encoding="utf-8")
    start, end = content.index(before) + len(before), content.index(after)
    page.write_text(content[:start] + text + content[end:], encoding="utf-8")


if __name__ == "__main__":
    tables = {"methods": (ROOT / "README.md", comparison), "costs": (ROOT / "docs" / "methods.md", costs)}
    for mark, (page, make) in tables.items():
        text = markdown(make())
        print(text, "\n")
        if "--write" in sys.argv:
            put(page, mark, text)
