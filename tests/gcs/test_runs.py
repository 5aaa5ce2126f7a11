"""Data, records and runs in Google Cloud Storage, against a server on this machine."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax import nnx
from PIL import Image

from p2r_jax.data import prepared
from p2r_jax.data.loader import LoadedRow
from p2r_jax.data.prepare import prepare
from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import SourceError, load_source
from p2r_jax.evals.record_file import EvalWriter
from p2r_jax.evals.report import write_report
from p2r_jax.evals.score import read_records, score_file
from p2r_jax.paths import files_in
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.rl import launch
from p2r_jax.rl.checkpointing import Checkpoints, SavedWeights
from p2r_jax.rl.convert import to_hf
from tests.gcs.killed_run import config_of
from tests.gcs_server import start
from tests.rl import runs
from tests.rl.tiny_run import metric_rows


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, image: object) -> dict[str, object]:
    answer = {"question": f"Which {number}?", "answer": "B", "answer_form": "mca"}
    return {"id": f"q{number}", **answer, "options": ["red", "blue"], "image": image}


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


class TestData:
    def test_parquet_with_its_images(self, folder):
        rows = [row(i, {"bytes": picture(i)}) for i in range(6)]
        buffer = io.BytesIO()
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, buffer, row_group_size=2)
        (folder / "rows.parquet").write_bytes(buffer.getvalue())
        source = load_source(str(folder / "rows.parquet"))
        assert [source[i].id for i in range(6)] == [f"q{i}" for i in range(6)]
        assert source[5].load_image()[0, 0, 0] == 5

    def test_lines_with_images_beside_them(self, folder, server, tmp_path):
        for i in range(3):
            (folder / "images" / f"{i}.png").write_bytes(picture(i))
        rows = [row(i, f"images/{i}.png") for i in range(4)]
        write_lines(folder / "rows.jsonl", [*rows, row(5, str(folder / "images" / "2.png"))])
        source = load_source(
            str(folder / "rows.jsonl"), max_bad_fraction=0.5, bad_rows=str(folder / "bad")
        )
        bad = json.loads((folder / "bad" / "bad_rows.jsonl").read_text())
        assert (len(source), bad["id"], bad["problem"][:14]) == (4, "q3", "file not found")
        server.reads.clear()
        assert source[2].id == "q2"
        assert sum(size for _, size in server.reads) == len(json.dumps(rows[2])) + 1
        assert [source[i].load_image()[0, 0, 0] for i in range(4)] == [0, 1, 2, 2]
        (folder / "images" / "1.png").unlink()
        with pytest.raises(RowError, match=r"'q1'.*file not found: gs://"):
            source[1].load_image()

    def test_a_prepared_dataset_is_copied_here_once(self, folder, server, tmp_path, monkeypatch):
        monkeypatch.setenv(prepared.CACHE_VARIABLE, str(tmp_path / "cache"))
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(picture(i))
        write_lines(tmp_path / "rows.jsonl", [row(i, f"{i}.png") for i in range(3)])
        made = prepare("mine", tmp_path / "rows.jsonl", folder)
        assert prepare("mine", tmp_path / "rows.jsonl", folder) == made == folder / "mine"
        assert (made / prepared.MARK).is_file()
        source = load_source(str(made))
        assert [source[i].load_image()[0, 0, 0] for i in range(3)] == [0, 1, 2]
        server.reads.clear()
        assert len(load_source(str(made))) == 3
        assert {name.rsplit("/")[-1] for name, _ in server.reads} == {prepared.MARK}

    def test_a_copy_that_did_not_come_whole_is_none(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv(prepared.CACHE_VARIABLE, str(tmp_path / "cache"))
        (folder / prepared.INDEX).write_text("{}\n" * 5)
        (folder / prepared.MARK).write_text("{}")

        def short(source, target):
            target.write_bytes(source.read_bytes()[:3])

        monkeypatch.setattr(prepared, "copy_file", short)
        with pytest.raises(SourceError, match=r"did not come whole.*set P2R_CACHE"):
            load_source(str(folder))
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


class TestRecords:
    LOADED = LoadedRow(Row("q", "Which?", "B", "mca"), np.zeros((6, 8, 3), np.uint8))

    def record(self, number: int) -> dict[str, object]:
        record = {"id": f"q{number}", "mode": "default", "correct": 1.0, "answer": "B"}
        return record | {"boxes": [], "answer_form": "mca", "reasoner_text": "B", "category": ""}

    def test_of_a_killed_evaluation_are_taken_up_again(self, folder, monkeypatch):
        writer = EvalWriter(folder, "e", pictures=1, fingerprint={"a": 1})
        for number in range(3):
            writer(self.record(number), self.LOADED)
        assert read_records(folder / "eval" / "e.jsonl").records == []
        monkeypatch.setattr("p2r_jax.evals.record_file.BUCKET_SECONDS", 0.0)
        writer(self.record(3), self.LOADED)  # Some time later: all four are sent.
        monkeypatch.undo()
        writer(self.record(4), self.LOADED)  # Lost.
        with pytest.raises(ValueError, match="another a"):
            EvalWriter(folder, "e", 1, {"a": 2}, resume=True)
        rest = EvalWriter(folder, "e", 1, {"a": 1}, resume=True)
        assert [record["id"] for record in rest.earlier] == ["q0", "q1", "q2", "q3"]
        rest(self.record(4), self.LOADED)
        summary = rest.finish([*rest.earlier, self.record(4)])
        records = read_records(folder / "eval" / "e.jsonl").records
        assert [record["id"] for record in records] == [f"q{i}" for i in range(5)]
        assert summary["modes"]["default"]["n"] == 5
        (image,) = (folder / "eval" / "images").iterdir()
        assert Image.open(io.BytesIO(image.read_bytes())).size == (8, 6)

        scored = score_file(str(folder / "eval" / "e.jsonl"), out=str(folder / "score"))
        assert scored["modes"]["default"]["accuracy"] == 1.0
        assert "e.csv" in files_in(folder / "score")
        page = write_report(str(folder))
        assert str(page) == str(folder / "report.html")
        assert b"data:image/jpeg" in page.read_bytes()

    def test_another_start_begins_anew(self, folder):
        for name in ("old", "new"):
            writer = EvalWriter(folder, "e", 0)
            writer(self.record(0) | {"id": name}, self.LOADED)
            writer.finish([self.record(0)])
        (record,) = read_records(folder / "eval" / "e.jsonl").records
        assert record["id"] == "new"


class TestTraining:
    @pytest.mark.slow
    def test_killed_and_resumed_it_equals_a_local_run(
        self, folder, server, tiny_checkpoint, compiled_programs, tmp_path
    ):
        """By SIGKILL as soon as the first step's checkpoint is whole."""
        with runs.small_world(compiled_programs):
            whole = runs.Run(config_of(str(tmp_path / "run"), tiny_checkpoint))
            process = start("-m", "tests.gcs.killed_run", str(folder), str(tiny_checkpoint))
            commit = f"{folder.name}/checkpoints/1/commit_success.txt"
            deadline = time.monotonic() + 300
            try:
                while commit not in server.buckets["bucket"]:
                    assert process.poll() is None, process.stdout.read()
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
            finally:
                process.kill()
                process.wait()
            assert not (folder / "export").exists()
            # What a kill in the middle of the next one leaves.
            (folder / "checkpoints" / "2" / "state" / "half").write_bytes(b"half")
            launch.train(config_of(str(folder), tiny_checkpoint))
        runs.assert_same_outcome(folder, whole)
        assert [r["step"] for r in metric_rows(folder) if "reward/mean" in r] == [1, 2]
        local, remote = (files_in(run) for run in (tmp_path / "run", folder))
        kept = [
            {n for n in names if not n.startswith(("checkpoints", "tensorboard"))}
            for names in (local, remote)
        ]
        assert kept[0] == kept[1]
        events = {n: s for n, s in remote.items() if n.startswith("tensorboard")}
        assert events
        assert min(events.values()) > 100

        assert SavedWeights.find(folder).step == 2
        to_hf(str(folder), str(folder / "again"), "float32")
        weights = (folder / "export" / "model.safetensors").read_bytes()
        assert (folder / "again" / "model.safetensors").read_bytes() == weights
        with pytest.raises(ValueError, match="no checkpoint of step 7; there are"):
            SavedWeights.find(folder, 7)


