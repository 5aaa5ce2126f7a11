"""Pixels of composed scenes: cut-outs and tags at their final size, pasted so that they belong.

    sprite  float32 [h, w, 4], colour 0-255 not multiplied by alpha, alpha 0-1
    scene   uint8 [H, W, 3]

Every sprite is rendered once, at the size at which it is pasted; nothing is resized afterwards, so
its box in the scene is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

PixelBox: TypeAlias = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, the last two excluded."""

TINTS: dict[str, tuple[int, int, int]] = {
    "red": (205, 25, 30),
    "yellow": (245, 215, 25),
    "green": (35, 150, 45),
    "blue": (35, 75, 215),
    "purple": (135, 40, 175),
}
"""Colours objects are tinted in (RGB).  No orange beside yellow, no pink beside red or purple, no
white, grey or black: tinted in those, shaded objects are named differently by different people."""

_PLATE = (246, 244, 236)
_INK = (24, 24, 28)
_RIM = (96, 92, 88)


@dataclasses.dataclass(frozen=True)
class Sprite:
    """Something to paste.

    Attributes:
      pixels: float32 [h, w, 4], see the module.
      body: the part that is the object itself, (left, top, right, bottom), pixels of the sprite.
      tag: the part that is its tag; None without one.
    """

    pixels: np.ndarray
    body: PixelBox
    tag: PixelBox | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB 0-255, [..., 3] -> float32 [..., 3]."""
    unit = np.asarray(rgb, np.float32) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ],
        np.float32,
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883], np.float32)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Rec. 601 luma, [..., 3] -> float32 [...]."""
    return np.asarray(rgb, np.float32)[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)


def nearest_tint(rgb: np.ndarray, names: tuple[str, ...] = tuple(TINTS)) -> tuple[str, float]:
    """The tint whose hue is nearest, and by how much: distance to the second minus to the first.

    Distances are in the a*b* plane, where shading counts little.
    """
    here = lab(np.asarray(rgb))[1:]
    away = sorted((float(np.hypot(*(here - lab(np.array(TINTS[n]))[1:]))), n) for n in names)
    return away[0][1], away[1][0] - away[0][0] if len(away) > 1 else math.inf


def tinted(image: Image.Image, tint: str) -> Image.Image:
    """An RGBA image in shades of one tint: its light and dark kept, within limits."""
    pixels = np.asarray(image, np.float32)
    light, weight = luminance(pixels), pixels[..., 3] / 255
    middle = (light * weight).sum() / weight.sum()
    spread = math.sqrt((((light - middle) ** 2) * weight).sum() / weight.sum()) + 1e-6
    shade = np.clip((light - middle) / max(spread, 20.0) * 0.22, -0.42, 0.42)[..., None]
    colour = np.array(TINTS[tint], np.float32)
    mixed = np.where(shade < 0, colour * (1 + shade), colour + (255 - colour) * shade)
    return Image.fromarray(np.dstack([mixed, pixels[..., 3]]).round().astype(np.uint8), "RGBA")


def object_sprite(image: Image.Image, side: int, angle: float, flip: bool) -> Sprite:
    """A cut-out (RGBA), turned by `angle` degrees, whose longer side is exactly `side` pixels."""
    large = 8 * side
    if max(image.size) > large:
        image = image.copy()
        image.thumbnail((large, large), Image.Resampling.BOX)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = image.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = turned.getchannel("a").point(lambda a: 255 * (a >= 96)).getbbox()
    turned = turned.crop(box)
    scale = side / max(turned.size)
    size = tuple(max(1, round(scale * s)) for s in turned.size)
    small = turned.resize((size[0], size[1]), Image.Resampling.LANCZOS).convert("RGBA")
    pixels = np.asarray(small, np.float32)
    pixels = np.dstack([pixels[..., :3], pixels[..., 3] / 255])
    return Sprite(pixels, (0, 0, size[0], size[1]))


