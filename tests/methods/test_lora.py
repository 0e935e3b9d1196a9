"""LoRA against HF PEFT, a closed form and the published counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from peft_cases import (
    assert_named_as_peft,
    assert_same_as_peft,
    convolution,
    embedding,
    low_rank_tensors,
    make_case,
    numbers,
)
from small_models import make_model

import jpeft
import jpeft.models

KEY = jax.random.key(0)


def start(fn, params, *inputs, **options):
    """`(method, trainable, frozen)` of LoRA on every site that it can adapt."""
    method = jpeft.LoRA(**{"rank": 2, "targets": lambda site: site.kind in jpeft.LoRA.KINDS, **options})
    sites = jpeft.find_sites(fn, params, *inputs)
    return method, *jax.jit(lambda k, p: method.init(k, p, sites))(KEY, params)


def filled(trainable, seed=0):
    """The same tree with random numbers of the same dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype), trainable)


# ---- HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("rslora", [False, True], ids=["standard", "rslora"])
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution", "strided convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name, rslora):
    peft = pytest.importorskip("peft")
    case = make_case(name)
    assert_same_as_peft(
        case,
        jpeft.LoRA(rank=3, alpha=5.0, scaling="rslora" if rslora else "standard", targets="kernel"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_rslora=rslora),
        low_rank_tensors,
        lambda w: case.factors(w.a, w.b),
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution"])
@pytest.mark.filterwarnings("ignore")
def test_its_tensors_have_peft_s_names_and_shapes(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_rslora=True)
    assert_named_as_peft(make_case(name), jpeft.LoRA(rank=3, alpha=5, scaling="rslora", targets="kernel"), config)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_lora_plus_trains_as_peft_s_optimizer_does():
    torch, peft, case = pytest.importorskip("torch"), pytest.importorskip("peft"), make_case("linear")
    from peft.optimizers import create_loraplus_optimizer

    model = peft.get_peft_model(torch.nn.Sequential(case.module), peft.LoraConfig(r=3, target_modules=["0"]))
    options = dict(lr=0.01, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    method, trainable, frozen = start(case.fn, case.params, case.x, rank=3, alpha=8.0, targets="kernel")
    tensors = low_rank_tensors(model.base_model.model[0])
    for parameter, value in zip(tensors, case.factors(trainable["kernel"].a, trainable["kernel"].b), strict=True):
        parameter.data = torch.from_numpy(np.array(value))
    tx = jpeft.lora_plus(optax.adamw(0.01, weight_decay=0.1), ratio=8.0)
    state = tx.init(trainable)
    step = jax.grad(lambda t: jnp.sin(jpeft.lift(case.fn)(method.bind(t, frozen), case.x)).sum())
    for _ in range(3):
        theirs.zero_grad()
        torch.sin(model(torch.from_numpy(case.x))).sum().backward()
        theirs.step()
        updates, state = tx.update(step(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    for parameter, value in zip(tensors, case.factors(trainable["kernel"].a, trainable["kernel"].b), strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, atol=1e-5)


# ---- closed form ----


def test_the_update_is_the_scaled_product_in_float64():
    w, x = numbers(6, 2, 4), numbers(3, 6)
    fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])
    method, trainable, frozen = start(fn, {"w": w}, x, rank=3, alpha=12)
    trainable = filled(trainable)
    a, b = (np.asarray(v, np.float64) for v in (trainable["w"].a, trainable["w"].b))
    merged = np.float64(w) + 4.0 * (a @ b).reshape(6, 2, 4)
    bound = method.bind(trainable, frozen)
    np.testing.assert_allclose(jpeft.merge(bound)["w"], merged, atol=1e-5)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, x), np.einsum("bd,dhk->bhk", np.float64(x), merged), atol=1e-4)


