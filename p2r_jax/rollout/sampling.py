"""How the next token is drawn: penalty, temperature, truncation, seeds.

The order and the meaning of every setting are those of `transformers` (repetition penalty, then
temperature, top-k, top-p, min-p). A draw depends on the logits, the seed of the prompt, the
completion's index in its group and the number of its tokens so far, on nothing else.

B prompts, W completions of each that decode at once, V vocabulary, E width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops.attention import MASKED
from p2r_jax.ops.log_probs import masked_logits
from p2r_jax.parallel.mesh import replicated
from p2r_jax.parallel.multihost import put
from p2r_jax.qwen3_vl.processor import Processor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Hashable: a static argument of the compiled program.

    Raises ValueError naming the setting that is out of range.
    """

    max_new_tokens: int
    """R: completions are cut here; a cut one has no stop token."""
    group: int = 1
    """G: completions per prompt."""
    temperature: float = 1.0
    """0 = greedy (log-probs are then those at temperature 1)."""
    top_k: int = 0
    """Draw among the k likeliest tokens (all that tie with the last of them); 0 = all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1 = all."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest; 0 = all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens seen before are divided by this, negative ones multiplied."""
    penalize_prompt: bool = True
    """Tokens of the prompt count as seen, as in transformers and vLLM."""

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("group", self.group >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 = off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    @property
    def remembers(self) -> bool:
        """Whether drawing needs to know which tokens were seen."""
        return self.repetition_penalty != 1.0


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
        return cls(*put(values, replicated(mesh) if mesh is not None else None))


def draw(
    hidden: Float[Array, "B W E"],
    unembedding: Float[Array, "V E"],
    vocabulary: Vocabulary,
    sampling: Sampling,
    seeds: Int[Array, " B"],
    index: Int[Array, "B W"],
    age: Int[Array, "B W"],
    seen: Bool[Array, "B W V"] | None = None,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """Next tokens, and their log-probs under the plain distribution at the temperature.

    index: the completion's place in its group; age: its tokens so far; seen: for the penalty.
    The log-probs ignore penalty and truncation, since the update trains the plain distribution.
    """
    logits = masked_logits(hidden, unembedding, vocabulary.allowed)
    log_p = jax.nn.log_softmax(logits / (sampling.temperature or 1.0))
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature:
        logits = truncate(logits / sampling.temperature, sampling)
        own_seeds = jnp.broadcast_to(seeds[:, None], index.shape)
        logits += jax.vmap(jax.vmap(_noise))(logits, own_seeds, index, age)
    tokens = first_of_largest(logits)
    return tokens, jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]


def _noise(logits: Array, seed: Array, index: Array, age: Array) -> Array:
    """With it added, the largest logit is a draw from their softmax."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), age)
    return jax.random.gumbel(key, logits.shape, logits.dtype)


def first_of_largest(x: Float[Array, "*T V"]) -> Int[Array, "*T"]:
    """`argmax` as two passes that every compiler vectorises: XLA on a CPU does not vectorise its
    own, and it took as long as a third of the layers. NaN anywhere gives V - 1, not its place."""
    x = jax.lax.optimization_barrier(x)  # Both passes must see the same bits.
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    size = x.shape[-1]
    found = jnp.where(x == x.max(-1, keepdims=True), places, size - 1)
    return found.min(-1)


def penalize(
    logits: Float[Array, "*T V"], seen: Bool[Array, "*T V"], penalty: float
) -> Float[Array, "*T V"]:
    """Repetition penalty (CTRL, arXiv 1909.05858)."""
    scaled = jnp.where(logits > 0, logits / penalty, logits * penalty)
    # Tokens that are not allowed stay where they are: their huge negative must not overflow.
    return jnp.where(seen & (logits > MASKED / 2), scaled, logits)


def truncate(logits: Float[Array, "*T V"], sampling: Sampling) -> Float[Array, "*T V"]:
    """Logits at the temperature with top-k, top-p and min-p applied."""
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = _likeliest(jax.nn.softmax(logits), lambda kept, _: kept.sum(-1) >= sampling.top_k)
        logits = jnp.where(kept, logits, MASKED)
    if sampling.top_p < 1:
        mass = lambda kept, p: jnp.where(kept, p, 0).sum(-1) >= sampling.top_p
        logits = jnp.where(_likeliest(jax.nn.softmax(logits), mass), logits, MASKED)
    if sampling.min_p:
        p = jax.nn.softmax(logits)
        logits = jnp.where(p >= sampling.min_p * p.max(-1, keepdims=True), logits, MASKED)
    return logits


def _likeliest(
    p: Float[Array, "*T V"], enough: Callable[[Array, Array], Array]
) -> Bool[Array, "*T V"]:
    """The tokens with the highest probabilities, as few as are `enough`(kept, p); ties stay in.

    A bisection for the lowest kept probability over its bit patterns, which order like the numbers
    they stand for: 31 passes over V = 151,936 instead of a sort, which accelerators are slow at.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        good = enough(bits >= middle[..., None], p)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.zeros(p.shape[:-1], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, bits.max(-1) + 1))
    return bits >= low[..., None]
