"""The jitted update: one forward over prompt ++ G completions, loss, gradient, optimizer.

B prompts, G completions a prompt, P prompt tokens, R completion tokens. The prompt (and the images
in it) is computed once for its G completions; positions restart after the prompt for each of them.
Gradients equal those of G repeated prompts to rounding. Sums and counts are kept apart until the
end, so microbatches give the gradient of the whole batch exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.config import LossConfig
from p2r_jax.ops.log_probs import token_log_probs
from p2r_jax.parallel.mesh import batch_shards
from p2r_jax.parallel.multihost import put
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.rl.losses import (
    SumCount,
    aggregate_terms,
    aggregation_count,
    kl_estimate,
    sampler_correction,
)
from p2r_jax.rl.losses import policy_loss_terms as policy_terms
from p2r_jax.rl.optimizer import is_vision
from p2r_jax.rollout.engine import last_valid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """Prompts, what was sampled from them, and how good it was."""

    prompts: Prompts
    tokens: Int[Array, "B G R"]
    mask: Bool[Array, "B G R"]
    """True on tokens that are trained; all False for filling rows and dropped samples."""
    sampler_log_probs: Float[Array, "B G R"]
    advantages: Float[Array, "B G"]
    old_log_probs: Float[Array, "B G R"] | None = None
    """The trainer's own, of the policy that sampled; None = the policy has not moved since."""
    reference_log_probs: Float[Array, "B G R"] | None = None
    """For the KL; None = there is none."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """How a batch enters the loss. Static: each one is compiled."""

    loss: LossConfig
    temperature: float = 1.0
    """That the completions were drawn at."""
    horizon: int = 1
    """Tokens, the constant of Dr. GRPO's aggregation."""
    microbatches: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchorBatch:
    """The idle role's prompts with the phase snapshot's own greedy outputs."""

    prompts: Prompts
    tokens: Int[Array, "A 1 R"]
    mask: Bool[Array, "A 1 R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: nnx.State
    """The trained weights, float32 unless `model.param_dtype` says otherwise."""
    opt_state: Any
    skipped: Int[Array, ""]
    """Updates of this phase that were skipped for a non-finite gradient."""


def new_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state a phase starts with: a fresh optimizer, laid out over devices like the weights."""
    # Not under jit, where zeros depend on nothing and all moments would land on one device.
    return with_state(params, optimizer.init(params))


def with_state(params: nnx.State, opt_state: Any) -> TrainState:
    """As `new_state`, with an optimizer that goes on."""
    skipped = jnp.zeros((), jnp.int32)
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        opt_state, skipped = jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else put(x, everywhere),
            (opt_state, skipped),
        )
    return TrainState(params, opt_state, skipped)


Layout = tuple[NamedSharding | None, ...]


def layout_of(state: TrainState) -> Layout:
    """Where each leaf of a state lives, for `train_step`; None where there is no mesh."""
    return tuple(
        x.sharding if isinstance(x.sharding, NamedSharding) else None
        for x in jax.tree.leaves(state)
    )


def _keep_layout(state: TrainState, layout: Layout) -> TrainState:
    leaves, structure = jax.tree.flatten(state)
    pinned = [
        x if where is None else jax.lax.with_sharding_constraint(x, where)
        for x, where in zip(leaves, layout, strict=True)
    ]
    return jax.tree.unflatten(structure, pinned)


def cast(params: Any, dtype: Any) -> Any:
    """Floating-point leaves in `dtype`."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )


def completion_log_probs(
    model: Qwen3VL,
    prompts: Prompts,
    tokens: Int[Array, "B G R"],
    mask: Bool[Array, "B G R"],
    allowed: Bool[Array, " V"],
    temperature: float = 1.0,
    remat: bool = False,
) -> tuple[Float[Array, "B G R"], Float[Array, "B G R"]]:
    """Log-probability of each completion token and entropy of its distribution, float32.

    Equal to running G copies of each prompt, at the cost of one.
    """
    rows, group, length = tokens.shape
    # The last token of a completion predicts nothing that is trained, so it is not fed.
    fed, fed_mask = tokens[:, :, :-1], mask[:, :, :-1]
    prompt_x, deepstack = model.embed_prompts(prompts, remat=remat)
    own_x = model.embed(fed.reshape(rows, -1))
    x = jnp.concatenate([prompt_x, own_x.astype(prompt_x.dtype)], axis=1)
    after = prompts.next_position[:, None, None] + jnp.arange(length - 1)
    after = jnp.broadcast_to(after, (rows, group, length - 1)).reshape(rows, -1)
    positions = jnp.concatenate(
        [prompts.positions, jnp.broadcast_to(after, (3, *after.shape))], axis=2
    )
    visual_slot = jnp.pad(prompts.visual_slot, ((0, 0), (0, after.shape[1])), constant_values=-1)

    def attend(q, k, v, _):
        return model.kernels.shared_prefix(q, k, v, prompts.valid, fed_mask), None

    hidden, _ = model.language_model(
        x, positions, attend, deepstack=deepstack, visual_slot=visual_slot, remat=remat
    )
    boundary = last_valid(hidden, prompts.valid)
    boundary = jnp.broadcast_to(boundary[:, None, None], (rows, group, 1, hidden.shape[-1]))
    own = hidden[:, prompts.tokens.shape[1] :]
    own = own.reshape(rows, group, length - 1, hidden.shape[-1])
    predicting = jnp.concatenate([boundary, own], axis=2)
    log_probs, entropy = token_log_probs(
        predicting.reshape(rows, group * length, hidden.shape[-1]),
        model.unembedding,
        tokens.reshape(rows, group * length),
        allowed,
        temperature,
        shards=1 if model.kernels.mesh is None else batch_shards(model.kernels.mesh),
    )
    return log_probs.reshape(tokens.shape), entropy.reshape(tokens.shape)


@functools.partial(jax.jit, static_argnames=("graph", "objective", "dtype"))
def batch_log_probs(
    graph: nnx.GraphDef,
    params: nnx.State,
    batch: TrainingBatch,
    allowed: Bool[Array, " V"],
    *,
    objective: Objective,
    dtype: Any,
) -> Float[Array, "B G R"]:
    """Log-probs of the batch's completions under other weights: the phase-start snapshot, or the
    policy before the first of several updates. dtype: to compute in."""
    model = nnx.merge(graph, cast(params, dtype))

    def of_part(part: TrainingBatch) -> Float[Array, "b G R"]:
        return completion_log_probs(
            model, part.prompts, part.tokens, part.mask, allowed, objective.temperature
        )[0]

    if objective.microbatches == 1:
        return of_part(batch)
    parts = jax.lax.map(of_part, _split_prompts(batch, objective.microbatches))
    return jnp.moveaxis(parts, 0, 1).reshape(batch.tokens.shape)


@functools.partial(jax.jit, static_argnames=("parts",))
def minibatch(batch: TrainingBatch, number: Int[Array, ""], *, parts: int) -> TrainingBatch:
    """One of `parts` equal parts of a batch: every parts-th prompt, so that no device is idle."""
    return jax.tree.map(lambda x: x[number], _split_prompts(batch, parts))


def _split_prompts(tree: Any, parts: int) -> Any:
    """Leading axis B -> [parts, B / parts]; `Prompts.positions` has its rows on axis 1.

    Part p holds rows p, p + parts, ...: every device then has rows of every part among its own,
    and none has to move.
    """

    def one(path, x):
        axis = 1 if getattr(path[-1], "name", None) == "positions" else 0
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_loss(
    params: nnx.State,
    graph: nnx.GraphDef,
    batch: TrainingBatch,
    allowed: Bool[Array, " V"],
    count: Float[Array, ""],
    *,
    objective: Objective,
    freeze_vision: bool,
    remat: bool,
    dtype: Any,
) -> tuple[Float[Array, ""], dict[str, SumCount]]:
    """Policy loss + KL of (a part of) the batch, divided by the whole batch's `count`."""
    if freeze_vision:
        params = _stop_vision(params)
    model = nnx.merge(graph, params)
    model.set_attributes(compute_dtype=dtype)
    loss, mask = objective.loss, batch.mask
    log_probs, entropy = completion_log_probs(
        model, batch.prompts, batch.tokens, mask, allowed, objective.temperature, remat
    )
    # With one update per rollout the policy that sampled is the policy that is trained. Its
    # probabilities are the trainer's own, not the sampler's.
    old = batch.old_log_probs
    old = jax.lax.stop_gradient(log_probs) if old is None else old
    correction: dict[str, SumCount] = {}
    weights = None
    if loss.sampler_correction is not None:
        weights, correction = sampler_correction(
            old, batch.sampler_log_probs, mask, loss.sampler_correction
        )
    terms, stats = policy_terms(
        log_probs,
        old,
        batch.advantages,
        mask,
        loss.clip_low,
        loss.clip_high,
        loss.dual_clip,
        ratio_level=loss.ratio_level,
        weights=weights,
    )

    def summed(values: Float[Array, "B G R"]) -> Float[Array, ""]:
        return aggregate_terms(values, mask, loss.aggregation, objective.horizon)[0]

    policy = summed(terms)
    total = policy / count
    gap = jnp.where(mask, jnp.abs(old - batch.sampler_log_probs), 0)
    tokens = mask.sum().astype(jnp.float32)
    stats |= {
        "loss/policy": (policy, aggregation_count(mask, loss.aggregation)),
        "entropy/mean": (jnp.where(mask, entropy, 0).sum(), tokens),
        "sampler_gap/mean": (gap.sum(), tokens),
    }
    if correction:
        stats["sampler_gap/prob"] = correction["sampler_prob_gap"]
        stats["sampler_gap/capped_fraction"] = correction["sampler_weight_capped_fraction"]
    if loss.entropy_weight:
        total -= loss.entropy_weight * summed(entropy) / count
    if batch.reference_log_probs is not None:
        kl = kl_estimate(log_probs, batch.reference_log_probs, loss.kl_kind, mask)
        total += loss.kl_weight * summed(kl) / count
        stats["kl/mean"] = (jnp.where(mask, kl, 0).sum(), tokens)
    stats["sampler_gap/max"] = (gap.max(), jnp.ones(()))
    return total, jax.tree.map(jax.lax.stop_gradient, stats)


def _stop_vision(params: nnx.State) -> nnx.State:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.stop_gradient(x) if is_vision(path) else x, params
    )


