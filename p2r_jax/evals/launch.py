"""`p2r eval` and `p2r ask`: from command-line settings to answers."""

from __future__ import annotations

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
from p2r_jax.data.loader import evaluation_batches
from p2r_jax.data.sources import Source, load_source
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.evals.runner import Decoding, EvalWriter, check_modes, evaluate
from p2r_jax.evals.scoring import format_table, summary_rows
from p2r_jax.parallel.mesh import for_decoding, make_mesh
from p2r_jax.qwen3_vl.hf import load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.answers import Verifier, require_verifier
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.pipeline import (
    Pipeline,
    Result,
    default_buckets,
    default_prompt_set,
    greedy_schedule,
    perceive_and_reason,
)
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.render import contact_sheet
from p2r_jax.roles.requests import Buckets
from p2r_jax.roles.verifiers import ConfiguredVerifier, ModelVerifier, make_verifier


def run_evaluation(config: EvalConfig, verifier: Verifier | None = None) -> dict[str, Any]:
    """Evaluate, write OUT/eval/NAME.jsonl and .json, print the table; returns the summary.

    verifier: judges free text; default, what `config.verifier` says (`model`: the weights that are
    evaluated). A run folder is evaluated with the prompts and pixel budget it was trained with,
    unless `config` says otherwise.
    """
    console = Console()
    config.validate()
    check_modes(config.modes)
    folder = locate_checkpoint(config.model)
    trained = _settings_of_run(Path(config.model))
    processor = Processor.from_pretrained(
        folder,
        config.min_pixels or trained.get("min_pixels"),
        config.max_pixels or trained.get("max_pixels"),
    )
    source: Source
    if config.benchmark == "visual_search":
        source = VisualSearch(config.split, config.seed)
        side, limit = source.config.image_size, config.limit or 1000
    else:
        source = load_source(config.benchmark)
        side, limit = 8192, config.limit or len(source)
    # A model that judges itself comes below; what else may be wrong shows before weights are read.
    judges_itself = verifier is None and config.verifier.kind == "model"
    if not judges_itself:
        if verifier is None:
            verifier = _checked(make_verifier(config.verifier), source)
        require_verifier(source.answer_forms, verifier)
    buckets = (
        default_buckets(processor.sizes, side)
        if config.buckets is None
        else Buckets.of(config.buckets)
    )
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = load_pretrained(folder, mesh, config.dtype, config.kernels, progress=True)
    graph, params = nnx.split(model, nnx.Param)
    params = jax.device_put(params, for_decoding(params, mesh))
    named = config.prompts or trained.get("prompts") or default_prompt_set(processor.config)
    prompts = load_prompt_set(named)
    rings = tuple((config.buckets or BucketConfig()).response_tokens)
    schedule = greedy_schedule(config.batch, rings)
    pipeline = Pipeline.create(graph, processor, prompts, buckets, mesh, schedule)
    total = max(0, min(limit, len(source) - config.offset))
    if not total:
        raise ValueError(f"offset {config.offset} leaves no row of {len(source)}")
    if judges_itself:
        judge = ModelVerifier(pipeline)
        judge.weights = params
        verifier = _checked(judge, source)
    writer = EvalWriter(Path(config.out), config.name, config.pictures)
    records = evaluate(
        pipeline,
        params,
        evaluation_batches(source, config.batch, total, config.offset),
        config.modes,
        Decoding.greedy(
            config.perceiver_max_new_tokens,
            config.reasoner_max_new_tokens,
            config.direct_max_new_tokens,
            config.repetition_penalty,
            config.penalize_prompt,
        ),
        total=total,
        seed=config.seed,
        grader=Grader(verifier),
        on_record=writer,
    )
    summary = writer.finish(records)
    console.print(format_table(summary_rows(summary["modes"])), markup=False, highlight=False)
    console.print(f"wrote {writer.folder / config.name}.jsonl", highlight=False, soft_wrap=True)
    return summary


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
