"""Update: one dense update added to the base in every operation, and kept out of the backward pass's memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jpeft
from jpeft.core.update import Update, from_channels_first
from jpeft.core.weight import static, to_matrix, weight


@weight
class Outer(Update):
    """`base + u vᵀ`."""

    base: Any
    u: Any
    v: Any
    axes: str = static()
    FIELDS = {"u": "i", "v": "o"}
    TRAINABLE = frozenset({"u", "v"})

    def matrix(self):
        return self.u.astype(self.wide)[..., :, None] * self.v.astype(self.wide)[..., None, :]


def grouped(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=2)


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


CASES = {
    "product": (lambda p, x: x @ p["w"], numbers(6, 5), "io", numbers(3, 6)),
    "transposed": (lambda p, x: x @ p["w"].T, numbers(6, 5), "io", numbers(3, 5)),
    "several axes": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), numbers(6, 2, 3), "ioo", numbers(3, 6)),
    "rows": (lambda p, x: p["w"][x], numbers(6, 5), "io", jnp.array([[1, 5], [0, 1]])),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), numbers(2, 6, 5), "bio", numbers(2, 3, 6)),
    "grouped convolution": (grouped, numbers(3, 3, 2, 6), "iiio", numbers(2, 4, 4, 4)),
    "layers": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
        numbers(3, 5, 5),
        "io",
        numbers(2, 5),
    ),
}


def bound(w, axes, dtype=jnp.float32):
    lead = [n for n, c in zip(w.shape, axes.rjust(w.ndim, "s"), strict=True) if c in "sb"]
    size = lambda letter: int(
        np.prod([n for n, c in zip(w.shape, axes.rjust(w.ndim, "s"), strict=True) if c == letter])
    )
    return {"w": Outer(w, numbers(*lead, size("i")).astype(dtype), numbers(*lead, size("o")).astype(dtype), axes=axes)}


@pytest.mark.parametrize("name", CASES)
def test_every_operation_and_its_gradient_are_those_of_the_merged_weight(name):
    fn, w, axes, x = CASES[name]
    tree = bound(w, axes)
    out, grad = jax.jit(jax.value_and_grad(lambda t: jnp.sin(jpeft.lift(fn)(t, x)).sum()))(tree)
    expected, dense_grad = jax.jit(jax.value_and_grad(lambda t: jnp.sin(fn(jpeft.merge(t), x)).sum()))(tree)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(dense_grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_dtypes_follow_the_activation_and_the_base_and_the_update_is_formed_in_float32():
    fn = lambda p, x: x @ p["w"]
    tree = bound(numbers(6, 5).astype(jnp.bfloat16), "io", jnp.bfloat16)
    assert tree["w"].matrix().dtype == jnp.float32
    assert jpeft.lift(fn)(tree, jnp.ones((2, 6), jnp.bfloat16)).dtype == jpeft.merge(tree)["w"].dtype == jnp.bfloat16


def test_the_backward_pass_keeps_the_base_and_no_dense_update():
    weight = bound(numbers(30, 20), "io")["w"]

    def run(x, u, v):
        return jpeft.lift(lambda p, x: x @ p["w"])({"w": weight.replace(u=u, v=v)}, x)

    _, pull = jax.vjp(run, numbers(2, 30), weight.u, weight.v)
    kept = [x for x in jax.tree.leaves(pull) if x.size == 600]
    assert len(kept) == 1 and np.array_equal(kept[0], weight.base)


@pytest.mark.parametrize(("order", "axes"), [("OIHW", "oiii"), ("HWIO", "iiio"), ("OHWI", "oiii")])
def test_inputs_of_a_convolution_go_from_channels_first_to_the_leaf_s_order(order, axes):
    torch = numbers(5, 4, 2, 3)  # OIHW
    leaf = jnp.transpose(torch, ["OIHW".index(letter) for letter in order])
    ordered = from_channels_first(torch.reshape(5, 24).T, Outer(leaf, None, None, axes=axes), order.index("I") - 4)
    np.testing.assert_array_equal(ordered, to_matrix(leaf, axes))


def test_a_subclass_without_a_matrix_is_told_so():
    with pytest.raises(TypeError, match="Update defines no matrix"):
        Update().matrix()
