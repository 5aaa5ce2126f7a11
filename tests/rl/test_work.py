"""Costs of a step: model FLOPs against those counted on a traced program."""

from __future__ import annotations

import dataclasses

import pytest

from p2r_jax.parallel.flops import matmul_flops
from p2r_jax.rl.work import ModelCosts
from tests import small_model


@pytest.fixture(scope="module")
def costs():
    return ModelCosts.of(small_model.CONFIG)


@pytest.mark.parametrize("name", ["one image", "text"])
def test_a_forward_pass_costs_what_the_program_multiplies(costs, name):
    """The program computes the whole square of attention and the logits of every position."""
    tokens, grids, _ = small_model.content(name)
    images = [h * w for h, w in grids]
    graph, params = small_model.make_model()
    prompts = small_model.make_prompts([name], len(tokens), sum(images) or 1)
    if not images:
        prompts = dataclasses.replace(prompts, patches=None)

    def forward(params, prompts):
        from flax import nnx

        return nnx.merge(graph, params)(prompts)

    n = len(tokens)
    square = costs.pair * (n * n - n * (n + 1) // 2)
    expected = costs.vision(images) + costs.text(n, []) + n * costs.head + square
    # The rest is the table of positions, interpolated by a matrix product.
    assert matmul_flops(forward, params, prompts) == pytest.approx(expected, rel=0.02)


def test_completions_share_their_prompt(costs):
    alone = costs.text(50, [4])
    prompt = costs.text(50, [])
    assert costs.text(50, [4] * 8) == prompt + 8 * (alone - prompt)


def test_a_completion_costs_what_as_many_more_prompt_tokens_do_and_its_logits(costs):
    assert costs.text(30, [7]) == costs.text(37, []) + 7 * costs.head
