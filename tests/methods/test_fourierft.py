"""FourierFT against HF PEFT and the published counts; its frequencies against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, make_case, numbers
from peft_folders import assert_same_from_folder
from test_lora import LLAMA2_7B, LLAMA3_8B, LLAMA3_70B, QWEN3_8B

import jpeft
import jpeft.models
from jpeft.methods._spectral import _inserted, torch_positions
from jpeft.methods.fourierft import log_weights

KEY = jax.random.key(0)
product = lambda p, x: x @ p["w"]


def start(w, **options):
    method = jpeft.FourierFT(**options)
    sites = jpeft.find_sites(product, {"w": w}, jnp.ones((2, w.shape[0])))
    return method, *method.init(KEY, {"w": w}, sites)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives():
    peft = pytest.importorskip("peft")
    assert_same_as_peft(
        make_case("linear"),
        jpeft.FourierFT(n_frequency=9, scale=30.0, targets="kernel"),
        peft.FourierFTConfig(n_frequency=9, scaling=30.0, target_modules=["0"]),
        lambda layer: (layer.fourierft_spectrum["default"],),
        lambda w: (w.values,),
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_s_folder_is_read_and_written_back(tmp_path):
    peft = pytest.importorskip("peft")
    assert_same_from_folder(peft.FourierFTConfig(n_frequency=9, target_modules=["first", "second"]), tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize(("n_in", "n_out", "count"), [(5, 6, 30), (24, 40, 100), (4096, 1024, 1000)])
def test_positions_are_those_of_torch_s_shuffle(n_in, n_out, count):
    torch = pytest.importorskip("torch")
    shuffled = torch.randperm(n_in * n_out, generator=torch.Generator().manual_seed(777))[:count].numpy()
    np.testing.assert_array_equal(torch_positions(777, n_in, n_out, count), [shuffled // n_in, shuffled % n_in])


def test_many_entries_are_shuffled_as_torch_shuffles_many():
    """The rule for large matrices, on few numbers: every one is somewhere, and the first are those of the whole."""
    whole = _inserted(np.random.RandomState(3), 50, 50)
    assert sorted(whole) == list(range(50))
    assert _inserted(np.random.RandomState(3), 50, 7) == whole[:7]


def test_the_update_is_the_sum_of_waves_in_float64():
    method, trainable, frozen = start(jnp.zeros((6, 5)), n_frequency=4, scale=7.0)
    outputs, inputs = np.asarray(frozen["w"].index)
    i, o = np.arange(6)[:, None, None], np.arange(5)[:, None]
    waves = np.cos(2 * np.pi * (i * inputs / 6 + o * outputs / 5)) / 30
    expected = 7 * (waves * np.asarray(trainable["w"].values, np.float64)).sum(-1)
    np.testing.assert_allclose(jpeft.merge(method.bind(trainable, frozen))["w"], expected, atol=1e-6)


def test_all_layers_share_their_frequencies_and_not_their_coefficients():
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    params = {"w": jnp.zeros((3, 6, 6))}
    method = jpeft.FourierFT(n_frequency=4)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, jnp.ones((2, 6))))
    assert frozen["w"].index.shape == (2, 4) and trainable["w"].values.shape == (3, 4)
    assert not np.array_equal(trainable["w"].values[0], trainable["w"].values[1])


def test_it_can_start_at_the_pretrained_function():
    w = jnp.asarray(numbers(6, 5))
    method, trainable, frozen = start(w, n_frequency=4, start="zeros")
    np.testing.assert_array_equal(jpeft.merge(method.bind(trainable, frozen))["w"], w)
    _, trainable, _ = start(jnp.zeros((90, 80)), n_frequency=4000)
    assert float(trainable["w"].values.std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("centre", [0.0, 20.0])
def test_a_bias_prefers_frequencies_at_its_centre(centre):
    _, _, frozen = start(jnp.zeros((64, 64)), n_frequency=60, frequency_bias=centre, bandwidth=6.0)
    outputs, inputs = (np.minimum(k, 64 - k) for k in np.asarray(frozen["w"].index))
    distance = np.hypot(inputs, outputs)
    assert abs(float(np.median(distance)) - centre) < 6 and np.unique(outputs * 64 + inputs).size > 1


def test_the_bias_is_equation_5():
    found = log_weights(8, 6, 2.0, 3.0)
    assert found[0, 0] < -1e6 and found[2, 0] == found[6, 0] == 0  # never at zero; surely at the centre
    distance = np.hypot(3, 1)
    np.testing.assert_allclose(found[5, 1], -(((distance**2 - 4) / (distance * 3)) ** 2), rtol=1e-5)
    assert log_weights(8, 6, 0.0, 3.0)[0, 0] == 0


@pytest.mark.parametrize(
    ("config", "count"), [(LLAMA2_7B, 64_000), (LLAMA3_8B, 64_000), (LLAMA3_70B, 160_000), (QWEN3_8B, 72_000)]
)
def test_counts_on_public_models_equal_the_published_integers(config, count):
    apply, shapes = jpeft.models.abstract(config)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.FourierFT(targets=["q_proj", "v_proj"])
    assert jpeft.count(jax.eval_shape(lambda k, p: method.init(k, p, sites)[0], KEY, shapes)).total == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "whole n_frequency >= 1, got 0"),
        ({"n_frequency_pattern": {"w": 2.5}}, "whole n_frequency >= 1, got 2.5"),
        ({"seed": -1}, r"0 <= seed < 2\*\*32, got seed=-1"),
        ({"frequency_bias": -1.0}, "frequency_bias >= 0 or None, got frequency_bias=-1.0"),
        ({"bandwidth": 0.0}, "bandwidth > 0, got bandwidth=0.0"),
        ({"start": "ones"}, "'normal' or 'zeros', got 'ones'"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.FourierFT(**options)


def test_sites_are_checked_before_anything_is_made():
    with pytest.raises(ValueError, match=r"w: n_frequency 31 is above its 6 × 5 entries; write n_frequency_pattern"):
        start(jnp.zeros((6, 5)), n_frequency=31)
    with pytest.raises(ValueError, match="n_frequency_pattern has 'v_proj', found in no adapted path; .*: w"):
        start(jnp.zeros((6, 5)), n_frequency=3, n_frequency_pattern={"v_proj": 2})
    _, trainable, _ = start(jnp.zeros((6, 5)), n_frequency_pattern={"w": 2})
    assert trainable["w"].values.shape == (2,)
