"""Folders whose kernels bitsandbytes compressed: read as they are, run and adapted so, written back to the byte."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tiny_decoders import BASE, random_model, tokens

import jpeft
from jpeft import models
from jpeft.core.tree import leaves_with_paths
from jpeft.core.weight import Weight
from jpeft.interop import bitsandbytes, compressed
from jpeft.quant import requantize
from jpeft.quant.int8 import Rowwise8
from jpeft.quant.nf4 import NormalFloat4
from jpeft.quant.pieces import Pieces

CONFIG = BASE | {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_key_value_heads": 2,
    "architectures": ["LlamaForCausalLM"],
}
FORMATS = {
    "nf4": jpeft.NF4(),
    "nf4-plain": jpeft.NF4(double_quant=False, compute_dtype="bfloat16"),
    "fp4": jpeft.FP4(block_size=32),
    "int8": jpeft.Int8(),
}
DOWN = "model.layers.1.mlp.down_proj.weight"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base():
    """`(apply, params, sites)` of the dense model."""
    apply, params = random_model(CONFIG, param_dtype="bfloat16", dtype="float32")
    return apply, params, jpeft.find_sites(apply, params, tokens())


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """`{format: (folder, the tree in it)}`."""
    _, params, sites = base
    made = {}
    for name, method in FORMATS.items():
        tree = method.bind(*method.init(KEY, params, sites))
        folder = tmp_path_factory.mktemp("folders") / name
        models.save(folder, tree, CONFIG)
        made[name] = (folder, tree)
    return made


@pytest.fixture
def nf4(folders, tmp_path):
    """A copy of the folder in NF4 with double quantization."""
    return shutil.copytree(folders["nf4"][0], tmp_path / "nf4")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    """The folder's `quantization_config` changed, or without it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config if changes else {k: v for k, v in config.items() if k != "quantization_config"}))


def leave_dense(params, *names):
    """A change of tensors: these as they were before they were compressed."""
    kernel = lambda name: params["layers"]["mlp"][name.split(".")[4]]["kernel"][int(name.split(".")[2])]

    def change(tensors):
        for name in names:
            for part in bitsandbytes.entries(tensors)[name]:
                del tensors[part]
            tensors[name] = np.ascontiguousarray(np.asarray(kernel(name)).T)

    return change


def arrays(tree):
    return {path: (x.dtype, np.asarray(x)) for path, x in ((str(p), x) for p, x in _leaves(tree))}


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


# ---- reading and writing ----


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_holds_the_compressed_tree_and_is_written_again_to_the_byte(folders, name, tmp_path):
    folder, tree = folders[name]
    apply, read = models.load(folder, dtype="float32")
    ours, theirs = arrays(read), arrays(tree)
    assert ours.keys() == theirs.keys()
    for path, (dtype, x) in theirs.items():
        assert ours[path][0] == dtype and np.array_equal(ours[path][1], x), path
    models.save(tmp_path / "again", read, folder, max_shard_bytes=10_000)
    shards = sorted((tmp_path / "again").glob("*.safetensors"))
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 1
    again = {key: x for shard in shards for key, x in load_file(shard).items()}
    first = load_file(folder / "model.safetensors")
    assert again.keys() == first.keys() == index.keys()
    assert all(again[k].dtype == x.dtype and again[k].tobytes() == x.tobytes() for k, x in first.items())
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["llm_int8_skip_modules"] == ["lm_head"] and said["quant_method"] == "bitsandbytes"
    assert (said["load_in_8bit"], said["load_in_4bit"]) == (name == "int8", name != "int8")


@pytest.mark.parametrize("name", FORMATS)
def test_it_runs_and_is_adapted_as_it_came(folders, name):
    folder, _ = folders[name]
    apply, params = models.load(folder, dtype="float32")
    run = jax.jit(jpeft.lift(apply))
    np.testing.assert_allclose(run(params, tokens()), apply(jpeft.merge(params), tokens()), atol=2e-5)
    sites = jpeft.find_sites(apply, params, tokens())
    method = jpeft.LoRA(rank=2)
    trainable, frozen = method.init(KEY, params, sites)
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {np.dtype("float32")}
    codes = params["layers"]["mlp"]["down_proj"]["kernel"].base
    assert frozen["layers"]["mlp"]["down_proj"]["kernel"].base.base is codes
    grads = jax.grad(lambda t: jpeft.lift(apply)(method.bind(t, frozen), tokens()).sum())(trainable)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)) and any(g.any() for g in jax.tree.leaves(grads))


def test_products_are_in_the_dtype_that_was_asked_for_else_in_the_configs(nf4):
    configure(nf4, bnb_4bit_compute_dtype="float16")
    of = lambda **options: models.load(nf4, **options)[1]["layers"]["mlp"]["up_proj"]["kernel"].compute_dtype
    assert of() == "float16" and of(dtype="float32") is None
    configure(nf4)
    assert of() is None


