"""WaveFT against HF PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, linear, make_case, numbers
from peft_folders import assert_same_from_folder
from small_models import make_model

import jpeft
from jpeft.methods.waveft import daubechies

KEY = jax.random.key(0)
product = lambda p, x: x @ p["w"]


@pytest.mark.parity
@pytest.mark.parametrize("wavelet", ["db1", "db2", "db5", "db10"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(wavelet):
    peft = pytest.importorskip("peft")
    assert_same_as_peft(
        make_case("linear"),  # one side odd, one even
        jpeft.WaveFT(n_frequency=17, scale=3.0, wavelet_family=wavelet, targets="kernel"),
        peft.WaveFTConfig(n_frequency=17, scaling=3.0, wavelet_family=wavelet, target_modules=["0"]),
        lambda layer: (layer.waveft_spectrum["default"],),
        lambda w: (w.values,),
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_s_folder_is_read_and_written_back(tmp_path):
    peft = pytest.importorskip("peft")
    options = {"wavelet_family": "db2", "target_modules": ["first", "second"]}
    assert_same_from_folder(peft.WaveFTConfig(n_frequency=9, **options), tmp_path)


@pytest.mark.parametrize("order", range(1, 11))
def test_filters_are_orthogonal_to_their_shifts_and_have_vanishing_moments(order):
    low = daubechies(order)
    assert low.size == 2 * order and low.sum() == pytest.approx(2**0.5)
    for shift in range(order):
        assert low[2 * shift :] @ low[: low.size - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-10)
    alternating = low * (-1.0) ** np.arange(low.size)
    for moment in range(order):
        powers = (np.arange(low.size) / low.size) ** moment
        assert alternating @ powers == pytest.approx(0, abs=1e-8)


def test_haar_s_update_is_the_sums_and_differences_of_the_quadrants():
    w = jnp.zeros((4, 6))
    method = jpeft.WaveFT(n_frequency=24, scale=2.0)
    trainable, frozen = method.init(KEY, {"w": w}, jpeft.find_sites(product, {"w": w}, jnp.ones((1, 4))))
    assert not np.any(trainable["w"].values)
    values = numbers(24)
    merged = jpeft.merge(method.bind({"w": trainable["w"].replace(values=jnp.asarray(values))}, frozen))["w"]
    s = np.zeros((4, 6))
    s[tuple(np.asarray(frozen["w"].index)[::-1])] = values
    a, h, v, d = s[:2, :3], s[:2, 3:], s[2:, :3], s[2:, 3:]
    expected = np.zeros((4, 6))
    for row in (0, 1):
        for column in (0, 1):
            expected[row::2, column::2] = a + (-1) ** row * h + (-1) ** column * v + (-1) ** (row + column) * d
    np.testing.assert_allclose(merged, expected, atol=1e-5)  # half of each, times the scale


def test_an_orthogonal_transform_keeps_the_norm():
    w = jnp.zeros((3, 8, 6))
    fn = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"])
    method = jpeft.WaveFT(n_frequency=20, scale=1.0, targets="experts")
    trainable, frozen = method.init(KEY, {"w": w}, jpeft.find_sites(fn, {"w": w}, jnp.ones((3, 2, 8))))
    values = jnp.asarray(numbers(3, 20))
    merged = jpeft.merge(method.bind({"w": trainable["w"].replace(values=values)}, frozen))["w"]
    np.testing.assert_allclose(np.square(merged).sum((1, 2)), np.square(values).sum(1), rtol=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_proportional_parameters_are_peft_s():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    sizes = {"one": (6, 5), "two": (12, 9), "three": (2, 2)}

    def fn(p, x):
        return sum(linear(p[name], x[:, : sizes[name][0]]).sum() for name in sizes)

    params = {n: {"kernel": jnp.ones((o, i)), "bias": jnp.ones(o)} for n, (i, o) in sizes.items()}
    method = jpeft.WaveFT(n_frequency=10, proportional_parameters=True)
    sites = jpeft.find_sites(fn, params, jnp.ones((1, 12)))
    trainable, _ = method.init(KEY, params, sites)
    module = torch.nn.ModuleDict({n: torch.nn.Linear(*size) for n, size in sizes.items()})
    config = peft.WaveFTConfig(n_frequency=10, proportional_parameters=True, target_modules=list(sizes))
    model = peft.get_peft_model(module, config).base_model.model
    theirs = {n: model[n].waveft_spectrum["default"].numel() for n in sizes}
    assert {n: trainable[n]["kernel"].values.size for n in sizes} == theirs


def test_layers_of_a_stack_count_one_by_one_for_the_budget():
    scanned, unrolled = make_model("linen-scanned"), make_model("linen-unrolled")
    method = jpeft.WaveFT(n_frequency=30, proportional_parameters=True, targets=["up", "attention/out"])
    shares = method.shares(scanned.sites)
    assert shares["layers/up/kernel"] == method.shares(unrolled.sites)["layer_1/up/kernel"] == 38
    total = 3 * sum(shares.values())
    assert total == pytest.approx(30 * 6, abs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wavelet_family": "db11"}, "from 'db1' to 'db10', got 'db11'"),
        ({"wavelet_family": "sym2"}, "got 'sym2'"),
        ({"proportional_parameters": True, "n_frequency_pattern": {"w": 3}}, "got both"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.WaveFT(**options)


def test_a_share_of_more_than_there_is_is_refused():
    w = {"w": jnp.ones((4, 3))}
    sites = jpeft.find_sites(product, w, jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="w: n_frequency 50 is above its 4 × 3 entries"):
        jpeft.WaveFT(n_frequency=50, proportional_parameters=True).init(KEY, w, sites)
