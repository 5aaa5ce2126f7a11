"""The programs of a training step, each as the trainer calls it, on abstract arrays.

    weights    the trained weights laid out for decoding; the snapshot of a phase
    rollout    evidence (draw, crop, resize, cut into patches), prefill with the vision tower, start
               (prompts into slots), decode, grow (a longer cache)
    update     reference log-probs, drift of the idle role, the update

Each names the arrays that lie beside its own arguments and results on a chip while it runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from p2r_jax.config import PhaseConfig
from p2r_jax.parallel.mesh import for_decoding
from p2r_jax.plan.shapes import Rollout, Shapes
from p2r_jax.rl.memory import tree_bytes
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.schedule import learning_roles, microbatches
from p2r_jax.rl.step import (
    Objective,
    anchor_drift,
    batch_log_probs,
    cast,
    layout_of,
    train_step,
)
from p2r_jax.roles.image_store import render_prompts
from p2r_jax.rollout import engine


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    stage: str
    """weights, rollout or update."""
    trace: Callable[[], Any]
    """The traced call, a `jax.stages.Traced`."""
    beside: dict[str, int]
    """Bytes on a chip of arrays that are neither its arguments nor its results, by name."""
    times: float
    """That it runs in a step; of decoding how many tokens, one after another."""
    loop: bool = False
    """Decoding: it runs until data say stop, and is counted by one turn of that loop."""
    scores: dict[int, int] = dataclasses.field(default_factory=dict)
    """Of attention by length of the sequence: how many are computed, for a head and a row."""
    kernel_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of kernels that get the caches of all layers and read one: bytes on a chip, by name."""


def programs(shapes: Shapes) -> list[Program]:
    """All of them, phases one after another. What two phases share is there once: its runs add up,
    and beside it lies what lies beside it in the phase that needs more."""
    found: dict[str, Program] = {}
    for phase in shapes.config.phases:
        for program in _of_phase(shapes, phase):
            name, times = program.name, program.times
            if name in found:
                times += found[name].times
                if sum(found[name].beside.values()) > sum(program.beside.values()):
                    program = found[name]
            found[name] = dataclasses.replace(program, times=times)
    return list(found.values())


def held(shapes: Shapes) -> dict[str, int]:
    """Arrays that a chip holds through the whole run."""
    config = shapes.config
    optimizer = make_optimizer(config.optimizer, 1)
    state = shapes.state(optimizer)
    found = {
        f"trained weights, {config.model.param_dtype}": tree_bytes(state.params),
        f"optimizer, {config.optimizer.name}": tree_bytes(state.opt_state),
        f"snapshot, {shapes.compute}": tree_bytes(shapes.snapshot),
    }
    if config.loss.reference == "start" and config.loss.kl_weight:
        found["weights of the start"] = tree_bytes(shapes.snapshot)
    return found


def _of_phase(shapes: Shapes, phase: PhaseConfig) -> Iterator[Program]:
    always = held(shapes)
    trained, moments, snapshot, *start = always
    images = {"source images": tree_bytes(shapes.images(phase.prompts))}
    own = shapes.decoding
    copies = {"decoding weights of the policy": tree_bytes(own)}
    if phase.partner == "phase" or shapes.config.verifier.kind == "model":
        copies["decoding weights of the partner"] = tree_bytes(own)

    yield from _weights(shapes, always, copies)
    for learning in learning_roles(phase):
        rollouts = shapes.rollouts(phase, learning)
        kept = {
            f"patches of the {learning.role}'s prompts": tree_bytes(
                shapes.prompts(learning.prompts, shapes.prompt(learning.role))
            )
        }
        for rollout in rollouts:
            yield from _rollout(shapes, rollout, always | copies | images | kept)
        beside = {name: always[name] for name in (trained, moments, *start)} | images
        yield from _update(shapes, phase, learning, beside, {snapshot: always[snapshot]})


