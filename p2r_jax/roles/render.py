"""Pictures for people: the annotated image and the crops, drawn on the host with Pillow.

Models never see these; they see what `ops.image` renders, pixel for pixel the same outlines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from p2r_jax.ops.outlines import OUTLINE_COLORS
from p2r_jax.roles.boxes import (
    MAX_CROPS,
    Box,
    crop_rectangle,
    line_width,
    outline_rectangle,
)


def annotate(image: np.ndarray, boxes: Sequence[Box]) -> Image.Image:
    """The image (uint8 [H, W, 3]) with the outline of every box."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for i, box in enumerate(boxes):
        draw.rectangle(
            outline_rectangle(*picture.size, box.bbox_2d),
            outline=OUTLINE_COLORS[i % len(OUTLINE_COLORS)],
            width=line_width(picture.width),
        )
    return picture


def crops(image: np.ndarray, boxes: Sequence[Box]) -> list[Image.Image]:
    """The padded crops of the first boxes, from the un-annotated image."""
    picture = Image.fromarray(image)
    rectangles = [crop_rectangle(*picture.size, box.bbox_2d) for box in boxes[:MAX_CROPS]]
    return [picture.crop(r) for r in rectangles if r[2] > r[0] and r[3] > r[1]]


def contact_sheet(image: np.ndarray, boxes: Sequence[Box], height: int = 768) -> Image.Image:
    """Annotated image on the left, crops stacked on the right; `height` pixels tall."""
    left = annotate(image, boxes)
    left = left.resize((max(1, round(left.width * height / left.height)), height))
    cells = crops(image, boxes)
    side = height // max(len(cells), 2)
    sheet = Image.new("RGB", (left.width + (side if cells else 0), height), "white")
    sheet.paste(left, (0, 0))
    for i, cell in enumerate(cells):
        cell.thumbnail((side, side))
        if max(cell.size) < side:  # thumbnail only shrinks, and small crops are the point
            scale = side / max(cell.size)
            cell = cell.resize((round(cell.width * scale), round(cell.height * scale)))
        sheet.paste(cell, (left.width, i * side))
    return sheet
