"""Advantages: rewards compared within the group of completions of one prompt."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2r_jax.rl.advantages import group_advantages, zero_variance_groups

GRPO = json.loads((Path(__file__).parents[1] / "golden" / "grpo.json").read_text())


@pytest.mark.parametrize("case", GRPO, ids=lambda case: f"{len(case['reward'])}rows")
@pytest.mark.parametrize(
    ("field", "normalize"), [("advantage_std_norm", True), ("advantage_mean_only", False)]
)
def test_advantages_equal_the_authors(case, field, normalize):
    rewards = np.reshape(case["reward"], (-1, case["group_size"]))
    per_token = group_advantages(rewards, normalize).reshape(-1, 1) * np.asarray(case["mask"])
    np.testing.assert_allclose(per_token, case[field], rtol=1e-6, atol=1e-6)


def test_the_deviation_is_the_sample_one():
    # Mean 0.25; deviations 0.75, -0.25 (three times); variance 0.75 / 3.
    advantages = group_advantages(jnp.array([[1.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(advantages, [[1.5, -0.5, -0.5, -0.5]], rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_that_agrees_teaches_nothing(reward):
    assert not group_advantages(jnp.full((2, 8), reward)).any()


def test_a_group_of_one_keeps_its_reward():
    rewards = jnp.array([[1.0], [0.0]])
    np.testing.assert_allclose(group_advantages(rewards), rewards / (1 + 1e-6))
    np.testing.assert_array_equal(group_advantages(rewards, normalize_by_std=False), rewards)


def test_a_dropped_sample_changes_nothing_for_the_others():
    rewards = jnp.array([[1.0, 0.0, 0.0, jnp.nan]])
    valid = jnp.array([[True, True, True, False]])
    expected = group_advantages(rewards[:, :3])
    advantages = group_advantages(rewards, valid=valid)
    np.testing.assert_allclose(advantages, jnp.pad(expected, ((0, 0), (0, 1))), rtol=1e-6)


def test_a_group_left_with_one_sample_has_nothing_to_compare_it_with():
    rewards = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    valid = jnp.array([[True, False], [False, False]])
    for normalize in (True, False):
        assert not group_advantages(rewards, normalize, valid=valid).any()


def test_the_deviation_can_be_taken_over_the_batch():
    rewards = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    advantages = group_advantages(rewards, std_over="batch")
    np.testing.assert_allclose(advantages, [[1.0, -1.0], [0.0, 0.0]], rtol=1e-5)  # std = 0.5


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="std_over 'row'"):
        group_advantages(jnp.zeros((1, 2)), std_over="row")


def test_zero_variance_groups_are_found_among_valid_rewards():
    rewards = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert zero_variance_groups(rewards).tolist() == [True, False, True, False]
    valid = jnp.array([[True, True], [True, True], [True, True], [True, False]])
    assert zero_variance_groups(rewards, valid).tolist() == [True, False, True, True]


def test_advantages_can_be_jitted():
    rewards = jnp.array([[1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(jax.jit(group_advantages)(rewards), group_advantages(rewards))
