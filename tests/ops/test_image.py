"""`p2r_jax.ops.image` against Pillow and the PIL image processor of `transformers`."""

import importlib.metadata
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageColor, ImageDraw

from p2r_jax.ops import image as ops
from p2r_jax.ops import outlines
from p2r_jax.qwen3_vl.processor import ImageSizes

COLOR_NAMES = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "magenta")
# Pillow 13 takes the height pass first on tall crops; every earlier version went width first.
PILLOW_TURNS = int(importlib.metadata.version("pillow").split(".")[0]) >= 13

draw_outlines = jax.jit(outlines.draw_outlines)
crop_resize = jax.jit(ops.crop_resize, static_argnames=("canvas", "pass_order"))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A 1/f spectrum, as photographs have, with hard black and white strokes, as text has."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    phase = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    waves = np.fft.irfft2(phase / frequency, s=(height, width)).transpose(1, 2, 0)
    pixels = np.clip(128 + 50 * (waves - waves.mean()) / waves.std(), 0, 255).astype(np.uint8)
    for stroke in range(40):
        y, x = rng.integers(0, height), rng.integers(0, width)
        down, across = (2, 25) if stroke % 2 else (25, 2)
        pixels[y : y + down, x : x + across] = 255 * (stroke % 3 == 0)
    return pixels


def pillow_outlines(image: np.ndarray, boxes, line_width: int) -> np.ndarray:
    annotated = Image.fromarray(image)
    draw = ImageDraw.Draw(annotated)
    for k, box in enumerate(boxes):
        draw.rectangle([int(v) for v in box], outline=COLOR_NAMES[k % 8], width=int(line_width))
    return np.asarray(annotated)


def pillow_crop_resize(image: np.ndarray, crop, target) -> np.ndarray:
    height, width = (int(v) for v in target)
    crop = tuple(int(v) for v in crop)
    resized = Image.fromarray(image).crop(crop).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def assert_same_picture(actual: np.ndarray, expected: np.ndarray, mean: float = 0.005) -> None:
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert difference.mean() <= mean


