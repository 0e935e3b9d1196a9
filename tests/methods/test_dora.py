"""DoRA against HF PEFT and against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_named_as_peft, assert_same_as_peft, low_rank_tensors, make_case, numbers

import jpeft
from jpeft.methods.dora import norm


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft = pytest.importorskip("peft")
    case = make_case(name)
    assert_same_as_peft(
        case,
        jpeft.DoRA(rank=3, alpha=5, targets="kernel"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True),
        lambda layer: (*low_rank_tensors(layer), layer.lora_magnitude_vector["default"].weight),
        lambda w: (*case.factors(w.a, w.b), case.vector(w.magnitude)),
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution"])
@pytest.mark.filterwarnings("ignore")
def test_its_tensors_have_peft_s_names_and_shapes(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True)
    assert_named_as_peft(make_case(name), jpeft.DoRA(rank=3, alpha=5, targets="kernel"), config)


def test_the_norm_is_that_of_the_updated_matrix_in_float64():
    w, a, b = numbers(2, 9, 7), numbers(2, 9, 3), numbers(2, 3, 7)
    wide = [x.astype(np.float64) for x in (w, a, b)]
    expected = np.linalg.norm(wide[0] + 0.7 * wide[1] @ wide[2], axis=-2)
    np.testing.assert_allclose(norm(*map(jnp.asarray, (w, a, b)), 0.7), expected, rtol=1e-5)


def test_counts_are_lora_and_one_number_per_output():
    fn = lambda p, x: x @ p["kernel"]
    params, x = {"kernel": jnp.ones((6, 5))}, jnp.ones((2, 6))
    method = jpeft.DoRA(rank=2)
    trainable, _ = method.init(jax.random.key(0), params, jpeft.find_sites(fn, params, x))
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 2 * (6 + 5) + 5


def test_what_a_weight_cannot_do_is_refused_with_the_way_out():
    rows = jnp.array([1, 3])
    forward = lambda p, x: p["kernel"][x]
    back = lambda p, x: p["kernel"].T[x]
    params = {"kernel": jnp.asarray(numbers(4, 5))}
    method = jpeft.DoRA(rank=2, targets="kernel")
    halves = method.init(jax.random.key(0), params, jpeft.find_sites(forward, params, rows))
    with pytest.raises(jpeft.DensifyError, match="'kernel' holds a Decomposed"):
        jpeft.lift(back)(method.bind(*halves), rows)