def test_a_torn_checkpoint_is_set_aside(folder, tiny_checkpoint):
    from p2r_jax import config as cfg
    from p2r_jax.rl.checkpointing import abstract
    from p2r_jax.rl.optimizer import make_optimizer
    from p2r_jax.rl.schedule import Progress
    from p2r_jax.rl.step import new_state

    params = nnx.state(load_pretrained(tiny_checkpoint, dtype="float32"), nnx.Param)
    state = new_state(params, make_optimizer(cfg.OptimizerConfig(), 10))
    told: list[str] = []

    def opened() -> Checkpoints:
        settings = {"model": {"path": "tiny"}}
        return Checkpoints(folder, cfg.CheckpointConfig(), settings, told.append)

    checkpoints = opened()
    for step in (1, 2):
        checkpoints.save(Progress(0, step, step, 0), state, params)
    checkpoints.close()
    data = folder / "checkpoints" / "2" / "state" / "d"
    sizes = files_in(data)
    (data / max(sizes, key=sizes.get)).write_bytes(b"torn")
    (folder / "checkpoints" / "3" / "half").write_bytes(b"")
    progress, *_ = opened().restore(abstract(state), abstract(params))
    assert progress.step == 1
    assert told[0] == "the checkpoint of step 3 was not finished; it is removed"
    assert "step 2 cannot be read and is skipped" in told[-1]
    assert "commit_success.txt" in files_in(folder / "torn_checkpoints" / "2")
    assert not (folder / "checkpoints" / "2").exists()
