"""What a compiled program consists of, and which collectives it runs.

Reads the text of the optimised program, `compiled.as_text()`, of the compiler for TPUs, GPUs or
CPUs; a program compiled ahead of time needs no device. Numbers are bytes on one device. The format
is XLA's HLO (openxla.org/xla/operation_semantics, openxla.org/xla/tiled_layout). Memory spaces are
those that the TPU compiler prints in layouts: none is HBM, `S(1)` VMEM, `S(2)` semaphores, `S(5)`
the host, `S(6)` scalar memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from p2r_jax.parallel.groups import between

COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"}
COLLECTIVES |= {"collective-permute", "collective-broadcast"}
VIEWS = {"bitcast", "reshape", "convert", "copy", "transpose"}
_MEGASCALE = r'_xla_megascale_transfer_type="(\w+)"'
_INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?"
)


class Buffer(NamedTuple):
    """An array of a shape as printed, e.g. `bf16[8,3,128]{2,1,0:T(8,128)(2,1)S(1)}`."""

    bytes: int
    """Of the elements alone."""
    hbm: int
    """In HBM, where tiles are padded; 0 for an array in another memory."""
    padded: int


@functools.lru_cache(maxsize=1 << 16)
def buffers(shape: str) -> tuple[Buffer, ...]:
    """The arrays of a shape, tuples flattened."""
    found = []
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape):
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8 * (dtype == "pred")
        sizes = [int(n) for n in re.findall(r"\d+", dims)]
        order, _, rest = layout.partition(":")
        minor_first = [sizes[int(d)] for d in order.split(",") if d] or list(sizes)
        tile = re.search(r"T\(([\d,]+)\)", rest)
        for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")] if tile else [])):
            minor_first += [1] * (i == len(minor_first))
            minor_first[i] = -(-minor_first[i] // n) * n
        padded = math.prod(minor_first) * bits // 8
        elsewhere = re.search(r"S\([1-9]", rest)
        found.append(Buffer(math.prod(sizes) * bits // 8, 0 if elsewhere else padded, padded))
    return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    computation: str
    name: str
    shape: str
    opcode: str
    arguments: str
    """Between the parentheses: of a constant its value, of a parameter its number."""
    attributes: str

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return buffers(self.shape)

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that run as part of it: of a loop its condition and body, in this order.
        (`to_apply` counts for a `call`; a reduction applies it to single elements.)"""
        keys = "condition|body|calls|branch_computations|true_computation|false_computation"
        keys += "|to_apply" if self.opcode == "call" else ""
        found = re.findall(rf"\b(?:{keys})=({{[^}}]*}}|%?[\w.\-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]

    @property
    def source(self) -> str:
        """Where in the traced program it comes from, as far as XLA remembers."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run."""

    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.arguments): i.name for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self}
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