def test_a_merged_tree_is_written_dense(folders, tmp_path):
    folder, tree = folders["nf4"]
    _, params = models.load(folder)
    models.save(tmp_path / "dense", jpeft.merge(params), folder)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    _, dense = models.load(tmp_path / "dense")
    jax.tree.map(np.testing.assert_array_equal, dense, jpeft.merge(tree))


def test_a_leaf_is_read_layer_by_layer(folders, monkeypatch):
    folder, _ = folders["nf4"]
    size = lambda tree: sum(x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree))
    held, of_before = [], size(jax.live_arrays())
    one, real = [], bitsandbytes.from_tensors

    def watched(tensors, *rest):
        made = real(tensors, *rest[:1])
        one.append(size(made))
        held.append(size(jax.live_arrays()) - of_before)
        return made

    monkeypatch.setattr(compressed.bitsandbytes, "from_tensors", lambda tensors, name, **_: watched(tensors, name))
    _, params = models.load(folder)
    largest = max(size(leaf) for _, leaf in leaves_with_paths(params) if isinstance(leaf, Weight))
    assert len(one) == 3 * 7 and max(held) <= size(params) + largest


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_read_into_shardings(folders, name):
    folder, _ = folders[name]
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = lambda path, leaf: (
        PartitionSpec(None, None, "tp") if path.endswith("kernel") and leaf.ndim == 3 else PartitionSpec()
    )
    shapes = models.abstract(folder)[1]
    on = jax.tree_util.tree_map_with_path(
        lambda p, leaf: NamedSharding(mesh, spec(jax.tree_util.keystr(p, simple=True, separator="/"), leaf)), shapes
    )
    apply, read = models.load(folder, dtype="float32", shardings=on)
    leaf = read["layers"]["mlp"]["up_proj"]["kernel"]
    assert leaf.base.sharding.spec == PartitionSpec(None, None, "tp")
    beside = leaf.absmax if name == "int8" else leaf.scales
    assert beside.sharding.is_fully_replicated == (name in ("nf4", "fp4")), "8-bit scales are not cut along the outputs"
    whole = models.load(folder, dtype="float32")[1]
    np.testing.assert_allclose(
        jax.jit(jpeft.lift(apply))(read, tokens()), jpeft.lift(apply)(whole, tokens()), atol=2e-5
    )


# ---- layers that were left dense ----


def test_single_layers_may_be_dense(nf4, base, tmp_path):
    names = [DOWN, "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    edit(nf4, leave_dense(base[1], *names))
    apply, read = models.load(nf4, dtype="float32")
    down, up, gate = (read["layers"]["mlp"][n]["kernel"] for n in ("down_proj", "up_proj", "gate_proj"))
    assert isinstance(down, Pieces) and isinstance(up, Pieces) and isinstance(gate, NormalFloat4)
    assert (down.cuts(), up.cuts()) == ((1, 2), (1, 2)) and down.shape == (3, 128, 64) and down.dtype == jnp.bfloat16
    np.testing.assert_array_equal(down.dense()[1], base[1]["layers"]["mlp"]["down_proj"]["kernel"][1])
    run = jax.jit(jpeft.lift(apply))
    np.testing.assert_allclose(run(read, tokens()), apply(jpeft.merge(read), tokens()), atol=2e-5)

    method, sites = jpeft.LoRA(rank=2, targets="mlp"), jpeft.find_sites(apply, read, tokens())
    loss = lambda t, frozen: jnp.sin(jpeft.lift(apply)(method.bind(t, frozen), tokens())).sum()
    halves = [method.init(KEY, tree, sites) for tree in (read, jpeft.merge(read))]
    moved = [jax.tree.map(lambda x: x + 0.05, trainable) for trainable, _ in halves]
    grads = [jax.jit(jax.grad(loss))(t, frozen) for t, (_, frozen) in zip(moved, halves, strict=True)]
    for ours, theirs in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))

    models.save(tmp_path / "again", read, nf4)
    skipped = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert skipped["llm_int8_skip_modules"] == sorted(["lm_head", *(n.removesuffix(".weight") for n in names)])
    first, again = (load_file(f / "model.safetensors") for f in (nf4, tmp_path / "again"))
    assert first.keys() == again.keys() and all(again[k].tobytes() == x.tobytes() for k, x in first.items())


def test_layers_of_another_dtype_are_refused(nf4, base):
    edit(nf4, leave_dense(jax.tree.map(lambda x: x.astype(jnp.float32), base[1]), DOWN))
    with pytest.raises(ValueError, match=r"expected layers of one dtype, got .*layers.1.mlp.down_proj.weight float32"):
        models.load(nf4)


