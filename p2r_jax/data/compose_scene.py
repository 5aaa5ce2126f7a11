"""One question's picture: a photograph, six to eight small objects, and the checks it must pass.

Objects and tags are as large as the overview must not show and no larger: an object's longer side
becomes at most `OVERVIEW_OBJECT` pixels in the overview, capitals at most `OVERVIEW_TEXT`.  The
wrong options are in the scene too, on other objects, so knowing that something is red helps little:
one has to know which of the small things is the banana.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from p2r_jax.data.compose_materials import Cutout, Photo
from p2r_jax.data.compose_pixels import (
    TINTS,
    PixelBox,
    Sprite,
    lab,
    luminance,
    nearest_tint,
    object_sprite,
    paste,
    tinted,
    with_tag,
)
from p2r_jax.data.compose_questions import (
    NUMBERS,
    WORDS,
    Plan,
    colour_options,
    phrase,
    relation_options,
    text_options,
)
from p2r_jax.qwen3_vl.processor import smart_resize

BUDGETS = {"half": 524_288, "training": 2_097_152, "evaluation": 4_194_304}
"""Pixel budgets of an image: half a megapixel, and the authors' two."""

OVERVIEW_OBJECT = 12
OVERVIEW_TEXT = 4
MIN_CONTRAST = 20.0
MIN_TAG_CONTRAST = 10.0
MIN_TINT_MARGIN = 15.0
MAX_TEXTURE = 26.0
BORDER = 0.04
SPACING = 0.07
ANGLE = 15.0

