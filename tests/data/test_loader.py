"""Batches depend on (seed, number of the batch) only."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from p2r_jax.data.loader import Unreadable, evaluation_batches, training_batches
from p2r_jax.data.rows import Row, RowError


class Rows:
    """`count` rows whose image says which they are."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        image = np.full((2, 2, 3), index, np.uint8)
        return Row(str(index), "which?", "A", "mca", ("a", "b"), image_source=image)


def ids(batches, count: int) -> list[list[int]]:
    return [[int(b.row.id) for b in batch] for batch in itertools.islice(batches, count)]


def test_an_epoch_shows_every_row_once_but_for_the_last_partial_batch():
    batches = ids(training_batches(Rows(10), 3, seed=0), 3)
    seen = [*itertools.chain(*batches)]
    assert all(len(batch) == 3 for batch in batches)
    assert len(set(seen)) == 9


def test_images_are_decoded_and_belong_to_their_rows():
    (batch,) = itertools.islice(training_batches(Rows(8), 8, seed=0), 1)
    assert [int(b.image[0, 0, 0]) for b in batch] == [int(b.row.id) for b in batch]


@pytest.mark.parametrize("start", [1, 3, 4, 7, 13])
def test_batch_n_is_the_same_wherever_training_started(start):
    whole = ids(training_batches(Rows(10), 3, seed=5), 20)
    assert ids(training_batches(Rows(10), 3, seed=5, start=start), 20 - start) == whole[start:]


def test_every_epoch_has_an_order_of_its_own():
    batches = ids(training_batches(Rows(12), 4, seed=0), 9)
    epochs = [[*itertools.chain(*batches[i : i + 3])] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_the_order():
    one, same, other = (ids(training_batches(Rows(50), 5, seed=s), 10) for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_too_few_rows_is_an_error():
    with pytest.raises(ValueError, match="the data has 3 rows, fewer than a batch of 4"):
        training_batches(Rows(3), 4, seed=0)


class TestOneStream:
    """`first_row`: the order does not depend on how rows are divided into batches."""

    def rows(self, batch: int, count: int, first: int = 0) -> list[int]:
        return [
            *itertools.chain(*ids(training_batches(Rows(10), batch, 5, first_row=first), count))
        ]

    def test_every_row_comes_once_an_epoch_and_none_is_dropped(self):
        seen = self.rows(3, 10)
        epochs = [seen[i : i + 10] for i in (0, 10, 20)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3

    @pytest.mark.parametrize("batch", [1, 2, 4, 6])
    def test_any_batch_size_gives_the_same_stream(self, batch):
        assert self.rows(batch, 24 // batch) == self.rows(3, 8)

    @pytest.mark.parametrize("first", [1, 7, 12, 23])
    def test_it_goes_on_from_any_row(self, first):
        assert self.rows(4, 5, first) == self.rows(1, 50)[first : first + 20]

    def test_the_seed_decides_it(self):
        other = ids(training_batches(Rows(10), 3, 6, first_row=0), 3)
        assert [*itertools.chain(*other)] != self.rows(3, 3)


class Broken(Rows):
    """Rows 2, 3 and 7 of 10 have no image."""

    def __getitem__(self, index):
        if index not in (2, 3, 7):
            return super().__getitem__(index)
        return Row(str(index), "which?", "A", "mca", ("a", "b"), image_source=b"no image")


def test_a_bad_image_names_its_row():
    with pytest.raises(RowError, match=r"row '[237]', field 'image'"):
        list(itertools.islice(training_batches(Broken(10), 5, seed=0), 2))
    with pytest.raises(RowError, match=r"row '2', field 'image'"):
        list(evaluation_batches(Broken(10), 5, 10))


def test_rows_without_an_image_give_their_place_to_the_next(tmp_path):
    bad = Unreadable(limit=3, listing=tmp_path / "bad" / "rows.jsonl")
    good = ids(training_batches(Rows(10), 5, seed=3), 4)
    found = ids(training_batches(Broken(10), 5, seed=3, unreadable=bad), 4)
    instead = {2: 4, 3: 4, 7: 8}
    assert found == [[instead.get(i, i) for i in batch] for batch in good]
    assert sorted(bad.problems) == ["2", "3", "7"]
    lines = [json.loads(line) for line in (tmp_path / "bad" / "rows.jsonl").open()]
    assert sorted(line["id"] for line in lines) == ["2", "3", "7"]  # once each, over two epochs
    assert ids(training_batches(Broken(10), 5, 3, 2, Unreadable(3)), 2) == found[2:]


def test_one_more_than_allowed_is_an_error():
    with pytest.raises(RowError, match="field 'image'"):
        ids(training_batches(Broken(10), 5, seed=3, unreadable=Unreadable(limit=2)), 2)


def test_evaluations_leave_them_out():
    assert ids(evaluation_batches(Broken(10), 2, 10, unreadable=Unreadable(3)), 9) == [
        [0, 1], [4, 5], [6], [8, 9],
    ]  # fmt: skip


def test_a_disk_that_fails_now_and_then_costs_no_row(monkeypatch):
    """One process alone would otherwise train on other rows than the others."""
    calls = []

    class Flaky(Row):
        def load_image(self):
            calls.append(self.id)
            if calls.count(self.id) < 3:
                raise OSError(5, "Input/output error")
            return super().load_image()

    class Disk(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return Flaky(row.id, "which?", "A", "mca", ("a", "b"), image_source=row.image_source)

    monkeypatch.setattr("p2r_jax.data.loader.time.sleep", lambda seconds: None)
    bad = Unreadable(4)
    assert ids(evaluation_batches(Disk(4), 4, 4, unreadable=bad), 1) == [[0, 1, 2, 3]]
    assert bad.problems == {}


def test_a_disk_that_fails_is_not_taken_for_a_bad_image(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("p2r_jax.data.rows.Image.open", fails)
    with pytest.raises(OSError, match="Input/output error"):
        Row("1", "which?", "A", "mca", ("a", "b"), image_source=tmp_path / "a.png").load_image()


def test_a_source_without_any_image_is_an_error():
    class Nothing(Broken):
        def __getitem__(self, index):
            return super().__getitem__(2)

    with pytest.raises(ValueError, match="no row of the data has an image"):
        next(training_batches(Nothing(4), 2, seed=0, unreadable=Unreadable(4)))


@pytest.mark.parametrize(
    "limit, offset, expected",
    [
        (10, 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (4, 0, [[0, 1, 2, 3]]),
        (5, 3, [[3, 4, 5, 6], [7]]),
        (100, 8, [[8, 9]]),
        (3, 10, []),
        (0, 0, []),
    ],
)
def test_evaluation_goes_through_the_rows_in_order(limit, offset, expected):
    assert ids(evaluation_batches(Rows(10), 4, limit, offset), 100) == expected
