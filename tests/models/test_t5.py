"""T5: sizes, logits equal to those of `transformers` in both directions, and cached, packed and lifted runs."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft import models
from jpeft.core.targets import select
from jpeft.interop import peft as interop
from jpeft.models.t5 import buckets_of_distances
from jpeft.train.generation import generate

CLOSE = dict(rtol=0, atol=2e-5)
EXACT = dict(rtol=0, atol=1e-5)  # against transformers, of logits up to about 10
BASE = {
    "model_type": "t5",
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 14,
}
VERSIONS = {
    "v1.0": BASE | {"num_decoder_layers": 2},
    "v1.1": BASE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-5},
}


def against_transformers(test):
    """Marks a test that runs `transformers`, whose warnings are not ours."""
    return pytest.mark.parity(pytest.mark.filterwarnings("ignore")(test))


@functools.cache
def model(version):
    """`(apply, params)` as T5 starts, for it has no scale in its attention; but no norm is one and distances tell."""
    apply, params = models.init(jax.random.key(1), VERSIONS[version])

    def moved(path, x):
        name = path[-1].key
        return x + {"scale": 0.2, "table": 0.8}.get(name, 0.0) * jax.random.normal(jax.random.key(x.size), x.shape)

    params = jax.tree_util.tree_map_with_path(moved, params)
    params["shared"]["embedding"] *= 0.3  # else a tied head says what it has just been told
    if "lm_head" in params:
        params["lm_head"]["kernel"] *= 0.2
    return apply, params


@pytest.fixture(params=VERSIONS)
def t5(request):
    return model(request.param)


def ids(seed, rows=2, length=18):
    return jax.random.randint(jax.random.key(seed), (rows, length), 2, BASE["vocab_size"])


SOURCE, TARGET = ids(3), ids(4, length=16)
PADDED = jnp.array([[1] * 18, [1] * 11 + [0] * 7])


# Sizes and configs.

PUBLISHED = {  # d_model, d_kv, d_ff, layers, heads, options, parameters
    "t5-small": (512, 64, 2048, 6, 8, {}, 60_506_624),
    "t5-base": (768, 64, 3072, 12, 12, {}, 222_903_552),
    "t5-v1_1-base": (768, 64, 2048, 12, 12, dict(VERSIONS["v1.1"]), 247_577_856),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_are_the_published_ones(name):
    *sizes, options, total = PUBLISHED[name]
    sizes = dict(zip(("d_model", "d_kv", "d_ff", "num_layers", "num_heads"), sizes, strict=True))
    options = {key: options[key] for key in options if key not in BASE}
    config = sizes | options | {"model_type": "t5", "vocab_size": 32_128, "dropout_rate": 0.1}
    apply, shapes = models.abstract(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == total
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    assert jax.eval_shape(apply, shapes, tokens, tokens).shape == (1, 8, 32_128)


def test_the_head_is_tied_and_scaled_unless_the_config_says_otherwise():
    of = lambda **more: models.abstract(BASE | more)[0].config
    assert of().tie_word_embeddings and of().scale_outputs
    for untied in (of(tie_word_embeddings=False), of(tie_word_embeddings=True, scale_decoder_outputs=False)):
        assert not untied.tie_word_embeddings and not untied.scale_outputs
    assert of().num_decoder_layers == 3 and of(num_decoder_layers=1).num_decoder_layers == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_kv": None}, "expected d_kv, which is absent"),
        ({"feed_forward_proj": "gated-silu"}, "expected feed_forward_proj 'relu' or 'gated-gelu', got 'gated-silu'"),
        ({"dense_act_fn": "silu"}, "expected dense_act_fn 'relu' with feed_forward_proj 'relu', got 'silu'"),
        ({"is_encoder_decoder": False}, "expected is_encoder_decoder True, got False"),
        ({"architectures": ["T5EncoderModel"]}, r"expected an architecture of .*, got \['T5EncoderModel'\]"),
        ({"relative_attention_num_buckets": 3}, "expected relative_attention_num_buckets of 4 or more, got 3"),
        ({"relative_attention_max_distance": 4}, "expected .*_max_distance above the half of 8 buckets, got 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized weights .* quant_method='gptq'"),
        ({"torch_dtype": "float16"}, "expected to compute in float32 or bfloat16 .*, got float16"),
    ],
)
def test_what_the_model_cannot_honour_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.abstract(BASE | change)


def test_all_problems_of_a_config_are_reported_together():
    with pytest.raises(ValueError) as error:
        models.abstract(BASE | {"feed_forward_proj": "silu", "is_decoder": True}, dtype="float16", remat="some")
    assert all(word in str(error.value) for word in ("feed_forward_proj", "is_decoder", "float16", "'some'"))


def test_kernels_start_with_the_deviations_of_the_paper():
    _, params = models.init(jax.random.key(0), BASE | {"d_model": 64, "d_ff": 128, "initializer_factor": 2.0})
    attention = params["decoder"]["block"]["layer"]["1"]["EncDecAttention"]
    feed_forward = params["encoder"]["block"]["layer"]["1"]["DenseReluDense"]
    np.testing.assert_allclose(attention["q"]["kernel"].std(), 2 * (64 * 6) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(attention["o"]["kernel"].std(), 2 * (4 * 6) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(feed_forward["wo"]["kernel"].std(), 2 * 128**-0.5, rtol=0.05)
    np.testing.assert_allclose(params["shared"]["embedding"].std(), 2.0, rtol=0.05)
    assert np.abs(attention["q"]["kernel"][0] - attention["q"]["kernel"][1]).min() > 0


# Parity.


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def torch_logits(model, padded=False):
    import torch

    as_torch = lambda x: torch.tensor(np.array(x)).long()
    mask = as_torch(PADDED) if padded else None
    with torch.no_grad():
        return model.eval()(as_torch(SOURCE), attention_mask=mask, decoder_input_ids=as_torch(TARGET)).logits.numpy()


def random_torch_model(transformers, version):
    import torch

    config = {key: value for key, value in VERSIONS[version].items() if key != "model_type"}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).float()
    if not VERSIONS[version].get("tie_word_embeddings", True):  # which transformers' constructor ties all the same
        model.lm_head.weight = torch.nn.Parameter(torch.empty(BASE["vocab_size"], BASE["d_model"]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.3) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, 0, 0.3)
    torch.nn.init.normal_(model.shared.weight, 0, 2.0)
    return model


@against_transformers
@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_transformers_gives_the_same_logits_here(transformers, version, tmp_path):
    theirs = random_torch_model(transformers, version)
    theirs.save_pretrained(tmp_path)
    apply, params = models.load(tmp_path)
    expected = torch_logits(theirs)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(apply(params, SOURCE, TARGET), expected, **EXACT)
    padded = apply(params, SOURCE, TARGET, segment_ids=PADDED)
    np.testing.assert_allclose(padded, torch_logits(theirs, padded=True), **EXACT)
    assert np.abs(padded[0] - expected[0]).max() < 1e-5 < np.abs(padded[1] - expected[1]).max()


@against_transformers
@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_ours_gives_the_same_logits_there(transformers, version, tmp_path):
    apply, params = model(version)
    models.save(tmp_path / "model", params, VERSIONS[version])
    theirs, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(torch_logits(theirs), apply(params, SOURCE, TARGET), **EXACT)


@against_transformers
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 14), (4, 3), (7, 40), (64, 256)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(transformers, buckets, distance, bidirectional):
    import torch

    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        torch.arange(-distance, distance + 1), bidirectional, buckets, distance
    )
    ours = buckets_of_distances(buckets, distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(ours, theirs.numpy())


@against_transformers
@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_generation_is_that_of_transformers(transformers, version, tmp_path):
    import torch

    apply, params = model(version)
    models.save(tmp_path / "model", params, VERSIONS[version])
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    source, mask = (torch.tensor(np.array(x)).long() for x in (SOURCE, PADDED))
    expected = theirs.generate(
        source, attention_mask=mask, max_new_tokens=9, do_sample=False, decoder_start_token_id=0, eos_token_id=None
    )
    assert greedy(apply, params, [], 9) == expected[:, 1:].tolist()


# The model against itself.


def greedy(apply, bound, stops, count):
    start = jpeft.lift(apply.start)
    new_cache = lambda rows, length: start(bound, SOURCE, length, segment_ids=PADDED)
    return generate(apply.decode, bound, [[0]] * 2, new_cache, new_tokens=count, stops=stops, context=64)


def greedy_without_cache(apply, params, count):
    tokens = jnp.zeros((2, 1), int)
    for _ in range(count):
        logits = apply(params, SOURCE, tokens, segment_ids=PADDED)
        tokens = jnp.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    return tokens[:, 1:].tolist()


def test_greedy_generation_with_a_cache_is_that_without(t5):
    apply, params = t5
    expected = greedy_without_cache(apply, params, 8)
    assert greedy(apply, params, [], 8) == expected
    assert len({token for row in expected for token in row}) > 1
    stop = expected[0][4]
    assert greedy(apply, params, [stop], 8)[0] == expected[0][: expected[0].index(stop)]


def test_cached_decoding_equals_the_full_forward(t5):
    apply, params = t5
    cache = apply.start(params, SOURCE, 16, segment_ids=PADDED)
    steps = []
    for a, b in ((0, 7), (7, 8), (8, 16)):
        logits, cache = apply(params, None, TARGET[:, a:b], cache=cache)
        steps.append(logits)
    full = apply(params, SOURCE, TARGET, segment_ids=PADDED)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), full, **CLOSE)
    assert int(cache.own.index) == 16
    assert np.isnan(apply(params, None, TARGET[:, :1], cache=cache)[0]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_cache_on_either_side_changes_nothing(side):
    apply, params = model("v1.0")
    alone = apply(params, SOURCE, TARGET)
    segments, prompt = jnp.array([[1] * 4 + [0] * 3, [1] * 7]), TARGET[:, :7]
    if side == "left":
        segments, prompt = segments.at[0].set(segments[0, ::-1]), prompt.at[0].set(jnp.roll(prompt[0], 3))
    cache = apply.start(params, SOURCE, 12)
    logits, cache = apply(params, None, prompt, decoder_segment_ids=segments, cache=cache)
    np.testing.assert_allclose(logits[0][segments[0] == 1], alone[0, :4], **CLOSE)
    for k in range(4, 8):
        logits, cache = apply(params, None, TARGET[:, k : k + 1], cache=cache)
        np.testing.assert_allclose(logits[0, 0], alone[0, k], **CLOSE)


def test_logits_depend_on_the_decoders_past_and_on_all_of_the_source(t5):
    apply, params = t5
    before = apply(params, SOURCE, TARGET)
    after = apply(params, SOURCE, TARGET.at[:, 8].set(TARGET[:, 8] % 59 + 2))
    assert before.dtype == jnp.float32 and before.shape == (2, 16, 61)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8] - after[:, 8]).max() > 1e-3
    moved = apply(params, SOURCE.at[:, -1].set(SOURCE[:, -1] % 59 + 2), TARGET)
    assert np.abs(before[:, 0] - moved[:, 0]).max() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_source_changes_nothing(t5, side):
    apply, params = t5
    pad = (0, 5) if side == "right" else (5, 0)
    source = jnp.pad(SOURCE, ((0, 0), pad), constant_values=7)
    segments = jnp.pad(jnp.ones_like(SOURCE), ((0, 0), pad))
    got = apply(params, source, TARGET, segment_ids=segments)
    np.testing.assert_allclose(got, apply(params, SOURCE, TARGET), **CLOSE)
    encoded = apply.encode(params, source, segment_ids=segments)
    np.testing.assert_allclose(encoded[segments == 1], apply.encode(params, SOURCE).reshape(-1, 32), **CLOSE)


def test_a_packed_row_equals_its_sequences_run_apart(t5):
    apply, params = t5
    a, b = SOURCE[:1, :5], SOURCE[1:, :9]
    c, d = TARGET[:1, :6], TARGET[1:, :4]
    source = jnp.concatenate([a, b, jnp.zeros((1, 2), a.dtype)], 1)
    target = jnp.concatenate([c, d, jnp.zeros((1, 3), a.dtype)], 1)
    segments = dict(
        segment_ids=jnp.array([[1] * 5 + [2] * 9 + [0] * 2]),
        decoder_segment_ids=jnp.array([[1] * 6 + [2] * 4 + [0] * 3]),
    )
    logits = apply(params, source, target, **segments)
    np.testing.assert_allclose(logits[:, :6], apply(params, a, c), **CLOSE)
    np.testing.assert_allclose(logits[:, 6:10], apply(params, b, d), **CLOSE)
    assert np.isfinite(logits).all()
    places = dict(
        positions=jnp.array([[*range(5), *range(9), 0, 0]]),
        decoder_positions=jnp.array([[*range(6), *range(4), 0, 0, 0]]),
    )
    given = apply(params, source, target, **segments, **places)
    np.testing.assert_allclose(given[:, :10], logits[:, :10], **CLOSE)


def test_positions_are_relative_and_are_read(t5):
    apply, params = t5
    expected = apply(params, SOURCE, TARGET)
    shifted = dict(
        positions=jnp.tile(jnp.arange(18) + 5, (2, 1)), decoder_positions=jnp.tile(jnp.arange(16) + 9, (2, 1))
    )
    np.testing.assert_allclose(apply(params, SOURCE, TARGET, **shifted), expected, **CLOSE)
    for name, positions in shifted.items():
        spread = apply(params, SOURCE, TARGET, **{name: 3 * positions})
        assert np.abs(spread - expected).max() > 1e-3
    cache = apply.start(params, SOURCE, 16)
    spread, cache = apply.decode(params, TARGET[:, :8], positions=3 * shifted["decoder_positions"][:, :8], cache=cache)
    last, _ = apply.decode(params, TARGET[:, 8:], positions=3 * shifted["decoder_positions"][:, 8:], cache=cache)
    whole = apply(params, SOURCE, TARGET, decoder_positions=3 * shifted["decoder_positions"])
    np.testing.assert_allclose(jnp.concatenate([spread, last], 1), whole, **CLOSE)


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_rematerialisation_changes_no_gradient(remat):
    apply, params = model("v1.1")
    again = type(apply)(replace(apply.config, remat=remat))
    loss = lambda apply: lambda params: apply(params, SOURCE[:, :5], TARGET[:, :4]).var()
    expected, got = (jax.jit(jax.grad(loss(f)))(params) for f in (apply, again))
    jax.tree.map(lambda e, g: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), expected, got)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(got))
    layers = lambda apply: str(jax.make_jaxpr(lambda p: apply(p, SOURCE, TARGET))(params)).count("remat2[")
    assert layers(again) == layers(apply) + 2  # the body of the encoder's scan and that of the decoder's


def test_hidden_states_and_head_compose_to_the_logits(t5):
    apply, params = t5
    hidden = apply.hidden(params, SOURCE, TARGET)
    assert hidden.shape == (2, 16, 32)
    np.testing.assert_array_equal(apply.logits_from_hidden(params, hidden), apply(params, SOURCE, TARGET))
    cached, _ = apply.hidden(params, None, TARGET, cache=apply.start(params, SOURCE, 16))
    np.testing.assert_allclose(cached, hidden, **CLOSE)


def test_computing_in_bfloat16_leaves_the_parameters_and_the_logits_in_float32():
    exact, params = model("v1.1")
    apply, _ = models.abstract(VERSIONS["v1.1"], dtype="bfloat16")
    logits = apply(params, SOURCE, TARGET)
    assert logits.dtype == jnp.float32 and apply.hidden(params, SOURCE, TARGET).dtype == jnp.bfloat16
    assert apply.start(params, SOURCE, 4).own.keys.dtype == jnp.bfloat16
    gradients = jax.eval_shape(jax.grad(lambda p: apply(p, SOURCE, TARGET).var()), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}
    error = np.abs(logits - exact(params, SOURCE, TARGET)).max() / np.abs(logits).max()
    assert 0 < error < 0.05  # bfloat16 rounds to 2^-8; six layers add a few roundings each


def test_other_names_of_the_embedding_are_not_read(tmp_path):
    apply, params = model("v1.0")
    models.save(tmp_path / "model", params, VERSIONS["v1.0"])
    tensors = load_file(tmp_path / "model/model.safetensors")
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight", unread):
        tensors[name] = tensors["shared.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors")
    same, again = models.load(tmp_path / "model")
    assert same == apply
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_inputs_that_do_not_fit_are_refused():
    apply, params = model("v1.0")
    cache = apply.start(params, SOURCE, 4)
    for error, call in {
        r"expected tokens as integers \(batch, length\), got float32\[3\]": lambda: apply(params, jnp.ones(3), TARGET),
        "expected tokens of the source, got None": lambda: apply(params, None, TARGET),
        "expected as many rows of tokens as of decoder_tokens, got 1 and 2": lambda: apply(params, SOURCE[:1], TARGET),
        "expected segment_ids of the tokens' shape": lambda: apply(params, SOURCE, TARGET, segment_ids=PADDED[:1]),
        "expected decoder_positions of the tokens' shape": lambda: apply(
            params, SOURCE, TARGET, decoder_positions=SOURCE
        ),
        "expected None for tokens and segment_ids beside a cache": lambda: apply(
            params, SOURCE, TARGET[:, :1], segment_ids=PADDED, cache=cache
        ),
        "expected a cache for 2 rows of 16 tokens or more, got one for 2 rows of 4": lambda: apply(
            params, None, TARGET, cache=cache
        ),
        "the cache of an encoder-decoder holds its source": lambda: models.init_cache(apply, 2, 8),
    }.items():
        with pytest.raises(ValueError, match=error):
            call()


# Adapters.


def test_presets_find_the_sites_that_they_mean():
    apply, params = model("v1.1")
    sites = jpeft.find_sites(apply, params, SOURCE, TARGET)
    ends = lambda preset: {path.split("/", 4)[-1] for path in select(sites, preset, ("dense",))}
    attention = {f"{part}/{k}/kernel" for part in ("SelfAttention", "EncDecAttention") for k in "qkvo"}
    mlp = {f"DenseReluDense/{k}/kernel" for k in ("wi_0", "wi_1", "wo")}
    assert ends("attention") == attention and ends("mlp") == mlp and ends("all-linear") == attention | mlp
    assert ends("key-value") == {path for path in attention if "/k/" in path or "/v/" in path}
    assert ends("down") == {"DenseReluDense/wo/kernel"}
    assert ends("attention-output") == {"SelfAttention/o/kernel", "EncDecAttention/o/kernel"}
    assert len(select(sites, "attention-calls", ("attention",))) == 3
    assert list(select(sites, "embedding", ("embedding",))) == ["shared/embedding"]  # and no table of distances
    assert len(select(sites, "all-linear", ("dense",))) == 4 + 8 + 2 * 3
    assert [site.path for site in sites if site.head] == ["lm_head/kernel"]


@against_transformers
def test_an_adapter_goes_from_peft_to_here_and_back(transformers, tmp_path):
    import torch

    peft = pytest.importorskip("peft")
    base = random_torch_model(transformers, "v1.0")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    tuned = peft.get_peft_model(base, lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.2)
    tuned.save_pretrained(tmp_path / "theirs")

    apply, params = models.load(tmp_path / "base")
    sites = jpeft.find_sites(apply, params, SOURCE, TARGET)
    method, trainable, frozen = interop.load(tmp_path / "theirs", params, sites)
    logits = jpeft.lift(apply)(method.bind(trainable, frozen), SOURCE, TARGET)
    assert np.abs(logits - apply(params, SOURCE, TARGET)).max() > 0.1
    np.testing.assert_allclose(logits, torch_logits(tuned), **EXACT)

    options = dict(sites=sites, names=apply.names, task_type=apply.task)
    interop.save(tmp_path / "ours", method, trainable, tmp_path / "base", frozen, **options)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    np.testing.assert_allclose(torch_logits(peft.PeftModel.from_pretrained(again, tmp_path / "ours")), logits, **EXACT)


@functools.cache
def adapted(version):
    apply, params = model(version)
    sites = jpeft.find_sites(apply, params, SOURCE, TARGET)
    method = jpeft.LoRA(rank=3)
    trainable, frozen = method.init(jax.random.key(5), params, sites)
    return (
        apply,
        method,
        jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), trainable),
        frozen,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_lifted_lora_equals_the_merged_weights(version):
    apply, method, trainable, frozen = adapted(version)
    bound = method.bind(trainable, frozen)
    merged = jpeft.merge(bound)
    inputs = dict(segment_ids=PADDED)
    lifted = jpeft.lift(apply)(bound, SOURCE, TARGET, **inputs)
    np.testing.assert_allclose(lifted, apply(merged, SOURCE, TARGET, **inputs), **CLOSE)
    assert np.abs(lifted - apply(model(version)[1], SOURCE, TARGET, **inputs)).max() > 1e-2
    gradients = jax.jit(jax.grad(lambda t: jpeft.lift(apply)(method.bind(t, frozen), SOURCE, TARGET).var()))(trainable)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(gradients))


def test_generation_through_an_adapter_is_that_of_the_merged_weights():
    apply, method, trainable, frozen = adapted("v1.0")
    bound = method.bind(trainable, frozen)
    assert greedy(apply, bound, [], 6) == greedy_without_cache(apply, jpeft.merge(bound), 6)
