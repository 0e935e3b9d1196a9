import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

import jpeft
from jpeft import models
from jpeft.train.generation import generate, sample_token


@pytest.fixture(scope="module")
def model():
    apply, params = models.init(jax.random.key(0), CONFIG)
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), params)
    return apply, params


def by_hand(apply, params, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.zeros((1, 48), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        ids.append(int(apply(params, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def run(model, prompts, bound=None, **options):
    apply, params = model
    options = {"new_tokens": 6, "stops": (256,), "context": 64} | options
    return generate(
        apply, params if bound is None else bound, prompts, functools.partial(models.init_cache, apply), **options
    )


PROMPTS = [[7, 3, 9], [1, 2, 3, 4, 5, 6, 7, 8], list(range(36))]


def test_unlike_prompts_in_one_batch_equal_each_without_cache(model):
    assert run(model, PROMPTS) == [by_hand(*model, p, 6) for p in PROMPTS]


def test_an_adapter_generates_as_its_merge_does(model):
    apply, params = model
    method = jpeft.LoRA(rank=2)
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    trainable, frozen = method.init(jax.random.key(2), params, sites)
    bound = method.bind(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    assert run(model, PROMPTS, bound) == run(model, PROMPTS, jpeft.merge(bound)) != run(model, PROMPTS)


def test_a_stop_ends_its_own_row(model):
    first, second, _ = run(model, PROMPTS)
    stop = first[2]
    stopped = run(model, PROMPTS[:2], stops=(stop,))
    assert stopped[0] == first[: first.index(stop)]
    assert stopped[1] == (second[: second.index(stop)] if stop in second else second)


def test_drawing_follows_the_seed(model):
    draw = lambda seed: run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=seed)
    assert draw(0) == draw(0) != draw(1)


def test_top_p_keeps_the_fewest_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 200)
    draws = jax.vmap(sample_token, (None, 0, None, None))
    drawn = lambda top_p: set(np.asarray(draws(logits, keys, 1.0, top_p)).ravel().tolist())
    assert drawn(0.4) == {0} and drawn(0.6) == {0, 1} and drawn(1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"new_tokens": 0}, "at least one new token"),
        ({"context": 8}, "prompt 0 has 3 tokens; expected 1 to 2"),
    ],
)
def test_out_of_range(model, options, said):
    with pytest.raises(ValueError, match=said):
        run(model, PROMPTS[:2], **options)
