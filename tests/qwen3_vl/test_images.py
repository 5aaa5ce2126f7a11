"""From pixels to logits on images that resizing treats specially: tiny ones and thin ones.

The reference is the image processor of transformers before its model; the port is what a rollout
uses: sizes on the host, pixels on the device.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from p2r_jax.ops.image import Views, render_patches
from p2r_jax.qwen3_vl import forward_hf
from p2r_jax.qwen3_vl.inputs import patch_layout
from p2r_jax.qwen3_vl.processor import ImageSizes
from tests.qwen3_vl.reference import GATE, LARGEST, make_batch, relative_l2, torch_logits

SIZES = [(9, 5), (10, 1500), (1500, 10)]
"""Height and width in pixels: below the minimum, one block high, one block wide."""


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    out = []
    for height, width in SIZES:
        coarse = rng.integers(0, 256, (height // 3 + 2, width // 3 + 2, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        out.append(np.asarray(smooth))
    return out


def on_the_device(images, targets, grids, config):
    """Patches, as `roles.requests` makes them."""
    count, side = len(images), max(max(image.shape[:2]) for image in images)
    stored = np.zeros((count, side, side, 3), np.uint8)
    for kept, image in zip(stored, images, strict=True):
        kept[: image.shape[0], : image.shape[1]] = image
    views = Views(
        image_index=np.arange(count)[None],
        crop=np.array([[(0, 0, image.shape[1], image.shape[0]) for image in images]]),
        target=np.array([targets]),
        outlines=np.zeros((1, count, 1, 4), int),
        outline_count=np.zeros((1, count), int),
        line_width=np.ones((1, count), int),
    )
    layout = patch_layout([grids], config, sum(h * w for h, w in grids))
    render = functools.partial(
        render_patches,
        canvas=tuple(np.max(targets, axis=0).tolist()),
        patch_size=config.vision.patch_size,
        temporal_patch_size=config.vision.temporal_patch_size,
    )
    sizes = np.array([image.shape[:2] for image in images])
    return np.asarray(
        jax.jit(render)(stored, sizes, views, layout["image_id"] - 1, layout["row_col"])[0]
    )


def test_tiny_and_thin_images_equal_the_reference(pair):
    images, config = pictures(), pair.model.config
    vision = config.vision
    block = vision.patch_size * vision.spatial_merge_size
    sizes = ImageSizes(vision.patch_size, vision.spatial_merge_size, 4 * block**2, 25 * block**2)
    process = Qwen2VLImageProcessorPil(
        size={"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = process(images=[Image.fromarray(image) for image in images], return_tensors="np")
    targets = [sizes.target_size(*image.shape[:2]) for image in images]
    grids = [sizes.grid(target) for target in targets]
    np.testing.assert_array_equal([(1, *grid) for grid in grids], expected["image_grid_thw"])
    pixels = on_the_device(images, targets, grids, config)
    levels = np.abs(pixels - expected["pixel_values"]) * 127.5
    print(f"grey levels: at most {levels.max():.2f}, mean {levels.mean():.1e}")
    assert levels.max() < 1.01
    assert levels.mean() <= 0.005

    row = (2, grids[0], 3, grids[1], 1, grids[2], 4)
    batch = dataclasses.replace(make_batch([row], vision.patch_dim), pixel_values=pixels)
    actual = np.asarray(forward_hf(pair.model, *batch.arguments()))
    reference = torch_logits(pair, batch)
    error, largest = relative_l2(actual, reference), np.abs(actual - reference).max()
    print(f"relative L2 {error:.1e}, largest difference {largest:.1e}")
    assert error <= GATE
    assert largest <= LARGEST
