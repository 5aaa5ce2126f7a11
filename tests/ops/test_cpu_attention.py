"""Attention ordered for one CPU is the reference's, forward and backward, however it is blocked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2r_jax.ops import attention as reference
from p2r_jax.ops import cpu_attention
from tests.rounding import assert_close, judged

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, S, HEADS, KV_HEADS, WIDTH = 3, 10, 6, 2, 8


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


QKV = tuple(random(B, S, heads, WIDTH, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
WEIGHTS = random(B, S, HEADS, WIDTH, seed=9)
VALID = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * S])
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [1] * S])


@pytest.mark.parametrize("block", [1, 4, 5, 10], ids="blocks of {}".format)
@pytest.mark.parametrize("name", ["causal_attention", "segment_attention"])
def test_equals_the_reference(monkeypatch, name, block):
    """10 queries do not fill blocks of 4; one head's queries are one block at 10."""
    monkeypatch.setattr(cpu_attention, "WHOLE", S if block == S else 0)
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    mask = VALID if name == "causal_attention" else SEGMENTS

    def both(module):
        run = lambda q, k, v: getattr(module, name)(q, k, v, mask)
        loss = lambda *qkv: (run(*qkv) * WEIGHTS).sum()
        return jax.jit(lambda *qkv: (run(*qkv), jax.grad(loss, (0, 1, 2))(*qkv)))

    # The longest sum is the gradient of a key that all queries read.
    expected, gates = judged(both(reference), *QKV, terms=WIDTH + S * HEADS // KV_HEADS)
    assert_close(both(cpu_attention)(*QKV), expected, gates)
    assert all(np.abs(g).max() > 0.1 for g in expected[1])


def test_scores_are_float32_and_the_result_has_the_dtype_of_the_values():
    q, k, v = (x.astype(jnp.bfloat16) for x in QKV)
    run = lambda q, k, v: cpu_attention.causal_attention(q, k, v, VALID)
    assert run(q, k, v).dtype == jnp.bfloat16
    assert f"f32[{HEADS // KV_HEADS},{S},{S}]" in str(jax.make_jaxpr(run)(q, k, v))
    np.testing.assert_allclose(
        run(q, k, v).astype(jnp.float32),
        reference.causal_attention(q, k, v, VALID).astype(jnp.float32),
        atol=2e-2,
    )


def test_scores_of_all_queries_never_exist_at_once(monkeypatch):
    """Nor are they kept for the backward pass."""
    monkeypatch.setattr(cpu_attention, "WHOLE", 0)
    monkeypatch.setattr(cpu_attention, "BLOCK", 2)
    loss = lambda q, k, v: cpu_attention.segment_attention(q, k, v, SEGMENTS).sum()
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*QKV))
    assert f"f32[{HEADS // KV_HEADS},2,{S}]" in program
    assert f",{S},{S}]" not in program.replace(f"bool[{B},{S},{S}]", "")
