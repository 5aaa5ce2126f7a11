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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from p2r_jax.ops.outlines import paint

PassOrder: TypeAlias = Literal["pillow", "width_first"]
Implementation: TypeAlias = Literal["xla", "pallas_tpu", "pallas_tpu_interpret"]

# How resizing is divided, best of those tried on a CPU: source rows at a time; along the width,
# outputs at a time and source pixels that are weighed for them; along the height, outputs.
_BAND, _OUTPUTS, _WINDOW, _LINES = 64, 32, 64, 64

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


def check_extents(in_extent: int, out_extent: int) -> None:
    """Raises ValueError if pixel positions between axes of these lengths would overflow int32."""
    if 2 * in_extent * out_extent >= 2**31:
        raise ValueError(
            f"in_extent {in_extent} × out_extent {out_extent} overflows int32; their product must "
            "stay below 2**30"
        )


def cubic_weights(
    source: Int32[Array, "*n"],
    target: Int32[Array, "*m"],
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
    out_size: Int32[Array, ""],
) -> Float32[Array, "*nm"]:
    """What pixels of the crop [start, stop) of an axis contribute to the `out_size` it becomes.

    Pillow's BICUBIC: Keys' cubic with a = -0.5, widened by the scale when shrinking. Zero for
    pixels outside the crop and targets from `out_size` on; to be divided by their sum over the
    source.
    """
    in_size = stop - start
    # Distance between pixel centres, (x + ½ - start) - (y + ½)·in/out, times 2·out. In integers,
    # because float32 positions of a few thousand pixels are too coarse for weights this exact.
    distance = (2 * (source - start) + 1) * out_size - (2 * target + 1) * in_size
    stretch = jnp.maximum(2 * jnp.maximum(in_size, out_size), 1)
    weights = _keys_cubic(jnp.abs(distance).astype(jnp.float32) / stretch.astype(jnp.float32))
    inside = (source >= start) & (source < stop) & (target < out_size)
    return jnp.where(inside, weights, 0.0)


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
      ValueError: unknown `pass_order`, or extents too large for int32.
    """

    def load_tile(row: Array, column: Array, shape: tuple[int, int]) -> Array:
        return _tile(image.reshape(1, image.shape[0], -1), jnp.int32(0), row, column, shape)

    extent = image.shape[0], image.shape[1]
    return _crop_resize(load_tile, extent, crop, target, canvas, pass_order).swapaxes(1, 2)


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
    return _cut(
        canvases.swapaxes(2, 3),
        slot,
        row_col,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
    )


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
    implementation: Implementation = "xla",
    chunk: int | None = None,
) -> Float32[Array, "B N D"]:
    """Renders every view (outlines at full resolution, crop, resize) and cuts it into patches.

    The views are rendered in a loop over B·S. A mesh that shards rows must call this under
    `jax.shard_map`: the partitioner would otherwise replicate the loop on every device.

    Args:
      images: padded source images; for a kernel as `ops.image_kernel.to_kernel_layout` returns
        them, [I, 3, h, w].
      sizes: height and width of each image's valid region.
      views: what to render, leading axes [B, S].
      slot: the view of its row that each patch comes from; -1 = padding.
      row_col: position of each patch in its view, in patches.
      canvas: static height and width, at least the largest target, multiples of `patch_size`.
      patch_size: p, pixels a side.
      temporal_patch_size: T, how often the frame is repeated.
      pass_order: as in `crop_resize`.
      implementation: "xla" runs anywhere and is the route for GPUs (tested with the compiler for
        H100). On a TPU it would copy the images; "pallas_tpu" is the kernel for that, for patches
        of 16 pixels, none of them listed twice. "pallas_tpu_interpret" runs it on any machine.
      chunk: for "xla", views rendered at once; None = one after another. A group shares larger
        matrix products but does for every view the work of its largest, in both pass orders, unused
        slots included; on a CPU it is several times slower.

    Returns:
      Flattened (3, T, p, p) patches, D = 3·T·p·p, as `patchify`.

    Raises:
      ValueError: unknown `implementation` or `pass_order`, a canvas that does not divide into
        patches, extents too large for int32, or what the kernel cannot do.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation {implementation!r} is unknown; available: {get_args(Implementation)}"
        )
    _check_pass_order(pass_order)
    _check_canvas(canvas, patch_size)
    if implementation != "xla":
        from p2r_jax.ops import image_kernel  # Which builds upon this module.

        channels = image_kernel.render_listed(
            images,
            sizes,
            views,
            slot,
            row_col,
            canvas=canvas,
            patch_size=patch_size,
            turn_tall=pass_order == "pillow",
            interpret=implementation == "pallas_tpu_interpret",
        )
        return _frames(channels, slot >= 0, temporal_patch_size)

    batch, slots = views.image_index.shape
    extent = (images.shape[1], images.shape[2])
    lines = images.reshape(*images.shape[:2], -1)

    def render(view: Views) -> Array:
        def load_tile(row: Array, column: Array, shape: tuple[int, int]) -> Array:
            tile = _tile(lines, view.image_index, row, column, shape)
            # Painting tile by tile gives the pixels of a painted image without copying the image.
            outlines = view.outlines, view.outline_count, view.line_width
            return lax.cond(
                view.outline_count > 0,
                lambda: paint(tile, row, column, sizes[view.image_index], *outlines),
                lambda: tile,
            )

        return lax.cond(
            jnp.all(view.target > 0),
            lambda: _crop_resize(load_tile, extent, view.crop, view.target, canvas, pass_order),
            lambda: jnp.zeros((canvas[0], 3, canvas[1]), jnp.uint8),
        )

    flat_views = jax.tree.map(lambda leaf: leaf.reshape(batch * slots, *leaf.shape[2:]), views)
    canvases = lax.map(render, flat_views, batch_size=chunk)
    canvases = canvases.reshape(batch, slots, *canvases.shape[1:])
    cut = partial(_cut, patch_size=patch_size, temporal_patch_size=temporal_patch_size)
    return jax.vmap(cut)(canvases, slot, row_col)


