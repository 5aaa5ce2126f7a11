"""Several processes, one for each host: starting them, and values that all of them see.

Host code is the same program everywhere: each process makes the same decisions from the same
values, so that all of them enter the same compiled programs in the same order. What only one of
them knows (a reward, a signal) is exchanged here before anything depends on it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from p2r_jax.config import DistributedConfig


def start(config: DistributedConfig) -> None:
    """Join the other processes, if there are any; before anything asks JAX for devices.

    Raises ValueError for settings that do not name one process of several.
    """
    own = (config.coordinator, config.processes, config.process)
    given = [value is not None for value in own]
    if any(given) and not all(given):
        raise ValueError(
            "distributed.coordinator, distributed.processes and distributed.process belong "
            "together: set all three, or none where the environment knows them"
        )
    if config.process is not None and not 0 <= config.process < (config.processes or 1):
        raise ValueError(
            f"distributed.process = {config.process} must be 0 to distributed.processes - 1"
        )
    if config.enabled == "off" or jax.distributed.is_initialized():
        return
    if config.enabled == "on" or any(given) or _environment_has_several():
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )


def _environment_has_several() -> bool:
    # Set by JAX itself on a TPU VM, whose other hosts only the metadata server knows; there it
    # may turn out to be one of one.
    on_tpu_vm = os.environ.get("TPU_ML_PLATFORM") == "JAX"
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    return (
        (on_tpu_vm and os.environ.get("JAX_PLATFORMS", "") != "cpu")
        or any(int(os.environ.get(name) or 1) > 1 for name in counts)
        or any("," in os.environ.get(name, "") for name in hosts)
        or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    )


def is_main() -> bool:
    """The one process that writes files people read."""
    return jax.process_index() == 0


def put(tree: Any, where: Sharding | None) -> Any:
    """NumPy arrays that every process holds alike, on the devices of a sharding.

    Nothing is sent between processes: each gives its devices what they hold.
    """
    if where is None or where.is_fully_addressable:
        return jax.device_put(tree, where)

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree)


def to_host(tree: Any) -> Any:
    """Whole arrays as NumPy on every process, whatever their sharding."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))
    return jax.tree.map(
        lambda x: to_one(x, True) if isinstance(x, jax.Array) else np.asarray(x), tree
    )


def to_one(x: jax.Array, here: bool) -> np.ndarray | None:
    """A whole array as NumPy on the processes that say `here`, None on others. All must call it."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        x = _replicate(x.sharding.mesh)(x)
    if not here:
        x.block_until_ready()  # Or copies would pile up on the devices.
        return None
    return np.asarray(x if x.is_fully_addressable else x.addressable_data(0))


@functools.cache
def _replicate(mesh: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def gather(values: np.ndarray) -> np.ndarray:
    """What each process passes in, as [processes, ...] on all of them; shapes must agree."""
    values = np.asarray(values)
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    # As bytes: JAX would make float32 of float64.
    raw = np.frombuffer(values.tobytes(), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(raw))
    return np.stack([np.frombuffer(r.tobytes(), values.dtype).reshape(values.shape) for r in rows])


def any_process(flag: bool) -> bool:
    """Whether the flag is set on at least one process."""
    return bool(gather(np.asarray([flag])).any())


def on_main(action: Callable[[], Any]) -> None:
    """Let the main process do something to files. If it fails, that error there and OSError on all
    others: none of them waits for one that is gone."""
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as problem:
            error = problem
    if any_process(error is not None):
        raise error or OSError("process 0 could not write files: see its output")
