"""HF PEFT's folders: each method that PEFT has goes there and back to the bit, and computes the same in PEFT itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_folders import CONFIG, TOKENS, edit, started
from safetensors.numpy import load_file
from small_models import make_model
from tiny_decoders import random_model

import jpeft
from jpeft import models
from jpeft.interop import peft as folders
from jpeft.interop.peft.axes import Layout, Window
from jpeft.interop.peft.modules import match, minimal, module_name

METHODS = [
    name for name, kind in jpeft.methods().items() if kind.EXPORT and kind.EXPORT.tensors and not kind.EXPORT.enclosing
]


def adaptable(kind, sites):
    """A method with its small hyperparameters, on all that PEFT's can adapt."""
    small = {k: v for k, v in kind.SMALL.items() if k != "targets"}
    uses = [s.path for s in sites]
    fits = lambda s: s.kind in kind.EXPORT.tensors and "/" in s.path and uses.count(s.path) == 1 and not s.head
    possible = kind(**small, targets=fits)
    return kind(**small, targets=lambda s: fits(s) and possible.check(s) is None)


def assert_same_leaves(got, wanted):
    got, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, wanted))
    assert got.keys() == wanted.keys()
    for path, x in wanted.items():
        assert got[path].dtype == x.dtype, path
        np.testing.assert_array_equal(got[path], x, err_msg=str(path))


def lora(llama, path, **options):
    """A folder with a LoRA of queries and values; `(method, trainable, frozen)`."""
    _, params, sites = llama
    method = jpeft.LoRA(**{"rank": 2, "targets": ["q_proj/kernel", "v_proj/kernel"], **options})
    trainable, frozen = started(method, params, sites)
    folders.save(path, method, trainable, "base", frozen, sites=sites, overwrite=True)
    return method, trainable, frozen


# ---- there and back ----


@pytest.mark.parametrize("tree", ["llama", "unrolled"])
@pytest.mark.parametrize("name", METHODS)
def test_round_trip_is_exact(name, tree, request, tmp_path):
    apply, params, sites = request.getfixturevalue(tree)
    method = adaptable(jpeft.methods()[name], sites)
    if not any(map(method.targets, sites)):
        pytest.fail(f"{name} adapts nothing here; give it an EXPORT for dense sites, or SMALL that suits them")
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path, method, trainable, "base", frozen, sites=sites)
    again, trainable_again, frozen_again = folders.load(tmp_path, params, sites)
    plain, expected = method.exported(trainable, frozen)
    assert again.EXPORT is plain.EXPORT
    assert_same_leaves(trainable_again, expected)
    if plain is method:
        assert_same_leaves(frozen_again, frozen)
    tokens = jnp.asarray(TOKENS)
    run = lambda method, halves: jax.jit(lambda halves: jpeft.lift(apply)(method.bind(*halves), tokens))(halves)
    out = run(again, (trainable_again, frozen_again))
    np.testing.assert_allclose(out, run(method, (trainable, frozen)), atol=1e-5 * max(1, float(jnp.abs(out).max())))


# ---- the real PEFT ----


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_what_we_write_and_we_compute_what_it_writes(name, llama, base, tmp_path):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    apply, params, sites = llama
    method = adaptable(jpeft.methods()[name], sites)
    trainable, frozen = started(method, params, sites)
    ours = lambda method, *halves: np.asarray(jpeft.lift(apply)(method.bind(*halves), jnp.asarray(TOKENS)))
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()), rtol=1e-4)

    folders.save(tmp_path / "ours", method, trainable, base, frozen, sites=sites)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours", is_trainable=True).eval()
    near(ours(method, trainable, frozen), model(torch.tensor(TOKENS)).logits.detach().numpy())

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 5
    model.save_pretrained(tmp_path / "theirs")
    near(ours(*folders.load(tmp_path / "theirs", params, sites)), model(torch.tensor(TOKENS)).logits.detach().numpy())


@pytest.fixture(scope="module")
def tied():
    """`(config, apply, params, sites)` of a decoder whose head is its embedding."""
    config = CONFIG | {"tie_word_embeddings": True}
    apply, params = random_model(config)
    return config, apply, params, jpeft.find_sites(apply, params, TOKENS)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in METHODS if jpeft.methods()[name].EXPORT.tied])
