"""Orthogonal transforms, and the products by blocks that they are made of."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jpeft.core.layout import Layout
from jpeft.core.ops import RaggedDot
from jpeft.core.rotation import Rotation, cayley, skew


def numbers(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_the_skew_matrix_has_its_vector_above_the_diagonal():
    q = np.asarray(skew(jnp.arange(1.0, 4.0), 3))
    np.testing.assert_array_equal(q, [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]])


def test_cayley_gives_rotations_in_float64():
    q = np.float64(skew(jnp.asarray(numbers(2, 6)), 4))
    r = np.eye(4) + np.asarray(cayley(jnp.asarray(q, jnp.float32)))
    np.testing.assert_allclose(r, (np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q), atol=1e-5)
    np.testing.assert_allclose(r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(4), r.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(r), 1, atol=1e-5)


@pytest.mark.parametrize("sizes", [[2, 1, 3], [2, 0, 1]], ids=["all rows", "rows of no group"])
def test_grouped_products_by_blocks(sizes):
    h, m = jnp.asarray(numbers(6, 2, 4)), jnp.asarray(numbers(3, 2, 4, 5))
    numbers_ = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
    params = {"ragged_dot_dimension_numbers": numbers_, "precision": None}
    layout = Layout.identity((3, 8, 7))
    op = RaggedDot(layout, "bio", jnp.float32, params=params, sizes=jnp.array(sizes), rows=6)
    expected = np.zeros((6, 2, 5), np.float32)
    group = np.repeat(np.arange(3), sizes)
    expected[: len(group)] = np.einsum("rnk,rnko->rno", h[: len(group)], np.asarray(m)[group])
    np.testing.assert_allclose(op.mix_blocks(h, m), expected, atol=1e-5)


def test_a_rotation_without_a_turn_says_so():
    with pytest.raises(TypeError, match="Bare defines no turned"):
        type("Bare", (Rotation,), {})().turned(jnp.ones((2, 3)), None, False)
