"""What the tests of dry runs share: four rows with an image file each, and a run over them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL import Image

from p2r_jax import config as cfg
from p2r_jax.data.visual_search import VisualSearch
from tests.rl.tiny_run import PROMPTS, make_config

SIDES = [(384, 384), (384, 200), (150, 384), (300, 260)]
"""Heights and widths of the images; their prompts differ in length."""
BUCKETS = cfg.BucketConfig(patches=[320], prompt_tokens=[128], canvas=[448], image=[384])
"""Large enough for three crops."""


def write_rows(folder: Path, **changes: Any) -> Path:
    """A batch. changes: fields of all rows."""
    source, lines = VisualSearch(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(SIDES):
        row = source[i]
        picture = Image.fromarray(row.load_image()[:height, :width])
        picture.save(folder / "images" / f"{i}.png")
        record = {"id": f"row {i}", "image": f"images/{i}.png", "question": row.question}
        record |= {"answer": row.answer, "answer_form": "mca", "options": list(row.options)}
        lines.append(json.dumps(record | changes))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def settings(run: Path, model: Path, data: Path, **changes: Any) -> cfg.TrainConfig:
    """A step of each role, of all rows."""
    config = make_config(run, model)
    fields: dict[str, Any] = {
        "buckets": BUCKETS,
        "phases": [dataclasses.replace(phase, steps=1) for phase in config.phases],
        "data": cfg.DataConfig(train=str(data), validation=str(data)),
        "log": cfg.LogConfig(tensorboard=False, sample_prompts=PROMPTS),
        "eval": dataclasses.replace(config.eval, every=0, final_modes=["p2r"], modes=["p2r"]),
        "export": False,
    }
    return dataclasses.replace(config, **fields | changes)
