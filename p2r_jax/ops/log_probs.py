"""Log-probabilities over a large vocabulary without ever holding [tokens, V].

B rows, T tokens of each, E width, V vocabulary (151,936 for Qwen3-VL). Tokens go through the output
matrix in chunks, and the backward pass recomputes each chunk's logits instead of storing them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import MASKED

TOKEN_CHUNK = 1024


def masked_logits(
    hidden: Float[Array, "*T E"],
    unembedding: Float[Array, "V E"],
    allowed: Bool[Array, " V"],
) -> Float[Array, "*T V"]:
    """Float32 logits; tokens that are not allowed get a huge negative."""
    return jnp.where(allowed, _logits(hidden, unembedding), MASKED)


@jax.custom_vjp
def _logits(hidden: Float[Array, "*T E"], unembedding: Float[Array, "V E"]) -> Float[Array, "*T V"]:
    rounded = unembedding.astype(hidden.dtype)
    return jnp.einsum("...e,ve->...v", hidden, rounded, preferred_element_type=jnp.float32)


def _logits_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    hidden, unembedding = saved
    rounded = unembedding.astype(hidden.dtype)
    dh = jnp.einsum("...v,ve->...e", d, rounded, preferred_element_type=jnp.float32)
    du = jnp.einsum("...v,...e->ve", d, hidden, preferred_element_type=jnp.float32)
    return dh.astype(hidden.dtype), du.astype(unembedding.dtype)


_logits.defvjp(lambda hidden, u: (_logits(hidden, u), (hidden, u)), _logits_backward)


def token_log_probs(
    hidden: Float[Array, "B T E"],
    unembedding: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    allowed: Bool[Array, " V"],
    temperature: float = 1.0,
    shards: int = 1,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy of its distribution (nats), both float32.

    The distribution is the sampler's: restricted to `allowed`, at `temperature`. shards: devices
    that the rows are split over. Memory of each is O(TOKEN_CHUNK * V), forward and backward.

    A chunk takes a few tokens of *every* row, so that each device has its share of it and no hidden
    state has to move.
    """
    rows, count, width = hidden.shape
    chunk = min(max(1, TOKEN_CHUNK * shards // rows), count)
    parts = -(-count // chunk)
    pad = ((0, 0), (0, parts * chunk - count))
    hidden = jnp.pad(hidden, (*pad, (0, 0))).reshape(rows, parts, chunk, width)
    targets = jnp.pad(targets, pad).reshape(rows, parts, chunk)

    @jax.checkpoint
    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        h, target = inputs
        log_p = jax.nn.log_softmax(masked_logits(h, unembedding, allowed) / temperature)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return jnp.take_along_axis(log_p, target[..., None], -1)[..., 0], entropy

    out = jax.lax.map(one, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)))
    log_prob, entropy = (jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :count] for x in out)
    return log_prob, entropy
