"""The Triton decode kernel equals the reference, reads only what is valid, compiles for an H100.

Kernels run in interpret mode, on the arrays of the TPU kernel's tests.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2r_jax.ops import triton_decode
from p2r_jax.ops.triton_decode import decode_attention
from p2r_jax.parallel.topology import H100, gpu_mesh
from tests.compilers import mesh_or_skip
from tests.ops.test_decode_kernel import (
    HEADS,
    KV_HEADS,
    MASKS,
    PREFIX_VALID,
    SUFFIX_VALID,
    C,
    L,
    P,
    expected,
    expected_and_gate,
    full_size,
    inputs,
)
from tests.rounding import assert_close, judged

pytestmark = pytest.mark.usefixtures("quick_compilation")


def kernel(q, k_new, v_new, prefix, suffix, layer=1):
    out = decode_attention(
        q, k_new, v_new, prefix, suffix, jnp.int32(layer), *MASKS, interpret=True
    )
    return np.asarray(out.astype(jnp.float32))


@pytest.fixture(params=[1, 8], ids=lambda n: f"chunks of {n} blocks")
def chunks(request, monkeypatch):
    """Prefixes of five blocks, the last of 40 keys, and suffixes of two in one chunk or several."""
    monkeypatch.setattr(triton_decode, "CHUNK", request.param * triton_decode.BLOCK)


@pytest.mark.usefixtures("chunks")
class TestParity:
    @pytest.mark.parametrize("layer", range(L))
    def test_with_the_reference(self, layer):
        assert_close(kernel(*inputs(), layer=layer), *expected_and_gate(layer))

    def test_bfloat16_costs_only_rounding(self):
        rounded = inputs(jnp.bfloat16)
        exact = expected(*jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
        np.testing.assert_allclose(kernel(*rounded), exact, atol=0.01)

    def test_without_any_cached_key_the_result_is_the_new_value(self):
        arrays = inputs()
        nothing = [jnp.zeros_like(mask) for mask in MASKS]
        out = decode_attention(*arrays, jnp.int32(0), *nothing, interpret=True)
        np.testing.assert_array_equal(out, np.repeat(arrays[2], HEADS // KV_HEADS, axis=2))

    @pytest.mark.parametrize("garbage", [np.inf, np.nan])
    def test_invalid_places_of_the_caches_do_not_matter(self, garbage):
        *new, prefix, suffix = inputs()
        unwritten = (
            tuple(jnp.where(PREFIX_VALID[:, None, :, None], x, garbage) for x in prefix),
            tuple(jnp.where(SUFFIX_VALID[:, None, ..., None], x, garbage) for x in suffix),
        )
        np.testing.assert_array_equal(kernel(*new, *unwritten), kernel(*new, prefix, suffix))

    def test_a_completion_never_sees_another(self):
        *new, prefix, suffix = inputs()
        before = kernel(*new, prefix, suffix)
        after = kernel(*new, prefix, tuple(x.at[:, :, :, 1].add(1) for x in suffix))
        np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
        assert (after[:2, 1] != before[:2, 1]).any(-1).all()


def test_a_ring_is_valid_wherever_its_tokens_lie():
    """A completion that began in the middle of the ring and went on at its start."""
    q, k_new, v_new, prefix, suffix = inputs()
    size = suffix[0].shape[4]
    valid = (np.arange(size) < 7) | (np.arange(size) >= size - 9)
    valid = jnp.broadcast_to(jnp.asarray(valid), MASKS[1].shape)

    def run(valid, *arrays):
        return decode_attention(*arrays, jnp.int32(1), MASKS[0], valid, interpret=True)

    out = run(valid, q, k_new, v_new, prefix, suffix)
    order = np.roll(np.arange(size), 9)  # The same keys, one run of them.
    rolled = tuple(x[:, :, :, :, order] for x in suffix)
    again = functools.partial(run, valid[..., order])
    same, gate = judged(again, q, k_new, v_new, prefix, rolled, terms=P + C + 1)
    assert_close(out, same, gate)


@pytest.mark.usefixtures("whole_compilation")
class TestH100:
    @pytest.mark.parametrize(
        "layers, prompt, past, heads", [(28, 2560, 256, 16), (36, 8704, 2048, 32)]
    )
    def test_no_layer_is_copied_out_of_the_caches(self, layers, prompt, past, heads):
        """At full size for one GPU; the larger cache has more than 2**32 bytes."""
        mesh = mesh_or_skip(gpu_mesh, H100.read_text(), 1, 1, 1)
        arrays = full_size(mesh, layers, 4, prompt, past, heads)
        compiled = jax.jit(decode_attention).trace(*arrays).lower().compile()
        text = compiled.as_text()
        assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2
        cache = rf"= \(?bf16\[{layers},[\d,]*,(?:{prompt}|{past}),128\]"
        assert set(re.findall(rf"{cache}.*? ([\w-]+)\(", text)) == {"parameter", "bitcast"}
        assert compiled.memory_analysis().temp_size_in_bytes < 2**27
