"""The Qwen3-VL language model: stacked and scanned decoder layers with interleaved M-RoPE.

B rows, S tokens, E width, H query heads, K key-value heads, D head width, L layers, J DeepStack
levels, M visual tokens. What a token may read is not decided here: the caller passes `attend`,
and prefill, decoding and the shared-prefix update are three such functions around one decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from p2r_jax.ops.kernels import Kernels
from p2r_jax.qwen3_vl.config import TextConfig
from p2r_jax.qwen3_vl.layers import Linear, RMSNorm, inverse_frequencies, param, rotate_half, stack
from p2r_jax.qwen3_vl.positions import mrope_axes

Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""(q [B,S,H,D], k [B,S,K,D], v [B,S,K,D], this layer's slice of `layer_inputs`) ->
(attended [B,S,H,D], anything to stack over layers)."""


def rotary_angles(
    config: TextConfig, positions: Int[Array, "3 *S"]
) -> tuple[Float[Array, "*S 1 D"], Float[Array, "*S 1 D"]]:
    """Cosine and sine of the interleaved M-RoPE angles, float32."""
    half = config.head_dim // 2
    frequencies = inverse_frequencies(config.rope_theta, half)
    by_axis = jnp.moveaxis(positions, 0, -1)[..., mrope_axes(config.mrope_section)]
    angles = by_axis.astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], -1)[..., None, :]
    return jnp.cos(angles), jnp.sin(angles)


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.input_norm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

        def linear(inputs, outputs, axes):
            return Linear(inputs, outputs, axes, bias=False, rngs=rngs)

        self.q_proj = linear((width,), (heads, head_dim), ("embed", "heads", None))
        self.k_proj = linear((width,), (kv_heads, head_dim), ("embed", "kv_heads", None))
        self.v_proj = linear((width,), (kv_heads, head_dim), ("embed", "kv_heads", None))
        self.o_proj = linear((heads, head_dim), (width,), ("heads", None, "embed"))
        self.gate_proj = linear((width,), (config.intermediate_size,), ("embed", "mlp"))
        self.up_proj = linear((width,), (config.intermediate_size,), ("embed", "mlp"))
        self.down_proj = linear((config.intermediate_size,), (width,), ("mlp", "embed"))

    def __call__(
        self,
        x: Float[Array, "B S E"],
        cos: Float[Array, "B S 1 D"],
        sin: Float[Array, "B S 1 D"],
        attend: Attend,
        layer_input: Any,
    ) -> tuple[Float[Array, "B S E"], Any]:
        h = self.input_norm(x)
        q, k, v = self.q_norm(self.q_proj(h)), self.k_norm(self.k_proj(h)), self.v_proj(h)
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        attended, kept = attend(q, k, v, layer_input)
        x = x + self.o_proj(attended)
        h = self.post_attention_norm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(h)) * self.up_proj(h)), kept


class TextDecoder(nnx.Module):
    def __init__(self, config: TextConfig, rngs: nnx.Rngs, kernels: Kernels):
        self.config = config
        self.kernels = kernels
        self.embed_tokens = param(
            rngs,
            (config.vocab_size, config.hidden_size),
            ("vocab", "embed"),
            fan_in=config.hidden_size,
        )
        self.layers = stack(lambda rngs: DecoderLayer(config, rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        positions: Int[Array, "3 B S"],
        attend: Attend,
        layer_inputs: Any = None,
        deepstack: Float[Array, "J B M E"] | None = None,
        visual_slot: Int[Array, "B S"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "B S E"], Any]:
        """Final hidden states and whatever `attend` returned, stacked over layers.

        `layer_inputs` is a pytree with leading axis L (the layer's index, say). Level j of
        `deepstack` is added to the visual tokens after layer j.
        """
        # Angles are float32, the products are in the model dtype: the reference's rounding.
        cos, sin = (t.astype(x.dtype) for t in rotary_angles(self.config, positions))
        graph, state = nnx.split(self.layers)

        def add_level(x, index):
            assert deepstack is not None
            assert visual_slot is not None
            gathered = jnp.take_along_axis(
                jax.lax.dynamic_index_in_dim(deepstack, index, keepdims=False),
                jnp.maximum(visual_slot, 0)[..., None],
                axis=1,
            )
            return x + jnp.where(visual_slot[..., None] >= 0, gathered, 0)

        def body(x, inputs):
            index, layer_state, layer_input = inputs
            x, kept = nnx.merge(graph, layer_state)(x, cos, sin, attend, layer_input)
            if deepstack is not None:
                x = jax.lax.cond(index < deepstack.shape[0], add_level, lambda x, _: x, x, index)
            return self.kernels.split_kept(x) if remat else x, kept

        if remat:
            body, x = jax.checkpoint(body), self.kernels.split_kept(x)
        indexes = np.arange(self.config.num_hidden_layers, dtype=np.int32)
        x, kept = jax.lax.scan(body, x, (indexes, state, layer_inputs))
        return self.norm(x), kept
