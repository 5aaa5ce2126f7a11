"""PRA-GRPO: one role learns at a time, from final-answer correctness alone (P2R §1).

    for each phase:
        snapshot = policy                      # frozen partner and KL reference
        for each step:
            rows    = next batch
            perceiver phase: policy writes G box lists a question; the frozen reasoner answers each
            reasoner phase:  the frozen perceiver boxes once; policy writes G answers
            rewards -> group advantages -> one update

`Trainer.run` reads top to bottom like that. Everything random follows from (seed, step), so a run
that is killed and resumed goes on as if it had not been.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.data.loader import LoadedRow, evaluation_batches, training_batches
from p2r_jax.evals.runner import EvalWriter, TokenLimits, evaluate
from p2r_jax.evals.scoring import summarize_modes
from p2r_jax.parallel.mesh import batch_sharding, parameter_shardings
from p2r_jax.parallel.multihost import is_main, to_host
from p2r_jax.qwen3_vl.hf import save_pretrained
from p2r_jax.rl.advantages import group_advantages, zero_variance_groups
from p2r_jax.rl.checkpointing import Checkpoints
from p2r_jax.rl.checkpointing import Progress as Position
from p2r_jax.rl.rewards import Reward, Verifier, answer_reward, perceiver_reward, reasoner_reward
from p2r_jax.rl.run_log import RunLog
from p2r_jax.rl.step import (
    AnchorBatch,
    Layout,
    TrainingBatch,
    TrainState,
    cast,
    layout_of,
    make_optimizer,
    make_schedule,
    new_state,
    reference_log_probs,
    train_step,
)
from p2r_jax.roles.boxes import ParsedBoxes, parse_response
from p2r_jax.roles.pipeline import Pipeline, Rollout
from p2r_jax.roles.requests import ImageStore, Request
from p2r_jax.rollout.engine import Sampling


@dataclasses.dataclass
class Experience:
    """What one step collected, before the update. B questions, G completions each."""

    rollout: Rollout
    rewards: list[list[Reward]]
    partner_texts: list[list[str]]
    """What the frozen partner wrote: per completion (perceiver phase) or per question."""
    boxes: list[list[ParsedBoxes]]
    """Boxes that the answers were given with."""
    idle_requests: list[Request]
    """Prompts of the idle role in this step, with the snapshot's greedy outputs, for the anchor."""
    idle_texts: list[str]


