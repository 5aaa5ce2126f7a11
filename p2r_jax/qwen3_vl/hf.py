"""Weights in and out: Hugging Face folders both ways, and the same weights as JAX arrays on disk.

A process reads the parts of tensors that its devices hold and no others, and processes write the
files of an export between them. No tensor is whole on more hosts, or more often, than it must be.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from p2r_jax.ops.kernels import Implementation, Kernels
from p2r_jax.parallel.mesh import parameter_shardings
from p2r_jax.parallel.multihost import any_process, is_main, on_main, to_one
from p2r_jax.qwen3_vl.arrays import array_types, restore_arrays, save_arrays
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.qwen3_vl.names import Parameter, flat_state, parameters
from p2r_jax.qwen3_vl.progress import bytes_bar
from p2r_jax.qwen3_vl.tensor_files import (
    INDEX,
    TensorFolder,
    TensorShape,
    TensorWriter,
    split_in_files,
)

MAX_SHARD_BYTES = 5 * 10**9
ARRAYS = "weights"
"""Folder of JAX arrays (orbax) that a converted checkpoint has in place of safetensors files."""
CARRIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What a checkpoint folder holds besides weights and config.json."""
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
    path = Path(path)
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
    found = {name: x.shape for name, x in array_types(folder).items()}
    check_contents(path, {name: x.shape for name, x in like.items()}, found)
    total = sum(map(_local_bytes, like.values()))
    with bytes_bar(f"loading {path.name}", total, progress) as advance:
        for name, x in like.items():
            yield name, restore_arrays(folder, {name: x})[name]
            advance(_local_bytes(x))


def _assemble(p: Parameter, folder: TensorFolder, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter on its devices, of which this process reads what its own ones hold."""
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Devices that hold the same part share one reading of it.
        if (key := repr(index)) not in parts:
            shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, like.shape, strict=True))
            parts[key] = _aligned(shape, like.dtype)
            p.read(index, parts[key], folder.read)
        return parts[key]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


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
    path: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError with everything that is missing, unexpected and of another shape."""
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
        raise ValueError(f"{path} does not match its config.json ({len(problems)}):\n  {shown}")


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
) -> None:
    """Write a folder that transformers loads: safetensors shards, index, config (4.57 form).

    files_from: a checkpoint folder whose tokenizer, chat template, processor and generation files
    are carried along. overwrite: replace a folder that is there. progress: show a bar. Several
    processes write the files between them. Written beside the target and renamed, so a killed
    export never looks whole. Raises FileExistsError if `path` exists and OSError if a process
    cannot write.
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
    )


def export(
    config: Qwen3VLConfig,
    shapes: Mapping[str, tuple[int, ...]],
    value: Callable[[str], jax.Array],
    path: str | Path,
    *,
    files_from: str | Path | None = None,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """`save_pretrained` for parameters that are fetched one at a time: value("lm_head"), say."""
    path, dtype = Path(path), np.dtype(dtype)
    wanted = parameters(config, dict(shapes))
    tensors = [(name, p.hf_shape) for p in wanted for name in p.names]
    total = sum(math.prod(shape) for _, shape in tensors) * dtype.itemsize
    # Enough files for every process to have one.
    most = min(max_shard_bytes, -(-total // jax.process_count()))
    files = split_in_files(tensors, dtype.itemsize, most)
    with written_at_once(path, files_from, overwrite) as folder:
        out = _Files(folder, files, dtype)
        failure: OSError | None = None
        with bytes_bar(f"writing {path.name}", total, progress) as advance:
            for p in wanted:
                stored = value(p.path)
                for layer, name in enumerate(p.names):
                    mine = out.is_mine(name)
                    tensor = to_one(_one(stored, layer if p.stacked else None, dtype), here=mine)
                    if tensor is not None and failure is None:
                        try:
                            out.write(name, p.to_hf(tensor))
                        except OSError as error:
                            failure = error  # The others still need this process to fetch theirs.
                    advance(math.prod(p.hf_shape) * dtype.itemsize)
                if failure is not None and jax.process_count() == 1:
                    break
        out.close(whole=failure is None)
        if any_process(failure is not None):
            raise failure or OSError(f"another process could not write its part of {path}")
        if is_main():
            out.write_index(total)
            write_config(config, folder, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _one(stored: jax.Array, layer: int | None, dtype: Any) -> jax.Array:
    """One layer, rounded before it travels. The layer is traced: one program serves them all."""
    return (stored if layer is None else stored[layer]).astype(dtype)


class _Files:
    """The safetensors files of an export, of which each process writes every so many."""

    def __init__(self, folder: Path, files: list[list[TensorShape]], dtype: np.dtype):
        count = len(files)
        self.folder, self.files, self.dtype = folder, files, dtype
        self.names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            self.names = ["model.safetensors"]
        self.file_of = {name: i for i, held in enumerate(files) for name, _ in held}
        self.current = -1
        self.writer: TensorWriter | None = None

    def is_mine(self, name: str) -> bool:
        return self.file_of[name] % jax.process_count() == jax.process_index()

    def write(self, name: str, tensor: np.ndarray) -> None:
        """In the order of the files."""
        number = self.file_of[name]
        if number != self.current:
            self.close()
            self.current = number
            file = self.folder / self.names[number]
            self.writer = TensorWriter(file, self.files[number], self.dtype)
        assert self.writer is not None
        self.writer.write(tensor)

    def close(self, whole: bool = True) -> None:
        if self.writer is not None:
            self.writer.close(whole)
            self.writer = None

    def write_index(self, total: int) -> None:
        """What says where each tensor is, if there are several files."""
        if len(self.files) > 1:
            weight_map = {name: self.names[i] for name, i in self.file_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2))


def save_converted(
    model: Qwen3VL, path: str | Path, *, files_from: str | Path | None = None
) -> None:
    """Write a folder that `load_pretrained` reads, with the weights as JAX arrays on disk, of the
    dtype they have. Raises as `save_pretrained` does."""
    path = Path(path)
    values = {n: x.get_value() for n, x in flat_state(nnx.state(model, nnx.Param)).items()}
    with written_at_once(path, files_from, overwrite=False) as folder:
        save_arrays(folder / ARRAYS, values)
        if is_main():
            write_config(model.config, folder, next(iter(values.values())).dtype)


def write_config(config: Qwen3VLConfig, folder: Path, dtype: np.dtype) -> None:
    """config.json in the form of transformers 4.57."""
    (folder / "config.json").write_text(json.dumps(config.to_hf(str(dtype)), indent=2) + "\n")


@contextlib.contextmanager
def written_at_once(path: Path, files_from: str | Path | None, overwrite: bool) -> Iterator[Path]:
    """A folder beside `path` to write to, for all processes, that becomes `path` at the end."""
    temporary, old = (path.parent / f".{path.name}.{end}" for end in ("partial", "old"))

    def begin() -> None:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another folder or delete it first")
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        for file in sorted(Path(files_from).iterdir()) if files_from is not None else ():
            if file.name in CARRIED_FILES:
                shutil.copyfile(file, temporary / file.name)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)

    on_main(begin)
    try:
        yield temporary
        any_process(False)  # All have written.
        on_main(finish)
    except BaseException:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
