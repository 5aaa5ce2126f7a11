"""From a step's experience to new weights: reference log-probs, one or more updates, metrics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.parallel.mesh import batch_shards
from p2r_jax.parallel.multihost import to_host
from p2r_jax.rl.batches import anchor_batch, training_batch
from p2r_jax.rl.experience import Clock, Experience
from p2r_jax.rl.optimizer import learning_rate, make_optimizer, updates_done
from p2r_jax.rl.rewards import Reward
from p2r_jax.rl.schedule import Phase, microbatches
from p2r_jax.rl.step import (
    AnchorBatch,
    Layout,
    Objective,
    TrainingBatch,
    TrainState,
    anchor_drift,
    batch_log_probs,
    minibatch,
    train_step,
)
from p2r_jax.rl.stop import RunStopped
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.pipeline import Pipeline

OF_THE_UPDATE = ("grad_norm", "loss/anchor")
"""Metrics that belong to no role."""


@dataclasses.dataclass
class Collected:
    """One role's part of a step."""

    role: PhaseConfig
    experience: Experience
    images: ImageStore
    sampled: list[list[Reward]]
    """Rewards of all groups, of which dynamic sampling chose."""


class Updates:
    """Makes the updates of a run."""

    def __init__(self, config: TrainConfig, phases: Sequence[Phase], pipeline: Pipeline):
        self.config, self.phases, self.pipeline = config, phases, pipeline
        self.dtype = jnp.dtype(config.model.compute_dtype)
        self.layout: Layout = ()
        """Of the state, see `step.layout_of`; to be set before the first update."""
        self._optimizers: dict[int, Any] = {}

    def run(
        self,
        phase: Phase,
        state: TrainState,
        reference: nnx.State,
        collected: list[Collected],
        clock: Clock,
    ) -> tuple[TrainState, dict[str, float]]:
        """Turn a step's experience into optimizer updates; returns its metrics too.

        state: consumed. reference: weights that the KL is taken to. Raises RunStopped if too many
        updates of the phase had a non-finite gradient, or too many samples no grade.
        """
        config, own = self.config, phase.config
        allowed, graph = self.pipeline.vocabulary.allowed, self.pipeline.graph
        rings = tuple(config.buckets.response_tokens)
        mesh = self.pipeline.builder.mesh
        shards = batch_shards(mesh) if mesh is not None else 1
        metrics: dict[str, float] = {}
        batches: list[TrainingBatch] = []
        objectives: list[Objective] = []
        prefix = [f"{c.role.role}/" if len(collected) > 1 else "" for c in collected]
        for one, name in zip(collected, prefix, strict=True):
            batch, about = training_batch(
                one.experience,
                config.loss,
                self.pipeline.builder.mesh,
                rings,
                config.reward.max_dropped_fraction,
                one.sampled,
            )
            metrics |= {name + key: value for key, value in about.items()}
            parts = microbatches(own, shards)
            every = parts * own.minibatches if own.microbatch else 1
            objective = Objective(config.loss, one.role.temperature, one.role.max_new_tokens, every)
            score = functools.partial(
                batch_log_probs, graph, allowed=allowed, objective=objective, dtype=self.dtype
            )
            if config.loss.kl_weight:
                with clock("reference"):
                    frozen = jax.block_until_ready(score(reference, batch=batch))
                batch = dataclasses.replace(batch, reference_log_probs=frozen)
            if own.updates_per_step > 1:
                with clock("update"):
                    old = score(state.params, batch=batch)
                    batch = dataclasses.replace(batch, old_log_probs=old)
                objective = dataclasses.replace(objective, microbatches=parts)
            batches.append(batch)
            objectives.append(objective)
        if len(collected) > 1:
            rewards = [metrics[f"{name}reward/mean"] for name in prefix]
            metrics["reward/mean"] = float(np.mean(rewards))
        with clock("update"):
            anchor = None
            if len(collected) == 1:
                first = collected[0]
                builder = self.pipeline.builder
                anchor = anchor_batch(own, first.experience, first.images, builder, rings)
            done = updates_done(state.opt_state)
            state, scalars = self._optimize(phase, state, tuple(batches), tuple(objectives), anchor)
        metrics |= _merged(scalars, prefix)
        metrics["lr"] = learning_rate(config.optimizer, self.schedule_length(phase), done)
        metrics["skipped_steps"] = skipped = int(to_host(state.skipped))
        self.stop_if_broken(skipped)
        return state, metrics

    def _optimize(
        self,
        phase: Phase,
        state: TrainState,
        batches: tuple[TrainingBatch, ...],
        objectives: tuple[Objective, ...],
        anchor: AnchorBatch | None,
    ) -> tuple[TrainState, list[tuple[dict[str, Any], ...]]]:
        """All updates of a step; metrics of each, by role."""
        own, results = phase.config, []
        drift = {}
        if anchor is not None and not own.role_anchor:
            # A program of its own: the update is then not compiled anew for sizes of the anchor.
            drift["loss/anchor"] = anchor_drift(
                state.params,
                self.pipeline.graph,
                anchor,
                self.pipeline.vocabulary.allowed,
                dtype=self.dtype,
            )
        for number in range(own.updates_per_step):
            part = batches
            if own.minibatches > 1:
                index = np.int32(number % own.minibatches)
                part = tuple(minibatch(b, index, parts=own.minibatches) for b in batches)
            state, scalars = train_step(
                state,
                part,
                anchor if own.role_anchor else None,
                self.pipeline.vocabulary.allowed,
                graph=self.pipeline.graph,
                optimizer=self.optimizer(phase),
                objectives=objectives,
                freeze_vision=self.config.optimizer.freeze_vision,
                role_anchor=own.role_anchor,
                remat=self.config.model.remat,
                dtype=self.dtype,
                layout=self.layout,
            )
            scalars[0].update(drift)
            results.append(to_host(scalars))
        return state, results

    def schedule_length(self, phase: Phase) -> int:
        """Updates that the learning-rate schedule goes over."""
        reset = self.config.optimizer.reset
        return phase.updates if reset else sum(p.updates for p in self.phases)

    def optimizer(self, phase: Phase) -> Any:
        """Of the phase; one object per schedule, which the compiled step knows by its identity."""
        updates = self.schedule_length(phase)
        if updates not in self._optimizers:
            self._optimizers[updates] = make_optimizer(self.config.optimizer, updates)
        return self._optimizers[updates]

    def stop_if_broken(self, skipped: int) -> None:
        """Raise RunStopped if more updates were skipped than `optimizer.max_skipped`."""
        if skipped > self.config.optimizer.max_skipped:
            raise RunStopped(
                f"{skipped} updates of this phase had a non-finite gradient (limit "
                "optimizer.max_skipped): start a new `run` with a lower optimizer.learning_rate or "
                "with model.compute_dtype float32"
            )


def _merged(results: list[tuple[dict[str, Any], ...]], prefix: list[str]) -> dict[str, float]:
    """Metrics of several updates as one: means, but for what is a maximum."""
    merged: dict[str, float] = {}
    for role, start in enumerate(prefix):
        for name in results[0][role]:
            values = [float(result[role][name]) for result in results]
            value = max(values) if name.endswith("/max") else float(np.mean(values))
            merged[name if name in OF_THE_UPDATE else start + name] = value
    if len(prefix) > 1:
        merged["loss/total"] = sum(merged[f"{start}loss/total"] for start in prefix)
    return merged
