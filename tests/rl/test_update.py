"""From the gradient to the weights: what moves, what stays, and where everything lives."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from p2r_jax.config import OptimizerConfig
from p2r_jax.parallel.mesh import batch_sharding, make_mesh, parameter_shardings
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.step import cast, layout_of, new_state
from tests.rl.updates import (
    ADVANTAGES,
    GATE,
    WHOLE_GATE,
    fresh_state,
    joint_step,
    make_batch,
    objective_of,
    step,
    unequal_metrics,
    within,
)
from tests.rounding import UNIT

pytestmark = pytest.mark.usefixtures("quick_compilation")

ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, eps=1e-3)
"""A large epsilon: with the usual one, the first step's size depends on the last bit of tiny
gradients, and nothing could be compared."""
CORRECTION = 2 * UNIT / (1 - ADAMW.beta2)
"""Relative error of Adam's step where gradients are far above epsilon: the square root of a
correction by 1 - beta2, of which float32 keeps what two roundings to it leave of beta2 near 1."""
CLIPPED_GATE = GATE + WHOLE_GATE
"""Of a gradient that is divided by its own norm."""
BAD = np.where(ADVANTAGES > 1, np.nan, ADVANTAGES)


@pytest.fixture(scope="module")
def batch(snapshot_log_probs):
    return make_batch(reference_log_probs=snapshot_log_probs)


@pytest.fixture(scope="module")
def adamw():
    return make_optimizer(ADAMW, 4)


@pytest.fixture(scope="module")
def updated(model, allowed, batch, adamw):
    return step(model, batch, allowed, optimizer=adamw)


def first_moment(state):
    """Linear in the gradient, as the step itself is not: here its gate is that of a gradient."""
    return optax.tree.get(state.opt_state, "mu")


def weight_gates(params, gradient, gate: float) -> dict[str, float]:
    """How far rounding may take each weight's first step, relative L2, from the same step on a
    clipped gradient that is within `gate`, and from exact arithmetic.

    Adam divides g by |g| + eps. That multiplies what changes in g by eps / (|g| + eps)^2, so by at
    most 1 / eps. The weight itself is rounded, as are its decay and the sum of both.
    """

    def one(p, g):
        p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
        direction = np.linalg.norm(g / (np.abs(g) + ADAMW.eps))
        of_gradient = gate * np.linalg.norm(g) / ADAMW.eps
        step = ADAMW.learning_rate * (of_gradient + CORRECTION * direction)
        return step / np.linalg.norm(p) + 3 * UNIT

    tree = jax.tree.map(one, *map(nnx.to_pure_dict, (params, gradient)))
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


class TestUpdate:
    def test_first_step_is_adamw_on_the_clipped_gradient(self, model, first, updated):
        recorded, norm = first[0].opt_state, float(first[1]["grad_norm"])
        assert norm > ADAMW.grad_clip
        # The recorded gradient is another program's, and differs in rounding.
        gradient = jax.tree.map(
            lambda m: np.asarray(m, np.float64) / (1 - ADAMW.beta1), first_moment(updated[0])
        )
        clipped = jax.tree.map(lambda g: np.float64(ADAMW.grad_clip / norm) * g, recorded)
        assert within(gradient, clipped, CLIPPED_GATE) == {}

        def expected(p, g):
            return p - ADAMW.learning_rate * (
                g / (np.abs(g) + ADAMW.eps) + ADAMW.weight_decay * np.asarray(p)
            )

        # The program's own gradient it has rounded but a few times.
        gates = weight_gates(model[1], gradient, gate=4 * UNIT)
        expected = jax.tree.map(expected, model[1], gradient)
        assert within(updated[0].params, expected, gates) == {}

    def test_a_frozen_tower_does_not_move_at_all(self, model, allowed, batch):
        """Weight decay included, which alone would move everything."""
        optimizer = make_optimizer(dataclasses.replace(ADAMW, freeze_vision=True), 4)
        state, metrics = step(model, batch, allowed, optimizer=optimizer, freeze_vision=True)
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
        self, model, allowed, batch, adamw, updated
    ):
        fresh = fresh_state(model[1], adamw)
        before = jax.tree.map(np.asarray, (fresh.params, fresh.opt_state))
        bad = dataclasses.replace(batch, advantages=jnp.asarray(BAD))
        state, metrics = step(model, bad, allowed, optimizer=adamw, state=fresh)
        assert not np.isfinite(float(metrics["grad_norm"]))
        assert int(state.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
        # The next step is as if the bad one had not been.
        state, _ = step(model, batch, allowed, optimizer=adamw, state=state)
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
        self, model, allowed, batch, adamw, updated, sizes, microbatches
    ):
        """Weights and optimizer stay where they were put."""
        _, params = model
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
        split = jax.tree.map(lambda _: rows, batch)
        split = dataclasses.replace(
            split, prompts=dataclasses.replace(split.prompts, positions=by_axis)
        )
        batch = jax.device_put(batch, split)
        layout = layout_of(state)
        moments = optax.tree.get(state.opt_state, "mu")
        assert jax.tree.map(lambda x: x.sharding, moments) == shardings
        state, (metrics,) = joint_step(
            model,
            [batch],
            [objective_of(microbatches=microbatches)],
            allowed,
            optimizer=adamw,
            state=state,
            layout=layout,
        )
        moment = first_moment(updated[0])
        assert within(first_moment(state), moment, CLIPPED_GATE) == {}
        gradient = jax.tree.map(lambda m: m / (1 - ADAMW.beta1), moment)
        gates = weight_gates(params, gradient, CLIPPED_GATE)
        assert within(state.params, updated[0].params, gates) == {}
        assert unequal_metrics(metrics, updated[1]) == {}
        for leaf, where in zip(jax.tree.leaves(state), layout, strict=True):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


class TestBfloat16Weights:
    """`model.param_dtype: bfloat16`: half the memory, and the gradient still summed in float32."""

    @pytest.mark.parametrize("microbatches", [1, 2])
    @pytest.mark.parametrize("name", ["adamw", "adafactor"])
    def test_types_stay_and_weights_move(self, model, allowed, name, microbatches):
        """A state of another type would be another program in the next step, and a checkpoint that
        the same run refuses."""
        graph, params = model
        optimizer = make_optimizer(dataclasses.replace(ADAMW, name=name), 4)
        half = graph, cast(params, "bfloat16")
        fresh = fresh_state(half[1], optimizer)
        types = jax.tree.map(lambda x: x.dtype, fresh)
        before = jax.tree.map(np.asarray, fresh)
        assert {str(x) for x in jax.tree.leaves(types.params)} == {"bfloat16"}
        objective = objective_of(microbatches=microbatches)
        settings = {"optimizer": optimizer, "dtype": jnp.bfloat16}

        bad = make_batch(advantages=BAD)
        state, metrics = step(half, bad, allowed, objective, state=fresh, **settings)
        assert not np.isfinite(float(metrics["grad_norm"]))
        assert int(state.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, state.params, before.params)

        state, metrics = step(half, make_batch(), allowed, objective, state=state, **settings)
        assert jax.tree.map(lambda x: x.dtype, state) == types
        assert int(state.skipped) == 1
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before.params)
        assert all(jax.tree.leaves(moved))
        assert all(np.isfinite(float(x)) for x in metrics.values())

    def test_the_gradient_is_near_that_of_float32(self, model, allowed, first):
        graph, params = model
        state, _ = step((graph, cast(params, "bfloat16")), make_batch(), allowed)
        whole, half = (
            np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree)])
            for tree in (first[0].opt_state, state.opt_state)
        )
        assert 0 < np.linalg.norm(half - whole) < 0.03 * np.linalg.norm(whole)
