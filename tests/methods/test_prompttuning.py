"""Prompt tuning: HF PEFT's numbers on a whole model, starts, lookups, heads, a cached decode, other Weights beneath."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_prompts import CONFIG, assert_same_as_peft_prompt
from small_models import make_model

import jpeft
from jpeft.methods._prompts import Prompt, Prompted

KEY = jax.random.key(0)
TOKENS = np.array([[3, 1, 4], [1, 5, 2]])
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 6)).astype(np.float32)
ROWS = RNG.normal(size=(2, 6)).astype(np.float32)
VIRTUAL = np.concatenate([jpeft.VIRTUAL + np.array([[0, 1], [1, 0]]), TOKENS], 1)
EXTENDED = np.where(VIRTUAL >= jpeft.VIRTUAL, VIRTUAL - jpeft.VIRTUAL + len(TABLE), VIRTUAL)


def tied(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["embed"].T


def start(method, fn=tied, params=None, tokens=TOKENS):
    params = {"embed": jnp.asarray(TABLE)} if params is None else params
    return method.init(KEY, params, jpeft.find_sites(fn, params, tokens))


def rows_of(**options):
    return np.asarray(start(jpeft.PromptTuning(**options))[0]["embed"].rows)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(tmp_path):
    peft = pytest.importorskip("peft")
    assert_same_as_peft_prompt(
        tmp_path,
        jpeft.PromptTuning(4, init_prompt="normal"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        lambda encoder: [encoder.embedding.weight],
        lambda w: [w.rows],
        named=lambda w: {"prompt_embeddings": w.rows},
    )


# ---- starts ----


def test_random_rows_are_uniform_and_normal_ones_normal():
    uniform, normal = rows_of(num_tokens=4000), rows_of(num_tokens=4000, init_prompt="normal")
    assert -0.5 <= uniform.min() < -0.499 and 0.499 < uniform.max() <= 0.5
    assert abs(uniform.std() - 12**-0.5) < 0.005
    assert abs(normal.std() - 1) < 0.02 and abs(normal.mean()) < 0.02


def test_rows_of_the_vocabulary_are_of_different_tokens_among_the_first():
    rows = rows_of(num_tokens=4, init_prompt="vocabulary", sample_from=4)
    found = [int(np.flatnonzero((TABLE == row).all(1))[0]) for row in rows]
    assert sorted(found) == [0, 1, 2, 3]
    more = rows_of(num_tokens=9, init_prompt="vocabulary", sample_from=2)
    assert all((TABLE[:2] == row).all(1).any() for row in more)


def test_a_text_gives_its_rows_repeated_or_filled_up_where_asked():
    exact = rows_of(num_tokens=3, init_prompt="text", init_text_ids=[5, 0, 5])
    np.testing.assert_array_equal(exact, TABLE[[5, 0, 5]])
    repeated = rows_of(num_tokens=5, init_prompt="text", init_text_ids=(5, 0), fit="repeat")
    np.testing.assert_array_equal(repeated, TABLE[[5, 0, 5, 0, 5]])
    cut = rows_of(num_tokens=2, init_prompt="text", init_text_ids=(5, 0, 3), fit="repeat")
    np.testing.assert_array_equal(cut, TABLE[[5, 0]])
    sampled = rows_of(num_tokens=4, init_prompt="text", init_text_ids=(5,), fit="sample", sample_from=2)
    np.testing.assert_array_equal(sampled[0], TABLE[5])
    assert all((TABLE[:2] == row).all(1).any() for row in sampled[1:])


def test_a_label_of_several_tokens_starts_at_their_mean():
    rows = rows_of(num_tokens=2, init_prompt="text", init_text_ids=[4, [1, 6]])
    np.testing.assert_array_equal(rows[0], TABLE[4])
    np.testing.assert_allclose(rows[1], (TABLE[1] + TABLE[6]) / 2, rtol=1e-6)


@pytest.mark.parametrize("beneath", [jpeft.NF4(targets="embed", block_size=2), jpeft.Int8(targets="embed")])
def test_rows_of_a_quantized_table_are_looked_up(beneath):
    table = RNG.normal(size=(256, 6)).astype(np.float32)
    params = {"embed": jnp.asarray(table)}
    plain = lambda p, tokens: p["embed"][tokens] * 2
    sites = jpeft.find_sites(plain, params, TOKENS)
    bound = beneath.bind(*beneath.init(KEY, params, sites))
    method = jpeft.PromptTuning(3, init_prompt="text", init_text_ids=(200, 7, 7))
    init = lambda bound: method.init(KEY, bound, sites)[0]["embed"].rows
    np.testing.assert_allclose(init(bound), jpeft.merge(bound)["embed"][jnp.array([200, 7, 7])], atol=1e-6)
    assert "f32[256,6]" not in str(jax.make_jaxpr(init)(bound))


def test_layers_of_a_stack_have_prompts_of_their_own():
    """Embeddings of each layer, as a scan takes them."""

    def fn(p, tokens):
        nothing = jnp.zeros((*tokens.shape, 6))
        return jax.lax.scan(lambda x, table: (x + jnp.take(table, tokens, axis=0), None), nothing, p["tables"])[0]

    params = {"tables": jnp.asarray(RNG.normal(size=(3, 7, 6)), jnp.float32)}
    for options in ({}, {"init_prompt": "vocabulary"}, {"init_prompt": "text", "init_text_ids": (4, 2)}):
        method = jpeft.PromptTuning(2, **options)
        halves = start(method, fn, params)
        rows = halves[0]["tables"].rows
        assert rows.shape == (3, 2, 6)
        assert not np.allclose(rows[0], rows[1])
        whole = {"tables": jnp.concatenate([params["tables"], rows], 1)}
        np.testing.assert_allclose(jpeft.lift(fn)(method.bind(*halves), VIRTUAL), fn(whole, EXTENDED), atol=1e-6)
    np.testing.assert_array_equal(rows, params["tables"][:, jnp.array([4, 2])])


# ---- lookups ----


def take(p, tokens):
    return jnp.take(p["embed"], tokens, axis=0)


LOOKUPS = {
    "take": take,
    "index": lambda p, tokens: p["embed"][tokens],
    "scaled": lambda p, tokens: p["embed"].astype(jnp.float32)[tokens] * 6**0.5,
    "stored out-in": lambda p, tokens: jnp.take(p["embed"].T, tokens, axis=1).transpose(1, 2, 0),
    "mapped": lambda p, tokens: jax.vmap(jax.vmap(lambda t: p["embed"][t]))(tokens),
    "mapped slices": lambda p, t: jax.vmap(jax.vmap(lambda t: jax.lax.dynamic_index_in_dim(p["embed"], t)))(t),
    "clipped": lambda p, tokens: jnp.take(p["embed"], tokens, axis=0, mode="clip"),
    "half the columns": lambda p, tokens: p["embed"][:, 3:][tokens],
    "part of the rows": lambda p, tokens: p["embed"][:6][tokens],
    "jit": lambda p, tokens: jax.jit(take)(p, tokens),
    "remat": lambda p, tokens: jax.checkpoint(take)(p, tokens),
    "loop": lambda p, tokens: jax.lax.map(lambda t: p["embed"][t], tokens),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_virtual_ids_find_the_rows_however_they_are_looked_up(name):
    fn = LOOKUPS[name]
    params = {"embed": jnp.asarray(TABLE)}
    axes = jpeft.find_sites(fn, params, TOKENS)["embed"].axes
    bound = {"embed": Prompt(params["embed"], jnp.asarray(ROWS), axes=axes)}
    kept = 6 if name == "part of the rows" else 7  # a table's padding rows are cut off, and the prompt stays
    longer = {"embed": jnp.concatenate([TABLE[:kept], ROWS])}
    whole = take if name == "part of the rows" else fn
    expected = whole(longer, np.where(EXTENDED >= 7, EXTENDED - 7 + kept, EXTENDED))
    np.testing.assert_allclose(jpeft.lift(fn)(bound, VIRTUAL), expected, atol=1e-6)


def test_an_id_behind_the_prompt_finds_nan():
    bound = {"embed": Prompt(jnp.asarray(TABLE), jnp.asarray(ROWS), axes="io")}
    out = jpeft.lift(take)(bound, jpeft.VIRTUAL + np.array([[1, 2]]))
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()


def test_the_rows_take_the_dtype_of_the_lookup():
    params = {"embed": jnp.asarray(TABLE, jnp.bfloat16)}
    method = jpeft.PromptTuning(2)
    trainable, frozen = start(method, take, params)
    assert trainable["embed"].rows.dtype == jnp.float32
    assert jpeft.lift(take)(method.bind(trainable, frozen), VIRTUAL).dtype == jnp.bfloat16


BENEATH = {
    "nothing": lambda: (),
    "NF4": lambda: (jpeft.NF4(targets="embed", block_size=2),),
    "LoRA": lambda: (jpeft.LoRA(rank=2, targets="embed"),),
    "NF4 and LoRA": lambda: (jpeft.NF4(targets="embed", block_size=2), jpeft.LoRA(rank=2, targets="embed")),
    "trainable tokens": lambda: (jpeft.TrainableTokens(token_indices=(3, 5)),),
    "full": lambda: (jpeft.FullFineTuning(targets="embed"),),
}


@pytest.mark.parametrize("name", BENEATH)
def test_a_tied_head_sees_the_base_alone_whatever_that_is(name):
    method = jpeft.chain(*BENEATH[name](), jpeft.PromptTuning(2))
    trainable, frozen = start(method)
    trainable = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(RNG.normal(size=x.shape), x.dtype), trainable)
    bound = method.bind(trainable, frozen)
    prompt = bound["embed"]
    table = jpeft.merge({"embed": prompt.base})["embed"] if BENEATH[name]() else prompt.base
    whole = jnp.concatenate([table, prompt.rows])
    expected = jnp.tanh(whole[EXTENDED]) @ table.T
    np.testing.assert_allclose(jpeft.lift(tied)(bound, VIRTUAL), expected, atol=2e-5)
    assert expected.shape == (2, 5, 7)


@pytest.mark.parametrize("last", [True, False])
def test_a_prompt_on_a_quantized_and_adapted_model(last):
    model, rest = make_model("nnx"), (jpeft.NF4(block_size=4), jpeft.LoRA(rank=2))
    method = jpeft.chain(*rest, jpeft.PromptTuning(3)) if last else jpeft.chain(jpeft.PromptTuning(3), *rest)
    trainable, frozen = method.init(KEY, model.params, model.sites)
    trainable = jax.tree.map(lambda x: x + 0.1 * RNG.normal(size=x.shape).astype(x.dtype), trainable)
    bound = method.bind(trainable, frozen)
    tokens = jpeft.prompted({"tokens": model.inputs[0]}, method)["tokens"]
    prompt = bound["embed"]["embedding"]
    longer = bound | {"embed": {"embedding": jnp.concatenate([prompt.base, prompt.rows])}}
    expected = jpeft.lift(model.apply)(longer, jnp.where(tokens >= jpeft.VIRTUAL, tokens - jpeft.VIRTUAL + 37, tokens))
    np.testing.assert_allclose(jpeft.lift(model.apply)(bound, tokens), expected, atol=1e-6)


# ---- which embedding ----


def with_positions(p, tokens):
    x = p["words"][tokens] + p["places"][jnp.arange(tokens.shape[1])]
    return jnp.tanh(x) @ p["words"].T


@pytest.mark.parametrize("places", [5, 50])
def test_the_embedding_of_the_tokens_is_the_one_that_the_head_speaks_of(places):
    params = {"words": jnp.ones((7, 6)), "places": jnp.ones((places, 6))}
    sites = jpeft.find_sites(with_positions, params, TOKENS)
    assert {s.path for s in sites if s.kind == "embedding"} == {"words", "places"}
    assert list(jpeft.PromptTuning().chosen(sites)) == ["words"]
    assert list(jpeft.PromptTuning(targets="places").chosen(sites)) == ["places"]


def test_without_a_head_it_is_the_largest():
    fn = lambda p, tokens: p["words"][tokens] + p["places"][jnp.arange(tokens.shape[1])]
    params = {"places": jnp.ones((5, 6)), "words": jnp.ones((7, 6))}
    assert list(jpeft.PromptTuning().chosen(jpeft.find_sites(fn, params, TOKENS))) == ["words"]


GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
BERT = CONFIG | {"model_type": "bert", "type_vocab_size": 2}
T5 = {"model_type": "t5", "vocab_size": 30, "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "inputs", "path"),
    [
        (CONFIG | {"model_type": "llama"}, 1, "embed_tokens/embedding"),
        (GPT2, 1, "wte/embedding"),
        (BERT | {"vocab_size": 99}, 1, "embeddings/word_embeddings/embedding"),
        (T5, 2, "shared/embedding"),
    ],
)
def test_the_library_s_models_have_one(config, inputs, path):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, *[jax.ShapeDtypeStruct((1, 8), jnp.int32)] * inputs)
    assert list(jpeft.PromptTuning().chosen(sites)) == [path]


def test_an_encoder_decoder_is_prompted_on_either_side():
    apply, params = jpeft.models.init(KEY, T5)
    batch = {"tokens": np.array([[3, 1, 4]]), "decoder_tokens": np.array([[0, 5]])}
    method = jpeft.PromptTuning(2)
    sites = jpeft.find_sites(apply, params, batch["tokens"], batch["decoder_tokens"])
    bound = method.bind(*method.init(KEY, params, sites))
    run = lambda batch: jpeft.lift(apply)(bound, batch["tokens"], batch["decoder_tokens"])
    plain, source, target = (
        run(batch),
        run(jpeft.prompted(batch, method)),
        jpeft.prompted(batch, method, stream="decoder_"),
    )
    assert plain.shape == source.shape == (1, 2, 30) and run(target).shape == (1, 4, 30)
    assert np.abs(source - plain).max() > 1e-3 and np.abs(run(target)[:, 2:] - plain).max() > 1e-3


# ---- generation ----


def test_a_prompt_in_a_cached_decode_is_that_of_the_whole_sequence():
    apply, params = jpeft.models.init(KEY, {"model_type": "llama", **CONFIG})
    method = jpeft.PromptTuning(3)
    tokens = jpeft.prompted({"tokens": np.array([[5, 6, 7, 8], [9, 1, 2, 3]])}, method)["tokens"]
    bound = method.bind(*start(method, apply, params))
    whole = jpeft.lift(apply)(bound, tokens)
    cache, steps = jpeft.models.init_cache(apply, batch=2, max_length=8), []
    run = jax.jit(lambda bound, tokens, cache: jpeft.lift(apply)(bound, tokens, cache=cache))
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        logits, cache = run(bound, tokens[:, begin:end], cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=2e-5)
    assert np.abs(whole[:, 3:] - apply(params, tokens[:, 3:])).max() > 1e-3


# ---- counts ----


@pytest.mark.parametrize(
    ("tokens", "width", "count"),
    [
        (20, 4096, 81_920),  # Llama-2-7B, Llama-3.1-8B, Qwen3-8B
        (20, 8192, 163_840),  # Llama-3.1-70B
        (200, 3072, 614_400),  # Llama-3.2-3B, of HF PEFT's comparison of methods
        (8, 1024, 8_192),  # bloomz-560m, of HF PEFT's documentation
        (100, 512, 51_200),  # T5.1.1, of the paper: small to XXL
        (100, 768, 76_800),
        (100, 1024, 102_400),
        (100, 2048, 204_800),
        (100, 4096, 409_600),
        (5, 4096, 20_480),
    ],
)
def test_the_counts_are_the_published_ones(tokens, width, count):
    params = {"embed": jax.ShapeDtypeStruct((32, width), jnp.bfloat16)}
    trainable, _ = jax.eval_shape(lambda p: start(jpeft.PromptTuning(tokens), params=p), params)
    assert sum(x.size for x in jax.tree.leaves(trainable)) == count


# ---- refusals ----


def test_nothing_may_be_put_around_a_prompt():
    prompt = jpeft.PromptTuning(2)
    for outer in (jpeft.LoRA(rank=1, targets="embed"), jpeft.FullFineTuning(targets="embed"), jpeft.PromptTuning(3)):
        with pytest.raises(ValueError, match="of a chain one method has a prompt, and it comes last"):
            start(jpeft.chain(prompt, outer))


def test_a_prompt_is_not_merged():
    method = jpeft.PromptTuning(2)
    with pytest.raises(ValueError, match=r"embed: a prompt is no change of the weights; keep the adapter"):
        jpeft.merge(method.bind(*start(method)))


def test_one_embedding_is_named():
    params = {"words": jnp.ones((7, 6)), "places": jnp.ones((9, 6))}
    with pytest.raises(
        ValueError, match="into one embedding, targets='words|places' match words, places; name the one"
    ):
        start(jpeft.PromptTuning(targets="words|places"), with_positions, params)


def test_the_embedding_is_not_trained_in_the_prompt_s_place():
    with pytest.raises(ValueError, match=r"would take embed from the prompt; .* write chain\(FullFineTuning"):
        start(jpeft.PromptTuning(2, modules_to_save=("embed",)))
    fn = lambda p, tokens: jnp.tanh(p["embed"][tokens]) @ p["head"]
    params = {"embed": jnp.ones((7, 6)), "head": jnp.ones((6, 4))}
    trainable, _ = start(jpeft.PromptTuning(2, modules_to_save=("head",)), fn, params)
    assert {x.shape for x in jax.tree.leaves(trainable)} == {(2, 6), (6, 4)}


TEXT = {"init_prompt": "text"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "expected a whole num_tokens >= 1, got num_tokens=0"),
        ({"num_tokens": 2.5}, "expected a whole num_tokens >= 1, got num_tokens=2.5"),
        ({"sample_from": 0}, "expected a whole sample_from >= 1"),
        ({"init_prompt": "zeros"}, r"expected init_prompt in \('random', .*, got 'zeros'"),
        ({**TEXT, "init_text_ids": (1,), "fit": "cut"}, r"expected fit in \('exact', 'repeat', 'sample'\), got 'cut'"),
        (TEXT, r"starts from a text; write init_text_ids=tokenizer.encode\(text\).ids"),
        ({**TEXT, "init_text_ids": "Is it spam?"}, "expected token ids, got the text init_text_ids='Is it spam"),
        ({"init_text_ids": (1, 2)}, "init_text_ids and fit are of init_prompt='text', got init_prompt='random'"),
        ({"fit": "repeat"}, "init_text_ids and fit are of init_prompt='text'"),
        (
            {**TEXT, "num_tokens": 3, "init_text_ids": (1, 2)},
            "the text has 2 tokens, the prompt 3: .* write num_tokens=2, another text, or fit=.* fit='sample'",
        ),
        (
            {**TEXT, "num_tokens": 1, "init_text_ids": (1, 2), "fit": "sample"},
            "the text has 2 tokens, the prompt 1: .* or fit='repeat', which repeats and cuts the text$",
        ),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.PromptTuning(**options)


@pytest.mark.parametrize("ids", [(7,), (-1,), ((2, 9),)])
def test_tokens_that_the_embedding_does_not_have_are_refused(ids):
    with pytest.raises(ValueError, match="embed: init_text_ids has (7|-1|9), not among its 7 tokens"):
        start(jpeft.PromptTuning(1, init_prompt="text", init_text_ids=ids))


def test_a_kind_of_prompt_says_what_its_rows_are():
    with pytest.raises(TypeError, match="Prompted defines no made"):
        Prompted().made()
