"""The settings of one training run: a frozen dataclass, the same fields from flags and from a YAML file."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = ["TrainConfig", "differences"]

_WHERE_NOT_WHAT = (
    "out",
    "overwrite",
    "resume",
    "log_every",
    "save_every",
    "samples",
    "offload_optimizer",
    "mesh",
    "distributed",
    "coordinator",
    "processes",
    "process_id",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a model on prompt-completion or chat records.

    Attributes:
        model: folder in Hugging Face format; the small embedded model when absent.
        data: JSONL file, one {"prompt", "completion"} or {"messages"} object a line; the embedded task when absent.
        validation: JSONL file of held-out records; a part of the data when absent.
        validation_fraction: part of the data that is held out when no validation file is given.
        method: the fine-tuning method, by name.
        rank: the method's rank.
        alpha: the method's alpha.
        targets: what is adapted: "all-linear", "attention", "mlp", or regular expressions searched in the site paths.
        dropout: the method's dropout.
        set: any other field of the method, as name=value; may be repeated.
        sequence_length: tokens in a row; 1024, or the model's context where that is shorter, when absent.
        packing: put several records in one row, apart from each other by segment.
        batch_size: rows in a batch.
        calibration_batches: batches shown, before the first step, to a method that starts from data.
        accumulation: microbatches that a batch is cut into, to save memory; the update stays the same.
        max_steps: optimizer steps; counted from `epochs` when absent.
        epochs: passes over the data when `max_steps` is absent.
        learning_rate: the highest learning rate.
        warmup: part of the steps in which the learning rate rises; a cosine falls from there to a tenth.
        weight_decay: AdamW's decay.
        clip_norm: the gradient's largest global norm.
        dtype: type of the computation; "auto" is bfloat16 on an accelerator and float32 on a CPU.
        remat: what the backward pass computes again, to save memory: "full" each layer from its input, "offload" the
            same with the inputs kept in the host's memory, "dots" all but the products with weights; "none" by default.
        mesh: sizes by axis, as fsdp=8 or data=2,fsdp=4,tensor=2, for all devices; when absent, the first device alone,
            and of several processes fsdp over all devices.
        data_shards: parts that the records are dealt into, each filling its own rows of a batch; a process reads the
            parts of its rows. As many as processes when absent. A run that goes on keeps its number.
        distributed: join the other processes of the run, as the cluster knows them: Cloud TPU, GKE, Slurm, Open MPI.
        coordinator: host:port of process 0, where no cluster knows it; or JAX_COORDINATOR_ADDRESS.
        processes: how many there are; or JAX_NUM_PROCESSES.
        process_id: this one's number, from 0; or JAX_PROCESS_ID.
        offload_optimizer: keep the optimizer's state in the host's memory; an error where the platform cannot.
        seed: of the split, the order of the data, the method's start and dropout.
        evaluate_every: steps between held-out evaluations; only before and after when 0.
        save_every: steps between checkpoints.
        log_every: steps between printed lines where there is no terminal.
        samples: held-out prompts completed before and after, in samples.md.
        sample_tokens: new tokens in each sample.
        out: folder for everything that the run writes.
        resume: go on from the last checkpoint in `out`; an error when there is none.
        overwrite: replace what an earlier run wrote in `out`.
    """

    model: str | None = None
    data: str | None = None
    validation: str | None = None
    validation_fraction: float = 0.1
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float | None = None
    set: tuple[str, ...] = ()
    sequence_length: int | None = None
    packing: bool = True
    batch_size: int = 8
    calibration_batches: int = 8
    accumulation: int = 1
    max_steps: int | None = None
    epochs: float = 3.0
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "full", "dots", "offload"] = "none"
    mesh: str | None = None
    data_shards: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    offload_optimizer: bool = False
    seed: int = 0
    evaluate_every: int = 0
    save_every: int = 100
    log_every: int = 10
    samples: int = 4
    sample_tokens: int = 48
    out: str = "jpeft-out"
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raise one ValueError that lists every field out of its range."""
        wrong = []
        positive = (
            "batch_size",
            "calibration_batches",
            "accumulation",
            "epochs",
            "learning_rate",
            "clip_norm",
            "save_every",
            "log_every",
            "sample_tokens",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                wrong.append(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_steps", "sequence_length", "data_shards", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                wrong.append(f"{name} must be at least 1, got {value}")
        for name in ("weight_decay", "evaluate_every", "samples", "seed"):
            if not getattr(self, name) >= 0:
                wrong.append(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("validation_fraction", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.accumulation > 0 and self.batch_size % self.accumulation:
            wrong.append(f"accumulation must divide batch_size, got {self.accumulation} and {self.batch_size}")
        if self.data_shards and self.batch_size % self.data_shards:
            wrong.append(f"data_shards must divide batch_size, got {self.data_shards} and {self.batch_size}")
        if self.resume and self.overwrite:
            wrong.append("resume keeps what overwrite deletes; give one of them")
        if wrong:
            raise ValueError("these settings are out of range:\n  " + "\n  ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain YAML and JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that would change the result of a resumed run, as `name: saved -> now` lines."""
    names = sorted((saved.keys() | now.keys()) - set(_WHERE_NOT_WHAT))
    return [f"{n}: {saved.get(n)!r} -> {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]
