"""Bytes on one device by what holds them, from shapes and shardings: nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from p2r_jax.config import OptimizerConfig
from p2r_jax.parallel.mesh import batch_shards, for_decoding
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.prompt_scan import Scan
from p2r_jax.rl.schedule import Phase, microbatches
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.image_store import image_bytes, share_of
from p2r_jax.roles.requests import fit
from p2r_jax.roles.verifiers import ModelVerifier
from p2r_jax.rollout.generate import Schedule


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device holds in a phase, at least: bytes by name."""

    always: dict[str, int]
    rollout: dict[str, int]
    """On top, while experience is collected: the largest of the rollouts."""
    update: dict[str, int]
    """On top, in an update."""

    def total(self, stage: str) -> int:
        """Bytes in `rollout` or `update`."""
        return sum(self.always.values()) + sum(getattr(self, stage).values())


def memory_of(trainer: Trainer, phase: Phase, scan: Scan) -> Memory:
    """What a device holds in a phase. scan: of the training rows; its largest prompts are taken."""
    config, own, like = trainer.config, phase.config, trainer.like
    model, compute = config.model, config.model.compute_dtype
    judges = isinstance(trainer.grader.verifier, ModelVerifier)
    always = {
        f"trained weights, {model.param_dtype}": tree_bytes(like),
        f"optimizer, {config.optimizer.name}": opt_state_bytes(config.optimizer, like),
        f"snapshot, {compute}": tree_bytes(like, compute),
    }
    if config.loss.reference == "start" and config.loss.kl_weight:
        always[f"weights of the start, {compute}"] = tree_bytes(like, compute)

    dtype = model.rollout_dtype or compute
    decoding = tree_bytes(like, dtype, for_decoding(like, trainer.mesh))
    rollout = {f"weights for the rollout, {dtype}, not split over fsdp": decoding}
    if own.partner == "phase" or judges:
        rollout["weights of the partner, likewise"] = decoding
    sizes = _Sizes(trainer, scan)
    rollout |= _largest_rollout(trainer, phase, sizes)

    update = {f"gradient, {model.param_dtype}": tree_bytes(like)}
    parts = microbatches(own, batch_shards(trainer.mesh) if trainer.mesh is not None else 1)
    if parts > 1:
        update[f"gradient, summed over {parts} microbatches, float32"] = tree_bytes(like, "float32")
    if compute != model.param_dtype:
        update[f"weights as computed with, {compute}"] = tree_bytes(like, compute)
    if judges:
        update["weights of the verifier, kept"] = decoding

    # Images stay through the step, and so do the patches of the prompts that are trained on.
    batches, each = 1 + own.dynamic_sampling, images_of_a_device(trainer, phase)
    shape = " × ".join(map(str, (each, *sizes.image(), 3)))
    patches = sum(sizes.patch_bytes(role.role, own.prompts) for role in phase.learning)
    pictures = {
        f"images, {shape}, on each device": image_bytes(each, sizes.image()),
        "images of the role that learns, as patches": patches * batches,
    }
    if sizes.shards > 1:
        rollout["patches on their way from device to device"] = sizes.exchange_bytes()
    return Memory(always, rollout | pictures, update | pictures)


