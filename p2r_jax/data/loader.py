"""Batches of rows with decoded images, in an order that depends only on (seed, step).

grain does the work: an index shuffle without memory, threads that decode ahead, and an iterator
whose whole state is the number of the next batch, so that resuming at step n is exact.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from p2r_jax.data.rows import Row, RowError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedRow:
    row: Row
    image: np.ndarray
    """uint8 [H, W, 3]."""


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


def _image(row: Row) -> np.ndarray:
    """Of a disk that fails now and then: on one process alone, it would train on other rows."""
    for wait in (1.0, 4.0):
        try:
            return row.load_image()
        except OSError as error:
            logger.warning("row %r: %s; trying again in %.0f s", row.id, error, wait)
            time.sleep(wait)
    return row.load_image()


def load(source: Sequence[Row] | Any, index: int, unreadable: Unreadable) -> LoadedRow:
    """The row, or the next one that can be read: so that batches keep their size and their order
    depends on the data alone."""
    for further in range(len(source)):
        row = source[(index + further) % len(source)]
        try:
            return LoadedRow(row, _image(row))
        except RowError as error:
            unreadable.add(error)
    raise ValueError("no row of the data has an image that can be read")


def training_batches(
    source: Sequence[Row] | Any,
    batch: int,
    seed: int,
    start: int = 0,
    unreadable: Unreadable | None = None,
) -> Iterator[list[LoadedRow]]:
    """Endless shuffled batches (a new shuffle each epoch, the last partial batch dropped).

    start: number of the first batch; batch n is the same whatever `start` was. unreadable: keeps
    count of rows whose image cannot be read; default, none is allowed. Raises ValueError if the
    source has fewer rows than a batch, and RowError for too many unreadable ones.
    """
    bad = unreadable or Unreadable()
    if len(source) < batch:
        raise ValueError(f"the data has {len(source)} rows, fewer than a batch of {batch}")
    dataset = (
        grain.MapDataset.source(range(len(source)))
        .seed(seed)
        .shuffle()
        .batch(batch, drop_remainder=True, batch_fn=list)
        .repeat(reseed_each_epoch=True)
        .map(lambda indices: [load(source, int(index), bad) for index in indices])
    )
    # Two threads, some batches ahead, hide decoding behind the device; order is kept.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def evaluation_batches(
    source: Sequence[Row] | Any,
    batch: int,
    limit: int,
    offset: int = 0,
    unreadable: Unreadable | None = None,
    wanted: Callable[[Row], bool] = lambda row: True,
) -> Iterator[list[LoadedRow]]:
    """Rows `offset` to `offset + limit` in order; the last batch may be short.

    unreadable: as for `training_batches`; such rows are left out. wanted: asked of each row before
    its image is read; the others are left out too, and move no row to another batch.
    """
    bad = unreadable or Unreadable()
    stop = min(offset + limit, len(source))
    for begin in range(offset, stop, batch):
        loaded = []
        rows = (source[i] for i in range(begin, min(begin + batch, stop)))
        for row in filter(wanted, rows):
            try:
                loaded.append(LoadedRow(row, _image(row)))
            except RowError as error:
                bad.add(error)
        if loaded:
            yield loaded
