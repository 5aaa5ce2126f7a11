"""Requests to the model, and how a list of them becomes one padded batch on the device.

A request is tokens plus views of one uploaded image. Batches take the smallest bucket that holds
them, so a run compiles each program once per bucket whatever the images and boxes are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from p2r_jax.config import BucketConfig
from p2r_jax.ops.image import Views
from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.mesh import batch_sharding, batch_shards
from p2r_jax.parallel.multihost import put
from p2r_jax.qwen3_vl.inputs import Patches, Prompts, patch_layout, round_up, token_layout
from p2r_jax.qwen3_vl.positions import Grid
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.evidence import P2R, Shown, View, gather_evidence, plain_view
from p2r_jax.roles.image_store import ImageStore, render_prompts
from p2r_jax.roles.prompts import PromptSet, Role, build_messages


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt: token row (placeholders expanded) and the views it refers to, in order."""

    tokens: np.ndarray
    image: int
    """Index into the batch's uploaded images."""
    views: tuple[View, ...]
    """() for a request of text alone."""
    has_evidence: bool = True


_SIZES = ("patches", "prompt_tokens", "canvas", "image")


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Allowed padded sizes, increasing. Each one used costs a compilation of each program."""

    patches: tuple[int, ...]
    """Patches a row (all its images)."""
    prompt_tokens: tuple[int, ...]
    canvas: tuple[int, ...]
    """Largest side of a resized image, pixels."""
    image: tuple[int, ...]
    """Largest side of a source image, pixels."""
    image_bytes: int = int(BucketConfig.image_gib * 2**30)
    """Most bytes of source images on one device; see `image_store`."""

    @classmethod
    def of(cls, config: BucketConfig) -> Buckets:
        """The part of the settings that prompts need."""
        sizes: dict[str, Any] = {name: tuple(getattr(config, name)) for name in _SIZES}
        return cls(**sizes, image_bytes=int(config.image_gib * 2**30))

    def __post_init__(self) -> None:
        for name in _SIZES:
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"buckets.{name} must be increasing sizes, got {sizes}")


def fit(sizes: Sequence[int], needed: int, name: str) -> int:
    """The smallest bucket of at least `needed`; ValueError naming the setting if there is none."""
    for size in sizes:
        if size >= needed:
            return size
    raise ValueError(
        f"{needed} exceeds the largest bucket of buckets.{name} = {list(sizes)}: add a larger one "
        "or lower the pixel budget"
    )


class RequestBuilder:
    """Words requests for each role and collates them. One instance serves a whole run."""

    def __init__(
        self,
        processor: Processor,
        prompts: PromptSet,
        buckets: Buckets,
        mesh: Mesh | None = None,
        kernels: Kernels | None = None,
    ):
        """kernels: default, plain XLA."""
        self.processor = processor
        self.prompts = prompts
        self.buckets = buckets
        self.mesh = mesh
        patch_size = processor.config.vision.patch_size
        self.image_ops = (kernels or Kernels()).image_ops(patch_size)

    def plain(
        self, role: Role, images: ImageStore, image: int, question: str, answer_form: str
    ) -> Request:
        """A request that sees the unannotated image: perceiver, baseline or direct."""
        view = plain_view(*images.shapes[image], self.processor.sizes)
        return self._build(role, image, (view,), question, answer_form)

    def reasoner(
        self,
        images: ImageStore,
        image: int,
        question: str,
        answer_form: str,
        boxes: Sequence[Box],
        shown: Shown = P2R,
    ) -> Request:
        """A request that sees the annotated image and the crops of `boxes`."""
        evidence = gather_evidence(*images.shapes[image], boxes, self.processor.sizes, shown)
        return self._build("reasoner", image, evidence.views, question, answer_form, evidence.found)

    def text(self, text: str) -> Request:
        """A request without any image: one user turn. Raises ValueError for a text that spells an
        image placeholder."""
        content = [{"type": "text", "text": text}]
        tokens = self.processor.encode([{"role": "user", "content": content}], [])
        return Request(tokens, 0, ())

    def _build(
        self,
        role: Role,
        image: int,
        views: tuple[View, ...],
        question: str,
        answer_form: str,
        has_evidence: bool = True,
    ) -> Request:
        messages = build_messages(
            self.prompts,
            role,
            question,
            num_images=len(views),
            answer_form=answer_form,
            has_evidence=has_evidence,
        )
        grids = [self.processor.sizes.grid(view.target) for view in views]
        tokens = self.processor.encode(messages, grids)
        return Request(tokens, image, views, has_evidence)

    def collate(self, requests: Sequence[Request], images: ImageStore) -> Prompts:
        """One batch on the device; rows are filled up to a multiple of the mesh's batch shards
        with copies of the last request. `patches` is None if no request has a view, so that the
        vision tower does not run."""
        config, sizes = self.processor.config, self.processor.sizes
        shards = batch_shards(self.mesh) if self.mesh is not None else 1
        requests = [*requests, *[requests[-1]] * (-len(requests) % shards)]
        grids = [[sizes.grid(view.target) for view in r.views] for r in requests]
        num_tokens = fit(
            self.buckets.prompt_tokens, max(len(r.tokens) for r in requests), "prompt_tokens"
        )
        tokens = token_layout(
            [r.tokens for r in requests], grids, config, num_tokens, self.processor.pad_id
        )
        if self.mesh is not None:
            rows = batch_sharding(self.mesh)
            by_axis = jax.sharding.NamedSharding(
                self.mesh, jax.sharding.PartitionSpec(None, *rows.spec)
            )
            positions = put(tokens.pop("positions"), by_axis)
            tokens = put(tokens, rows) | {"positions": positions}
        else:
            tokens = jax.device_put(tokens)
        patches = self._patches(requests, grids, images) if any(grids) else None
        return Prompts(patches=patches, **tokens)

    def _patches(
        self, requests: Sequence[Request], grids: Sequence[Sequence[Grid]], images: ImageStore
    ) -> Patches:
        """The patches of a batch, cut on the device. grids: of each request's views, in patches."""
        config = self.processor.config
        num_patches = fit(
            self.buckets.patches, max(sum(h * w for h, w in g) for g in grids), "patches"
        )
        targets = [view.target for r in requests for view in r.views]
        canvas = tuple(
            fit(self.buckets.canvas, max(t[axis] for t in targets), "canvas") for axis in (0, 1)
        )
        where = batch_sharding(self.mesh) if self.mesh is not None else None
        layout = patch_layout(grids, config, num_patches, where)
        pixels = render_prompts(
            images.pixels,
            images.sizes,
            put(_stack_views(requests, images.places), where),
            layout["image_id"],
            layout["row_col"],
            canvas=canvas,
            patch_size=config.vision.patch_size,
            mesh=self.mesh,
            implementation=self.image_ops,
        )
        return Patches(pixels=pixels, **layout)


