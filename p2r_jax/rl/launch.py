"""`p2r train`: from a config to a running `Trainer`, with every check that can fail done first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from p2r_jax.config import TrainConfig
from p2r_jax.data.sources import FileSource, SourceError, load_source
from p2r_jax.evals.modes import parse_modes
from p2r_jax.evals.report import write_report
from p2r_jax.evals.scoring import format_table, summary_rows
from p2r_jax.evals.verdicts import outcome, verdict_rows
from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.mesh import batch_shards, make_mesh, parameter_shardings
from p2r_jax.parallel.multihost import any_process, is_main
from p2r_jax.paths import as_path, write_whole
from p2r_jax.qwen3_vl.hf import abstract_model, load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.rl.best import metric_of
from p2r_jax.rl.experience import phase_sampling
from p2r_jax.rl.rewards import Verifier, require_verifier
from p2r_jax.rl.run_log import require_wandb
from p2r_jax.rl.stop import StopRequests
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.pipeline import Pipeline, default_prompt_set, greedy_schedule
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets
from p2r_jax.roles.verifiers import make_verifier

FREE_TO_CHANGE = ("run", "log", "checkpoint", "mesh", "distributed", "rollout", "export", "health")
"""Settings of how fast and on what, not of what: a run may go on with others. `health` too: a
person who has read why a run stopped may let it go on."""
FREE_PARTS = {
    # Paths differ between machines; checkpoints know what weights and rows they are of.
    "model": ("kernels", "path"),
    "data": ("train", "validation"),
    # Of memory alone; runs of earlier versions do not name them.
    "buckets": ("image_gib",),
    "eval": ("image_cache_gib",),
    "verifier": ("base_url", "api_key_variable", "timeout_seconds", "attempts", "concurrency"),
}


def build_trainer(
    config: TrainConfig,
    console: Console,
    verifier: Verifier | None = None,
    stops: StopRequests | None = None,
) -> Trainer:
    """Everything a run needs, but for the weights; `verifier` grades free text (default: what
    `config.verifier` says).

    Raises ValueError or FileNotFoundError naming the setting.
    """
    config.validate()
    parse_modes(config.eval.modes, partner=True)
    parse_modes(config.eval.final_modes)
    metric_of(config)
    require_wandb(config.log)
    folder = locate_checkpoint(config.model.path)
    buckets = Buckets.of(config.buckets)
    processor = Processor.from_pretrained(folder, config.model.min_pixels, config.model.max_pixels)
    prompts = load_prompt_set(config.model.prompts or default_prompt_set(processor.config))
    train_source = open_source(config.data.train, "train", config)
    validation_source = open_source(config.data.validation, "validation", config)
    for split, source in (("train", train_source), ("validation", validation_source)):
        if isinstance(source, FileSource) and source.bad:
            console.print(
                f"data.{split}: {source.bad} bad rows left out, {len(source)} used; listed in "
                f"{bad_rows_folder(config, split)}"
            )
    forms = train_source.answer_forms | validation_source.answer_forms
    judged = verifier is not None or config.verifier.kind != "none"
    require_verifier(forms - {"free_form"} if judged else forms, None)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_phases(config, mesh)

    model = abstract_model(processor.config, Kernels.choose(config.model.kernels, mesh))
    model.name_or_path = str(folder)
    graph, shapes = nnx.split(model, nnx.Param)
    dtype = config.model.param_dtype
    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where),
        shapes,
        parameter_shardings(shapes, mesh),
    )

    def load() -> nnx.State:
        model = load_pretrained(folder, mesh, dtype, config.model.kernels, progress=is_main())
        return nnx.state(model, nnx.Param)

    rollout, rings = config.rollout, tuple(config.buckets.response_tokens)
    greedy = greedy_schedule(rollout.greedy_slots, rings, rollout.refill)
    pipeline = Pipeline.create(graph, processor, prompts, buckets, mesh, greedy, model.kernels)
    if verifier is None and "free_form" in forms:
        verifier = _checked_verifier(config, pipeline)
    grader = Grader(verifier)
    return Trainer(
        config, pipeline, load, like, train_source, validation_source, console, grader, stops
    )


def _checked_verifier(config: TrainConfig, pipeline: Pipeline) -> Verifier | None:
    made, error = make_verifier(config.verifier, pipeline), None
    if made is not None and is_main():
        try:
            made.check()
        except ValueError as problem:
            error = problem
    if any_process(error is not None):
        raise error or ValueError("process 0 cannot use the verifier: see its output")
    return made


def check_phases(config: TrainConfig, mesh: Mesh) -> None:
    shards = batch_shards(mesh)
    for i, phase in enumerate(config.phases):
        try:
            phase_sampling(phase)
        except ValueError as error:
            raise ValueError(f"phases[{i}].{error}") from error
        together = phase.prompts // phase.minibatches
        size = max(phase.microbatch, shards) if phase.microbatch else together
        if size % shards or together % size:
            raise ValueError(
                f"phases[{i}]: the prompts of an update ({size} of {together}: microbatch, or "
                f"prompts / minibatches) must be a multiple of mesh.data x mesh.fsdp = {shards} "
                "that divides them"
            )


def open_source(name: str, split: str, config: TrainConfig) -> Any:
    """A source of rows by the name in `data.train` or `data.validation`. Raises SourceError naming
    that setting."""
    if name == "visual_search":
        return load_source(name, split=split, seed=config.seed)
    try:
        return load_source(
            name,
            max_bad_fraction=config.data.max_bad_fraction,
            bad_rows=bad_rows_folder(config, split) if is_main() else None,
        )
    except SourceError as error:
        hint = "  Relative paths of images start at the folder of the file."
        wanted = hint if "field 'image'" in str(error) else ""
        raise SourceError(f"data.{split}: {error}{wanted}") from error


def bad_rows_folder(config: TrainConfig, split: str) -> Path:
    """Where rows that cannot be used are listed."""
    return as_path(config.run) / "bad_rows" / split


def train(config: TrainConfig, verifier: Verifier | None = None) -> dict[str, Any]:
    """Run (or resume) a training run; returns its summary. verifier: judges free text; default,
    what `config.verifier` says.

    Raises ValueError or OSError before any long work, RunStopped and Preempted later.
    """
    with StopRequests() as stops:
        return _train(config, Console(quiet=not is_main()), verifier, stops)


def _train(
    config: TrainConfig, console: Console, verifier: Verifier | None, stops: StopRequests
) -> dict[str, Any]:
    run = as_path(config.run)
    require_writable(run)
    check_same_config(config, run)
    trainer = build_trainer(config, console, verifier, stops)
    trainer.prepare()
    # Only now are the settings known to work: until then they may be corrected freely.
    if is_main():
        write_config(config, run)
        # Epochs in steps, for whoever wants to know how far the run is.
        steps = [phase.steps for phase in trainer.phases]
        write_whole(run / "schedule.json", json.dumps({"steps": steps}) + "\n")
    any_process(False)  # The others wait for it before they may fail for a reason of their own.
    size = sum(x.size for x in jax.tree.leaves(trainer.like))
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.print(
        f"{size:,} parameters on {len(jax.devices())} {jax.devices()[0].platform} device(s)"
        f"{processes}; writing to {run}"
    )
    summary = trainer.run()
    if is_main():
        rows = {
            f"{name} / {mode}": values
            for name, entry in summary.items()
            if isinstance(entry, dict) and "modes" in entry
            for mode, values in entry["modes"].items()
        }
        if rows:
            console.print(format_table(summary_rows(rows)), markup=False, highlight=False)
        judged = verdict_rows(summary["phases"])
        if judged:
            table = format_table(judged)
            console.print(table, markup=False, highlight=False, soft_wrap=True)
        stages = ", ".join(f"{k} {v:.0f} s" for k, v in summary["stages"].items())
        console.print(f"{summary['wall_seconds']:.0f} s: {stages}", highlight=False)
        try:
            console.print(f"report: {write_report(run)}", highlight=False, soft_wrap=True)
        except Exception as error:  # The run is done and saved; its page can be made again.
            console.print(f"no report was written ({error!r}): p2r report {run}")
        ended = outcome(summary["phases"], summary["warnings"])
        console.print(ended, markup=False, highlight=False, soft_wrap=True)
    return summary


def require_writable(run: Path) -> None:
    """Raise OSError naming the folder if a run cannot write there."""
    if not is_main():
        return
    probe = run / ".writable"
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise OSError(f"run folder {run} cannot be written ({why}): set `run`") from error


def check_same_config(config: TrainConfig, run: Path) -> None:
    """Refuse to resume a run with other settings than it was started with."""
    file = run / "config.yaml"
    if not file.is_file():
        return
    now, before = _plain(dataclasses.asdict(config)), yaml.safe_load(file.read_text())
    before.get("data", {}).setdefault("order", "phase")  # Runs of earlier versions do not name it.
    for settings in (now, before):
        for part, names in FREE_PARTS.items():
            for name in names:
                settings.get(part, {}).pop(name, None)
    for phase in before.get("phases") or []:
        phase.setdefault("start", "last")  # Runs of earlier versions do not name it.
    changed = [k for k in now if k not in FREE_TO_CHANGE and before.get(k) != now[k]]
    best = [settings.get("checkpoint", {}).get("keep_best") for settings in (now, before)]
    if best[0] != best[1] and any(phase.start == "best" for phase in config.phases):
        changed.append("checkpoint.keep_best")  # A phase would start with other weights.
    if changed:
        raise ValueError(
            f"{run} was started with other settings ({', '.join(changed)}): choose another "
            "`run` folder, or delete this one to start again"
        )


def write_config(config: TrainConfig, folder: Path) -> None:
    """As config.yaml, which `--config` reads back."""
    text = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    write_whole(folder / "config.yaml", text + "\n")


def _plain(value: Any) -> Any:
    """As YAML gives it back (tuples become lists)."""
    return yaml.safe_load(yaml.safe_dump(value))
