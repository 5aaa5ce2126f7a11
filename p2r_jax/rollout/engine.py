"""The compiled half of the rollout engine: prompts into slots, and decoding what is in them.

B slots hold a prompt each, W columns of a slot decode completions of that prompt at once. When a
completion ends, its column goes on with the next of the G completions of the prompt; when all have
ended, the slot is free for another prompt. All shapes are fixed, so nothing recompiles while
prompts come and go.

    empty_slots    room for B prompts of P tokens
    prefill        run F prompts once
    fill           the same, and put each into a slot
    decode         step until the host has something to do
    resize         another cache length

A prompt's keys and values exist once and are read by all its completions. What a completion has
written itself lies in a ring of C places: every column writes at the same place, `clock % C`, and
reads as many places back as it has tokens. So columns of different age need no scatter, C only has
to hold the oldest completion alive, and a new completion needs nothing to be cleared.

Letters besides: L layers, K key-value heads, D head width, E width, V vocabulary,
R `max_new_tokens`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.parallel.mesh import BATCH_AXES, batch_shards
from p2r_jax.qwen3_vl.config import TextConfig
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.rollout.sampling import Sampling, Vocabulary, draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prompt that has been run: one copy, read by all its completions."""

    keys: Float[Array, "L B K P D"]
    values: Float[Array, "L B K P D"]
    valid: Int[Array, "B P"]
    next_position: Int[Array, " B"]
    boundary: Float[Array, "B E"]
    """Hidden state of the last prompt token: the first token of every completion comes from it."""
    seed: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None
    """Tokens that the repetition penalty counts from the start; None without a penalty."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Completions in progress and the tokens they have."""

    next_index: Int[Array, " B"]
    """The next of the G completions to start."""
    active: Bool[Array, "B W"]
    index: Int[Array, "B W"]
    """Which of the G completions a column writes."""
    age: Int[Array, "B W"]
    """Tokens of it that have been fed, all of them in the ring."""
    hidden: Float[Array, "B W E"]
    """State that the next token is drawn from."""
    seen: Bool[Array, "B W V"] | None
    keys: Float[Array, "L B K W C D"]
    values: Float[Array, "L B K W C D"]
    tokens: Int[Array, "B G R"]
    log_probs: Float[Array, "B G R"]
    clock: Int[Array, ""]
    """Decoding steps so far."""
    drawn: Int[Array, ""]
    """Tokens drawn in them: clock * B * W if no column was ever idle."""


Slots = tuple[Prefix, Columns]


def _split(x: Any, mesh: Mesh | None) -> Any:
    """Slots over the batch axes, key-value heads over `tensor`; so a step never moves a cache."""
    if mesh is None:
        return x

    def one(path: Any, leaf: Array) -> Array:
        where = NamedSharding(mesh, slot_spec(path, leaf, mesh))
        return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree_util.tree_map_with_path(one, x)


def slot_spec(path: Any, leaf: Any, mesh: Mesh) -> PartitionSpec:
    """How a leaf of `Slots` is split; path: as `jax.tree_util` gives it."""
    if _is_cache(path):
        return _cache_spec(leaf, mesh)
    return PartitionSpec(BATCH_AXES) if leaf.ndim else PartitionSpec()


def _is_cache(path: Any) -> bool:
    return getattr(path[-1], "name", None) in ("keys", "values")


def _cache_spec(cache: Any, mesh: Mesh) -> PartitionSpec:
    heads = "tensor" if cache.shape[2] % mesh.shape["tensor"] == 0 else None
    return PartitionSpec(None, BATCH_AXES, heads)


