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


def save_arrays(folder: Path, values: Mapping[str, jax.Array]) -> None:
    """Write arrays by name to a new folder; returns when they are on disk."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), dict(values))


def restore_arrays(
    folder: Path, like: Mapping[str, jax.ShapeDtypeStruct], within: tuple[str, ...] = ()
) -> dict[str, jax.Array]:
    """Those arrays that `like` names, with its types and shardings; what else is there is not read.

    within: names of the groups that hold them, if the folder holds more than one.
    """
    item: Any = dict(like)
    for group in reversed(within):
        item = {group: item}
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with _quiet():
        found = _reader().restore(folder.absolute(), args=arguments)
    return functools.reduce(lambda tree, group: tree[group], within, found)


def array_types(folder: Path, within: tuple[str, ...] = ()) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types by name. Raises ValueError if the folder cannot be read."""
    try:
        with _quiet():
            tree: Any = _reader().metadata(folder.absolute()).item_metadata.tree
        found = functools.reduce(lambda tree, group: tree[group], within, tree)
        return {n: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for n, x in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} holds no weights that can be read: {error}") from error


@functools.cache
def _reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


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
