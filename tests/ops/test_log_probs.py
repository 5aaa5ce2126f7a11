"""Chunked log-probabilities equal the plain computation and never hold [tokens, V]."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2r_jax.ops import log_probs as log_probs_module
from p2r_jax.ops.log_probs import masked_logits, token_log_probs
from p2r_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from tests.rounding import assert_close, judged, worst

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, E, V = 2, 5, 8, 24
ALLOWED = np.arange(V) % 5 != 3
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, unembedding = (rng.normal(size=(*n, E)).astype(np.float32) for n in ((B, T), (V,)))
    return jnp.asarray(hidden), jnp.asarray(unembedding)


TERMS = E + V
"""Of a logit, and of the probabilities that they are divided by."""
TARGETS = np.random.default_rng(1).choice(np.flatnonzero(ALLOWED), (B, T))
WEIGHTS = np.random.default_rng(2).normal(size=(2, B, T)).astype(np.float32)


def plain(hidden, unembedding):
    """Renormalised over what may be sampled: banned columns do not exist at all."""
    log_p = jax.nn.log_softmax((hidden @ unembedding.T)[..., ALLOWED] / TEMPERATURE)
    column = np.cumsum(ALLOWED)[TARGETS] - 1
    return jnp.take_along_axis(log_p, column[..., None], -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(
        -1
    )


def in_chunks(hidden, unembedding):
    return token_log_probs(hidden, unembedding, TARGETS, jnp.array(ALLOWED), TEMPERATURE)


@pytest.fixture(params=[1, 2, 6, B * T, 1024])
def chunk(request, monkeypatch):
    """Tokens of a chunk: 1, 1, 3 or all 5 of each of the two rows."""
    monkeypatch.setattr(log_probs_module, "TOKEN_CHUNK", request.param)
    return request.param


def test_values_equal_the_plain_computation(inputs, chunk):
    actual = in_chunks(*inputs)
    assert [x.shape for x in actual] == 2 * [(B, T)]
    assert_close(actual, *judged(plain, *inputs, terms=TERMS))


def test_gradients_equal_the_plain_computation(inputs, chunk):
    """Of log-probs and entropies, for hidden states and the output matrix."""

    def total(compute, *inputs):
        log_probs, entropy = compute(*inputs)
        return (WEIGHTS[0] * log_probs + WEIGHTS[1] * entropy).sum()

    actual = jax.grad(functools.partial(total, in_chunks), argnums=(0, 1))(*inputs)
    expected = jax.jit(jax.grad(functools.partial(total, plain), argnums=(0, 1)))
    assert_close(actual, *judged(expected, *inputs, terms=TERMS))
    assert not np.asarray(actual[1])[~ALLOWED].any()


def test_a_banned_target_is_finite_and_so_are_gradients(inputs):
    """Padding may hold any token; it is masked later, where 0 times infinity would be NaN."""
    banned = np.full((B, T), np.flatnonzero(~ALLOWED)[0])

    def total(hidden):
        log_probs, entropy = token_log_probs(hidden, inputs[1], banned, jnp.array(ALLOWED))
        return jnp.where(jnp.zeros((B, T), bool), log_probs, 0).sum() + entropy.sum()

    value, gradient = jax.value_and_grad(total)(inputs[0])
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bfloat16_inputs_give_float32_log_probs_of_their_exact_products(inputs):
    low = [x.astype(jnp.bfloat16) for x in inputs]
    ours, entropy = in_chunks(*low)
    assert ours.dtype == entropy.dtype == jnp.float32
    expected = judged(plain, *(x.astype(jnp.float32) for x in low), terms=TERMS)
    assert_close((ours, entropy), *expected)


def test_masked_logits_leave_nothing_to_tokens_that_are_not_allowed(inputs):
    logits = np.asarray(masked_logits(*inputs, jnp.array(ALLOWED)))
    hidden, unembedding = (np.asarray(x, np.float64) for x in inputs)
    gate = worst(E, np.max(np.abs(hidden) @ np.abs(unembedding).T))
    assert_close(logits[..., ALLOWED], (hidden @ unembedding.T)[..., ALLOWED], gate)
    assert (logits[..., ~ALLOWED] < -1e29).all()


def test_devices_work_on_their_own_rows_alone():
    """Rows over eight devices: no hidden state or logit moves, forward or backward."""
    mesh = make_mesh()
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def total(hidden, unembedding, targets):
        out = token_log_probs(hidden, unembedding, targets, jnp.array(ALLOWED), shards=8)
        return sum(x.sum() for x in out)

    compiled = (
        jax.jit(jax.grad(total), out_shardings=rows)
        .lower(
            jax.ShapeDtypeStruct((16, 64, E), jnp.float32, sharding=rows),
            jax.ShapeDtypeStruct((V, E), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=rows),
        )
        .compile()
    )
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.parametrize("tokens", [64, 1024])
def test_memory_is_that_of_a_chunk_forward_and_backward(tokens, monkeypatch):
    """Temporary memory beyond inputs and outputs, as XLA plans it."""
    width, vocabulary, chunk = 4, 4096, 32
    monkeypatch.setattr(log_probs_module, "TOKEN_CHUNK", chunk)

    def total(hidden, unembedding):
        targets = jnp.zeros((1, tokens), jnp.int32)
        allowed = jnp.ones(vocabulary, bool)
        log_probs, entropy = token_log_probs(hidden, unembedding, targets, allowed)
        return (log_probs + entropy).sum()

    shapes = [jax.ShapeDtypeStruct((*n, width), jnp.float32) for n in ((1, tokens), (vocabulary,))]
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    of_a_chunk = chunk * vocabulary * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * of_a_chunk
