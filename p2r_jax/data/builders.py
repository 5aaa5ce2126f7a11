"""TFDS builders of the benchmarks: their questions with the encoded images, as array_record files.

    from p2r_jax.data.builders import HRBench4K
    builder = HRBench4K(data_dir="data", file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir="HR-Bench")
    )
    builder.as_data_source("test")[0]["question"]

`p2r data prepare` does this and lists the bad rows.  TensorFlow is not needed: it would be for the
default file format, for `tfds.load` and `as_dataset`, and for TFDS's own writer, which keeps a
gigabyte in memory and then spills through TensorFlow.  So these builders write with TFDS's
`SequentialWriter`, in file order, one example at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from p2r_jax.data.benchmarks import Benchmark, benchmarks, plain
from p2r_jax.data.rows import Row, RowError

VERSION = "1.0.0"

SHARD = 250
"""Examples of a file; what is done again after a kill."""
_UNFLUSHED_BYTES = 2**25
"""The writer saves its metadata at every call, so that small examples are handed over together."""


@dataclasses.dataclass
class Report:
    """What came of the records of a source.

    Attributes:
      read: records so far.
      bad: for each that cannot be used: row (where it is), id, field, problem.
      index: for each that can: all but its image, as it reads from JSON.
      on_record: called after each.
    """

    read: int = 0
    bad: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    index: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    on_record: Callable[[], None] = lambda: None


def features() -> tfds.features.FeaturesDict:
    """What an example holds. Images are `Text`: bytes come back as they went in, undecoded."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "question": text(),
            "options": tfds.features.Sequence(text()),
            "answer": text(),
            "answer_form": text(),
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "category": text(),
            "image": text(),
            "height": np.int32,
            "width": np.int32,
            "image_hash": text(),
            "cluster": text(),
            "meta": text(),  # JSON
        }
    )


class Images:
    """Reads and checks images, each content once: rotations of a question share one."""

    def __init__(self, index: Iterable[dict[str, Any]] = ()) -> None:
        """index: of a `Report`, whose images need no check."""
        self.sizes: dict[str, tuple[int, int] | str] = {
            row["image_hash"]: (row["height"], row["width"]) for row in index
        }
        """By hash: (height, width), or what is wrong."""

    def read(self, row: Row) -> tuple[bytes, str, int, int]:
        """(encoded bytes, SHA-256 of them, height, width); raises RowError."""
        source = row.image_source
        if isinstance(source, Path):
            path = source
            try:
                source = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError) as error:
                raise RowError(row.id, "image", f"file not found: {path}") from error
        if not isinstance(source, bytes) or not source:
            raise RowError(row.id, "image", "is empty")
        name = hashlib.sha256(source).hexdigest()
        if name not in self.sizes:
            self.sizes[name] = _size(source)
        size = self.sizes[name]
        if isinstance(size, str):
            raise RowError(row.id, "image", f"cannot decode {len(source)} bytes: {size}")
        return source, name, *size


