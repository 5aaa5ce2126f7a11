"""Matrix-product FLOPs against counts by hand: 2 × rows × contracted × columns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.parallel.flops import matmul_flops, matmuls
from p2r_jax.parallel.mesh import make_mesh

X = jax.ShapeDtypeStruct((3, 4), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
STACK = jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)
ONE = 2 * 3 * 4 * 4
"""FLOPs of X @ SQUARE."""


def through_layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


class TestProducts:
    def test_a_product(self):
        assert matmul_flops(jnp.matmul, X, SQUARE) == ONE

    def test_shapes_are_enough_whatever_their_size(self):
        big = jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)
        assert matmul_flops(jnp.matmul, big, big) == 2e18

    def test_batch_dimensions_multiply(self):
        q = jax.ShapeDtypeStruct((2, 7, 3, 8), jnp.float32)
        scores = functools.partial(jnp.einsum, "bqhd,bkhd->bhqk")
        assert matmul_flops(scores, q, q) == 2 * (2 * 3) * 7 * 7 * 8

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_convolution_multiplies_window_and_input_channels(self, groups):
        x = jax.ShapeDtypeStruct((2, 6, 8, 8), jnp.float32)
        kernel = jax.ShapeDtypeStruct((10, 6 // groups, 3, 3), jnp.float32)
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            feature_group_count=groups,
        )
        assert matmul_flops(convolve, x, kernel) == 2 * (2 * 10 * 8 * 8) * 9 * 6 // groups

    def test_elementwise_work_does_not_count(self):
        assert matmul_flops(lambda x: jnp.tanh(x).sum(), X) == 0

    def test_a_product_that_nobody_uses_does_not_count(self):
        def first(x, w):
            return x @ w, (x @ w) @ w

        assert matmul_flops(lambda x, w: first(x, w)[0], X, SQUARE) == ONE

    def test_kinds_and_shapes_are_told_apart(self):
        counts = matmuls(lambda x, w: (x @ w) @ w + (x @ w.T), X, SQUARE)
        assert counts == {"dot_general (3, 4) × (4, 4)": 3 * ONE}
        counts = matmuls(lambda x, w: (x @ w).T @ x, X, SQUARE)
        assert len(counts) == 2

    def test_a_jaxpr_or_a_jitted_function_with_static_arguments_will_do(self):
        assert matmul_flops(jax.make_jaxpr(jnp.matmul)(X, SQUARE)) == ONE

        @functools.partial(jax.jit, static_argnames="times")
        def repeated(x, w, times):
            for _ in range(times):
                x = x @ w
            return x

        assert matmul_flops(repeated, X, SQUARE, times=3) == 3 * ONE


class TestControlFlow:
    def test_a_scan_counts_every_step(self):
        assert matmul_flops(through_layers, X, STACK) == 5 * ONE

    def test_a_loop_of_known_length_is_a_scan(self):
        def f(x, w):
            return jax.lax.fori_loop(0, 7, lambda _, x: x @ w, x)

        assert matmul_flops(f, X, SQUARE) == 7 * ONE

    def test_a_loop_of_unknown_length_must_be_told(self):
        def f(x, w):
            return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: through_layers(x, w), x)

        with pytest.raises(ValueError, match="pass trips="):
            matmul_flops(f, X, STACK)
        assert matmul_flops(f, X, STACK, trips=3) == 3 * 5 * ONE

    def test_a_loop_of_unknown_length_without_products_need_not_be_told(self):
        def f(x, w):
            return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x + 1, x) @ w

        assert matmul_flops(f, X, SQUARE) == ONE

    def test_the_most_expensive_branch_counts(self):
        def f(x, w):
            return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

        assert matmul_flops(f, X, SQUARE) == 2 * ONE


class TestDerivatives:
    def test_both_gradients_cost_two_more(self):
        loss = lambda x, w: (through_layers(x, w) ** 2).sum()
        assert matmul_flops(jax.grad(loss, argnums=(0, 1)), X, STACK) == 3 * 5 * ONE

    def test_the_gradient_of_the_first_input_alone_is_not_needed(self):
        loss = lambda x, w: ((x @ w) ** 2).sum()
        assert matmul_flops(jax.grad(loss, argnums=1), X, SQUARE) == 2 * ONE

    def test_recomputation_counts(self):
        def loss(x, w, wrap):
            # The second product is not recomputed: nothing backward needs its value.
            return (wrap(lambda x: jnp.tanh(x @ w) @ w)(x) ** 2).sum()

        stored = functools.partial(loss, wrap=lambda f: f)
        recomputed = functools.partial(loss, wrap=jax.checkpoint)
        assert matmul_flops(jax.grad(stored, argnums=(0, 1)), X, SQUARE) == 6 * ONE
        assert matmul_flops(jax.grad(recomputed, argnums=(0, 1)), X, SQUARE) == 7 * ONE

    def test_custom_derivatives_are_followed(self):
        @jax.custom_vjp
        def product(x, w):
            return x @ w

        product.defvjp(
            lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, jnp.zeros_like(kept[1]))
        )
        assert matmul_flops(product, X, SQUARE) == ONE
        loss = lambda x, w: (product(x, w) ** 2).sum()
        assert matmul_flops(jax.grad(loss), X, SQUARE) == 2 * ONE


class TestManyDevices:
    ROWS = jax.ShapeDtypeStruct((16, 4), jnp.float32)

    def test_sharding_leaves_the_whole_unchanged(self):
        rows = jax.ShapeDtypeStruct(
            (16, 4), jnp.float32, sharding=NamedSharding(make_mesh(), PartitionSpec("fsdp"))
        )
        assert matmul_flops(jnp.matmul, rows, SQUARE) == 2 * 16 * 4 * 4

    @pytest.mark.parametrize("split, copies", [("fsdp", 2), (("fsdp", "tensor"), 1)])
    def test_shards_add_up_with_what_several_do_alike(self, split, copies):
        product = jax.shard_map(
            jnp.matmul,
            mesh=make_mesh(fsdp=4, tensor=2),
            in_specs=(PartitionSpec(split), PartitionSpec()),
            out_specs=PartitionSpec(split),
            check_vma=False,
        )
        assert matmul_flops(product, self.ROWS, SQUARE) == copies * 2 * 16 * 4 * 4


class TestKernels:
    @staticmethod
    def kernel(estimate):
        def copy(x, out):
            out[...] = x[...]

        return lambda x: pl.pallas_call(
            copy, out_shape=x, interpret=True, cost_estimate=estimate, name="copied"
        )(x)

    def test_the_estimate_of_a_kernel_counts(self):
        estimate = pl.CostEstimate(flops=100, transcendentals=0, bytes_accessed=0)
        f = lambda x: jax.lax.scan(lambda x, _: (self.kernel(estimate)(x), None), x, length=3)[0]
        assert matmul_flops(f, X) == 300
        assert matmul_flops(f, X, kernel_flops=lambda eqn: None) == 300

    def test_a_kernel_without_estimate_is_an_error(self):
        with pytest.raises(ValueError, match="copied has no cost_estimate"):
            matmul_flops(self.kernel(None), X)

    def test_the_caller_may_know_better(self):
        flops = lambda eqn: 7.0 * eqn.invars[0].aval.size
        assert matmul_flops(self.kernel(None), X, kernel_flops=flops) == 7 * 12
