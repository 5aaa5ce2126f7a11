"""The rollout engine: prefill once per prompt, decode G completions against the shared prefix.

B prompts, G completions a prompt, P prompt tokens, R new tokens, L layers, K key-value heads,
D head width. Three pure functions over one state value: `prefill`, `decode_step`, `generate`.
A completion depends only on (weights, prompt, seed, its index in the group): random numbers are
keyed by those, never by the position in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import attention, causal_mask, decode_attention
from p2r_jax.ops.log_probs import masked_logits
from p2r_jax.parallel.mesh import replicated
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.qwen3_vl.processor import Processor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Hashable: a static argument of the compiled program."""

    max_new_tokens: int
    """R: completions are cut here; a cut one has no stop token."""
    group: int = 1
    """G: completions per prompt."""
    temperature: float = 1.0
    """0 = greedy (log-probs are then those at temperature 1)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.group < 1 or self.temperature < 0:
            raise ValueError(
                f"{self}: max_new_tokens and group must be at least 1, temperature at least 0"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the sampler must know about token ids."""

    allowed: Bool[Array, " V"]
    """False for placeholders and unused rows of the embedding: never sampled."""
    stop: Bool[Array, " V"]
    """True for tokens that end a completion; the stop token belongs to the completion."""
    pad: Int[Array, ""]

    @classmethod
    def of(cls, processor: Processor, mesh: Mesh | None = None) -> Vocabulary:
        """On the device, replicated over `mesh`."""
        stop = np.zeros(processor.config.text.vocab_size, bool)
        stop[list(processor.stop_ids)] = True
        values = (processor.allowed_tokens(), stop, np.int32(processor.pad_id))
        return cls(*jax.device_put(values, replicated(mesh) if mesh is not None else None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    tokens: Int[Array, "B G R"]
    """Padding after the stop token."""
    log_probs: Float[Array, "B G R"]
    """Of each sampled token at the sampling temperature, float32; 0 on padding."""
    mask: Bool[Array, "B G R"]
    """True on the tokens of the completion, the stop token included."""
    stopped: Bool[Array, "B G"]
    """False if the completion was cut at max_new_tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What prefill leaves behind: one copy per prompt, read by all its completions."""

    keys: Float[Array, "L B P K D"]
    values: Float[Array, "L B P K D"]
    last_hidden: Float[Array, "B E"]


def prefill(model: Qwen3VL, prompts: Prompts) -> Prefix:
    """Encode the images and run the prompts once."""
    mask = causal_mask(prompts.valid)
    x, deepstack = model.embed_prompts(prompts)
    hidden, (keys, values) = model.language_model(
        x,
        prompts.positions,
        lambda q, k, v, _: (attention(q, k, v, mask), (k, v)),
        deepstack=deepstack,
        visual_slot=prompts.visual_slot,
    )
    return Prefix(keys, values, hidden[jnp.arange(hidden.shape[0]), last_index(prompts.valid)])


def last_index(valid: Int[Array, "B P"]) -> Int[Array, " B"]:
    """Index of the last valid token of each row, under left or right padding."""
    return valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)


def decode_step(
    model: Qwen3VL,
    prompts: Prompts,
    prefix: Prefix,
    suffix: tuple[Float[Array, "L B G R K D"], Float[Array, "L B G R K D"]],
    tokens: Int[Array, "B G"],
    step: Int[Array, ""],
) -> tuple[Float[Array, "B G E"], Any]:
    """Feed token number `step` of each completion; returns hidden states and the new cache."""
    rows, group = tokens.shape
    positions = jnp.broadcast_to(prompts.next_position[:, None] + step, (3, rows, group))

    def attend(q, k, v, caches):
        prefix_k, prefix_v, suffix_k, suffix_v = caches
        out = decode_attention(
            q, k, v, (prefix_k, prefix_v), (suffix_k, suffix_v), prompts.valid, step
        )
        return out, (k, v)

    hidden, new = model.language_model(
        model.embed(tokens), positions, attend, (prefix.keys, prefix.values, *suffix)
    )
    grown = tuple(
        jax.lax.dynamic_update_slice_in_dim(cache, update[:, :, :, None], step, axis=3)
        for cache, update in zip(suffix, new, strict=True)
    )
    return hidden, grown


def _sample(
    hidden: Float[Array, "B G E"],
    model: Qwen3VL,
    vocabulary: Vocabulary,
    sampling: Sampling,
    keys: Array,
    step: Array,
) -> tuple[Int[Array, "B G"], Float[Array, "B G"]]:
    """Next tokens and their log-probs; `keys` [B, G] are per completion."""
    logits = masked_logits(
        hidden, model.unembedding, vocabulary.allowed, sampling.temperature or 1.0
    )
    log_p = jax.nn.log_softmax(logits)
    if sampling.temperature:
        draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)
        tokens = jax.vmap(jax.vmap(draw))(keys, logits)
    else:
        tokens = logits.argmax(-1)
    return tokens, jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]


@functools.partial(jax.jit, static_argnames=("graph", "sampling"))
def generate(
    graph: nnx.GraphDef,
    params: nnx.State,
    prompts: Prompts,
    vocabulary: Vocabulary,
    seeds: Int[Array, " B"],
    sampling: Sampling,
) -> Completions:
    """Complete every prompt G times; stops as soon as all completions have.

    seeds: one integer per prompt; with the completion's index in the group it decides all
    randomness.
    """
    model = nnx.merge(graph, params)
    prefix = prefill(model, prompts)
    rows, group, length = seeds.shape[0], sampling.group, sampling.max_new_tokens
    layers, _, _, kv_heads, width = prefix.keys.shape

    def completion_keys(seed):
        return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
            jnp.arange(group)
        )

    keys = jax.vmap(completion_keys)(seeds)
    boundary = jnp.broadcast_to(
        prefix.last_hidden[:, None], (rows, group, prefix.last_hidden.shape[-1])
    )
    cache = jnp.zeros((layers, rows, group, length, kv_heads, width), prefix.keys.dtype)
    tokens = jnp.full((rows, group, length), vocabulary.pad, jnp.int32)
    log_probs = jnp.zeros((rows, group, length), jnp.float32)

    def draw(hidden, step, tokens, log_probs, done):
        new, log_p = _sample(hidden, model, vocabulary, sampling, keys, step)
        tokens = tokens.at[:, :, step].set(jnp.where(done, vocabulary.pad, new))
        log_probs = log_probs.at[:, :, step].set(jnp.where(done, 0.0, log_p))
        return tokens, log_probs, done | vocabulary.stop[new]

    def unfinished(state):
        step, _, _, _, done = state
        return (step < length - 1) & ~done.all()

    def advance(state):
        step, suffix, tokens, log_probs, done = state
        hidden, suffix = decode_step(model, prompts, prefix, suffix, tokens[:, :, step], step)
        drawn = draw(hidden, step + 1, tokens, log_probs, done)
        return (step + 1, suffix, *drawn)

    first = draw(boundary, 0, tokens, log_probs, jnp.zeros((rows, group), bool))
    state = (jnp.zeros((), jnp.int32), (cache, cache), *first)
    _, _, tokens, log_probs, done = jax.lax.while_loop(unfinished, advance, state)

    # A token belongs to the completion unless a stop token came before it.
    stops = vocabulary.stop[tokens]
    mask = jnp.cumsum(stops, axis=-1) - stops == 0
    return Completions(tokens, log_probs, mask, done)
