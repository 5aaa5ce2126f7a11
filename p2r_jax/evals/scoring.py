"""From evaluation records to numbers with intervals: accuracy, perceiver figures, paired tests.

A record is one answered question in one mode, the JSON object that a runner appends to
`RUN/eval/<name>.jsonl`.  The verdict `correct` is already in it (the letter rule belongs to
`p2r_jax.rl.rewards`); this module only counts.  Every accuracy carries its n and its 95 % Wilson
interval, because benchmarks of 191 questions move by several points by chance alone.

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

from p2r_jax.evals.intervals import Accuracy, mcnemar_p, paired_interval, wilson_interval
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

Record = Mapping[str, Any]
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
      accuracy, low, high, n: overall, 95 % Wilson; low and high allow for clusters, see below.
      by_category: {category: {accuracy, low, high, n}}, sorted by name.
      answer_parse_failure_rate: share of records whose `prediction` is None.
      hit_rate, hit_low, hit_high, hit_n; mean_iou: over records with true boxes and evidence.
      mean_area: mean box area, fraction of the image, over records with boxes.
      boxes_per_sample: over records with evidence (a perceiver ran, or boxes were given).
      parse_ok_rate, empty_rate, overlap_penalty_rate, label_penalty_rate: over records where a
        perceiver ran (`perceiver_text` is not None); `perceiver_n` of them.  Penalties are those
        of the training reward, see `roles.boxes.perceiver_penalty`; here they cost nothing.
      all_rotations (only if records carry a `cluster` that repeats): {accuracy, low, high, n} of
        clusters answered right in every rotation, HR-Bench's strict accuracy.
    Figures without any record to count are None.

    Args:
      records: see the module docstring.  `cluster` is optional: records with an equal value are
        rotations of one question and are not counted as independent.

    Raises:
      ValueError: a record lacks `correct`, or the records mix modes.
    """
    records = list(records)
    modes = sorted({str(record.get("mode")) for record in records})
    if len(modes) > 1:
        raise ValueError(f"records of several modes {modes}: summarize each of by_mode(records)")
    summary: dict[str, Any] = dataclasses.asdict(_accuracy(records))
    summary["answer_parse_failure_rate"] = _mean([r.get("prediction") is None for r in records])
    summary.update(_perceiver_summary(records))

    categories: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        categories[record.get("category") or ""].append(record)
    summary["by_category"] = {
        name: dataclasses.asdict(_accuracy(categories[name])) for name in sorted(categories)
    }
    clusters = _group_by_cluster(records)
    if clusters and len(clusters) < len(records):
        strict = [min(_verdict(r) for r in group) for group in clusters.values()]
        summary["all_rotations"] = dataclasses.asdict(Accuracy.of(strict))
    return summary


def summarize_modes(name: str, records: Iterable[Record]) -> dict[str, Any]:
    """Content of `RUN/eval/<name>.json`: {"name": name, "modes": {mode: summarize(...)}}."""
    return {"name": name, "modes": {m: summarize(r) for m, r in by_mode(records).items()}}


def compare(
    records_a: Iterable[Record], records_b: Iterable[Record], confidence: float = 0.95
) -> dict[str, Any]:
    """Paired comparison of two runs, or two modes, over the questions both answered.

    Returns a JSON-able dict:
      n: questions answered by both; only_a, only_b: by one alone, left out of everything else.
      accuracy_a, accuracy_b, difference = accuracy_b - accuracy_a: fractions.
      gain: wrong in a, right in b.  harm: right in a, wrong in b.
      low, high: interval of the difference by Bonett and Price (2012): a Wald interval after one
        observation is added to each discordant cell, near nominal coverage from n = 25 on.
      mcnemar_p: exact two-sided McNemar test, a binomial test of gain among gain + harm at 1/2.
    Both treat questions as independent, also where `cluster` says otherwise.

    Raises:
      ValueError: an id repeats on one side (mixed modes), or no id is on both.
    """
    a, b = _by_id(records_a, "a"), _by_id(records_b, "b")
    shared = a.keys() & b.keys()
    if not shared:
        raise ValueError("no question id is on both sides: these are runs of different questions")
    gain = sum(a[i] < b[i] for i in shared)
    harm = sum(a[i] > b[i] for i in shared)
    n = len(shared)
    low, high = paired_interval(gain, harm, n, confidence)
    return {
        "n": n,
        "only_a": len(a) - n,
        "only_b": len(b) - n,
        "accuracy_a": sum(a[i] for i in shared) / n,
        "accuracy_b": sum(b[i] for i in shared) / n,
        "difference": (gain - harm) / n,
        "low": low,
        "high": high,
        "gain": gain,
        "harm": harm,
        "mcnemar_p": mcnemar_p(gain, harm),
    }


def summary_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `format_table`: each named summary, then its categories."""
    rows = []
    for name, summary in summaries.items():
        parts = {"all": summary, **summary.get("by_category", {})}
        for part, value in parts.items():
            if part != "all" and len(parts) == 2:
                continue  # A single category repeats the line above it.
            accuracy = value["accuracy"]
            rows.append(
                {
                    "run": name,
                    "category": part,
                    "n": value["n"],
                    "accuracy %": None if accuracy is None else f"{100 * accuracy:.1f}",
                    "95 % interval": f"{100 * value['low']:.1f} - {100 * value['high']:.1f}",
                }
            )
    return rows


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


def _verdict(record: Record) -> int:
    verdict = record.get("correct")
    if verdict not in (0, 1):  # Also accepts bools and 0.0 / 1.0.
        raise ValueError(f"record {record.get('id')!r}: 'correct' must be 0 or 1, is {verdict!r}")
    return int(verdict)


def _accuracy(records: Sequence[Record]) -> Accuracy:
    clusters = [r.get("cluster") for r in records]
    return Accuracy.of([_verdict(r) for r in records], None if None in clusters else clusters)


def _group_by_cluster(records: Sequence[Record]) -> dict[Hashable, list[Record]]:
    groups: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        if record.get("cluster") is None:
            return {}
        groups[record["cluster"]].append(record)
    return dict(groups)


def _by_id(records: Iterable[Record], side: str) -> dict[Hashable, int]:
    verdicts: dict[Hashable, int] = {}
    for record in records:
        if record["id"] in verdicts:
            raise ValueError(
                f"id {record['id']!r} repeats on side {side}: pass one mode of one run"
            )
        verdicts[record["id"]] = _verdict(record)
    return verdicts


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _area(rectangle: Sequence[float]) -> float:
    left, top, right, bottom = rectangle
    return max(0.0, right - left) * max(0.0, bottom - top)
