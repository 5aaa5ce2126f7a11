"""Log-probabilities over a large vocabulary without ever holding [tokens, V].

T tokens, E width, V vocabulary (151,936 for Qwen3-VL). Tokens go through the output matrix in
chunks, and the backward pass recomputes each chunk's logits instead of storing them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import MASKED


def masked_logits(
    hidden: Float[Array, "*T E"],
    unembedding: Float[Array, "V E"],
    allowed: Bool[Array, " V"],
    temperature: float,
) -> Float[Array, "*T V"]:
    """Float32 logits at a sampling temperature; tokens that are not allowed get a huge negative."""
    logits = jnp.einsum("...e,ve->...v", hidden, unembedding, preferred_element_type=jnp.float32)
    return jnp.where(allowed, logits / temperature, MASKED)


def token_log_probs(
    hidden: Float[Array, "T E"],
    unembedding: Float[Array, "V E"],
    targets: Int[Array, " T"],
    allowed: Bool[Array, " V"],
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Log-probability of each target and entropy of its distribution (nats), both float32.

    The distribution is the sampler's: restricted to `allowed`, at `temperature`. Memory is
    O(chunk * V), forward and backward.
    """
    count, width = hidden.shape
    chunk = min(chunk, count)
    padded = -(-count // chunk) * chunk
    hidden = jnp.pad(hidden, ((0, padded - count), (0, 0))).reshape(-1, chunk, width)
    targets = jnp.pad(targets, (0, padded - count)).reshape(-1, chunk)

    @jax.checkpoint
    def one(inputs):
        h, target = inputs
        log_p = jax.nn.log_softmax(masked_logits(h, unembedding, allowed, temperature))
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return jnp.take_along_axis(log_p, target[:, None], -1)[:, 0], entropy

    log_prob, entropy = jax.lax.map(one, (hidden, targets))
    return log_prob.reshape(-1)[:count], entropy.reshape(-1)[:count]
