"""Records of the tables that benchmarks are published in, one at a time.

These files hold whole images, often as base64 text, so what matters is never to hold many: the
8K half of HR-Bench is a table of 2.8 GB, and one row group of MME-RealWorld has 626 MiB.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from p2r_jax.data.sources import SourceError

_MAPPED_PAGE = 2**28
"""Bytes of the first image page from which a parquet file is mapped instead of read."""

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """The records of some files of one kind (.parquet, .tsv or .jsonl), in order.

    Attributes:
      paths: the files.
      image: column that holds the images; only decides how a parquet file is read.
    """

    paths: Sequence[Path]
    image: str

    def count(self) -> int | None:
        """Number of records; None if that takes reading everything."""
        if any(path.suffix == ".tsv" for path in self.paths):
            return None
        return sum(_parquet_rows(p) if p.suffix == ".parquet" else _lines(p) for p in self.paths)

    def __iter__(self) -> Iterator[tuple[Path, int, Record | str]]:
        """(file, number of the record in it from 1, the record or what is wrong with it).

        Values that say "nothing" (null, NaN, empty text) are left out of a record.
        """
        for path in self.paths:
            for number, record in enumerate(_READERS[path.suffix](path, self.image), 1):
                yield path, number, record if isinstance(record, str) else _without_nothing(record)


def _without_nothing(record: Record) -> Record:
    return {key: value for key, value in record.items() if not _is_nothing(value)}


def _is_nothing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _open_parquet(path: Path, image: str) -> Any:
    import pyarrow.parquet as parquet

    try:
        # Without a buffer size, and with pre-buffering, whole column chunks would be read.
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        # A writer of many large values may put a whole row group into one page. Arrow needs that
        # page compressed and not; mapped, the compressed one is the kernel's to drop.
        if _first_page(path, file.metadata, image) > _MAPPED_PAGE:
            file = parquet.ParquetFile(path, pre_buffer=False, memory_map=True)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise SourceError(f"cannot read {path} as parquet: {error}") from error
    return file


def _parquet_rows(path: Path) -> int:
    return _open_parquet(path, "").metadata.num_rows


def _parquet(path: Path, image: str) -> Iterator[Record]:
    file = _open_parquet(path, image)
    for batch in file.iter_batches(batch_size=1, use_threads=False):
        (record,) = batch.to_pylist()
        del batch  # Not a second copy of an image while the first is worked on.
        yield record


def _first_page(path: Path, metadata: Any, image: str) -> int:
    """Compressed bytes of the first page of the image column that is not a dictionary, 0 if there
    is a dictionary: it holds each image once, and Arrow copies it whether mapped or not.

    A page header is a Thrift struct whose first fields are, as zigzag integers: type, size, and
    compressed size.  (https://github.com/apache/parquet-format, PageHeader)
    """
    if not metadata.num_row_groups:
        return 0
    group = metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.split(".")[0] == image and not column.has_dictionary_page:
            with open(path, "rb") as file:
                file.seek(column.data_page_offset)
                return max(_integers(file.read(32)), default=0)
    return 0


def _integers(header: bytes) -> Iterator[int]:
    """The leading i32 fields of a struct in Thrift's compact protocol, while ids count up by 1."""
    position = 0
    while header[position : position + 1] == b"\x15":
        position += 1
        value = shift = 0
        while position < len(header):
            byte = header[position]
            value |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                break
        yield (value >> 1) ^ -(value & 1)


def _tsv(path: Path, image: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # The default is 128 KiB; images are fields.
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")


def _jsonl(path: Path, image: str) -> Iterator[Record | str]:
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                yield f"is not JSON: {error}"
                continue
            yield record if isinstance(record, dict) else "is not a JSON object"


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)


_READERS = {".parquet": _parquet, ".tsv": _tsv, ".jsonl": _jsonl}
