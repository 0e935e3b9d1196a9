"""`jpeft plan`: what a training step takes on TPUs or GPUs that nobody has booked yet, from the model's config."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from jpeft.cli.options import build_method, parse

__all__ = ["PlanConfig", "run"]


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compile the training step for TPUs or GPUs, with no weights and none of them, and say what it takes.

    Attributes:
        model: folder or config.json in Hugging Face format; weights are not read.
        topology: the slice, as NAME-CHIPS: v5e-16, v5p-8, h100-8, ...
        batch: rows of the whole batch, on all chips together.
        seq: tokens in a row.
        mesh: sizes by axis, as fsdp=8,tensor=2; when absent, fsdp takes as many devices as share the batch equally, and
            tensor the rest.
        search: find the smallest slice of the topology's kind that fits; its number of chips is not read then.
        method: the fine-tuning method, by name.
        rank: the method's rank.
        alpha: the method's alpha.
        targets: what is adapted, as in `jpeft train`.
        dropout: the method's dropout.
        set: any other field of the method, as name=value; may be repeated.
        accumulation: microbatches that a batch is cut into.
        remat: what the backward pass computes again, as in `jpeft train`.
        offload_optimizer: keep the optimizer's state in the host's memory.
        try_changes: where it does not fit, compile what could help, one change at a time.
        json: file to write all figures to.
    """

    model: str
    topology: str
    batch: int
    seq: int = 2048
    mesh: str | None = None
    search: bool = False
    method: str = "qlora"
    rank: int | None = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float | None = None
    set: tuple[str, ...] = ()
    accumulation: int = 1
    remat: Literal["none", "full", "dots", "offload"] = "full"
    offload_optimizer: bool = False
    try_changes: bool = True
    json: str | None = None


def run(arguments: Sequence[str]) -> None:
    """Check the options, compile, print the table and the verdict, write the JSON."""
    config = parse(PlanConfig, arguments, "plan")
    for name in ("batch", "seq", "accumulation"):
        if getattr(config, name) < 1:
            raise ValueError(f"expected --{name} of at least 1, got {getattr(config, name)}")
    from jpeft.parallel.topology import parse_topology

    given = parse_topology(config.topology)
    planner = _Planner(config)
    if config.search:
        found, topology = planner.smallest(given)
    else:
        topology = given
        found = planner.compiled(topology)
    advice = planner.advice(topology, found)
    report = planner.report(topology, found, advice)
    print(_table(report, planner.method))
    if config.json is not None:
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class _Planner:
    """The model and the method of a config, and the plans made of them."""

    def __init__(self, config: PlanConfig):
        from jpeft.cli import model
        from jpeft.models import abstract

        self.config, self.method = config, build_method(config)
        self.apply, self.params = abstract(config.model, dtype="bfloat16", param_dtype="bfloat16")
        self.sites = model.sites_of(self.apply, self.params)
        context = self.apply.config.max_position_embeddings
        if config.seq > context:
            raise ValueError(f"--seq {config.seq} is beyond the model's context of {context}")

    def optimizer(self, in_host: bool):
        from jpeft.train.optimizer import adamw

        return self.method.optimizer(adamw(1e-4, 1000, in_host=in_host))

    def compiled(self, topology, **changes) -> Any:
        """The plan for a slice, with these fields of the config changed."""
        from jpeft.models import abstract
        from jpeft.parallel import make_mesh
        from jpeft.train.plan import plan

        config = dataclasses.replace(self.config, **changes)
        remat = None if config.remat == "none" else config.remat
        apply, _ = abstract(config.model, dtype="bfloat16", param_dtype="bfloat16", remat=remat)
        mesh = make_mesh(config.mesh or _default_mesh(topology.size, config.batch), devices=topology.devices())
        what = ", ".join(f"{name}={value}" for name, value in changes.items())
        with _progress(f"compiling for {topology}{f' with {what}' if what else ''}"):
            return plan(
                apply,
                self.params,
                self.sites,
                self.method,
                self.optimizer(config.offload_optimizer),
                mesh,
                config.batch,
                config.seq,
                topology.hbm_gib,
                config.accumulation,
            )

    def smallest(self, given) -> tuple[Any, Any]:
        """`(plan, slice)`: the smallest slice of the given one's kind that fits, or the largest, if none does."""
        from jpeft.parallel.topology import slices_of

        slices = slices_of(given.kind)
        weights = self._weights_gib(slices[0].devices()[:1])
        fitting = [topology for topology in slices if weights / topology.size < given.hbm_gib]
        found = None
        for topology in fitting:
            if self.config.mesh is None and topology.size > self.config.batch * 8:
                break  # heads do not go that far
            found = self.compiled(topology), topology
            if found[0].fits:
                return found
        if found is None:
            raise ValueError(f"the weights alone fill the largest {given.kind} slice")
        return found

    def _weights_gib(self, device) -> float:
        """Of one device that holds all."""
        import jax

        from jpeft.parallel import make_mesh, shard
        from jpeft.parallel.program import per_device

        one = make_mesh("fsdp=1", devices=device)
        layout = shard(one, self.method, self.params, self.sites)
        _, frozen = jax.eval_shape(lambda p: self.method.init(jax.random.key(0), p, self.sites), self.params)
        return per_device(frozen, layout.frozen) / 2**30

    def advice(self, topology, found) -> list[dict[str, Any]]:
        """Changes that could make a plan fit, each compiled and priced; none where it fits."""
        if found.fits or not self.config.try_changes:
            return []
        config = self.config
        tried = []
        for change in _changes(config, topology):
            try:
                plan = self.compiled(topology, **change)
            except ValueError as reason:
                tried.append({"change": change, "fits": False, "refused": str(reason)})
                continue
            tried.append({"change": change, "fits": plan.fits, "hbm_per_chip_gib": plan.gib, "host_gib": plan.host_gib})
        return tried

    def report(self, topology, found, advice) -> dict[str, Any]:
        """All figures, as the JSON has them."""
        from jpeft.models import abstract
        from jpeft.train.plan import flops_per_token

        remat = None if self.config.remat == "none" else self.config.remat
        apply, _ = abstract(self.config.model, dtype="bfloat16", param_dtype="bfloat16", remat=remat)
        optimizer = self.optimizer(False)
        per_token = flops_per_token(apply, self.params, self.sites, self.method, optimizer, self.config.seq)
        return {
            "fits": found.fits,
            "hbm_per_chip_gib": found.gib,
            "hbm_limit_gib": found.limit_gib,
            "headroom": found.headroom,
            "breakdown_gib": found.parts_gib,
            "host_gib": found.host_gib,
            "gathered_bytes_by_dtype": found.gathered_bytes,
            "collectives": [dataclasses.asdict(e) for e in found.exchanges],
            "flops_per_token": per_token,
            "advice": advice,
            "topology": str(topology),
            "devices": topology.size,
            "mesh": found.mesh,
            "batch": self.config.batch,
            "seq": self.config.seq,
            "accumulation": self.config.accumulation,
            "remat": self.config.remat,
            "method": str(self.method),
            "compile_seconds": found.seconds,
        }


