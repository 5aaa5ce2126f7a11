"""What the engine's programs move on a TPU, read from what the TPU compiler makes of them.

Qwen3-VL-2B at full depth on four chips: 8 prompts of 2,560 tokens with 8 completions each. A
shallow model would not do: the compiler keeps whole stacks of few layers in fast memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.hlo import collectives, data_dependent_loop
from p2r_jax.parallel.mesh import BATCH_AXES, parameter_shardings
from p2r_jax.parallel.topology import tpu_mesh
from p2r_jax.parallel.traffic import bytes_accessed
from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.inputs import Patches, Prompts
from p2r_jax.qwen3_vl.published import published
from p2r_jax.rollout import engine
from p2r_jax.rollout.sampling import Sampling, Vocabulary

SLOTS, GROUP, PROMPT, RING = 8, 8, 2560, 256


def bf16(shape, sharding):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


class Engine:
    """Abstract weights and slots on a mesh of chips."""

    def __init__(self, chips: str, fsdp: int, tensor: int, re_laid: bool = True):
        self.mesh = mesh = tpu_mesh(chips, data=1, fsdp=fsdp, tensor=tensor)
        self.shards = fsdp
        self.config = config = Qwen3VLConfig.from_hf(published("2B"))
        model = abstract_model(config, Kernels("pallas_tpu", mesh))
        self.graph, state = nnx.split(model, nnx.Param)
        where = parameter_shardings(state, mesh, fsdp=not re_laid)
        self.params = jax.tree.map(
            lambda p, s: p.replace(bf16(p.get_value().shape, s.get_value())),
            state,
            where,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        rows, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((BATCH_AXES,), ()))
        cache = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "tensor"))
        self.rows, self.cache = rows, cache
        self.scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        self.sampling = Sampling(1024, GROUP)
        flags = jax.ShapeDtypeStruct((config.text.vocab_size,), bool, sharding=whole)
        self.words = Vocabulary(flags, flags, self.scalar)
        shapes = jax.eval_shape(
            lambda pad: engine.empty_slots(
                pad, text=config.text, sampling=self.sampling, slots=SLOTS, columns=GROUP,
                prompt=PROMPT, ring=RING, dtype=jnp.bfloat16, mesh=None,
            ),
            jax.ShapeDtypeStruct((), jnp.int32),
        )  # fmt: skip

        def place(path, x):
            name = path[-1].name
            own = cache if name in ("keys", "values") else rows if x.ndim else whole
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

        self.prefix, self.columns = jax.tree_util.tree_map_with_path(place, shapes)
        text = config.text
        self.layers = text.num_hidden_layers
        decoder = sum(x.size for x in jax.tree.leaves(state["language_model"]))
        self.weights = 2 * decoder / tensor  # the embedding is tied: it is the output matrix too
        token = 2 * 2 * self.layers * text.num_key_value_heads * text.head_dim / fsdp / tensor
        self.prefixes, self.suffixes = SLOTS * PROMPT * token, SLOTS * GROUP * RING * token

    def decode(self) -> str:
        return (
            engine.decode.lower(
                self.graph, self.params, self.prefix, self.columns, self.words, self.scalar,
                self.scalar, sampling=self.sampling,
            )
            .compile()
            .as_text()
        )  # fmt: skip

    def start(self, rows: int) -> str:
        """Prompts that have been run come into their slots."""
        by_row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
            (rows, *shape), dtype, sharding=self.rows
        )
        keys = self.prefix.keys.shape
        keys = bf16((keys[0], rows, *keys[2:]), self.cache)
        boundary = by_row(self.config.text.hidden_size, dtype=jnp.bfloat16)
        own = {name: getattr(self.columns, name) for name in engine.STARTED}
        tokens = by_row(PROMPT)
        return (
            engine._start.lower(
                self.prefix, own, (keys, keys, boundary), tokens, tokens, by_row(), by_row(),
                by_row(dtype=jnp.uint32), self.scalar, penalize_prompt=True, mesh=self.mesh,
            )
            .compile()
            .as_text()
        )  # fmt: skip

    def prefill(self, rows: int, patches: int) -> str:
        by_row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
            (rows, *shape), dtype, sharding=self.rows
        )
        by_axis = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))
        prompts = Prompts(
            tokens=by_row(PROMPT),
            positions=jax.ShapeDtypeStruct((3, rows, PROMPT), jnp.int32, sharding=by_axis),
            visual_slot=by_row(PROMPT),
            valid=by_row(PROMPT),
            next_position=by_row(),
            patches=Patches(
                pixels=by_row(patches, self.config.vision.patch_dim, dtype=jnp.float32),
                row_col=by_row(patches, 2),
                image_id=by_row(patches),
                pos_index=by_row(patches, 4),
                pos_weight=by_row(patches, 4, dtype=jnp.float32),
            ),
        )
        return engine.prefill.lower(self.graph, self.params, prompts).compile().as_text()


CHIPS = ["v5e:2x2", "v6e:2x2"]


@pytest.fixture(scope="module", params=CHIPS)
def chips(request):
    pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
    return Engine(request.param, fsdp=2, tensor=2)


class TestDecode:
    @pytest.fixture(scope="class")
    def program(self, chips):
        return chips.decode()

    def test_the_kernel_is_in_the_program(self, program):
        assert "tpu_custom_call" in program

    def test_a_step_reads_weights_one_prefix_and_suffixes_and_little_else(self, chips, program):
        """The kernel counts as one layer of the caches: its blocks are those, each read once."""

        def kernel(instruction) -> float | None:
            if "decode" not in instruction.name:
                return None
            return (chips.prefixes + chips.suffixes) / chips.layers

        traffic = bytes_accessed(program, loop=data_dependent_loop(program), custom_call=kernel)
        ideal = chips.weights + chips.prefixes + chips.suffixes
        print(f"{traffic.total / 1e6:.0f} MB of {ideal / 1e6:.0f} MB\n{traffic}")
        assert 1 <= traffic.total / ideal <= 1.2

    def test_no_step_gathers_weights(self, program):
        """What moves between chips is activations: far less than the smallest layer's weights."""
        moved = collectives(program, loop=data_dependent_loop(program))
        assert sum(c.bytes * c.times for c in moved if "gather" in c.kind) < 2e6
        assert max(c.bytes for c in moved) < 1e6

    def test_weights_split_over_fsdp_would_be_gathered_every_step(self):
        """That the test above can fail: the layout that training uses."""
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
        program = Engine("v5e:2x2", fsdp=4, tensor=1, re_laid=False).decode()
        moved = collectives(program, loop=data_dependent_loop(program))
        assert sum(c.bytes * c.times for c in moved) > 1e9


