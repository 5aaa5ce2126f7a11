"""`p2r train --dry-run`: what a run will do, show and need, before a machine is rented for it.

    build     all that `train` builds, with its checks: settings, data, verifier, mesh
    scan      rows of the data: can their images be decoded, do their prompts fit the buckets
    tables    schedule, prompts, memory of a device
    collect   the weights, and a small batch of experience for each phase, by the trainer's own code
    leave     RUN/dry_run: samples, pictures, the prompts as text, one page

What costs seconds comes before what costs minutes. Nothing is written outside RUN/dry_run, so that
the real run begins as if there had been no other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from p2r_jax.config import LogConfig, OptimizerConfig, PhaseConfig, TrainConfig
from p2r_jax.data.loader import training_batches
from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import SourceError
from p2r_jax.evals.report import write_report
from p2r_jax.parallel.mesh import batch_shards, for_decoding
from p2r_jax.parallel.multihost import any_process, is_main, to_host
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.processor import ImageSizes
from p2r_jax.rl.batches import training_batch
from p2r_jax.rl.experience import Clock
from p2r_jax.rl.launch import build_trainer, check_same_config, require_writable
from p2r_jax.rl.optimizer import learning_rate, make_optimizer
from p2r_jax.rl.rewards import Verifier, has_answer_tag
from p2r_jax.rl.run_log import RunLog
from p2r_jax.rl.schedule import Phase, Progress
from p2r_jax.rl.step import new_state
from p2r_jax.rl.stop import RunStopped
from p2r_jax.rl.trainer import Collected, Live, Trainer
from p2r_jax.roles.boxes import MAX_CROPS, Box, crop_rectangle
from p2r_jax.roles.render import contact_sheet
from p2r_jax.roles.requests import Buckets, ImageStore, Request, RequestBuilder, fit
from p2r_jax.roles.verifiers import ModelVerifier

FOLDER = "dry_run"
"""Inside the run's folder."""
QUESTIONS = 4
"""Of each batch, rounded up to what the mesh splits a batch into."""
SCANNED = 512
"""Rows of each split that are measured and decoded."""
TITLES = {
    "perceiver": "perceiver",
    "reasoner": f"reasoner, {MAX_CROPS} crops",
    "baseline": "baseline",
    "direct": "direct",
}
"""Requests that are measured, by role. A reasoner's depends on what the perceiver writes: it is
measured at its worst."""
IDLE = {"perceiver": "reasoner", "reasoner": "perceiver"}


def dry_run(
    config: TrainConfig,
    questions: int = QUESTIONS,
    scanned: int = SCANNED,
    verifier: Verifier | None = None,
) -> dict[str, dict[str, float]]:
    """Look at a run without making it; returns what was measured, by phase and role.

    questions: of each phase's batch, at most those of a step. scanned: rows of each split, spread
    over it. verifier: as for `launch.train`.

    Raises ValueError, OSError or RunStopped naming the setting that would end the real run.
    """
    console = Console(quiet=not is_main())
    require_writable(Path(config.run))
    check_same_config(config, Path(config.run))
    folder = Path(config.run) / FOLDER
    if is_main() and folder.exists():
        shutil.rmtree(folder)  # an earlier dry run's
    any_process(False)
    # Every sample is shown, and all that the trainer writes goes into the folder.
    everything = LogConfig(
        tensorboard=False, sample_prompts=max(phase.prompts for phase in config.phases)
    )
    trainer = build_trainer(
        dataclasses.replace(config, run=str(folder), log=everything), console, verifier
    )
    _print_schedule(trainer, console)
    scans = [scan_source(trainer, *split, scanned, console) for split in _splits(trainer)]
    phases = trainer.phases[: len(config.phases)]  # further rounds are like the first
    for scan in scans:
        console.print(_prompt_table(scan, trainer.pipeline.builder.buckets))
    for phase in phases:
        _print_memory(trainer, phase, scans[0], console)
    if is_main():
        _write_prompts(trainer, scans[0], folder)

    if any((Path(config.run) / "checkpoints").glob("[0-9]*")):
        console.print(
            f"{config.run} holds checkpoints, from which the real run goes on; what follows is of "
            "the weights that it began with"
        )
    clock = Clock()
    with _out_of_memory_is_an_answer():
        _load_weights(trainer, clock)
        measured = _collect_all(trainer, phases, questions, folder, clock)
    console.print(_reward_table(measured))
    for name, values in measured.items():
        for warning in _warnings(name, values):
            _warn(console, warning)
    if is_main():
        page = _write_page(folder, measured, clock)
        for name, path in (("page", page), ("also", folder / "pictures"), ("", folder / "prompts")):
            console.print(f"{name:5} {path}", markup=False, highlight=False, soft_wrap=True)
    return measured


