"""From boxes to what is shown: which part of which image, at which size, with which outlines.

Everything here is integers on the host; `ops.image` turns a `View` into patches on the device.
P2R §3: outlines of *all* boxes on the full-resolution image, then crops of the first three from
the un-annotated image, each padded; if no crop survives, the plain image and a prompt without
evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from p2r_jax.qwen3_vl.processor import MAX_ASPECT_RATIO, ImageSizes
from p2r_jax.roles.boxes import (
    MAX_CROPS,
    Box,
    crop_rectangle,
    line_width,
    outline_rectangle,
)

Rectangle = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class View:
    """One image as a model sees it. Pixels of the full-resolution source."""

    crop: Rectangle
    """left, top, right, bottom; the last two excluded."""
    target: tuple[int, int]
    """height, width after resizing."""
    outlines: tuple[Rectangle, ...] = ()
    """Corners (inclusive) of the rectangles drawn before cropping."""
    line_width: int = 0


@dataclasses.dataclass(frozen=True)
class Shown:
    """How much of the evidence a reasoner is shown; the default is P2R's."""

    overview: Literal["annotated", "plain", "none"] = "annotated"
    """The whole image with the boxes outlined, without, or left out."""
    crops: int = MAX_CROPS
    """Of how many boxes, the first ones."""
    show_crops: bool = True
    """False: boxes are outlined and not cropped."""
    padding: float = 0.1
    """Around a crop, per side, as a fraction of the image."""
    budget: float = 1.0
    """Of each view, as a fraction of the pixel budget."""


P2R = Shown()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a reasoner gets to see."""

    views: tuple[View, ...]
    found: bool
    """False if the views are only the plain image: use the prompt without evidence."""


def plain_view(height: int, width: int, sizes: ImageSizes) -> View:
    """The whole image within the pixel budget. Raises ValueError for aspect ratios above 200."""
    return View((0, 0, width, height), sizes.target_size(height, width))


def gather_evidence(
    height: int,
    width: int,
    boxes: Sequence[Box],
    sizes: ImageSizes,
    shown: Shown = P2R,
) -> Evidence:
    """The annotated image and the crops of the first boxes.

    Boxes whose padded crop is empty or longer than 200 times its width are not cropped. Never
    raises on parsed boxes.
    """
    if shown.budget != 1:
        most = max(sizes.min_pixels, int(sizes.max_pixels * shown.budget))
        sizes = dataclasses.replace(sizes, max_pixels=most)
    overview = plain_view(height, width, sizes)
    crops = []
    for box in boxes[: shown.crops]:
        crop = crop_rectangle(width, height, box.bbox_2d, shown.padding)
        crop_width, crop_height = crop[2] - crop[0], crop[3] - crop[1]
        short, long = sorted((crop_width, crop_height))
        if short >= 1 and long <= MAX_ASPECT_RATIO * short:
            crops.append(View(crop, sizes.target_size(crop_height, crop_width)))
    if not crops:
        return Evidence((overview,), found=False)
    annotated = dataclasses.replace(
        overview,
        outlines=tuple(outline_rectangle(width, height, box.bbox_2d) for box in boxes),
        line_width=line_width(width),
    )
    views = {"annotated": (annotated,), "plain": (overview,), "none": ()}[shown.overview]
    return Evidence((*views, *crops) if shown.show_crops else views, found=True)
