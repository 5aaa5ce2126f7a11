"""Throw-away vision labels: what replaces pretrained weights in the embedded tiny model.

A tower trained only by next-token loss never finds the tiles (they fill 3 % of the patches). So
it is first taught, by linear heads that are thrown away, what lies in each visual token: colour
and shape of the tile centred there, where exactly, and on crops which character it carries. The
heads read the merged tokens and every DeepStack level, each scaled as a decoder layer scales what
it reads: a tower trained without this writes positions into the lengths of its tokens, where the
language model does not find them. (With it and the corner heads joint training had 19 % hits after
100 steps and 56 % after 150, with neither 7 % and 9 %.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from PIL import Image, ImageDraw

from p2r_jax.data.visual_search import SHAPES, VisualSearch
from p2r_jax.data.visual_search_glyphs import glyph_ink
from p2r_jax.ops.outlines import OUTLINE_COLORS
from p2r_jax.parallel.mesh import batch_sharding, replicated
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.inputs import Patches, patch_layout
from p2r_jax.qwen3_vl.positions import Grid, patch_coordinates
from p2r_jax.qwen3_vl.processor import ImageSizes
from p2r_jax.qwen3_vl.vision import VisionTower
from p2r_jax.roles.boxes import line_width, outline_rectangle
from p2r_jax.sft.tiny import COORDINATE_STEP


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Dense vision pre-training."""

    steps: int = 4500
    images: int = 64
    """Windows a step, never shown twice: a tower this size memorises thousands of them, and then
    reads the characters of those and no others."""
    learning_rate: float = 1.5e-3
    seed: int = 0
    before: int = 0
    """Steps that the tower was trained for already: it goes on with the windows after those, as
    far away as they were at the end. The heads are new."""


@dataclasses.dataclass
class Windows:
    """A batch of rendered windows of all shapes, with labels per visual token (-1 = none)."""

    pixels: np.ndarray
    """uint8 [I, N, 3*p*p], patches in merge-block order."""
    grids: list[Grid]
    labels: dict[str, np.ndarray]
    """colour, shape, glyph: int32 [I, M]; corners, of overviews only: int32 [I, M, 4], the tile's
    left, top, right and bottom in coordinate steps."""
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


WINDOWS_PER_SCENE = 4
CLOSEST_AT_END = 0.6
"""How far the closest zooms have been left behind when training ends."""
COORDINATES = 1000 // COORDINATE_STEP
"""Coordinate steps across an image."""


