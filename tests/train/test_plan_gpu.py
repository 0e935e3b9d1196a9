"""Plans for GPUs that are not here: a small Llama's step, compiled. Needs JAX's CUDA plugin (`jax[cuda13]`)."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
import jpeft.models
from jpeft.parallel import layout, make_mesh
from jpeft.parallel.topology import parse_topology
from jpeft.train.plan import plan

pytest.importorskip("jax_cuda13_plugin")

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
)
MATRICES = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
QLORA = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=4))


ADAMW = optax.adamw(1e-3)


def planned(topology, rows, limit=None, tx=ADAMW):
    apply, params = jpeft.models.abstract(CONFIG, param_dtype="bfloat16", dtype="bfloat16", remat="full")
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    given = parse_topology(topology)
    mesh = make_mesh({"fsdp": given.size}, devices=given.devices())
    return plan(apply, params, sites, QLORA, tx, mesh, rows, 64, limit or given.hbm_gib)


@pytest.mark.parametrize("kind", ["a100", "h100", "b200"])
def test_a_step_on_one_gpu_takes_its_weights_and_more(kind):
    found = planned(f"{kind}-1", 1)
    assert found.fits
    assert found.exchanges == ()
    held = sum(size for name, size in found.parts_gib.items() if name not in ("temporaries", "program"))
    assert MATRICES / 2 / 2**30 < found.parts_gib["weights"] < held < found.gib < 0.1
    targets = re.findall(r'custom_call_target="([^"]*)"', found.text)
    assert not [t for t in targets if "mosaic" in t or t == "__gpu$xla.gpu.triton"], "no kernel that was not measured"


def test_what_compiles_and_does_not_fit_says_all_the_same_what_gpus_exchange(monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 64)
    found = planned("h100-8", 8, limit=1e-3)
    assert not found.fits
    assert found.gib > 1e-3
    assert found.gathered_bytes["s8"] == 2 * MATRICES // 2, "two codes a byte, of each layer, forward and backward"


def test_offloaded_state_is_refused_before_anything_compiles():
    with pytest.raises(ValueError, match="H100 .* shows no memory of a host"):
        planned("h100-1", 1, tx=jpeft.offload(optax.adamw(1e-3)))
