"""How far a training run is: from what it planned (config.yaml, schedule.json) and what it wrote so
far."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from p2r_jax.evals.chart_phases import ROLE_STYLE, Phase, Row, is_evaluation, is_step, phases_of
from p2r_jax.evals.run_folder import read_json

WRITTEN_LAST = {
    "summary.json": "written when a run ends",
    "export": "the weights in Hugging Face format, written when a run ends",
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A phase of the schedule. `steps` is None where nothing tells them, and `done` counts those
    that were taken."""

    label: str
    role: str
    steps: int | None
    done: int

    @property
    def style(self) -> int:
        """Colour, that of the phase's shading in charts."""
        return ROLE_STYLE.get(self.role, 3)

    @property
    def share(self) -> float:
        """Of its steps that are done; 1 if it has begun and nobody knows how long it is."""
        return min(1.0, self.done / self.steps) if self.steps else float(self.done > 0)


@dataclasses.dataclass(frozen=True)
class Progress:
    """`pending` names what the run has yet to write; `written` is when it last wrote a row."""

    finished: bool
    step: int
    total: int | None
    where: str
    phases: list[Planned]
    pending: list[str]
    written: datetime.datetime | None

    @property
    def share(self) -> float | None:
        """Of all steps."""
        return self.step / self.total if self.total else None

    def width(self, phase: Planned) -> int:
        """Steps that a phase has, or may have."""
        longest = max((p.steps or p.done for p in self.phases), default=0)
        return phase.steps or max(longest, 1)


def progress_of(run: Path, rows: Sequence[Row], notes: list[str]) -> Progress | None:
    """None for a folder that no training wrote.

    A run has finished once it wrote summary.json.
    """
    config = read_config(run / "config.yaml", notes)
    planned = [p for p in _list(config.get("phases")) if isinstance(p, dict)]
    rows = [row for row in rows if is_step(row.get("step"))]
    if not planned and not rows:
        return None
    rounds = config.get("rounds")
    rounds = rounds if is_step(rounds) and 0 < rounds < 10_000 else 1
    found = phases_of(rows)
    step = max((int(r["step"]) for r in rows if not is_evaluation(r)), default=0)
    finished = (run / "summary.json").is_file()
    phases = _schedule(planned, int(rounds), found, finished)
    lengths = _list(read_json(run / "schedule.json", notes).get("steps"))
    if len(lengths) == len(phases) and all(map(is_step, lengths)):
        phases = [
            dataclasses.replace(phase, steps=int(steps))
            for phase, steps in zip(phases, lengths, strict=True)
        ]
    phases = _ended_early(phases, finished)
    known = [phase.steps for phase in phases if phase.steps is not None]
    total = sum(known) if phases and len(known) == len(phases) else None
    metrics = run / "metrics.jsonl"
    written = metrics.stat().st_mtime if metrics.is_file() else None
    return Progress(
        finished,
        step,
        total,
        _where(phases, found),
        phases,
        [] if finished else _pending(run, config, phases),
        None if written is None else datetime.datetime.fromtimestamp(written, datetime.UTC),
    )


def read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """config.yaml; {} if there is none, or with a note if it is not a mapping."""
    try:
        value = yaml.safe_load(path.read_text("utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a mapping")
        return {}
    return value


def _schedule(
    planned: Sequence[Mapping[str, Any]], rounds: int, found: Sequence[Phase], finished: bool
) -> list[Planned]:
    """All phases of all rounds, with how far each is."""
    done = {phase.number: phase.last - phase.first + 1 for phase in found}
    current = max((number for number in done if number is not None), default=0)
    phases = []
    for number in range(1, rounds * len(planned) + 1):
        index = (number - 1) % len(planned)
        steps = planned[index].get("steps")
        if not is_step(steps):
            # Of a phase whose length the data decide, any that is over tells the length.
            over = [n for n in range(index + 1, current + finished, len(planned)) if n in done]
            steps = done[over[0]] if over else None
        role = str(planned[index].get("role", "perceiver"))
        label = f"round {(number - 1) // len(planned) + 1} {role}"
        steps = None if steps is None else int(steps)
        phases.append(Planned(label, role, steps, done.get(number, 0)))
    return phases


def _ended_early(phases: Sequence[Planned], finished: bool) -> list[Planned]:
    """A phase that another one followed, or the end of the run, has no more steps than it took."""
    begun = [i for i, phase in enumerate(phases) if phase.done]
    over = begun if finished else begun[:-1]
    return [
        dataclasses.replace(phase, steps=phase.done) if i in over else phase
        for i, phase in enumerate(phases)
    ]


def _where(phases: Sequence[Planned], found: Sequence[Phase]) -> str:
    """Example: round 1 reasoner, step 7 of 12."""
    if not found:
        return ""
    last = found[-1]
    taken = last.last - last.first + 1
    number = last.number or 0
    steps = phases[number - 1].steps if 0 < number <= len(phases) else None
    return f"{last.label}, step {taken}" + (f" of {steps}" if steps else "")


def _pending(run: Path, config: Mapping[str, Any], phases: Sequence[Planned]) -> list[str]:
    """What an unfinished run has yet to write."""
    settings = config.get("eval")
    questions = settings.get("final_questions", 1000) if isinstance(settings, dict) else 0
    names = []
    if questions:
        names = ["before"]
        names += [f"after_phase{i}_{phase.role}" for i, phase in enumerate(phases[:-1], 1)]
        names += ["after"] if phases else []
    missing = [name for name in names if not (run / "eval" / f"{name}.json").is_file()]
    pending = [f"evaluation {name}" for name in missing]
    if len(pending) > 4:
        pending[2:-1] = [f"{len(pending) - 3} more"]
    export = config.get("export", True) not in (False, "none")
    for name in ("summary.json", *(["export"] if export else [])):
        if not (run / name).exists():
            pending.append(f"{name} ({WRITTEN_LAST[name]})")
    return pending


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