def merge_block_order(rows: int, columns: int, merge: int = 2) -> np.ndarray:
    """[rows·columns, 2] patch coordinates in the order a Qwen-VL processor lists patches."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)


# --- outlines ---------------------------------------------------------------------------------


def test_outline_colors_are_pillows() -> None:
    assert tuple(ImageColor.getrgb(name) for name in COLOR_NAMES) == outlines.OUTLINE_COLORS


CANVAS, MOST_BOXES = 40, 10
corners = st.integers(-12, CANVAS + 12)
# Half of the sides are 0–4 pixels: boxes thinner than their line are where Pillow is peculiar.
sides = st.one_of(st.integers(0, 4), st.integers(0, CANVAS + 20))
box_lists = st.lists(st.tuples(corners, corners, sides, sides), max_size=MOST_BOXES)


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, CANVAS),
    width=st.integers(1, CANVAS),
    boxes=box_lists,
    line=st.integers(0, 15),
)
def test_outlines_equal_pillow_bit_for_bit(height: int, width: int, boxes: list, line: int) -> None:
    pixels = noise(CANVAS, CANVAS)
    array = np.full((MOST_BOXES, 4), 7, np.int32)  # what lies beyond `count` must not be drawn
    for k, (x, y, dx, dy) in enumerate(boxes):
        array[k] = x, y, x + dx, y + dy
    drawn = draw_outlines(pixels, np.int32([height, width]), array, len(boxes), line)

    expected = pixels.copy()  # padding outside the valid region stays as it was
    expected[:height, :width] = pillow_outlines(pixels[:height, :width], array[: len(boxes)], line)
    np.testing.assert_array_equal(drawn, expected)


def test_later_boxes_cover_earlier_ones_beyond_one_word_of_boxes() -> None:
    pixels = noise(60, 60)
    boxes = np.int32([[k, k // 2, 30 + k // 2, 30 + k // 3] for k in range(40)])
    drawn = draw_outlines(pixels, np.int32([60, 60]), boxes, 40, 3)
    np.testing.assert_array_equal(drawn, pillow_outlines(pixels, boxes, 3))


def test_inverted_boxes_paint_nothing() -> None:
    pixels = noise(20, 20)
    boxes = np.int32([[9, 2, 8, 12], [2, 9, 12, 8]])
    np.testing.assert_array_equal(draw_outlines(pixels, np.int32([20, 20]), boxes, 2, 3), pixels)


# --- crop and resize --------------------------------------------------------------------------

SOURCE, TARGET = (300, 420), (192, 256)
CROPS = {
    "whole image, down": ((0, 0, 420, 300), (96, 128)),
    "whole image, slightly down": ((0, 0, 420, 300), (192, 256)),
    "whole image to a dot": ((0, 0, 420, 300), (1, 1)),
    "top left corner, up": ((0, 0, 50, 40), (160, 192)),
    "bottom right corner, up": ((380, 270, 420, 300), (192, 256)),
    "left border, mixed": ((0, 10, 30, 290), (96, 128)),
    "wide strip": ((0, 140, 420, 148), (32, 256)),
    "one pixel": ((419, 299, 420, 300), (64, 64)),
    "tile boundary": ((127, 127, 257, 257), (64, 96)),
    "one axis unchanged": ((100, 50, 356, 250), (96, 256)),
    "tall, width first": ((10, 0, 110, 300), (128, 20)),
}
TALL_CROPS = {
    "tall strip": ((200, 0, 208, 300), (192, 32)),
    "tall, both down": ((10, 0, 110, 300), (64, 96)),
    "width up, height down": ((100, 40, 200, 260), (96, 256)),
}
needs_pillow_13 = pytest.mark.skipif(not PILLOW_TURNS, reason="the pass order is Pillow 13's")


@pytest.mark.parametrize("picture", [noise, scene])
@pytest.mark.parametrize("case", CROPS)
def test_crop_resize_equals_pillow(case: str, picture) -> None:
    crop, target = CROPS[case]
    pixels = picture(*SOURCE)
    result = np.asarray(crop_resize(pixels, np.int32(crop), np.int32(target), canvas=TARGET))
    assert_same_picture(result[: target[0], : target[1]], pillow_crop_resize(pixels, crop, target))
    assert not result[target[0] :].any()
    assert not result[:, target[1] :].any()


@needs_pillow_13
@pytest.mark.parametrize("case", TALL_CROPS)
def test_tall_crops_are_resized_along_their_height_first(case: str) -> None:
    crop, target = TALL_CROPS[case]
    pixels = noise(*SOURCE)
    result = np.asarray(crop_resize(pixels, np.int32(crop), np.int32(target), canvas=TARGET))
    assert_same_picture(result[: target[0], : target[1]], pillow_crop_resize(pixels, crop, target))


@needs_pillow_13
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_crop_at_any_size_equals_pillow(data: st.DataObject) -> None:
    (top, bottom), (left, right) = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
        for n in SOURCE
    )
    height, width = (data.draw(st.integers(1, n)) for n in TARGET)
    crop, pixels = (left, top, right, bottom), noise(*SOURCE)
    result = crop_resize(pixels, np.int32(crop), np.int32([height, width]), canvas=TARGET)
    difference = np.asarray(result)[:height, :width].astype(int)
    difference -= pillow_crop_resize(pixels, crop, (height, width))
    # Cubic weights exceed 1 when enlarging: a half that the first pass rounds the other way grows.
    enlarged = height > bottom - top or width > right - left
    assert np.abs(difference).max() <= (2 if enlarged else 1)


@needs_pillow_13
def test_pass_order_switches_exactly_where_pillow_switches() -> None:
    pixels = noise(*SOURCE)
    for height in (139, 140, 141):  # 200 - 140 is just twice 110 - 80
        crop, target = np.int32((30, 50, 140, 250)), np.int32((height, 80))
        result = np.asarray(crop_resize(pixels, crop, target, canvas=TARGET))
        expected = pillow_crop_resize(pixels, crop, target)
        assert_same_picture(result[:height, :80], expected)


def test_width_first_is_the_order_of_pillow_before_13() -> None:
    """Turning the picture turns the order, so any Pillow can tell what width first would give."""
    crop, target = TALL_CROPS["tall, both down"]
    pixels = noise(*SOURCE)
    by_width = Image.fromarray(pixels).crop(crop).resize((target[1], crop[3] - crop[1]), 3)
    expected = np.asarray(by_width.resize(target[::-1], Image.Resampling.BICUBIC))
    result = crop_resize(
        pixels, np.int32(crop), np.int32(target), canvas=TARGET, pass_order="width_first"
    )
    assert_same_picture(np.asarray(result)[: target[0], : target[1]], expected)


def test_same_size_resize_is_the_identity() -> None:
    pixels = noise(*SOURCE)
    crop, target = np.int32([37, 5, 237, 195]), np.int32([190, 200])
    result = np.asarray(crop_resize(pixels, crop, target, canvas=TARGET))
    np.testing.assert_array_equal(result[:190, :200], pixels[5:195, 37:237])


def test_long_axes_keep_exact_weights() -> None:
    """Positions of thousands of pixels held in float32 make the mean difference 0.002."""
    pixels = noise(2, 4000)
    crop, target = np.int32([0, 0, 4000, 2]), np.int32([2, 3500])
    result = np.asarray(crop_resize(pixels, crop, target, canvas=(2, 3500)))
    assert_same_picture(result, pillow_crop_resize(pixels, crop, target), mean=2e-4)


def test_weights_are_zero_outside_the_crop_and_the_target_and_never_outside_their_span() -> None:
    source, target = np.arange(90), np.arange(40)[:, None]
    weights = np.asarray(ops.cubic_weights(source, target, 20, 70, 33))
    np.testing.assert_array_equal(weights.any(axis=1), np.arange(40) < 33)
    assert not weights[:, :20].any()
    assert not weights[:, 70:].any()
    for begin in range(40):
        low, high = ops.source_span(20, 70, 33, begin, begin + 5)
        needed = np.flatnonzero(weights[begin : begin + 5].any(axis=0))
        assert set(needed) <= set(range(low, high))
        assert high - low <= len(needed) + 2 * (begin < 33)


def test_an_empty_crop_gives_an_empty_canvas() -> None:
    crop, target = np.int32([9, 9, 9, 20]), np.int32([8, 8])
    assert not np.asarray(crop_resize(noise(*SOURCE), crop, target, canvas=TARGET)).any()


def test_one_compilation_serves_every_crop_and_target() -> None:
    resize = jax.jit(partial(ops.crop_resize, canvas=(64, 64)))
    rng = np.random.default_rng(0)
    pixels = noise(100, 140)
    for _ in range(12):
        left, top = rng.integers(0, 60, 2)
        width, height = rng.integers(1, 40, 2)
        target = rng.integers(1, 65, 2, dtype=np.int32)
        resize(pixels, np.int32([left, top, left + width, top + height]), target)
    assert resize._cache_size() == 1


def test_no_float_copy_of_the_image_is_made() -> None:
    shape = jax.ShapeDtypeStruct
    compiled = crop_resize.lower(
        shape((2160, 3840, 3), jnp.uint8),
        shape((4,), jnp.int32),
        shape((2,), jnp.int32),
        canvas=(64, 64),
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2160 * 3840 * 3 / 2


def test_extents_beyond_int32_are_refused() -> None:
    with pytest.raises(ValueError, match="overflows int32"):
        ops.check_extents(2**16, 2**15)


def test_unknown_pass_order_is_refused() -> None:
    with pytest.raises(ValueError, match="pass_order 'columns'"):
        ops.crop_resize(
            noise(8, 8),
            np.int32([0, 0, 8, 8]),
            np.int32([8, 8]),
            canvas=(8, 8),
            pass_order="columns",
        )


# --- patches ----------------------------------------------------------------------------------


def pil_processor(min_pixels: int, max_pixels: int):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module.Qwen2VLImageProcessorPil(
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@pytest.fixture(scope="module")
def processor():
    return pil_processor(32 * 32, 160 * 160)


def assert_same_bits(actual, expected) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


patchify = jax.jit(partial(ops.patchify, patch_size=16, temporal_patch_size=2))


@pytest.mark.parametrize("size", [(96, 64), (32, 160), (160, 160)])
def test_patches_equal_the_transformers_processor_bit_for_bit(processor, size) -> None:
    pixels = noise(*size)
    pixels[:16, :16] = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)  # every byte there is
    reference = processor(images=[Image.fromarray(pixels)], do_resize=False, return_tensors="np")
    canvases = np.zeros((2, 160, 160, 3), np.uint8)
    canvases[1, : size[0], : size[1]] = pixels
    row_col = merge_block_order(size[0] // 16, size[1] // 16)
    patches = patchify(canvases, np.ones(len(row_col), np.int32), row_col)
    assert_same_bits(patches, reference["pixel_values"])


PUBLISHED = ImageSizes(patch=16, merge=2, min_pixels=65_536, max_pixels=16_777_216)


@pytest.mark.parametrize(
    "size", [(10, 1500), (1500, 10), (31, 31), (333, 500), (1007, 1425), (16, 3200), (1920, 1080)]
)
def test_patches_of_an_image_of_any_size_equal_the_processors_bit_for_bit(size) -> None:
    """The processor resizes as well; ours starts from Pillow's pixels of the size we ask for."""
    image = Image.fromarray(scene(*size))
    reference = pil_processor(PUBLISHED.min_pixels, PUBLISHED.max_pixels)(images=[image])
    height, width = PUBLISHED.target_size(*size)
    canvases = np.zeros((2, 3136, 3648, 3), np.uint8)
    canvases[1, :height, :width] = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = PUBLISHED.grid((height, width))
    assert reference["image_grid_thw"].tolist() == [[1, rows, columns]]

    slot, row_col = np.full(8192, -1, np.int32), np.zeros((8192, 2), np.int32)
    slot[: rows * columns] = 1
    row_col[: rows * columns] = merge_block_order(rows, columns)
    patches = np.asarray(patchify(canvases, slot, row_col))
    assert_same_bits(patches[: rows * columns], reference["pixel_values"])


