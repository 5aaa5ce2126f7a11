"""Model inputs: padded arrays in which image sizes are data and only budgets are shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r_jax.parallel.mesh import batch_sharding, make_mesh
from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.inputs import Patches, patch_layout, pixel_values, token_layout
from p2r_jax.qwen3_vl.model import prompts_from_hf
from p2r_jax.qwen3_vl.positions import patch_coordinates, position_interpolation
from tests.qwen3_vl.reference import IMAGE, hf_config, make_batch

CONFIG = Qwen3VLConfig.from_hf(hf_config("uneven"))


class TestPatchLayout:
    def test_images_follow_each_other_and_padding_comes_last(self):
        out = patch_layout([[(2, 4), (4, 2)], [], [(2, 2)]], CONFIG, num_patches=20)
        assert out["image_id"].tolist() == [
            [1] * 8 + [2] * 8 + [0] * 4,
            [0] * 20,
            [1] * 4 + [0] * 16,
        ]
        assert out["row_col"][0, 8:16].max(0).tolist() == [3, 1]
        assert out["row_col"][0, 16:].tolist() == [[0, 0]] * 4

    def test_padding_reads_no_position_embedding(self):
        out = patch_layout([[(2, 4)]], CONFIG, num_patches=12)
        np.testing.assert_allclose(out["pos_weight"][0, :8].sum(-1), 1, atol=1e-6)
        assert not out["pos_weight"][0, 8:].any()

    def test_a_row_over_budget_names_itself_and_the_remedy(self):
        with pytest.raises(ValueError, match=r"row 1 has 12 patches.*budget of 8.*max_pixels"):
            patch_layout([[(2, 4)], [(2, 4), (2, 2)]], CONFIG, num_patches=8)

    @given(st.lists(st.lists(st.tuples(*[st.integers(1, 5)] * 2), max_size=5), min_size=1))
    @settings(max_examples=30, deadline=None)
    def test_each_image_is_laid_out_as_if_it_were_alone(self, halves):
        """The device makes from grids what `patch_coordinates` lists, and reads no budget."""
        grids = [[(2 * h, 2 * w) for h, w in row] for row in halves]
        out = jax.device_get(patch_layout(grids, CONFIG, num_patches=512))
        side = CONFIG.vision.position_grid
        for row, own in enumerate(grids):
            start = 0
            for number, grid in enumerate(own):
                here = slice(start, start + grid[0] * grid[1])
                start = here.stop
                expected = patch_coordinates(grid, 2)
                index, weight = position_interpolation(expected, np.array(grid), side)
                assert (out["image_id"][row, here] == number + 1).all()
                np.testing.assert_array_equal(out["row_col"][row, here], expected)
                np.testing.assert_array_equal(out["pos_index"][row, here], index)
                np.testing.assert_allclose(out["pos_weight"][row, here], weight, atol=1e-6)
            for name, empty in out.items():
                if name != "pos_index":
                    assert not empty[row, start:].any()

    def test_a_grid_that_is_no_whole_blocks_names_itself(self):
        with pytest.raises(ValueError, match="4x3 patches does not divide into blocks of 2x2"):
            patch_layout([[(4, 4)], [(4, 3)]], CONFIG, num_patches=64)

    def test_it_lies_where_it_is_asked_to(self):
        where = batch_sharding(make_mesh(1, 2, 2, jax.devices()[:4]))
        out = patch_layout([[(2, 4)], [(2, 2)]], CONFIG, 8, where)
        assert {name: x.sharding for name, x in out.items()} == dict.fromkeys(out, where)

    def test_a_row_may_fill_its_budget(self):
        assert patch_layout([[(2, 4)]], CONFIG, num_patches=8)["image_id"].all()


class TestTokenLayout:
    TOKENS = np.array([1, IMAGE, IMAGE, 2, IMAGE, 3])
    GRIDS = ((2, 4), (2, 2))

    def layout(self, side, num_tokens=8):
        return token_layout(
            [self.TOKENS], [self.GRIDS], CONFIG, num_tokens, pad_token_id=9, padding_side=side
        )

    def test_right_padding(self):
        out = self.layout("right")
        assert out["tokens"].tolist() == [[1, IMAGE, IMAGE, 2, IMAGE, 3, 9, 9]]
        assert out["valid"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
        assert out["visual_slot"].tolist() == [[-1, 0, 1, -1, 2, -1, -1, -1]]
        assert out["positions"][:, 0].tolist() == [
            [0, 1, 1, 3, 4, 5, 0, 0],
            [0, 1, 1, 3, 4, 5, 0, 0],
            [0, 1, 2, 3, 4, 5, 0, 0],
        ]
        assert out["next_position"].tolist() == [6]

    def test_left_padding_moves_tokens_and_changes_no_position(self):
        left, right = self.layout("left"), self.layout("right")
        for name in ("tokens", "valid", "visual_slot", "positions"):
            np.testing.assert_array_equal(left[name], np.roll(right[name], 2, axis=-1))
        assert left["next_position"] == right["next_position"]

    def test_a_prompt_over_budget_is_never_truncated(self):
        with pytest.raises(ValueError, match=r"row 0 has 6 prompt tokens.*budget of 5.*bucket"):
            self.layout("right", num_tokens=5)


class TestFromProcessorOutputs:
    BATCH = make_batch([(2, (2, 4), 3), (4, (4, 4), 1)], CONFIG.vision.patch_dim, "left")

    def convert(self, **changes):
        fields = {
            "input_ids": self.BATCH.input_ids,
            "attention_mask": self.BATCH.attention_mask,
            "pixel_values": self.BATCH.pixel_values,
            "image_grid_thw": self.BATCH.image_grid_thw,
        }
        return prompts_from_hf(CONFIG, **(fields | changes))

    def test_each_row_gets_its_own_pixels(self):
        patches = self.convert().patches
        assert patches.pixels.shape == (2, 16, CONFIG.vision.patch_dim)
        np.testing.assert_array_equal(patches.pixels[0, :8], self.BATCH.pixel_values[:8])
        np.testing.assert_array_equal(patches.pixels[1], self.BATCH.pixel_values[8:])
        assert not np.asarray(patches.pixels[0, 8:]).any()

    def test_padding_stays_where_it_was(self):
        np.testing.assert_array_equal(self.convert().valid, self.BATCH.attention_mask)

    def test_text_alone_has_no_patches(self):
        batch = make_batch([(4,), (2,)], CONFIG.vision.patch_dim)
        assert prompts_from_hf(CONFIG, *batch.arguments()).patches is None

    @pytest.mark.parametrize(
        "grids, message",
        [
            ([[1, 2, 4]], "row 1: image placeholders do not match"),
            ([[1, 2, 4], [1, 4, 6]], "row 1: image placeholders do not match"),
            ([[1, 2, 4], [1, 4, 4], [1, 2, 2]], "1 image.* no placeholders"),
            ([[2, 2, 4], [1, 4, 4]], "video"),
        ],
    )
    def test_images_that_do_not_match_the_tokens_are_refused(self, grids, message):
        thw = np.array(grids)
        pixels = np.zeros((thw.prod(1).sum(), CONFIG.vision.patch_dim), np.float32)
        with pytest.raises(ValueError, match=message):
            self.convert(image_grid_thw=thw, pixel_values=pixels)

    @pytest.mark.parametrize("count", [23, 25])
    def test_a_wrong_number_of_patches_is_refused(self, count):
        pixels = np.zeros((count, CONFIG.vision.patch_dim), np.float32)
        with pytest.raises(ValueError, match=f"{count} patches.*24"):
            self.convert(pixel_values=pixels)


class TestPixelValues:
    def test_bytes_are_what_the_reference_processor_gives(self):
        """x/127.5 - 1 correctly rounded, the frame repeated within its channel, padding 0."""
        config = CONFIG.vision
        rng = np.random.default_rng(0)
        raw = rng.integers(0, 256, (2, 3, config.frame_dim), dtype=np.uint8)
        image_id = np.array([[1, 1, 0], [1, 2, 2]])
        nothing = np.zeros((2, 3))
        patches = Patches(jnp.asarray(raw), nothing, jnp.asarray(image_id), nothing, nothing)
        values = np.asarray(pixel_values(patches, config))
        one = raw.astype(np.float32) / np.float32(127.5) - 1
        frames = one.reshape(2, 3, 3, 1, -1).repeat(config.temporal_patch_size, axis=3)
        expected = np.where(image_id[..., None] > 0, frames.reshape(2, 3, -1), 0)
        np.testing.assert_array_equal(values, expected)

    def test_floats_are_left_alone(self):
        pixels = jnp.ones((1, 2, CONFIG.vision.patch_dim))
        nothing = np.zeros((1, 2))
        patches = Patches(pixels, nothing, nothing, nothing, nothing)
        assert pixel_values(patches, CONFIG.vision) is pixels
