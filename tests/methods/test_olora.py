"""OLoRA against HF PEFT and against the decomposition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, assert_starts_as_peft, low_rank_tensors, make_case, numbers

import jpeft


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_it_starts_and_trains_as_peft_s():
    peft = pytest.importorskip("peft")
    ours = jpeft.OLoRA(rank=3, alpha=5, targets="kernel")
    options = dict(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights="olora")
    assert_starts_as_peft(make_case("linear"), ours, peft.LoraConfig(**options))
    case = make_case("linear")
    factors = lambda w: case.factors(w.a, w.b)
    assert_same_as_peft(case, ours, peft.LoraConfig(**options), low_rank_tensors, factors)


def test_b_is_orthonormal_and_the_first_inputs_are_spanned():
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    w, x = jnp.asarray(numbers(3, 7, 7)), jnp.ones((2, 7))
    method = jpeft.OLoRA(rank=4, alpha=4)
    trainable, frozen = method.init(jax.random.key(0), {"w": w}, jpeft.find_sites(fn, {"w": w}, x))
    a, b = trainable["w"].a, trainable["w"].b
    np.testing.assert_allclose(b @ b.mT, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)
    for layer in range(3):
        q, t = np.linalg.qr(np.float64(w[layer].T))
        np.testing.assert_allclose(a[layer] @ b[layer], (q[:, :4] @ t[:4]).T, atol=1e-5)
    np.testing.assert_allclose(frozen["w"].base[:, :4], 0, atol=1e-5)