class TestFill:
    @pytest.fixture(scope="class")
    def v5e(self):
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
        return Engine("v5e:2x2", fsdp=2, tensor=2)

    def test_prompts_come_into_their_slots_without_moving_or_copying_the_others(self, v5e):
        """New rows are read and written; the 8 slots' caches are updated where they are."""
        program = v5e.start(rows=2)
        assert not collectives(program)
        new = v5e.prefixes * 2 / SLOTS
        assert bytes_accessed(program).total < 3.5 * new < v5e.prefixes

    def test_running_them_adds_up_activations_and_moves_nothing_else(self, v5e):
        """Two sums over `tensor` in every layer, as tensor parallelism costs: no row, no weight and
        no cache goes to another chip."""
        rows, patches, vision = 2, 4096, v5e.config.vision
        program = v5e.prefill(rows, patches)
        assert "tpu_custom_call" in program
        moved = collectives(program)
        assert {c.kind for c in moved} == {"all-reduce"}
        own, width = rows // v5e.shards, v5e.config.text.hidden_size
        decoder = 2 * v5e.layers * own * PROMPT * width
        tower = 2 * vision.depth * own * patches * vision.hidden_size
        visual = (1 + len(vision.deepstack_visual_indexes)) * own * patches // 4 * width
        embedded = own * PROMPT * width
        expected = 2 * (decoder + tower + visual + embedded)
        assert sum(c.bytes * c.times for c in moved) <= 1.05 * expected
