"""The arrays a model reads: image sizes are data, never shapes.

B rows, N patches a row (all its images one after another, then padding), P prompt tokens,
M = N / merge² visual tokens. Only the budgets N and P shape a trace, so one compiled program
serves every mix of image counts and sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, UInt8

from p2r_jax.ops.image import normalize
from p2r_jax.parallel.multihost import put
from p2r_jax.qwen3_vl.config import Qwen3VLConfig, VisionConfig
from p2r_jax.qwen3_vl.positions import (
    Grid,
    check_grid,
    coordinates_at,
    position_interpolation,
    rope_positions,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """The images of each row, in merge-block order; see `positions`."""

    pixels: UInt8[Array, "B N D"] | Float[Array, "B N C"]
    """Bytes of one frame, (channel, row, column), or what `pixel_values` makes of them."""
    row_col: Int[Array, "B N 2"]
    """Patch coordinates inside the image."""
    image_id: Int[Array, "B N"]
    """1, 2, ... by image of the row; 0 is padding. Attention stays within an id."""
    pos_index: Int[Array, "B N 4"]
    pos_weight: Float[Array, "B N 4"]
    """Bilinear look-up into the learned position table."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Right- or left-padded token rows with what their images need."""

    tokens: Int[Array, "B P"]
    positions: Int[Array, "3 B P"]
    """M-RoPE positions (time, height, width); 0 on padding."""
    visual_slot: Int[Array, "B P"]
    """Index into the row's visual tokens, -1 for text and padding."""
    valid: Int[Array, "B P"]
    """1 on real tokens, 0 on padding."""
    next_position: Int[Array, " B"]
    """M-RoPE position of the first token after the prompt (all three axes)."""
    patches: Patches | None


def pixel_values(patches: Patches, config: VisionConfig) -> Float[Array, "B N C"]:
    """Patches as the reference's image processor gives them: (channel, frame, row, column),
    normalised to [-1, 1], all frames the same; 0 on padding.

    Bytes take an eighth of the memory, and most prompts are kept until their update.
    """
    if patches.pixels.dtype != jnp.uint8:
        return patches.pixels
    values = jnp.where((patches.image_id > 0)[..., None], normalize(patches.pixels), 0.0)
    channels = jnp.split(values, config.in_channels, axis=-1)
    # Side by side: a reshape would cost a TPU another pass over them.
    return jnp.concatenate([c for c in channels for _ in range(config.temporal_patch_size)], -1)


def patch_layout(
    grids: Sequence[Sequence[Grid]],
    config: Qwen3VLConfig,
    num_patches: int,
    where: NamedSharding | None = None,
) -> dict[str, Array]:
    """Everything about the patches of a batch but their pixels: the other fields of `Patches`.

    grids: for each row, the (h, w) of its images in patches. Only these go to the device, which
    makes the rest of them. where: how rows are split. Raises ValueError if a row exceeds
    `num_patches`, or for a grid that does not divide into blocks.
    """
    merge, side = config.vision.spatial_merge_size, config.vision.position_grid
    for row, row_grids in enumerate(grids):
        if (total := sum(h * w for h, w in row_grids)) > num_patches:
            raise ValueError(
                f"row {row} has {total} patches, more than the budget of {num_patches}: "
                "raise the patch bucket or lower max_pixels"
            )
        for grid in row_grids:
            check_grid(grid, merge)
    sizes = np.zeros((len(grids), round_up(max(map(len, grids))), 2), np.int32)
    for row, row_grids in enumerate(grids):
        sizes[row, : len(row_grids)] = np.reshape(row_grids, (-1, 2))
    return layout_program(where)(put(sizes, where), size=num_patches, merge=merge, side=side)


def round_up(images: int) -> int:
    """Images of a row that arrays have room for, so that few numbers are compiled."""
    return 1 if images <= 1 else max(4, 1 << (images - 1).bit_length())


def layout_of_grids(
    grids: Int[Array, "B S 2"], *, size: int, merge: int, side: int
) -> dict[str, Array]:
    """`patch_layout` of grids on the device; one of no patches is no image."""
    counts = grids.prod(-1)
    ends = jnp.cumsum(counts, axis=-1)
    place = jnp.arange(size)[None]
    image = (place[..., None] >= ends[:, None]).sum(-1)
    real = image < grids.shape[1]
    image = jnp.minimum(image, grids.shape[1] - 1)
    of_image = lambda x: jnp.take_along_axis(x, image, axis=1)
    grid = jnp.stack([of_image(grids[..., axis]) for axis in (0, 1)], -1)
    grid = jnp.where(real[..., None], grid, merge)
    place = jnp.where(real, place - of_image(ends - counts), 0)
    row_col = jnp.stack(coordinates_at(place, grid[..., 1], merge), -1)
    index, weight = position_interpolation(row_col, grid, side)
    return {
        "row_col": row_col,
        "image_id": jnp.where(real, image + 1, 0),
        "pos_index": index,
        "pos_weight": jnp.where(real[..., None], weight, 0.0),
    }


@functools.cache
def layout_program(where: NamedSharding | None) -> Any:
    """`layout_of_grids`, compiled for rows that are split like this."""
    return jax.jit(layout_of_grids, static_argnames=("size", "merge", "side"), out_shardings=where)


def token_layout(
    rows: Sequence[np.ndarray],
    grids: Sequence[Sequence[Grid]],
    config: Qwen3VLConfig,
    num_tokens: int,
    pad_token_id: int,
    padding_side: str = "right",
) -> dict[str, np.ndarray]:
    """The token fields of `Prompts` from unpadded token rows.

    Raises ValueError if a row exceeds `num_tokens`; prompts are never silently truncated, since
    that would cut images in half.
    """
    merge = config.vision.spatial_merge_size
    shape = (len(rows), num_tokens)
    out = {
        "tokens": np.full(shape, pad_token_id, np.int32),
        "positions": np.zeros((3, *shape), np.int32),
        "visual_slot": np.full(shape, -1, np.int32),
        "valid": np.zeros(shape, np.int32),
        "next_position": np.zeros(len(rows), np.int32),
    }
    for i, tokens in enumerate(rows):
        size = len(tokens)
        if size > num_tokens:
            raise ValueError(
                f"row {i} has {size} prompt tokens, more than the budget of {num_tokens}: "
                "raise the prompt bucket or lower max_pixels"
            )
        span = slice(0, size) if padding_side == "right" else slice(num_tokens - size, num_tokens)
        positions, following = rope_positions(tokens, grids[i], config.image_token_id, merge)
        out["tokens"][i, span] = tokens
        out["positions"][:, i, span] = positions
        out["valid"][i, span] = 1
        is_image = np.asarray(tokens) == config.image_token_id
        out["visual_slot"][i, span] = np.where(is_image, np.cumsum(is_image) - 1, -1)
        out["next_position"][i] = following
    return out
