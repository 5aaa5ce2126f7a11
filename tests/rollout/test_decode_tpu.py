"""What a decoding step moves on a TPU, read from the program that the TPU compiler makes.

Qwen3-VL-2B at full depth on four v5e chips: 8 prompts of 2,560 tokens with 8 completions each.
A shallow model would not do: the compiler keeps whole stacks of few layers in fast memory.
"""

from __future__ import annotations

import json
from pathlib import Path

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
from p2r_jax.rollout import engine
from p2r_jax.rollout.sampling import Sampling, Vocabulary

SLOTS, GROUP, PROMPT, RING = 8, 8, 2560, 256
CONFIGS = Path(__file__).parents[1] / "qwen3_vl" / "configs"


def bf16(shape, sharding):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


class Decode:
    """The compiled decoding loop, and the bytes that one step cannot do without."""

    def __init__(self, chips: str, fsdp: int, tensor: int, re_laid: bool = True):
        self.mesh = mesh = tpu_mesh(chips, data=1, fsdp=fsdp, tensor=tensor)
        config = Qwen3VLConfig.from_hf(json.loads((CONFIGS / "config_2B.json").read_text()))
        model = abstract_model(config, Kernels("pallas_tpu", mesh))
        graph, state = nnx.split(model, nnx.Param)
        where = parameter_shardings(state, mesh, fsdp=not re_laid)
        params = jax.tree.map(
            lambda p, s: p.replace(bf16(p.get_value().shape, s.get_value())),
            state,
            where,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        rows, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((BATCH_AXES,), ()))
        cache = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "tensor"))
        sampling = Sampling(1024, GROUP)
        size = config.text.vocab_size
        words = Vocabulary(
            *(jax.ShapeDtypeStruct((size,), bool, sharding=whole),) * 2,
            jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        )
        shapes = jax.eval_shape(
            lambda pad: engine.empty_slots(
                pad, text=config.text, sampling=sampling, slots=SLOTS, columns=GROUP,
                prompt=PROMPT, ring=RING, dtype=jnp.bfloat16, mesh=None,
            ),
            jax.ShapeDtypeStruct((), jnp.int32),
        )  # fmt: skip

        def place(path, x):
            name = path[-1].name
            own = cache if name in ("keys", "values") else rows if x.ndim else whole
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

        prefix, columns = jax.tree_util.tree_map_with_path(place, shapes)
        free = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        self.compiled = engine.decode.lower(
            graph, params, prefix, columns, words, free, sampling=sampling
        ).compile()
        self.text = self.compiled.as_text()
        self.loop = data_dependent_loop(self.text)

        text = config.text
        decoder = sum(x.size for x in jax.tree.leaves(state["language_model"]))
        weights = 2 * decoder / tensor  # the embedding is tied: it is the output matrix too
        place_bytes = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        self.prefix = SLOTS * PROMPT * place_bytes / fsdp / tensor
        self.suffixes = SLOTS * GROUP * RING * place_bytes / fsdp / tensor
        self.ideal = weights + self.prefix + self.suffixes
        self.layers = text.num_hidden_layers

    def kernel_bytes(self, instruction) -> float | None:
        """One call reads one layer of the stacked caches."""
        if "decode" not in instruction.name:
            return None
        return (self.prefix + self.suffixes) / self.layers


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def decode(request):
    pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
    return Decode(request.param, fsdp=2, tensor=2)


def test_the_kernel_is_in_the_program(decode):
    assert "tpu_custom_call" in decode.text


def test_a_step_reads_weights_one_prefix_and_suffixes_and_little_else(decode):
    traffic = bytes_accessed(decode.text, loop=decode.loop, custom_call=decode.kernel_bytes)
    print(f"{traffic.total / 1e6:.0f} MB of {decode.ideal / 1e6:.0f} MB\n{traffic}")
    assert 1 <= traffic.total / decode.ideal <= 1.2


def test_no_step_gathers_weights(decode):
    """What moves between chips is activations: far less than the smallest layer's weights."""
    moved = collectives(decode.text, loop=decode.loop)
    assert sum(c.bytes * c.times for c in moved if "gather" in c.kind) < 2e6
    assert max(c.bytes for c in moved) < 1e6


def test_weights_split_over_fsdp_would_be_gathered_every_step():
    """That the test above can fail: the layout that training uses."""
    pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
    wrong = Decode("v5e:2x2", fsdp=4, tensor=1, re_laid=False)
    moved = collectives(wrong.text, loop=wrong.loop)
    assert sum(c.bytes * c.times for c in moved) > 1e9
