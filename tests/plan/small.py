"""A run so small that all of its programs compile in seconds, for four chips that are not there."""

from __future__ import annotations

from p2r_jax.config import (
    BucketConfig,
    MeshConfig,
    ModelConfig,
    PhaseConfig,
    RolloutConfig,
    TrainConfig,
)
from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.published import published


def small_model() -> Qwen3VLConfig:
    """Three layers in the proportions of the 2B; heads that two chips can share."""
    config = published("2B")
    config["text_config"] |= {
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 151936,
    }
    config["vision_config"] |= {
        "depth": 3,
        "hidden_size": 256,
        "num_heads": 4,
        "intermediate_size": 512,
        "out_hidden_size": 256,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return Qwen3VLConfig.from_hf(config)


def small_run(**settings) -> TrainConfig:
    """A reasoner learns from 8 prompts of 4 images, 512 pixels a side; its perceiver sees one."""
    phase = {"prompts": 8, "group": 2, "max_new_tokens": 64, "partner_max_new_tokens": 64}
    return TrainConfig(
        **{
            "model": ModelConfig(max_pixels=512 * 512),
            "mesh": MeshConfig(data=1, fsdp=2, tensor=2),
            "buckets": BucketConfig(
                patches=[1024, 4096],
                prompt_tokens=[768, 1536],
                response_tokens=[32],
                canvas=[512],
                image=[1024],
            ),
            "rollout": RolloutConfig(greedy_slots=8),
            "phases": [PhaseConfig(role="reasoner", microbatch=4, **phase)],
            **settings,
        }
    )
