"""Attention: XLA reference implementations of the four shapes that P2R needs.

    causal          prompts (prefill)
    segment         patches of several images in one row (vision)
    shared prefix   a prompt and its G completions in one row (update)
    decode          one new token of each completion against prompt and own past (rollout)

`ops.kernels` chooses between these and the kernels of an accelerator.

Letters: B rows, G completions a row, P prompt tokens, R completion tokens, S any sequence,
H query heads, K key-value heads (H = K * groups), D head width. Scores and softmax are float32,
the result has the dtype of the values. Masked scores are a large finite number, not -inf, so that
padding queries with no key at all give a harmless average instead of NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
QUERY_CHUNK = 128


def _scores(q: Float[Array, "*B Q H D"], k: Float[Array, "*B S K D"]) -> Float[Array, "*B K g Q S"]:
    """Scaled dot products; query head h reads key-value head h // (H / K)."""
    *lead, queries, heads, width = q.shape
    kv_heads = k.shape[-2]
    q = q.reshape(*lead, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("...qkgd,...skd->...kgqs", q, k, preferred_element_type=jnp.float32)
    return scores * width**-0.5


def _weighted(
    weights: Float[Array, "*B K g Q S"], v: Float[Array, "*B S K D"]
) -> Float[Array, "*B Q H D"]:
    out = jnp.einsum("...kgqs,...skd->...qkgd", weights.astype(v.dtype), v)
    return out.reshape(*out.shape[:-3], out.shape[-3] * out.shape[-2], out.shape[-1])


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B Q S"],
) -> Float[Array, "B Q H D"]:
    """Grouped-query attention; query i of row b reads key j where `mask[b, i, j]`.

    Many queries go through in chunks, forward and backward, so that scores need memory for the
    number of keys and not for its square: one 2048-token image has 8192 patches. (The mask, one
    byte for each pair, does grow with the square.) A chunk's scores should fit a processor's cache.
    """
    queries, chunk = q.shape[1], QUERY_CHUNK
    if queries <= chunk:
        return _weighted(attention_weights(q, k, mask), v)
    pad = -queries % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> Array:
        return _weighted(attention_weights(part[0], k, part[1]), v)

    out = jnp.moveaxis(jax.lax.map(one, (chunks(q), chunks(mask))), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :queries]


def attention_weights(
    q: Float[Array, "B Q H D"], k: Float[Array, "B S K D"], mask: Bool[Array, "B Q S"]
) -> Float[Array, "B K g Q S"]:
    """The softmax weights of `attention`; query head h is [h // g, h % g]."""
    scores = jnp.where(mask[:, None, None], _scores(q, k), MASKED)
    return jax.nn.softmax(scores, axis=-1)


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    valid: Int[Array, "B S"],
) -> Float[Array, "B S H D"]:
    """Each token reads itself and the valid tokens before it."""
    return attention(q, k, v, causal_mask(valid))


def segment_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment: Int[Array, "B S"],
) -> Float[Array, "B S H D"]:
    """Tokens read the tokens of their own segment."""
    return attention(q, k, v, segment_mask(segment))