def test_patches_of_padding_are_zero_and_slots_choose_the_canvas() -> None:
    canvases = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 255)])
    patches = patchify(canvases, np.int32([1, -1, 0]), np.int32([[1, 1], [0, 0], [0, 1]]))
    np.testing.assert_array_equal(patches, np.float32([[1], [0], [-1]]) * np.ones((3, 1536)))


def test_a_canvas_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of patch_size 16"):
        patchify(np.zeros((1, 40, 32, 3), np.uint8), np.int32([0]), np.int32([[0, 0]]))


# --- everything together ----------------------------------------------------------------------

STATIC = dict(canvas=(96, 128), patch_size=16, temporal_patch_size=2)
render = jax.jit(partial(ops.render_patches, **STATIC))
render_by_threes = jax.jit(partial(ops.render_patches, **STATIC, chunk=3))


@pytest.fixture(scope="module")
def evidence():
    """Two rows of an annotated overview, a crop, a crop or nothing; images of mixed size."""
    sources = [scene(150, 200, 1), scene(90, 60, 2), noise(160, 131, 3)]
    images = np.zeros((3, 160, 200, 3), np.uint8)
    for padded, source in zip(images, sources, strict=True):
        padded[: source.shape[0], : source.shape[1]] = source
    sizes = np.int32([source.shape[:2] for source in sources])
    boxes = np.int32([[20, 30, 90, 140], [50, 10, 51, 100], [120, 60, 260, 170]])
    views = ops.Views(
        image_index=np.int32([[0, 0, 2], [1, 1, 0]]),
        crop=np.int32(
            [
                [[0, 0, 200, 150], [20, 30, 90, 140], [100, 0, 131, 150]],
                [[0, 0, 60, 90], [5, 40, 60, 77], [0, 0, 200, 150]],
            ]
        ),
        target=np.int32([[[96, 128], [96, 64], [96, 32]], [[96, 64], [64, 96], [0, 0]]]),
        outlines=np.broadcast_to(boxes, (2, 3, 3, 4)),
        outline_count=np.int32([[3, 0, 0], [2, 0, 3]]),
        line_width=np.int32([[3, 3, 3], [5, 5, 5]]),
    )
    return images, sizes, sources, views


