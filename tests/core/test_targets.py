"""What a target matches, and what is said of one that matches nothing."""

import jax
import jax.numpy as jnp
import pytest
from small_models import make_model

import jpeft
import jpeft.models
from jpeft.core.targets import PRESETS, first_match, select

DENSE = ("dense",)


@pytest.fixture(scope="module")
def sites():
    return make_model("linen-unrolled").sites


@pytest.fixture(scope="module")
def plain():
    return make_model("plain").sites


def test_presets(sites, plain):
    linear = select(sites, "all-linear", DENSE)
    assert len(linear) == 3 * 6 and not any("embed" in path for path in linear)
    attention, mlp = (set(select(sites, name, DENSE)) for name in ("attention", ["up", "down"]))
    assert len(attention) == 3 * 4 and attention | mlp == set(linear)
    assert set(select(sites, ["key-value", "down"], DENSE)) == set(select(sites, ["key", "value", "down"], DENSE))
    assert set(select(sites, "embedding", ("embedding",))) == {"embed/embedding"}
    assert len(select(sites, "norm", ("scale",))) == 3 * 2 + 1
    assert set(select(plain, "conv", ("conv",))) == {"conv"}
    assert set(select(plain, "experts", ("experts",))) == {"gate", "expert"}
    assert set(select(plain, "bias", ("bias",))) == {"bias"}


def test_every_preset_is_of_sites_in_a_decoder():
    _, shapes = jpeft.models.abstract(LLAMA)
    apply, _ = jpeft.models.abstract(LLAMA)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    names = lambda preset: [path.split("/")[-2] for path in select(sites, preset, DENSE)]
    assert sorted(names("attention")) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert sorted(names("mlp")) == ["down_proj", "gate_proj", "up_proj"]
    assert sorted(names("key-value") + names("down")) == ["down_proj", "k_proj", "v_proj"]
    assert sorted(names("all-linear")) == sorted(names("attention") + names("mlp"))


@pytest.mark.parametrize(
    ("preset", "kinds"),
    [
        (
            "attention",
            "q/w attn/c_proj/w attention/output/dense/w self_attn/out_proj/w|classifier/out_proj/w output/dense",
        ),
        (
            "attention-output",
            "attention/output/dense/w self_attn/out_proj/w|classifier/out_proj/w 0/output/dense/w q/w",
        ),
        ("mlp", "mlp/c_fc/w DenseReluDense/wi/w intermediate/dense/w 0/output/dense/w|attention/output/dense/w wi/w"),
        ("key-value", "SelfAttention/v/kernel attention/self/key/weight k_proj|attn/kv_einsum c_attn/kernel q/v_norm"),
        ("down", "mlp/c_proj/w DenseReluDense/wo/w 0/output/dense/w fc2/w|attn/c_proj/w attention/output/dense/w up/w"),
    ],
)
def test_presets_know_the_names_of_many_models(preset, kinds):
    found, passed = (names.split() for names in kinds.split("|"))
    site = lambda path: jpeft.core.sites.Site(path, "dense", (2, 3), jnp.float32, "io", 1, 1)
    matched = [path for path in found + passed if PRESETS[preset](site(path))]
    assert matched == found


LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_a_string_is_a_regex_searched_in_the_path(sites):
    assert list(select(sites, "layer_1/.*(query|value)", DENSE)) == [
        "layer_1/attention/query/kernel",
        "layer_1/attention/value/kernel",
    ]
    assert list(select(sites, r"^layer_\d/up/kernel$", DENSE)) == [f"layer_{n}/up/kernel" for n in range(3)]
    assert "layer_0/up/bias" not in select(sites, "up", DENSE), "sites of other kinds are passed over"


def test_a_list_is_all_of_them_in_the_order_of_the_function(sites):
    chosen = select(sites, ("down", "layer_0/up", "up"), DENSE)
    assert list(chosen) == [f"layer_{n}/{name}/kernel" for n in range(3) for name in ("up", "down")]


def test_a_predicate_sees_the_sites(sites):
    chosen = select(sites, lambda site: site.shape[0] == 40, DENSE)
    assert list(chosen) == [f"layer_{n}/down/kernel" for n in range(3)]


def test_a_tied_leaf_is_taken_by_its_first_use_of_a_fitting_kind(sites):
    assert select(sites, "embed", ("dense", "embedding"))["embed/embedding"].axes == "io"
    assert select(sites, "embed", DENSE)["embed/embedding"].axes == "oi"


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("atention", ["'atention' matches no site", "did you mean 'attention'", "the sites are: layer_0/attention/"]),
        ("all_linear", ["did you mean 'all-linear'"]),
        (["up", "querry", "vlaue", "down"], ["'querry'", "'query'", "'vlaue'", "'value'"]),
        ([], ["at least one target", "'all-linear'"]),
        ((), ["at least one target"]),
        ("bias", ["matches only", "(bias)", "expected a site of kind dense"]),
        ("layer_(", ["'layer_(' is neither a preset (all-linear", "nor a regex"]),
        (lambda site: False, ["the predicate matches no site"]),
        (None, ["expected targets as a string", "None"]),
        ([3], ["expected targets as a string", "[3]"]),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(sites, targets, parts):
    with pytest.raises(ValueError) as error:
        select(sites, targets, DENSE)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "'up'" not in str(error.value).split("the sites are")[0] or targets == "all_linear"


def test_a_leaf_whose_axes_are_not_known_is_not_adapted():
    fn = lambda p, x: jnp.einsum("bi,jio->jbo", x, p["w"].reshape(2, 2, 5))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    sites = jpeft.find_sites(fn, {"w": shape(4, 5)}, shape(3, 2))
    with pytest.raises(ValueError, match="in more ways at once"):
        select(sites, "all-linear", DENSE)


def test_the_first_pattern_found_wins():
    patterns = {"layer_1": 4, "up": 8}
    assert [first_match(patterns, p, 2) for p in ("layer_1/up", "layer_0/up", "down")] == [4, 8, 2]
    assert first_match(tuple(patterns.items()), "layer_0/up", 2) == 8
    assert first_match((), "layer_0/up", 2) == 2


def test_the_presets_are_documented():
    assert all(f'"{name}"' in jpeft.Method.__doc__ for name in ("all-linear", "attention", "mlp"))
    assert set(PRESETS) >= {"all-linear", "attention", "mlp", "embedding", "conv", "experts", "norm", "bias"}
