"""Local paths and those in Google Cloud Storage, `gs://BUCKET/...`: both made by `as_path`.

A bucket has no folders, no renaming and no appending. What takes their place:

- A file that is written whole, in one request, is there whole or not at all (`write_whole`).
- A folder is whole when the file is there that is written last; who reads it looks for that one
  (`move_folder`). Orbax does so too: it ends a checkpoint with `commit_success.txt`.
- A file grows (`open("a")`) when the server joins it with a piece that was sent beside it. It only
  ever holds whole flushes, so a killed process leaves no half line, but loses what it had not
  flushed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

# One way to a bucket: with TensorFlow installed, etils would take that instead.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils.epath.gpath import PosixGPath

PREFIX = "gs://"
_PIECE = 2**25
"""Bytes of one request where several go side by side."""


def as_path(path: str | os.PathLike[str]) -> Path:
    """The one way to make a path of what a person gave: `gs://BUCKET/...` or a local one.

    The bucket is asked for once, so that what is wrong with it shows here. Raises ValueError if the
    extra is missing or there is no bucket in the name, FileNotFoundError if there is no such
    bucket, OSError if it cannot be reached.
    """
    text = os.fspath(path)
    if isinstance(path, BucketPath):
        return cast(Path, path)
    if not text.startswith(PREFIX):
        if re.match("[a-z][a-z0-9]+:/", text):  # pathlib makes one slash of two
            raise ValueError(f"{text}: only local paths and gs://BUCKET/... are known")
        return Path(path)
    bucket = text.removeprefix(PREFIX).split("/")[0]
    if not bucket:
        raise ValueError(f"{text} names no bucket: write gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text} is in Google Cloud Storage: pip install 'p2r_jax[gcs]'")
    try:
        _reach(bucket)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{text}: there is no bucket {bucket}") from error
    except Exception as error:
        raise OSError(
            f"{text} cannot be reached: run 'gcloud auth application-default login' with an "
            f"account that may list, read and write bucket {bucket} ({_first_line(error)})"
        ) from error
    return cast(Path, BucketPath(text))


def is_remote(path: os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return isinstance(path, BucketPath)


class BucketPath(PosixGPath):
    """etils' path, with what it lacks or does otherwise than `pathlib`."""

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def is_file(self) -> bool:
        return _store().isfile(str(self))

    def iterdir(self) -> Iterator[BucketPath]:
        # Consoles make folders visible by an empty object of the folder's own name.
        return (path for path in super().iterdir() if path != self)

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        inner, _, wanted = pattern.rpartition("/")
        if set(inner) & set("*?["):
            return super().glob(pattern)
        # etils takes characters of the folder's own name for wildcards.
        folder = self / inner
        found = folder.iterdir() if folder.is_dir() else ()
        return (path for path in found if fnmatch.fnmatchcase(path.name, wanted))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """Files only: there are no folders."""
        found = (self / name for name in files_in(cast(Path, self)))
        return (path for path in found if fnmatch.fnmatchcase(path.name, pattern))

    def stat(self) -> Any:
        """As etils and as `os.stat` name it; `st_ino` is the generation of the object."""
        found = _store().info(str(self))
        when = found["mtime"].timestamp() if "mtime" in found else 0.0
        generation = int(found.get("generation") or 0)
        return SimpleNamespace(
            **{"length": found["size"], "st_size": found["size"], "mtime": int(when)},
            **{"st_mtime": when, "st_mtime_ns": int(when * 1e9), "st_dev": 0, "st_ino": generation},
            **{"is_directory": found["type"] == "directory", "owner": None, "group": None},
            mode=None,
        )

    def open(self, mode: str = "r", **text: Any) -> Any:
        """text: encoding, errors and newline, as of `open`."""
        text = text if "b" in mode else {"encoding": "utf-8"} | text
        if "a" not in mode:
            return _store().open(str(self), mode, **text)
        return _Growing(self) if "b" in mode else io.TextIOWrapper(_Growing(self), **text)

    def read_bytes(self) -> bytes:
        return _store().cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors)

    def write_bytes(self, data: Any) -> int:
        _store().pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str = "strict") -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors))

    def append(self, data: bytes) -> None:
        """Add to the end. Only one process may write to the file."""
        try:
            generation = self.stat().st_ino
        except FileNotFoundError:
            self.write_bytes(data)
            return
        piece = self.with_name(f"{self.name}.piece")
        piece.write_bytes(data)
        bucket, key, _ = _store().split_path(str(self))
        sources = [{"name": key}, {"name": f"{key}.piece"}]
        # It exists in another generation: the answer to a first try was lost on its way.
        with contextlib.suppress(FileExistsError):
            _store().call(
                *("POST", "b/{}/o/{}/compose", bucket, key),
                ifGenerationMatch=generation,
                headers={"Content-Type": "application/json"},
                json={"sourceObjects": sources, "destination": {"name": key, "bucket": bucket}},
            )
        piece.unlink(missing_ok=True)


