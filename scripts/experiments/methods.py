"""Do the papers' orderings hold on a small model? Each arm at its own tuned learning rate, three seeds.

    python scripts/experiments/methods.py                 # all tables, an hour on two cores
    python scripts/experiments/methods.py starts plus     # some of them

The model is the one that comes with the package (2.4 M parameters), the task its own: signature to summary, split by
module. All learning rates and seeds of an arm train as one population, one `vmap` over the trainable halves; the frozen
half exists once. "Best" is the learning rate with the lowest mean held-out loss after the last step, chosen on the data
that it is reported on, so differences within the spread mean nothing. The budget and d90 run for LONG steps. The search
for d90 takes one seed a dimension; what it finds, and the dimension below, run with all seeds.
Expected numbers: docs/methods.md.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # decompositions; its threads wait by spinning

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

import jpeft
from jpeft import assets, models

LENGTH, ROWS, STEPS, LONG, SEEDS = 48, 4, 40, 200, 3
RATES = (1e-3, 3e-3, 1e-2)
EARLY = 10

apply, params = models.load(assets.model_path(), param_dtype="float32")
tokenizer = Tokenizer.from_file(str(assets.model_path() / "tokenizer.json"))
sites = jpeft.find_sites(apply, params, jnp.zeros((1, LENGTH), jnp.int32))


def encode(examples):
    """Token rows and a mask of the completion's tokens, `(n, LENGTH)` each."""
    end = tokenizer.token_to_id("<|endoftext|>")
    tokens, mask = np.zeros((len(examples), LENGTH), np.int32), np.zeros((len(examples), LENGTH), np.float32)
    for row, example in enumerate(examples):
        prompt = tokenizer.encode(example["prompt"]).ids
        full = (prompt + tokenizer.encode(example["completion"]).ids + [end])[:LENGTH]
        tokens[row, : len(full)] = full
        mask[row, len(prompt) : len(full)] = 1
    return tokens, mask


TRAIN, HELD_OUT = encode(assets.summaries("train")), encode(assets.summaries("validation")[:48])


def loss_of(fn, params, tokens, mask):
    """Mean cross-entropy of the completion's tokens."""
    logits = fn(params, tokens)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(each * mask[:, 1:]) / jnp.maximum(jnp.sum(mask[:, 1:]), 1)


@dataclass(frozen=True)
class Arm:
    """A method as it is compared: its name in the table, itself, and a change to the optimizer if it needs one."""

    name: str
    method: Any
    wrap: Any = staticmethod(lambda tx: tx)
    rates: tuple[float, ...] = RATES


@dataclass(frozen=True)
class Outcome:
    """Held-out losses `(rates, seeds)` early and at the end, and the final trainables `(rates, seeds, ...)`."""

    early: np.ndarray
    final: np.ndarray
    trainable: Any
    frozen: Any
    count: int
    rates: tuple[float, ...]

    @property
    def best(self) -> int:
        means = np.where(np.isfinite(self.final), self.final, np.inf).mean(1)
        return int(np.argmin(means))

    def row(self) -> str:
        at = self.best
        early, final = self.early[at], self.final[at]
        return (
            f"{self.count:>10,}  {self.rates[at]:<7g}  {early.mean():.3f} ± {early.std():.3f}   "
            f"{final.mean():.3f} ± {final.std():.3f}"
        )


