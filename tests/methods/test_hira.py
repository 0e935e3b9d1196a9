"""HiRA against HF PEFT and against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import assert_same_as_peft, embedding, make_case, numbers

import jpeft
from jpeft.methods.hira import Hadamard

KEY = jax.random.key(0)


def tensors(layer):
    names = ("hira_embedding_A", "hira_embedding_B") if "default" in layer.hira_embedding_A else ("hira_A", "hira_B")
    return tuple(getattr(layer, name)["default"] for name in names)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution", "strided convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft = pytest.importorskip("peft")
    case = make_case(name)
    method, config = jpeft.HiRA(rank=3, targets="kernel"), peft.HiraConfig(r=3, target_modules=["0"])
    assert_same_as_peft(case, method, config, tensors, lambda w: case.factors(w.a, w.b))


def test_the_update_is_the_weights_times_the_product_in_float64():
    w, a, b, x = numbers(6, 2, 4), numbers(6, 3), numbers(3, 8), numbers(5, 6)
    fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])
    tree = {"w": Hadamard(*map(jnp.asarray, (w, a, b)), axes="ioo")}
    factor = 1 + a.astype(np.float64) @ b.astype(np.float64)
    expected = np.einsum("bd,dhk->bhk", x.astype(np.float64), w * factor.reshape(6, 2, 4))
    np.testing.assert_allclose(jpeft.lift(fn)(tree, x), expected, atol=1e-5, rtol=1e-5)


def test_a_grouped_convolution_is_scaled_entry_by_entry():
    w, x = numbers(3, 2, 6), numbers(1, 7, 4)
    dims = ("NWC", "WIO", "NWC")
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=dims, feature_group_count=2)
    tree = {"w": Hadamard(jnp.asarray(w), jnp.asarray(numbers(6, 2)), jnp.asarray(numbers(2, 6)), axes="iio")}
    np.testing.assert_allclose(jpeft.lift(fn)(tree, x), fn(jpeft.merge(tree), x), atol=1e-5)


def test_a_lookup_scales_the_rows_that_it_finds_and_no_others():
    table = jnp.asarray(numbers(40, 30))
    tree = {"kernel": Hadamard(table, jnp.asarray(numbers(40, 2)), jnp.asarray(numbers(2, 30)), axes="io")}
    rows = jnp.array([3, 7])
    text = jax.jit(jpeft.lift(embedding)).lower(tree, rows).compile().as_text()
    assert "f32[40,30]{1,0} dot(" not in text and "f32[40,30]{1,0} multiply(" not in text
    np.testing.assert_allclose(jpeft.lift(embedding)(tree, rows), jpeft.merge(tree)["kernel"][rows], rtol=1e-5)


def test_the_base_of_another_weight_is_read_as_it_stands():
    """On a LoRA, HiRA scales what the LoRA makes of the weights."""
    fn, x = lambda p, x: x @ p["w"], jnp.asarray(numbers(2, 6))
    params = {"w": jnp.asarray(numbers(6, 5))}
    both = jpeft.chain(jpeft.LoRA(rank=2), jpeft.HiRA(rank=2))
    halves = both.init(KEY, params, jpeft.find_sites(fn, params, x))
    lora, hira = jax.tree.map(lambda t: t + 0.5, halves[0])
    bound = both.bind((lora, hira), halves[1])
    below = params["w"] + 4.0 * lora["w"].a @ lora["w"].b
    np.testing.assert_allclose(jpeft.merge(bound)["w"], below * (1 + hira["w"].a @ hira["w"].b), rtol=1e-5)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), x @ jpeft.merge(bound)["w"], rtol=1e-4)


def test_starts():
    fn, big = lambda p, x: x @ p["w"], {"w": jnp.zeros((100, 80))}
    trainable, _ = jpeft.HiRA(rank=40).init(KEY, big, jpeft.find_sites(fn, big, jnp.zeros((1, 100))))
    assert 0.099 < np.abs(trainable["w"].a).max() <= 0.1 and not trainable["w"].b.any()
    table = {"kernel": jnp.zeros((50, 40))}
    sites = jpeft.find_sites(embedding, table, jnp.zeros((2,), int))
    trainable, _ = jpeft.HiRA(rank=20, targets="kernel").init(KEY, table, sites)
    assert not trainable["kernel"].a.any() and float(trainable["kernel"].b.std()) == pytest.approx(1, rel=0.15)


def test_refusals():
    with pytest.raises(ValueError, match="expected rank >= 1, got rank=0"):
        jpeft.HiRA(rank=0)
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match=r"w: rank 5 is above min\(in, out\) = min\(6, 4\)"):
        jpeft.HiRA(rank=5).init(KEY, params, jpeft.find_sites(fn, params, jnp.ones((1, 6))))
