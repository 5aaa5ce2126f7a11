"""The GRPO objective: clipped policy loss, KL estimates, and how per-token values become a scalar.

Arrays are [*batch, R], R response tokens, with any leading axes ([B, R] or [B, G, R]); `mask` is 1
on the tokens that count. What masked positions hold, NaN included, reaches neither values nor
gradients. Everything is computed in float32.

A mean is never taken of means: `aggregate_terms` and every statistic return a (sum, count) pair, to
be added over microbatches and hosts before the one division.

    loss = aggregate(policy_loss_terms(...)[0], mask, "token-mean")
         + kl_weight * aggregate(kl_estimate(..., "k3", mask), mask, "token-mean")
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
KlKind = Literal["k1", "k2", "k3", "abs"]
RatioLevel = Literal["token", "sequence"]

SumCount = tuple[Float[Array, ""], Float[Array, ""]]
Mask = Bool[Array, "*batch R"] | Int[Array, "*batch R"] | Float[Array, "*batch R"]

MAX_LOG_RATIO = 20.0  # e^20 is where a ratio stops meaning anything and starts to overflow
MAX_K3 = 10.0


def policy_loss(
    log_probs: Float[Array, "*batch R"],
    old_log_probs: Float[Array, "*batch R"],
    advantages: Float[Array, "*batch"] | Float[Array, "*batch R"],
    mask: Mask,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    aggregation: Aggregation = "token-mean",
    *,
    ratio_level: RatioLevel = "token",
    horizon: int | None = None,
) -> Float[Array, ""]:
    """The clipped policy loss of one whole batch; see `policy_loss_terms` and `aggregate`."""
    loss, _ = policy_loss_terms(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_low,
        clip_high,
        dual_clip,
        ratio_level=ratio_level,
    )
    return aggregate(loss, mask, aggregation, horizon)


def policy_loss_terms(
    log_probs: Float[Array, "*batch R"],
    old_log_probs: Float[Array, "*batch R"],
    advantages: Float[Array, "*batch"] | Float[Array, "*batch R"],
    mask: Mask,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    *,
    ratio_level: RatioLevel = "token",
    weights: Float[Array, "*batch R"] | None = None,
) -> tuple[Float[Array, "*batch R"], dict[str, SumCount]]:
    """PPO's clipped loss per token, with dual clipping (P2R §2).

    With ρ = exp(clip(log_prob − old, ±20)) and advantage A:

        L = max(−A·ρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high));  where A < 0, min(L, −A·dual_clip)

    Args:
      log_probs: of the policy being trained, at the sampling temperature. The only argument a
        gradient flows to.
      old_log_probs: of the policy that the ratio is taken against. For one update per rollout,
        `stop_gradient(log_probs)`.
      advantages: one per sequence, or one per token.
      mask: 1 on response tokens that count.
      clip_low, clip_high: how far the ratio may move below and above 1. Unequal is "clip-higher".
      dual_clip: bound on the loss of a disfavoured token, in units of |A|; above 1. None for none.
      ratio_level: "token", or "sequence" for GSPO: every token then carries its sequence's
        geometric mean ratio (Zheng et al. 2025, §4.3), which wants far smaller clips.
      weights: factor per token, such as `sampler_correction` gives.

    Returns:
      The loss per token, 0 where masked, and statistics as (sum, count) over tokens: `ratio`;
      `approx_kl` = old − log_prob; `clip_low_fraction` and `clip_high_fraction`, tokens whose ratio
      was clipped from below and above, and `dual_clip_fraction`.

    Raises:
      ValueError: `dual_clip` not above 1, or unknown `ratio_level`.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be above 1 (or None), got {dual_clip}")
    mask = mask.astype(bool)
    log_probs = _unmasked(log_probs, mask)
    old_log_probs = jax.lax.stop_gradient(_unmasked(old_log_probs, mask))
    if advantages.ndim == log_probs.ndim - 1:
        advantages = jnp.broadcast_to(advantages[..., None], log_probs.shape)
    advantages = jax.lax.stop_gradient(_unmasked(advantages, mask))

    difference = log_probs - old_log_probs
    if ratio_level == "sequence":
        tokens = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
        mean = difference.sum(axis=-1, keepdims=True) / tokens
        # The value of the sequence's ratio, with a gradient that stays at the token.
        difference = log_probs + jax.lax.stop_gradient(mean - log_probs)
    elif ratio_level != "token":
        raise ValueError(f"unknown ratio_level {ratio_level!r}; expected 'token' or 'sequence'")
    ratio = jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))

    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(unclipped, clipped)
    dual_clipped = jnp.zeros_like(mask)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > bound)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    if weights is not None:
        loss = loss * jax.lax.stop_gradient(_unmasked(weights, mask))

    was_clipped = clipped > unclipped
    stats = {
        "ratio": ratio,
        "approx_kl": -difference,
        "clip_low_fraction": was_clipped & (ratio < 1.0),
        "clip_high_fraction": was_clipped & (ratio > 1.0),
        "dual_clip_fraction": dual_clipped,
    }
    token_stats = {
        name: aggregate_terms(jax.lax.stop_gradient(value), mask, "token-mean")
        for name, value in stats.items()
    }
    return jnp.where(mask, loss, 0.0), token_stats


