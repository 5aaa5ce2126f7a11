"""`p2r eval` and `p2r ask`: from command-line settings to answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from flax import nnx
from PIL import Image
from rich.console import Console

from p2r_jax.config import BucketConfig, EvalConfig
from p2r_jax.data.loader import ImageCache, evaluation_batches
from p2r_jax.data.rows import Row
from p2r_jax.data.sources import Source, load_source
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.evals.modes import Mode, parse_modes
from p2r_jax.evals.record_file import EvalWriter
from p2r_jax.evals.runner import Decoding, Seconds, evaluate
from p2r_jax.evals.scoring import format_table, summary_rows
from p2r_jax.parallel.mesh import for_decoding, make_mesh
from p2r_jax.parallel.multihost import is_main
from p2r_jax.paths import as_path
from p2r_jax.qwen3_vl.hf import ARRAYS, load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.answers import Verifier, require_verifier
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import share_of
from p2r_jax.roles.pipeline import (
    Pipeline,
    Result,
    default_buckets,
    default_prompt_set,
    greedy_schedule,
    perceive_and_reason,
)
from p2r_jax.roles.prompts import PromptSet, load_prompt_set
from p2r_jax.roles.render import contact_sheet
from p2r_jax.roles.requests import Buckets
from p2r_jax.roles.verifiers import ConfiguredVerifier, ModelVerifier, make_verifier


def run_evaluation(config: EvalConfig, verifier: Verifier | None = None) -> dict[str, Any]:
    """Evaluate, write OUT/eval/NAME.jsonl and .json, print the table; returns the summary.

    verifier: judges free text; default, what `config.verifier` says (`model`: the weights that are
    evaluated). A run folder is evaluated with the prompts and pixel budget it was trained with,
    unless `config` says otherwise.
    """
    console = Console(quiet=not is_main())
    config.validate()
    modes = parse_modes(config.modes)
    _check_unfinished(config)
    folder = locate_checkpoint(config.model)
    trained = _settings_of_run(as_path(config.model))
    preset = PRESETS[config.preset]
    processor = Processor.from_pretrained(
        folder,
        config.min_pixels or preset.get("min_pixels") or trained.get("min_pixels"),
        config.max_pixels or preset.get("max_pixels") or trained.get("max_pixels"),
    )
    source: Source
    if config.benchmark == "visual_search":
        source = VisualSearch(config.split, config.seed)
        side, limit = source.config.image_size, config.limit or 1000
    else:
        source = load_benchmark(config.benchmark, as_path(config.data))
        side, limit = 8192, config.limit or len(source)
    # A model that judges itself comes below; what else may be wrong shows before weights are read.
    judges_itself = verifier is None and config.verifier.kind == "model"
    if not judges_itself:
        if verifier is None:
            verifier = _checked(make_verifier(config.verifier), source)
        require_verifier(source.answer_forms, verifier)
    buckets = (
        default_buckets(processor.sizes, side, most_views(modes))
        if config.buckets is None
        else Buckets.of(config.buckets)
    )
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = load_pretrained(folder, mesh, config.dtype, config.kernels, progress=is_main())
    graph, params = nnx.split(model, nnx.Param)
    params = jax.device_put(params, for_decoding(params, mesh))
    named = config.prompts or trained.get("prompts") or default_prompt_set(processor.config)
    prompts = load_prompt_set(named)
    rings = tuple((config.buckets or BucketConfig()).response_tokens)
    schedule = greedy_schedule(config.batch, rings)
    pipeline = Pipeline.create(graph, processor, prompts, buckets, mesh, schedule, model.kernels)
    total = max(0, min(limit, len(source) - config.offset))
    if not total:
        raise ValueError(f"offset {config.offset} leaves no row of {len(source)}")
    if judges_itself:
        judge = ModelVerifier(pipeline)
        judge.weights = params
        verifier = _checked(judge, source)
    penalty = config.repetition_penalty or preset.get("repetition_penalty") or 1.0
    decoding = Decoding.of(
        config.perceiver_max_new_tokens,
        config.reasoner_max_new_tokens,
        config.direct_max_new_tokens,
        repetition_penalty=penalty,
        penalize_prompt=config.penalize_prompt,
        samples=config.samples,
        temperature=config.temperature if config.samples else 0.0,
    )
    depends_on = {
        "model": weights_fingerprint(folder),
        "dtype": config.dtype,
        "questions": questions_fingerprint(source, config.offset, total),
        "prompts": prompts_fingerprint(prompts),
        "pixel budget": [processor.sizes.min_pixels, processor.sizes.max_pixels],
        "decoding": json.loads(json.dumps(dataclasses.asdict(decoding))),
        "preset": config.preset,
        "seed": config.seed,
        "verifier": config.verifier.kind,
    }
    writer = EvalWriter(config.out, config.name, config.pictures, depends_on, config.resume)
    if writer.earlier:
        console.print(f"going on with {len(writer.earlier)} records", highlight=False)
    begin, seconds = time.perf_counter(), Seconds()
    cache = ImageCache(int(config.image_cache_gib * 2**30))
    records = evaluate(
        pipeline,
        params,
        lambda wanted: evaluation_batches(
            source,
            config.batch,
            total,
            config.offset,
            wanted=wanted,
            share=share_of(mesh),
            cache=cache,
        ),
        config.modes,
        decoding,
        total=total,
        seed=config.seed,
        grader=Grader(verifier),
        on_record=writer,
        earlier=writer.earlier,
        seconds=seconds,
        asked=as_published if config.preset == "authors" else as_ours,
    )
    summary = writer.finish(records)
    console.print(format_table(summary_rows(summary["modes"])), markup=False, highlight=False)
    made, took = len(records) - len(writer.earlier), time.perf_counter() - begin
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.by_stage.items())
    console.print(
        f"{made} answers in {took:.1f} s, {made / took:.2f} a second ({stages})", highlight=False
    )
    console.print(f"wrote {writer.folder / config.name}.jsonl", highlight=False, soft_wrap=True)
    return summary


PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},
    # P2R's evaluation script: 16 to 4096 visual tokens an image.
    "authors": {
        "min_pixels": 16 * 32**2,
        "max_pixels": 4096 * 32**2,
        "repetition_penalty": 1.05,
    },
}


def as_ours(row: Row) -> str:
    return row.question_with_options


def as_published(row: Row) -> str:
    """As the authors' code puts the question of this benchmark, if it is one that they evaluate."""
    return row.meta.get("asked", row.question_with_options)


