"""What answers of a report gain and harm: against another run, the first evaluation, or `default`.

Marks for single answers, to filter by, and paired tests between whole evaluations.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from p2r_jax.evals import scoring
from p2r_jax.evals.comparing import Change, changes
from p2r_jax.evals.records import sample_of
from p2r_jax.evals.report_results import Records, eval_order, graded
from p2r_jax.evals.run_folder import read_jsonl

Side: TypeAlias = tuple[str, str]
"""Evaluation and mode."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """How an answer differs from another one to the same question."""

    change: Change
    base: str
    """What the other one is of: a mode, an evaluation or a run."""
    other: Mapping[str, Any]
    """The record of the other one."""

    @property
    def label(self) -> str:
        return f"{self.change} {'over' if self.change == 'gain' else 'against'} {self.base}"


@dataclasses.dataclass(frozen=True)
class Against:
    """Answers of another run folder. `sides`: records by evaluation and mode."""

    name: str
    sides: Mapping[Side, Records]

    @classmethod
    def read(cls, run: Path, notes: list[str]) -> Against:
        """Raises FileNotFoundError if there are no evaluations."""
        evals = {p.stem: read_jsonl(p, notes) for p in run.glob("eval/*.jsonl")}
        if not evals:
            raise FileNotFoundError(f"nothing to compare with in {run}: it has no eval/*.jsonl")
        return cls(run.resolve().name, sides_of(evals))

    def opposite(self, evaluation: str, mode: str) -> tuple[Side, Records] | None:
        """The same mode in the evaluation of the same name, else in its newest one."""
        names = sorted({e for e, m in self.sides if m == mode}, key=eval_order)
        if not names:
            return None
        side = (evaluation if evaluation in names else names[-1], mode)
        return side, self.sides[side]


def sides_of(evals: Mapping[str, Records]) -> dict[Side, Records]:
    """Graded records by evaluation and mode."""
    return {
        (name, mode): records
        for name in evals
        for mode, records in scoring.by_mode(
            r for r in graded(evals[name]) if isinstance(r.get("mode"), str)
        ).items()
    }


def marks_of(
    evals: Mapping[str, Records], against: Against | None
) -> dict[tuple[str, str, Any, int], list[Mark]]:
    """Gains and harms of each answer, by evaluation, mode, id and sample. evals: in order."""
    sides = sides_of(evals)
    marks: dict[tuple[str, str, Any, int], list[Mark]] = defaultdict(list)
    for (name, mode), records in sides.items():
        for base, others in _bases(name, mode, sides, against):
            try:
                found = changes(others, records)
            except (KeyError, TypeError, ValueError):
                continue  # `comparisons_of` and `evaluations_of` name what is wrong.
            by_key = {(r["id"], sample_of(r)): r for r in others}
            for (id_, sample), change in found.items():
                if change in ("gain", "harm"):
                    mark = Mark(change, base, by_key[id_, sample])
                    marks[name, mode, id_, sample].append(mark)
    return marks


def against_rows(
    evals: Mapping[str, Records], against: Against, notes: list[str]
) -> list[dict[str, Any]]:
    """Paired tests of every evaluation and mode with the other run's, which is side a."""
    rows = []
    for (name, mode), records in sides_of(evals).items():
        opposite = against.opposite(name, mode)
        if opposite is None:
            continue
        (other, _), others = opposite
        try:
            row = scoring.compare(others, records)
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"{name} {mode} cannot be compared with {against.name}: {error}")
            continue
        rows.append({"a": (f"{against.name} {other}", mode), "b": (name, mode), **row})
    return rows


def _bases(
    name: str, mode: str, sides: Mapping[Side, Records], against: Against | None
) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    opposite = against.opposite(name, mode) if against else None
    if against and opposite:
        yield against.name, opposite[1]
    if mode != "default" and (name, "default") in sides:
        yield "default", sides[name, "default"]
    first = next(own for own, other in sides if other == mode)
    if first != name:
        yield first, sides[first, mode]
