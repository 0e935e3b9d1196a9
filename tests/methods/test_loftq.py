"""LoftQ: the start is what HF PEFT's loop gives, divided by the scale; under a compressing method it uses its codes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_model

import jpeft
from jpeft.kernels.nf4 import reference
from jpeft.methods.loftq import normal_float, rounded

KEY = jax.random.key(0)
GOLDEN = Path(__file__).parent.parent / "golden"


def linear(p, x):
    return x @ p["kernel"]


def numbers(*shape):
    return np.random.default_rng(sum(shape)).standard_t(5, size=shape).astype(np.float32)


PARAMS, X = {"kernel": jnp.asarray(numbers(128, 48))}, jnp.asarray(numbers(5, 128))
SITES = jpeft.find_sites(linear, PARAMS, X)


def start(method, params=PARAMS, calibration=None):
    trainable, frozen = jax.jit(lambda k, p: method.init(k, p, SITES, calibration))(KEY, params)
    return method.bind(trainable, frozen)["kernel"]


def theirs(w, rank: int, iterations: int):
    """HF PEFT's loop for a torch weight (out, in), in float64 but for NF4 itself."""
    residual = w
    for _ in range(iterations):
        codes, scales = reference.quantize(residual.astype(np.float32).reshape(-1, 1))
        base = np.asarray(reference.dequantize(codes, scales), np.float64).reshape(w.shape)
        u, s, vt = np.linalg.svd(w - base, full_matrices=False)
        left, right = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vt[:rank]
        residual = w - left @ right
    return base, left @ right


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_start_is_hf_pefts_loop_divided_by_the_scale(iterations, compressed):
    method = jpeft.LoftQ(rank=6, alpha=3, iterations=iterations)
    both = jpeft.chain(jpeft.NF4(double_quant=False), method) if compressed else method
    ours = start(both)
    base, update = theirs(np.asarray(PARAMS["kernel"], np.float64).T, 6, iterations)
    ours_base = ours.base.dense() if compressed else ours.base
    far = np.abs(np.asarray(ours_base) - base.T) > 1e-5  # a weight on the edge of two codes may fall to either side
    assert far.mean() < 1e-3
    if not far.any():
        np.testing.assert_allclose(0.5 * ours.a @ ours.b, update.T, atol=1e-4)
    assert ours.scale == 0.5
    assert np.linalg.norm(ours.dense() - PARAMS["kernel"]) <= np.linalg.norm(base.T - PARAMS["kernel"])


def test_the_start_is_nearer_to_the_pretrained_weights_than_qloras():
    distance = lambda w: float(jnp.linalg.norm(w.dense() - PARAMS["kernel"]))
    qlora = distance(start(jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=8))))
    one, five = (distance(start(jpeft.chain(jpeft.NF4(), jpeft.LoftQ(rank=8, iterations=n)))) for n in (1, 5))
    assert five < one < 0.9 * qlora


def test_one_iteration_keeps_the_codes_of_qlora():
    ours, theirs = (start(jpeft.chain(jpeft.NF4(), m)) for m in (jpeft.LoftQ(), jpeft.LoRA()))
    assert all(map(np.array_equal, jax.tree.leaves(ours.base), jax.tree.leaves(theirs.base)))


def test_calibrate_gives_what_the_chain_shows_by_itself():
    method = jpeft.chain(jpeft.NF4(), jpeft.LoftQ(iterations=2))
    given = jpeft.calibrate(linear, PARAMS, SITES, method=method)
    ours, alone = method.init(KEY, PARAMS, SITES, given), method.init(KEY, PARAMS, SITES)
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(alone)))
    assert jax.tree.leaves(ours[1][0]) != [] or ours[1][0]["kernel"].base is None  # the first codes are gone
    assert sum(x.dtype == jnp.uint4 for x in jax.tree.leaves(ours)) == 1


def test_the_table_is_nf4_at_four_bits_and_ascends_at_every_other():
    np.testing.assert_allclose(normal_float(4), np.load(GOLDEN / "tables.npz")["nf4"], atol=1e-6)
    for bits in range(2, 9):
        table = normal_float(bits)
        assert len(table) == 2**bits and (np.diff(table) > 0).all() and 0 in table
        assert table[-1] == 1 and (table[0] == -1 or bits == 2)


@pytest.mark.parametrize("rows", [128, 100])
def test_rounding_is_that_of_the_4_bit_codes(rows):
    w = jnp.asarray(numbers(2, rows, 7))
    ours, theirs = rounded(w, 4, 64), reference.dequantize(*reference.quantize(w))
    differs = np.abs(np.asarray(ours) - theirs) > 1e-5
    assert differs.mean() < 1e-3
    assert not np.any(rounded(jnp.zeros((64, 2)), 4, 64))


def test_stacked_layers_are_rounded_each_by_itself():
    model = make_model("linen-scanned")
    method = jpeft.LoftQ(**jpeft.LoftQ.SMALL)
    path = "layers/up/kernel"
    _, frozen = method.init(KEY, model.params, model.sites)
    found = frozen["layers"]["up"]["kernel"].base
    one = lambda p, x: x @ p["kernel"]
    for n in range(found.shape[0]):
        alone = {"kernel": model.params["layers"]["up"]["kernel"][n]}
        sites = jpeft.find_sites(one, alone, jnp.ones((1, alone["kernel"].shape[0])))
        _, of_one = method.init(KEY, alone, sites)
        np.testing.assert_allclose(found[n], of_one["kernel"].base, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "expected a whole iterations >= 1"),
        ({"num_bits": 1}, "expected a whole num_bits >= 2 and <= 8"),
        ({"num_bits": 9}, "expected a whole num_bits >= 2 and <= 8"),
        ({"block_size": 1}, "expected a whole block_size >= 2"),
        ({"alpha": 0}, "expected alpha > 0"),
        ({"alpha_pattern": {"q": -1.0}}, "expected alpha > 0"),
    ],
)
def test_what_the_constructor_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoftQ(**fields)


def test_weights_that_are_known_only_compressed_are_refused_unless_given():
    quantizer, method = jpeft.NF4(), jpeft.LoftQ()
    tree = quantizer.bind(*quantizer.init(KEY, PARAMS, SITES))
    with pytest.raises(ValueError, match="kernel came compressed; expected the weights as they were"):
        method.init(KEY, tree, SITES)
    ours = method.bind(*method.init(KEY, tree, SITES, dict(PARAMS)))["kernel"]
    alone = start(jpeft.chain(quantizer, method))
    np.testing.assert_allclose(ours.dense(), alone.dense(), atol=1e-5)


def test_a_leaf_that_another_method_adapts_is_refused():
    with pytest.raises(ValueError, match="put the method first in the chain"):
        jpeft.chain(jpeft.LoRA(), jpeft.LoftQ()).init(KEY, PARAMS, SITES)
