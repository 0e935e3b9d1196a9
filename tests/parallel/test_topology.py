import importlib.util

import pytest
from jax.experimental import topologies

from jpeft.parallel.topology import GPU, KINDS, Slice, parse_topology, slices_of


def test_a_slice_is_a_kind_and_a_number_of_chips():
    assert parse_topology("v5e-16") == Slice("v5e", 16)
    assert (parse_topology("v5p-1").size, parse_topology("v7x-4").size, parse_topology("h100-8").size) == (1, 8, 8)
    assert KINDS["v5e"].sizes == [1, 4, 8, 16, 32, 64, 128, 256]
    assert KINDS["v5p"].sizes[-1] == 4096
    assert KINDS["h100"].sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(parse_topology(str(found)) == found for kind in KINDS for found in slices_of(kind))


@pytest.mark.parametrize("text", ["v5e", "v5e-3", "v5e-512", "v9-4", "a100-3", "v5e-"])
def test_an_unknown_slice_is_refused_with_all_that_there_are(text):
    with pytest.raises(ValueError, match=r"NAME-CHIPS, got .*\n.*v4-\{1,4(.|\n)*v7x-\{1,4,8(.|\n)*h100-\{1,2,4,8,16"):
        parse_topology(text)


@pytest.mark.parametrize(("topology", "line"), [("v5e-4", r"jpeft\[tpu\]"), ("h100-8", r"jax\[cuda13\]")])
def test_without_the_compiler_the_line_to_install_it_is_said(monkeypatch, topology, line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f'pip install "{line}"'):
        parse_topology(topology).devices()


def test_a_gpu_s_memory_is_what_jax_takes_of_it(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    sizes = {name: kind.hbm_gib / 0.75 for name, kind in KINDS.items() if isinstance(kind, GPU)}
    assert sizes == pytest.approx({"a100": 79.26, "h100": 79.11, "b200": 178.36}, abs=0.01)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology("h100-8").hbm_gib == pytest.approx(0.9 * 79.11, abs=0.01)


@pytest.mark.parametrize(("topology", "shape"), [("h100-4", "1x1x4"), ("h100-8", "1x1x8"), ("a100-32", "1x4x8")])
def test_gpus_are_described_node_by_node(monkeypatch, topology, shape):
    asked = {}

    def described(**options):
        asked.update(options)
        return topologies.TopologyDescription([])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    assert parse_topology(topology).devices() == []
    assert (asked["platform"], asked["topology"]) == ("cuda", shape)
    assert f"{topology.partition('-')[0].upper()}" in asked["target_config"]


def test_a_process_that_left_the_plugin_out_is_told_what_to_do(monkeypatch):
    def described(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    with pytest.raises(RuntimeError, match="set JAX_PLATFORMS=cpu"):
        parse_topology("h100-1").devices()
