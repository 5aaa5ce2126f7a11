"""The plan of a run on a slice: a row for each program, what fits, how long a step would take.

Seconds are a roofline: of matrix products, memory traffic, exchange between chips and over the
network between slices the largest, each at a stated part of the chip's peak. They rank plans; they
were never measured on a chip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from p2r_jax.config import TrainConfig
from p2r_jax.plan.chips import GIB, Slice
from p2r_jax.plan.compile import BETWEEN, Compiled, compile_program
from p2r_jax.plan.programs import Program, programs
from p2r_jax.plan.shapes import Shapes
from p2r_jax.qwen3_vl.config import Qwen3VLConfig

EFFICIENCY = {"compute": 0.5, "memory": 0.8, "link": 0.7, "network": 0.7}
"""Part of the peak that is taken to be reached."""

LINKED = {"all-reduce": 2.0}
"""Times that a chip sends the result of a collective; others once. (The last share is left out.)"""

Watch = Callable[[str], None]
"""Told what is being compiled."""


@dataclasses.dataclass
class Row:
    """One program of the plan."""

    program: Program
    compiled: Compiled
    where: Slice

    @property
    def total(self) -> int:
        """Bytes on a chip while it runs; of one that was refused, what the compiler wanted."""
        own = self.compiled.total
        if self.compiled.over is not None:
            own = self.where.chip.usable + self.compiled.over
        return own + sum(self.program.beside.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, by what would bind alone."""
        chip, c = self.where.chip, self.compiled
        sent = {"link": 0.0, "network": 0.0}
        for kind, size in c.exchanged.items():
            own = kind.removesuffix(BETWEEN)
            sent["link" if own == kind else "network"] += LINKED.get(own, 1) * size
        once = {
            "compute": c.flops / chip.flops,
            "memory": c.moved / chip.hbm_bytes,
            "link": sent["link"] / chip.link_bytes,
            "network": sent["network"] / chip.network_bytes,
        }
        return {k: self.program.times * v / EFFICIENCY[k] for k, v in once.items()}

    @property
    def binds(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    def as_dict(self) -> dict[str, Any]:
        """For machines: bytes, FLOPs and seconds."""
        compiled = dataclasses.asdict(self.compiled)
        compiled["compile_seconds"] = compiled.pop("seconds")
        return {
            "program": self.program.name,
            "stage": self.program.stage,
            "times": self.program.times,
            "beside": self.program.beside,
            "total": self.total,
            "seconds": self.seconds,
            "binds": self.binds,
            **compiled,
        }


@dataclasses.dataclass
class Plan:
    """All rows, for one slice and one set of settings."""

    where: Slice
    mesh: dict[str, int]
    rows: list[Row]
    complete: bool = True
    """False if it was given up after the last row, which does not fit."""

    @property
    def peak(self) -> Row:
        """The program that needs most."""
        return max(self.rows, key=lambda row: row.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.where.chip.usable

    @property
    def seconds(self) -> float:
        """Of a step of every phase, programs one after another."""
        return sum(max(row.seconds.values()) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "topology": str(self.where),
            "mesh": self.mesh,
            "usable": self.where.chip.usable,
            "fits": self.fits,
            "complete": self.complete,
            "peak": self.peak.total,
            "seconds": self.seconds if self.complete else None,
            "efficiency": EFFICIENCY,
            "programs": [row.as_dict() for row in self.rows],
        }


def make_plan(
    config: TrainConfig,
    model: Qwen3VLConfig,
    where: Slice,
    keep: Path | None = None,
    watch: Watch = lambda name: None,
    only: Iterable[str] | None = None,
    give_up: bool = False,
) -> Plan:
    """Compile every program of the run. keep: folder of earlier results. only: names, or beginnings
    of names, of programs. give_up: none after the first that does not fit.

    Raises ValueError for settings that do not fit the slice, RuntimeError for a program that the
    compiler refuses, ModuleNotFoundError without a compiler.
    """
    mesh = where.mesh(config.mesh)
    shapes = Shapes(config, model, mesh, where.chip.kernels)
    rows: list[Row] = []
    complete = True
    for program in programs(shapes):
        if only is not None and not any(program.name.startswith(name) for name in only):
            continue
        watch(program.name)
        rows.append(Row(program, compile_program(program, where, mesh, keep), where))
        if give_up and rows[-1].total > where.chip.usable:
            complete = False
            break
    return Plan(where, dict(mesh.shape), rows, complete)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def table(plan: Plan) -> Table:
    """The plan for a terminal; memory in GiB of one chip."""
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    made = Table(title=f"{plan.where}, {mesh}", title_justify="left")
    made.add_column("program")
    for name in ("GiB", "beside", "arguments", "results", "temporary"):
        made.add_column(name, justify="right")
    for name in ("times", "TFLOP", "GB moved", "GB linked", "seconds", "binds"):
        made.add_column(name, justify="right")
    for row in plan.rows:
        c, over = row.compiled, row.total > plan.where.chip.usable
        parts = (sum(row.program.beside.values()), c.arguments, c.results, c.temporary + c.code)
        linked = sum(c.exchanged.values())
        made.add_row(
            row.program.name,
            gib(row.total) + (" !" if over else ""),
            *map(gib, parts),
            f"{row.program.times:g}",
            f"{c.flops / 1e12:.3g}",
            f"{c.moved / 1e9:.3g}",
            f"{linked / 1e9:.3g}",
            f"{max(row.seconds.values()):.3g}",
            row.binds,
            style="red" if over else None,
        )
    return made


def markdown(plan: Plan) -> str:
    """The same as a table of Markdown."""
    lines = [
        "| program | GiB a chip = beside + arguments + results + temporary | times | TFLOP | "
        "GB moved | GB linked | seconds | binds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in plan.rows:
        c = row.compiled
        parts = (sum(row.program.beside.values()), c.arguments, c.results, c.temporary + c.code)
        linked = sum(c.exchanged.values())
        lines.append(
            f"| {row.program.name} | {gib(row.total)} = {' + '.join(map(gib, parts))} | "
            f"{row.program.times:g} | {c.flops / 1e12:.3g} | {c.moved / 1e9:.3g} | "
            f"{linked / 1e9:.3g} | {max(row.seconds.values()):.3g} | {row.binds} |"
        )
    return "\n".join(lines)


def verdict(plan: Plan) -> list[str]:
    """In words: whether it fits, what is largest where it does not, what a step takes."""
    usable, peak = plan.where.chip.usable, plan.peak
    room = usable - peak.total
    lines = [
        f"{'fits' if room >= 0 else 'does not fit'} by {gib(abs(room))} GiB: {gib(peak.total)} of "
        f"{gib(usable)} GiB a chip, in {peak.program.name}"
    ]
    if room < 0:
        named = dict(peak.program.beside)
        if peak.compiled.over is None:
            named |= {"its arguments": peak.compiled.arguments}
            named |= {"its temporary arrays": peak.compiled.temporary}
        largest = sorted(named, key=lambda name: -named[name])[:5]
        lines.append("largest: " + "; ".join(f"{gib(named[name])} {name}" for name in largest))
        lines += [f"  {text}" for text in peak.compiled.largest]
    stages: dict[str, float] = {}
    for row in plan.rows:
        stage = row.program.stage
        stages[stage] = stages.get(stage, 0) + max(row.seconds.values())
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
    assumed = ", ".join(f"{name} {part:.0%}" for name, part in EFFICIENCY.items())
    lines.append(
        f"one step of every phase: {plan.seconds:.0f} s by roofline ({parts}) at {assumed} of peak;"
        " every completion as long as it may be; not measured on a chip"
    )
    return lines
