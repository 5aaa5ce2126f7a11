"""The whole Qwen3-VL model, and the bridge from Hugging Face processor outputs.

Letters as in `inputs`; V vocabulary, E text width.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from p2r_jax.ops.kernels import Kernels
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.inputs import Patches, Prompts, patch_layout, token_layout
from p2r_jax.qwen3_vl.layers import look_up, param
from p2r_jax.qwen3_vl.text import TextDecoder
from p2r_jax.qwen3_vl.vision import VisionTower


class Qwen3VL(nnx.Module):
    """Qwen3-VL, general over configs; every shape comes from `config`."""

    def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs, kernels: Kernels | None = None):
        """kernels: default, the XLA reference implementations."""
        self.config = config
        self.kernels = kernels or Kernels()
        self.kernels.check_heads(
            num_key_value_heads=config.text.num_key_value_heads,
            vision_num_heads=config.vision.num_heads,
        )
        self.compute_dtype: Any = None
        """Of activations; None = of the weights. Weights are rounded to it where they are used."""
        self.name_or_path = ""
        """The folder the weights came from, as in transformers; "" if made from nothing."""
        self.visual = VisionTower(config.vision, rngs, self.kernels)
        self.language_model = TextDecoder(config.text, rngs, self.kernels)
        shape = (config.text.vocab_size, config.text.hidden_size)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else param(rngs, shape, ("vocab", "embed"), fan_in=shape[1])
        )

    def embed(
        self,
        tokens: Int[Array, "B S"],
        visual: Float[Array, "B M E"] | None = None,
        visual_slot: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S E"]:
        """Token embeddings, with visual tokens in place of the image placeholders."""
        table = self.language_model.embed_tokens[...]
        x = look_up(table, tokens, self.compute_dtype or table.dtype)
        if visual is not None:
            assert visual_slot is not None
            gathered = jnp.take_along_axis(visual, jnp.maximum(visual_slot, 0)[..., None], axis=1)
            x = jnp.where(visual_slot[..., None] >= 0, gathered.astype(x.dtype), x)
        return self.kernels.pin_rows(x)

    def embed_prompts(
        self, prompts: Prompts, remat: bool = False
    ) -> tuple[Float[Array, "B P E"], Float[Array, "J B M E"] | None]:
        """Run the vision tower; returns input embeddings and DeepStack features."""
        if prompts.patches is None:
            return self.embed(prompts.tokens), None
        visual, deepstack = self.visual(prompts.patches, remat=remat)
        return self.embed(prompts.tokens, visual, prompts.visual_slot), deepstack

    @property
    def unembedding(self) -> Float[Array, "V E"]:
        """The output matrix, tied or not, as [vocabulary, width]."""
        head = self.language_model.embed_tokens if self.lm_head is None else self.lm_head
        return head[...]

    def __call__(self, prompts: Prompts) -> Float[Array, "B P V"]:
        """Logits of every prompt token (teacher forcing)."""
        x, deepstack = self.embed_prompts(prompts)
        hidden, _ = self.language_model(
            x,
            prompts.positions,
            lambda q, k, v, _: (self.kernels.causal(q, k, v, prompts.valid), None),
            deepstack=deepstack,
            visual_slot=prompts.visual_slot,
        )
        return hidden @ self.unembedding.T.astype(hidden.dtype)


@nnx.jit
def _forward(model: Qwen3VL, prompts: Prompts) -> Float[Array, "B P V"]:
    return model(prompts)


def prompts_from_hf(
    config: Qwen3VLConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
) -> Prompts:
    """`Prompts` from what a Hugging Face processor returns; left or right padding is kept.

    Raises ValueError if placeholders, grids and patches do not match, or on video grids.
    """
    input_ids, valid = np.asarray(input_ids), np.asarray(attention_mask).astype(bool)
    rows, size = input_ids.shape
    merge = config.vision.spatial_merge_size
    thw = np.zeros((0, 3), int) if image_grid_thw is None else np.asarray(image_grid_thw)
    if (thw[:, 0] != 1).any():
        raise ValueError("image_grid_thw has t > 1: video is not supported")
    given, wanted = 0 if pixel_values is None else len(pixel_values), int(thw.prod(1).sum())
    if given != wanted:
        raise ValueError(f"pixel_values has {given} patches, image_grid_thw asks for {wanted}")
    queue = [(int(h), int(w)) for _, h, w in thw]
    grids: list[list[tuple[int, int]]] = []
    for row in range(rows):
        needed = int((input_ids[row][valid[row]] == config.image_token_id).sum())
        mine: list[tuple[int, int]] = []
        while needed > 0 and queue:
            h, w = queue.pop(0)
            mine.append((h, w))
            needed -= h * w // merge**2
        if needed:
            raise ValueError(f"row {row}: image placeholders do not match image_grid_thw")
        grids.append(mine)
    if queue:
        raise ValueError(f"{len(queue)} image(s) in image_grid_thw have no placeholders")

    parts = [
        token_layout(
            [input_ids[row][valid[row]]],
            [grids[row]],
            config,
            size,
            pad_token_id=0,
            padding_side="left" if not valid[row, 0] else "right",
        )
        for row in range(rows)
    ]
    fields = {
        name: jnp.asarray(
            np.concatenate([p[name] for p in parts], axis=1 if name == "positions" else 0)
        )
        for name in parts[0]
    }
    patches = None
    if len(thw):
        counts = [sum(h * w for h, w in row) for row in grids]
        layout = patch_layout(grids, config, max(counts))
        pixels = np.zeros((rows, max(counts), config.vision.patch_dim), np.float32)
        start = 0
        for row, count in enumerate(counts):
            pixels[row, :count] = np.asarray(pixel_values)[start : start + count]
            start += count
        patches = Patches(pixels=jnp.asarray(pixels), **layout)
    return Prompts(patches=patches, **fields)


def forward_hf(
    model: Qwen3VL,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
) -> Float[Array, "B S V"]:
    """Logits for the outputs of a Hugging Face processor (NumPy), to check parity or move over.

    input_ids, attention_mask: int [B, S]; pixel_values: float32 [sum of patches, C·T·p²];
    image_grid_thw: int [images, 3]. Logits on padding are meaningless.
    """
    prompts = prompts_from_hf(model.config, input_ids, attention_mask, pixel_values, image_grid_thw)
    return _forward(model, prompts)