def images_of_a_device(trainer: Trainer, phase: Phase) -> int:
    """Source images that one device holds in a step, at most.

    Those chosen from several batches stay with their processes: at worst these have more of them.
    """
    own, share = phase.config, share_of(trainer.mesh)
    each = -(-own.prompts // share.shards)
    if len(set(share.owners)) > 1:
        each = min(each * (1 + own.dynamic_sampling), own.prompts)
    return each


def tree_bytes(tree: Any, dtype: Any = None, layout: Any = None) -> int:
    """Bytes of a tree (shapes with shardings) on one device. dtype, layout: instead of its own."""
    leaves = jax.tree.leaves(tree)
    where = [x.sharding for x in leaves] if layout is None else jax.tree.leaves(layout)
    return sum(_bytes(x, own, dtype) for x, own in zip(leaves, where, strict=True))


def opt_state_bytes(config: OptimizerConfig, params: Any) -> int:
    """Bytes of an optimizer's state on one device. params: shapes, with shardings if there are any.

    What has a parameter's shape is split like it, all else is there whole (see `step.new_state`).
    """
    name = jax.tree_util.keystr
    parameters = {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    state = jax.eval_shape(make_optimizer(config, 1).init, params)
    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        ends = (name(path[i:]) for i in range(len(path)))
        own = next((parameters[end] for end in ends if end in parameters), None)
        like = own is not None and own.shape == x.shape
        total += _bytes(x, getattr(own, "sharding", None) if like else None)
    return total


def _bytes(x: Any, sharding: Any, dtype: Any = None) -> int:
    """Of an array on one device; whole if it has no sharding."""
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * jnp.dtype(dtype or x.dtype).itemsize


def device_bytes() -> int | None:
    """Memory of a device that JAX may use, where the backend tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


class _Sizes:
    """Padded sizes that the largest prompts of a scan take, and what they cost a device."""

    def __init__(self, trainer: Trainer, scan: Scan):
        builder, model, mesh = trainer.pipeline.builder, trainer.config.model, trainer.mesh
        self.scan, self.buckets = scan, builder.buckets
        self.shards = batch_shards(mesh) if mesh is not None else 1
        tensor = mesh.shape["tensor"] if mesh is not None else 1
        text = builder.processor.config.text
        heads = text.num_key_value_heads
        heads //= tensor if heads % tensor == 0 else 1
        item = jnp.dtype(model.rollout_dtype or model.compute_dtype).itemsize
        self.token_bytes = text.num_hidden_layers * heads * text.head_dim * 2 * item
        vision = builder.processor.config.vision
        self.frame_dim = vision.frame_dim

    def bucket(self, role: str, kind: str) -> int:
        return fit(getattr(self.buckets, kind), max(self.scan.needs[role, kind]), kind)

    def image(self) -> tuple[int, int]:
        height, width = map(max, zip(*self.scan.images.shapes, strict=True))
        return fit(self.buckets.image, height, "image"), fit(self.buckets.image, width, "image")

    def up(self, rows: int) -> int:
        """Rows that a batch is filled up to."""
        return -(-rows // self.shards) * self.shards

    def cache_bytes(self, slots: int, tokens: int) -> int:
        """Keys and values of `tokens` in each slot."""
        return self.up(slots) // self.shards * tokens * self.token_bytes

    def patch_bytes(self, role: str, rows: int) -> int:
        """Pixels of the patches of so many prompts."""
        return self.up(rows) // self.shards * self.bucket(role, "patches") * self.frame_dim

    def exchange_bytes(self) -> int:
        """Of `image_store.render_prompts`: one frame of the patches of a prompt for each shard."""
        most = max(self.bucket(role, kind) for role, kind in self.scan.needs if kind == "patches")
        return self.shards * most * self.frame_dim


def _largest_rollout(trainer: Trainer, phase: Phase, sizes: _Sizes) -> dict[str, int]:
    """Of those of the roles that learn and of their partners, which follow each other."""
    settings, partners = trainer.config.rollout, {"perceiver": "reasoner", "reasoner": "perceiver"}
    schedule = Schedule(settings.slots, settings.columns, settings.refill)
    greedy = trainer.pipeline.schedule
    every = []
    for own in phase.learning:
        new = own.max_new_tokens
        every.append(_rollout(sizes, own.role, schedule, own.prompts, own.group, new))
        if own.role in partners:
            new = own.partner_max_new_tokens
            every.append(_rollout(sizes, partners[own.role], greedy, None, 1, new))
    return max(every, key=lambda parts: sum(parts.values()))


def _rollout(
    sizes: _Sizes, role: str, schedule: Schedule, prompts: int | None, group: int, new: int
) -> dict[str, int]:
    """As `rollout.generate` plans it. prompts: None for the partner's, however many there are."""
    slots = sizes.up(schedule.slots or prompts or 1)
    refill = schedule.refill or (slots if prompts and slots >= prompts else slots // 4 or 1)
    refill = min(sizes.up(refill), slots)
    columns = min(schedule.columns or group, group)
    prompt, ring = sizes.bucket(role, "prompt_tokens"), -(-new // 8) * 8
    prefill = sizes.cache_bytes(refill, prompt)
    if prompts is None or refill < prompts:  # Else the batch comes in whole, with its patches.
        prefill += sizes.patch_bytes(role, refill)
    prefix, rings = (sizes.cache_bytes(slots, tokens) for tokens in (prompt, columns * ring))
    return {
        f"prefix cache of the {role}, {slots} slots × {prompt} tokens": prefix,
        f"ring cache of the {role}, {slots} slots × {columns} × {ring} tokens": rings,
        f"prefill of the {role}, {refill} prompts at once": prefill,
    }
