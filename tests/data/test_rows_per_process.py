"""Several processes go through one plan of batches, and each decodes only what its devices hold.

As a program this file is one of two real processes: PROCESS PORT MODEL OUT.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from p2r_jax.config import DistributedConfig
from p2r_jax.data import loader
from p2r_jax.data.loader import (
    ImageCache,
    Share,
    Unreadable,
    evaluation_batches,
    shared_images,
    training_batches,
)
from p2r_jax.data.rows import Row, RowError

ROOT = Path(__file__).parents[2]
TWO = (frozenset({0}), frozenset({0}), frozenset({1}), frozenset({1}))
ROWS, BATCH = 20, 6
MANY = 400
"""So many that what threads decode ahead is of the first epoch, where no row comes twice."""


class Source:
    """Rows of noise; counts which are decoded. broken: those without an image."""

    def __init__(
        self, broken: tuple[int, ...] = (), failing: tuple[int, ...] = (), count: int = ROWS
    ):
        self.broken, self.failing, self.count = broken, failing, count
        self.decoded: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        def read() -> np.ndarray | bytes:
            with self._lock:
                self.decoded[str(index)] += 1
            if index in self.failing:
                raise PermissionError(13, "Permission denied")
            return b"no image" if index in self.broken else picture(index)

        return Row(str(index), "red?", "A", "mca", ("a", "b"), image_source=read)


def picture(index: int) -> np.ndarray:
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (*rng.integers(60, 120, 2), 3)).astype(np.uint8)


# --- processes that are threads: what one of them alone finds -------------------------------------


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the process number in as many threads, which exchange for real."""
    number = threading.local()

    def run(count, function):
        barrier = threading.Barrier(count, timeout=60)
        values, results = [None] * count, [None] * count

        def exchange(value):
            if not hasattr(number, "own"):  # What is compared with: one process.
                return [value]
            values[number.own] = json.loads(json.dumps(value))
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        def one(process):
            number.own = process
            try:
                results[process] = function(process)
            except Exception as error:
                results[process] = error

        monkeypatch.setattr(loader, "_exchange", exchange)
        monkeypatch.setattr(loader.time, "sleep", lambda seconds: None)
        threads = [threading.Thread(target=one, args=(p,)) for p in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


def taken(batches, count: int) -> list[list[tuple]]:
    """What every process must see alike."""
    return [[(b.row.id, b.size) for b in batch] for batch in itertools.islice(batches, count)]


def train(source, share=None, count=4, limit=4, start=0):
    bad = Unreadable(limit)
    return taken(training_batches(source, BATCH, 3, start, bad, share), count), sorted(bad.problems)


def test_each_decodes_what_its_devices_hold_and_all_see_the_same(together):
    sources = [Source(count=MANY), Source(count=MANY)]
    results = together(2, lambda p: train(sources[p], Share(TWO, p), count=3))
    expected = train(Source(count=MANY), count=3)
    assert results == [expected, expected]
    assert_each_decoded_its_own(expected[0], [source.decoded for source in sources])


def assert_each_decoded_its_own(batches, decoded) -> None:
    """The first four of each batch, and the last two; more of them, since threads decode ahead."""
    own = [
        {name for batch in batches for name, _ in batch[part]} for part in (slice(4), slice(4, 6))
    ]
    for names, mine, other in zip(decoded, own, own[::-1], strict=True):
        assert mine <= set(names)
        assert not other & set(names)


def test_pixels_are_there_only_where_they_belong(together):
    def pixels(process):
        batch = next(training_batches(Source(), BATCH, 3, share=Share(TWO, process)))
        assert all((b.image == picture(int(b.row.id))).all() for b in batch)  # read again
        return [b.pixels is not None for b in batch], [b.shard for b in batch]

    (first, shards), (second, same) = together(2, pixels)
    assert first == [True] * 4 + [False] * 2
    assert second == [False] * 4 + [True] * 2
    assert shards == same == [0, 0, 1, 1, 2, 2]


def test_no_run_ends_for_want_of_a_picture(caplog):
    row = Source(broken=(7,))[7]
    image = loader.LoadedRow(row, None, (30, 20)).image
    assert image.shape == (30, 20, 3)
    assert not image.any()
    assert "no picture of row '7': row '7', field 'image': cannot decode" in caplog.text


@pytest.mark.parametrize("start", [0, 2, 5])
def test_rows_that_one_cannot_read_give_their_place_to_the_next_everywhere(together, start):
    broken = (2, 3, 7)
    results = together(2, lambda p: train(Source(broken), Share(TWO, p), 6 - start, start=start))
    assert results[0] == results[1]
    whole, problems = train(Source(broken), count=6)
    assert results[0][0] == whole[start:]
    if start == 0:
        assert results[0][1] == problems
        assert problems == ["2", "3", "7"]


@pytest.mark.parametrize("here", [0, 1])
def test_one_that_reads_less_than_the_other_decides(together, here):
    """Both hold every image, as where mesh.tensor spans hosts; one cannot read three of them."""
    both = (frozenset({0, 1}),)
    sources = [Source((2, 3, 7) if p == here else ()) for p in range(2)]
    results = together(2, lambda p: train(sources[p], Share(both, p)))
    assert results == [train(Source((2, 3, 7)))] * 2


def test_too_many_of_them_end_all(together):
    results = together(2, lambda p: train(Source((2, 3, 7)), Share(TWO, p), limit=2))
    assert [type(r) for r in results] == [RowError, RowError]
    assert str(results[0]) == str(results[1])
    assert "field 'image': cannot decode 8 bytes" in str(results[0])


def test_a_disk_that_fails_on_one_ends_all_and_is_told(together):
    failing = tuple(range(ROWS))
    results = together(2, lambda p: train(Source(failing=failing if p else ()), Share(TWO, p)))
    assert isinstance(results[1], PermissionError)
    assert type(results[0]) is OSError
    assert "process 1 could not read its images: PermissionError" in str(results[0])


def test_other_files_under_one_name_are_noticed(together):
    class Other(Source):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), image_source=picture(index + 1))

    both = (frozenset({0, 1}),)
    results = together(2, lambda p: train((Other if p else Source)(), Share(both, p)))
    assert all("see an image of other sizes" in str(r) for r in results)


