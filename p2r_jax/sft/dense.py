"""Throw-away vision labels: what replaces pretrained weights in the embedded tiny model.

A tower trained only by next-token loss never finds the tiles (they fill 3 % of the patches). So
it is first taught, by linear heads that are thrown away, what lies in each visual token: colour
and shape of the tile centred there, where exactly, and on crops which character it carries. The
heads read the merged tokens and every DeepStack level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from PIL import Image, ImageDraw
from rich.progress import track

from p2r_jax.data.visual_search import SHAPES, VisualSearch
from p2r_jax.data.visual_search_glyphs import glyph_ink
from p2r_jax.parallel.mesh import batch_sharding, replicated
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.inputs import Patches, patch_layout
from p2r_jax.qwen3_vl.positions import Grid, patch_coordinates
from p2r_jax.qwen3_vl.processor import ImageSizes
from p2r_jax.qwen3_vl.vision import VisionTower
from p2r_jax.roles.boxes import OUTLINE_COLORS, line_width, outline_rectangle


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Dense vision pre-training."""

    steps: int = 1500
    images: int = 64
    """Images a step: half overviews, half crops."""
    pool: int = 8192
    """Rendered scenes to draw from."""
    learning_rate: float = 1.5e-3
    seed: int = 0


@dataclasses.dataclass
class Pool:
    """Rendered windows of all shapes, with labels per visual token (-1 = none)."""

    pixels: np.ndarray
    """uint8 [I, N, p*p*3], patches in merge-block order."""
    grids: list[Grid]
    labels: dict[str, np.ndarray]
    """colour, shape, glyph: int32 [I, M]."""
    position: np.ndarray
    """Centre of the tile in the window, 0..1, [I, M, 2] as (x, y)."""


