"""The configs that benchmarks run at: the published ones, and a tiny one with their vocabulary."""

from __future__ import annotations

import copy
from typing import Any

from p2r_jax.qwen3_vl.published import published

SIZES = ("tiny", "2B", "4B", "8B", "32B")

TINY_TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
}
TINY_VISION = {
    "depth": 6,
    "hidden_size": 192,
    "num_heads": 3,
    "intermediate_size": 768,
    "out_hidden_size": 256,
    "deepstack_visual_indexes": [1, 3, 4],
}
"""51,360,192 parameters, three quarters of them the embedding of 151,936 tokens."""


def hf_config(size: str) -> dict[str, Any]:
    """`config.json` of a size, in the form of the published files."""
    name = "2B" if size == "tiny" else size
    config = published(name)
    if size == "tiny":
        config = copy.deepcopy(config)
        config["text_config"] |= TINY_TEXT
        config["vision_config"] |= TINY_VISION
    return config