def _check_pass_order(pass_order: str) -> None:
    if pass_order not in get_args(PassOrder):
        raise ValueError(f"pass_order {pass_order!r} is unknown; available: {get_args(PassOrder)}")


def _check_canvas(canvas: tuple[int, int], patch_size: int) -> None:
    height, width = canvas
    if height % patch_size or width % patch_size:
        raise ValueError(f"canvas {height}×{width} is not a multiple of patch_size {patch_size}")


def _cut(
    canvases: UInt8[Array, "S Hc 3 Wc"],
    slot: Int32[Array, " N"],
    row_col: Int32[Array, "N 2"],
    *,
    patch_size: int,
    temporal_patch_size: int,
) -> Float32[Array, "N D"]:
    """`patchify` of canvases with their channels in the middle, as resizing leaves them."""
    slots, height, channels, width = canvases.shape
    _check_canvas((height, width), patch_size)
    rows, columns = height // patch_size, width // patch_size
    grid = canvases.reshape(slots, rows, patch_size, channels, columns, patch_size)
    # Patches are gathered as bytes, and only then become (four times larger) floats.
    flat = grid.transpose(0, 1, 4, 3, 2, 5).reshape(slots * rows * columns, channels, -1)
    index = (slot * rows + row_col[:, 0]) * columns + row_col[:, 1]
    valid = slot >= 0
    pixels = flat[jnp.where(valid, index, 0)]
    return _frames([pixels[:, c] for c in range(channels)], valid, temporal_patch_size)


def _frames(
    channels: Sequence[UInt8[Array, "*batch d"]], valid: Bool[Array, "*batch"], frames: int
) -> Float32[Array, "*batch D"]:
    """Patches as the vision tower reads them: normalised, every frame the same, padding zero."""
    values = [jnp.where(valid[..., None], normalize(channel), 0.0) for channel in channels]
    # Side by side rather than reshaped, which a TPU could do only by writing them twice.
    return jnp.concatenate([value for value in values for _ in range(frames)], axis=-1)


