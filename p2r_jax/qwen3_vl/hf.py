"""Weights in and out: Hugging Face folders both ways, and the same weights as JAX arrays on disk.

A process keeps the parts of tensors that its devices hold and no others. Where a matrix is split by
columns, which is how its Hugging Face form sees `fsdp`, the pages of the file that it reads for
that are all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from p2r_jax.ops.kernels import Implementation, Kernels
from p2r_jax.parallel.mesh import parameter_shardings
from p2r_jax.parallel.multihost import on_main
from p2r_jax.paths import as_path
from p2r_jax.qwen3_vl.arrays import array_types_of, restore_array, save_array
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.export import MAX_SHARD_BYTES, export, write_config
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.qwen3_vl.names import Parameter, flat_state, parameters
from p2r_jax.qwen3_vl.new_folder import new_folder
from p2r_jax.qwen3_vl.progress import bytes_bar
from p2r_jax.qwen3_vl.tensor_files import TensorFolder

ARRAYS = "jax_weights"
"""Folder of JAX arrays (orbax) that a converted checkpoint has in place of safetensors files."""
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


def abstract_model(config: Qwen3VLConfig, kernels: Kernels | None = None) -> Qwen3VL:
    """The module tree with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Qwen3VL(config, nnx.Rngs(0), kernels))


# --- in -----------------------------------------------------------------------------------------


def load_pretrained(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = "bfloat16",
    kernels: Implementation | Literal["auto"] = "auto",
    progress: bool = False,
) -> Qwen3VL:
    """Load a Qwen3-VL folder: safetensors as Hugging Face has them, or what `p2r convert` wrote.

    mesh: where to place parameters (see `parallel.mesh`); None = the default device.
    dtype: of all parameters. kernels: attention, see `ops.kernels`. progress: show a bar.
    Raises FileNotFoundError for a missing folder or file and ValueError listing every missing,
    unexpected and mis-shaped tensor at once.
    """
    path = as_path(path)
    config = Qwen3VLConfig.from_pretrained(path)
    graph, state = nnx.split(abstract_model(config, Kernels.choose(kernels, mesh)))
    flat, dtype = flat_state(state), np.dtype(dtype)
    if mesh is None:
        where = dict.fromkeys(flat, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        placed = flat_state(parameter_shardings(state, mesh))
        where = {name: variable.get_value() for name, variable in placed.items()}
    like = {
        name: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where[name]) for name, x in flat.items()
    }
    read = _read_arrays if (path / ARRAYS).is_dir() else _read_safetensors
    for name, value in read(path, config, like, progress):
        flat[name].set_value(value)
    model = nnx.merge(graph, state)
    model.name_or_path = str(path)
    return model


Like = Mapping[str, jax.ShapeDtypeStruct]
"""Shape, type and sharding wanted of each parameter, by path."""


def _read_safetensors(
    path: Path, config: Qwen3VLConfig, like: Like, progress: bool
) -> Iterator[tuple[str, jax.Array]]:
    folder = TensorFolder(path)
    wanted = parameters(config, {name: x.shape for name, x in like.items()})
    shapes = {name: p.hf_shape for p in wanted for name in p.names}
    found = dict(folder.shapes)
    # Some tools write the tied head a second time; harmless only if it is the same matrix.
    if config.tie_word_embeddings and _same(folder, HEAD, EMBEDDING):
        del found[HEAD]
    check_contents(path, shapes, found)
    total = sum(_local_bytes(like[p.path]) for p in wanted)
    with bytes_bar(f"loading {path.name}", total, progress) as advance:
        for p in wanted:
            yield p.path, _assemble(p, folder, like[p.path])
            advance(_local_bytes(like[p.path]))
    folder.close()


def _read_arrays(
    path: Path, config: Qwen3VLConfig, like: Like, progress: bool
) -> Iterator[tuple[str, jax.Array]]:
    folder = path / ARRAYS
    found = {name: x.shape for name, x in array_types_of(folder).items()}
    check_contents(path, {name: x.shape for name, x in like.items()}, found)
    total = sum(map(_local_bytes, like.values()))
    with bytes_bar(f"loading {path.name}", total, progress) as advance:
        for name, x in like.items():
            yield name, restore_array(folder, name, x)
            advance(_local_bytes(x))


