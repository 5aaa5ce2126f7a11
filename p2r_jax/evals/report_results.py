"""Tables of a report: every evaluation, the first against the newest, paired tests.

Counted from the records where they are, else as stored beside them (eval/NAME.json), else as
summary.json has them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2r_jax.evals import scoring
from p2r_jax.evals.run_folder import natural, read_json
from p2r_jax.evals.verdicts import mode_that_counts

Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation. `modes`: summaries as `scoring.summarize` makes them. `finished`: whether its
    summary was written; if not, it goes on or was cut off."""

    name: str
    modes: dict[str, dict[str, Any]]
    finished: bool
    ungraded: int = 0


@dataclasses.dataclass(frozen=True)
class Headline:
    """The first evaluation against the newest finished one. `rows`: (mode, first summary, newest
    summary, comparison); `mode` is the one that counts. `stations`: (evaluation, its summary of
    that mode, comparison with the one before), of all finished ones: the end of each phase."""

    mode: str
    first: str
    last: str | None
    rows: list[tuple[str, dict[str, Any] | None, dict[str, Any] | None, dict[str, Any] | None]]
    stations: list[tuple[str, dict[str, Any], Mapping[str, Any] | None]]


def evaluations_of(
    run: Path, evals: Mapping[str, Records], summary: Mapping[str, Any], notes: list[str]
) -> list[Evaluation]:
    """All evaluations, in the order in which they were made. evals: records by name."""
    # NAME.run.json says what records depend on, it is no summary.
    stored = (p.stem for p in run.glob("eval/*.json") if not p.stem.endswith(".run"))
    names = {*stored, *evals}
    found = []
    for name in sorted(names, key=eval_order):
        records = evals.get(name, [])
        modes: dict[str, Any] = {}
        try:
            modes = scoring.summarize_modes(name, graded(records))["modes"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"eval/{name}.jsonl cannot be scored: {type(error).__name__}: {error}")
        finished = (run / f"eval/{name}.json").is_file()
        if not modes and finished:
            modes = mapping(read_json(run / f"eval/{name}.json", notes).get("modes"))
        modes = {mode: value for mode, value in modes.items() if has_accuracy(value)}
        if modes:
            found.append(Evaluation(name, modes, finished, len(records) - len(graded(records))))
    return found or [
        Evaluation(name, modes, True)
        for name, value in summary.items()
        if (modes := _modes_of(value))
    ]


def comparisons_of(evals: Mapping[str, Records], notes: list[str]) -> list[dict[str, Any]]:
    """Paired tests: for each mode, each evaluation with the next and the first with the last; and
    within an evaluation, `default` with every other mode. With another run: `report_changes`."""
    sides = {
        (name, mode): records
        for name in evals
        for mode, records in scoring.by_mode(
            r for r in graded(evals[name]) if isinstance(r.get("mode"), str)
        ).items()
    }
    pairs = []
    for mode in dict.fromkeys(mode for _, mode in sides):
        names = [name for name, other in sides if other == mode]
        steps = [*itertools.pairwise(names), *([(names[0], names[-1])] if len(names) > 2 else [])]
        pairs += [((a, mode), (b, mode)) for a, b in steps]
    pairs += [
        ((n, "default"), (n, m)) for n, m in sides if m != "default" and (n, "default") in sides
    ]
    rows = []
    for a, b in pairs:
        try:
            if not {r["id"] for r in sides[a]} & {r["id"] for r in sides[b]}:
                continue  # Two benchmarks: nothing to pair.
            rows.append({"a": a, "b": b, **scoring.compare(sides[a], sides[b])})
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            notes.append(f"{' '.join(a)} and {' '.join(b)} cannot be compared: {problem}")
    return rows


def headline_of(
    evaluations: Sequence[Evaluation], comparisons: Sequence[Mapping[str, Any]]
) -> Headline | None:
    """What the page begins with; None without any evaluation."""
    if not evaluations:
        return None
    finished = [e for e in evaluations if e.finished] or list(evaluations)
    first = finished[0]
    mode = mode_that_counts(first.modes) or next(iter(first.modes))
    later = [e for e in finished[1:] if mode in e.modes]
    last = later[-1] if later else None
    pairs = {(c["a"], c["b"]): c for c in comparisons}
    rows: list[Any] = []
    for name in dict.fromkeys([mode, *first.modes]):
        # Some modes are asked less often: their own newest evaluation, if it is that of the mode
        # that counts.
        after = last.modes.get(name) if last else None
        pair = pairs.get(((first.name, name), (last.name, name))) if last else None
        rows.append((name, first.modes[name], after, pair))
    stations: list[Any] = [(first.name, first.modes[mode], None)]
    for one in later:
        pair = pairs.get(((stations[-1][0], mode), (one.name, mode)))
        stations.append((one.name, one.modes[mode], pair))
    return Headline(mode, first.name, last.name if last else None, rows, stations)


def eval_order(name: str) -> tuple[int, int, bool, list[Any]]:
    """`before` first, `after` last, those of phases in their order and others in numeric order
    between."""
    rank = 0 if name.startswith("before") else 2 if name == "after" else 1
    phase = re.match(r"(after_)?phase(\d+)_", name)
    return rank, int(phase[2]) if phase else 0, bool(phase and phase[1]), natural(name)


def graded(records: Records) -> list[Mapping[str, Any]]:
    """Records whose answer could be graded: the others count nowhere."""
    return [record for record in records if record.get("correct", 0) is not None]


def has_accuracy(value: Any) -> bool:
    """Whether a value is the summary of a mode."""
    return isinstance(value, dict) and "accuracy" in value


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else {}."""
    return dict(value) if isinstance(value, dict) else {}


def _modes_of(value: Any) -> dict[str, dict[str, Any]]:
    """Modes of an entry of summary.json; an entry without modes is one of its own."""
    entry = mapping(value)
    modes = {m: v for m, v in mapping(entry.get("modes")).items() if has_accuracy(v)}
    return modes or ({"p2r": entry} if has_accuracy(entry) else {})
