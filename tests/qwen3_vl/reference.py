"""The reference: tiny random Qwen3-VL models of Hugging Face transformers, and batches for them.

The two configs differ wherever the published models differ from each other, and in a few places
where they agree, so that no value can be hard-coded unnoticed:

              tied head  heads*head_dim  vision heads  patch  taps of depth   M-RoPE section
  uneven      no         64 != 48        2 x 72        16     0, 1, 3 of 5    4, 2, 2
  compact     yes        96 != 64        3 x 32        8      1, 3 of 4       6, 3, 3

Norms and biases are perturbed, since a weight of one or a bias of zero hides its own absence;
matrices keep their small initial values, since large activations hide a wrong epsilon, but for the
mergers', where small ones would hide the wrong GELU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from p2r_jax.ops.attention import attention, causal_mask
from p2r_jax.qwen3_vl import Qwen3VL, Qwen3VLConfig, hf, load_pretrained
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import prompts_from_hf
from p2r_jax.qwen3_vl.names import flat_state, parameters

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

GATE = 3e-6
"""Relative L2 between float32 values of the port and of the reference, logits or any stage."""
LARGEST = 1e-4
"""Difference of any single logit."""

IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303
VOCABULARY = 320

CONFIGS: dict[str, dict[str, Any]] = {
    "uneven": {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 80,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": {"mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "depth": 5,
            "hidden_size": 144,
            "num_heads": 2,
            "intermediate_size": 96,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1, 3],
            "num_position_embeddings": 144,
            "patch_size": 16,
        },
    },
    "compact": {
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "intermediate_size": 72,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e5,
            "rope_scaling": {"mrope_section": [6, 3, 3]},
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 96,
            "num_heads": 3,
            "intermediate_size": 80,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [1, 3],
            "num_position_embeddings": 49,
            "patch_size": 8,
        },
    },
}


def hf_config(name: str) -> dict[str, Any]:
    """A config in the form of the published files (transformers 4.57)."""
    raw = CONFIGS[name]
    rope = raw["text_config"]["rope_scaling"]
    rope = rope | {"mrope_interleaved": True, "rope_type": "default"}
    return {
        "model_type": "qwen3_vl",
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": raw["tie_word_embeddings"],
        "text_config": raw["text_config"]
        | {"model_type": "qwen3_vl_text", "vocab_size": VOCABULARY, "rope_scaling": rope},
        "vision_config": raw["vision_config"]
        | {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh"},
    }


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights twice: in transformers (float32, eager) and in the port."""

    torch_model: Any
    model: Qwen3VL
    folder: Path
    """Where transformers saved them: one safetensors file, config.json in the 5.x form."""

    @property
    def patch_dim(self) -> int:
        return self.model.config.vision.patch_dim


def make_pair(name: str, folder: Path) -> Pair:
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(**hf_config(name))
    config._attn_implementation = "eager"
    torch_model = transformers.Qwen3VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for key, parameter in torch_model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "merger" in key:
                parameter.mul_(3)
    torch_model.save_pretrained(folder)
    return Pair(torch_model, load_pretrained(folder, dtype="float32"), folder)


Row = Sequence["int | tuple[int, int]"]
"""A prompt: an int is that many text tokens, a pair is an image of that many patches."""

MIXED: tuple[Row, ...] = (
    (3, (4, 6), 5, (8, 2), 1, (2, 2), 4),
    (9,),
    (2, (6, 4), 6),
)
"""Three images, none, and one."""

