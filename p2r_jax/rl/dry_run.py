"""`p2r train --dry-run`: what a run will do, show and need, before a machine is rented for it.

    build     all that `train` builds, with its checks: settings, data, verifier, mesh
    scan      rows of the data: can their images be decoded, do their prompts fit the buckets
    tables    schedule, prompts, memory of a device
    collect   the weights, and a small batch of experience for each phase, by the trainer's own code
    leave     RUN/dry_run: a page of the samples with their prompts, images as the model sees them

What costs seconds comes before what costs minutes. Nothing is written outside RUN/dry_run, so that
the real run begins as if there had been no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from rich.console import Console

from p2r_jax.config import LogConfig, TrainConfig
from p2r_jax.data.loader import training_batches
from p2r_jax.evals.report import write_report
from p2r_jax.parallel.mesh import batch_shards
from p2r_jax.parallel.multihost import any_process, is_main, to_host
from p2r_jax.paths import as_path, remove_folder
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.rl.batches import training_batch
from p2r_jax.rl.dry_run_tables import (
    METRICS,
    memory_table,
    prompt_table,
    reward_table,
    schedule_table,
    size_text,
)
from p2r_jax.rl.experience import Clock
from p2r_jax.rl.launch import build_trainer, check_same_config, require_writable
from p2r_jax.rl.memory import device_bytes, images_of_a_device, memory_of
from p2r_jax.rl.prompt_scan import scan_splits
from p2r_jax.rl.rewards import Verifier, has_answer_tag
from p2r_jax.rl.run_log import RunLog
from p2r_jax.rl.schedule import Phase, Progress
from p2r_jax.rl.stop import RunStopped
from p2r_jax.rl.trainer import Trainer
from p2r_jax.rl.updates import Collected
from p2r_jax.roles.image_store import checked_buckets, share_of
from p2r_jax.roles.requests import RequestBuilder

FOLDER = "dry_run"
"""Inside the run's folder."""
QUESTIONS = 4
"""Of each batch, rounded up to what the mesh splits a batch into."""
SCANNED = 512
"""Rows of each split that are measured and decoded."""
MORE_ROOM = {
    "rollout": "lower rollout.slots, columns, refill or greedy_slots, or raise mesh.tensor",
    "update": "raise mesh.fsdp or mesh.tensor, or set optimizer.name adafactor",
}
"""What to do about a stage that takes too much memory."""
IF_ALL = {
    "completion/truncated_fraction": "every completion was cut: raise max_new_tokens, or look "
    "whether the model ends its answers",
    "partner/truncated_fraction": "all that the partner wrote was cut: raise "
    "partner_max_new_tokens",
    "reward/zero_variance_groups": "the rewards of every group agree, so this batch teaches "
    "nothing: look whether answers are found in the samples, or questions too easy or too hard",
}
"""What to do about a metric of 1."""


def dry_run(
    config: TrainConfig,
    questions: int = QUESTIONS,
    scanned: int = SCANNED,
    verifier: Verifier | None = None,
) -> dict[str, dict[str, float]]:
    """Look at a run without making it; returns metrics of a small batch, by phase and role.

    questions: of each batch, at most those of a step. scanned: rows of each split, spread over it.
    verifier: as for `launch.train`.

    Raises ValueError, OSError or RunStopped naming the setting that would end the real run.
    """
    console = Console(quiet=not is_main())
    run = as_path(config.run)
    folder = run / FOLDER
    require_writable(run)
    check_same_config(config, run)
    if is_main() and folder.exists():
        remove_folder(folder)  # an earlier dry run's
    any_process(False)  # Nobody goes on before it is gone.
    # All that the trainer writes goes into the folder, and every sample is shown.
    log = dataclasses.replace(config.log, sample_prompts=max(p.prompts for p in config.phases))
    own = dataclasses.replace(config, run=str(folder), log=log)
    trainer = build_trainer(own, console, verifier)
    builder = trainer.pipeline.builder
    phases = trainer.phases[: len(config.phases)]  # Further rounds are like the first.
    console.print(schedule_table(trainer))

    with console.status("decoding images of the data"):
        scans = scan_splits(trainer, scanned)
    for scan in scans:
        console.print(prompt_table(scan, builder.buckets))
        if scan.problem:
            _warn(console, scan.problem)
    names = [f"row {row.id!r}" for row in scans[0].rows]
    for phase in phases:
        each = images_of_a_device(trainer, phase)
        checked_buckets(scans[0].images.shapes, each, names, builder.buckets)
        memory, limit = memory_of(trainer, phase, scans[0]), device_bytes()
        console.print(memory_table(phase, memory))
        stage = max(MORE_ROOM, key=memory.total)
        if limit and memory.total(stage) > limit:
            needed = f"{size_text(memory.total(stage))} of {size_text(limit)} in the {stage}"
            _warn(console, f"phase {phase.number + 1} needs {needed}: {MORE_ROOM[stage]}")

    if any((run / "checkpoints").glob("[0-9]*")):
        _warn(console, f"{run} holds checkpoints: the real run goes on from them, not as below")
    clock, measured = Clock(), {}
    samples = RunLog(folder, LogConfig(tensorboard=False), 0)
    with _too_little_memory_in_words():
        with clock("load"):
            trainer.prepare()
        trainer.checkpoints.close()
        remove_folder(trainer.checkpoints.folder, ignore_errors=True)  # It stays empty.
        for phase in phases:
            collected = collect_some(trainer, phase, questions, clock)
            trainer._log_samples(phase, collected, phase.number + 1, samples)
            for one in collected:
                name = f"{phase.number + 1} {phase.role}"
                name += f", {one.role.role}" if len(collected) > 1 else ""
                measured[name] = measure(trainer, one)
                save_pictures(builder, one, folder / "pictures", name)
    console.print(reward_table(measured))
    for name, values in measured.items():
        for key, meaning in IF_ALL.items():
            if values.get(key) == 1:
                _warn(console, f"phase {name}: {meaning}")
    if is_main():
        page = write_page(folder, measured, clock)
        for path in (page, folder / "pictures"):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return measured