def _warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)


def _write_page(folder: Path, measured: dict[str, dict[str, float]], clock: Clock) -> Path:
    """The report of a run folder, of the dry run's; its heading is made of a summary."""
    summary = {"kind": "dry run, nothing was trained"} | {
        f"{name}: {title}": _shown(key, values[key])
        for name, values in measured.items()
        for key, title in ROWS.items()
        if key in ("reward/mean", "reward/zero_variance_groups", "completion/truncated_fraction")
    }
    stages = {stage: round(seconds, 1) for stage, seconds in clock.seconds.items()}
    text = json.dumps(summary | {"stages": stages}, indent=2)
    (folder / "summary.json").write_text(text + "\n")
    return write_report(folder, folder / "index.html")


# --- the schedule ---------------------------------------------------------------------------------


def _print_schedule(trainer: Trainer, console: Console) -> None:
    table = _table("schedule")
    table.add_column("phase", no_wrap=True)
    names = ("round", "steps", "prompts\n× group", "new tokens\n/ partner", "updates")
    for name in (*names, "learning rate"):
        table.add_column(name, justify="right", no_wrap=name != "learning rate")
    for phase in trainer.phases:
        own = phase.config
        tokens = " + ".join(dict.fromkeys(f"{role.max_new_tokens:,}" for role in phase.learning))
        if phase.role != "baseline":
            tokens += f" / {own.partner_max_new_tokens:,}"
        table.add_row(
            f"{phase.number + 1} {phase.role}",
            f"{phase.round + 1}",
            f"{phase.steps:,}",
            f"{own.prompts} × {own.group}",
            tokens,
            f"{phase.updates:,}",
            _rates(trainer, phase),
        )
    console.print(table)


def _table(title: str, caption: str | None = None) -> Table:
    """In the style of this page: narrow enough for a terminal of 80 columns."""
    return Table(
        title=f"\n{title}",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )


def _rates(trainer: Trainer, phase: Phase) -> str:
    """The learning rate of the phase's first update, its peak, and its last."""
    settings, length = trainer.config.optimizer, trainer._schedule_length(phase)
    before = 0 if settings.reset else sum(p.updates for p in trainer.phases[: phase.number])
    first, last = before, before + phase.updates - 1
    peak = min(max(settings.warmup_steps, first), last)
    shown = [f"{learning_rate(settings, length, n):.2g}" for n in (first, peak, last)]
    shown = [rate.replace("e-0", "e-") for rate in shown]
    return " → ".join(rate for i, rate in enumerate(shown) if i == 0 or rate != shown[i - 1])


