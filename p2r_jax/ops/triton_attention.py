"""Attention on GPUs: one flash attention in Pallas-Triton behind the signatures of `ops.attention`.

A forward kernel also gives the log-sum-exp of each query's scores; one backward kernel makes dq,
another dk and dv. Letters are those of `ops.attention`; the g = H / K query heads of a key-value
head read its keys in place, nothing is repeated. Scores and softmax are float32, matrix products
take operands of the inputs' dtype and accumulate in float32, the result has the dtype of v.

Which query reads which key is a `Rule` over positions and one id a position. Blocks in which
nobody reads are not visited: `key_runs` and `query_runs` say which are, from rule and ids. That is
why a group costs P*P + G*R*(P + R) and not (P + G*R)², and why padding costs little. Where `valid`
is 0, a position neither reads nor is read: result and gradients are zero there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import MASKED

BEHIND_THE_END = np.iinfo(np.int32).min
"""Id of positions that only fill the last block."""
LOG2_E = math.log2(math.e)
"""Scores times this, so that 2**x, which the hardware has, stands in for e**x."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which positions read which. Static: each rule is a kernel of its own.

    segments: the same id. Otherwise ids are 1, or 0 for padding, and a query reads what is not
    behind it in the prompt (the first `prompt` positions) and its own completion (of `length`).
    """

    size: int
    prompt: int
    length: int = 1
    segments: bool = False


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Positions in one tile, powers of two of at least 16, and the warps that share it."""

    queries: int
    keys: int
    warps: int = 8


