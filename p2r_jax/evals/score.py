"""Scoring again from saved records, without a model: `p2r score`.

    FILE.jsonl --read_records--> records --regrade--> records --score_file--> tables, JSON, CSV

Option letters are graded anew by the authors' rule, so that files of any age are scored alike;
numbers and free text keep the verdict that was given when they were answered (a verifier may have
given it).
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from p2r_jax.evals.comparing import compare
from p2r_jax.evals.records import Key, Record, chosen, is_choice, key_of
from p2r_jax.evals.scoring import (
    by_mode,
    format_table,
    interval,
    percent,
    summarize_modes,
    summary_rows,
)
from p2r_jax.paths import as_path

BASES = ("default", "thinking", "baseline")
"""Modes without evidence; the first that was answered is what the others are compared with."""

_INTERVAL = ("low", "high", "bootstrap_low", "bootstrap_high")
_PERCEIVER = (
    "mean_iou",
    "mean_area",
    "boxes_per_sample",
    "parse_ok_rate",
    "empty_rate",
    "overlap_penalty_rate",
    "label_penalty_rate",
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a file of records holds."""

    records: list[dict[str, Any]]
    damaged: int = 0
    """1 if the last line is half written, as a killed run leaves it; it is left out."""
    repeated: int = 0
    """Records that stood there more than once; the last one counts."""


def read_records(path: Path) -> Reading:
    """The records of a JSON-lines file.

    Raises:
      FileNotFoundError: no such file; the message names those that are there.
      ValueError: a line before the last one is damaged, a record lacks `id` or `mode`, or one
        (id, mode, sample) has two different records.
    """
    if not path.is_file():
        near = sorted([*path.parent.glob("*.jsonl"), *path.rglob("*.jsonl")])[:5]
        there = f": there is {', '.join(map(str, near))}" if near else ""
        raise FileNotFoundError(f"no file of records at {path}{there}")
    lines = path.read_text("utf-8", errors="replace").split("\n")
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    found: dict[Key, dict[str, Any]] = {}
    damaged = repeated = 0
    for place, line in numbered:
        record = _object(line)
        if record is None:
            if place == numbered[-1][0]:
                damaged = 1
                continue
            raise ValueError(f"{path}, line {place}: not a JSON object, and not the last line")
        lacking = [name for name in ("id", "mode") if not isinstance(record.get(name), str)]
        if lacking:
            raise ValueError(f"{path}, line {place}: no {' and no '.join(lacking)}: not a record")
        key = key_of(record)
        if key in found:
            if _content(found[key]) != _content(record):
                raise ValueError(
                    f"{path}, line {place}: another record of id {key[0]!r}, mode {key[1]!r}, "
                    f"sample {key[2]} stands above, and they differ: keep one of them"
                )
            repeated += 1
        found[key] = record
    return Reading(list(found.values()), damaged, repeated)


def regrade(records: Sequence[Record]) -> tuple[list[dict[str, Any]], int]:
    """Records with option letters graded by the authors' rule, and how many verdicts changed."""
    graded = [dict(record) for record in records]
    changed = 0
    for record in graded:
        if not (is_choice(record) and isinstance(record.get("reasoner_text"), str)):
            continue
        letter = chosen(record)["authors"]
        correct = float(letter == record["answer"])
        changed += record.get("correct") != correct
        record |= {"prediction": letter, "correct": correct}
    return graded, changed