def _default_mesh(devices: int, rows: int) -> str:
    """`fsdp` over as many devices as share the rows equally, `tensor` over the rest."""
    fsdp = math.gcd(devices, rows)
    return f"fsdp={fsdp},tensor={devices // fsdp}"


def _changes(config: PlanConfig, topology) -> Iterator[dict[str, Any]]:
    """What could make a step smaller, the cheapest in time first."""
    if config.remat != "full":
        yield {"remat": "full"}
    if not config.offload_optimizer:
        yield {"offload_optimizer": True}
    mesh = config.mesh or _default_mesh(topology.size, config.batch)
    from jpeft.parallel import parse_mesh

    sizes = parse_mesh(mesh)
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
    rows = config.batch // shards // config.accumulation
    if rows > 1:
        yield {"accumulation": config.batch // shards}
    if sizes.get("data", 1) > 1:
        yield {"mesh": f"fsdp={shards},tensor={sizes.get('tensor', 1)}"}
    if config.remat != "offload":
        yield {"remat": "offload"}
    if sizes.get("fsdp", 1) % 2 == 0:
        yield {"mesh": f"fsdp={sizes['fsdp'] // 2},tensor={2 * sizes.get('tensor', 1)}"}
    if config.seq > 1024:
        yield {"seq": config.seq // 2}


def _table(report: dict[str, Any], method) -> str:
    lines = [str(method), ""]
    where = f"{report['topology']}, mesh {report['mesh']}"
    lines.append(f"{where}: {report['batch']} rows of {report['seq']} tokens, remat {report['remat']}")
    rows = [(name, gib) for name, gib in report["breakdown_gib"].items()]
    rows += [("peak", report["hbm_per_chip_gib"]), ("limit", report["hbm_limit_gib"])]
    if report["host_gib"]:
        rows.append(("host", report["host_gib"]))
    lines += ["", "HBM of a device, GiB", *(f"  {name:<12}{gib:8.3f}" for name, gib in rows)]
    if report["collectives"]:
        lines += ["", "exchanges of a step      dtype   count        MiB a device"]
        lines += [
            f"  {e['kind']:<22} {e['dtype']:<6}{e['count']:>7}  {e['bytes'] / 2**20:>16,.1f}"
            for e in report["collectives"]
        ]
    lines += [
        "",
        f"{report['flops_per_token'] / 1e9:,.2f} GFLOP a token; compiled in {report['compile_seconds']:.0f} s",
    ]
    if report["fits"]:
        lines.append(f"It fits, with {report['headroom']:.0%} of the memory to spare.")
        return "\n".join(lines)
    lines.append(
        f"It does not fit: {report['hbm_per_chip_gib']:.2f} GiB of {report['hbm_limit_gib']:.2f} GiB. Tried instead:"
    )
    for tried in report["advice"]:
        change = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in tried["change"].items())
        said = (
            tried.get("refused")
            or f"{tried['hbm_per_chip_gib']:.2f} GiB, {'fits' if tried['fits'] else 'does not fit'}"
        )
        lines.append(f"  {change:<34} {said}")
    if not any(tried["fits"] for tried in report["advice"]):
        lines.append("None of these is enough alone; try a larger slice (--search), or two of them together.")
    return "\n".join(lines)


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say on stderr what goes on, and every ten seconds for how long."""
    done, begun = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not done.wait(10):
            print(f"{what}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