# What a program keeps is 64 positions for each group of four warps: the shape of Hopper's matrix
# instructions. In bfloat16 the compiler needs no more registers than there are, up to width 128.
BY_QUERIES = Blocks(queries=128, keys=64)
"""Forward and dq: a program keeps a block of queries and goes through keys."""
BY_KEYS = Blocks(queries=64, keys=128)
"""dk and dv: a program keeps a block of keys and goes through the queries of all its heads."""


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    valid: Int[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """Each valid token reads itself and the valid tokens before it."""
    ids = valid.astype(bool).astype(jnp.int32)
    return _attention(q, k, v, ids, Rule(q.shape[1], prompt=q.shape[1]), interpret)


def segment_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment: Int[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """Tokens read the tokens of their own segment; segment 0 is padding and reads padding.

    Right for any ids, and fast where those of a segment lie together.
    """
    rule = Rule(q.shape[1], prompt=q.shape[1], segments=True)
    return _attention(q, k, v, segment.astype(jnp.int32), rule, interpret)


def shared_prefix_attention(
    q: Float[Array, "B P+G*R H D"],
    k: Float[Array, "B P+G*R K D"],
    v: Float[Array, "B P+G*R K D"],
    prompt_valid: Int[Array, "B P"],
    completion_valid: Int[Array, "B G R"],
    *,
    interpret: bool = False,
) -> Float[Array, "B P+G*R H D"]:
    """Attention of prompt ++ G completions: the prompt is causal, a completion sees it and itself.

    P and R are any numbers: a block may hold the end of one part and the start of the next.
    """
    rows, prompt = prompt_valid.shape
    valid = jnp.concatenate([prompt_valid, completion_valid.reshape(rows, -1)], axis=1)
    ids = valid.astype(bool).astype(jnp.int32)
    rule = Rule(q.shape[1], prompt, length=max(completion_valid.shape[2], 1))
    return _attention(q, k, v, ids, rule, interpret)


# Which blocks are visited. Two runs of blocks, each (start, number), are enough for every rule.


def key_runs(ids: Int[Array, "B S"], rule: Rule, blocks: Blocks) -> Int[Array, "B N 4"]:
    """What each block of queries visits: a run of the prompt's blocks and one of its own."""
    first = np.arange(0, rule.size, blocks.queries)
    stop = np.minimum(first + blocks.queries, rule.size)
    prompt_stop = np.full_like(stop, rule.size) if rule.segments else np.minimum(stop, rule.prompt)
    prompt_stop = -(-prompt_stop // blocks.keys)
    own = np.maximum(first, rule.prompt)
    own -= (own - rule.prompt) % rule.length
    # A block with both the end of the prompt and the start of a completion is in the first run.
    own = np.maximum(own // blocks.keys, prompt_stop)
    own_stop = np.where(stop > rule.prompt, -(-stop // blocks.keys), 0)
    meet = _meet(ids, rule, blocks)
    runs = _run(meet, np.zeros_like(own), prompt_stop), _run(meet, own, own_stop)
    return jnp.concatenate(runs, axis=-1)


def query_runs(ids: Int[Array, "B S"], rule: Rule, blocks: Blocks) -> Int[Array, "B M 4"]:
    """What each block of keys visits: one run, because a completion's readers are contiguous."""
    first = np.arange(0, rule.size, blocks.keys)
    last = np.minimum(first + blocks.keys, rule.size) - 1
    completion_stop = last - (last - rule.prompt) % rule.length + rule.length
    stop = np.where(first < rule.prompt, rule.size, completion_stop)
    start = np.zeros_like(first) if rule.segments else first // blocks.queries
    meet = jnp.swapaxes(_meet(ids, rule, blocks), 1, 2)
    run = _run(meet, start, -(-stop // blocks.queries))
    return jnp.concatenate([run, jnp.zeros_like(run)], axis=-1)


def executed_scores(prompt: int, group: int = 0, length: int = 1, causal: bool = True) -> int:
    """As `splash.executed_scores`, for sequences without padding; blocks of images that do not meet
    count here, though the kernels leave them out: data say which."""
    rule = Rule(prompt + group * length, prompt, length, segments=not causal)
    with jax.ensure_compile_time_eval():
        runs = key_runs(jnp.ones((1, rule.size), jnp.int32), rule, BY_QUERIES)
        return int(runs[..., 1::2].sum()) * BY_QUERIES.queries * BY_QUERIES.keys


def _meet(ids: Int[Array, "B S"], rule: Rule, blocks: Blocks) -> Bool[Array, "B N M"]:
    """Whether ids let a block of queries read from a block of keys, judged by the ids' ranges.

    Padding stays out of the ranges: 0 behind the last segment would stretch them over all others.
    """

    def ranges(block: int) -> tuple[Array, Array, Array]:
        pad = ((0, 0), (0, -rule.size % block))
        of_block = jnp.pad(ids, pad, mode="edge").reshape(ids.shape[0], -1, block)
        padding, limits = of_block == 0, np.iinfo(np.int32)
        lowest = jnp.where(padding, limits.max, of_block).min(-1)
        return lowest, jnp.where(padding, limits.min, of_block).max(-1), padding.any(-1)

    lowest, highest, padding = (x[:, :, None] for x in ranges(blocks.queries))
    key_lowest, key_highest, key_padding = (x[:, None] for x in ranges(blocks.keys))
    meet = (lowest <= key_highest) & (key_lowest <= highest)
    return meet | (padding & key_padding) if rule.segments else meet


def _run(
    meet: Bool[Array, "B N M"], start: Int[np.ndarray, " N"], stop: Int[np.ndarray, " N"]
) -> Int[Array, "B N 2"]:
    """From the first to the last block of [start, stop) that is met, as start and number."""
    at = np.arange(meet.shape[-1], dtype=np.int32)
    meet = meet & ((at >= start[:, None]) & (at < stop[:, None]))
    first = jnp.where(meet, at, np.int32(at.size)).min(-1)
    end = jnp.where(meet, at + 1, 0).max(-1)
    return jnp.stack([first, jnp.maximum(end - first, 0)], axis=-1)


# Kernels. A reference is the whole sequence of one head (on a GPU no more than a pointer), from
# which tiles of [positions, width] are loaded. Triton wants powers of two, so a tile is as wide as
# the next one, and loads and stores leave out what is outside of the array.


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a kernel, and how its tiles are loaded and stored."""

    rule: Rule
    blocks: Blocks
    width: int

    def inside(self, start: Array, count: int) -> Array | None:
        wide = pl.next_power_of_2(self.width)
        if self.rule.size % count == 0 and self.width == wide:
            return None
        rows = (start + jnp.arange(count) < self.rule.size)[:, None]
        return rows & (jnp.arange(wide) < self.width)[None]

    def load(self, ref: Any, start: Array, count: int, *head: Array) -> Array:
        ref, mask = ref.at[(pl.ds(start, count), *head)], self.inside(start, count)
        return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0.0)

    def store(self, ref: Any, start: Array, tile: Array) -> None:
        ref, mask = ref.at[pl.ds(start, tile.shape[0])], self.inside(start, tile.shape[0])
        plgpu.store(ref, tile.astype(ref.dtype), mask=mask)

    def reads(self, query: Array, key: Array, query_id: Array, key_id: Array) -> Array:
        """Which queries read which keys; the shapes of the two broadcast to that of the tile."""
        rule, reads = self.rule, query_id == key_id
        if not rule.segments:
            reads &= (query >= key) & (key_id == 1)
        if rule.prompt < rule.size:
            query, other = (lax.div(x - rule.prompt, jnp.int32(rule.length)) for x in (query, key))
            reads &= (key < rule.prompt) | (query == other)
        return reads


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Contracts the last axis of a with one of b."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _over_runs(runs_ref: Any, heads: int, body: Callable[..., Any], carry: Any) -> Any:
    """Goes through both runs of blocks, with each head at each: body(block, head, carry)."""
    start, number, second, more = (runs_ref[i] for i in range(4))

    def step(i: Array, carry: Any) -> Any:
        at, head = lax.div(i, jnp.int32(heads)), lax.rem(i, jnp.int32(heads))
        return body(jnp.where(at < number, start + at, second + at - number), head, carry)

    return lax.fori_loop(0, (number + more) * heads, step, carry)


def _flash_forward(*refs: Any, plan: Plan) -> None:
    runs_ref, ids_ref, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    mine, block_keys = plan.blocks.queries, plan.blocks.keys
    start = pl.program_id(0) * mine
    query, query_id = (start + jnp.arange(mine))[:, None], ids_ref[pl.ds(start, mine)][:, None]
    q = plan.load(q_ref, start, mine)

    def body(block: Array, _: Array, carry: tuple[Array, Array, Array]) -> Any:
        out, top, total = carry
        at = block * block_keys
        key, key_id = (at + jnp.arange(block_keys))[None], ids_ref[pl.ds(at, block_keys)][None]
        k, v = (plan.load(ref, at, block_keys) for ref in (k_ref, v_ref))
        reads = plan.reads(query, key, query_id, key_id)
        scores = jnp.where(reads, _dot(q, k, 1) * (plan.width**-0.5 * LOG2_E), MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        # Masked again: until a query has read something, masked scores are its highest.
        weights = jnp.where(reads, jnp.exp2(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 0)
        return out, new_top, total * shrink + weights.sum(1)

    nothing = jnp.zeros(mine, jnp.float32)
    carry = jnp.zeros(q.shape, jnp.float32), nothing + MASKED, nothing
    out, top, total = _over_runs(runs_ref, 1, body, carry)
    total = jnp.where(total == 0.0, 1.0, total)
    plan.store(out_ref, start, out / total[:, None])
    lse_ref[pl.ds(start, mine)] = top + jnp.log2(total)


def _flash_dq(*refs: Any, plan: Plan) -> None:
    runs_ref, ids_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref = refs
    mine, block_keys = plan.blocks.queries, plan.blocks.keys
    start = pl.program_id(0) * mine
    query, query_id = (start + jnp.arange(mine))[:, None], ids_ref[pl.ds(start, mine)][:, None]
    q, dout = (plan.load(ref, start, mine) for ref in (q_ref, dout_ref))
    lse, delta = (ref[pl.ds(start, mine)][:, None] for ref in (lse_ref, delta_ref))

    def body(block: Array, _: Array, dq: Array) -> Array:
        at = block * block_keys
        key, key_id = (at + jnp.arange(block_keys))[None], ids_ref[pl.ds(at, block_keys)][None]
        k, v = (plan.load(ref, at, block_keys) for ref in (k_ref, v_ref))
        scores = _dot(q, k, 1) * (plan.width**-0.5 * LOG2_E)
        reads = plan.reads(query, key, query_id, key_id)
        weights = jnp.where(reads, jnp.exp2(scores - lse), 0.0)
        dscores = weights * (_dot(dout, v, 1) - delta)
        return dq + _dot(dscores.astype(k.dtype), k, 0)

    dq = _over_runs(runs_ref, 1, body, jnp.zeros(q.shape, jnp.float32))
    plan.store(dq_ref, start, dq * plan.width**-0.5)


def _flash_dkv(*refs: Any, plan: Plan) -> None:
    """Scores are [keys, queries] here, so that no product transposes a tile of weights."""
    runs_ref, ids_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
    mine, block_queries = plan.blocks.keys, plan.blocks.queries
    start = pl.program_id(0) * mine
    key, key_id = (start + jnp.arange(mine))[:, None], ids_ref[pl.ds(start, mine)][:, None]
    k, v = (plan.load(ref, start, mine) for ref in (k_ref, v_ref))

    def body(block: Array, head: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        at = block * block_queries
        rows = pl.ds(at, block_queries)
        query, query_id = (at + jnp.arange(block_queries))[None], ids_ref[rows][None]
        q, dout = (plan.load(ref, at, block_queries, head) for ref in (q_ref, dout_ref))
        reads = plan.reads(query, key, query_id, key_id)
        scores = _dot(k, q, 1) * (plan.width**-0.5 * LOG2_E)
        weights = jnp.where(reads, jnp.exp2(scores - lse_ref[head, rows][None]), 0.0)
        dv = dv + _dot(weights.astype(dout.dtype), dout, 0)
        dscores = weights * (_dot(v, dout, 1) - delta_ref[head, rows][None])
        return dk + _dot(dscores.astype(q.dtype), q, 0), dv

    nothing = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _over_runs(runs_ref, q_ref.shape[1], body, (nothing, nothing))
    plan.store(dk_ref, start, dk * plan.width**-0.5)
    plan.store(dv_ref, start, dv)


# Calls. A grid is (blocks, heads, rows): blocks of a head run side by side, its keys in the cache.


def _call(
    kernel: Callable[..., None],
    rule: Rule,
    blocks: Blocks,
    interpret: bool,
    inputs: Sequence[Array],
    outputs: Sequence[tuple[str, DTypeLike]],
    by_keys: bool = False,
) -> list[Array]:
    """inputs: runs, ids, q, k, v and, backward, dout, lse, delta; outputs: shapes and dtypes.

    by_keys: a program has a key-value head with all its query heads, and not one query head.
    """
    _, ids, q, k, *_ = inputs
    (rows, size, heads, width), kv_heads, padded = q.shape, k.shape[2], ids.shape[1]
    mine, group = (heads // kv_heads, 1) if by_keys else (None, heads // kv_heads)
    wide, per_kv = pl.next_power_of_2(width), np.int32(group)
    specs = {
        "runs": pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
        "ids": pl.BlockSpec((None, padded), lambda i, h, b: (b, 0)),
        "q": pl.BlockSpec((None, padded, mine, wide), lambda i, h, b: (b, 0, h, 0)),
        "kv": pl.BlockSpec(
            (None, padded, None, wide), lambda i, h, b: (b, 0, lax.div(h, per_kv), 0)
        ),
        "lse": pl.BlockSpec((None, mine, padded), lambda i, h, b: (b, h, 0)),
    }
    order = ["runs", "ids", "q", "kv", "kv", "q", "lse", "lse"]
    shapes = {"q": q.shape, "kv": k.shape, "lse": (rows, heads, padded)}
    block = blocks.keys if by_keys else blocks.queries
    return pl.pallas_call(
        functools.partial(kernel, plan=Plan(rule, blocks, width)),
        grid=(pl.cdiv(size, block), kv_heads if by_keys else heads, rows),
        in_specs=[specs[name] for name in order[: len(inputs)]],
        out_specs=[specs[name] for name, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=2),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs)


def _blocks(dtype: DTypeLike) -> list[Blocks]:
    """BY_QUERIES and BY_KEYS; half as large in float32, which takes twice the shared memory."""
    share = 2 if jnp.dtype(dtype).itemsize > 2 else 1
    return [Blocks(*(n // share for n in dataclasses.astuple(b))) for b in (BY_QUERIES, BY_KEYS)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, ids: Array, rule: Rule, interpret: bool) -> Array:
    return _forward(q, k, v, ids, rule, interpret)[0]


def _forward(
    q: Array, k: Array, v: Array, ids: Array, rule: Rule, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} key-value heads evenly")
    blocks, by_keys = _blocks(q.dtype)
    fill = -rule.size % max(blocks.queries, blocks.keys, by_keys.queries, by_keys.keys)
    runs = key_runs(ids, rule, blocks)
    ids = jnp.pad(ids, ((0, 0), (0, fill)), constant_values=BEHIND_THE_END)
    outputs = [("q", v.dtype), ("lse", jnp.float32)]
    out, lse = _call(_flash_forward, rule, blocks, interpret, (runs, ids, q, k, v), outputs)
    return out, (runs, ids, q, k, v, out, lse)


def _backward(
    rule: Rule, interpret: bool, residuals: tuple[Array, ...], dout: Array
) -> tuple[Array, Array, Array, None]:
    runs, ids, q, k, v, out, lse = residuals
    blocks, by_keys = _blocks(q.dtype)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, ids.shape[1] - rule.size)))
    inputs = ids, q, k, v, dout, lse, delta
    (dq,) = _call(_flash_dq, rule, blocks, interpret, (runs, *inputs), [("q", q.dtype)])
    runs = query_runs(ids[:, : rule.size], rule, by_keys)
    outputs = [("kv", k.dtype), ("kv", v.dtype)]
    dk, dv = _call(_flash_dkv, rule, by_keys, interpret, (runs, *inputs), outputs, by_keys=True)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)
