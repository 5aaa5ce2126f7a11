"""Attention of whole sequences on TPU: JAX's splash attention behind the reference's signatures.

The functions take and return what their namesakes in `ops.attention` do, and agree with them at
real positions, gradients included. Padding differs: segment ids keep it to itself, so that a
padding query reads padding (itself at least), never a real token.

Which blocks of scores exist follows from the shapes alone. That schedule is computed once on the
host, which takes seconds for the longest sequences, and kept; the other blocks are never visited.
Within a block the kernel evaluates the same rule on positions. Letters as in `ops.attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

LANES = 128
LARGEST_BLOCK = 512
"""Longest side of a block of scores. With 1024, which would still compile, a causal sequence of
2560 computes 1.6 times as many scores, and a completion of 256 is lost in its block."""

OUTSIDE = -1
"""Segment of the padding that is added here, which no segment of the caller is."""


@dataclasses.dataclass(frozen=True)
class Rule(masks.Mask):
    """A prompt of `prompt` tokens, then completions of `length`, a power of two, each causal.

    Completions read the prompt and themselves. Plain causal attention is a prompt and nothing else.
    """

    size: int
    prompt: int
    length: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def q_sequence(self) -> np.ndarray:
        """The positions of queries, in the form that tells splash to evaluate `mask_function`."""
        return np.arange(self.size, dtype=np.int32)

    def mask_function(self, query: Any, key: Any) -> Any:
        """Runs on the host for the schedule and in the kernel for the scores.

        Nothing here may divide: lowering an integer division asks for the default device's TPU
        generation, which a host that compiles for another machine does not have.
        """
        reads = query >= key
        if self.prompt < self.size:
            # Where both are positive: numbers that differ only in their last bits.
            same = ((query - self.prompt) ^ (key - self.prompt)) < self.length
            reads &= (key < self.prompt) | same
        return reads

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(*part.indices(self.size), dtype=np.int32) for part in index)
        return self.mask_function(query[:, None], key[None])


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    valid: Int[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """Each token reads itself and the valid tokens before it."""
    size = _padded(q.shape[1])
    return _attention(q, k, v, valid != 0, Rule(size, prompt=size), interpret)


def segment_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment: Int[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """Tokens read the tokens of their own segment; segment 0 is padding and reads padding.

    Segments are data, so all S² scores are computed, whatever the segments.
    """
    size = _padded(q.shape[1])
    return _attention(q, k, v, segment, masks.FullMask((size, size)), interpret)


def shared_prefix_attention(
    q: Float[Array, "B P+G*R H D"],
    k: Float[Array, "B P+G*R K D"],
    v: Float[Array, "B P+G*R K D"],
    prompt_valid: Int[Array, "B P"],
    completion_valid: Int[Array, "B G R"],
    *,
    interpret: bool = False,
) -> Float[Array, "B P+G*R H D"]:
    """Attention of prompt ++ G completions: the prompt is causal, a completion sees it and itself.

    Completions are padded to a power of two here, so R should be one, or little less.
    """
    rows, group, length = completion_valid.shape
    prompt, rounded = prompt_valid.shape[1], 1 << (length - 1).bit_length()

    def spread(x: Array) -> Array:
        """The same with `rounded` positions for each completion."""
        own = x[:, prompt:].reshape(rows, group, length, *x.shape[2:])
        own = jnp.pad(own, ((0, 0), (0, 0), (0, rounded - length), *[(0, 0)] * (x.ndim - 2)))
        own = own.reshape(rows, group * rounded, *x.shape[2:])
        return jnp.concatenate([x[:, :prompt], own], axis=1)

    valid = jnp.concatenate([prompt_valid, completion_valid.reshape(rows, -1)], axis=1) != 0
    rule = Rule(_padded(prompt + group * rounded), prompt, rounded)
    out = _attention(spread(q), spread(k), spread(v), spread(valid), rule, interpret)
    own = out[:, prompt:].reshape(rows, group, rounded, *out.shape[2:])[:, :, :length]
    own = own.reshape(rows, group * length, *out.shape[2:])
    return jnp.concatenate([out[:, :prompt], own], axis=1)


def _attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment: Bool[Array, "B S"] | Int[Array, "B S"],
    mask: masks.Mask,
    interpret: bool,
) -> Float[Array, "B S H D"]:
    """Tokens read the tokens of their own segment that the mask allows."""
    size, added = q.shape[1], mask.shape[0] - q.shape[1]
    # Splash does not scale. In float32, because D**-0.5 has no exact bfloat16 for D = 128.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))), 1, 2) for x in (q, k, v)
    )
    segment = segment.astype(jnp.int32)
    segment = jnp.pad(segment, ((0, 0), (0, added)), constant_values=OUTSIDE)
    kernel = _kernel(mask, q.shape[1], _block(mask.shape[0]), interpret)
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment))
    return jnp.swapaxes(out, 1, 2)[:, :size].astype(v.dtype)


@functools.lru_cache(maxsize=64)
def _kernel(mask: masks.Mask, heads: int, block: int, interpret: bool) -> Callable[..., Array]:
    """Splash attention of one row with the mask's schedule, which every head shares."""
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            interpret=interpret,
        )
        # Arrays of the first device that asked would not do for another mesh.
        return jax.tree.map(np.asarray, kernel)


def _block(size: int) -> int:
    """Side of a block of scores: equal blocks of at most LARGEST_BLOCK, in whole lanes."""
    blocks = -(-size // LARGEST_BLOCK)
    return -(-size // (blocks * LANES)) * LANES


def _padded(size: int) -> int:
    return size + -size % _block(size)


def executed_scores(prompt: int, group: int = 0, length: int = 1, causal: bool = True) -> int:
    """Scores that a forward pass computes for one head and row: whole blocks, the skipped ones
    left out. prompt, group, length: as `shared_prefix_attention`; not `causal`: all of them."""
    if not causal:
        return _padded(prompt) ** 2
    rounded = 1 << (length - 1).bit_length()
    size = _padded(prompt + group * rounded)
    return _executed(Rule(size, min(prompt, size) if group else size, rounded))


@functools.lru_cache(maxsize=64)
def _executed(rule: Rule) -> int:
    block = _block(rule.size)
    starts = range(0, rule.size, block)
    parts = ((slice(q, q + block), slice(k, k + block)) for q in starts for k in starts if k <= q)
    return sum(bool(rule[part].any()) for part in parts) * block**2
