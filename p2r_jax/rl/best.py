"""Which weights of a run are best by its own evaluations, and which checkpoints stay for that.

A candidate is a step whose weights were evaluated: in a short evaluation on the way, in a full one
at a phase's end, or before the first step (step 0, the weights that the run started from). What is
compared is the accuracy on the questions that all evaluations share. All of it goes into each
checkpoint, so that a resumed run knows what the one that wrote it knew, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from p2r_jax.config import TrainConfig
from p2r_jax.evals.intervals import Accuracy
from p2r_jax.evals.modes import LIVE_MODES
from p2r_jax.evals.scoring import summarize_modes
from p2r_jax.parallel.multihost import is_main
from p2r_jax.paths import write_whole
from p2r_jax.rl.schedule import Phase

FILE = "best.json"
"""In the run's folder: what the newest checkpoint will say of evaluations, for people and for `p2r
convert`. A run does not read it."""


@dataclasses.dataclass(frozen=True)
class Score:
    """An evaluation of the weights of one step."""

    step: int
    accuracy: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return str(Accuracy(self.accuracy, self.low, self.high, self.n))


class Best:
    """What a run has evaluated so far, and what follows from it."""

    def __init__(self, config: TrainConfig, phases: Sequence[Phase]):
        """Raises ValueError naming a setting that asks for evaluations which there will not be."""
        self.config, self.phases = config, phases
        self.metric = metric_of(config)
        """Mode whose accuracy decides; None = nothing does."""
        self.scores: dict[int, Score] = {}
        """By step."""
        self.starts: dict[int, int] = {0: 0}
        """The step whose weights a phase started with, by number of the phase."""
        self.ends: set[int] = set()
        """The last steps of the phases that are over."""
        for phase in phases[1:]:
            self._check_start(phase, phases[phase.number - 1])

    def _check_start(self, phase: Phase, before: Phase) -> None:
        if phase.config.start != "best":
            return
        settings = self.config.eval
        if not (settings.final_questions or 0 < settings.every < before.steps):
            problem = "is not evaluated: set eval.final_questions, or a smaller eval.every"
        elif self.metric not in settings.modes:
            problem = f"is not evaluated by {self.metric}: add it to eval.modes"
        else:
            return
        own = phase.number % len(self.config.phases)
        raise ValueError(f"phases[{own}].start: the phase before {problem}")

    # --- what is known -----------------------------------------------------------------------

    def add(self, step: int, accuracy: Accuracy | None) -> None:
        """An evaluation of a step's weights, unless there is one of them already. None: it did not
        tell."""
        if self.metric is None or accuracy is None:
            return
        if accuracy.accuracy is not None:
            score = Score(step, accuracy.accuracy, accuracy.low, accuracy.high, accuracy.n)
            self.scores.setdefault(step, score)

    def drop(self, step: int) -> None:
        """Forget a candidate whose weights cannot be had."""
        self.scores.pop(step, None)

    def started(self, phase: int, step: int) -> None:
        """A phase begins with the weights of this step."""
        self.starts[phase] = step

    def ended(self, step: int) -> None:
        """A phase is over with this step."""
        self.ends.add(step)

    def phase_of(self, step: int) -> Phase | None:
        """The phase that took a step; None for step 0."""
        number = sum(end < step for end in self.ends)
        return self.phases[min(number, len(self.phases) - 1)] if step else None

    # --- what follows ------------------------------------------------------------------------

    def ranked(self, phase: int | None = None, until: int | None = None) -> list[Score]:
        """Candidates, the best first and of equal ones the later. phase: only those of this phase,
        with the weights that it started with. until: only those of up to this step."""
        found = [s for s in self.scores.values() if until is None or s.step <= until]
        if phase is not None:
            start = self.starts.get(phase)
            found = [s for s in found if s.step == start or self._number(s.step) == phase]
        return ranked(found)

    def wants(self, step: int) -> bool:
        """Whether the weights of this step, the newest, are the best so far of what may be asked
        for later."""
        return any(score.step == step for score in self._bests(step))

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Of the steps that have checkpoints, those that stay beside the newest: ends of phases if
        they are wanted, and what a run would ask for that goes on from one that stays."""
        newest = sorted(steps)[-self.config.checkpoint.keep :]
        kept = set(self.ends) if self.config.checkpoint.keep_phase_ends else set()
        kept |= {score.step for end in kept for score in self._phase_best(end)}
        kept |= {score.step for step in newest for score in self._bests(step)}
        return kept & set(steps)

    def _bests(self, until: int) -> list[Score]:
        return self.ranked(until=until)[:1] + self._phase_best(until)

    def _phase_best(self, until: int) -> list[Score]:
        """Of the phase of this step, if the next one starts from it."""
        number = self._number(until)
        if number is None or number + 1 >= len(self.phases):
            return []
        if self.phases[number + 1].config.start != "best":
            return []
        return self.ranked(number, until)[:1]

    def _number(self, step: int) -> int | None:
        phase = self.phase_of(step)
        return None if phase is None else phase.number

    # --- on disk -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "metric": self.metric,
            "scores": [dataclasses.asdict(score) for _, score in sorted(self.scores.items())],
            "starts": {str(phase): step for phase, step in sorted(self.starts.items())},
            "ends": sorted(self.ends),
        }

    def load(self, found: Mapping[str, Any] | None, step: int) -> None:
        """What the checkpoint of `step` says. None: it is of a version that knew of no best, when
        each phase went on from the end of the one before."""
        if found is None:
            ends = [sum(p.steps for p in self.phases[: n + 1]) for n in range(len(self.phases))]
            self.scores = {}
            # Its own end is told when it is over, as that of a run that was not resumed.
            self.ends = {end for end in ends if end < step}
            self.starts = {n: ([0, *ends])[n] for n in range(len(self.ends) + 1)}
            return
        # By another metric they would not compare.
        same = found["metric"] == self.metric
        self.scores = {s.step: s for s in scores_of(found)} if same else {}
        self.starts = {int(phase): start for phase, start in found["starts"].items()}
        self.ends = set(found["ends"])

    def write(self, run: Path) -> None:
        """As FILE in a run's folder."""
        if is_main() and self.metric is not None:
            write_whole(run / FILE, json.dumps(self.to_json(), indent=1) + "\n")


class StayingCheckpoints:
    """`Best.kept` as orbax asks for it: a preservation policy."""

    def __init__(self, best: Best):
        self.best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of the checkpoints stay."""
        kept = self.best.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def ranked(scores: Iterable[Score]) -> list[Score]:
    """The best first, of equal ones the later."""
    return sorted(scores, key=lambda score: (score.accuracy, score.step), reverse=True)


def scores_of(found: Mapping[str, Any]) -> list[Score]:
    """Of what `Best.to_json` made."""
    return [Score(**score) for score in found["scores"]]


def metric_of(config: TrainConfig) -> str | None:
    """The mode that `checkpoint.keep_best` stands for in this run; None if nothing is to decide.

    Raises ValueError for one that no evaluation of the run gives.
    """
    wanted, settings = config.checkpoint.keep_best, config.eval
    modes = settings.modes if settings.every or settings.final_questions else []
    final = settings.final_modes if settings.final_questions else []
    given = [m for m in [*modes, *final] if m.partition(":")[0] not in LIVE_MODES]
    if wanted is None or (wanted == "p2r" and not (modes or final)):
        return None
    if wanted == "p2r" and given:
        # The control without stages has no p2r on the way; that before and after is not its own.
        own = [mode for mode in given if mode in modes] or given
        return wanted if wanted in own else own[0]
    if wanted in given:
        return wanted
    live = " (its partner is another one in each phase)" if wanted in LIVE_MODES else ""
    raise ValueError(
        f"checkpoint.keep_best: no evaluation of this run tells which weights are best by "
        f"{wanted}{live}; there are {', '.join(dict.fromkeys(given)) or 'none'}, or null"
    )


def shared_questions(config: TrainConfig) -> int:
    """How many questions all evaluations of a run have in common, the first of the validation
    rows."""
    settings = config.eval
    counts = [settings.final_questions] if settings.final_questions else []
    counts += [settings.questions] if settings.every else []
    return min(counts, default=0)


def accuracy_of(
    records: Iterable[Mapping[str, Any]], metric: str, ids: set[str] | None
) -> Accuracy | None:
    """Of the records of one mode, without those that could not be graded. ids: of the rows that
    count; None = all."""
    counted = [
        dict(record)
        for record in records
        if record["mode"] == metric
        and record["correct"] is not None
        and (ids is None or record["id"] in ids)
    ]
    if not counted:
        return None
    summary = summarize_modes("", counted)["modes"][metric]
    return Accuracy(summary["accuracy"], summary["low"], summary["high"], summary["n"])
