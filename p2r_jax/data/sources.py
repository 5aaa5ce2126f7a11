"""Sources of rows by name: the procedural task, prepared benchmarks, JSON lines and parquet.

A source is anything with `__len__` and `__getitem__(int) -> Row` that can be pickled, so it goes
into `grain.MapDataset.source` as it is.  Files are checked once, in full, when opened: a bad row
is listed and skipped, too many bad rows are an error before any work begins.  Images stay where
they are until `Row.load_image`.

A file row has the fields

    image        path (relative to the file), base64, or {"bytes": ..., "path": ...} in parquet
    images       instead of `image`: a list with one of these
    question, answer, answer_form                       as in `Row`
    options, boxes, category, id                        optional, as in `Row`

and any others, which end up in `Row.meta`.  Without `id` a row is named "<file name>:<number>".
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import json
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from p2r_jax.data.rows import ImageSource, Row, RowError
from p2r_jax.data.visual_search import VisualSearch, VisualSearchConfig
from p2r_jax.paths import PREFIX, as_path, is_remote, read_range

CheckImages = Literal["no", "exists", "decode"]

_KNOWN = ("id", "question", "answer", "answer_form", "options", "boxes", "category")


class Source(Protocol):
    """Random access to rows."""

    @property
    def answer_forms(self) -> frozenset[str]:
        """All answer forms that occur: what a run must be able to grade."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class SourceError(ValueError):
    """A source that cannot be used.  The message names the file and what to do."""


def load_source(name: str | os.PathLike[str], **options: Any) -> Source:
    """Opens a source of rows.

    Args:
      name: "visual_search", a benchmark that was prepared ("vstar", "hrbench_4k", ...: see
        `prepared.BENCHMARKS`), or the path (perhaps gs://) of a prepared dataset or of a `.jsonl`
        or `.parquet` file.
      **options: for "visual_search" the arguments of `VisualSearch` (`config` may be a dict), for
        benchmarks `folder`, where they were prepared, for files those of `open_file`.

    Raises:
      SourceError: unknown name, missing file, unknown option, or too many bad rows.
    """
    from p2r_jax.data.prepared import BENCHMARKS, PreparedSource, is_prepared, open_benchmark

    kind = "visual_search" if name == "visual_search" else Path(name).suffix
    try:
        if kind == "visual_search":
            if isinstance(options.get("config"), Mapping):
                options["config"] = VisualSearchConfig(**options["config"])
            return VisualSearch(**options)
        if kind in (".jsonl", ".parquet"):
            return open_file(name, **options)
        for checked in ("max_bad_fraction", "bad_rows"):
            options.pop(checked, None)  # That was settled when the dataset was prepared.
        if name in BENCHMARKS:
            return open_benchmark(str(name), **options)
        if is_prepared(as_path(name)):
            return PreparedSource(name, **options)
    except TypeError as error:
        raise SourceError(f"source {os.fspath(name)!r}: {error}") from error
    raise SourceError(
        f"unknown source {os.fspath(name)!r}: use 'visual_search', one of {', '.join(BENCHMARKS)}"
        " once prepared (p2r data prepare), or the path of a prepared dataset or of a file that"
        " ends in .jsonl or .parquet"
    )


