"""How each phase of a run ended, and what the run warned of on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2r_jax.evals.report_progress import Progress
from p2r_jax.evals.report_results import Evaluation
from p2r_jax.evals.run_folder import is_number, read_jsonl
from p2r_jax.evals.verdicts import Span, judged, mode_that_counts, spans_of

FIGURES = ("n", "accuracy_start", "accuracy_end", "difference", "low", "high", "p_value")
"""Of an entry, see `verdicts.judged`."""
MAX_WARNINGS = 40
"""Shown of a phase, the first ones; the others are counted."""
WARNINGS = "warnings.jsonl"


@dataclasses.dataclass(frozen=True)
class PhaseHealth:
    """A phase. `entry`: its verdict as in summary.json, {} if it was not judged."""

    label: str
    entry: Mapping[str, Any]
    warnings: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        return self.warnings[:MAX_WARNINGS]

    @property
    def ended_early(self) -> bool:
        """Whether a warning ended it."""
        return any(warning["action"] == "stop_phase" for warning in self.warnings)


@dataclasses.dataclass(frozen=True)
class Health:
    """`watched`: whether the run looked at itself; runs of earlier versions did not."""

    phases: list[PhaseHealth]
    watched: bool

    @property
    def count(self) -> int:
        """Of warnings."""
        return sum(len(phase.warnings) for phase in self.phases)

    @property
    def worse(self) -> list[PhaseHealth]:
        """Phases that ended worse than they began."""
        return [phase for phase in self.phases if phase.entry.get("verdict") == "worse"]


def health_of(
    run: Path,
    progress: Progress | None,
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    notes: list[str],
) -> Health | None:
    """None for a folder with neither a verdict nor a file of warnings.

    comparisons: as of `report_results.comparisons_of`; where there are none, summary.json says.
    """
    stored = {
        entry["number"]: entry
        for entry in _list(summary.get("phases"))
        if isinstance(entry, dict) and _is_judged(entry)
    }
    phases: dict[Any, PhaseHealth] = {}
    if progress is not None and progress.phases:
        spans = spans_of([phase.role for phase in progress.phases], 1)
        for span, planned in zip(spans, progress.phases, strict=True):
            entry = _entry(span, evaluations, comparisons) or stored.get(span.number, {})
            phases[span.number] = PhaseHealth(planned.label, entry)
    else:
        for number, entry in sorted(stored.items()):
            phases[number] = PhaseHealth(f"round {entry.get('round')} {entry.get('role')}", entry)
    for row in read_jsonl(run / WARNINGS, notes):
        number = row.get("phase_number")
        number = number if is_number(number) else None
        own = phases.setdefault(
            number, PhaseHealth(f"round {row.get('round')} {row.get('phase')}", {})
        )
        names = ("step", "rule", "metric", "value", "threshold", "message", "action")
        own.warnings.append({name: row.get(name) for name in names})
    watched = (run / WARNINGS).is_file()
    found = list(phases.values())
    if not watched and not any(phase.entry for phase in found):
        return None
    return Health(found, watched)


def _entry(
    span: Span, evaluations: Sequence[Evaluation], comparisons: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    modes = {e.name: list(e.modes) for e in evaluations if e.finished}
    span = span.among(modes)
    end = modes.get(span.end, [])
    mode = mode_that_counts(mode for mode in modes.get(span.start, []) if mode in end)
    pair = (span.start, mode), (span.end, mode)
    for comparison in comparisons:
        if mode is not None and (comparison["a"], comparison["b"]) == pair:
            return judged(span, mode, comparison)
    return None


def _is_judged(entry: Mapping[str, Any]) -> bool:
    figures = all(is_number(entry.get(name)) for name in ("number", *FIGURES))
    return figures and isinstance(entry.get("verdict"), str)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
