"""Groups of devices in every notation of XLA, and the network between slices and nodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.config import MeshConfig
from p2r_jax.parallel.groups import between, groups
from p2r_jax.parallel.hlo import collectives
from p2r_jax.plan.chips import Slice, islands
from tests.compilers import mesh_or_skip


def listed(attributes, devices=8):
    return [group.tolist() for group in groups(attributes, devices)]


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("channel_id=1, replica_groups={{0,1,2},{3,4,5}}, dimensions={0}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups={}, to_apply=%sum", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("to_apply=%sum", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,2}}, channel_id=1", [[0, 1], [1, 2]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_notations(attributes, expected):
    assert listed(attributes) == expected


def test_an_unknown_notation_is_shown():
    with pytest.raises(ValueError, match=r"unknown notation: replica_groups=\?"):
        groups("replica_groups=?", 8)


@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 2))
def test_an_iota_equals_its_list(order, shape, kept):
    numbers = np.arange(np.prod(shape)).reshape(shape).transpose(order)
    by_group = numbers.reshape(int(np.prod(numbers.shape[:kept])), -1)
    iota = f"replica_groups=[{','.join(map(str, by_group.shape))}]<=[{','.join(map(str, shape))}]"
    iota += f"T({','.join(map(str, order))})"
    written = "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in by_group) + "}"
    size = int(np.prod(shape))
    assert listed(iota, size) == listed(f"replica_groups={written}", size) == by_group.tolist()


def test_between_islands_devices_of_one_share_what_comes_from_another():
    pairs = "replica_groups={{0,1},{2,3}}"
    assert between(pairs, [0, 0, 1, 1]) == 0
    assert between(pairs, [0, 1, 0, 1]) == 1
    assert between("replica_groups={{0,1,2,3},{4,5,6,7}}", [0, 0, 1, 1] * 2) == 2
    assert between("replica_groups={{0,1,2,3},{4,5,6,7}}", [0, 1, 0, 1, 2, 2, 2, 2]) == 2
    assert between("", [0] * 8 + [1] * 8) == 8


def test_what_goes_through_hosts_between_slices_has_the_name_of_its_collective():
    """As XLA:TPU prints it; a start that is sent is not counted beside what is received."""
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    transfer = lambda way: f'{attributes}, _xla_megascale_transfer_type="{way}"'
    text = f"""
ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {{
  %x = bf16[8,8]{{1,0}} parameter(0)
  %t = token[] after-all()
  %s = (bf16[8,8]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=1, frontend_attributes={{{transfer("ALL_REDUCE")}}}
  %r = (bf16[8,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, frontend_attributes={{{transfer("ALL_REDUCE")}}}
  %p = (bf16[4,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=2, frontend_attributes={{{transfer("ONE_TO_ONE")}}}
  ROOT %c = bf16[8,8]{{1,0}} copy(%x)
}}
"""  # noqa: E501
    found = [(c.kind, c.bytes, c.between) for c in collectives(text)]
    assert sorted(found) == [("all-reduce", 128, 1), ("collective-permute", 64, 1)]


def test_the_groups_of_a_collective_are_those_of_its_start():
    """Whatever XLA puts between its start and its end."""
    text = """
ENTRY %main (x: bf16[8,8]) -> bf16[32,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %s = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
  %b = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) opt-barrier(%s)
  ROOT %d = bf16[32,8]{1,0} all-gather-done(%b)
}
"""  # noqa: E501 (as XLA prints it)
    assert [c.between for c in collectives(text, islands=[0, 0, 1, 1])] == [0]
    assert [c.between for c in collectives(text, islands=[0, 1, 0, 1])] == [1]


@pytest.mark.parametrize("name, slices", [("v5e:2x2", 2), ("h100:16", 1)])
def test_only_the_sum_of_gradients_leaves_a_slice_or_node(name, slices):
    """Weights are split inside of it and the batch over all: what the compilers make of that."""
    where = Slice.parse(name, slices)
    mesh = mesh_or_skip(where.mesh, MeshConfig(data=2, fsdp=-1, tensor=1))
    size, inside = 2048, mesh.shape["fsdp"]

    def loss(weights, x):
        return (jnp.tanh(x @ weights) ** 2).sum()

    def shape(rows, *spec):
        return jax.ShapeDtypeStruct(
            (rows, size), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    weights = shape(size, "fsdp")
    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    compiled = gradient.trace(weights, shape(512, ("data", "fsdp"))).lower().compile()
    found = collectives(compiled.as_text(), islands=islands(mesh))
    assert len(set(islands(mesh))) == 2
    (crossing,) = (c for c in found if c.between)
    assert crossing.kind == "all-reduce"
    # A shard of the gradient, and no more than the TPU's padding beyond.
    shard = size * size * 2 // inside
    assert shard <= crossing.bytes <= 1.1 * shard
    gathered = [c.bytes for c in found if c.kind == "all-gather" and not c.between]
    assert gathered == [size * size * 2]
