"""SHiRA against HF PEFT, and its masks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, make_case, numbers
from peft_folders import assert_same_from_folder
from test_lora import LLAMA3_8B

import jpeft
import jpeft.models
from jpeft.methods.shira import rows_columns_diagonal

KEY = jax.random.key(0)
product = lambda p, x: x @ p["w"]


def start(w, calibration=None, **options):
    method = jpeft.SHiRA(**options)
    sites = jpeft.find_sites(product, {"w": w}, jnp.ones((2, w.shape[0])))
    return method, *method.init(KEY, {"w": w}, sites, calibration)


def mask_of(frozen):
    outputs, inputs = np.asarray(frozen["w"].index)
    mask = np.zeros(frozen["w"].base.shape, bool)
    mask[inputs, outputs] = True
    assert mask.sum() == outputs.size, "each position once"
    return mask


@pytest.mark.parity
@pytest.mark.parametrize("mask", ["rand", "wm"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(mask):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    case = make_case("linear")
    method = jpeft.SHiRA(rank=1, mask=mask, targets="kernel")
    sites = jpeft.find_sites(case.fn, case.params, case.x)
    _, frozen = method.init(KEY, case.params, sites)
    index = np.asarray(frozen["kernel"].index)
    order = np.lexsort((index[1], index[0]))  # PEFT reads the positions off a mask, row by row

    peft_mask = torch.zeros(5, 6)
    peft_mask[index[0], index[1]] = 1
    config = peft.ShiraConfig(r=1, target_modules=["0"])
    config.mask_fn = lambda layer, r, **_: peft_mask
    assert_same_as_peft(
        case, method, config, lambda layer: (layer.shira_weight["default"],), lambda w: (w.values[order],)
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_s_folder_is_read_and_written_back(tmp_path):
    peft = pytest.importorskip("peft")
    assert_same_from_folder(peft.ShiraConfig(r=1, random_seed=3, target_modules=["first", "third"]), tmp_path)


def test_wm_takes_the_largest_weights():
    w = numbers(7, 5)
    _, trainable, frozen = start(w, rank=2, mask="wm")
    assert not np.any(trainable["w"].values)
    np.testing.assert_array_equal(mask_of(frozen), np.abs(w) >= np.sort(np.abs(w), None)[-24])


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_gradients_choose_and_the_choice_is_saved(mask):
    w, batches = numbers(7, 5), [numbers(3, 7, seed=n) for n in range(2)]
    method = jpeft.SHiRA(rank=1, mask=mask)
    sites = jpeft.find_sites(product, {"w": w}, batches[0])
    loss = lambda p, x: jnp.sum(jnp.sin(product(p, x)))
    calibration = jpeft.calibrate(product, {"w": w}, sites, batches, method=method, loss=loss)
    gradient = sum(np.asarray(x.T @ np.cos(x @ w)) for x in batches)
    np.testing.assert_allclose(calibration["w"], gradient, atol=1e-5)
    _, _, frozen = start(w, calibration, rank=1, mask=mask)
    score = np.abs(gradient if mask == "grad" else gradient * w)
    np.testing.assert_array_equal(mask_of(frozen), score >= np.sort(score, None)[-12])
    assert "index" in frozen["w"].SAVED


def test_without_a_calibration_a_mask_of_gradients_is_refused():
    with pytest.raises(ValueError, match="SHiRA starts from gradients of the loss; write"):
        start(numbers(7, 5), rank=1, mask="snip")


def test_struct_is_whole_rows_and_columns_and_the_diagonal():
    _, _, frozen = start(numbers(8, 6), rank=2, mask="struct", offset=1)
    expected = np.eye(8, 6, dtype=bool)
    expected[[1, 5]] = True
    expected[:, [1, 4]] = True
    np.testing.assert_array_equal(mask_of(frozen), expected)


def test_struct_adapters_of_different_offsets_share_the_diagonal_and_the_crossings():
    one, other = (set(map(tuple, rows_columns_diagonal(32, 32, 2, n).T.tolist())) for n in (0, 1))
    crossings = {(a, b) for a in (0, 16) for b in (1, 17)} | {(a, b) for a in (1, 17) for b in (0, 16)}
    assert one & other == {(n, n) for n in range(32)} | crossings


def test_the_count_is_lora_s():
    apply, shapes = jpeft.models.abstract(LLAMA3_8B)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))

    def trainable(method):
        return jpeft.count(jax.eval_shape(lambda k, p: method.init(k, p, sites)[0], KEY, shapes)).total

    options = {"rank": 8, "targets": ["q_proj", "v_proj"]}
    assert trainable(jpeft.SHiRA(**options)) == trainable(jpeft.LoRA(**options)) == 3_407_872


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1, got rank=0"),
        ({"offset": -1}, "offset >= 0, got offset=-1"),
        ({"mask": "random"}, "expected mask in .*'rand'.*, got 'random'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.SHiRA(**options)


def test_a_rank_that_asks_for_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"w: rank 3 asks for 36 of its 7 × 5 entries; write a rank of at most 2"):
        start(numbers(7, 5), rank=3)
    with pytest.raises(ValueError, match=r"rank 6 is above min\(in, out\) = min\(7, 5\)"):
        start(numbers(7, 5), rank=6, mask="struct")
