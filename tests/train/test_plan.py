"""Plans for devices that are there: eight virtual CPUs. For TPUs that are not, see `test_plan_aot.py`."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
import jpeft.models
from jpeft.parallel import layout, make_mesh
from jpeft.parallel.program import Collective
from jpeft.train import plan as plans
from jpeft.train.plan import flops_per_token, plan

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def model():
    apply, params = jpeft.models.abstract(CONFIG, param_dtype="bfloat16", dtype="bfloat16", remat="full")
    return apply, params, jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))


QLORA = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=4))


def test_a_plan_says_what_each_device_holds_and_exchanges(model, monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 64)
    monkeypatch.setattr(layout, "TINY", 64)
    found = plan(*model, QLORA, optax.adamw(1e-3), make_mesh("fsdp=8"), 8, 32, limit_gib=1.0)
    assert (found.fits, found.mesh) == (True, "fsdp=8")
    assert 0 < found.gib < 0.1
    assert found.headroom == 1 - found.gib
    matrices = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    embeddings = 2 * 64 * 256 * 2 / 8
    assert found.parts_gib["weights"] * 2**30 == pytest.approx(matrices * 4.127 / 8 / 8 + embeddings, rel=0.05)
    assert found.parts_gib["optimizer"] == pytest.approx(2 * found.parts_gib["adapters"], rel=0.01)
    codes = sum(size for dtype, size in found.gathered_bytes.items() if dtype in ("u4", "u8", "s4", "s8"))
    assert codes >= 2 * matrices // 2, "the codes of all layers, forward and backward"


def test_what_tensor_parallelism_cuts_stays_cut_where_it_is_gathered(model, monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 64)
    monkeypatch.setattr(layout, "TINY", 64)
    codes = {}
    for mesh in ("fsdp=4,data=2", "fsdp=4,tensor=2"):
        found = plan(*model, QLORA, optax.adamw(1e-3), make_mesh(mesh), 8, 32, limit_gib=1.0)
        codes[mesh] = sum(size for dtype, size in found.gathered_bytes.items() if dtype in ("u4", "u8", "s4", "s8"))
    assert codes["fsdp=4,tensor=2"] <= 0.51 * codes["fsdp=4,data=2"]


def test_gathers_that_the_compiler_wrote_as_sums_of_words_count_as_gathered():
    exchanges = [
        ("all-gather", "u32", 8),
        ("all-gather", "u4", 4),
        ("all-reduce", "bf16", 2),
        ("all-reduce", "u32", 16),
    ]
    found = plans.Plan("fsdp=8", True, 1.0, 2.0, {}, exchanges=tuple(Collective(k, d, 1, n) for k, d, n in exchanges))
    assert found.gathered_bytes == {"u32": 24, "u4": 4}


def test_offloaded_state_is_the_host_s(model):
    tx = jpeft.offload(optax.adamw(1e-3))
    found = plan(*model, QLORA, tx, make_mesh("fsdp=8"), 8, 32, limit_gib=1.0)
    assert found.fits
    assert found.parts_gib["optimizer"] < 0.01 * found.parts_gib["adapters"], "the counters alone"


def test_devices_that_show_no_host_memory_hold_no_offloaded_state():
    class Described:
        device_kind = "NVIDIA B200"
        addressable_memories = staticmethod(list)

    with pytest.raises(ValueError, match="NVIDIA B200, only compiled for, shows no memory of a host"):
        plans._check_host(Described)


def test_a_small_limit_does_not_fit(model):
    assert not plan(*model, QLORA, optax.adamw(1e-3), make_mesh("fsdp=8"), 8, 32, limit_gib=1e-4).fits


def test_rows_that_devices_cannot_share_are_refused(model):
    with pytest.raises(ValueError, match="12 rows cannot be split over the 8 devices"):
        plan(*model, QLORA, optax.adamw(1e-3), make_mesh("fsdp=8"), 12, 32, 1.0)
    with pytest.raises(ValueError, match="microbatches of 4 rows .* accumulation may be at most 2"):
        plan(*model, QLORA, optax.adamw(1e-3), make_mesh("fsdp=8"), 16, 32, 1.0, accumulation=4)


def test_operations_a_token_are_those_of_the_products(model):
    matrices = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    head, attention = 64 * 256, 3 * 2 * 32 * 256  # scores and their products with the values, rows of 32
    lora = 3 * 4 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
    down = 3 * 512 * 256
    frozen = 3 * matrices - down + 2 * head  # forward, again but for what closes a layer, and back to the inputs
    found = flops_per_token(*model, QLORA, optax.adamw(1e-3), 32)
    assert 2 * (frozen + 3 * lora + 3 * attention) < found < 2 * (frozen + 4 * lora + 4 * attention)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 17.61G of 15.75G hbm. Exceeded hbm capacity by 1.86G", 17.61),
        ("the total memory required for HLO temporaries (240.12G) exceeds available HBM (15.75G).", 240.12),
        ("Mosaic failed to compile", None),
    ],
)
def test_what_a_program_needs_is_in_the_compiler_s_refusal(message, gib):
    assert plans._needed(message) == gib
