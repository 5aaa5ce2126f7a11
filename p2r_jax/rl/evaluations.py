"""Evaluation during training: greedy, both roles by the live weights, and each of them with the
frozen other one, so that it shows which of them drifts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from p2r_jax.config import TrainConfig
from p2r_jax.data.loader import ImageCache, LoadedRow, Unreadable, evaluation_batches
from p2r_jax.evals.intervals import Accuracy
from p2r_jax.evals.modes import LIVE_MODES
from p2r_jax.evals.record_file import EvalWriter
from p2r_jax.evals.runner import Decoding, evaluate
from p2r_jax.evals.scoring import summarize_modes
from p2r_jax.evals.verdicts import start_name
from p2r_jax.parallel.multihost import gather, is_main
from p2r_jax.paths import as_path
from p2r_jax.rl.best import accuracy_of, metric_of, shared_questions
from p2r_jax.rl.run_log import RunLog
from p2r_jax.rl.schedule import Phase, learning_roles
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import share_of
from p2r_jax.roles.pipeline import Pipeline


class Evaluations:
    """The evaluations of a run: before training, between phases and at the end in full, and short
    ones on the way."""

    def __init__(
        self,
        config: TrainConfig,
        phases: Sequence[Phase],
        pipeline: Pipeline,
        source: Any,
        grader: Grader,
        check: Callable[[], None] = lambda: None,
    ):
        """check: called between batches; may raise to end an evaluation before its time."""
        self.config, self.phases, self.pipeline, self.source = config, phases, pipeline, source
        self.grader, self.check = grader, check
        self.run = as_path(config.run)
        listing = self.run / "bad_rows" / "validation" / "images.jsonl"
        limit = config.data.max_bad_fraction * len(source)
        self.unreadable = Unreadable(limit, listing if is_main() else None)
        self.decoding = decoding_of(config)
        self.summaries: dict[str, dict[str, Any]] = {}
        """Of the full ones that are done: name -> mode -> summary."""
        self.metric = metric_of(config)
        self.shared: Accuracy | None = None
        """By `metric`, of the last evaluation: on the questions that all of them share."""
        self._shared_ids: set[str] | None = None

    def name_after(self, phase: Phase) -> str:
        """Name of the evaluation that follows a phase."""
        if phase.number == len(self.phases) - 1:
            return "after"
        return f"after_phase{phase.number + 1}_{phase.role}"

    def name_at_start(self, phase: Phase) -> str:
        """Name of the one that a phase begins with if its weights are not the newest."""
        return start_name(phase.number + 1, phase.role)

    def due(self, phase: Phase, phase_step: int) -> bool:
        """Whether a short one follows this step; a phase's last step has a full one."""
        every = self.config.eval.every
        return bool(every) and phase_step % every == 0 and phase_step != phase.steps

    def short(self, params: nnx.State, partner: nnx.State) -> dict[str, float]:
        """Accuracy and perceiver figures, as flat metrics. partner: the snapshot's weights."""
        settings = self.config.eval
        records = evaluate(
            self.pipeline,
            params,
            lambda _: self._batches(settings.questions),
            settings.modes,
            self.decoding,
            total=settings.questions,
            grader=self.grader,
            partner=partner,
        )
        self.shared = self._on_shared(records)
        return self._flat(records)

    def _batches(self, questions: int) -> Iterator[list[LoadedRow]]:
        size, bad = self.config.eval.batch, self.unreadable
        share = share_of(self.pipeline.builder.mesh)
        cache = ImageCache(int(self.config.eval.image_cache_gib * 2**30))
        for batch in evaluation_batches(
            self.source, size, questions, unreadable=bad, share=share, cache=cache
        ):
            self.check()
            yield batch

    def _modes(self, name: str) -> list[str]:
        settings = self.config.eval
        if name == "before":  # The snapshot is the policy: one mode tells all.
            return list(dict.fromkeys([*settings.final_modes, *filter(None, [self.metric])]))
        if name in map(self.name_at_start, self.phases):  # So it is here.
            own = [mode for mode in settings.modes if mode.partition(":")[0] not in LIVE_MODES]
            return list(dict.fromkeys([*own, *filter(None, [self.metric])]))
        if name == "after":
            return list(dict.fromkeys([*settings.final_modes, *settings.modes]))
        return settings.modes

    def full(
        self, name: str, params: nnx.State, partner: nnx.State, log: RunLog, step: int
    ) -> None:
        """Records, pictures and summary under RUN/eval."""
        settings, begin, self.shared = self.config.eval, time.perf_counter(), None
        if not settings.final_questions:
            return
        writer = EvalWriter(self.run, name, pictures=40)
        records = evaluate(
            self.pipeline,
            params,
            lambda _: self._batches(settings.final_questions),
            self._modes(name),
            self.decoding,
            total=settings.final_questions,
            grader=self.grader,
            partner=partner,
            on_record=writer,
            description=f"evaluating {name}",
        )
        metrics = self._flat(records) | {"time/evaluation": time.perf_counter() - begin}
        # In this order: a row without its summary is dropped on resume and written again.
        log.metrics(step, {"phase": "eval", "name": name}, metrics)
        self.summaries[name] = writer.finish(records)["modes"]
        self.shared = self._on_shared(records)

    def read_shared(self, name: str) -> None:
        """Set `shared` to what it was after this evaluation, which is done, from its records."""
        self.shared, figures = None, np.zeros(4)
        file = self.run / "eval" / f"{name}.jsonl"
        if is_main() and file.is_file():
            lines = file.read_text().splitlines()
            found = self._on_shared(list(map(json.loads, lines)))
            if found is not None:
                figures = np.asarray([found.accuracy, found.low, found.high, found.n], float)
        accuracy, low, high, n = map(float, gather(figures)[0])
        if n:
            self.shared = Accuracy(accuracy, low, high, int(n))

    def _on_shared(self, records: list[dict[str, Any]]) -> Accuracy | None:
        if self.metric is None:
            return None
        if self._shared_ids is None:
            count = min(shared_questions(self.config), len(self.source))
            self._shared_ids = {self.source[i].id for i in range(count)}
        return accuracy_of(records, self.metric, self._shared_ids)

    def _flat(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Flat metrics; answers that nothing could grade are left out and counted."""
        flat: dict[str, float] = {}
        graded = [record for record in records if record["correct"] is not None]
        for mode, summary in summarize_modes("", graded)["modes"].items():
            for name in ("accuracy", "low", "high", "hit_rate", "mean_iou", "mean_area"):
                if summary.get(name) is not None:
                    flat[f"eval/{mode}/{name}"] = summary[name]
        flat["eval/ungraded"] = len(records) - len(graded)
        counts = self.grader.counts()
        return flat | {f"eval/verifier_{name}": count for name, count in counts.items()}

    def load(self, phases_done: int) -> None:
        """After a resume, when so many phases are over: the full ones that were done by then."""
        over = self.phases[: phases_done + 1]
        names = ["before", *map(self.name_at_start, over)]
        names += map(self.name_after, over[:phases_done])
        files = [self.run / "eval" / f"{name}.json" for name in names]
        # One process decides for all: a file that only some of them see would part their ways.
        there = gather(np.asarray([file.is_file() for file in files]))[0]
        for name, file, found in zip(names, files, there, strict=True):
            if found:
                self.summaries[name] = json.loads(file.read_text())["modes"] if is_main() else {}


def decoding_of(config: TrainConfig) -> Decoding:
    """What each role may write: as much as in any phase."""
    caps: dict[str, int] = {}
    for phase in config.phases:
        for own in learning_roles(phase):
            caps[own.role] = max(caps.get(own.role, 0), own.max_new_tokens)
            idle = {"perceiver": "reasoner", "reasoner": "perceiver"}.get(own.role)
            if idle:
                caps[idle] = max(caps.get(idle, 0), own.partner_max_new_tokens)
    reasoner = max(caps.get("reasoner", 0), caps.get("baseline", 0))
    return Decoding.of(
        caps.get("perceiver", 256),
        reasoner,
        16,
        repetition_penalty=config.eval.repetition_penalty,
        penalize_prompt=config.eval.penalize_prompt,
    )