def _tile(
    lines: UInt8[Array, "I H W*3"], image: Array, row: Array, column: Array, shape: tuple[int, int]
) -> UInt8[Array, "h 3 w"]:
    """Some pixels of an image, their channels moved to the middle.

    Taken from whole lines of bytes, as of [H, W, 3] the compiler for GPUs would rather transpose
    the whole image first.
    """
    height, width = shape
    tile = lax.dynamic_slice(lines, (image, row, 3 * column), (1, height, 3 * width))
    return tile.reshape(height, width, 3).transpose(0, 2, 1)


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

    def weights(self, source: Array, target: Array) -> Float32[Array, "*n"]:
        return cubic_weights(source, target, self.start, self.stop, self.size)


def _crop_resize(
    load_tile: _LoadTile,
    extent: tuple[int, int],
    crop: Int32[Array, " 4"],
    target: Int32[Array, " 2"],
    canvas: tuple[int, int],
    pass_order: PassOrder,
) -> UInt8[Array, "Hc 3 Wc"]:
    """`crop_resize` of an image of `extent` (height, width) that is only ever seen as tiles."""
    _check_pass_order(pass_order)
    for source, size in zip(extent, canvas, strict=True):
        check_extents(source, size)
    left, top, right, bottom = jnp.clip(crop, 0, jnp.array([*extent[::-1], *extent[::-1]]))
    vertical = _Axis(top, bottom, target[0], extent[0], canvas[0])
    horizontal = _Axis(left, right, target[1], extent[1], canvas[1])

    def width_first() -> Array:
        return _resize_by_tiles(load_tile, vertical, horizontal)

    if pass_order == "width_first":
        return width_first()

    def load_turned(row: Array, column: Array, shape: tuple[int, int]) -> Array:
        return load_tile(column, row, (shape[1], shape[0])).transpose(2, 1, 0)

    def height_first() -> Array:
        return _resize_by_tiles(load_turned, horizontal, vertical).transpose(2, 1, 0)

    tall = (vertical.loss > 0) & (vertical.loss > 2 * horizontal.loss)
    return lax.cond(tall, height_first, width_first)


