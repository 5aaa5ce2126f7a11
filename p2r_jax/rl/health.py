"""Whether a run is well, told from the rows of its metrics.jsonl: rules, and when they warn.

    row of a step --Monitor.add--> readings (a value beside its threshold) --> new warnings

No JAX and no files here: the same rows give the same warnings, which is how a resumed run comes to
where it was (`Monitor` is given the rows again). Files and processes: `rl.watch`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

from p2r_jax.config import HealthConfig

Row: TypeAlias = Mapping[str, Any]
"""Of metrics.jsonl: {"step", "phase", "round", "phase_number", "phase_step", "kl/mean", ...}."""

PREFIXES = ("", "perceiver/", "reasoner/")
"""Metrics of a joint phase carry the role that they belong to."""
ENTROPY_FLOOR = 0.04
"""Nats. Where a role is surer than this to begin with, small rises are large factors."""
COMPARED = ("p2r", "baseline")
"""Mode whose accuracy is held against the reward; the second where there is no first."""
WATCHED = (
    "kl/mean",
    "completion/truncated_fraction",
    "entropy/mean",
    "reward/teaching_groups",
    "reward/only_training",
    "reward/mean",
    "loss/anchor",
    "grad_norm",
)
"""Metrics of every step that rules read."""
IDLE_MODE = {"perceiver": "live_reasoner", "reasoner": "live_perceiver"}
"""By the role that learns: the mode in which only the other one is live."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A value beside its threshold. `about` is what may be added to the advice."""

    metric: str
    """As metrics.jsonl names it, or what is made of it."""
    value: float
    threshold: float
    exceeded: bool
    about: str = ""


@dataclasses.dataclass(frozen=True)
class HealthWarning:
    """A threshold was crossed, and was not before."""

    step: int
    phase: str
    round: int
    phase_number: int
    """From 1, over all rounds."""
    phase_step: int
    rule: str
    """The field of `HealthConfig`."""
    metric: str
    value: float
    threshold: float
    message: str
    """What it means and what to change."""

    @property
    def label(self) -> str:
        """Example: step 152, round 1 reasoner: kl/mean 0.61, threshold 0.5."""
        return (
            f"step {self.step}, round {self.round} {self.phase}: {self.metric} {self.value:.3g}, "
            f"threshold {self.threshold:.3g} (health.{self.rule})"
        )


ADVICE = {
    "kl": "The policy is far from the weights that the KL is taken to, more than rewards of one "
    "phase ask for: lower optimizer.learning_rate, raise loss.kl_weight, or shorten the phase.",
    "truncated": "Completions run into max_new_tokens and are graded as they are cut: if they are "
    "longer than the task needs, the policy is falling apart (lower optimizer.learning_rate, set "
    "loss.mask_truncated); if not, raise phases[i].max_new_tokens.",
    "entropy_collapse": "The policy hardly varies any more, so that groups stop to differ and it "
    "explores nothing: set loss.entropy_weight or a larger loss.clip_high, or lower "
    "optimizer.learning_rate.",
    "entropy_rise": "The policy gets less sure of every token instead of surer, as it does when "
    "noise is trained on: lower optimizer.learning_rate, raise loss.kl_weight.",
    "teaching_groups": "Most groups agree in their rewards, and what is left of the gradient is "
    "noise and KL: set phases[i].dynamic_sampling, give harder (or easier) questions, a larger "
    "group or a higher temperature, or end the phase here.",
    "only_training": "Completions earn rewards that evaluations would not give them; the policy "
    "learns to write these: set reward.answer_rule to evaluation, or read RUN/samples for how.",
    "reward_gap": "The reward holds or grows while held-out accuracy falls: what is learned is the "
    "frozen partner's habits, the training rows or a hole in the reward. Set "
    "phases[i].role_anchor, raise loss.kl_weight, shorten the phase, and read RUN/samples.",
    "anchor_rise": "The role that does not learn forgets what it wrote at the phase's start, which "
    "the reward cannot see because the partner is frozen: set or raise phases[i].role_anchor, or "
    "lower optimizer.learning_rate.",
    "idle_drop": "The role that does not learn gets worse, which the reward cannot see because the "
    "partner is frozen: set or raise phases[i].role_anchor, or lower optimizer.learning_rate.",
    "grad_norm": "Gradients are large, and every update is clipped to optimizer.grad_clip: lower "
    "optimizer.learning_rate, or set optimizer.warmup_steps.",
    "grad_norm_rise": "Gradients are many times what they were in this phase: lower "
    "optimizer.learning_rate, or look for rows of another kind in data.train.",
}
"""What each rule means and what to change."""


