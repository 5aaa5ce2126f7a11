"""Cards of a report: answers of evaluations and groups of training samples, with pictures."""

from __future__ import annotations

import collections
import string
from collections.abc import Mapping, Sequence
from typing import Any

from p2r_jax.evals.chart_phases import Phase, is_step
from p2r_jax.evals.report_changes import Mark
from p2r_jax.evals.run_folder import CROP_SIDE, Pictures, boxes_of, is_number

Record = Mapping[str, Any]


def eval_card(
    record: Record,
    pictures: Pictures,
    marks: Sequence[Mark] = (),
    sampled: bool = False,
    crop_side: int = CROP_SIDE,
) -> dict[str, Any]:
    """One answer of an evaluation, as the template shows it.

    marks: what it gains and harms. sampled: questions are answered several times. crop_side:
    longest side of a crop, pixels.
    """
    options = record.get("options")
    if isinstance(options, dict):
        options = list(options.values())
    correct = record.get("correct")
    return {
        **{k: record.get(k) for k in ("id", "eval", "answer", "prediction")},
        **{k: record.get(k) for k in ("iou", "area", "parse_ok", "perceiver_text")},
        "mode": str(record.get("mode") or ""),
        "category": str(record.get("category") or ""),
        "question": record.get("question") or "",
        "reasoner_text": record.get("reasoner_text"),
        "verdict": "not graded" if correct is None else "right" if correct == 1 else "wrong",
        "options": list(zip(string.ascii_uppercase, options, strict=False))
        if isinstance(options, (list, tuple))
        else [],
        "judged": _judged(record.get("hit")),
        "sample": record.get("sample") if sampled else None,
        "marks": marks,
        "changes": [mark.label for mark in marks],
        "view": _view(record, pictures),
        "crops": _crops(record, pictures, crop_side),
    }


def sample_groups(
    samples: Sequence[Record],
    pictures: Pictures,
    phases: Sequence[Phase] = (),
    crop_side: int = CROP_SIDE,
) -> list[dict[str, Any]]:
    """Completions of one prompt in one step, together: the group an advantage compares."""
    groups: dict[tuple, list[Record]] = collections.defaultdict(list)
    for s in samples:
        key = (s.get(k) for k in ("step", "phase", "role", "id"))
        groups[tuple("" if part is None else str(part) for part in key)].append(s)
    cards = []
    for (step, phase, role, id_), members in groups.items():
        views = [_view(member, pictures) for member in members]
        same_view = all(view == views[0] for view in views)
        prompts = [m.get("prompt") for m in members]
        same_prompt = all(prompt == prompts[0] for prompt in prompts)
        cards.append(
            {
                "step": step,
                "phase": _phase_label(members[0].get("step"), phases) or phase,
                "role": role,
                "id": id_,
                "question": members[0].get("question") or "",
                "answer": members[0].get("answer"),
                "prompt": prompts[0] if same_prompt else None,
                "prompt_tokens": members[0].get("prompt_tokens"),
                "shared_view": views[0] if same_view else None,
                "shared_crops": _crops(members[0], pictures, crop_side) if same_view else [],
                "rewards": "mixed" if len({str(m.get("reward")) for m in members}) > 1 else "equal",
                "truncated": (cut := sum(m.get("truncated") is True for m in members)),
                "cut": "some" if cut else "none",
                "members": [
                    {
                        **{k: m.get(k) for k in ("completion", "reward", "advantage")},
                        "tokens": m.get("completion_tokens"),
                        "truncated": m.get("truncated") is True,
                        "prompt": None if same_prompt else m.get("prompt"),
                        "prompt_tokens": m.get("prompt_tokens"),
                        "partner": m.get("partner_completion"),
                        "parts": _parts(m),
                        "view": None if same_view else view,
                        "crops": [] if same_view else _crops(m, pictures, crop_side),
                    }
                    for m, view in zip(members, views, strict=True)
                ],
            }
        )
    return cards


def _phase_label(step: Any, phases: Sequence[Phase]) -> str:
    """Of the phase that a step belongs to, "" if the metrics do not know it."""
    inside = (p for p in phases if is_step(step) and p.first <= step <= p.last)
    return next((phase.label for phase in inside), "")


def _crops(record: Record, pictures: Pictures, side: int) -> list[dict[str, Any]]:
    crops = record.get("crops")
    return [
        {"path": crop, "picture": pictures.add(crop, side)}
        for crop in (crops if isinstance(crops, list) else [])
    ]


def _view(record: Record, pictures: Pictures) -> dict[str, Any]:
    """What a figure draws: the picture, or an empty canvas of its shape, and boxes on it."""
    path = record.get("image")
    picture = pictures.add(path)
    source: Mapping[str, Any] = picture or record
    width, height = source.get("width"), source.get("height")
    if not (is_number(width) and is_number(height) and width > 0 and height > 0):
        width, height = 4, 3
    scale = 1000 / max(width, height)
    canvas = (round(width * scale, 1), round(height * scale, 1))

    def rectangles(value: Any) -> list[dict[str, Any]]:
        shapes = []
        for box in boxes_of(value):
            x1, y1, x2, y2 = (min(max(c, 0.0), 1000.0) / 1000 for c in box["bbox"])
            shapes.append(
                {
                    **box,
                    "x": round(x1 * canvas[0], 1),
                    "y": round(y1 * canvas[1], 1),
                    "width": round(max(0.0, x2 - x1) * canvas[0], 1),
                    "height": round(max(0.0, y2 - y1) * canvas[1], 1),
                }
            )
        return shapes

    return {
        "path": path,
        "picture": picture,
        "problem": pictures.problems.get(path) if isinstance(path, str) else None,
        "canvas": canvas,
        "scale": (canvas[0] / width, canvas[1] / height),
        "boxes": rectangles(record.get("boxes")),
        "true_boxes": rectangles(record.get("true_boxes")),
    }


def _judged(hit: Any) -> str:
    return ("hit" if hit else "miss") if isinstance(hit, bool) else "not judged"


def _parts(sample: Record) -> dict[str, float]:
    parts = sample.get("reward_parts")
    return {k: v for k, v in parts.items() if is_number(v)} if isinstance(parts, dict) else {}
