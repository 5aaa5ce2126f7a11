"""`p2r train --dry-run`: what it tells, what it refuses, and that it leaves nothing in the way."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from p2r_jax import cli
from p2r_jax import config as cfg
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.rl import dry_run as dry
from p2r_jax.rl import experience, launch
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.boxes import Box, parse_response
from p2r_jax.roles.evidence import gather_evidence
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets, RequestBuilder
from tests.rl.dry_runs import BUCKETS, SIDES, settings, write_rows
from tests.rl.tiny_run import GROUP, PROMPTS


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "140")  # Tables keep their lines.
        yield


def command(config: cfg.TrainConfig, folder: Path, option: str = "--dry-run") -> tuple[int, str]:
    """Exit code, and all that was printed."""
    file, printed = folder / "config.yaml", io.StringIO()
    launch.write_config(config, folder)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = cli.main(["train", "--config", str(file), option])
    return code, printed.getvalue()


class Done:
    """A dry run that went through."""

    def __init__(self, folder: Path, model: Path):
        self.data = write_rows(folder / "data")
        self.run = folder / "run"
        self.config = settings(self.run, model, self.data)
        self.code, self.text = command(self.config, folder)
        self.folder = self.run / dry.FOLDER

    def table(self, title: str) -> str:
        """What is printed from a title to the next."""
        return self.text.split(title)[1].split("\n\n")[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_checkpoint) -> Done:
    return Done(tmp_path_factory.mktemp("dry"), tiny_checkpoint)


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    file = run / "samples" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


class TestTells:
    def test_it_goes_through(self, done):
        assert done.code == 0, done.text
        assert "Traceback" not in done.text

    def test_the_schedule(self, done):
        lines = done.table("schedule").splitlines()
        first, second = (next(x for x in lines if role in x) for role in ("perceiver", "reasoner"))
        assert " ".join(first.split()) == "1 perceiver 1 1 4 × 2 5 / 5 1 0.001"
        assert second.split()[:2] == ["2", "reasoner"]

    def test_the_prompts(self, done):
        table = done.table("prompts of 4 rows of data.train")
        assert re.search(r"^perceiver +tokens( +[\d.]+){3} +128:4 *$", table, re.M)
        assert re.search(r"^ +patches( +[\d.]+){3} +320:4 *$", table, re.M)
        assert re.search(r"^source image +px a side +300 +363.0 +384 +384:4 *$", table, re.M)
        validation = done.table("prompts of 4 rows of data.validation")
        assert re.search(r"^reasoner, 3 crops +tokens ", validation, re.M)
        assert "direct" not in validation

    def test_the_memory(self, done):
        table = done.table("phase 2 reasoner")
        for line in ("trained weights", "optimizer", "snapshot", "weights of the partner"):
            assert re.search(rf"^{line}.* +[\d.]+ MiB", table, re.M), line
        assert re.search(r"^the device has +unknown", table, re.M)
        assert "Activations come on top" in " ".join(table.split())

    def test_the_rewards(self, done):
        table = done.table("a small batch of each phase")
        shown = re.search(r"^reward +(\S+) +(\S+)", table, re.M).groups()
        for step, reward in zip((1, 2), shown, strict=True):
            own = [row["reward"] for row in samples(done.folder, step)]
            assert len(own) == PROMPTS * GROUP
            assert f"{np.mean(own):.2f}" == reward
        assert re.search(r"^answers in their tag +0% +0%", table, re.M)
        assert re.search(r"^box lists well formed +100% +100%", table, re.M)
        assert re.search(r"^cut at max_new_tokens +\d+% +\d+%", table, re.M)

    def test_as_few_questions_as_are_asked_for(self, tmp_path, done, tiny_checkpoint):
        config = settings(tmp_path / "run", tiny_checkpoint, done.data)
        with contextlib.redirect_stdout(io.StringIO()):
            measured = dry.dry_run(config, questions=1, scanned=2)
        assert list(measured) == ["1 perceiver", "2 reasoner"]
        assert measured["1 perceiver"]["completions"] == GROUP
        few, many = (samples(run, 1) for run in (tmp_path / "run/dry_run", done.folder))
        assert [r["completion"] for r in few] == [r["completion"] for r in many[:GROUP]]

    def test_controls_have_batches_too(self, tmp_path, done, tiny_checkpoint):
        config = settings(tmp_path / "run", tiny_checkpoint, done.data)
        config.phases = [
            dataclasses.replace(config.phases[0], role=role) for role in ("joint", "baseline")
        ]
        code, text = command(config, tmp_path)
        assert code == 0, text
        assert "1 joint, perceiver  1 joint, reasoner  2 baseline" in text
        folder = tmp_path / "run/dry_run"
        roles = [dict.fromkeys(row["role"] for row in samples(folder, n)) for n in (1, 2)]
        assert [list(own) for own in roles] == [["perceiver", "reasoner"], ["baseline"]]
        assert (folder / "pictures/2_baseline_row_0_0.png").is_file()

    def test_warnings_where_nothing_can_be_learned(
        self, tmp_path, monkeypatch, done, tiny_checkpoint
    ):
        """Random weights babble to the limit, and real rules give them nothing."""
        monkeypatch.setattr(launch, "Grader", Grader)
        monkeypatch.setattr(experience, "parse_response", parse_response)
        config = settings(tmp_path / "run", tiny_checkpoint, done.data)
        code, text = command(config, tmp_path, "--dry_run")
        assert code == 0
        assert "warning: phase 1 perceiver: the rewards of every group agree" in text
        cut = {r["truncated"] for r in samples(tmp_path / "run/dry_run", 1)}
        assert ("phase 1 perceiver: every completion was cut" in text) == (cut == {True})

    def test_pictures_are_what_the_model_gets(self, tiny_checkpoint):
        processor = Processor.from_pretrained(tiny_checkpoint)
        buckets = Buckets.of(BUCKETS)
        builder = RequestBuilder(processor, load_prompt_set("tiny"), buckets)
        image = VisualSearch()[0].load_image()[:384, :300]
        store = ImageStore.upload([image], buckets)
        request = builder.reasoner(store, 0, "red?", "mca", [Box((100, 100, 400, 300), "x")])
        views = dry.seen_images(builder.collate([request], store), 0, 8)
        assert len(views) == len(request.views) == 2
        crop = request.views[1]
        size = crop.target[::-1]
        assert views[1].size == size
        expected = Image.fromarray(image).crop(crop.crop).resize(size, Image.Resampling.BICUBIC)
        gap = np.abs(np.asarray(views[1], np.int32) - np.asarray(expected, np.int32))
        assert gap.max() <= 2
        assert gap.mean() < 0.1


class TestLeaves:
    def test_nothing_but_its_own_folder(self, done):
        assert [path.name for path in done.run.iterdir()] == ["dry_run"]
        names = {path.name for path in done.folder.iterdir()}
        assert names == {"index.html", "pictures", "samples", "summary.json"}

    @pytest.mark.parametrize("step, name", [(1, "1_perceiver"), (2, "2_reasoner")])
    def test_pictures_of_each_question(self, done, tiny_checkpoint, step, name):
        sizes = Processor.from_pretrained(tiny_checkpoint).sizes
        for i, side in enumerate(SIDES):
            record = next(r for r in samples(done.folder, step) if r["id"] == f"row {i}")
            boxes = [Box(tuple(box), "") for box in record["boxes"]]
            views = gather_evidence(*side, boxes, sizes).views
            files = sorted((done.folder / "pictures").glob(f"{name}_row_{i}_*.png"))
            assert [Image.open(file).size[::-1] for file in files] == [v.target for v in views]

    def test_one_page_that_needs_no_other_file(self, done):
        page = (done.folder / "index.html").read_text()
        assert "dry run, nothing was trained" in page
        assert all(f"row {i}" in page for i in range(4))
        assert f"Find: {VisualSearch()[0].question}" in page
        assert "data:image/jpeg;base64," in page
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)

    def test_the_real_run_begins_as_if_there_had_been_no_other(self, done):
        """And its first step asks, and gets, what the dry run showed."""
        with contextlib.redirect_stdout(io.StringIO()):
            launch.train(done.config)
        assert (done.run / "config.yaml").is_file()
        rows = (done.run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows if "grad_norm" in row] == [1, 2]
        made = samples(done.run, 1)
        assert samples(done.folder, 1) == made
        tokens = {row["id"]: row["prompt_tokens"] for row in made}.values()
        table = done.table("prompts of 4 rows of data.train")
        shown = re.search(r"^perceiver +tokens +(\S+) +(\S+) +(\S+) ", table, re.M).groups()
        assert shown == (f"{min(tokens)}", f"{np.mean(list(tokens)):.1f}", f"{max(tokens)}")
        worst = int(re.search(r"^reasoner, 3 crops +tokens +\d+ +\S+ +(\d+)", table, re.M)[1])
        assert max(row["prompt_tokens"] for row in samples(done.run, 2)) <= worst

        code, text = command(done.config, done.run.parent)
        assert code == 0
        assert "holds checkpoints: the real run goes on from them" in text


# --- what it refuses ------------------------------------------------------------------------------


def begins(*args: Any) -> None:
    """In place of the long work."""
    raise AssertionError("long work begins")


@pytest.fixture
def refused(tmp_path, monkeypatch, tiny_checkpoint):
    """Makes a dry run that must end with one line before weights are read; returns the line."""
    monkeypatch.setattr(Trainer, "prepare", begins)

    def run(**changes: Any) -> str:
        data = write_rows(tmp_path / "data", **changes.pop("rows", {}))
        code, text = command(settings(tmp_path / "run", tiny_checkpoint, data, **changes), tmp_path)
        assert code == 2
        assert "Traceback" not in text
        (line,) = [line for line in text.splitlines() if line.startswith("p2r train: ")]
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return line

    return run


FREE_TEXT = {"answer_form": "free_form", "options": []}


def test_a_wrong_image_folder(refused, tmp_path):
    line = refused(rows={"image": "elsewhere/0.png"})
    assert "data.train" in line
    assert f"file not found: {tmp_path}/data/elsewhere/0.png" in line
    assert "Relative paths of images start at the folder of the file" in line


def test_a_prompt_over_budget(refused):
    line = refused(buckets=dataclasses.replace(BUCKETS, patches=[100]))
    assert "exceeds buckets.patches = [100]" in line


def test_images_that_do_not_fit_a_device(refused):
    line = refused(buckets=dataclasses.replace(BUCKETS, image_gib=2**-13))
    assert re.search(r"row 'row \d' has \d+ × \d+ pixels, so every image of its batch", line)
    assert "more than buckets.image_gib = 0.00012207" in line


def test_a_verifier_that_cannot_be_reached(refused):
    pytest.importorskip("openai")
    verifier = cfg.VerifierConfig(
        kind="endpoint", base_url="http://127.0.0.1:9/v1", model="judge", attempts=1
    )
    line = refused(rows=FREE_TEXT, verifier=verifier)
    assert "verifier.base_url http://127.0.0.1:9/v1: cannot be reached" in line


def test_free_text_without_a_verifier(refused):
    assert "verifier" in refused(rows=FREE_TEXT)


def test_a_mesh_that_does_not_fit(refused, monkeypatch):
    monkeypatch.setattr(launch, "make_mesh", make_mesh)
    line = refused(mesh=cfg.MeshConfig(data=3, fsdp=1))
    assert "mesh {'data': 3, 'fsdp': 1, 'tensor': 1} does not fit 8 device(s)" in line


def test_a_folder_of_a_run_with_other_settings(refused, tmp_path, tiny_checkpoint):
    (tmp_path / "run").mkdir()
    other = settings(tmp_path / "run", tiny_checkpoint, tmp_path / "data/rows.jsonl")
    launch.write_config(other, tmp_path / "run")
    assert "was started with other settings (seed)" in refused(seed=1)


def test_a_model_that_cannot_judge(tmp_path, monkeypatch, tiny_checkpoint):
    """Known once it has its weights, before anything is collected."""
    monkeypatch.setattr(Trainer, "_collect", begins)
    data, verifier = write_rows(tmp_path / "data", **FREE_TEXT), cfg.VerifierConfig(kind="model")
    config = settings(tmp_path / "run", tiny_checkpoint, data, verifier=verifier)
    code, text = command(config, tmp_path)
    assert code == 2
    assert "verifier.kind 'model': this model cannot judge" in text
    assert "Traceback" not in text


def test_too_little_memory(refused, monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 12 bytes")

    monkeypatch.setattr(Trainer, "prepare", full)
    assert "the devices have too little memory" in refused()


def test_a_warning_if_a_device_is_too_small(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(dry, "device_bytes", lambda: 2**20)
    monkeypatch.setattr(Trainer, "prepare", begins)
    config = settings(tmp_path / "run", tiny_checkpoint, write_rows(tmp_path / "data"))
    code, text = command(config, tmp_path)
    assert code == 1
    assert re.search(r"warning: phase 1 needs [\d.]+ MiB of 1.00 MiB in the \w+: \w+", text)
