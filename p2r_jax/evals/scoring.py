"""From evaluation records to numbers with intervals: accuracy, perceiver figures, paired tests.

A record is one answered question in one mode, see `evals.records`.  The verdict `correct` is
already in it, by the authors' rule or a verifier; other rules are read from the text beside it.
Every accuracy carries its n and its 95 % Wilson interval, because benchmarks of 191 questions move
by several points by chance alone.

    records --by_mode--> {mode: records} --summarize--> {accuracy, low, high, n, hit_rate, ...}
    records_a, records_b --compare--> {gain, harm, mcnemar_p, difference, low, high}

Boxes are (x1, y1, x2, y2) in units of 1/1000 of the image, predicted and true alike; width and
height are the pixels of the image.  Accuracies, rates and areas are fractions of 1.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from p2r_jax.evals.answer_rules import RULES
from p2r_jax.evals.comparing import compare
from p2r_jax.evals.intervals import Accuracy, cluster_bootstrap, mcnemar_p, wilson_interval
from p2r_jax.evals.pass_at_k import sampled_figures
from p2r_jax.evals.records import (
    Record,
    by_category,
    chosen,
    clusters,
    is_choice,
    rotation,
    sample_of,
    verdict,
)
from p2r_jax.roles.boxes import MAX_CROPS, Box, crop_rectangle, iou, perceiver_penalty

__all__ = [
    "Accuracy",
    "box_figures",
    "by_mode",
    "compare",
    "format_table",
    "hit",
    "mcnemar_p",
    "summarize",
    "summarize_modes",
    "summary_rows",
    "wilson_interval",
]

BBox = Sequence[float]

MAX_HIT_AREA = 0.25
"""Largest crop, as a fraction of the image, that may count as a hit.

A box around everything contains every true box; without this limit it would score 100 %.  A
crop of a quarter of the image doubles the resolution the reasoner sees at an equal budget.
"""


def hit(
    pred_boxes: Sequence[BBox],
    true_boxes: Sequence[BBox],
    width: int,
    height: int,
    max_area: float = MAX_HIT_AREA,
    max_crops: int = MAX_CROPS,
) -> bool | None:
    """Whether the reasoner was given a close view of everything it needs.

    True if every true box lies fully inside (to one pixel: crop corners are whole pixels) the
    padded crop of some predicted box among the first `max_crops`, and that crop covers at most
    `max_area` of the image.  None if there are no true boxes to judge by.

    Args:
      pred_boxes: predicted boxes in the model's order, 0-1000.
      true_boxes: boxes of the evidence, 0-1000.
      width, height: image size in pixels.
      max_area: largest crop that counts, as a fraction of the image.
      max_crops: how many of the predicted boxes are cropped.
    """
    if not true_boxes:
        return None
    crops = [crop_rectangle(width, height, box) for box in pred_boxes[:max_crops]]
    close_views = [c for c in crops if _area(c) <= max_area * width * height]

    def contains(crop: Sequence[float], box: BBox) -> bool:
        left, top, right, bottom = crop
        return (
            left - 1 <= box[0] / 1000 * width
            and top - 1 <= box[1] / 1000 * height
            and right + 1 >= box[2] / 1000 * width
            and bottom + 1 >= box[3] / 1000 * height
        )

    return all(any(contains(crop, box) for crop in close_views) for box in true_boxes)


def box_figures(
    pred_boxes: Sequence[BBox], true_boxes: Sequence[BBox], width: int, height: int
) -> dict[str, Any]:
    """The fields `hit`, `iou` and `area` of a record.

    `iou`: for each true box the best IoU of any predicted box (0 if none), averaged over true
    boxes; None without true boxes.  `area`: mean area of the predicted boxes, before padding, as
    a fraction of the image; None without predicted boxes.
    """
    best = [max((iou(pred, true) for pred in pred_boxes), default=0.0) for true in true_boxes]
    return {
        "hit": hit(pred_boxes, true_boxes, width, height),
        "iou": _mean(best),
        "area": _mean([_area(box) / 1e6 for box in pred_boxes]),
    }


def by_mode(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each mode, modes in order of first appearance."""
    modes: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        modes[record["mode"]].append(record)
    return dict(modes)


