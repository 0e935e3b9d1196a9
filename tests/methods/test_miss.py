"""MiSS against HF PEFT in its three modes, its count, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import assert_same_as_peft, linear, make_case, numbers

import jpeft
import jpeft.models

KEY = jax.random.key(0)
MODES = {
    "standard": ({}, {}),
    "mini": ({"mode": "mini", "mini_r": 2}, {"init_weights": "mini", "mini_r": 2}),
    "bat": ({"mode": "bat"}, {"init_weights": "bat"}),
}


@pytest.mark.parity
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(mode):
    peft = pytest.importorskip("peft")
    ours, theirs = MODES[mode]
    assert_same_as_peft(
        make_case("wide linear"),
        jpeft.MiSS(rank=4, targets="kernel", **ours),
        peft.MissConfig(r=4, target_modules=["0"], **theirs),
        lambda layer: (layer.miss_block["default"],),
        lambda w: (w.shard,),
    )


OTHERS = {
    "rows": (lambda p, x: p["w"][x], numbers(8, 12), jnp.array([1, 7, 3])),
    "transposed": (lambda p, x: x @ p["w"].T, numbers(8, 12), numbers(3, 12)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), numbers(2, 8, 12), numbers(2, 3, 8)),
    "ragged": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1])), numbers(2, 8, 12), numbers(3, 8)),
    "convolution": (lambda p, x: lax.conv(x, p["w"], (1, 1), "SAME"), numbers(12, 4, 2, 2), numbers(1, 4, 5, 5)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_every_operation_is_that_of_the_merged_weight(name, mode):
    fn, w, x = OTHERS[name]
    params = {"w": jnp.asarray(w)}
    method = jpeft.MiSS(rank=4, targets="w", **MODES[mode][0])
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    trainable = jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)
    bound = method.bind(trainable, frozen)
    merged = jpeft.merge(bound)
    np.testing.assert_allclose(jax.jit(jpeft.lift(fn))(bound, x), fn(merged, x), atol=1e-5, rtol=1e-5)
    assert not np.allclose(merged["w"], w)


def test_all_shards_of_the_inputs_share_one():
    params = {"kernel": jnp.zeros((5, 12)), "bias": jnp.zeros(5)}
    method = jpeft.MiSS(rank=4, targets="kernel")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(linear, params, jnp.ones((1, 12))))
    assert not trainable["kernel"].shard.any()
    shard = numbers(4, 5)
    trainable = jax.tree.map(lambda _: jnp.asarray(shard), trainable)
    merged = jpeft.merge(method.bind(trainable, frozen))["kernel"]
    np.testing.assert_array_equal(merged, np.tile(shard, (3, 1)).T)


def test_dropout_is_on_the_update_s_input_alone():
    """With D one, the update's output counts the kept inputs."""
    fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.ones((200, 1))}, jnp.ones((50, 200))
    method = jpeft.MiSS(rank=8, dropout=0.25)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, x))
    bound = lambda key: method.bind(jax.tree.map(jnp.ones_like, trainable), frozen, key)
    np.testing.assert_allclose(jpeft.lift(fn)(bound(None), x), 400.0)
    kept = (np.asarray(jpeft.lift(fn)(bound(KEY), x)) - 200) * 0.75
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert kept.mean() / 200 == pytest.approx(0.75, abs=0.03)


def test_only_bat_forms_a_dense_update():
    assert jpeft.MiSS().FORMS_DENSE_UPDATE == jpeft.MiSS(mode="mini", mini_r=2).FORMS_DENSE_UPDATE == ""
    assert "blocks" in jpeft.MiSS(mode="bat").FORMS_DENSE_UPDATE


LLAMA32_3B = dict(model_type="llama", hidden_size=3072, num_hidden_layers=28, num_attention_heads=24)
LLAMA32_3B |= dict(intermediate_size=8192, vocab_size=128256, num_key_value_heads=8, head_dim=128)
LLAMA32_3B |= dict(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("options", "published"),
    [({}, 7_340_032), ({"mode": "bat"}, 7_340_032), ({"mode": "mini", "mini_r": 64}, 229_376)],
)
def test_counts_on_llama_3_2_3b_equal_the_published_integers(options, published):
    apply, shapes = jpeft.models.abstract(LLAMA32_3B)
    method = jpeft.MiSS(targets=["q_proj", "v_proj"], **options)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    trainable, _ = jax.eval_shape(lambda key, p: method.init(key, p, sites), KEY, shapes)
    assert jpeft.count(trainable).trainable == published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1 and mini_r >= 1, got rank=0, mini_r=1"),
        ({"mode": "mini", "mini_r": 0}, "mini_r=0"),
        ({"mode": "maxi"}, "expected mode in .*'bat'.*, got 'maxi'"),
        ({"dropout": 1.0}, "0 <= dropout < 1, and none in mode 'bat', got dropout=1.0"),
        ({"mode": "bat", "dropout": 0.5}, "none in mode 'bat', got dropout=0.5"),
        ({"mini_r": 2}, "mini_r=2 has no effect in mode 'standard'; write mode='mini'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.MiSS(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "w: rank 4 does not divide its 6 inputs; choose a divisor"),
        ({"rank": 2, "mode": "bat"}, "w: rank 2 does not divide its 5 outputs"),
        ({"rank": 2, "mode": "mini", "mini_r": 3}, "w: mini_r 3 does not divide its 5 outputs"),
    ],
)
def test_sites_that_cannot_be_cut_evenly_are_refused(options, message):
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((6, 5))}
    with pytest.raises(ValueError, match=message):
        jpeft.MiSS(**options).init(KEY, params, jpeft.find_sites(fn, params, jnp.ones((1, 6))))
