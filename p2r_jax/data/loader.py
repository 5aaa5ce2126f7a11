"""Batches of rows with decoded images, in an order that depends only on (seed, step).

grain does the work: an index shuffle without memory, threads that decode ahead, and an iterator
whose whole state is the number of the next batch, so that resuming at step n is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from p2r_jax.data.rows import Row


@dataclasses.dataclass(frozen=True)
class LoadedRow:
    row: Row
    image: np.ndarray
    """uint8 [H, W, 3]."""


def load(row: Row) -> LoadedRow:
    return LoadedRow(row, row.load_image())


def training_batches(
    source: Sequence[Row] | Any, batch: int, seed: int, start: int = 0
) -> Iterator[list[LoadedRow]]:
    """Endless shuffled batches (a new shuffle each epoch, the last partial batch dropped).

    start: number of the first batch; batch n is the same whatever `start` was. Raises ValueError
    if the source has fewer rows than a batch.
    """
    if len(source) < batch:
        raise ValueError(f"the data has {len(source)} rows, fewer than a batch of {batch}")
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .batch(batch, drop_remainder=True, batch_fn=list)
        .repeat(reseed_each_epoch=True)
        .map(lambda rows: [load(row) for row in rows])
    )
    # One thread a step ahead hides decoding behind the device; order is kept.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def evaluation_batches(
    source: Sequence[Row] | Any, batch: int, limit: int, offset: int = 0
) -> Iterator[list[LoadedRow]]:
    """Rows `offset` to `offset + limit` in order; the last batch may be short."""
    stop = min(offset + limit, len(source))
    for begin in range(offset, stop, batch):
        yield [load(source[i]) for i in range(begin, min(begin + batch, stop))]
