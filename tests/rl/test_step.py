"""The update: G completions behind one prompt give the gradient of G repeated prompts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from p2r_jax.rl.step import AnchorBatch, completion_log_probs
from tests import small_model
from tests.rl.updates import (
    ADVANTAGES,
    CONDITION,
    KL_NOISE,
    LOSS,
    MASK,
    NAMES,
    TOKENS,
    WHOLE_CONDITION,
    WHOLE_GATE,
    B,
    G,
    R,
    flat,
    make_batch,
    objective_of,
    policy_coefficients,
    scores,
    slow_gradient,
    step,
    unequal_metrics,
    within,
)
from tests.rounding import STEP, moved, worst
from tests.small_model import (
    ROWS,
    make_prompts,
    nats,
    plain_scores,
    relative_errors,
    repeated_prompts,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


SUM = worst(int(MASK.sum()), float(np.abs(ADVANTAGES).max()))
"""What the order may change in a mean of advantages over the tokens that count."""


class TestSharedPrefix:
    @pytest.fixture(scope="class")
    def score(self, model):
        graph, params = model

        @jax.jit
        def score(prompts, tokens, mask, allowed, temperature=1.0):
            model = nnx.merge(graph, params)
            return completion_log_probs(model, prompts, tokens, mask, allowed, temperature)

        return score

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_and_entropies_equal_repeated_prompts(
        self, model, allowed, score, side, temperature
    ):
        actual = score(make_prompts(NAMES, side=side), TOKENS, MASK, allowed, temperature)
        rows, starts = repeated_prompts(NAMES, TOKENS, MASK)
        targets = TOKENS.reshape(-1, R)
        expected = plain_scores(*model, rows, starts, targets, allowed, temperature)
        for ours, reference in zip(actual, expected[:2], strict=True):
            ours, reference = np.asarray(ours), np.asarray(reference).reshape(B, G, R)
            np.testing.assert_allclose(ours[MASK], reference[MASK], rtol=0, atol=nats(temperature))

    def test_what_is_masked_changes_nothing(self, allowed, score):
        prompts = make_prompts(NAMES)
        garbage = np.where(MASK, TOKENS, 77)
        before, after = (np.asarray(score(prompts, t, MASK, allowed)[0]) for t in (TOKENS, garbage))
        np.testing.assert_array_equal(before[MASK], after[MASK])

    def test_completions_of_a_single_token(self, model, allowed):
        """Then no completion token is fed at all: the prompt's last token predicts it."""
        tokens, mask = TOKENS[:, :, :1], np.ones((B, G, 1), bool)
        log_probs, _ = completion_log_probs(
            nnx.merge(*model), make_prompts(NAMES), jnp.asarray(tokens), jnp.asarray(mask), allowed
        )
        rows, starts = repeated_prompts(NAMES, tokens, mask)
        expected, _, _ = plain_scores(*model, rows, starts, tokens.reshape(-1, 1), allowed)
        np.testing.assert_allclose(log_probs.reshape(-1, 1), expected, rtol=0, atol=nats())

    def test_gradients_equal_repeated_prompts(self, model, allowed):
        """Every parameter, vision tower included; activations recomputed, as in training."""
        graph, params = model
        coefficients = np.random.default_rng(3).normal(size=(B, G, R)) * MASK

        @jax.jit
        @jax.grad
        def gradient(params):
            log_probs, _ = completion_log_probs(
                nnx.merge(graph, params), make_prompts(NAMES), TOKENS, MASK, allowed, remat=True
            )
            return (jnp.where(MASK, log_probs, 0) * coefficients).sum()

        expected = slow_gradient(model, allowed, coefficients)
        assert within(gradient(params), expected) == {}
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))


class TestRounding:
    """The gates of these modules hold for a model that is no more sensitive than they say."""

    def test_conditions(self, model, allowed, snapshot_log_probs, first):
        graph, params = model
        other = graph, moved(params)
        state, _ = step(other, make_batch(reference_log_probs=snapshot_log_probs), allowed)
        each = relative_errors(state.opt_state, first[0].opt_state)
        assert 0.5 * CONDITION < max(each.values()) / STEP < CONDITION
        before, after = flat(first[0].opt_state), flat(state.opt_state)
        whole = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert 0.5 * WHOLE_CONDITION < whole / STEP < WHOLE_CONDITION
        change = np.abs(np.asarray(scores(other, make_batch(), allowed)) - snapshot_log_probs)
        condition = change[MASK].max() / STEP
        assert 0.3 * small_model.CONDITION < condition < small_model.CONDITION


