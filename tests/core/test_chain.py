"""What is kept of a chain when one of its methods becomes another after training."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_model

import jpeft
from jpeft.core.method import Method
from jpeft.core.tree import map_with_paths
from jpeft.core.weight import Weight, apply, dense, static, weight


@weight
class Scaled(Weight):
    """The base times a scale (*stack)."""

    base: Any
    scale: Any
    axes: str = static()
    FIELDS = {"scale": ""}
    TRAINABLE = frozenset({"scale"})
    SLICEABLE = "io"

    def apply(self, op, x):
        return apply(op, x, self.base) * self.scale

    def dense(self):
        return dense(self.base) * self.scale.reshape(self.scale.shape + (1,) * len(self.axes))


@weight
class Split(Scaled):
    """A scale in two terms: it has one array more."""

    scale: Any
    more: Any = None
    axes: str = static()
    FIELDS = {"scale": "", "more": ""}
    TRAINABLE = frozenset({"scale", "more"})

    def apply(self, op, x):
        return apply(op, x, self.base) * (self.scale + self.more)


@dataclass(frozen=True)
class Scaling(Method):
    split: bool = True

    def wrap(self, key, leaf, site):
        ones = jnp.ones([n for n, c in zip(site.shape, site.axes, strict=True) if c == "s"])
        axes = site.axes.lstrip("s")
        return Split(leaf, ones, ones / 4, axes=axes) if self.split else Scaled(leaf, ones, axes=axes)

    def after_training(self, trainable, frozen):
        def whole(_, w):
            if not isinstance(w, Split):
                return w
            return Scaled(w.base, None if w.scale is None else w.scale + w.more, axes=w.axes)

        return replace(self, split=False), map_with_paths(whole, trainable), map_with_paths(whole, frozen)


CHAINS = {
    "wrapped": lambda: (Scaling(targets="down"), jpeft.LoRA(rank=2)),
    "beside": lambda: (Scaling(targets="down"), jpeft.LoRA(rank=2, targets="up"), jpeft.BitFit()),
    "within": lambda: (jpeft.Int8(), Scaling(targets="down"), jpeft.LoRA(rank=2), jpeft.IA3(targets="up|down")),
    "shared": lambda: (Scaling(targets="down"), jpeft.VeRA(rank=2)),
    "two": lambda: (Scaling(targets="down"), Scaling(targets="down")),
    "last": lambda: (jpeft.LoRA(rank=2), Scaling(targets="down")),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_others_stand_on_what_has_become_of_it(name):
    model = make_model("linen-scanned")
    chain = jpeft.chain(*CHAINS[name]())
    trainable, frozen = chain.init(jax.random.key(0), model.params, model.sites)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), trainable)
    kept = chain.after_training(trainable, frozen)
    method, made, rest = kept
    assert any(isinstance(m, Scaling) and not m.split for m in method.methods)
    run = lambda method, *halves: jpeft.lift(model.apply)(method.bind(*halves), *model.inputs)
    np.testing.assert_allclose(run(method, made, rest), run(chain, trainable, frozen), atol=1e-5)
    identities = lambda tree: {id(x) for x in jax.tree.leaves(tree)}
    arrays = jax.tree.leaves((made, rest))
    assert len(arrays) == len(identities(arrays))
    assert identities(arrays) == identities(method.bind(made, rest))
    again = jax.eval_shape(lambda key, params: method.init(key, params, model.sites), jax.random.key(0), model.params)
    assert jax.tree.structure(again) == jax.tree.structure((made, rest))
