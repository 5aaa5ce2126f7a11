"""Device meshes and the one table that maps logical axes of parameters to mesh axes.

Parameters carry logical axis names (`axes` metadata). `data` and `fsdp` split prompts; `fsdp`
also splits every parameter once; `tensor` splits heads, MLP columns and the vocabulary. The same
code serves one process, several processes and several slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: dict[str | None, str | None] = {
    None: None,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh; one size may be -1 (whatever is left).

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes must be positive; one may be -1"
        )
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: only one size may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices) or 0 in sizes:
        raise ValueError(
            f"mesh {dict(zip(AXES, (data, fsdp, tensor), strict=True))} does not fit "
            f"{len(devices)} device(s): the sizes must multiply to that number"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, fsdp: bool = True
) -> PartitionSpec:
    """Mesh axes for one parameter; a dimension that does not divide evenly is replicated.

    fsdp: False leaves out the split over `fsdp`, which is how decoding wants its weights.
    """
    if len(axes) == len(shape) - 1:
        axes = ("layers", *axes)
    names = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES[axis]
        split = name and (fsdp or name != "fsdp") and size % mesh.shape[name] == 0
        names.append(name if split else None)
    return PartitionSpec(*names)


def parameter_shardings(state: Any, mesh: Mesh, fsdp: bool = True) -> Any:
    """A tree like `state` (nnx variables) of `NamedSharding`s; see `partition_spec`."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata()["axes"]
        spec = partition_spec(axes, variable.get_value().shape, mesh, fsdp)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def for_decoding(params: Any, mesh: Mesh | None) -> Any:
    """A tree of shardings like `params` that is not split over fsdp, so that no decoding step
    gathers weights; None without a mesh."""
    if mesh is None:
        return None
    return jax.tree.map(
        lambda variable: variable.get_value(),
        parameter_shardings(params, mesh, fsdp=False),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis (prompts, images) split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Ways a batch is split; batch sizes must be multiples of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