def test_evaluations_leave_rows_out_everywhere(together):
    def run(share, broken):
        bad = Unreadable(5)
        batches = evaluation_batches(Source(broken), BATCH, 14, 1, bad, share=share)
        return taken(batches, 9), sorted(bad.problems)

    results = together(2, lambda p: run(Share(TWO, p), (1, 4, 8) if p == 0 else (6, 8)))
    # Rows 1 to 6 are on shards 0 0 1 1 2 2: row 4 is process 0's, row 6 process 1's.
    expected = run(None, (1, 4, 6, 8))
    assert results == [expected, expected]
    assert expected[1] == ["1", "4", "6", "8"]


# --- rows that share an image ---------------------------------------------------------------------


class Rotations(Source):
    """Rows 0 to 3 share image 0, rows 4 to 7 image 1, and so on; a prepared dataset says so."""

    def __getitem__(self, index):
        row = super().__getitem__(index // 4)
        return dataclasses.replace(row, id=str(index), image_hash=f"{index // 4:064x}")


@pytest.mark.parametrize("batch", [4, 3, 1, 20])
def test_rotations_decode_their_image_once(batch):
    """Whether batches cut through them or not."""
    source = Rotations()
    rows = [row for b in evaluation_batches(source, batch, ROWS) for row in b]
    assert dict(source.decoded) == {str(i): 1 for i in range(5)}
    assert [row.row.id for row in rows] == [str(i) for i in range(ROWS)]
    for row in rows:
        np.testing.assert_array_equal(row.pixels, picture(int(row.row.id) // 4))


def test_a_cache_of_nothing_decodes_again_but_for_one_batch():
    source = Rotations()
    list(evaluation_batches(source, 2, 8, cache=ImageCache(0)))
    assert dict(source.decoded) == {"0": 2, "1": 2}


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    source = Rotations()
    images = [picture(i).nbytes for i in range(3)]
    cache = ImageCache(sum(images))
    for index in (0, 4, 8, 0, 12, 0, 4):
        cache.read(source[index])
        assert cache.bytes <= cache.limit
    # 12 pushed out 4, perhaps 8 too, but not 0.
    assert source.decoded["0"] == 1
    assert source.decoded["1"] == 2


def test_an_image_that_shared_rows_cannot_read_is_bad_for_each():
    bad = Unreadable(9)
    batches = list(evaluation_batches(Rotations(broken=(1,)), 6, 10, unreadable=bad))
    assert [[int(b.row.id) for b in batch] for batch in batches] == [[0, 1, 2, 3], [8, 9]]
    assert sorted(bad.problems) == ["4", "5", "6", "7"]
    assert "row '5'" in bad.problems["5"]


class TestSourcesThatFailNowAndThen:
    """Rows of a file in a bucket are requests, and any of them may fail."""

    class Flaky(Source):
        def __init__(self, failures: int):
            super().__init__()
            self.failures = failures

        def __getitem__(self, index):
            if index == 3 and self.failures:
                self.failures -= 1
                raise RuntimeError("503 Service Unavailable")
            return super().__getitem__(index)

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(loader.time, "sleep", lambda seconds: None)

    def test_are_asked_again(self):
        rows = next(training_batches(self.Flaky(2), ROWS, seed=0))
        assert len(rows) == ROWS
        (batch,) = evaluation_batches(self.Flaky(2), ROWS, ROWS)
        assert [row.row.id for row in batch] == [str(i) for i in range(ROWS)]

    def test_for_good_is_an_error_that_all_processes_hear_of(self, monkeypatch):
        told, exchange = [], loader._exchange

        def listen(value):
            told.append(value)
            return exchange(value)

        monkeypatch.setattr(loader, "_exchange", listen)
        with pytest.raises(RuntimeError, match="503"):
            next(training_batches(self.Flaky(10**6), ROWS, seed=0))
        assert any("503" in (one["error"] or "") for one in told[0])


class TestImageKey:
    def test_bytes_and_prepared_rows_go_by_content(self):
        row = Row("1", "q", "x", "free_form", image_source=b"abc")
        other = dataclasses.replace(row, id="2", image_source=b"abd")
        assert row.image_key == dataclasses.replace(row, id="3").image_key != other.image_key
        told = dataclasses.replace(other, image_hash=row.image_key)
        assert shared_images([row, other, told]) == [0, 1, 0]

    @pytest.mark.parametrize("name", ["8f373e7ac1d0b2a4", "ab" * 32, 7, None])
    def test_a_column_of_that_name_proves_nothing(self, name):
        """It may be a perceptual hash, or that of the photograph that rows show parts of."""
        row = Row("1", "q", "x", "free_form", image_source=lambda: b"", meta={"image_hash": name})
        assert row.image_key is None
        assert shared_images([row, row]) == [0, 1]

    def test_a_file_that_changed_is_read_again(self, tmp_path):
        from PIL import Image

        file, cache = tmp_path / "a.png", ImageCache()
        row = Row("1", "q", "x", "free_form", image_source=file)
        Image.fromarray(picture(1)).save(file)
        first = cache.read(row)
        assert cache.read(row) is first
        Image.fromarray(picture(2)).save(file)
        os.utime(file, ns=(1, 1))
        np.testing.assert_array_equal(cache.read(row), picture(2))


# --- two real processes ---------------------------------------------------------------------------


def collated(builder, batch) -> tuple:
    """The batch's prompts on the devices."""
    from p2r_jax.roles.image_store import ImageStore

    images = ImageStore.of_rows(batch, builder.buckets, builder.mesh)
    requests = [builder.plain("perceiver", images, i, "red?", "mca") for i in (3, 1, 4, 1, 5, 0, 2)]
    return images, builder.collate(requests, images)


def builder_of(model: Path, mesh):
    from p2r_jax.qwen3_vl.processor import Processor
    from p2r_jax.roles.prompts import load_prompt_set
    from p2r_jax.roles.requests import Buckets, RequestBuilder

    buckets = Buckets((128,), (128,), (128,), (128,))
    return RequestBuilder(Processor.from_pretrained(model), load_prompt_set("tiny"), buckets, mesh)


def broken_for(process: int) -> tuple[int, ...]:
    """Only process 1 cannot read the fifth row of the first batch, nor the row that follows it."""
    fifth = int(next(training_batches(Source(count=MANY), BATCH, 3))[4].row.id)
    return (fifth, fifth + 1) if process else ()


def checksums(patches) -> dict[int, int]:
    """Of each row that is here."""
    return {
        (shard.index[0].start or 0) + i: zlib.crc32(np.asarray(shard.data)[i].tobytes())
        for shard in patches.addressable_shards
        for i in range(shard.data.shape[0])
    }


def main(process: str, port: str, model: str, out: str) -> None:
    from p2r_jax.parallel.mesh import make_mesh
    from p2r_jax.parallel.multihost import start
    from p2r_jax.roles.image_store import share_of

    start(DistributedConfig("on", f"localhost:{port}", 2, int(process)))
    mesh = make_mesh(2, 2, 2)
    source = Source(broken_for(int(process)), count=MANY)
    batches = training_batches(source, BATCH, 3, 0, Unreadable(4), share_of(mesh))
    batch = next(batches)
    images, prompts = collated(builder_of(Path(model), mesh), batch)
    told = {
        "rows": [(b.row.id, b.size) for b in batch],
        "here": [b.pixels is not None for b in batch],
        "then": taken(batches, 2),
        "decoded": sorted(source.decoded),
        "image_bytes": sorted({s.data.nbytes for s in images.pixels.addressable_shards}),
        "patches": checksums(prompts.patches.pixels),
    }
    Path(out).write_text(json.dumps(told))


def test_two_real_processes(tiny_files, tmp_path):
    """On a (2, 2, 2) mesh of four devices each: one plan, each its own images, the patches those
    of one device, and rows that one of them cannot read replaced on both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    env = os.environ | {
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=4"]),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__]
    both = [
        subprocess.Popen([*command, str(i), str(port), str(tiny_files), str(out)], env=env)
        for i, out in enumerate(outs)
    ]
    try:
        assert [process.wait(300) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    first, second = (json.loads(out.read_text()) for out in outs)
    for name in ("rows", "then"):
        assert first[name] == second[name]
    assert first["here"] == [True] * 4 + [False] * 2
    assert second["here"] == [False] * 4 + [True] * 2

    plan = taken(training_batches(Source(count=MANY), BATCH, 3), 3)
    fifth, after = broken_for(1)
    instead = str(after + 1)
    plan[0][4] = (instead, picture(after + 1).shape[:2])
    found = [first["rows"], *first["then"]]
    assert found == json.loads(json.dumps(plan))
    assert_each_decoded_its_own(found, [first["decoded"], second["decoded"]])
    assert {str(fifth), str(after)} <= set(second["decoded"])

    # Two images a device of 6 in 4 shards, and each prompt's patches as one device cuts them.
    assert first["image_bytes"] == second["image_bytes"] == [2 * 128 * 128 * 3]
    ids = [int(name) for name, _ in first["rows"]]
    rows = [
        loader.LoadedRow(row, row.load_image()) for row in map(Source(count=MANY).__getitem__, ids)
    ]
    _, alone = collated(builder_of(tiny_files, None), rows)
    expected = checksums(alone.patches.pixels)
    found = {int(k): v for k, v in (first["patches"] | second["patches"]).items()}
    assert len(set(expected.values())) == 6
    assert {row: found[row] for row in expected} == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
