"""Requests and their batches: bucket choice, device pixels, mesh filling, compile counts."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.inputs import pixel_values
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles import image_store, render
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.evidence import View
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets, RequestBuilder, fit

BUCKETS = Buckets(patches=(80, 320), prompt_tokens=(40, 128), canvas=(96, 448), image=(64, 256))
BOXES = [Box((100, 200, 300, 400), "a"), Box((600, 50, 980, 400), "b"), Box((0, 0, 90, 990), "c")]
FOURTH = Box((400, 700, 900, 1000), "d")


@pytest.fixture(scope="module")
def processor(tiny_files) -> Processor:
    return Processor.from_pretrained(tiny_files)


@pytest.fixture(scope="module")
def builder(processor) -> RequestBuilder:
    return RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    return np.asarray(smooth)


def test_the_smallest_bucket_that_fits_is_taken():
    assert [fit((8, 16, 64), n, "x") for n in (1, 8, 9, 16, 17, 64)] == [8, 8, 16, 16, 64, 64]


def test_too_large_a_request_names_the_setting():
    with pytest.raises(ValueError, match=r"65 exceeds .* buckets\.prompt_tokens = \[8, 64\]"):
        fit((8, 64), 65, "prompt_tokens")


@pytest.mark.parametrize("sizes", [(), (0, 8), (8, 8), (16, 8)])
def test_buckets_must_increase(sizes):
    with pytest.raises(ValueError, match=r"buckets\.canvas must be increasing sizes"):
        Buckets(patches=(8,), prompt_tokens=(8,), canvas=sizes, image=(8,))


def test_images_are_padded_to_one_bucket_and_keep_their_sizes():
    store = ImageStore.upload([picture(40, 60), picture(65, 30)], BUCKETS)
    assert store.pixels.shape == (2, 256, 64, 3)
    assert store.shapes == ((40, 60), (65, 30))
    np.testing.assert_array_equal(store.sizes, [[40, 60], [65, 30]])
    np.testing.assert_array_equal(store.pixels[1, :65, :30], picture(65, 30))


def test_too_large_an_image_names_the_setting():
    with pytest.raises(ValueError, match=r"300 pixels exceeds .* buckets\.image"):
        ImageStore.upload([picture(300, 20)], BUCKETS)


def test_a_row_has_one_placeholder_for_each_visual_token(builder):
    store = ImageStore.upload([picture(200, 150)], BUCKETS)
    request = builder.reasoner(store, 0, "red?", "mca", BOXES)
    config = builder.processor.config
    patches = sum(h * w for h, w in (builder.processor.sizes.grid(v.target) for v in request.views))
    assert len(request.views) == 4
    assert (request.tokens == config.image_token_id).sum() == patches // 4
    assert (request.tokens == config.vision_start_token_id).sum() == 4


def test_a_reasoner_without_evidence_is_asked_about_the_whole_image(builder):
    store = ImageStore.upload([picture(200, 150)], BUCKETS)
    request = builder.reasoner(store, 0, "red?", "mca", [])
    assert not request.has_evidence
    assert "Whole: red?" in builder.processor.tokenizer.decode(request.tokens)
    assert len(request.views) == 1


def host_patches(image: np.ndarray, view: View, outlined: bool, processor: Processor) -> np.ndarray:
    """The view by Pillow and the processor of transformers, which resizes to the same size."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    picture = render.annotate(image, [*BOXES, FOURTH]) if outlined else Image.fromarray(image)
    hf = Qwen2VLImageProcessorPil(
        size={
            "shortest_edge": processor.sizes.min_pixels,
            "longest_edge": processor.sizes.max_pixels,
        },
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    out = hf(images=[picture.crop(view.crop)], return_tensors="np")
    assert tuple(out["image_grid_thw"][0][1:]) == processor.sizes.grid(view.target)
    return out["pixel_values"]


@pytest.mark.parametrize("size", [(200, 150), (60, 250), (33, 47)])
def test_device_patches_equal_pillow_and_the_reference_processor(builder, size):
    """Overview, annotated overview and crops, each within one grey level."""
    image = picture(*size, seed=3)
    store = ImageStore.upload([picture(20, 20), image], BUCKETS)
    plain = builder.plain("perceiver", store, 1, "red?", "mca")
    zoomed = builder.reasoner(store, 1, "red?", "mca", [*BOXES, FOURTH])
    prompts = builder.collate([plain, zoomed], store)
    pixels = np.asarray(pixel_values(prompts.patches, builder.processor.config.vision))
    image_id = np.asarray(prompts.patches.image_id)
    for row, request in enumerate((plain, zoomed)):
        for i, view in enumerate(request.views):
            expected = host_patches(image, view, bool(view.outlines), builder.processor)
            actual = pixels[row][image_id[row] == i + 1]
            assert actual.shape == expected.shape
            # One grey level is 2/255 after normalisation.
            assert np.abs(actual - expected).max() * 127.5 < 1.01
            assert np.abs(actual - expected).mean() * 127.5 < 0.1
    assert zoomed.views[0].outlines
    assert not plain.views[0].outlines


def test_padding_changes_no_pixel(builder):
    """A row is the same alone in a small bucket and beside a larger row."""
    store = ImageStore.upload([picture(64, 60)], BUCKETS)
    small = builder.plain("perceiver", store, 0, "red?", "mca")
    large = builder.reasoner(store, 0, "red?", "mca", BOXES)
    alone, beside = (builder.collate(rows, store) for rows in ([small], [small, large]))
    assert alone.tokens.shape[1] < beside.tokens.shape[1]
    count, length = int((alone.patches.image_id > 0).sum()), len(small.tokens)
    np.testing.assert_array_equal(alone.patches.pixels[0, :count], beside.patches.pixels[0, :count])
    np.testing.assert_array_equal(beside.tokens[0, :length], small.tokens)
    assert not np.asarray(beside.patches.image_id[0, count:]).any()
    assert not np.asarray(beside.valid[0, length:]).any()


def test_rows_are_filled_up_on_a_mesh_and_equal_those_of_one_device(processor, builder):
    mesh = make_mesh(2, 2, 2)
    sharded = RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS, mesh)
    images = [picture(120, 90, 1), picture(100, 140, 2)]
    batches = []
    for maker in (sharded, builder):
        store = ImageStore.upload(images, BUCKETS, maker.mesh)
        rows = [
            maker.plain("perceiver", store, 0, "red?", "mca"),
            maker.reasoner(store, 1, "blue?", "mca", BOXES[:2]),
            maker.reasoner(store, 0, "blue?", "mca", BOXES),
        ]
        batches.append(maker.collate(rows, store))
    on_mesh, alone = batches
    assert on_mesh.tokens.shape[0] == 4
    assert alone.tokens.shape[0] == 3
    assert len(on_mesh.patches.pixels.addressable_shards) == 8
    np.testing.assert_array_equal(on_mesh.tokens[3], on_mesh.tokens[2])
    np.testing.assert_array_equal(on_mesh.positions[:, :3], alone.positions)
    same = jax.tree.map(lambda a, b: np.array_equal(a[:3], b), on_mesh.patches, alone.patches)
    assert all(jax.tree.leaves(same))


def test_a_bucket_is_compiled_once_whatever_images_and_boxes_are(processor):
    buckets = Buckets(patches=(320,), prompt_tokens=(128,), canvas=(448,), image=(256,))
    builder = RequestBuilder(processor, load_prompt_set("tiny"), buckets)
    rng = np.random.default_rng(0)

    def collate() -> None:
        images = [np.zeros((*size, 3), np.uint8) for size in rng.integers(20, 256, (4, 2))]
        store = ImageStore.upload(images, buckets)
        rows = [builder.reasoner(store, 0, "red?", "mca", BOXES)]
        for i in range(4):
            (x1, x2), (y1, y2) = np.sort(rng.uniform(0, 1000, (2, 2)))
            boxes = [Box((x1, y1, x2, y2), "x")] * rng.integers(0, 4)
            rows.append(builder.reasoner(store, i, "red?", "mca", boxes))
        builder.collate(rows, store)

    before = image_store.render_prompts._cache_size()
    for _ in range(20):
        collate()
    assert image_store.render_prompts._cache_size() == before + 1