def load_benchmark(name: str, data: Path) -> Source:
    """A file of rows, or a benchmark that was prepared under `data`. Raises SourceError saying how
    to prepare it."""
    if Path(name).suffix in (".jsonl", ".parquet") or as_path(name).exists():
        return load_source(name)
    return load_source(name, folder=data)


def most_views(modes: Sequence[Mode]) -> int:
    """Images that a prompt of these modes may hold."""
    crops = [mode.shown.crops for mode in modes if mode.boxes != "none"]
    return 1 + max(crops, default=0)


def _check_unfinished(config: EvalConfig) -> None:
    file = as_path(config.out) / "eval" / f"{config.name}.jsonl"
    if file.is_file() and not file.with_suffix(".json").is_file() and not config.resume:
        raise ValueError(
            f"{file} was not finished: go on with --resume true, choose another --name, or delete "
            "it to start again"
        )


def weights_fingerprint(folder: Path) -> str:
    """Of config.json and of the weights: sizes, and the first and last MiB of each file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors" or (file.is_file() and ARRAYS in file.parts):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder)} {size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(2**20))
                opened.seek(max(0, size - 2**20))
                digest.update(opened.read())
    return digest.hexdigest()[:16]


def questions_fingerprint(source: Source, offset: int, count: int) -> str:
    """Of ids, questions and answers of the rows that are asked; images are not read."""
    digest = hashlib.sha256()
    for i in range(offset, min(offset + count, len(source))):
        row = source[i]
        digest.update(repr((row.id, row.question_with_options, row.answer, row.boxes)).encode())
    return digest.hexdigest()[:16]


def prompts_fingerprint(prompts: PromptSet) -> str:
    wording = dataclasses.replace(prompts, name="")
    return hashlib.sha256(repr(wording).encode()).hexdigest()[:16]


def _checked(verifier: ConfiguredVerifier | None, source: Source) -> ConfiguredVerifier | None:
    """The verifier, which is known to judge if the source needs that."""
    if verifier is not None and "free_form" in source.answer_forms:
        verifier.check()
    return verifier


def _settings_of_run(run: Path) -> dict[str, Any]:
    """The `model` settings that a run folder was trained with; {} for any other folder."""
    file = run / "config.yaml"
    settings = yaml.safe_load(file.read_text()) if file.is_file() else None
    return settings.get("model", {}) if isinstance(settings, dict) else {}


def ask(
    model: str,
    image: Path,
    question: str,
    *,
    options: Sequence[str] = (),
    prompts: str | None = None,
    out: Path = Path("p2r_ask.png"),
    dtype: str = "float32",
    max_pixels: int | None = None,
) -> Result:
    """Answer one question; prints boxes, reasoning and answer, saves the picture to `out`."""
    folder = locate_checkpoint(model)
    if not image.is_file():
        raise FileNotFoundError(f"no image at {image}")
    try:
        pixels = np.asarray(Image.open(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow reports broken files through any of these, depending on the format.
        raise ValueError(f"{image} is not an image that Pillow can read: {error}") from error
    result = perceive_and_reason(
        load_pretrained(folder, dtype=dtype),
        pixels,
        question,
        options=options,
        processor=Processor.from_pretrained(folder, max_pixels=max_pixels),
        prompts=prompts,
    )
    console = Console(highlight=False, soft_wrap=True)
    if not result.boxes:
        console.print("boxes: none, the whole image was used")
    for box in result.boxes:
        corners = ", ".join(f"{v:g}" for v in box.bbox_2d)
        console.print(f"box: [{corners}] {box.label}", markup=False)
    console.print(f"reasoning: {result.reasoning}", markup=False)
    console.print(f"answer: {result.answer}", markup=False)
    contact_sheet(pixels, result.boxes).save(out)
    console.print(f"picture: {out}")
    return result
