"""Meshes of TPU chips and GPUs that are not there, to compile for them on any machine.

The package libtpu brings the real TPU compiler, JAX's CUDA plugin the real GPU compiler; both work
without a device. A function is compiled for one by giving it shapes that are sharded over such a
mesh:

    mesh = tpu_mesh("v5e:4x4", fsdp=8, tensor=2)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(f).trace(x).lower().compile()

Lowering for a platform without such shardings would silently compile for the CPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

from jax.experimental import topologies
from jax.sharding import Mesh

from p2r_jax.parallel.mesh import make_mesh

_ENVIRONMENT = {
    # A second process, such as another test worker, would abort on the first one's lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Both keep libtpu from asking a metadata server which chip it is running on.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


H100 = Path(__file__).parents[1] / "assets" / "h100_target.txtpb"
"""XLA's description of the GPU, for `gpu_mesh`."""


def tpu_mesh(name: str, data: int = 1, fsdp: int = -1, tensor: int = 1, slices: int = 1) -> Mesh:
    """A (data, fsdp, tensor) mesh to compile for, not to run on.

    name: generation and chips, such as "v5e:2x2", "v5p:2x2x1" or "v6e:4x4".
    data, fsdp, tensor: as for `make_mesh`; three times 1 takes one chip of the topology.
    slices: how many of these are joined by the data-centre network.

    Raises ModuleNotFoundError without libtpu, ValueError for a topology that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ModuleNotFoundError(
            "compiling for a TPU needs the package libtpu: pip install 'p2r_jax[tpu]'"
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"topology {name!r}: {str(error).splitlines()[0]}") from error
    if math.prod((data, fsdp, tensor)) == 1:
        devices = devices[:1]
    return make_mesh(data, fsdp, tensor, devices=devices)


def gpu_mesh(
    target: str, data: int = 1, fsdp: int = -1, tensor: int = 1, topology: str = "1x1x1"
) -> Mesh:
    """A (data, fsdp, tensor) mesh of the GPUs that `target` describes.

    target: XLA's description of one GPU, a GpuTargetConfigProto as text. topology: slices x hosts
    of each x GPUs of each; "1x1x8" is one host with eight.

    Raises ModuleNotFoundError without JAX's CUDA plugin.
    """
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name="gpu", target_config=target, topology=topology
        ).devices
    except NotImplementedError as error:
        raise ModuleNotFoundError(
            "compiling for GPUs needs JAX's CUDA plugin: pip install 'p2r_jax[cuda]'"
        ) from error
    return make_mesh(data, fsdp, tensor, devices)
