"""bitsandbytes' checkpoint entries: read exactly, written to the byte, refused where they contradict themselves."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

import jpeft
from jpeft.interop import bitsandbytes

GOLDEN = Path(__file__).parent.parent / "golden"
NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
ENTRIES = ("nested", "plain")


def golden(entry):
    """The tensors of the checkpoint's entry, and those that were recorded beside it."""
    tensors = load_file(GOLDEN / f"linear4bit_{entry}_uint8.safetensors")
    of_entry = {key: np.asarray(x) for key, x in tensors.items() if key.startswith(NAME)}
    return of_entry, {key: x for key, x in tensors.items() if key not in of_entry}


def linear(p, x):
    return x @ p["kernel"]


def ulps(a, b):
    """How many bfloat16 numbers lie between two arrays."""
    as_int = lambda x: np.asarray(x).view(np.int16).astype(np.int32)
    return np.abs(as_int(a) - as_int(b))


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_stands_for_the_transposed_weight(entry):
    tensors, recorded = golden(entry)
    weight = bitsandbytes.from_tensors(tensors, NAME)
    assert weight.shape == (64, 96) and weight.dtype == jnp.bfloat16 and weight.axes == "io"
    differs = ulps(weight.dense().T, recorded["dequant"])
    if entry == "plain":
        assert not differs.any()
    else:  # a scale's last bit: the compiler may round its product and sum once
        assert differs.max() <= 1 and (differs > 0).mean() < 0.01


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_layer_gives_the_output_and_the_gradient_that_bitsandbytes_gives(entry):
    tensors, recorded = golden(entry)
    tree = {"kernel": bitsandbytes.from_tensors(tensors, NAME)}
    y, pull = jax.vjp(lambda x: jpeft.lift(linear)(tree, x), recorded["x"])
    for ours, theirs in ((y, recorded["y"]), (pull(jnp.ones_like(y))[0], recorded["dx_of_ones"])):
        assert ours.dtype == theirs.dtype == jnp.bfloat16
        ours, theirs = np.float32(ours), np.float32(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-8 * np.abs(theirs).max())


@pytest.mark.parametrize("entry", ENTRIES)
def test_reading_and_writing_gives_the_same_bytes(entry):
    tensors, _ = golden(entry)
    written = bitsandbytes.to_tensors(bitsandbytes.from_tensors(tensors, NAME), NAME)
    assert list(written) == bitsandbytes.tensor_names(bitsandbytes.from_tensors(tensors, NAME), NAME)
    assert written.keys() == tensors.keys()
    for key, theirs in tensors.items():
        assert written[key].dtype == theirs.dtype and written[key].shape == theirs.shape, key
        assert written[key].tobytes() == theirs.tobytes(), key


def test_a_kernel_is_quantized_as_bitsandbytes_does():
    tensors, recorded = golden("nested")
    theirs = bitsandbytes.from_tensors(tensors, NAME)
    ours = bitsandbytes.quantize(recorded["orig"].T, double_quant=True)
    np.testing.assert_array_equal(ours.base, theirs.base)
    np.testing.assert_allclose(ours.offset, theirs.offset, rtol=3e-7)
    assert (ours.scales != theirs.scales).mean() < 0.03  # the compiled CPU library rounds a few to a neighbour
    plain, _ = golden("plain")
    alone = bitsandbytes.quantize(recorded["orig"].T)
    np.testing.assert_array_equal(alone.scales.T.reshape(-1), plain[f"{NAME}.absmax"])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_form_goes_to_tensors_and_back(quant_type, double_quant):
    kernel = jax.random.normal(jax.random.key(0), (96, 10))
    ours = bitsandbytes.quantize(kernel, 32, double_quant, quant_type)
    tensors = bitsandbytes.to_tensors(ours, "w")
    assert set(tensors) == set(bitsandbytes.tensor_names(ours, "w"))
    back = bitsandbytes.from_tensors(tensors, "w", compute_dtype="bfloat16")
    assert back.compute_dtype == "bfloat16"
    back = back.replace(compute_dtype=None)
    assert jax.tree.structure(back) == jax.tree.structure(ours)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(ours)))


def test_codes_stored_as_a_wider_type_are_the_same_bytes():
    tensors, _ = golden("plain")
    wide = {**tensors, NAME: tensors[NAME].reshape(-1).view(jnp.bfloat16)[:, None]}
    ours, theirs = (bitsandbytes.from_tensors(t, NAME) for t in (wide, tensors))
    np.testing.assert_array_equal(ours.base, theirs.base)