def _weights(shapes: Shapes, always: dict[str, int], copies: dict[str, int]) -> Iterator[Program]:
    layout = for_decoding(shapes.trained, shapes.mesh)
    to_rollout = jax.jit(lambda p: cast(p, shapes.rollout_dtype), out_shardings=layout)
    held = dict(always)
    del held[next(iter(held))]
    others = dict(list(copies.items())[1:])
    yield Program(
        "weights for decoding",
        "weights",
        lambda: to_rollout.trace(shapes.trained),
        held | others,
        len(copies),
    )
    own = jax.tree.map(lambda x: x.sharding, shapes.trained)
    to_snapshot = jax.jit(lambda p: cast(p, shapes.compute), out_shardings=own)
    yield Program(
        "snapshot of a phase",
        "weights",
        lambda: to_snapshot.trace(shapes.trained),
        dict(list(always.items())[1:2]),
        0,
    )


def _rollout(shapes: Shapes, rollout: Rollout, beside: dict[str, int]) -> Iterator[Program]:
    plan, size, role = rollout.slots, rollout.prompt, rollout.role
    vision = shapes.model.vision
    decoding = next(name for name in beside if name.startswith("decoding weights"))
    without_weights = {k: v for k, v in beside.items() if k != decoding}
    # Prompts of the role that learns are kept for the update; run all at once, they are the same.
    whole = rollout.learns and plan.refill >= rollout.requests
    other_patches = {k: v for k, v in beside.items() if not (whole and k.startswith("patches"))}
    ring = plan.rings[-1]
    caches = shapes.slots(rollout, ring)
    full = {
        f"prefix cache, {plan.slots} × {size.tokens} tokens": tree_bytes(caches[0]),
        f"ring cache, {plan.slots} × {plan.columns} × {ring} tokens": tree_bytes(caches[1]),
    }
    fills = math.ceil(rollout.requests / plan.refill)
    executed = shapes.executed_scores
    prompts = shapes.prompts(plan.refill, size)

    def evidence() -> Any:
        pixels, sizes = shapes.images(rollout.requests if rollout.learns else 1)
        patches = prompts.patches
        assert patches is not None
        return render_prompts.trace(
            pixels,
            sizes,
            shapes.views(plan.refill, size),
            shapes.rows(plan.refill, size.patches),
            patches.row_col,
            canvas=shapes.canvas(),
            patch_size=vision.patch_size,
            mesh=shapes.mesh,
            implementation=shapes.kernels.image_ops(vision.patch_size),
        )

    sizes = f"{plan.refill} × {size.tokens} tokens, {size.patches} patches"
    yield Program(f"evidence, {role}, {sizes}", "rollout", evidence, other_patches | full, fills)
    yield Program(
        f"prefill, {role}, {sizes}",
        "rollout",
        lambda: engine.prefill.trace(shapes.graph, shapes.decoding, prompts),
        {k: v for k, v in (other_patches | full).items() if k != decoding},
        fills,
        scores={
            size.tokens: executed(size.tokens),
            size.patches: executed(size.patches, causal=False),
        },
    )

    def start() -> Any:
        prefix, columns = caches
        keys = prefix.keys
        new = jax.ShapeDtypeStruct(
            (keys.shape[0], plan.refill, *keys.shape[2:]), keys.dtype, sharding=keys.sharding
        )
        boundary = shapes.rows(plan.refill, prefix.boundary.shape[1], dtype=keys.dtype)
        return engine._start.trace(
            prefix,
            {name: getattr(columns, name) for name in engine.STARTED},
            (new, new, boundary),
            prompts.tokens,
            prompts.valid,
            prompts.next_position,
            shapes.rows(plan.refill),
            shapes.rows(plan.refill, dtype=jnp.uint32),
            shapes.scalar(),
            penalize_prompt=rollout.sampling.penalize_prompt,
            mesh=shapes.mesh,
        )

    rings = {k: v for k, v in full.items() if k.startswith("ring")}
    slots = f"{plan.slots} × {plan.columns}"
    yield Program(f"start, {role}, {slots}", "rollout", start, beside | rings, fills)

    def decode(length: int) -> Callable[[], Any]:
        prefix, columns = shapes.slots(rollout, length)
        return lambda: engine.decode.trace(
            shapes.graph,
            shapes.decoding,
            prefix,
            columns,
            shapes.vocabulary(),
            shapes.scalar(),
            shapes.scalar(),
            sampling=rollout.sampling,
        )

    completions = rollout.requests * rollout.sampling.group
    waves = math.ceil(completions / (plan.slots * plan.columns))
    yield Program(
        f"decode, {role}, {slots}, {ring} tokens",
        "rollout",
        decode(ring),
        without_weights,
        waves * rollout.sampling.max_new_tokens,
        loop=True,
        kernel_bytes=_kernel_bytes(caches, shapes.model.text.num_hidden_layers),
    )
    if len(plan.rings) > 1:
        smaller = plan.rings[-2]
        _, columns = shapes.slots(rollout, smaller)
        prefix = {k: v for k, v in full.items() if k.startswith("prefix")}
        yield Program(
            f"grow, {role}, {slots}, {smaller} to {ring} tokens",
            "rollout",
            lambda: engine.resize.trace(columns, ring=ring, mesh=shapes.mesh),
            beside | prefix,
            waves,
        )


