"""Which devices exchange in a collective of a compiled program, and whether a slow network lies
between them.

XLA prints groups of devices as lists, `{{0,1},{2,3}}`, as an iota, `[2,2]<=[4]` or
`[2,2]<=[2,2]T(1,0)`, or as axes of a mesh, `mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}`.
Numbers are positions among the devices that a program was compiled for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def groups(attributes: str, devices: int) -> list[Int[np.ndarray, " N"]]:
    """The groups of a collective, of its attributes as printed. One of all if none are named.

    Raises ValueError for a notation that is none of the above.
    """
    braces = r"=\{((?:\{[\d,]*\},?)*)\}"
    if pairs := re.search("source_target_pairs" + braces, attributes):
        return [np.array(pair) for pair in _lists(pairs[1])]
    if listed := re.search("replica_groups" + braces, attributes):
        return [np.array(group) for group in _lists(listed[1])] or [np.arange(devices)]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?)(?:, |$)", attributes):
        return list(_iota(iota[2]).reshape(_numbers(iota[1])))
    if axes := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", attributes
    ):
        return _of_mesh(axes[1], axes[2], axes[3], devices)
    if "replica_groups" in attributes:
        raise ValueError(f"groups of devices in an unknown notation: {attributes[:200]}")
    return [np.arange(devices)]


def between(attributes: str, islands: Sequence[int]) -> int:
    """How many devices of an island take part in a group that has several islands; 0 if no group
    has. islands: of each device the number."""
    where = np.asarray(islands)
    each = [where[group] for group in groups(attributes, len(where))]
    shares = [len(own) // len(set(own)) for own in each if len(set(own)) > 1]
    return max(1, min(shares)) if shares else 0


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text: str) -> Int[np.ndarray, "..."]:
    """`[2,8]T(1,0)`: numbers from 0 in that shape, axes in that order."""
    shape, _, order = text.partition("T")
    numbers = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def _of_mesh(axes: str, ids: str | None, chosen: str, devices: int) -> list[Int[np.ndarray, " N"]]:
    """Axes may be named in part: `'x':(2)4` is the part of size 4 that comes after one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: [size] for name, size in sizes.items()}
    inside: list[tuple[str, int]] = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        if size:
            own = [int(before), int(size), sizes[name] // (int(before) * int(size))]
            if len(parts[name]) > 1 and parts[name] != own:
                raise ValueError(f"an axis in several parts: {chosen}")
            parts[name] = own
        inside.append((name, 1 if size else 0))
    split = [(name, i) for name, own in parts.items() for i in range(len(own))]
    numbers = np.arange(devices) if ids is None else _iota(ids)
    numbers = numbers.reshape([parts[name][i] for name, i in split])
    last = [split.index(one) for one in inside]
    first = [i for i in range(len(split)) if i not in last]
    size = int(np.prod([numbers.shape[i] for i in last]))
    return list(numbers.transpose(first + last).reshape(-1, size))