def test_another_codebook_of_the_scales_is_honoured():
    tensors, _ = golden("nested")
    key = f"{NAME}.nested_quant_map"
    other = bitsandbytes.from_tensors({**tensors, key: tensors[key] * np.float32(0.5)}, NAME)
    ours = bitsandbytes.from_tensors(tensors, NAME).with_plain_scales()
    assert not other.double_quant
    expected = (np.asarray(ours.scales, np.float64) + float(bitsandbytes.from_tensors(tensors, NAME).offset)) / 2
    np.testing.assert_allclose(other.scales, expected, rtol=1e-5)


def edited(entry, **changes):
    """The entry with tensors replaced, or left out where None; `state` changes its description."""
    tensors, _ = golden(entry)
    state = json.loads(tensors[STATE].tobytes()) | changes.pop("state", {})
    tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    for part, value in changes.items():
        key = NAME if part == "weight" else f"{NAME}.{part}"
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ("plain", {"weight": np.zeros((7, 1), np.uint8)}, r"up_proj.weight: expected uint8\[3072\], got uint8\[7\]"),
        ("plain", {"absmax": np.zeros(7, np.float32)}, r"absmax: expected float32\[96\], got float32\[7\]"),
        ("plain", {"absmax": np.zeros(96, np.uint8)}, r"absmax: expected float32\[96\], got uint8\[96\]"),
        ("plain", {"absmax": None}, "the checkpoint lacks model.layers.0.mlp.up_proj.weight.absmax"),
        ("plain", {"weight": None}, "the checkpoint lacks model.layers.0.mlp.up_proj.weight$"),
        ("plain", {"quant_map": np.zeros(16, np.float32)}, "it is not the codebook of nf4"),
        ("plain", {"state": {"shape": [96, 128]}}, r"expected uint8\[6144\], got uint8\[3072\]"),
        ("plain", {"state": {"shape": [3, 50]}}, "blocks of 64 run from one output of 50 inputs into the next"),
        ("plain", {"state": {"blocksize": 32}}, r"absmax: expected float32\[192\]"),
        ("plain", {"state": {"blocksize": 0}}, "expected a matrix in nf4 or fp4"),
        ("plain", {"state": {"quant_type": "fp4"}}, "expected a matrix in nf4 or fp4"),
        ("plain", {"state": {"dtype": "int8"}}, "expected a matrix in nf4 or fp4"),
        ("plain", {"state": {"shape": [96]}}, "is not a description by bitsandbytes"),
        ("nested", {"nested_absmax": np.zeros(3, np.float32)}, r"nested_absmax: expected float32\[1\]"),
        ("nested", {"nested_quant_map": np.zeros(16, np.float32)}, r"nested_quant_map: expected float32\[256\]"),
        ("nested", {"state": {"nested_blocksize": 128}}, "expected 8-bit scales in groups of 256"),
        ("nested", {"state": {"nested_offset": None}}, "expected 8-bit scales in groups of 256"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(entry, changes, message):
    with pytest.raises(ValueError, match=message):
        bitsandbytes.from_tensors(edited(entry, **changes), NAME)


def test_a_description_that_is_missing_or_no_json_is_refused():
    tensors, _ = golden("plain")
    with pytest.raises(ValueError, match="is not a description by bitsandbytes"):
        bitsandbytes.from_tensors({**tensors, STATE: np.frombuffer(b"\xff{", np.uint8)}, NAME)
    del tensors[STATE]
    with pytest.raises(ValueError, match="expected one tensor .*nf4 or ...fp4, got none"):
        bitsandbytes.from_tensors(tensors, NAME)


def test_what_bitsandbytes_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="a block size that divides the inputs, got block_size=64 for 100 inputs"):
        bitsandbytes.quantize(jnp.ones((100, 4)))
    with pytest.raises(ValueError, match=r"expected a kernel \(in, out\)"):
        bitsandbytes.quantize(jnp.ones((2, 64, 4)))
    kernel, x = jnp.ones((100, 4)), jnp.ones((1, 100))
    sites = jpeft.find_sites(linear, {"kernel": kernel}, x)
    for method, message in ((jpeft.NF4(), "run from one output into the next"), (jpeft.Int8(), "to end in '.weight'")):
        tree = method.bind(*method.init(jax.random.key(0), {"kernel": kernel}, sites))
        with pytest.raises(ValueError, match=message):
            bitsandbytes.to_tensors(tree["kernel"], "w")
