"""The last layers: which they are, and what the backward pass leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_cases import numbers
from small_models import make_model
from test_lora import LLAMA3_8B

import jpeft
import jpeft.models
from jpeft.methods.lastlayers import Tail

KEY = jax.random.key(0)
PARAMS = {"w": numbers(5, 6, 6) / 2, "b": numbers(5, 6)}
X = numbers(2, 6)


def layers(p, x, reverse=False):
    def body(x, layer):
        y = jnp.tanh(x @ layer["w"] + layer["b"])
        return y, (y, layer["b"])

    return lax.scan(body, x, p, reverse=reverse)


def start(fn, params=PARAMS, inputs=X, **options):
    method = jpeft.LastLayers(**options)
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, inputs))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_in_parts_gives_what_the_whole_gives(reverse):
    fn = lambda p, x: layers(p, x, reverse)
    method, trainable, frozen = start(fn, num_layers=2)
    assert trainable["w"].tail.shape == (2, 6, 6) and frozen["w"].base.shape == (3, 6, 6)
    moved = jax.tree.map(lambda x: x + 1, trainable)
    for half in (trainable, moved):
        bound = method.bind(half, frozen)
        found, expected = jpeft.lift(fn)(bound, X), fn(jpeft.merge(bound), X)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_the_backward_pass_ends_where_training_does():
    method, trainable, frozen = start(layers, num_layers=2)
    loss = lambda t: jnp.sum(jpeft.lift(layers)(method.bind(t, frozen), X)[0])
    text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    lengths = sorted(int(line.split("length=")[1].split()[0]) for line in text.splitlines() if "length=" in line)
    assert lengths == [2, 2, 3], "forward through all, backward through the last two"
    assert "f32[5,6,6]" not in text.split("lambda")[-1], "no copy of the stack"


def test_an_unrolled_loop_over_a_stacked_leaf_takes_the_layers_from_the_two_parts():
    def fn(p, x):
        for n in range(5):
            x = jnp.tanh(x @ p["w"][n])
        return x

    params = {"w": PARAMS["w"]}
    method, trainable, frozen = start(fn, params, num_layers=2)
    bound = method.bind(jax.tree.map(lambda x: x + 1, trainable), frozen)
    np.testing.assert_allclose(jpeft.lift(fn)(bound, X), fn(jpeft.merge(bound), X), atol=1e-6)
    picked = lambda p, n: X @ lax.dynamic_index_in_dim(p["w"], n, keepdims=False)
    for n in (1, 4):
        found = jax.jit(lambda n: jpeft.lift(picked)(bound, n))(n)
        np.testing.assert_allclose(found, picked(jpeft.merge(bound), n), atol=1e-6)


def test_pieces_of_a_tail_are_the_merged_stack_s():
    _, trainable, frozen = start(layers, num_layers=2)
    tail = Tail(frozen["w"].base, trainable["w"].tail + 1, axes="io")
    whole = np.asarray(tail.dense())
    for first, last, step in [(0, 3, 1), (3, 5, 1), (4, 5, 1), (1, 5, 1), (0, 5, 2), (3, 5, 2)]:
        cut = lambda a, k, bounds=(first, last, step): lax.slice_in_dim(a, *bounds, axis=k)
        np.testing.assert_array_equal(tail.along(0, cut).dense(), whole[first:last:step])
        np.testing.assert_array_equal(tail.along(2, cut).dense(), whole[..., first:last:step])


def test_layers_that_are_leaves_of_their_own_are_found_by_their_number():
    model = make_model("linen-unrolled")
    paths = jpeft.LastLayers(num_layers=2).chosen(model.sites)
    assert {path.split("/")[0] for path in paths} == {"layer_1", "layer_2"}
    every = {s.path for s in model.sites if s.path.startswith(("layer_1/", "layer_2/"))}
    assert set(paths) == every
    assert set(jpeft.LastLayers(targets="up/kernel").chosen(model.sites)) == {"layer_2/up/kernel"}


def test_all_layers_of_a_stack_are_a_leaf_that_trains_whole():
    method, trainable, frozen = start(layers, num_layers=5)
    assert trainable["w"].base.shape == (5, 6, 6) and not jax.tree.leaves(frozen)


def test_the_count_is_that_of_the_layers():
    apply, shapes = jpeft.models.abstract(LLAMA3_8B)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.LastLayers(num_layers=2)
    trainable = jax.eval_shape(lambda k, p: method.init(k, p, sites)[0], KEY, shapes)
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    assert jpeft.count(trainable).total == 2 * layer


def test_an_adapter_on_a_tail_is_taken_apart_with_it():
    both = jpeft.chain(jpeft.LastLayers(num_layers=2, targets="w"), jpeft.LoRA(rank=2, targets="w"))
    trainable, frozen = both.init(KEY, PARAMS, jpeft.find_sites(layers, PARAMS, X))
    bound = both.bind(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    np.testing.assert_allclose(jpeft.lift(layers)(bound, X)[0], layers(jpeft.merge(bound), X)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers >= 1, got num_layers=0"),
        ({"layer_pattern": r"\d+"}, "with a group for the number"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LastLayers(**options)


def test_stacks_that_are_too_short_or_none_are_refused():
    with pytest.raises(ValueError, match="w: num_layers 6 is above its 5 layers"):
        start(layers, num_layers=6)
    unrolled = make_model("linen-unrolled").sites
    with pytest.raises(ValueError, match=r"at least num_layers=4 layers, got layer_\*: 3 layers"):
        jpeft.LastLayers(num_layers=4).chosen(unrolled)
    with pytest.raises(ValueError, match="none of embed/embedding is in the last layers"):
        jpeft.LastLayers(targets="embedding").chosen(unrolled)

    def nested(p, x):
        return lax.scan(lambda x, w: (lax.scan(lambda x, w: (x @ w, None), x, w)[0], None), x, p["w"])[0]

    with pytest.raises(ValueError, match="its axes 'ssio' are stacked in more than one way"):
        start(nested, {"w": numbers(2, 3, 6, 6)})