class _Growing(io.RawIOBase):
    """A file opened for appending, which sends what was written when it is flushed."""

    def __init__(self, path: BucketPath):
        self._path, self._waiting = path, bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._waiting += data
        return len(data)

    def flush(self) -> None:
        if self._waiting:
            self._path.append(bytes(self._waiting))
            self._waiting.clear()


# --- the same for local paths and buckets -----------------------------------------------------


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole or as it was before, whatever is killed when."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def read_range(path: Path, begin: int, end: int) -> bytes | bytearray:
    """Bytes `begin` to `end` of a file, of which no others are asked for."""
    if not is_remote(path):
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)
    if end - begin <= 2 * _PIECE:
        return _store().cat_file(str(path), begin, end) if end > begin else b""
    starts = list(range(begin, end, _PIECE))
    ends = [*starts[1:], end]
    read = bytearray()
    for i in range(0, len(starts), 8):
        some = starts[i : i + 8], ends[i : i + 8]
        for piece in _store().cat_ranges([str(path)] * len(some[0]), *some, on_error="raise"):
            read += piece
    return read


def files_in(folder: Path) -> dict[str, int]:
    """Bytes of all files below a folder by their path in it, sorted. {} if there is none."""
    if is_remote(folder):
        found = _store().find(str(folder), detail=True)
        start = len(str(folder).removeprefix(PREFIX).rstrip("/")) + 1
        sizes = {name[start:]: info["size"] for name, info in found.items()}
        return {name: sizes[name] for name in sorted(sizes) if name and name[-1] != "/"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def remove_folder(folder: Path, ignore_errors: bool = False) -> None:
    """Remove a folder and all that is in it."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(*((Exception,) if ignore_errors else (FileNotFoundError,))):
        cast(BucketPath, folder).rmtree()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; within Google's storage its bytes do not pass through this machine."""
    if is_remote(source) and is_remote(target):
        _store().cp_file(str(source), str(target))
    elif is_remote(source):
        _store().get_file(str(source), str(target))
    elif is_remote(target):
        _store().put_file(str(source), str(target))
    else:
        shutil.copyfile(source, target)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Give a folder another name, under which nothing is yet. In a bucket its files are copied, the
    one called `last` after the others: before that the folder is not whole."""
    if not is_remote(source):
        os.replace(source, target)
        return
    for name in sorted(files_in(source), key=lambda name: (name == last, name)):
        copy_file(source / name, target / name)
    remove_folder(source)


@contextlib.contextmanager
def local_files(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """The folder, for libraries that only read local ones: of one in a bucket those files by name
    that are there, in a folder that is gone afterwards."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in files_in(folder).keys() & set(names):
            copy_file(folder / name, Path(scratch) / name)
        yield Path(scratch)


@functools.cache
def _store() -> Any:
    """fsspec's file system, as etils and hence orbax make it too."""
    import fsspec

    # Other processes write as well: a listing that is kept would soon be out of date.
    for name in ("gcs", "gs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@functools.cache
def _reach(bucket: str) -> None:
    logger = logging.getLogger("gcsfs")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # What it would print is raised, and told in one sentence.
    try:
        _store().call("GET", "b/{}/o", bucket, maxResults=1)
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