@functools.partial(
    jax.jit,
    static_argnames=("text", "sampling", "slots", "columns", "prompt", "ring", "dtype", "mesh"),
)
def empty_slots(
    pad: Int[Array, ""],
    *,
    text: TextConfig,
    sampling: Sampling,
    slots: int,
    columns: int,
    prompt: int,
    ring: int,
    dtype: Any,
    mesh: Mesh | None,
) -> Slots:
    """B = `slots` with W = `columns`, for prompts of up to P = `prompt` tokens, C = `ring`."""
    heads, width, layers = text.num_key_value_heads, text.head_dim, text.num_hidden_layers
    whole, remembers = (slots, columns), sampling.remembers
    prefix_cache = jnp.zeros((layers, slots, heads, prompt, width), dtype)
    ring_cache = jnp.zeros((layers, slots, heads, columns, ring, width), dtype)
    written = (slots, sampling.group, sampling.max_new_tokens)
    prefix = Prefix(
        keys=prefix_cache,
        values=prefix_cache,
        valid=jnp.zeros((slots, prompt), jnp.int32),
        next_position=jnp.zeros(slots, jnp.int32),
        boundary=jnp.zeros((slots, text.hidden_size), dtype),
        seed=jnp.zeros(slots, jnp.uint32),
        seen=jnp.zeros((slots, text.vocab_size), bool) if remembers else None,
    )
    state = Columns(
        next_index=jnp.zeros(slots, jnp.int32),
        active=jnp.zeros(whole, bool),
        index=jnp.zeros(whole, jnp.int32),
        age=jnp.zeros(whole, jnp.int32),
        hidden=jnp.zeros((*whole, text.hidden_size), dtype),
        seen=jnp.zeros((*whole, text.vocab_size), bool) if remembers else None,
        keys=ring_cache,
        values=ring_cache,
        tokens=jnp.full(written, pad, jnp.int32),
        log_probs=jnp.zeros(written, jnp.float32),
        clock=jnp.zeros((), jnp.int32),
        drawn=jnp.zeros((), jnp.int32),
    )
    return _split((prefix, state), mesh)


@functools.partial(jax.jit, static_argnames=("graph",))
def prefill(
    graph: nnx.GraphDef, params: nnx.State, prompts: Prompts
) -> tuple[Float[Array, "L F K p D"], Float[Array, "L F K p D"], Float[Array, "F E"]]:
    """Encode the images and run F prompts once: keys, values, and boundary states.

    Nothing here depends on slots, rings or sampling: the most expensive program is compiled once
    for each size of the prompts.
    """
    model = nnx.merge(graph, params)
    x, deepstack = model.embed_prompts(prompts)

    def attend(q, k, v, _):
        out = model.kernels.causal(q, k, v, prompts.valid)
        return out, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))

    hidden, (keys, values) = model.language_model(
        x, prompts.positions, attend, deepstack=deepstack, visual_slot=prompts.visual_slot
    )
    return keys, values, last_valid(hidden, prompts.valid)


def last_valid(x: Float[Array, "B P E"], valid: Int[Array, "B P"]) -> Float[Array, "B E"]:
    """What belongs to the last valid token of each row, under left or right padding."""
    # Along an axis, not by row numbers: a row then never asks for what another device holds.
    return jnp.take_along_axis(x, last_index(valid)[:, None, None], axis=1)[:, 0]


def last_index(valid: Int[Array, "B P"]) -> Int[Array, " B"]:
    """Index of the last valid token of each row, under left or right padding."""
    return valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)


def fill(
    graph: nnx.GraphDef,
    params: nnx.State,
    prefix: Prefix,
    state: Columns,
    prompts: Prompts,
    slot: Int[Array, " F"],
    seeds: Int[Array, " F"],
    pad: Int[Array, ""],
    sampling: Sampling,
    mesh: Mesh | None,
) -> Slots:
    """Run F prompts and put each into its slot, where its first completions start.

    slot: out of range for rows that only fill up the batch. On a mesh, rows and slots are split
    alike and `slot` counts within the device's own slots, so no cache moves between devices. The
    prompts may be shorter than the slots, not longer.
    """
    own = {name: getattr(state, name) for name in STARTED}
    new = prefill(graph, params, prompts)
    prefix, own = _start(
        prefix, own, new, prompts.tokens, prompts.valid, prompts.next_position, slot, seeds, pad,
        penalize_prompt=sampling.penalize_prompt, mesh=mesh,
    )  # fmt: skip
    return prefix, dataclasses.replace(state, **own)


STARTED = ("next_index", "active", "index", "age", "hidden", "seen", "tokens", "log_probs")
"""What of `Columns` changes when a prompt comes into a slot; not the rings."""