def score_file(
    path: str | Path,
    against: str | Path | None = None,
    out: str | Path | None = None,
    modes: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a file of records, print tables, write OUT/NAME.json, NAME.csv and, if something is
    compared, NAME_compared.csv; returns what the JSON holds.

    Args:
      path: records of any mix of modes.
      against: records of another run: its answers are the `a` of every comparison, so a gain is
        wrong there and right here. Without it the modes of one file are compared with the one
        without evidence (`BASES`).
      out: folder to write; default, `score` beside the file.
      modes: modes to score; default, all.

    Raises:
      FileNotFoundError, ValueError: see `read_records`; also a mode that was not answered, no
        graded record at all, or runs that share no question.
    """
    console = console or Console()
    path, against = as_path(path), as_path(against) if against else None
    result, sides = _side(path, modes)
    pairs = _pairs_within(path.stem, sides)
    if against is not None:
        other, others = _side(against, modes)
        here, there = _told_apart(path, against)
        pairs = [((there, others[m]), (here, sides[m]), m, m) for m in sides if m in others]
        if not pairs:
            raise ValueError(
                f"{path} and {against} share no mode: {_names(sides)}, {_names(others)}"
            )
        result["against"] = {k: v for k, v in other.items() if k != "modes"}
    result["comparisons"] = [
        {"a": {"file": a, "mode": mode_a}, "b": {"file": b, "mode": mode_b}}
        | compare(records_a, records_b)
        for (a, records_a), (b, records_b), mode_a, mode_b in pairs
    ]
    for title, rows in tables(result).items():
        text = f"\n{title}\n{format_table(rows)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for side in filter(None, (result, result.get("against"))):
        for note in _notes(side):
            console.print(f"{side['file']}: {note}", markup=False, highlight=False, soft_wrap=True)
    folder = as_path(out) if out else path.parent / "score"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.stem}.json"
    target.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    _write_csv(folder / f"{path.stem}.csv", figure_rows(result["modes"]))
    if result["comparisons"]:
        _write_csv(folder / f"{path.stem}_compared.csv", compared_rows(result["comparisons"]))
    console.print(f"wrote {target}", markup=False, highlight=False, soft_wrap=True)
    return result


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each table to print, by title; tables without rows are left out."""
    modes = result["modes"]
    found = {
        "accuracy (authors' rule)": [
            {"mode": row.pop("run"), **row} for row in summary_rows(modes)
        ],
        "the same answers by three rules": [
            {"mode": mode, "rule": rule, "n": s["n"], "accuracy %": percent(s["accuracy"]),
             "95 % interval": interval(s), "no answer %": percent(s["no_answer_rate"])}
            for mode, summary in modes.items()
            for rule, s in summary.get("rules", {}).items()
        ],
        "rotations of a question": [_rotation_row(mode, s) for mode, s in modes.items()
                                    if "rotations" in s or "all_rotations" in s],
        "several answers to a question": [
            {"mode": mode, "k": int(k), "pass@k %": percent(once["accuracy"]),
             "by image": interval(once), "maj@k %": percent(most["accuracy"]),
             "95 % interval": interval(most), "questions": once["n"]}
            for mode, s in modes.items() if "sampled" in s
            for (k, once), most in zip(s["sampled"]["pass"].items(), s["sampled"]["maj"].values(),
                                       strict=True)
        ],
        "perceiver": [
            {"mode": mode, "n": s["perceiver_n"], "hit %": percent(s["hit_rate"]),
             "95 % interval": interval(s, "hit_") if s["hit_n"] else None, "IoU": s["mean_iou"],
             "area %": percent(s["mean_area"]), "boxes": s["boxes_per_sample"],
             "parsed %": percent(s["parse_ok_rate"]), "no boxes %": percent(s["empty_rate"])}
            for mode, s in modes.items() if s["perceiver_n"]
        ],
        "gain (wrong to right) and harm (right to wrong)": [
            {"from": _place(c, "a"), "to": _place(c, "b"), "category": name, "n": s["n"],
             "gain": s["gain"], "harm": s["harm"], "points": f"{100 * s['difference']:+.1f}",
             "95 % interval": interval(s),
             **({"by image": interval(s, "bootstrap_")} if "clusters" in s else {}),
             "p": f"{s['mcnemar_p']:.2g}"}
            for c in result["comparisons"]
            for name, s in _with_categories(c)
        ],
    }  # fmt: skip
    return {title: rows for title, rows in found.items() if rows}


def figure_rows(modes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each mode, category and figure: value, n and intervals, fractions of 1."""
    rows = []

    def add(mode: str, figure: str, s: Mapping[str, Any], category: str = "all") -> None:
        value = {"n": s.get("n"), "value": s["accuracy"]} | {k: s.get(k) for k in _INTERVAL}
        rows.append({"mode": mode, "category": category, "figure": figure} | value)

    def plain(value: float | None, n: int | None = None) -> dict[str, Any]:
        return {"accuracy": value, "n": n}

    for mode, s in modes.items():
        add(mode, "accuracy", s)
        for name, part in s["by_category"].items():
            add(mode, "accuracy", part, name or "(none)")
        for rule, part in s.get("rules", {}).items():
            add(mode, f"accuracy {rule}", part)
            add(mode, f"no answer {rule}", plain(part["no_answer_rate"], part["n"]))
        if "all_rotations" in s:
            add(mode, "all rotations", s["all_rotations"])
        if "rotations" in s:
            add(mode, "mean of rotations", plain(s["rotations"]["mean"]))
            for name, part in s["rotations"]["by_rotation"].items():
                add(mode, f"rotation {name}", part)
        for kind in ("pass", "maj"):
            for k, part in s.get("sampled", {}).get(kind, {}).items():
                add(mode, f"{kind}@{k}", part)
        if s["hit_n"]:
            hits = {k: s[f"hit_{k}"] for k in ("n", "low", "high")}
            add(mode, "hit rate", hits | {"accuracy": s["hit_rate"]})
        for name in _PERCEIVER:
            if s[name] is not None:
                add(mode, name.replace("_", " "), plain(s[name]))
    return rows


def compared_rows(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each comparison and category."""
    return [
        {"a_file": c["a"]["file"], "a_mode": c["a"]["mode"]}
        | {"b_file": c["b"]["file"], "b_mode": c["b"]["mode"], "category": name}
        | {k: s.get(k) for k in ("n", "accuracy_a", "accuracy_b", "difference", *_INTERVAL)}
        | {k: s.get(k) for k in ("gain", "harm", "mcnemar_p", "clusters")}
        for c in comparisons
        for name, s in _with_categories(c)
    ]


def _side(path: Path, wanted: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    """The summary of a file, and its graded records by mode."""
    reading = read_records(path)
    known = by_mode(reading.records)
    unknown = [mode for mode in wanted if mode not in known]
    if unknown:
        raise ValueError(f"{path} has no mode {', '.join(unknown)}: it has {_names(known)}")
    asked = [r for r in reading.records if not wanted or r["mode"] in wanted]
    records, changed = regrade(asked)
    graded = [record for record in records if record.get("correct") is not None]
    if not graded:
        raise ValueError(f"{path} holds no graded record")
    result = {
        "file": str(path),
        "records": len(records),
        "damaged": reading.damaged,
        "repeated": reading.repeated,
        "ungraded": len(records) - len(graded),
        "regraded": changed,
        "modes": summarize_modes(path.stem, graded)["modes"],
    }
    return result, by_mode(graded)


def _pairs_within(name: str, sides: Mapping[str, list[Record]]) -> list[tuple[Any, Any, str, str]]:
    base = next((mode for mode in BASES if mode in sides), None)
    if base is None:
        return []
    # Modes that need true boxes may have been asked other questions only.
    ids = {r["id"] for r in sides[base]}
    return [
        ((name, sides[base]), (name, records), base, mode)
        for mode, records in sides.items()
        if mode != base and any(r["id"] in ids for r in records)
    ]


def _told_apart(path: Path, against: Path) -> tuple[str, str]:
    """Short names of two files: evaluations of two runs are often called the same."""
    stems = path.stem, against.stem
    runs = [p.resolve().parent.parent.name for p in (path, against)]
    if stems[0] != stems[1]:
        return stems
    if runs[0] != runs[1]:
        return f"{runs[0]}/{stems[0]}", f"{runs[1]}/{stems[1]}"
    return str(path), str(against)


def _rotation_row(mode: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"mode": mode}
    strict = summary.get("all_rotations")
    if strict is not None:
        row |= {"questions": strict["n"], "all right %": percent(strict["accuracy"])}
        row |= {"95 % interval": interval(strict)}
        if strict["incomplete"]:
            row["incomplete"] = strict["incomplete"]
    means = summary.get("rotations")
    if means is not None:
        row["mean of rotations %"] = percent(means["mean"])
        row |= {name: percent(m["accuracy"]) for name, m in means["by_rotation"].items()}
    return row


def _with_categories(comparison: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    categories = comparison["by_category"]
    parts = [(name or "(none)", part) for name, part in categories.items()]
    return [("all", comparison), *(parts if len(parts) > 1 else [])]


def _notes(side: Mapping[str, Any]) -> list[str]:
    notes = {
        "damaged": "last line was half written and is left out",
        "repeated": "record(s) stood there more than once",
        "ungraded": "answer(s) that nothing could grade are left out",
        "regraded": "stored verdict(s) differ from the authors' rule, which counts here",
    }
    return [f"{side[name]} {text}" for name, text in notes.items() if side[name]]


def _place(comparison: Mapping[str, Any], side: str) -> str:
    """Mode of a side, and its file where there are two."""
    two = comparison["a"]["file"] != comparison["b"]["file"]
    own = comparison[side]
    return f"{own['file']} {own['mode']}" if two else own["mode"]


def _names(modes: Mapping[str, Any]) -> str:
    return ", ".join(modes) or "none"


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says where its pictures are."""
    return {k: v for k, v in record.items() if k not in ("image", "crops")}


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