def test_the_head_that_shares_the_embedding_shares_the_adapter(name, tied, tmp_path):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config, apply, params, sites = tied
    models.save(tmp_path / "base", params, config)
    method = jpeft.methods()[name](**jpeft.methods()[name].SMALL | {"targets": "embedding"})
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path / "ours", method, trainable, "base", frozen, sites=sites)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    wanted = jpeft.lift(apply)(method.bind(trainable, frozen), jnp.asarray(TOKENS))
    np.testing.assert_allclose(model(torch.tensor(TOKENS)).logits.detach().numpy(), wanted, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    assert len(load_file(tmp_path / "theirs/adapter_model.safetensors")) == 2  # the head's is a second name
    assert_same_leaves(folders.load(tmp_path / "theirs", params, sites)[1], trainable)
    edit(tmp_path / "theirs", tensors=lambda t: t.update({k: v + 1 for k, v in t.items() if "lm_head" in k}))
    with pytest.raises(ValueError, match="1 left over:\n.*lm_head"):
        folders.load(tmp_path / "theirs", params, sites)


# ---- what is written ----


def test_names_and_options_are_peft_s(llama, tmp_path):
    lora(llama, tmp_path, alpha=5.0, rank_pattern={"v_proj": 4}, alpha_pattern={"q_proj": 6}, scaling="rslora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": None,
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {r"model\.layers\.\d+\.self_attn\.v_proj": 4},
        "alpha_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 6},
    }
    assert expected.items() <= config.items()
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    one = "base_model.model.model.layers.{}.self_attn."
    assert shapes == {
        (one + name).format(layer): shape
        for layer in (0, 1)
        for name, shape in {
            "q_proj.lora_A.weight": (2, 24),
            "q_proj.lora_B.weight": (24, 2),
            "v_proj.lora_A.weight": (4, 24),
            "v_proj.lora_B.weight": (12, 4),
        }.items()
    }
    again, _, _ = folders.load(tmp_path, *llama[1:])
    assert again.rank_pattern == ((r"^layers/self_attn/v_proj/kernel$", 4),)
    assert again.alpha_pattern == ((r"^layers/self_attn/q_proj/kernel$", 6.0),)
    assert (again.alpha, again.scaling) == (5.0, "rslora")


def test_without_sites_and_frozen_the_names_are_the_same(llama, tmp_path):
    method, trainable, _ = lora(llama, tmp_path / "a")
    folders.save(tmp_path / "b", method, trainable, base=llama[1])
    same = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["base_model_name_or_path"] == ""


def test_modules_to_save_are_whole_modules(llama, tmp_path):
    _, trainable, _ = lora(llama, tmp_path, modules_to_save=["lm_head", "layers/input_layernorm"])
    written = load_file(tmp_path / "adapter_model.safetensors")
    head = written["base_model.model.lm_head.weight"]
    np.testing.assert_array_equal(head, trainable["lm_head"]["kernel"].base.T)
    assert written["base_model.model.model.layers.1.input_layernorm.weight"].shape == (24,)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["input_layernorm", "lm_head"]
    again, trainable_again, _ = folders.load(tmp_path, *llama[1:])
    assert again.modules_to_save == ("^lm_head/kernel$", "^layers/input_layernorm/scale$")
    assert_same_leaves(trainable_again, trainable)


def test_a_chain_is_written_as_the_one_method_that_trains(llama, tmp_path):
    _, params, sites = llama
    frozen_first = jpeft.chain(jpeft.LoRA(rank=1, targets="up_proj"), jpeft.LoRA(rank=2, targets="q_proj"))
    (_, second), frozen = frozen_first.init(jax.random.key(0), params, sites)
    folders.save(tmp_path / "a", frozen_first, (None, second), "base", frozen, sites=sites)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    folders.save(tmp_path / "b", frozen_first, (None, second), "base")
    trainable, frozen = frozen_first.init(jax.random.key(0), params, sites)
    with pytest.raises(ValueError, match="expected a chain of which one method trains, got 2"):
        folders.save(tmp_path / "c", frozen_first, trainable, "base", frozen, sites=sites)


def test_an_adapter_keeps_its_dtype(llama, tmp_path):
    method, trainable, _ = lora(llama, tmp_path, dtype="bfloat16")
    again, trainable_again, _ = folders.load(tmp_path, *llama[1:])
    assert again.dtype == "bfloat16"
    assert_same_leaves(trainable_again, trainable)


def test_what_trains_only_with_the_other_half_says_so(llama, tmp_path):
    _, params, sites = llama
    needing = []
    for name in METHODS:
        method = adaptable(jpeft.methods()[name], sites)
        trainable, frozen = jax.jit(lambda p, method=method: method.init(jax.random.key(0), p, sites))(params)
        try:
            folders.save(tmp_path / name, method, trainable, "base", sites=sites)
        except ValueError as error:
            assert "write save(..., frozen=frozen)" in str(error), name
            needing.append(name)
    assert needing and set(needing) < set(METHODS)
    method = jpeft.LoRA(rank=2, freeze_a=True)
    trainable, frozen = method.init(jax.random.key(0), params, sites)
    with pytest.raises(ValueError, match=r"LoRA amounts to .* write save\(..., frozen=frozen\)"):
        folders.save(tmp_path / "fa", method, trainable, "base", sites=sites)
    with pytest.raises(KeyError, match="down_proj"):  # what was given is no half of this method
        folders.save(tmp_path / "fa", method, trainable, "base", {"other": 1}, sites=sites)
    assert not (tmp_path / "fa").exists()


def test_nothing_is_overwritten_unless_asked_and_nothing_half_is_left(llama, tmp_path, monkeypatch):
    method, trainable, _ = lora(llama, tmp_path / "a")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        folders.save(tmp_path / "a", method, trainable, "base")
    before = (tmp_path / "a/adapter_model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("jpeft.interop.peft.writing.write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        folders.save(tmp_path / "a", method, trainable, "other", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == before


# ---- what cannot be written ----


def refused(message, method, params, found, path, **options):
    trainable, frozen = method.init(jax.random.key(0), params, found)
    options = {"sites": found, "frozen": frozen, **options}
    with pytest.raises(ValueError, match=message):
        folders.save(path, method, trainable, **options)
    assert not path.exists()


def test_what_peft_does_not_have_is_refused(llama, tmp_path):
    _, params, sites = llama
    path = tmp_path / "out"
    refused(r"does not have FullFineTuning \(it has .*LoRA.*\); merge", jpeft.FullFineTuning(), params, sites, path)
    plain = make_model("plain")
    refused("embed is in no module", jpeft.LoRA(rank=2, targets="^embed$"), plain.params, plain.sites, path)
    experts = {"moe": {"kernel": plain.params["expert"]}}
    fn = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["moe"]["kernel"])
    found = jpeft.find_sites(fn, experts, jnp.ones((2, 3, 40)))
    refused(
        r"LORA is for dense, .* not for moe/kernel \(experts\)", jpeft.LoRA(rank=2, targets="moe"), experts, found, path
    )
    twice = {"a": {"b": {"kernel": jnp.ones((2, 3, 4, 4))}}}
    scan = lambda x, w: jax.lax.scan(lambda x, w: (jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], None), x, w)[0]
    found = jpeft.find_sites(lambda p, x: scan(x, p["a"]["b"]["kernel"]), twice, jnp.ones((1, 4)))
    refused("a stack of stacks", jpeft.LoRA(rank=2, targets="a"), twice, found, path)
    alone = {"w": {"kernel": jnp.ones((3, 4, 4))}}
    one = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"]["kernel"])[0]
    found = jpeft.find_sites(one, alone, jnp.ones((1, 4)))
    refused("stacked, and not in a module of its own", jpeft.LoRA(rank=2, targets="w"), alone, found, path)


def test_a_weight_with_two_uses_is_no_module_of_its_own(tmp_path):
    model = make_model("linen-scanned")
    message = "embed/embedding is used as embedding and dense"
    refused(message, jpeft.LoRA(rank=2, targets="embedding"), model.params, model.sites, tmp_path / "out")
    method = jpeft.LoRA(rank=2, targets="layers/up")
    trainable, _ = method.init(jax.random.key(0), model.params, model.sites)
    folders.save(tmp_path / "up", method, trainable, sites=model.sites)
    with pytest.raises(ValueError, match="down/kernel is none of the sites"):
        method = jpeft.LoRA(rank=2, targets="down")
        trainable, _ = method.init(jax.random.key(0), model.params, model.sites)
        rest = jpeft.Sites(tuple(s for s in model.sites if "down" not in s.path))
        folders.save(tmp_path / "down", method, trainable, sites=rest)


def test_params_of_other_shapes_are_refused(llama, tmp_path):
    _, params, sites = llama
    other = jax.tree.map(lambda x: jnp.ones((*x.shape[:-1], x.shape[-1] + 1)), params)
    refused(r"q_proj/kernel: the params have \[2, 24, 25\], b has \[2, 2, 24\]", jpeft.LoRA(rank=2, targets="q_proj"),
            params, sites, tmp_path / "out", base=other)  # fmt: skip
    refused(
        "q_proj/kernel: no such leaf", jpeft.LoRA(rank=2, targets="q_proj"), params, sites, tmp_path / "out", base={}
    )


def test_without_sites_only_flax_s_own_names_are_known(llama, tmp_path):
    _, params, sites = llama
    for target in ("lm_head", "embed_tokens"):
        refused("write sites=sites", jpeft.LoRA(rank=2, targets=target), params, sites, tmp_path / "out", sites=None)


def test_a_variant_that_peft_does_not_compute_is_refused():
    from jpeft.core.export import Export
    from jpeft.interop.peft.config import values_of

    export = Export("LORA", {}, required={"scaling": "rslora"})
    assert values_of(jpeft.LoRA(scaling="rslora"), export, {}) == {}
    with pytest.raises(ValueError, match="computes LoRA with scaling='rslora' only, got scaling='standard'"):
        values_of(jpeft.LoRA(), export, {})


# ---- what cannot be read ----


def unreadable(llama, folder, message, kind=ValueError):
    with pytest.raises(kind, match=message) as error:
        folders.load(folder, *llama[1:])
    return str(error.value)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_file_is_named(llama, tmp_path, kept):
    lora(llama, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    unreadable(llama, tmp_path, "adapter_model.safetensors is truncated")


def test_absent_files_are_named(llama, tmp_path):
    unreadable(llama, tmp_path, "expected an adapter folder of HF PEFT, but there is no", FileNotFoundError)
    lora(llama, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    unreadable(llama, tmp_path, r"\['adapter_model.bin'\] may run code", FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text("[]")
    unreadable(llama, tmp_path, "expected a mapping in .*adapter_config.json, got a list")
    (tmp_path / "adapter_config.json").write_text("{")
    unreadable(llama, tmp_path, "expected JSON in .*adapter_config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORE"}, "peft_type 'LORE'; this jpeft reads .*IA3, .*LORA"),
        ({"bias": "all"}, r"(?s)no method computes this LORA adapter\n.*LoRA has bias='none' \(here 'all'\)"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights=True \(here 'pissa'\)"),
        ({"trainable_token_indices": [3], "use_bdlora": True}, "trainable_token_indices: .3.\n    use_bdlora: True"),
        ({"layer_replication": [[0, 2]]}, "options that this jpeft does not compute:\n    layer_replication"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 1}}, "layers of a stack share one value, here .*q_proj: 1"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "1 missing:\n    model.layers.0.self_attn.o_proj, which"),
    ],
)
def test_options_that_are_not_computed_are_refused(llama, tmp_path, config, message):
    lora(llama, tmp_path)
    edit(tmp_path, config)
    unreadable(llama, tmp_path, message)