def test_patterns_give_paths_their_own_rank_and_alpha():
    model = make_model("linen-unrolled")
    method = jpeft.LoRA(
        rank=2, alpha=6, rank_pattern={"layer_1/up": 4, "up": 3}, alpha_pattern={"layer_0": 8}, targets=["up", "down"]
    )
    bound = jax.eval_shape(lambda k, p: method.bind(*method.init(k, p, model.sites)), KEY, model.params)
    got = {
        n: (bound[f"layer_{n}"]["up"]["kernel"].a.shape[-1], bound[f"layer_{n}"]["up"]["kernel"].scale)
        for n in (0, 1, 2)
    }
    assert got == {0: (3, 8 / 3), 1: (4, 6 / 4), 2: (3, 6 / 3)}
    assert bound["layer_2"]["down"]["kernel"].scale == 3
    assert jpeft.LoRA(rank=4, alpha=8, scaling="rslora").scale_of("any") == 4.0
    assert jpeft.LoRA(rank_pattern={"up": 3}) == jpeft.LoRA(rank_pattern=[["up", 3]])


# ---- starts ----


def test_a_starts_kaiming_uniform_and_b_at_zero():
    fn = lambda p, x: x @ p["w"]
    _, trainable, _ = start(fn, {"w": jnp.zeros((100, 80))}, jnp.zeros((1, 100)), rank=40)
    a, b = trainable["w"].a, trainable["w"].b
    bound = math.sqrt(6 / ((1 + 5) * 100))  # a = √5
    assert bound == pytest.approx(0.1)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    assert abs(float(a.mean())) < 4 * bound / math.sqrt(3 * a.size)
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not b.any()
    _, trainable, _ = start(fn, {"w": jnp.zeros((100, 80))}, jnp.zeros((1, 100)), rank=40, init_a="gaussian")
    assert float(trainable["w"].a.std()) == pytest.approx(1 / 40, rel=0.1)


def test_an_embedding_starts_with_a_at_zero():
    _, trainable, _ = start(embedding, {"kernel": jnp.zeros((50, 40))}, jnp.zeros((2,), int), rank=20)
    assert not trainable["kernel"].a.any()
    assert float(trainable["kernel"].b.std()) == pytest.approx(1, rel=0.15)


def test_a_convolution_s_fan_in_is_window_times_channels():
    params = {"kernel": jnp.zeros((6, 4, 5, 5)), "bias": jnp.zeros(6)}
    fn = functools.partial(convolution, window_strides=(1, 1))
    _, trainable, _ = start(fn, params, jnp.zeros((1, 4, 8, 8)), rank=6)
    assert trainable["kernel"].a.shape == (100, 6)
    assert 0.09 < np.abs(trainable["kernel"].a).max() <= 0.1


def test_the_orthogonal_start_is_a_no_op_with_both_factors_nonzero():
    fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    _, trainable, _ = start(fn, {"w": jnp.zeros((3, 8, 8))}, jnp.zeros((1, 8)), rank=4, init_a="orthogonal")
    a, b = trainable["w"].a, trainable["w"].b
    assert np.abs(a).min(axis=(1, 2)).all() and np.abs(b).max() > 0
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)
    assert not np.allclose(a[0], a[1]), "each layer starts from its own numbers"


# ---- dropout ----


def test_dropout_needs_a_key_scales_what_it_keeps_and_is_the_same_for_the_same_key():
    fn = lambda p, x: x @ p["w"]
    x = jnp.ones((400, 50))
    method, trainable, frozen = start(fn, {"w": jnp.zeros((50, 1))}, x, rank=1, alpha=1, dropout=0.2)
    # with A one input each and B one, the output counts the kept inputs
    trainable = {"w": trainable["w"].replace(a=jnp.ones((50, 1)), b=jnp.ones((1, 1)))}
    run = jax.jit(lambda key: jpeft.lift(fn)(method.bind(trainable, frozen, key), x))
    off = jpeft.lift(fn)(method.bind(trainable, frozen), x)
    np.testing.assert_allclose(off, 50.0)
    one, again, other = run(KEY), run(KEY), run(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    kept = np.asarray(one) * 0.8
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert kept.mean() / 50 == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / 20_000))
    assert jnp.array_equal(jpeft.merge(method.bind(trainable, frozen, KEY))["w"], jnp.ones((50, 1)))


