import importlib.util

import pytest

from jpeft.parallel.topology import GENERATIONS, Slice, parse_topology, sizes_of


def test_a_slice_is_a_kind_and_a_number_of_chips():
    assert parse_topology("v5e-16") == Slice("v5e", 16)
    assert (parse_topology("v5p-1").size, parse_topology("v7x-4").size) == (1, 8)
    assert sizes_of("v5e") == [1, 4, 8, 16, 32, 64, 128, 256]
    assert sizes_of("v5p")[-1] == 4096
    assert all(str(parse_topology(f"{name}-{n}")) == f"{name}-{n}" for name in GENERATIONS for n in sizes_of(name))


@pytest.mark.parametrize("text", ["v5e", "v5e-3", "v5e-512", "v9-4", "a100-8", "v5e-"])
def test_an_unknown_slice_is_refused_with_all_that_there_are(text):
    with pytest.raises(ValueError, match=r"NAME-CHIPS, got .*\n.*v4-\{1,4(.|\n)*v7x-\{1,4,8"):
        parse_topology(text)


def test_without_libtpu_the_line_to_install_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jpeft\[tpu\]"'):
        Slice("v5e", 4).devices()