class TestGradient:
    def test_on_policy_it_is_the_advantage_weighted_one(self, model, allowed, first):
        """Nothing is clipped at ratio 1, and the KL term is at its minimum at the snapshot."""
        state, metrics = first
        expected = slow_gradient(model, allowed, policy_coefficients())
        assert within(state.opt_state, expected) == {}
        assert float(metrics["grad_norm"]) == pytest.approx(
            float(optax.global_norm(expected)), rel=WHOLE_GATE
        )

    def test_metrics_on_policy(self, first):
        _, metrics = first
        metrics = {k: float(v) for k, v in metrics.items()}
        mean_advantage = (ADVANTAGES[..., None] * MASK).sum() / MASK.sum()
        assert metrics["ratio"] == 1
        assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0
        assert metrics["kl/mean"] == pytest.approx(0, abs=KL_NOISE)
        assert metrics["loss/policy"] == pytest.approx(-mean_advantage, abs=SUM)
        total = SUM + LOSS.kl_weight * KL_NOISE
        assert metrics["loss/total"] == pytest.approx(-mean_advantage, abs=total)

    def test_the_kl_term_pulls_towards_the_reference(self, model, allowed, snapshot_log_probs):
        reference = np.asarray(snapshot_log_probs) + np.where(
            MASK, np.random.default_rng(4).normal(size=MASK.shape), np.nan
        ).astype(np.float32)
        state, metrics = step(model, make_batch(reference_log_probs=reference), allowed)
        d = np.where(MASK, reference - np.asarray(snapshot_log_probs), 0)
        pull = LOSS.kl_weight * (1 - np.exp(d)) / MASK.sum()
        expected = slow_gradient(model, allowed, policy_coefficients() + pull)
        assert within(state.opt_state, expected) == {}
        slope = float(np.abs(np.exp(d) - 1)[MASK].mean())
        assert float(metrics["kl/mean"]) == pytest.approx(
            (np.exp(d) - d - 1).sum() / MASK.sum(), abs=nats() * slope
        )

    def test_without_a_reference_there_is_no_kl_term(self, model, allowed, first):
        state, metrics = step(model, make_batch(), allowed)
        assert within(state.opt_state, first[0].opt_state) == {}
        assert "kl/mean" not in metrics

    def test_what_is_masked_contributes_nothing(self, model, allowed, snapshot_log_probs):
        """A dropped sample has no advantage worth its name, and its reference may be garbage."""
        mask = MASK.copy()
        mask[0, 1] = mask[1] = False
        changes = {
            "mask": mask,
            "advantages": np.where(mask.any(-1), ADVANTAGES, 1e9).astype(np.float32),
            "tokens": np.where(mask, TOKENS, 77),
            "sampler_log_probs": np.where(mask, 0, np.nan).astype(np.float32),
        }
        changes["reference_log_probs"] = np.where(mask, snapshot_log_probs, np.nan)
        state, metrics = step(model, make_batch(**changes), allowed)
        expected = slow_gradient(model, allowed, policy_coefficients(mask=mask), mask=mask)
        assert within(state.opt_state, expected) == {}
        assert all(np.isfinite(float(v)) for v in metrics.values())

    def test_sampler_gap(self, model, allowed, snapshot_log_probs, first):
        """How far the sampler's log-probs are from the trainer's, on trained tokens."""
        gap = np.where(MASK, np.random.default_rng(5).uniform(0, 1, MASK.shape), 100)
        sampled = (np.asarray(snapshot_log_probs) + gap).astype(np.float32)
        state, metrics = step(model, make_batch(sampler_log_probs=sampled), allowed)
        assert float(metrics["sampler_gap/mean"]) == pytest.approx(gap[MASK].mean(), abs=nats())
        assert float(metrics["sampler_gap/max"]) == pytest.approx(gap[MASK].max(), abs=nats())
        # It is told, not corrected, unless `loss.sampler_correction` says so.
        assert within(state.opt_state, first[0].opt_state) == {}

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_the_reference_does_not_depend_on_microbatches(
        self, model, allowed, snapshot_log_probs, microbatches
    ):
        parts = scores(model, make_batch(), allowed, microbatches=microbatches)
        np.testing.assert_allclose(parts[MASK], snapshot_log_probs[MASK], rtol=0, atol=nats())

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_microbatches_give_the_gradient_and_the_metrics_of_the_whole_batch(
        self, model, allowed, snapshot_log_probs, first, microbatches
    ):
        """Parts have different numbers of tokens (the last one none): sums are divided once."""
        batch = make_batch(reference_log_probs=snapshot_log_probs)
        state, metrics = step(model, batch, allowed, objective_of(microbatches=microbatches))
        # Rounding: a product of other shape adds up in another order.
        whole, parts = flat(first[0].opt_state), flat(state.opt_state)
        assert np.linalg.norm(parts - whole) <= WHOLE_GATE * np.linalg.norm(whole)
        assert within(state.opt_state, first[0].opt_state) == {}
        assert unequal_metrics(metrics, first[1]) == {}

    @pytest.mark.parametrize("weight", [0.5, 0.0])
    def test_the_anchor_adds_the_idle_roles_cross_entropy(
        self, model, allowed, snapshot_log_probs, first, weight
    ):
        """With weight 0 it is only told: the drift of the role that does not learn."""
        names = tuple(ROWS) * 3
        tokens = np.random.default_rng(6).integers(13, 94, (12, 1, R))
        mask = np.arange(R) < np.array([4, 6, 1, 0] * 3)[:, None, None]
        anchor = jax.tree.map(jnp.asarray, AnchorBatch(make_prompts(names), tokens, mask))
        batch = make_batch(reference_log_probs=snapshot_log_probs)
        state, metrics = step(model, batch, allowed, anchor=anchor, role_anchor=weight)
        own = slow_gradient(model, allowed, -(mask / mask.sum()), tokens, mask, names)
        expected = jax.tree.map(lambda g, a: g + weight * a, first[0].opt_state, own)
        assert within(state.opt_state, expected) == {}
        rows, starts = repeated_prompts(names, tokens, mask)
        log_probs, _, _ = plain_scores(*model, rows, starts, tokens.reshape(-1, R), allowed)
        cross_entropy = -np.asarray(log_probs)[mask.reshape(-1, R)].mean()
        assert float(metrics["loss/anchor"]) == pytest.approx(cross_entropy, abs=nats())
        total, kl = SUM, LOSS.kl_weight * KL_NOISE
        assert float(metrics["loss/total"]) == pytest.approx(
            float(first[1]["loss/total"]), abs=total + kl
        )
