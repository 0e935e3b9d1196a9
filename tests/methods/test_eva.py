"""EVA against HF PEFT and against principal components in float64, ranks that move included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import numbers

import jpeft
from jpeft.train import adapter

KEY = jax.random.key(0)
SPREAD = np.float32([2.5, 2, 1.6, 1.25, 1, 0.5, 0.2, 0.1])


def two(p, x):
    return jnp.tanh(x @ p["first"]) @ p["second"]


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def calibrated(method, fn, params, batches):
    sites = jpeft.find_sites(fn, params, batches[0])
    return sites, jpeft.calibrate(fn, params, sites, batches, method=method)


def components(rows):
    """The principal components in columns, and the part of the variance of each."""
    centred = rows - rows.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    return vt.T, s**2 / (centred**2).sum()


@pytest.mark.parity
@pytest.mark.parametrize(("rank", "rho", "whiten"), [(4, 1.0, False), (2, 2.0, False), (2, 2.0, True)])
@pytest.mark.filterwarnings("ignore")
def test_it_starts_as_peft_s(rank, rho, whiten):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.lora import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, False), torch.nn.Tanh(), torch.nn.Linear(8, 6, False))
    narrow = 0.1 * numbers(8, 1) @ numbers(1, 8) + 0.01 * numbers(
        8, 8
    )  # one component has most of what comes out of it
    model[0].weight.data = torch.from_numpy(narrow)
    batches = [numbers(200, 8, seed=n) * SPREAD + n / 9 for n in range(2)]
    theirs = get_eva_state_dict(
        model,
        [torch.from_numpy(x) for x in batches],
        peft.LoraConfig(
            r=rank,
            target_modules=["0", "2"],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=rho, tau=0.0, whiten=whiten),
        ),
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    params = {n: jnp.asarray(model[k].weight.detach().numpy().T) for n, k in (("first", 0), ("second", 2))}
    method = jpeft.EVA(rank=rank, rho=rho, whiten=whiten)
    sites, calibration = calibrated(method, two, params, [jnp.asarray(x) for x in batches])
    trainable, frozen = method.init(KEY, params, sites, calibration)
    for path, name in (("first", "0"), ("second", "2")):
        np.testing.assert_allclose(np.abs(trainable[path].a.T), np.abs(theirs[name].numpy()), atol=1e-4)
        assert not np.any(trainable[path].b) and frozen[path].base is params[path]
    if rho > 1:
        assert (trainable["first"].a.shape[-1], trainable["second"].a.shape[-1]) == (3, 1)


def test_batches_give_the_components_of_all_rows_together():
    rows = numbers(90, 8).astype(np.float64) * SPREAD**2 + 3
    batches = [jnp.asarray(rows[at], jnp.float32) for at in (slice(0, 3), slice(3, 50), slice(50, 90))]
    product = lambda p, x: x @ p["w"]
    method = jpeft.EVA(rank=5, rho=1.0)
    _, calibration = calibrated(method, product, {"w": jnp.ones((8, 5))}, batches)
    expected, _ = components(rows)
    np.testing.assert_allclose(np.abs(np.sum(calibration["w"] * expected[:, :5], 0)), 1, atol=1e-3)


def test_ranks_go_where_components_explain_most_layer_by_layer():
    flat = np.linalg.qr(numbers(8, 8))[0]  # keeps the inputs' variance as it is
    w = np.stack([flat, numbers(8, 2) @ numbers(2, 8), flat])
    params, x = {"w": jnp.asarray(w)}, numbers(60, 8)
    method = jpeft.EVA(rank=1, rho=3.0)
    sites, calibration = calibrated(method, scanned, params, [jnp.asarray(x)])
    rows, ratios, columns = x.astype(np.float64), [], []
    for layer in range(3):
        found = components(rows)
        columns.append(found[0])
        ratios.append(found[1][:3])
        rows = np.tanh(rows @ w[layer])
    kept = np.zeros(9, bool)
    kept[np.argsort(-np.concatenate(ratios))[:3]] = True
    ranks = kept.reshape(3, 3).sum(-1)
    assert sorted(ranks.tolist()) == [0, 1, 2]
    trainable, frozen = jax.jit(lambda p: method.init(KEY, p, sites, calibration))(params)
    a = np.asarray(trainable["w"].a)
    assert a.shape == (3, 8, ranks.max()) and trainable["w"].b.shape == (3, ranks.max(), 8)
    for layer, rank in enumerate(ranks):
        overlap = np.abs(np.sum(a[layer][:, :rank] * columns[layer][:, :rank], 0))
        np.testing.assert_allclose(overlap, 1, atol=1e-2)
        assert not np.any(a[layer][:, rank:])
    assert frozen["w"].scale == method.scale_of("w") == 8.0

    step = jax.grad(lambda t: jnp.sum(jnp.sin(jpeft.lift(scanned)(method.bind(t, frozen), x))))
    for _ in range(2):
        trainable = jax.tree.map(lambda t, g: t - 0.01 * g, trainable, step(trainable))
    for layer, rank in enumerate(ranks):
        assert not np.any(trainable["w"].a[layer][:, rank:]) and not np.any(trainable["w"].b[layer][rank:])
        assert np.any(trainable["w"].b[layer][:rank]) == (rank > 0)


def test_a_matrix_of_rank_0_stays_as_it_is_and_adapters_are_saved_and_exported(tmp_path):
    fn = lambda p, x: x @ p["first"] @ p["second"]
    narrow = numbers(8, 2) @ numbers(2, 8)  # two components have all of what comes out of it
    params, x = {"first": jnp.asarray(narrow), "second": jnp.asarray(numbers(8, 6))}, jnp.asarray(numbers(50, 8))
    method = jpeft.EVA(rank=1, rho=2.0, alpha=3.0)
    sites, calibration = calibrated(method, fn, params, [x])
    trainable, frozen = method.init(KEY, params, sites, calibration)
    ranks = {path: w.a.shape[-1] for path, w in trainable.items()}
    assert ranks == {"first": 0, "second": 2}
    trainable = jax.tree.map(lambda t: t + 0.1 * numbers(*t.shape), trainable)
    out = jpeft.lift(fn)(method.bind(trainable, frozen), x)
    np.testing.assert_allclose(out, fn(jpeft.merge(method.bind(trainable, frozen)), x), rtol=1e-4, atol=1e-4)
    assert jpeft.count(method.bind(trainable, frozen)).trainable == sum(t.size for t in jax.tree.leaves(trainable))

    mark = adapter.fingerprint(params)
    adapter.save_adapter(tmp_path, method, trainable, frozen, base="here", base_fingerprint=mark, seed=0)
    loaded, again, rest = adapter.load_adapter(tmp_path, params, sites, jpeft.methods())
    assert loaded == method
    np.testing.assert_array_equal(jpeft.lift(fn)(method.bind(again, rest), x), out)

    plain, exported = method.exported(trainable, frozen)
    assert [plain.rank_of(path) for path, rank in ranks.items() if rank] == [2]
    _, rest = plain.init(KEY, params, sites)
    np.testing.assert_allclose(jpeft.lift(fn)(plain.bind(exported, rest), x), out, rtol=1e-5)


def test_what_it_cannot_start_from_is_refused():
    product = lambda p, x: x @ p["w"]
    params = {"w": jnp.ones((6, 5))}
    with pytest.raises(ValueError, match="expected rho >= 1, got rho=0.5"):
        jpeft.EVA(rho=0.5)
    with pytest.raises(ValueError, match="w: expected at least 4 rows to find as many components, got 3"):
        calibrated(jpeft.EVA(rank=2), product, params, [jnp.ones((3, 6))])
    for x in (jnp.ones((9, 6)), jnp.full((9, 6), jnp.inf)):
        with pytest.raises(ValueError, match="w: expected inputs that are finite and differ"):
            calibrated(jpeft.EVA(rank=2), product, params, [x])
