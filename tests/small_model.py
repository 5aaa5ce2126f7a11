"""A random Qwen3-VL of a few thousand weights, prompts for it, and the slow way to score text.

Prompts have images of mixed sizes, or none; what a row holds depends on its name alone, never on
its place in a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from p2r_jax.ops.attention import MASKED
from p2r_jax.ops.kernels import Kernels
from p2r_jax.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from p2r_jax.qwen3_vl.inputs import Patches, Prompts, patch_layout, token_layout
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.rollout.sampling import Vocabulary
from tests.rounding import allowance

VOCABULARY, PAD, IMAGE, VIDEO, START, END = 96, 0, 1, 2, 3, 4
STOP = (5, 6, 7, 8, 9, 10, 11, 12)
"""Many, so that random completions end at different lengths."""
BANNED = (PAD, IMAGE, VIDEO, START, END, 94, 95)

CONFIG = Qwen3VLConfig(
    vision=VisionConfig(
        hidden_size=16,
        depth=3,
        num_heads=2,
        intermediate_size=24,
        out_hidden_size=32,
        deepstack_visual_indexes=(0, 1),
        patch_size=4,
        num_position_embeddings=16,
    ),
    text=TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        rope_theta=1e4,
        mrope_section=(2, 1, 1),
    ),
    tie_word_embeddings=False,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
)

Item = "int | tuple[int, int]"
ROWS: dict[str, Sequence[Any]] = {
    "three images": (2, (4, 6), 2, (6, 2), 1, (2, 2), 3),
    "text": (9,),
    "one image": (2, (6, 4), 4),
    "two images": (1, (2, 4), 3, (4, 4), 5),
}
"""A prompt: an int is that many text tokens, a pair is an image of that many patches."""
PROMPT_TOKENS, NUM_PATCHES = 24, 40

CONDITION = 30
"""Nats by which a log-prob moves, at most, for a relative change of all weights by one. The tests
of the update measure it."""


def nats(temperature: float = 1.0) -> float:
    """What rounding may change in a log-prob, whose longest sum is over the pixels of a patch."""
    return allowance(CONFIG.vision.patch_dim, CONDITION / temperature)


def make_model(seed: int = 0, kernels: Kernels | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """Norms and biases are perturbed: a weight of one and a bias of zero hide their absence."""
    graph, params = nnx.split(Qwen3VL(CONFIG, nnx.Rngs(seed), kernels), nnx.Param)
    rng = np.random.default_rng(seed)
    return graph, jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params
    )


def vocabulary(banned: Sequence[int] = BANNED, stop: Sequence[int] = STOP) -> Vocabulary:
    allowed, stops = np.ones(VOCABULARY, bool), np.zeros(VOCABULARY, bool)
    allowed[list(banned)], stops[list(stop)] = False, True
    return Vocabulary(jnp.asarray(allowed), jnp.asarray(stops), jnp.int32(PAD))


def content(name: str) -> tuple[list[int], list[tuple[int, int]], np.ndarray]:
    """Tokens, grids and pixels of the row of that name."""
    rng = np.random.default_rng(sorted(ROWS).index(name))
    tokens: list[int] = []
    grids: list[tuple[int, int]] = []
    for item in ROWS[name]:
        if isinstance(item, int):
            tokens += rng.integers(13, 94, item).tolist()
        else:
            grids.append(item)
            tokens += [START, *[IMAGE] * (item[0] * item[1] // 4), END]
    patches = sum(h * w for h, w in grids)
    return tokens, grids, rng.uniform(-1, 1, (patches, CONFIG.vision.patch_dim)).astype(np.float32)


def make_prompts(
    names: Sequence[str],
    num_tokens: int = PROMPT_TOKENS,
    num_patches: int = NUM_PATCHES,
    side: str = "right",
    appended: Sequence[Sequence[int]] | None = None,
) -> Prompts:
    """One row per name, followed by the tokens `appended` to it, as one padded batch."""
    rows = [content(name) for name in names]
    tokens = [row[0] for row in rows]
    if appended is not None:
        tokens = [[*own, *more] for own, more in zip(tokens, appended, strict=True)]
    grids = [row[1] for row in rows]
    layout = patch_layout(grids, CONFIG, num_patches)
    pixels = np.zeros((len(rows), num_patches, CONFIG.vision.patch_dim), np.float32)
    for i, (_, _, own) in enumerate(rows):
        pixels[i, : len(own)] = own
    fields = token_layout([np.array(t) for t in tokens], grids, CONFIG, num_tokens, PAD, side)
    return jax.tree.map(jnp.asarray, Prompts(patches=Patches(pixels=pixels, **layout), **fields))


def repeated_prompts(names: Sequence[str], tokens: Any, mask: Any) -> tuple[Prompts, np.ndarray]:
    """Each completion as a row of its own, behind its own copy of the prompt.

    Returns the rows [B*G, P+R] and where each completion starts, [B*G].
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    rows, group, length = tokens.shape
    copies = [name for name in names for _ in range(group)]
    own = [tokens[b, g][mask[b, g]] for b in range(rows) for g in range(group)]
    starts = np.array([len(content(name)[0]) for name in copies])
    return make_prompts(copies, PROMPT_TOKENS + length, appended=own), starts


def plain_log_probs(
    graph: nnx.GraphDef,
    params: nnx.State,
    repeated: Prompts,
    starts: Any,
    targets: Any,
    allowed: Any,
    temperature: Any = 1.0,
) -> jax.Array:
    """Log-probs [B*G, R, V] of completion tokens by one plain causal forward over the rows."""
    logits = nnx.merge(graph, params)(repeated)
    where = starts[:, None] - 1 + jnp.arange(targets.shape[1])
    logits = jnp.take_along_axis(logits, where[..., None], axis=1) / temperature
    return jax.nn.log_softmax(jnp.where(allowed, logits, MASKED))


@functools.partial(jax.jit, static_argnames="graph")
def plain_scores(graph, params, repeated, starts, targets, allowed, temperature=1.0):
    """Log-prob of each target, entropy, and the likeliest token; [B*G, R] each."""
    log_p = plain_log_probs(graph, params, repeated, starts, targets, allowed, temperature)
    chosen = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(log_p) * log_p).sum(-1), log_p.argmax(-1)


@functools.partial(jax.jit, static_argnames="graph")
def plain_gradient(graph, params, repeated, starts, targets, allowed, coefficients):
    """Gradient of sum(coefficients * log-probs), [B*G, R]."""

    def total(params):
        log_p = plain_log_probs(graph, params, repeated, starts, targets, allowed)
        chosen = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return jnp.where(coefficients != 0, coefficients * chosen, 0).sum()

    return jax.grad(total)(params)


def relative_errors(actual: Any, expected: Any) -> dict[str, float]:
    """Relative L2 difference of each parameter, by path."""

    def one(path, a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        size = np.linalg.norm(e)
        return float(np.linalg.norm(a - e) / size) if size else float(np.abs(a).max())

    tree = jax.tree_util.tree_map_with_path(
        one, nnx.to_pure_dict(actual), nnx.to_pure_dict(expected)
    )
    return {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(tree)}
