"""Configs of the published checkpoints: all that planning and benchmarks need of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.locate import locate_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "qwen3_vl"
SIZES = ("2B", "4B", "8B", "32B")


def published(size: str) -> dict[str, Any]:
    """`config.json` of Qwen3-VL-{size}-Instruct as published."""
    return json.loads((FOLDER / f"config_{size}.json").read_text())


def config_of(name: str) -> Qwen3VLConfig:
    """Of a checkpoint folder or, where there is none, of the published size in its name
    ("Qwen3-VL-4B-Instruct"). Raises FileNotFoundError saying what was tried."""
    try:
        return Qwen3VLConfig.from_pretrained(locate_checkpoint(name))
    except FileNotFoundError as error:
        for size in SIZES:
            if re.search(rf"(?<![0-9A-Z.]){size}(?![0-9A-Z])", str(name).upper()):
                return Qwen3VLConfig.from_hf(published(size))
        raise FileNotFoundError(
            f"{error}. Without files the sizes {', '.join(SIZES)} are known, by names such as "
            "Qwen3-VL-4B-Instruct"
        ) from error
