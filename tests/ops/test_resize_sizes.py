"""Whole images of thirty sizes, up to 8K, resized to what the model reads: against Pillow.

The targets are those of the real pixel budgets. Every source is the top left corner of one picture:
a single compiled program serves them all, and pixels beside the source are there to leak in.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from p2r_jax.ops import image as ops
from p2r_jax.qwen3_vl.processor import ImageSizes
from tests.ops.test_image import PILLOW_TURNS, pillow_crop_resize, scene

BUDGETS = {
    "training": ImageSizes(patch=16, merge=2, min_pixels=4096, max_pixels=2_097_152),
    "evaluation": ImageSizes(patch=16, merge=2, min_pixels=16_384, max_pixels=4_194_304),
    "default": ImageSizes(patch=16, merge=2, min_pixels=65_536, max_pixels=16_777_216),
}
SIZES = [
    # 8K, lying and standing
    (4320, 7680, "training"),
    (4320, 7680, "evaluation"),
    (4320, 7680, "default"),
    (7680, 4320, "training"),
    (7680, 4320, "evaluation"),
    (7680, 4320, "default"),
    (7680, 7680, "evaluation"),
    (2400, 7680, "training"),
    (7680, 2400, "evaluation"),
    # down
    (5250, 7000, "training"),
    (6000, 4000, "evaluation"),
    (2160, 3840, "training"),
    (3840, 2160, "evaluation"),
    (3000, 4000, "training"),
    (1500, 2250, "training"),
    # one axis up, the other down or unchanged
    (2160, 3840, "default"),
    (1080, 1920, "training"),
    (1007, 1425, "training"),
    (705, 530, "evaluation"),
    # up
    (333, 500, "default"),
    (31, 31, "default"),
    (20, 30, "training"),
    (20, 30, "evaluation"),
    (60, 100, "default"),
    (100, 60, "default"),
    # aspects of up to 1 : 200
    (10, 1500, "training"),
    (10, 1500, "evaluation"),
    (1500, 10, "default"),
    (27, 5400, "training"),
    (5400, 27, "training"),
]
SOURCE, CANVAS = 7680, 5440


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    tile = scene(320, 320)
    return np.tile(tile, (SOURCE // 320, SOURCE // 320, 1))


@pytest.fixture(scope="module")
def resize(picture):
    """(crop, target) → canvas, compiled once."""
    uploaded = jax.device_put(picture)
    order = "pillow" if PILLOW_TURNS else "width_first"
    program = jax.jit(partial(ops.crop_resize, canvas=(CANVAS, CANVAS), pass_order=order))
    yield partial(program, uploaded)
    assert program._cache_size() == 1


@pytest.mark.parametrize("height, width, budget", SIZES)
def test_an_image_of_any_size_is_resized_as_by_pillow(picture, resize, height, width, budget):
    """Within one level, but for one value in 100,000 where an axis grows: there an exact half that
    the first pass rounds the other way is stretched by the second, beside the border."""
    target = BUDGETS[budget].target_size(height, width)
    crop = (0, 0, width, height)
    resized = np.asarray(resize(np.int32(crop), np.int32(target)))[: target[0], : target[1]]
    difference = np.abs(resized - pillow_crop_resize(picture, crop, target).astype(np.int16))
    assert difference.mean() <= 0.005
    if target[0] <= height and target[1] <= width:
        assert difference.max() <= 1
    else:
        assert difference.max() <= 2
        assert np.count_nonzero(difference > 1) <= max(1, difference.size // 100_000)


def test_there_are_thirty_sizes_that_shrink_grow_and_do_both():
    assert len(set(SIZES)) == 30
    changes = set()
    for height, width, budget in SIZES:
        target = BUDGETS[budget].target_size(height, width)
        changes.add((np.sign(target[0] - height), np.sign(target[1] - width)))
    assert changes >= {(-1, -1), (1, 1), (1, -1), (-1, 1), (1, 0)}
