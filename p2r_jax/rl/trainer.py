"""PRA-GRPO: one role learns at a time, from final-answer correctness alone (P2R §1).

    for each phase:
        snapshot = policy                      # frozen partner and KL reference
        for each step:
            rows       = next batch
            experience = the learning role samples, the frozen partner plays the other role
            rewards -> group advantages -> one update (or several)

`Trainer.run` reads top to bottom like that. Everything random follows from (seed, step), so a run
that is killed and resumed goes on as if it had not been.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.data.loader import LoadedRow, Unreadable, training_batches
from p2r_jax.evals.verdicts import phase_verdicts, spans_of
from p2r_jax.parallel.compilations import Compilations
from p2r_jax.parallel.mesh import for_decoding
from p2r_jax.parallel.multihost import gather, is_main
from p2r_jax.paths import as_path
from p2r_jax.qwen3_vl.hf import save_pretrained
from p2r_jax.rl.batches import advantages_of
from p2r_jax.rl.best import Best, Score
from p2r_jax.rl.checkpointing import Checkpoints, abstract
from p2r_jax.rl.evaluations import Evaluations
from p2r_jax.rl.experience import (
    Clock,
    Experience,
    Step,
    choose,
    collect,
    sample_records,
    teaches,
)
from p2r_jax.rl.model_card import Exported
from p2r_jax.rl.run_log import RunLog
from p2r_jax.rl.schedule import Phase, Progress, plan_phases
from p2r_jax.rl.step import (
    TrainState,
    cast,
    layout_of,
    new_state,
    with_state,
)
from p2r_jax.rl.stop import Interrupted, Preempted, RunStopped, StopRequests
from p2r_jax.rl.updates import Collected, Updates
from p2r_jax.rl.watch import Watch
from p2r_jax.rl.work import work_metrics
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import ImageStore, share_of
from p2r_jax.roles.pipeline import Pipeline
from p2r_jax.roles.verifiers import ModelVerifier
from p2r_jax.rollout.generate import Schedule


@dataclasses.dataclass
class Live:
    """What changes while a run goes on, and what its checkpoints hold."""

    progress: Progress
    state: TrainState
    snapshot: nnx.State
    """Weights of the phase's start: frozen partner and KL reference."""
    pending: dict[str, float] | None = None
    """Metrics of the last step, until they are logged."""


