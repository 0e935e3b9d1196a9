import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

import jpeft
from jpeft import models
from jpeft.train.adapter import decode_method, encode_method, load_adapter, read_adapter, save_adapter
from jpeft.train.adapter import fingerprint as fingerprint_of

METHOD = jpeft.LoRA(rank=2, alpha=3, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 1})


@pytest.fixture(scope="module")
def base():
    apply, params = models.init(jax.random.key(0), CONFIG)
    return params, jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))


@pytest.fixture
def saved(base, tmp_path):
    params, sites = base
    trainable, frozen = METHOD.init(jax.random.key(5), params, sites)
    trainable = jax.tree.map(lambda x: x + 1, trainable)
    save_adapter(tmp_path / "a", METHOD, trainable, frozen, base="m", base_fingerprint=fingerprint_of(params), seed=5)
    return tmp_path / "a", trainable, frozen


def test_round_trip_to_the_bit(base, saved):
    folder, trainable, frozen = saved
    method, *loaded = load_adapter(folder, *base, jpeft.methods())
    assert method == METHOD
    assert jax.tree.structure(loaded) == jax.tree.structure([trainable, frozen])
    jax.tree.map(np.testing.assert_array_equal, loaded, [trainable, frozen])


def test_a_chain_round_trips():
    method = jpeft.chain(METHOD, jpeft.LoRA(rank=1, targets="attention"))
    assert decode_method(json.loads(json.dumps(encode_method(method))), jpeft.methods()) == method


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="targets=.* cannot be written"):
        encode_method(jpeft.LoRA(targets=lambda site: True))


def test_another_base_is_refused(base, saved):
    params, sites = base
    _, other = models.init(jax.random.key(1), CONFIG)
    with pytest.raises(ValueError, match="another model.*\n.*shapes are the same, the values are not"):
        load_adapter(saved[0], other, sites, jpeft.methods())
    apply, wider = models.init(jax.random.key(0), CONFIG | {"intermediate_size": 32})
    with pytest.raises(ValueError, match=r"down_proj/kernel: \[2, 24, 16\] there, \[2, 32, 16\] in this model"):
        load_adapter(saved[0], wider, sites, jpeft.methods())


def test_the_fingerprint_survives_loading_in_bfloat16(base):
    params, _ = base
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert fingerprint_of(narrow) == fingerprint_of(params)


def test_damaged_adapters(base, saved, tmp_path):
    folder, *_ = saved
    arrays = folder / "trainable.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        load_adapter(folder, *base, jpeft.methods())
    arrays.unlink()
    with pytest.raises(FileNotFoundError, match="expected the adapter's arrays"):
        load_adapter(folder, *base, jpeft.methods())
    with pytest.raises(FileNotFoundError, match="there is no .*method.json"):
        read_adapter(tmp_path)
    (folder / "method.json").write_text("{")
    with pytest.raises(ValueError, match="not what `jpeft train` writes"):
        read_adapter(folder)
    (folder / "method.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks"):
        read_adapter(folder)


def test_methods_and_fields_that_this_version_lacks():
    with pytest.raises(ValueError, match="the method 'LoRB'"):
        decode_method({"method": "LoRB"}, jpeft.methods())
    with pytest.raises(ValueError, match="no field.*rnk.*rank"):
        decode_method({"method": "LoRA", "rnk": 3}, jpeft.methods())


def test_arrays_of_another_rank_are_listed(base, saved):
    folder, *_ = saved
    written = json.loads((folder / "method.json").read_text())
    written["method"]["rank"] = 4
    (folder / "method.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"q_proj/kernel/a: expected float32\[2, 16, 4\], got float32\[2, 16, 2\]"):
        load_adapter(folder, *base, jpeft.methods())


def test_the_arrays_are_as_readable_as_the_method(saved):
    assert (saved[0] / "trainable.safetensors").stat().st_mode == (saved[0] / "method.json").stat().st_mode