@functools.partial(
    jax.jit, static_argnames=("penalize_prompt", "mesh"), donate_argnames=("prefix", "own")
)
def _start(
    prefix: Prefix,
    own: dict[str, Any],
    new: tuple[Array, Array, Array],
    prompt_tokens: Int[Array, "F p"],
    valid: Int[Array, "F p"],
    next_position: Int[Array, " F"],
    slot: Int[Array, " F"],
    seeds: Int[Array, " F"],
    pad: Int[Array, ""],
    *,
    penalize_prompt: bool,
    mesh: Mesh | None,
) -> tuple[Prefix, dict[str, Any]]:
    keys, values, boundary = new
    rows, columns = slot.shape[0], own["active"].shape[1]
    seen = None
    if prefix.seen is not None:
        seen = jnp.zeros((rows, prefix.seen.shape[1]), bool)
        if penalize_prompt:
            mark = jax.vmap(lambda seen, token, counts: seen.at[token].max(counts))
            seen = mark(seen, prompt_tokens, valid.astype(bool))
    room = prefix.valid.shape[1] - valid.shape[1]
    arrived = Prefix(
        keys=keys.astype(prefix.keys.dtype),
        values=values.astype(prefix.values.dtype),
        valid=jnp.pad(valid, ((0, 0), (0, room))),
        next_position=next_position,
        boundary=boundary.astype(prefix.boundary.dtype),
        seed=seeds,
        seen=seen,
    )
    spread = lambda x: jnp.broadcast_to(x[:, None], (rows, columns, *x.shape[1:]))
    first = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (rows, columns))
    started = {
        "next_index": jnp.full(rows, columns, jnp.int32),
        "active": jnp.ones((rows, columns), bool),
        "index": first,
        "age": jnp.zeros_like(first),
        "hidden": spread(arrived.boundary),
        "seen": spread(seen) if seen is not None else None,
        "tokens": jnp.full((rows, *own["tokens"].shape[1:]), pad, jnp.int32),
        "log_probs": jnp.zeros((rows, *own["log_probs"].shape[1:]), jnp.float32),
    }
    return _split(_put((prefix, own), (arrived, started), slot, mesh), mesh)


def _put(old: Any, new: Any, slot: Int[Array, " F"], mesh: Mesh | None) -> Any:
    """Rows of `new` into the slots of `old`; see `fill`. Caches may be shorter than there is room
    for: what lies behind is not valid, and stays."""

    def run(old: Any, new: Any, slot: Array) -> Any:
        def one(path: Any, x: Array, rows: Array) -> Array:
            if _is_cache(path):
                return x.at[:, slot, :, : rows.shape[3]].set(rows, mode="drop")
            return x.at[slot].set(rows, mode="drop")

        return jax.tree_util.tree_map_with_path(one, old, new)

    if mesh is None:
        return run(old, new, slot)
    by_row = PartitionSpec(BATCH_AXES)
    spec = lambda path, x: _cache_spec(x, mesh) if _is_cache(path) else by_row
    specs = jax.tree_util.tree_map_with_path(spec, old)
    return jax.shard_map(
        run, mesh=mesh, in_specs=(specs, specs, by_row), out_specs=specs, check_vma=False
    )(old, new, slot)


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames=("state",))
def decode(
    graph: nnx.GraphDef,
    params: nnx.State,
    prefix: Prefix,
    state: Columns,
    vocabulary: Vocabulary,
    free: Int[Array, ""],
    each: Int[Array, ""],
    sampling: Sampling,
) -> Columns:
    """Step until all is done, or the ring is full, or `free` slots are free, of which at most
    `each` of a device count."""
    model = nnx.merge(graph, params)
    shards = 1 if model.kernels.mesh is None else batch_shards(model.kernels.mesh)
    ring = state.keys.shape[4]

    def goes_on(state: Columns) -> Bool[Array, ""]:
        idle = ~state.active.any(1)
        enough = jnp.minimum(idle.reshape(shards, -1).sum(1), each).sum() >= free
        return state.active.any() & (state.age.max() < ring) & ~enough

    def step(state: Columns) -> Columns:
        return _split(_step(model, prefix, state, vocabulary, sampling), model.kernels.mesh)

    return jax.lax.while_loop(goes_on, step, state)