def _warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)


@contextlib.contextmanager
def _too_little_memory_in_words() -> Iterator[None]:
    """What a dry run is made to find out needs no traceback."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunStopped(
            "the devices have too little memory (the tables above say for what): "
            f"{'; or '.join(MORE_ROOM.values())}. {str(error).splitlines()[0][:300]}"
        ) from error


def collect_some(trainer: Trainer, phase: Phase, questions: int, clock: Clock) -> list[Collected]:
    """What the trainer collects in the phase's first step, of its first few questions.

    Questions and random numbers are those of the real run. So are the completions of the first
    phase; those of later ones are by the weights that the run begins with.
    """
    shards = batch_shards(trainer.mesh) if trainer.mesh is not None else 1
    count = min(-(-questions // shards) * shards, phase.config.prompts)
    # One batch, whatever it is worth, and what it is divided into later does not matter.
    own = dataclasses.replace(
        phase.config, prompts=count, microbatch=0, minibatches=1, dynamic_sampling=0
    )
    earlier = trainer.phases[: phase.number]
    one_stream = trainer.config.data.order == "run"
    batches = training_batches(
        trainer.train_source,
        count,
        trainer.config.seed * 1000 + (0 if one_stream else phase.number),
        unreadable=trainer.unreadable,
        share=share_of(trainer.mesh),
        first_row=sum(p.steps * p.config.prompts for p in earlier) if one_stream else None,
    )
    steps = sum(before.steps for before in earlier)
    trainer.live.progress = Progress(phase.number, 0, steps)
    collected, _ = trainer._collect(dataclasses.replace(phase, config=own), batches, clock)
    return collected


def measure(trainer: Trainer, one: Collected) -> dict[str, float]:
    """The metrics that a run logs of what was collected, and what is told of both roles here.

    Raises RunStopped if too few answers could be graded.
    """
    config, experience = trainer.config, one.experience
    allowed = config.reward.max_dropped_fraction
    _, metrics = training_batch(experience, config.loss, trainer.mesh, (), allowed)
    metrics["completions"] = experience.completions.stopped.size
    answers = experience.partner_texts if one.role.role == "perceiver" else experience.texts
    metrics["answer_tag"] = float(np.mean([has_answer_tag(t) for own in answers for t in own]))
    partners = [output.tokens for own in experience.idle_outputs for output in own]
    if partners:  # Else there is no perceiver either.
        stops = set(trainer.pipeline.builder.processor.stop_ids)
        cut = [not tokens or tokens[-1] not in stops for tokens in partners]
        parsed = [own for group in experience.boxes for own in group]
        metrics["partner/truncated_fraction"] = float(np.mean(cut))
        metrics["boxes/parsed"] = float(np.mean([own.well_formed for own in parsed]))
        metrics["boxes/count"] = float(np.mean([len(own.boxes) for own in parsed]))
    return metrics


def save_pictures(builder: RequestBuilder, one: Collected, folder: Path, name: str) -> None:
    """The images of one prompt about each question as the model sees them: with evidence, if the
    perceiver found any."""
    experience, requests = one.experience, one.experience.requests
    if one.role.role == "perceiver":  # Its own prompt has no evidence; its reasoner's has.
        requests = [
            next((request for request in own if request.has_evidence), own[0])
            for own in experience.idle_requests
        ]
    prompts = to_host(builder.collate(requests, one.images))
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for b, loaded in enumerate(experience.rows):
        stem = re.sub(r"[^\w.-]+", "_", f"{name} {loaded.row.id}")[:100]
        images = seen_images(prompts, b, builder.processor.config.vision.patch_size)
        for number, image in enumerate(images):
            image.save(folder / f"{stem}_{number}.png")


def seen_images(prompts: Prompts, row: int, patch: int) -> list[Image.Image]:
    """The images of one prompt, put together from its patches. prompts: on the host."""
    assert prompts.patches is not None
    number = np.asarray(prompts.patches.image_id[row])
    images = []
    for i in range(1, int(number.max()) + 1):
        own = number == i
        cells = np.asarray(prompts.patches.pixels[row])[own].reshape(own.sum(), 3, patch, patch)
        at = np.asarray(prompts.patches.row_col[row])[own]
        rows, columns = at.max(0) + 1
        canvas = np.zeros((rows, columns, patch, patch, 3), np.uint8)
        canvas[at[:, 0], at[:, 1]] = cells.transpose(0, 2, 3, 1)
        pixels = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)
        images.append(Image.fromarray(pixels))
    return images


def write_page(folder: Path, measured: dict[str, dict[str, float]], clock: Clock) -> Path:
    """The report of a run folder, of the dry run's; its heading is made of a summary."""
    summary: dict[str, object] = {"kind": "dry run, nothing was trained"}
    for key in ("reward/mean", "reward/zero_variance_groups", "completion/truncated_fraction"):
        title, form = METRICS[key]
        for name, values in measured.items():
            summary[f"{name}: {title}"] = format(values[key], form)
    summary["stages"] = {stage: round(seconds, 1) for stage, seconds in clock.seconds.items()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return write_report(folder, folder / "index.html")