_PLACES = 80
_ATTEMPTS = 24
_CROP_PADDING = 0.1
_CROP_PADDING_PIXELS = 600
_ASPECTS = (4 / 3, 16 / 9)


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of benchmark: width of its images, and the overview budget that hides its objects."""

    width: int
    budget: int


SIZES = {
    "2k": Size(2304, BUDGETS["half"]),
    "4k": Size(3840, BUDGETS["training"]),
    "8k": Size(7680, BUDGETS["training"]),
}
"""2K images have a smaller budget: within the authors' they are shrunk by a sixth only, and nothing
that a crop shows could be hidden."""


@dataclasses.dataclass
class Placed:
    """An object in the scene.  Boxes are (left, top, right, bottom), pixels, right excluded."""

    cutout: Cutout
    sprite: Sprite
    says: str  # the tint, the text on the tag, or ""
    box: PixelBox = (0, 0, 0, 0)
    contrast: float = 0.0
    texture: float = 0.0

    def part(self, part: PixelBox) -> PixelBox:
        """A part of the sprite in pixels of the scene."""
        x, y = self.box[:2]
        return (part[0] + x, part[1] + y, part[2] + x, part[3] + y)


@dataclasses.dataclass
class Scene:
    """A composed question.

    Attributes:
      image: uint8 [H, W, 3].
      photo: what it was made from.
      window: part of the photograph that was used, pixels of the photograph.
      enlarged: scene pixels per photograph pixel; above 1 the photograph was too small.
      placed: all objects, those asked about first.
      targets: how many are asked about.
      question: without options.
      options: the right one first.
      checks: what was measured.
    """

    image: np.ndarray
    photo: Photo
    window: tuple[float, float, float, float]
    enlarged: float
    placed: list[Placed]
    targets: int
    question: str
    options: list[str]
    checks: dict[str, float]


class TooBusy(Exception):
    """No place on this photograph lets the objects be seen."""


def overview_scale(size: Sequence[int], budget: int) -> float:
    """Overview pixels per pixel of an image of `size` (width, height); the axis shrunk less."""
    width, height = size
    new_height, new_width = smart_resize(
        height, width, factor=32, min_pixels=16 * 32**2, max_pixels=budget
    )
    return max(new_height / height, new_width / width)


def crop_box(box: PixelBox, width: int, height: int) -> PixelBox:
    """The crop a reasoner is shown of a box: padded by a tenth of the image, at most 600 pixels.

    The rule of P2R; such a crop is not enlarged, so what it shows is as large as in the image.
    """
    dx = min(_CROP_PADDING * width, _CROP_PADDING_PIXELS)
    dy = min(_CROP_PADDING * height, _CROP_PADDING_PIXELS)
    left, top, right, bottom = box
    return (
        max(0, round(left - dx)),
        max(0, round(top - dy)),
        min(width, round(right + dx)),
        min(height, round(bottom + dy)),
    )


def compose_scene(
    plan: Plan,
    photos: Sequence[Photo],
    cutouts: Sequence[Cutout],
    size: Size,
    load: Any,
    entropy: Sequence[int],
) -> Scene:
    """Composes the scene of one question; the same for the same arguments.

    Args:
      photos: candidates; the first is used unless it is too busy to place things on.
      cutouts: all objects of the split.
      load: Photo -> PIL image; may cache.
      entropy: seeds the random stream.

    Raises:
      ValueError: no photograph leaves room for the objects.
    """
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng([*entropy, attempt])
        photo = photos[(attempt // 3) % len(photos)]
        try:
            return _compose(plan, photo, load(photo), cutouts, size, rng)
        except TooBusy:
            continue
    names = ", ".join(sorted({photo.name for photo in photos})[:5])
    raise ValueError(
        f"question {plan.id}: no place found for its objects on any of the {plan.split}"
        f" photographs ({names}); add photographs with calmer parts (sky, walls, water)"
    )


def _compose(
    plan: Plan,
    photo: Photo,
    picture: Image.Image,
    cutouts: Sequence[Cutout],
    size: Size,
    rng: np.random.Generator,
) -> Scene:
    window, shape = _window(picture.size, size.width, rng)
    scale = overview_scale(shape, size.budget)
    side, text_height = int(OVERVIEW_OBJECT / scale), int(OVERVIEW_TEXT / scale)
    enlarged = shape[0] / (window[2] - window[0])

    chosen = _choose(cutouts, int(rng.integers(6, 9)), rng)
    options, says, checks = _contents(plan, len(chosen), text_height, scale, rng)
    placed = []
    for cutout, word in zip(chosen, says, strict=True):
        image = cutout.load()
        if plan.kind == "colour":
            image = tinted(image, word)
        sprite = object_sprite(image, side, rng.uniform(-ANGLE, ANGLE), bool(rng.integers(2)))
        if plan.kind in ("word", "number"):
            sprite = with_tag(sprite, word, text_height)
        placed.append(Placed(cutout, sprite, word))
    targets = 2 if plan.category == "relative_position" else 1
    # The picture is resized only now: most that can go wrong has gone wrong before.
    resized = picture.resize(shape, Image.Resampling.LANCZOS, box=window, reducing_gap=3)
    scene = np.array(resized)
    _place(plan, placed, scene, rng)
    before = [_cut(scene, item.box).copy() for item in placed]
    soften = min(0.6, 0.35 * max(0.0, enlarged - 1))
    for item in placed:
        paste(scene, item.sprite, item.box[0], item.box[1], rng, soften)
    margins = []
    for item, ground in zip(placed, before, strict=True):
        margins.append(_verify(plan, item, ground, _cut(scene, item.box)))
    names = [item.cutout.noun for item in placed[:targets]]
    if not options:
        options = relation_options(plan.kind, plan.answer, names)
    asked = placed[:targets]
    checks |= {
        "object_px": side,
        "object_overview_px": round(side * scale, 2),
        "contrast": round(min(item.contrast for item in asked), 1),
        "texture": round(max(item.texture for item in asked), 1),
    }
    if plan.kind in ("word", "number"):
        checks |= {"text_px": text_height, "text_overview_px": round(text_height * scale, 2)}
    if plan.kind == "colour":
        checks["tint_margin"] = round(margins[0], 1)
    question = phrase(plan.kind, names)
    return Scene(scene, photo, window, enlarged, placed, targets, question, options, checks)


def _window(
    size: tuple[int, int], width: int, rng: np.random.Generator
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """A part of a photograph, and the (width, height) it is resized to."""
    aspect = float(np.clip(size[0] / size[1], *_ASPECTS))
    widest = min(size[0], size[1] * aspect)
    # Large photographs are used in part, never enlarged; small ones nearly whole.
    least = min(widest, max(0.7 * widest, width)) if widest > width else 0.9 * widest
    used = rng.uniform(least, widest)
    left = rng.uniform(0, size[0] - used)
    top = rng.uniform(0, max(0.0, size[1] - used / aspect))
    box = (left, top, left + used, min(float(size[1]), top + used / aspect))
    return box, (width, round(width / aspect))


def _choose(cutouts: Sequence[Cutout], count: int, rng: np.random.Generator) -> list[Cutout]:
    """Objects of different kinds without a word in common.  Each kind is as likely as any."""
    kinds: dict[str, list[Cutout]] = {}
    for cutout in cutouts:
        kinds.setdefault(cutout.kind, []).append(cutout)
    names = sorted(kinds)
    chosen: list[Cutout] = []
    for i in rng.permutation(len(names)):
        group = kinds[names[i]]
        cutout = group[int(rng.integers(len(group)))]
        if not any(cutout.words & other.words for other in chosen):
            chosen.append(cutout)
        if len(chosen) == count:
            return chosen
    if len(chosen) < 4:
        raise ValueError(
            f"objects: only {len(chosen)} of {len(cutouts)} names have no word in common; at least"
            " 4 are needed in every split"
        )
    return chosen


def _contents(
    plan: Plan, count: int, text_height: int, scale: float, rng: np.random.Generator
) -> tuple[list[str], list[str], dict[str, float]]:
    """Options (right first; none yet for relations), what each object shows, and checks."""
    if plan.category == "relative_position":
        return [], [""] * count, {}
    if plan.kind == "colour":
        options = colour_options(plan.answer, rng)
        spare = [tint for tint in TINTS if tint != plan.answer]
        extra = [spare[i] for i in rng.integers(len(spare), size=count)]
        return options, [*options, *extra][:count], {}
    options, least = text_options(plan.kind, text_height, scale, rng)
    texts = WORDS if plan.kind == "word" else NUMBERS
    pool = [text for text in texts if text not in options]
    extra = [pool[i] for i in rng.permutation(len(pool))[:count]]
    checks = {f"options_differ_{view}": value for view, value in least.items()}
    return options, [*options, *extra][:count], checks


def _place(plan: Plan, placed: list[Placed], scene: np.ndarray, rng: np.random.Generator) -> None:
    """Finds a place for each object: apart, off the border, on calm ground it stands out from."""
    height, width = scene.shape[:2]
    done: list[Placed] = []
    for number, item in enumerate(placed):
        for _ in range(_PLACES):
            x, y = _candidate(item.sprite, width, height, rng)
            item.box = (x, y, x + item.sprite.size[0], y + item.sprite.size[1])
            if any(_distance(item.box, other.box) < SPACING * width for other in done):
                continue
            if number == 1 and plan.category == "relative_position":
                between = (placed[0].box, item.box)
                if not _related(plan.kind, plan.answer, *between, width, height):
                    continue
            reach = max(4, (item.box[3] - item.box[1]) // 2)
            around = scene[
                max(0, y - reach) : y + item.sprite.size[1] + reach,
                max(0, x - reach) : x + item.sprite.size[0] + reach,
            ]
            item.texture = float(luminance(around).std())
            if item.texture > MAX_TEXTURE:
                continue
            if _stands_out(item.sprite, _cut(scene, item.box)):
                done.append(item)
                break
        else:
            raise TooBusy(plan.id)


def _candidate(
    sprite: Sprite, width: int, height: int, rng: np.random.Generator
) -> tuple[int, int]:
    edge_x = max(round(BORDER * width), sprite.size[0])
    edge_y = max(round(BORDER * height), sprite.size[1])
    x = int(rng.integers(edge_x, width - edge_x - sprite.size[0]))
    y = int(rng.integers(edge_y, height - edge_y - sprite.size[1]))
    return x, y


def _related(kind: str, answer: str, a: PixelBox, b: PixelBox, width: int, height: int) -> bool:
    """Whether the first box clearly has the relation `answer` to the second."""
    dx, dy = _centre(a)[0] - _centre(b)[0], _centre(a)[1] - _centre(b)[1]
    if kind == "horizontal":
        along, across = dx / width, dy / height
    else:
        along, across = dy / height, dx / width
    if answer in ("left", "above"):
        along = -along
    return along >= 0.12 and abs(across) <= max(0.35, along)


def _centre(box: PixelBox) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _distance(a: PixelBox, b: PixelBox) -> float:
    (ax, ay), (bx, by) = _centre(a), _centre(b)
    return math.hypot(ax - bx, ay - by)


def _stands_out(sprite: Sprite, ground: np.ndarray) -> bool:
    """A first look, before pasting."""
    body, tag = _parts(sprite)
    if _contrast(sprite.pixels[..., :3], ground, body) < MIN_CONTRAST:
        return False
    return tag is None or _contrast(sprite.pixels[..., :3], ground, tag) >= MIN_TAG_CONTRAST


def _verify(plan: Plan, item: Placed, ground: np.ndarray, after: np.ndarray) -> float:
    """Measures a pasted object: the margin of its tint.  Raises `TooBusy` if it cannot be told."""
    body, tag = _parts(item.sprite)
    item.contrast = _contrast(after, ground, body)
    if item.contrast < MIN_CONTRAST:
        raise TooBusy(plan.id)
    if tag is not None and _contrast(after, ground, tag) < MIN_TAG_CONTRAST:
        raise TooBusy(plan.id)
    if plan.kind != "colour":
        return math.inf
    tint, margin = nearest_tint(after[body].astype(np.float32).mean(axis=0))
    if tint != item.says or margin < MIN_TINT_MARGIN:
        raise TooBusy(plan.id)
    return margin


def _parts(sprite: Sprite) -> tuple[np.ndarray, np.ndarray | None]:
    """Masks [h, w] of the object's own pixels and of its tag."""
    solid = sprite.pixels[..., 3] >= 0.75
    body = np.zeros_like(solid)
    left, top, right, bottom = sprite.body
    body[top:bottom, left:right] = solid[top:bottom, left:right]
    return body, None if sprite.tag is None else solid & ~body


def _contrast(colour: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> float:
    """Mean distance in L*a*b* between what is there and what was there."""
    return float(np.linalg.norm(lab(colour[mask]) - lab(ground[mask]), axis=-1).mean())


def _cut(scene: np.ndarray, box: PixelBox) -> np.ndarray:
    left, top, right, bottom = box
    return scene[top:bottom, left:right]