def causal_mask(valid: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Each token reads itself and the valid tokens before it."""
    size = valid.shape[-1]
    return jnp.tril(jnp.ones((size, size), bool)) & valid.astype(bool)[:, None, :]


def segment_mask(segment: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Tokens read the tokens of their own segment; segment 0 is padding and reads padding."""
    return segment[:, :, None] == segment[:, None, :]


def shared_prefix_attention(
    q: Float[Array, "B P+G*R H D"],
    k: Float[Array, "B P+G*R K D"],
    v: Float[Array, "B P+G*R K D"],
    prompt_valid: Int[Array, "B P"],
    completion_valid: Int[Array, "B G R"],
    causal: Callable[..., Array] = causal_attention,
) -> Float[Array, "B P+G*R H D"]:
    """Attention of prompt ++ G completions: the prompt is causal, a completion sees it and itself.

    The prompt's keys are read by all completions of the row from one copy, and no score between
    two completions is ever computed: P*P + G*R*(P + R) scores instead of (P + G*R)². Completions
    go through in chunks of about QUERY_CHUNK queries, forward and backward. causal: attention of
    the prompts.
    """
    rows, prompt = prompt_valid.shape
    _, group, length = completion_valid.shape
    from_prompt = causal(q[:, :prompt], k[:, :prompt], v[:, :prompt], prompt_valid)

    own = [x[:, prompt:].reshape(rows, group, length, *x.shape[2:]) for x in (q, k, v)]
    own.append(completion_valid)
    one = functools.partial(_completions_attention, k[:, :prompt], v[:, :prompt], prompt_valid)
    sizes = [n for n in range(1, group + 1) if group % n == 0 and n * length <= QUERY_CHUNK]
    together = max(sizes, default=1)
    if together == group:
        out = one(own)
    else:
        chunks = [
            jnp.moveaxis(x.reshape(rows, group // together, together, *x.shape[2:]), 1, 0)
            for x in own
        ]
        out = jnp.moveaxis(jax.lax.map(jax.checkpoint(one), chunks), 0, 1)
    return jnp.concatenate([from_prompt, out.reshape(rows, group * length, *q.shape[2:])], axis=1)


def _completions_attention(
    prompt_k: Float[Array, "B P K D"],
    prompt_v: Float[Array, "B P K D"],
    prompt_valid: Int[Array, "B P"],
    own: Sequence[Array],
) -> Float[Array, "B G*R H D"]:
    """Completions against the shared prompt and, causally, themselves; own: q, k, v, valid."""
    q, k, v, valid = own
    rows, group, length, heads, width = q.shape
    prompt, kv_heads = prompt_k.shape[1:3]
    # [B, K, g, G*R, P]: the group is folded into the query dimension.
    to_prompt = _scores(q.reshape(rows, group * length, heads, width), prompt_k)
    to_prompt = jnp.where(prompt_valid.astype(bool)[:, None, None, None, :], to_prompt, MASKED)
    to_prompt = to_prompt.reshape(rows, kv_heads, heads // kv_heads, group, length, prompt)
    to_prompt = jnp.moveaxis(to_prompt, 3, 1)
    own_mask = causal_mask(valid.reshape(rows * group, length))
    own_mask = own_mask.reshape(rows, group, 1, 1, length, length)
    to_own = jnp.where(own_mask, _scores(q, k), MASKED)

    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], -1), axis=-1)
    at_prompt = jnp.moveaxis(weights[..., :prompt], 1, 3)
    at_prompt = at_prompt.reshape(rows, kv_heads, heads // kv_heads, group * length, prompt)
    out = _weighted(at_prompt, prompt_v)
    return out + _weighted(weights[..., prompt:], v).reshape(out.shape)


def decode_attention(
    q: Float[Array, "B G H D"],
    k_new: Float[Array, "B G K D"],
    v_new: Float[Array, "B G K D"],
    prefix: tuple[Float[Array, "B K P D"], Float[Array, "B K P D"]],
    suffix: tuple[Float[Array, "B K G C D"], Float[Array, "B K G C D"]],
    prefix_valid: Int[Array, "B P"],
    suffix_valid: Bool[Array, "B G C"],
) -> Float[Array, "B G H D"]:
    """One decoding step of G completions a row against the shared prefix and their own past.

    The new token's own key and value are passed apart from the suffix cache (which holds the
    tokens before it where `suffix_valid`), so that a layer only reads its caches and the caller
    writes them once for all layers. Heads come first in the caches: each head's keys are then one
    contiguous matrix, read once for all queries.
    """
    rows, group, heads, width = q.shape
    kv_heads, prompt = prefix[0].shape[1:3]
    per_head = q.reshape(rows, group, kv_heads, heads // kv_heads, width)
    scale = width**-0.5

    def scores(pattern: str, queries: Array, keys: Array) -> Array:
        return jnp.einsum(pattern, queries, keys, preferred_element_type=jnp.float32) * scale

    to_prefix = scores("bgkhd,bkpd->bkghp", per_head, prefix[0])
    to_prefix = jnp.where(prefix_valid.astype(bool)[:, None, None, None], to_prefix, MASKED)
    to_suffix = scores("bgkhd,bkgcd->bkghc", per_head, suffix[0])
    to_suffix = jnp.where(suffix_valid[:, None, :, None], to_suffix, MASKED)
    to_self = scores("bgkhd,bgkd->bkgh", per_head, k_new)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_suffix, to_self], -1), axis=-1)
    weights = weights.astype(v_new.dtype)
    out = jnp.einsum("bkghp,bkpd->bgkhd", weights[..., :prompt], prefix[1])
    out += jnp.einsum("bkghc,bkgcd->bgkhd", weights[..., prompt:-1], suffix[1])
    out += jnp.einsum("bkgh,bgkd->bgkhd", weights[..., -1], v_new)
    return out.reshape(rows, group, heads, width)
