"""The Triton kernels equal the XLA reference, visit only needed blocks, and compile for an H100.

On a CPU the kernels run interpreted, in blocks so small that every run of blocks has several. The
compiler for H100 runs on any machine that has JAX's CUDA plugin.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.ops import attention, triton_attention
from p2r_jax.ops.triton_attention import BY_KEYS, BY_QUERIES, Blocks, Rule, key_runs, query_runs
from p2r_jax.parallel.topology import H100, gpu_mesh
from tests.compilers import mesh_or_skip
from tests.rounding import assert_close, judged

NAMES = ["causal_attention", "segment_attention", "shared_prefix_attention"]
TRITON_CALL = "__gpu$xla.gpu.triton"

B, G, P, R = 3, 3, 37, 21
S = P + G * R
POSITION = np.arange(P)
PROMPT_VALID = np.stack([POSITION >= 20, POSITION < 30, POSITION >= 0]).astype(np.int32)
"""Left-padded (a whole block of it), right-padded and full."""
LENGTHS = np.array([[21, 13, 0], [1, 21, 16], [21, 21, 21]])
COMPLETION_VALID = (np.arange(R) < LENGTHS[..., None]).astype(np.int32)
VALID = np.concatenate([PROMPT_VALID, COMPLETION_VALID.reshape(B, -1)], axis=1)
SEGMENT = np.stack(
    [
        np.repeat([1, 2, 3, 0], [50, 7, 23, 20]),  # images in order, padding behind them
        np.repeat([0, 2, 1, 2], [5, 45, 30, 20]),  # padding before, a segment in two parts
        np.ones(S, np.int32),
    ]
).astype(np.int32)
MASKS = {
    "causal_attention": (VALID,),
    "segment_attention": (SEGMENT,),
    "shared_prefix_attention": (PROMPT_VALID, COMPLETION_VALID),
}


def real(name):
    """Where queries are compared: padding queries of the reference read something harmless."""
    return np.ones((B, S), bool) if name == "segment_attention" else VALID.astype(bool)


def inputs(width=16, heads=4, kv_heads=2, rows=B, size=S):
    generator = np.random.default_rng(0)
    shapes = [(rows, size, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


def result_and_gradients(function, qkv, weights):
    def loss(*qkv):
        out = function(*qkv)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def kernels(name, *masks):
    function = getattr(triton_attention, name)
    return lambda q, k, v: function(q, k, v, *map(jnp.asarray, masks), interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """16 or 32 positions in float32."""
    monkeypatch.setattr(triton_attention, "BY_QUERIES", Blocks(queries=64, keys=32))
    monkeypatch.setattr(triton_attention, "BY_KEYS", Blocks(queries=32, keys=64))


@pytest.mark.usefixtures("quick_compilation", "small_blocks")
class TestAgainstTheReference:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        "width, heads, kv_heads", [(64, 4, 2), (72, 3, 3), (128, 4, 1)], ids=str
    )
    def test_results_and_gradients_are_equal(self, name, width, heads, kv_heads):
        """Neither P nor R nor S is a multiple of a block; padding queries have no weight."""
        *qkv, weights = inputs(width, heads, kv_heads)
        weights *= real(name)[..., None, None]
        masks = MASKS[name]
        reference = getattr(attention, name)

        def run(function, *qkv):
            result, *gradients = result_and_gradients(function, qkv, weights)
            return {"result": result[real(name)], **dict(zip("qkv", gradients, strict=True))}

        # The longest sums are a score, and the gradient of a key that all queries read.
        terms = width + S * heads // kv_heads
        plain = functools.partial(run, lambda *x: reference(*x, *masks))
        expected, gates = judged(plain, *qkv, terms=terms)
        assert_close(run(kernels(name, *masks), *qkv), expected, gates)

    @pytest.mark.parametrize("name", ["causal_attention", "shared_prefix_attention"])
    def test_padding_is_zero_and_gets_no_gradient_whatever_the_loss(self, name):
        """Row 0 has no real token at all."""
        masks = [mask.copy() for mask in MASKS[name]]
        for mask in masks:
            mask[0] = 0
        padding = ~np.concatenate([m.reshape(B, -1) for m in masks], axis=1).astype(bool)
        *qkv, weights = inputs()
        for part in result_and_gradients(kernels(name, *masks), qkv, weights):
            assert np.isfinite(part).all()
            assert not part[padding].any()
            assert part[~padding].any()

    def test_bfloat16_inputs_give_a_bfloat16_result_near_the_float32_one(self):
        *qkv, weights = inputs()
        weights *= VALID[..., None, None]
        run = kernels("shared_prefix_attention", PROMPT_VALID, COMPLETION_VALID)
        rounded = [x.astype(jnp.bfloat16) for x in qkv]
        shapes = jax.eval_shape(jax.value_and_grad(lambda *x: run(*x).sum(), (0, 1, 2)), *rounded)
        assert [x.dtype for x in jax.tree.leaves(shapes)] == [jnp.bfloat16] * 4
        expected = result_and_gradients(run, [x.astype(jnp.float32) for x in rounded], weights)
        actual = result_and_gradients(run, rounded, weights)
        for ours, theirs in zip(actual, expected, strict=True):
            assert np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max()

    def test_prompts_without_completions_are_causal(self):
        *qkv, _ = inputs()
        none = np.zeros((B, 0, R), np.int32)
        out = kernels("shared_prefix_attention", VALID, none)(*qkv)
        np.testing.assert_array_equal(out, kernels("causal_attention", VALID)(*qkv))

    def test_query_heads_that_do_not_share_evenly_are_refused(self):
        *qkv, _ = inputs(heads=3)
        with pytest.raises(ValueError, match="3 query heads do not share 2"):
            kernels("causal_attention", VALID)(*qkv)


def rule_ids_and_mask(name):
    """The static rule, the ids and who reads whom, [B, S, S]."""
    valid = VALID.astype(bool)
    causal = np.tril(np.ones((S, S), bool)) & valid[:, None] & valid[..., None]
    if name == "causal_attention":
        return Rule(S, prompt=S), VALID, causal
    if name == "segment_attention":
        same = SEGMENT[:, None] == SEGMENT[..., None]
        return Rule(S, prompt=S, segments=True), SEGMENT, same
    completion = np.repeat([0, *range(1, G + 1)], [P, *[R] * G])
    sees = (completion == 0) | (completion == completion[:, None])
    return Rule(S, prompt=P, length=R), VALID, causal & sees


def visited(runs, count):
    """[B, N, M] of two runs (start, number, start, number) of M blocks."""
    runs, at = np.asarray(runs)[..., None], np.arange(count)
    inside = [(at >= runs[:, :, i]) & (at < runs[:, :, i] + runs[:, :, i + 1]) for i in (0, 2)]
    assert not (inside[0] & inside[1]).any(), "a block is visited twice"
    return inside[0] | inside[1]


def tiles(mask, queries, keys):
    """[B, N, M]: whether anyone in a block of queries reads anything in a block of keys."""
    pad = [(0, 0), (0, -mask.shape[1] % queries), (0, -mask.shape[2] % keys)]
    mask = np.pad(mask, pad)
    mask = mask.reshape(len(mask), mask.shape[1] // queries, queries, -1, keys)
    return mask.any((2, 4))


class TestVisitedBlocks:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("queries, keys", [(32, 16), (4, 8), (128, 64)])
    def test_every_block_that_is_read_is_visited(self, name, queries, keys):
        rule, ids, mask = rule_ids_and_mask(name)
        needed, blocks = tiles(mask, queries, keys), Blocks(queries, keys)
        by_queries = visited(key_runs(jnp.asarray(ids), rule, blocks), needed.shape[2])
        by_keys = visited(query_runs(jnp.asarray(ids), rule, blocks), needed.shape[1])
        assert (by_queries >= needed).all()
        assert (by_keys.swapaxes(1, 2) >= needed).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_no_other_block_is_visited_where_ids_are_in_order(self, name):
        """Row 0 of the segments, and the row without padding of the others."""
        rule, ids, mask = rule_ids_and_mask(name)
        row = slice(0, 1) if name == "segment_attention" else slice(2, 3)
        needed, blocks = tiles(mask[row], 16, 16), Blocks(16, 16)
        ids = jnp.asarray(ids[row])
        np.testing.assert_array_equal(visited(key_runs(ids, rule, blocks), 7), needed)
        np.testing.assert_array_equal(
            visited(query_runs(ids, rule, blocks), 7).swapaxes(1, 2), needed
        )

    def test_blocks_of_nothing_but_padding_are_not_visited(self):
        valid = np.zeros((1, 128), np.int32)
        valid[:, 40:70] = 1
        rule, blocks, ids = Rule(128, prompt=128), Blocks(16, 16), jnp.asarray(valid)
        numbers = np.asarray(key_runs(ids, rule, blocks))[0, :, 1]
        assert numbers.tolist() == [0, 0, 1, 2, 3, 0, 0, 0]
        numbers = np.asarray(query_runs(ids, rule, blocks))[0, :, 1]
        assert numbers.tolist() == [0, 0, 3, 2, 1, 0, 0, 0]

    def test_a_group_costs_its_prompt_once_and_no_score_between_completions(self):
        """2048 + 8 x 256 tokens in the real blocks, against the scores that are needed."""
        prompt, group, length = 2048, 8, 256
        size = prompt + group * length
        rule, ids = Rule(size, prompt, length), jnp.ones((1, size), jnp.int32)
        needed = prompt**2 / 2 + group * length * (prompt + length / 2)
        for runs, blocks in ((key_runs, BY_QUERIES), (query_runs, BY_KEYS)):
            number = np.asarray(runs(ids, rule, blocks))[..., [1, 3]].sum()
            assert needed < number * blocks.queries * blocks.keys < 1.1 * needed

    @pytest.mark.usefixtures("quick_compilation", "small_blocks")
    def test_nan_outside_of_the_visited_blocks_does_not_matter(self):
        """A completion of NaN, aligned to blocks, touches the other completions nowhere."""
        prompt, length, group = 64, 64, 3
        *qkv, weights = inputs(rows=1, size=prompt + group * length)
        masks = np.ones((1, prompt), np.int32), np.ones((1, group, length), np.int32)
        run = kernels("shared_prefix_attention", *masks)
        second = slice(prompt + length, prompt + 2 * length)
        poisoned = [x.at[:, second].set(jnp.nan) for x in qkv]
        clean, actual = (result_and_gradients(run, x, weights) for x in (qkv, poisoned))
        others = np.r_[prompt : prompt + length, prompt + 2 * length : prompt + group * length]
        assert np.isnan(actual[0][:, second]).all()
        np.testing.assert_array_equal(actual[0][:, :prompt], clean[0][:, :prompt])
        for ours, theirs in zip(actual, clean, strict=True):
            np.testing.assert_array_equal(ours[:, others], theirs[:, others])

    @pytest.mark.usefixtures("quick_compilation", "small_blocks")
    @pytest.mark.parametrize(
        "name, ids", [("causal_attention", [1, 1]), ("segment_attention", [1, 2])]
    )
    def test_nan_behind_a_query_or_in_another_segment_does_not_matter(self, name, ids):
        *qkv, _ = inputs(rows=1, size=128)
        run = kernels(name, np.repeat([ids], 64, axis=1))
        out = run(*(x.at[:, 64:].set(jnp.nan) for x in qkv))
        np.testing.assert_array_equal(out[:, :64], run(*qkv)[:, :64])


@pytest.fixture(scope="module")
def h100():
    """Sharding over one H100 that is not there."""
    return NamedSharding(mesh_or_skip(gpu_mesh, H100.read_text()), PartitionSpec())


@pytest.mark.usefixtures("whole_compilation")
class TestH100:
    def compiled(self, name, sharding, prompt, group, length, heads, kv_heads, widths):
        """Forward and backward of one rule at several widths, in one program."""
        size = prompt + group * length
        array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        shapes = [(1, prompt), (1, group, length)] if name == NAMES[2] else [(1, size)]
        masks = [array(shape, jnp.int32) for shape in shapes]
        function = getattr(triton_attention, name)

        def step(operands, masks):
            results = []
            for *qkv, dout in operands:
                out, backward = jax.vjp(lambda *x: function(*x, *masks), *qkv)
                results.append((out, backward(dout)))
            return results

        operands = [
            [array((1, size, n, w), jnp.bfloat16) for n in (heads, kv_heads, kv_heads, heads)]
            for w in widths
        ]
        return jax.jit(step).trace(operands, masks).lower().compile()

    @pytest.mark.parametrize("name", NAMES)
    def test_forward_and_backward_compile_at_every_head_width(self, h100, name):
        """With a rest of a block; 72 is the vision tower's."""
        text = self.compiled(name, h100, 100, 4, 25, 4, 2, (64, 72, 128)).as_text()
        assert text.count(TRITON_CALL) == 9

    def test_an_update_of_a_group_needs_no_memory_for_scores(self, h100):
        """2048 + 8 x 256 tokens; the scores of 16 heads alone would be 402 MiB in float32."""
        program = self.compiled(NAMES[2], h100, 2048, 8, 256, 16, 8, (128,))
        assert program.as_text().count(TRITON_CALL) == 3
        assert program.memory_analysis().temp_size_in_bytes < 2**20


class TestGpuMesh:
    def test_axes_are_those_of_every_mesh(self, h100):
        assert h100.mesh.axis_names == ("data", "fsdp", "tensor")
        text = H100.read_text()
        mesh = gpu_mesh(text, fsdp=-1, tensor=2, topology="1x1x8")
        assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}

    def test_a_missing_plugin_is_named_with_the_extra_that_has_it(self, monkeypatch):
        def missing(*_, **__):
            raise NotImplementedError("topology not implemented for cuda")

        monkeypatch.setattr(topologies, "get_topology_desc", missing)
        with pytest.raises(ModuleNotFoundError, match=r"p2r_jax\[cuda\]"):
            gpu_mesh("")