def anchor_loss(
    params: nnx.State,
    graph: nnx.GraphDef,
    anchor: AnchorBatch,
    allowed: Bool[Array, " V"],
    *,
    freeze_vision: bool,
    remat: bool,
    dtype: Any,
) -> Float[Array, ""]:
    """Cross-entropy on the snapshot's greedy outputs for the idle role, per token."""
    if freeze_vision:
        params = _stop_vision(params)
    model = nnx.merge(graph, params)
    model.set_attributes(compute_dtype=dtype)
    log_probs, _ = completion_log_probs(
        model, anchor.prompts, anchor.tokens, anchor.mask, allowed, 1.0, remat
    )
    return -jnp.where(anchor.mask, log_probs, 0).sum() / jnp.maximum(anchor.mask.sum(), 1)


def _gradient(
    state: TrainState,
    graph: nnx.GraphDef,
    batch: TrainingBatch,
    allowed: Bool[Array, " V"],
    *,
    objective: Objective,
    **shared: Any,
) -> tuple[Float[Array, ""], dict[str, SumCount], nnx.State]:
    """Loss, statistics and gradient of one batch, whatever its microbatches."""
    count = jnp.maximum(aggregation_count(batch.mask, objective.loss.aggregation), 1.0)
    gradient = jax.value_and_grad(batch_loss, has_aux=True)

    def of_part(part: TrainingBatch):
        return gradient(state.params, graph, part, allowed, count, objective=objective, **shared)

    if objective.microbatches == 1:
        (value, stats), grads = of_part(batch)
        return value, stats, grads

    parts = _split_prompts(batch, objective.microbatches)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    # Sums of many small parts: float32, whatever the weights are.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, "f4")), shapes)

    def add(total, part):
        ((old_value, old_stats), old_grads), ((value, stats), grads) = total, of_part(part)
        merged = jax.tree.map(jnp.add, old_stats, stats)
        merged["sampler_gap/max"] = (
            jnp.maximum(old_stats["sampler_gap/max"][0], stats["sampler_gap/max"][0]),
            jnp.ones(()),
        )
        return ((old_value + value, merged), jax.tree.map(jnp.add, old_grads, grads)), None

    ((value, stats), grads), _ = jax.lax.scan(add, zeros, parts)
    return value, stats, grads


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def anchor_drift(
    params: nnx.State,
    graph: nnx.GraphDef,
    anchor: AnchorBatch,
    allowed: Bool[Array, " V"],
    *,
    dtype: Any,
) -> Float[Array, ""]:
    """`anchor_loss` of weights that are not held to it: how far the idle role has drifted."""
    return anchor_loss(
        params, graph, anchor, allowed, freeze_vision=False, remat=False, dtype=dtype
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "graph",
        "optimizer",
        "objectives",
        "freeze_vision",
        "role_anchor",
        "remat",
        "dtype",
        "layout",
    ),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    batches: tuple[TrainingBatch, ...],
    anchor: AnchorBatch | None,
    allowed: Bool[Array, " V"],
    *,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objectives: tuple[Objective, ...],
    freeze_vision: bool = False,
    role_anchor: float = 0.0,
    remat: bool = False,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
) -> tuple[TrainState, tuple[dict[str, Float[Array, ""]], ...]]:
    """One optimizer update. A non-finite gradient leaves the state as it was and is counted.

    batches, objectives: one of each per role that learns. Their losses are added, each divided by
    the tokens (or sequences) of its own role. layout: of `state`, see `layout_of`; the new state
    then lives where the old one did. Left to the compiler it may move, and the next step would be
    compiled again.

    Returns the state and metrics by batch; what belongs to the update as a whole is in the first.
    """
    shared = {"freeze_vision": freeze_vision, "remat": remat, "dtype": dtype}
    all_metrics, grads = [], None
    for batch, objective in zip(batches, objectives, strict=True):
        value, stats, own = _gradient(state, graph, batch, allowed, objective=objective, **shared)
        grads = own if grads is None else jax.tree.map(jnp.add, grads, own)
        metrics = {name: total / jnp.maximum(n, 1) for name, (total, n) in stats.items()}
        all_metrics.append(metrics | {"loss/total": value})
    metrics = all_metrics[0]
    if anchor is not None:
        idle, anchor_grads = jax.value_and_grad(anchor_loss)(
            state.params, graph, anchor, allowed, **shared
        )
        metrics["loss/anchor"] = idle
        if role_anchor:
            grads = jax.tree.map(lambda g, a: g + role_anchor * a, grads, anchor_grads)
    grads = cast(grads, jnp.float32)  # of bfloat16 weights too: norm and clipping are sums
    metrics["grad_norm"] = optax.global_norm(grads)

    finite = jnp.isfinite(metrics["grad_norm"])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    after = TrainState(
        params=keep(optax.apply_updates(state.params, updates), state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
    )
    if layout is not None:
        after = _keep_layout(after, layout)
    return after, tuple(all_metrics)
