"""LoRA-GA against HF PEFT, and its first step against the gradient's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, assert_starts_as_peft, low_rank_tensors, make_case, numbers

import jpeft

KEY = jax.random.key(0)
DIRECTIONS, SCALES = ("ArB2r", "A2rBr", "ArBr"), ("stable", "gd_scale", "weight_svd", "unit")


def product(p, x):
    return x @ p["w"]


def calibrated(method, fn, params, batches):
    sites = jpeft.find_sites(fn, params, batches[0])
    loss = lambda p, x: jnp.sum(jnp.sin(fn(p, x)))
    return sites, jpeft.calibrate(fn, params, sites, batches, method=method, loss=loss)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("direction", "scale"), [(d, "stable") for d in DIRECTIONS] + [("ArB2r", s) for s in SCALES[1:]]
)
@pytest.mark.filterwarnings("ignore")
def test_weighted_it_starts_and_trains_as_peft_s(direction, scale):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    batches = [numbers(7, 6, seed=n) for n in range(2)]
    ours = jpeft.LoRAGA(rank=2, alpha=5, direction=direction, scale=scale, weighted=True, targets="kernel")

    def compare(check, *tensors):
        case = make_case("linear")
        config = peft.LoraConfig(
            r=2,
            lora_alpha=5,
            target_modules=["0"],
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
        )
        step = lambda model: [torch.sin(model(torch.from_numpy(x))).sum().backward() for x in batches]
        prepare = lambda model: preprocess_loraga(model, config, lambda: step(model))
        _, calibration = calibrated(ours, case.fn, case.params, [jnp.asarray(x) for x in batches])
        check(case, ours, config, *tensors, calibration=calibration, prepare=prepare)

    compare(assert_starts_as_peft)
    if (direction, scale) == ("ArB2r", "stable"):
        compare(assert_same_as_peft, low_rank_tensors, lambda w: (w.a.T, w.b.T))


@pytest.mark.parametrize("direction", (*DIRECTIONS, "random"))
def test_the_first_step_moves_the_weight_along_its_gradient(direction):
    """To first order in the step ΔW is −s²·c² times the gradient's best approximation of rank 2·rank."""
    params, x = {"w": jnp.asarray(numbers(12, 8))}, jnp.asarray(numbers(20, 12))
    method = jpeft.LoRAGA(rank=2, alpha=6, direction=direction, gamma=4.0)
    sites, calibration = calibrated(method, product, params, [x])
    trainable, frozen = method.init(KEY, params, sites, calibration)
    loss = lambda t: jnp.sum(jnp.sin(jpeft.lift(product)(method.bind(t, frozen), x)))
    grads = jax.grad(loss)(trainable)["w"]
    a, b = trainable["w"].a, trainable["w"].b
    move = 3 * (np.asarray(grads.a, np.float64) @ np.asarray(b) + np.asarray(a) @ np.asarray(grads.b, np.float64))
    u, s, vt = np.linalg.svd(np.asarray(calibration["w"], np.float64), full_matrices=False)
    c = 8**0.25 / 4**0.5
    np.testing.assert_allclose(move, 9 * c**2 * (u[:, :4] * s[:4]) @ vt[:4], atol=1e-3)


@pytest.mark.parametrize(("scale", "expected"), [("unit", 1.0), ("gd_scale", 1 / 3), ("stable", 8**0.25 / 4)])
def test_a_and_b_are_orthogonal_and_of_the_scale_s_size(scale, expected):
    params, x = {"w": jnp.asarray(numbers(12, 8))}, jnp.asarray(numbers(20, 12))
    method = jpeft.LoRAGA(rank=2, alpha=6, scale=scale)
    sites, calibration = calibrated(method, product, params, [x])
    w = method.init(KEY, params, sites, calibration)[0]["w"]
    for gram in (w.a.T @ w.a, w.b @ w.b.T):
        np.testing.assert_allclose(gram, expected**2 * np.eye(2), atol=1e-5)


def test_the_weight_s_own_size_is_the_mean_of_its_values_roots():
    params, x = {"w": jnp.asarray(numbers(12, 8))}, jnp.asarray(numbers(20, 12))
    method = jpeft.LoRAGA(rank=2, alpha=6, scale="weight_svd")
    sites, calibration = calibrated(method, product, params, [x])
    w = method.init(KEY, params, sites, calibration)[0]["w"]
    sigma = np.linalg.svd(np.float64(params["w"]), compute_uv=False)[:2]
    np.testing.assert_allclose(np.linalg.norm(w.a, axis=0), np.mean(np.sqrt(sigma / 3)), rtol=1e-4)


def test_random_halves_are_each_layer_s_own_and_peft_s_are_one_half():
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    params, x = {"w": jnp.asarray(numbers(6, 8, 8))}, jnp.asarray(numbers(20, 8))
    for weighted in (False, True):
        method = jpeft.LoRAGA(rank=3, direction="random", scale="unit", weighted=weighted)
        sites, calibration = calibrated(method, fn, params, [x])
        trainable = method.init(KEY, params, sites, calibration)[0]["w"]
        u, _, vt = np.linalg.svd(np.asarray(calibration["w"], np.float64))
        index = lambda overlap: [frozenset(np.argmax(np.abs(o), axis=-1).tolist()) for o in overlap]
        of_a = index(np.swapaxes(trainable.a, -1, -2) @ u)
        of_b = index(np.asarray(trainable.b) @ np.swapaxes(vt, -1, -2))
        every = set(range(6))
        assert all((a == b) if weighted else (a | b == every) for a, b in zip(of_a, of_b, strict=True))
        assert len(set(of_a)) > 1


def test_what_it_cannot_start_from_is_refused():
    for options, message in (
        ({"direction": "ABr"}, "expected direction in .*'ArB2r'.*, got 'ABr'"),
        ({"scale": "stabel"}, "expected scale in .*'stable'.*, got 'stabel'"),
        ({"gamma": 0.0}, "expected gamma > 0, got gamma=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            jpeft.LoRAGA(**options)
    params, x = {"w": jnp.ones((6, 5))}, jnp.ones((4, 6))
    with pytest.raises(ValueError, match=r"w: rank 3 takes 6 directions of a gradient that has min.*\(6, 5\)"):
        calibrated(jpeft.LoRAGA(rank=3), product, params, [x])
    with pytest.raises(ValueError, match="expected finite gradients, got others at w"):
        calibrated(jpeft.LoRAGA(rank=2), product, params, [jnp.full((4, 6), jnp.inf)])