def patch_lists(views: ops.Views, length: int) -> tuple[np.ndarray, np.ndarray]:
    slot = np.full((2, length), -1, np.int32)
    row_col = np.zeros((2, length, 2), np.int32)
    for row in range(2):
        orders = [merge_block_order(*(target // 16)) for target in views.target[row]]
        listed = np.concatenate(orders)
        slot[row, : len(listed)] = np.repeat(np.arange(3), [len(order) for order in orders])
        row_col[row, : len(listed)] = listed
    return slot, row_col


@pytest.mark.parametrize("render", [render, render_by_threes])
def test_rendered_patches_equal_pillow_and_the_processor(evidence, processor, render) -> None:
    images, sizes, sources, views = evidence
    slot, row_col = patch_lists(views, 100)
    patches = np.asarray(render(images, sizes, views, slot, row_col))
    assert patches.shape == (2, 100, 1536)

    for row in range(2):
        pictures = []
        for view in range(3):
            if not views.target[row, view].all():
                continue
            source = sources[views.image_index[row, view]]
            boxes = views.outlines[row, view, : views.outline_count[row, view]]
            annotated = pillow_outlines(source, boxes, views.line_width[row, view])
            pictures.append(
                pillow_crop_resize(annotated, views.crop[row, view], views.target[row, view])
            )
        expected = np.concatenate(
            [processor(images=[p], do_resize=False)["pixel_values"] for p in pictures]
        )
        assert_same_picture(
            np.rint((patches[row, : len(expected)] + 1) * 127.5), np.rint((expected + 1) * 127.5)
        )
        assert not patches[row, len(expected) :].any()


def test_views_that_keep_their_size_are_the_processors_patches_bit_for_bit(processor) -> None:
    pixels = noise(96, 128)
    pixels[:16, :16] = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    zeros = partial(np.zeros, dtype=np.int32)
    views = ops.Views(
        image_index=zeros((1, 1)),
        crop=np.int32([[[0, 0, 128, 96]]]),
        target=np.int32([[[96, 128]]]),
        outlines=zeros((1, 1, 1, 4)),
        outline_count=zeros((1, 1)),
        line_width=zeros((1, 1)),
    )
    order = merge_block_order(6, 8)[None]
    patches = render(pixels[None], np.int32([[96, 128]]), views, zeros((1, 48)), order)
    reference = processor(images=[Image.fromarray(pixels)], do_resize=False)["pixel_values"]
    assert_same_bits(patches[0], reference)


def test_a_view_does_not_depend_on_its_neighbours(evidence) -> None:
    images, sizes, _, views = evidence
    slot, row_col = patch_lists(views, 100)
    together = render(images, sizes, views, slot, row_col)
    compiled = render._cache_size()
    turned = jax.tree.map(lambda leaf: leaf[::-1].copy(), (views, slot, row_col))
    np.testing.assert_array_equal(render(images, sizes, *turned)[::-1], together)
    assert render._cache_size() == compiled


def test_unknown_implementation_is_refused(evidence) -> None:
    images, sizes, _, views = evidence
    with pytest.raises(ValueError, match="implementation 'cuda' is unknown"):
        ops.render_patches(
            images, sizes, views, *patch_lists(views, 100), **STATIC, implementation="cuda"
        )
