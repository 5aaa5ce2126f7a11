"""The image kernel equals the XLA version and Pillow, reads only what it needs, and compiles.

Interpreted, one program renders all cases: they are views of the same images.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.ops import image as ops
from p2r_jax.ops import image_kernel
from p2r_jax.ops.image_kernel import TILE, render_listed, to_kernel_layout
from p2r_jax.parallel.topology import H100, gpu_mesh, tpu_mesh
from tests.compilers import mesh_or_skip
from tests.ops.test_image import (
    PILLOW_TURNS,
    assert_same_picture,
    merge_block_order,
    noise,
    pillow_crop_resize,
    pillow_outlines,
    scene,
)

SOURCES = [scene(300, 420, 1), noise(300, 420, 2), scene(90, 60, 3)]
IMAGES = np.zeros((3, 300, 420, 3), np.uint8)
for _padded, _source in zip(IMAGES, SOURCES, strict=True):
    _padded[: _source.shape[0], : _source.shape[1]] = _source
SIZES = np.int32([source.shape[:2] for source in SOURCES])
CANVAS = (192, 256)
STATIC = dict(canvas=CANVAS, patch_size=16, temporal_patch_size=2)

_rng = np.random.default_rng(0)
_corners = _rng.integers(-20, 420, (40, 4)).astype(np.int32)
BOXES = np.concatenate(
    [np.minimum(*np.split(_corners, 2, 1)), np.maximum(*np.split(_corners, 2, 1))], 1
)
BOXES[:4] = [100, 50, 101, 200], [50, 100, 200, 101], [127, 127, 128, 128], [9, 9, 8, 8]
"""Forty of any size, some of them thinner than their line, and one inverted, which is not drawn."""

# (image, crop, target, outlines, line width)
CASES = {
    "whole image, down": (0, (0, 0, 420, 300), (96, 128), 0, 0),
    "whole image, little down": (0, (0, 0, 420, 300), (192, 256), 0, 0),
    "noise, down": (1, (0, 0, 420, 300), (96, 128), 0, 0),
    "to one block": (0, (0, 0, 420, 300), (32, 32), 0, 0),
    "top left corner, up": (0, (0, 0, 50, 40), (160, 192), 0, 0),
    "bottom right corner, up": (0, (380, 270, 420, 300), (192, 256), 0, 0),
    "left border, mixed": (1, (0, 10, 30, 290), (96, 128), 0, 0),
    "wide strip": (1, (0, 140, 420, 148), (32, 256), 0, 0),
    "one pixel": (1, (419, 299, 420, 300), (64, 64), 0, 0),
    "one pixel, first": (1, (0, 0, 1, 1), (32, 32), 0, 0),
    "across tiles": (1, (127, 127, 257, 257), (64, 96), 0, 0),
    "of one tile": (1, (128, 128, 256, 256), (128, 128), 0, 0),
    "one axis unchanged": (1, (100, 50, 356, 250), (96, 256), 0, 0),
    "small image": (2, (0, 0, 60, 90), (96, 64), 0, 0),
    "tall strip": (1, (200, 0, 208, 300), (192, 32), 0, 0),
    "tall, both down": (0, (10, 0, 110, 300), (64, 96), 0, 0),
    "width up, height down": (1, (100, 40, 200, 260), (96, 256), 0, 0),
    "outlines": (0, (0, 0, 420, 300), (192, 256), 3, 3),
    "outlines, cropped": (0, (90, 40, 210, 210), (160, 128), 6, 5),
    "outlines, tall": (1, (60, 0, 130, 300), (64, 96), 8, 4),
    "forty outlines": (0, (0, 0, 420, 300), (192, 256), 40, 2),
    "outlines of a small image": (2, (0, 0, 60, 90), (96, 64), 40, 7),
    "unused": (0, (0, 0, 420, 300), (0, 0), 5, 3),
}
TALL = {"tall strip", "tall, both down", "width up, height down", "outlines, tall"}


def views_of(cases) -> ops.Views:
    image, crop, target, count, width = zip(*cases, strict=True)
    array = partial(np.array, dtype=np.int32)
    return ops.Views(
        image_index=array([image]),
        crop=array([crop]),
        target=array([target]),
        outlines=np.broadcast_to(BOXES, (1, len(cases), *BOXES.shape)),
        outline_count=array([count]),
        line_width=array([width]),
    )


def lists_of(cases, length: int, seed: int | None = None):
    """Every patch of every view in a row's order, or shuffled together with the padding."""
    orders = [merge_block_order(target[0] // 16, target[1] // 16) for _, _, target, *_ in cases]
    listed = np.concatenate(orders)
    slot, row_col = np.full((1, length), -1, np.int32), np.zeros((1, length, 2), np.int32)
    slot[0, : len(listed)] = np.repeat(np.arange(len(cases)), [len(order) for order in orders])
    row_col[0, : len(listed)] = listed
    if seed is not None:
        order = np.random.default_rng(seed).permutation(length)
        slot, row_col = slot[:, order], row_col[:, order]
    return slot, row_col


def render(implementation: str, images, sizes, views, slot, row_col, **static):
    if implementation != "xla":
        images = to_kernel_layout(images)
    run = jax.jit(partial(ops.render_patches, implementation=implementation, **static))
    return np.asarray(run(images, sizes, views, slot, row_col))


@pytest.fixture(scope="module")
def rendered(quick_compilation):
    """implementation → case → its patches; "padding" is what no view is behind."""
    cases = list(CASES.values())
    arguments = IMAGES, SIZES, views_of(cases), *lists_of(cases, 2304)
    results = {}
    for implementation in ("xla", "pallas_tpu_interpret"):
        patches = render(implementation, *arguments, **STATIC)[0]
        ends = np.cumsum([target[0] * target[1] // 256 for _, _, target, *_ in cases])
        results[implementation] = dict(
            zip([*CASES, "padding"], np.split(patches, ends), strict=True)
        )
    return results


def picture(patches: np.ndarray, target) -> np.ndarray:
    """Patches of both frames back to bytes [height, width, 3], frame 0."""
    pixels = np.rint((patches + 1) * 127.5).astype(np.uint8).reshape(-1, 3, 2, 16, 16)
    np.testing.assert_array_equal(pixels[:, :, 0], pixels[:, :, 1])
    out = np.zeros((*target, 3), np.uint8)
    for patch, (row, column) in zip(
        pixels, merge_block_order(target[0] // 16, target[1] // 16), strict=True
    ):
        out[row * 16 :, column * 16 :][:16, :16] = patch[:, 0].transpose(1, 2, 0)
    return out


class TestAgainstXlaAndPillow:
    @pytest.mark.parametrize("case", CASES)
    def test_every_view_is_that_of_the_xla_version(self, rendered, case):
        ours, reference = rendered["pallas_tpu_interpret"][case], rendered["xla"][case]
        levels = np.abs(ours - reference) * 127.5
        assert levels.max(initial=0.0) < 1.01
        assert np.count_nonzero(levels > 0.5) <= ours.size * 0.001

    @pytest.mark.parametrize("case", [case for case in CASES if case != "unused"])
    def test_every_view_is_pillows(self, rendered, case):
        if case in TALL and not PILLOW_TURNS:
            pytest.skip("the pass order is Pillow 13's")
        image, crop, target, count, width = CASES[case]
        boxes = [box for box in BOXES[:count] if box[0] <= box[2] and box[1] <= box[3]]
        source = SOURCES[image]
        if count:
            # Pillow refuses inverted boxes; what stands for one has no width and keeps its colour.
            boxes = [
                box if tuple(box) != (9, 9, 8, 8) else (-9, -9, -9, -9) for box in BOXES[:count]
            ]
            source = pillow_outlines(source, boxes, width)
        expected = pillow_crop_resize(source, crop, target)
        assert_same_picture(picture(rendered["pallas_tpu_interpret"][case], target), expected)

    def test_padding_is_zero(self, rendered):
        assert len(rendered["pallas_tpu_interpret"]["padding"]) > 0
        assert not rendered["pallas_tpu_interpret"]["padding"].any()

    def test_width_first_where_it_is_asked_for(self, quick_compilation):
        cases = [CASES[case] for case in sorted(TALL)]
        arguments = IMAGES, SIZES, views_of(cases), *lists_of(cases, 256)
        first, second = (
            render(name, *arguments, **STATIC, pass_order="width_first")
            for name in ("xla", "pallas_tpu_interpret")
        )
        np.testing.assert_allclose(second, first, atol=1.01 / 127.5)
        assert np.count_nonzero(first != second) <= first.size * 0.001

    def test_an_image_of_8k_width(self, quick_compilation):
        """Sixty tiles beside each other, and positions too large for weights in float32."""
        pixels = noise(40, 7680)
        cases = [(0, (0, 0, 7680, 40), (32, 1920), 0, 0), (0, (7000, 3, 7680, 40), (32, 640), 0, 0)]
        out = render(
            "pallas_tpu_interpret",
            pixels[None],
            np.int32([[40, 7680]]),
            views_of(cases),
            *lists_of(cases, 320),
            **STATIC | {"canvas": (32, 1920)},
        )[0]
        for patches, (_, crop, target, *_) in zip((out[:240], out[240:]), cases, strict=True):
            expected = pillow_crop_resize(pixels, crop, target)
            assert_same_picture(picture(patches, target), expected, mean=5e-4)


FEW = [CASES[case] for case in ("outlines, cropped", "unused", "tall, both down", "one pixel")]


@pytest.fixture(scope="module")
def few(quick_compilation):
    """Arguments of `render_listed`, for patches in any order, and the XLA version's patches."""
    arguments = SIZES, views_of(FEW), *lists_of(FEW, 144, seed=3)
    return (to_kernel_layout(IMAGES), *arguments), render("xla", IMAGES, *arguments, **STATIC)


class TestReadsAndWrites:
    def test_each_patch_lands_at_its_place_whatever_the_order(self, few):
        arguments, expected = few
        run = partial(ops.render_patches, implementation="pallas_tpu_interpret", **STATIC)
        np.testing.assert_allclose(jax.jit(run)(*arguments), expected, atol=1.01 / 127.5)

    def test_no_read_is_out_of_bounds(self, few):
        """On a TPU nothing stops such a read. What is uninitialised, the sums, is NaN here."""
        arguments, expected = few
        strict = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
        run = partial(render_listed, canvas=CANVAS, patch_size=16, turn_tall=True)
        channels = np.stack(run(*arguments, interpret=strict), axis=2)
        slot = arguments[3]
        pixels = channels[slot >= 0] / 127.5 - 1
        first_frame = expected[slot >= 0].reshape(-1, 3, 2, 256)[:, :, 0]
        np.testing.assert_allclose(pixels, first_frame, atol=1.01 / 127.5)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_read_out_of_bounds_would_be_noticed(self, few, monkeypatch):
        arguments, _ = few
        exact = image_kernel._source_tiles

        def too_far(*args):
            first, count = exact(*args)
            return first + 3, count

        monkeypatch.setattr(image_kernel, "_source_tiles", too_far)
        strict = pltpu.InterpretParams(out_of_bounds_reads="raise")
        try:
            run = partial(render_listed, canvas=CANVAS, patch_size=16, turn_tall=True)
            with pytest.raises(Exception, match=r"(?i)out-of-bounds"):
                jax.block_until_ready(run(*arguments, interpret=strict))
        finally:
            pltpu.reset_tpu_interpret_mode_state()

    def test_only_tiles_with_weight_are_read(self):
        """A crop's tiles, and of these what a block of outputs depends on."""
        rng = np.random.default_rng(0)
        begins = jnp.arange(3) * TILE
        for _ in range(60):
            start, stop = sorted(rng.choice(1500, 2, replace=False).tolist())
            out_size = int(rng.integers(1, 385))
            numbers = (jnp.array([number]) for number in (start, stop, out_size))
            firsts, counts = image_kernel._source_tiles(*numbers, begins)
            weights = np.asarray(
                ops.cubic_weights(
                    np.arange(1536), np.arange(384)[:, None], start, stop, jnp.int32(out_size)
                )
            )
            for block, first, count in zip(np.split(weights, 3), firsts[0], counts[0], strict=True):
                needed = np.flatnonzero(block.any(axis=0)) // TILE
                read = np.arange(first, first + count)
                assert set(needed) <= set(read.tolist())
                # The outermost pixel of the kernel's reach has weight zero.
                assert len(read) <= len(np.unique(needed)) + 2 * (len(needed) > 0)

    def test_views_of_which_no_patch_is_listed_are_no_work(self, few):
        """The grid has as many steps as there are blocks with a listed patch: here none."""
        (images, sizes, views, slot, row_col), _ = few
        run = partial(ops.render_patches, implementation="pallas_tpu_interpret", **STATIC)
        assert not np.asarray(jax.jit(run)(images, sizes, views, slot * 0 - 1, row_col)).any()

    def test_patches_beside_a_view_are_black_as_in_the_xla_version(self, few):
        (images, sizes, views, _, _), _ = few
        slot = np.int32([[3, 1, 0]])
        row_col = np.int32([[[11, 15], [0, 0], [0, 15]]])
        run = partial(ops.render_patches, implementation="pallas_tpu_interpret", **STATIC)
        np.testing.assert_array_equal(
            jax.jit(run)(images, sizes, views, slot, row_col), np.full((1, 3, 1536), -1.0)
        )


class TestLayout:
    def test_planes_of_whole_tiles(self):
        planes = np.asarray(to_kernel_layout(IMAGES))
        assert planes.shape == (3, 3, 384, 512)
        np.testing.assert_array_equal(planes[:, :, :300, :420], IMAGES.transpose(0, 3, 1, 2))
        assert not planes[:, :, 300:].any()
        assert not planes[..., 420:].any()

    def test_other_layouts_are_refused_with_the_remedy(self, few):
        (_, *arguments), _ = few
        with pytest.raises(ValueError, match="to_kernel_layout"):
            ops.render_patches(IMAGES, *arguments, **STATIC, implementation="pallas_tpu_interpret")

    def test_other_patch_sizes_are_refused_with_the_remedy(self, few):
        arguments, _ = few
        static = STATIC | {"canvas": (28, 28), "patch_size": 14}
        with pytest.raises(ValueError, match=r"16 pixels, not 14.*'xla'"):
            ops.render_patches(*arguments, **static, implementation="pallas_tpu_interpret")


IMAGE = (4320, 7680)


def program(sharding, implementation: str, image=IMAGE):
    """Four views with up to 64 outlines of an 8K image, compiled for another machine."""

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    padded = [side + -side % TILE for side in image]
    pixels = (*image, 3) if implementation == "xla" else (3, *padded)
    views = ops.Views(
        image_index=shape(1, 4),
        crop=shape(1, 4, 4),
        target=shape(1, 4, 2),
        outlines=shape(1, 4, 64, 4),
        outline_count=shape(1, 4),
        line_width=shape(1, 4),
    )
    run = partial(
        ops.render_patches, **STATIC | {"canvas": (1536, 2720)}, implementation=implementation
    )
    lists = shape(1, 8192), shape(1, 8192, 2)
    arguments = shape(1, *pixels, dtype=jnp.uint8), shape(1, 2), views, *lists
    return jax.jit(run).trace(*arguments).lower().compile()


@pytest.mark.usefixtures("whole_compilation")
class TestOtherMachines:
    @pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    def test_the_kernel_compiles_for_tpus_and_needs_no_copy_of_the_image(self, topology):
        pytest.importorskip("libtpu")
        sharding = NamedSharding(tpu_mesh(topology, 1, 1, 1), PartitionSpec())
        compiled = program(sharding, "pallas_tpu")
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
        assert compiled.memory_analysis().temp_size_in_bytes < np.prod(IMAGE) * 3 / 4

    def test_bytes_are_normalised_as_written_on_a_tpu(self):
        """Its compiler adds up constants that multiply the same value, one bit off for most bytes;
        there are two products left."""
        pytest.importorskip("libtpu")
        sharding = NamedSharding(tpu_mesh("v5e:2x2", 1, 1, 1), PartitionSpec())
        values = jax.ShapeDtypeStruct((4096, 128), jnp.uint8, sharding=sharding)
        text = jax.jit(ops.normalize).trace(values).lower().compile().as_text()
        assert text.count(" multiply(") == 2

    def test_the_xla_version_compiles_for_an_h100_and_makes_no_copy_of_the_image(self):
        sharding = NamedSharding(mesh_or_skip(gpu_mesh, H100.read_text()), PartitionSpec())
        whole, quarter = (
            program(sharding, "xla", image).memory_analysis().temp_size_in_bytes
            for image in (IMAGE, (IMAGE[0] // 2, IMAGE[1] // 2))
        )
        assert abs(whole - quarter) < np.prod(IMAGE) * 3 / 100
