"""Trainable tokens against HF PEFT, and with a tied head against the merged table."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, make_case, numbers
from safetensors.numpy import load_file

import jpeft
from jpeft.interop import peft as folders

KEY = jax.random.key(0)
TOKENS = np.array([[1, 6, 1], [0, 2, 6]])


def tied(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["embed"].T


def apart(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["head"]


def start(fn, params, **options):
    method = jpeft.TrainableTokens(**options)
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, TOKENS))


@pytest.mark.parity
@pytest.mark.parametrize(("name", "indices"), [("embedding", (6, 1)), ("linear", (4, 0, 2))])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name, indices):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    case = make_case(name)
    if name == "linear":  # PEFT's head has no bias
        module = torch.nn.Linear(6, 5, bias=False)
        case = type(case)(module, lambda p, x: x @ p["kernel"].T, case.x, case.factors)
    assert_same_as_peft(
        case,
        jpeft.TrainableTokens(token_indices=indices, targets="kernel"),
        peft.TrainableTokensConfig(token_indices=list(indices), target_modules=["0"]),
        lambda layer: (layer.trainable_tokens_delta["default"],),
        lambda w: (w.rows,),
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_s_folder_is_read_and_written_back(tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(OrderedDict(embed=torch.nn.Embedding(7, 5)))
    params = {"embed": {"kernel": jnp.asarray(net.embed.weight.detach().numpy())}}
    config = peft.TrainableTokensConfig(token_indices=[3, 1], target_modules=["embed"])
    model = peft.get_peft_model(net, config)
    delta = model.base_model.model.embed.trainable_tokens_delta["default"]
    delta.data += 1
    model.save_pretrained(tmp_path / "theirs")
    sites = jpeft.find_sites(lambda p, tokens: p["embed"]["kernel"][tokens], params, TOKENS)
    method, trainable, frozen = folders.load(tmp_path / "theirs", params, sites)
    assert method.token_indices == (3, 1)
    np.testing.assert_array_equal(trainable["embed"]["kernel"].rows, delta.detach().numpy())
    folders.save(tmp_path / "ours", method, trainable, frozen=frozen, sites=sites, prefix="", task_type=None)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)


def test_rows_start_at_the_table_s_and_a_tied_head_sees_the_same():
    params = {"embed": jnp.asarray(numbers(7, 5))}
    method, trainable, frozen = start(tied, params, token_indices=[6, 1])
    np.testing.assert_array_equal(trainable["embed"].rows, params["embed"][jnp.array([6, 1])])
    np.testing.assert_array_equal(jpeft.lift(tied)(method.bind(trainable, frozen), TOKENS), tied(params, TOKENS))
    moved = {"embed": trainable["embed"].replace(rows=jnp.asarray(numbers(2, 5)))}
    table = params["embed"].at[jnp.array([6, 1])].set(numbers(2, 5))
    bound = method.bind(moved, frozen)
    np.testing.assert_array_equal(jpeft.merge(bound)["embed"], table)
    np.testing.assert_allclose(jpeft.lift(tied)(bound, TOKENS), tied({"embed": table}, TOKENS), atol=1e-5)


def test_a_head_apart_has_the_tokens_as_its_outputs():
    params = {"embed": jnp.asarray(numbers(7, 5)), "head": jnp.asarray(numbers(5, 7))}
    method, trainable, frozen = start(apart, params, token_indices=[3], targets=["embedding", "head"])
    assert trainable["embed"].rows.shape == trainable["head"].rows.shape == (1, 5)
    moved = {**trainable, "head": trainable["head"].replace(rows=jnp.ones((1, 5)))}
    merged = jpeft.merge(method.bind(moved, frozen))["head"]
    np.testing.assert_array_equal(merged, params["head"].at[:, 3].set(1))


def test_the_step_forms_no_second_table():
    params = {"embed": jnp.ones((512, 8))}
    method, trainable, frozen = start(tied, params, token_indices=[6, 1])
    loss = lambda t: jnp.sum(jpeft.lift(tied)(method.bind(t, frozen), TOKENS))
    text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    made = [line for line in text.splitlines() if ":f32[512,8] =" in line]
    assert not made, made


def test_the_count_is_one_row_a_token():
    _, trainable, _ = start(tied, {"embed": jnp.ones((7, 5))}, token_indices=range(3))
    assert trainable["embed"].rows.size == 15


@pytest.mark.parametrize("indices", [[-1], [2, 2]])
def test_options_are_checked_where_they_are_written(indices):
    with pytest.raises(ValueError, match=f"each once, got token_indices={tuple(indices)}".replace("(", r"\(")[:-1]):
        jpeft.TrainableTokens(token_indices=indices)


@pytest.mark.parametrize(("indices", "message"), [([], "no tokens to train"), ([7], "token 7 is not among its 7")])
def test_tokens_that_are_not_there_are_refused(indices, message):
    with pytest.raises(ValueError, match=f"embed: {message}"):
        start(tied, {"embed": jnp.ones((7, 5))}, token_indices=indices)
