"""Evidence images on the device: draw outlines, crop, resize, cut into patches.

Source images are uploaded once, as uint8 arrays padded to a common size; afterwards only numbers
(boxes, crops, target sizes) travel. Every shape below is static and every geometry is data, so one
compilation serves all images, boxes and crops. The results are Pillow's: outlines bit for bit,
resized pixels within one grey level.

Shapes: I source images of H×W pixels; B rows of S views, each drawn with at most K outlines and
resized onto a canvas of Hc×Wc pixels; N patches a row, of T·p·p pixels (T frames, p pixels a side).

    images [I,H,W,3] ──views [B,S]──▶ canvases [B,S,Hc,Wc,3] ──slot, row_col [B,N]──▶ [B,N,3·T·p·p]
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt8, UInt32

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

PassOrder: TypeAlias = Literal["pillow", "width_first"]

# Side of the source tiles that resizing streams through. 128 fills a TPU matrix unit, and on a CPU
# small crops hardly pay for pixels they do not show while large ones still run near peak.
_TILE = 128

# One bit per box; also a multiple of the number of colours, so a new word restarts the cycle.
_BOXES_PER_WORD = 32

# (row, column, (h, w)) → the h×w pixels there, channels in the middle: uint8 [h,3,w].
_LoadTile: TypeAlias = Callable[[Array, Array, tuple[int, int]], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """What to render: B rows of S views; a view is one crop of one source image.

    Pixel coordinates are those of the full-resolution source image.
    """

    image_index: Int32[Array, "*batch"]  # which source image
    crop: Int32[Array, "*batch 4"]  # left, top, right, bottom; right and bottom excluded
    target: Int32[Array, "*batch 2"]  # height, width after resizing; (0, 0) = unused slot
    outlines: Int32[Array, "*batch K 4"]  # x0, y0, x1, y1; all four included
    outline_count: Int32[Array, "*batch"]  # how many of the K outlines are drawn
    line_width: Int32[Array, "*batch"]  # pixels


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
    return _paint(tile, 0, 0, size, boxes, count, line_width).transpose(0, 2, 1)


def resample_matrix(
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
    out_size: Int32[Array, ""],
    *,
    in_extent: int,
    out_extent: int,
) -> Float32[Array, "{out_extent} {in_extent}"]:
    """Weights that crop [start, stop) of one axis and resize it to `out_size` pixels.

    Pillow's BICUBIC: Keys' cubic with a = -0.5, widened by the scale when shrinking, each row
    normalised over the pixels of the crop. Zero outside the crop and in rows from `out_size` on.

    Raises:
      ValueError: the extents are so large that pixel positions would overflow int32.
    """
    if 2 * in_extent * out_extent >= 2**31:
        raise ValueError(
            f"in_extent {in_extent} × out_extent {out_extent} overflows int32; their product must "
            "stay below 2**30"
        )
    source = jnp.arange(in_extent, dtype=jnp.int32)
    target = jnp.arange(out_extent, dtype=jnp.int32)[:, None]
    in_size = stop - start
    # Distance between pixel centres, (x + ½ - start) - (y + ½)·in/out, times 2·out. In integers,
    # because float32 positions of a few thousand pixels are too coarse for weights this exact.
    distance = (2 * (source - start) + 1) * out_size - (2 * target + 1) * in_size
    stretch = jnp.maximum(2 * jnp.maximum(in_size, out_size), 1)
    weights = _keys_cubic(jnp.abs(distance).astype(jnp.float32) / stretch.astype(jnp.float32))
    inside = (source >= start) & (source < stop) & (target < out_size)
    weights = jnp.where(inside, weights, 0.0)
    total = weights.sum(axis=1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def crop_resize(
    image: UInt8[Array, "H W 3"],
    crop: Int32[Array, " 4"],
    target: Int32[Array, " 2"],
    *,
    canvas: tuple[int, int],
    pass_order: PassOrder = "pillow",
) -> UInt8[Array, "Hc Wc 3"]:
    """Crops and resizes as Pillow's `image.crop(crop).resize((width, height), BICUBIC)`.

    Equal to Pillow within one grey level (mean difference at most 0.005): the same two passes, each
    rounded and clipped to a byte. Pillow weighs in fixed point, so an exact half may round either
    way; enlarging can stretch that to two levels, in about one value of three million of white
    noise. Work grows with the area of the crop, and no float copy of the image is made.

    Args:
      image: pixels.
      crop: left, top, right, bottom in pixels, clamped to the array.
      target: height and width of the result, at most `canvas`.
      canvas: static height and width of the returned array.
      pass_order: "pillow" follows Pillow ≥ 13, which takes height first where that loses more than
        twice as many pixels as width (tall crops); "width_first" is every earlier Pillow. On such
        crops the two differ by up to a dozen levels around hard edges, elsewhere not at all.

    Returns:
      The result in the top left corner of the canvas, zero elsewhere.

    Raises:
      ValueError: unknown `pass_order`, or extents too large for `resample_matrix`.
    """

    def load_tile(row: Array, column: Array, shape: tuple[int, int]) -> Array:
        return lax.dynamic_slice(image, (row, column, 0), (*shape, 3)).transpose(0, 2, 1)

    return _crop_resize(
        load_tile, (image.shape[0], image.shape[1]), crop, target, canvas, pass_order
    )


def patchify(
    canvases: UInt8[Array, "S Hc Wc 3"],
    slot: Int32[Array, " N"],
    row_col: Int32[Array, "N 2"],
    *,
    patch_size: int,
    temporal_patch_size: int,
) -> Float32[Array, "N D"]:
    """Cuts one row's canvases into the patches a vision tower reads, in the order the caller lists.

    Args:
      canvases: rendered views.
      slot: the canvas each patch comes from; -1 = padding.
      row_col: position of each patch on its canvas, in patches.
      patch_size: p, pixels a side.
      temporal_patch_size: T, how often the frame is repeated.

    Returns:
      Flattened (3, T, p, p) patches, D = 3·T·p·p, channel slowest, as x/127.5 - 1 (bit for bit what
      the PIL image processor of `transformers` computes); rows of zeros for padding.

    Raises:
      ValueError: the canvas does not divide into patches.
    """
    slots, height, width, channels = canvases.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"canvas {height}×{width} is not a multiple of patch_size {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    grid = canvases.reshape(slots, rows, patch_size, columns, patch_size, channels)
    # Patches are gathered as bytes, and only then become (four times larger) floats.
    flat = grid.transpose(0, 1, 3, 5, 2, 4).reshape(slots * rows * columns, channels, 1, -1)
    index = (slot * rows + row_col[:, 0]) * columns + row_col[:, 1]
    valid = slot >= 0
    pixels = _normalize(flat[jnp.where(valid, index, 0)])
    pixels = jnp.where(valid[:, None, None, None], pixels, 0.0)
    shape = (slot.shape[0], channels, temporal_patch_size, patch_size * patch_size)
    return jnp.broadcast_to(pixels, shape).reshape(slot.shape[0], -1)


def render_patches(
    images: UInt8[Array, "I H W 3"],
    sizes: Int32[Array, "I 2"],
    views: Views,
    slot: Int32[Array, "B N"],
    row_col: Int32[Array, "B N 2"],
    *,
    canvas: tuple[int, int],
    patch_size: int,
    temporal_patch_size: int,
    pass_order: PassOrder = "pillow",
    implementation: str = "xla",
    chunk: int | None = None,
) -> Float32[Array, "B N D"]:
    """Renders every view (outlines at full resolution, crop, resize) and cuts it into patches.

    The views are rendered in a loop over B·S. A mesh that shards rows must call this under
    `jax.shard_map`: the partitioner would otherwise replicate the loop on every device.

    Args:
      images: padded source images.
      sizes: height and width of each image's valid region.
      views: what to render, leading axes [B, S].
      slot: the view of its row that each patch comes from; -1 = padding.
      row_col: position of each patch in its view, in patches.
      canvas: static height and width, at least the largest target, multiples of `patch_size`.
      patch_size: p, pixels a side.
      temporal_patch_size: T, how often the frame is repeated.
      pass_order: as in `crop_resize`.
      implementation: "xla".
      chunk: views rendered at once; None = one after another. A group shares larger matrix products
        but does for every view the work of its largest, in both pass orders, unused slots included;
        on a CPU it is several times slower.

    Returns:
      Flattened (3, T, p, p) patches, D = 3·T·p·p, as `patchify`.

    Raises:
      ValueError: unknown `implementation` or `pass_order`, or a canvas that does not divide into
        patches.
    """
    if implementation != "xla":
        raise ValueError(f"implementation {implementation!r} is unknown; available: 'xla'")
    batch, slots = views.image_index.shape
    extent = (images.shape[1], images.shape[2])

    def render(view: Views) -> Array:
        def load_tile(row: Array, column: Array, shape: tuple[int, int]) -> Array:
            start = (view.image_index, row, column, 0)
            tile = lax.dynamic_slice(images, start, (1, *shape, 3))[0].transpose(0, 2, 1)
            # Painting tile by tile gives the pixels of a painted image without copying the image.
            outlines = view.outlines, view.outline_count, view.line_width
            return lax.cond(
                view.outline_count > 0,
                lambda: _paint(tile, row, column, sizes[view.image_index], *outlines),
                lambda: tile,
            )

        return lax.cond(
            jnp.all(view.target > 0),
            lambda: _crop_resize(load_tile, extent, view.crop, view.target, canvas, pass_order),
            lambda: jnp.zeros((*canvas, 3), jnp.uint8),
        )

    flat_views = jax.tree.map(lambda leaf: leaf.reshape(batch * slots, *leaf.shape[2:]), views)
    canvases = lax.map(render, flat_views, batch_size=chunk).reshape(batch, slots, *canvas, 3)
    cut = partial(patchify, patch_size=patch_size, temporal_patch_size=temporal_patch_size)
    return jax.vmap(cut)(canvases, slot, row_col)


def _paint(
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
        drawn = (number < count) & (x0 <= x1) & (y0 <= y1) & (y < size[0])

        across = (x >= x0) & (x <= x1) & (x < size[1])
        bars = drawn & (((y >= y0) & (y < y0 + line_width)) | ((y <= y1) & (y > y1 - line_width)))
        # Pillow draws the uprights from y0 + width up to, not including, y1 - width + 1. Where the
        # bars overlap it draws upwards, so a box shorter than its line spills below itself.
        begin, end = y0 + line_width, y1 - line_width + 1
        between = drawn & (((y >= begin) & (y < end)) | ((y <= begin) & (y > end)))
        # Likewise a box narrower than its line spills sideways, but between the bars only.
        uprights = ((x >= x0) & (x < x0 + line_width)) | ((x <= x1) & (x > x1 - line_width))
        uprights &= x < size[1]

        painted = _pack_bits(bars)[:, None] & _pack_bits(across)
        painted |= _pack_bits(between)[:, None] & _pack_bits(uprights)
        last = _BOXES_PER_WORD - 1 - lax.clz(painted)
        tile = jnp.where((painted != 0)[:, None], _outline_color(last[:, None]), tile)
    return tile


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


class _Axis(NamedTuple):
    """One axis of a resize: pixels [start, stop) of `extent` become `size` pixels of `canvas`."""

    start: Int32[Array, ""]
    stop: Int32[Array, ""]
    size: Int32[Array, ""]
    extent: int
    canvas: int

    @property
    def length(self) -> Int32[Array, ""]:
        return self.stop - self.start

    @property
    def loss(self) -> Int32[Array, ""]:
        """How many pixels the axis loses."""
        return self.length - self.size

    @property
    def tile(self) -> int:
        return min(_TILE, self.extent)

    def matrix(self) -> Float32[Array, "canvas extent"]:
        start, stop, size, extent, canvas = self
        return resample_matrix(start, stop, size, in_extent=extent, out_extent=canvas)


def _crop_resize(
    load_tile: _LoadTile,
    extent: tuple[int, int],
    crop: Int32[Array, " 4"],
    target: Int32[Array, " 2"],
    canvas: tuple[int, int],
    pass_order: PassOrder,
) -> UInt8[Array, "Hc Wc 3"]:
    """`crop_resize` of an image of `extent` (height, width) that is only ever seen as tiles."""
    if pass_order not in get_args(PassOrder):
        raise ValueError(f"pass_order {pass_order!r} is unknown; available: {get_args(PassOrder)}")
    left, top, right, bottom = jnp.clip(crop, 0, jnp.array([*extent[::-1], *extent[::-1]]))
    vertical = _Axis(top, bottom, target[0], extent[0], canvas[0])
    horizontal = _Axis(left, right, target[1], extent[1], canvas[1])

    def width_first() -> Array:
        return _resize_by_tiles(load_tile, vertical, horizontal).swapaxes(1, 2)

    if pass_order == "width_first":
        return width_first()

    def load_turned(row: Array, column: Array, shape: tuple[int, int]) -> Array:
        return load_tile(column, row, (shape[1], shape[0])).transpose(2, 1, 0)

    def height_first() -> Array:
        return _resize_by_tiles(load_turned, horizontal, vertical).transpose(2, 0, 1)

    tall = (vertical.loss > 0) & (vertical.loss > 2 * horizontal.loss)
    return lax.cond(tall, height_first, width_first)


def _resize_by_tiles(
    load_tile: _LoadTile, vertical: _Axis, horizontal: _Axis
) -> UInt8[Array, "Hc 3 Wc"]:
    """Resizes along width, then along height.

    A band of tiles goes through the width pass, is rounded, and joins the height pass's running
    sum. Only the tiles that the crop touches are visited.
    """
    rows, columns = vertical.tile, horizontal.tile
    down, across = vertical.matrix(), horizontal.matrix()

    def add_band(i: Array, total: Array) -> Array:
        top = vertical.start + i * rows
        row = jnp.minimum(top, vertical.extent - rows)

        def add_tile(j: Array, band: Array) -> Array:
            left = horizontal.start + j * columns
            column = jnp.minimum(left, horizontal.extent - columns)
            # Channels stand in the middle, so that the pass is one product of two plain matrices.
            lines = load_tile(row, column, (rows, columns)).reshape(rows * 3, columns)
            return _add_block(band, lines.astype(jnp.float32), across, horizontal, left, axis=1)

        band = jnp.zeros((rows * 3, horizontal.canvas), jnp.float32)
        band = lax.fori_loop(0, _ceil_div(horizontal.length, columns), add_tile, band)
        band = _round_to_byte(band).reshape(rows, 3 * horizontal.canvas)
        return _add_block(total, band, down, vertical, top, axis=0)

    total = jnp.zeros((vertical.canvas, 3 * horizontal.canvas), jnp.float32)
    total = lax.fori_loop(0, _ceil_div(vertical.length, rows), add_band, total)
    return _round_to_byte(total).astype(jnp.uint8).reshape(vertical.canvas, 3, horizontal.canvas)


def _add_block(
    total: Float32[Array, "..."],
    source: Float32[Array, "..."],
    matrix: Float32[Array, "canvas extent"],
    along: _Axis,
    begin: Int32[Array, ""],
    *,
    axis: int,
) -> Float32[Array, "..."]:
    """Adds to `total` what the block of source pixels from `begin` on contributes along `axis`.

    A resampling matrix is banded, so only blocks of outputs within the kernel's reach are visited,
    a tenth of the arithmetic on 4K images. A block that would leave its array is moved back into
    it, and what its neighbour has already counted gets weight zero.
    """
    size, block = source.shape[axis], min(_TILE, along.canvas)
    column = jnp.minimum(begin, along.extent - size)
    fresh_column = column + jnp.arange(size) >= begin

    def add(i: int | Array, total: Array) -> Array:
        row = jnp.minimum(i * block, along.canvas - block)
        fresh_row = row + jnp.arange(block) >= i * block
        weights = lax.dynamic_slice(matrix, (row, column), (block, size))
        weights = jnp.where(fresh_row[:, None] & fresh_column, weights, 0.0)
        product = _dot(weights, source) if axis == 0 else _dot(source, weights.T)
        old = lax.dynamic_slice_in_dim(total, row, block, axis)
        return lax.dynamic_update_slice_in_dim(total, old + product, row, axis)

    if block == along.canvas:
        return add(0, total)
    # Output y takes from the pixels nearer than two (output or source) pixels to its centre.
    offset, length = begin - along.start, jnp.maximum(along.length, 1)
    reach = 2 * jnp.maximum(along.length, along.size)
    first = jnp.maximum(offset * along.size - reach, 0) // length
    last = jnp.minimum(_ceil_div((offset + size) * along.size + reach, length), along.size)
    return lax.fori_loop(first // block, _ceil_div(last, block), add, total)


def _keys_cubic(t: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Keys' cubic kernel at distance t ≥ 0, a = -0.5."""
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return jnp.where(t < 1.0, near, jnp.where(t < 2.0, far, 0.0))


def _round_to_byte(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Pillow's rounding after each pass: half up, clipped; the values stay float32."""
    return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)


def _normalize(x: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """x/127.5 - 1 with the division correctly rounded.

    XLA divides by a constant through its rounded reciprocal, one unit in the last place off for
    most bytes. Here the reciprocal has two parts, the first so short that its product is exact.
    """
    high = np.float32(np.float16(1 / 127.5))
    low = np.float32(1 / 127.5 - np.float64(high))
    value = x.astype(jnp.float32)
    return (value * high + value * low) - 1.0


def _dot(a: Float32[Array, "m k"], b: Float32[Array, "k n"]) -> Float32[Array, "m n"]:
    """Full float32: an accelerator's default of bfloat16 is off by whole grey levels."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _ceil_div(a: Array, b: int | Array) -> Array:
    return (a + b - 1) // b