def _assemble(p: Parameter, folder: TensorFolder, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter on its devices, of which this process reads what its own ones hold."""
    assert like.sharding is not None
    # Devices that hold the same part share one reading of it.
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    distinct = {repr(index): index for index in indices}
    parts = {key: _aligned(_lengths(own, like.shape), like.dtype) for key, own in distinct.items()}
    # Layer by layer, each for all devices: the rows of a tensor come from a bucket once.
    for layer in range(like.shape[0] if p.stacked else 1):
        for key, own in distinct.items():
            if not p.stacked:
                p.read(own, parts[key], folder.read)
            elif layer in (held := range(*own[0].indices(like.shape[0]))):
                out = parts[key][held.index(layer) :][:1]
                p.read((slice(layer, layer + 1), *own[1:]), out, folder.read)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda i: parts[repr(i)])


def _lengths(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX on a CPU takes over as it is, where it would copy another."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _same(folder: TensorFolder, a: str, b: str, rows: int = 4096) -> bool:
    """Whether both tensors are there and equal."""
    if not {a, b} <= folder.shapes.keys() or folder.shapes[a] != folder.shapes[b]:
        return False
    count = folder.shapes[a][0]
    spans = [(slice(i, min(i + rows, count)),) for i in range(0, count, rows)]
    return all(np.array_equal(folder.read(a, s), folder.read(b, s)) for s in spans)


def check_contents(
    path: Path,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    config: str = "its",
) -> None:
    """Raise ValueError with everything that is missing, unexpected and of another shape.

    config: whose config.json says what is wanted.
    """
    problems = [f"missing: {n}" for n in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected: {n}" for n in sorted(found.keys() - wanted.keys())]
    problems += [
        f"shape of {n}: {tuple(found[n])} in the file, {tuple(s)} in config.json"
        for n, s in wanted.items()
        if n in found and tuple(found[n]) != tuple(s)
    ]
    if problems:
        more = [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        shown = "\n  ".join(problems[:40] + more)
        raise ValueError(
            f"{path} does not match {config} config.json ({len(problems)}):\n  {shown}"
        )


def _local_bytes(like: jax.ShapeDtypeStruct) -> int:
    """What the devices of this process hold, the same part once."""
    assert like.sharding is not None
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    shard = math.prod(like.sharding.shard_shape(like.shape))
    return len(set(map(repr, indices))) * shard * like.dtype.itemsize


# --- out ----------------------------------------------------------------------------------------


def save_pretrained(
    model: Qwen3VL,
    path: str | Path,
    *,
    files_from: str | Path | None = None,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
    readme: str | None = None,
) -> None:
    """Write a folder that transformers loads: safetensors shards, index, config (4.57 form).

    files_from: a checkpoint folder whose tokenizer, chat template, processor and generation files
    are carried along. overwrite: replace a folder that is there. progress: show a bar. readme: text
    of its README.md. Several processes write the files between them. Written beside the target and
    renamed, so a killed export never looks whole. Raises FileExistsError if `path` exists, OSError
    if a process cannot write, and ValueError for types that cannot be written.
    """
    flat = flat_state(nnx.state(model, nnx.Param))
    export(
        model.config,
        {name: x.shape for name, x in flat.items()},
        lambda name: flat[name].get_value(),
        path,
        files_from=files_from,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
        readme=readme,
    )


def convert_to_arrays(
    source: str | Path, out: str | Path, dtype: Any = "bfloat16", progress: bool = False
) -> None:
    """A Hugging Face folder as one that `load_pretrained` reads too, with the weights as JAX arrays
    on disk. One parameter is in memory at a time. Raises as `load_pretrained` and
    `save_pretrained` do."""
    source = as_path(source)
    config = Qwen3VLConfig.from_pretrained(source)
    shapes = flat_state(nnx.state(abstract_model(config), nnx.Param))
    device = SingleDeviceSharding(jax.local_devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(x.shape, np.dtype(dtype), sharding=device)
        for name, x in shapes.items()
    }
    with new_folder(out, source) as folder:
        for name, value in _read_safetensors(source, config, like, progress):
            save_array(folder / ARRAYS, name, value)
        on_main(lambda: write_config(config, folder, np.dtype(dtype)))
