"""How far looking gets without a model: cut-outs found by matching, colours and texts read off.

The reader knows what no model is told: the cut-out itself (not how it was turned or lit), its size,
and the font.  It looks at one view of the image:

    crop, searched       the crop of the true box, at the size at which P2R shows it
    overview, searched   the whole image within the overview budget
    overview, told where the overview, and the object's place in it to within its own size

It takes the place where the cut-out's light and dark fit best (normalised correlation under its
mask), names the nearest of the offered colours there, or fits the offered texts to the tag below.
The third row separates what the overview hides (texts) from what is only hard to find (colours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.signal import oaconvolve

from p2r_jax.data.compose_materials import Cutout
from p2r_jax.data.compose_pixels import (
    PixelBox,
    luminance,
    nearest_tint,
    object_sprite,
    tag_pixels,
)
from p2r_jax.data.compose_questions import LETTERS
from p2r_jax.data.compose_scene import crop_box
from p2r_jax.qwen3_vl.processor import smart_resize

LOOKING = {
    "crop, searched": "matching in the crop of the true box",
    "overview, searched": "matching in the whole overview",
    "overview, told where": "matching at the true place in the overview",
}
"""Ways to answer with the image and without a model."""

_FLAT = 4.0  # grey levels; below this a place has nothing to match


def looking_baselines(
    row: Mapping[str, Any], folder: Path, cutouts: Sequence[Cutout], budget: int
) -> dict[str, bool]:
    """Which ways of `LOOKING` answer a question rightly.

    Args:
      row: the record of a question, as beside its image, with "image".
      folder: the split's folder.
      cutouts: of the objects asked about.
      budget: overview budget, pixels.
    """
    with Image.open(folder / row["image"]) as opened:
        image = opened.convert("RGB")
    new_height, new_width = smart_resize(
        image.height, image.width, factor=32, min_pixels=16 * 32**2, max_pixels=budget
    )
    overview = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    scale = (new_width / image.width, new_height / image.height)
    boxes = [(x, y, x + w, y + h) for x, y, w, h in row["bbox"]]
    views: dict[str, list[tuple[np.ndarray, tuple[int, int], tuple[float, float]]]] = {
        name: [] for name in LOOKING
    }
    for box in boxes:
        crop = crop_box(box, image.width, image.height)
        views["crop, searched"].append((np.asarray(image.crop(crop)), crop[:2], (1.0, 1.0)))
        views["overview, searched"].append((overview, (0, 0), scale))
        near = _near(box, scale, overview.shape)
        left, top, right, bottom = near
        views["overview, told where"].append((overview[top:bottom, left:right], near[:2], scale))
    return {name: _answer(row, parts, cutouts) == row["label"] for name, parts in views.items()}


def _near(box: PixelBox, scale: tuple[float, float], shape: tuple[int, ...]) -> PixelBox:
    """A box in the overview with room on all sides, half its own size."""
    left, right = box[0] * scale[0], box[2] * scale[0]
    top, bottom = box[1] * scale[1], box[3] * scale[1]
    room = 0.5 * max(right - left, bottom - top)
    return (
        max(0, int(left - room)),
        max(0, int(top - room)),
        min(shape[1], int(right + room) + 1),
        min(shape[0], int(bottom + room) + 1),
    )


def _answer(row: Mapping[str, Any], views: Sequence[Any], cutouts: Sequence[Cutout]) -> str:
    """The letter that the reader chooses."""
    kind, shown, side = row["kind"], row["shown"], int(row["checks"]["object_px"])
    found = []
    for cutout, (pixels, origin, scale) in zip(cutouts, views, strict=True):
        found.append((*_find(cutout, side, pixels, scale), origin, scale))
    if kind in ("horizontal", "vertical"):
        axis = 0 if kind == "horizontal" else 1
        ends = []
        for (x, y), mask, origin, scale in found:
            centre = (x + mask.shape[1] / 2 + origin[0], y + mask.shape[0] / 2 + origin[1])
            # Crops keep the image's own pixels: their origin is in them already.
            ends.append(centre[axis] / scale[axis])
        first = ends[0] < ends[1]
        word = ("left" if first else "right") if axis == 0 else ("above" if first else "below")
        return next(
            letter
            for letter, option in zip(LETTERS, shown, strict=False)
            if word in option.rstrip(".").split()
        )
    pixels = views[0][0]
    (x, y), mask, _, scale = found[0]
    height, width = mask.shape
    if kind == "colour":
        inside = pixels[y : y + height, x : x + width][mask > 0.75].astype(np.float32)
        if not len(inside):
            return LETTERS[0]
        return LETTERS[shown.index(nearest_tint(inside.mean(axis=0), tuple(shown))[0])]
    text_height = int(row["checks"]["text_px"])
    scores = []
    for text in shown:
        plate = tag_pixels(text, text_height)
        size = (
            max(2, round(plate.shape[1] * scale[0])),
            max(2, round(plate.shape[0] * scale[1])),
        )
        small = Image.fromarray(plate.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        template = luminance(np.asarray(small))
        # The tag is centred below the object; where exactly is searched.
        slack = max(2, round(0.4 * max(width, height)))
        left = max(0, round(x + width / 2 - size[0] / 2) - slack)
        top = max(0, y + height - slack // 2)
        area = luminance(pixels[top : top + size[1] + 2 * slack, left : left + size[0] + 2 * slack])
        if area.shape[0] < size[1] or area.shape[1] < size[0]:
            scores.append(-1.0)
            continue
        scores.append(float(correlation(area, template, np.ones_like(template)).max()))
    return LETTERS[int(np.argmax(scores))]


def _find(
    cutout: Cutout, side: int, pixels: np.ndarray, scale: tuple[float, float]
) -> tuple[tuple[int, int], np.ndarray]:
    """Left top corner of the best fit, and the mask [h, w] of the template that fitted."""
    light = luminance(pixels)
    best: tuple[float, tuple[int, int], np.ndarray] | None = None
    for flip in (False, True):
        sprite = object_sprite(cutout.load(), max(4, round(side * max(scale))), 0.0, flip).pixels
        template, mask = luminance(sprite), sprite[..., 3]
        if template.shape[0] > light.shape[0] or template.shape[1] > light.shape[1]:
            continue
        fit = correlation(light, template, mask)
        y, x = np.unravel_index(int(fit.argmax()), fit.shape)
        if best is None or fit[y, x] > best[0]:
            best = (float(fit[y, x]), (int(x), int(y)), mask)
    if best is None:
        return (0, 0), np.ones((1, 1), np.float32)
    return best[1], best[2]


def correlation(view: np.ndarray, template: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Correlation of a template with every place of a view, under a mask.

    Args:
      view: [H, W] grey levels.
      template: [h, w], not larger.
      mask: [h, w], weights.

    Returns:
      [H - h + 1, W - w + 1], -1 to 1.
    """
    weight = mask / mask.sum()
    centred = template - (template * weight).sum()
    spread = np.sqrt((centred**2 * weight).sum())
    view = view - view.mean()

    def summed(plane: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return oaconvolve(plane, weights[::-1, ::-1].astype(np.float32), mode="valid")

    mean = summed(view, weight)
    variance = np.maximum(summed(view * view, weight) - mean**2, 0)
    return summed(view, centred * weight) / (max(float(spread), 1.0) * np.sqrt(variance + _FLAT**2))
