"""The perceiver's answer: from text to boxes, and from boxes to pixel rectangles.

A box has two corners (x1, y1, x2, y2) in thousandths of the image's width and height, and a label.
Everything a model can write is data here: no function that reads its text raises. Training and
evaluation share this one path.

    text ─ parse_boxes ─▶ [Box] ─ outline_rectangle ─▶ pixels to draw (every box)
                                └ crop_rectangle ────▶ pixels to cut (the first MAX_CROPS boxes)
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Rectangle = tuple[int, int, int, int]  # (left, top, right, bottom) in pixels

SCALE = 1000.0
MAX_CROPS = 3
MAX_ASPECT_RATIO = 200.0
MAX_IOU = 0.5
PLACEHOLDER_LABEL = "description"

_FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
_CODE_FENCE = re.compile(r"```[a-zA-Z]*\s*(.*)```", re.DOTALL)


@dataclass(frozen=True)
class Box:
    """One region of an image.

    Attributes:
      bbox_2d: (x1, y1, x2, y2), 0 ≤ x1 < x2 ≤ 1000 and 0 ≤ y1 < y2 ≤ 1000, in thousandths of the
        image's width and height.
      label: what the model called it; "" if it gave none.
    """

    bbox_2d: tuple[float, float, float, float]
    label: str


class ParsedBoxes(NamedTuple):
    """What was read from a perceiver's answer.

    Attributes:
      boxes: the valid boxes, in the order written.
      well_formed: the answer, an optional code fence aside, is a JSON list (or a single object) of
        which every entry gave a box. `[]` is well formed. False once anything was dropped or had to
        be searched for; a metric of format, never a reward.
    """

    boxes: tuple[Box, ...]
    well_formed: bool


class PerceiverPenalty(NamedTuple):
    """Why a perceiver's answer earns no reward whatever the reasoner makes of it (P2R §1).

    Attributes:
      iou: two of its boxes have an IoU above `MAX_IOU`.
      label: one of its labels is empty, or the placeholder `description` (in any case).
    """

    iou: bool
    label: bool


def parse_boxes(text: str) -> list[Box]:
    """Reads the boxes from a perceiver's answer; never raises, whatever the text.

    If the whole text is JSON, its object, or the objects in its list, are the candidates. Otherwise
    every flat `{…}` in the text that is JSON is one: models usually answer inside a code fence.
    A candidate is a box if its `bbox_2d` is four finite numbers (booleans are not numbers) with
    x1 < x2 and y1 < y2 that, clamped to 0–1000, still enclose an area with an aspect ratio of at
    most `MAX_ASPECT_RATIO`. The ratio is taken in 0–1000 coordinates, since the image's shape is
    not known here. A label that is not text counts as missing.

    An empty list means "the whole image", which is also how an unreadable answer behaves.
    """
    return list(parse_response(text).boxes)


def parse_response(text: str) -> ParsedBoxes:
    """`parse_boxes`, together with whether the answer had the form that was asked for."""
    written = _load_json(text)
    if isinstance(written, dict | list):
        candidates = _entries(written)
    else:
        candidates = list(_flat_objects(text))
        fenced = _CODE_FENCE.fullmatch(text.strip())
        written = _load_json(fenced[1]) if fenced else None
    boxes = tuple(box for candidate in candidates if (box := _as_box(candidate)) is not None)
    well_formed = isinstance(written, dict | list) and len(boxes) == len(_entries(written))
    return ParsedBoxes(boxes, well_formed)


def crop_rectangle(
    width: int,
    height: int,
    bbox_2d: Sequence[float],
    padding: float = 0.1,
    max_padding_pixels: float = 600.0,
) -> Rectangle:
    """The rectangle of an image to cut out for a box (P2R §3).

    Args:
      width, height: of the image, in pixels; at least 1.
      bbox_2d: two opposite corners in 0–1000; coordinates outside are clamped.
      padding: added on every side, as a fraction of the image's width or height ...
      max_padding_pixels: ... but never more than this many pixels.

    Returns:
      (left, top, right, bottom) in pixels, `right` and `bottom` exclusive. It lies inside the image
      and holds at least one pixel.
    """
    left, right = _crop_interval(width, bbox_2d[0], bbox_2d[2], padding, max_padding_pixels)
    top, bottom = _crop_interval(height, bbox_2d[1], bbox_2d[3], padding, max_padding_pixels)
    return left, top, right, bottom


def outline_rectangle(width: int, height: int, bbox_2d: Sequence[float]) -> Rectangle:
    """The corner pixels of a box's outline, as given to Pillow's `ImageDraw.rectangle`.

    Both corners belong to the outline. A coordinate of 1000 falls one pixel outside the image,
    where drawing clips it.
    """
    left, right = sorted(int(x / SCALE * width) for x in (bbox_2d[0], bbox_2d[2]))
    top, bottom = sorted(int(y / SCALE * height) for y in (bbox_2d[1], bbox_2d[3]))
    return left, top, right, bottom


def line_width(width: int) -> int:
    """Thickness of the outlines, in pixels, on an image `width` pixels wide."""
    return max(3, int(0.003 * width))


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), in [0, 1]; 0 if both are empty."""
    overlap_x = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    overlap_y = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = overlap_x * overlap_y
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    union = area_a + area_b - intersection
    # Rounding can leave the union an ulp short of an intersection that fills it.
    return min(1.0, intersection / union) if union > 0 else 0.0


