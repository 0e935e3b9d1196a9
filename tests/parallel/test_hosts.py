"""One process's view of many: what `join` refuses, and that alone every function is what it says."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.parallel import hosts, make_mesh
from jpeft.parallel.layout import batch_sharding


@pytest.mark.parametrize(
    "given, environment, message",
    [
        ({"processes": 2}, {}, r"missing: --coordinator \(JAX_COORDINATOR_ADDRESS\), --process-id \(JAX_PROCESS_ID\)"),
        ({}, {"JAX_NUM_PROCESSES": "2"}, "missing: --coordinator"),
        (
            {"coordinator": "here", "processes": 2, "process_id": 0},
            {},
            "host:port, got 'here'; write for example here:8476",
        ),
        ({"coordinator": "here:1", "processes": 2, "process_id": 2}, {}, "process id from 0 to 1, got 2 of 2"),
        ({"coordinator": "here:1", "processes": 2}, {"JAX_PROCESS_ID": "one"}, "number in JAX_PROCESS_ID, got 'one'"),
    ],
)
def test_what_does_not_name_the_others_is_refused(given, environment, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(**given, environment=environment)


def test_flags_go_before_the_environment_and_all_is_handed_to_jax(monkeypatch):
    seen = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.update(a=a, k=k))
    variables = {"JAX_COORDINATOR_ADDRESS": "there:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    hosts.join(coordinator="here:2", environment=variables)
    assert seen["a"] == ("here:2", 4, 3) and seen["k"]["cluster_detection_method"] == "deactivate"
    assert seen["k"]["heartbeat_timeout_seconds"] == hosts.HEARTBEAT_SECONDS
    hosts.join(distributed=True, environment={})
    assert seen["a"] == (None, None, None) and seen["k"]["cluster_detection_method"] is None
    seen.clear()
    hosts.join(environment={})
    hosts.join("here:2", 1, 0, environment={})
    assert not seen, "a process that is alone joins nobody"


def test_a_cluster_that_says_nothing_is_told(monkeypatch):
    def silent(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", silent)
    with pytest.raises(ValueError, match="--distributed found no cluster.*give --coordinator HOST:PORT"):
        hosts.join(distributed=True, environment={})


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}])
def test_a_batch_is_placed_row_by_row(sizes):
    sharding, rows = batch_sharding(make_mesh(sizes)), 16
    assert hosts.rows_here(sharding, rows) == list(range(rows))
    batch = {"x": np.arange(rows * 3).reshape(rows, 3), "y": np.arange(rows)}
    order = np.random.default_rng(0).permutation(rows)
    placed = hosts.place({name: x[order] for name, x in batch.items()}, sharding, rows, order.tolist())
    for name, x in batch.items():
        np.testing.assert_array_equal(placed[name], x)
        assert placed[name].sharding.is_equivalent_to(sharding, x.ndim)


def test_alone_everything_is_here():
    mesh = make_mesh({"fsdp": 8})
    x = np.arange(16.0, dtype=np.float32)
    spread = hosts.spread({"x": x}, {"x": NamedSharding(mesh, P("fsdp"))})
    np.testing.assert_array_equal(hosts.whole(spread["x"]), x)
    assert hosts.everywhere({"a": 1}) == [{"a": 1}] and hosts.is_first()
    hosts.meet("nobody else")


def test_an_error_of_one_process_alone_stays_what_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"), hosts.watched():
        raise jax.errors.JaxRuntimeError("broken")


def test_with_others_a_failed_exchange_says_who_is_gone_and_too_little_memory_does_not(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(hosts.ProcessLost, match="process 0 lost another one of 2"), hosts.watched():
        raise jax.errors.JaxRuntimeError("Gloo AllReduce failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"), hosts.watched():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_only_the_first_prints(monkeypatch, capsys):
    with hosts.only_first_prints():
        print("first")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with hosts.only_first_prints():
        print("second")
    assert capsys.readouterr().out == "first\n"