class Program(dict[str, Computation]):
    """Computations by name."""

    entry: str

    @functools.cached_property
    def loops(self) -> dict[str, Instruction]:
        """`while` instructions by name."""
        return {i.name: i for c in self.values() for i in c.values() if i.opcode == "while"}

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None if that depends on data (or is not a plain count)."""
        if known := re.search(r'known_trip_count"?:\s*{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        (test, body), outside = (self[name] for name in loop.called), self[loop.computation]
        state = outside[loop.operands[0]]
        if {state.opcode, body.root.opcode} != {"tuple"}:
            return None
        if "direction=LT" not in test.root.attributes:
            return None
        try:
            (counter, start), (unknown, stop) = (_integer(test, o) for o in test.root.operands)
            previous, step = _integer(body, body.root.operands[counter or 0])
            argument, initial = _integer(outside, state.operands[counter or 0])
        except ValueError:
            return None
        if counter is None or previous != counter or step < 1:
            return None
        if unknown is not None or argument is not None:
            return None
        return max(0, -(-(stop - start - initial) // step))

    def executed(
        self, loop: str | None = None, trips: int | None = None
    ) -> Iterator[tuple[Instruction, int, tuple[str, ...]]]:
        """Instructions with how often they run and in which loops, outermost first.

        loop: only one iteration of this loop, its condition included. trips: iterations of every
        loop whose number depends on data; ValueError if it is needed and missing. Of a conditional
        all branches run here, so what follows from it is an upper bound.
        """
        names = self.loops[loop].called if loop else [self.entry]
        stack: list[tuple[str, int, tuple[str, ...]]] = [(name, 1, ()) for name in names]
        while stack:
            name, times, inside = stack.pop()
            for i in self[name].values():
                if i.opcode == "while":
                    count = self.trips(i)
                    if (count := trips if count is None else count) is None:
                        raise ValueError(f"{i.name} ({i.source}) depends on data: pass trips=")
                    stack += [(c, times * count, (*inside, i.name)) for c in i.called]
                elif i.opcode in ("call", "conditional"):
                    stack += [(c, times, inside) for c in i.called]
                else:
                    yield i, times, inside

    def fused(self, i: Instruction) -> Iterator[Instruction]:
        """What a fusion or an asynchronous call contains, nested ones too."""
        for name in i.called:
            for inner in self[name].values():
                yield inner
                yield from self.fused(inner)


def _integer(c: Computation, name: str) -> tuple[int | None, int]:
    """A value as (element of the computation's argument or None, what is added to it)."""
    i = c[name]
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments):
        return None, int(i.arguments)
    if i.opcode == "get-tuple-element" and c[i.operands[0]].opcode == "parameter":
        return int(re.split(r"index=|,", i.attributes)[1]), 0
    if i.opcode in VIEWS:
        return _integer(c, i.operands[0])
    if i.opcode == "add":
        (a, x), (b, y) = (_integer(c, operand) for operand in i.operands)
        if a is None or b is None:
            return b if a is None else a, x + y
    raise ValueError(f"{name} is neither constant nor an argument")


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Of `compiled.as_text()`."""
    program, c = Program(), Computation()
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*{$", line):
            name = found[2]
            c = program[name] = Computation()
            if found[1]:
                program.entry = name
        elif found := _INSTRUCTION.fullmatch(line):
            root, label, shape, opcode, arguments, attributes = found.groups()
            i = Instruction(name, label, shape, opcode, arguments, attributes or "")
            c[label] = i
            if root:
                c.root = i
    return program


def data_dependent_loop(text: str) -> str:
    """Name of the outermost loop that runs until data say stop, e.g. the decoding of tokens."""
    program, found = parse(text), set()
    for _, _, inside in program.executed(trips=1):
        unknown = [name for name in inside if program.trips(program.loops[name]) is None]
        found |= set(unknown[:1])
    if len(found) != 1:
        raise ValueError(f"not one but these data-dependent loops: {sorted(found)}")
    return found.pop()


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int
    """Of the result on one device, each time."""
    times: int
    loops: tuple[str, ...]
    """The loops around it, outermost first."""
    instruction: Instruction
    between: int
    """If it goes over the network between slices or nodes, how many devices of one take part and
    share its bytes; else 0."""


def collectives(
    text: str,
    loop: str | None = None,
    trips: int | None = None,
    islands: Sequence[int] | None = None,
) -> list[Collective]:
    """Every collective of a program, or of one iteration of `loop`; see `Program.executed`.

    islands: of each device, in the order of the mesh, the number of its slice or node.

    An asynchronous one counts once, where its result arrives. XLA:TPU also spreads one over
    several fusions (`AsyncCollectiveStart`, steps with the same chain_id, `AsyncCollectiveDone`),
    all of which contain it: it counts in the first. Its reduce-scatter is a fusion named
    all-reduce-scatter. Between slices it sends to a host and receives from there (Megascale).
    """
    program, found = parse(text), []
    for i, times, inside in program.executed(loop, trips):
        if i.opcode == "recv" and (way := re.search(_MEGASCALE, i.attributes)):
            kind = way[1].lower().replace("_", "-")
            kind = "collective-permute" if kind == "one-to-one" else kind
            found.append(Collective(kind, i.outputs[0].bytes, times, inside, i, 1))
        scatter = any(name.startswith("all-reduce-scatter") for name in i.called)
        inner = list(program.fused(i))
        started = any("AsyncCollectiveStart" in j.attributes for j in inner)
        for j in (i, *inner):
            kind = j.opcode.removesuffix("-done")
            if kind in COLLECTIVES and (started or "chain_id=" not in j.attributes):
                shape, kind = (i, "reduce-scatter") if scatter else (j, kind)
                size = sum(b.bytes for b in shape.outputs)
                crosses = 0
                if islands is not None:
                    crosses = between(_start(program[j.computation], j).attributes, islands)
                found.append(Collective(kind, size, times, inside, j, crosses))
    return found


def _start(c: Computation, i: Instruction) -> Instruction:
    """Of what ends an asynchronous collective, what started it; others are their own start."""
    while i.opcode.endswith("-done") or i.opcode in ("opt-barrier", "get-tuple-element", "tuple"):
        i = c[i.operands[0]]
    return i
