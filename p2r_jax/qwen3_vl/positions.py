"""Where tokens and patches sit: integer bookkeeping, of tokens on the host.

A grid `(h, w)` counts patches; both are multiples of the merge size. Patches are listed in
*merge-block order* (block row, block column, row in block, column in block), so that four
consecutive patches become one visual token and merging is a reshape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]


@functools.lru_cache(maxsize=4096)
def patch_coordinates(grid: Grid, merge_size: int) -> np.ndarray:
    """Row and column of each patch, int32 [h*w, 2], in merge-block order.

    Raises ValueError if the grid does not divide into blocks.
    """
    h, w = grid
    check_grid(grid, merge_size)
    places = coordinates_at(np.arange(h * w, dtype=np.int32), np.int32(w), merge_size)
    return np.stack(places, -1)


def check_grid(grid: Grid, merge_size: int) -> None:
    """Raise ValueError if a grid does not divide into blocks of patches."""
    if grid[0] % merge_size or grid[1] % merge_size:
        raise ValueError(
            f"an image of {grid[0]}x{grid[1]} patches does not divide into blocks of {merge_size}x"
            f"{merge_size}: resize its sides to multiples of patch size × {merge_size} pixels"
        )


def coordinates_at(place: Any, width: Any, merge_size: int) -> tuple[Any, Any]:
    """Row and column of the patches with these numbers, NumPy or JAX; width: of their grids."""
    block, inside = place // merge_size**2, place % merge_size**2
    blocks = width // merge_size
    row = block // blocks * merge_size + inside // merge_size
    return row, block % blocks * merge_size + inside % merge_size


def position_interpolation(
    row_col: Int[Array, "*n 2"], grid: Int[Array, "*n 2"], table_side: int
) -> tuple[Int[Array, "*n 4"], Float[Array, "*n 4"]]:
    """Bilinear look-up of a `table_side`² embedding table stretched over the grid of each patch.

    Corners align (the first patch reads entry 0, the last reads `table_side - 1`).
    Returns indices into the row-major table and weights.
    """
    last = jnp.maximum(grid - 1, 1)
    # In whole numbers, since accelerators divide inexactly: a floor must not fall short.
    low, rest = jnp.divmod(row_col * (table_side - 1), last)
    high = jnp.minimum(low + 1, table_side - 1)
    # Rounded as the reference's, which takes the fraction of the float32 position.
    where = low + rest.astype(jnp.float32) / last.astype(jnp.float32)
    fr, fc = jnp.moveaxis(where - low, -1, 0)
    (r0, c0), (r1, c1) = jnp.moveaxis(low, -1, 0), jnp.moveaxis(high, -1, 0)
    index = jnp.stack([r0 * table_side + c0, r0 * table_side + c1,
                       r1 * table_side + c0, r1 * table_side + c1], -1)  # fmt: skip
    weight = jnp.stack([(1 - fr) * (1 - fc), (1 - fr) * fc, fr * (1 - fc), fr * fc], -1)
    return index, weight


def mrope_axes(section: Sequence[int]) -> np.ndarray:
    """Axis (0 time, 1 height, 2 width) of each rotary frequency, int32 [sum(section)].

    Interleaved M-RoPE: T H W T H W ..., and once height and width have had their share the rest
    is time. For section (24, 20, 20), frequencies 60..63 are all time.
    """
    axes = np.zeros(sum(section), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def rope_positions(
    tokens: np.ndarray, grids: Sequence[Grid], image_token_id: int, merge_size: int
) -> tuple[np.ndarray, int]:
    """M-RoPE positions of one unpadded row.

    tokens: int [S]; each image is a run of `image_token_id` of length h*w/merge².
    Returns positions int32 [3, S] (time, height, width) and the position of the next token.
    Text counts all axes together; an image starting at `t` has time t, height t + row, width
    t + column, and the text after it resumes at t + max(rows, columns).

    Raises ValueError if images and placeholder runs do not match.
    """
    size = len(tokens)
    positions = np.zeros((3, size), np.int32)
    is_image = np.asarray(tokens) == image_token_id
    current, i = 0, 0
    remaining = list(grids)
    while i < size:
        if not is_image[i]:
            stop = i
            while stop < size and not is_image[stop]:
                stop += 1
            positions[:, i:stop] = current + np.arange(stop - i)
            current += stop - i
            i = stop
            continue
        if not remaining:
            raise ValueError("more image placeholders in the tokens than images given")
        h, w = (side // merge_size for side in remaining.pop(0))
        stop = i + h * w
        if stop > size or not is_image[i:stop].all():
            raise ValueError(
                f"an image of {h}x{w} visual tokens does not match its run of placeholders"
            )
        rows, cols = np.divmod(np.arange(h * w), w)
        positions[0, i:stop] = current
        positions[1, i:stop] = current + rows
        positions[2, i:stop] = current + cols
        current += max(h, w)
        i = stop
    if remaining:
        raise ValueError(f"{len(remaining)} image(s) have no placeholders in the tokens")
    return positions, current
