"""Whether each phase of a run ended better than it began: the same questions, paired.

RUN/eval/before.jsonl, after_phase1_perceiver.jsonl, ..., after.jsonl
    (and phase2_reasoner_start.jsonl, of a phase that began with other weights than those)
    --phase_verdicts--> [{number, role, start, end, accuracy_start, ..., verdict}]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from p2r_jax.evals import scoring
from p2r_jax.evals.records import Record
from p2r_jax.evals.run_folder import read_jsonl

Verdict: TypeAlias = Literal["better", "worse", "no clear change"]

LEVEL = 0.05
"""Largest p at which a difference is called one."""

PREFERRED = ("p2r", "baseline", "thinking")
"""Modes that training is about, by preference."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A phase and the evaluations that it lies between."""

    number: int
    """From 1, over all rounds."""
    round: int
    """From 1."""
    role: str
    start: str
    """Name of the evaluation of the weights that the phase began with."""
    end: str

    def among(self, names: Container[str]) -> Span:
        """Of a run that made these evaluations: a phase that began with other weights than the end
        of the one before has one of its own."""
        own = start_name(self.number, self.role)
        return dataclasses.replace(self, start=own) if own in names else self

    @property
    def label(self) -> str:
        return f"round {self.round} {self.role}"


def start_name(number: int, role: str) -> str:
    """Name of the evaluation that a phase begins with if its weights are not those that the one
    before ended with (`PhaseConfig.start`). number: from 1, over all rounds."""
    return f"phase{number}_{role}_start"


def spans_of(roles: Sequence[str], rounds: int) -> list[Span]:
    """All phases of a run, given the roles of one round."""
    every = [role for _ in range(rounds) for role in roles]
    spans, start = [], "before"
    for number, role in enumerate(every, 1):
        end = "after" if number == len(every) else f"after_phase{number}_{role}"
        spans.append(Span(number, (number - 1) // len(roles) + 1, role, start, end))
        start = end
    return spans


def mode_that_counts(modes: Iterable[str]) -> str | None:
    """The one by which a run is judged: p2r, else another that is trained, else the first."""
    modes = list(modes)
    return next((mode for mode in PREFERRED if mode in modes), modes[0] if modes else None)


def verdict_of(comparison: Mapping[str, Any]) -> Verdict:
    """What a paired comparison, as `scoring.compare` makes it, says of its second side."""
    if comparison["mcnemar_p"] >= LEVEL or not comparison["difference"]:
        return "no clear change"
    return "better" if comparison["difference"] > 0 else "worse"


def judged(span: Span, mode: str, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a phase in summary.json: its span, and of `mode`
    accuracy_start, accuracy_end, difference; low, high: 95 % interval of the difference; p_value:
    exact McNemar, or its counterpart for clusters (`scoring.compare`); n: questions; verdict.
    """
    return dataclasses.asdict(span) | {
        "mode": mode,
        "n": comparison["n"],
        "accuracy_start": comparison["accuracy_a"],
        "accuracy_end": comparison["accuracy_b"],
        "difference": comparison["difference"],
        "low": comparison["low"],
        "high": comparison["high"],
        "p_value": comparison["mcnemar_p"],
        "verdict": verdict_of(comparison),
    }


def phase_verdicts(run: Path, spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Entries of phases whose evaluations, before and after, are there and share questions; of
    others the span alone."""
    sides: dict[str, dict[str, list[Record]]] = {}
    entries = []
    made = {file.stem for file in (run / "eval").glob("*.jsonl")}
    for span in (span.among(made) for span in spans):
        for name in (span.start, span.end):
            if name not in sides:
                records = read_jsonl(run / "eval" / f"{name}.jsonl", [])
                graded = [r for r in records if r.get("correct") is not None]
                sides[name] = scoring.by_mode(graded)
        start, end = sides[span.start], sides[span.end]
        mode = mode_that_counts(mode for mode in start if mode in end)
        try:
            if mode is None:
                raise ValueError("no mode is on both sides")
            comparison = scoring.compare(start[mode], end[mode])
        except ValueError:
            entries.append(dataclasses.asdict(span))
        else:
            entries.append(judged(span, mode, comparison))
    return entries


def verdict_rows(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `scoring.format_table`, of the phases that could be judged."""
    return [
        {
            "phase": f"{entry['number']} {entry['role']}",
            "mode": entry["mode"],
            "n": entry["n"],
            "start %": scoring.percent(entry["accuracy_start"]),
            "end %": scoring.percent(entry["accuracy_end"]),
            "points": f"{100 * entry['difference']:+.1f}",
            "95 % interval": f"{100 * entry['low']:+.1f} to {100 * entry['high']:+.1f}",
            "p": f"{entry['p_value']:.2g}",
            "verdict": entry["verdict"],
        }
        for entry in entries
        if "verdict" in entry
    ]


def outcome(entries: Iterable[Mapping[str, Any]], warnings: int) -> str:
    """How a run that went through ended, in one sentence or two."""
    worse = [
        f"phase {e['number']} (round {e['round']} {e['role']}) ended worse than it began: "
        f"{e['mode']} {e['accuracy_start']:.1%} -> {e['accuracy_end']:.1%} on the same "
        f"{e['n']:,} questions, p = {e['p_value']:.2g}"
        for e in entries
        if e.get("verdict") == "worse"
    ]
    parts = [f"finished, but {'; '.join(worse)}." if worse else "finished."]
    if warnings:
        noun = "warning was" if warnings == 1 else "warnings were"
        parts.append(f"{warnings} {noun} given on the way: warnings.jsonl and the report.")
    return " ".join(parts)
