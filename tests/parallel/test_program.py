"""What is read from programs, against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.parallel import make_mesh
from jpeft.parallel.program import Collective, collectives, flops, memory, per_device


def compiled(fn, *args, **options):
    return jax.jit(fn, **options).lower(*args).compile()


def test_products_are_counted_with_the_turns_of_their_loops():
    x, w = jnp.ones((3, 5)), jnp.ones((4, 5, 5))

    def fn(x, w):
        for_each = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        return jax.lax.scan(lambda x, w: (for_each(x, w), None), x, w)[0].sum()

    assert flops(fn, x, w) == 4 * 2 * 3 * 5 * 5
    assert flops(jax.grad(fn, 1), x, w) == 4 * 4 * 2 * 3 * 5 * 5, "forward, again, and to both operands"
    image, kernel = jnp.ones((1, 3, 8)), jnp.ones((7, 3, 2))
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW"))
    assert flops(conv, image, kernel) == 2 * (3 * 2) * (7 * 8)
    grouped = lambda x, w, n: jax.lax.ragged_dot(x, w, n)
    assert flops(grouped, x, w, jnp.array([1, 2, 0, 0])) == 2 * 3 * 5 * 5
    either = lambda p, x, w: jax.lax.cond(p, lambda: x @ w[0] @ w[1], lambda: x @ w[0])
    assert flops(either, True, x, w) == 2 * 2 * 3 * 5 * 5


def test_exchanges_are_counted_with_the_turns_of_their_loops():
    mesh = make_mesh("fsdp=8")
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def local(x, w):
        return jax.lax.scan(lambda x, w: (x @ jax.lax.all_gather(w, "fsdp", tiled=True), None), x, w)[0]

    spec = PartitionSpec(None, "fsdp")
    fn = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec("fsdp"), spec), out_specs=PartitionSpec("fsdp"))
    x, w = jnp.ones((8, 16)), jax.device_put(jnp.ones((5, 16, 16)), cut)
    found = [e for e in collectives(compiled(fn, x, w).as_text()) if e.kind == "all-gather"]
    assert found == [Collective("all-gather", "f32", 5, 5 * 16 * 16 * 4)]


def test_an_exchange_in_several_operations_counts_once():
    gather = "all-gather(%p), channel_id=7, dimensions={0}"
    text = "\n".join(
        [
            "%part (p: u4[2,8]) -> u4[8,8] {",
            f"  ROOT %a = u4[8,8]{{1,0}} {gather}",
            "}",
            "%rest (p: u4[2,8]) -> u4[8,8] {",
            f"  ROOT %a = u4[8,8]{{1,0}} {gather}",
            "}",
            "%body (t: (s32[])) -> (s32[]) {",
            "  %b = u4[8,8]{1,0} fusion(%p), kind=kLoop, calls=%part",
            "  %c = u4[8,8]{1,0} fusion(%p), kind=kLoop, calls=%rest",
            "  %d = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%q), channel_id=8",
            "  %e = bf16[16]{0} all-gather-done(%d)",
            "}",
            "%cond (t: (s32[])) -> pred[] {",
            "  %n = s32[]{:T(128)} constant(3)",
            "  ROOT %lt = pred[] compare(%i, %n), direction=LT",
            "}",
            "ENTRY %main (x: s32[]) -> s32[] {",
            "  %w = (s32[]) while(%x), condition=%cond, body=%body",
            "  %r = f32[] all-reduce(%y), channel_id=9, to_apply=%add",
            "}",
        ]
    )
    assert collectives(text) == [
        Collective("all-gather", "bf16", 3, 3 * 32),
        Collective("all-gather", "u4", 3, 3 * 32),
        Collective("all-reduce", "f32", 1, 4),
    ]


def test_exchanges_of_many_arrays_in_two_halves_count_each_array_once():
    """As XLA writes them for GPUs: arrays together, loops without their first turns, exchanges in wrappers."""
    both = "((f32[2,8]{1,0}, s8[8]{0}), (f32[16,8]{1,0}, /*index=1*/s8[64]{0}))"
    text = "\n".join(
        [
            "%wrapped (p: bf16[4]) -> bf16[4] {",
            "  ROOT %p = bf16[4]{0} all-to-all(%p), channel_id=4",
            "}",
            "%body (t: (s32[])) -> (s32[]) {",
            f"  %a = {both} all-gather-start(%p, %q), channel_id=1",
            "  %b = (f32[16,8]{1,0}, /*index=1*/s8[64]{0}) all-gather-done(%a)",
            "  %c = s8[64]{0} get-tuple-element(%b), index=1",
            "  %d = ((bf16[4]), bf16[4]) async-start(%c), calls=%wrapped",
            "  %e = bf16[4] async-done(%d), calls=%wrapped",
            "}",
            "%cond (t: (s32[])) -> pred[] {",
            "  %n = s32[] constant(3)",
            "  ROOT %lt = pred[] compare(%i, %n), direction=LT",
            "}",
            "ENTRY %main (x: s32[]) -> s32[] {",
            '  %w = (s32[]) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"2"}}',
            "  %s = ((f32[16]{0}), (f32[2]{0})) reduce-scatter-start(%y), channel_id=2, to_apply=%add",
            "  %r = f32[2]{0} reduce-scatter-done(%s)",
            "}",
        ]
    )
    assert collectives(text) == [
        Collective("all-gather", "f32", 2, 2 * 16 * 8 * 4),
        Collective("all-gather", "s8", 2, 2 * 64),
        Collective("all-to-all", "bf16", 2, 2 * 8),
        Collective("reduce-scatter", "f32", 1, 8),
    ]


def test_memory_is_that_of_arguments_results_and_what_is_between():
    x = jnp.ones((256, 256))
    found = memory(compiled(lambda x: (x @ x) @ x, x))
    assert (found.arguments, found.results, found.host) == (x.nbytes, x.nbytes, 0)
    assert found.peak >= found.arguments + found.results
    donated = memory(compiled(lambda x: x + 1, x, donate_argnums=0))
    assert donated.results == 0


def test_four_bit_numbers_count_as_such_on_each_device():
    mesh = make_mesh("fsdp=8")
    tree = {"codes": jax.ShapeDtypeStruct((64, 32), jnp.uint4), "scale": jax.ShapeDtypeStruct((3,), jnp.float32)}
    places = {"codes": NamedSharding(mesh, PartitionSpec("fsdp")), "scale": NamedSharding(mesh, PartitionSpec())}
    assert per_device(tree, places) == 64 * 32 // 2 // 8 + 3 * 4
    assert np.isclose(per_device(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)), 1024 + 12)
