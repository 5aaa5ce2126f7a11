"""What a dry run prints: tables narrow enough for a terminal of 80 columns."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from p2r_jax.rl.memory import Memory, device_bytes
from p2r_jax.rl.optimizer import learning_rate
from p2r_jax.rl.prompt_scan import UNITS, Scan
from p2r_jax.rl.schedule import Phase
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.boxes import MAX_CROPS
from p2r_jax.roles.requests import Buckets, fit

METRICS = {
    "completions": ("completions", "d"),
    "reward/mean": ("reward", ".2f"),
    "reward/dropped_fraction": ("could not be graded", ".0%"),
    "reward/zero_variance_groups": ("groups whose rewards agree", ".0%"),
    "answer_tag": ("answers in their tag", ".0%"),
    "boxes/parsed": ("box lists well formed", ".0%"),
    "boxes/count": ("boxes of a list", ".2f"),
    "reward/overlap_penalty": ("lists with overlapping boxes", ".0%"),
    "reward/label_penalty": ("lists with empty labels", ".0%"),
    "completion/length_mean": ("tokens of a completion", ".2f"),
    "completion/truncated_fraction": ("cut at max_new_tokens", ".0%"),
    "partner/truncated_fraction": ("partner cut at its limit", ".0%"),
}
"""Those of a batch that are shown: name and format."""


def schedule_table(trainer: Trainer) -> Table:
    """What each phase of the run does."""
    names = ("round", "steps", "prompts\n× group", "new tokens\n/ partner", "updates")
    table = _table("schedule", ["phase"], [*names, "learning rate"])
    for phase in trainer.phases:
        own = phase.config
        tokens = " + ".join(dict.fromkeys(f"{role.max_new_tokens:,}" for role in phase.learning))
        if phase.role != "baseline":
            tokens += f" / {own.partner_max_new_tokens:,}"
        table.add_row(
            f"{phase.number + 1} {phase.role}",
            f"{phase.round + 1}",
            f"{phase.steps:,}",
            f"{own.prompts} × {own.group}",
            tokens,
            f"{phase.updates:,}",
            _rates(trainer, phase),
        )
    return table


def _rates(trainer: Trainer, phase: Phase) -> str:
    """The learning rate of the phase's first update, its peak, and its last."""
    settings, length = trainer.config.optimizer, trainer.updates.schedule_length(phase)
    first = 0 if settings.reset else sum(p.updates for p in trainer.phases[: phase.number])
    last = first + phase.updates - 1
    peak = min(max(settings.warmup_steps, first), last)
    rates = (f"{learning_rate(settings, length, n):.2g}" for n in (first, peak, last))
    return " → ".join(dict.fromkeys(rate.replace("e-0", "e-") for rate in rates))


def prompt_table(scan: Scan, buckets: Buckets) -> Table:
    """How large the scanned prompts are, and which buckets they take."""
    table = _table(
        f"prompts of {len(scan.rows)} rows of data.{scan.split}",
        ["request", "unit"],
        ["min", "mean", "max", "bucket:rows that take it"],
        "A batch takes the bucket of its largest prompt. Crops are the largest that boxes can ask "
        "for.",
    )
    shown = ""
    for (role, kind), values in scan.needs.items():
        title = f"reasoner, {MAX_CROPS} crops" if role == "reasoner" else role
        if shown not in ("", role):
            table.add_section()
        sizes = getattr(buckets, kind)
        used = collections.Counter(fit(sizes, value, kind) for value in values)
        table.add_row(
            "" if role == shown else title,
            UNITS[kind],
            f"{min(values)}",
            f"{np.mean(values):.1f}",
            f"{max(values)}",
            "  ".join(f"{size}:{used[size]}" for size in sizes),
        )
        shown = role
    return table


def memory_table(phase: Phase, memory: Memory) -> Table:
    """What takes memory in a phase."""
    device = jax.local_devices()[0].device_kind
    table = _table(
        f"memory of each of {len(jax.devices())} {device} device(s), phase {phase.number + 1} "
        f"{phase.role}",
        ["what"],
        ["bytes"],
        "An estimate from shapes, for the largest prompts of the scan. Activations come on top.",
    )
    for stage in ("always", "rollout", "update"):
        for name, count in getattr(memory, stage).items():
            table.add_row(name, size_text(count))
        if stage != "always":
            table.add_row(f"sum in the {stage}", size_text(memory.total(stage)), style="bold")
        table.add_section()
    limit = device_bytes()
    table.add_row("the device has", size_text(limit) if limit else "unknown", style="bold")
    return table


def reward_table(measured: dict[str, dict[str, float]]) -> Table:
    """`METRICS` of each batch."""
    title = "a small batch of each phase, by the weights that the run begins with"
    table = _table(title, [""], list(measured))
    for key, (name, form) in METRICS.items():
        values = [own.get(key) for own in measured.values()]
        table.add_row(name, *("–" if v is None else format(v, form) for v in values))
    return table


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _table(
    title: str, left: Sequence[str], right: Sequence[str], caption: str | None = None
) -> Table:
    """left, right: names of columns, by how they are aligned."""
    return Table(
        *left,
        *(Column(name, justify="right") for name in right),
        title=f"\n{title}",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
