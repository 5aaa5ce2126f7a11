"""What the settings of the loss do to the gradient of an update, token by token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from p2r_jax.config import LossConfig
from p2r_jax.rl.step import minibatch
from tests.rl.updates import (
    ADVANTAGES,
    LOSS,
    MASK,
    NAMES,
    TOKENS,
    WHOLE_GATE,
    B,
    G,
    R,
    joint_step,
    make_batch,
    objective_of,
    policy_coefficients,
    slow_gradient,
    step,
    within,
)
from tests.small_model import make_prompts, nats, plain_log_probs, repeated_prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")

NOISE = np.random.default_rng(10).normal(size=MASK.shape).astype(np.float32)


def mean(values):
    """Over the tokens that count."""
    return float(np.asarray(values)[MASK].mean())


class TestSamplerCorrection:
    CAP = 1.5
    LOSS = LossConfig(kl_weight=0.0, sampler_correction=CAP)

    @pytest.mark.parametrize("several", [False, True])
    def test_weighs_tokens_by_trainer_over_sampler(
        self, model, allowed, snapshot_log_probs, several
    ):
        """The trainer's probability is that of the policy that sampled: with several updates it is
        not the policy's that is trained."""
        ours = np.asarray(snapshot_log_probs)
        old = ours - 0.01 * NOISE if several else ours
        sampler = np.where(MASK, old - 0.5 * np.roll(NOISE, 1, axis=0), np.nan)
        changes = {"old_log_probs": np.where(MASK, old, np.nan)} if several else {}
        batch = make_batch(sampler_log_probs=sampler, **changes)
        state, metrics = step(model, batch, allowed, objective_of(self.LOSS))

        weights = np.exp(np.where(MASK, old - sampler, 0))
        capped = weights > self.CAP
        assert 0 < capped[MASK].sum() < MASK.sum()
        ratio = np.exp(np.where(MASK, ours - old, 0))
        coefficients = policy_coefficients() * np.minimum(weights, self.CAP) * ratio
        expected = slow_gradient(model, allowed, coefficients)
        assert within(state.opt_state, expected) == {}
        gap = np.abs(np.exp(old) - np.exp(sampler))
        assert float(metrics["sampler_gap/capped_fraction"]) == pytest.approx(mean(capped))
        assert float(metrics["sampler_gap/prob"]) == pytest.approx(mean(gap), abs=nats())
        assert float(metrics["sampler_gap/mean"]) == pytest.approx(
            mean(np.abs(old - sampler)), abs=nats()
        )

    def test_is_off_by_default(self, first):
        assert LossConfig().sampler_correction is None
        assert "sampler_gap/capped_fraction" not in first[1]


class TestSeveralUpdates:
    """With the log-probs of the policy that sampled given, the ratio and its clips act."""

    @pytest.mark.parametrize(
        "level, spread, clip",
        [
            pytest.param("token", 0.3, 0.2, id="token"),
            pytest.param("sequence", 0.3, 0.1, id="sequence (GSPO)"),
        ],
    )
    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_gradient_and_fractions(
        self, model, allowed, snapshot_log_probs, level, spread, clip, microbatches
    ):
        ours, counts = np.asarray(snapshot_log_probs), MASK.sum(-1, keepdims=True)
        noise = spread * NOISE
        noise[0, 0] = -1.2  # A ratio of 3.3: beyond the dual clip, if the advantage is negative.
        advantages = ADVANTAGES.copy()
        advantages[0, 0] = -1.0
        loss = LossConfig(
            kl_weight=0.0, clip_low=clip, clip_high=1.5 * clip, ratio_level=level, dual_clip=3.0
        )
        batch = make_batch(
            old_log_probs=np.where(MASK, ours + noise, np.nan), advantages=advantages
        )
        state, metrics = step(model, batch, allowed, objective_of(loss, microbatches=microbatches))

        # By hand: the ratio, and the tokens whose loss it is that has a gradient.
        moved = np.where(MASK, -noise, 0)
        if level == "sequence":
            moved = np.broadcast_to(
                moved.sum(-1, keepdims=True) / np.maximum(counts, 1), MASK.shape
            )
        ratio, a = np.exp(moved), np.broadcast_to(advantages[..., None], MASK.shape)
        high, low = (a > 0) & (ratio > 1 + 1.5 * clip), (a < 0) & (ratio < 1 - clip)
        dual = (a < 0) & (ratio > 3)
        for flag in (high, low, dual):
            assert 0 < flag[MASK].sum() < MASK.sum()
        free = ~(high | low | dual)
        expected = slow_gradient(model, allowed, -a * ratio * free * MASK / MASK.sum())
        assert within(state.opt_state, expected) == {}

        assert float(metrics["ratio"]) == pytest.approx(mean(ratio), rel=nats())
        assert float(metrics["approx_kl"]) == pytest.approx(-mean(moved), abs=nats())
        for name, flag in (("clip_high", high), ("clip_low", low), ("dual_clip", dual)):
            assert float(metrics[f"{name}_fraction"]) == pytest.approx(mean(flag)), name
        value = np.where(high, 1 + 1.5 * clip, np.where(low, 1 - clip, np.where(dual, 3, ratio)))
        gate = nats() * mean(np.abs(a * value))
        assert float(metrics["loss/policy"]) == pytest.approx(mean(-a * value), abs=gate)


