"""The update multiplies little more than it must: counted on its traced program, nothing runs."""

from __future__ import annotations

import pytest

from tests.benchmarks.group_cost import update_flops


@pytest.mark.parametrize("prompt, length, group", [(1024, 32, 8), (2048, 128, 16)])
def test_flops_of_the_update_are_those_of_one_prompt_and_its_completions(prompt, length, group):
    """Qwen3-VL-2B with the vision tower; recomputation left out. The rest is the causal half."""
    ours, repeated, ideal = update_flops(prompt, length, group)
    assert 1 <= ours / ideal <= 1.10
    # What sharing saves, of a prompt that is most of the work.
    assert repeated / ours > 0.7 * group