def _size(encoded: bytes) -> tuple[int, int] | str:
    """(height, width) of an image that decodes to its end, else the reason."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            # JPEG at an eighth of its size: all of it is read, with a hundredth of the memory.
            image.draft("RGB", (1, 1))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return height, width


def examples(
    benchmark: Benchmark, source: Path, report: Report, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """The examples of the first `limit` records, but for those that `report` has read already; what
    is no example goes into `report`."""
    _, rows = benchmark.rows(source)
    images, ids = Images(report.index), {row["id"] for row in report.index}
    for where, row in itertools.islice(rows, report.read, None):
        if limit is not None and report.read >= limit:
            return
        report.read += 1
        try:
            if isinstance(row, RowError):
                raise row
            if row.id in ids:
                raise RowError(row.id, "id", "another row has the same id")
            example = _example(benchmark, row, images)
            ids.add(row.id)
        except RowError as error:
            report.bad.append(
                {
                    "row": where,
                    "id": error.row_id,
                    "field": error.field,
                    "problem": error.problem,
                }
            )
        else:
            kept = {k: v for k, v in example.items() if k not in ("image", "meta")}
            boxes = [[float(v) for v in box] for box in example["boxes"]]
            report.index.append({**kept, "boxes": boxes, "meta": dict(row.meta)})
            yield example
            del example
        del row  # No image is kept while the next is read.
        report.on_record()


def _example(benchmark: Benchmark, row: Row, images: Images) -> dict[str, Any]:
    encoded, image_hash, height, width = images.read(row)
    rotation_of = hashlib.sha256(f"{image_hash} {row.question}".encode()).hexdigest()[:32]
    return {
        "id": row.id,
        "question": row.question,
        "options": list(row.options),
        "answer": row.answer,
        "answer_form": row.answer_form,
        "boxes": np.asarray(row.boxes, np.float32).reshape(-1, 4),
        "category": row.category,
        "image": encoded,
        "height": height,
        "width": width,
        "image_hash": image_hash,
        "cluster": rotation_of if benchmark.rotated else "",
        "meta": json.dumps(dict(row.meta), ensure_ascii=False, default=str),
    }


class PreparedBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """What all builders here share. `benchmark` says which files and rows."""

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the published files, as downloaded"
    benchmark: Benchmark
    # TFDS would look beside the code for checksums of downloads, with importlib_resources, which
    # it does not install. Nothing is downloaded here.
    code_path = None

    def __init__(
        self,
        *,
        source: Path | None = None,
        report: Report | None = None,
        limit: int | None = None,
        benchmark: Benchmark | None = None,
        **kwargs: Any,
    ):
        """source: downloaded file or folder; default, the `manual_dir` of the `DownloadConfig`.
        limit: records to read; default, all. benchmark: instead of that of the class."""
        self.benchmark = benchmark or self.benchmark
        super().__init__(**kwargs)
        self.source, self.report, self.limit = source, report or Report(), limit

    def _info(self) -> tfds.core.DatasetInfo:
        return self._info_of(self)

    def _info_of(self, identity: Any) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=identity,
            description=self.benchmark.about,
            features=features(),
            disable_shuffling=True,
        )

    def _log_download_bytes(self) -> None:
        """TFDS would say that it downloads, and a folder that `prepare` renames."""

    def _log_download_done(self) -> None:
        pass

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        source = self.source or Path(dl_manager.manual_dir)
        return {self.benchmark.split: self._generate_examples(source)}

    def _generate_examples(self, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(examples(self.benchmark, source, self.report, self.limit))

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        # In place of TFDS's writer, see the module docstring.
        source = self.source or Path(dl_manager.manual_dir)
        # Until all is written, `data_dir` is a temporary folder; `self.info` has the final one.
        self.info.set_splits(self.write(source, Path(self.data_dir)))

    def write(
        self, source: Path, folder: Path, saved: Callable[[], None] = lambda: None
    ) -> tfds.core.splits.SplitDict:
        """Writes the examples to `folder`; returns the splits.

        If `self.report` has read some records, their examples must be there, in whole shards, and
        the others follow. saved: called when a shard is whole, with its records in the report.
        """
        split, known = self.benchmark.split, self.report.index
        here = tfds.core.dataset_info.DatasetIdentity(
            name=self.name,
            version=self.version,
            data_dir=str(folder),
            module_name=str(self.__module__),
        )
        info = self._info_of(here)
        writer = tfds.core.SequentialWriter(
            info, max_examples_per_shard=SHARD, overwrite=not known, file_format="array_record"
        )
        writer.initialize_splits([split], fail_if_exists=False)
        waiting: list[dict[str, Any]] = []
        unflushed = 0
        for example in examples(self.benchmark, source, self.report, self.limit):
            waiting.append(example)
            unflushed += len(example["image"])
            del example
            whole = len(known) % SHARD == 0
            if whole or unflushed >= _UNFLUSHED_BYTES:
                writer.add_examples({split: waiting})
                waiting, unflushed = [], 0
            if whole:
                saved()
        writer.add_examples({split: waiting})
        writer.close_all()
        return info.splits


_BENCHMARKS = benchmarks()


class VStar(PreparedBuilder):
    name = "vstar"
    benchmark = _BENCHMARKS[name]


class HRBench4K(PreparedBuilder):
    name = "hrbench_4k"
    benchmark = _BENCHMARKS[name]


class HRBench8K(PreparedBuilder):
    name = "hrbench_8k"
    benchmark = _BENCHMARKS[name]


class MMERealWorld(PreparedBuilder):
    name = "mme_realworld"
    benchmark = _BENCHMARKS[name]


class MMERealWorldLite(PreparedBuilder):
    name = "mme_realworld_lite"
    benchmark = _BENCHMARKS[name]


class P2R10K(PreparedBuilder):
    name = "p2r_10k"
    benchmark = _BENCHMARKS[name]


class OwnRows(PreparedBuilder):
    """Rows of a user's own: a plain .jsonl or .parquet file, or a folder in V*'s layout."""

    name = "own_rows"
    benchmark = plain(name)


BUILDERS: dict[str, type[PreparedBuilder]] = {
    cls.name: cls for cls in (VStar, HRBench4K, HRBench8K, MMERealWorld, MMERealWorldLite, P2R10K)
}
