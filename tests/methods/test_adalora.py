"""AdaLoRA against HF PEFT's layers and allocator, and what its budget, pruning and orthogonality promise."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft_cases import assert_named_as_peft, assert_same_as_peft, make_case, numbers
from tiny_llama import CONFIG

import jpeft
import jpeft.models
from jpeft.core.weight import Weight
from jpeft.methods._allocation import AllocatorState, orthogonality
from jpeft.train import adapter
from jpeft.train.config import TrainConfig
from jpeft.train.loop import fit
from jpeft.train.tokens import Example

KEY = jax.random.key(0)
PARAMS = {"stack": numbers(3, 8, 8) / 3, "last": numbers(8, 6) / 3}
X, Y = numbers(16, 8), numbers(16, 6)


def fn(p, x):
    step = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(step, x, p["stack"])[0] @ p["last"]


SITES = jpeft.find_sites(fn, PARAMS, X)
MATRICES = 4


def start(**options):
    method = jpeft.AdaLoRA(**{"init_rank": 5, "target_rank": 3, "total_steps": 12, **options})
    return method, *method.init(KEY, PARAMS, SITES)


def loss(method):
    return lambda t, f: jnp.mean((jpeft.lift(fn)(method.bind(t, f), X) - Y) ** 2)


def weights(trainable):
    leaves = jax.tree.leaves(trainable, is_leaf=lambda x: isinstance(x, Weight))
    return [x for x in leaves if isinstance(x, Weight)]


def values_of(trainable):
    return [np.asarray(w.singular_values) for w in weights(trainable)]


def kept(trainable):
    return sum(int((v != 0).sum()) for v in values_of(trainable))


def train(method, trainable, frozen, tx=None, steps=None):
    """Every step's trainable half, and how often the step was traced."""
    tx = method.optimizer(tx or optax.adam(0.05))
    state, seen, traced = tx.init(trainable), [], []

    @jax.jit
    def step(trainable, state, frozen):
        traced.append(1)
        updates, state = tx.update(jax.grad(loss(method))(trainable, frozen), state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(steps or method.total_steps):
        trainable, state = step(trainable, state, frozen)
        seen.append(trainable)
    return seen, len(traced)


# ---- against HF PEFT ----


@pytest.mark.parity
@pytest.mark.parametrize("name", ["linear", "convolution"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_give_what_peft_gives(name):
    peft = pytest.importorskip("peft")
    assert_same_as_peft(
        make_case(name),
        jpeft.AdaLoRA(init_rank=4, target_rank=3, alpha=5, targets="kernel", total_steps=10),
        peft.AdaLoraConfig(init_r=4, target_r=3, lora_alpha=5, target_modules=["0"], total_step=10),
        lambda layer: tuple(getattr(layer, f"lora_{n}")["default"] for n in "AEB"),
        lambda w: (w.q.T, w.singular_values[:, None], w.p.T),
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_it_is_written_with_pefts_names():
    peft = pytest.importorskip("peft")
    options = {"tinit": 1, "tfinal": 2, "beta1": 0.7, "beta2": 0.6, "orth_reg_weight": 0.3}
    assert_named_as_peft(
        make_case("linear"),
        jpeft.AdaLoRA(init_rank=4, target_rank=3, alpha=5, targets="kernel", total_steps=9, delta_t=2, **options),
        peft.AdaLoraConfig(init_r=4, target_r=3, lora_alpha=5, target_modules=["0"], total_step=9, deltaT=2, **options),
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("delta", [1, 3])
def test_scores_budgets_and_masks_are_pefts_over_a_whole_run(delta):
    """Twenty steps of plain gradient descent on the same gradients, in torch and here."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    layers, total, rate = 3, 20, 0.1
    schedule = {"tinit": 2, "tfinal": 5, "beta1": 0.8, "beta2": 0.7}
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, target_modules=["0", "1", "2"], total_step=total, deltaT=delta, **schedule
    )
    model = peft.get_peft_model(torch.nn.Sequential(*(torch.nn.Linear(6, 5) for _ in range(layers))), config)
    modules = [getattr(model.base_model.model, str(n)) for n in range(layers)]
    theirs = [[getattr(m, f"lora_{n}")["default"] for n in "AEB"] for m in modules]
    allocator = model.base_model.rankallocator

    method = jpeft.AdaLoRA(
        init_rank=4, target_rank=2, total_steps=total, delta_t=delta, sensitivity="after", targets="w", **schedule
    )
    params = {"w": numbers(layers, 6, 5)}
    stacked = lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]
    trainable, _ = method.init(KEY, params, jpeft.find_sites(stacked, params, numbers(1, 6)))
    stack = lambda arrays, n: jnp.stack([jnp.asarray(layer[n].detach().numpy()) for layer in arrays])
    from_torch = lambda arrays: {
        "w": trainable["w"].replace(
            q=stack(arrays, 0).mT, singular_values=stack(arrays, 1)[..., 0], p=stack(arrays, 2).mT
        )
    }
    trainable = from_torch(theirs)
    tx = jpeft.rank_allocator(method, optax.sgd(rate))
    state = tx.init(trainable)
    for step in range(1, total + 1):
        for n, p in enumerate(p for m in theirs for p in m):
            p.grad = torch.from_numpy((1 + n // 3) * numbers(*p.shape, seed=1000 * step + n))
        gradients = from_torch([[p.grad for p in m] for m in theirs])
        with torch.no_grad():
            for p in (p for m in theirs for p in m):
                p -= rate * p.grad
        model.base_model.update_and_allocate(step)
        updates, state = tx.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)

        want = from_torch(theirs)["w"]
        np.testing.assert_array_equal(trainable["w"].singular_values == 0, want.singular_values == 0)
        np.testing.assert_allclose(trainable["w"].singular_values, want.singular_values, atol=1e-5)
        if step < total - 5:
            assert method.budget(step, 12, 6) == allocator.budget_schedule(step)[0]
            for name, ours in (("exp_avg_ipt", state.sensitivity), ("exp_avg_unc", state.uncertainty)):
                found = getattr(allocator, name)
                each = [[found[f"{n}.lora_{letter}.default"] for letter in "AEB"] for n in range(layers)]
                averages = from_torch(each)["w"]
                for x, y in zip(ours[0], (averages.q, averages.singular_values, averages.p), strict=True):
                    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
    assert kept(trainable) == 6
    assert len({int(n) for n in (trainable["w"].singular_values != 0).sum(-1)}) > 1


# ---- the budget ----


def test_the_budget_is_the_papers_and_met_exactly_at_every_step_with_one_compilation():
    method, trainable, frozen = start(tinit=2, tfinal=3)
    seen, traced = train(method, trainable, frozen)
    expected = []
    for t in range(1, 13):
        left = min(max(1 - (t - 2) / (12 - 2 - 3), 0), 1)
        expected.append(int(np.floor(12 + (20 - 12) * left**3 + 1e-9)))
    assert [method.budget(t, 20, 12) for t in range(1, 13)] == expected
    assert [kept(t) for t in seen] == expected
    assert expected[:2] == [20, 20] and expected[-4:] == [12, 12, 12, 12]
    assert traced == 1
    fixed = [[v != 0 for v in values_of(t)] for t in seen[-4:]]
    assert all(np.array_equal(a, b) for later in fixed[1:] for a, b in zip(fixed[0], later, strict=True))
    moving = [values_of(t) for t in seen[-2:]]
    assert any(not np.array_equal(a, b) for a, b in zip(*moving, strict=True)), "what is kept goes on training"


def test_ranks_differ_between_matrices_where_importance_does():
    method, trainable, frozen = start(tfinal=3)
    ranks = np.concatenate(
        [np.atleast_1d((v != 0).sum(-1)) for v in values_of(train(method, trainable, frozen)[0][-1])]
    )
    assert ranks.sum() == 3 * MATRICES and len(set(ranks.tolist())) > 1


def test_between_two_allocations_what_was_zero_may_come_back():
    method, trainable, frozen = start(delta_t=4, tfinal=2)
    counts = [kept(t) for t in train(method, trainable, frozen)[0]]
    assert [counts[t - 1] for t in (4, 8, 10, 11, 12)] == [method.budget(t, 20, 12) for t in (4, 8, 10, 11, 12)]
    assert counts[4] == counts[8] == 20, "the step after a mask trains all of them"


@pytest.mark.parametrize("sensitivity", ["before", "after"])
def test_importance_is_the_papers_formula_in_float64(sensitivity):
    method, trainable, _ = start(sensitivity=sensitivity, beta1=0.6, beta2=0.9)
    tx = jpeft.rank_allocator(method, optax.sgd(0.5))
    rng = np.random.default_rng(0)
    random = lambda tree: jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)
    trainable = random(trainable)
    state = tx.init(trainable)
    mean, deviation = 0.0, 0.0
    for _ in range(4):
        gradients = random(trainable)
        updates, state = tx.update(gradients, state, trainable)
        after = optax.apply_updates(trainable, updates)
        g = np.asarray(gradients["last"].q, np.float64)
        w = np.asarray((trainable if sensitivity == "before" else after)["last"].q, np.float64)
        now = np.abs(w * g)
        mean = 0.6 * mean + 0.4 * now
        deviation = 0.9 * deviation + 0.1 * np.abs(now - mean)
        trainable = after
    np.testing.assert_allclose(state.sensitivity[0][0], mean, rtol=1e-5)  # of "last", the first in the tree
    np.testing.assert_allclose(state.uncertainty[0][0], deviation, rtol=1e-5, atol=1e-7)


def test_the_transforms_serve_a_sweep_a_scan_and_other_trainables_beside():
    method = jpeft.AdaLoRA(init_rank=4, target_rank=2, total_steps=6, targets="stack", modules_to_save=["last"])
    trainable, frozen = method.init(KEY, PARAMS, SITES)
    tx = method.optimizer(optax.adam(0.05))

    def run(trainable):
        def step(carry, _):
            trainable, state = carry
            updates, state = tx.update(jax.grad(loss(method))(trainable, frozen), state, trainable)
            return (optax.apply_updates(trainable, updates), state), None

        return jax.lax.scan(step, (trainable, tx.init(trainable)), None, length=6)[0]

    two = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), trainable)
    many, state = jax.jit(jax.vmap(run))(two)
    for n in range(2):
        one = jax.tree.map(lambda x, n=n: x[n], many)
        assert kept({"stack": one["stack"]}) == 2 * 3
    assert not np.allclose(many["last"].base[0], PARAMS["last"])
    assert isinstance(state[1], AllocatorState) and state[1].step.tolist() == [6, 6]
    alone, _ = run(trainable)
    np.testing.assert_allclose(alone["stack"].q, many["stack"].q[0], atol=1e-4)


# ---- orthogonality ----


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_the_orthogonality_term_is_the_formula_and_adds_its_own_gradient(form):
    _, trainable, _ = start()
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype), trainable)
    norms = []
    for w in weights(trainable):
        for rows in (np.asarray(w.q).swapaxes(-1, -2), np.asarray(w.p)):
            off = rows @ rows.swapaxes(-1, -2) - np.eye(5)
            norms += np.atleast_1d(np.sqrt((off**2).sum((-2, -1)))).tolist()
    expected = np.sum(np.square(norms)) if form == "squared" else np.mean(norms)
    term = lambda t: orthogonality([(w.q, w.singular_values, w.p) for w in weights(t)], form)
    np.testing.assert_allclose(term(trainable), expected, rtol=1e-5)

    tx = jpeft.add_orthogonal_regularization(0.3, form)
    gradients = jax.tree.map(jnp.ones_like, trainable)
    found, _ = tx.update(gradients, tx.init(trainable), trainable)
    wanted = jax.tree.map(lambda g, d: g + 0.3 * d, gradients, jax.grad(term)(trainable))
    assert jax.tree.structure(found) == jax.tree.structure(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


def test_the_optimizer_counts_the_term_once_and_makes_the_vectors_orthogonal():
    method, trainable, frozen = start(total_steps=150, orth_reg_weight=0.1)
    assert method.penalty(trainable) == 0.0
    term = lambda t: float(orthogonality([(w.q, w.singular_values, w.p) for w in weights(t)]))
    last = train(method, trainable, frozen, optax.adam(0.02))[0][-1]
    assert term(trainable) == pytest.approx(2 * 5 * MATRICES, rel=0.02), "at first all vectors are near zero"
    assert term(last) < 0.5
    without = dataclasses.replace(method, orth_reg_weight=0.0)
    assert term(train(without, trainable, frozen, optax.adam(0.02))[0][-1]) > 5


# ---- pruning ----


def trained(**options):
    method, trainable, frozen = start(tfinal=3, **options)
    return method, train(method, trainable, frozen)[0][-1], frozen


def test_the_pruned_adapter_computes_the_same_with_smaller_arrays(tmp_path):
    method, trainable, frozen = trained(target_rank=1)
    pruned, small, same = method.pruned(trainable, frozen)
    assert same is frozen
    ranks = {path: int((v != 0).sum(-1).max()) for path, v in zip(("last", "stack"), values_of(trainable), strict=True)}
    assert {path: small[path].singular_values.shape[-1] for path in ranks} == {p: max(1, r) for p, r in ranks.items()}
    assert dict(pruned.rank_pattern) == {f"^{p}$": max(1, r) for p, r in ranks.items()}
    assert kept(small) == kept(trainable) == MATRICES
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(small) < size(trainable)
    merged, again = (jpeft.merge(method.bind(t, frozen)) for t in (trainable, small))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, again)

    mark = adapter.fingerprint(PARAMS)
    adapter.save_adapter(tmp_path, pruned, small, frozen, base="", base_fingerprint=mark, seed=0)
    loaded = adapter.load_adapter(tmp_path, PARAMS, SITES, jpeft.methods())
    assert loaded[0] == pruned
    jax.tree.map(np.testing.assert_array_equal, loaded[1], small)


def test_pruning_reaches_one_method_of_a_chain_alone():
    both = jpeft.chain(jpeft.LoRA(rank=2), jpeft.AdaLoRA(init_rank=4, target_rank=2)).for_steps(6)
    trainable, frozen = both.init(KEY, PARAMS, SITES)
    value = jnp.zeros((3, 4)).at[:, 1].set(2.0)
    trainable[1]["stack"] = trainable[1]["stack"].replace(singular_values=value)
    method, small, same = both.after_training(trainable, frozen)
    assert [type(m) for m in method.methods] == [jpeft.LoRA, jpeft.AdaLoRA]
    assert small[1]["stack"].q.shape == (3, 8, 1) and small[0]["stack"].a.shape == (3, 8, 2)
    merged, again = (jpeft.merge(m.bind(t, f)) for m, t, f in ((both, trainable, frozen), (method, small, same)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, again)


def test_a_pruned_adapter_is_a_lora_to_others():
    method, trainable, frozen = trained()
    same, unchanged = method.exported(trainable, frozen)
    assert same == method and unchanged is trainable
    pruned, small, _ = method.pruned(trainable, frozen)
    lora, exported = pruned.exported(small, frozen)
    assert isinstance(lora, jpeft.LoRA)
    started, lora_frozen = lora.init(KEY, PARAMS, SITES)
    assert jax.tree.structure(started) == jax.tree.structure(exported)
    merged, again = jpeft.merge(method.bind(trainable, frozen)), jpeft.merge(lora.bind(exported, lora_frozen))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, again)


# ---- the trainer ----


def test_the_trainer_plans_resumes_and_prunes(tmp_path, monkeypatch):
    apply, params = jpeft.models.init(jax.random.key(0), CONFIG)
    sites = jpeft.find_sites(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    examples = [Example(np.repeat(np.int32(n), n), np.arange(n) >= 1) for n in rng.integers(3, 10, 12)]
    settings = {"max_steps": 6, "batch_size": 2, "save_every": 2, "learning_rate": 1e-2}
    method = jpeft.AdaLoRA(init_rank=4, target_rank=2, targets=["q_proj", "down_proj"])
    run = lambda name: fit(
        apply, params, sites, method, examples, examples[:3], TrainConfig(**settings, out=str(tmp_path / name)), 8
    )
    whole = run("whole")
    assert whole.method.total_steps == 6 and kept(whole.trainable) == 2 * 2 * CONFIG["num_hidden_layers"]
    written = json.loads((tmp_path / "whole/adapter/method.json").read_text())["method"]
    assert written["total_steps"] == 6 and len(written["rank_pattern"]) == 2
    loaded = adapter.load_adapter(tmp_path / "whole/adapter", params, sites, jpeft.methods())
    assert loaded[0] == whole.method
    jax.tree.map(np.testing.assert_array_equal, loaded[1], whole.trainable)

    class Killed(BaseException):
        pass

    from jpeft.train.folder import RunFolder

    log = RunFolder.log

    def killing(self, **values):
        log(self, **values)
        if values["step"] == 5:
            raise Killed

    monkeypatch.setattr(RunFolder, "log", killing)
    with pytest.raises(Killed):
        run("parts")
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, run("parts").trainable, whole.trainable)


# ---- counts and refusals ----

LLAMA2_7B = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA2_7B |= dict(intermediate_size=11008, vocab_size=32000)


def test_the_count_on_a_public_model_is_the_published_integer():
    apply, shapes = jpeft.models.abstract(LLAMA2_7B)
    sites = jpeft.find_sites(apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jpeft.AdaLoRA(init_rank=12, targets=["q_proj", "v_proj"])
    bound = jax.eval_shape(lambda key, p: method.bind(*method.init(key, p, sites)), KEY, shapes)
    assert jpeft.count(bound).trainable == 6_292_224


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_rank": 4, "target_rank": 6}, "init_rank=4 is below target_rank=6; the paper has"),
        ({"target_rank": 0}, "whole target_rank >= 1, got target_rank=0"),
        ({"init_rank": 8.5}, "whole init_rank >= 1"),
        ({"total_steps": 0}, "whole total_steps >= 1, got total_steps=0"),
        ({"delta_t": 0}, "whole delta_t >= 1"),
        ({"tinit": -1}, "whole tinit >= 0"),
        ({"tinit": 6, "tfinal": 4, "total_steps": 10}, "tinit=6 and tfinal=4 leave no step of total_steps=10"),
        ({"beta1": 1.0}, "0 < beta1 < 1, got beta1=1.0"),
        ({"beta2": 0.0}, "0 < beta2 < 1"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got dropout=1.0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight >= 0"),
        ({"sensitivity": "during"}, "expected sensitivity in .*'before'.*, got 'during'"),
        ({"orthogonality": "trace"}, "expected orthogonality in .*'squared'.*, got 'trace'"),
        ({"rank_pattern": {"up": 0}}, "ranks >= 1 in rank_pattern, got 'up': 0"),
    ],
)
def test_options_are_checked_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.AdaLoRA(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_rank": 7}, r"last: rank 7 is above min\(in, out\) = min\(8, 6\)"),
        ({"rank_pattern": {"first": 2}}, "rank_pattern has 'first', found in no adapted path; .*: stack, last"),
    ],
)
def test_sites_are_checked_before_anything_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_what_the_transforms_need_is_said():
    method, trainable, frozen = start()
    unplanned = jpeft.AdaLoRA()
    for make in (lambda: unplanned.optimizer(optax.sgd(0.1)), lambda: unplanned.exported(trainable, frozen)):
        with pytest.raises(ValueError, match=r"write AdaLoRA\(total_steps=...\)"):
            make()
    with pytest.raises(ValueError, match="total_steps=12, but the run ends after 11"):
        method.for_steps(11)
    assert method.for_steps(13) == method and unplanned.for_steps(13).total_steps == 13
    with pytest.raises(ValueError, match="tinit=5 and tfinal=5 leave no step of total_steps=9"):
        jpeft.AdaLoRA(tinit=5, tfinal=5).for_steps(9)
    tx = jpeft.rank_allocator(method, optax.sgd(0.1))
    with pytest.raises(ValueError, match="got 0 triplets in 0 leaves"):
        tx.init({"w": jnp.ones(3)})
    greedy = jpeft.rank_allocator(dataclasses.replace(method, init_rank=6, target_rank=6), optax.sgd(0.1))
    with pytest.raises(ValueError, match="at least target_rank=6 triplets a matrix, got 20 triplets in 2 leaves"):
        greedy.init(trainable)
    for each in (tx, jpeft.add_orthogonal_regularization(0.1)):
        with pytest.raises(ValueError, match=r"write tx.update\(gradients, state, trainable\)"):
            each.update(trainable, each.init(trainable))