def kl_estimate(
    log_probs: Float[Array, "*batch R"],
    ref_log_probs: Float[Array, "*batch R"],
    kind: KlKind = "k3",
    mask: Mask | None = None,
) -> Float[Array, "*batch R"]:
    """Per-token estimate of KL(policy ‖ reference) from tokens sampled by the policy.

    With d = ref − log_prob (Schulman, "Approximating KL divergence"):

        k1   −d              unbiased, high variance, may be negative
        k2   d²/2            biased, low variance
        k3   e^d − d − 1     unbiased, low variance, never negative; d is clipped to ±20 and the
                             result to ±10, beyond which its gradient is zero (P2R §2)
        abs  |d|

    No gradient reaches the reference. With a `mask` the estimate is 0 where masked, and garbage
    there cannot reach a gradient; without it log-probs must be finite everywhere.

    Raises:
      ValueError: unknown `kind`.
    """
    if mask is None:
        mask = jnp.ones(log_probs.shape, bool)
    d = jax.lax.stop_gradient(_unmasked(ref_log_probs, mask)) - _unmasked(log_probs, mask)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d**2
    if kind == "k3":
        d = jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        return jnp.clip(jnp.exp(d) - d - 1.0, -MAX_K3, MAX_K3)
    if kind == "abs":
        return jnp.abs(d)
    raise ValueError(f"unknown KL kind {kind!r}; expected k1, k2, k3 or abs")


def sampler_correction(
    log_probs: Float[Array, "*batch R"],
    sampler_log_probs: Float[Array, "*batch R"],
    mask: Mask,
    cap: float = 2.0,
) -> tuple[Float[Array, "*batch R"], dict[str, SumCount]]:
    """How far the sampler's probabilities are from the trainer's, and weights that correct for it.

    The two differ when they compute in different precisions or layouts, which makes "on-policy"
    data slightly off-policy.

    Returns:
      Truncated importance weights min(trainer / sampler, cap) for `policy_loss_terms`, 1 where
      masked and without gradient, and the mean absolute differences of probabilities and of
      log-probs as (sum, count).
    """
    mask = mask.astype(bool)
    log_probs = jax.lax.stop_gradient(_unmasked(log_probs, mask))
    sampler_log_probs = jax.lax.stop_gradient(_unmasked(sampler_log_probs, mask))
    difference = log_probs - sampler_log_probs
    weights = jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    gap = jnp.abs(jnp.exp(log_probs) - jnp.exp(sampler_log_probs))
    stats = {
        "sampler_prob_gap": aggregate_terms(gap, mask, "token-mean"),
        "sampler_log_prob_gap": aggregate_terms(jnp.abs(difference), mask, "token-mean"),
        "sampler_weight_capped_fraction": aggregate_terms(weights > cap, mask, "token-mean"),
    }
    return jnp.minimum(weights, cap), stats


def aggregate(
    values: Float[Array, "*batch R"],
    mask: Mask,
    aggregation: Aggregation,
    horizon: int | None = None,
) -> Float[Array, ""]:
    """One number from per-token values: the division of `aggregate_terms`; 0 if nothing counts."""
    total, count = aggregate_terms(values, mask, aggregation, horizon)
    return total / jnp.maximum(count, 1.0)


def aggregate_terms(
    values: Float[Array, "*batch R"],
    mask: Mask,
    aggregation: Aggregation,
    horizon: int | None = None,
) -> SumCount:
    """The (sum, count) whose quotient is the aggregate; the pairs of a batch's parts add up.

    Sequences without any token that counts are left out. T is the sequence's number of tokens:

        aggregation               each sequence adds to the sum      count
        token-mean                Σ values                           tokens
        seq-mean-token-sum        Σ values                           sequences
        seq-mean-token-mean       Σ values / T                       sequences
        seq-mean-token-sum-norm   Σ values / horizon   (Dr. GRPO)    sequences

    Args:
      values, mask: [*batch, R].
      aggregation: see above.
      horizon: tokens; required by `seq-mean-token-sum-norm`. A constant of the run, such as the
        response limit, and not the padded length R, which differs between batches.

    Raises:
      ValueError: unknown aggregation, or a missing horizon.
    """
    sums = _unmasked(values, mask).sum(axis=-1)
    if aggregation == "seq-mean-token-mean":
        sums = sums / jnp.maximum(mask.astype(jnp.float32).sum(axis=-1), 1.0)
    elif aggregation == "seq-mean-token-sum-norm":
        if horizon is None:
            raise ValueError(
                "aggregation 'seq-mean-token-sum-norm' needs horizon, e.g. the response limit"
            )
        sums = sums / horizon
    return sums.sum(), aggregation_count(mask, aggregation)


def aggregation_count(mask: Mask, aggregation: Aggregation) -> Float[Array, ""]:
    """The count of `aggregate_terms`, which depends on the mask alone.

    It lets a step that accumulates gradients over microbatches divide by the whole batch's count
    from the first one on.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {aggregation!r}; expected one of {', '.join(AGGREGATIONS)}"
        )
    tokens = mask.astype(jnp.float32).sum(axis=-1)
    return tokens.sum() if aggregation == "token-mean" else (tokens > 0).astype(jnp.float32).sum()


def _unmasked(values: Array, mask: Array) -> Array:
    """Values in float32 with zeros where masked, so that no garbage there can reach a gradient."""
    return jnp.where(mask.astype(bool), values.astype(jnp.float32), 0.0)
