"""What QLoRA of Llama-3.1-8B and 70B takes on TPU slices, compiled ahead of time; no TPU is needed.

    python scripts/bench/pods.py [CASE ...]        # needs libtpu (the extra jpeft[tpu]); all cases: hours of two cores

NF4 with double quantization, LoRA r=16 on all linear layers, sequences of 2,048 tokens, one a chip, bfloat16, each
layer rematerialised. A case is one row of the table; `depth` compiles the step of 8 layers and of 80 in turn, twice
each, and gives the ratio of the times. Expected (docs/pods.md says when and with what):

    | 8b-v5e-4 | fsdp=4 | fits | 3.58 of 15.75 | ...
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

import jpeft
import jpeft.models
from jpeft.parallel import make_mesh
from jpeft.parallel.topology import parse_topology
from jpeft.train.optimizer import adamw
from jpeft.train.plan import Plan, plan

LLAMA_8B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    torch_dtype="bfloat16",
)
LLAMA_70B = dict(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
CASES = {
    "8b-v5e-4": (LLAMA_8B, "v5e-4"),
    "70b-v5e-16": (LLAMA_70B, "v5e-16"),
    "70b-v5p-1": (LLAMA_70B, "v5p-1"),
    "70b-v5e-256": (LLAMA_70B, "v5e-256"),
    "70b-v5p-512": (LLAMA_70B, "v5p-512"),
}
HEADER = (
    "| case | mesh | | peak, GiB a device | weights | temporaries | gathered, MiB a device | lowered and compiled, s |"
)


def compiled(config: dict, name: str) -> Plan:
    """The plan of a config's step on a slice, one row a device."""
    apply, params = jpeft.models.abstract(config, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.chain(jpeft.NF4(double_quant=True), jpeft.LoRA(rank=16))
    topology = parse_topology(name)
    mesh = make_mesh({"fsdp": topology.size}, devices=topology.devices())
    return plan(apply, params, sites, method, adamw(1e-4, 1000), mesh, topology.size, 2048, topology.hbm_gib)


def row(case: str) -> str:
    found = compiled(*CASES[case])
    parts = found.parts_gib
    gathered = ", ".join(f"{dtype} {size / 2**20:,.0f}" for dtype, size in found.gathered_bytes.items()) or "none"
    memory = f"{found.gib:.2f} of {found.limit_gib} | {parts['weights']:.2f} | {parts['temporaries']:.2f}"
    verdict = "fits" if found.fits else "does not fit"
    return f"| {case} | {found.mesh} | {verdict} | {memory} | {gathered} | {found.seconds:.0f} |"


def depth(name: str) -> str:
    """Seconds for 8 layers and for 80, in turn, the lesser of two each."""
    seconds = {8: [], 80: []}
    for layers in (8, 80, 80, 8):
        seconds[layers].append(compiled(LLAMA_70B | {"num_hidden_layers": layers}, name).seconds)
    few, many = min(seconds[8]), min(seconds[80])
    return f"70B's step on {name}: 8 layers {few:.0f} s, 80 layers {many:.0f} s, ratio {many / few:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", choices=[*CASES, "depth", []], metavar="CASE", help=f"{', '.join(CASES)}, depth"
    )
    wanted = parser.parse_args().cases or [*CASES, "depth"]
    if rows := [case for case in wanted if case != "depth"]:
        print(HEADER + "\n|---|---|---|---|---|---|---|---|", flush=True)
    for case in rows:
        print(row(case), flush=True)
    if "depth" in wanted:
        print(*("\n" + depth(name) for name in ("v5e-16", "v5e-256")), sep="", flush=True)


if __name__ == "__main__":
    main()
