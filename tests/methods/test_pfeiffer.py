"""Pfeiffer adapters against the `adapters` package, in stacks, and the published counts."""

import jax
import numpy as np
import pytest
from adapters_golden import assert_same_as_adapters, bottleneck
from peft_cases import numbers
from small_models import make_model
from test_houlsby import BERT_BASE, BERT_LARGE, KEY, count

import jpeft


def test_the_same_numbers_give_what_the_adapters_package_gives():
    assert_same_as_adapters("pfeiffer", jpeft.Pfeiffer(reduction=4), bottleneck)


def test_it_starts_from_a_normal_distribution():
    model = make_model("linen-scanned")
    w = jpeft.Pfeiffer(bottleneck=20).init(KEY, model.params, model.sites)[0]["layers"]["down"]["bias"]
    assert w.down.shape == (3, 24, 20) and 0.018 < np.std(w.down) < 0.022 and 0.018 < np.std(w.up) < 0.022
    assert not np.any(w.down_bias) and not np.any(w.up_bias) and np.abs(w.down).max() > 0.05


def test_a_second_adapter_stands_on_the_first():
    layer = lambda p, x: x + (x @ p["down"]["kernel"] + p["down"]["bias"])
    params, x = {"down": {"kernel": numbers(6, 6), "bias": numbers(6)}}, numbers(3, 6)
    one = jpeft.Pfeiffer(bottleneck=2, init_std=1.0)
    both = jpeft.chain(one, one)
    trainable, frozen = both.init(KEY, params, jpeft.find_sites(layer, params, x))
    assert len(jax.tree.leaves(trainable[0])) == len(jax.tree.leaves(trainable[1])) == 4
    y = x @ params["down"]["kernel"] + params["down"]["bias"]
    for half in trainable:
        w = half["down"]["bias"]
        y = y + np.maximum(y @ np.asarray(w.down, np.float64), 0) @ np.asarray(w.up, np.float64)
    np.testing.assert_allclose(jpeft.lift(layer)(both.bind(trainable, frozen), x), x + y, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [(BERT_BASE, {}, 894_528), (BERT_LARGE, {"bottleneck": 64}, 3_171_840), (BERT_LARGE, {"bottleneck": 16}, 811_392)],
)
def test_counts_on_public_models_equal_the_published_integers(config, fields, expected):
    assert count(jpeft.Pfeiffer(**fields), config) == expected