def summarize(records: Iterable[Record]) -> dict[str, Any]:
    """Accuracy, by category too, and perceiver figures of the records of one mode.

    Returns a JSON-able dict:
      accuracy, low, high, n: overall, 95 % Wilson.  Where records share an image or a question
        (`records.clusters`), n is divided by the design effect first, and there are also
        bootstrap_low, bootstrap_high (clusters drawn anew; why beside: `evals.intervals`) and
        clusters, how many there are.
      by_category: {category: {accuracy, low, high, n, ...}}, sorted by name.
      answer_parse_failure_rate: share of records whose `prediction` is None.
      rules (only with option letters): {name: {accuracy, low, high, n, no_answer_rate}} of each of
        `answer_rules.RULES`, read anew from the answers.
      hit_rate, hit_low, hit_high, hit_n; mean_iou: over records with true boxes and evidence.
      mean_area: mean box area, fraction of the image, over records with boxes.
      boxes_per_sample: over records with evidence (a perceiver ran, or boxes were given).
      parse_ok_rate, empty_rate, overlap_penalty_rate, label_penalty_rate: over records where a
        perceiver ran (`perceiver_text` is not None); `perceiver_n` of them.  Penalties are those
        of the training reward, see `roles.boxes.perceiver_penalty`; here they cost nothing.
      all_rotations (only if records carry a `cluster` that repeats): {accuracy, low, high, n,
        incomplete} of questions answered right in every rotation, HR-Bench's strict accuracy.
        Questions with fewer rotations than others are left out and counted as incomplete.
      rotations (only with `cycle_category`): {by_rotation: {value: {accuracy, ...}}, mean}; the
        mean of means is the figure that other harnesses call HR-Bench's accuracy.
      sampled (only with several answers to a question): see `pass_at_k.sampled_figures`.
    Figures without any record to count are None.

    Raises:
      ValueError: a record lacks `correct`, or the records mix modes.
    """
    records = list(records)
    modes = sorted({str(record.get("mode")) for record in records})
    if len(modes) > 1:
        raise ValueError(f"records of several modes {modes}: summarize each of by_mode(records)")
    summary = _accuracy(records)
    summary["answer_parse_failure_rate"] = _mean([r.get("prediction") is None for r in records])
    summary.update(_perceiver_summary(records))
    summary["by_category"] = {
        name: _accuracy(members) for name, members in by_category(records).items()
    }
    parts = {
        "rules": _rules(records),
        "all_rotations": _all_rotations(records),
        "rotations": _rotations(records),
        "sampled": sampled_figures(records),
    }
    return summary | {name: part for name, part in parts.items() if part is not None}


def summarize_modes(name: str, records: Iterable[Record]) -> dict[str, Any]:
    """Content of `RUN/eval/<name>.json`: {"name": name, "modes": {mode: summarize(...)}}."""
    return {"name": name, "modes": {m: summarize(r) for m, r in by_mode(records).items()}}


