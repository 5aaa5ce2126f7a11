"""The update: G completions behind one prompt give the gradient of G repeated prompts.

The reference writes every completion behind its own copy of the prompt and runs the model's plain
causal forward; the loss enters as one coefficient per token, differentiated by hand. The batch has
images of mixed sizes, ragged completions, a dropped sample and a filling row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from p2r_jax.config import LossConfig, OptimizerConfig
from p2r_jax.parallel.mesh import batch_sharding, make_mesh, parameter_shardings
from p2r_jax.rl.step import (
    AnchorBatch,
    TrainingBatch,
    TrainState,
    completion_log_probs,
    layout_of,
    make_optimizer,
    make_schedule,
    new_state,
    reference_log_probs,
    train_step,
)
from tests.small_model import (
    PAD,
    ROWS,
    make_model,
    make_prompts,
    plain_gradient,
    plain_scores,
    relative_errors,
    repeated_prompts,
    vocabulary,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("three images", "text", "one image", "text")
"""The last row fills the batch up: nothing of it is trained."""
B, G, R = 4, 3, 6
LENGTHS = np.array([[6, 2, 4], [1, 6, 3], [5, 0, 6], [0, 0, 0]])
"""Tokens that count; one sample of the third prompt was dropped."""
MASK = np.arange(R) < LENGTHS[..., None]
GATE = 1e-5
LOSS = LossConfig(kl_weight=0.1)

TOKENS = np.where(MASK, np.random.default_rng(1).integers(13, 94, (B, G, R)), PAD)
ADVANTAGES = np.random.default_rng(2).normal(size=(B, G)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def allowed():
    return vocabulary().allowed


def make_batch(**changes: Any) -> TrainingBatch:
    fields = {
        "prompts": make_prompts(NAMES),
        "tokens": TOKENS,
        "mask": MASK,
        "sampler_log_probs": np.zeros((B, G, R), np.float32),
        "advantages": ADVANTAGES,
    }
    fields |= changes
    return jax.tree.map(jnp.asarray, TrainingBatch(**fields))


def slow_gradient(model, allowed, coefficients, tokens=TOKENS, mask=MASK, names=NAMES):
    """Gradient of sum(coefficients * log-probs) with every prompt repeated."""
    rows, starts = repeated_prompts(names, tokens, mask)
    flat = [np.asarray(x).reshape(-1, R) for x in (tokens, coefficients)]
    return plain_gradient(*model, rows, starts, flat[0], allowed, flat[1].astype(np.float32))


def within(actual, expected, gate):
    """Parameters whose gradients differ by more than the gate: none, if all is well."""
    return {k: v for k, v in relative_errors(actual, expected).items() if not v <= gate}


# --- one prompt for G completions ---------------------------------------------------------------


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
            np.testing.assert_allclose(ours[MASK], reference[MASK], atol=1e-5)

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
        np.testing.assert_allclose(log_probs.reshape(-1, 1), expected, atol=1e-5)

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
        assert within(gradient(params), expected, GATE) == {}
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))


# --- the whole step -----------------------------------------------------------------------------

RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)
"""Moves nothing; its state is the last gradient."""

ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, eps=1e-3)
"""A large epsilon: with the usual one, the first step's size depends on the last bit of tiny
gradients, and nothing could be compared."""


def fresh_state(params, optimizer) -> TrainState:
    return new_state(jax.tree.map(jnp.copy, params), optimizer)  # the step consumes its state


def step(model, batch, reference, allowed, optimizer=RECORDER, anchor=None, **settings):
    graph, params = model
    settings = {"loss": LOSS, "temperature": 1.0, "horizon": R} | settings
    return train_step(
        fresh_state(params, optimizer),
        batch,
        reference,
        anchor,
        allowed,
        graph=graph,
        optimizer=optimizer,
        **settings,
    )


@pytest.fixture(scope="module")
def snapshot_log_probs(model, allowed):
    return reference_log_probs(*model, make_batch(), allowed, 1.0)


@pytest.fixture(scope="module")
def first(model, allowed, snapshot_log_probs):
    """The first step of a phase: state and metrics."""
    return step(model, make_batch(), snapshot_log_probs, allowed)


def policy_coefficients(advantages=ADVANTAGES, mask=MASK):
    """d loss / d log-prob of the clipped loss at ratio 1, averaged over the tokens that count."""
    return -advantages[..., None] * mask / mask.sum()


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


class TestGradient:
    def test_on_policy_it_is_the_advantage_weighted_one(self, model, allowed, first):
        """Nothing is clipped at ratio 1, and the KL term is at its minimum at the snapshot."""
        state, metrics = first
        expected = slow_gradient(model, allowed, policy_coefficients())
        assert within(state.opt_state, expected, GATE) == {}
        assert float(metrics["grad_norm"]) == pytest.approx(
            float(optax.global_norm(expected)), rel=1e-5
        )

    def test_metrics_on_policy(self, first):
        _, metrics = first
        metrics = {k: float(v) for k, v in metrics.items()}
        mean_advantage = (ADVANTAGES[..., None] * MASK).sum() / MASK.sum()
        assert metrics["ratio"] == 1
        assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0
        assert metrics["kl/mean"] == pytest.approx(0, abs=1e-9)
        assert metrics["loss/policy"] == pytest.approx(-mean_advantage, rel=1e-5)
        assert metrics["loss/total"] == pytest.approx(-mean_advantage, rel=1e-5)

    def test_the_kl_term_pulls_towards_the_reference(self, model, allowed, snapshot_log_probs):
        reference = np.asarray(snapshot_log_probs) + np.where(
            MASK, np.random.default_rng(4).normal(size=MASK.shape), np.nan
        ).astype(np.float32)
        state, metrics = step(model, make_batch(), jnp.asarray(reference), allowed)
        d = np.where(MASK, reference - np.asarray(snapshot_log_probs), 0)
        pull = LOSS.kl_weight * (1 - np.exp(d)) / MASK.sum()
        expected = slow_gradient(model, allowed, policy_coefficients() + pull)
        assert within(state.opt_state, expected, GATE) == {}
        assert float(metrics["kl/mean"]) == pytest.approx(
            (np.exp(d) - d - 1).sum() / MASK.sum(), rel=1e-4
        )

    def test_without_a_reference_there_is_no_kl_term(self, model, allowed, first):
        state, metrics = step(model, make_batch(), None, allowed)
        assert within(state.opt_state, first[0].opt_state, 1e-5) == {}
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
        reference = jnp.where(mask, snapshot_log_probs, jnp.nan)
        state, metrics = step(model, make_batch(**changes), reference, allowed)
        expected = slow_gradient(model, allowed, policy_coefficients(mask=mask), mask=mask)
        assert within(state.opt_state, expected, GATE) == {}
        assert all(np.isfinite(float(v)) for v in metrics.values())

    def test_sampler_gap(self, model, allowed, snapshot_log_probs):
        """How far the sampler's log-probs are from the trainer's, on trained tokens."""
        gap = np.where(MASK, np.random.default_rng(5).uniform(0, 1, MASK.shape), 100)
        sampled = (np.asarray(snapshot_log_probs) + gap).astype(np.float32)
        _, metrics = step(model, make_batch(sampler_log_probs=sampled), snapshot_log_probs, allowed)
        assert float(metrics["sampler_gap/mean"]) == pytest.approx(gap[MASK].mean(), rel=1e-4)
        assert float(metrics["sampler_gap/max"]) == pytest.approx(gap[MASK].max(), rel=1e-4)

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_the_reference_does_not_depend_on_microbatches(
        self, model, allowed, snapshot_log_probs, microbatches
    ):
        graph, params = model
        parts = reference_log_probs(graph, params, make_batch(), allowed, 1.0, microbatches)
        whole = reference_log_probs(graph, params, make_batch(), allowed, 1.0)
        np.testing.assert_allclose(parts[MASK], whole[MASK], atol=1e-5)

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_microbatches_give_the_gradient_and_the_metrics_of_the_whole_batch(
        self, model, allowed, snapshot_log_probs, first, microbatches
    ):
        """Parts have different numbers of tokens (the last one none): sums are divided once."""
        state, metrics = step(
            model, make_batch(), snapshot_log_probs, allowed, microbatches=microbatches
        )
        # Rounding: a product of other shape adds up in another order, in log-probs 2e-6 apart.
        whole, parts = flat(first[0].opt_state), flat(state.opt_state)
        assert np.linalg.norm(parts - whole) <= 2e-6 * np.linalg.norm(whole)
        # Of each parameter alone: the small ones are sums in which much cancels.
        assert within(state.opt_state, first[0].opt_state, 5e-6) == {}
        assert metrics.keys() == first[1].keys()
        for name, value in first[1].items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-8), name

    def test_the_anchor_adds_the_idle_roles_cross_entropy(
        self, model, allowed, snapshot_log_probs, first
    ):
        names = tuple(ROWS) * 3
        tokens = np.random.default_rng(6).integers(13, 94, (12, 1, R))
        mask = np.arange(R) < np.array([4, 6, 1, 0] * 3)[:, None, None]
        anchor = jax.tree.map(jnp.asarray, AnchorBatch(make_prompts(names), tokens, mask))
        state, metrics = step(
            model, make_batch(), snapshot_log_probs, allowed, anchor=anchor, role_anchor=0.5
        )
        own = slow_gradient(model, allowed, -(mask / mask.sum()), tokens, mask, names)
        expected = jax.tree.map(lambda g, a: g + 0.5 * a, first[0].opt_state, own)
        assert within(state.opt_state, expected, GATE) == {}
        assert float(metrics["loss/anchor"]) > 0
        assert float(metrics["loss/total"]) == pytest.approx(float(first[1]["loss/total"]))


class TestUpdate:
    @pytest.fixture(scope="class")
    def adamw(self):
        return make_optimizer(ADAMW, steps=4)

    @pytest.fixture(scope="class")
    def updated(self, model, allowed, snapshot_log_probs, adamw):
        return step(model, make_batch(), snapshot_log_probs, allowed, adamw)

    def test_first_step_is_adamw_on_the_clipped_gradient(self, model, first, updated):
        gradient, norm = first[0].opt_state, float(first[1]["grad_norm"])
        scale = min(1.0, ADAMW.grad_clip / norm)

        def expected(p, g):
            g = np.asarray(g, np.float64) * scale
            return p - ADAMW.learning_rate * (
                g / (np.abs(g) + ADAMW.eps) + ADAMW.weight_decay * np.asarray(p)
            )

        assert norm > ADAMW.grad_clip
        expected = jax.tree.map(expected, model[1], gradient)
        assert within(updated[0].params, expected, 1e-6) == {}

    def test_a_frozen_tower_does_not_move_at_all(self, model, allowed, snapshot_log_probs):
        """Weight decay included, which alone would move everything."""
        optimizer = make_optimizer(dataclasses.replace(ADAMW, freeze_vision=True), steps=4)
        state, metrics = step(
            model, make_batch(), snapshot_log_probs, allowed, optimizer, freeze_vision=True
        )
        before, after = nnx.to_pure_dict(model[1]), nnx.to_pure_dict(state.params)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert not any(jax.tree.leaves(moved.pop("visual")))
        assert all(jax.tree.leaves(moved))
        assert float(metrics["grad_norm"]) > 0

    def test_a_free_tower_moves(self, model, updated):
        before, after = nnx.to_pure_dict(model[1]), nnx.to_pure_dict(updated[0].params)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(moved))

    def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
        self, model, allowed, snapshot_log_probs, adamw, updated
    ):
        graph, params = model
        bad = make_batch(advantages=np.where(ADVANTAGES > 1, np.nan, ADVANTAGES))
        run = functools.partial(
            train_step,
            graph=graph,
            optimizer=adamw,
            loss=LOSS,
            temperature=1.0,
            horizon=R,
        )
        fresh = fresh_state(params, adamw)
        before = jax.tree.map(np.asarray, (fresh.params, fresh.opt_state))
        state, metrics = run(fresh, bad, snapshot_log_probs, None, allowed)
        assert not np.isfinite(float(metrics["grad_norm"]))
        assert int(state.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
        # The next step is as if the bad one had not been.
        state, _ = run(state, make_batch(), snapshot_log_probs, None, allowed)
        assert int(state.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, state.params, updated[0].params)

    @pytest.mark.parametrize(
        "sizes, microbatches",
        [
            pytest.param((2, 2, 2), 1, id="data, fsdp and tensor"),
            pytest.param((2, 1, 2), 2, id="data and tensor, microbatches"),
        ],
    )
    def test_many_devices_equal_one(
        self, model, allowed, snapshot_log_probs, adamw, updated, sizes, microbatches
    ):
        """Weights and optimizer stay where they were put."""
        graph, params = model
        mesh = make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
        shardings = jax.tree.map(
            lambda v: v.get_value(),
            parameter_shardings(params, mesh),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        # A copy first: the step gives its state away, and replicas may share memory with `params`.
        own = jax.device_put(jax.tree.map(jnp.copy, params), shardings)
        state = new_state(own, adamw)
        rows = batch_sharding(mesh)
        by_axis = jax.NamedSharding(mesh, jax.P(None, *rows.spec))
        batch = make_batch()
        split = jax.tree.map(lambda _: rows, batch)
        split = dataclasses.replace(
            split, prompts=dataclasses.replace(split.prompts, positions=by_axis)
        )
        batch = jax.device_put(batch, split)
        layout = layout_of(state)
        moments = optax.tree.get(state.opt_state, "mu")
        assert jax.tree.map(lambda x: x.sharding, moments) == shardings
        state, metrics = train_step(
            state,
            batch,
            jax.device_put(snapshot_log_probs, rows),
            None,
            allowed,
            graph=graph,
            optimizer=adamw,
            loss=LOSS,
            temperature=1.0,
            horizon=R,
            microbatches=microbatches,
            layout=layout,
        )
        assert within(state.params, updated[0].params, 1e-6) == {}
        for name, value in updated[1].items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
        for leaf, where in zip(jax.tree.leaves(state), layout, strict=True):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


# --- learning rates -----------------------------------------------------------------------------


class TestSchedule:
    def test_constant_by_default(self):
        schedule = make_schedule(OptimizerConfig(learning_rate=2.0), 10)
        assert [float(schedule(i)) for i in (0, 5, 9)] == [2, 2, 2]

    def test_warm_up_rises_to_the_peak_and_its_first_step_already_learns(self):
        schedule = make_schedule(OptimizerConfig(learning_rate=4.0, warmup_steps=3), 10)
        np.testing.assert_allclose([schedule(i) for i in range(5)], [1, 2, 3, 4, 4], rtol=1e-6)

    def test_cosine_falls_to_its_final_part(self):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final_fraction=0.1)
        schedule = make_schedule(config, 12)
        rates = [float(schedule(i)) for i in range(2, 13)]
        assert rates[0] == 1
        assert rates[-1] == pytest.approx(0.1)
        assert rates == sorted(rates, reverse=True)
