"""The Qwen3-VL vision tower: patches in, visual tokens and DeepStack features out.

B rows, N patches, D vision width, M = N / merge² visual tokens, E text width, J DeepStack levels.
Blocks are stacked and scanned; outputs of the tapped blocks are written into a [J, B, N, D]
buffer as the scan passes them, so uneven taps cost nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from p2r_jax.ops.kernels import Kernels
from p2r_jax.qwen3_vl.config import VisionConfig
from p2r_jax.qwen3_vl.inputs import Patches, pixel_values
from p2r_jax.qwen3_vl.layers import (
    LayerNorm,
    Linear,
    inverse_frequencies,
    look_up,
    param,
    rotate_half,
    stack,
)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self.norm1 = LayerNorm(width, config.layer_norm_eps)
        self.norm2 = LayerNorm(width, config.layer_norm_eps)
        self.qkv = Linear(
            (width,),
            (3, heads, head_dim),
            ("vision_embed", None, "vision_heads", None),
            bias=True,
            rngs=rngs,
        )
        self.proj = Linear(
            (heads, head_dim),
            (width,),
            ("vision_heads", None, "vision_embed"),
            bias=True,
            rngs=rngs,
        )
        hidden = config.intermediate_size
        self.fc1 = Linear((width,), (hidden,), ("vision_embed", "vision_mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear((hidden,), (width,), ("vision_mlp", "vision_embed"), bias=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        cos: Float[Array, "B N 1 h"],
        sin: Float[Array, "B N 1 h"],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B N D"]:
        qkv = self.qkv(self.norm1(x))
        q, k, v = (qkv[:, :, i] for i in range(3))
        # Vision rotation is float32 in every precision; the text decoder's is not.
        q, k = (
            (t.astype(jnp.float32) * cos + rotate_half(t.astype(jnp.float32)) * sin).astype(x.dtype)
            for t in (q, k)
        )
        x = x + self.proj(attend(q, k, v))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True))


class Merger(nnx.Module):
    """Joins merge² patches into one visual token of the language model's width."""

    def __init__(self, config: VisionConfig, *, norm_after_merge: bool, rngs: nnx.Rngs):
        merged = config.hidden_size * config.merge_unit
        self.merged_width = merged
        self.norm_after_merge = norm_after_merge
        self.norm = LayerNorm(
            merged if norm_after_merge else config.hidden_size, config.layer_norm_eps
        )
        self.fc1 = Linear(
            (merged,), (merged,), ("vision_embed", "vision_mlp"), bias=True, rngs=rngs
        )
        self.fc2 = Linear(
            (merged,), (config.out_hidden_size,), ("vision_mlp", "embed"), bias=True, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B M E"]:
        merged_shape = (x.shape[0], -1, self.merged_width)
        if self.norm_after_merge:
            x = self.norm(x.reshape(merged_shape))
        else:
            x = self.norm(x).reshape(merged_shape)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, kernels: Kernels):
        self.config = config
        self.kernels = kernels
        self.compute_dtype: Any = None
        self.patch_embed = Linear(
            (config.patch_dim,), (config.hidden_size,), (None, "vision_embed"), bias=True, rngs=rngs
        )
        self.pos_embed = param(
            rngs,
            (config.num_position_embeddings, config.hidden_size),
            (None, "vision_embed"),
            fan_in=config.hidden_size,
        )
        self.blocks = stack(lambda rngs: VisionBlock(config, rngs), config.depth, rngs)
        self.merger = Merger(config, norm_after_merge=False, rngs=rngs)
        self.deepstack_mergers = stack(
            lambda rngs: Merger(config, norm_after_merge=True, rngs=rngs),
            len(config.deepstack_visual_indexes),
            rngs,
        )

    def __call__(
        self, patches: Patches, remat: bool = False
    ) -> tuple[Float[Array, "B M E"], Float[Array, "J B M E"]]:
        """Visual tokens and DeepStack features; values on padding are finite and meaningless."""
        config = self.config
        table = self.pos_embed[...]
        dtype = self.compute_dtype or table.dtype
        x = self.patch_embed(pixel_values(patches, config).astype(dtype))
        # Interpolated in float32 whatever the model dtype: bf16 weights shift boxes.
        table = self.kernels.pin_whole(table)
        looked_up = look_up(table, patches.pos_index, dtype).astype(jnp.float32)
        x = x + (looked_up * patches.pos_weight[..., None]).sum(-2).astype(dtype)
        x = self.kernels.pin_rows(x)

        frequencies = inverse_frequencies(config.rope_theta, config.head_dim // 4)
        angles = patches.row_col[..., None].astype(jnp.float32) * frequencies
        angles = angles.reshape(*angles.shape[:2], 1, -1)  # rows, then columns
        angles = jnp.concatenate([angles, angles], -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)

        def attend(q: Array, k: Array, v: Array) -> Array:
            return self.kernels.segments(q, k, v, patches.image_id)

        levels = len(config.deepstack_visual_indexes)
        # Level written after each block; `levels` means none.
        level_of = np.full(config.depth, levels, np.int32)
        level_of[list(config.deepstack_visual_indexes)] = np.arange(levels)
        graph, state = nnx.split(self.blocks)

        def body(carry, inputs):
            x, taps = carry
            level, block_state = inputs
            x = nnx.merge(graph, block_state)(x, cos, sin, attend)
            taps = jax.lax.cond(
                level < levels, lambda t: t.at[level].set(x, mode="drop"), lambda t: t, taps
            )
            return (self.kernels.split_kept(x) if remat else x, taps), None

        if remat:
            body, x = jax.checkpoint(body), self.kernels.split_kept(x)
        taps = jnp.zeros((levels, *x.shape), x.dtype)
        (x, taps), _ = jax.lax.scan(body, (x, taps), (level_of, state))
        # Unrolled: there are three, and a batched matrix product is slower than three plain ones.
        merger_graph, mergers = nnx.split(self.deepstack_mergers)
        deepstack = [
            nnx.merge(merger_graph, jax.tree.map(operator.itemgetter(level), mergers))(taps[level])
            for level in range(levels)
        ]
        return self.merger(x), jnp.stack(deepstack)
