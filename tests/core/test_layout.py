"""A Layout is the same transposes, reshapes and squeezes, not yet carried out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpeft.core.layout import Layout

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


def numbered(shape):
    return np.arange(math.prod(shape)).reshape(shape)


def factorizations(draw, size):
    """A shape of the given size: factors in any order, some of size one."""
    factors = []
    while size > 1:
        factor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        factors.append(factor)
        size //= factor
    factors += [1] * draw(st.integers(0, 2))
    return tuple(draw(st.permutations(factors)))


@st.composite
def chains(draw):
    """An array, a layout of it after random steps, and the same steps carried out by NumPy."""
    base = numbered(draw(SHAPES))
    layout, view = Layout.identity(base.shape), base
    for _ in range(draw(st.integers(0, 5))):
        step = draw(st.sampled_from(["transpose", "reshape", "squeeze"]))
        if step == "transpose":
            order = draw(st.permutations(range(view.ndim)))
            layout, view = layout.transpose(order), view.transpose(order)
        elif step == "squeeze":
            ones = [k for k, n in enumerate(view.shape) if n == 1]
            dims = draw(st.lists(st.sampled_from(ones), unique=True)) if ones else []
            layout, view = layout.squeeze([d - view.ndim for d in dims]), view.squeeze(tuple(dims))
        else:
            shape = factorizations(draw, view.size)
            new = layout.reshape(shape)
            if new is not None:
                layout, view = new, view.reshape(shape)
    return base, layout, view


@given(chains())
def test_a_layout_is_the_steps_that_made_it(chain):
    base, layout, view = chain
    assert layout.base_shape == base.shape and layout.shape == view.shape
    np.testing.assert_array_equal(layout.apply(base), view)


def boundaries(shape):
    """Products of the trailing sizes: where the axes of a contiguous array begin."""
    return set(itertools.accumulate(reversed([n for n in shape if n != 1]), lambda a, b: a * b, initial=1))


@given(chains(), st.data())
def test_a_reshape_is_refused_only_where_no_cut_of_the_axes_gives_it(chain, data):
    _, layout, view = chain
    shape = factorizations(data.draw, view.size)
    shown = [layout.size(part) for axis in layout.axes for part in axis]
    ends = sorted(boundaries(shown) | boundaries(shape))
    nested = all(b % a == 0 for a, b in itertools.pairwise(ends))
    assert (layout.reshape(shape) is not None) == nested, (layout, shape)


def test_merging_and_splitting_undo_each_other():
    start = Layout.identity((4, 6))
    merged = start.reshape((24,))
    assert merged.reshape((4, 6)) == start
    assert merged.reshape((2, 12)).axes == (((0, 0),), ((0, 1), (1, 0)))
    assert start.transpose([1, 0]).reshape((24,)).reshape((6, 4)).transpose([1, 0]) == start
    assert start.reshape((8, 3)) is not None and start.reshape((3, 8)) is None


@given(chains())
def test_a_view_axis_that_is_a_whole_base_axis_is_known_as_such(chain):
    base, layout, view = chain
    for axis in range(view.ndim):
        whole = layout.base_axis(axis)
        if whole is not None:
            assert view.shape[axis] == base.shape[whole]
            np.testing.assert_array_equal(  # taking along one is taking along the other
                np.sort(view.take([0], axis).ravel()), np.sort(base.take([0], whole).ravel())
            )


def test_an_axis_that_is_gone_from_the_base_leaves_the_others():
    layout = Layout.identity((5, 2, 3)).transpose([0, 2, 1]).squeeze([]).reshape((5, 6))
    inner = Layout(layout.cuts, layout.axes[1:]).without(0)
    base = numbered((2, 3))
    np.testing.assert_array_equal(inner.apply(base), base.T.reshape(6))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
def test_the_identity_returns_the_array_itself(shape):
    array = numbered(shape)
    assert Layout.identity(shape).apply(array) is array