def open_file(
    path: str | os.PathLike[str],
    *,
    max_bad_fraction: float = 0.01,
    bad_rows: str | os.PathLike[str] | None = None,
    check_images: CheckImages = "exists",
) -> FileSource:
    """Opens a JSON-lines or parquet file and checks all its rows.

    Args:
      path: the file.
      max_bad_fraction: largest share of bad rows that are skipped; more are an error.
      bad_rows: directory that gets `bad_rows.jsonl`, one line per bad row (file, row, id, field,
        problem).  Nothing is written if there are none.
      check_images: "exists" looks for image files, "decode" also decodes each image, which takes
        as long as reading them all; "no" leaves errors to `Row.load_image`.

    Raises:
      SourceError: no such file, no good row, or more bad rows than allowed.
    """
    path = as_path(path)
    if not path.is_file():
        raise SourceError(f"source file not found: {path}")
    records: _Records = _Parquet(path) if path.suffix == ".parquet" else _JsonLines(path)
    good, problems, total = [], [], 0
    there = functools.cache(_names_in)
    ids: set[str] = set()
    forms: set[str] = set()
    for number, record in records.scan():
        total += 1
        name = f"{path.name}:{number + 1}"
        try:
            row = file_row(record, name, path.parent)
            if row.id in ids:
                raise RowError(row.id, "id", "another row has the same id")
            _check_image(row, check_images, there)
        except RowError as error:
            problems.append(
                {
                    "file": str(path),
                    "row": number + 1,
                    "id": error.row_id,
                    "field": error.field,
                    "problem": error.problem,
                }
            )
        else:
            ids.add(row.id)
            forms.add(row.answer_form)
            good.append(number)
    listed = _list_bad_rows(problems, bad_rows)
    if problems and len(problems) > max_bad_fraction * total:
        first = problems[0]
        raise SourceError(
            f"{path}: {len(problems)} of {total} rows are bad (at most {max_bad_fraction:.1%} may"
            f" be).  The first: row {first['id']!r}, field {first['field']!r}: {first['problem']}."
            f"  {f'All are listed in {listed}.' if listed else 'Set bad_rows to list them all.'}"
        )
    if not good:
        raise SourceError(f"{path}: has no rows")
    return FileSource(path, records, np.array(good), len(problems), frozenset(forms))


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
    """The good rows of a file, in file order.

    Attributes:
      path: the file.
      records: access to its raw records.
      numbers: record number of each row, [rows].
      bad: number of rows that were skipped.
      answer_forms: of all rows.
    """

    path: Path
    records: _Records
    numbers: np.ndarray
    bad: int
    answer_forms: frozenset[str]

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"FileSource({str(self.path)!r}, {len(self)} rows, {self.bad} bad)"

    def __getitem__(self, index: int) -> Row:
        number = int(self.numbers[index])
        name = f"{self.path.name}:{number + 1}"
        return file_row(self.records.read(number), name, self.path.parent)


class _Records(Protocol):
    """Raw records of a file by number."""

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """All records once, in order; a `RowError` stands for one that cannot be parsed."""

    def read(self, number: int) -> dict[str, Any] | RowError:
        """One record.  In place of an embedded image there may be a function that reads it."""


class _JsonLines:
    """A JSON-lines file.  Only the position of each line is kept in memory."""

    def __init__(self, path: Path):
        self.path = path
        spans, position = [], 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    spans.append((position, position + len(line)))
                position += len(line)
        self.spans = np.array(spans, np.int64).reshape(-1, 2)

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        with self.path.open("rb") as file:
            lines = (line for line in file if line.strip())
            for number, line in enumerate(lines):
                yield number, self._parse(number, line)

    def read(self, number: int) -> dict[str, Any] | RowError:
        # Opened anew each time: loader threads would race for the position of a shared file.
        begin, end = map(int, self.spans[number])
        return self._parse(number, bytes(read_range(self.path, begin, end)))

    def _parse(self, number: int, line: bytes) -> dict[str, Any] | RowError:
        name = f"{self.path.name}:{number + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            return RowError(name, "(line)", f"is not JSON: {error}")
        if not isinstance(record, dict):
            return RowError(name, "(line)", f"must be a JSON object, is {type(record).__name__}")
        return {field: value for field, value in record.items() if value is not None}


class _Parquet:
    """A parquet file.  All columns but embedded images are kept in memory.

    Parquet has no cheap random access: reading one embedded image reads its whole row group (the
    last few are kept).  That is fine for evaluation in order; for shuffled training store images
    as files, or in small row groups.
    """

    def __init__(self, path: Path):
        self.path = path
        file = _open_parquet(path)
        names = file.schema_arrow.names
        self.image_column = "images" if "images" in names and "image" not in names else "image"
        self.embedded = False
        if self.image_column in names:
            kind = str(file.schema_arrow.field(self.image_column).type)
            self.embedded = "binary" in kind
        columns = [n for n in names if not (self.embedded and n == self.image_column)]
        self.records: list[dict[str, Any]] = file.read(columns=columns).to_pylist()
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.group_starts = np.cumsum([0, *sizes])

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        for number in range(len(self.records)):
            yield number, self.read(number)

    def read(self, number: int) -> dict[str, Any] | RowError:
        record = {k: v for k, v in self.records[number].items() if v is not None}
        if self.embedded:
            record[self.image_column] = functools.partial(self._image, number)
        return record

    def _image(self, number: int) -> Any:
        group = int(np.searchsorted(self.group_starts, number, side="right")) - 1
        values = _row_group(self.path, group, self.image_column)
        return values[number - int(self.group_starts[group])]


