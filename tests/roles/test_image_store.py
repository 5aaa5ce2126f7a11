"""Images split over a mesh: who holds what, that patches are those of one device, the bound."""

from __future__ import annotations

import doctest
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.config import BucketConfig, EvalConfig, EvalDuringTraining, TrainConfig
from p2r_jax.data.loader import LoadedRow, Share
from p2r_jax.data.rows import Row
from p2r_jax.ops.image import Views
from p2r_jax.parallel.hlo import collectives
from p2r_jax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh
from p2r_jax.parallel.topology import tpu_mesh
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles import image_store
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.image_store import (
    ImageStore,
    image_bytes,
    placed_again,
    render_prompts,
    share_of,
)
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets, RequestBuilder

BUCKETS = Buckets(patches=(320,), prompt_tokens=(128,), canvas=(448,), image=(64, 256))
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
BOXES = [Box((100, 200, 300, 400), "a"), Box((600, 50, 980, 400), "b")]


@pytest.fixture(scope="module")
def processor(tiny_files) -> Processor:
    return Processor.from_pretrained(tiny_files)


def builder_on(processor, mesh) -> RequestBuilder:
    return RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS, mesh)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """White noise of several sizes: any pixel that is not its own shows."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (*rng.integers(40, 250, 2), 3)).astype(np.uint8) for _ in range(count)
    ]


def row_of(name: str, image: np.ndarray) -> Row:
    return Row(name, "which?", "A", "mca", ("a", "b"), image_source=image)


def test_examples_in_docstrings():
    assert doctest.testmod(image_store).attempted >= 3
    assert doctest.testmod(image_store).failed == 0


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("count", [3, 8, 13])
def test_patches_are_those_of_one_device_bit_for_bit(processor, sizes, count):
    """Prompts in any order, about images anywhere, some images never asked about."""
    mesh, images = make_mesh(*sizes), pictures(count)
    asked = np.random.default_rng(count).integers(0, count, 11)
    batches = []
    for where in (mesh, None):
        builder = builder_on(processor, where)
        store = ImageStore.upload(images, BUCKETS, where)
        requests = [
            builder.reasoner(store, int(i), "red?", "mca", BOXES[: row % 3])
            if row % 2
            else builder.plain("perceiver", store, int(i), "red?", "mca")
            for row, i in enumerate(asked)
        ]
        batches.append(builder.collate(requests, store).patches)
    on_mesh, alone = batches
    np.testing.assert_array_equal(np.asarray(on_mesh.pixels)[:11], alone.pixels)
    assert len(np.unique(np.asarray(alone.pixels))) > 250  # every grey level, or nearly


@pytest.mark.parametrize("sizes", MESHES)
def test_a_device_holds_its_share_of_the_images(sizes):
    mesh, images = make_mesh(*sizes), pictures(13)
    store = ImageStore.upload(images, BUCKETS, mesh)
    shards = batch_shards(mesh)
    expected = image_bytes(13, (256, 256), shards)
    assert {s.data.nbytes for s in store.pixels.addressable_shards} == {expected}
    assert expected == -(-13 // shards) * 256 * 256 * 3
    for place, image in zip(store.places, images, strict=True):
        height, width = image.shape[:2]
        np.testing.assert_array_equal(store.pixels[place, :height, :width], image)
        np.testing.assert_array_equal(store.sizes[place], [height, width])


def test_images_that_other_processes_hold_need_not_be_here():
    """A process of the first four devices of eight is asked for the places of those alone."""
    mesh, images = make_mesh(8, 1, 1), pictures(8)
    shapes = [i.shape[:2] for i in images]
    rows = [
        LoadedRow(row_of(str(i), image), image if i < 4 else None, shapes[i], i)
        for i, image in enumerate(images)
    ]
    made = []

    def four_of_eight(shape, sharding, callback):
        made.append([callback((slice(i, i + 1),)) for i in range(4)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", four_of_eight)
        store = ImageStore.of_rows(rows, BUCKETS, mesh)
    assert store.shapes == tuple(shapes)
    for i, block in enumerate(made[0]):
        np.testing.assert_array_equal(block[0, : shapes[i][0], : shapes[i][1]], images[i])
    with pytest.raises(ValueError, match="row '4' was loaded for another process"):
        ImageStore.of_rows(rows, BUCKETS, mesh)


def test_room_keeps_one_shape_as_far_as_the_bound_allows():
    rows = [LoadedRow(row_of(str(i), image), image) for i, image in enumerate(pictures(3))]
    assert ImageStore.of_rows(rows, BUCKETS).pixels.shape == (3, 256, 256, 3)
    assert ImageStore.of_rows(rows, BUCKETS, room=4).pixels.shape == (4, 256, 256, 3)
    tight = Buckets((8,), (8,), (8,), (256,), image_bytes=3 * 256**2 * 3)
    assert ImageStore.of_rows(rows, tight, room=4).pixels.shape == (3, 256, 256, 3)


class TestBound:
    def test_more_than_it_is_an_error_that_says_what_to_do(self):
        tight = Buckets((8,), (8,), (8,), (64, 256), image_bytes=2 * 256**2 * 3)
        images = [*pictures(2), np.zeros((200, 70, 3), np.uint8)]
        rows = [LoadedRow(row_of(f"r{i}", image), image) for i, image in enumerate(images[::-1])]
        with pytest.raises(ValueError, match=r"row 'r\d' has .* bucket 256 × 256: 3 on a device"):
            ImageStore.of_rows(rows, tight)
        with pytest.raises(ValueError, match=r"raise buckets\.image_gib"):
            ImageStore.of_rows(rows, tight)

    def test_more_devices_help(self):
        tight = Buckets((8,), (8,), (8,), (64, 256), image_bytes=2 * 256**2 * 3)
        store = ImageStore.upload(pictures(13), tight, make_mesh(8, 1, 1))
        found = {s.data.nbytes for s in store.pixels.addressable_shards}
        assert max(found) <= tight.image_bytes

    def test_no_bucket_names_the_row(self):
        rows = [LoadedRow(row_of("wide", image := np.zeros((20, 300, 3), np.uint8)), image)]
        with pytest.raises(ValueError, match=r"row 'wide': .* 300 .* exceeds .* buckets\.image"):
            ImageStore.of_rows(rows, BUCKETS)

    @pytest.mark.parametrize(
        "config, name",
        [
            (TrainConfig(buckets=BucketConfig(image_gib=0)), "buckets.image_gib"),
            (EvalConfig(image_cache_gib=-1), "image_cache_gib"),
            (TrainConfig(eval=EvalDuringTraining(image_cache_gib=-1)), "eval.image_cache_gib"),
        ],
    )
    def test_settings_that_cannot_work_are_named(self, config, name):
        with pytest.raises(ValueError, match=name):
            config.validate()
        assert Buckets.of(BucketConfig(image_gib=0.5)).image_bytes == 2**29

    def test_parts_keep_within_it(self):
        tight = Buckets((8,), (8,), (8,), (64, 256), image_bytes=2 * 256**2 * 3)
        rng = np.random.default_rng(0)
        shapes = [tuple(int(s) for s in rng.integers(1, 257, 2)) for _ in range(40)]
        shards = [i // 10 for i in range(40)]
        parts = image_store.parts(shapes, shards, tight)
        assert sorted(i for part in parts for i in part) == list(range(40))
        for part in parts:
            each = max(sum(shards[i] == s for i in part) for s in range(4))
            extent = [64 if max(shapes[i][a] for i in part) <= 64 else 256 for a in (0, 1)]
            assert image_bytes(each, extent) <= tight.image_bytes
        assert len(parts) < 10  # and does not simply take them one by one
        assert len(image_store.parts(shapes, shards, BUCKETS)) == 1


class TestPlacedAgain:
    """Images of several batches, none of which may leave its process."""

    two = Share((frozenset({0}), frozenset({0}), frozenset({1}), frozenset({1})))

    def test_one_process_spreads_them_as_in_one_batch(self):
        alone = Share((frozenset({0}),) * 4)
        assert placed_again([3, 3, 3, 0, 0, 1], alone) == alone.shards_of(6)

    @pytest.mark.parametrize("shards", [[0, 0, 0, 0], [3, 2, 1, 0], [2, 2, 3, 0], [0, 3, 3, 3]])
    def test_each_stays_in_its_process(self, shards):
        placed = placed_again(shards, self.two)
        owners = [[self.two.owners[s] for s in own] for own in (shards, placed)]
        assert owners[0] == owners[1]
        # Within the process they are even.
        counts = [placed.count(s) for s in range(4)]
        assert abs(counts[0] - counts[1]) <= 1
        assert abs(counts[2] - counts[3]) <= 1


def test_a_shard_belongs_to_the_processes_of_its_devices():
    at = [[SimpleNamespace(process_index=p) for p in pair] for pair in ((0, 0), (0, 1), (1, 1))]
    mesh = SimpleNamespace(
        devices=np.array(at, object).reshape(3, 1, 2), shape={"data": 3, "fsdp": 1, "tensor": 2}
    )
    share = share_of(mesh)
    assert share.owners == (frozenset({0}), frozenset({0, 1}), frozenset({1}))
    assert share.process == 0
    assert [share.has(shard) for shard in range(3)] == [True, True, False]
    assert share_of(None) == Share()


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_on_four_chips_no_image_leaves_its_chip(implementation):
    """What is exchanged is patches as bytes, of one prompt for each chip."""
    pytest.importorskip("libtpu")
    mesh = tpu_mesh("v5e:2x2", fsdp=4)
    images, rows, views, patches, outlines, patch = 16, 8, 4, 2048, 8, 16
    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    compiled = render_prompts.lower(
        array(images, 2048, 2048, 3, dtype=jnp.uint8),
        array(images, 2),
        Views(
            image_index=array(rows, views),
            crop=array(rows, views, 4),
            target=array(rows, views, 2),
            outlines=array(rows, views, outlines, 4),
            outline_count=array(rows, views),
            line_width=array(rows, views),
        ),
        array(rows, patches),
        array(rows, patches, 2),
        canvas=(1024, 1024),
        patch_size=patch,
        mesh=mesh,
        implementation=implementation,
    ).compile()
    found = collectives(compiled.as_text(), trips=1)
    exchanged = 4 * patches * 3 * patch**2
    assert max(c.bytes for c in found) == exchanged
    assert exchanged < 2048 * 2048 * 3  # less than one image
    # A chip has its four images and (in the layout that XLA resizes from) a copy, never all 16.
    memory, own = compiled.memory_analysis(), image_bytes(images, (2048, 2048), 4)
    assert own < memory.argument_size_in_bytes < 1.01 * own
    assert memory.temp_size_in_bytes < image_bytes(images, (2048, 2048)) - own
