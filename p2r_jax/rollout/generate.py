"""The host half of the rollout engine: which prompt goes into which slot, and when.

Completions end at different lengths. With fewer slots than prompts, a slot whose completions have
all ended takes the next prompt from the queue (continuous batching) while the others decode on;
shapes stay the same, so nothing recompiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from p2r_jax.parallel.mesh import batch_sharding, batch_shards
from p2r_jax.parallel.multihost import put, to_host
from p2r_jax.qwen3_vl.config import TextConfig
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.rollout.engine import decode, empty_slots, fill, resize
from p2r_jax.rollout.sampling import Sampling, Vocabulary

Load = Callable[[Sequence[int]], Prompts]
"""The prompts of these numbers as one batch on the device, in this order."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Called with `encode`, `prefill` or `decode`; what it returns is entered while that runs."""


def untimed(name: str) -> AbstractContextManager[Any]:
    """The `Stage` of those who do not want to know."""
    return nullcontext()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many completions decode at once. It changes speed and memory, never a completion."""

    slots: int | None = None
    """Prompts that decode at once; None = all."""
    columns: int | None = None
    """Completions of a prompt that decode at once, the others follow as these end; None = all."""
    refill: int | None = None
    """Prompts that are run together when as many slots are free; None = a quarter of the slots, or
    all at once if every prompt has a slot."""
    rings: tuple[int, ...] = ()
    """Cache lengths, in tokens, that a completion grows through up to `max_new_tokens`. Each one
    used costs a compilation of the decoding loop."""

    def __post_init__(self) -> None:
        for name in ("slots", "columns", "refill"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {value}")
        if min(self.rings, default=1) < 1:
            raise ValueError(f"rings must be at least 1, got {list(self.rings)}")


@dataclasses.dataclass(frozen=True)
class Completions:
    """On the host. N prompts, G completions of each, R `max_new_tokens`."""

    tokens: Int[np.ndarray, "N G R"]
    """Padding after the stop token."""
    log_probs: Float[np.ndarray, "N G R"]
    """Of each sampled token at the sampling temperature, float32; 0 on padding."""
    mask: Bool[np.ndarray, "N G R"]
    """True on the tokens of the completion, the stop token included."""
    stopped: Bool[np.ndarray, "N G"]
    """False if the completion was cut at max_new_tokens."""
    steps: int = 0
    """Decoding steps that it took."""
    occupancy: float = 1.0
    """Part of the columns that drew a token in them, on average."""


def generate(
    graph: nnx.GraphDef,
    params: nnx.State,
    load: Load,
    seeds: Sequence[int] | np.ndarray,
    prompt_tokens: int,
    vocabulary: Vocabulary,
    sampling: Sampling,
    schedule: Schedule | None = None,
    stage: Stage = untimed,
) -> Completions:
    """Complete each of N = len(seeds) prompts G times.

    load: called with exactly `schedule.refill` numbers below N at a time (rounded up to the devices
    that rows are split over), each number once but for repeats of one that fill up. seeds: one
    uint32 per prompt; with the completion's index in the group it decides all randomness.
    prompt_tokens: P, the padded size that holds every prompt.

    Raises ValueError if there is no prompt, or if what `load` gives does not fit.
    """
    plan = SlotPlan.of(schedule or Schedule(), len(seeds), sampling, *_facts(graph, params))
    shape = (len(seeds), sampling.group, sampling.max_new_tokens)
    tokens, log_probs = np.full(shape, int(vocabulary.pad), np.int32), np.zeros(shape, np.float32)
    seeds = np.asarray(seeds, np.uint32)
    prefix, state = empty_slots(
        vocabulary.pad,
        text=plan.text,
        sampling=sampling,
        slots=plan.slots,
        columns=plan.columns,
        prompt=prompt_tokens,
        ring=plan.rings[0],
        dtype=plan.dtype,
        mesh=plan.mesh,
    )
    queue = list(range(len(seeds)))
    serves = np.full(plan.slots, -1)
    where = batch_sharding(plan.mesh) if plan.mesh is not None else None
    while True:
        active, age = to_host((state.active, state.age))
        ended = np.flatnonzero(~active.any(1) & (serves >= 0))
        if len(ended):
            written = to_host((state.tokens, state.log_probs))
            tokens[serves[ended]], log_probs[serves[ended]] = (x[ended] for x in written)
            serves[ended] = -1
        while queue and plan.may_fill(serves < 0, len(queue)):
            numbers, local, slots = plan.assign(serves < 0, queue)
            serves[slots] = np.asarray(numbers)[local >= 0]
            queue = queue[len(slots) :]
            with stage("encode"):
                prompts = jax.block_until_ready(load(numbers))
            _check(prompts, plan, prompt_tokens)
            with stage("prefill"):
                prefix, state = fill(
                    graph,
                    params,
                    prefix,
                    state,
                    prompts,
                    put(np.where(local < 0, plan.slots, local).astype(np.int32), where),
                    put(seeds[numbers], where),
                    vocabulary.pad,
                    sampling=sampling,
                    mesh=plan.mesh,
                )
                jax.block_until_ready(prefix.boundary)
        if not (serves >= 0).any():
            break
        ring = plan.ring(int(age[active].max(initial=0)), state.keys.shape[4])
        if ring != state.keys.shape[4]:
            state = resize(state, ring=ring, mesh=plan.mesh)
        free, each = np.int32(plan.wanted(len(queue))), np.int32(plan.refill // plan.shards)
        with stage("decode"):
            state = decode(graph, params, prefix, state, vocabulary, free, each, sampling=sampling)
            jax.block_until_ready(state.clock)
    # A token belongs to the completion unless a stop token came before it.
    stops = np.asarray(to_host(vocabulary.stop))[tokens]
    mask = np.cumsum(stops, axis=-1) - stops == 0
    steps, drawn = map(int, to_host((state.clock, state.drawn)))
    stopped, occupancy = np.asarray(stops.any(-1)), drawn / (steps * active.size)
    return Completions(tokens, log_probs, mask, stopped, steps, occupancy)


def _facts(graph: nnx.GraphDef, params: nnx.State) -> tuple[Mesh | None, TextConfig, Any]:
    """Mesh, text settings and dtype of a model.

    Of its shapes: what is merged from real weights holds them until Python collects cycles, and
    the weights of a rollout must be gone when the update begins.
    """
    found = []

    def look(params: nnx.State) -> None:
        model: Qwen3VL = nnx.merge(graph, params)
        found.append((model.kernels.mesh, model.config.text, model.unembedding.dtype))

    jax.eval_shape(look, params)
    return found[0]


def _check(prompts: Prompts, plan: SlotPlan, prompt_tokens: int) -> None:
    rows, size = prompts.tokens.shape
    if rows != plan.refill:
        raise ValueError(
            f"prompts were loaded in {rows} rows where {plan.refill} were asked for: is the model "
            "on another mesh than the prompts?"
        )
    if size > prompt_tokens:
        raise ValueError(f"prompts of {size} tokens do not fit prompt_tokens = {prompt_tokens}")


@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """A schedule made definite: everything divides by the devices that slots are split over."""

    slots: int
    columns: int
    refill: int
    rings: tuple[int, ...]
    shards: int
    mesh: Mesh | None
    text: TextConfig
    dtype: Any

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        count: int,
        sampling: Sampling,
        mesh: Mesh | None,
        text: TextConfig,
        dtype: Any,
    ) -> SlotPlan:
        if count < 1:
            raise ValueError("there is no prompt to complete")
        shards = batch_shards(mesh) if mesh is not None else 1
        up = lambda n: -(-n // shards) * shards
        slots = up(schedule.slots or count)
        refill = up(schedule.refill or (slots if slots >= count else slots // 4 or 1))
        limit = sampling.max_new_tokens
        # The decode kernel wants whole tiles; a ring may be longer than any completion.
        rings = {-(-r // 8) * 8 for r in (*schedule.rings, limit) if r <= limit}
        return cls(
            slots,
            min(schedule.columns or sampling.group, sampling.group),
            min(refill, slots),
            tuple(sorted(rings)),
            shards,
            mesh,
            text,
            dtype,
        )

    def wanted(self, waiting: int) -> int:
        """Free slots at which decoding pauses to fill them; more than there are = never.

        Several devices wait for half of them only: one with a long completion would hold up all.
        """
        if not waiting:
            return self.slots + 1
        return min(self.refill if self.shards == 1 else -(-self.refill // 2), waiting)

    def may_fill(self, free: np.ndarray, waiting: int) -> bool:
        by_device = free.reshape(self.shards, -1).sum(1)
        return int(np.minimum(by_device, self.refill // self.shards).sum()) >= self.wanted(waiting)

    def assign(
        self, free: np.ndarray, queue: Sequence[int]
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Who goes where: the numbers to run (F, the last repeated to fill up), the place of each
        among its device's slots (-1 for fillers), and the slots over all devices."""
        own, each = self.slots // self.shards, self.refill // self.shards
        local, numbers, left = np.full(self.refill, -1), [queue[-1]] * self.refill, list(queue)
        for device, places in enumerate(free.reshape(self.shards, own)):
            for i, place in enumerate(np.flatnonzero(places)[:each]):
                if left:
                    local[device * each + i] = place
                    numbers[device * each + i] = left.pop(0)
        rows = np.flatnonzero(local >= 0)
        return numbers, local, rows // each * own + local[rows]

    def ring(self, oldest: int, now: int) -> int:
        """The cache length to go on with; it shrinks late, so that it does not swing."""
        holds = next(r for r in self.rings if r > oldest or r == self.rings[-1])
        return holds if holds > now or 2 * oldest <= holds else now
