"""Splash attention equals the reference where tokens are real, and keeps padding to itself.

Kernels run in interpret mode here; the last class compiles them for TPUs that are not there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.ops import attention as reference
from p2r_jax.ops import splash
from p2r_jax.parallel.topology import tpu_mesh
from tests.rounding import assert_close, judged

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, P, G, R, HEADS, KV_HEADS = 3, 50, 3, 37, 4, 2
S = P + G * R


def filled(size, starts, stops):
    at = np.arange(size)
    return (at >= np.asarray(starts)[..., None]) & (at < np.asarray(stops)[..., None])


PROMPT = filled(P, [13, 0, 0], [P, 29, P])
"""Left-padded, right-padded and full."""
COMPLETION = filled(R, np.zeros((B, G)), [[R, 1, 0], [3, R, 20], [R, R, R]])
SEGMENT = np.where(filled(S, [0, 20, 0], [S, S, 140]), 1 + np.arange(S) // 60, 0)

MASKS = {
    "causal": (filled(S, [31, 0, 0], [S, 100, S]).astype(np.int32),),
    "segment": (SEGMENT.astype(np.int32),),
    "shared_prefix": (PROMPT.astype(np.int32), COMPLETION.astype(np.int32)),
}
REAL = {
    "causal": MASKS["causal"][0] > 0,
    # Here padding is a segment like any other.
    "segment": np.ones((B, S), bool),
    "shared_prefix": np.concatenate([PROMPT, COMPLETION.reshape(B, -1)], axis=1),
}


def random(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(width):
    return (
        random(B, S, HEADS, width, seed=1),
        random(B, S, KV_HEADS, width, seed=2),
        random(B, S, KV_HEADS, width, seed=3),
    )


def result_and_gradients(function, inputs, masks, weights, **options):
    """The result, and gradients of its weighted sum with respect to q, k and v."""

    def loss(*inputs):
        out = function(*inputs, *map(jnp.asarray, masks), **options)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return np.asarray(out), [np.asarray(x) for x in gradients]


def assert_parity(shape, width):
    """Of real tokens; no gradient comes from padding, so that all of them are compared."""
    inputs, real = qkv(width), REAL[shape]
    weights = random(B, S, HEADS, width, seed=4) * real[..., None, None]

    def run(module, *inputs, **options):
        function = getattr(module, f"{shape}_attention")
        out, gradients = result_and_gradients(function, inputs, MASKS[shape], weights, **options)
        return out[real], gradients

    # The longest sums are a score, and the gradient of a key that all queries read.
    terms = width + S * HEADS // KV_HEADS
    expected, gates = judged(functools.partial(run, reference), *inputs, terms=terms)
    assert_close(run(splash, *inputs, interpret=True), expected, gates)


class TestParity:
    @pytest.mark.parametrize("width", [64, 72, 128])
    @pytest.mark.parametrize("shape", MASKS)
    def test_results_and_gradients_equal_the_reference(self, shape, width):
        assert_parity(shape, width)

    @pytest.mark.parametrize("shape", MASKS)
    def test_blocks_may_begin_and_end_anywhere(self, monkeypatch, shape):
        """Two blocks of 128; the prompt ends, and completions begin, in the middle of one."""
        monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)
        assert_parity(shape, 8)

    def test_bfloat16_stays_and_costs_only_rounding(self):
        exact = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in qkv(64)]
        inputs = [x.astype(jnp.bfloat16) for x in exact]
        masks = [*map(jnp.asarray, MASKS["causal"])]
        out = splash.causal_attention(*inputs, *masks, interpret=True)
        assert out.dtype == jnp.bfloat16
        expected = np.asarray(reference.causal_attention(*exact, *masks))
        difference = np.abs(np.asarray(out, np.float32) - expected)[REAL["causal"]]
        assert difference.max() < 0.03


class TestPadding:
    @pytest.mark.parametrize("shape", ["causal", "shared_prefix"])
    def test_no_gradient_of_padding_reaches_a_real_token(self, shape):
        """Even if a loss were to look at padding, whose results are finite."""
        real = REAL[shape]
        weights = random(B, S, HEADS, 8, seed=4) * ~real[..., None, None]
        function = getattr(splash, f"{shape}_attention")
        out, gradients = result_and_gradients(
            function, qkv(8), MASKS[shape], weights, interpret=True
        )
        assert np.isfinite(out).all()
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            assert not gradient[real].any()
            assert gradient[~real].any()

    @pytest.mark.parametrize("shape", ["causal", "shared_prefix"])
    def test_no_result_depends_on_padding(self, shape):
        real = REAL[shape]
        function = getattr(splash, f"{shape}_attention")
        masks = [*map(jnp.asarray, MASKS[shape])]
        inputs = qkv(8)
        changed = [jnp.where(real[..., None, None], x, 50.0) for x in inputs]
        before, after = (
            np.asarray(function(*x, *masks, interpret=True)) for x in (inputs, changed)
        )
        np.testing.assert_array_equal(after[real], before[real])
        assert np.isfinite(after).all()


class TestSchedule:
    def test_the_rule_is_causal_within_prompt_and_completion(self):
        expected = [
            [query >= key and (key < 3 or (query - 3) // 4 == (key - 3) // 4) for key in range(11)]
            for query in range(11)
        ]
        rule = splash.Rule(11, prompt=3, length=4)
        assert rule[:, :].tolist() == expected
        assert rule[2:5, 1:9].tolist() == [row[1:9] for row in expected[2:5]]

    def test_blocks_between_two_completions_are_never_visited(self):
        """A prompt of two blocks and three completions of one: 2 + 1 of the first, 3 * 3 more."""
        rule = splash.Rule(5 * 128, prompt=2 * 128, length=128)
        kernel = splash._kernel(rule, 2, 128, True)
        for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
            assert (info.block_mask > 0).sum() == 3 + 3 * 3

    def test_it_is_computed_once_for_many_traces(self):
        """And holds no array of a device, let alone a tracer of the first trace."""
        rule = splash.Rule(128, prompt=128)
        first = splash._kernel(rule, HEADS, 128, True)
        for size in (100, 128):  # Both are one block of 128.
            inputs = [x[:, :size] for x in qkv(8)]
            jax.jit(lambda *x: splash.causal_attention(*x, interpret=True)).lower(
                *inputs, jnp.ones((B, size), jnp.int32)
            )
        assert splash._kernel(splash.Rule(128, prompt=128), HEADS, 128, True) is first
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first))

    @pytest.mark.parametrize("size", [1, 100, 128, 129, 520, 1024, 1100, 2560, 2600])
    def test_blocks_divide_padded_sequences(self, size):
        padded = splash._padded(size)
        block = splash._block(padded)
        assert padded % block == 0 == block % 128
        assert block <= 512
        assert size <= padded < size + block


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
class TestCompilesForTpu:
    """Forward and backward, for one chip: whole blocks for v5e, which has the least fast memory.

    The compiler's time goes into unrolling blocks, hence smaller ones for the others.
    """

    @pytest.fixture(autouse=True)
    def _compiler(self, quick_compilation):
        """Undisturbed by what this module's other tests save time with."""
        pytest.importorskip("libtpu")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)

    def check(self, topology, shape, heads, kv_heads, width, *masks):
        whole = NamedSharding(tpu_mesh(topology, 1, 1, 1), PartitionSpec())
        size = sum(int(np.prod(mask[1:])) for mask in masks)
        q, k = (
            jax.ShapeDtypeStruct((1, size, n, width), jnp.bfloat16, sharding=whole)
            for n in (heads, kv_heads)
        )
        masks = [jax.ShapeDtypeStruct(mask, jnp.int32, sharding=whole) for mask in masks]

        def loss(q, k, v, weights, *masks):
            return (getattr(splash, f"{shape}_attention")(q, k, v, *masks) * weights).sum()

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        text = step.trace(q, k, k, q, *masks).lower().compile().as_text()
        # The result, the gradient of q, and those of k and v.
        assert text.count('custom_call_target="tpu_custom_call"') == 3

    def test_a_prompt_with_grouped_queries(self, topology):
        size = 1024 if topology.startswith("v5e") else 256
        self.check(topology, "causal", 16, 8, 128, (1, size))

    def test_completions_of_a_prompt(self, topology):
        prompt, group, length = (1024, 8, 128) if topology.startswith("v5e") else (128, 2, 64)
        self.check(topology, "shared_prefix", 16, 8, 128, (1, prompt), (1, group, length))

    @pytest.mark.parametrize("width", [64, 72])
    def test_patches(self, topology, width):
        size = 1024 if topology.startswith("v5e") else 256
        self.check(topology, "segment", 16, 16, width, (1, size))
