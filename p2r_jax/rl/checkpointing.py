"""Checkpoints that make a killed run go on as if it had not been: orbax, asynchronous and atomic.

A checkpoint holds the weights, the phase-start snapshot, the optimizer, and where the run is. Data
order and randomness follow from (seed, step), so nothing else is needed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from p2r_jax.config import CheckpointConfig
from p2r_jax.rl.step import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """The next step to take."""

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    """Over all phases."""

    def after_step(self) -> Progress:
        """One step further in the same phase."""
        return Progress(self.phase, self.phase_step + 1, self.step + 1)

    def next_phase(self) -> Progress:
        """At the start of the following phase."""
        return Progress(self.phase + 1, 0, self.step)


class Checkpoints:
    """Saves and restores (Progress, TrainState, snapshot) under RUN/checkpoints."""

    def __init__(self, run: Path, config: CheckpointConfig):
        self.every = config.every
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps: on schedule, or because the machine is to go away."""
        return step % self.every == 0 or self.manager.reached_preemption(step)

    def latest(self) -> Progress | None:
        """Where the newest checkpoint stands; None if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return None
        restored = self.manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        )
        return Progress(**restored.progress)

    def save(self, progress: Progress, state: TrainState, snapshot: nnx.State) -> None:
        """Start saving; returns before the bytes are on disk."""
        self.manager.save(
            progress.step,
            args=ocp.args.Composite(
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                state=ocp.args.StandardSave(_tree(state, snapshot)),
            ),
        )

    def restore(
        self, progress: Progress, state: TrainState, snapshot: nnx.State
    ) -> tuple[TrainState, nnx.State]:
        """Read into arrays shaped and sharded like `state` and `snapshot`.

        Raises ValueError if the checkpoint is of another model or optimizer.
        """
        like = _tree(state, snapshot)
        try:
            restored = self.manager.restore(
                progress.step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(like)),
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.manager.directory} does not fit this run's model or optimizer; use another "
                f"`run` folder or the settings in its config.yaml: {error}"
            ) from error
        tree = restored.state
        opt_state = _refill(state.opt_state, tree["opt_state"])
        return (
            TrainState(_refill(state.params, tree["params"]), opt_state, tree["skipped"]),
            _refill(snapshot, tree["snapshot"]),
        )

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by number: orbax then needs to know nothing of our containers."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _refill(like: Any, leaves: dict[str, Any]) -> Any:
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [leaves[str(i)] for i in range(len(leaves))])


def _tree(state: TrainState, snapshot: nnx.State) -> dict[str, Any]:
    return {
        "params": _leaves(state.params),
        "opt_state": _leaves(state.opt_state),
        "skipped": state.skipped,
        "snapshot": _leaves(snapshot),
    }
