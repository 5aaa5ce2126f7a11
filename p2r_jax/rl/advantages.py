"""From the rewards of a group of completions to their advantages.

A group is the G completions sampled for one prompt; B prompts make a batch. Everything is [B, G].
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

EPSILON = 1e-6


def group_advantages(
    rewards: Float[ArrayLike, "B G"],
    normalize_by_std: bool = True,
    *,
    valid: Bool[ArrayLike, "B G"] | None = None,
    std_over: Literal["group", "batch"] = "group",
) -> Float[Array, "B G"]:
    """Rewards relative to their group: (r − mean) / (std + 1e-6), P2R §2.

    The standard deviation is the sample one (ddof = 1). A group in which all rewards agree gets
    zeros. With G = 1 there is nothing to compare with: mean 0 and std 1, so the advantage is the
    reward (nearly: the epsilon stays).

    Args:
      rewards: one per completion.
      normalize_by_std: False leaves r − mean, as Dr. GRPO does.
      valid: False where a sample was dropped, say because its answer could not be graded. Such a
        reward takes no part in the statistics and its advantage is 0; a group left with a single
        valid sample gets 0 too.
      std_over: divide by the deviation within each group, or over all valid rewards of the batch.

    Returns:
      float32 advantages.

    Raises:
      ValueError: unknown `std_over`.
    """
    if std_over not in ("group", "batch"):
        raise ValueError(f"unknown std_over {std_over!r}; expected 'group' or 'batch'")
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = _as_valid(rewards, valid)

    if rewards.shape[1] == 1:
        mean = jnp.zeros_like(rewards)
        group_std = jnp.ones_like(rewards)
    else:
        mean = _mean(rewards, valid, axis=1)
        group_std = _std(rewards, valid, axis=1)
        valid = valid & (valid.sum(axis=1, keepdims=True) > 1)

    advantages = rewards - mean
    if normalize_by_std:
        std = group_std if std_over == "group" else _std(rewards, valid, axis=None)
        advantages = advantages / (std + EPSILON)
    return jnp.where(valid, advantages, 0.0)


def zero_variance_groups(
    rewards: Float[ArrayLike, "B G"], valid: Bool[ArrayLike, "B G"] | None = None
) -> Bool[Array, " B"]:
    """Groups whose valid rewards all agree, and which therefore teach nothing."""
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = _as_valid(rewards, valid)
    lowest = jnp.where(valid, rewards, jnp.inf).min(axis=1)
    highest = jnp.where(valid, rewards, -jnp.inf).max(axis=1)
    return lowest >= highest


def _as_valid(rewards: Array, valid: ArrayLike | None) -> Array:
    if valid is None:
        return jnp.ones(rewards.shape, bool)
    return jnp.asarray(valid, bool)


def _mean(values: Array, valid: Array, axis: int | None) -> Array:
    count = valid.sum(axis=axis, keepdims=True)
    return jnp.where(valid, values, 0.0).sum(axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _std(values: Array, valid: Array, axis: int | None) -> Array:
    deviations = jnp.where(valid, values - _mean(values, valid, axis), 0.0)
    count = valid.sum(axis=axis, keepdims=True)
    variance = (deviations**2).sum(axis=axis, keepdims=True) / jnp.maximum(count - 1, 1)
    return jnp.sqrt(variance)