def test_options_that_say_nothing_of_the_arrays_are_passed_over(llama, tmp_path):
    _, trainable, _ = lora(llama, tmp_path)
    options = {"init_lora_weights": "gaussian", "megatron_core": "megatron.core", "layers_to_transform": [0, 1]}
    edit(tmp_path, options | {"exclude_modules": ["k_proj"], "target_modules": r".*\.[qkv]_proj", "use_dora": None})
    assert_same_leaves(folders.load(tmp_path, *llama[1:])[1], trainable)
    edit(tmp_path, {"layers_to_transform": None})
    assert_same_leaves(folders.load(tmp_path, *llama[1:])[1], trainable)


def test_lacking_options_are_named(llama, tmp_path):
    lora(llama, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    del content["r"], content["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    unreadable(llama, tmp_path, "2 missing:\n    r\n    lora_alpha")


def test_all_differences_are_one_error(llama, tmp_path):
    lora(llama, tmp_path)
    one = "base_model.model.model.layers.1.self_attn."

    def spoil(tensors):
        del tensors[one + "q_proj.lora_A.weight"], tensors[one + "q_proj.lora_B.weight"]
        tensors[one + "z_proj.lora_A.weight"] = np.ones((2, 24), np.float32)
        tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"] = np.ones((2, 24), np.float32)
        tensors["score.weight"] = np.ones((2, 24), np.float32)
        tensors[one + "v_proj.lora_B.weight"] = np.ones((13, 2), np.float32)
        tensors[one + "v_proj.lora_A.weight"] = np.ones((2, 24), np.int64)

    edit(tmp_path, tensors=spoil)
    said = unreadable(llama, tmp_path, "are not those of a LORA adapter")
    layer = "base_model.model.model.layers.{}.self_attn."
    for line in (
        f"{layer}q_proj.lora_A.weight of the layers 1\n",
        f"{layer}q_proj.lora_B.weight of the layers 1\n",
        f"{one}z_proj.lora_A.weight [2, 24]",
        "layers.2.self_attn.q_proj.lora_A.weight [2, 24]",
        "score.weight [2, 24]",
        f"{one}v_proj.lora_B.weight: expected [12, 2], got [13, 2]",
    ):
        assert line in said, said


def test_digits_are_not_lost(llama, tmp_path):
    lora(llama, tmp_path)
    wide = lambda tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items() if "q_proj" in k})
    edit(tmp_path, tensors=wide)
    unreadable(llama, tmp_path, "4 of a dtype that would lose digits:\n.*q_proj.lora_A.weight: F64 into float32")