def population(arm: Arm, steps: int = STEPS, seeds: int = SEEDS) -> Outcome:
    """Train every learning rate and seed of an arm at once."""
    method = arm.method
    calibration = jpeft.calibrate(
        apply,
        params,
        sites,
        [(TRAIN[0][n * 32 : n * 32 + 32],) for n in range(4)],
        method=method,
        loss=lambda p, tokens: loss_of(apply, p, tokens, jnp.asarray(tokens > 0, jnp.float32)),
        mask=lambda tokens: tokens > 0,
    )
    starts = [method.init(jax.random.key(seed), params, sites, calibration or None) for seed in range(seeds)]
    frozen, starts = starts[0][1], [trainable for trainable, _ in starts]
    members = [(rate, seed) for rate in arm.rates for seed in range(seeds)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    trainable = stack([starts[seed] for _, seed in members])
    rates = jnp.asarray([rate for rate, _ in members])

    adam = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-rate))
    tx_of = lambda rate: method.optimizer(arm.wrap(adam(rate)))  # the rate is a member's own, and may be traced
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    loss = lambda t, f, tokens, mask: loss_of(jpeft.lift(apply), method.bind(t, f), tokens, mask) + method.penalty(t)

    def one(trainable, state, rate, now, frozen, tokens, mask):
        grads = jax.grad(loss)(trainable, frozen, tokens, mask)
        updates, state = tx_of(rate * schedule(now)).update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    step = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None, 0, 0)), donate_argnums=(0, 1))
    held = lambda t, f: loss_of(jpeft.lift(apply), method.bind(t, f), *map(jnp.asarray, HELD_OUT))
    evaluate = jax.jit(lambda ts, f: jax.lax.map(lambda t: held(t, f), ts))
    state = jax.jit(jax.vmap(tx_of(0.0).init))(trainable)
    orders = [np.random.default_rng(seed) for seed in range(seeds)]
    early = None
    for now in range(steps):
        drawn = [order.integers(0, len(TRAIN[0]), ROWS) for order in orders]
        rows = np.stack([drawn[seed] for _, seed in members])
        trainable, state = step(trainable, state, rates, now, frozen, TRAIN[0][rows], TRAIN[1][rows])
        jax.block_until_ready(state)  # XLA:CPU can hang with dozens of steps in flight on two cores
        if now + 1 == EARLY:
            early = evaluate(trainable, frozen)
    shape = (len(arm.rates), seeds)
    count = sum(x.size for x in jax.tree.leaves(starts[0]))
    final = evaluate(trainable, frozen)
    return Outcome(np.reshape(early, shape), np.reshape(final, shape), trainable, frozen, count, arm.rates)


def table(title: str, arms: list[Arm], steps: int = STEPS) -> dict[str, Outcome]:
    """Run the arms and print one row each."""
    base = float(loss_of(apply, params, *map(jnp.asarray, HELD_OUT)))
    print(f"\n{title}\nheld-out loss of the base {base:.3f}; mean ± standard deviation over {SEEDS} seeds", flush=True)
    print(f"{'':<28}{'trainable':>10}  {'rate':<7}  {f'step {EARLY}':<15} step {steps}")
    found = {}
    for arm in arms:
        found[arm.name] = population(arm, steps)
        print(f"{arm.name:<28}{found[arm.name].row()}", flush=True)
    return found


def say(claim: str, gap: np.ndarray) -> None:
    """A claim's gap per seed, positive where the claim holds."""
    verdict = "reproduced" if gap.min() > 0 else "did not reproduce" if gap.mean() <= 0 else "within the spread"
    print(f"  {claim}: {gap.mean():+.3f} ± {gap.std():.3f}: {verdict}", flush=True)


def at_best(outcome: Outcome, when: str = "final") -> np.ndarray:
    return getattr(outcome, when)[outcome.best]


def experiment_starts() -> None:
    """PiSSA, EVA and the other starts lower the loss faster than a Kaiming start in the first steps."""
    arms = [Arm("LoRA, Kaiming", jpeft.LoRA(rank=8))]
    arms += [Arm(n, getattr(jpeft, n)(rank=8)) for n in ("PiSSA", "OLoRA", "EVA", "CorDA", "LoRAGA")]
    found = table("Starts, rank 8", arms)
    kaiming = found[arms[0].name]
    for name in list(found)[1:]:
        ahead = f"{name} ahead at step {EARLY}"
        say(f"{ahead}, each at its best rate", at_best(kaiming, "early") - at_best(found[name], "early"))
        say(f"{ahead}, both at rate {RATES[0]:g}", kaiming.early[0] - found[name].early[0])


def experiment_ranks() -> None:
    """rsLoRA keeps improving from rank 8 to 64 where alpha / rank stalls."""
    arm = lambda rank, scaling: Arm(f"rank {rank}, {scaling}", jpeft.LoRA(rank=rank, alpha=8, scaling=scaling))
    found = table("Scaling of the rank, alpha 8", [arm(r, s) for s in ("standard", "rslora") for r in (8, 64)])
    for scaling in ("standard", "rslora"):
        low, high = (found[f"rank {r}, {scaling}"] for r in (8, 64))
        say(f"{scaling}: rank 64 below rank 8, each at its best rate", at_best(low) - at_best(high))
        say(f"{scaling}: rank 64 below rank 8, both at rate {RATES[0]:g}", low.final[0] - high.final[0])


