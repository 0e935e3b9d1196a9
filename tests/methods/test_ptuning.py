"""P-tuning: HF PEFT's encoders on a whole model, published counts, and what is left when training is over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_prompts import assert_same_as_peft_prompt

import jpeft

KEY = jax.random.key(0)


def mlp_tensors(encoder):
    return [encoder.embedding.weight, *(p for n in (0, 2, 4) for p in encoder.mlp_head[n].parameters())]


def lstm_tensors(encoder):
    lstm = encoder.lstm_head
    ways = [(n, way) for n in range(lstm.num_layers) for way in ("", "_reverse")]
    cells = [getattr(lstm, f"{kind}_l{n}{way}") for n, way in ways for kind in KINDS]
    return [encoder.embedding.weight, *cells, *(p for n in (0, 2) for p in encoder.mlp_head[n].parameters())]


KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def mlp_fields(w):
    return [w.inputs, w.first.T, w.first_bias, w.hidden[0].T, w.hidden_bias[0], w.last.T, w.last_bias]


def lstm_fields(w):
    cells = []
    for n in range(len(w.recurrent)):
        for way in range(2):
            kernel = w.upper[n - 1, way] if n else w.lower[way]
            cells += [kernel.T, w.recurrent[n, way].T, w.input_bias[n, way], w.recurrent_bias[n, way]]
    return [w.inputs, *cells, w.first.T, w.first_bias, w.last.T, w.last_bias]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("lstm", 2), ("lstm", 3), ("lstm", 1)])
def test_the_same_numbers_give_what_peft_gives(encoder, layers, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=7,
        encoder_num_layers=layers,
    )
    assert_same_as_peft_prompt(
        tmp_path,
        jpeft.PTuning(5, encoder=encoder, encoder_hidden_size=7, encoder_num_layers=layers),
        config,
        mlp_tensors if encoder == "mlp" else lstm_tensors,
        mlp_fields if encoder == "mlp" else lstm_fields,
        named=lambda w: {"prompt_embeddings": w.rows},
    )


def apply(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["embed"].T


def start(method, width=6, key=KEY):
    params = {"embed": jnp.asarray(np.random.default_rng(0).normal(size=(7, width)), jnp.float32)}
    return method.init(key, params, jpeft.find_sites(apply, params, jnp.array([[3, 1]])))


METHODS = {
    "mlp": jpeft.PTuning(3, encoder="mlp", encoder_hidden_size=5, encoder_num_layers=3),
    "shallow": jpeft.PTuning(3, encoder="mlp", encoder_num_layers=1),
    "lstm": jpeft.PTuning(3, head_hidden_size=5),
    "one layer": jpeft.PTuning(3, encoder_hidden_size=4, encoder_num_layers=1),
}


def by_hand(w):
    """The prompt in float64: the LSTM's equations, token by token, then the layers that follow."""
    f = {name: np.asarray(x, np.float64) for name in w.FIELDS if (x := getattr(w, name)) is not None}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    x = f["inputs"]
    for n in range(len(f.get("recurrent", ()))):
        ways = []
        for way in range(2):
            kernel = f["upper"][n - 1, way] if n else f["lower"][way]
            h = c = np.zeros(f["recurrent"].shape[2])
            out = []
            for token in x[::-1] if way else x:
                gates = (
                    token @ kernel + f["input_bias"][n, way] + h @ f["recurrent"][n, way] + f["recurrent_bias"][n, way]
                )
                i, forget, g, o = np.split(gates, 4)
                c = sigmoid(forget) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                out.append(h)
            ways.append(np.array(out[::-1] if way else out))
        x = np.concatenate(ways, 1)
    for kernel, bias in (
        (f["first"], f["first_bias"]),
        *zip(f.get("hidden", ()), f.get("hidden_bias", ()), strict=True),
    ):
        x = np.maximum(x @ kernel + bias, 0)
    return x @ f["last"] + f["last_bias"]