def test_an_adapter_of_another_model_is_refused(llama, unrolled, tmp_path):
    method = jpeft.LoRA(rank=2, targets="layer_1/up")
    trainable, frozen = method.init(jax.random.key(0), *unrolled[1:])
    folders.save(tmp_path, method, trainable, "base", frozen, sites=unrolled[2])
    unreadable(llama, tmp_path, "2 left over:\n.*layer_1.up.lora_A.weight")
    edit(tmp_path, tensors=dict.clear)
    unreadable(llama, tmp_path, "the file has no tensor of the method")


def test_a_copy_of_the_base_must_be_this_base(llama, tmp_path):
    _, params, sites = llama
    method = jpeft.LoRA(rank=2, targets="embedding")
    trainable, _ = started(method, params, sites)
    folders.save(tmp_path, method, trainable, "base", sites=sites)
    copy = np.asarray(params["embed_tokens"]["embedding"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(tmp_path, tensors=lambda tensors: tensors.update({key: copy}))
    assert_same_leaves(folders.load(tmp_path, params, sites)[1], trainable)
    edit(tmp_path, tensors=lambda tensors: tensors.update({key: copy + 1, key.replace("embed_tokens", "norm"): copy}))
    said = unreadable(llama, tmp_path, "2 left over")
    assert "other values than this model has" in said and "norm.base_layer.weight" in said


def has_copies(export):
    return {name for name, _ in export.shared.values()} & {
        f for kind in export.tensors.values() for f, _ in kind.values()
    }


@pytest.mark.parametrize("name", [name for name in METHODS if has_copies(jpeft.methods()[name].EXPORT)])
def test_copies_of_one_array_must_agree(name, llama, tmp_path):
    _, params, sites = llama
    method = adaptable(jpeft.methods()[name], sites)
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path, method, trainable, "base", frozen, sites=sites)
    first = next(iter(method.EXPORT.shared))
    edit(tmp_path, tensors=lambda tensors: tensors.update({first: tensors[first] + 1}))
    unreadable(llama, tmp_path, f"one array serves all of these, but their tensors differ:\n.*\n.*{first}")


def test_a_field_with_an_axis_that_peft_lacks_is_refused():
    from jpeft.core.export import Export
    from jpeft.interop.peft.rows import rows_of
    from jpeft.methods.lora import LowRank

    leaves = {"up/kernel": LowRank(None, jnp.ones((4, 2)), jnp.ones((2, 4)), axes="io")}
    export = Export("LORA", {"dense": {"a": ("a", "i")}})
    with pytest.raises(ValueError, match=r"not for up/kernel \(a with an axis r\)"):
        list(rows_of(leaves, {"up/kernel": site("up/kernel")}, {"up/kernel": "up"}, export, complete=True))


# ---- names and axes ----


def site(path, axes="io", kind="dense", shape=(), head=False):
    return jpeft.Site(path, kind, shape or (4,) * len(axes), jnp.float32, axes, 1, 0, head)


@pytest.mark.parametrize(
    ("path", "axes", "others", "name"),
    [
        ("layers/attn/q/kernel", "sio", ["layers/norm/scale"], "model.layers.{}.attn.q"),
        ("layers/attn/q/kernel", "sio", [], "model.layers.{}.attn.q"),
        ("model/layers/attn/q/kernel", "sio", ["model/layers/up/kernel"], "model.layers.{}.attn.q"),
        (
            "encoder/layers/q/kernel",
            "sio",
            ["decoder/layers/q/kernel", "encoder/layers/k/kernel"],
            "model.encoder.layers.{}.q",
        ),
        (
            "encoder/block/layer/0/SelfAttention/q/kernel",
            "sio",
            ["encoder/block/layer/1/DenseReluDense/wi/kernel"],
            "model.encoder.block.{}.layer.0.SelfAttention.q",
        ),
        ("layers/0/q/kernel", "io", ["layers/1/q/kernel"], "model.layers.0.q"),
        ("layer_0/q/kernel", "io", [], "model.layer_0.q"),
    ],
)
def test_the_layer_s_number_stands_after_the_stack(path, axes, others, name):
    sites = jpeft.Sites(
        (site(path, axes), *(site(other, axes) for other in others), site("model/norm/scale", "o", "scale"))
    )
    assert module_name(sites[path], sites, "model.") == name
    assert match(name.replace("{}", "7"), sites) == (sites[path], name)


def test_a_head_stands_beside_the_model():
    head = site("lm_head/kernel", head=True)
    assert module_name(head, jpeft.Sites((head,)), "model.") == "lm_head"


def test_names_that_may_be_several_modules_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="q may be a/q/kernel or b/q/kernel"):
        match("q", [site("a/q/kernel"), site("b/q/kernel")])
    assert match("x.3.q", [site("q/kernel")]) is None  # a layer of something that is not here
    assert match("a.q", [site("a/q/kernel"), site("q/kernel")])[0].path == "a/q/kernel"
    lora(llama, tmp_path)
    other = "base_model.model.tower.layers.0.self_attn.q_proj.lora_A.weight"
    edit(tmp_path, tensors=lambda tensors: tensors.update({other: np.ones((2, 24), np.float32)}))
    unreadable(llama, tmp_path, "ambiguous:\n.*q_proj/kernel is .* already")
    trees = {"a": {"q": {"kernel": jnp.ones((4, 4))}}, "b": {"q": {"kernel": jnp.ones((4, 4))}}}
    sites = jpeft.find_sites(lambda p, x: x @ p["a"]["q"]["kernel"] @ p["b"]["q"]["kernel"], trees, jnp.ones((1, 4)))
    edit(tmp_path, tensors=lambda t: (t.clear(), t.update({"base_model.model.q.lora_A.weight": np.ones((2, 4))})))
    with pytest.raises(ValueError, match="q may be a/q/kernel or b/q/kernel"):
        folders.load(tmp_path, trees, sites)


