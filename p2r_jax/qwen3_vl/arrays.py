"""Weights as orbax keeps JAX arrays: in parts, of which each host of any mesh reads its own."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

CHUNK_BYTES = 32 * 2**20
"""Of a part. Whole arrays would be compressed, and read, at once."""


def save_array(folder: Path, name: str, value: jax.Array) -> None:
    """Write one array to FOLDER/NAME; returns when it is on disk.

    Each has a folder of its own: orbax keeps all that it saves at once in memory a second time.
    """
    tree = {"array": value}
    arguments = ocp.args.PyTreeSave(
        tree, save_args={"array": ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)}
    )
    _checkpointer().save(folder.absolute() / name, args=arguments)


def array_types_of(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what `save_array` wrote to a folder, by name."""
    names = sorted(path.name for path in folder.iterdir())
    return {name: array_types(folder / name)["array"] for name in names}


def restore_array(folder: Path, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """What `save_array` wrote, with the type and sharding of `like`. Raises ValueError if it is
    damaged."""
    return restore_arrays(folder / name, {"array": like})["array"]


def restore_arrays(
    folder: Path, like: Mapping[str, jax.ShapeDtypeStruct], within: tuple[str, ...] = ()
) -> dict[str, jax.Array]:
    """Those arrays of an orbax checkpoint that `like` names, with its types and shardings; what
    else is there is not read.

    within: names of the groups that hold them, if the folder holds more than one. Raises ValueError
    if they are damaged.
    """
    item: Any = dict(like)
    for group in reversed(within):
        item = {group: item}
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        with _quiet():
            found = _checkpointer().restore(folder.absolute(), args=arguments)
    except jax.errors.JaxRuntimeError:
        raise  # The devices, or another process.
    except Exception as error:
        raise ValueError(f"{folder} is damaged ({_first_line(error)})") from error
    return functools.reduce(lambda tree, group: tree[group], within, found)


def array_types(folder: Path, within: tuple[str, ...] = ()) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types by name. Raises ValueError if the folder cannot be read."""
    try:
        with _quiet():
            tree: Any = _checkpointer().metadata(folder.absolute()).item_metadata.tree
        found = functools.reduce(lambda tree, group: tree[group], within, tree)
        return {n: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for n, x in found.items()}
    except Exception as error:
        raise ValueError(f"{folder} holds no weights that can be read: {error}") from error


@functools.cache
def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's warning that a part of a checkpoint has no metadata file of its own."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