class TestEntropyBonus:
    def test_pulls_towards_more_entropy(self, model, allowed):
        """By the derivative of the mean entropy, taken on repeated prompts."""
        graph, params = model
        rows, starts = repeated_prompts(NAMES, TOKENS, MASK)

        @jax.jit
        @jax.value_and_grad
        def entropy(params):
            targets = TOKENS.reshape(-1, R)
            log_p = plain_log_probs(graph, params, rows, starts, targets, allowed)
            # Probabilities of tokens that are not allowed are 0, and so is what they add.
            each = -jnp.where(allowed, jnp.exp(log_p) * log_p, 0).sum(-1)
            return jnp.where(MASK.reshape(-1, R), each, 0).sum() / MASK.sum()

        value, pull = entropy(params)
        weight = 0.5
        loss = LossConfig(kl_weight=0.0, entropy_weight=weight)
        state, metrics = step(model, make_batch(), allowed, objective_of(loss))
        policy = slow_gradient(model, allowed, policy_coefficients())
        expected = jax.tree.map(lambda g, e: g - weight * e, policy, pull)
        assert within(state.opt_state, expected) == {}
        # Enough of it to be seen.
        assert float(optax.global_norm(pull)) > 0.01 * float(optax.global_norm(policy))
        assert float(metrics["entropy/mean"]) == pytest.approx(float(value), abs=nats())
        assert float(metrics["loss/total"]) == pytest.approx(
            float(metrics["loss/policy"]) - weight * float(value), abs=weight * nats()
        )


class TestTwoRoles:
    """`joint`: one update on the batches of both roles, of different shapes and settings."""

    @pytest.fixture(scope="class")
    def pair(self):
        rng = np.random.default_rng(11)
        shape = (2, 2, 4)
        mask = np.arange(4) < np.array([[4, 1], [2, 3]])[..., None]
        other = make_batch(
            prompts=make_prompts(("two images", "one image")),
            tokens=rng.integers(13, 94, shape),
            mask=mask,
            sampler_log_probs=np.zeros(shape, np.float32),
            advantages=rng.normal(size=shape[:2]).astype(np.float32),
        )
        return (
            (make_batch(), objective_of(LossConfig(kl_weight=0.0))),
            (other, objective_of(LossConfig(kl_weight=0.0), temperature=0.7, microbatches=2)),
        )

    def test_the_gradient_is_the_sum_and_each_has_its_metrics(self, model, allowed, pair):
        """So each role's loss is divided by its own tokens, not by those of both."""
        alone = [step(model, batch, allowed, objective) for batch, objective in pair]
        state, metrics = joint_step(model, *zip(*pair, strict=True), allowed)
        expected = jax.tree.map(jnp.add, *(own.opt_state for own, _ in alone))
        assert within(state.opt_state, expected) == {}
        whole = {"grad_norm": float(optax.global_norm(expected))}
        assert [m.keys() ^ whole.keys() for m in metrics] == [
            alone[0][1].keys() - whole.keys(),
            alone[1][1].keys(),
        ]
        for role, ((_, own), both) in enumerate(zip(alone, metrics, strict=True)):
            for name in both:
                value = whole[name] if name in whole else float(own[name])
                gates = {"rel": WHOLE_GATE, "abs": nats(0.7)}
                assert float(both[name]) == pytest.approx(value, **gates), (role, name)
        assert float(metrics[0]["entropy/mean"]) != float(metrics[1]["entropy/mean"])


class TestMinibatches:
    def test_are_equal_parts_of_the_prompts(self, snapshot_log_probs):
        """Every field by prompt; the rows of M-RoPE positions are on another axis."""
        batch = make_batch(old_log_probs=snapshot_log_probs)
        parts = [minibatch(batch, np.int32(i), parts=2) for i in range(2)]
        for number, part in enumerate(parts):
            rows = list(range(number, B, 2))
            assert part.prompts.positions.shape == (3, 2, batch.prompts.positions.shape[2])
            assert part.tokens.shape == (2, G, R)
            assert part.reference_log_probs is None
            by_row = dataclasses.replace(
                batch,
                prompts=dataclasses.replace(
                    batch.prompts, positions=jnp.moveaxis(batch.prompts.positions, 1, 0)
                ),
            )
            expected = jax.tree.map(lambda x, rows=rows: x[jnp.array(rows)], by_row)
            actual = dataclasses.replace(
                part,
                prompts=dataclasses.replace(
                    part.prompts, positions=jnp.moveaxis(part.prompts.positions, 1, 0)
                ),
            )
            jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_their_gradients_weighed_by_their_tokens_are_that_of_the_batch(
        self, model, allowed, snapshot_log_probs, first
    ):
        batch = make_batch(reference_log_probs=snapshot_log_probs)
        total = None
        for number in range(2):
            part = minibatch(batch, np.int32(number), parts=2)
            state, _ = step(model, part, allowed, objective_of(LOSS))
            share = MASK[number::2].sum() / MASK.sum()
            own = jax.tree.map(lambda g, share=share: share * g, state.opt_state)
            total = own if total is None else jax.tree.map(jnp.add, total, own)
        assert within(total, first[0].opt_state) == {}
