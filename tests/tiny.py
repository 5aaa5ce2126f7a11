"""The embedded tiny model with random weights: its whole folder, as `p2r sft` would write it.

It stands in for trained weights wherever what the model says does not matter; it babbles.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.hf import abstract_model, save_pretrained
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.sft.warm_start import write_tiny_files


def write_files(folder: Path) -> Path:
    """Tokenizer, config and processor files, without weights."""
    write_tiny_files(VisualSearch(), folder)
    return folder


def random_model(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VL:
    """Weights from NumPy: a model's own initialisation compiles a program per shape."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_model(config))

    def draw(path, leaf):
        centre, scale = (1.0, 0.1) if "scale" in jax.tree_util.keystr(path) else (0.0, 0.08)
        return jnp.asarray(centre + scale * rng.normal(size=leaf.shape), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def write_checkpoint(folder: Path, files: Path, seed: int = 0) -> Path:
    """A checkpoint folder with random weights, float32."""
    model = random_model(Qwen3VLConfig.from_pretrained(files), seed)
    save_pretrained(model, folder, files_from=files, dtype="float32")
    return folder
