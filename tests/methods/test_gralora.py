"""GraLoRA against HF PEFT and block by block in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import assert_same_as_peft, make_case, numbers

import jpeft

KEY = jax.random.key(0)


def start(params, fn=lambda p, x: x @ p["w"], **options):
    method = jpeft.GraLoRA(**{"targets": "w", **options})
    x = jnp.ones((1, params["w"].shape[-2]))
    return method, *method.init(KEY, params, jpeft.find_sites(fn, params, x))


@pytest.mark.parity
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("hybrid", [0, 3])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(k, hybrid):
    peft = pytest.importorskip("peft")

    def theirs(layer):
        general = (layer.gralora_A_general["default"], layer.gralora_B_general["default"]) if hybrid else ()
        return layer.gralora_A["default"], layer.gralora_B["default"], *(linear.weight for linear in general)

    def ours(w):
        return (w.a, w.b, w.general_a.T, w.general_b.T) if hybrid else (w.a, w.b)

    assert_same_as_peft(
        make_case("wide linear"),
        jpeft.GraLoRA(rank=4, gralora_k=k, hybrid_rank=hybrid, alpha=6.0, targets="kernel"),
        peft.GraloraConfig(r=4, gralora_k=k, hybrid_r=hybrid, alpha=6, target_modules=["0"]),
        theirs,
        ours,
    )


def test_each_block_has_the_product_of_its_own_parts_in_float64():
    method, trainable, frozen = start({"w": jnp.zeros((12, 9))}, rank=6, gralora_k=3, alpha=12)
    trainable = jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)
    merged = jpeft.merge(method.bind(trainable, frozen))["w"]
    a, b = (np.asarray(t, np.float64) for t in (trainable["w"].a, trainable["w"].b))
    for n in range(3):
        for m in range(3):
            expected = 2.0 * a[n][:, 2 * m : 2 * m + 2] @ b[m][2 * n : 2 * n + 2]
            np.testing.assert_allclose(merged[4 * n : 4 * n + 4, 3 * m : 3 * m + 3], expected, atol=1e-5)


def test_the_update_has_k_times_the_rank_of_a_lora_with_as_many_parameters():
    method, trainable, frozen = start({"w": jnp.zeros((24, 24))}, rank=4, gralora_k=4)
    assert sum(t.size for t in jax.tree.leaves(trainable)) == 4 * (24 + 24)
    trainable = jax.tree.map(lambda t: jnp.asarray(numbers(*t.shape)), trainable)
    assert np.linalg.matrix_rank(jpeft.merge(method.bind(trainable, frozen))["w"]) == 16


def test_it_starts_as_lora_does_with_the_inputs_of_a_block_as_fan_in():
    _, trainable, _ = start({"w": jnp.zeros((200, 80))}, rank=40, gralora_k=2, hybrid_rank=20)
    w = trainable["w"]
    assert 0.099 < np.abs(w.a).max() <= 0.1 and not w.b.any()
    assert 0.069 < np.abs(w.general_a).max() <= 1 / np.sqrt(200) and not w.general_b.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1, .*got rank=0"),
        ({"gralora_k": 0}, "gralora_k >= 1 .*gralora_k=0"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
        ({"hybrid_rank": -1}, "hybrid_rank >= 0, .*hybrid_rank=-1"),
        ({"rank": 6, "gralora_k": 4}, "a rank that gralora_k divides, got rank=6, gralora_k=4"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.GraLoRA(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "w: gralora_k 2 does not divide its 8 inputs and 9 outputs; leave the site out"),
        ({"rank": 9, "gralora_k": 1}, r"w: rank 9, hybrid_rank 0: above min\(in, out\) = min\(8, 9\)"),
        ({"rank": 2, "gralora_k": 1, "hybrid_rank": 9}, "w: rank 2, hybrid_rank 9: above"),
    ],
)
def test_sites_are_checked_before_anything_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        start({"w": jnp.ones((8, 9))}, **options)
