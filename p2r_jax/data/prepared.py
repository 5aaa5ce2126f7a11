"""Prepared datasets: OUT/NAME as `p2r data prepare` leaves it, read at random.

prepared.json     what it was made from, and how many rows are good and bad
rows.jsonl        all rows without their images: a source opens without reading gigabytes
bad_rows.jsonl    the rows that could not be used, if any
1.0.0/            the TFDS dataset, which has the images too
"""

from __future__ import annotations

import functools
import json
import os
import threading
from pathlib import Path
from typing import Any

from p2r_jax.data.rows import Row
from p2r_jax.data.sources import SourceError

MARK = "prepared.json"
INDEX = "rows.jsonl"
BAD_ROWS = "bad_rows.jsonl"
BENCHMARKS = ("vstar", "hrbench_4k", "hrbench_8k", "mme_realworld", "mme_realworld_lite", "p2r_10k")
"""Names that `load_source` and `p2r data prepare` know."""

DEFAULT_FOLDER = "data"
"""Where prepared datasets are looked for by name."""


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a whole prepared dataset: it gets its name when it is."""
    return (folder / MARK).is_file()


def open_benchmark(
    name: str, folder: str | os.PathLike[str] = DEFAULT_FOLDER, **options: Any
) -> PreparedSource:
    """A benchmark by name, below `folder`. Raises SourceError with the command that prepares it."""
    path = Path(folder)
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
        """Raises SourceError if `folder` is no prepared dataset."""
        self.folder = Path(folder)
        if not is_prepared(self.folder):
            raise SourceError(f"{folder} is no prepared dataset; p2r data prepare makes one")
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
        )


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
