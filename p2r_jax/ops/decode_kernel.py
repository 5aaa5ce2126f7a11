"""A Pallas TPU kernel for one decoding step of G completions a row against their shared prompt.

Decoding waits for memory, so what counts is that the caches are read once. All query heads of all
completions that read one key-value head are the rows of one matrix, N = G * H / K of them, and go
together against each block of keys: first of the prefix, then of the suffix, whose G caches are
G * C keys in a row. A query row owns C of those, the others are masked: the matrix unit is idle
anyway. The whole cache of all layers goes in, and the layer is a scalar that selects blocks, so no
layer is ever copied out of it. Blocks without any valid key are neither read nor computed.

Softmax runs over the blocks with a maximum, a sum and a weighted value for each row, in float32,
which start from the new token's own key: every row has a key, whatever the masks. Other letters as
in `ops.attention`, and L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import MASKED

LANES = 128
MOST_KEYS = 1024
"""Keys a block: reading them and their values, 512 KiB for a bfloat16 width of 128, should take
longer than a step of the grid costs by itself (about 0.35 µs), and unwritten ones be skipped."""


def decode_attention(
    q: Float[Array, "B G H D"],
    k_new: Float[Array, "B G K D"],
    v_new: Float[Array, "B G K D"],
    prefix: tuple[Float[Array, "L B K P D"], Float[Array, "L B K P D"]],
    suffix: tuple[Float[Array, "L B K G C D"], Float[Array, "L B K G C D"]],
    layer: Int[Array, ""],
    prefix_valid: Int[Array, "B P"],
    suffix_valid: Bool[Array, "B G C"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B G H D"]:
    """`ops.attention.decode_attention` on layer `layer` of the caches.

    What lies in the caches at invalid places does not matter, not even infinity or NaN. On a TPU, C
    should be a multiple of 8 and D of 128: the caches are copied otherwise, to merge G and C or to
    give keys a layout that the kernel can read.
    """
    batch, group, heads, width = q.shape
    kv_heads, prompt = prefix[0].shape[2:4]
    past, each = suffix[0].shape[4], heads // kv_heads
    # Rows come in whole registers: 8 of 32 bits, 16 of 16 bits.
    rows = group * each
    added = -rows % (32 // q.dtype.itemsize)

    def as_rows(x: Float[Array, "B G K g D"]) -> Float[Array, "B K N D"]:
        x = jnp.swapaxes(x, 1, 2).reshape(batch, kv_heads, rows, width)
        return jnp.pad(x, ((0, 0), (0, 0), (0, added), (0, 0)))

    def repeated(x: Float[Array, "B G K D"]) -> Float[Array, "B K N D"]:
        return as_rows(jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], each, width)))

    # Where each row's own completion starts among all keys; nothing is the added rows' own.
    own = jnp.repeat(jnp.arange(group, dtype=jnp.int32) * past, each)
    own = jnp.pad(own, (0, added), constant_values=group * past)[:, None]
    suffix = jax.tree.map(lambda x: x.reshape(*x.shape[:3], group * past, width), suffix)

    prefix_part = _Part(prompt, MOST_KEYS)
    suffix_part = _Part(group * past, MOST_KEYS)
    prefix_mask = prefix_part.whole_blocks(prefix_valid)
    suffix_mask = suffix_part.whole_blocks(suffix_valid.reshape(batch, -1))
    scalars = (
        jnp.reshape(layer, 1).astype(jnp.int32),
        schedule(prefix_mask, prefix_part.block),
        schedule(suffix_mask, suffix_part.block),
    )

    def at_prefix(b: Any, h: Any, j: Any, layer: Any, reads: Any, _: Any) -> tuple[Any, ...]:
        return layer[0], b, h, reads[b, jnp.minimum(j, prefix_part.blocks - 1)], 0

    def at_suffix(b: Any, h: Any, j: Any, layer: Any, _: Any, reads: Any) -> tuple[Any, ...]:
        return layer[0], b, h, reads[b, jnp.maximum(j - prefix_part.blocks, 0)], 0

    def mask_spec(part: _Part, index_map: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, part.block), lambda b, *at: (b, 0, index_map(b, *at)[3]))

    def cache_spec(part: _Part, index_map: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, part.block, width), index_map)

    per_head = pl.BlockSpec((None, None, rows + added, width), lambda b, h, *_: (b, h, 0, 0))
    keys = prompt + group * past
    out = pl.pallas_call(
        functools.partial(_kernel, prefix_blocks=prefix_part.blocks, past=past),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, rows + added, width), v_new.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, kv_heads, prefix_part.blocks + suffix_part.blocks),
            in_specs=[
                *[per_head] * 3,
                pl.BlockSpec((rows + added, 1), lambda *_: (0, 0)),
                mask_spec(prefix_part, at_prefix),
                *[cache_spec(prefix_part, at_prefix)] * 2,
                mask_spec(suffix_part, at_suffix),
                *[cache_spec(suffix_part, at_suffix)] * 2,
            ],
            out_specs=per_head,
            scratch_shapes=[
                pltpu.VMEM((rows + added, 1), jnp.float32),
                pltpu.VMEM((rows + added, 1), jnp.float32),
                pltpu.VMEM((rows + added, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * group * heads * keys * width,
            transcendentals=batch * group * heads * keys,
            bytes_accessed=2 * batch * kv_heads * keys * width * v_new.dtype.itemsize,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        *scalars,
        as_rows(q.reshape(batch, group, kv_heads, each, width)),
        repeated(k_new),
        repeated(v_new),
        own,
        prefix_mask[:, None],
        *prefix,
        suffix_mask[:, None],
        *suffix,
    )
    out = out[:, :, :rows].reshape(batch, kv_heads, group, each, width)
    return jnp.swapaxes(out, 1, 2).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Keys of one cache and their division into blocks, the last of which may be part empty."""

    keys: int
    most: int

    @property
    def block(self) -> int:
        """All keys, or blocks of about the same size in whole lanes."""
        blocks = pl.cdiv(self.keys, self.most)
        return self.keys if blocks == 1 else pl.cdiv(self.keys, blocks * LANES) * LANES

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.keys, self.block)

    def whole_blocks(self, valid: Array) -> Int[Array, "B N"]:
        """Nothing is valid behind the last key, where a block holds whatever is in memory."""
        added = self.blocks * self.block - self.keys
        return jnp.pad((valid != 0).astype(jnp.int32), ((0, 0), (0, added)))


