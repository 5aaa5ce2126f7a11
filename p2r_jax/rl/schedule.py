"""The method as a schedule: which role learns when, and for how long (P2R §1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from p2r_jax.config import PhaseConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the run in which the snapshot stays: partner and KL reference."""

    number: int
    """From 0, over all rounds."""
    round: int
    """From 0."""
    config: PhaseConfig
    steps: int

    @property
    def role(self) -> str:
        return self.config.role

    @property
    def updates(self) -> int:
        """Optimizer updates of the phase, if none is skipped."""
        return self.steps * self.config.updates_per_step

    @property
    def learning(self) -> tuple[PhaseConfig, ...]:
        """See `learning_roles`."""
        return learning_roles(self.config)


def learning_roles(phase: PhaseConfig) -> tuple[PhaseConfig, ...]:
    """What each role that learns samples with: one, or both of `joint`."""
    if phase.role != "joint":
        return (phase,)
    cap = phase.reasoner_max_new_tokens or phase.max_new_tokens
    own = dataclasses.replace(phase, reasoner_max_new_tokens=None)
    return (
        dataclasses.replace(own, role="perceiver"),
        dataclasses.replace(own, role="reasoner", max_new_tokens=cap),
    )


def microbatches(phase: PhaseConfig, shards: int = 1) -> int:
    """Parts that the gradient of one update is summed over. shards: ways that a batch is split.

    >>> microbatches(PhaseConfig(prompts=64, microbatch=8))
    8
    >>> microbatches(PhaseConfig(prompts=64, microbatch=8), shards=16)
    4
    """
    if not phase.microbatch:
        return 1
    return max(1, phase.prompts // phase.minibatches // max(phase.microbatch, shards))


def plan_phases(config: TrainConfig, rows: int) -> tuple[Phase, ...]:
    """All phases of all rounds.

    rows: of the training data, which say how long an epoch is. Raises ValueError naming a phase
    that would have no step.
    """
    phases: list[Phase] = []
    for round_ in range(config.rounds):
        for i, own in enumerate(config.phases):
            steps = own.steps
            if steps is None:
                epochs = 1.0 if own.epochs is None else own.epochs
                # 0.29 * 100 is 28.999999999999996.
                steps = int(round(epochs * (rows // own.prompts), 6))
            if rows < own.prompts or steps < 1:
                raise ValueError(
                    f"phases[{i}] has no step: data.train has {rows} rows, a step takes "
                    f"phases[{i}].prompts = {own.prompts}"
                )
            phases.append(Phase(len(phases), round_, own, steps))
    return tuple(phases)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The next step to take."""

    phase: int = 0
    """Number of the phase, over all rounds."""
    phase_step: int = 0
    step: int = 0
    """Over all phases."""
    batch: int = 0
    """The next batch of questions of the phase; ahead of `phase_step` with dynamic sampling."""
    tokens: int = 0
    """Of prompts and completions that have been trained on so far, over all phases."""
    ended: bool = False
    """The phase is over before its steps are done, see `HealthConfig.action`."""
    rows: int = 0
    """Taken from the training data so far, over all phases."""

    def is_over(self, phase: Phase) -> bool:
        """Whether the phase that this is in has no step left."""
        return self.ended or self.phase_step >= phase.steps

    def ahead(self, phases: Sequence[Phase]) -> int:
        """Steps that are left, of this phase and the following ones."""
        own = sum(phase.steps for phase in phases[self.phase : self.phase + 1]) - self.phase_step
        return sum(phase.steps for phase in phases[self.phase + 1 :]) + (0 if self.ended else own)

    def after_step(self, batches: int = 1, tokens: int = 0, rows: int = 0) -> Progress:
        """One step further in the same phase, which took so many batches and rows, and trained on
        so many tokens."""
        return dataclasses.replace(
            self,
            phase_step=self.phase_step + 1,
            step=self.step + 1,
            batch=self.batch + batches,
            tokens=self.tokens + tokens,
            rows=self.rows + rows,
        )

    def next_phase(self) -> Progress:
        """At the start of the following phase."""
        return dataclasses.replace(self, phase=self.phase + 1, phase_step=0, batch=0, ended=False)

    def end_phase(self) -> Progress:
        """Where it is, with no further step in this phase."""
        return dataclasses.replace(self, ended=True)
