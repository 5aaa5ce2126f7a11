"""Everything that a run holds, as shapes on a mesh: weights, prompts, caches, batches.

The sizes are the largest that the settings allow: every image fills its pixel budget, a reasoner
sees the annotated image and all crops, every completion runs to its limit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.ops import splash, triton_attention
from p2r_jax.ops.image import Views
from p2r_jax.ops.kernels import Implementation, Kernels
from p2r_jax.parallel.mesh import BATCH_AXES, batch_shards, parameter_shardings
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.inputs import Patches, Prompts
from p2r_jax.rl.experience import phase_sampling
from p2r_jax.rl.step import AnchorBatch, TrainingBatch, TrainState
from p2r_jax.roles.boxes import MAX_CROPS
from p2r_jax.roles.pipeline import greedy_schedule
from p2r_jax.rollout import engine
from p2r_jax.rollout.generate import Schedule, SlotPlan
from p2r_jax.rollout.sampling import Sampling, Vocabulary

TEXT_TOKENS = 512
"""Of a prompt besides its images: room for instructions, question and options."""
IMAGES = {"perceiver": 1, "baseline": 1, "reasoner": 1 + MAX_CROPS}
"""That a role sees."""
PARTNER = {"perceiver": "reasoner", "reasoner": "perceiver"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Padded sizes of a role's prompts."""

    tokens: int
    patches: int
    images: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of one role in one phase."""

    role: str
    learns: bool
    """Sampled by the policy in groups; else written once by the frozen partner."""
    requests: int
    """Prompts of a step."""
    sampling: Sampling
    slots: SlotPlan
    prompt: Prompt


class Shapes:
    """Abstract arrays of a run; `jax.ShapeDtypeStruct`s that lie on `mesh`."""

    def __init__(
        self, config: TrainConfig, model: Qwen3VLConfig, mesh: Mesh, kernels: Implementation
    ):
        self.config, self.model, self.mesh = config, model, mesh
        self.shards = batch_shards(mesh)
        self.compute = jnp.dtype(config.model.compute_dtype)
        self.rollout_dtype = jnp.dtype(config.model.rollout_dtype or config.model.compute_dtype)
        chosen = kernels if config.model.kernels == "auto" else config.model.kernels
        self.kernels = Kernels(chosen, mesh)
        shapes = abstract_model(model, self.kernels)
        self.graph, self._weights = nnx.split(shapes, nnx.Param)
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.by_row = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def executed_scores(self, *sizes: int, causal: bool = True) -> int:
        """That the attention kernels compute; see `ops.splash.executed_scores`."""
        gpu = self.kernels.implementation == "pallas_gpu"
        return (triton_attention if gpu else splash).executed_scores(*sizes, causal=causal)

    # --- weights ----------------------------------------------------------------------------------

    def weights(self, dtype: Any, decoding: bool = False) -> nnx.State:
        """The model's parameters. decoding: not split over fsdp."""
        return jax.tree.map(
            lambda p, s: p.replace(
                jax.ShapeDtypeStruct(p.get_value().shape, dtype, sharding=s.get_value())
            ),
            self._weights,
            parameter_shardings(self._weights, self.mesh, fsdp=not decoding),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    @functools.cached_property
    def trained(self) -> nnx.State:
        return self.weights(self.config.model.param_dtype)

    @functools.cached_property
    def snapshot(self) -> nnx.State:
        return self.weights(self.compute)

    @functools.cached_property
    def decoding(self) -> nnx.State:
        return self.weights(self.rollout_dtype, decoding=True)

    def state(self, optimizer: Any) -> TrainState:
        """Weights and the optimizer's moments, each of which lies where its parameter does."""
        leaves = jax.tree_util.tree_leaves_with_path(self.trained)
        by_path = {jax.tree_util.keystr(path): x for path, x in leaves}

        def place(path: Any, x: Any) -> Any:
            names = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
            own = next((by_path[name] for name in names if name in by_path), None)
            same = own is not None and own.shape == x.shape
            where = own.sharding if own is not None and same else self.whole
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        moments = jax.eval_shape(optimizer.init, self.trained)
        return TrainState(
            self.trained, jax.tree_util.tree_map_with_path(place, moments), self.scalar()
        )

    # --- sizes ------------------------------------------------------------------------------------

    def prompt(self, role: str) -> Prompt:
        """The largest buckets that a role's prompts take. Raises ValueError without a budget."""
        config, vision = self.config, self.model.vision
        if config.model.max_pixels is None:
            raise ValueError("set model.max_pixels: without the checkpoint its budget is unknown")
        unit = vision.merge_unit
        each = config.model.max_pixels // (vision.patch_size**2 * unit) * unit
        patches = IMAGES[role] * each
        tokens = patches // unit + TEXT_TOKENS
        largest = lambda sizes, need: next((size for size in sizes if size >= need), sizes[-1])
        buckets = config.buckets
        return Prompt(
            largest(buckets.prompt_tokens, tokens), largest(buckets.patches, patches), IMAGES[role]
        )

    def rollouts(self, phase: PhaseConfig, learning: PhaseConfig) -> list[Rollout]:
        """What a step of `phase` completes for one role that learns: its own, and the partner's."""
        settings, rings = self.config.rollout, tuple(self.config.buckets.response_tokens)
        own = Schedule(settings.slots, settings.columns, settings.refill, rings)
        sampled = phase_sampling(learning)
        found = [self._rollout(learning.role, True, learning.prompts, sampled, own)]
        if learning.role in PARTNER:
            greedy = Sampling(phase.partner_max_new_tokens, temperature=0.0)
            every = learning.prompts * (learning.group if learning.role == "perceiver" else 1)
            slots = greedy_schedule(settings.greedy_slots, rings, settings.refill)
            found.append(self._rollout(PARTNER[learning.role], False, every, greedy, slots))
        return found

    def _rollout(
        self, role: str, learns: bool, requests: int, sampling: Sampling, schedule: Schedule
    ) -> Rollout:
        plan = SlotPlan.of(
            schedule, requests, sampling, self.mesh, self.model.text, self.rollout_dtype
        )
        return Rollout(role, learns, requests, sampling, plan, self.prompt(role))

    # --- arrays -----------------------------------------------------------------------------------

    def scalar(self, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=self.whole)

    def rows(self, *shape: int, dtype: Any = jnp.int32, lead: tuple[int, ...] = ()) -> Any:
        """An array of shape (*lead, rows, …), split over the batch axes."""
        where = NamedSharding(self.mesh, PartitionSpec(*[None] * len(lead), BATCH_AXES))
        return jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=where)

    def vocabulary(self) -> Vocabulary:
        flags: Any = jax.ShapeDtypeStruct((self.model.text.vocab_size,), bool, sharding=self.whole)
        return Vocabulary(flags, flags, self.scalar())

    def prompts(self, rows: int, size: Prompt) -> Prompts:
        n = size.patches
        return Prompts(
            tokens=self.rows(rows, size.tokens),
            positions=self.rows(rows, size.tokens, lead=(3,)),
            visual_slot=self.rows(rows, size.tokens),
            valid=self.rows(rows, size.tokens),
            next_position=self.rows(rows),
            patches=Patches(
                pixels=self.rows(rows, n, self.model.vision.frame_dim, dtype=jnp.uint8),
                row_col=self.rows(rows, n, 2),
                image_id=self.rows(rows, n),
                pos_index=self.rows(rows, n, 4),
                pos_weight=self.rows(rows, n, 4, dtype=jnp.float32),
            ),
        )

    def images(self, count: int) -> tuple[Any, Any]:
        """Source images in the largest bucket that `buckets.image_gib` has room for, and sizes."""
        config = self.config.buckets
        each = -(-count // self.shards)
        sides = [s for s in config.image if each * s * s * 3 <= config.image_gib * 2**30]
        side = max(sides, default=config.image[0])
        total = each * self.shards
        return self.rows(total, side, side, 3, dtype=jnp.uint8), self.rows(total, 2)

    def views(self, rows: int, size: Prompt) -> Views:
        """Of `rows` prompts; as `roles.requests` rounds them."""
        slots, outlines = (1 if size.images == 1 else 4), 8
        return Views(
            image_index=self.rows(rows, slots),
            crop=self.rows(rows, slots, 4),
            target=self.rows(rows, slots, 2),
            outlines=self.rows(rows, slots, outlines, 4),
            outline_count=self.rows(rows, slots),
            line_width=self.rows(rows, slots),
        )

    def canvas(self) -> tuple[int, int]:
        """The smallest that holds a square image of the whole budget."""
        side = int((self.config.model.max_pixels or 0) ** 0.5)
        sizes = self.config.buckets.canvas
        fits = next((size for size in sizes if size >= side), sizes[-1])
        return fits, fits

    def slots(self, rollout: Rollout, ring: int) -> engine.Slots:
        """Prefixes and columns with a cache of `ring` tokens."""
        plan = rollout.slots
        make = functools.partial(
            engine.empty_slots,
            text=self.model.text,
            sampling=rollout.sampling,
            slots=plan.slots,
            columns=plan.columns,
            prompt=rollout.prompt.tokens,
            ring=ring,
            dtype=self.rollout_dtype,
            mesh=None,
        )
        shapes = jax.eval_shape(make, jax.ShapeDtypeStruct((), jnp.int32))

        def place(path: Any, x: Any) -> Any:
            spec = engine.slot_spec(path, x, self.mesh)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(place, shapes)

    def batch(self, phase: PhaseConfig, reference: bool) -> TrainingBatch:
        """What one role's update is made of; completions of the longest length."""
        shape = (phase.prompts, phase.group, phase.max_new_tokens)
        log_probs = self.rows(*shape, dtype=jnp.float32)
        return TrainingBatch(
            self.prompts(phase.prompts, self.prompt(phase.role)),
            tokens=self.rows(*shape),
            mask=self.rows(*shape, dtype=bool),
            sampler_log_probs=log_probs,
            advantages=self.rows(*shape[:2], dtype=jnp.float32),
            old_log_probs=log_probs if phase.updates_per_step > 1 else None,
            reference_log_probs=log_probs if reference else None,
        )

    def anchor(self, phase: PhaseConfig) -> AnchorBatch | None:
        """The idle role's prompts, as `rl.batches.anchor_batch` takes them."""
        if phase.role not in PARTNER or not phase.role_anchor_prompts or phase.partner == "step":
            return None
        rows = min(phase.role_anchor_prompts, phase.prompts)
        rows = -(-rows // self.shards) * self.shards
        shape = (rows, 1, phase.partner_max_new_tokens)
        prompts = self.prompts(rows, self.prompt(PARTNER[phase.role]))
        return AnchorBatch(prompts, self.rows(*shape), self.rows(*shape, dtype=bool))