def perceiver_penalty(boxes: Sequence[Box]) -> PerceiverPenalty:
    """The format faults that zero a perceiver's reward, judged on all boxes, cropped or not.

    An answer without boxes has no fault.
    """
    return PerceiverPenalty(
        iou=any(iou(a.bbox_2d, b.bbox_2d) > MAX_IOU for a, b in itertools.combinations(boxes, 2)),
        label=any(box.label.strip().lower() in ("", PLACEHOLDER_LABEL) for box in boxes),
    )


def _load_json(text: str) -> Any:
    """The JSON value of the text, or None if it is not JSON that Python can hold."""
    try:
        return json.loads(text.strip())
    except (ValueError, RecursionError):
        # Besides JSONDecodeError: integers of more digits than Python converts, and deep nesting.
        return None


def _entries(written: dict | list) -> list:
    return [written] if isinstance(written, dict) else written


def _flat_objects(text: str) -> Iterator[Any]:
    """Every JSON object in the text that contains no other object, left to right."""
    for match in _FLAT_OBJECT.finditer(text):
        yield _load_json(match[0])


def _as_box(candidate: Any) -> Box | None:
    corners = candidate.get("bbox_2d") if isinstance(candidate, dict) else None
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
        return None
    # Compared and clamped before conversion: a JSON integer can be too large for a float.
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        return None
    x1, y1, x2, y2 = (float(min(max(0, c), SCALE)) for c in corners)
    short, long = sorted((x2 - x1, y2 - y1))
    if short <= 0 or long > MAX_ASPECT_RATIO * short:
        return None
    label = candidate.get("label")
    return Box((x1, y1, x2, y2), label if isinstance(label, str) else "")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _crop_interval(
    size: int, start: float, end: float, padding: float, max_padding_pixels: float
) -> tuple[int, int]:
    """One axis of `crop_rectangle`: the pixels [first, last) of an image `size` pixels long."""
    low, high = sorted((start / SCALE, end / SCALE))
    pad = min(padding, max_padding_pixels / size)
    first = int(min(max(0.0, low - pad), 1.0) * size)
    last = int(max(min(1.0, high + pad), 0.0) * size)
    # On an image of a few pixels the padding can vanish in the rounding; keep one pixel.
    first = min(first, size - 1)
    return first, max(last, first + 1)
