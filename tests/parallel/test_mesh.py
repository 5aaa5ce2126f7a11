"""Meshes, and the one table that says which parameter axis is split over which mesh axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from p2r_jax.parallel.mesh import (
    AXES,
    RULES,
    batch_sharding,
    batch_shards,
    for_decoding,
    make_mesh,
    parameter_shardings,
    partition_spec,
    replicated,
)
from tests.small_model import make_model


class TestMakeMesh:
    def test_tests_have_eight_devices(self):
        assert jax.device_count() == 8

    @pytest.mark.parametrize(
        "sizes, expected",
        [
            ({}, (1, 8, 1)),
            ({"tensor": 2}, (1, 4, 2)),
            ({"data": -1, "fsdp": 2}, (4, 2, 1)),
            ({"fsdp": 1, "tensor": -1}, (1, 1, 8)),
            ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ],
    )
    def test_minus_one_takes_what_is_left(self, sizes, expected):
        assert tuple(make_mesh(**sizes).shape[axis] for axis in AXES) == expected

    def test_one_device(self):
        assert make_mesh(devices=jax.devices()[:1]).size == 1

    @pytest.mark.parametrize(
        "sizes, message",
        [
            ({"fsdp": 3}, "does not fit 8 device"),
            ({"fsdp": 16}, "does not fit 8 device"),
            ({"tensor": 16}, "does not fit 8 device"),
            ({"data": 3, "fsdp": -1}, "does not fit 8 device"),
            ({"data": -1, "fsdp": -1}, "only one size may be -1"),
            ({"data": 0, "fsdp": -1}, "must be positive"),
            ({"data": -2, "fsdp": -4}, "must be positive"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            make_mesh(**sizes)


class TestPartitionSpec:
    MESH = {"fsdp": 4, "tensor": 2}  # noqa: RUF012

    @pytest.mark.parametrize(
        "axes, shape, expected",
        [
            (("embed", "heads", None), (64, 4, 16), ("fsdp", "tensor", None)),
            (("vocab", "embed"), (320, 64), ("tensor", "fsdp")),
            (("embed", "kv_heads", None), (64, 1, 16), ("fsdp", None, None)),
            (("embed", "mlp"), (66, 8), (None, "tensor")),
            ((None,), (64,), (None,)),
        ],
        ids=["split", "vocabulary", "one head: replicated", "66 / 4: replicated", "norm"],
    )
    def test_a_dimension_is_split_if_it_divides(self, axes, shape, expected):
        assert partition_spec(axes, shape, make_mesh(**self.MESH)) == PartitionSpec(*expected)

    def test_stacked_layers_have_one_more_axis(self):
        spec = partition_spec(("embed", "mlp"), (12, 64, 8), make_mesh(**self.MESH))
        assert spec == PartitionSpec(None, "fsdp", "tensor")

    def test_weights_for_decoding_are_split_over_tensor_alone(self):
        mesh = make_mesh(**self.MESH)
        spec = partition_spec(("embed", "heads", None), (64, 4, 16), mesh, fsdp=False)
        assert spec == PartitionSpec(None, "tensor", None)

    def test_every_rule_names_a_mesh_axis(self):
        assert set(RULES.values()) <= {None, *AXES}


class TestPlacement:
    MESH = {"data": 2, "fsdp": 2, "tensor": 2}  # noqa: RUF012

    def test_parameter_shardings_mirror_the_state(self):
        class Two(nnx.Module):
            def __init__(self):
                self.kernel = nnx.Param(jnp.zeros((8, 4)), axes=("embed", "mlp"))
                self.scale = nnx.Param(jnp.zeros(8), axes=(None,))

        state = nnx.state(Two())
        shardings = parameter_shardings(state, make_mesh(**self.MESH))
        placed = jax.tree.map(jax.device_put, state, shardings)
        assert placed.kernel.get_value().addressable_shards[0].data.shape == (4, 2)
        assert placed.scale.get_value().is_fully_replicated

    def test_a_batch_is_split_over_data_and_fsdp(self):
        mesh = make_mesh(**self.MESH)
        assert batch_shards(mesh) == 4
        batch = jax.device_put(jnp.zeros((8, 3)), batch_sharding(mesh))
        assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}

    def test_replicated(self):
        x = jax.device_put(jnp.zeros(3), replicated(make_mesh(**self.MESH)))
        assert x.is_fully_replicated
        assert len(x.addressable_shards) == 8


def test_weights_for_decoding_are_split_over_tensor_only():
    """Split over fsdp, every decoding step would gather them."""
    _, params = make_model()
    mesh = make_mesh(1, 4, 2)
    specs = {name for s in jax.tree.leaves(for_decoding(params, mesh)) for name in s.spec}
    assert specs == {None, "tensor"}
    assert for_decoding(params, None) is None
