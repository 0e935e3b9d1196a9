"""What a run shows: a progress bar or plain lines, the loss curve, the samples before and after."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["progress", "plot_losses", "samples_table", "Speed"]

Update = Callable[[int, float, float], None]


class Speed:
    """Tokens per second, the first step left out since it compiles."""

    def __init__(self):
        self._last: float | None = None
        self.tokens = 0
        self.seconds = 0.0
        self.steps = 0

    def step(self, tokens: int) -> None:
        """Count a step that has just ended."""
        now = time.perf_counter()
        if self._last is not None:
            self.tokens += tokens
            self.seconds += now - self._last
            self.steps += 1
        self._last = now

    def pause(self) -> None:
        """Leave out what happened since the last step, an evaluation or a checkpoint."""
        if self._last is not None:
            self._last = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def seconds_for(self, steps: int) -> float:
        """The expected seconds for so many more steps."""
        return steps * self.seconds / self.steps if self.steps else 0.0


@contextlib.contextmanager
def progress(start: int, steps: int, every: int, speed: Speed) -> Iterator[tuple[Update, Callable[[str], Any]]]:
    """`(update, say)`: `update(step, loss, rate)` shows a step, `say(text)` a line, on a terminal or off it."""
    if not sys.stdout.isatty():

        def update(step: int, loss: float, rate: float) -> None:
            if step % every == 0 or step in (start + 1, steps):
                print(
                    f"step {step}/{steps}  loss {loss:.4f}  rate {rate:.2e}  "
                    f"{speed.tokens_per_second:,.0f} tokens/s  {_clock(speed.seconds_for(steps - step))} left",
                    flush=True,
                )

        yield update, lambda text: print(text, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=steps, completed=start, shown="compiling")

        def update(step: int, loss: float, rate: float) -> None:
            shown = (
                f"loss {loss:.4f}  {speed.tokens_per_second:,.0f} tokens/s  "
                f"{_clock(speed.seconds_for(steps - step))} left"
            )
            bar.update(task, completed=step, shown=shown)

        yield update, bar.console.print


def plot_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    """Training loss by step, its running mean, and the held-out losses, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    held_out = [(m["step"], m["heldout_loss"]) for m in metrics if "heldout_loss" in m]
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=1, label="training")
        mean, smooth = train[0][1], []
        for step, loss in train:
            mean = 0.9 * mean + 0.1 * loss
            smooth.append((step, mean))
        axes.plot(*zip(*smooth, strict=True), color="tab:blue", label="training, running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss per learned token (nats)")
    axes.legend()
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=120)
    partial.replace(path)


def samples_table(prompts: list[str], wanted: list[str], before: list[str], after: list[str]) -> str:
    """Markdown: each held-out prompt with the reference, the base model's text and the fine-tuned model's."""
    parts = ["# Held-out prompts, before and after\n"]
    for i, texts in enumerate(zip(prompts, wanted, before, after, strict=True), start=1):
        named = zip(("prompt", "reference", "before", "after"), texts, strict=True)
        blocks = [f"**{name}**\n\n{_fenced(text)}\n" for name, text in named]
        parts.append(f"## {i}\n\n" + "\n".join(blocks))
    return "\n".join(parts)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