@pytest.mark.parametrize("way", ["scan", "unrolled"])
def test_every_layer_drops_its_own_inputs(way):
    x = jnp.ones((1, 64))

    def fn(p, x):
        each = lambda _, w: (None, x @ w)
        return lax.scan(each, None, p["w"])[1] if way == "scan" else jnp.stack([x @ p["w"][n] for n in range(3)])

    method, trainable, frozen = start(fn, {"w": jnp.zeros((3, 64, 1))}, x, rank=1, alpha=1, dropout=0.5)
    weights = 2.0 ** jnp.arange(64) % 1009  # tells masks apart
    a = jnp.broadcast_to(weights[:, None], (3, 64, 1))
    trainable = {"w": trainable["w"].replace(a=a, b=jnp.ones((3, 1, 1)))}
    out = jpeft.lift(fn)(method.bind(trainable, frozen, KEY), x).ravel()
    assert len(set(np.asarray(out).tolist())) == 3


def test_row_numbers_are_not_dropped():
    tokens = jnp.arange(7)
    method, trainable, frozen = start(embedding, {"kernel": jnp.zeros((7, 4))}, tokens, dropout=0.9)
    trainable = filled(trainable)
    off, on = (jpeft.lift(embedding)(method.bind(trainable, frozen, key), tokens) for key in (None, KEY))
    np.testing.assert_array_equal(off, on)


# ---- what trains, and in which dtype ----


def test_frozen_a_leaves_b_alone_to_train():
    fn = lambda p, x: x @ p["w"]
    method, trainable, frozen = start(fn, {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)), freeze_a=True)
    assert trainable["w"].a is None and frozen["w"].a.shape == (4, 2) and trainable["w"].b.shape == (2, 3)
    assert jpeft.count(method.bind(trainable, frozen)).trainable == 6


def test_a_frozen_a_is_written_with_b():
    fn = lambda p, x: x @ p["w"]
    method, trainable, frozen = start(fn, {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)), freeze_a=True)
    plain, whole = method.exported(trainable, frozen)
    assert plain == jpeft.LoRA(rank=2, targets=method.targets)
    assert jnp.array_equal(whole["w"].a, frozen["w"].a) and whole["w"].b is trainable["w"].b
    _, rest = plain.init(KEY, {"w": jnp.ones((4, 3))}, jpeft.find_sites(fn, {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))))
    assert jpeft.count(plain.bind(whole, rest)).trainable == 14
    assert plain.exported(whole, rest) == (plain, whole)


