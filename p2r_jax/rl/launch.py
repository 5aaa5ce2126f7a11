"""`p2r train`: from a config to a running `Trainer`, with every check that can fail done first."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx
from rich.console import Console

from p2r_jax.config import TrainConfig
from p2r_jax.data.sources import FileSource, load_source
from p2r_jax.evals.report import write_report
from p2r_jax.evals.runner import check_modes
from p2r_jax.evals.scoring import format_table, summary_rows
from p2r_jax.parallel.mesh import batch_shards, make_mesh
from p2r_jax.parallel.multihost import is_main
from p2r_jax.qwen3_vl.hf import load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.rl.experience import phase_sampling
from p2r_jax.rl.rewards import Verifier, require_verifier
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.pipeline import Pipeline, default_prompt_set, greedy_schedule
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets


def build_trainer(
    config: TrainConfig, console: Console, verifier: Verifier | None = None
) -> Trainer:
    """Everything a run needs; `verifier` grades free text.

    Raises ValueError or FileNotFoundError naming the setting.
    """
    config.validate()
    check_modes([*config.eval.modes, *config.eval.final_modes])
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
    require_verifier(train_source.answer_forms | validation_source.answer_forms, verifier)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    for i, phase in enumerate(config.phases):
        try:
            phase_sampling(phase)
        except ValueError as error:
            raise ValueError(f"phases[{i}].{error}") from error
        if (phase.microbatch or phase.prompts) % batch_shards(mesh):
            raise ValueError(
                f"phases[{i}]: prompts (or microbatch) must be a multiple of mesh.data x mesh.fsdp "
                f"= {batch_shards(mesh)}"
            )
    model = load_pretrained(folder, mesh, "float32", config.model.kernels)
    graph, params = nnx.split(model, nnx.Param)
    greedy = greedy_schedule(config.rollout.greedy_slots, tuple(config.buckets.response_tokens))
    pipeline = Pipeline.create(graph, processor, prompts, buckets, mesh, greedy)
    return Trainer(config, pipeline, params, train_source, validation_source, console, verifier)


def open_source(name: str, split: str, config: TrainConfig) -> Any:
    """A source of rows by the name in `data.train` or `data.validation`."""
    if name == "visual_search":
        return load_source(name, split=split, seed=config.seed)
    return load_source(
        name,
        max_bad_fraction=config.data.max_bad_fraction,
        bad_rows=bad_rows_folder(config, split),
    )


def bad_rows_folder(config: TrainConfig, split: str) -> Path:
    """Where rows that cannot be used are listed."""
    return Path(config.run) / "bad_rows" / split


def train(config: TrainConfig, verifier: Verifier | None = None) -> dict[str, Any]:
    """Run (or resume) a training run; returns its summary. verifier: grades free text."""
    console = Console()
    run = Path(config.run)
    if is_main():
        _check_same_config(config, run)
    trainer = build_trainer(config, console, verifier)
    if is_main():
        _write_config(config, run)
    size = sum(x.size for x in jax.tree.leaves(trainer.initial))
    console.print(
        f"{size:,} parameters on {len(jax.devices())} {jax.devices()[0].platform} device(s); "
        f"writing to {run}"
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
        stages = ", ".join(f"{k} {v:.0f} s" for k, v in summary["stages"].items())
        console.print(f"wall time {summary['wall_seconds']:.0f} s: {stages}", highlight=False)
        console.print(f"report: {write_report(run)}", highlight=False, soft_wrap=True)
    return summary


def _check_same_config(config: TrainConfig, run: Path) -> None:
    """Refuse to resume a run with other settings than it was started with."""
    file = run / "config.yaml"
    now = dataclasses.asdict(config)
    if file.is_file():
        before = yaml.safe_load(file.read_text())
        # These change where and how fast, not what: a run may go on on other machines.
        free = ("run", "log", "checkpoint", "mesh", "rollout")
        changed = [key for key in now if key not in free]
        for settings in (now["model"], before.get("model", {})):
            settings.pop("kernels", None)
        changed = [key for key in changed if before.get(key) != _plain(now[key])]
        if changed:
            raise ValueError(
                f"{run} was started with other settings ({', '.join(changed)}): choose another "
                "`run` folder, or delete this one to start again"
            )


def _write_config(config: TrainConfig, run: Path) -> None:
    """Only once the settings are known to work: until then they may be corrected freely."""
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / "config.tmp"
    temporary.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))
    os.replace(temporary, run / "config.yaml")


def _plain(value: Any) -> Any:
    """As YAML gives it back (tuples become lists)."""
    return yaml.safe_load(yaml.safe_dump(value))