def _resize_by_tiles(
    load_tile: _LoadTile, vertical: _Axis, horizontal: _Axis
) -> UInt8[Array, "Hc 3 Wc"]:
    """Resizes along width, then along height.

    A band of rows goes through the width pass, is rounded, and joins the height pass's running
    sum. Only pixels that the crop touches are visited, for outputs that they contribute to.
    """
    rows = min(_BAND, vertical.extent)

    def add_band(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        top = vertical.start + i * rows
        row = jnp.minimum(top, vertical.extent - rows)
        band = _resize_band(partial(load_tile, row), rows, horizontal)
        return _add_band(sums, band.reshape(rows, -1), vertical, top)

    sums = jnp.zeros((vertical.canvas, 3 * horizontal.canvas)), jnp.zeros((vertical.canvas, 1))
    sums = lax.fori_loop(0, _ceil_div(vertical.length, rows), add_band, sums)
    return weighted_byte(*sums).astype(jnp.uint8).reshape(vertical.canvas, 3, horizontal.canvas)


def _resize_band(
    load_columns: Callable[[Array, tuple[int, int]], Array], rows: int, along: _Axis
) -> Float32[Array, "rows*3 canvas"]:
    """The width pass of some rows, block by block of outputs."""
    block, window = min(_OUTPUTS, along.canvas), min(_WINDOW, along.extent)

    def resize_block(i: Array, band: Array) -> Array:
        begin = jnp.minimum(i * block, along.canvas - block)
        target = begin + jnp.arange(block)
        low, high = source_span(along.start, along.stop, along.size, begin, begin + block)

        def add_window(j: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            left = low + j * window
            column = jnp.minimum(left, along.extent - window)
            source = column + jnp.arange(window)[:, None]
            # A window that would leave the image is moved back; some of it has been counted.
            weights = jnp.where(source >= left, along.weights(source, target), 0.0)
            # Channels stand in the middle, so that the pass is one product of two plain matrices.
            pixels = load_columns(column, (rows, window)).reshape(rows * 3, window)
            product = _dot(pixels.astype(jnp.float32), weights)
            return sums[0] + product, sums[1] + weights.sum(axis=0)

        sums = jnp.zeros((rows * 3, block)), jnp.zeros(block)
        sums = lax.fori_loop(0, _ceil_div(high - low, window), add_window, sums)
        return lax.dynamic_update_slice_in_dim(band, weighted_byte(*sums), begin, axis=1)

    band = jnp.zeros((rows * 3, along.canvas))
    return lax.fori_loop(0, _ceil_div(along.size, block), resize_block, band)


def _add_band(
    sums: tuple[Float32[Array, "canvas n"], Float32[Array, "canvas 1"]],
    band: Float32[Array, "rows n"],
    along: _Axis,
    begin: Int32[Array, ""],
) -> tuple[Float32[Array, "canvas n"], Float32[Array, "canvas 1"]]:
    """Adds what the band of rows from `begin` on contributes to the height pass, and its weights.

    Only blocks of outputs within the kernel's reach are visited. A block or band that would leave
    its array is moved back into it, and what its neighbour has already counted gets weight zero.
    """
    rows, block = band.shape[0], min(_LINES, along.canvas)
    source = jnp.minimum(begin, along.extent - rows) + jnp.arange(rows)

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(i * block, along.canvas - block)
        target = first + jnp.arange(block)[:, None]
        fresh = (target >= i * block) & (source >= begin)
        weights = jnp.where(fresh, along.weights(source, target), 0.0)
        new = _dot(weights, band), weights.sum(axis=1, keepdims=True)
        old = (lax.dynamic_slice_in_dim(total, first, block) for total in sums)
        total, weight = (
            lax.dynamic_update_slice_in_dim(total, before + more, first, axis=0)
            for total, before, more in zip(sums, old, new, strict=True)
        )
        return total, weight

    # Output y takes from the pixels nearer than two (output or source) pixels to its centre.
    offset, length = begin - along.start, jnp.maximum(along.length, 1)
    reach = 2 * jnp.maximum(along.length, along.size)
    first = jnp.maximum(offset * along.size - reach, 0) // length
    last = jnp.minimum(_ceil_div((offset + rows) * along.size + reach, length), along.size)
    return lax.fori_loop(first // block, _ceil_div(last, block), add, sums)


def source_span(
    start: Array, stop: Array, out_size: Array, begin: Array, end: Array
) -> tuple[Array, Array]:
    """First and past-the-last source pixel that outputs [begin, end) below `out_size` depend on.

    Nothing, so equal, for no outputs or an empty crop [start, stop). Shapes are broadcast.
    """
    in_size, divisor = stop - start, jnp.maximum(2 * out_size, 1)
    end = jnp.minimum(end, out_size)
    # Output y takes from the pixels nearer than two (output or source) pixels to its centre.
    reach = 4 * jnp.maximum(in_size, out_size)
    low = jnp.maximum(((2 * begin + 1) * in_size - reach - out_size) // divisor, 0)
    high = jnp.minimum(((2 * end - 1) * in_size + reach - out_size) // divisor + 1, in_size)
    some = (begin < end) & (in_size > 0)
    return start + low, start + jnp.where(some, high, low)


def weighted_byte(total: Array, weight: Array) -> Float32[Array, "*n"]:
    """The weighted mean as Pillow rounds it after each pass; zero where there is no weight."""
    return _round_to_byte(total / jnp.where(weight == 0.0, 1.0, weight))


def _keys_cubic(t: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Keys' cubic kernel at distance t ≥ 0, a = -0.5."""
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return jnp.where(t < 1.0, near, jnp.where(t < 2.0, far, 0.0))


def _round_to_byte(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Pillow's rounding after each pass: half up, clipped; the values stay float32."""
    return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)


def normalize(x: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """x/127.5 - 1 with the division correctly rounded.

    XLA divides by a constant through its rounded reciprocal, one unit in the last place off for
    most bytes. Here the reciprocal has two parts, the first so short that its product is exact.
    """
    high = np.float32(np.float16(1 / 127.5))
    low = np.float32(1 / 127.5 - np.float64(high))
    value = x.astype(jnp.float32)
    # Bytes fit eight bits. The compiler for TPUs does not know; it would add the parts up first.
    same = lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    return (value * high + same * low) - 1.0


def _dot(a: Float32[Array, "m k"], b: Float32[Array, "k n"]) -> Float32[Array, "m n"]:
    """Full float32: an accelerator's default of bfloat16 is off by whole grey levels."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _ceil_div(a: Array, b: int | Array) -> Array:
    return (a + b - 1) // b