def test_lora_plus_scales_b_alone_in_every_method_of_a_chain():
    model = make_model("linen-scanned")
    method = jpeft.chain(jpeft.LoRA(rank=2, modules_to_save=("norm",)), jpeft.DoRA(rank=2))
    trainable, frozen = method.init(KEY, model.params, model.sites)
    tx = jpeft.lora_plus(optax.sgd(1.0), ratio=4.0)
    updates, _ = jax.jit(lambda t: tx.update(jax.tree.map(jnp.ones_like, t), tx.init(t)))(trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(trainable)
    scales = {
        (jax.tree_util.keystr(p)[-2:], float(u.ravel()[0])) for p, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {(name, scale) for name, scale in scales if name in (".a", ".b")} == {(".a", -1.0), (".b", -4.0)}
    assert all(scale == -1.0 for name, scale in scales if name != ".b")
    with pytest.raises(ValueError, match="a ratio > 0 of B's learning rate to A's, got ratio=0"):
        jpeft.lora_plus(optax.sgd(1.0), ratio=0)


def test_parameters_keep_their_dtype_and_compute_follows_the_activation():
    fn = lambda p, x: x @ p["w"]
    w, x = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16)
    method, trainable, frozen = start(fn, {"w": w}, x)
    assert trainable["w"].a.dtype == trainable["w"].b.dtype == jnp.float32
    bound = method.bind(filled(trainable), frozen)
    assert jpeft.lift(fn)(bound, x).dtype == jpeft.merge(bound)["w"].dtype == jnp.bfloat16
    text = str(jax.make_jaxpr(jpeft.lift(fn))(bound, x))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all("bf16" in line for line in products)
    for dtype in ("bfloat16", jnp.bfloat16):
        _, trainable, _ = start(fn, {"w": w}, x, dtype=dtype)
        assert trainable["w"].a.dtype == jnp.bfloat16


def test_experts_have_factors_of_their_own():
    sizes = jnp.array([2, 1, 3])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)
    w, x = numbers(3, 4, 5), numbers(6, 4)
    method, trainable, frozen = start(fn, {"w": w}, x, alpha=2)
    assert trainable["w"].a.shape == (3, 4, 2) and trainable["w"].b.shape == (3, 2, 5)
    trainable = filled(trainable)
    out = jpeft.lift(fn)(method.bind(trainable, frozen), x)
    group = np.repeat(np.arange(3), sizes)
    dense = w + np.asarray(trainable["w"].a) @ np.asarray(trainable["w"].b)
    np.testing.assert_allclose(out, np.einsum("bi,bio->bo", x, dense[group]), atol=1e-5)


# ---- published counts ----

LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)
LLAMA3_8B = LLAMA2_7B | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
LLAMA3_70B = LLAMA3_8B | dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)
QWEN3_8B = LLAMA3_8B | dict(
    model_type="qwen3", num_hidden_layers=36, intermediate_size=12288, vocab_size=151936, head_dim=128
)
PUBLISHED = {
    "Llama-2-7B": (LLAMA2_7B, 4_194_304, 39_976_960),
    "Llama-3.1-8B": (LLAMA3_8B, 3_407_872, 41_943_040),
    "Llama-3.1-70B": (LLAMA3_70B, 16_384_000, 207_093_760),
    "Qwen3-8B": (QWEN3_8B, 3_833_856, 43_646_976),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_on_public_models_equal_the_published_integers(name):
    config, query_value, all_seven = PUBLISHED[name]
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))

    def trainable(method):
        bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
        return jpeft.count(bound).trainable

    assert trainable(jpeft.LoRA(rank=8, targets=["q_proj", "v_proj"])) == query_value
    assert trainable(jpeft.LoRA(rank=16)) == all_seven


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "whole rank >= 1, got rank=0"),
        ({"rank": 2.5}, "whole rank"),
        ({"rank_pattern": {"up": 0}}, "whole rank >= 1, got rank=0"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"scaling": "rs"}, "expected scaling in .*'rslora'.*, got 'rs'"),
        ({"init_a": "zeros"}, "expected init_a in .*'kaiming'.*, got 'zeros'"),
        ({"dtype": "float33"}, "expected dtype as .*, got 'float33'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoRA(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, r"LoRA cannot adapt\nw: rank 5 is above min\(in, out\) = min\(6, 4\)"),
        ({"rank": 4, "rank_pattern": {"w": 5}}, r"write rank_pattern=\{'w': ...\}"),
        ({"rank": 3, "init_a": "orthogonal"}, "needs an even rank and no embedding, got rank 3"),
        ({"rank_pattern": {"w": 2, "v_proj": 3}}, "rank_pattern has 'v_proj', found in no adapted path; .*: w"),
        ({"alpha_pattern": {"v_proj": 3}}, "alpha_pattern has 'v_proj'"),
    ],
)
def test_sites_are_checked_before_anything_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        start(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 4))}, jnp.ones((1, 6)), **options)
