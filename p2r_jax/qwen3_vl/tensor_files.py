"""Safetensors files, read by parts and written as a stream.

The library maps a file into memory, and pages that were read count as memory of the process until
the file is closed; it writes a file only from all of its tensors at once. Both are gigabytes at the
size of real checkpoints, so files are reopened now and then, and written tensor by tensor. From a
bucket only the bytes are asked for that hold the wanted rows of a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from p2r_jax.paths import is_remote, read_range
from p2r_jax.qwen3_vl.names import canonical_name

INDEX = "model.safetensors.index.json"
TensorShape = tuple[str, tuple[int, ...]]
"""Name and shape of a tensor."""
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What weights may be stored in."""

_MAPPED_BYTES = 256 * 2**20
"""After reading so much a file is reopened."""
_WRITTEN_BYTES = 32 * 2**20
"""At once."""


class TensorFolder:
    """Tensors of one or several safetensors files by canonical name.

    Raises FileNotFoundError for missing files and ValueError naming a damaged one, tensors that are
    there twice, and tensors that are not floating-point numbers.
    """

    def __init__(self, path: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._file: Path | None = None
        self._handle: Any = None
        self._mapped = 0
        strange = []
        files = _files(path)
        self._seen = {file: _identity(file) for file in files}
        for file in files:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                canonical = canonical_name(name)
                if canonical in self._where:
                    raise ValueError(
                        f"{file} holds {name}, but {canonical} was read before: the same tensor "
                        "is there twice (files of two exports in one folder?)"
                    )
                part = handle.get_slice(name)
                self.shapes[canonical] = tuple(part.get_shape())
                self._where[canonical] = (file, name)
                if part.get_dtype() not in DTYPES:
                    strange.append(f"{name} ({part.get_dtype()})")
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise ValueError(
                f"{path} holds tensors that are not float32, float16 or bfloat16: "
                f"{', '.join(strange[:3])}{more}. Quantized weights are not supported: take the "
                "bfloat16 ones"
            )

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that slices of its first axes name."""
        file, own = self._where[name]
        if self._mapped > _MAPPED_BYTES:
            self.close()
        handle = self._open(file)
        tensor = handle.get_slice(own)
        self._mapped += math.prod(self.shapes[name]) * DTYPES[tensor.get_dtype()].itemsize
        return tensor[part or slice(None)]

    def close(self) -> None:
        """Give the mapped memory back; reading opens the file again."""
        self._file = self._handle = None
        self._mapped = 0

    def _open(self, file: Path) -> Any:
        if file != self._file:
            self.close()
            try:
                if _identity(file) != self._seen[file]:
                    raise ValueError(
                        f"{file} changed while it was read: something writes to this folder. Read "
                        "it again"
                    )
                remote = is_remote(file)
                self._handle = _RemoteFile(file) if remote else safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(
                    f"{file} is damaged, or its download did not finish ({error}): get it again"
                ) from error
            self._file = file
        return self._handle


class _RemoteFile:
    """A file in a bucket, with the part of `safe_open`'s interface that is used above."""

    def __init__(self, file: Path):
        """Raises SafetensorError if it is damaged."""
        self.file = file
        size = file.stat().st_size
        length = int.from_bytes(read_range(file, 0, min(8, size)), "little")
        if not 0 < length <= size - 8:
            raise SafetensorError("its header does not fit in it")
        self.start, end = 8 + length, 0
        try:
            self._header = json.loads(read_range(file, 8, self.start))
            self._header.pop("__metadata__", None)
            for entry in self._header.values():
                begin, end = entry["data_offsets"]
                known = DTYPES.get(entry["dtype"])
                if known and end - begin != math.prod(entry["shape"]) * known.itemsize:
                    raise ValueError(f"{end - begin} bytes for {entry}")
            end = max(entry["data_offsets"][1] for entry in self._header.values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SafetensorError(f"its header cannot be read: {error!r}") from error
        if end != size - self.start:
            raise SafetensorError("it is not as long as its header says")
        self._last: tuple[tuple[int, int], bytes | bytearray] | None = None

    def keys(self) -> Iterable[str]:
        return self._header.keys()

    def get_slice(self, name: str) -> _RemoteTensor:
        return _RemoteTensor(self, self._header[name])

    def rows(self, begin: int, end: int) -> bytes | bytearray:
        """Kept until others are read: the columns that other devices hold are in them."""
        if self._last is None or self._last[0] != (begin, end):
            self._last = None
            self._last = (begin, end), read_range(self.file, begin, end)
        return self._last[1]


class _RemoteTensor:
    def __init__(self, file: _RemoteFile, entry: Mapping[str, Any]):
        self._file, self._entry = file, entry

    def get_shape(self) -> list[int]:
        return self._entry["shape"]

    def get_dtype(self) -> str:
        return self._entry["dtype"]

    def __getitem__(self, part: slice | tuple[slice, ...]) -> np.ndarray:
        """Reads the rows of the first axis that are asked for, whatever is asked of the others."""
        first, *others = part if isinstance(part, tuple) else (part,)
        count, *inner = self.get_shape() or [1]
        rows, dtype = range(*first.indices(count)), DTYPES[self.get_dtype()]
        width = math.prod(inner) * dtype.itemsize
        begin = self._file.start + self._entry["data_offsets"][0] + rows.start * width
        raw = self._file.rows(begin, begin + len(rows) * width)
        read = np.frombuffer(raw, dtype).reshape(len(rows), *inner)
        return read[(slice(None), *others)]


def _identity(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
        if outside:
            raise ValueError(f"{index} names files outside of its folder: {outside}")
        gone = [str(path / name) for name in names if not (path / name).is_file()]
        if gone:
            raise FileNotFoundError(f"{index} names files that do not exist: {gone}")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        other = [f.name for f in path.glob("*.bin")]
        hint = f" (pickle files such as {other[0]} are refused)" if other else ""
        raise FileNotFoundError(f"{path} holds no .safetensors files{hint}")
    return files


class TensorWriter:
    """One safetensors file, written in the order of its header."""

    def __init__(self, file: Path, tensors: Sequence[TensorShape], dtype: np.dtype):
        """dtype: of all tensors."""
        self.tensors, self.dtype = tensors, dtype
        self.written = 0
        code = next(name for name, known in DTYPES.items() if known == dtype)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._out = file.open("wb")
        self._out.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: np.ndarray) -> None:
        """The next tensor."""
        name, shape = self.tensors[self.written]
        assert tensor.shape == shape, f"{name}: {tensor.shape} is not {shape}"
        assert tensor.dtype == self.dtype
        # A transposed array is a strided view, whose bytes lie in the wrong order.
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        for begin in range(0, len(data), _WRITTEN_BYTES):  # What goes to a bucket is copied first.
            self._out.write(data[begin : begin + _WRITTEN_BYTES])
        self.written += 1

    def close(self, whole: bool = True) -> None:
        """whole: whether every tensor must have been written."""
        self._out.close()
        assert not whole or self.written == len(self.tensors), "tensors are missing"


def split_in_files(
    tensors: Iterable[TensorShape], itemsize: int, most_bytes: int
) -> list[list[TensorShape]]:
    """Tensors by file, in order; no file above `most_bytes` unless by a single tensor."""
    files: list[list[TensorShape]] = [[]]
    size = 0
    for name, shape in tensors:
        own = math.prod(shape) * itemsize
        if files[-1] and size + own > most_bytes:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += own
    return files
