"""Source images of a batch, each on one of the device groups that a batch is split over.

A device holds the images of its shard and nothing else, and a process decodes only the images that
its devices hold. Prompts need images of other shards: every device cuts the patches of its own
images for all of them, and one exchange of bytes hands each prompt its patches.

    bytes of images on a device = ceil(images / shards) × height × width × 3

Height and width are the buckets that hold the largest image of the batch; shards is mesh.data ×
mesh.fsdp. `Buckets.image_bytes` is the most that this may be.

Shapes: I images in shards × K places of H×W pixels; B prompts (rows) of S views and N patches.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Int32, UInt8

from p2r_jax.data.loader import LoadedRow, Share
from p2r_jax.ops.image import Implementation, Views, render_patches
from p2r_jax.parallel.mesh import BATCH_AXES, batch_sharding, batch_shards
from p2r_jax.parallel.multihost import put

if TYPE_CHECKING:
    from p2r_jax.roles.requests import Buckets


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """The source images of a step, uploaded once as one uint8 array; see the module."""

    pixels: jax.Array
    """uint8 [shards × K, H, W, 3], split over the batch axes of the mesh. Zeros where there is no
    image."""
    sizes: jax.Array
    """int32 [shards × K, 2], height and width, split likewise."""
    shapes: tuple[tuple[int, int], ...]
    """(height, width) of each image, on the host of every process."""
    places: tuple[int, ...] = ()
    """Where each image is in `pixels`; () if there are no pixels."""

    @classmethod
    def upload(
        cls, images: Sequence[np.ndarray], buckets: Buckets, mesh: Mesh | None = None
    ) -> ImageStore:
        """images: uint8 [H, W, 3] each, the same on every process.

        Raises ValueError for an image that no bucket holds, or for more bytes on a device than
        `buckets.image_bytes`.
        """
        shapes = [(int(i.shape[0]), int(i.shape[1])) for i in images]
        shards = share_of(mesh).shards_of(len(images))
        names = [f"image {i}" for i in range(len(images))]
        return cls._place(list(images), shapes, shards, names, buckets, mesh)

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[LoadedRow],
        buckets: Buckets,
        mesh: Mesh | None = None,
        room: int = 0,
    ) -> ImageStore:
        """The images of these rows, on the shards that they were loaded for.

        room: allocate as for so many images, so that batches of fewer compile nothing new. Raises
        as `upload` does, naming the row.
        """
        share = share_of(mesh)
        shards = [row.shard for row in rows if row.shard is not None]
        if len(shards) < len(rows):
            shards = share.shards_of(len(rows))
        least = -(-max(room, 1) // share.shards)
        names = [f"row {row.row.id!r}" for row in rows]
        images = [row.pixels for row in rows]
        return cls._place(images, [row.size for row in rows], shards, names, buckets, mesh, least)

    @classmethod
    def empty(cls) -> ImageStore:
        """No image, for requests of text alone."""
        return cls(jnp.zeros((0, 1, 1, 3), jnp.uint8), jnp.zeros((0, 2), jnp.int32), ())

    @classmethod
    def _place(
        cls,
        images: Sequence[np.ndarray | None],
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Any],
        names: Sequence[str],
        buckets: Buckets,
        mesh: Mesh | None,
        least: int = 1,
    ) -> ImageStore:
        """least: places that a shard gets at least, if they may be so many."""
        each = max(collections.Counter(shards).values())
        height, width = checked_buckets(shapes, each, names, buckets)
        if image_bytes(least, (height, width)) <= buckets.image_bytes:
            each = max(each, least)
        free = collections.Counter[int]()
        places = []
        for shard in shards:
            places.append(shard * each + free[shard])
            free[shard] += 1
        by_place = dict(zip(places, range(len(images)), strict=True))

        @functools.cache  # Several devices may hold the same.
        def block(own: range) -> np.ndarray:
            """These places; their images are of this process."""
            pixels = np.zeros((len(own), height, width, 3), np.uint8)
            for to, place in enumerate(own):
                if (i := by_place.get(place)) is not None:
                    image = images[i]
                    if image is None:
                        raise ValueError(f"{names[i]} was loaded for another process")
                    pixels[to, : image.shape[0], : image.shape[1]] = image
            return pixels

        total = each * (batch_shards(mesh) if mesh is not None else 1)
        sizes = np.zeros((total, 2), np.int32)
        sizes[places] = shapes
        if mesh is None:
            pixels, on_device = jax.device_put((block(range(total)), sizes))
        else:
            where = batch_sharding(mesh)

            def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
                return block(range(total)[index[0]] if index else range(total))

            pixels = jax.make_array_from_callback((total, height, width, 3), where, of_device)
            on_device = put(sizes, where)
        return cls(pixels, on_device, tuple(shapes), tuple(places))


def share_of(mesh: Mesh | None) -> Share:
    """Which process has which shard of a batch."""
    if mesh is None:
        return Share()
    by_shard = mesh.devices.reshape(batch_shards(mesh), -1)
    owners = [frozenset(device.process_index for device in own) for own in by_shard]
    return Share(tuple(owners), jax.process_index())


# --- how much memory ------------------------------------------------------------------------------


def image_bytes(count: int, extent: Sequence[int], shards: int = 1) -> int:
    """Bytes of `count` images on one device. extent: buckets that hold the largest of them.

    >>> image_bytes(64, (4096, 4096), shards=16) / 2**20
    192.0
    """
    return -(-count // shards) * math.prod(extent) * 3


def checked_buckets(
    shapes: Sequence[tuple[int, int]], each: int, names: Sequence[str], buckets: Buckets
) -> tuple[int, int]:
    """Height and width that hold all images, `each` of which are on one device.

    Raises ValueError naming the image, the bucket and what to do if there is no such bucket, or if
    they take more than `buckets.image_bytes`.
    """
    every = range(len(shapes))
    largest = [max(every, key=lambda i: shapes[i][0]), max(every, key=lambda i: shapes[i][1])]
    extent = []
    for axis, i in enumerate(largest):
        size = next((size for size in buckets.image if size >= shapes[i][axis]), None)
        if size is None:
            raise ValueError(
                f"{names[i]}: a side of {shapes[i][axis]} pixels exceeds the largest bucket of "
                f"buckets.image = {list(buckets.image)}: add a larger one or shrink the image"
            )
        extent.append(size)
    height, width = extent
    needed = image_bytes(each, (height, width))
    if needed > buckets.image_bytes:
        i = max(largest, key=lambda i: math.prod(shapes[i]))
        raise ValueError(
            f"{names[i]} has {shapes[i][0]} × {shapes[i][1]} pixels, so every image of its batch "
            f"takes the bucket {height} × {width}: {each} on a device are {needed / 2**30:.2f} GiB,"
            f" more than buckets.image_gib = {buckets.image_bytes / 2**30:g}. Shrink the image, add"
            " a bucket between to buckets.image, take smaller batches (prompts of the phase, batch "
            "of an evaluation) or more devices (mesh.data, mesh.fsdp), or raise buckets.image_gib"
        )
    return height, width


def parts(
    shapes: Sequence[tuple[int, int]], shards: Sequence[int], buckets: Buckets
) -> list[list[int]]:
    """Numbers of images that may be on the devices together, all of them in as few parts as that
    takes; large images keep to themselves. shards: of each image.

    >>> from p2r_jax.roles.requests import Buckets
    >>> buckets = Buckets((8,), (8,), (8,), image=(10, 100), image_bytes=30000)
    >>> parts([(9, 9), (90, 90), (8, 8), (99, 9)], [0, 0, 0, 0], buckets)
    [[0, 2, 3], [1]]
    """

    def bucket(sides: Sequence[int]) -> list[int]:
        # What no bucket holds is an error of the upload, which names it.
        return [next((b for b in buckets.image if b >= s), s) for s in sides]

    # By size, and of equal ones the first of each shard, then the second of each.
    areas = [math.prod(bucket(shape)) for shape in shapes]
    kinds = list(zip(areas, shards, strict=True))
    order = sorted(range(len(shapes)), key=lambda i: (areas[i], kinds[:i].count(kinds[i])))
    found: list[list[int]] = []
    for i in order:
        if found:
            together = [*found[-1], i]
            each = max(collections.Counter(shards[j] for j in together).values())
            sides = [max(shapes[j][axis] for j in together) for axis in (0, 1)]
            if image_bytes(each, bucket(sides)) <= buckets.image_bytes:
                found[-1] = together
                continue
        found.append([i])
    return [sorted(part) for part in found]


def placed_again(shards: Sequence[int], share: Share) -> list[int]:
    """Shards for images that come from several batches, spread as evenly as they can be without
    any of them leaving its process.

    >>> placed_again([1, 1, 0, 1], Share((frozenset({0}),) * 4))
    [0, 1, 2, 3]
    """
    each = -(-len(shards) // share.shards)
    free = {shard: each for shard in range(share.shards)}
    placed: dict[int, int] = {}
    for i, shard in enumerate(shards):
        if share.owners[i // each] == share.owners[shard]:
            placed[i] = i // each
            free[i // each] -= 1
    for i, shard in enumerate(shards):
        if i not in placed:
            own = [s for s in free if share.owners[s] == share.owners[shard]]
            placed[i] = max(own, key=lambda s: free[s])
            free[placed[i]] -= 1
    return [placed[i] for i in range(len(shards))]


# --- from images to patches -----------------------------------------------------------------------


@functools.partial(
    jax.jit,
    static_argnames=("canvas", "patch_size", "mesh", "implementation"),
)
def render_prompts(
    images: UInt8[Array, "I H W 3"],
    sizes: Int32[Array, "I 2"],
    views: Views,
    image_id: Int32[Array, "B N"],
    row_col: Int32[Array, "B N 2"],
    *,
    canvas: tuple[int, int],
    patch_size: int,
    mesh: Mesh | None,
    implementation: Implementation = "xla",
) -> UInt8[Array, "B N D"]:
    """`render_patches` for images and rows that are both split over the batch axes of a mesh.

    All views of a row are of one image; their `image_index` is its place in `images`. image_id: 1
    for patches of the first view, 2 of the second and so on, 0 for padding. The result are the
    bytes (D = 3·p·p) that `render_patches` normalises, see `qwen3_vl.inputs.pixel_values`;
    those of padding mean nothing. On top of it a device needs the patches of `shards` rows: shards
    × N × D bytes.
    """
    alone = mesh is None or batch_shards(mesh) == 1
    if implementation != "xla":
        from p2r_jax.ops.image_kernel import to_kernel_layout
    settings: dict[str, Any] = {"canvas": canvas, "patch_size": patch_size}
    settings["implementation"] = implementation

    slot = image_id - 1

    def render(images: Array, *about: Any) -> Array:
        images = images if implementation == "xla" else to_kernel_layout(images)
        if alone:
            return _bytes(render_patches(images, *about, temporal_patch_size=1, **settings))
        return _render_and_exchange(images, *about, **settings)

    if mesh is None:
        return render(images, sizes, views, slot, row_col)
    # The loop over views must stay on its own rows; the partitioner would run it everywhere.
    rows = PartitionSpec(BATCH_AXES)
    split = jax.shard_map(render, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return split(images, sizes, views, slot, row_col)


def _render_and_exchange(
    images: UInt8[Array, "K H W 3"],
    sizes: Int32[Array, "K 2"],
    views: Views,
    slot: Int32[Array, "b N"],
    row_col: Int32[Array, "b N 2"],
    *,
    canvas: tuple[int, int],
    patch_size: int,
    implementation: Implementation,
) -> UInt8[Array, "b N D"]:
    """On one device: its K images, and its b rows, whose images may be anywhere.

    One row of every shard at a time: all devices hear what these rows show, cut the patches of
    those whose image they have, and leave the others 0; the sum over devices is what each row gets.
    """
    first = lax.axis_index(BATCH_AXES) * images.shape[0]
    shape = (slot.shape[1], 3 * patch_size**2)

    def render_row(row: tuple[Views, Array, Array]) -> Array:
        views, slot, row_col = row
        local = views.image_index - first

        def render() -> Array:
            one = dataclasses.replace(views, image_index=local), slot, row_col
            patches = render_patches(
                images,
                sizes,
                *jax.tree.map(lambda x: x[None], one),
                canvas=canvas,
                patch_size=patch_size,
                temporal_patch_size=1,
                implementation=implementation,
            )
            return _bytes(patches[0])

        here = (local[0] >= 0) & (local[0] < images.shape[0])
        return lax.cond(here, render, lambda: jnp.zeros(shape, jnp.uint8))

    def one_of_each(_: None, rows: tuple[Views, Array, Array]) -> tuple[None, Array]:
        patches = lax.map(render_row, lax.all_gather(rows, BATCH_AXES))
        return None, lax.psum_scatter(patches, BATCH_AXES, scatter_dimension=0)

    return lax.scan(one_of_each, None, (views, slot, row_col))[1]


def _bytes(patches: Float32[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Back to what they are made of, exactly: a quarter of the memory."""
    return jnp.round((patches + 1) * 127.5).astype(jnp.uint8)