@functools.lru_cache(maxsize=64)
def _font(height: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, as large as capitals of at most `height` pixels allow.

    Hinting makes their height jump, so it can be one pixel less.
    """
    best, size = ImageFont.load_default(1.0 * height), 1.0 * height
    while True:
        size += 0.1
        font = ImageFont.load_default(size)
        if _ink(font, "H")[1] > height:
            assert isinstance(best, ImageFont.FreeTypeFont)
            return best
        best = font


def _ink(font: Any, text: str) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return round(right - left), round(bottom - top)


@functools.lru_cache(maxsize=4096)
def tag_pixels(text: str, height: int) -> np.ndarray:
    """A plate with dark text: float32 [h, w, 3].

    Capitals and digits are `height` pixels tall, all plates for as many characters are of one size,
    and each character is centred in a cell of one width: neither tells the text.
    """
    font = _font(height)
    pad = max(2, round(0.4 * height))
    cell = _cell(height, text.isdigit())
    plate = Image.new("RGB", (cell * len(text) + 2 * pad, height + 2 * pad + 2), _RIM)
    draw = ImageDraw.Draw(plate)
    draw.rectangle((1, 1, plate.width - 2, plate.height - 2), fill=_PLATE)
    for i, character in enumerate(text):
        left, _, right, _ = font.getbbox(character)
        x = pad + cell * i + round((cell - (right - left)) / 2 - left)
        draw.text((x, 1 + pad - font.getbbox("H")[1]), character, fill=_INK, font=font)
    return np.asarray(plate, np.float32)


@functools.lru_cache(maxsize=64)
def _cell(height: int, digits: bool) -> int:
    """Width of a character's cell: the widest one in use and a little room."""
    characters = "0123456789" if digits else "ABCDEGHKLNOPRSTUVXYZ"
    return max(_ink(_font(height), c)[0] for c in characters) + max(1, height // 6)


def with_tag(sprite: Sprite, text: str, height: int) -> Sprite:
    """The sprite with a tag centred below it; `height` as in `tag_pixels`."""
    plate = tag_pixels(text, height)
    gap = max(1, height // 4)
    (width, body_height), (plate_height, plate_width) = sprite.size, plate.shape[:2]
    total = max(width, plate_width)
    pixels = np.zeros((body_height + gap + plate_height, total, 4), np.float32)
    left, tag_left, tag_top = (total - width) // 2, (total - plate_width) // 2, body_height + gap
    pixels[:body_height, left : left + width] = sprite.pixels
    pixels[tag_top:, tag_left : tag_left + plate_width, :3] = plate
    pixels[tag_top:, tag_left : tag_left + plate_width, 3] = 1
    return Sprite(
        pixels,
        (left, 0, left + width, body_height),
        (tag_left, tag_top, tag_left + plate_width, tag_top + plate_height),
    )


def paste(
    scene: np.ndarray, sprite: Sprite, x: int, y: int, rng: np.random.Generator, soften: float = 0
) -> None:
    """Pastes a sprite with its left top corner at (x, y), in place.

    It gets the light and the grain of what it is put on, a soft shadow, and is blurred by `soften`
    pixels (the blur of an enlarged photograph; the tag stays sharp enough to read).
    """
    width, height = sprite.size
    reach = max(3, round(0.2 * max(sprite.body[2] - sprite.body[0], 1)))
    top, left = max(0, y - reach), max(0, x - reach)
    area = scene[top : y + height + 2 * reach, left : x + width + 2 * reach]
    ground = area.astype(np.float32)
    alpha = np.zeros(area.shape[:2], np.float32)
    colour = np.zeros(area.shape, np.float32)
    inside = (slice(y - top, y - top + height), slice(x - left, x - left + width))
    alpha[inside], colour[inside] = sprite.pixels[..., 3], sprite.pixels[..., :3]
    if soften > 0:
        # Tag rows are left as they are: text is at the limit of what can be read.
        rows = slice(0, y - top + sprite.body[3])
        solid = gaussian_filter(alpha[rows], soften)
        premultiplied = gaussian_filter(colour[rows] * alpha[rows, :, None], (soften, soften, 0))
        colour[rows] = premultiplied / np.maximum(solid, 1e-3)[..., None]
        alpha[rows] = np.where(alpha[rows] > 0, solid, 0)  # the box stays exact
    shift = max(1, reach // 3)
    shadow = gaussian_filter(np.roll(alpha, (shift, shift), (0, 1)), reach / 3) * 0.45
    ground_light = float(np.clip(luminance(ground).mean() / 255, 0, 1))
    lit = colour * (0.82 + 0.26 * ground_light)
    grain = min(_grain(ground), 5.0)
    lit += rng.normal(0, 1, (*alpha.shape, 1)).astype(np.float32) * grain
    shaded = ground * (1 - shadow * (1 - alpha))[..., None]
    mixed = shaded * (1 - alpha[..., None]) + lit * alpha[..., None]
    area[...] = np.clip(mixed.round(), 0, 255).astype(np.uint8)


def _grain(area: np.ndarray) -> float:
    """Standard deviation of the finest detail, grey levels; the median ignores edges."""
    light = luminance(area)
    detail = light[1:, 1:] - light[:-1, 1:] - light[1:, :-1] + light[:-1, :-1]
    return float(np.median(np.abs(detail))) / 0.6745 / 2
