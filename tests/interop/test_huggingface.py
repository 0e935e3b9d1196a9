"""Folders: what is written is read back to the bit into any sharding; what is wrong is said at once and in full."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tiny_decoders import FAMILIES, random_model

from jpeft import models
from jpeft.interop import huggingface
from jpeft.models.decoder import HF_TENSORS

CONFIG = FAMILIES["qwen3"]


@pytest.fixture(scope="session")
def params():
    return random_model(CONFIG)[1]


@pytest.fixture
def saved(params, tmp_path):
    """A folder with one file."""
    models.save(tmp_path / "model", params, CONFIG)
    return tmp_path / "model"


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def edit(folder, change):
    """Rewrite the folder's file with its tensors changed by `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 10**9])
def test_round_trip_is_exact(params, tmp_path, dtype, max_shard_bytes):
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    models.save(tmp_path / "model", cast, CONFIG, max_shard_bytes=max_shard_bytes)
    apply, back = models.load(tmp_path / "model")
    assert_equal(back, cast)
    assert apply.config.param_dtype == dtype
    sizes = [file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")]
    assert (len(sizes) == 1) == (max_shard_bytes == 10**9)
    if max_shard_bytes == 20_000:
        index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        assert max(sizes) < 20_000 + 4096  # the header comes on top
        assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(cast))


def test_leaves_are_read_into_the_given_shardings(saved, params):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    specs = {2: PartitionSpec(None, "y"), 3: PartitionSpec(None, "x", "y")}
    _, shapes = models.abstract(saved)
    even = lambda s: all(n % 2 == 0 for n in s.shape[1:])
    spec = lambda s: specs.get(s.ndim, PartitionSpec()) if even(s) else PartitionSpec()
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, spec(s)), shapes)
    _, back = models.load(saved, shardings=shardings)
    assert_equal(back, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, back) == shardings
    assert back["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (3, 16, 20)
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert models.load(saved, shardings=everywhere)[1]["norm"]["scale"].sharding == everywhere


def test_only_the_asked_slices_are_read(saved, monkeypatch):
    blocks = []
    read_shard = huggingface._read_shard

    def record(*args):
        blocks.append(read_shard(*args))
        return blocks[-1]

    monkeypatch.setattr(huggingface, "_read_shard", record)
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    _, params = models.load(saved, shardings=NamedSharding(mesh, PartitionSpec()))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(block.nbytes for block in blocks) == whole  # a replicated leaf is read once


def test_parameters_are_cast_on_the_way_in(saved, params):
    _, back = models.load(saved, param_dtype="bfloat16")
    assert_equal(back, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_the_second_name_of_a_tied_embedding_and_old_buffers_are_not_left_over(tmp_path):
    config = FAMILIES["llama3"]
    _, params = random_model(config)
    models.save(tmp_path / "model", params, config)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit(tmp_path / "model", add)
    assert_equal(models.load(tmp_path / "model")[1], params)


def test_a_tensor_under_two_of_its_names_is_refused(saved):
    _, shapes = models.abstract(saved)
    edit(saved, lambda tensors: tensors.update({"norm.gamma": np.ones(32, np.float32)}))
    with pytest.raises(
        ValueError, match="1 under two names:\n    model.norm.weight: (model.norm.weight|norm.gamma) and"
    ):
        huggingface.read(saved, HF_TENSORS, shapes, renamed=((r"^norm\.gamma$", "model.norm.weight"),))


def test_all_mismatches_are_reported_together(saved):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["score.weight"] = np.ones((2, 32), np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["lm_head.weight"] = np.ones((61, 32), np.int8)

    edit(saved, spoil)
    with pytest.raises(ValueError) as error:
        models.load(saved)
    for line in (
        "1 missing:\n    model.layers.1.mlp.up_proj.weight [40, 32]",
        "1 left over:\n    score.weight [2, 32]",
        "model.norm.weight: expected [32], got [31]",
        "lm_head.weight: I8",
    ):
        assert line in str(error.value)


def test_a_long_list_of_mismatches_fits_on_a_screen(saved):
    edit(saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers." in name])
    with pytest.raises(ValueError, match=r"and \d+ more") as error:
        models.load(saved)
    assert str(error.value).count("\n") < 15


@pytest.mark.parametrize("kept", [4, 100, 50_000])
def test_a_truncated_file_is_named_with_its_sizes(saved, kept):
    file = saved / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"model.safetensors is truncated: expected .* bytes.*, got {kept}") as error:
        models.load(saved)
    assert kept < 50_000 or f"{size} bytes" in str(error.value)


def test_a_file_that_is_no_safetensors_is_named(saved):
    (saved / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope" * 10)
    with pytest.raises(ValueError, match="expected a safetensors header in .*model.safetensors"):
        models.load(saved)
    (saved / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"more")
    with pytest.raises(ValueError, match="is damaged: expected 10 bytes, got 14"):
        models.load(saved)


def test_absent_files_are_named(saved, params, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a model folder .*, found nothing at .*nowhere"):
        models.load(tmp_path / "nowhere")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or .*found \['pytorch_model.bin'\]"):
        models.load(saved)
    models.save(saved, params, CONFIG, overwrite=True, max_shard_bytes=20_000)
    (saved / "model-00002-of-00009.safetensors").unlink(missing_ok=True)
    gone = sorted(saved.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"are absent: .*{gone.name}"):
        models.load(saved)
    (saved / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON in .*index.json"):
        models.load(saved)


def test_nothing_is_overwritten_unless_asked(saved, params):
    doubled = jax.tree.map(lambda leaf: leaf * 2, params)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        models.save(saved, doubled, CONFIG)
    assert_equal(models.load(saved)[1], params)
    models.save(saved, doubled, CONFIG, overwrite=True)
    assert_equal(models.load(saved)[1], doubled)
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(saved, params, monkeypatch):
    from jpeft.interop import files

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        models.save(saved, params, CONFIG, overwrite=True)
    assert_equal(models.load(saved)[1], params)
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_the_tokenizer_comes_along(saved, params, tmp_path):
    (saved / "tokenizer.json").write_text("{}")
    (saved / "notes.txt").write_text("not a part of the model")
    models.save(tmp_path / "copy", params, saved)
    names = {entry.name for entry in (tmp_path / "copy").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert_equal(models.load(tmp_path / "copy")[1], params)


def test_parameters_that_the_config_does_not_describe_are_refused(params, tmp_path):
    wrong = dict(params, extra={"kernel": jnp.ones((2, 2))}, norm={"scale": jnp.ones(31)})
    del wrong["lm_head"]
    wrong["embed_tokens"] = {"embedding": jax.ShapeDtypeStruct((61, 32), "float32")}
    with pytest.raises(ValueError) as error:
        models.save(tmp_path / "model", wrong, CONFIG)
    for line in (
        "lm_head/kernel [32, 61]",
        "extra/kernel [2, 2]",
        "norm/scale: expected [32], got [31]",
        "embed_tokens/embedding: ShapeDtypeStruct",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "model").exists()


def test_the_weights_are_as_readable_as_the_config(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode
