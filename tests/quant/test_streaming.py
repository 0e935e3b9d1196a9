"""Compressing while reading gives what compressing afterwards gives, and lets each dense leaf go."""

import gc
import weakref

import jax
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.quant import compressing
from jpeft.train.adapter import fingerprint

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    architectures=["LlamaForCausalLM"],
)
QLORA = jpeft.chain(jpeft.NF4(double_quant=True), jpeft.LoRA(rank=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "dense"
    _, params = models.init(jax.random.key(0), CONFIG)
    models.save(path, params, CONFIG)
    return path


@pytest.fixture(scope="module")
def dense(folder):
    apply, params = models.load(folder)
    return apply, params, jpeft.find_sites(apply, params, *apply.inputs(8))


def test_the_halves_are_those_of_the_dense_tree(folder, dense):
    _, params, sites = dense
    _, packed = models.load(folder, each=compressing(QLORA, sites))
    expected = QLORA.init(jax.random.key(1), params, sites)
    found = QLORA.init(jax.random.key(1), packed, sites)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


def test_no_two_dense_leaves_live_at_a_time(folder, dense):
    alive, compress = [], compressing(QLORA, dense[2])

    def each(path, leaf):
        gc.collect()
        assert not [other for other, ref in alive if ref() is not None], "an earlier one is still there"
        found = compress(path, leaf)
        if found is not leaf:
            alive.append((path, weakref.ref(leaf)))
        return found

    models.load(folder, each=each)
    assert len(alive) == 7


def test_who_must_see_the_pretrained_weights_gets_them(dense):
    sites = dense[2]
    assert compressing(jpeft.LoRA(), sites) is None
    assert compressing(jpeft.chain(jpeft.NF4(), jpeft.PiSSA(rank=2)), sites) is None
    assert compressing(jpeft.chain(jpeft.NF4(), jpeft.LoftQ(rank=2)), sites) is None
    assert compressing(jpeft.chain(jpeft.LoRA(), jpeft.LoRA()), sites) is None


def test_the_command_compresses_while_it_reads_and_knows_the_folder(folder, dense):
    from jpeft.cli.model import load_to_train

    _, params, base = load_to_train(folder, QLORA, "float32", "none", None)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, jpeft.Weight)
    assert base == fingerprint(dense[1])
    _, params, base = load_to_train(folder, jpeft.LoRA(), "float32", "none", None)
    assert isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], jax.Array)
    assert base == fingerprint(dense[1])
