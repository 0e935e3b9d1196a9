"""The decoder against itself: cached, packed, padded and rematerialised runs are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import FAMILIES, random_model, tokens

from jpeft import models

CLOSE = dict(rtol=0, atol=2e-5)


def test_logits_depend_on_the_past_only(decoder):
    apply, params = decoder
    changed = tokens().at[:, 8].add(1) % 61
    before, after = apply(params, tokens()), apply(params, changed)
    assert before.dtype == jnp.float32 and before.shape == (2, 12, 61)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8] - after[:, 8]).max() > 1e-3


def test_cached_decoding_equals_the_full_forward(decoder):
    apply, params = decoder
    cache = models.init_cache(apply, batch=2, max_length=14)
    prompt, cache = apply(params, tokens()[:, :9], cache=cache)
    steps = []
    for k in range(9, 12):
        logits, cache = apply(params, tokens()[:, k : k + 1], cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate([prompt, *steps], 1), apply(params, tokens()), **CLOSE)
    assert int(cache.index) == 12


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_padding_in_the_cache_on_either_side_changes_nothing(family, side):
    apply, params = random_model(FAMILIES[family])
    row = tokens(1, 10)
    alone = apply(params, row)
    segments = jnp.array([[1] * 7 + [0] * 3, [1] * 10])  # the first row's prompt is 7 tokens, the second's 10
    prompt = jnp.concatenate([jnp.pad(row[:, :7], ((0, 0), (0, 3))), row])
    if side == "left":
        segments, prompt = jnp.roll(segments, 3, axis=1).at[1].set(1), prompt.at[0].set(jnp.roll(prompt[0], 3))
    cache = models.init_cache(apply, batch=2, max_length=13)
    logits, cache = apply(params, prompt, segment_ids=segments, cache=cache)
    np.testing.assert_allclose(logits[0][segments[0] == 1], alone[0, :7], **CLOSE)
    for k in range(7, 10):
        logits, cache = apply(params, jnp.tile(row[:, k : k + 1], (2, 1)), cache=cache)
        np.testing.assert_allclose(logits[0, 0], alone[0, k], **CLOSE)


def test_a_packed_row_equals_its_sequences_run_apart(decoder):
    apply, params = decoder
    a, b = tokens(1, 7), tokens(1, 9)[:, 2:]
    packed = jnp.concatenate([a, b, jnp.zeros((1, 2), a.dtype)], 1)
    segments = jnp.array([[1] * 7 + [2] * 7 + [0] * 2])
    logits = apply(params, packed, segment_ids=segments)
    np.testing.assert_allclose(logits[:, :7], apply(params, a), **CLOSE)
    np.testing.assert_allclose(logits[:, 7:14], apply(params, b), **CLOSE)
    assert np.isfinite(logits).all()
    positions = jnp.array([[*range(7), *range(7), 0, 0]])
    given = apply(params, packed, segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(given[:, :14], logits[:, :14])


def test_rotary_positions_are_relative(qwen3):
    apply, params = qwen3
    moved = apply(params, tokens(), positions=jnp.broadcast_to(jnp.arange(12) + 5, (2, 12)))
    np.testing.assert_allclose(moved, apply(params, tokens()), **CLOSE)


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_rematerialisation_changes_no_gradient(qwen3, remat):
    apply, params = qwen3
    again, _ = models.abstract(FAMILIES["qwen3"], remat=remat)
    loss = lambda apply: lambda params: apply(params, tokens(1, 5)).var()
    expected, got = (jax.jit(jax.grad(loss(f)))(params) for f in (apply, again))
    jax.tree.map(lambda e, g: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6), expected, got)
    assert "remat" in str(jax.make_jaxpr(lambda p: again(p, tokens(1, 5)))(params))


def test_hidden_states_and_head_compose_to_the_logits(decoder):
    apply, params = decoder
    hidden = apply.hidden(params, tokens())
    assert hidden.shape == (2, 12, 32)
    np.testing.assert_array_equal(apply.logits_from_hidden(params, hidden), apply(params, tokens()))
    cached, cache = apply.hidden(params, tokens(), cache=models.init_cache(apply, 2, 12))
    np.testing.assert_allclose(cached, hidden, **CLOSE)
    assert isinstance(cache, models.Cache)


def test_computing_in_bfloat16_leaves_the_parameters_and_the_logits_in_float32(qwen3):
    exact, params = qwen3
    apply, _ = models.abstract(FAMILIES["qwen3"], dtype="bfloat16")
    logits = apply(params, tokens())
    assert logits.dtype == jnp.float32 and apply.hidden(params, tokens()).dtype == jnp.bfloat16
    gradients = jax.eval_shape(jax.grad(lambda p: apply(p, tokens()).var()), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}
    error = np.abs(logits - exact(params, tokens())).max() / np.abs(logits).max()
    assert 0 < error < 0.05  # bfloat16 rounds to 2^-8; three layers add a few roundings each


def test_the_apply_function_compares_and_hashes_by_its_config(qwen3):
    apply, _ = qwen3
    same, _ = models.abstract(FAMILIES["qwen3"])
    assert same == apply and hash(same) == hash(apply) and same.config.qk_norm
    assert models.abstract(FAMILIES["qwen2"])[0] != apply


def test_every_layer_starts_with_numbers_of_its_own():
    _, params = models.init(jax.random.key(0), FAMILIES["qwen3"])
    kernel = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).min() > 0
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)


def test_a_token_outside_the_vocabulary_and_a_full_cache_give_nan(qwen3):
    apply, params = qwen3
    assert np.isnan(apply(params, jnp.array([[61]]))).all()
    cache = models.init_cache(apply, 1, 2)
    _, cache = apply(params, jnp.array([[1, 2]]), cache=cache)
    assert np.isnan(apply(params, jnp.array([[3]]), cache=cache)[0]).all()


def test_inputs_that_do_not_fit_are_refused(qwen3):
    apply, params = qwen3
    with pytest.raises(ValueError, match=r"expected tokens as integers \(batch, length\), got float32\[3\]"):
        apply(params, jnp.ones(3))
    with pytest.raises(ValueError, match=r"expected segment_ids of the tokens' shape \(2, 12\), got \(1, 12\)"):
        apply(params, tokens(), segment_ids=jnp.ones((1, 12), int))
    with pytest.raises(ValueError, match="expected a cache for 2 rows of 12 tokens or more, got one for 2 rows of 4"):
        apply(params, tokens(), cache=models.init_cache(apply, 2, 4))
