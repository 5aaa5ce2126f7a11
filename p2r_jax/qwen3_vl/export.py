"""Weights to a folder that transformers loads, by all processes together.

A tensor is gathered where it is written and nowhere else on the host; processes take turns in
gathering, and write what is theirs meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from p2r_jax.parallel.multihost import any_process, on_main, to_one
from p2r_jax.paths import as_path
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.names import Parameter, parameters
from p2r_jax.qwen3_vl.new_folder import new_folder
from p2r_jax.qwen3_vl.progress import bytes_bar
from p2r_jax.qwen3_vl.tensor_files import (
    DTYPES,
    INDEX,
    TensorShape,
    TensorWriter,
    split_in_files,
)

MAX_SHARD_BYTES = 5 * 10**9
WORTH_SHARING_BYTES = 10**9
"""Smaller files are not made only for several processes to have one each."""


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
    readme: str | None = None,
) -> None:
    """`save_pretrained` for parameters that are fetched by name: value("lm_head"), say.

    shapes: of all parameters, by path. One process asks for the layers of a parameter one after the
    other, several in turns. Raises as `save_pretrained` does.
    """
    path, dtype = as_path(path), np.dtype(dtype)
    if dtype not in DTYPES.values():
        known = ", ".join(str(d) for d in DTYPES.values())
        raise ValueError(f"weights cannot be written as {dtype}: choose one of {known}")
    wanted = parameters(config, dict(shapes))
    source = {
        name: (p, layer if p.stacked else None)
        for p in wanted
        for layer, name in enumerate(p.names)
    }
    tensors = [(name, p.hf_shape) for name, (p, _) in source.items()]
    total = sum(math.prod(shape) for _, shape in tensors) * dtype.itemsize
    # A file or more for every process, if there is enough to share.
    most = min(max_shard_bytes, max(WORTH_SHARING_BYTES, -(-total // jax.process_count())))
    files = split_in_files(tensors, dtype.itemsize, most)
    with new_folder(path, files_from, overwrite) as folder, _Files(folder, files, dtype) as out:
        with bytes_bar(f"writing {path.name}", total, progress) as advance:
            for name in out.in_turns():
                p, layer = source[name]
                tensor = to_one(_one(value(p.path), layer, dtype), here=out.is_mine(name))
                if tensor is not None:
                    out.write(name, p, tensor)
                advance(math.prod(p.hf_shape) * dtype.itemsize)
                if out.failure and jax.process_count() == 1:
                    break
        out.close()
        if any_process(out.failure is not None):
            raise out.failure or OSError(f"another process could not write its part of {path}")
        on_main(lambda: out.write_index(total))
        if readme is not None:
            on_main(lambda: (folder / "README.md").write_text(readme))
        on_main(lambda: write_config(config, folder, dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _one(stored: jax.Array, layer: int | None, dtype: Any) -> jax.Array:
    """One layer, rounded before it travels. The layer is traced: one program serves them all."""
    return (stored if layer is None else stored[layer]).astype(dtype)


class _Files:
    """The safetensors files of an export, of which each process writes every so many, in the
    background, a tensor behind."""

    def __init__(self, folder: Path, files: list[list[TensorShape]], dtype: np.dtype):
        count = len(files)
        self.folder, self.files, self.dtype = folder, files, dtype
        self.names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            self.names = ["model.safetensors"]
        self.file_of = {name: i for i, held in enumerate(files) for name, _ in held}
        self.failure: Exception | None = None
        """The first; the other processes still need this one to fetch what is theirs."""
        self._current = -1
        self._writer: TensorWriter | None = None
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def is_mine(self, name: str) -> bool:
        return self._owner(self.file_of[name]) == jax.process_index()

    def _owner(self, number: int) -> int:
        return number % jax.process_count()

    def in_turns(self) -> Iterator[str]:
        """All tensors; every process gets one of its own, then every process another."""
        own: list[list[str]] = [[] for _ in range(jax.process_count())]
        for number, held in enumerate(self.files):
            own[self._owner(number)] += [name for name, _ in held]
        for turn in itertools.zip_longest(*own):
            yield from (name for name in turn if name is not None)

    def write(self, name: str, p: Parameter, tensor: np.ndarray) -> None:
        """In the order of the files. Returns when the tensor before is written."""
        self._wait()
        if self.failure is None:
            self._pending = self._pool.submit(self._write, name, p, tensor)

    def _write(self, name: str, p: Parameter, tensor: np.ndarray) -> None:
        number = self.file_of[name]
        if number != self._current:
            if self._writer is not None:
                self._writer.close()
            self._current = number
            file = self.folder / self.names[number]
            self._writer = TensorWriter(file, self.files[number], self.dtype)
        assert self._writer is not None
        self._writer.write(p.to_hf(tensor))

    def _wait(self) -> None:
        try:
            if self._pending is not None:
                self._pending.result()
        except Exception as error:
            self.failure = self.failure or error
        self._pending = None

    def close(self) -> None:
        """Wait for what is being written."""
        self._wait()
        try:
            if self._writer is not None:
                self._writer.close(whole=self.failure is None)
        except Exception as error:
            self.failure = self.failure or error
        self._writer = None

    def write_index(self, total: int) -> None:
        """What says where each tensor is, if there are several files."""
        if len(self.files) > 1:
            weight_map = {name: self.names[i] for name, i in self.file_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2))


def write_config(config: Qwen3VLConfig, folder: Path, dtype: np.dtype) -> None:
    """config.json in the form of transformers 4.57."""
    (folder / "config.json").write_text(json.dumps(config.to_hf(str(dtype)), indent=2) + "\n")
