"""Penalty and truncation are those of transformers; a draw follows from its seed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from p2r_jax.ops.attention import MASKED
from p2r_jax.rollout.sampling import Sampling, draw, first_of_largest, penalize, truncate
from tests.rounding import assert_close, judged, worst
from tests.small_model import BANNED, VOCABULARY, vocabulary

V = 50


def logits_of(seed: int, rows: int = 4) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(rows, V))).astype(np.float32)


def theirs(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The warpers in the order in which `generate` applies them."""
    chain = []
    if sampling.top_k:
        chain.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(logits_process.MinPLogitsWarper(sampling.min_p))
    scores = torch.tensor(logits)
    for warper in chain:
        scores = warper(None, scores)
    return scores.numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 1, 2, 7, V - 1, V, 3 * V]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
)
def test_what_may_be_drawn_is_what_transformers_keeps(seed, top_k, top_p, min_p):
    sampling = Sampling(1, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(seed)
    ours, expected = np.asarray(truncate(jnp.asarray(logits), sampling)), theirs(logits, sampling)
    np.testing.assert_array_equal(ours > MASKED / 2, np.isfinite(expected))
    kept = np.isfinite(expected)
    np.testing.assert_array_equal(ours[kept], expected[kept])


def test_tokens_that_tie_with_the_last_one_stay():
    logits = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.1, 0.1]))
    kept = lambda **limits: (truncate(logits, Sampling(1, **limits)) > MASKED / 2).tolist()
    assert kept(top_k=2) == [True, True, True, False, False]
    assert kept(top_p=0.5) == [True, True, True, False, False]
    assert kept(top_p=0.85) == [True] * 5


@pytest.mark.parametrize("penalty", [1.05, 1.5, 0.7])
def test_the_penalty_is_that_of_transformers(penalty):
    logits = logits_of(0)
    ids = np.random.default_rng(1).integers(0, V, (4, 12))
    seen = np.zeros((4, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor(ids), torch.tensor(logits)).numpy()
    # A quotient, or a product with the inverse of the penalty.
    np.testing.assert_allclose(penalize(logits, seen, penalty), expected, rtol=worst(4))


def test_the_penalty_leaves_banned_tokens_banned_and_finite():
    out = penalize(jnp.array([MASKED, -1.0, 2.0]), jnp.ones(3, bool), 1e30)
    assert np.isfinite(out).all()
    assert out[0] == np.float32(MASKED)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 4, 8)).astype(np.float32)
    head = rng.normal(size=(VOCABULARY, 8)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(head)


def drawn(inputs, sampling, seeds=(1, 2, 3), index=None, age=0):
    index = np.broadcast_to(np.arange(4), (3, 4)) if index is None else index
    ages = jnp.full((3, 4), age)
    seeds = jnp.array(seeds, jnp.uint32)
    tokens, log_p = draw(*inputs, vocabulary(), sampling, seeds, jnp.asarray(index), ages)
    return np.asarray(tokens), np.asarray(log_p)


class TestDraws:
    def test_depend_on_seed_index_and_age_alone(self, inputs):
        hidden = jnp.broadcast_to(inputs[0][:1, :1], inputs[0].shape)
        many = lambda **changed: drawn((hidden, inputs[1]), Sampling(1, temperature=3.0), **changed)
        same, _ = many(seeds=(7, 7, 7), index=np.full((3, 4), 2))
        assert (same == same[0, 0]).all()
        for changed in ({"seeds": range(3)}, {"index": np.arange(12).reshape(3, 4)}):
            other, _ = many(**({"seeds": (7, 7, 7), "index": np.full((3, 4), 2)} | changed))
            assert len(np.unique(other)) > 2
        ages = [many(seeds=(7, 7, 7), index=np.full((3, 4), 2), age=n)[0][0, 0] for n in range(12)]
        assert len(set(ages)) > 4

    def test_stay_among_the_likeliest(self, inputs):
        scores = np.where(vocabulary().allowed, inputs[0] @ inputs[1].T, -np.inf)
        third = np.sort(scores, -1)[..., -3]
        for age in range(20):
            tokens, _ = drawn(inputs, Sampling(1, temperature=5.0, top_k=3), age=age)
            chosen = np.take_along_axis(scores, tokens[..., None], -1)[..., 0]
            assert (chosen >= third).all()

    @pytest.mark.parametrize(
        "settings", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"temperature": 0.0}, {}]
    )
    def test_have_the_log_probs_of_the_plain_distribution(self, inputs, settings):
        sampling = Sampling(1, **({"temperature": 0.7} | settings))
        tokens, log_p = drawn(inputs, sampling)

        def plain(hidden, head):
            logits = hidden @ head.T / (sampling.temperature or 1)
            every = jax.nn.log_softmax(logits.at[..., list(BANNED)].set(-jnp.inf))
            return jnp.take_along_axis(every, tokens[..., None], -1)[..., 0]

        # A logit, and the probabilities that it is divided by.
        terms = inputs[1].shape[1] + VOCABULARY
        assert_close(log_p, *judged(jax.jit(plain), *inputs, terms=terms))


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("max_new_tokens", 0, "at least 1"),
        ("group", 0, "at least 1"),
        ("temperature", -1.0, "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", 1.0, "at least 0 and below 1"),
        ("repetition_penalty", 0.0, "above 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(name, value, wanted):
    with pytest.raises(ValueError, match=rf"{name} must be {wanted}.*got {value}"):
        Sampling(**{"max_new_tokens": 4} | {name: value})


class TestFirstOfLargest:
    def test_ties_go_to_the_first(self):
        x = jnp.array([[0.0, 2.0, 2.0, 1.0], [-jnp.inf, -jnp.inf, -3.0, -3.0]])
        assert first_of_largest(x).tolist() == [1, 2]

    def test_nothing_but_masked_values_gives_a_place(self):
        assert first_of_largest(jnp.full((1, 5), -jnp.inf)).tolist() == [0]
        assert first_of_largest(jnp.array([[0.0, jnp.nan, 1.0]])).tolist() == [2]

    def test_with_noise_it_is_a_categorical_draw(self):
        """Compiled as one with what comes before: the very tokens that JAX would draw."""
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1000)) * 3, jnp.float32)
        keys = jax.random.split(jax.random.key(1), 64)

        @jax.jit
        def ours(logits):
            noise = jax.vmap(lambda key: jax.random.gumbel(key, (1000,)))(keys)
            return first_of_largest(logits / 0.7 + noise)

        theirs = jax.jit(lambda x: jax.vmap(jax.random.categorical)(keys, x / 0.7))(logits)
        np.testing.assert_array_equal(ours(logits), theirs)
