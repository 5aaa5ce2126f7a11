"""`p2r sft`: runs both stages and writes the checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console

from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.hf import load_pretrained, save_pretrained
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
) -> None:
    """Train the tiny model from nothing and write it to `out` in Hugging Face layout.

    tower: folder of an earlier result whose vision tower is taken instead of the dense stage.
    Raises FileExistsError if `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder or delete it first")
    console = Console(highlight=False)
    dense = DenseConfig(seed=seed)
    if dense_steps is not None:
        dense = dataclasses.replace(dense, steps=dense_steps)
    joint = WarmStartConfig(seed=seed)
    if steps is not None:
        joint = dataclasses.replace(joint, steps=steps)
    source = VisualSearch("train", seed=seed)
    files = out.with_name(f".{out.name}.files")
    processor = write_tiny_files(source, files)
    model = Qwen3VL(processor.config, nnx.Rngs(seed))
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    console.print(f"{size:,} parameters, {len(processor.tokenizer)} tokens")
    times = {}
    mesh = make_mesh(data=-1, fsdp=1)
    begin = time.perf_counter()
    if tower is None:
        for row in train_tower(
            model.visual, processor.config, processor.sizes, source, dense, mesh
        ):
            console.print("dense " + _line(row))
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    else:
        nnx.update(model.visual, nnx.state(load_pretrained(tower, dtype="float32").visual))
    times["dense_seconds"] = round(time.perf_counter() - begin, 1)
    begin = time.perf_counter()
    builder = RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS)
    pools = make_pool(model, builder, source, joint)
    for row in train_roles(model, pools, joint, mesh):
        console.print("roles " + _line(row))
    times["joint_seconds"] = round(time.perf_counter() - begin, 1)
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    save_pretrained(model, out, files_from=files, dtype="float32")
    for file in files.iterdir():
        file.unlink()
    files.rmdir()
    made = {"dense": dataclasses.asdict(dense), "joint": dataclasses.asdict(joint)} | times
    (out / "made_by.json").write_text(json.dumps(made, indent=2) + "\n")
    console.print(f"wrote {out}")


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3g}" for k, v in row.items())
