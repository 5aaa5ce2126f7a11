"""Shared-prefix and decode attention equal plain attention over repeated prompts.

The reference is a loop over heads in float64. Prompts have padding on either side, completions
have different lengths, and padding anywhere must neither leak nor turn into NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2r_jax.ops import attention as attention_module
from p2r_jax.ops.attention import (
    attention,
    attention_weights,
    causal_mask,
    decode_attention,
    segment_mask,
    shared_prefix_attention,
)
from tests.rounding import allowance, assert_close, judged

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, G, P, R, HEADS, KV_HEADS, WIDTH = 3, 4, 6, 5, 6, 2, 8

PROMPT_VALID = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
"""Left-padded, right-padded and full."""
LENGTHS = np.array([[5, 3, 1, 0], [2, 5, 5, 4], [5, 5, 5, 5]])
COMPLETION_VALID = (np.arange(R) < LENGTHS[..., None]).astype(int)


TERMS = WIDTH + (P + G * R) * HEADS // KV_HEADS
"""Of the longest sums: a score, and the gradient of a key that all queries read."""


def plain(q, k, v, mask):
    """One row and head at a time; query head h reads key-value head h // (H / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    repeats = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h // repeats].T / np.sqrt(q.shape[-1])
            scores = np.where(mask[b], scores, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h // repeats]
    return out


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(rows, size):
    return (
        random(rows, size, HEADS, WIDTH, seed=1),
        random(rows, size, KV_HEADS, WIDTH, seed=2),
        random(rows, size, KV_HEADS, WIDTH, seed=3),
    )


class TestMasks:
    def test_causal(self):
        assert causal_mask(jnp.array([[0, 1, 1]])).astype(int).tolist() == [
            [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
        ]

    def test_segments(self):
        assert segment_mask(jnp.array([[1, 1, 2, 0]])).astype(int).tolist() == [
            [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        ]


class TestPlainAttention:
    def test_equals_a_loop_over_heads(self):
        q, k, v = qkv(B, P)
        mask = np.asarray(causal_mask(jnp.asarray(PROMPT_VALID)))
        out = np.asarray(attention(q, k, v, mask))
        assert_close(out, *judged(lambda *x: plain(*x, mask), q, k, v, terms=TERMS))

    @pytest.mark.parametrize("chunk", [2, 4, 6])
    def test_many_queries_in_chunks_equal_all_at_once(self, monkeypatch, chunk):
        """Forward and backward; 6 queries do not fill chunks of 4."""
        inputs = tuple(map(jnp.asarray, qkv(B, P)))
        mask, weights = causal_mask(jnp.asarray(PROMPT_VALID)), random(B, P, HEADS, WIDTH, seed=4)

        def loss(q, k, v):
            return (attention(q, k, v, mask) * weights).sum()

        def run(*inputs):
            return attention(*inputs, mask), jax.grad(loss, (0, 1, 2))(*inputs)

        expected, gates = judged(jax.jit(run), *inputs, terms=TERMS)
        monkeypatch.setattr(attention_module, "QUERY_CHUNK", chunk)
        assert ("scan" in str(jax.make_jaxpr(loss)(*inputs))) == (chunk < P)
        assert_close(jax.jit(lambda *x: run(*x))(*inputs), expected, gates)

    def test_key_value_heads_are_repeated_not_tiled(self):
        """Heads 0, 1, 2 read key-value head 0; tiling would send head 1 to key-value head 1."""
        q, k, v = qkv(1, P)
        v[:, :, 0], v[:, :, 1] = 0, 1
        out = np.asarray(attention(q, k, v, np.ones((1, P, P), bool)))
        # Weights that add up to 1.
        np.testing.assert_allclose(out[0, 0, :, 0], [0, 0, 0, 1, 1, 1], atol=allowance(P))

    def test_a_query_without_any_key_is_finite(self):
        q, k, v = qkv(1, P)
        out, gradient = jax.value_and_grad(
            lambda q: attention(q, k, v, jnp.zeros((1, P, P), bool)).sum()
        )(jnp.asarray(q))
        assert np.isfinite(out)
        assert np.isfinite(gradient).all()

    def test_scores_are_float32_and_the_result_has_the_dtype_of_the_values(self):
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(1, P))
        mask = jnp.ones((1, P, P), bool)
        assert attention_weights(q, k, mask).dtype == jnp.float32
        assert attention(q, k, v, mask).dtype == jnp.bfloat16


def repeated(x):
    """[B, P+G*R, ...] -> [B*G, P+R, ...]: each completion behind its own copy of the prompt."""
    prompt, own = x[:, :P], x[:, P:].reshape(B, G, R, *x.shape[2:])
    prompt = jnp.repeat(prompt[:, None], G, axis=1)
    return jnp.concatenate([prompt, own], 2).reshape(B * G, P + R, *x.shape[2:])


def repeated_attention(q, k, v):
    """The completions' part of plain attention over repeated prompts, [B, G, R, H, D]."""
    valid = np.concatenate([np.repeat(PROMPT_VALID[:, None], G, 1), COMPLETION_VALID], -1)
    mask = causal_mask(jnp.asarray(valid.reshape(B * G, P + R)))
    out = attention(*map(repeated, (q, k, v)), mask)
    return out.reshape(B, G, P + R, HEADS, WIDTH)


def shared(q, k, v):
    return shared_prefix_attention(q, k, v, jnp.array(PROMPT_VALID), jnp.array(COMPLETION_VALID))


REAL_PROMPT, REAL_COMPLETION = PROMPT_VALID.astype(bool), COMPLETION_VALID.astype(bool)


class TestSharedPrefix:
    @pytest.fixture(scope="class")
    def inputs(self):
        return tuple(map(jnp.asarray, qkv(B, P + G * R)))

    def test_completions_equal_repeated_prompts(self, inputs):
        out = np.asarray(shared(*inputs))[:, P:].reshape(B, G, R, HEADS, WIDTH)
        expected, gate = judged(jax.jit(repeated_attention), *inputs, terms=TERMS)
        expected = expected[:, :, P:]
        assert_close(out[REAL_COMPLETION], expected[REAL_COMPLETION], gate)

    def test_the_prompt_equals_attention_without_completions(self, inputs):
        out = np.asarray(shared(*inputs))[:, :P]
        mask = np.asarray(causal_mask(jnp.asarray(PROMPT_VALID)))
        prompts = [np.asarray(x)[:, :P] for x in inputs]
        expected, gate = judged(lambda *x: plain(*x, mask), *prompts, terms=TERMS)
        assert_close(out[REAL_PROMPT], expected[REAL_PROMPT], gate)

    def test_gradients_equal_repeated_prompts(self, inputs):
        """The prompt's share is the sum over its copies; padding receives none."""
        weights = random(B, G, R, HEADS, WIDTH, seed=4) * COMPLETION_VALID[..., None, None]

        def of_shared(q, k, v):
            return (shared(q, k, v)[:, P:].reshape(weights.shape) * weights).sum()

        def of_repeated(q, k, v):
            return (repeated_attention(q, k, v)[:, :, P:] * weights).sum()

        actual, expected = (
            jax.jit(jax.grad(total, argnums=(0, 1, 2))) for total in (of_shared, of_repeated)
        )
        actual = actual(*inputs)
        assert_close(actual, *judged(expected, *inputs, terms=TERMS))
        for ours in actual[1:]:
            assert not np.asarray(ours)[:, :P][~REAL_PROMPT].any()

    def test_a_completion_never_sees_another(self, inputs):
        q, k, v = inputs
        second = slice(P + R, P + 2 * R)
        changed = np.asarray(shared(q, k.at[:, second].add(1), v.at[:, second].add(1)))
        before = np.asarray(shared(q, k, v))
        outside = np.r_[0 : P + R, P + 2 * R : P + G * R]
        np.testing.assert_array_equal(changed[:, outside], before[:, outside])

    @pytest.mark.parametrize("queries, chunks", [(R, 4), (2 * R, 2), (3 * R, 2), (1, 4)])
    def test_completions_in_chunks_equal_all_at_once(self, inputs, monkeypatch, queries, chunks):
        """Forward and backward; a chunk has whole completions, at least one."""
        weights = random(B, P + G * R, HEADS, WIDTH, seed=4)

        def loss(q, k, v):
            return (shared(q, k, v) * weights).sum()

        def run(*inputs):
            return shared(*inputs), jax.grad(loss, (0, 1, 2))(*inputs)

        expected, gates = judged(jax.jit(run), *inputs, terms=TERMS)
        monkeypatch.setattr(attention_module, "QUERY_CHUNK", queries)
        assert f"length={chunks}" in str(jax.make_jaxpr(shared)(*inputs))
        assert_close(jax.jit(lambda *x: run(*x))(*inputs), expected, gates)

    def test_padding_is_finite(self, inputs):
        assert np.isfinite(shared(*inputs)).all()


class TestDecode:
    @pytest.mark.parametrize("step", range(R))
    def test_each_step_equals_the_whole_sequence(self, step):
        """What lies in the suffix cache at and after `step` is not valid, hence garbage."""
        q, k, v = map(jnp.asarray, qkv(B, P + G * R))
        expected, gate = judged(jax.jit(shared), q, k, v, terms=TERMS)
        expected = expected[:, P:].reshape(B, G, R, HEADS, WIDTH)[:, :, step]
        q_own, k_own, v_own = (x[:, P:].reshape(B, G, R, *x.shape[2:]) for x in (q, k, v))
        cached = k_own.at[:, :, step:].set(50.0), v_own.at[:, :, step:].set(1e3)
        out = decode_attention(
            q_own[:, :, step],
            k_own[:, :, step],
            v_own[:, :, step],
            (jnp.swapaxes(k[:, :P], 1, 2), jnp.swapaxes(v[:, :P], 1, 2)),
            tuple(jnp.moveaxis(x, 3, 1) for x in cached),
            jnp.asarray(PROMPT_VALID),
            jnp.broadcast_to(jnp.arange(R) < step, (B, G, R)),
        )
        real = REAL_COMPLETION[:, :, step]
        assert_close(np.asarray(out)[real], expected[real], gate)
