"""Compile one program for chips that are not there, and read what it needs of them.

Memory is the compiler's own account; matrix-product FLOPs are counted on the traced program, loops
multiplied; collectives and memory traffic are read from the compiled one. Compiling is the slow
part, so results are kept by a hash of the program, the chips and the compiler.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from p2r_jax.parallel.flops import matmul_flops
from p2r_jax.parallel.hlo import collectives, data_dependent_loop
from p2r_jax.parallel.traffic import bytes_accessed
from p2r_jax.plan.chips import Slice, islands
from p2r_jax.plan.programs import Program

FORMAT = 3
"""Of kept results; another number makes them be computed anew."""


BETWEEN = " between slices"
"""Behind the kind of a collective that goes over the network between slices or nodes."""


@dataclasses.dataclass
class Compiled:
    """One program on one chip. Bytes, FLOPs and traffic of decoding are those of one token."""

    arguments: int = 0
    results: int = 0
    """Beyond those that take the place of arguments."""
    temporary: int = 0
    code: int = 0
    flops: float = 0.0
    moved: int = 0
    """Bytes to and from the chip's memory."""
    exchanged: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of collectives by kind; of those over the network with BETWEEN behind the kind."""
    kernels: int = 0
    """Pallas kernels in the program."""
    seconds: float = 0.0
    """That compiling took."""
    over: int | None = None
    """Bytes that the compiler wanted beyond the chip's memory; then all else is 0."""
    largest: list[str] = dataclasses.field(default_factory=list)
    """The largest arrays, if it did not fit."""

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporary + self.code


def compile_program(program: Program, where: Slice, mesh: Mesh, keep: Path | None) -> Compiled:
    """Compile, or read what an earlier call found. keep: a folder, or None.

    Raises RuntimeError if the compiler refuses the program for another reason than its memory.
    """
    traced = program.trace()
    lowered = traced.lower()
    file = None
    if keep is not None:
        identity = [str(where), mesh.size, _versions(), program.loop, program.scores, FORMAT]
        digest = hashlib.sha256(json.dumps(identity).encode() + lowered.as_text().encode())
        file = keep / f"{digest.hexdigest()[:32]}.json"
        if file.is_file():
            return Compiled(**json.loads(file.read_text()))
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise RuntimeError(f"{program.name}: {str(error).splitlines()[0][:500]}") from error
        found = _too_large(str(error))
    else:
        found = _read(program, traced, compiled, mesh)
    found.seconds = time.perf_counter() - begin
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(dataclasses.asdict(found)))
        temporary.replace(file)
    return found


def _versions() -> list[str]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    return [version(name) for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")]


def _read(program: Program, traced: Any, compiled: Any, mesh: Mesh) -> Compiled:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    loop = data_dependent_loop(text) if program.loop else None
    exchanged: collections.Counter[str] = collections.Counter()
    for one in collectives(text, loop=loop, trips=1, islands=islands(mesh)):
        # Devices of an island that take part share what comes from outside.
        name, share = (one.kind + BETWEEN, one.between) if one.between else (one.kind, 1)
        exchanged[name] += one.bytes * one.times // share

    def kernel_bytes(instruction: Any) -> int | None:
        # On a GPU only the source of the call tells its name.
        names = instruction.name, instruction.source
        of = (size for own, size in program.kernel_bytes.items() if any(own in n for n in names))
        return next(of, None)

    flops = matmul_flops(traced.jaxpr, trips=1, kernel_flops=_kernel_flops(program.scores))
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops / mesh.size,
        moved=bytes_accessed(text, loop=loop, trips=1, custom_call=kernel_bytes).total,
        exchanged=dict(exchanged),
        kernels=len(
            re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"', text)
        ),
    )


PRODUCTS = {"fwd": 2, "forward": 2, "dq": 3, "dkv": 4}
"""Matrix products of attention kernels by the end of their name: each has 2·D FLOPs a score."""


def _kernel_flops(scores: dict[int, int]) -> Any:
    """FLOPs of a call of splash or of our Triton kernels, of which the equation tells the shapes
    and `scores` how many of the pairs are computed."""

    def flops(equation: Any) -> float | None:
        name = str(equation.params.get("name_and_src_info") or equation.params.get("name"))
        name = name.split(" at ")[0]
        products = next(
            (n for end, n in PRODUCTS.items() if re.search(rf"_{end}(_|$)", name)), None
        )
        if name.startswith("render_patches"):
            return 0.0  # Data say how much it does; it is next to nothing.
        if products is None:
            return None
        if name.startswith("flash"):
            queries = next(var.aval for var in equation.invars if len(var.aval.shape) == 4)
            rows, sequence, heads, width = queries.shape
            if sequence not in scores:
                return None
            return 2.0 * products * width * scores[sequence] * rows * heads
        shapes = [var.aval.shape for var in equation.outvars if len(var.aval.shape) > 2]
        *lead, sequence, width = max(shapes, key=math.prod)
        if sequence not in scores:
            padded = {size: n for size, n in scores.items() if sequence - size >= 0}
            if not padded:
                return None
            sequence = max(padded)
        return 2.0 * products * width * scores[sequence] * math.prod(lead)

    return flops


def _too_large(message: str) -> Compiled:
    """From the compiler's own words: how much too much, and which arrays are the largest."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = r"([\d.]+)([KMGT]?)"
    over = 0
    if found := re.search(rf"Exceeded \w+ capacity by {size}", message):
        over = int(float(found[1]) * units[found[2]])
    elif found := re.search(
        rf"(?:Used|temporaries) \(?{size}\)? (?:of|exceeds available HBM) \(?{size}", message
    ):
        over = int(float(found[1]) * units[found[2]] - float(found[3]) * units[found[4]])
    largest = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:6]:
        amount = block.split("\n")[0].strip()
        shape = re.search(r"Shape: (\S+?)\{", block)
        source = re.search(r'op_name="([^"]*)"', block)
        place = "/".join(source[1].split("/")[-3:]) if source else "unknown"
        largest.append(f"{amount} {shape[1] if shape else ''} {place}")
    return Compiled(over=max(over, 1), largest=largest)
