"""The decode kernel equals the reference, reads only what is valid, and compiles for TPUs.

Kernels run in interpret mode. Caches of several blocks have a last one that is part empty.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.ops import attention as reference
from p2r_jax.ops import decode_kernel
from p2r_jax.ops.decode_kernel import decode_attention, schedule
from p2r_jax.parallel.topology import tpu_mesh
from tests.compilers import mesh_or_skip
from tests.rounding import assert_close, judged

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, B, G, HEADS, KV_HEADS, P, C, WIDTH = 2, 3, 3, 4, 2, 296, 104, 8

STARTS, STOPS = np.array([140, 0, 0]), np.array([P, 100, P])
PREFIX_VALID = (np.arange(P) >= STARTS[:, None]) & (np.arange(P) < STOPS[:, None])
"""Left-padded, right-padded and full; of three blocks the first has no use for one, the second
for two."""
LENGTHS = np.array([[0, 1, C], [40, 40, 40], [0, 0, 0]])
SUFFIX_VALID = np.arange(C) < LENGTHS[..., None]


def random(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(dtype=jnp.float32):
    """q, k_new, v_new, prefix and suffix."""
    arrays = (
        random(B, G, HEADS, WIDTH, seed=1),
        random(B, G, KV_HEADS, WIDTH, seed=2),
        random(B, G, KV_HEADS, WIDTH, seed=3),
        tuple(random(L, B, KV_HEADS, P, WIDTH, seed=seed) for seed in (4, 5)),
        tuple(random(L, B, KV_HEADS, G, C, WIDTH, seed=seed) for seed in (6, 7)),
    )
    return jax.tree.map(lambda x: x.astype(dtype), arrays)


MASKS = jnp.asarray(PREFIX_VALID, jnp.int32), jnp.asarray(SUFFIX_VALID)


def kernel(q, k_new, v_new, prefix, suffix, layer=1, interpret=True):
    return np.asarray(
        decode_attention(
            q, k_new, v_new, prefix, suffix, jnp.int32(layer), *MASKS, interpret=interpret
        ).astype(jnp.float32)
    )


def expected(q, k_new, v_new, prefix, suffix, layer=1):
    prefix, suffix = jax.tree.map(lambda x: x[layer], (prefix, suffix))
    out = reference.decode_attention(q, k_new, v_new, prefix, suffix, *MASKS)
    return np.asarray(out.astype(jnp.float32))


def expected_and_gate(layer=1):
    """The longest sum is over the keys of a query, its own among them."""
    return judged(functools.partial(expected, layer=layer), *inputs(), terms=P + C + 1)


@pytest.fixture
def several_blocks(monkeypatch):
    """Three of the prefix and three of the suffix, whose last ones hold 40 and 56 keys."""
    monkeypatch.setattr(decode_kernel, "MOST_KEYS", 128)


class TestParity:
    @pytest.mark.parametrize("layer", range(L))
    def test_a_block_for_each_cache(self, layer):
        assert_close(kernel(*inputs(), layer=layer), *expected_and_gate(layer))

    @pytest.mark.parametrize("layer", range(L))
    def test_several_blocks(self, several_blocks, layer):
        assert_close(kernel(*inputs(), layer=layer), *expected_and_gate(layer))

    def test_bfloat16_costs_only_rounding(self, several_blocks):
        rounded = inputs(jnp.bfloat16)
        out = kernel(*rounded)
        exact = expected(*jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
        np.testing.assert_allclose(out, exact, atol=0.01)

    def test_the_result_has_the_dtype_of_the_values(self):
        out = decode_attention(*inputs(jnp.bfloat16), jnp.int32(0), *MASKS, interpret=True)
        assert out.dtype == jnp.bfloat16

    def test_without_any_cached_key_the_result_is_the_new_value(self, several_blocks):
        arrays = inputs()
        nothing = [jnp.zeros_like(mask) for mask in MASKS]
        out = decode_attention(*arrays, jnp.int32(0), *nothing, interpret=True)
        values = np.repeat(arrays[2], HEADS // KV_HEADS, axis=2)
        np.testing.assert_array_equal(out, values)

    def test_layer_is_data(self):
        """One compiled program decodes every layer."""
        run = jax.jit(lambda layer: decode_attention(*inputs(), layer, *MASKS, interpret=True))
        results = [np.asarray(run(jnp.int32(layer))) for layer in range(L)]
        assert run._cache_size() == 1
        assert np.abs(results[0] - results[1]).max() > 0.1


class TestReads:
    @pytest.mark.parametrize("garbage", [1e3, np.inf, np.nan])
    def test_invalid_places_of_the_caches_do_not_matter(self, several_blocks, garbage):
        q, k_new, v_new, prefix, suffix = inputs()
        unwritten = (
            tuple(jnp.where(PREFIX_VALID[:, None, :, None], x, garbage) for x in prefix),
            tuple(jnp.where(SUFFIX_VALID[:, None, ..., None], x, garbage) for x in suffix),
        )
        np.testing.assert_array_equal(
            kernel(q, k_new, v_new, *unwritten), kernel(q, k_new, v_new, prefix, suffix)
        )

    def test_a_completion_never_sees_another(self, several_blocks):
        *new, prefix, suffix = inputs()
        before = kernel(*new, prefix, suffix)
        changed = tuple(x.at[:, :, :, 1].add(1) for x in suffix)
        after = kernel(*new, prefix, changed)
        np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
        assert (after[:2, 1] != before[:2, 1]).any(-1).all()

    def test_blocks_without_valid_keys_are_skipped(self):
        """A step computes the block of its own number, and otherwise keeps another in memory."""
        valid = [[0, 0, 1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
        assert schedule(jnp.array(valid), 2).tolist() == [[1, 1, 1, 3], [0, 0, 0, 0], [0, 1, 2, 3]]

    def test_no_block_is_out_of_bounds(self, several_blocks):
        """On a TPU nothing stops such a read. What is uninitialised, such as the end of a last
        block, is NaN here."""
        strict = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
        assert_close(kernel(*inputs(), interpret=strict), *expected_and_gate())

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_block_out_of_bounds_would_be_noticed(self, several_blocks, monkeypatch):
        monkeypatch.setattr(decode_kernel, "schedule", lambda *args: schedule(*args) + 1)
        strict = pltpu.InterpretParams(out_of_bounds_reads="raise")
        try:
            with pytest.raises(Exception, match="Out-of-bounds block index"):
                kernel(*inputs(), interpret=strict)
        finally:
            pltpu.reset_tpu_interpret_mode_state()


def full_size(mesh, layers, batch, prompt, past, heads):
    """Abstract arguments of a step of eight completions a row, whole on one chip."""
    whole = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

    group, kv_heads, width = 8, 8, 128
    new = shape(batch, group, kv_heads, width)
    return (
        shape(batch, group, heads, width),
        new,
        new,
        (shape(layers, batch, kv_heads, prompt, width),) * 2,
        (shape(layers, batch, kv_heads, group, past, width),) * 2,
        shape(dtype=jnp.int32),
        shape(batch, prompt, dtype=jnp.int32),
        shape(batch, group, past, dtype=jnp.bool_),
    )


@pytest.mark.usefixtures("whole_compilation")
class TestCompilesForTpu:
    @pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    @pytest.mark.parametrize("prompt, past, heads", [(2560, 256, 16), (8704, 64, 32)])
    def test_no_layer_is_copied_out_of_the_caches(self, topology, prompt, past, heads):
        """At full size for one chip: the kernel takes the caches as they come in."""
        mesh = mesh_or_skip(tpu_mesh, topology, 1, 1, 1)
        arrays = full_size(mesh, 28, 8, prompt, past, heads)
        compiled = jax.jit(decode_attention).trace(*arrays).lower().compile()
        text = compiled.as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1
        cache = rf"= \(?bf16\[[\d,]*,(?:{prompt}|{past}|{8 * past}),128\]"
        assert set(re.findall(rf"{cache}.*? ([\w-]+)\(", text)) == {"parameter", "bitcast"}