def _stack_views(requests: Sequence[Request], places: Sequence[int]) -> Views:
    """Views of a batch [B, S, ...]; S and the number of outlines are rounded up to few sizes.

    places: of each image in the uploaded array.
    """
    most = max(len(r.views) for r in requests)
    slots = round_up(most)
    drawn = max(len(v.outlines) for r in requests for v in r.views)
    outlines = max(4, 1 << max(drawn - 1, 0).bit_length())
    shape = (len(requests), slots)
    out: dict[str, Any] = {
        "image_index": np.zeros(shape, np.int32),
        "crop": np.zeros((*shape, 4), np.int32),
        "target": np.zeros((*shape, 2), np.int32),
        "outlines": np.zeros((*shape, outlines, 4), np.int32),
        "outline_count": np.zeros(shape, np.int32),
        "line_width": np.ones(shape, np.int32),
    }
    for row, request in enumerate(requests):
        if request.views:  # Unused slots too, so that all of a row are on one device.
            out["image_index"][row] = places[request.image]
        for i, view in enumerate(request.views):
            out["crop"][row, i] = view.crop
            out["target"][row, i] = view.target
            count = len(view.outlines)
            if count:
                out["outlines"][row, i, :count] = view.outlines
            out["outline_count"][row, i] = count
            out["line_width"][row, i] = max(1, view.line_width)
    return Views(**out)
