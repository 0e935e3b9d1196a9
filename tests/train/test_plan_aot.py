"""Plans for TPUs that are not here: the step of an 8B Llama, compiled. Needs libtpu (the extra `tpu`)."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
import jpeft.models
from jpeft.parallel import make_mesh
from jpeft.parallel.topology import parse_topology
from jpeft.train.optimizer import adamw
from jpeft.train.plan import plan

pytest.importorskip("libtpu")

LLAMA_8B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)
MATRICES = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


def test_qlora_of_8b_on_four_v5e_chips():
    apply, params = jpeft.models.abstract(LLAMA_8B, param_dtype="bfloat16", dtype="bfloat16", remat="full")
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.chain(jpeft.NF4(double_quant=True), jpeft.LoRA(rank=16))
    topology = parse_topology("v5e-4")
    mesh = make_mesh("fsdp=4", devices=topology.devices())
    found = plan(apply, params, sites, method, adamw(1e-4, 100), mesh, 4, 2048, topology.hbm_gib)
    assert found.fits
    assert found.headroom >= 0.25
    assert 'custom_call_target="tpu_custom_call"' in found.text, "the Pallas kernel"

    besides = 2 * 128256 * 4096 * 2 / 4 + 65 * 4096 * 2  # embedding and head in pieces, norms whole on each chip
    bits = (found.parts_gib["weights"] * 2**30 - besides) * 4 * 8 / MATRICES
    assert bits <= 4.13, bits

    packed = sum(size for dtype, size in found.gathered_bytes.items() if dtype in ("u4", "u8"))
    assert packed <= 0.27 * 2 * (2 * MATRICES), "of a bfloat16 base's, gathered forward and backward"
    # Besides the codes: the embedding and the head, once each, and the adapters, forward and backward.
    adapters = 2 * 32 * 16 * 2 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert found.gathered_bytes["bf16"] <= 2 * 128256 * 4096 * 2 + 2 * adapters
    assert set(found.gathered_bytes) <= {"u4", "u8", "bf16", "f32"}
    assert found.gathered_bytes.get("f32", 0) < 2**24
