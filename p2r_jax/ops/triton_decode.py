"""A Pallas-Triton kernel for one decoding step of G completions a row against their shared prompt.

Decoding waits for memory, so what counts is that the caches are read once and by enough programs
to keep a GPU busy, though rows and heads are few. Each program therefore has a chunk of one cache
(flash-decoding): of the prefix, whose keys all G * H / K query heads of a key-value head read, or
of one completion's own suffix. It gives its weighted values with their maximum and sum, and XLA
puts the chunks and the new token together. The whole cache of all layers goes in and the layer is a
scalar, so no layer is ever copied out of it. Blocks before the first and behind the last valid key
are not read.

Letters as in `ops.attention`, L layers; here a cache has M parts that N query rows read each: the
prefix is one part for all completions, a suffix one for each.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import MASKED

BLOCK = 64
"""Keys in one tile."""
CHUNK = 512
"""Keys that a program reads: short enough for some programs on each of a GPU's processors, long
enough for results to be few beside what was read."""
LEAST_ROWS = 16
"""Of a tile of queries, for the matrix unit."""
LOG2_E = math.log2(math.e)


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
    interpret: bool = False,
) -> Float[Array, "B G H D"]:
    """`ops.attention.decode_attention` on layer `layer` of the caches.

    What lies in the caches at invalid places does not matter, not even infinity or NaN.
    """
    batch, group, heads, width = q.shape
    kv_heads = k_new.shape[2]
    each = heads // kv_heads
    scale = width**-0.5 * LOG2_E
    by_head = jnp.swapaxes(q.reshape(batch, group, kv_heads, each, width), 1, 2)
    of_prefix = _parts(
        by_head.reshape(batch, kv_heads, 1, group * each, width),
        [x[:, :, :, None] for x in prefix],
        layer,
        prefix_valid[:, None],
        interpret,
        "decode_prefix",
    )
    of_suffix = _parts(by_head, suffix, layer, suffix_valid, interpret, "decode_suffix")
    # Both as [B, K, G, each, chunks, ...].
    shape = (batch, kv_heads, -1, group, each)
    of_prefix = [jnp.moveaxis(x.reshape(*shape, *x.shape[5:]), 2, 4) for x in of_prefix]
    of_suffix = [jnp.moveaxis(x, 3, 4) for x in of_suffix]

    keys, values = (jnp.swapaxes(x, 1, 2)[:, :, :, None] for x in (k_new, v_new))
    own = (by_head.astype(jnp.float32) * keys.astype(jnp.float32)).sum(-1) * scale
    highest = jnp.maximum(jnp.maximum(own, of_prefix[1].max(-1)), of_suffix[1].max(-1))
    total = jnp.exp2(own - highest)
    out = total[..., None] * values.astype(jnp.float32)
    for weighted, top, sums in (of_prefix, of_suffix):
        kept = jnp.exp2(top - highest[..., None])
        total += (kept * sums).sum(-1)
        out += (kept[..., None] * weighted).sum(-2)
    out = (out / total[..., None]).astype(v_new.dtype)
    return jnp.swapaxes(out, 1, 2).reshape(q.shape)


def _parts(
    q: Float[Array, "B K M N D"],
    caches: Any,
    layer: Int[Array, ""],
    valid: Array,
    interpret: bool,
    name: str,
) -> list[Array]:
    """Of each of J chunks the weighted values [B, K, M, J, N, D], and of its scores the maximum and
    the sum of powers [B, K, M, J, N], all float32."""
    batch, kv_heads, parts, rows, width = q.shape
    layers, size = caches[0].shape[0], caches[0].shape[4]
    valid = (valid != 0).astype(jnp.int32)
    # Padded, so that a tile of the mask is always inside.
    at = jnp.arange(size, dtype=jnp.int32)
    first = jnp.where(valid == 1, at, size).min(-1)
    stop = jnp.where(valid == 1, at + 1, 0).max(-1)
    valid = jnp.pad(valid, ((0, 0), (0, 0), (0, -size % BLOCK)))
    chunks, wide = pl.cdiv(size, CHUNK), pl.next_power_of_2(width)

    def where(j: Any, h: Any, b: Any) -> tuple[Any, ...]:
        """Row, head, part and chunk of a program."""
        return b, lax.div(h, jnp.int32(parts)), lax.rem(h, jnp.int32(parts)), j

    def spec(block: tuple[int | None, ...], take: str) -> pl.BlockSpec:
        def index(*at: Any) -> tuple[Any, ...]:
            own = dict(zip("bkmj", where(*at), strict=True))
            return tuple(own.get(letter, 0) for letter in take)

        return pl.BlockSpec(block, index)

    whole = (layers, None, None, None, size, wide)
    out = [(chunks, rows, width), (chunks, rows), (chunks, rows)]
    return pl.pallas_call(
        functools.partial(_kernel, size=size, rows=rows, width=width),
        grid=(chunks, kv_heads * parts, batch),
        in_specs=[
            spec((1,), "0"),
            spec((None, None, 2), "bm0"),
            spec((None, None, valid.shape[2]), "bm0"),
            spec((None, None, None, rows, wide), "bkm00"),
            *[spec(whole, "0bkm00")] * 2,
        ],
        out_specs=[
            spec((None, None, None, None, rows, wide), "bkmj00"),
            *[spec((None, None, None, None, rows), "bkmj0")] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, parts, *shape), jnp.float32) for shape in out
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * size,
            transcendentals=q.size // width * size,
            bytes_accessed=2 * batch * kv_heads * parts * size * width * q.dtype.itemsize,
        ),
        interpret=interpret,
        name=name,
    )(
        jnp.reshape(layer, 1).astype(jnp.int32),
        jnp.stack([first, stop], -1),
        valid,
        q,
        *caches,
    )


def _kernel(
    layer_ref: Any,
    bounds: Any,
    valid_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    size: int,
    rows: int,
    width: int,
) -> None:
    """One chunk of keys of one part; see the top of the file."""
    tall, wide = max(LEAST_ROWS, pl.next_power_of_2(rows)), pl.next_power_of_2(width)
    row, column = jnp.arange(tall) < rows, jnp.arange(wide) < width
    inside, layer = row[:, None] & column[None], layer_ref[0]
    q = plgpu.load(q_ref.at[pl.ds(0, tall)], mask=inside, other=0.0)
    per_chunk, chunk = CHUNK // BLOCK, pl.program_id(0)
    begin = jnp.maximum(chunk * per_chunk, lax.div(bounds[0], jnp.int32(BLOCK)))
    end = lax.div(bounds[1] + (BLOCK - 1), jnp.int32(BLOCK))
    end = jnp.minimum((chunk + 1) * per_chunk, end)

    def body(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = carry
        at = pl.ds(block * BLOCK, BLOCK)
        reads = valid_ref[at] == 1
        # What is not valid is not loaded: it may be infinite, or lie behind the end of the cache.
        mask = reads[:, None] & column[None]
        k, v = (plgpu.load(ref.at[layer, at], mask=mask, other=0.0) for ref in (k_ref, v_ref))
        scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = jnp.where(reads[None], scores * (width**-0.5 * LOG2_E), MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        # Masked again: until a key is valid, masked scores are the highest.
        weights = jnp.where(reads[None], jnp.exp2(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        products = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * shrink[:, None] + products, new_top, total * shrink + weights.sum(1)

    nothing = jnp.zeros(tall, jnp.float32)
    carry = jnp.zeros((tall, wide), jnp.float32), nothing + MASKED, nothing
    out, top, total = lax.fori_loop(begin, end, body, carry)
    plgpu.store(out_ref.at[pl.ds(0, tall)], out, mask=inside)
    plgpu.store(top_ref.at[pl.ds(0, tall)], top, mask=row)
    plgpu.store(total_ref.at[pl.ds(0, tall)], total, mask=row)