def _outline(image: np.ndarray, tiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image with boxes around one or two tiles, as the reasoner's overview has them."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = len(image)
    for i, tile in enumerate(rng.permutation(tiles)[: rng.integers(1, 3)]):
        box = 50 * np.round(tile["box"] * 20 / size + rng.uniform(-0.5, 0.5, 4))
        rectangle = outline_rectangle(size, size, np.clip(box, 0, 1000))
        draw.rectangle(rectangle, outline=OUTLINE_COLORS[i], width=line_width(size))
    return np.asarray(picture)


def build_pool(source: VisualSearch, config: DenseConfig, processor: ImageSizes) -> Pool:
    """Even entries are overviews (a third annotated), odd ones crops at all aspects that a padded
    box around a tile can give, cut off at the border of the image, and at closer zooms as well:
    reading starts there."""
    rng = np.random.default_rng(config.seed)
    count, size, budget = config.pool, source.config.image_size, processor.max_patches
    names = ("colour", "shape", "glyph")
    pool = Pool(
        np.zeros((count, budget, processor.patch**2 * 3), np.uint8),
        [],
        {name: np.full((count, budget // processor.merge**2), -1, np.int32) for name in names},
        np.zeros((count, budget // processor.merge**2, 2), np.float32),
    )
    for i in track(range(count), description="rendering windows"):
        scene = source.render_scene(i // 2)
        image = scene.image
        if i % 2 == 0:
            left, top, right, bottom = 0, 0, size, size
            if rng.random() < 1 / 3:
                image = _outline(image, scene.tiles, rng)
        else:
            tile = scene.tiles[rng.integers(len(scene.tiles))]
            centre = (tile["box"][:2] + tile["box"][2:]) / 2 + rng.uniform(-0.03, 0.03, 2) * size
            half = 0.05 * 4 ** rng.random() * size * rng.uniform(0.88, 1.12, 2)
            window = np.clip(np.concatenate([centre - half, centre + half]), 0, size)
            left, top, right, bottom = (int(v) for v in window)
        height, width = processor.target_size(bottom - top, right - left)
        window_image = Image.fromarray(image[top:bottom, left:right])
        crop = np.asarray(window_image.resize((width, height), Image.Resampling.BICUBIC))
        grid = (height // processor.patch, width // processor.patch)
        pool.grids.append(grid)
        where = patch_coordinates(grid, processor.merge)
        patches = crop.reshape(grid[0], processor.patch, grid[1], processor.patch, 3)
        patches = patches.transpose(0, 2, 4, 1, 3)[where[:, 0], where[:, 1]]
        pool.pixels[i, : len(where)] = patches.reshape(len(where), -1)
        rows, columns = (side // processor.merge for side in grid)
        for tile in scene.tiles:
            box = tile["box"]
            x, y = ((box[:2] + box[2:]) / 2 - (left, top)) / (right - left, bottom - top)
            if not (0 <= x < 1 and 0 <= y < 1):
                continue
            token = int(y * rows) * columns + int(x * columns)
            for name in names:
                if name != "glyph" or i % 2:
                    pool.labels[name][i, token] = tile[name]
            pool.position[i, token] = x, y
    return pool


class Heads(nnx.Module):
    """One linear head per feature level and label; discarded after training."""

    def __init__(self, levels: int, width: int, outputs: dict[str, int], rngs: nnx.Rngs):
        self.kernels = nnx.Dict(
            {
                name: nnx.Param(
                    jax.random.normal(rngs.params(), (levels, width, size)) * width**-0.5
                )
                for name, size in outputs.items()
            }
        )

    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        return {n: jnp.einsum("lbme,leo->lbmo", features, k[...]) for n, k in self.kernels.items()}


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1)


def dense_loss(
    tower: VisionTower, heads: Heads, patches: Patches, labels: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed over levels (merged tokens weight 1, DeepStack .5); metrics of the merged tokens."""
    visual, deepstack = tower(patches)
    features = jnp.concatenate([visual[None], deepstack])
    out = heads(features)
    level_weight = jnp.asarray([1.0] + [0.5] * deepstack.shape[0])
    total, metrics = jnp.zeros(()), {}
    # The character's dots say more than its name: eight classes alone leave the tower at chance.
    dots, seen = labels["dots"], (labels["glyph"] >= 0).astype(jnp.float32)
    for level in range(features.shape[0]):
        loss = optax.sigmoid_binary_cross_entropy(out["dots"][level], dots).mean(-1)
        total += 4 * level_weight[level] * _masked_mean(loss, seen)
    metrics["dots"] = _masked_mean(((out["dots"][0] > 0) == (dots > 0)).mean(-1), seen)
    for name in ("colour", "shape", "glyph"):
        target = labels[name]
        known = (target >= 0).astype(jnp.float32)
        if name == "colour":  # the empty cell is a class of its own
            target, known = target + 1, 0.2 + 0.8 * known
        target = jnp.maximum(target, 0)
        for level in range(features.shape[0]):
            loss = optax.softmax_cross_entropy_with_integer_labels(out[name][level], target)
            total += level_weight[level] * _masked_mean(loss, known)
        right = (out[name][0].argmax(-1) == target).astype(jnp.float32)
        metrics[name] = _masked_mean(right, (labels[name] >= 0).astype(jnp.float32))
    present = (labels["colour"] >= 0).astype(jnp.float32)
    for level in range(features.shape[0]):
        error = jnp.abs(out["position"][level] - labels["position"]).sum(-1)
        total += 4 * level_weight[level] * _masked_mean(error, present)
        if level == 0:
            metrics["position_l1"] = _masked_mean(error, present)
    return total, metrics | {"loss": total}


def pool_patches(pool: Pool, pick: np.ndarray, config: Qwen3VLConfig) -> Patches:
    """One window a row, normalised as `ops.image.patchify` does."""
    vision = config.vision
    layout: dict[str, Any] = patch_layout([[pool.grids[i]] for i in pick], config, pool.pixels.shape[1])
    del layout["slot"]
    x = pool.pixels[pick].astype(np.float32) / np.float32(127.5) - 1
    x = x.reshape(*x.shape[:2], 3, 1, -1).repeat(vision.temporal_patch_size, axis=3)
    return Patches(pixels=x.reshape(*x.shape[:2], -1), **layout)


def train_tower(
    tower: VisionTower,
    config: Qwen3VLConfig,
    sizes: ImageSizes,
    source: VisualSearch,
    dense: DenseConfig,
    mesh: Mesh,
) -> Iterator[dict[str, Any]]:
    """Train `tower` in place; yields metrics every 50 steps."""
    pool = build_pool(source, dense, sizes)
    outputs = {
        "colour": len(source.config.colours) + 1,
        "shape": len(SHAPES),
        "glyph": len(source.config.glyphs),
        "position": 2,
        "dots": 35,
    }
    levels = 1 + len(config.vision.deepstack_visual_indexes)
    heads = Heads(levels, config.text.hidden_size, outputs, nnx.Rngs(dense.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, dense.learning_rate, 100, dense.steps, dense.learning_rate / 50
    )
    both = nnx.Dict(tower=tower, heads=heads)
    optimizer = nnx.Optimizer(
        both, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), wrt=nnx.Param
    )

    @nnx.jit
    def step(both, optimizer, patches, labels):
        def loss(both):
            return dense_loss(both.tower, both.heads, patches, labels)

        (_, metrics), grads = nnx.value_and_grad(loss, has_aux=True)(both)
        optimizer.update(both, grads)
        return metrics

    # Every device has a copy of the small tower and its share of the images.
    nnx.update(both, jax.device_put(nnx.state(both), replicated(mesh)))
    nnx.update(optimizer, jax.device_put(nnx.state(optimizer), replicated(mesh)))
    dots = np.stack([glyph_ink(g)[::2, ::2] for g in source.config.glyphs])
    dots = dots.reshape(len(dots), -1).astype(np.float32)
    rng = np.random.default_rng(dense.seed + 1)
    half = dense.images // 2
    for i in range(dense.steps):
        pick = rng.integers(0, dense.pool // 2, dense.images) * 2
        pick[half:] += 1
        rng.shuffle(pick)
        labels = {name: values[pick] for name, values in pool.labels.items()}
        labels["position"] = pool.position[pick]
        labels["dots"] = dots[labels["glyph"]]
        batch = jax.device_put((pool_patches(pool, pick, config), labels), batch_sharding(mesh))
        metrics = step(both, optimizer, *batch)
        if i % 50 == 49:
            yield {"step": i + 1} | {k: float(v) for k, v in metrics.items()}