@pytest.mark.parametrize(
    ("names", "paths", "found"),
    [
        ({"layers/q/kernel": "m.layers.{}.q"}, ["layers/k/kernel", "norm/scale"], ["q"]),
        ({"layers/a/q/kernel": "m.layers.{}.a.q"}, ["layers/b/q/kernel"], ["a.q"]),
        ({"layers/q/kernel": "m.layers.{}.q"}, ["tower/q/kernel"], ["m.layers.0.q", "m.layers.1.q"]),
        ({"layer_1/up/kernel": "m.layer_1.up"}, ["layer_0/up/kernel", "layer_2/up/kernel"], ["layer_1.up"]),
        ({"up/kernel": "m.up"}, ["layer/up/kernel"], ["m.up"]),
    ],
)
def test_target_modules_are_the_shortest_that_mean_no_other_module(names, paths, found):
    assert minimal(names, dict.fromkeys(names, 2), [*names, *paths]) == found


@pytest.mark.parametrize("axes", ["iio", "oii"])
def test_a_convolution_s_channels_come_before_its_window(axes):
    numbers = np.arange(3 * 4 * 2).reshape(12, 2)  # (in, rank), window 3 and channels 4 or the other way round
    shape = (3, 4, 5) if axes == "iio" else (5, 4, 3)
    window = Window.of(site("c/kernel", axes, "conv", shape))
    tensor = Layout("ir", "ri", window).to_torch(numbers)
    by_hand = np.moveaxis(numbers.reshape(3, 4, 2), 1, 0) if axes == "iio" else numbers.reshape(4, 3, 2)
    np.testing.assert_array_equal(tensor, np.moveaxis(by_hand, -1, 0))
    for has, wants, shape in (
        ("ir", "ri", (2, 4, 3)),
        ("ir", "r(i)", (2, 12)),
        ("ro", "orw", (7, 2, 1)),
        ("o", "1ow", (1, 7, 1)),
        ("", "l", (1,)),
    ):
        layout, field = Layout(has, wants, window), tuple({"i": 12, "r": 2, "o": 7}[c] for c in has)
        values = np.arange(np.prod(field)).reshape(field)
        assert layout.shape(field) == layout.to_torch(values).shape == shape
        again = layout.from_torch(layout.to_torch(values), field)
        assert again.shape == field
        np.testing.assert_array_equal(again, values)
    with pytest.raises(ValueError, match="of the axes ioi it is not known which are the channels"):
        Window.of(site("c/kernel", "ioi", "conv"))