class Monitor:
    """Watches the steps of a run, one row after the other."""

    def __init__(self, config: HealthConfig):
        self.config = config
        self.count = 0
        """Warnings so far."""
        self._number: Any = None
        """Of the present phase."""
        self._phase = _Phase(config.window)
        self._active: dict[tuple[str, str], HealthWarning] = {}
        """By rule and metric, those that have not recovered."""
        self._calm: dict[tuple[str, str], int] = {}
        """Readings in a row within their threshold."""

    @property
    def active(self) -> list[HealthWarning]:
        """Warnings of the present phase whose value has not recovered."""
        return list(self._active.values())

    def add(self, row: Row) -> list[HealthWarning]:
        """The warnings that a step's row gives. Rows of full evaluations, between phases, say
        nothing."""
        if row.get("phase") == "eval":
            return []
        if row.get("phase_number") != self._number:
            self._number, self._phase = row.get("phase_number"), _Phase(self.config.window)
            self._active, self._calm = {}, {}
        self._phase.add(row)
        warnings = []
        for rule, read in RULES.items():
            if getattr(self.config, rule) is None:
                continue
            for reading in read(self.config, self._phase):
                if self._is_news(rule, reading):
                    warning = _warning(row, rule, reading)
                    self._active[rule, reading.metric] = warning
                    warnings.append(warning)
        self.count += len(warnings)
        return warnings

    def _is_news(self, rule: str, reading: Reading) -> bool:
        """Whether the threshold is crossed and was not before, or has been kept for long enough
        since."""
        key = rule, reading.metric
        if reading.exceeded:
            self._calm[key] = 0
            return key not in self._active
        self._calm[key] = self._calm.get(key, 0) + 1
        # Evaluations are rare, and each of them is many answers: one is enough.
        if self._calm[key] >= (1 if "eval/" in reading.metric else self.config.window):
            self._active.pop(key, None)
        return False


def _warning(row: Row, rule: str, reading: Reading) -> HealthWarning:
    numbers = {name: int(row.get(name) or 0) for name in ("step", "round", "phase_number")}
    return HealthWarning(
        phase=str(row.get("phase")),
        phase_step=int(row.get("phase_step") or 0),
        rule=rule,
        metric=reading.metric,
        value=reading.value,
        threshold=reading.threshold,
        message=f"{reading.about} {ADVICE[rule]}".strip(),
        **numbers,
    )


# --- the rows of a phase, and readings of them ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """A short evaluation of one mode. `high`: upper end of its 95 % interval."""

    step: int
    accuracy: float
    high: float
    reward: float
    """Training reward at the time, median of the last steps."""


class _Phase:
    """What the rules need of a phase's rows so far."""

    def __init__(self, window: int):
        self.window = window
        self.row: Row = {}
        """The newest."""
        self.values: dict[str, list[float]] = collections.defaultdict(list)
        self.evaluated: dict[str, list[_Evaluated]] = collections.defaultdict(list)
        """By mode."""

    def add(self, row: Row) -> None:
        self.row = row
        for name in (prefix + metric for prefix in PREFIXES for metric in WATCHED):
            if _is_value(row.get(name)):
                self.values[name].append(row[name])
        for mode in (*COMPARED, *IDLE_MODE.values()):
            accuracy = row.get(f"eval/{mode}/accuracy")
            if _is_value(accuracy):
                rewards = self.values["reward/mean"][-self.window :]
                reward = _median(rewards) if rewards else 0.0
                high = row.get(f"eval/{mode}/high", accuracy)
                self.evaluated[mode].append(_Evaluated(int(row["step"]), accuracy, high, reward))

    def series(self, metric: str, least: int) -> Iterator[tuple[str, list[float]]]:
        """Name and values of a metric that the newest row has, of each role, if there are so
        many."""
        for name in (prefix + metric for prefix in PREFIXES):
            if _is_value(self.row.get(name)) and len(self.values[name]) >= least:
                yield name, self.values[name]

    def since_start(self, metric: str) -> Iterator[tuple[str, float, float]]:
        """Name, median of the first steps, median of the last."""
        for name, values in self.series(metric, self.window + 1):
            yield name, _median(values[: self.window]), _median(values[-self.window :])

    def fall(self, mode: str) -> tuple[_Evaluated, _Evaluated] | None:
        """The best evaluation of the phase and the newest one; the newest twice if it is not below
        the best, or may be by chance. They ask the same questions. None if the newest row has no
        evaluation."""
        if not _is_value(self.row.get(f"eval/{mode}/accuracy")):
            return None
        newest = self.evaluated[mode][-1]
        best = max(self.evaluated[mode], key=lambda one: (one.accuracy, one.step))
        return (best, newest) if newest.high < best.accuracy else (newest, newest)


