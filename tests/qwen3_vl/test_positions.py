"""Positions of patches and tokens, against worked examples and the reference's helpers."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf_module
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.layers import inverse_frequencies
from p2r_jax.qwen3_vl.positions import (
    mrope_axes,
    patch_coordinates,
    position_interpolation,
    rope_positions,
)
from p2r_jax.qwen3_vl.published import FOLDER
from p2r_jax.qwen3_vl.text import rotary_angles
from tests.qwen3_vl.reference import IMAGE, prompts_of, scenario
from tests.rounding import worst

GRIDS = [(2, 2), (2, 6), (4, 6), (28, 28), (48, 50), (96, 20), (66, 120)]


class TestRotaryAxes:
    """T 0, H 1, W 2: interleaved in threes until height and width have had their share."""

    def test_published_models(self):
        axes = mrope_axes((24, 20, 20))
        assert axes.tolist() == [0, 1, 2] * 20 + [0, 0, 0, 0]
        # Numerically invisible (those frequencies are about 4e-7), hence exact: without the cut,
        # 61 would be height and 62 width.
        assert axes[60:64].tolist() == [0, 0, 0, 0]
        assert np.bincount(axes).tolist() == [24, 20, 20]

    def test_short_sections(self):
        assert mrope_axes((4, 2, 2)).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
        assert mrope_axes((3, 3, 2)).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_patches_are_listed_block_by_block():
    assert patch_coordinates((4, 4), 2).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1],
        [0, 2], [0, 3], [1, 2], [1, 3],
        [2, 0], [2, 1], [3, 0], [3, 1],
        [2, 2], [2, 3], [3, 2], [3, 3],
    ]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_patch_coordinates_equal_the_reference(grid):
    expected = get_vision_position_ids(torch.tensor([[1, *grid]]), 2).numpy()
    np.testing.assert_array_equal(patch_coordinates(grid, 2), expected)


@pytest.mark.parametrize("side", [48, 7])
@pytest.mark.parametrize("grid", GRIDS)
def test_position_interpolation_equals_the_reference(grid, side):
    expected_index, expected_weight = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]),
        num_grid_per_side=side,
        align_corners=True,
        spatial_merge_size=2,
    )
    index, weight = position_interpolation(patch_coordinates(grid, 2), np.array(grid), side)
    np.testing.assert_array_equal(index, expected_index)
    # A float32 position between 32 and 47 is rounded to 2**-18; here and there the other way.
    np.testing.assert_allclose(weight, expected_weight, atol=2**-18)
    assert (np.abs(np.asarray(weight) - expected_weight.numpy()) > 1e-6).mean() < 0.01


def test_corners_of_the_position_table_align_with_corners_of_the_image():
    grid = (4, 6)
    index, weight = position_interpolation(patch_coordinates(grid, 2), np.array(grid), 48)
    read = {int(i) for i, w in zip(index[0], weight[0], strict=True) if w > 0}
    assert read == {0}
    read = {int(i) for i, w in zip(index[-1], weight[-1], strict=True) if w > 0}
    assert read == {48 * 48 - 1}
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-6)


class TestTokenPositions:
    def test_worked_example(self):
        """Two text tokens, an image of 2 x 3 visual tokens, two text tokens."""
        tokens = np.array([5, 6, *[IMAGE] * 6, 7, 8])
        positions, following = rope_positions(tokens, [(4, 6)], IMAGE, 2)
        assert positions.tolist() == [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
        ]
        assert following == 7

    def test_an_image_of_448_pixels_saves_182_positions(self):
        tokens = np.array([1, *[IMAGE] * 196, 2])
        _, following = rope_positions(tokens, [(28, 28)], IMAGE, 2)
        assert following - len(tokens) == -182

    def test_text_alone_counts(self):
        positions, following = rope_positions(np.arange(5), [], IMAGE, 2)
        assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
        assert following == 5

    def test_nothing(self):
        positions, following = rope_positions(np.array([], int), [], IMAGE, 2)
        assert positions.shape == (3, 0)
        assert following == 0

    @pytest.mark.parametrize(
        "tokens, grids, message",
        [
            ([1, IMAGE, 2], [], "more image placeholders"),
            ([1, 2], [(2, 2)], "have no placeholders"),
            ([1, IMAGE, 2], [(2, 4)], "1x2 visual tokens does not match"),
            ([1, IMAGE, 2, IMAGE], [(2, 4)], "does not match"),
            ([1, IMAGE, IMAGE], [(2, 2)], "more image placeholders"),
        ],
    )
    def test_images_that_do_not_match_their_placeholders_are_refused(self, tokens, grids, message):
        with pytest.raises(ValueError, match=message):
            rope_positions(np.array(tokens), grids, IMAGE, 2)

    @pytest.mark.parametrize("name", ["text", "images of mixed sizes", "left padding"])
    def test_positions_and_continuation_equal_the_reference(self, pair, name):
        batch = scenario(name, pair.patch_dim)
        inputs = batch.torch()
        expected, delta = pair.torch_model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        prompts = prompts_of(pair, batch)
        np.testing.assert_array_equal(prompts.positions, expected)
        following = batch.attention_mask.sum(1) + delta[:, 0].numpy()
        np.testing.assert_array_equal(prompts.next_position, following)


@pytest.mark.parametrize("theta, count", [(5e6, 64), (1e6, 64), (1e4, 18), (1e4, 16)])
def test_frequencies_equal_the_reference(theta, count):
    """Its float32 power may be a unit in the last place off, on some processors; ours is right.
    `theta ** -x` would be off for a third of them."""
    ours = inverse_frequencies(theta, count)
    exponents = torch.arange(0, 2 * count, 2, dtype=torch.int64).float() / (2 * count)
    reference = (1.0 / theta**exponents).numpy()
    np.testing.assert_array_max_ulp(ours, reference, maxulp=1)
    assert (ours == reference).mean() > 0.9
    exact = torch.tensor(theta, dtype=torch.float64) ** exponents.double()
    np.testing.assert_array_equal(ours, (1.0 / exact.float()).numpy())


@pytest.mark.parametrize("furthest", [100, 1000])
def test_angles_equal_the_reference_far_into_a_prompt(furthest):
    """A frequency below 1 that is a unit off is one at a position as far as this, and the product
    of both is rounded once more: where angles are largest, by another one."""
    file = FOLDER / "config_8B.json"
    raw = json.loads(file.read_text())
    config = Qwen3VLConfig.from_hf(raw).text
    rotary = hf_module.Qwen3VLTextRotaryEmbedding(transformers.Qwen3VLConfig(**raw).text_config)
    positions = np.random.default_rng(0).integers(0, furthest, (3, 1, 200))
    expected = rotary(torch.zeros(1), torch.tensor(positions))
    actual = rotary_angles(config, jnp.asarray(positions))
    for ours, reference in zip(actual, expected, strict=True):
        gate = 2 * np.spacing(np.float32(furthest)) + worst(4)
        np.testing.assert_allclose(ours[..., 0, :], reference, rtol=0, atol=gate)
