"""AdapterFusion against the `adapters` package: what is fused, what trains, what is saved, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters_golden import assert_same_as_adapters, bottleneck
from small_models import make_model
from test_houlsby import BERT_BASE, KEY, count

import jpeft
from jpeft.train import adapter


def test_the_same_numbers_give_what_the_adapters_package_gives():
    def fields(get):
        query, key, value = (get(f"adapter_fusion_layer.a,b.{n}.weight").mT for n in ("query", "key", "value"))
        return dict(query=query, key=key, value=value, query_bias=get("adapter_fusion_layer.a,b.query.bias"))

    def given(get):
        a, b = (bottleneck(get, name) for name in "ab")
        return {name: np.stack([a[name], b[name]], 1) for name in a}

    method = jpeft.AdapterFusion(reduction=4, query_bias=True)
    assert_same_as_adapters("fusion", method, fields, given_of=given)


def trained(model, method, seeds):
    """Trees bound by `method`, with numbers that no start has."""
    halves = [method.init(jax.random.key(seed), model.params, model.sites) for seed in seeds]
    return [method.bind(jax.tree.map(lambda x: x + 0.05, t), f) for t, f in halves]


def test_with_one_adapter_it_starts_as_that_adapter():
    model = make_model("linen-scanned")
    houlsby = jpeft.Houlsby(bottleneck=4, init_std=0.3, activation="relu", ln_before=True)
    (bound,) = trained(model, houlsby, [0])
    fusion = jpeft.AdapterFusion(targets=houlsby.targets, num_adapters=1, bottleneck=4, ln_before=True)
    trainable, frozen = fusion.init(KEY, model.params, model.sites, fusion.calibration_of(bound))
    run = jax.jit(lambda bound: jpeft.lift(model.apply)(bound, *model.inputs))
    np.testing.assert_allclose(run(fusion.bind(trainable, frozen)), run(bound), atol=1e-5)


def test_the_adapters_are_frozen_and_saved_and_the_attention_trains(tmp_path):
    model = make_model("nnx")
    fusion = jpeft.AdapterFusion(num_adapters=3, bottleneck=5)
    given = fusion.calibration_of(*trained(model, jpeft.Pfeiffer(bottleneck=5), range(3)))
    trainable, frozen = fusion.init(KEY, model.params, model.sites, given)
    w = trainable["layers"]["down"]["bias"]
    assert w.query.shape == w.key.shape == w.value.shape == (3, 24, 24) and w.down is None
    assert np.array_equal(w.value[1], np.eye(24)) and not np.allclose(w.query[0], w.query[1])
    kept = frozen["layers"]["down"]["bias"]
    assert kept.down.shape == (3, 3, 24, 5) and kept.up_bias.shape == (3, 3, 24)
    assert np.array_equal(kept.down, given["layers/down/bias"]["down"])
    mark = adapter.fingerprint(model.params)
    key = dict(base="here", base_fingerprint=mark, seed=0)
    adapter.save_adapter(tmp_path, fusion, trainable, frozen, **key)
    _, _, loaded = adapter.load_adapter(tmp_path, model.params, model.sites, jpeft.methods())
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(frozen)))


def test_the_attention_follows_the_scores():
    fn = lambda p, x: x @ p["down"]
    params, x = {"down": jnp.eye(4)}, jnp.ones((1, 4))
    fusion = jpeft.AdapterFusion(bottleneck=2)
    trainable, frozen = fusion.init(KEY, params, jpeft.find_sites(fn, params, x))
    w = frozen["down"]
    ends = jnp.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    frozen = {"down": w.replace(up=0 * w.up, up_bias=ends)}
    for chosen in (0, 1):  # the key picks one entry, on which only one of the two adapters has something
        key = jnp.zeros((4, 4)).at[chosen, 0].set(50.0)
        moved = {"down": trainable["down"].replace(query=jnp.eye(4), key=key, value=2 * jnp.eye(4))}
        np.testing.assert_allclose(jpeft.lift(fn)(fusion.bind(moved, frozen), x), x + 2 * ends[chosen], atol=1e-6)


def test_the_penalty_holds_the_values_near_the_identity():
    model = make_model("linen-unrolled")
    fusion = jpeft.AdapterFusion(bottleneck=5, regularization=0.5)
    trainable, _ = fusion.init(KEY, model.params, model.sites)
    assert float(fusion.penalty(trainable)) == 0
    w = trainable["layer_1"]["down"]["bias"]
    trainable["layer_1"]["down"]["bias"] = w.replace(value=w.value + 0.1)
    np.testing.assert_allclose(fusion.penalty(trainable), 0.5 * 0.01 * 24 * 24, rtol=1e-5)


def test_counts_on_bert():
    assert count(jpeft.AdapterFusion(num_adapters=14), BERT_BASE) == 12 * 3 * 768**2
    assert count(jpeft.AdapterFusion(query_bias=True), BERT_BASE) == 12 * (3 * 768**2 + 768)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_adapters": 0}, "expected a whole num_adapters >= 1, got num_adapters=0"),
        ({"regularization": -1.0}, "expected regularization >= 0"),
    ],
)
def test_what_cannot_be_fused_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.AdapterFusion(**fields)


PFEIFFER = jpeft.Pfeiffer(bottleneck=5)


@pytest.mark.parametrize(
    ("fields", "method", "seeds", "message"),
    [
        (
            {"bottleneck": 5},
            PFEIFFER,
            [0],
            "expected 2 trees with an adapter each at the same places, got them at layer_0",
        ),
        ({"bottleneck": 5}, jpeft.LoRA(rank=2), [0, 1], "got them at nowhere; nowhere"),
        ({"bottleneck": 5, "activation": "gelu"}, PFEIFFER, [0, 1], "with activation='gelu', got relu"),
        ({"bottleneck": 4}, PFEIFFER, [0, 1], r"layer_0/down/bias: the trained .* down \(2, 24, 5\) for \(2, 24, 4\)"),
        ({"bottleneck": 5, "ln_after": True}, PFEIFFER, [0, 1], r"after None for \(2, 2, 24\)"),
        ({"bottleneck": 5, "targets": "layer_1/down"}, PFEIFFER, [0, 1], "stand at layer_0/down/bias, .* mean layer_1"),
        ({"bottleneck": 5}, jpeft.chain(PFEIFFER, PFEIFFER), [0, 1], "expected one adapter, got one on another"),
    ],
)
def test_adapters_that_the_fields_do_not_mean_are_refused(fields, method, seeds, message):
    model, fusion = make_model("linen-unrolled"), jpeft.AdapterFusion(**fields)
    with pytest.raises(ValueError, match=message):
        fusion.init(KEY, model.params, model.sites, fusion.calibration_of(*trained(model, method, seeds)))