# --- rows of the data -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """A request for a scanned row, in the units of the buckets."""

    row: str
    """Id."""
    tokens: int
    patches: int
    side: int
    """Longest side of a resized image, pixels."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """Some rows of one split."""

    split: str
    rows: list[Row]
    images: ImageStore
    """Sizes of their images, without pixels."""
    requests: dict[str, list[Measured]]
    """By role, one of each row."""


def _splits(trainer: Trainer) -> Iterator[tuple[str, Any, tuple[str, ...], int]]:
    """(split, source, roles that are asked about its rows, how many of its rows are used)."""
    source = trainer.train_source
    yield "train", source, trained_roles(trainer.config.phases), len(source)
    settings, source = trainer.config.eval, trainer.evaluations.source
    used = max(settings.final_questions, settings.questions if settings.every else 0)
    if used:
        modes = {*settings.modes, *settings.final_modes}
        asks = {"default": ("direct",), "baseline": ("baseline",)}
        asks |= {"oracle_box": ("reasoner",), "random_box": ("reasoner",)}
        roles = {role for mode in modes for role in asks.get(mode, ("perceiver", "reasoner"))}
        yield "validation", source, tuple(r for r in TITLES if r in roles), min(used, len(source))


def trained_roles(phases: Sequence[PhaseConfig]) -> tuple[str, ...]:
    """Roles that write something in training: those that learn, and their partners."""
    baseline = [phase.role == "baseline" for phase in phases]
    both = () if all(baseline) else ("perceiver", "reasoner")
    return (*both, "baseline") if any(baseline) else both


def scan_source(
    trainer: Trainer,
    split: str,
    source: Any,
    roles: Sequence[str],
    limit: int,
    most: int,
    console: Console,
) -> Scan:
    """Measure what each role is asked about up to `most` of the first `limit` rows.

    Raises SourceError if more images than `data.max_bad_fraction` cannot be decoded, and ValueError
    for a row that no request can be made of, or whose request fits no bucket.
    """
    config, builder = trainer.config, trainer.pipeline.builder
    rows = [source[i] for i in spread(limit, most)]
    total, bad = len(rows), []
    sizes: list[tuple[int, int]] = []
    good: list[Row] = []
    for row in rows:
        try:
            sizes.append(image_size(row))
            good.append(row)
        except RowError as error:
            bad.append(error)
    _refuse_bad(split, bad, total, config.data.max_bad_fraction)
    images = dataclasses.replace(ImageStore.empty(), shapes=tuple(sizes))
    requests: dict[str, list[Measured]] = {role: [] for role in roles}
    for number, row in enumerate(good):
        for role in roles:
            try:
                requests[role].append(measure_request(builder, images, number, row, role))
            except ValueError as error:
                raise ValueError(f"data.{split}: row {row.id!r}, {role}: {error}") from error
    scan = Scan(split, good, images, requests)
    _refuse_large(scan, builder)

    # In threads: Pillow lets others run while it decodes.
    with (
        console.status(f"decoding {len(good)} images of data.{split}"),
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        bad += [error for error in pool.map(_decoding_error, good) if error is not None]
    _refuse_bad(split, bad, total, config.data.max_bad_fraction)
    if bad:
        _warn(
            console,
            f"{len(bad)} of {total} images of data.{split} cannot be decoded; the run ends at the "
            f"first that it comes to: {_listed(bad)}",
        )
    return scan


def spread(count: int, most: int, runs: int = 16) -> list[int]:
    """Up to `most` numbers below `count`, in a few runs of neighbours.

    Not singly: of a parquet file whole groups of rows are read.

    >>> spread(100, 6, runs=3)
    [0, 1, 49, 50, 98, 99]
    """
    if count <= most:
        return list(range(count))
    runs = min(runs, most)
    length = most // runs
    starts = np.linspace(0, count - length, runs).astype(int)
    return sorted({int(start) + i for start in starts for i in range(length)})


def image_size(row: Row) -> tuple[int, int]:
    """Height and width in pixels, from the file's header if it has one.

    Raises RowError as `Row.load_image` does.
    """
    source: Any = row.image_source
    while callable(source):
        source = source()
    if isinstance(source, (bytes, bytearray, str, os.PathLike)):
        opened = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
        try:
            with Image.open(opened) as image:
                return image.height, image.width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            pass  # What is wrong with it, `load_image` says.
    height, width, _ = row.load_image().shape
    return height, width


def _decoding_error(row: Row) -> RowError | None:
    try:
        row.load_image()
    except RowError as error:
        return error
    return None


def _refuse_bad(split: str, bad: Sequence[RowError], total: int, limit: float) -> None:
    if bad and (len(bad) > limit * total or len(bad) == total):
        raise SourceError(
            f"data.{split}: {len(bad)} of {total} images cannot be decoded (data.max_bad_fraction "
            f"allows {limit:.1%}): {_listed(bad)}. Repair these files, or leave out their rows"
        )


def _listed(bad: Sequence[RowError]) -> str:
    shown = "; ".join(f"row {error.row_id!r}: {error.problem}" for error in bad[:3])
    return f"{shown}; …" if len(bad) > 3 else shown


def measure_request(
    builder: RequestBuilder, images: ImageStore, number: int, row: Row, role: str
) -> Measured:
    """What a role is asked about a row; the reasoner with the largest crops that there can be.

    Raises ValueError if there is no such request, as the trainer would.
    """
    question, sizes = (row.question_with_options, row.answer_form), builder.processor.sizes
    side = 0
    if role == "reasoner":
        box, side = largest_crop(*images.shapes[number], sizes)
        request = builder.reasoner(images, number, *question, [box] * MAX_CROPS)
    else:
        request = builder.plain(role, images, number, *question)  # type: ignore[arg-type]
    grids = [sizes.grid(view.target) for view in request.views]
    side = max(side, *(max(view.target) for view in request.views))
    return Measured(row.id, len(request.tokens), sum(h * w for h, w in grids), side)


@functools.cache
def largest_crop(height: int, width: int, sizes: ImageSizes) -> tuple[Box, int]:
    """A box whose crop takes the most patches, and the longest side in pixels that the crop of some
    other box is resized to.

    Which crop is largest depends on how its sides round, so many are tried. In a corner of the
    image a crop can be as narrow as anywhere.
    """
    # The first and the last make the narrowest box that there is. Up to 900 the padding, which is
    # limited on large images, may reach the other edge.
    ends = (5, *range(20, 901, 20), 1000)
    crop = lambda x, y: crop_rectangle(width, height, (0, 0, x, y))
    widths = {crop(x, x)[2]: x for x in ends}
    heights = {crop(y, y)[3]: y for y in ends}
    best, most, longest = Box((0.0, 0.0, 900.0, 900.0), "largest crop"), 0, 0
    for w, x in reversed(widths.items()):
        for h, y in reversed(heights.items()):
            try:
                target = sizes.target_size(h, w)
            except ValueError:
                continue  # too long for its width: never cropped
            longest = max(longest, *target)
            rows, columns = sizes.grid(target)
            if rows * columns > most:
                most, best = rows * columns, Box((0.0, 0.0, float(x), float(y)), best.label)
    return best, longest


def _refuse_large(scan: Scan, builder: RequestBuilder) -> None:
    """Raise ValueError with the worst row for each bucket that is too small for some."""
    buckets, pixels = builder.buckets, builder.processor.sizes.max_pixels
    lower = f"lower model.max_pixels (now {pixels})"
    found: dict[str, list[tuple[int, str, str]]] = {
        "image": [
            (max(size), row.id, "the source image, longest side in pixels")
            for row, size in zip(scan.rows, scan.images.shapes, strict=True)
        ]
    }
    fixes = {"image": "shrink the images", "canvas": lower, "patches": lower}
    for name, field, unit in (
        ("canvas", "side", "longest side of a resized image in pixels"),
        ("patches", "patches", "patches"),
        ("prompt_tokens", "tokens", "prompt tokens"),
    ):
        found[name] = [
            (getattr(one, field), one.row, f"{TITLES[role]}, {unit}")
            for role, measured in scan.requests.items()
            for one in measured
        ]
    problems = []
    for name, every in found.items():
        largest = getattr(buckets, name)[-1]
        over = [one for one in every if one[0] > largest]
        if over:
            needed, row, what = max(over)
            count = len({row for _, row, _ in over})
            problems.append(
                f"row {row!r} exceeds buckets.{name} = {list(getattr(buckets, name))} ({what}: "
                f"{needed}; {count} of {len(scan.rows)} scanned rows do): add a bucket of at least "
                f"{needed}, or {fixes.get(name, lower)}"
            )
    if problems:
        raise ValueError(f"data.{scan.split}: " + ". Also, ".join(problems))


def _prompt_table(scan: Scan, buckets: Buckets) -> Table:
    table = _table(
        f"prompts of {len(scan.rows)} rows of data.{scan.split}",
        "A batch takes the bucket of its largest prompt. Crops are the largest that boxes can ask "
        "for.",
    )
    table.add_column("request")
    table.add_column("unit")
    for name in ("min", "mean", "max"):
        table.add_column(name, justify="right")
    table.add_column("bucket:rows that take it")

    def add(title: str, unit: str, values: Sequence[int], sizes: Sequence[int], last: bool) -> None:
        used = collections.Counter(fit(sizes, value, "") for value in values)
        counts = "  ".join(f"{size}:{used[size]}" for size in sizes)
        mean = f"{np.mean(values):.1f}"
        table.add_row(
            title, unit, f"{min(values)}", mean, f"{max(values)}", counts, end_section=last
        )

    for role, measured in scan.requests.items():
        add(TITLES[role], "tokens", [m.tokens for m in measured], buckets.prompt_tokens, False)
        add("", "patches", [m.patches for m in measured], buckets.patches, False)
        add("", "side, px", [m.side for m in measured], buckets.canvas, True)
    add("source image", "side, px", [max(s) for s in scan.images.shapes], buckets.image, True)
    return table


# --- memory ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that takes memory on each device."""

    name: str
    bytes: int
    about: str = ""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device holds in a phase, at least."""

    always: list[Part]
    rollout: list[Part]
    """On top, while experience is collected: the largest of the rollouts."""
    update: list[Part]
    """On top, in an update."""

    def total(self, stage: str) -> int:
        """Bytes in `rollout` or `update`."""
        return sum(part.bytes for part in (*self.always, *getattr(self, stage)))


def tree_bytes(tree: Any, dtype: Any = None, layout: Any = None) -> int:
    """Bytes of a tree (shapes with shardings) on one device. dtype, layout: instead of its own."""
    leaves = jax.tree.leaves(tree)
    where = [x.sharding for x in leaves] if layout is None else jax.tree.leaves(layout)
    return sum(
        math.prod(s.shard_shape(x.shape) if s is not None else x.shape)
        * jnp.dtype(dtype or x.dtype).itemsize
        for x, s in zip(leaves, where, strict=True)
    )


def optimizer_bytes_of_a_device(config: OptimizerConfig, params: Any) -> int:
    """As `optimizer.optimizer_bytes`, for one device: what has a parameter's shape is split like
    it, all else is there whole. params: shapes with shardings."""
    shardings = {
        tuple(map(str, path)): (x.shape, x.sharding)
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    state = jax.eval_shape(make_optimizer(config, 1).init, params)
    total = 0
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = tuple(map(str, path))
        shape, sharding = next(
            (shardings[keys[i:]] for i in range(len(keys)) if keys[i:] in shardings), (None, None)
        )
        own = x.shape
        if shape == x.shape and isinstance(sharding, NamedSharding):
            own = sharding.shard_shape(x.shape)
        total += math.prod(own) * x.dtype.itemsize
    return total


def memory_of(trainer: Trainer, phase: Phase, scan: Scan) -> Memory:
    """What a device holds in a phase. scan: of the training rows; its largest prompts are taken."""
    config, own = trainer.config, phase.config
    like, model, compute = trainer.like, config.model, jnp.dtype(config.model.compute_dtype)
    rollout = jnp.dtype(model.rollout_dtype or model.compute_dtype)
    always = [
        Part("trained weights", tree_bytes(like), model.param_dtype),
        Part(
            "optimizer", optimizer_bytes_of_a_device(config.optimizer, like), config.optimizer.name
        ),
        Part("snapshot", tree_bytes(like, compute), model.compute_dtype),
    ]
    if config.loss.reference == "start" and config.loss.kl_weight:
        always.append(Part("weights of the start", tree_bytes(like, compute), "loss.reference"))
    sizes = _Sizes(trainer, scan)
    patches = sum(sizes.patch_bytes(role.role, own.prompts) for role in phase.learning)
    images = own.prompts * math.prod(sizes.image) * 3
    pictures = [
        Part(
            "images",
            images,
            f"{own.prompts} × {sizes.image[0]} × {sizes.image[1]} × 3, on every device",
        ),
        Part("images as patches", patches * (1 + own.dynamic_sampling), "of the role that learns"),
    ]
    decoding = tree_bytes(like, rollout, for_decoding(like, trainer.mesh))
    layout = f"{rollout.name}, not split over fsdp"
    weights = [Part("weights for the rollout", decoding, layout)]
    judges = isinstance(trainer.grader.verifier, ModelVerifier)
    if own.partner == "phase" or judges:
        weights.append(Part("weights of the partner", decoding, layout))
    caches = max(
        (_caches(trainer, sizes, role) for role in phase.learning),
        key=lambda parts: sum(part.bytes for part in parts),
    )
    parts = own.prompts // own.microbatch if own.microbatch else 1
    parts = max(1, parts // own.minibatches)
    trained = jnp.dtype(model.param_dtype)
    gradient = [Part("gradient", tree_bytes(like), model.param_dtype)]
    if parts > 1:
        total = tree_bytes(like, jnp.promote_types(trained, jnp.float32))
        gradient.append(Part("gradient, summed", total, f"over {parts} microbatches, float32"))
    if compute != trained:
        gradient.append(Part("weights as computed with", tree_bytes(like, compute), compute.name))
    if judges:
        gradient.append(Part("weights of the verifier", decoding, "the snapshot's, kept"))
    return Memory(always, [*weights, *caches, *pictures], [*gradient, *pictures])


class _Sizes:
    """Padded sizes that the largest prompts of a scan take, and what they cost."""

    def __init__(self, trainer: Trainer, scan: Scan):
        buckets, measured = trainer.pipeline.builder.buckets, scan.requests
        config = trainer.pipeline.builder.processor.config
        self.text, self.patch_dim = config.text, config.vision.patch_dim
        self.shards = batch_shards(trainer.mesh) if trainer.mesh is not None else 1
        self.tensor = trainer.mesh.shape["tensor"] if trainer.mesh is not None else 1
        model = trainer.config.model
        self.item = jnp.dtype(model.rollout_dtype or model.compute_dtype).itemsize
        most = lambda role, field: max(getattr(m, field) for m in measured[role])
        self.tokens = {r: fit(buckets.prompt_tokens, most(r, "tokens"), "") for r in measured}
        self.patches = {r: fit(buckets.patches, most(r, "patches"), "") for r in measured}
        self.image = tuple(
            fit(buckets.image, max(size[axis] for size in scan.images.shapes), "")
            for axis in (0, 1)
        )

    def up(self, rows: int) -> int:
        """Rows that a batch is filled up to."""
        return -(-rows // self.shards) * self.shards

    def cache_bytes(self, slots: int, tokens: int) -> int:
        """Keys and values of `tokens` in each slot, on one device; heads are split over `tensor`
        where they divide."""
        heads = self.text.num_key_value_heads
        heads //= self.tensor if heads % self.tensor == 0 else 1
        per_token = self.text.num_hidden_layers * heads * self.text.head_dim * 2 * self.item
        return self.up(slots) // self.shards * tokens * per_token

    def patch_bytes(self, role: str, rows: int) -> int:
        """Pixels of the patches of so many prompts, float32, on one device."""
        return self.up(rows) // self.shards * self.patches[role] * self.patch_dim * 4


def _caches(trainer: Trainer, sizes: _Sizes, role: PhaseConfig) -> list[Part]:
    """Of the policy's rollout or of the partner's, whichever takes more; they follow each other."""
    rollout, count = trainer.config.rollout, role.prompts
    slots = sizes.up(rollout.slots or count)
    refill = rollout.refill or (slots if slots >= count else slots // 4 or 1)
    columns = min(rollout.columns or role.group, role.group)
    every = [
        _generation(sizes, role.role, slots, columns, role.max_new_tokens, refill, refill < count)
    ]
    if role.role in IDLE:
        slots = rollout.greedy_slots
        new = role.partner_max_new_tokens
        every.append(
            _generation(sizes, IDLE[role.role], slots, 1, new, max(1, slots // 4), loads=True)
        )
    return max(every, key=lambda parts: sum(part.bytes for part in parts))


def _generation(
    sizes: _Sizes, role: str, slots: int, columns: int, new: int, refill: int, loads: bool
) -> list[Part]:
    """loads: whether prompts get patches of their own as they come in."""
    prompt, ring = sizes.tokens[role], -(-new // 8) * 8
    slots = sizes.up(slots)
    refill = min(sizes.up(refill), slots)
    patches = sizes.patch_bytes(role, refill) if loads else 0
    return [
        Part(
            f"prefix cache of the {role}",
            sizes.cache_bytes(slots, prompt),
            f"{slots} slots × {prompt} tokens",
        ),
        Part(
            f"ring cache of the {role}",
            sizes.cache_bytes(slots, columns * ring),
            f"{slots} slots × {columns} × {ring} tokens",
        ),
        Part(
            f"prefill of the {role}",
            sizes.cache_bytes(refill, prompt) + patches,
            f"{refill} prompts that come in at once",
        ),
    ]


def _print_memory(trainer: Trainer, phase: Phase, scan: Scan, console: Console) -> None:
    memory = memory_of(trainer, phase, scan)
    device, limit = jax.local_devices()[0], device_bytes()
    table = _table(
        f"memory of each of {len(jax.devices())} {device.device_kind} device(s), phase "
        f"{phase.number + 1} {phase.role}",
        "An estimate from shapes, for the largest prompts of the scan. Activations come on top.",
    )
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("how")
    for part in memory.always:
        table.add_row(part.name, size_text(part.bytes), part.about)
    table.add_section()
    for stage, name in (("rollout", "in the rollout"), ("update", "in the update")):
        for part in getattr(memory, stage):
            table.add_row(part.name, size_text(part.bytes), part.about)
        table.add_row(f"sum {name}", size_text(memory.total(stage)), "", style="bold")
        table.add_section()
    most = max(("rollout", "update"), key=memory.total)
    known = f"the device has {size_text(limit)}" if limit else "the backend does not say its size"
    table.add_row("most", size_text(memory.total(most)), known, style="bold")
    console.print(table)
    if limit and memory.total(most) > limit:
        fix = {
            "rollout": "lower rollout.slots, rollout.columns, rollout.greedy_slots or "
            f"phases[{phase.number}].prompts, or raise mesh.tensor",
            "update": "raise mesh.fsdp or mesh.tensor, or set optimizer.name adafactor or "
            "optimizer.moment_dtype bfloat16",
        }
        _warn(
            console,
            f"phase {phase.number + 1} needs {size_text(memory.total(most))} on a device of "
            f"{size_text(limit)} in the {most}: {fix[most]}",
        )


def device_bytes() -> int | None:
    """Memory of a device that JAX may use, where the backend tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def size_text(count: int) -> str:
    """Bytes for people.

    >>> size_text(3 * 2**30 // 2)
    '1.50 GiB'
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


# --- prompts as text ------------------------------------------------------------------------------


def _write_prompts(trainer: Trainer, scan: Scan, folder: Path) -> None:
    """The first scanned row as each role is asked about it."""
    builder, row = trainer.pipeline.builder, scan.rows[0]
    question = (0, row.question_with_options, row.answer_form)
    boxes = [Box(box, "evidence") for box in row.boxes]
    boxes = boxes or [largest_crop(*scan.images.shapes[0], builder.processor.sizes)[0]]
    requests: dict[str, Request] = {}
    if "perceiver" in scan.requests:
        requests["perceiver"] = builder.plain("perceiver", scan.images, *question)
        requests["reasoner_with_evidence"] = builder.reasoner(scan.images, *question, boxes)
        requests["reasoner_without_evidence"] = builder.reasoner(scan.images, *question, [])
    if "baseline" in scan.requests:
        requests["baseline"] = builder.plain("baseline", scan.images, *question)
    target = folder / "prompts"
    target.mkdir(parents=True, exist_ok=True)
    for name, request in requests.items():
        text = builder.processor.prompt_text(request.tokens)
        (target / f"{name}.txt").write_text(text, encoding="utf-8", errors="replace")


# --- a batch of experience ------------------------------------------------------------------------


@contextlib.contextmanager
def _out_of_memory_is_an_answer() -> Iterator[None]:
    """What a dry run is made to find out needs no traceback."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
            raise
        raise RunStopped(
            "the devices have too little memory (the tables above say for what): raise mesh.fsdp "
            "or mesh.tensor, or lower rollout.slots, rollout.columns and rollout.greedy_slots. "
            f"{str(error).splitlines()[0][:300]}"
        ) from error


