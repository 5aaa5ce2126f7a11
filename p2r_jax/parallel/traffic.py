"""Bytes that a compiled program moves to and from device memory (HBM), instruction by instruction.

Counted on the optimised program (see `hlo`): operands and results of what runs by itself. What a
fusion only slices counts as its slice, an update in place as the update, and values that the
compiler keeps in VMEM do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from p2r_jax.parallel.hlo import VIEWS, Computation, Instruction, Program, parse

_SLICES = {"slice", "dynamic-slice", "gather"}
# What writes in place, with the position of the updates among its operands.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"opt-barrier", "partition-id", "replica-id", "async-update"}


class Part(NamedTuple):
    bytes: int
    """Of all its runs."""
    times: int
    instruction: Instruction


class Traffic(NamedTuple):
    total: int
    """Bytes."""
    parts: list[Part]
    """Most expensive first."""

    def __str__(self) -> str:
        lines = [f"{self.total / 1e6:12.3f} MB in all"]
        for size, times, i in self.parts[:20]:
            lines.append(f"{size / 1e6:12.3f} MB in {times} × {i.opcode} {i.name} {i.source}")
        return "\n".join(lines)


def bytes_accessed(
    text: str,
    loop: str | None = None,
    trips: int | None = None,
    custom_call: Callable[[Instruction], int | None] | None = None,
) -> Traffic:
    """What a program, or one iteration of `loop`, reads from and writes to HBM.

    loop, trips: see `Program.executed`. custom_call: HBM bytes of one run of a custom call such
    as a Pallas kernel, or None for its operands and results, which is too much for a kernel that
    reads one layer of a stacked cache.

    Every instruction reads its operands and writes its result once, so a matrix product that has
    to read an operand several times counts too little. Of an operand that is only sliced the
    slices count, of a result updated in place the update. Compile at full depth and batch: XLA
    keeps a stack of a few layers in VMEM for all steps, which then seems to cost nothing.
    """
    program = parse(text)
    parts = [
        Part(times * _traffic(program, i, custom_call), times, i)
        for i, times, _ in program.executed(loop, trips)
    ]
    parts = sorted((part for part in parts if part.bytes), key=lambda part: -part.bytes)
    return Traffic(sum(part.bytes for part in parts), parts)


def _traffic(program: Program, i: Instruction, custom_call: Callable | None) -> int:
    c, opcode = program[i.computation], re.sub("-(start|done)$", "", i.opcode)
    if opcode in _FREE or "AllocateBuffer" in i.attributes:
        return 0
    if i.opcode == "custom-call" and custom_call and (given := custom_call(i)) is not None:
        return given
    starts, done = i.opcode.endswith("-start"), i.opcode.endswith("-done")
    reads, writes = {}, {} if starts else {n: b.hbm for n, b in enumerate(i.outputs)}
    for n, operand in enumerate(i.operands):
        if not done and operand not in i.operands[:n]:
            reads[n] = sum(b.hbm for b in c[operand].outputs)
    if opcode in _SLICES and not done:
        # What starts gives (operands, result, context).
        reads[0] = reads[0] and i.outputs[len(i.operands) if starts else 0].padded
    if opcode in _UPDATES:
        writes = {} if done else {0: reads.pop(0) and _update(c, i)}
    if opcode in ("fusion", "async") and not done:
        inner = program[i.called[0]]
        several = inner.root.opcode == "tuple"
        roots = inner.root.operands if several else [inner.root.name]
        # One that gives several results itself, such as a reduction of pairs, stands for all.
        roots = [name for name in roots for _ in inner[name].outputs]
        frames = ((inner, i),)
        reads = {n: b and _read(program, frames, inner.parameters[n], b) for n, b in reads.items()}
        writes = {n: b and _written(program, frames, roots[n], b) for n, b in writes.items()}
        if any("chain_id=" in j.attributes for j in program.fused(i)):
            # A collective under way, see `collectives`: its buffers only pass through. What it
            # gathers is read at its start and written to the buffer that starts there.
            for output, operand in re.findall(r"{(\d*)}: \((\d+), {}\)", i.attributes):
                writes.pop(int(output or 0), None)
                if "AsyncCollectiveStart" not in inner.root.attributes:
                    reads.pop(int(operand), None)
            if "AsyncCollectiveDone" in inner.root.attributes:
                reads = {}
    return sum(reads.values()) + sum(writes.values())


def _update(c: Computation, i: Instruction) -> int:
    return sum(b.padded for b in c[i.operands[_UPDATES[i.opcode.removesuffix("-start")]]].outputs)


def _read(program: Program, frames: tuple, name: str, whole: int, state: str = "same") -> int:
    """Bytes that a fusion reads of the argument that is called `name` in the innermost frame.

    state: what became of the argument so far: the same, changed in type or order, updated.
    """
    c, caller = frames[-1]
    total = 0
    for use in c.users[name]:
        first = use.operands.index(name) == 0
        if use.opcode in _SLICES and first:
            total += use.outputs[0].padded
        elif use.opcode in _UPDATES and first and state != "changed":
            total += _read(program, frames, use.name, whole, "updated")
        elif use.opcode == "bitcast" or (use.opcode in VIEWS and state != "updated"):
            kept = state if use.opcode == "bitcast" else "changed"
            total += _read(program, frames, use.name, whole, kept)
        elif use.opcode == "fusion":
            inner = program[use.called[0]]
            for n, operand in enumerate(use.operands):
                if operand == name:
                    called = (*frames, (inner, use))
                    total += _read(program, called, inner.parameters[n], whole, state)
        elif use is not c.root or use.opcode != "tuple" or state != "updated":
            return whole
    if c.root.name == name and len(frames) > 1:
        total += _read(program, frames[:-1], caller.name, whole, state)
    elif c.root.name == name and state != "updated":
        return whole
    return min(total, whole)


def _written(program: Program, frames: tuple, name: str, whole: int) -> int:
    """Bytes of a fusion's result that it writes: an update alone if its base is an argument."""
    c, _ = frames[-1]
    i = c[name]
    if i.opcode == "bitcast":
        return _written(program, frames, i.operands[0], whole)
    if i.opcode == "fusion" and program[i.called[0]].root.opcode != "tuple":
        inner = program[i.called[0]]
        return _written(program, (*frames, (inner, i)), inner.root.name, whole)
    if i.opcode in _UPDATES and _argument(program, frames, i.operands[0]):
        return min(whole, _update(c, i))
    return whole


def _argument(program: Program, frames: tuple, name: str) -> bool:
    c, caller = frames[-1]
    i = c[name]
    if i.opcode == "bitcast":
        return _argument(program, frames, i.operands[0])
    if i.opcode == "parameter" and len(frames) > 1:
        return _argument(program, frames[:-1], caller.operands[int(i.arguments)])
    return i.opcode == "parameter"
