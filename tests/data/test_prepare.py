"""Preparing datasets, killing that, and reading what was prepared."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from p2r_jax import cli
from p2r_jax.data import builders
from p2r_jax.data.prepare import prepare
from p2r_jax.data.prepared import BENCHMARKS, PreparedSource
from p2r_jax.data.sources import SourceError, load_source
from tests.data.published import (
    hrbench_records,
    mme_record,
    p2r_record,
    picture,
    vstar_folder,
    write_parquet,
)


def run(*argv: object) -> int:
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def hrbench(tmp_path) -> Path:
    return write_parquet(tmp_path / "hr_bench_4k.parquet", hrbench_records(3))


def test_what_was_prepared_is_what_was_published(tmp_path, hrbench, capsys):
    out = tmp_path / "data"
    assert run("data", "prepare", "hrbench_4k", "--source", hrbench, "--out", out) == 0
    assert "12 rows, 3 images, no bad rows" in capsys.readouterr().out
    source = load_source("hrbench_4k", folder=out)
    assert len(source) == 12
    assert source.answer_forms == {"mca"}
    for row, record in zip(source, hrbench_records(3), strict=True):
        assert (row.id, row.question) == (str(record["index"]), record["question"])
        assert row.options == tuple(record[letter] for letter in "ABCD")
        assert row.options[ord(row.answer) - 65] == "red"
        assert row.category == record["category"]
        assert row.meta["cycle_category"] == record["cycle_category"]
        # The bytes of the file, not an image encoded again.
        assert row.image_source() == picture(record["index"] // 4, form="JPEG")
        assert (row.meta["height"], row.meta["width"]) == row.load_image().shape[:2]
    clusters = [row.meta["cluster"] for row in source]
    assert [clusters.index(c) for c in clusters] == [i // 4 * 4 for i in range(12)]
    assert len({row.meta["image_hash"] for row in source}) == 3


def test_true_boxes_survive(tmp_path):
    prepare("vstar", vstar_folder(tmp_path / "V-Star"), tmp_path / "data")
    row = load_source(tmp_path / "data" / "vstar")[1]
    assert row.boxes == ((250.0, 200.0, 750.0, 300.0),)
    assert (row.answer, row.options[2]) == ("B", "dark brown")
    assert row.meta["target_object"] == ["cup"]
    assert "cluster" not in row.meta


def test_a_folder_in_the_layout_of_vstar_may_have_its_own_name(tmp_path):
    prepare("mine", vstar_folder(tmp_path / "test"), tmp_path / "data")
    source = load_source(tmp_path / "data" / "mine")
    assert [row.boxes for row in source] == [((250.0, 200.0, 750.0, 300.0),)] * 3


def test_it_is_a_tfds_dataset_with_everything(tmp_path):
    import tensorflow_datasets as tfds

    folder = prepare("vstar", vstar_folder(tmp_path / "V-Star"), tmp_path / "data")
    examples = tfds.builder_from_directory(folder / "1.0.0").as_data_source("test")
    assert len(examples) == 3
    example = examples[2]
    assert example["question"] == b"What colour is thing 2?"
    assert list(example["options"]) == [b"red", b"blue", b"dark brown", b"white"]
    np.testing.assert_array_equal(example["boxes"], [[250, 200, 750, 300]])
    assert example["image"] == picture(2, form="JPEG")
    assert (example["height"], example["width"]) == (30, 40)


def test_builders_work_as_tfds_users_expect(tmp_path, hrbench):
    import tensorflow_datasets as tfds

    from p2r_jax.data.builders import BUILDERS

    assert set(BUILDERS) == set(BENCHMARKS)
    config = tfds.download.DownloadConfig(manual_dir=str(hrbench.parent))
    builder = BUILDERS["hrbench_4k"](data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare(download_config=config)
    assert len(builder.as_data_source("test")) == 12
    assert len(builder.as_data_source("test[:25%]")) == 3
    assert "tensorflow" not in sys.modules


def test_bad_rows_are_left_out_listed_and_counted(tmp_path, capsys):
    records = [mme_record(i) for i in range(10)]
    records[1]["answer"] = "F"
    records[2]["bytes"] = None
    records[4]["bytes"] = records[4]["bytes"][:400]  # a whole header, half an image
    records[5]["index"] = 6
    records[7]["multi-choice options"] = ["(A) 1"]
    path = write_parquet(tmp_path / "train.parquet", records)
    out = tmp_path / "data"
    command = ["data", "prepare", "mme_realworld_lite", "--source", path, "--out", out]

    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "5 of 10 rows are bad, more than max_bad_fraction = 0.01" in error
    assert "row '1', field 'answer'" in error
    assert not (out / "mme_realworld_lite").exists()
    listing = out / "mme_realworld_lite.bad_rows.jsonl"
    assert len(listing.read_text().splitlines()) == 5

    assert run(*command, "--max_bad_fraction", "0.5") == 0
    assert "5 rows, 5 images; 5 bad rows" in capsys.readouterr().out.replace("\n", " ")
    folder = out / "mme_realworld_lite"
    bad = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [(b["row"], b["id"], b["field"]) for b in bad] == [
        ("train.parquet:2", "1", "answer"),
        ("train.parquet:3", "2", "bytes"),
        ("train.parquet:5", "4", "image"),
        ("train.parquet:7", "6", "id"),
        ("train.parquet:8", "7", "options"),
    ]
    assert [row.id for row in load_source(folder)] == ["0", "3", "6", "8", "9"]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_cut_off_image_is_a_bad_row(tmp_path, form):
    whole = picture(0, (200, 200), form)
    for i, data in enumerate([whole, whole[:-4000], b"GIF89a"]):
        (tmp_path / f"{i}.img").write_bytes(data)
    lines = [
        json.dumps({"image": f"{i}.img", "question": "?", "answer": "x", "answer_form": "na"})
        for i in range(3)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    folder = prepare("mine", tmp_path / "mine.jsonl", tmp_path / "data", max_bad_fraction=0.7)
    assert [row.id for row in load_source(folder)] == ["mine.jsonl:1"]


def test_the_training_set_serves_a_training_run(tmp_path):
    """Which gives a source the options of a file."""
    path = write_parquet(tmp_path / "train.parquet", [p2r_record(i) for i in range(5)])
    folder = prepare("p2r_10k", path, tmp_path / "data", limit=3)
    source = load_source(folder, max_bad_fraction=0.1, bad_rows=tmp_path)
    assert [row.meta["index"] for row in source] == [0, 1, 2]
    with pytest.raises(SourceError, match="colour"):
        load_source(folder, colour="red")


def test_a_name_that_is_not_prepared_says_what_to_run(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(SourceError, match=f"run: p2r data prepare {name} --source DOWNLOADED"):
            load_source(name, folder=tmp_path)


@pytest.mark.parametrize("name", ["hrbench4k", "a b"])
def test_an_unknown_name_lists_the_known(tmp_path, name):
    with pytest.raises(
        SourceError, match=rf"unknown dataset '{name}': use one of vstar, hrbench_4k"
    ):
        prepare(name, tmp_path, tmp_path / "data")


def test_a_source_can_be_pickled_and_read_by_threads(tmp_path, hrbench):
    folder = prepare("hrbench_4k", hrbench, tmp_path / "data")
    source = pickle.loads(pickle.dumps(PreparedSource(folder)))
    row = pickle.loads(pickle.dumps(source[5]))
    assert (row, row.image_source()) == (source[5], source[5].image_source())
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: source[i % 12].image_source(), range(96)))
    assert read == [picture(i % 12 // 4, form="JPEG") for i in range(96)]
    assert source[-1].image_source() == source[11].image_source()
    with pytest.raises(IndexError):
        source[12]


# --- once only, and interrupted -----------------------------------------------------------------


def test_the_same_again_does_nothing_and_something_else_is_refused(tmp_path, hrbench, capsys):
    out = tmp_path / "data"
    before = prepare("hrbench_4k", hrbench, out).stat().st_mtime_ns
    assert prepare("hrbench_4k", hrbench, out).stat().st_mtime_ns == before
    assert "is prepared already" in capsys.readouterr().out
    with pytest.raises(SourceError, match=r"was prepared from .* with limit None; remove it"):
        prepare("hrbench_4k", hrbench, out, limit=4)
    (tmp_path / "other" / "hrbench_4k").mkdir(parents=True)
    with pytest.raises(SourceError, match="is no prepared dataset; use another --out"):
        prepare("hrbench_4k", hrbench, tmp_path / "other")


def test_two_processes_do_not_prepare_the_same(tmp_path, hrbench):
    import fcntl

    out = tmp_path / "data"
    out.mkdir()
    with open(out / ".hrbench_4k.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(SourceError, match="another process prepares hrbench_4k"):
            prepare("hrbench_4k", hrbench, out)
    prepare("hrbench_4k", hrbench, out)


def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path):
    """Killed while it writes; the same command then succeeds and leaves no remains."""
    # Bytes after the end of a JPEG make it large, not slow.
    images = [picture(i, form="JPEG") + os.urandom(2**22) for i in range(12)]
    lines = []
    for i, image in enumerate(images):
        (tmp_path / f"{i}.jpg").write_bytes(image)
        row = {"image": f"{i}.jpg", "question": "?", "answer": "x", "answer_form": "free_form"}
        lines.append(json.dumps(row))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    out = tmp_path / "data"
    # It waits at the last image, of a pipe into which nobody writes.
    (tmp_path / "11.jpg").unlink()
    os.mkfifo(tmp_path / "11.jpg")
    source, target = tmp_path / "mine.jsonl", out
    code = "import sys; from pathlib import Path; from p2r_jax.data.prepare import prepare; "
    code += "prepare('mine', Path(sys.argv[1]), Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(target)])
    written: list[Path] = []
    give_up = time.monotonic() + 120
    while process.poll() is None and not written and time.monotonic() < give_up:
        time.sleep(0.02)
        written = [p for p in out.rglob("*array_record*") if p.stat().st_size > 0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert written, "it ended before it wrote"
    assert not (out / "mine").exists()
    for folder in out.rglob("*"):
        with pytest.raises(SourceError):
            load_source(folder)

    (tmp_path / "11.jpg").unlink()
    (tmp_path / "11.jpg").write_bytes(images[11])
    prepare("mine", tmp_path / "mine.jsonl", out)
    assert [row.image_source() for row in load_source(out / "mine")] == images
    assert sorted(p.name for p in out.iterdir()) == [".mine.lock", "mine"]


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Two of three files of examples are written, and the reading of the ninth image ends it all.
    Returns the source, and the bytes of images that were checked since."""
    monkeypatch.setattr(builders, "SHARD", 3)
    checked, whole = [], builders._size
    lines = []
    for i in range(9):
        image = b"no image" if i == 1 else picture(i, form="JPEG")
        (tmp_path / f"{i}.jpg").write_bytes(image)
        row = {"image": f"{i}.jpg", "question": "?", "answer": "x", "answer_form": "na"}
        lines.append(json.dumps(row | {"id": str(i)}))
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(lines))

    def size(encoded: bytes):
        if encoded == picture(8, form="JPEG"):
            raise KeyboardInterrupt
        return whole(encoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "_size", size)
        with pytest.raises(KeyboardInterrupt):
            prepare("mine", source, tmp_path / "data", max_bad_fraction=0.5)

    def count(encoded: bytes):
        checked.append(encoded)
        return whole(encoded)

    monkeypatch.setattr(builders, "_size", count)
    return source, checked