def test_a_convolution_goes_there_and_back(tmp_path):
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["net"]["c"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    params, x = {"net": {"c": {"kernel": jnp.ones((3, 4, 5))}}}, jnp.ones((1, 6, 4))
    sites = jpeft.find_sites(fn, params, x)
    method = jpeft.LoRA(rank=2, targets="conv", modules_to_save=())
    trainable, frozen = started(method, params, sites)
    folders.save(tmp_path, method, trainable, sites=sites, prefix="")
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.net.c.lora_A.weight": (2, 4, 3),
        "base_model.model.net.c.lora_B.weight": (5, 2, 1),
    }
    assert_same_leaves(folders.load(tmp_path, params, sites)[1], trainable)


# ---- the data itself ----


@pytest.mark.parametrize("name", METHODS)
def test_export_data_is_of_this_class_and_names_no_field_twice(name):
    kind = jpeft.methods()[name]
    export, fields = kind.EXPORT, set(kind.__dataclass_fields__)
    used = [e if isinstance(e, str) else e[0] for e in export.config.values()]
    used += [field for pair in export.patterns.values() for field in pair] + [e[0] for e in export.modules.values()]
    assert set(used) | set(export.required) <= fields
    parts = [export.config, export.patterns, export.modules, export.fixed]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert not {"target_modules", "modules_to_save", "peft_type"} & set().union(*parts)


def test_no_two_classes_read_the_same_folder():
    own = [k.EXPORT for k in jpeft.methods().values() if vars(k).get("EXPORT") is not None]
    seen = [(e.peft_type, tuple(sorted((k, str(v)) for k, v in e.fixed.items()))) for e in own]
    assert len(set(seen)) == len(seen)


def test_formats_load_on_first_use_and_without_torch():
    import subprocess
    import sys

    code = "import sys, jpeft; jpeft.interop.peft.save; assert not {'torch', 'flax', 'optax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        jpeft.interop.nothing_like_it  # noqa: B018