def _above(metric: str, rule: str) -> Callable[[HealthConfig, _Phase], Iterator[Reading]]:
    """The median of the last steps, at most the threshold."""

    def read(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
        limit = getattr(config, rule)
        for name, values in phase.series(metric, config.window):
            now = _median(values[-config.window :])
            yield Reading(name, now, limit, now > limit)

    return read


def _teaching_groups(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    limit = config.teaching_groups or 0.0
    for name, values in phase.series("reward/teaching_groups", config.window):
        now = _median(values[-config.window :])
        yield Reading(name, now, limit, now < limit)


def _entropy_collapse(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    for name, first, now in phase.since_start("entropy/mean"):
        limit = (config.entropy_collapse or 0.0) * first
        yield Reading(name, now, limit, now < limit, _began(first))


def _entropy_rise(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    for name, first, now in phase.since_start("entropy/mean"):
        limit = (config.entropy_rise or 0.0) * max(first, ENTROPY_FLOOR)
        yield Reading(name, now, limit, now > limit, _began(first))


def _anchor_rise(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    for name, first, now in phase.since_start("loss/anchor"):
        limit = first + (config.anchor_rise or 0.0)
        yield Reading(name, now, limit, now > limit, _began(first))


def _began(first: float) -> str:
    return f"It was {first:.3g} as the phase began."


def _grad_norm_rise(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    # With fewer steps the last ones would be most of all.
    for name, values in phase.series("grad_norm", 3 * config.window):
        usual, now = _median(values), _median(values[-config.window :])
        limit = (config.grad_norm_rise or 0.0) * usual
        yield Reading(name, now, limit, now > limit, f"Its median in the phase is {usual:.3g}.")


def _reward_gap(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    limit = config.reward_gap or 0.0
    found = ((mode, phase.fall(mode)) for mode in COMPARED)
    for mode, (best, now) in ((mode, fall) for mode, fall in found if fall is not None):
        gap = best.accuracy - now.accuracy + now.reward - best.reward
        about = (
            f"Since step {best.step} accuracy went from {best.accuracy:.1%} to {now.accuracy:.1%} "
            f"and the reward from {best.reward:.3f} to {now.reward:.3f}."
        )
        yield Reading(f"reward/mean - eval/{mode}/accuracy", gap, limit, gap > limit, about)
        return


def _idle_drop(config: HealthConfig, phase: _Phase) -> Iterator[Reading]:
    limit = config.idle_drop or 0.0
    mode = IDLE_MODE.get(str(phase.row.get("phase")), "")
    fall = phase.fall(mode)
    if fall is not None:
        best, now = fall
        lost = best.accuracy - now.accuracy
        about = f"It went from {best.accuracy:.1%} at step {best.step} to {now.accuracy:.1%}."
        yield Reading(f"fall of eval/{mode}/accuracy", lost, limit, lost > limit, about)


RULES: dict[str, Callable[[HealthConfig, _Phase], Iterator[Reading]]] = {
    "kl": _above("kl/mean", "kl"),
    "truncated": _above("completion/truncated_fraction", "truncated"),
    "entropy_collapse": _entropy_collapse,
    "entropy_rise": _entropy_rise,
    "teaching_groups": _teaching_groups,
    "only_training": _above("reward/only_training", "only_training"),
    "reward_gap": _reward_gap,
    "anchor_rise": _anchor_rise,
    "idle_drop": _idle_drop,
    "grad_norm": _above("grad_norm", "grad_norm"),
    "grad_norm_rise": _grad_norm_rise,
}
"""By the field of `HealthConfig` that is its threshold."""


def _median(values: list[float]) -> float:
    return float(statistics.median(values))


def _is_value(value: Any) -> TypeGuard[float]:
    """Infinity is one, and beyond every threshold; NaN is none."""
    return isinstance(value, (int, float)) and not math.isnan(value)