class Trainer:
    """Owns the run: weights, data, schedule, checkpoints, logs."""

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Pipeline,
        params: nnx.State,
        train_source: Any,
        validation_source: Any,
        console: Console,
        verifier: Verifier | None = None,
    ):
        """params: float32 weights, placed on the mesh of `pipeline`."""
        self.config, self.pipeline, self.console = config, pipeline, console
        self.train_source, self.validation_source = train_source, validation_source
        self.verifier = verifier
        self.run_folder = Path(config.run)
        self.mesh = pipeline.builder.mesh
        self.dtype = jnp.dtype(config.model.compute_dtype)
        self.checkpoints = Checkpoints(self.run_folder, config.checkpoint)
        self.initial = params
        self.stages: dict[str, float] = collections.defaultdict(float)
        self.summaries: dict[str, dict[str, Any]] = {}
        self._state_layout: Layout = ()
        layout = self._layout(params)
        self._to_rollout = jax.jit(lambda p: cast(p, self.dtype), out_shardings=layout)
        self._to_snapshot = jax.jit(lambda p: cast(p, self.dtype))

    def _layout(self, params: nnx.State) -> Any:
        """Shardings for decoding: not split over fsdp, so that no step gathers weights."""
        if self.mesh is None:
            return None
        return jax.tree.map(
            lambda v: v.get_value(),
            parameter_shardings(params, self.mesh, fsdp=False),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    # --- the method --------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train through all phases (or the rest of them); returns the summary."""
        started = time.perf_counter()
        position = self.checkpoints.latest() or Position()
        log = RunLog(self.run_folder, self.config.log, position.step)
        resumed = position.step > 0
        state, snapshot = self._start_phase(self.initial, min(position.phase, self._last_phase))
        if resumed:
            state, snapshot = self.checkpoints.restore(position, state, snapshot)
            self.console.print(f"resuming at step {position.step} of {self._total_steps}")
        self._load_evaluations(position)
        if "before" not in self.summaries:
            self._evaluate(state.params, "before", log, position.step)

        batches: Iterator[list[LoadedRow]] | None = None
        with self._progress_bar() as bar:
            task = bar.add_task("training", total=self._total_steps, completed=position.step)
            while position.phase < len(self.config.phases):
                phase = self.config.phases[position.phase]
                if position.phase_step == 0 and not (resumed and snapshot is None):
                    state, snapshot = self._start_phase(state.params, position.phase)
                partner = self._to_rollout(snapshot)
                batches = training_batches(
                    self.train_source, phase.prompts, self._data_seed(position), position.phase_step
                )
                while position.phase_step < phase.steps:
                    state, metrics = self._step(
                        phase, position, state, snapshot, partner, next(batches), log
                    )
                    position = dataclasses.replace(
                        position, phase_step=position.phase_step + 1, step=position.step + 1
                    )
                    where = {
                        "phase": phase.role,
                        "round": position.phase,
                        "phase_step": position.phase_step,
                    }
                    if self._evaluation_due(position):
                        metrics |= self._short_evaluation(state.params)
                    log.metrics(position.step, where, metrics)
                    bar.update(
                        task,
                        completed=position.step,
                        description=f"{phase.role} reward {metrics['reward/mean']:.2f}",
                    )
                    if self.checkpoints.due(position.step):
                        self.checkpoints.save(position, state, snapshot)
                if self._phase_name(position) not in self.summaries:
                    self._evaluate(state.params, self._phase_name(position), log, position.step)
                position = Position(position.phase + 1, 0, position.step)
        self.checkpoints.close()
        if self.config.export and is_main():
            self._export(state.params)
        log.close()
        return self._write_summary(time.perf_counter() - started)

    def _start_phase(self, params: nnx.State, phase: int) -> tuple[TrainState, nnx.State]:
        """Phase-start snapshot (partner and KL reference) and a fresh optimizer."""
        optimizer = make_optimizer(self.config.optimizer, self.config.phases[phase].steps)
        state = new_state(params, optimizer)
        # Taken once: later states lie the same but describe it in other words, and the layout is
        # a static argument of the compiled step.
        self._state_layout = self._state_layout or layout_of(state)
        return state, self._to_snapshot(params)

    def _step(
        self,
        phase: PhaseConfig,
        position: Position,
        state: TrainState,
        snapshot: nnx.State,
        partner: nnx.State,
        rows: list[LoadedRow],
        log: RunLog,
    ) -> tuple[TrainState, dict[str, float]]:
        """Collect experience and make one update."""
        clock = _Clock(self.stages)
        with clock("upload"):
            builder = self.pipeline.builder
            images = ImageStore.upload([r.image for r in rows], builder.buckets, builder.mesh)
            policy = self._to_rollout(state.params)
        seeds = _fold(self.config.seed, position.step, len(rows))
        collect = {
            "perceiver": self._perceiver_experience,
            "reasoner": self._reasoner_experience,
            "baseline": self._baseline_experience,
        }[phase.role]
        experience = collect(phase, rows, images, policy, partner, seeds, clock)
        batch, values = self._training_batch(phase, experience)
        with clock("update"):
            anchor = self._anchor_batch(phase, experience, images)
            allowed = self.pipeline.vocabulary.allowed
            reference = None
            if self.config.loss.kl_weight:
                reference = reference_log_probs(
                    self.pipeline.graph, snapshot, batch, allowed, phase.temperature
                )
            state, scalars = train_step(
                state,
                batch,
                reference,
                anchor,
                allowed,
                graph=self.pipeline.graph,
                optimizer=self._optimizer(phase.steps),
                loss=self.config.loss,
                temperature=phase.temperature,
                horizon=phase.max_new_tokens,
                microbatches=phase.prompts // phase.microbatch if phase.microbatch else 1,
                freeze_vision=self.config.optimizer.freeze_vision,
                anchor_weight=phase.anchor_weight,
                remat=self.config.model.remat,
                dtype=self.dtype,
                layout=self._state_layout,
            )
            scalars = {name: float(value) for name, value in to_host(scalars).items()}
        self._stop_if_broken(int(state.skipped))
        values |= scalars
        values["lr"] = float(make_schedule(self.config.optimizer, phase.steps)(position.phase_step))
        values["skipped_steps"] = int(state.skipped)
        values |= {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
        values["time/step"] = sum(clock.seconds.values())
        if position.step % self.config.log.samples_every == 0:
            self._log_samples(phase, position, rows, experience, values, log)
        return state, values

    # --- experience of each role --------------------------------------------------------------

    def _perceiver_experience(
        self,
        phase: PhaseConfig,
        rows: list[LoadedRow],
        images: ImageStore,
        policy: nnx.State,
        partner: nnx.State,
        seeds: np.ndarray,
        clock: _Clock,
    ) -> Experience:
        """The policy samples box lists; the frozen reasoner answers once for each."""
        pipeline = self.pipeline
        questions = _questions(rows)
        with clock("rollout"):
            requests = [pipeline.builder.plain("perceiver", images, *q) for q in questions]
            rollout = pipeline.sample(policy, requests, images, _sampling(phase), seeds)
        parsed = [[parse_response(text) for text in texts] for texts in rollout.texts]
        with clock("partner"):
            asked = [
                pipeline.builder.reasoner(images, *question, p.boxes)
                for question, group in zip(questions, parsed, strict=True)
                for p in group
            ]
            answers = pipeline.complete(partner, asked, images, phase.partner_max_new_tokens)
        with clock("reward"):
            grouped = _group(answers, phase.group)
            rewards = [
                [
                    perceiver_reward(p, self._grade(row, answer))
                    for p, answer in zip(group, texts, strict=True)
                ]
                for row, group, texts in zip(rows, parsed, grouped, strict=True)
            ]
        return Experience(rollout, rewards, grouped, parsed, asked, answers)

    def _reasoner_experience(
        self,
        phase: PhaseConfig,
        rows: list[LoadedRow],
        images: ImageStore,
        policy: nnx.State,
        partner: nnx.State,
        seeds: np.ndarray,
        clock: _Clock,
    ) -> Experience:
        """The frozen perceiver boxes once a question; the policy samples answers."""
        pipeline = self.pipeline
        questions = _questions(rows)
        with clock("partner"):
            idle = [pipeline.builder.plain("perceiver", images, *q) for q in questions]
            texts = pipeline.complete(partner, idle, images, phase.partner_max_new_tokens)
        parsed = [parse_response(text) for text in texts]
        with clock("rollout"):
            requests = [
                pipeline.builder.reasoner(images, *question, p.boxes)
                for question, p in zip(questions, parsed, strict=True)
            ]
            rollout = pipeline.sample(policy, requests, images, _sampling(phase), seeds)
        with clock("reward"):
            rewards = self._answer_rewards(rows, rollout)
        return Experience(
            rollout,
            rewards,
            [[text] for text in texts],
            [[p] * phase.group for p in parsed],
            idle,
            texts,
        )

    def _baseline_experience(
        self,
        phase: PhaseConfig,
        rows: list[LoadedRow],
        images: ImageStore,
        policy: nnx.State,
        partner: nnx.State,
        seeds: np.ndarray,
        clock: _Clock,
    ) -> Experience:
        """Single-stage control: the plain image and the reasoning prompt."""
        with clock("rollout"):
            requests = [
                self.pipeline.builder.plain("baseline", images, *q) for q in _questions(rows)
            ]
            rollout = self.pipeline.sample(policy, requests, images, _sampling(phase), seeds)
        with clock("reward"):
            rewards = self._answer_rewards(rows, rollout)
        nothing = [[ParsedBoxes((), True)] * phase.group for _ in rows]
        return Experience(rollout, rewards, [[] for _ in rows], nothing, [], [])

    def _answer_rewards(self, rows: list[LoadedRow], rollout: Rollout) -> list[list[Reward]]:
        return [
            [reasoner_reward(text, self._grade(row, text)) for text in texts]
            for row, texts in zip(rows, rollout.texts, strict=True)
        ]

    def _grade(self, loaded: LoadedRow, answer: str) -> float | None:
        row = loaded.row
        return answer_reward(
            answer, row.answer, row.answer_form, self.verifier, question=row.question_with_options
        )

    # --- from experience to an update ------------------------------------------------------

    def _training_batch(
        self, phase: PhaseConfig, experience: Experience
    ) -> tuple[TrainingBatch, dict[str, float]]:
        """Advantages and masks; dropped samples and filling rows are masked out and counted."""
        rewards = experience.rewards
        values, valid, advantages = self._advantages(rewards)
        dropped = 1.0 - valid.mean()
        if dropped > self.config.loss.max_dropped_fraction:
            raise RuntimeError(
                f"{dropped:.0%} of the samples could not be graded (limit "
                f"loss.max_dropped_fraction = {self.config.loss.max_dropped_fraction:.0%}): "
                "check the verifier and the answers of the data"
            )
        completions = experience.rollout.completions
        rows = completions.tokens.shape[0]
        fill = ((0, rows - len(values)), (0, 0))
        where = batch_sharding(self.mesh) if self.mesh is not None else None
        keep = jax.device_put(np.pad(valid, fill), where)
        batch = TrainingBatch(
            experience.rollout.prompts,
            completions.tokens,
            completions.mask & keep[:, :, None],
            completions.log_probs,
            jax.device_put(np.pad(advantages, fill), where),
        )
        metrics = _reward_metrics(experience, values, valid)
        mask, stopped = to_host((completions.mask, completions.stopped))
        lengths = mask[: len(values)].sum(-1)
        metrics |= {
            "reward/dropped_fraction": float(dropped),
            "completion/length_mean": float(lengths.mean()),
            "completion/length_min": float(lengths.min()),
            "completion/length_max": float(lengths.max()),
            "completion/truncated_fraction": float(1 - stopped[: len(values)].mean()),
        }
        return batch, metrics

    def _advantages(self, rewards: list[list[Reward]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values (0 where there is none), whether there is one, and advantages; [B, G] each."""
        values = np.array([[r.value if r.value is not None else 0.0 for r in g] for g in rewards])
        valid = np.array([[r.value is not None for r in group] for group in rewards])
        advantages = group_advantages(values, self.config.loss.normalize_by_std, valid=valid)
        return values, valid, np.asarray(advantages)

    def _anchor_batch(
        self, phase: PhaseConfig, experience: Experience, images: ImageStore
    ) -> AnchorBatch | None:
        """A few of the idle role's prompts of this very step, with the snapshot's greedy text."""
        if not phase.anchor_weight or not experience.idle_requests:
            return None
        pipeline = self.pipeline
        # The idle reasoner has G prompts a question: take one of each.
        stride = max(1, len(experience.idle_requests) // phase.anchor_prompts)
        requests = experience.idle_requests[::stride][: phase.anchor_prompts]
        texts = experience.idle_texts[::stride][: phase.anchor_prompts]
        stop = pipeline.builder.processor.stop_ids[0]
        encode = pipeline.builder.processor.tokenizer.encode
        rows = [[*encode(text, add_special_tokens=False), stop] for text in texts]
        prompts = pipeline.builder.collate(requests, images)
        shape = (prompts.tokens.shape[0], 1, _round_up(max(map(len, rows)), 16))
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, row in enumerate(rows):
            tokens[i, 0, : len(row)] = row
            mask[i, 0, : len(row)] = True
        where = batch_sharding(self.mesh) if self.mesh is not None else None
        return AnchorBatch(prompts, jax.device_put(tokens, where), jax.device_put(mask, where))

    def _optimizer(self, steps: int) -> Any:
        # One object per phase length: it is a static argument of the compiled step.
        if getattr(self, "_made", (None,))[0] != steps:
            self._made = (steps, make_optimizer(self.config.optimizer, steps))
        return self._made[1]

    def _stop_if_broken(self, skipped: int) -> None:
        if skipped > self.config.optimizer.max_skipped:
            raise RuntimeError(
                f"{skipped} steps of this phase had a non-finite gradient (limit "
                "optimizer.max_skipped): lower optimizer.learning_rate or use compute_dtype float32"
            )

    # --- looking at the run ----------------------------------------------------------------

    def _evaluation_due(self, position: Position) -> bool:
        every = self.config.eval.every
        last = position.phase_step == self.config.phases[position.phase].steps
        return bool(every) and position.phase_step % every == 0 and not last

    def _limits(self) -> TokenLimits:
        caps: dict[str, int] = {}
        for phase in self.config.phases:
            caps[phase.role] = max(caps.get(phase.role, 0), phase.max_new_tokens)
            idle = {"perceiver": "reasoner", "reasoner": "perceiver"}.get(phase.role)
            if idle:
                caps[idle] = max(caps.get(idle, 0), phase.partner_max_new_tokens)
        reasoner = max(caps.get("reasoner", 0), caps.get("baseline", 0))
        return TokenLimits(caps.get("perceiver", 256), reasoner, 16)

    def _short_evaluation(self, params: nnx.State) -> dict[str, float]:
        """Greedy accuracy of the live weights in both roles, as flat metrics."""
        settings = self.config.eval
        records = evaluate(
            self.pipeline,
            self._to_rollout(params),
            evaluation_batches(self.validation_source, settings.batch, settings.questions),
            settings.modes,
            self._limits(),
            total=settings.questions,
        )
        return _flat_summary(records)

    def _evaluate(self, params: nnx.State, name: str, log: RunLog, step: int) -> None:
        """A full evaluation: records, pictures and summary under RUN/eval."""
        settings, begin = self.config.eval, time.perf_counter()
        if not settings.final_questions:
            return
        writer = EvalWriter(self.run_folder, name, pictures=40)
        records = evaluate(
            self.pipeline,
            self._to_rollout(params),
            evaluation_batches(self.validation_source, settings.batch, settings.final_questions),
            settings.final_modes if name in ("before", "after") else settings.modes,
            self._limits(),
            total=settings.final_questions,
            on_record=writer,
            description=f"evaluating {name}",
        )
        # In this order: a row without its summary is dropped on resume and written again.
        log.metrics(step, {"phase": "eval", "name": name}, _flat_summary(records))
        self.summaries[name] = writer.finish(records)["modes"]
        self.stages[f"evaluate {name}"] += time.perf_counter() - begin

    def _load_evaluations(self, position: Position) -> None:
        """After a resume, the evaluations that are already done, up to where it resumes."""
        steps = [0, *(phase.steps for phase in self.config.phases)]
        names = ("before", *map(self._name_of_phase, range(len(self.config.phases))))
        for name, step in zip(names, itertools.accumulate(steps), strict=True):
            file = self.run_folder / "eval" / f"{name}.json"
            if step <= position.step and file.is_file():
                self.summaries[name] = json.loads(file.read_text())["modes"]

    def _name_of_phase(self, phase: int) -> str:
        if phase == self._last_phase:
            return "after"
        return f"after_phase{phase + 1}_{self.config.phases[phase].role}"

    def _phase_name(self, position: Position) -> str:
        return self._name_of_phase(position.phase)

    def _log_samples(
        self,
        phase: PhaseConfig,
        position: Position,
        rows: list[LoadedRow],
        experience: Experience,
        metrics: dict[str, float],
        log: RunLog,
    ) -> None:
        count = min(self.config.log.sample_prompts, len(rows))
        _, _, advantages = self._advantages(experience.rewards)
        samples = []
        for b in range(count):
            row = rows[b].row
            for g, text in enumerate(experience.rollout.texts[b]):
                partner = experience.partner_texts[b]
                parsed, reward = experience.boxes[b][g], experience.rewards[b][g]
                samples.append(
                    {
                        "step": position.step + 1,
                        "phase": phase.role,
                        "role": phase.role,
                        "id": row.id,
                        "question": row.question_with_options,
                        "answer": row.answer,
                        "completion": text,
                        "reward": reward.value,
                        "reward_parts": reward.parts,
                        "advantage": float(advantages[b, g]),
                        "partner_completion": (
                            partner[g if len(partner) > 1 else 0] if partner else ""
                        ),
                        "boxes": [list(box.bbox_2d) for box in parsed.boxes],
                        "labelled_boxes": [
                            {"bbox_2d": list(box.bbox_2d), "label": box.label}
                            for box in parsed.boxes
                        ],
                        "true_boxes": [list(box) for box in row.boxes],
                    }
                )
        log.samples(position.step + 1, samples, {r.row.id: r for r in rows[:count]})

    def _export(self, params: nnx.State) -> None:
        begin = time.perf_counter()
        folder = self.run_folder / "export"
        if folder.exists():
            shutil.rmtree(folder)
        model = nnx.merge(self.pipeline.graph, params)
        save_pretrained(model, folder, files_from=model.name_or_path, dtype=self.dtype)
        self.stages["export"] += time.perf_counter() - begin

    def _write_summary(self, seconds: float) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for name, modes in self.summaries.items():
            headline = modes.get("p2r") or next(iter(modes.values()))
            summary[name] = {k: v for k, v in headline.items() if k != "by_category"}
            summary[name]["modes"] = modes
        summary["stages"] = {k: round(v, 1) for k, v in self.stages.items()}
        summary["wall_seconds"] = round(seconds, 1)
        if is_main():
            (self.run_folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    @property
    def _last_phase(self) -> int:
        return len(self.config.phases) - 1

    @property
    def _total_steps(self) -> int:
        return sum(phase.steps for phase in self.config.phases)

    def _data_seed(self, position: Position) -> int:
        return self.config.seed * 1000 + position.phase

    def _progress_bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )


class _Clock:
    """Wall seconds by stage of one step, added up over the run in `totals`."""

    def __init__(self, totals: dict[str, float]):
        self.totals = totals
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin
        self.totals[name] += time.perf_counter() - begin


def _questions(rows: list[LoadedRow]) -> list[tuple[int, str, str]]:
    return [(i, r.row.question_with_options, r.row.answer_form) for i, r in enumerate(rows)]


def _sampling(phase: PhaseConfig) -> Sampling:
    return Sampling(phase.max_new_tokens, phase.group, phase.temperature)


def _group(values: list[str], size: int) -> list[list[str]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _fold(seed: int, step: int, count: int) -> np.ndarray:
    """One 32-bit seed per prompt of a step."""
    return np.random.SeedSequence([seed, step]).generate_state(count)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flat_summary(records: list[dict[str, Any]]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for mode, summary in summarize_modes("", records)["modes"].items():
        for name in ("accuracy", "low", "high", "hit_rate", "mean_iou", "mean_area"):
            if summary.get(name) is not None:
                flat[f"eval/{mode}/{name}"] = summary[name]
    return flat


def _reward_metrics(
    experience: Experience, values: np.ndarray, valid: np.ndarray
) -> dict[str, float]:
    graded = values[valid]
    metrics = {
        "reward/mean": float(graded.mean()),
        "reward/std": float(graded.std()),
        "reward/zero_variance_groups": float(np.mean(zero_variance_groups(values, valid))),
    }
    parts: dict[str, list[float]] = collections.defaultdict(list)
    for group in experience.rewards:
        for reward in group:
            for name, value in reward.parts.items():
                parts[name].append(value)
    metrics |= {f"reward/{name}": float(np.mean(v)) for name, v in parts.items()}
    areas = [
        (b.bbox_2d[2] - b.bbox_2d[0]) * (b.bbox_2d[3] - b.bbox_2d[1]) / 1e6
        for group in experience.boxes
        for parsed in group
        for b in parsed.boxes
    ]
    if areas:
        metrics["boxes/mean_area"] = float(np.mean(areas))
    return metrics