def _collect_all(
    trainer: Trainer, phases: Sequence[Phase], questions: int, folder: Path, clock: Clock
) -> dict[str, dict[str, float]]:
    """A batch of each phase, with its samples and pictures; what was measured of it, by name."""
    log = RunLog(folder, trainer.config.log, 0)
    measured: dict[str, dict[str, float]] = {}
    for phase in phases:
        collected = _collect(trainer, phase, questions, clock)
        trainer._log_samples(phase, collected, phase.number + 1, log)
        for one in collected:
            name = f"{phase.number + 1} {phase.role}"
            if len(collected) > 1:
                name += f", {one.role.role}"
            measured[name] = measure_batch(trainer, one)
            _save_pictures(trainer, one, folder / "pictures", name)
    log.close()
    return measured


def _load_weights(trainer: Trainer, clock: Clock) -> None:
    """As `Trainer.prepare` does for a run that begins, without a place for checkpoints.

    Raises ValueError if the model is to judge answers and cannot.
    """
    with clock("load"):
        params = trainer.load()
        state = new_state(params, trainer._optimizer(trainer.phases[0]))
        trainer.live = Live(Progress(), state, trainer._to_snapshot(params))
        jax.block_until_ready((state.params, trainer.live.snapshot))
    verifier = trainer.grader.verifier
    if isinstance(verifier, ModelVerifier):
        trainer._partner()  # gives it its weights, without which it could not be checked before
        verifier.check()