@pytest.mark.parametrize("name", METHODS)
def test_the_prompt_is_what_the_equations_say(name):
    trainable, _ = start(METHODS[name])
    np.testing.assert_allclose(trainable["embed"].made(), by_hand(trainable["embed"]), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_after_training_a_plain_prompt_computes_the_same(name):
    method = METHODS[name]
    trainable, frozen = start(method)
    tokens = jpeft.prompted({"tokens": jnp.array([[3, 1]])}, method, at=(0, 1, 2))["tokens"]
    plain, rows, rest = method.after_training(trainable, frozen)
    assert plain == jpeft.PromptTuning(3)
    before, after = (
        jpeft.lift(apply)(m.bind(t, f), tokens) for m, t, f in ((method, trainable, frozen), (plain, rows, rest))
    )
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert jax.tree.structure((rows, rest)) == jax.tree.structure(start(plain))
    exported, its_rows = method.exported(trainable, frozen)
    assert exported == plain and np.array_equal(its_rows["embed"].rows, rows["embed"].rows)


@pytest.mark.parametrize("first", [True, False])
def test_in_a_chain_the_encoder_goes_and_the_rest_stays(first):
    lora = jpeft.LoRA(rank=2, targets="head")
    fn = lambda p, tokens: jnp.tanh(p["embed"][tokens]) @ p["head"]
    params = {"embed": jnp.ones((7, 6)), "head": jnp.ones((6, 4))}
    method = jpeft.chain(METHODS["lstm"], lora) if first else jpeft.chain(lora, METHODS["lstm"])
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, jnp.array([[3, 1]])))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    tokens = jpeft.prompted({"tokens": jnp.array([[3, 1]])}, method)["tokens"]
    plain, rows, rest = method.after_training(trainable, frozen)
    assert {type(m).__name__ for m in plain.methods} == {"PromptTuning", "LoRA"}
    before = jpeft.lift(fn)(method.bind(trainable, frozen), tokens)
    np.testing.assert_allclose(jpeft.lift(fn)(plain.bind(rows, rest), tokens), before, atol=1e-6)


def test_a_key_switches_dropout_on_between_the_layers():
    method = jpeft.PTuning(3, encoder_num_layers=3, encoder_dropout=0.5)
    halves = start(method)
    rows = lambda *key: method.bind(*halves, *key)["embed"].made()
    np.testing.assert_allclose(rows(), by_hand(halves[0]["embed"]), atol=1e-6)
    first, second = rows(jax.random.key(1)), rows(jax.random.key(2))
    assert not np.allclose(first, rows(), atol=1e-4) and not np.allclose(first, second, atol=1e-4)
    np.testing.assert_array_equal(first, rows(jax.random.key(1)))
    still = jpeft.PTuning(3, encoder_num_layers=3)
    np.testing.assert_array_equal(still.bind(*start(still), jax.random.key(1))["embed"].made(), rows())


def test_layers_of_a_stack_have_encoders_of_their_own():
    def fn(p, tokens):
        nothing = jnp.zeros((*tokens.shape, 6))
        return jax.lax.scan(lambda x, table: (x + jnp.take(table, tokens, axis=0), None), nothing, p["tables"])[0]

    params, tokens = {"tables": jnp.ones((2, 7, 6))}, jnp.array([[3, 1]])
    method = jpeft.PTuning(3, encoder_dropout=0.5)
    trainable, frozen = method.init(KEY, params, jpeft.find_sites(fn, params, tokens))
    w = trainable["tables"]
    assert w.lower.shape == (2, 2, 6, 12) and w.upper.shape == (2, 1, 2, 6, 12)
    layer = lambda n: by_hand(jax.tree.map(lambda x: x[n], w))
    np.testing.assert_allclose(w.made(), [layer(0), layer(1)], atol=1e-6)
    assert not np.allclose(layer(0), layer(1), atol=1e-3)
    out = jpeft.lift(fn)(method.bind(trainable, frozen), jpeft.VIRTUAL + jnp.array([[0, 1, 2]]))
    np.testing.assert_allclose(out[0], layer(0) + layer(1), atol=1e-6)
    assert method.bind(trainable, frozen, KEY)["tables"].made().shape == (2, 3, 6)