def _kernel_bytes(caches: engine.Slots, layers: int) -> dict[str, int]:
    """On TPUs one kernel reads both caches, on GPUs each has its own."""
    prefix, ring = (tree_bytes((own.keys, own.values)) // layers for own in caches)
    return {"decode_attention": prefix + ring, "decode_prefix": prefix, "decode_suffix": ring}


def _update(
    shapes: Shapes,
    phase: PhaseConfig,
    learning: PhaseConfig,
    beside: dict[str, int],
    snapshot: dict[str, int],
) -> Iterator[Program]:
    config = shapes.config
    size = shapes.prompt(learning.role)
    parts = microbatches(phase, shapes.shards)
    every = parts * phase.minibatches if phase.microbatch else 1
    objective = Objective(config.loss, learning.temperature, learning.max_new_tokens, every)
    allowed = shapes.vocabulary().allowed
    # The last token of a completion is not fed; kernels round lengths up to a power of two.
    fed = learning.max_new_tokens - 1
    executed = shapes.executed_scores
    together = size.tokens + learning.group * fed
    scores = {
        together: executed(size.tokens, learning.group, fed),
        size.patches: executed(size.patches, causal=False),
    }
    what = f"{learning.role}, {phase.prompts} × ({size.tokens} + {learning.group} × {fed + 1})"
    shared = {"graph": shapes.graph, "dtype": shapes.compute}
    if config.loss.kl_weight:
        trained = dict(list(beside.items()))
        yield Program(
            f"reference, {what}",
            "update",
            lambda: batch_log_probs.trace(
                params=shapes.snapshot,
                batch=shapes.batch(learning, reference=False),
                allowed=allowed,
                objective=objective,
                **shared,
            ),
            trained,
            1,
            scores=scores,
        )
    anchor, of_anchor = shapes.anchor(learning), dict[int, int]()
    moments = {k: v for k, v in beside.items() if not k.startswith("trained weights")}
    if anchor is not None:
        idle = anchor.tokens.shape[2] - 1
        prompt = anchor.prompts.tokens.shape[1]
        assert anchor.prompts.patches is not None
        patches = anchor.prompts.patches.pixels.shape[1]
        of_anchor = {
            prompt + idle: executed(prompt, 1, idle),
            patches: executed(patches, causal=False),
        }
    if anchor is not None and not phase.role_anchor:
        batch = {"batch of the update": tree_bytes(shapes.batch(learning, reference=True))}
        yield Program(
            f"drift of the other role, {anchor.tokens.shape[0]} × ({prompt} + {idle + 1})",
            "update",
            lambda: anchor_drift.trace(shapes.trained, anchor=anchor, allowed=allowed, **shared),
            moments | snapshot | batch,
            1,
            scores=of_anchor,
        )
    optimizer = make_optimizer(config.optimizer, 1)
    state = shapes.state(optimizer)
    own = dataclasses.replace(learning, prompts=phase.prompts // phase.minibatches)
    images = {k: v for k, v in beside.items() if k == "source images" or "start" in k}
    yield Program(
        f"update, {what}, {parts} microbatches",
        "update",
        lambda: train_step.trace(
            state,
            (shapes.batch(own, reference=bool(config.loss.kl_weight)),),
            anchor if phase.role_anchor else None,
            allowed,
            optimizer=optimizer,
            objectives=(objective,),
            freeze_vision=config.optimizer.freeze_vision,
            role_anchor=phase.role_anchor,
            remat=config.model.remat,
            layout=layout_of(state),
            **shared,
        ),
        images | snapshot,
        phase.updates_per_step,
        scores=scores | of_anchor if phase.role_anchor else scores,
    )