# Scenarios of equal shape share a compiled program: sizes are chosen to make them meet.
SCENARIOS: dict[str, tuple[tuple[Row, ...], str]] = {
    "text": (((14,), (6,)), "right"),
    "one image": (((5, (8, 8), 9),), "right"),
    "images of mixed sizes": (((2, (4, 6), 3, (2, 10), 1, (10, 2), 4),), "right"),
    "right padding": (MIXED, "right"),
    "left padding": (MIXED, "left"),
    "strips": (((1, (2, 2), 3, (2, 60), 75, (60, 2), 2), (4, (60, 2), 1)), "left"),
}
"""`strips` has more patches and more tokens than attention takes in one chunk."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a Hugging Face processor returns, in NumPy."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    pixel_values: np.ndarray | None
    image_grid_thw: np.ndarray | None

    @property
    def valid(self) -> np.ndarray:
        return self.attention_mask.astype(bool)

    def torch(self) -> dict[str, torch.Tensor | None]:
        fields = dataclasses.asdict(self)
        fields["mm_token_type_ids"] = (self.input_ids == IMAGE).astype(int)
        return {k: None if v is None else torch.tensor(v) for k, v in fields.items()}

    def arguments(self) -> tuple[np.ndarray | None, ...]:
        """For `forward_hf` and `prompts_from_hf`."""
        return (self.input_ids, self.attention_mask, self.pixel_values, self.image_grid_thw)


def make_batch(rows: Sequence[Row], patch_dim: int, side: str = "right", seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens: list[list[int]] = []
    grids: list[tuple[int, int, int]] = []
    for row in rows:
        tokens.append([])
        for item in row:
            if isinstance(item, int):
                tokens[-1] += rng.integers(0, IMAGE, item).tolist()
            else:
                grids.append((1, *item))
                placeholders = [IMAGE] * (item[0] * item[1] // 4)
                tokens[-1] += [VISION_START, *placeholders, VISION_END]
    size = max(map(len, tokens))
    ids, mask = np.zeros((2, len(rows), size), np.int64)
    for i, row_tokens in enumerate(tokens):
        used = len(row_tokens)
        span = slice(0, used) if side == "right" else slice(size - used, size)
        ids[i, span], mask[i, span] = row_tokens, 1
    if not grids:
        return Batch(ids, mask, None, None)
    thw = np.array(grids)
    # Faint images: the variance of strong ones would drown the epsilon of a normalisation.
    pixels = rng.uniform(-0.3, 0.3, (thw.prod(1).sum(), patch_dim)).astype(np.float32)
    return Batch(ids, mask, pixels, thw)


def scenario(name: str, patch_dim: int) -> Batch:
    rows, side = SCENARIOS[name]
    return make_batch(rows, patch_dim, side)


def torch_logits(pair: Pair, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        return pair.torch_model(**batch.torch()).logits.numpy()


def prompts_of(pair: Pair, batch: Batch) -> Prompts:
    return prompts_from_hf(pair.model.config, *batch.arguments())


def with_config(model: Qwen3VL, config: Qwen3VLConfig) -> Qwen3VL:
    """The same weights under another config."""
    graph, _ = nnx.split(hf.abstract_model(config))
    return nnx.merge(graph, nnx.state(model))


def to_hf(model: Qwen3VL, state: Any) -> dict[str, np.ndarray]:
    """Parameters or gradients of the port under their Hugging Face names and shapes."""
    flat = flat_state(state)
    out = {}
    for p in parameters(model.config, {name: x.shape for name, x in flat.items()}):
        value = np.asarray(flat[p.path].get_value())
        for i, name in enumerate(p.names):
            out[name] = p.to_hf(value[i] if p.stacked else value)
    return out


def tensors_of(model: Qwen3VL) -> dict[str, np.ndarray]:
    """Parameters of the port under their Hugging Face names and shapes."""
    return to_hf(model, nnx.state(model, nnx.Param))


def relative_l2(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@nnx.jit
def jax_policy_loss(model: Qwen3VL, prompts: Prompts, weights: jax.Array) -> tuple[jax.Array, Any]:
    """-(sum of weight x log-probability of the next token), and its gradient.

    Activations are recomputed in the backward pass, as in training.
    """

    def loss(model: Qwen3VL) -> jax.Array:
        mask = causal_mask(prompts.valid)
        x, deepstack = model.embed_prompts(prompts, remat=True)
        hidden, _ = model.language_model(
            x,
            prompts.positions,
            lambda q, k, v, _: (attention(q, k, v, mask), None),
            deepstack=deepstack,
            visual_slot=prompts.visual_slot,
            remat=True,
        )
        log_probs = jax.nn.log_softmax(hidden @ model.unembedding.T)[:, :-1]
        chosen = jnp.take_along_axis(log_probs, prompts.tokens[:, 1:, None], -1)[..., 0]
        return -(weights * chosen).sum()

    return nnx.value_and_grad(loss)(model)


def torch_policy_loss(pair: Pair, batch: Batch, weights: np.ndarray) -> tuple[float, dict]:
    inputs = batch.torch()
    pair.torch_model.zero_grad()
    log_probs = pair.torch_model(**inputs).logits.log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    loss = -(torch.tensor(weights) * chosen).sum()
    loss.backward()
    gradients = {
        name: parameter.grad.numpy().copy()
        for name, parameter in pair.torch_model.named_parameters()
    }
    pair.torch_model.zero_grad()
    return loss.item(), gradients