def assert_whole(folder: Path) -> None:
    """All rows but the bad one, with their images, in files of three."""
    rows = list(load_source(folder))
    assert [row.id for row in rows] == ["0", "2", "3", "4", "5", "6", "7", "8"]
    assert [row.image_source() for row in rows] == [picture(int(r.id), form="JPEG") for r in rows]
    bad = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [(b["row"], b["field"]) for b in bad] == [("mine.jsonl:2", "image")]
    about = json.loads((folder / "prepared.json").read_text())
    assert (about["rows"], about["bad"], about["images"]) == (8, 1, 8)
    assert len(list(folder.glob("1.0.0/*array_record*"))) == 3


def test_an_interrupted_preparation_goes_on_after_its_last_whole_file(interrupted, capsys):
    source, checked = interrupted
    folder = prepare("mine", source, source.parent / "data", max_bad_fraction=0.5)
    assert "going on after 7 records" in capsys.readouterr().out
    assert checked == [picture(i, form="JPEG") for i in (7, 8)]
    assert_whole(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == [".mine.lock", "mine"]


@pytest.mark.parametrize("change", ["source", "limit", "between"])
def test_it_starts_anew_if_it_would_be_another(interrupted, change):
    """Of a source that has changed, with another limit, or killed between the examples and the
    note that they are there."""
    source, checked = interrupted
    out, limit = source.parent / "data", None
    if change == "source":
        os.utime(source, ns=(1, 1))
    elif change == "limit":
        limit = 9
    else:
        file = out / ".mine.preparing" / "progress.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps(state | {"index": state["index"][:3], "read": 4}))
    assert_whole(prepare("mine", source, out, limit=limit, max_bad_fraction=0.5))
    assert len(checked) == 9


def test_a_damaged_index_is_noticed(tmp_path, hrbench):
    folder = prepare("hrbench_4k", hrbench, tmp_path / "data")
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(SourceError, match=r"is damaged: rows\.jsonl has 11 rows"):
        load_source(folder)


# --- showing ------------------------------------------------------------------------------------


def test_show_prints_rows_and_draws_their_boxes(tmp_path, capsys):
    prepare("vstar", vstar_folder(tmp_path / "V-Star"), tmp_path / "data")
    capsys.readouterr()
    pictures = tmp_path / "pictures"
    command = ["data", "show", "vstar", "--folder", tmp_path / "data", "--out", pictures]
    assert run(*command, "--index", 1) == 0
    text = capsys.readouterr().out
    for line in ("[1] direct_attributes", "C. dark brown", "answer: B (mca)", "image: 40 x 30"):
        assert line in text.splitlines()
    assert "box: 250.0, 200.0, 750.0, 300.0 of 1000" in text
    (file,) = pictures.iterdir()
    with Image.open(file) as drawn:
        reds = np.argwhere((np.asarray(drawn).astype(int) - [255, 0, 0]).__abs__().sum(-1) < 150)
    top, left = reds.min(0)
    bottom, right = reds.max(0)
    assert abs(left - 10) <= 2
    assert abs(right - 30) <= 2
    assert abs(top - 6) <= 2
    assert abs(bottom - 9) <= 4

    assert run(*command, "--limit", 2) == 0
    assert capsys.readouterr().out.count("answer:") == 2
    assert run(*command, "--index", 9) == 2
    assert "--index must be 0 to 2" in capsys.readouterr().err
