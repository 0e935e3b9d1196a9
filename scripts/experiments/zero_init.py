"""Does attention that starts behind a gate of zero train better than attention that starts at random?

    taskset -c 0 python scripts/experiments/zero_init.py        # two minutes of one core

The claim of LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): prompts that act from the first step disturb the
pretrained model. Three arms with the same number of virtual tokens in every layer: a gate at zero, the same gate at
one, and prefix tuning, whose softmax is joint with the model's and whose keys and values go through no projection.
Model, task and training are those of methods.py beside this file; the held-out loss at step 0 is of the start itself.
Expected numbers: docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from methods import HELD_OUT, SEEDS, STEPS, Arm, apply, loss_of, params, population, sites

import jpeft

TOKENS, LAYERS = 10, 4
RATES = (3e-3, 1e-1, 3e-1, 1.0, 3.0)


@dataclass(frozen=True)
class OpenGate(jpeft.LLaMAAdapter):
    """LLaMA-Adapter whose gates start at one."""

    tanh: bool = False
    NO_OP_AT_START = False

    def wrap(self, key, leaf, site):
        made = super().wrap(key, leaf, site)
        return made.replace(gate=jnp.ones_like(made.gate)) if hasattr(made, "gate") else made


ARMS = {
    "gate of zero": jpeft.LLaMAAdapter(num_tokens=TOKENS, num_layers=LAYERS),
    "gate of one": OpenGate(num_tokens=TOKENS, num_layers=LAYERS),
    "joint softmax": jpeft.PrefixTuning(num_tokens=TOKENS, reparametrize=False),
}


def at_start(method) -> np.ndarray:
    """The held-out loss of each seed's start."""
    starts = [method.init(jax.random.key(seed), params, sites) for seed in range(SEEDS)]
    run = jax.jit(lambda halves: loss_of(jpeft.lift(apply), method.bind(*halves), *map(jnp.asarray, HELD_OUT)))
    return np.array([float(jax.block_until_ready(run(halves))) for halves in starts])


def main() -> None:
    """Run the arms; print a row of the table each, then the claims."""
    base = float(loss_of(apply, params, *map(jnp.asarray, HELD_OUT)))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {STEPS} steps; {SEEDS} seeds")
    print(f"held-out loss of the base {base:.3f}; mean ± standard deviation", flush=True)
    print(f"| arm | trainable | step 0 | best rate | step {STEPS} | step {STEPS} at rate {RATES[0]:g} |")
    show = lambda losses: f"{losses.mean():.3f} ± {losses.std():.3f}"
    starts, found = {}, {}
    for name, method in ARMS.items():
        starts[name], found[name] = at_start(method), population(Arm(name, method, rates=RATES))
        outcome = found[name]
        best, first = outcome.final[outcome.best], outcome.final[0]
        cells = [name, f"{outcome.count:,}", show(starts[name]), f"{RATES[outcome.best]:g}", show(best), show(first)]
        print(f"| {' | '.join(cells)} |", flush=True)
    zero = found["gate of zero"]
    for name in list(ARMS)[1:]:
        best = found[name].final[found[name].best] - zero.final[zero.best]
        same = found[name].final[0] - zero.final[0]
        print(f"{name} above a gate of zero: at the start by {show(starts[name] - base)}; after {STEPS} steps, each at")
        print(f"  its best rate, by {show(best)}, both at {RATES[0]:g} by {show(same)}")


if __name__ == "__main__":
    main()