def render_windows(
    source: VisualSearch,
    first: int,
    count: int,
    sizes: ImageSizes,
    rng: np.random.Generator,
    closest: float = 0.0,
) -> Windows:
    """`count` windows of the scenes from `first` on: of each scene one overview (a third of them
    annotated), then crops at all aspects that a padded box around a tile can give, cut off at the
    border of the image. `closest`: 0 for closer zooms as well, since reading starts there; at 0.6
    all are as wide as a perceiver's crops."""
    size, budget = source.config.image_size, sizes.max_patches
    tokens = budget // sizes.merge**2
    names = ("colour", "shape", "glyph")
    labels = {name: np.full((count, tokens), -1, np.int32) for name in names}
    labels["corners"] = np.full((count, tokens, 4), -1, np.int32)
    out = Windows(
        np.zeros((count, budget, sizes.patch**2 * 3), np.uint8),
        [],
        labels,
        np.zeros((count, tokens, 2), np.float32),
    )
    for i in range(count):
        is_crop = i % WINDOWS_PER_SCENE > 0
        if not is_crop:
            scene = source.render_scene(first + i // WINDOWS_PER_SCENE)
            image = scene.image
            left, top, right, bottom = 0, 0, size, size
            if rng.random() < 1 / 3:
                image = _outline(image, scene.tiles, rng)
        else:
            image = scene.image
            tile = scene.tiles[rng.integers(len(scene.tiles))]
            centre = (tile["box"][:2] + tile["box"][2:]) / 2 + rng.uniform(-0.03, 0.03, 2) * size
            half = 0.05 * 4 ** rng.uniform(closest, 1) * size * rng.uniform(0.88, 1.12, 2)
            window = np.clip(np.concatenate([centre - half, centre + half]), 0, size)
            left, top, right, bottom = (int(v) for v in window)
        height, width = sizes.target_size(bottom - top, right - left)
        cut = Image.fromarray(image[top:bottom, left:right])
        crop = np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC))
        grid = (height // sizes.patch, width // sizes.patch)
        out.grids.append(grid)
        where = patch_coordinates(grid, sizes.merge)
        patches = crop.reshape(grid[0], sizes.patch, grid[1], sizes.patch, 3)
        patches = patches.transpose(0, 2, 4, 1, 3)[where[:, 0], where[:, 1]]
        out.pixels[i, : len(where)] = patches.reshape(len(where), -1)
        rows, columns = (side // sizes.merge for side in grid)
        for tile in scene.tiles:
            box = tile["box"]
            x, y = ((box[:2] + box[2:]) / 2 - (left, top)) / (right - left, bottom - top)
            if not (0 <= x < 1 and 0 <= y < 1):
                continue
            token = int(y * rows) * columns + int(x * columns)
            for name in names:
                if name != "glyph" or is_crop:
                    labels[name][i, token] = tile[name]
            out.position[i, token] = x, y
            if not is_crop:
                labels["corners"][i, token] = np.round(box / size * COORDINATES)
    return out


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
    features *= jax.lax.rsqrt(jnp.square(features).mean(-1, keepdims=True) + 1e-6)
    out = heads(features)
    level_weight = jnp.asarray([1.0] + [0.5] * deepstack.shape[0])
    metrics: dict[str, jax.Array] = {}

    def over_levels(losses: jax.Array, known: jax.Array) -> jax.Array:
        """losses: [levels, I, M, ...]; mean over where `known` [I, M, ...], weighted by level."""
        means = jax.vmap(_masked_mean, in_axes=(0, None))(losses, known)
        return (means * level_weight).sum()

    def classify(name: str, logits: jax.Array, target: jax.Array, known: jax.Array) -> jax.Array:
        target = jnp.broadcast_to(jnp.maximum(target, 0), logits.shape[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        right = (logits[0].argmax(-1) == target[0]).astype(jnp.float32)
        metrics[name] = _masked_mean(right, labels[name] >= 0)
        return over_levels(losses, known)

    # The character's dots say more than its name: eight classes alone leave the tower at chance.
    dots, read = labels["dots"], labels["glyph"] >= 0
    wrong_dots = optax.sigmoid_binary_cross_entropy(
        out["dots"], jnp.broadcast_to(dots, out["dots"].shape)
    )
    total = 4 * over_levels(wrong_dots.mean(-1), read)
    metrics["dots"] = _masked_mean(((out["dots"][0] > 0) == (dots > 0)).mean(-1), read)

    present = labels["colour"] >= 0
    # The empty cell is a colour of its own.
    total += classify("colour", out["colour"], labels["colour"] + 1, 0.2 + 0.8 * present)
    for name in ("shape", "glyph"):
        total += classify(name, out[name], labels[name], labels[name] >= 0)
    corners = out["corners"].reshape(*out["corners"].shape[:-1], 4, COORDINATES + 1)
    total += 2 * classify("corners", corners, labels["corners"], labels["corners"] >= 0)
    distance = jnp.abs(out["position"] - labels["position"]).sum(-1)
    total += 4 * over_levels(distance, present)
    metrics["position_l1"] = _masked_mean(distance[0], present)
    return total, metrics | {"loss": total}


def window_patches(windows: Windows, config: Qwen3VLConfig) -> Patches:
    """One window a row, normalised as `ops.image.patchify` does."""
    layout = patch_layout([[grid] for grid in windows.grids], config, windows.pixels.shape[1])
    x = windows.pixels.astype(np.float32) / np.float32(127.5) - 1
    x = x.reshape(*x.shape[:2], 3, 1, -1).repeat(config.vision.temporal_patch_size, axis=3)
    return Patches(pixels=jnp.asarray(x.reshape(*x.shape[:2], -1)), **layout)


def train_tower(
    tower: VisionTower,
    config: Qwen3VLConfig,
    sizes: ImageSizes,
    source: VisualSearch,
    dense: DenseConfig,
    mesh: Mesh,
) -> Iterator[dict[str, Any]]:
    """Train `tower` in place; yields metrics (of windows not trained on before) every 50 steps."""
    outputs = {
        "colour": len(source.config.colours) + 1,
        "shape": len(SHAPES),
        "glyph": len(source.config.glyphs),
        "position": 2,
        "corners": 4 * (COORDINATES + 1),
        "dots": 35,
    }
    levels = 1 + len(config.vision.deepstack_visual_indexes)
    heads = Heads(levels, config.text.hidden_size, outputs, nnx.Rngs(dense.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        dense.learning_rate,
        min(100, dense.steps // 2),
        dense.steps,
        dense.learning_rate / 50,
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
    rng = np.random.default_rng(dense.seed + 1 + dense.before)
    scenes = dense.images // WINDOWS_PER_SCENE

    def batch(i: int) -> tuple[Patches, dict[str, np.ndarray]]:
        closest = CLOSEST_AT_END * (1.0 if dense.before else i / dense.steps)
        first = (dense.before + i) * scenes
        windows = render_windows(source, first, dense.images, sizes, rng, closest)
        labels = windows.labels | {"position": windows.position}
        return window_patches(windows, config), labels | {"dots": dots[labels["glyph"]]}

    recent: list[dict[str, jax.Array]] = []
    with ThreadPoolExecutor(1) as ahead:  # one step ahead; one thread, so that order is fixed
        coming = ahead.submit(batch, 0)
        for i in range(dense.steps):
            now = coming.result()
            coming = ahead.submit(batch, i + 1)
            recent.append(step(both, optimizer, *jax.device_put(now, batch_sharding(mesh))))
            if i % 50 == 49:
                means = {k: float(np.mean([r[k] for r in recent])) for k in recent[0]}
                yield {"step": i + 1} | means
                recent = []
