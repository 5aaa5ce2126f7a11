"""One small batch, one update of it, and the slow way to the same gradient.

The reference writes every completion behind its own copy of the prompt and runs the model's plain
causal forward; the loss enters as one coefficient per token, differentiated by hand. The batch has
images of mixed sizes, ragged completions, a dropped sample and a filling row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from p2r_jax.config import LossConfig
from p2r_jax.rl.step import (
    Objective,
    TrainingBatch,
    TrainState,
    batch_log_probs,
    new_state,
    train_step,
)
from tests.rounding import UNIT, allowance
from tests.small_model import (
    PAD,
    PROMPT_TOKENS,
    make_prompts,
    nats,
    plain_gradient,
    relative_errors,
    repeated_prompts,
)

NAMES = ("three images", "text", "one image", "text")
"""The last row fills the batch up: nothing of it is trained."""
B, G, R = 4, 3, 6
LENGTHS = np.array([[6, 2, 4], [1, 6, 3], [5, 0, 6], [0, 0, 0]])
"""Tokens that count; one sample of the third prompt was dropped."""
MASK = np.arange(R) < LENGTHS[..., None]

CONDITION, WHOLE_CONDITION = 20, 8
"""By how much more the gradient moves than the weights, relatively: that of any single parameter,
and all of them as one. `test_step` measures it."""
TERMS = B * G * (PROMPT_TOKENS + R)
"""A weight's gradient is a sum over the tokens, of which the repeated prompts have most."""
GATE = allowance(TERMS, CONDITION)
"""Relative L2, of the gradient of any single parameter."""
WHOLE_GATE = allowance(TERMS, WHOLE_CONDITION)
KL_NOISE = 4 * UNIT
"""The KL term of equal policies: exp(d) next to 1 is a unit off, or two, and nothing cancels it.
The square of a d that is rounding is far less."""

LOSS = LossConfig(kl_weight=0.1)

TOKENS = np.where(MASK, np.random.default_rng(1).integers(13, 94, (B, G, R)), PAD)
ADVANTAGES = np.random.default_rng(2).normal(size=(B, G)).astype(np.float32)

RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)
"""Moves nothing; its state is the last gradient."""


def make_batch(**changes: Any) -> TrainingBatch:
    fields = {
        "prompts": make_prompts(NAMES),
        "tokens": TOKENS,
        "mask": MASK,
        "sampler_log_probs": np.zeros((B, G, R), np.float32),
        "advantages": ADVANTAGES,
    }
    fields |= changes
    return jax.tree.map(jnp.asarray, TrainingBatch(**fields))


def slow_gradient(model, allowed, coefficients, tokens=TOKENS, mask=MASK, names=NAMES):
    """Gradient of sum(coefficients * log-probs) with every prompt repeated."""
    rows, starts = repeated_prompts(names, tokens, mask)
    length = tokens.shape[2]
    flat = [np.asarray(x).reshape(-1, length) for x in (tokens, coefficients)]
    return plain_gradient(*model, rows, starts, flat[0], allowed, flat[1].astype(np.float32))


def within(actual, expected, gate=GATE):
    """Parameters whose gradients differ by more than the gate: none, if all is well.

    gate: for all of them, or a dictionary with one for each.
    """
    return {
        k: v
        for k, v in relative_errors(actual, expected).items()
        if not v <= (gate[k] if isinstance(gate, dict) else gate)
    }


def unequal_metrics(actual, expected) -> dict[str, tuple[float, float]]:
    """Metrics that differ by more than rounding.

    They are means over tokens of what moves no more than a log-prob does, but for the norm of the
    gradient, and the KL, which is near its minimum.
    """
    assert actual.keys() == expected.keys()
    found = {}
    for name, value in expected.items():
        ours, theirs = float(actual[name]), float(value)
        relative = WHOLE_GATE if name == "grad_norm" else 0
        absolute = {"grad_norm": 0, "kl/mean": KL_NOISE}.get(name, nats())
        if not abs(ours - theirs) <= relative * abs(theirs) + absolute:
            found[name] = ours, theirs
    return found


def objective_of(loss: LossConfig = LOSS, **changes: Any) -> Objective:
    return Objective(loss, **({"horizon": R} | changes))


def scores(model, batch, allowed, **changes: Any) -> jax.Array:
    """Log-probs of the batch's completions under the model as it is."""
    objective = objective_of(**changes)
    return batch_log_probs(*model, batch, allowed, objective=objective, dtype=jnp.float32)


def fresh_state(params, optimizer=RECORDER) -> TrainState:
    return new_state(jax.tree.map(jnp.copy, params), optimizer)  # the step consumes its state


def joint_step(
    model, batches, objectives, allowed, optimizer=RECORDER, anchor=None, state=None, **settings
):
    """One update, of a fresh state unless there is one, on several batches."""
    graph, params = model
    return train_step(
        fresh_state(params, optimizer) if state is None else state,
        tuple(batches),
        anchor,
        allowed,
        graph=graph,
        optimizer=optimizer,
        objectives=tuple(objectives),
        **settings,
    )


def step(model, batch, allowed, objective=None, **settings):
    """One update on one batch: state and metrics."""
    objective = objective or objective_of()
    state, (metrics,) = joint_step(model, [batch], [objective], allowed, **settings)
    return state, metrics


def policy_coefficients(advantages=ADVANTAGES, mask=MASK):
    """d loss / d log-prob of the clipped loss at ratio 1, averaged over the tokens that count."""
    return -advantages[..., None] * mask / mask.sum()


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
