"""Qwen3-VL in Flax NNX, exact against Hugging Face transformers."""

from p2r_jax.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from p2r_jax.qwen3_vl.hf import load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.model import Qwen3VL, forward_hf

__all__ = [
    "Qwen3VL",
    "Qwen3VLConfig",
    "TextConfig",
    "VisionConfig",
    "forward_hf",
    "load_pretrained",
    "save_pretrained",
]