class Trainer:
    """Owns the run: weights, data, schedule, checkpoints, logs."""

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Pipeline,
        load: Callable[[], nnx.State],
        like: nnx.State,
        train_source: Any,
        validation_source: Any,
        console: Console,
        grader: Grader,
        stops: StopRequests | None = None,
    ):
        """load: reads the weights that the run starts from, in `model.param_dtype`, on the mesh of
        `pipeline`. like: their shapes and shardings; a run that is resumed reads only these."""
        self.config, self.pipeline, self.console = config, pipeline, console
        self.load, self.like = load, like
        self.train_source = train_source
        self.grader = grader
        self.phases = plan_phases(config, len(train_source))
        self.best = Best(config, self.phases)
        self.run_folder = as_path(config.run)
        self.mesh = pipeline.builder.mesh
        self.dtype = jnp.dtype(config.model.compute_dtype)
        self.updates = Updates(config, self.phases, pipeline)
        self.stops = stops or StopRequests()
        self.evaluations = Evaluations(
            config, self.phases, pipeline, validation_source, grader, self.stops.check
        )
        limit = config.data.max_bad_fraction * len(train_source)
        listing = self.run_folder / "bad_rows" / "train" / "images.jsonl"
        self.unreadable = Unreadable(limit, listing if is_main() else None)
        self.live: Live
        self.checkpoints: Checkpoints
        self.watch: Watch
        self._reference: nnx.State | None = None
        self._between: dict[str, float] = {}
        self._exported: Exported | None = None
        layout = for_decoding(like, self.mesh)
        rollout = jnp.dtype(config.model.rollout_dtype or config.model.compute_dtype)
        self._to_rollout = jax.jit(lambda p: cast(p, rollout), out_shardings=layout)
        own = jax.tree.map(lambda x: x.sharding, like) if self.mesh is not None else None
        self._to_snapshot = jax.jit(lambda p: cast(p, self.dtype), out_shardings=own)

    # --- the method --------------------------------------------------------------------------

    def prepare(self) -> None:
        """Weights on the devices: of the newest checkpoint, or those that the run starts from."""
        settings = dataclasses.asdict(self.config)
        self.checkpoints = Checkpoints(
            self.run_folder,
            self.config.checkpoint,
            settings,
            self.console.print,
            self._data(),
            self.best,
        )
        like, snapshot = self._state_like()
        self._like = like
        self.updates.layout = layout_of(like)
        found = self.checkpoints.restore(like, snapshot)
        if found is None:
            params = self.load()
            state = new_state(params, self.updates.optimizer(self.phases[0]))
            self.live = Live(Progress(), state, self._to_snapshot(params))
        else:
            self.live = Live(*found)
            step = self.live.progress.step
            self.console.print(f"resuming at step {step} of {self.total_steps}")
        if self.config.loss.reference == "start" and self.config.loss.kl_weight:
            self._reference = self._to_snapshot(self.load())
        if isinstance(self.grader.verifier, ModelVerifier):
            self._partner()
            self.grader.verifier.check()

    def _data(self) -> dict[str, Any]:
        """What a resumed run must find unchanged: with other rows it would be another run."""
        rows = len(self.train_source)
        some = [self.train_source[i].id for i in range(0, rows, max(1, rows // 256))]
        return {
            "rows of data.train": rows,
            "ids of some rows": zlib.crc32("\n".join(some).encode()),
            "steps of each phase": [phase.steps for phase in self.phases],
        }

    def run(self) -> dict[str, Any]:
        """Train through all phases (or the rest of them); returns the summary.

        Raises Preempted after saving if the process is asked to end, RunStopped if going on makes
        no sense.
        """
        try:
            return self._run()
        except Interrupted as request:
            self._save()
            self.checkpoints.close()
            raise Preempted(
                f"{request}: the run is saved at step {self.live.progress.step} of "
                f"{self.total_steps}; the same command goes on from there"
            ) from request
        except RunStopped:
            # A checkpoint may be on its way, and what stopped the run may be that it failed.
            with contextlib.suppress(RunStopped):
                self.checkpoints.wait()
            raise

    def _run(self) -> dict[str, Any]:
        self.stops.check()
        live = self.live
        # A pending row is written again, even if a run that was killed has written it before.
        written = live.progress.step - (live.pending is not None)
        log = RunLog(self.run_folder, self.config.log, written)
        self.watch = Watch(self.run_folder, self.config.health, written, self._warn)
        self.evaluations.load(self._phases_done())
        self._evaluate("before", log)
        with self._progress_bar() as bar:
            task = bar.add_task("training", total=self.total_steps, completed=live.progress.step)
            while live.progress.phase < len(self.phases):
                phase = self.phases[live.progress.phase]
                if live.progress.phase_step == 0 and phase.number > 0:
                    self._start_phase(phase, log)
                if live.pending is not None:  # Saved in the middle of an evaluation.
                    self._after_step(phase, log)
                one_stream = self.config.data.order == "run"
                batches = training_batches(
                    self.train_source,
                    phase.config.prompts,
                    self.config.seed * 1000 + (0 if one_stream else phase.number),
                    live.progress.batch,
                    self.unreadable,
                    share_of(self.mesh),
                    first_row=live.progress.rows if one_stream else None,
                )
                while not live.progress.is_over(phase):
                    metrics, used = self._step(phase, batches, log)
                    live.progress = live.progress.after_step(
                        used, _tokens(metrics), used * phase.config.prompts
                    )
                    live.pending = metrics | {"tokens/seen": live.progress.tokens}
                    self._after_step(phase, log)
                    shown = f"round {phase.round + 1} {phase.role}"
                    reward = f"{shown}, reward {metrics['reward/mean']:.2f}"
                    done, total = live.progress.step, self.total_steps
                    bar.update(task, completed=done, total=total, description=reward)
                self.best.ended(live.progress.step)
                self._evaluate(self.evaluations.name_after(phase), log)
                live.progress = live.progress.next_phase()
        self.checkpoints.close()
        if self.config.export != "none":
            self._export(log)
        log.close()
        return self._write_summary(log)

    def _start_phase(self, phase: Phase, log: RunLog) -> None:
        """The policy becomes snapshot; the optimizer starts anew if it is set to."""
        live = self.live
        source = live.progress.step
        if phase.config.start == "best":
            best = self._take_best(phase.number - 1, not self.config.optimizer.reset)
            source = source if best is None else best.step
            why = "nothing tells which is best" if best is None else f"{self.best.metric} {best}"
            self._say(
                f"phase {phase.number + 1} ({phase.role}) starts with the weights of step {source}"
                f", the best of phase {phase.number}: {why}"
            )
        self.best.started(phase.number, source)
        params, kept = live.state.params, live.state.opt_state
        # The old snapshot and moments go before the new ones come: there may be no room for both.
        live.snapshot = params
        if self.config.optimizer.reset:
            kept, live.state = None, with_state(params, ())
            live.state = new_state(params, self.updates.optimizer(phase))
        else:
            live.state = with_state(params, kept)
        live.snapshot = self._to_snapshot(params)
        if source != live.progress.step:  # Else the end of the phase before has told.
            self._evaluate(self.evaluations.name_at_start(phase), log, source)

    def _take_best(self, phase: int | None, optimizer: bool) -> Score | None:
        """Make the best weights of a phase (None: of the run) that can be had the live ones; None
        leaves those that are, as no evaluation tells. optimizer: its state comes along."""
        live, now = self.live, self.live.progress.step
        candidates = self.best.ranked(phase)
        if not candidates or candidates[0].step == now:
            return candidates[0] if candidates else None
        self.checkpoints.wait()
        # The live ones go first: there may be no room for both.
        live.state = live.snapshot = None  # type: ignore[assignment]
        there, found = self.checkpoints.steps(), None
        for score in candidates:
            if score.step == 0:
                params, first = self.load(), self.updates.optimizer(self.phases[0])
                found = new_state(params, first) if optimizer else with_state(params, ())
            elif score.step in there:
                found = self.checkpoints.weights(score.step, self._like, optimizer)
            if found is not None:
                live.state = found
                return score
            self._say(f"the weights of step {score.step}, {self.best.metric} {score}, are gone")
            self.best.drop(score.step)
        if (found := self.checkpoints.weights(now, self._like, optimizer)) is None:
            raise RunStopped(f"no checkpoint in {self.checkpoints.folder} can be read any more")
        live.state = found
        return None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _step(
        self, phase: Phase, batches: Iterator[list[LoadedRow]], log: RunLog
    ) -> tuple[dict[str, float], int]:
        """Collect experience and update. Returns metrics and the number of batches it took."""
        self.stops.check()
        self.checkpoints.check()
        begin, clock, compiled = time.perf_counter(), Clock(), Compilations()
        collected, used = self._collect(phase, batches, clock)
        self.stops.check()
        live = self.live
        reference = live.snapshot if self._reference is None else self._reference
        live.state, metrics = self.updates.run(phase, live.state, reference, collected, clock)
        number = self.live.progress.step + 1
        if (number - 1) % self.config.log.samples_every == 0:
            with clock("samples"):
                self._log_samples(phase, collected, number, log)
        metrics |= {f"verifier/{name}": count for name, count in self.grader.counts().items()}
        for one in collected:
            name = f"{one.role.role}/" if len(collected) > 1 else ""
            work = work_metrics(one, self.pipeline.builder, self.config)
            metrics |= {name + key: value for key, value in work.items()}
        metrics["data/batches"] = used
        metrics |= {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
        metrics["time/step"] = time.perf_counter() - begin
        metrics |= {"compile/count": compiled.count, "compile/seconds": compiled.seconds}
        compiled.close()
        return metrics, used

    def _collect(
        self, phase: Phase, batches: Iterator[list[LoadedRow]], clock: Clock
    ) -> tuple[list[Collected], int]:
        """Experience of each role that learns in this phase."""
        builder, own = self.pipeline.builder, phase.config
        with clock("weights"):
            policy = jax.block_until_ready(self._to_rollout(self.live.state.params))
            live = own.partner == "step"
            if not live or isinstance(self.grader.verifier, ModelVerifier):
                partner = self._partner()
            if live:
                partner = policy
        rollout = self.config.rollout
        rings = tuple(self.config.buckets.response_tokens)
        schedule = Schedule(rollout.slots, rollout.columns, rollout.refill, rings)

        def load() -> tuple[list[LoadedRow], ImageStore]:
            with clock("data"):
                rows = next(batches)
                self._must_agree(rows)
            with clock("upload"):
                return rows, ImageStore.of_rows(rows, builder.buckets, self.mesh)

        def experience(role: PhaseConfig, rows: list[LoadedRow], images: ImageStore, *use: int):
            entropy = [self.config.seed, self.live.progress.step, *(use if any(use) else ())]
            seeds = np.random.SeedSequence(entropy).generate_state(len(rows))
            step = Step(
                phase=role,
                reward=self.config.reward,
                pipeline=self.pipeline,
                policy=policy,
                partner=partner,
                rows=rows,
                images=images,
                seeds=seeds,
                schedule=schedule,
                grader=self.grader,
                clock=clock,
            )
            return collect(step)

        rows, images = load()
        collected, used = [], 1
        for number, role in enumerate(phase.learning):
            parts = [experience(role, rows, images, number, 0)]
            while used <= own.dynamic_sampling and _teaching(parts) < own.prompts:
                self.stops.check()
                parts.append(experience(role, *load(), number, used))
                used += 1
            sampled = [group for part in parts for group in part.rewards]
            if len(parts) > 1:
                with clock("encode"):
                    chosen, images = choose(parts, own.prompts, self.pipeline)
                parts = [chosen]
            collected.append(Collected(role, parts[0], images, sampled))
        return collected, used

    def _must_agree(self, rows: list[LoadedRow]) -> None:
        """Raise RunStopped unless all processes have the same rows before them."""
        seen = "\n".join(f"{r.row.id} {r.size}" for r in rows)
        if len(set(gather(np.asarray(zlib.crc32(seen.encode()))).tolist())) > 1:
            raise RunStopped(
                "the processes read different rows from data.train: let all of them see the same "
                "file, and start again from the last checkpoint"
            )

    def _partner(self) -> nnx.State:
        """The snapshot's weights, laid out for decoding; also those of a verifier in-process."""
        weights = jax.block_until_ready(self._to_rollout(self.live.snapshot))
        if isinstance(self.grader.verifier, ModelVerifier):
            self.grader.verifier.weights = weights
        return weights

    def _state_like(self) -> tuple[TrainState, Any]:
        """Shapes and shardings of state and snapshot."""
        zeros = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.like),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.like),
        )()
        like = abstract(new_state(zeros, self.updates.optimizer(self.phases[0])))
        snapshot = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype, sharding=x.sharding), self.like
        )
        return like, snapshot

    # --- what a run leaves behind ------------------------------------------------------------

    def _after_step(self, phase: Phase, log: RunLog) -> None:
        """Evaluation if one is due, the step's row, and then the checkpoint that vouches for it."""
        progress, metrics = self.live.progress, self.live.pending or {}
        if self.evaluations.due(phase, progress.phase_step):
            begin = time.perf_counter()
            policy = self._to_rollout(self.live.state.params)
            metrics |= self.evaluations.short(policy, self._partner())
            self._judged(progress.step)
            metrics["time/evaluation"] = time.perf_counter() - begin
        where = {"phase": phase.role, "round": phase.round + 1, "phase_number": phase.number + 1}
        where["phase_step"] = progress.phase_step
        acts = self.watch.after_step(progress.step, where, metrics)
        log.metrics(progress.step, where, metrics | self._between)
        self._between, self.live.pending = {}, None
        if acts and self.config.health.action == "stop_phase":
            self.live.progress = progress = progress.end_phase()
        due = self.checkpoints.due(progress.step) or self.best.wants(progress.step)
        if progress.is_over(phase) or due:
            begin = time.perf_counter()
            self._save()
            # The row of this step must be there before its checkpoint is: it goes into the next.
            self._between = {"time/save": time.perf_counter() - begin}
        if acts and self.config.health.action == "stop":
            self._save()
            self.watch.stop(progress.step)

    def _phases_done(self) -> int:
        """Phases without a step left, whether they are evaluated or not."""
        progress = self.live.progress
        own = self.phases[progress.phase : progress.phase + 1]
        return progress.phase + sum(progress.is_over(phase) for phase in own)

    def _warn(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _save(self) -> None:
        live = self.live
        if live.progress.step not in (0, self.checkpoints.saved):
            self.checkpoints.save(live.progress, live.state, live.snapshot, live.pending)

    def _evaluate(self, name: str, log: RunLog, weights: int | None = None) -> None:
        """A full evaluation, unless a run that was killed has made it already. weights: the step
        that they are of; None = the newest."""
        if name not in self.evaluations.summaries:
            policy = self._to_rollout(self.live.state.params)
            self.evaluations.full(name, policy, self._partner(), log, self.live.progress.step)
        else:
            self.evaluations.read_shared(name)
        newest = 0 if name == "before" else self.live.progress.step
        self._judged(newest if weights is None else weights)

    def _judged(self, step: int) -> None:
        """The last evaluation was of the weights of this step."""
        self.best.add(step, self.evaluations.shared)
        self.best.write(self.run_folder)

    def _log_samples(
        self, phase: Phase, collected: list[Collected], number: int, log: RunLog
    ) -> None:
        records: list[dict[str, Any]] = []
        rows: dict[str, LoadedRow] = {}
        for one in collected:
            experience, role = one.experience, one.role.role
            count = min(self.config.log.sample_prompts, len(experience.rows))
            _, _, advantages = advantages_of(experience.rewards, self.config.loss)
            processor = self.pipeline.builder.processor
            records += sample_records(
                role, experience, advantages, processor, count, step=number, phase=phase.role
            )
            rows |= {r.row.id: r for r in experience.rows[:count]}
        log.samples(number, records, rows)

    def _export(self, log: RunLog) -> None:
        begin = time.perf_counter()
        best = self._take_best(None, False) if self.config.export == "best" else None
        settings, last = dataclasses.asdict(self.config), self.live.progress.step
        self._exported = Exported.of(settings, self.best, last, best)
        self._say(str(self._exported))
        model = nnx.merge(self.pipeline.graph, self.live.state.params)
        save_pretrained(
            model,
            self.run_folder / "export",
            files_from=model.name_or_path,
            dtype=self.dtype,
            overwrite=True,
            progress=is_main(),
            readme=self._exported.card(self.run_folder / "export" / "README.md"),
        )
        self._between["time/export"] = time.perf_counter() - begin

    def _write_summary(self, log: RunLog) -> dict[str, Any]:
        """summary.json; {} on the processes that do not write, which need not know it."""
        if not is_main():
            return {}
        summary: dict[str, Any] = {}
        for name, modes in self.evaluations.summaries.items():
            headline = modes.get("p2r") or next(iter(modes.values()))
            summary[name] = {k: v for k, v in headline.items() if k != "by_category"}
            summary[name]["modes"] = modes
        roles = [phase.role for phase in self.config.phases]
        summary["phases"] = phase_verdicts(self.run_folder, spans_of(roles, self.config.rounds))
        summary["warnings"] = self.watch.monitor.count
        if self._exported is not None:
            summary["export"] = self._exported.summary()
        seconds = collections.defaultdict(float, log.seconds())
        for name, value in self._between.items():
            seconds[name.removeprefix("time/")] += value
        inside_steps = seconds.pop("step", 0.0)
        outside = sum(seconds[name] for name in ("evaluation", "save", "export"))
        summary["stages"] = {k: round(v, 1) for k, v in seconds.items()}
        summary["wall_seconds"] = round(inside_steps + outside, 1)
        (self.run_folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    @property
    def total_steps(self) -> int:
        """Of all phases; of one that ended early those that it took."""
        return self.live.progress.step + self.live.progress.ahead(self.phases)

    def _progress_bar(self) -> ProgressBar:
        return ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )


def _tokens(metrics: dict[str, float]) -> int:
    """Of the prompts and completions of a step, by whichever roles."""
    ends = ("tokens/prompts", "tokens/completions")
    return int(sum(value for name, value in metrics.items() if name.endswith(ends)))


def _teaching(parts: list[Experience]) -> int:
    """Groups whose rewards differ."""
    return sum(teaches(group) for part in parts for group in part.rewards)
