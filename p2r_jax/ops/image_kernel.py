"""A Pallas TPU kernel that renders views of uint8 images in HBM and leaves them as listed patches.

Work comes in jobs: a block of 128×128 pixels of one view's canvas. A job copies in, 128×128 at a
time and one ahead of the arithmetic, the tiles of the source that its pixels depend on, paints the
outlines onto them, and sums up what they contribute: along the first axis into one line of tiles,
which is rounded to bytes as Pillow rounds between its passes, then along the second. Nothing but
those tiles and blocks is ever in VMEM, whatever the sizes of image and canvas. The finished block
is cut into patches, three bytes a number, and each goes by its own copy to its place in the list.

Matrix products are exact to float32: bytes fit bfloat16 as they are, and a weight is the sum of
three bfloat16 numbers, so three passes of the matrix unit do what would otherwise take six.

XLA has the rest: which blocks have a listed patch (no others become jobs), which tiles they need,
and at the end bytes to normalised frames, where the float32 patches are written anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int32, UInt8

from p2r_jax.ops.image import (
    Views,
    check_extents,
    cubic_weights,
    source_span,
    weighted_byte,
)
from p2r_jax.ops.outlines import OUTLINE_COLORS, outline_parts

TILE = 128
"""Sides of source tiles and canvas blocks: lanes of a register, and width of a matrix unit."""
PATCH = 16
ACROSS = TILE // PATCH
"""Patches along a side of a block."""
PATCHES = ACROSS**2
HALVES = PATCH**2 // TILE
"""Rows of 128 lanes that hold one channel of a patch."""
ROWS = 8
"""Rows of a register: patches lie that far apart until they are copied out."""

# Numbers of a view, in front of its outlines with five each; and of a block, behind its places.
_VIEW = 12
_BLOCK = PATCHES + 6


def to_kernel_layout(images: UInt8[Array, "I H W 3"]) -> UInt8[Array, "I 3 h w"]:
    """Images as the kernel reads them: a plane per channel, padded with zeros to whole tiles.

    Do this once, where the images are uploaded; h and w are multiples of 128 pixels.
    """
    height, width = images.shape[1:3]
    padding = ((0, 0), (0, 0), (0, -height % TILE), (0, -width % TILE))
    return jnp.pad(jnp.moveaxis(images, 3, 1), padding)


def render_listed(
    images: UInt8[Array, "I 3 h w"],
    sizes: Int32[Array, "I 2"],
    views: Views,
    slot: Int32[Array, "B N"],
    row_col: Int32[Array, "B N 2"],
    *,
    canvas: tuple[int, int],
    patch_size: int,
    turn_tall: bool,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[UInt8[Array, "B N P"]]:
    """Red, green and blue of every listed patch; padding (slot -1) is whatever memory holds.

    Args:
      images: see `to_kernel_layout`.
      sizes, views, slot, row_col, canvas: as for `ops.image.render_patches`. A patch of a view must
        not be listed twice: one of the two would be left out.
      patch_size: 16.
      turn_tall: tall crops are resized along their height first, as Pillow 13 does.
      interpret: run in Python on any machine.

    Raises:
      ValueError: another patch size, images in another layout, or extents too large for int32.
    """
    if patch_size != PATCH:
        raise ValueError(
            f"the image kernel cuts patches of {PATCH} pixels, not {patch_size}: choose "
            "implementation 'xla'"
        )
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % TILE or images.shape[3] % TILE:
        raise ValueError(
            f"images {images.shape} are not [I, 3, h, w] with multiples of {TILE} pixels, as the "
            "image kernel reads them: pass ops.image_kernel.to_kernel_layout(images)"
        )
    extent = images.shape[2], images.shape[3]
    for source, target in zip(extent, canvas, strict=True):
        check_extents(source, target)
    batch, listed = slot.shape
    flat = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), views)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), flat)
    grid = pl.cdiv(canvas[0], TILE), pl.cdiv(canvas[1], TILE)

    crop = jnp.clip(flat.crop, 0, jnp.array([*extent[::-1], *extent[::-1]], jnp.int32))
    used = jnp.all(flat.target > 0, axis=-1)
    places = _places(slot, row_col, views.image_index.shape[1], grid)
    view_numbers = _view_numbers(flat, crop, sizes, turn_tall)
    block_numbers = _block_numbers(places, crop, flat.target, used, grid)
    needed = jnp.any(places >= 0, axis=-1).reshape(-1)
    (jobs,) = jnp.nonzero(needed, size=needed.shape[0], fill_value=0)

    per_view = grid[0] * grid[1]
    out = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((batch * listed, HALVES, TILE), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(needed.sum(dtype=jnp.int32),),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, block_numbers.shape[2]),
                    lambda i, jobs: (jobs[i], 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                pl.BlockSpec(
                    (1, 1, view_numbers.shape[2]),
                    lambda i, jobs: (lax.div(jobs[i], per_view), 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((2, 3, TILE, TILE), jnp.uint8),
                pltpu.VMEM((3, TILE, TILE), jnp.float32),
                pltpu.VMEM((TILE, TILE), jnp.float32),
                pltpu.VMEM((3, TILE, TILE), jnp.float32),
                pltpu.VMEM((TILE, TILE), jnp.float32),
                pltpu.VMEM((TILE, TILE), jnp.int32),
                pltpu.VMEM((PATCHES * ROWS, TILE), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="render_patches",
    )(jobs.astype(jnp.int32), block_numbers, view_numbers, images)
    # Rows of registers become rows of patches while they are few: XLA would do it with floats.
    pixels = lax.optimization_barrier(out.reshape(batch, listed, PATCH**2))
    return [((pixels >> shift) & 255).astype(jnp.uint8) for shift in (0, 8, 16)]


def _places(
    slot: Int32[Array, "B N"], row_col: Int32[Array, "B N 2"], slots: int, grid: tuple[int, int]
) -> Int32[Array, "blocks PATCHES"]:
    """Where each patch of each block goes among all listed ones; -1 = nowhere.

    Patches of a block are numbered column by column.
    """
    batch, listed = slot.shape
    rows, columns = grid
    place = jnp.arange(batch * listed, dtype=jnp.int32).reshape(batch, listed)
    shape = (batch, slots, rows * ACROSS, columns * ACROSS)
    row = jnp.arange(batch)[:, None]
    at = (row, jnp.where(slot < 0, slots, slot), row_col[..., 0], row_col[..., 1])
    table = jnp.full(shape, -1, jnp.int32).at[at].set(place, mode="drop")
    table = table.reshape(batch * slots, rows, ACROSS, columns, ACROSS)
    return table.transpose(0, 1, 3, 4, 2).reshape(-1, PATCHES)


def _view_numbers(
    views: Views, crop: Int32[Array, "V 4"], sizes: Int32[Array, "I 2"], turn_tall: bool
) -> Int32[Array, "V 1 n"]:
    """What the kernel has to know of each view, in the order `_kernel` unpacks it."""
    size = jnp.asarray(sizes, jnp.int32)[views.image_index]
    lost = crop[:, 2:] - crop[:, :2] - views.target[:, ::-1]
    tall = turn_tall & (lost[:, 1] > 0) & (lost[:, 1] > 2 * lost[:, 0])
    scalars = (views.image_index, tall, views.outline_count, views.line_width)
    most = views.outlines.shape[1]
    colors = jnp.array([r | g << 8 | b << 16 for r, g, b in OUTLINE_COLORS], jnp.int32)
    colors = jnp.broadcast_to(
        colors[jnp.arange(most) % len(OUTLINE_COLORS), None], (*views.outlines.shape[:2], 1)
    )
    outlines = jnp.concatenate([views.outlines, colors], axis=-1).reshape(len(crop), -1)
    numbers = [jnp.stack(scalars, axis=-1), crop, views.target, size, outlines]
    return jnp.concatenate(numbers, axis=-1).astype(jnp.int32)[:, None]


def _block_numbers(
    places: Int32[Array, "blocks PATCHES"],
    crop: Int32[Array, "V 4"],
    target: Int32[Array, "V 2"],
    used: Bool[Array, " V"],
    grid: tuple[int, int],
) -> Int32[Array, "blocks 1 n"]:
    """Places of patches, position on the canvas, and first and number of source tiles."""
    shape = (len(crop), *grid)
    per_axis = []
    for axis, blocks in enumerate(grid):
        start, stop = crop[:, 1 - axis], crop[:, 3 - axis]
        begin = jnp.arange(blocks, dtype=jnp.int32) * TILE
        first, count = _source_tiles(start, stop, target[:, axis], begin)
        count = jnp.where(used[:, None], count, 0)
        begin = jnp.broadcast_to(begin, first.shape)
        spread = [jnp.expand_dims(x, 2 - axis) for x in (begin, first, count)]
        per_axis += [jnp.broadcast_to(x, shape).reshape(-1, 1) for x in spread]
    return jnp.concatenate([places, *per_axis], axis=-1)[:, None]


def _source_tiles(
    start: Int32[Array, " V"],
    stop: Int32[Array, " V"],
    out_size: Int32[Array, " V"],
    begin: Int32[Array, " n"],
) -> tuple[Int32[Array, "V n"], Int32[Array, "V n"]]:
    """First and number of the tiles of an axis that the block from `begin` on depends on."""
    axis = start[:, None], stop[:, None], out_size[:, None]
    low, high = source_span(*axis, begin, begin + TILE)
    first = low // TILE
    return first, jnp.where(low < high, (high + TILE - 1) // TILE - first, 0)


def _kernel(
    jobs: Any,
    block: Any,
    view: Any,
    images: Any,
    out: Any,
    tiles: Any,
    line: Any,
    line_weight: Any,
    total: Any,
    total_weight: Any,
    packed: Any,
    patches: Any,
    arrived: Any,
    sent: Any,
) -> None:
    """One block of one view; see the top of the file."""
    del jobs  # Only the index maps need it.
    image, tall, outline_count, line_width, *rest = (view[0, 0, i] for i in range(_VIEW))
    left, top, right, bottom, *target, height, width = rest
    y_out, first_row, rows, x_out, first_column, columns = (
        block[0, 0, i] for i in range(PATCHES, _BLOCK)
    )

    def positions(begin: Array, axis: int) -> Array:
        return begin + lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis)

    def down(row: Array) -> Array:
        """Weights [output rows, source rows] of the tiles that start at `row`."""
        return cubic_weights(positions(row, 1), positions(y_out, 0), top, bottom, target[0])

    def across(column: Array) -> Array:
        """Weights [source columns, output columns]."""
        return cubic_weights(positions(column, 0), positions(x_out, 1), left, right, target[1])

    def paint(tile: Array, row: Array, column: Array) -> Array:
        y, x = positions(row, 0), positions(column, 1)

        def draw(k: Array, color: Array) -> Array:
            *box, own = (view[0, 0, _VIEW + 5 * k + i] for i in range(5))
            bars, between_sides, between, uprights = outline_parts(
                y, x, (height, width), box, line_width
            )
            return jnp.where((bars & between_sides) | (between & uprights), own, color)

        def draw_if_near(k: Array, color: Array) -> Array:
            x0, y0, x1, y1 = (view[0, 0, _VIEW + 5 * k + i] for i in range(4))
            near = (jnp.minimum(y0, y1 - line_width) < row + TILE) & (
                jnp.maximum(y1, y0 + line_width) >= row
            )
            near &= (jnp.minimum(x0, x1 - line_width) < column + TILE) & (
                jnp.maximum(x1, x0 + line_width) >= column
            )
            return lax.cond(near, lambda: draw(k, color), lambda: color)

        none = jnp.full((TILE, TILE), -1, jnp.int32)
        color = lax.fori_loop(0, outline_count, draw_if_near, none)
        channels = [
            jnp.where(color < 0, tile[c], lax.shift_right_logical(color, 8 * c) & 255)
            for c in range(3)
        ]
        return jnp.stack(channels)

    def add(sums: Any, weights: Any, product: Array, weight: Array, fresh: Array) -> None:
        """The memory of a fresh sum holds anything, infinity included."""
        sums[...] = jnp.where(fresh, 0.0, sums[...]) + product
        weights[...] = jnp.where(fresh, 0.0, weights[...]) + weight

    def by_width(tile: Array, column: Array) -> tuple[Array, Array]:
        weights = across(column)
        product = _dot_right(tile.reshape(3 * TILE, TILE), weights)
        return product.reshape(3, TILE, TILE), weights.sum(0, keepdims=True)

    def by_height(tile: Array, row: Array) -> tuple[Array, Array]:
        weights = down(row)
        return _dot_left(weights, tile), weights.sum(1, keepdims=True)

    def resize(turned: bool) -> None:
        inner_count = rows if turned else columns
        count = rows * columns

        def place(t: Array) -> tuple[Array, Array]:
            outer, inner = lax.div(t, inner_count), lax.rem(t, inner_count)
            row, column = (inner, outer) if turned else (outer, inner)
            return (first_row + row) * TILE, (first_column + column) * TILE

        def copy(t: Array) -> Any:
            row, column = (pl.ds(pl.multiple_of(begin, TILE), TILE) for begin in place(t))
            buffer = t & 1
            return pltpu.make_async_copy(
                images.at[image, :, row, column], tiles.at[buffer], arrived.at[buffer]
            )

        @pl.when(count > 0)
        def start_reading() -> None:
            copy(jnp.int32(0)).start()

        def add_tile(t: Array, _: None) -> None:
            @pl.when(t + 1 < count)
            def read_ahead() -> None:
                copy(t + 1).start()

            copy(t).wait()
            row, column = place(t)
            inner = lax.rem(t, inner_count)
            tile = paint(tiles[t & 1].astype(jnp.int32), row, column)
            tile = tile.astype(jnp.float32).astype(jnp.bfloat16)
            first, second = (by_height, by_width) if turned else (by_width, by_height)
            begins = (row, column) if turned else (column, row)
            add(line, line_weight, *first(tile, begins[0]), inner == 0)

            @pl.when(inner == inner_count - 1)
            def finish_line() -> None:
                between = weighted_byte(line[...], line_weight[...]).astype(jnp.bfloat16)
                add(total, total_weight, *second(between, begins[1]), t < inner_count)

        lax.fori_loop(0, count, add_tile, None)

        @pl.when(count == 0)
        def nothing() -> None:
            total[...] = jnp.zeros_like(total)

    pl.when(tall == 0)(functools.partial(resize, turned=False))
    pl.when(tall != 0)(functools.partial(resize, turned=True))

    red, green, blue = weighted_byte(total[...], total_weight[...]).astype(jnp.int32)
    packed[...] = red | (green << 8) | (blue << 16)
    _cut(packed, patches)

    def send(k: Array) -> Any:
        mine = pl.ds(pl.multiple_of(k * ROWS, ROWS), HALVES)
        return pltpu.make_async_copy(patches.at[mine], out.at[block[0, 0, k]], sent)

    def of_listed(do: Any) -> None:
        def one(k: Array, _: None) -> None:
            pl.when(block[0, 0, k] >= 0)(lambda: do(send(k)))

        lax.fori_loop(0, PATCHES, one, None)

    of_listed(lambda copy: copy.start())
    of_listed(lambda copy: copy.wait())


def _cut(packed: Any, patches: Any) -> None:
    """[128, 128] pixels to patches: each a row of pixels after the other, in two rows of lanes.

    Line dy of eight patches under each other is one register, in which the patches beside each
    other are groups of 16 lanes; a rotation brings each group to where its own patch has line dy.
    """
    lanes_of = PATCH.bit_length() - 1
    group = lax.broadcasted_iota(jnp.int32, (ACROSS, TILE), 1) >> lanes_of
    per_half = PATCH // HALVES
    for half in range(HALVES):
        rows = [jnp.zeros((ACROSS, TILE), jnp.int32)] * ACROSS
        for at in range(per_half):
            lines = packed[pl.ds(half * per_half + at, ACROSS, stride=PATCH), :]
            for beside in range(ACROSS):
                turned = pltpu.roll(lines, (at - beside) * PATCH % TILE, 1)
                rows[beside] = jnp.where(group == at, turned, rows[beside])
        for beside, row in enumerate(rows):
            first = beside * ACROSS * ROWS + half
            patches[pl.ds(first, ACROSS, stride=ROWS), :] = row


def _split(weights: Array) -> list[Array]:
    """Three bfloat16 arrays whose sum is `weights`, smallest first.

    Cut off by a mask, as XLA may leave out a conversion to bfloat16 and back.
    """
    parts = []
    for _ in range(3):
        bits = lax.bitcast_convert_type(weights, jnp.int32) & -(1 << 16)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        weights = weights - part
    return parts[::-1]


def _dot_right(bytes_: Array, weights: Array) -> Array:
    products = [_dot(bytes_, part) for part in _split(weights)]
    return products[0] + products[1] + products[2]


def _dot_left(weights: Array, planes: Array) -> Array:
    parts = _split(weights)
    return jnp.stack([sum(_dot(part, plane) for part in parts) for plane in planes])


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