def _collect(trainer: Trainer, phase: Phase, questions: int, clock: Clock) -> list[Collected]:
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
    batches = training_batches(
        trainer.train_source, count, trainer.config.seed * 1000 + phase.number
    )
    steps = sum(before.steps for before in trainer.phases[: phase.number])
    trainer.live.progress = Progress(phase.number, 0, steps)
    collected, _ = trainer._collect(dataclasses.replace(phase, config=own), batches, clock)
    return collected


def measure_batch(trainer: Trainer, one: Collected) -> dict[str, float]:
    """The step's metrics of one role, as a run logs them, and what is told of both roles here.

    Raises RunStopped if too few answers could be graded.
    """
    config, experience = trainer.config, one.experience
    _, metrics = training_batch(
        experience,
        config.loss,
        trainer.mesh,
        config.buckets.response_tokens,
        config.reward.max_dropped_fraction,
    )
    role, stops = one.role.role, set(trainer.pipeline.builder.processor.stop_ids)
    answers = experience.partner_texts if role == "perceiver" else experience.texts
    metrics["answer_tag"] = float(np.mean([has_answer_tag(t) for own in answers for t in own]))
    if role in IDLE:
        parsed = [p for group in experience.boxes for p in group]
        metrics["boxes/parsed"] = float(np.mean([p.well_formed for p in parsed]))
        metrics["boxes/count"] = float(np.mean([len(p.boxes) for p in parsed]))
        written = [o.tokens for own in experience.idle_outputs for o in own]
        cut = [not tokens or tokens[-1] not in stops for tokens in written]
        metrics["partner/truncated_fraction"] = float(np.mean(cut))
    metrics["completions"] = experience.completions.stopped.size
    metrics["max_new_tokens"] = one.role.max_new_tokens
    return metrics


