"""Evaluation during training: greedy, live weights in both roles, from `evals.runner`."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from flax import nnx

from p2r_jax.config import TrainConfig
from p2r_jax.data.loader import evaluation_batches
from p2r_jax.evals.runner import Decoding, EvalWriter, evaluate
from p2r_jax.evals.scoring import summarize_modes
from p2r_jax.rl.rewards import Verifier
from p2r_jax.rl.run_log import RunLog
from p2r_jax.roles.pipeline import Pipeline


class Evaluations:
    """The evaluations of a run: before training, between phases and at the end in full, and short
    ones on the way."""

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Pipeline,
        source: Any,
        verifier: Verifier | None = None,
    ):
        self.config, self.pipeline, self.source = config, pipeline, source
        self.verifier = verifier
        self.run = Path(config.run)
        self.decoding = decoding_of(config)
        self.summaries: dict[str, dict[str, Any]] = {}
        """Of the full ones that are done: name -> mode -> summary."""
        self.seconds: dict[str, float] = {}

    def name_after(self, phase: int) -> str:
        """Name of the evaluation that follows a phase."""
        if phase == len(self.config.phases) - 1:
            return "after"
        return f"after_phase{phase + 1}_{self.config.phases[phase].role}"

    def due(self, phase: int, phase_step: int) -> bool:
        """Whether a short one follows this step; a phase's last step has a full one."""
        every = self.config.eval.every
        last = phase_step == self.config.phases[phase].steps
        return bool(every) and phase_step % every == 0 and not last

    def short(self, params: nnx.State) -> dict[str, float]:
        """Accuracy and perceiver figures, as flat metrics."""
        settings = self.config.eval
        batches = evaluation_batches(self.source, settings.batch, settings.questions)
        records = evaluate(
            self.pipeline,
            params,
            batches,
            settings.modes,
            self.decoding,
            total=settings.questions,
            verifier=self.verifier,
        )
        return _flat(records)

    def full(self, name: str, params: nnx.State, log: RunLog, step: int) -> None:
        """Records, pictures and summary under RUN/eval."""
        settings, begin = self.config.eval, time.perf_counter()
        if not settings.final_questions:
            return
        writer = EvalWriter(self.run, name, pictures=40)
        records = evaluate(
            self.pipeline,
            params,
            evaluation_batches(self.source, settings.batch, settings.final_questions),
            settings.final_modes if name in ("before", "after") else settings.modes,
            self.decoding,
            total=settings.final_questions,
            verifier=self.verifier,
            on_record=writer,
            description=f"evaluating {name}",
        )
        # In this order: a row without its summary is dropped on resume and written again.
        log.metrics(step, {"phase": "eval", "name": name}, _flat(records))
        self.summaries[name] = writer.finish(records)["modes"]
        self.seconds[f"evaluate {name}"] = time.perf_counter() - begin

    def load(self, step: int) -> None:
        """After a resume at `step`: the full ones that were done by then."""
        steps = [0, *(phase.steps for phase in self.config.phases)]
        names = ("before", *map(self.name_after, range(len(self.config.phases))))
        for name, done in zip(names, itertools.accumulate(steps), strict=True):
            file = self.run / "eval" / f"{name}.json"
            if done <= step and file.is_file():
                self.summaries[name] = json.loads(file.read_text())["modes"]


def decoding_of(config: TrainConfig) -> Decoding:
    """What each role may write: as much as in any phase."""
    caps: dict[str, int] = {}
    for phase in config.phases:
        caps[phase.role] = max(caps.get(phase.role, 0), phase.max_new_tokens)
        idle = {"perceiver": "reasoner", "reasoner": "perceiver"}.get(phase.role)
        if idle:
            caps[idle] = max(caps.get(idle, 0), phase.partner_max_new_tokens)
    reasoner = max(caps.get("reasoner", 0), caps.get("baseline", 0))
    penalty = config.eval.repetition_penalty, config.eval.penalize_prompt
    return Decoding.greedy(caps.get("perceiver", 256), reasoner, 16, *penalty)


def _flat(records: list[dict[str, Any]]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for mode, summary in summarize_modes("", records)["modes"].items():
        for name in ("accuracy", "low", "high", "hit_rate", "mean_iou", "mean_area"):
            if summary.get(name) is not None:
                flat[f"eval/{mode}/{name}"] = summary[name]
    return flat
