"""What tests of methods at attention calls share: models of HF PEFT's and ours, generation with a cache and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import FAMILIES, random_model

import jpeft
from jpeft import models
from jpeft.train.generation import generate

KEY = jax.random.key(0)
PROJECTION = "layers/self_attn/{}_proj/kernel"


def filled(tree, seed=0, size=0.5):
    """The same tree with random numbers of the same dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), tree)


def bound_to(method, params, sites, seed=0, size=0.5):
    """`(trainable, frozen)` of a method, its trainables random."""
    trainable, frozen = jax.jit(lambda key, params: method.init(key, params, sites))(KEY, params)
    return filled(trainable, seed, size), frozen


def positions_of(tokens, method):
    """The positions that the method's adapter needs."""
    default = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jpeft.prompted({"tokens": tokens}, method).get("positions", default)


# ---- HF PEFT ----


class Pair:
    """A tiny model of `transformers` with an adapter of PEFT's, and the same model here with one of ours."""

    def __init__(self, folder, config, peft_config, method):
        torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
        self.apply, self.params = random_model(config)
        models.save(folder / "model", self.params, config)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
        self.theirs = peft.get_peft_model(model.float(), peft_config).eval()
        self.tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 7))
        self.sites = jpeft.find_sites(self.apply, self.params, self.tokens)
        self.method = method
        self.trainable, self.frozen = bound_to(method, self.params, self.sites)
        self.torch = torch

    def assert_same(self, tensors, ours_of, tolerance=1e-5):
        """PEFT's `tensors` filled with `ours_of(trainable)`: the same logits, and gradients of every trainable."""
        assert len(tensors) == sum(p.requires_grad for p in self.theirs.parameters())
        for tensor, value in zip(tensors, ours_of(self.trainable), strict=True):
            assert tuple(tensor.shape) == value.shape
            tensor.data = self.torch.from_numpy(np.array(value))
        tokens, positions = jnp.asarray(self.tokens), positions_of(self.tokens, self.method)
        run = lambda t: jpeft.lift(self.apply)(self.method.bind(t, self.frozen), tokens, positions=positions)
        loss = lambda t: (jnp.sin(out := run(t)).sum(), out)
        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.trainable)
        given = self.torch.from_numpy(self.tokens)
        expected = self.theirs(input_ids=given, attention_mask=self.torch.ones_like(given)).logits
        self.torch.sin(expected).sum().backward()
        close(logits, expected.detach().numpy(), tolerance)
        for grad, tensor in zip(ours_of(grads), tensors, strict=True):
            close(grad, tensor.grad.numpy(), tolerance)


def close(got, wanted, tolerance):
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got / scale, wanted / scale, rtol=0, atol=tolerance)


# ---- generation ----


def assert_the_cache_changes_nothing(method, family="llama3", size=0.5):
    """Greedy generation with a cache gives, token for token, what whole runs without one give."""
    apply, params = random_model(FAMILIES[family])
    prompt, new = [5, 17, 3, 9], 6
    sites = jpeft.find_sites(apply, params, jnp.asarray([prompt]))
    bound = method.bind(*bound_to(method, params, sites, size=size))

    def whole(run, found):
        """The prompt and what follows it, each new token by a whole run; what stands behind a token says nothing."""
        while len(found) < len(prompt) + new:
            tokens = jnp.zeros((1, len(prompt) + new), jnp.int32).at[0, : len(found)].set(jnp.asarray(found))
            found = [*found, int(run(tokens)[0, len(found) - 1].argmax())]
        return found

    lifted = jpeft.lift(apply)
    found = whole(jax.jit(lambda tokens: lifted(bound, tokens, positions=positions_of(tokens, method))), prompt)
    cached = generate(
        apply,
        bound,
        [prompt],
        lambda rows, length: models.init_cache(apply, rows, length),
        new_tokens=new,
        stops=[],
        context=64,
        first_position=method.position_shift,
    )
    assert cached == [found[len(prompt) :]]
    assert found != whole(lambda tokens: apply(params, tokens), prompt), "an adapter that changes nothing shows nothing"


# ---- counts ----


def count(method, config, **options):
    """The trainable parameters of a method on a public config."""
    apply, shapes = models.abstract(config, **options)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    return jpeft.count(bound).trainable


LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)
LLAMA3_8B = LLAMA2_7B | dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
LLAMA3_70B = LLAMA3_8B | dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)
LLAMA3_3B = LLAMA3_8B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192)
QWEN3_8B = LLAMA3_8B | dict(model_type="qwen3", num_hidden_layers=36, head_dim=128)
GPT2_M = dict(model_type="gpt2", n_embd=1024, n_layer=24, n_head=16, vocab_size=50257, n_positions=1024)
BERT = dict(model_type="bert", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
BERT |= dict(vocab_size=30522, max_position_embeddings=512)
