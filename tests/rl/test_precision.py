"""Gradients of weights are summed in float32 where the model computes in bfloat16."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.ops.log_probs import masked_logits
from p2r_jax.parallel.hlo import collectives, parse
from p2r_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, parameter_shardings
from p2r_jax.parallel.topology import tpu_mesh
from p2r_jax.qwen3_vl.layers import LayerNorm, Linear, RMSNorm, look_up, stack

ROWS, TOKENS, WIDTH, HIDDEN, LAYERS = 16, 384, 128, 256, 3


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rms, self.norm = RMSNorm(WIDTH, 1e-6), LayerNorm(WIDTH, 1e-6)
        # Two axes on either side, as heads have.
        self.up = Linear((WIDTH,), (2, HIDDEN // 2), ("embed", None, "mlp"), bias=True, rngs=rngs)
        self.down = Linear((2, HIDDEN // 2), (WIDTH,), (None, "mlp", "embed"), bias=True, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(self.rms(x)))))


def bfloat16(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


ROUNDING = 1e-3
"""Of one bfloat16 rounding at the end, which is what a float32 sum must not have."""


class TestValues:
    """Against sums in float64 of the very same bfloat16 values."""

    @pytest.fixture(params=["one device", "eight devices"])
    def place(self, request):
        if request.param == "one device":
            return lambda x: x
        mesh = make_mesh(2, 4, 1, jax.devices()[:8])
        return lambda x: jax.device_put(x, batch_sharding(mesh))

    def gradient(self, module, place, x, dy, dtype=jnp.float32):
        graph, params = nnx.split(module)
        params = jax.tree.map(lambda p: p.astype(dtype), params)

        @jax.jit
        def gradient(params, x, dy):
            _, pull = jax.vjp(lambda p, x: nnx.merge(graph, p)(x), params, x)
            return pull(dy)

        return gradient(params, place(x), place(dy))

    @pytest.mark.parametrize("dtype, gate", [(jnp.float32, 1e-5), (jnp.bfloat16, 2 * ROUNDING)])
    def test_linear(self, place, dtype, gate):
        """bfloat16 weights have a bfloat16 gradient, rounded once."""
        layer = Linear((2, 8), (4, 8), (None, "heads", "heads", None), bias=True, rngs=nnx.Rngs(0))
        x, dy = bfloat16(1, ROWS, TOKENS, 2, 8), bfloat16(2, ROWS, TOKENS, 4, 8)
        weights, dx = self.gradient(layer, place, x, dy, dtype)
        wide_x, wide_dy = (np.asarray(t, np.float64) for t in (x, dy))
        kernel, bias = weights["kernel"].get_value(), weights["bias"].get_value()
        assert kernel.dtype == bias.dtype == dtype
        assert relative_error(kernel, np.einsum("btij,btkl->ijkl", wide_x, wide_dy)) < gate
        assert relative_error(bias, wide_dy.sum((0, 1))) < gate
        assert dx.dtype == jnp.bfloat16
        rounded = np.asarray(layer.kernel[...].astype(jnp.bfloat16), np.float64)
        assert relative_error(dx, np.einsum("btkl,ijkl->btij", wide_dy, rounded)) < 2 * ROUNDING

    @pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
    def test_norms(self, place, norm):
        """Single terms of the sum are bfloat16 products; it is over many of them."""
        x, dy = 1 + bfloat16(1, ROWS, TOKENS, 32), 1 + bfloat16(2, ROWS, TOKENS, 32)
        weights, _ = self.gradient(norm(32, 1e-6), place, x, dy)
        wide_x, wide_dy = (np.asarray(t, np.float64) for t in (x, dy))
        if norm is LayerNorm:
            wide_x -= wide_x.mean(-1, keepdims=True)
            bias = weights["bias"].get_value()
            assert relative_error(bias, wide_dy.sum((0, 1))) < 1e-5
        normed = wide_x / np.sqrt(np.square(wide_x).mean(-1, keepdims=True) + 1e-6)
        scale = weights["scale"].get_value()
        assert scale.dtype == jnp.float32
        assert relative_error(scale, (normed * wide_dy).sum((0, 1))) < 0.3 * ROUNDING

    def test_embedding_and_unembedding(self):
        """A token that occurs often adds up many small terms."""
        table = jax.random.normal(jax.random.key(0), (8, 16))
        tokens, dy = jnp.arange(ROWS * TOKENS) % 4, bfloat16(1, ROWS * TOKENS, 16)
        _, pull = jax.vjp(lambda table: look_up(table, tokens, jnp.bfloat16), table)
        expected = np.zeros(table.shape)
        np.add.at(expected, np.asarray(tokens), np.asarray(dy, np.float64))
        assert relative_error(pull(dy)[0], expected) < 1e-5

        hidden, dz = bfloat16(2, ROWS * TOKENS, 16), jax.random.normal(jax.random.key(3), (8,))
        _, pull = jax.vjp(lambda table: masked_logits(hidden, table, jnp.ones(8, bool)), table)
        (found,) = pull(jnp.broadcast_to(dz, (ROWS * TOKENS, 8)))
        wide = np.asarray(hidden, np.float64).sum(0)
        assert relative_error(found, np.outer(np.asarray(dz, np.float64), wide)) < 1e-5

    def test_float32_weights_are_rounded_to_the_input_s_dtype(self):
        block, x = Block(nnx.Rngs(0)), bfloat16(1, 2, 8, WIDTH)
        graph, params = nnx.split(block)
        rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        run = jax.jit(lambda params: nnx.merge(graph, params)(x))
        assert run(params).dtype == jnp.bfloat16
        np.testing.assert_array_equal(run(params), run(rounded))


class TestReductionsOnTPU:
    @pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 1), (1, 2, 2)])
    def test_devices_add_up_float32_and_gather_bfloat16(self, sizes):
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
        mesh = tpu_mesh("v5e:2x2", *sizes)
        graph, weights = nnx.split(nnx.eval_shape(lambda: stack(Block, LAYERS, nnx.Rngs(0))))
        params = jax.tree.map(
            lambda p, s: p.replace(
                jax.ShapeDtypeStruct(p.get_value().shape, jnp.float32, sharding=s.get_value())
            ),
            weights,
            parameter_shardings(weights, mesh),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

        def loss(params, x):
            @jax.checkpoint
            def body(x, layer):
                # As the attention kernels do in the model.
                x = jax.lax.with_sharding_constraint(x, rows)
                return nnx.merge(graph, layer)(x), None

            return jnp.square(jax.lax.scan(body, x, params)[0].astype(jnp.float32)).mean()

        x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16, sharding=rows)
        where = jax.tree.map(lambda p: p.sharding, params)
        program = jax.jit(jax.grad(loss), out_shardings=where).trace(params, x).lower().compile()
        text = program.as_text()
        dtypes: dict[str, set[str]] = {"sums": set(), "gathers": set()}
        for found in collectives(text):
            i = found.instruction
            operands = {parse(text)[i.computation][name].opcode for name in i.operands}
            # A small array is gathered as a sum of arrays that are zero but for one device's part.
            gathers = found.kind == "all-gather" or operands == {"dynamic-update-slice"}
            for dtype, shape in re.findall(r"\b(f32|bf16)\[([\d,]*)\]", i.shape):
                # Activations, which `tensor` adds up in bfloat16, have their number of tokens.
                if str(TOKENS) not in shape.split(","):
                    dtypes["gathers" if gathers else "sums"].add(dtype)
        assert dtypes["sums"] == {"f32"}
        assert dtypes["gathers"] == {"bf16"}
