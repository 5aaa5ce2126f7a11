"""Batches of rows with decoded images, in an order that depends only on (seed, step).

grain does the work: an index shuffle without memory, threads that decode ahead, and an iterator
whose whole state is the number of the next batch, so that resuming at step n is exact.

Several processes go through one plan of batches. Each reads the rows of a batch, but decodes only
the images that its devices will hold; their sizes, and which of them cannot be read, are exchanged
when a batch is taken, in the thread that takes it. So all have the batch that one process has.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from p2r_jax.data.rows import Row, RowError
from p2r_jax.parallel.multihost import gather

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which images of a batch this process decodes."""

    owners: tuple[frozenset[int], ...] = (frozenset({0}),)
    """For each shard of a batch the processes that have devices in it."""
    process: int = 0

    @property
    def shards(self) -> int:
        """Ways that the images of a batch are split."""
        return len(self.owners)

    def shards_of(self, count: int) -> list[int]:
        """Of each of `count` images: equal runs.

        >>> Share((frozenset({0}),) * 4).shards_of(7)
        [0, 0, 1, 1, 2, 2, 3]
        """
        each = -(-count // self.shards)
        return [i // each for i in range(count)]

    def has(self, shard: int) -> bool:
        """Whether a device of this process holds the shard."""
        return self.process in self.owners[shard]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRow:
    """A row of a batch. All but the pixels is known to every process."""

    row: Row
    pixels: np.ndarray | None = dataclasses.field(repr=False)
    """uint8 [H, W, 3]; None if no device of this process will hold the image."""
    size: tuple[int, int] = (0, 0)
    """Height and width; by default those of `pixels`."""
    shard: int | None = None
    """Where the image belongs among the shards of its batch."""

    def __post_init__(self) -> None:
        if self.pixels is not None:
            object.__setattr__(self, "size", self.pixels.shape[:2])

    @functools.cached_property
    def image(self) -> np.ndarray:
        """uint8 [H, W, 3], for people to look at: read again if it is another process's, and black
        if that fails, with a warning. No run ends for want of a picture."""
        if self.pixels is not None:
            return self.pixels
        try:
            return _image(self.row)
        except (RowError, OSError) as error:
            logger.warning("no picture of row %r: %s", self.row.id, error)
            return np.zeros((*self.size, 3), np.uint8)


class ImageCache:
    """The decoded images that were used last, for rows that share one."""

    def __init__(self, limit: int = 2**30):
        """limit: bytes of pixels that are kept at most; an 8K image of 7680 × 4320 has 95 MiB."""
        self.limit = limit
        self.bytes = 0
        """That are kept now."""
        self._images: collections.OrderedDict[Any, np.ndarray] = collections.OrderedDict()

    def read(self, row: Row) -> np.ndarray:
        """The image of a row, decoded if it is not there. Raises RowError or OSError."""
        key = self._key(row)
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        image = _image(row)
        if key is not None and image.nbytes <= self.limit:
            self._images[key] = image
            self.bytes += image.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._images.popitem(last=False)[1].nbytes
        return image

    @staticmethod
    def _key(row: Row) -> Any:
        """What tells the content of an image; of a file its time too, which a new one changes."""
        key, source = row.image_key, row.image_source
        if key is None or not isinstance(source, (str, os.PathLike)):
            return key
        try:
            found = os.stat(source)
        except OSError:
            return None  # Reading it says why.
        return key, found.st_size, found.st_mtime_ns


class Unreadable:
    """Rows whose image turned out not to be one: listed, counted, and too many of them an error.

    Sources check their rows when they are opened, but decode no image: that takes as long as
    reading all of them.
    """

    def __init__(self, limit: float = 0, listing: Path | None = None):
        """limit: rows. listing: JSON-lines file that gets a line for each."""
        self.limit, self.listing = limit, listing
        self.problems: dict[str, str] = {}
        """By row id."""
        self._lock = threading.Lock()

    def add(self, error: RowError) -> None:
        """Raises `error` once there are more than `limit` rows."""
        with self._lock:
            known = error.row_id in self.problems
            self.problems[error.row_id] = str(error)
            if len(self.problems) > self.limit:
                raise error
            if known:
                return
            logger.warning("%s; the row is skipped", error)
            if self.listing is not None:
                self.listing.parent.mkdir(parents=True, exist_ok=True)
                with self.listing.open("a") as file:
                    line = {"id": error.row_id, "field": error.field, "problem": error.problem}
                    file.write(json.dumps(line) + "\n")


def _insisting(what: str, read: Callable[[], Any]) -> Any:
    """For a disk or a bucket that fails now and then; one process alone would end."""
    for wait in (1.0, 4.0):
        try:
            return read()
        except RowError:
            raise
        except Exception as error:
            logger.warning("%s: %s; trying again in %.0f s", what, error, wait)
            time.sleep(wait)
    return read()


def _image(row: Row) -> np.ndarray:
    return _insisting(f"row {row.id!r}", row.load_image)


def _row(source: Sequence[Row] | Any, index: int) -> Row:
    return _insisting(f"row number {index}", lambda: source[index])


@dataclasses.dataclass
class _Read:
    """What this process found where a batch wants an image."""

    pixels: np.ndarray | None = None
    passed: list[RowError] = dataclasses.field(default_factory=list)
    """Rows that could not be read: each gives its place to the next."""
    error: Exception | None = None
    """Not the fault of the image."""

    def told(self) -> dict[str, Any]:
        """All but the pixels, as JSON has it."""
        return {
            "size": None if self.pixels is None else list(self.pixels.shape[:2]),
            "passed": [[e.row_id, e.field, e.problem] for e in self.passed],
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
        }


@dataclasses.dataclass
class _Batch:
    """What a thread has read ahead."""

    indices: list[int]
    rows: list[Row]
    """[] if they could not be read; then one of `reads` has the error."""
    reads: list[_Read | None]
    """None for images of other processes."""


def _read(
    source: Sequence[Row] | Any, index: int, limit: float, passed: Sequence[RowError] = ()
) -> _Read:
    """The image of a row, or of the next one that can be read: so that batches keep their size and
    their order depends on the data alone.

    limit: rows that may be unreadable; there is no use in looking further. passed: rows that are
    known to be.
    """
    found = _Read(passed=list(passed))
    try:
        while len(found.passed) < len(source):
            if len({error.row_id for error in found.passed}) > limit:
                break
            try:
                found.pixels = _image(_row(source, (index + len(found.passed)) % len(source)))
                break
            except RowError as error:
                found.passed.append(error)
    except Exception as error:  # The others wait for an answer: it is raised when they have it.
        found.error = error
    return found


def _agree(
    reads: list[_Read | None], again: Callable[[int, list[RowError]], _Read]
) -> list[dict[str, Any]]:
    """What the processes found, image by image, as `_Read.told`. All must call it.

    reads: None for images of others; brought into line with what all found. again: reads an image
    once more, where another process could not read the rows before.

    Raises OSError, or here the error itself, if a process failed; ValueError if two have images of
    other sizes before them.
    """
    while True:
        everyone = _exchange([None if read is None else read.told() for read in reads])
        for process, told in enumerate(everyone):
            if failed := next((t["error"] for t in told if t and t["error"]), None):
                mine = next((read.error for read in reads if read and read.error), None)
                raise mine or OSError(f"process {process} could not read its images: {failed}")
        of_image = [[told[i] for told in everyone if told[i]] for i in range(len(reads))]
        agreed = [max(own, key=lambda t: len(t["passed"])) for own in of_image]
        behind = any(
            len(told["passed"]) < len(best["passed"])
            for own, best in zip(of_image, agreed, strict=True)
            for told in own
        )
        if not behind:
            for own in of_image:
                if any(told["size"] != own[0]["size"] for told in own):
                    raise ValueError(f"processes see an image of other sizes: {own}")
            return agreed
        for i, read in enumerate(reads):
            if read is not None and len(read.passed) < len(agreed[i]["passed"]):
                reads[i] = again(i, [RowError(*error) for error in agreed[i]["passed"]])


def _exchange(value: Any) -> list[Any]:
    """What each process passes in, JSON, on all of them."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather(np.asarray(len(raw)))
    # Few lengths: each is a program that JAX compiles.
    padded = np.zeros(max(4096, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: len(raw)] = raw
    return [
        json.loads(own[:size].tobytes()) for own, size in zip(gather(padded), sizes, strict=True)
    ]


def training_batches(
    source: Sequence[Row] | Any,
    batch: int,
    seed: int,
    start: int = 0,
    unreadable: Unreadable | None = None,
    share: Share | None = None,
    first_row: int | None = None,
) -> Iterator[list[LoadedRow]]:
    """Endless shuffled batches (a new shuffle each epoch, the last partial batch dropped).

    start: number of the first batch; batch n is the same whatever `start` was. first_row: instead,
    batches are cut from one endless stream of shuffled epochs, in which no row is dropped and which
    does not depend on `batch`, from this row of it on (0 is its first). unreadable: keeps
    count of rows whose image cannot be read; default, none is allowed. share: images that this
    process decodes; default, all. With several processes all must take the same batches.

    Raises ValueError if the source has fewer rows than a batch, and RowError for too many
    unreadable ones.
    """
    bad, own = unreadable or Unreadable(), share or Share()
    if len(source) < batch:
        raise ValueError(f"the data has {len(source)} rows, fewer than a batch of {batch}")
    shards = own.shards_of(batch)

    def read(indices: Sequence[int]) -> _Batch:
        numbers = [int(index) for index in indices]
        reads = [
            _read(source, index, bad.limit) if own.has(shard) else None
            for index, shard in zip(numbers, shards, strict=True)
        ]
        rows: list[Row] = []
        try:  # All rows, so that nothing is left to fail once the processes have agreed.
            rows = [_row(source, index) for index in numbers]
        except Exception as error:
            mine = next((one for one in reads if one is not None), None)
            if mine is None:
                raise
            mine.error = mine.error or error
        return _Batch(numbers, rows, reads)

    shuffled = grain.MapDataset.source(range(len(source))).seed(seed).shuffle()
    if first_row is None:
        batched = shuffled.batch(batch, drop_remainder=True, batch_fn=list)
        dataset = batched.repeat(reseed_each_epoch=True).map(read)
    else:
        rows, begin = shuffled.repeat(reseed_each_epoch=True), first_row
        numbered = grain.MapDataset.range(sys.maxsize // batch - begin)
        dataset = numbered.map(lambda n: read([rows[begin + n * batch + i] for i in range(batch)]))
    # Two threads, some batches ahead, hide decoding behind the device; order is kept.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start if first_row is None else 0})

    def batches() -> Iterator[list[LoadedRow]]:
        for found in iterator:
            yield _training_rows(source, found, shards, bad)

    return batches()


def _training_rows(
    source: Sequence[Row] | Any,
    batch: _Batch,
    shards: list[int],
    bad: Unreadable,
) -> list[LoadedRow]:
    indices, reads = batch.indices, batch.reads
    agreed = _agree(reads, lambda i, passed: _read(source, indices[i], bad.limit, passed))
    rows = []
    parts = zip(indices, batch.rows, reads, shards, agreed, strict=True)
    for index, row, read, shard, found in parts:
        for error in found["passed"]:
            bad.add(RowError(*error))
        if found["size"] is None:
            raise ValueError("no row of the data has an image that can be read")
        if found["passed"]:
            row = _row(source, (index + len(found["passed"])) % len(source))
        rows.append(LoadedRow(row, read.pixels if read else None, tuple(found["size"]), shard))
    return rows


def shared_images(rows: Sequence[Row]) -> list[int]:
    """For each row the number of its image among the distinct ones, in their order."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(row.image_key or i, len(numbers)) for i, row in enumerate(rows)]


def evaluation_batches(
    source: Sequence[Row] | Any,
    batch: int,
    limit: int,
    offset: int = 0,
    unreadable: Unreadable | None = None,
    wanted: Callable[[Row], bool] = lambda row: True,
    share: Share | None = None,
    cache: ImageCache | None = None,
) -> Iterator[list[LoadedRow]]:
    """Rows `offset` to `offset + limit` in order; the last batch may be short.

    unreadable: as for `training_batches`; such rows are left out. wanted: asked of each row before
    its image is read; the others are left out too, and move no row to another batch. share: as for
    `training_batches`. cache: of the images; default, one of 1 GiB. Rows of a batch that share an
    image share its pixels too.
    """
    bad, own, cache = unreadable or Unreadable(), share or Share(), cache or ImageCache()
    stop = min(offset + limit, len(source))
    for begin in range(offset, stop, batch):
        rows = [
            row for i in range(begin, min(begin + batch, stop)) if wanted(row := _row(source, i))
        ]
        if rows and (loaded := _evaluation_rows(rows, bad, own, cache)):
            yield loaded


def _evaluation_rows(
    rows: list[Row], bad: Unreadable, share: Share, cache: ImageCache
) -> list[LoadedRow]:
    numbers = shared_images(rows)
    firsts = [rows[numbers.index(number)] for number in range(max(numbers) + 1)]
    shards = share.shards_of(len(firsts))

    def read(row: Row) -> _Read:
        try:
            return _Read(cache.read(row))
        except RowError as error:
            return _Read(passed=[error])
        except Exception as error:
            return _Read(error=error)

    reads = [
        read(row) if share.has(shard) else None for row, shard in zip(firsts, shards, strict=True)
    ]
    agreed = _agree(reads, lambda i, passed: _Read(passed=passed))
    loaded = []
    for row, number in zip(rows, numbers, strict=True):
        mine, found, shard = reads[number], agreed[number], shards[number]
        for _, field, problem in found["passed"]:
            bad.add(RowError(row.id, field, problem))
        if found["size"] is not None:
            loaded.append(
                LoadedRow(row, mine.pixels if mine else None, tuple(found["size"]), shard)
            )
    return loaded
