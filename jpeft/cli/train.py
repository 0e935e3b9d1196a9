"""`jpeft train`: from a model folder and a JSONL file to an adapter, its curve and its samples."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence

from jpeft.cli import model
from jpeft.cli.options import build_method, parse
from jpeft.train.config import TrainConfig
from jpeft.train.folder import RunFolder
from jpeft.train.records import Record

__all__ = ["run"]

_EMBEDDED = {"max_steps": 150, "sequence_length": 128, "batch_size": 8}
"""What `jpeft train` alone runs with, where the user does not say otherwise."""


def run(arguments: Sequence[str]) -> None:
    """Check everything that can be checked, show what will be trained, train, and write samples and summary."""
    config = parse(TrainConfig, arguments, "train")
    config = _filled(config)
    config.check()
    method = build_method(config)
    from jpeft.parallel import hosts

    hosts.join(config.coordinator, config.processes, config.process_id, distributed=config.distributed)
    try:
        with hosts.only_first_prints(), hosts.watched():
            _train(config, method)
    except hosts.ProcessLost as error:
        print(f"jpeft: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the ordinary end would wait for the process that is gone


def _train(config: TrainConfig, method) -> None:
    from jpeft.train.data import deal_here
    from jpeft.train.tokens import Text, encode_records

    folder = RunFolder.plan(config)
    config = folder.settled(config)
    training, held_out = _records(config)
    source = model.folder_of(config.model)
    text = Text(source)
    apply, params, base = model.load_to_train(source, method, config.dtype, config.remat, config.mesh)
    length = _length(config, apply.config.max_position_embeddings, method)
    encode = functools.partial(encode_records, text, length=length - method.prompt_length)
    examples = deal_here(training, config).map(encode), encode(held_out)
    sites = model.sites_of(apply, params)
    from jpeft.train.calibration import calibration_for

    calibration = calibration_for(apply, params, sites, method, examples[0], config, length)
    table, trainable, total = model.matched(method, params, sites, calibration)
    print(f"{method}\n{table}\n")
    print(_data_line(*examples, length), flush=True)

    from jpeft.train.loop import fit

    result = fit(apply, params, sites, method, *examples, config, length, folder, calibration, base)
    if not result.finished:
        print(f"stopped at step {result.steps}; all is saved, and the same command goes on from there")
        return
    bound = result.method.bind(result.trainable, result.frozen)
    if config.samples:
        shown = _spread(held_out, config.samples)
        folder.write("samples.md", _samples(apply, params, bound, result.method, text, shown, config))
    summary = {
        "heldout_loss_before": result.heldout_loss_before,
        "heldout_loss_after": result.heldout_loss_after,
        "trainable": trainable,
        "total": total,
        "tokens_per_second": result.tokens_per_second,
        "steps": result.steps,
        "method": str(method),
    }
    folder.write("summary.json", json.dumps(summary, indent=1))
    print(
        f"held-out loss {result.heldout_loss_before:.4f} -> {result.heldout_loss_after:.4f}; adapter, loss.png and "
        f"samples.md are in {folder.path}"
    )


def _filled(config: TrainConfig) -> TrainConfig:
    """The embedded task's own settings, where neither a model nor data is given and a field is at its default."""
    if config.model is not None or config.data is not None:
        return config
    plain = TrainConfig()
    wanted = {n: v for n, v in _EMBEDDED.items() if getattr(config, n) == getattr(plain, n)}
    return dataclasses.replace(config, **wanted)


def _records(config: TrainConfig) -> tuple[list[Record], list[Record]]:
    from jpeft.train.records import from_dicts, read_jsonl, split

    if config.data is None:
        from jpeft import assets

        return (
            from_dicts(assets.summaries("train"), "embedded training task"),
            from_dicts(assets.summaries("validation"), "embedded held-out task"),
        )
    records = read_jsonl(config.data)
    if config.validation is not None:
        return records, read_jsonl(config.validation)
    return split(records, config.validation_fraction, config.seed)


def _length(config: TrainConfig, context: int, method) -> int:
    """Tokens in a row, virtual ones counted; a prefix in the attention takes positions of the context besides."""
    room = context - method.position_shift
    length = config.sequence_length or min(1024, room)
    taken = f", of which the prefix takes {method.position_shift}" if method.position_shift else ""
    if length > room:
        raise ValueError(
            f"--sequence-length {length} is beyond the model's context of {context}{taken}; give at most {room}"
        )
    if length <= method.prompt_length:
        raise ValueError(
            f"the prompt overflows the context: rows of {length} tokens leave no room beside {method.prompt_length} "
            "virtual ones; raise --sequence-length, or give the method fewer with --set num_tokens=..."
        )
    return length


def _data_line(training, held_out, length: int) -> str:
    cut = lambda examples: [e.truncated for e in examples if e.truncated]
    taken = [n for part in [*training.of_each(cut), cut(held_out)] for n in part]
    note = f"; {len(taken)} of them cut, {sum(taken)} tokens in all" if taken else ""
    return f"{training.total} records to train on, {len(held_out)} held out, rows of {length} tokens{note}"


def _spread(records: list[Record], count: int) -> list[Record]:
    """So many records, evenly from the whole list, whose neighbours are alike."""
    return [records[i * len(records) // count] for i in range(count)] if count < len(records) else records


def _samples(apply, params, bound, method, text, records: list[Record], config: TrainConfig) -> str:
    from jpeft.train.report import samples_table

    context = apply.config.max_position_embeddings
    shown = []
    for record in records:
        if record.messages:
            last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
            prompt, wanted = text.chat.render(record.messages[:last], True), record.messages[last]["content"]
            ids = text.tokenizer.encode(prompt, add_special_tokens=False).ids
        else:
            prompt, wanted, ids = record.prompt, record.completion, text.encode_prompt(record.prompt)
        taken = method.prompt_length + method.position_shift
        if 1 <= len(ids) <= context - config.sample_tokens - taken:
            shown.append((prompt, wanted, ids, record.task))
    if not shown:
        return "# Held-out prompts\n\nNone of them leaves room for new tokens in the model's context.\n"
    prompts, wanted, ids, tasks = map(list, zip(*shown, strict=True))
    complete = lambda *adapted: model.complete(apply, *adapted, new_tokens=config.sample_tokens)
    before, after = complete(params, text, ids), complete(bound, text, ids, method, tasks)
    return samples_table(prompts, wanted, before, after)