def summary_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `format_table`: each named summary, then its categories."""
    rows = []
    for name, summary in summaries.items():
        parts = {"all": summary, **summary.get("by_category", {})}
        for part, value in parts.items():
            if part != "all" and len(parts) == 2:
                continue  # A single category repeats the line above it.
            row = {"run": name, "category": part, "n": value["n"]}
            row |= {"accuracy %": percent(value["accuracy"]), "95 % interval": interval(value)}
            if "bootstrap_low" in value:
                row["by image"] = interval(value, "bootstrap_")
            rows.append(row)
    return rows


def percent(value: float | None) -> str | None:
    """0.9319 -> "93.2"; None for None."""
    return None if value is None else f"{100 * value:.1f}"


def interval(value: Mapping[str, Any], prefix: str = "") -> str:
    """ "88.7 - 96.0" from the fields `low` and `high`, or `bootstrap_low` and `bootstrap_high`."""
    return f"{percent(value[prefix + 'low'])} - {percent(value[prefix + 'high'])}"


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain-text table, one line per row, columns in order of first appearance.

    Columns that hold only numbers (or numbers as text) are right-aligned, None is shown as "-",
    floats with 3 decimals.  No rows give "(no rows)".
    """
    if not rows:
        return "(no rows)"
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    columns = []
    for name in names:
        cells = [_cell(row.get(name)) for row in rows]
        width = max(len(name), *map(len, cells))
        numeric = all(cell == "-" or _is_number(cell) for cell in cells)
        align = str.rjust if numeric else str.ljust
        columns.append([align(name, width), "-" * width, *(align(c, width) for c in cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return " ".join(text.split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _perceiver_summary(records: Sequence[Record]) -> dict[str, Any]:
    perceived = [r for r in records if r.get("perceiver_text") is not None]
    with_evidence = [r for r in records if r.get("perceiver_text") is not None or r.get("boxes")]
    judged = [r for r in with_evidence if r.get("hit") is not None]
    penalties = [
        perceiver_penalty([Box(tuple(b["bbox_2d"]), b.get("label") or "") for b in r["boxes"]])
        for r in perceived
        if r.get("boxes") is not None
    ]
    hits = Accuracy.of([int(bool(r["hit"])) for r in judged])

    def mean_of(field: str) -> float | None:
        return _mean([r[field] for r in with_evidence if r.get(field) is not None])

    return {
        "hit_rate": hits.accuracy,
        "hit_low": hits.low,
        "hit_high": hits.high,
        "hit_n": hits.n,
        "mean_iou": mean_of("iou"),
        "mean_area": mean_of("area"),
        "boxes_per_sample": _mean([len(r.get("boxes") or ()) for r in with_evidence]),
        "perceiver_n": len(perceived),
        "parse_ok_rate": _mean([bool(r.get("parse_ok")) for r in perceived]),
        "empty_rate": _mean([not r.get("boxes") for r in perceived]),
        "overlap_penalty_rate": _mean([p.iou for p in penalties]),
        "label_penalty_rate": _mean([p.label for p in penalties]),
    }


def _accuracy(records: Sequence[Record]) -> dict[str, Any]:
    correct, shares = [verdict(r) for r in records], clusters(records)
    counted: dict[str, Any] = dataclasses.asdict(Accuracy.of(correct, shares))
    if shares is not None:
        low, high = cluster_bootstrap(correct, shares)
        counted |= {"bootstrap_low": low, "bootstrap_high": high, "clusters": len(set(shares))}
    return counted


def _rules(records: Sequence[Record]) -> dict[str, Any] | None:
    asked = [record for record in records if is_choice(record)]
    if not asked:
        return None
    letters = [chosen(record) for record in asked]
    shares = clusters(asked)
    found = {}
    for name in RULES:
        right = [int(c[name] == r["answer"]) for c, r in zip(letters, asked, strict=True)]
        found[name] = {
            **dataclasses.asdict(Accuracy.of(right, shares)),
            "no_answer_rate": _mean([c[name] is None for c in letters]),
        }
    return found


def _all_rotations(records: Sequence[Record]) -> dict[str, Any] | None:
    groups: dict[tuple[Hashable, int], list[Record]] = defaultdict(list)
    for record in records:
        if record.get("cluster") is None:
            return None
        groups[record["cluster"], sample_of(record)].append(record)
    full = max(map(len, groups.values()), default=1)
    if full == 1:
        return None
    complete = [group for group in groups.values() if len(group) == full]
    strict = [min(map(verdict, group)) for group in complete]
    firsts = [group[0] for group in complete]
    shares = clusters(firsts)
    return {
        **dataclasses.asdict(Accuracy.of(strict, shares)),
        "incomplete": len(groups) - len(complete),
    }


def _rotations(records: Sequence[Record]) -> dict[str, Any] | None:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        value = rotation(record)
        if value is None:
            return None
        groups[str(value)].append(record)
    if not groups:
        return None
    means = {name: _accuracy(groups[name]) for name in sorted(groups)}
    return {"by_rotation": means, "mean": _mean([m["accuracy"] for m in means.values()])}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _area(rectangle: Sequence[float]) -> float:
    left, top, right, bottom = rectangle
    return max(0.0, right - left) * max(0.0, bottom - top)