def experiment_plus() -> None:
    """LoRA+ beats one learning rate."""
    arm = lambda ratio: Arm(f"B's rate x {ratio}", jpeft.LoRA(rank=8), lambda tx: jpeft.lora_plus(tx, ratio))
    found = table("LoRA+, rank 8", [arm(1), arm(16)])
    one = found["B's rate x 1"]
    for ratio in (16,):
        two = found[f"B's rate x {ratio}"]
        say(f"ratio {ratio} below one rate, each at its best", at_best(one) - at_best(two))
        say(f"ratio {ratio} below one rate, A's rate {RATES[0]:g}", one.final[0] - two.final[0])


def experiment_budget() -> None:
    """AdaLoRA at the same final budget is at least as good as LoRA, and its ranks differ by layer."""
    schedule = dict(init_rank=6, target_rank=4, tinit=LONG // 10, tfinal=LONG // 2, delta_t=1, total_steps=LONG)
    adaptive = jpeft.AdaLoRA(**schedule)
    rates = (3e-3, 1e-2, 3e-2, 1e-1)
    arms = [Arm("LoRA, rank 4", jpeft.LoRA(rank=4), rates=rates), Arm("AdaLoRA, 6 to 4", adaptive, rates=rates)]
    plain, outcome = table("Budget of rank 4 a matrix", arms, LONG).values()
    say("AdaLoRA at least as good", at_best(plain) - at_best(outcome))
    first = jax.tree.map(lambda x: x[outcome.best * SEEDS], outcome.trainable)
    bound = adaptive.bind(first, outcome.frozen)
    weights = [(p, w) for p, w in jpeft.core.tree.leaves_with_paths(bound) if isinstance(w, jpeft.Weight)]
    print("  kept ranks by layer, first seed:")
    total = 0
    for path, w in weights:
        kept = np.sum(np.asarray(w.singular_values) != 0, axis=-1)
        total += int(kept.sum())
        print(f"    {path:<40}{' '.join(f'{k:>2}' for k in kept)}")
    print(f"  in all {total}; the budget is {4 * sum(w.shape[0] for _, w in weights)}")


def experiment_small() -> None:
    """VeRA, (IA)3 and the selective methods train at their published fractions."""
    arms = [Arm("LoRA, rank 8", jpeft.LoRA(rank=8)), Arm("VeRA, rank 64", jpeft.VeRA(rank=64)), Arm("IA3", jpeft.IA3())]
    arms += [Arm("NormTuning", jpeft.NormTuning())]
    full = tuple(rate / 10 for rate in RATES)
    arms += [Arm("FullFineTuning", jpeft.FullFineTuning(), rates=full)]
    total = sum(x.size for x in jax.tree.leaves(params))
    found = table("Few parameters", arms)
    for name, outcome in found.items():
        print(f"  {name}: {100 * outcome.count / total:.3f} % of {total:,}")


def experiment_d90() -> None:
    """The smallest random subspace that keeps nine tenths of what full fine-tuning gains (Aghajanyan et al. 2020)."""
    full = population(Arm("full", jpeft.FullFineTuning(), rates=tuple(rate / 10 for rate in RATES)), LONG)
    base = float(loss_of(apply, params, *map(jnp.asarray, HELD_OUT)))
    gain = base - at_best(full).mean()
    print(f"\nIntrinsic dimension, SAID: full fine-tuning gains {gain:.3f} in {LONG} steps", flush=True)

    def gains(method, seeds: int):
        rates = (3e-4, 1e-3, 3e-3, 1e-2)
        outcome = population(Arm("", method, rates=rates), LONG, seeds)
        gained = base - at_best(outcome)
        print(
            f"  {method.dimension:>9,}  {rates[outcome.best]:<7g}  {gained.mean():.3f} ± {gained.std():.3f}", flush=True
        )
        return gained.mean()

    start, largest = 2**14, 2**20
    found = jpeft.intrinsic_dimension(
        lambda m: gains(m, 1), gain, start=start, smallest=64, largest=largest, precision=0.5
    )
    print(found)
    below = max((d for d, _ in found.tries if found.dimension and d < found.dimension), default=None)
    for dimension in filter(None, (below, found.dimension)):
        gains(jpeft.IntrinsicDimension(dimension=dimension), SEEDS)


EXPERIMENTS = {n.removeprefix("experiment_"): fn for n, fn in list(globals().items()) if n.startswith("experiment_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []], help=f"of {', '.join(EXPERIMENTS)}")
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {STEPS} or {LONG} steps of {ROWS} x {LENGTH} tokens"
    )
    for name in parser.parse_args().names or EXPERIMENTS:
        EXPERIMENTS[name]()
