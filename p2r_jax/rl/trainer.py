"""PRA-GRPO: one role learns at a time, from final-answer correctness alone (P2R §1).

    for each phase:
        snapshot = policy                      # frozen partner and KL reference
        for each step:
            rows       = next batch
            experience = the learning role samples, the frozen partner plays the other role
            rewards -> group advantages -> one update

`Trainer.run` reads top to bottom like that. Everything random follows from (seed, step), so a run
that is killed and resumed goes on as if it had not been.
"""

from __future__ import annotations

import collections
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.data.loader import LoadedRow, training_batches
from p2r_jax.parallel.compilations import Compilations
from p2r_jax.parallel.mesh import for_decoding
from p2r_jax.parallel.multihost import is_main, to_host
from p2r_jax.qwen3_vl.hf import save_pretrained
from p2r_jax.rl.batches import advantages_of, anchor_batch, training_batch
from p2r_jax.rl.checkpointing import Checkpoints, Progress
from p2r_jax.rl.evaluations import Evaluations
from p2r_jax.rl.experience import Clock, Experience, Step, collect, grader, sample_records
from p2r_jax.rl.rewards import Verifier
from p2r_jax.rl.run_log import RunLog
from p2r_jax.rl.step import (
    Layout,
    TrainState,
    cast,
    layout_of,
    make_optimizer,
    make_schedule,
    new_state,
    reference_log_probs,
    train_step,
)
from p2r_jax.rl.stop import RunStopped
from p2r_jax.roles.pipeline import Pipeline
from p2r_jax.roles.requests import ImageStore
from p2r_jax.rollout.generate import Schedule


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
        self.grade = grader(verifier)
        self.run_folder = Path(config.run)
        self.mesh = pipeline.builder.mesh
        self.dtype = jnp.dtype(config.model.compute_dtype)
        self.checkpoints = Checkpoints(self.run_folder, config.checkpoint)
        self.evaluations = Evaluations(config, pipeline, validation_source, verifier)
        self.initial = params
        self.stages: dict[str, float] = collections.defaultdict(float)
        self._state_layout: Layout = ()
        layout = for_decoding(params, self.mesh)
        self._to_rollout = jax.jit(lambda p: cast(p, self.dtype), out_shardings=layout)
        self._to_snapshot = jax.jit(lambda p: cast(p, self.dtype))

    # --- the method --------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train through all phases (or the rest of them); returns the summary."""
        started = time.perf_counter()
        progress = self.checkpoints.latest() or Progress()
        log = RunLog(self.run_folder, self.config.log, progress.step)
        self.evaluations.load(progress.step)
        state, snapshot = self._start_phase(self.initial, progress.phase)
        if progress.step:
            state, snapshot = self.checkpoints.restore(progress, state, snapshot)
            self.console.print(f"resuming at step {progress.step} of {self._total_steps}")
        self._evaluate("before", state.params, log, progress.step)

        with self._progress_bar() as bar:
            task = bar.add_task("training", total=self._total_steps, completed=progress.step)
            while progress.phase < len(self.config.phases):
                phase = self.config.phases[progress.phase]
                if progress.phase_step == 0 and progress.phase > 0:
                    state, snapshot = self._start_phase(state.params, progress.phase)
                partner = self._to_rollout(snapshot)
                batches = training_batches(
                    self.train_source, phase.prompts, self._data_seed(progress), progress.phase_step
                )
                while progress.phase_step < phase.steps:
                    state, metrics = self._step(
                        phase, progress, state, snapshot, partner, batches, log
                    )
                    progress = progress.after_step()
                    if self.evaluations.due(progress.phase, progress.phase_step):
                        metrics |= self.evaluations.short(self._to_rollout(state.params))
                    where = {"phase": phase.role, "round": progress.phase}
                    where["phase_step"] = progress.phase_step
                    log.metrics(progress.step, where, metrics)
                    reward = f"{phase.role} reward {metrics['reward/mean']:.2f}"
                    bar.update(task, completed=progress.step, description=reward)
                    last = progress.phase_step == phase.steps
                    if last or self.checkpoints.due(progress.step):
                        self.checkpoints.save(progress, state, snapshot)
                name = self.evaluations.name_after(progress.phase)
                self._evaluate(name, state.params, log, progress.step)
                progress = progress.next_phase()
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
        progress: Progress,
        state: TrainState,
        snapshot: nnx.State,
        partner: nnx.State,
        batches: Iterator[list[LoadedRow]],
        log: RunLog,
    ) -> tuple[TrainState, dict[str, float]]:
        """Collect experience from the next batch and make one update."""
        begin, clock, compiled = time.perf_counter(), Clock(self.stages), Compilations()
        builder = self.pipeline.builder
        with clock("data"):
            rows = next(batches)
        with clock("upload"):
            images = ImageStore.upload([r.image for r in rows], builder.buckets, self.mesh)
            policy = self._to_rollout(state.params)
        seeds = np.random.SeedSequence([self.config.seed, progress.step]).generate_state(len(rows))
        lengths = tuple(self.config.buckets.response_tokens)
        rollout = self.config.rollout
        step = Step(
            phase=phase,
            pipeline=self.pipeline,
            policy=policy,
            partner=partner,
            rows=rows,
            images=images,
            seeds=seeds,
            schedule=Schedule(rollout.slots, rollout.columns, rollout.refill, lengths),
            grade=self.grade,
            clock=clock,
        )
        experience = collect(step)
        batch, metrics = training_batch(experience, self.config.loss, self.mesh, lengths)
        with clock("update"):
            anchor = anchor_batch(phase, experience, images, builder, lengths)
            allowed = self.pipeline.vocabulary.allowed
            parts = phase.prompts // phase.microbatch if phase.microbatch else 1
            reference = None
            if self.config.loss.kl_weight:
                reference = reference_log_probs(
                    self.pipeline.graph, snapshot, batch, allowed, phase.temperature, parts
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
                microbatches=parts,
                freeze_vision=self.config.optimizer.freeze_vision,
                role_anchor=phase.role_anchor,
                remat=self.config.model.remat,
                dtype=self.dtype,
                layout=self._state_layout,
            )
            metrics |= {name: float(value) for name, value in to_host(scalars).items()}
        self._stop_if_broken(int(state.skipped))
        metrics["lr"] = float(
            make_schedule(self.config.optimizer, phase.steps)(progress.phase_step)
        )
        metrics["skipped_steps"] = int(state.skipped)
        if progress.step % self.config.log.samples_every == 0:
            with clock("samples"):
                self._log_samples(step, experience, progress.step + 1, log)
        metrics |= {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
        metrics["time/step"] = time.perf_counter() - begin
        metrics |= {"compile/count": compiled.count, "compile/seconds": compiled.seconds}
        compiled.close()
        return state, metrics

    def _optimizer(self, steps: int) -> Any:
        # One object per phase length: it is a static argument of the compiled step.
        if getattr(self, "_made", (None,))[0] != steps:
            self._made = (steps, make_optimizer(self.config.optimizer, steps))
        return self._made[1]

    def _stop_if_broken(self, skipped: int) -> None:
        if skipped > self.config.optimizer.max_skipped:
            raise RunStopped(
                f"{skipped} steps of this phase had a non-finite gradient (limit "
                "optimizer.max_skipped): lower optimizer.learning_rate or use compute_dtype float32"
            )

    # --- what a run leaves behind ------------------------------------------------------------

    def _evaluate(self, name: str, params: nnx.State, log: RunLog, step: int) -> None:
        """A full evaluation, unless a run that was killed has made it already."""
        if name not in self.evaluations.summaries:
            self.evaluations.full(name, self._to_rollout(params), log, step)

    def _log_samples(self, step: Step, experience: Experience, number: int, log: RunLog) -> None:
        count = min(self.config.log.sample_prompts, len(step.rows))
        _, _, advantages = advantages_of(experience.rewards, self.config.loss)
        records = sample_records(step, experience, advantages, number, count)
        log.samples(number, records, {r.row.id: r for r in step.rows[:count]})

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
        for name, modes in self.evaluations.summaries.items():
            headline = modes.get("p2r") or next(iter(modes.values()))
            summary[name] = {k: v for k, v in headline.items() if k != "by_category"}
            summary[name]["modes"] = modes
        stages = {**self.evaluations.seconds, **self.stages}
        summary["stages"] = {k: round(v, 1) for k, v in stages.items()}
        summary["wall_seconds"] = round(seconds, 1)
        if is_main():
            (self.run_folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    @property
    def _total_steps(self) -> int:
        return sum(phase.steps for phase in self.config.phases)

    def _data_seed(self, progress: Progress) -> int:
        return self.config.seed * 1000 + progress.phase

    def _progress_bar(self) -> ProgressBar:
        return ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