def schedule(valid: Int[Array, "B N"], block: int) -> Int[Array, "B n"]:
    """The block to have in memory at each step: step j computes where it is j.

    A block without valid keys is skipped and leaves in place what was read before, or, at the
    start, what is read next.
    """
    needed = valid.reshape(valid.shape[0], -1, block).any(-1)
    at = jnp.arange(needed.shape[1], dtype=jnp.int32)
    latest = lax.cummax(jnp.where(needed, at, -1), axis=1)
    earliest = jnp.argmax(needed, axis=1, keepdims=True).astype(jnp.int32)
    return jnp.where(latest < 0, earliest, latest)


def _kernel(
    layer: Any,
    prefix_reads: Any,
    suffix_reads: Any,
    q: Any,
    k_new: Any,
    v_new: Any,
    own: Any,
    prefix_mask: Any,
    prefix_k: Any,
    prefix_v: Any,
    suffix_mask: Any,
    suffix_k: Any,
    suffix_v: Any,
    out: Any,
    highest: Any,
    total: Any,
    weighted: Any,
    *,
    prefix_blocks: int,
    past: int,
) -> None:
    """One block of keys of one head; see the top of the file."""
    del layer  # Only the index maps need it.
    b, j = pl.program_id(0), pl.program_id(2)
    scale = q.shape[-1] ** -0.5

    @pl.when(j == 0)
    def start_from_the_new_token() -> None:
        products = q[...].astype(jnp.float32) * k_new[...].astype(jnp.float32)
        highest[...] = products.sum(-1, keepdims=True) * scale
        total[...] = jnp.ones_like(total)
        weighted[...] = v_new[...].astype(jnp.float32)

    def attend(k: Any, v: Any, valid: Array, reads: Array) -> None:
        scores = lax.dot_general(
            q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores = jnp.where(reads, scores * scale, MASKED)
        before = highest[...]
        now = jnp.maximum(before, scores.max(-1, keepdims=True))
        kept, weights = jnp.exp(before - now), jnp.exp(scores - now)
        highest[...] = now
        total[...] = kept * total[...] + weights.sum(-1, keepdims=True)
        # A weight of zero does not undo the infinity that memory may hold.
        values = jnp.where(_column(valid, v.shape), v[...], jnp.zeros_like(v))
        weighted[...] = kept * weighted[...] + jnp.dot(
            weights.astype(v.dtype), values, preferred_element_type=jnp.float32
        )

    @pl.when((j < prefix_blocks) & (prefix_reads[b, jnp.minimum(j, prefix_blocks - 1)] == j))
    def attend_to_the_prefix() -> None:
        valid = prefix_mask[...] != 0
        attend(prefix_k, prefix_v, valid, valid)

    s = jnp.maximum(j - prefix_blocks, 0)

    @pl.when((j >= prefix_blocks) & (suffix_reads[b, s] == s))
    def attend_to_the_suffix() -> None:
        valid = suffix_mask[...] != 0
        shape = (q.shape[0], suffix_k.shape[0])
        key = s * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)
        mine = (key >= own[...]) & (key < own[...] + past)
        attend(suffix_k, suffix_v, valid, valid & mine)

    @pl.when(j == pl.num_programs(2) - 1)
    def finish() -> None:
        out[...] = (weighted[...] / total[...]).astype(out.dtype)


def _column(valid: Bool[Array, "1 N"], shape: tuple[int, int]) -> Bool[Array, "N D"]:
    """Turned from lanes to sublanes, which Mosaic does for whole registers of 32 bits."""
    registers = jnp.broadcast_to(valid.astype(jnp.float32), (8, shape[0]))
    return jnp.broadcast_to(jnp.transpose(registers)[:, :1], shape) != 0
