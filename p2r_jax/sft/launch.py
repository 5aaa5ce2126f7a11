"""`p2r sft`: runs both stages and writes the checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.hf import load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import RequestBuilder
from p2r_jax.sft.dense import DenseConfig, train_tower
from p2r_jax.sft.warm_start import (
    BUCKETS,
    WarmStartConfig,
    make_pool,
    train_roles,
    write_tiny_files,
)


def make_warm_start(
    out: Path,
    *,
    seed: int = 0,
    dense_steps: int | None = None,
    steps: int | None = None,
    tower: str | None = None,
    taught_glyphs: str | None = None,
) -> None:
    """Train the tiny model from nothing and write it to `out` in Hugging Face layout.

    tower: folder of an earlier result, or `tiny` for the one inside this package, whose vision
    tower is taken; with `dense_steps` it is trained for so many more, without it the dense stage is
    left out. A tower of this run goes to `out`.tower as soon as it is trained. taught_glyphs: as
    `WarmStartConfig.taught_glyphs`.

    Raises FileExistsError if `out` exists, ValueError for characters that there are not, or if the
    devices cannot share a batch.
    """
    kept = out.with_name(f"{out.name}.tower")
    trains_tower = tower is None or bool(dense_steps)
    for folder in (out, kept) if trains_tower else (out,):
        if folder.exists():
            raise FileExistsError(f"{folder} exists: choose another --out or delete it first")
    console = Console(highlight=False)
    dense = DenseConfig(seed=seed) if dense_steps is None else DenseConfig(dense_steps, seed=seed)
    joint = WarmStartConfig(seed=seed) if steps is None else WarmStartConfig(steps, seed=seed)
    source = VisualSearch("train", seed=seed)
    if taught_glyphs is not None:
        if unknown := set(taught_glyphs) - set(source.config.glyphs):
            raise ValueError(
                f"--taught_glyphs: there is no {', '.join(sorted(unknown))} in the pictures, only "
                f"{source.config.glyphs}"
            )
        joint = dataclasses.replace(joint, taught_glyphs=taught_glyphs)
    mesh = make_mesh(data=-1, fsdp=1)
    for batch in (dense.images, joint.perceiver_batch, joint.reasoner_batch):
        if batch % mesh.size:
            raise ValueError(
                f"{mesh.size} devices cannot share a batch of {batch}: use 1 or 2 of them "
                "(CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS); the model is tiny"
            )
    asked = {"seed": seed, "dense_steps": dense_steps, "steps": steps, "tower": tower}
    asked |= {"taught_glyphs": taught_glyphs}
    options = [f"--{name} {value}" for name, value in asked.items() if value is not None]
    made: dict[str, Any] = {"command": " ".join(["p2r sft --out DIR", *options])}
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch)
        processor = write_tiny_files(source, files)
        model = Qwen3VL(processor.config, nnx.Rngs(seed))
        size = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        console.print(f"{size:,} parameters, {len(processor.tokenizer)} tokens")
        if tower is not None:
            taken = locate_checkpoint(tower)
            nnx.update(model.visual, nnx.state(load_pretrained(taken, dtype="float32").visual))
            earlier = taken / "made_by.json"
            if earlier.is_file():
                made["dense"] = json.loads(earlier.read_text()).get("dense")
        if trains_tower:
            stages = _stages(made.pop("dense", None))
            before = sum(stage["settings"]["steps"] for stage in stages)
            dense = dataclasses.replace(dense, before=before)
            rows = train_tower(model.visual, processor.config, processor.sizes, source, dense, mesh)
            stages.append(_follow(rows, "dense", dense, console))
            made["dense"] = stages if len(stages) > 1 else stages[0]
            _to_one_device(model)
            # Its own folder, so that the long stage need not be repeated (`--tower`).
            save_pretrained(model, kept, files_from=files, dtype="float32")
            (kept / "made_by.json").write_text(json.dumps(made, indent=2) + "\n")
        builder = RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS)
        pools = make_pool(model, builder, source, joint)
        made["joint"] = _follow(train_roles(model, pools, joint, mesh), "joint", joint, console)
        _to_one_device(model)
        save_pretrained(model, out, files_from=files, dtype="bfloat16")
    (out / "made_by.json").write_text(json.dumps(made, indent=2) + "\n")
    console.print(f"wrote {out}")


def _stages(dense: Any) -> list[Any]:
    """Of the tower's training, as made_by.json has it: a stage, or several in a row."""
    if dense is None:
        return []
    return dense if isinstance(dense, list) else [dense]


def _to_one_device(model: Qwen3VL) -> None:
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))


def _follow(
    rows: Iterator[dict[str, float]],
    stage: str,
    settings: DenseConfig | WarmStartConfig,
    console: Console,
) -> dict[str, Any]:
    """Run a stage to its end, showing progress and metrics; returns what to remember of it."""
    begin, row = time.perf_counter(), {}
    with Progress(console=console) as progress:
        task = progress.add_task(stage, total=settings.steps)
        for row in rows:
            progress.update(task, completed=row["step"])
            figures = "  ".join(f"{k} {v:.3g}" for k, v in row.items())
            console.print(f"{stage} {figures}", soft_wrap=True)
    return {
        "settings": dataclasses.asdict(settings),
        "last_metrics": {k: round(float(v), 4) for k, v in row.items()},
        "seconds": round(time.perf_counter() - begin, 1),
    }