ROWS = {
    "completions": "completions",
    "reward/mean": "reward",
    "reward/dropped_fraction": "could not be graded",
    "reward/zero_variance_groups": "groups whose rewards agree",
    "answer_tag": "answers in their tag",
    "boxes/parsed": "box lists well formed",
    "boxes/count": "boxes of a list",
    "reward/overlap_penalty": "lists with overlapping boxes",
    "reward/label_penalty": "lists with empty labels",
    "completion/length_mean": "tokens of a completion",
    "completion/truncated_fraction": "cut at max_new_tokens",
    "partner/truncated_fraction": "partner cut at its limit",
}
PLAIN = {"completions", "reward/mean", "boxes/count", "completion/length_mean"}
"""Those of `ROWS` that are not shown in per cent."""


def _reward_table(measured: dict[str, dict[str, float]]) -> Table:
    table = _table("a small batch of each phase, by the weights that the run begins with")
    table.add_column("")
    for name in measured:
        table.add_column(name, justify="right")
    for key, title in ROWS.items():
        values = [values.get(key) for values in measured.values()]
        table.add_row(title, *(_shown(key, value) for value in values))
    return table


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key not in PLAIN:
        return f"{value:.0%}"
    return f"{value}" if isinstance(value, int) else f"{value:.2f}"


