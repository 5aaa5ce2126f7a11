"""Perceive-to-Reason in JAX: rollouts, PRA-GRPO training, evaluation and export of Qwen3-VL."""

__version__ = "0.1.0"
