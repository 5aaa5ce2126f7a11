"""Accelerators by name: what a chip can do, and meshes of chips to compile for.

Peaks are the manufacturers' (dense bfloat16): cloud.google.com/tpu/docs for v5e, v5p and v6e, the
H100 SXM data sheet; between nodes of eight H100, eight network adapters of 400 Gb/s. `usable` is
what the compiler leaves to a program.
"""

from __future__ import annotations

import dataclasses
import re

from jax.sharding import Mesh

from p2r_jax.config import MeshConfig
from p2r_jax.ops.kernels import Implementation
from p2r_jax.parallel.topology import H100, gpu_mesh, tpu_mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    flops: float
    """bfloat16 matrix products, FLOP a second."""
    hbm_bytes: float
    """Memory bandwidth, bytes a second."""
    link_bytes: float
    """To other chips of the slice or node, all links together, bytes a second."""
    network_bytes: float
    """To other slices or nodes, a chip's share of its host's network, bytes a second."""
    usable: int
    """Bytes of memory that a program may take."""
    kernels: Implementation


CHIPS = {
    "v5e": Chip("v5e", 197e12, 819e9, 200e9, 3.125e9, int(15.75 * GIB), "pallas_tpu"),
    "v5p": Chip("v5p", 459e12, 2765e9, 600e9, 6.25e9, int(95.74 * GIB), "pallas_tpu"),
    "v6e": Chip("v6e", 918e12, 1640e9, 448e9, 12.5e9, int(31.25 * GIB), "pallas_tpu"),
    # JAX takes three quarters of a GPU's 80 GB by default; launch scripts set 0.92.
    "h100": Chip("h100", 989e12, 3350e9, 450e9, 50e9, int(0.92 * 80e9), "pallas_gpu"),
}

FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""Slices of v5e and v6e by number of chips."""
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
"""Of v5p, whose names count two cores a chip: v5p-8 has four chips."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that a run would rent."""

    chip: Chip
    topology: str
    """4x4, for instance, of TPUs; of GPUs how many, in nodes of eight."""
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> Slice:
        """Of a name: v5e:4x4, v5e-16, v5p-8 (four chips), h100:8. Raises ValueError."""
        found = re.fullmatch(r"([a-z0-9]+)([:-])([\dx]+)", name.lower())
        chip = CHIPS.get(found[1]) if found else None
        if found is None or chip is None:
            raise ValueError(
                f"--topology {name!r}: name chips and shape, such as v5e:4x4, v5e-16, v5p:2x2x1 or "
                f"h100:8 (chips: {', '.join(CHIPS)})"
            )
        shape = found[3]
        if chip.name == "h100":
            if not shape.isdigit() or (int(shape) > 8 and int(shape) % 8):
                raise ValueError(f"--topology {name!r}: GPUs come as up to 8, or as eights")
            if slices != 1:
                raise ValueError(
                    "--num-slices is for TPUs; give the number of all GPUs, as h100:16"
                )
        elif shape.isdigit():
            known = {2 * n: s for n, s in CUBES.items()} if chip.name == "v5p" else FLAT
            if int(shape) not in known:
                raise ValueError(
                    f"--topology {name!r}: known are {', '.join(f'{chip.name}-{n}' for n in known)}"
                    f"; others by shape, as {chip.name}:{known[8]}"
                )
            shape = known[int(shape)]
        return cls(chip, shape, slices)

    def __str__(self) -> str:
        times = f" × {self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name}:{self.topology}{times}"

    def mesh(self, config: MeshConfig) -> Mesh:
        """To compile for. Raises ValueError if the settings do not fit the number of chips."""
        sizes = (config.data, config.fsdp, config.tensor)
        if self.chip.name != "h100":
            return tpu_mesh(f"{self.chip.name}:{self.topology}", *sizes, slices=self.slices)
        count = int(self.topology)
        nodes, each = max(1, count // 8), min(count, 8)
        return gpu_mesh(H100.read_text(), *sizes, topology=f"1x{nodes}x{each}")


def islands(mesh: Mesh) -> list[int]:
    """Of each device, in the order of the mesh, the number of its slice of TPUs or node of GPUs."""
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return [d.process_index if gpu else getattr(d, "slice_index", 0) for d in mesh.devices.flat]
