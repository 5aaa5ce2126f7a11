"""Collectives and HBM bytes of compiled programs, for CPU devices and for absent TPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.parallel.hlo import buffers, collectives, data_dependent_loop
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.parallel.traffic import bytes_accessed

LAYERS, STEPS = 5, 3


def shape(mesh, sizes, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def compiled_text(f, *args, **options):
    return jax.jit(f, **options).trace(*args).lower().compile().as_text()


def through_layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def decode(x, weights, steps):
    """Runs until data say stop, like the decoding of tokens."""

    def unfinished(state):
        return (state[0] < steps) & (jnp.abs(state[1]).max() < 100)

    def advance(state):
        return state[0] + 1, through_layers(state[1], weights)

    return jax.lax.while_loop(unfinished, advance, (0, x))[1]


class TestShapes:
    @pytest.mark.parametrize(
        "text, elements, padded",
        [
            ("f32[]", 4, 4),
            ("pred[3]{0}", 3, 3),
            ("bf16[8,256]{1,0:T(8,128)(2,1)}", 4096, 4096),
            ("bf16[3,100]{1,0:T(8,128)(2,1)}", 600, 8 * 128 * 2),
            ("bf16[3,100]{0,1:T(8,128)(2,1)}", 600, 104 * 128 * 2),
            ("s32[]{:T(128)}", 4, 512),
            ("s4[10]{0}", 5, 5),
            ("token[]", 0, 0),
        ],
    )
    def test_arrays_are_padded_to_whole_tiles(self, text, elements, padded):
        assert buffers(text) == ((elements, padded, padded),)

    def test_tuples_are_flattened_and_other_memories_hold_no_hbm(self):
        text = "((bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0}), f32[1]{0:S(0)})"
        assert [b.bytes for b in buffers(text)] == [2048, 8, 4]
        assert [b.hbm for b in buffers(text)] == [0, 8, 4]


class TestCollectivesOnCPU:
    """float32 [64, 64] weights, split over eight devices: one gathered takes 16 KiB."""

    WEIGHT = 64 * 64 * 4

    @pytest.fixture(scope="class")
    def mesh(self):
        return make_mesh()

    def args(self, mesh, *sizes):
        weights = shape(mesh, (*sizes, 64, 64), *[None] * len(sizes), "fsdp", dtype=jnp.float32)
        return shape(mesh, (16, 64), "fsdp", dtype=jnp.float32), weights

    def test_a_split_weight_is_gathered_once(self, mesh):
        text = compiled_text(lambda x, w: (x @ w).sum(), *self.args(mesh))
        found = {c.kind: (c.bytes, c.times, c.loops) for c in collectives(text)}
        assert found == {"all-gather": (self.WEIGHT, 1, ()), "all-reduce": (4, 1, ())}

    def test_in_a_scan_it_counts_every_time(self, mesh):
        text = compiled_text(through_layers, *self.args(mesh, LAYERS))
        (gather,) = collectives(text)
        assert (gather.kind, gather.bytes, gather.times) == ("all-gather", self.WEIGHT, LAYERS)
        assert len(gather.loops) == 1

    def test_gradients_are_reduced(self, mesh):
        x, w = self.args(mesh, LAYERS)
        text = compiled_text(
            jax.grad(lambda w, x: through_layers(x, w).sum()), w, x, out_shardings=w.sharding
        )
        moved = {"all-gather": 0, "all-reduce": 0, "reduce-scatter": 0}
        for c in collectives(text):
            moved[c.kind] += c.bytes * c.times
        assert moved["all-gather"] == 2 * LAYERS * self.WEIGHT
        assert moved["all-reduce"] + moved["reduce-scatter"] == LAYERS * self.WEIGHT

    def test_a_data_dependent_loop_must_be_told_its_length(self, mesh):
        text = compiled_text(functools.partial(decode, steps=9), *self.args(mesh, LAYERS))
        with pytest.raises(ValueError, match="depends on data: pass trips="):
            collectives(text)
        (gather,) = (c for c in collectives(text, trips=STEPS) if c.kind == "all-gather")
        assert gather.times == STEPS * LAYERS
        assert gather.loops[0] == data_dependent_loop(text)

    def test_one_iteration_of_a_loop_can_be_asked_for(self, mesh):
        text = compiled_text(functools.partial(decode, steps=9), *self.args(mesh, LAYERS))
        inside = collectives(text, loop=data_dependent_loop(text))
        assert {c.kind: c.times for c in inside} == {"all-gather": LAYERS, "all-reduce": 1}

    def test_a_program_without_such_a_loop_says_so(self, mesh):
        text = compiled_text(through_layers, *self.args(mesh, LAYERS))
        with pytest.raises(ValueError, match="data-dependent loops"):
            data_dependent_loop(text)


HAND_WRITTEN = """
%start (p: bf16[8,8]) -> (bf16[8,8], bf16[64,8], u32[]) {
  %p = bf16[8,8]{1,0} parameter(0)
  %g.0 = bf16[64,8]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[8,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%done (p.1: bf16[8,8], q.1: bf16[64,8]) -> bf16[64,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  %q.1 = bf16[64,8]{1,0} parameter(1)
  %g.1 = bf16[64,8]{1,0} all-gather(%p.1), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d = bf16[64,8]{1,0} custom-call(%p.1, %q.1, %g.1), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (r: f32[64]) -> f32[8] {
  %r = f32[64]{0} parameter(0)
  %o = s32[] constant(0)
  %a = f32[64]{0} all-reduce(%r), to_apply=%sum
  ROOT %s = f32[8]{0} dynamic-slice(%a, %o), dynamic_slice_sizes={8}
}

ENTRY %main (x: bf16[8,8], y: f32[64]) -> f32[8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %ags = (bf16[8,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[64,8]{1,0} all-gather-done(%ags)
  %cps = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}, /*index=3*/u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %cpd = bf16[8,8]{1,0} collective-permute-done(%cps)
  %f.0 = (bf16[8,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %e.0 = bf16[8,8]{1,0} get-tuple-element(%f.0), index=0
  %e.1 = bf16[64,8]{1,0} get-tuple-element(%f.0), index=1
  %f.1 = bf16[64,8]{1,0} fusion(%e.0, %e.1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done
  ROOT %rs = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501 (as XLA prints it)


class TestAsynchronousForms:
    """As XLA:TPU prints them; no small program yields all of them."""

    def test_each_collective_counts_once(self):
        assert [(c.kind, c.bytes) for c in collectives(HAND_WRITTEN)] == [
            ("all-gather", 64 * 8 * 2),
            ("collective-permute", 8 * 8 * 2),
            ("all-gather", 64 * 8 * 2),
            ("reduce-scatter", 8 * 4),
        ]

    def test_each_buffer_is_read_and_written_once(self):
        small, large = 8 * 8 * 2, 64 * 8 * 2
        by_name = {p.instruction.name: p.bytes for p in bytes_accessed(HAND_WRITTEN).parts}
        assert by_name == {
            "ags": small,
            "agd": large,
            "cps": small,
            "cpd": small,
            "f.0": small + large,
            "rs": 64 * 4 + 8 * 4,
        }


class TestOnTPU:
    """Programs for v5e; every weight here is too large for its 128 MiB of VMEM."""

    L, ROWS, IN, OUT = 12, 64, 2048, 6144
    WEIGHTS = 2 * L * IN * OUT * 2

    @pytest.fixture(scope="class")
    def chip(self):
        return self.mesh(fsdp=1)

    @staticmethod
    def mesh(**sizes):
        pytest.importorskip("libtpu")
        from p2r_jax.parallel.topology import tpu_mesh

        return tpu_mesh("v5e:2x2", **sizes)

    def decode_program(self, mesh, split=None, gathered=False):
        def layer(x, weights):
            up, down = weights
            return x + jax.nn.silu(x @ up) @ down, None

        def f(x, weights, steps):
            if gathered:
                whole = NamedSharding(mesh, PartitionSpec())
                weights = [jax.lax.with_sharding_constraint(w, whole) for w in weights]

            def unfinished(state):
                return (state[0] < steps) & (jnp.abs(state[1]).max() < 100)

            def advance(state):
                return state[0] + 1, jax.lax.scan(layer, state[1], weights)[0]

            return jax.lax.while_loop(unfinished, advance, (0, x))

        return compiled_text(
            f,
            shape(mesh, (self.ROWS, self.IN), split),
            [
                shape(mesh, (self.L, self.IN, self.OUT), None, split),
                shape(mesh, (self.L, self.OUT, self.IN), None, split),
            ],
            shape(mesh, (), dtype=jnp.int32),
        )

    def test_a_step_over_stacked_layers_reads_every_weight_once(self, chip):
        text = self.decode_program(chip)
        traffic = bytes_accessed(text, loop=data_dependent_loop(text))
        assert self.WEIGHTS <= traffic.total <= 1.03 * self.WEIGHTS
        assert {p.times for p in traffic.parts[:2]} == {self.L}
        assert "MB in 12 × fusion" in str(traffic)

    @pytest.mark.parametrize("gathered", [False, True])
    def test_weights_gathered_in_every_step_are_found(self, gathered):
        text = self.decode_program(self.mesh(fsdp=4), "fsdp", gathered)
        loop = data_dependent_loop(text)
        inside = sum(c.bytes * c.times for c in collectives(text, loop) if c.bytes > 1e6)
        every = sum(c.bytes * c.times for c in collectives(text, trips=STEPS) if c.bytes > 1e6)
        assert inside == (0 if gathered else self.WEIGHTS)
        assert every == self.WEIGHTS * (1 if gathered else STEPS)

    def test_of_a_buffer_updated_in_place_the_update_counts(self, chip):
        """A cache of 4,096 × 64 × 1,024, 512 MiB, of which a step writes 128 KiB twice."""

        def f(cache, new, steps):
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)

            def advance(state):
                step, cache = state
                cache = put(cache, new, step)
                return step + 1, put(cache, jnp.tanh(cache[step // 2]), step + 1)

            return jax.lax.while_loop(lambda s: s[0] < steps, advance, (0, cache))[1]

        cache, new = shape(chip, (4096, 64, 1024)), shape(chip, (64, 1024))
        steps = shape(chip, (), dtype=jnp.int32)
        text = compiled_text(f, cache, new, steps, donate_argnums=0)
        total = bytes_accessed(text, data_dependent_loop(text)).total
        assert total == pytest.approx(4 * 64 * 1024 * 2, rel=0.05)

    def test_the_caller_knows_what_a_kernel_reads(self, chip):
        """A kernel that reads one layer of a stack of 12, 192 MiB; XLA only sees the stack."""
        rows, columns = 8192, 1024
        stack = shape(chip, (self.L, rows, columns))

        def kernel(_, block, out):
            @pl.when(pl.program_id(0) == 0)
            def _():
                out[...] = jnp.zeros_like(out)

            out[...] += block[0].astype(jnp.float32).reshape(-1, 8, columns).sum(0)

        def column_sums(layer, stack):
            return pl.pallas_call(
                kernel,
                out_shape=jax.ShapeDtypeStruct((8, columns), jnp.float32),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=(rows // 512,),
                    in_specs=[pl.BlockSpec((1, 512, columns), lambda i, layer: (layer[0], i, 0))],
                    out_specs=pl.BlockSpec((8, columns), lambda i, layer: (0, 0)),
                ),
                name="column_sums",
            )(layer[None], stack)

        def f(stack):
            add = lambda total, layer: (total + column_sums(layer, stack), None)
            return jax.lax.scan(add, jnp.zeros((8, columns)), jnp.arange(self.L))[0]

        text = compiled_text(f, stack)
        whole = self.L * rows * columns * 2
        assert bytes_accessed(text).total == pytest.approx(self.L * whole, rel=0.01)
        layer_only = bytes_accessed(
            text, custom_call=lambda i: whole // self.L if "column_sums" in i.name else None
        )
        assert layer_only.total == pytest.approx(whole, rel=0.01)
