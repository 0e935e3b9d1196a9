"""CorDA against HF PEFT and against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, assert_starts_as_peft, low_rank_tensors, make_case, numbers

import jpeft

KEY = jax.random.key(0)


def calibrated(method, fn, params, batches):
    sites = jpeft.find_sites(fn, params, batches[0])
    return sites, jpeft.calibrate(fn, params, sites, batches, method=method)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.filterwarnings("ignore")
def test_it_starts_and_trains_as_peft_s(mode):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    batches = [numbers(20, 6, seed=n) * np.float32([3, 2, 1, 1, 0.5, 0.5]) for n in range(3)]
    ours = jpeft.CorDA(rank=2, alpha=5, mode=mode, targets="kernel")

    def compare(check, *tensors):
        case = make_case("linear")
        config = peft.LoraConfig(
            r=2,
            lora_alpha=5,
            target_modules=["0"],
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=mode),
        )
        run = lambda model: [model(torch.from_numpy(x)) for x in batches]
        prepare = lambda model: corda.preprocess_corda(model, config, run_model=lambda: run(model))
        _, calibration = calibrated(ours, case.fn, case.params, [jnp.asarray(x) for x in batches])
        check(case, ours, config, *tensors, calibration=calibration, prepare=prepare)

    compare(assert_starts_as_peft)
    compare(assert_same_as_peft, low_rank_tensors, lambda w: (w.a.T, w.b.T))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_part_that_trains_is_the_formula_s_in_every_layer(mode):
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    w, x = numbers(2, 6, 6), numbers(30, 6)
    method = jpeft.CorDA(rank=2, alpha=6, mode=mode)
    sites, calibration = calibrated(method, fn, {"w": jnp.asarray(w)}, [jnp.asarray(x)])
    trainable, frozen = jax.jit(lambda p: method.init(KEY, p, sites, calibration))({"w": jnp.asarray(w)})
    part = slice(None, 2) if mode == "ipm" else slice(-2, None)
    rows = x.astype(np.float64)
    for layer in range(2):
        matrix, scaled = w[layer].astype(np.float64), rows / abs(rows.max())
        c = scaled.T @ scaled
        c += 0.01 * np.mean(np.diag(c)) * np.eye(6)
        u, s, vt = np.linalg.svd(c @ matrix)
        expected = np.linalg.inv(c) @ (u[:, part] * s[part]) @ vt[part]
        a, b = (np.asarray(getattr(trainable["w"], name)[layer], np.float64) for name in "ab")
        np.testing.assert_allclose(3 * a @ b, expected, atol=1e-4)
        np.testing.assert_allclose(frozen["w"].base[layer], matrix - expected, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(s[part] / 3), rtol=1e-3)
        rows = np.tanh(rows @ matrix)


def test_a_weight_of_lower_rank_has_nothing_to_train_there():
    w = jnp.asarray(numbers(6, 1) @ numbers(1, 5))
    product = lambda p, x: x @ p["w"]
    method = jpeft.CorDA(rank=2, mode="kpm")
    sites, calibration = calibrated(method, product, {"w": w}, [jnp.asarray(numbers(20, 6))])
    trainable, frozen = method.init(KEY, {"w": w}, sites, calibration)
    assert not np.any(trainable["w"].a) and np.array_equal(frozen["w"].base, w)


def test_what_it_cannot_start_from_is_refused():
    product = lambda p, x: x @ p["w"]
    params = {"w": jnp.ones((6, 5))}
    with pytest.raises(ValueError, match=r"expected mode in \('ipm', 'kpm'\), got 'ppm'"):
        jpeft.CorDA(mode="ppm")
    for x in (jnp.zeros((4, 6)), jnp.full((4, 6), jnp.inf)):
        with pytest.raises(ValueError, match="w: expected inputs that are finite and not all zero"):
            calibrated(jpeft.CorDA(rank=2), product, params, [x])
    with pytest.raises(ValueError, match="CorDA starts from the inputs of the matrices; write"):
        jpeft.CorDA(rank=2).init(KEY, params, jpeft.find_sites(product, params, jnp.ones((4, 6))))