def test_the_encoder_runs_once_however_often_the_embedding_is_used():
    method = METHODS["mlp"]
    twice = lambda p, tokens: apply(p, tokens) + apply(p, tokens[:, ::-1])
    halves = start(method)
    tokens = jpeft.prompted({"tokens": jnp.array([[3, 1]])}, method)["tokens"]
    products = lambda fn: str(
        jax.make_jaxpr(lambda t: jpeft.lift(fn)(method.bind(t, halves[1]), tokens))(halves[0])
    ).count("f32[3,5] = dot_general")
    assert products(twice) == products(apply) == 3


def test_parameters_start_as_torch_s():
    method = jpeft.PTuning(400, encoder_hidden_size=40, head_hidden_size=25)
    w = start(method, width=100)[0]["embed"]
    assert abs(float(w.inputs.std()) - 1) < 0.01
    for name in ("lower", "upper", "recurrent", "input_bias", "recurrent_bias"):
        x = np.abs(getattr(w, name))
        assert 0.9 * 40**-0.5 < x.max() <= 40**-0.5, name
    for name, size in (("first", 80), ("first_bias", 80), ("last", 25), ("last_bias", 25)):
        x = np.abs(getattr(w, name))
        assert 0.8 * size**-0.5 < x.max() <= size**-0.5, name


@pytest.mark.parametrize(
    ("width", "method", "count"),
    [
        (1024, jpeft.PTuning(9), 14_698_496 + 9 * 1024),  # the authors' code for LAMA
        (1024, jpeft.PTuning(9, encoder_hidden_size=1024, head_hidden_size=1024), 45_123_584 + 9 * 1024),  # SuperGLUE
        (1024, jpeft.PTuning(20, encoder="mlp", encoder_hidden_size=128), 300_288),  # HF PEFT on bloomz-560m
        (3072, jpeft.PTuning(20, encoder="mlp"), 28_382_208),  # HF PEFT on Llama-3.2-3B
        (4096, jpeft.PTuning(20, encoder="mlp", encoder_hidden_size=512), 4_543_488),
        (2560, jpeft.PTuning(20, encoder="mlp", encoder_hidden_size=512), 2_938_368),
        (4096, jpeft.PTuning(20, encoder_hidden_size=512), 30_512_128),
        (2560, jpeft.PTuning(20, encoder_hidden_size=512), 22_615_552),
    ],
)
def test_the_counts_are_the_published_ones(width, method, count):
    trainable, _ = jax.eval_shape(lambda: start(method, width))
    assert sum(x.size for x in jax.tree.leaves(trainable)) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": -1}, "expected a whole num_tokens >= 1, got num_tokens=-1"),
        ({"encoder": "gru"}, r"expected encoder in \('lstm', 'mlp'\), got 'gru'"),
        ({"encoder_num_layers": 0}, "expected a whole encoder_num_layers >= 1"),
        ({"encoder_hidden_size": 0}, "expected a whole encoder_hidden_size >= 1"),
        ({"head_hidden_size": 1.5}, "expected a whole head_hidden_size >= 1"),
        (
            {"encoder": "mlp", "head_hidden_size": 4},
            "expected head_hidden_size for encoder='lstm' alone, got 4 for 'mlp'",
        ),
        ({"encoder_dropout": 1.0}, "expected 0 <= encoder_dropout < 1, .* got 1.0"),
        ({"encoder": "mlp", "encoder_dropout": 0.1}, "0 but between two layers of an LSTM, got 0.1 for encoder='mlp'"),
        ({"encoder_num_layers": 1, "encoder_dropout": 0.1}, "got 0.1 for encoder='lstm', encoder_num_layers=1"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.PTuning(**options)


def test_an_odd_embedding_has_no_half():
    with pytest.raises(ValueError, match="embed: no half of its 5 features .* write encoder_hidden_size="):
        start(jpeft.PTuning(), width=5)
    assert start(jpeft.PTuning(encoder_hidden_size=3), width=5)[0]["embed"].made().shape == (20, 5)
