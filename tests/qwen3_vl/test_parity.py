"""The port equals Hugging Face transformers in float32: logits and every gradient.

The gates are as tight as float32 allows, because looser ones let wrong models through: a GELU of
the wrong kind moves logits by 1e-4, a wrong epsilon by 7e-6, and neither changes a greedy token.
`test_mistakes` proves that the gate used here sees such mistakes; `test_stages` compares what lies
between pixels and logits.
"""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from p2r_jax.qwen3_vl import forward_hf
from tests.qwen3_vl.reference import (
    GATE,
    LARGEST,
    SCENARIOS,
    jax_policy_loss,
    make_batch,
    prompts_of,
    relative_l2,
    scenario,
    to_hf,
    torch_logits,
    torch_policy_loss,
)

GRADIENT_GATE = 1e-4
"""Relative L2 of every single parameter."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_logits_equal_the_reference(pair, name):
    batch = scenario(name, pair.patch_dim)
    expected = torch_logits(pair, batch)[batch.valid]
    actual = np.asarray(forward_hf(pair.model, *batch.arguments()))[batch.valid]
    error, largest = relative_l2(actual, expected), np.abs(actual - expected).max()
    print(f"relative L2 {error:.1e}, largest difference {largest:.1e}")
    assert error <= GATE
    assert largest <= LARGEST


@pytest.mark.parametrize("name", ["left padding", "right padding"])
def test_gradients_of_a_policy_gradient_loss_equal_the_reference(pair, name):
    batch = scenario(name, pair.patch_dim)
    advantages = np.array([[1.5], [-0.5], [0.75]], np.float32)
    real = batch.valid[:, :-1] & batch.valid[:, 1:]
    weights = advantages * real
    expected_loss, expected = torch_policy_loss(pair, batch, weights)
    loss, gradient = jax_policy_loss(pair.model, prompts_of(pair, batch), weights)
    actual = to_hf(pair.model, gradient)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert actual.keys() == expected.keys()
    errors = {key: relative_l2(actual[key], expected[key]) for key in expected}
    print(f"{len(errors)} gradients, at most {max(errors.values()):.1e}")
    assert {key: error for key, error in errors.items() if not error <= GRADIENT_GATE} == {}


def test_one_program_serves_every_mix_of_image_sizes(pairs):
    pair = pairs["compact"]
    traces = 0

    @nnx.jit
    def forward(model, prompts):
        nonlocal traces
        traces += 1
        return model(prompts)

    for rows in (
        [(2, (4, 6), 3), (1, (2, 4), 2, (8, 2), 4)],
        [(1, (8, 2), 1, (2, 4), 5), (8, (6, 4), 1)],
    ):
        batch = make_batch(rows, pair.patch_dim)
        actual = np.asarray(forward(pair.model, prompts_of(pair, batch)))
        expected = torch_logits(pair, batch)
        assert relative_l2(actual[batch.valid], expected[batch.valid]) <= GATE
    assert traces == 1


def test_bfloat16_is_as_close_to_float32_as_the_reference_is(pairs):
    """Both round, differently; being much further from float32 would mean rounding too early."""
    pair = pairs["uneven"]
    batch = scenario("right padding", pair.patch_dim)
    truth = torch_logits(pair, batch)[batch.valid]
    with torch.no_grad():
        half = copy.deepcopy(pair.torch_model).bfloat16()
        reference = half(**batch.torch()).logits.float().numpy()[batch.valid]
    graph, state = nnx.split(pair.model)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    actual = forward_hf(rounded, *batch.arguments())
    assert actual.dtype == jnp.bfloat16
    actual = np.asarray(actual.astype(jnp.float32))[batch.valid]
    assert relative_l2(actual, truth) <= 1.5 * relative_l2(reference, truth)
