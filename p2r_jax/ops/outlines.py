"""Outlines of boxes on the device, bit for bit as Pillow draws them.

Shapes: images or tiles of H×W pixels with their channels last or, where that is cheaper, in the
middle; K boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt8, UInt32

# Pillow's values of red, green, blue, yellow, orange, purple, cyan, magenta; box k takes k mod 8.
OUTLINE_COLORS: tuple[tuple[int, int, int], ...] = (
    (255, 0, 0),
    (0, 128, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 165, 0),
    (128, 0, 128),
    (0, 255, 255),
    (255, 0, 255),
)

# One bit per box; also a multiple of the number of colours, so a new word restarts the cycle.
_BOXES_PER_WORD = 32


def draw_outlines(
    image: UInt8[Array, "H W 3"],
    size: Int32[Array, " 2"],
    boxes: Int32[Array, "K 4"],
    count: Int32[Array, ""],
    line_width: Int32[Array, ""],
) -> UInt8[Array, "H W 3"]:
    """Draws the first `count` boxes, in order, as `ImageDraw.rectangle(box, outline=…, width=…)`.

    Args:
      image: pixels; those outside the valid region are left alone.
      size: height and width of the valid region, in pixels.
      boxes: x0, y0, x1, y1 in pixels, corners included; may reach outside the image. Pillow refuses
        a box with x1 < x0 or y1 < y0; here it paints nothing, because model output is data.
      count: how many boxes to draw.
      line_width: pixels, growing inwards from the box; 0 draws nothing.

    Returns:
      The image with colours cycling through `OUTLINE_COLORS`, equal to Pillow's bit for bit.
    """
    tile = image.transpose(0, 2, 1)
    return paint(tile, 0, 0, size, boxes, count, line_width).transpose(0, 2, 1)


def paint(
    tile: UInt8[Array, "h 3 w"],
    top: int | Array,
    left: int | Array,
    size: Int32[Array, " 2"],
    boxes: Int32[Array, "K 4"],
    count: Int32[Array, ""],
    line_width: Int32[Array, ""],
) -> UInt8[Array, "h 3 w"]:
    """Paints the outlines onto the tile of an image whose first pixel is (top, left).

    A rectangle's outline is a union of two outer products (rows × columns), so the boxes pack into
    bits: one AND and OR per pixel for 32 boxes, and the highest set bit is the box drawn last.
    """
    y = top + jnp.arange(tile.shape[0], dtype=jnp.int32)
    x = left + jnp.arange(tile.shape[2], dtype=jnp.int32)
    for first in range(0, boxes.shape[0], _BOXES_PER_WORD):
        word = boxes[first : first + _BOXES_PER_WORD]
        x0, y0, x1, y1 = (word[:, i, None] for i in range(4))
        number = first + jnp.arange(word.shape[0], dtype=jnp.int32)[:, None]
        drawn = number < count
        bars, across, between, uprights = outline_parts(
            y, x, (size[0], size[1]), (x0, y0, x1, y1), line_width
        )
        bars, between = drawn & bars, drawn & between

        rows = [_pack_bits(flags) for flags in (bars, between)]
        columns = [_pack_bits(flags) for flags in (across, uprights)]
        draw = partial(_draw, tile, rows, columns)
        # Few tiles have a line in them, even of those in the middle of boxes.
        hit = [_any_bits(row) & _any_bits(col) for row, col in zip(rows, columns, strict=True)]
        tile = lax.cond((hit[0] | hit[1]) != 0, draw, lambda tile=tile: tile)
    return tile


def _draw(tile: Array, rows: Sequence[Array], columns: Sequence[Array]) -> Array:
    """Colours pixels by the last box of either pair (rows, columns) of words of bits."""
    painted = rows[0][:, None] & columns[0] | rows[1][:, None] & columns[1]
    last = _BOXES_PER_WORD - 1 - lax.clz(painted)
    return jnp.where((painted != 0)[:, None], _outline_color(last[:, None]), tile)


def outline_parts(
    y: Array, x: Array, size: Sequence[Array], box: Sequence[Array], line_width: Array
) -> tuple[Array, Array, Array, Array]:
    """Flags whose combination bars & across | between & uprights is the outline of a box.

    The first and third depend on y, the others on x. Shapes are broadcast.
    """
    x0, y0, x1, y1 = box
    drawn = (x0 <= x1) & (y0 <= y1) & (y < size[0])
    across = (x >= x0) & (x <= x1) & (x < size[1])
    bars = drawn & (((y >= y0) & (y < y0 + line_width)) | ((y <= y1) & (y > y1 - line_width)))
    # Pillow draws the uprights from y0 + width up to, not including, y1 - width + 1. Where the
    # bars overlap it draws upwards, so a box shorter than its line spills below itself.
    begin, end = y0 + line_width, y1 - line_width + 1
    between = drawn & (((y >= begin) & (y < end)) | ((y <= begin) & (y > end)))
    # Likewise a box narrower than its line spills sideways, but between the bars only.
    uprights = ((x >= x0) & (x < x0 + line_width)) | ((x <= x1) & (x > x1 - line_width))
    return bars, across, between, uprights & (x < size[1])


def _outline_color(box: UInt32[Array, "h 1 w"]) -> UInt8[Array, "h 3 w"]:
    """Looks colours up in registers: a channel's eight bytes fill two words, and a shift picks one.

    A gather of single bytes per pixel would cost more than the rest of the painting.
    """
    table = np.array(OUTLINE_COLORS, np.uint8).T.copy().view("<u4").astype(np.uint32)
    low, high = (jnp.asarray(table[:, half])[:, None] for half in (0, 1))
    box %= len(OUTLINE_COLORS)
    return (jnp.where(box < 4, low, high) >> (8 * (box % 4))).astype(jnp.uint8)


def _pack_bits(flags: Bool[Array, "k n"]) -> Array:
    """[k, n] flags, k ≤ 32 → [n] words, flag i in bit i."""
    bits = jnp.arange(flags.shape[0], dtype=jnp.uint32)[:, None]
    return (flags.astype(jnp.uint32) << bits).sum(axis=0, dtype=jnp.uint32)


def _any_bits(words: UInt32[Array, " n"]) -> UInt32[Array, ""]:
    """Bits that are set in any of the words."""
    return lax.reduce(words, jnp.uint32(0), lax.bitwise_or, (0,))