def _step(
    model: Qwen3VL, prefix: Prefix, state: Columns, vocabulary: Vocabulary, sampling: Sampling
) -> Columns:
    """One token of every active completion: draw it, write it down, feed it."""
    token, log_p = draw(
        state.hidden, model.unembedding, vocabulary, sampling,
        prefix.seed, state.index, state.age, state.seen,
    )  # fmt: skip
    index = jnp.where(state.active, state.index, sampling.group)  # out of range: not written
    # By row, so that the partitioner sees that no row writes into another.
    write = jax.vmap(lambda out, index, age, new: out.at[index, age].set(new, mode="drop"))
    tokens = write(state.tokens, index, state.age, token)
    log_probs = write(state.log_probs, index, state.age, log_p)

    full = state.age + 1 == sampling.max_new_tokens
    ended = state.active & (vocabulary.stop[token] | full)
    feeds = state.active & ~ended
    following = state.next_index[:, None] + jnp.cumsum(ended, axis=1) - 1
    starts = ended & (following < sampling.group)

    # The last tokens of the last completions need not be fed. The caches stay outside of the
    # conditional, which would copy them on a GPU.
    nothing = jax.tree.map(
        jnp.zeros_like, (state.keys[..., :1, :], state.values[..., :1, :], state.hidden)
    )
    keys, values, hidden = jax.lax.cond(
        feeds.any(), lambda: _feed(model, prefix, state, token), lambda: nothing
    )
    place = state.clock % state.keys.shape[4]
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(cache, new, place, axis=4)
        for cache, new in ((state.keys, keys), (state.values, values))
    )
    seen = state.seen
    if seen is not None and prefix.seen is not None:
        mark = jax.vmap(jax.vmap(lambda seen, token, new: seen.at[token].max(new)))
        seen = mark(seen, token, feeds)
        seen = jnp.where(starts[..., None], prefix.seen[:, None], seen)
    return Columns(
        next_index=state.next_index + starts.sum(1),
        active=feeds | starts,
        index=jnp.where(starts, following, state.index),
        age=jnp.where(feeds, state.age + 1, 0),
        hidden=jnp.where(starts[..., None], prefix.boundary[:, None], hidden),
        seen=seen,
        keys=keys,
        values=values,
        tokens=tokens,
        log_probs=log_probs,
        clock=state.clock + 1,
        drawn=state.drawn + state.active.sum(),
    )


def _feed(
    model: Qwen3VL, prefix: Prefix, state: Columns, token: Int[Array, "B W"]
) -> tuple[Array, Array, Float[Array, "B W E"]]:
    """Run one token of each column; its keys and values, [L, B, K, W, 1, D], and hidden state."""
    ring = state.keys.shape[4]
    back = (state.clock - 1 - jnp.arange(ring)) % ring  # 0 = written in the last step
    in_ring = back < state.age[..., None]
    positions = jnp.broadcast_to(prefix.next_position[:, None] + state.age, (3, *token.shape))

    def attend(q, k, v, layer):
        out = model.kernels.decode(
            q, k, v, (prefix.keys, prefix.values), (state.keys, state.values),
            layer, prefix.valid, in_ring,
        )  # fmt: skip
        return out, (k, v)

    layers = jnp.arange(state.keys.shape[0])
    hidden, new = model.language_model(model.embed(token), positions, attend, layers)
    # [L, B, W, K, D] to [L, B, K, W, 1, D]: all layers are written at once.
    keys, values = (
        jnp.swapaxes(own, 2, 3)[:, :, :, :, None].astype(state.keys.dtype) for own in new
    )
    return keys, values, hidden.astype(state.hidden.dtype)


@functools.partial(jax.jit, static_argnames=("ring", "mesh"))
def resize(state: Columns, *, ring: int, mesh: Mesh | None) -> Columns:
    """The same completions with a ring of another length; it must hold the oldest of them."""
    old = state.keys.shape[4]
    # Place j holds what was written `back` steps ago, in either ring.
    back = (state.clock - 1 - jnp.arange(ring)) % ring
    source = (state.clock - 1 - jnp.minimum(back, old - 1)) % old
    # Layer by layer: all at once would take the new caches' memory twice over for a while.
    one = lambda own: jnp.take(own, source, axis=3)
    keys, values = (jax.lax.map(one, x) for x in (state.keys, state.values))
    return _split(dataclasses.replace(state, keys=keys, values=values), mesh)