@functools.lru_cache(maxsize=4)
def _row_group(path: Path, group: int, column: str) -> list[Any]:
    """One column of one row group."""
    table = _open_parquet(path).read_row_group(group, columns=[column])
    return table.column(0).to_pylist()


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SourceError(f"{path}: parquet files need pyarrow; pip install pyarrow") from error
    return pyarrow.parquet.ParquetFile(path.open("rb") if is_remote(path) else path)


def file_row(record: dict[str, Any] | RowError, name: str, folder: Path) -> Row:
    """The `Row` of a raw record; raises `RowError`."""
    if isinstance(record, RowError):
        raise record
    name = str(record.get("id", name))
    for field in ("question", "answer", "answer_form"):
        if record.get(field) is None:
            raise RowError(name, field, "is missing")
    for field in ("options", "boxes"):
        if not isinstance(record.get(field, []), list):
            raise RowError(name, field, f"must be a list, is {type(record[field]).__name__}")
    answer = record["answer"]
    if isinstance(answer, numbers.Real) and not isinstance(answer, bool):
        answer = str(answer)
    return Row(
        id=name,
        question=record["question"],
        answer=answer,
        answer_form=record["answer_form"],
        options=tuple(record.get("options", ())),
        boxes=tuple(record.get("boxes", ())),
        category=record.get("category", ""),
        image_source=_image_source(record, name, folder),
        meta={k: v for k, v in record.items() if k not in (*_KNOWN, "image", "images")},
    )


def _image_source(record: dict[str, Any], name: str, folder: Path) -> ImageSource:
    """Where the image of a record is; nothing is read."""
    if ("image" in record) == ("images" in record):
        raise RowError(name, "image", "give either 'image' or 'images'")
    value = record.get("image", record.get("images"))
    if callable(value):
        return functools.partial(_embedded_image, value, name, folder)
    return _image_value(value, name, folder)


def _embedded_image(read: Callable[[], Any], name: str, folder: Path) -> ImageSource:
    return _image_value(read(), name, folder)


def _image_value(value: Any, name: str, folder: Path) -> ImageSource:
    """A path or bytes from what a record holds as image."""
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError(name, "images", f"must hold one image, holds {len(value)}")
        value = value[0]
    if isinstance(value, dict):  # how Hugging Face datasets store images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise RowError(name, "image", f"must be a path or base64, is {type(value).__name__}")
    # Base64 has no dot and image files have an extension; a short dotless string may be either.
    if not value.startswith("data:") and (
        "." in value or (len(value) < 256 and (folder / value).is_file())
    ):
        file = as_path(value) if value.startswith((PREFIX, "/")) else folder / value
        return functools.partial(_remote_image, file, name) if is_remote(file) else file
    try:
        return base64.b64decode(value.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(name, "image", f"is neither a file nor base64: {value[:40]!r}") from error


def _remote_image(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise RowError(name, "image", f"file not found: {path}") from error


def _names_in(folder: Path) -> frozenset[str]:
    """Of the files. One request for a folder in a bucket, where one for each image takes hours."""
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def _check_image(row: Row, check: CheckImages, there: Callable[[Path], frozenset[str]]) -> None:
    """there: names of the files of a folder in a bucket."""
    if check == "decode":
        row.load_image()
    elif check == "exists":
        source = row.image_source
        if isinstance(source, Path) and not source.is_file():
            raise RowError(row.id, "image", f"file not found: {source}")
        if isinstance(source, functools.partial) and source.func is _remote_image:
            (file, _) = source.args
            if file.name not in there(file.parent):
                raise RowError(row.id, "image", f"file not found: {file}")
    elif check != "no":
        raise SourceError(f"check_images is {check!r}; use 'no', 'exists' or 'decode'")


def _list_bad_rows(
    problems: list[dict[str, Any]], folder: str | os.PathLike[str] | None
) -> Path | None:
    if not problems or folder is None:
        return None
    path = as_path(folder) / "bad_rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(problem, ensure_ascii=False) + "\n")
    return path
