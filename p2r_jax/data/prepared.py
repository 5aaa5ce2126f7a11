"""Prepared datasets: OUT/NAME as `p2r data prepare` leaves it, read at random.

prepared.json     what it was made from, and how many rows are good and bad
rows.jsonl        all rows without their images: a source opens without reading gigabytes
bad_rows.jsonl    the rows that could not be used, if any
1.0.0/            the TFDS dataset, which has the images too

The library that reads the images at random reads local files only. So what was prepared to a bucket
is copied to this machine's disk when it is opened, once.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import threading
import zlib
from pathlib import Path
from typing import Any

from p2r_jax.data.rows import Row
from p2r_jax.data.sources import SourceError
from p2r_jax.paths import as_path, copy_file, files_in, is_remote
from p2r_jax.qwen3_vl.progress import bytes_bar

MARK = "prepared.json"
INDEX = "rows.jsonl"
BAD_ROWS = "bad_rows.jsonl"
BENCHMARKS = ("vstar", "hrbench_4k", "hrbench_8k", "mme_realworld", "mme_realworld_lite", "p2r_10k")
"""Names that `load_source` and `p2r data prepare` know."""

DEFAULT_FOLDER = "data"
"""Where prepared datasets are looked for by name."""

CACHE_VARIABLE = "P2R_CACHE"
"""Folder of what is copied from buckets; default, ~/.cache/p2r_jax."""


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a whole prepared dataset: it gets its name when it is."""
    return (folder / MARK).is_file()


def open_benchmark(
    name: str, folder: str | os.PathLike[str] = DEFAULT_FOLDER, **options: Any
) -> PreparedSource:
    """A benchmark by name, below `folder`. Raises SourceError with the command that prepares it."""
    path = as_path(folder)
    if path.name != name or not is_prepared(path):
        path = path / name
    if not is_prepared(path):
        raise SourceError(
            f"{name} is not prepared in {folder}. Download its files, then run: p2r data prepare "
            f"{name} --source DOWNLOADED --out {folder}"
        )
    return PreparedSource(path, **options)


class PreparedSource:
    """The rows of a prepared dataset.

    A row's `meta` has what its benchmark calls it, "asked" (question and options as the authors of
    P2R put them), and "height", "width" (pixels) and "image_hash", which need no reading of the
    image; "cluster" where several rows ask the same, as HR-Bench's rotations do. The image is read
    when `Row.load_image` wants it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Raises SourceError if `folder` is no prepared dataset, or cannot be copied."""
        self.folder = as_path(folder)
        if not is_prepared(self.folder):
            raise SourceError(f"{folder} is no prepared dataset; p2r data prepare makes one")
        if is_remote(self.folder):
            self.folder = local_copy(self.folder)
        self.about: dict[str, Any] = json.loads((self.folder / MARK).read_text("utf-8"))
        with open(self.folder / INDEX, encoding="utf-8") as file:
            self._rows = [json.loads(line) for line in file]
        if len(self._rows) != self.about["rows"]:
            raise SourceError(
                f"{folder} is damaged: {INDEX} has {len(self._rows)} rows, {MARK} says "
                f"{self.about['rows']}. Remove it and prepare it again"
            )
        self.answer_forms = frozenset(row["answer_form"] for row in self._rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)

    def __repr__(self) -> str:
        return f"PreparedSource({str(self.folder)!r}, {len(self)} rows)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        found = self._rows[index]
        meta = dict(found["meta"])
        meta |= {key: found[key] for key in ("height", "width", "image_hash")}
        if found["cluster"]:
            meta["cluster"] = found["cluster"]
        return Row(
            id=found["id"],
            question=found["question"],
            answer=found["answer"],
            answer_form=found["answer_form"],
            options=tuple(found["options"]),
            boxes=tuple(found["boxes"]),
            category=found["category"],
            image_source=functools.partial(read_image, self.folder, index),
            meta=meta,
            image_hash=found["image_hash"],
        )


def publish(folder: Path, target: Path) -> None:
    """Give a prepared dataset the name under which it is found: by renaming it, or, in a bucket, by
    copying it there, its MARK last."""
    if is_remote(target):
        _copy(folder, target, f"copying to {target}")
    else:
        os.rename(folder, target)


def local_copy(folder: Path) -> Path:
    """A prepared dataset in a bucket as a local folder, which stays for the next time.

    Its name follows from what is in the bucket, so that another dataset there is another folder
    here. Processes of a machine wait for one of them. Raises SourceError saying what to do.
    """
    sizes = files_in(folder)
    version = zlib.crc32(f"{folder} {sizes} {(folder / MARK).read_text()}".encode())
    cache = Path(os.environ.get(CACHE_VARIABLE, "~/.cache/p2r_jax")).expanduser()
    target, work = (cache / f"{dot}{folder.name}-{version:08x}" for dot in ("", "."))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{work.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_prepared(target):
                shutil.rmtree(work, ignore_errors=True)  # what a killed process left
                try:
                    _copy(folder, work, f"copying {folder} to {cache}")
                    if files_in(work) != sizes:
                        raise OSError("its files changed meanwhile, or did not come whole")
                    os.rename(work, target)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise SourceError(
            f"{folder} cannot be copied to {cache} ({error}): make room there, or set "
            f"{CACHE_VARIABLE} to a folder on another disk"
        ) from error
    return target


def _copy(source: Path, target: Path, description: str) -> None:
    sizes = files_in(source)
    with bytes_bar(description, sum(sizes.values()), True) as advance:
        for name in sorted(sizes, key=lambda name: (name == MARK, name)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / name, target / name)
            advance(sizes[name])


def read_image(folder: Path, index: int) -> bytes:
    """The encoded image of a row. Raises OSError if it cannot be read."""
    return _images(folder)[index]["image"]


_opening = threading.Lock()


def _images(folder: Path) -> Any:
    with _opening:  # TFDS imports itself lazily, which threads disturb.
        return _data_source(folder)


@functools.lru_cache(maxsize=8)
def _data_source(folder: Path) -> Any:
    """TFDS's random access to the examples, once a process."""
    import tensorflow_datasets as tfds

    about = json.loads((folder / MARK).read_text("utf-8"))
    (version,) = (path.parent for path in folder.glob("*/dataset_info.json"))
    return tfds.builder_from_directory(version).as_data_source(about["split"])