# ---- under methods that compress ----


def test_what_came_in_a_methods_format_stays_and_what_came_in_another_is_refused(folders, nf4, base):
    apply, params = models.load(folders["nf4-plain"][0], dtype="float32")
    sites = jpeft.find_sites(apply, params, tokens())
    both = jpeft.chain(jpeft.NF4(), jpeft.LoRA(rank=2))
    _, (kept, _) = both.init(KEY, params, sites)
    leaf = lambda tree: tree["layers"]["mlp"]["up_proj"]["kernel"]
    assert leaf(kept).base is leaf(params).base and not leaf(kept).double_quant
    faster = jpeft.NF4(compute_dtype="bfloat16").init(KEY, params, sites)[1]
    assert leaf(faster).base is leaf(params).base and leaf(faster).compute_dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"it came compressed, as NormalFloat4, and FP4 .* leave FP4 out"):
        jpeft.FP4().init(KEY, params, sites)
    edit(nf4, leave_dense(base[1], DOWN))
    with pytest.raises(ValueError, match="down_proj/kernel: it came compressed, as Pieces, and NF4"):
        both.init(KEY, models.load(nf4)[1], sites)


@pytest.mark.parametrize("name", FORMATS)
def test_a_merged_adapter_is_compressed_again_where_asked_and_says_what_it_loses(folders, nf4, base, name):
    folder = folders[name][0]
    if name == "nf4":  # with a dense layer
        edit(nf4, leave_dense(base[1], DOWN))
        folder = nf4
    apply, params = models.load(folder, dtype="float32")
    method = jpeft.LoRA(rank=2, targets="mlp")
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(apply, params, tokens()))
    bound = method.bind(jax.tree.map(lambda x: x + 0.02, trainable), frozen)
    merged, (again, errors) = jpeft.merge(bound), requantize(bound)
    assert set(errors) == {f"layers/mlp/{n}/kernel" for n in ("up_proj", "gate_proj", "down_proj")}
    assert jax.tree.structure(again) == jax.tree.structure(params)
    attention = again["layers"]["self_attn"]["q_proj"]["kernel"]
    assert attention.base is params["layers"]["self_attn"]["q_proj"]["kernel"].base
    for path, error in errors.items():
        part = path.split("/")[2]
        w, q = (
            np.float32(x)
            for x in (merged["layers"]["mlp"][part]["kernel"], again["layers"]["mlp"][part]["kernel"].dense())
        )
        np.testing.assert_allclose(error, np.linalg.norm(q - w) / np.linalg.norm(w), rtol=1e-3)
        assert 0.001 < error < (0.012 if name == "int8" else 0.16)
    assert np.array_equal(again["embed_tokens"]["embedding"], params["embed_tokens"]["embedding"])


# ---- refusals ----


def state_of(tensors, name, **changes):
    [key] = [key for key in tensors if key.startswith(f"{name}.quant_state")]
    said = json.loads(tensors[key].tobytes()) | changes
    tensors[key] = np.frombuffer(json.dumps(said).encode(), np.uint8)


STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"
NAN = np.full(1, np.nan, np.float32)
CONTRADICTIONS = {
    "no scales": (lambda t: t.pop(f"{DOWN}.absmax"), f"the checkpoint lacks {DOWN}.absmax"),
    "no codes": (lambda t: t.pop(DOWN), f"the checkpoint lacks {DOWN}$"),
    "no description": (lambda t: t.pop(STATE), "expected one tensor .*down_proj.*got none"),
    "cut codes": (lambda t: t.update({DOWN: t[DOWN][:-1]}), r"expected uint8\[4096\], got uint8\[4095\]"),
    "scales of another type": (
        lambda t: t.update({f"{DOWN}.absmax": np.zeros(128, np.float32)}),
        r"absmax: expected uint8\[128\], got float32\[128\]",
    ),
    "another block size": (lambda t: state_of(t, DOWN, blocksize=32), r"absmax: expected uint8\[256\], got uint8\[128"),
    "an unknown format": (lambda t: state_of(t, DOWN, quant_type="nf3"), "expected a matrix in nf4 or fp4"),
    "a dtype of integers": (lambda t: state_of(t, DOWN, dtype="int8"), "expected a matrix in nf4 or fp4"),
    "another shape": (lambda t: state_of(t, DOWN, shape=[128, 64]), r"shape \[64, 128\], got one of \[128, 64\]"),
    "a mean that is not finite": (lambda t: state_of(t, DOWN, nested_offset=float("inf")), "expected a finite mean"),
    "a scale that is not finite": (lambda t: t.update({f"{DOWN}.nested_absmax": NAN}), "absmax: a scale is not finite"),
    "plain codes": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(DOWN + ".")],
        r"not a plain float:\n +model.layers.1.mlp.down_proj.weight: U8",
    ),
    "a compressed vector": (
        lambda t: t.update({"model.norm.weight.absmax": np.zeros(1, np.float32)}),
        r"model.norm.weight: expected a plain tensor of shape \[64\], got a compressed weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_folders_that_contradict_themselves_are_refused_by_tensor(nf4, change, message):
    edit(nf4, change)
    with pytest.raises(ValueError, match=message):
        models.load(nf4)


def test_several_contradictions_are_reported_together(nf4):
    edit(nf4, lambda t: [CONTRADICTIONS["no scales"][0](t), t.pop("model.layers.0.mlp.up_proj.weight.absmax")])
    with pytest.raises(ValueError, match=r"(?s)2 contradicting what is said of them.*up_proj.*|.*down_proj.*up_proj"):
        models.load(nf4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "the checkpoint lacks .*down_proj.SCB"),
        ({"scales": np.zeros(7, np.float32)}, r"down_proj.SCB: expected float32\[64\], got float32\[7\]"),
        ({"scales": np.full(64, np.inf, np.float32)}, "down_proj.SCB: a scale is not finite"),
        ({"codes": np.zeros((64, 128), np.uint8)}, r"down_proj.weight: expected int8\[64, 128\], got uint8"),
        ({"codes": np.zeros((128, 64), np.int8)}, r"down_proj.weight: expected int8\[64, 128\], got int8\[128, 64\]"),
        ({"codes": None}, "the checkpoint lacks .*down_proj.weight"),
        ({"form": np.uint8(2)}, "weight_format: expected 0, row-major codes, got 2"),
        ({"form": np.float32(0)}, r"weight_format: expected uint8\[\], got float32\[\]"),
    ],
)
def test_8_bit_weights_that_contradict_themselves_are_refused(folders, tmp_path, change, message):
    folder = shutil.copytree(folders["int8"][0], tmp_path / "int8")
    keys = {"codes": DOWN, "scales": DOWN.replace("weight", "SCB"), "form": DOWN.replace("weight", "weight_format")}

    def changed(tensors):
        for what, value in change.items():
            if value is None:
                del tensors[keys[what]]
            else:
                tensors[keys[what]] = np.asarray(value)

    edit(folder, changed)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_8_bit_weights_of_older_checkpoints_have_no_format(folders, tmp_path):
    folder = shutil.copytree(folders["int8"][0], tmp_path / "int8")
    edit(folder, lambda t: t.pop(DOWN.replace("weight", "weight_format")))
    _, params = models.load(folder)
    assert isinstance(params["layers"]["mlp"]["down_proj"]["kernel"], Rowwise8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "or bitsandbytes' format, got quant_method='gptq'"),
        ({"load_in_4bit": False}, "expected load_in_4bit or load_in_8bit in the quantization_config, got neither"),
        ({"bnb_4bit_quant_type": "fp4"}, f"{DOWN}: the quantization_config says fp4, the tensors are nf4"),
        (
            {"load_in_4bit": False, "load_in_8bit": True},
            f"{DOWN}: the quantization_config says int8, the tensors are nf4",
        ),
    ],
)
def test_configs_that_say_something_else_are_refused(nf4, changes, message):
    configure(nf4, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(nf4)


def test_a_config_that_speaks_of_compressed_weights_where_none_are_is_refused(folders, nf4, base, tmp_path):
    models.save(tmp_path / "dense", base[1], CONFIG)
    shutil.copy(nf4 / "config.json", tmp_path / "dense" / "config.json")
    with pytest.raises(ValueError, match="the quantization_config says nf4, and no tensor is compressed"):
        models.load(tmp_path / "dense")


def test_what_transformers_cannot_read_is_not_written(base, tmp_path):
    _, params, sites = base
    of = lambda method: method.bind(*method.init(KEY, params, sites))
    with pytest.raises(ValueError, match=r"(?s)no kernel of a linear layer.*embed_tokens/embedding"):
        models.save(tmp_path / "a", of(jpeft.NF4(targets="embedding")), CONFIG)
    mixed = of(jpeft.chain(jpeft.NF4(targets="mlp"), jpeft.FP4(targets="attention")))
    with pytest.raises(ValueError, match="expected compressed weights of one format, got fp4, nf4"):
        models.save(tmp_path / "b", mixed, CONFIG)
    with pytest.raises(ValueError, match=r"merge adapters with jpeft.merge before saving"):
        models.save(tmp_path / "c", of(jpeft.LoRA(rank=2)), CONFIG)
    assert not any(tmp_path.iterdir())
