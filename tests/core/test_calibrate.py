"""calibrate shows a method what each matrix is multiplied with, its gradients, or its weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_model

import jpeft


@dataclass(frozen=True)
class Looker(jpeft.LoRA):
    """Keeps all that it is shown."""

    looks_at: str = "inputs"

    KINDS = ("dense",)
    CALIBRATION = "what it is shown"

    @property
    def OBSERVES(self):  # noqa: N802
        return self.looks_at

    def observe(self, state, seen, site):
        return [*(state or []), seen]


def layers(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.einsum("btd,dhk->bthk", x, params["heads"])


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    params = {"layers": rng.normal(size=(3, 4, 4)).astype("f4"), "heads": rng.normal(size=(4, 2, 5)).astype("f4")}
    x = rng.normal(size=(2, 6, 4)).astype("f4")
    return params, x, jpeft.find_sites(layers, params, x)


def test_inputs_are_those_that_each_layer_sees(model):
    params, x, sites = model
    more = 2 * x[:, :3]
    seen = jpeft.calibrate(layers, params, sites, [x, (more,)], method=Looker(rank=2))
    for batch, inputs in enumerate((x, more)):
        rows = inputs.reshape(-1, 4)
        for n in range(3):
            np.testing.assert_allclose(seen["layers"][batch][n], rows, atol=1e-5)
            rows = np.tanh(rows @ params["layers"][n])
        np.testing.assert_allclose(seen["heads"][batch], rows, atol=1e-5)


def test_masked_rows_are_not_shown(model):
    params, x, sites = model
    keep = np.arange(12).reshape(2, 6) % 3 > 0
    seen = jpeft.calibrate(layers, params, sites, [x], method=Looker(rank=2), mask=lambda x: keep)
    np.testing.assert_allclose(seen["layers"][0][0], x[keep], atol=1e-6)
    with pytest.raises(ValueError, match="the mask is for 5 rows, the matrix sees 12"):
        jpeft.calibrate(layers, params, sites, [x], method=Looker(rank=2), mask=lambda x: np.ones(5, bool))


def test_gradients_are_those_of_the_loss(model):
    params, x, sites = model
    loss = lambda p, x: jnp.sum(layers(p, x) ** 2)
    seen = jpeft.calibrate(
        layers, params, sites, [x], method=Looker(rank=2, looks_at="gradients", targets="heads"), loss=loss
    )
    assert list(seen) == ["heads"]
    np.testing.assert_allclose(seen["heads"][0], jax.grad(loss)(params, x)["heads"], rtol=1e-5)


def test_weights_are_those_before_the_chain(model):
    params, _, sites = model
    method = jpeft.chain(jpeft.LoRA(rank=2), Looker(rank=2, looks_at="weights", targets="heads"))
    nothing, seen = jpeft.calibrate(layers, params, sites, method=method)
    assert nothing == {} and seen["heads"] is params["heads"]


def test_every_kind_of_model_shows_its_inputs():
    for kind in ("linen-scanned-axis-1", "nnx", "plain"):
        model = make_model(kind)
        method = Looker(rank=2)
        seen = jpeft.calibrate(model.apply, model.params, model.sites, [model.inputs], method=method)
        assert set(seen) == set(method.chosen(model.sites))
        assert all(np.isfinite(x).all() and np.any(x) for (x,) in seen.values())


def test_what_cannot_be_gathered_is_refused(model):
    params, x, sites = model
    with pytest.raises(ValueError, match="Looker starts from what it is shown; expected at least one batch"):
        jpeft.calibrate(layers, params, sites, method=Looker(rank=2))
    with pytest.raises(ValueError, match="write calibrate.*loss="):
        jpeft.calibrate(layers, params, sites, [x], method=Looker(rank=2, looks_at="gradients"))
    with pytest.raises(ValueError, match="calibration = jpeft.calibrate.*method=Looker"):
        Looker(rank=2).init(jax.random.key(0), params, sites)
    with pytest.raises(ValueError, match="the calibration says nothing of layers"):
        Looker(rank=2).init(jax.random.key(0), params, sites, {"heads": 0})
    twice = lambda p, x: x @ p["w"] @ p["w"]
    square = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="w: one run uses it 2 times"):
        jpeft.calibrate(twice, square, jpeft.find_sites(twice, square, x), [x], method=Looker(rank=2))