def _warnings(name: str, values: dict[str, float]) -> Iterator[str]:
    if values["completion/truncated_fraction"] == 1:
        yield (
            f"phase {name}: every completion was cut at max_new_tokens = "
            f"{values['max_new_tokens']}: raise it, or look whether the model ends its answers"
        )
    if values.get("partner/truncated_fraction") == 1:
        yield (
            f"phase {name}: everything that the partner wrote was cut: raise partner_max_new_tokens"
        )
    if values["reward/zero_variance_groups"] == 1:
        yield (
            f"phase {name}: the rewards of every group agree, so this batch teaches nothing: look "
            "at the samples, whether answers are found in the texts and whether the questions are "
            "too easy or too hard"
        )


# --- pictures -------------------------------------------------------------------------------------


def _save_pictures(trainer: Trainer, one: Collected, folder: Path, name: str) -> None:
    """Of each question its boxes and crops as people see them, and the images of a prompt as the
    model does: read back from the patches, at the size they are resized to."""
    experience = one.experience
    chosen = [
        next((g for g, parsed in enumerate(group) if parsed.boxes), 0) for group in experience.boxes
    ]
    asked = experience.requests
    if one.role.role == "perceiver":  # Its own prompt has no evidence; its reasoner's has.
        asked = [own[g] for own, g in zip(experience.idle_requests, chosen, strict=True)]
    prompts = to_host(trainer.pipeline.builder.collate(asked, one.images))
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    vision = trainer.pipeline.builder.processor.config.vision
    for b, (loaded, g) in enumerate(zip(experience.rows, chosen, strict=True)):
        row = re.sub(r"[^\w.-]", "_", loaded.row.id)[:80]
        stem = f"{re.sub(r'[^a-z0-9]+', '_', name)}_{row}"
        boxes = experience.boxes[b][g].boxes
        contact_sheet(loaded.image, boxes).save(folder / f"{stem}.png")
        views = seen_images(prompts, b, vision.patch_size)
        sheet = Image.new(
            "RGB",
            (sum(v.width + 8 for v in views) - 8, max(v.height for v in views)),
            "white",
        )
        left = 0
        for view in views:
            sheet.paste(view, (left, 0))
            left += view.width + 8
        sheet.save(folder / f"{stem}_as_seen.png")


def seen_images(prompts: Prompts, row: int, patch: int) -> list[Image.Image]:
    """The images of one prompt, put together from its patches. prompts: on the host."""
    assert prompts.patches is not None
    number = np.asarray(prompts.patches.image_id[row])
    images = []
    for i in range(1, int(number.max()) + 1):
        own = number == i
        # [patch, channel, frame, row, column]; the frames of a still image are equal.
        cells = np.asarray(prompts.patches.pixels[row])[own].reshape(own.sum(), 3, -1, patch, patch)
        at = np.asarray(prompts.patches.row_col[row])[own]
        rows, columns = at.max(0) + 1
        canvas = np.zeros((rows, columns, patch, patch, 3), np.float32)
        canvas[at[:, 0], at[:, 1]] = cells[:, :, 0].transpose(0, 2, 3, 1)
        pixels = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)
        images.append(Image.fromarray(np.round((pixels + 1) * 127.5).clip(0, 255).astype(np.uint8)))
    return images
