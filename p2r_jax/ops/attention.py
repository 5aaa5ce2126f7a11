"""Attention: XLA reference implementations of the three shapes that P2R needs.

Letters: B rows, G completions a row, P prompt tokens, R completion tokens, S any sequence,
H query heads, K key-value heads (H = K * groups), D head width. Scores and softmax are float32,
the result has the dtype of the values. Masked scores are a large finite number, not -inf, so that
padding queries with no key at all give a harmless average instead of NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
QUERY_CHUNK = 1024


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

    Many queries go through in chunks, forward and backward, so that memory grows with the number
    of keys and not with its square: one 2048-token image has 8192 patches.
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
) -> Float[Array, "B P+G*R H D"]:
    """Attention of prompt ++ G completions: the prompt is causal, a completion sees it and itself.

    The prompt's keys are read by all completions of the row from one copy, and no score between
    two completions is ever computed: P*P + G*R*(P + R) scores instead of (P + G*R)².
    """
    rows, prompt = prompt_valid.shape
    _, group, length = completion_valid.shape
    heads, width = q.shape[-2:]
    kv_heads = k.shape[-2]
    from_prompt = attention(q[:, :prompt], k[:, :prompt], v[:, :prompt], causal_mask(prompt_valid))

    q_own = q[:, prompt:].reshape(rows, group, length, heads, width)
    k_own, v_own = (x[:, prompt:].reshape(rows, group, length, kv_heads, width) for x in (k, v))
    # [B, K, g, G*R, P]: the group is folded into the query dimension.
    to_prompt = _scores(q[:, prompt:], k[:, :prompt])
    to_prompt = jnp.where(prompt_valid.astype(bool)[:, None, None, None, :], to_prompt, MASKED)
    to_prompt = to_prompt.reshape(rows, kv_heads, heads // kv_heads, group, length, prompt)
    to_prompt = jnp.moveaxis(to_prompt, 3, 1)
    to_own = _scores(q_own, k_own)
    own_mask = causal_mask(completion_valid.reshape(rows * group, length))
    own_mask = own_mask.reshape(rows, group, 1, 1, length, length)
    to_own = jnp.where(own_mask, to_own, MASKED)

    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], -1), axis=-1)
    at_prompt = jnp.moveaxis(weights[..., :prompt], 1, 3)
    at_prompt = at_prompt.reshape(rows, kv_heads, heads // kv_heads, group * length, prompt)
    out = _weighted(at_prompt, v[:, :prompt])
    out += _weighted(weights[..., prompt:], v_own).reshape(out.shape)
    return jnp.concatenate([from_prompt, out], axis=1)


def decode_attention(
    q: Float[Array, "B G H D"],
    k_new: Float[Array, "B G K D"],
    v_new: Float[Array, "B G K D"],
    prefix: tuple[Float[Array, "B P K D"], Float[Array, "B P K D"]],
    suffix: tuple[Float[Array, "B G R K D"], Float[Array, "B G R K D"]],
    prompt_valid: Int[Array, "B P"],
    step: Int[Array, ""],
) -> Float[Array, "B G H D"]:
    """One decoding step of G completions a row against the shared prefix and their own suffix.

    The new token's own key and value are passed apart from the suffix cache (which holds the
    `step` tokens before it), so that a layer only reads its caches and the caller writes them
    once for all layers.
    """
    rows, group, heads, width = q.shape
    prompt, length = prefix[0].shape[1], suffix[0].shape[2]
    to_prefix = _scores(q, prefix[0])  # [B, K, g, G, P]
    to_prefix = jnp.where(prompt_valid.astype(bool)[:, None, None, None, :], to_prefix, MASKED)
    to_prefix = jnp.moveaxis(to_prefix, 3, 1)[..., None, :]  # [B, G, K, g, 1, P]
    to_suffix = _scores(q[:, :, None], suffix[0])  # [B, G, K, g, 1, R]
    to_suffix = jnp.where(jnp.arange(length) < step, to_suffix, MASKED)
    to_self = _scores(q[:, :, None], k_new[:, :, None])
    weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_suffix, to_self], -1), axis=-1)
    at_prefix = jnp.moveaxis(weights[..., 0, :prompt], 1, 3)  # [B, K, g, G, P]
    out = _weighted(at_prefix, prefix[1])
    out += _weighted(weights[..., prompt : prompt + length], suffix[1])[:, :, 0]
    out += _weighted(weights[..., prompt + length :], v_new[:, :, None])[:, :, 0]
    return out.reshape(rows, group, heads, width)
