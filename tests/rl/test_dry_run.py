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
from rich.console import Console

from p2r_jax import cli
from p2r_jax import config as cfg
from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.parallel.mesh import for_decoding, make_mesh
from p2r_jax.qwen3_vl.processor import ImageSizes, Processor
from p2r_jax.rl import dry_run as dry
from p2r_jax.rl import experience, launch
from p2r_jax.rl.experience import phase_sampling
from p2r_jax.rl.optimizer import make_optimizer, optimizer_bytes
from p2r_jax.rl.step import new_state
from p2r_jax.roles.boxes import Box, parse_response
from p2r_jax.roles.evidence import gather_evidence
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets, ImageStore, RequestBuilder
from p2r_jax.rollout.engine import empty_slots
from tests.rl.tiny_run import GROUP, PROMPTS, make_config, patches

SIDES = [(384, 384), (384, 200), (150, 384), (300, 260)]
"""Heights and widths of the images; their prompts differ in length."""
BUCKETS = cfg.BucketConfig(patches=[320], prompt_tokens=[128], canvas=[448], image=[384])
"""Large enough for three crops."""


@pytest.fixture(scope="module", autouse=True)
def _small_world(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in patches():
            patch.setattr(where, name, value)
        # Tables keep their lines.
        patch.setenv("COLUMNS", "140")
        yield


def write_rows(folder: Path, **changes: Any) -> Path:
    """Four rows, a batch, with an image file each."""
    source, lines = VisualSearch(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(SIDES):
        row = source[i]
        picture = Image.fromarray(row.load_image()[:height, :width])
        picture.save(folder / "images" / f"{i}.png")
        record = {"id": f"row {i}", "image": f"images/{i}.png", "question": row.question}
        record |= {"answer": row.answer, "answer_form": "mca", "options": list(row.options)}
        lines.append(json.dumps(record | changes))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def settings(run: Path, model: Path, data: Path, **changes: Any) -> cfg.TrainConfig:
    """A step of each role, of all rows."""
    config = make_config(run, model)
    changes.setdefault("buckets", BUCKETS)
    return dataclasses.replace(
        config,
        phases=[dataclasses.replace(phase, steps=1) for phase in config.phases],
        data=cfg.DataConfig(train=str(data), validation=str(data)),
        log=cfg.LogConfig(tensorboard=False, sample_prompts=PROMPTS),
        eval=dataclasses.replace(config.eval, every=0),
        export=False,
        **changes,
    )


def command(config: cfg.TrainConfig, folder: Path, option: str = "--dry-run") -> tuple[int, str]:
    """Exit code, and all that was printed."""
    file, printed = folder / "config.yaml", io.StringIO()
    cli.dump_config(config, file)
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


# --- what it tells --------------------------------------------------------------------------------


class TestTells:
    def test_it_goes_through(self, done):
        assert done.code == 0, done.text
        assert "Traceback" not in done.text

    def test_the_schedule(self, done):
        lines = done.table("schedule").splitlines()
        first, second = (next(x for x in lines if role in x) for role in ("perceiver", "reasoner"))
        assert first.split() == ["1", "perceiver", "1", "1", "4", "×", "2", "5", "/", "5", "1",
                                 "0.001"]  # fmt: skip
        assert second.split()[:2] == ["2", "reasoner"]

    def test_the_prompts(self, done, tiny_checkpoint):
        """Of all four rows, counted again here."""
        processor = Processor.from_pretrained(tiny_checkpoint)
        builder = RequestBuilder(
            processor, load_prompt_set("tiny"), Buckets.of(done.config.buckets)
        )
        store = dataclasses.replace(ImageStore.empty(), shapes=tuple(SIDES))
        source = VisualSearch()
        plain = [
            builder.plain("perceiver", store, i, source[i].question_with_options, "mca")
            for i in range(4)
        ]
        lengths = [len(request.tokens) for request in plain]
        assert len(set(lengths)) > 1
        table = done.table("prompts of 4 rows of data.train").splitlines()
        at = next(i for i, line in enumerate(table) if line.startswith("perceiver"))
        assert table[at].split()[1:] == [
            "tokens", f"{min(lengths)}", f"{np.mean(lengths):.1f}", f"{max(lengths)}", "128:4",
        ]  # fmt: skip
        counts = [
            sum(h * w for h, w in [processor.sizes.grid(v.target) for v in request.views])
            for request in plain
        ]
        assert table[at + 1].split() == [
            "patches", f"{min(counts)}", f"{np.mean(counts):.1f}", f"{max(counts)}", "320:4",
        ]  # fmt: skip
        assert any(re.match(r"source image +side, px +300 .* 384 +384:4", line) for line in table)
        assert "direct" not in done.table("prompts of 4 rows of data.validation")

    def test_the_memory(self, done):
        table = done.table("phase 2 reasoner")
        for line in ("trained weights", "optimizer", "snapshot", "weights of the partner"):
            assert re.search(rf"^{line} +[\d.]+ MiB", table, re.MULTILINE), line
        assert re.search(r"ring cache of the perceiver +[\d.]+ MiB +64 slots × 1 × 8", table)
        assert re.search(r"most +[\d.]+ MiB +the backend does not say its size", table)
        assert "Activations come on top" in " ".join(table.split())

    def test_the_rewards(self, done):
        rows = [r for step in (1, 2) for r in samples(done.folder, step)]
        table = done.table("a small batch of each phase")
        for role, shown in zip(
            ("perceiver", "reasoner"),
            re.search(r"^reward +(\S+) +(\S+)", table, re.MULTILINE).groups(),
            strict=True,
        ):
            own = [row["reward"] for row in rows if row["role"] == role]
            assert len(own) == PROMPTS * GROUP
            assert f"{np.mean(own):.2f}" == shown
        assert re.search(r"^answers in their tag +0% +0%", table, re.MULTILINE)
        assert re.search(r"^box lists well formed +100% +100%", table, re.MULTILINE)
        assert re.search(r"^cut at max_new_tokens +\d+% +\d+%", table, re.MULTILINE)

    def test_what_it_returns_and_how_many_questions(self, tmp_path, done, tiny_checkpoint):
        """A batch is no larger than a step's, and is asked for in the signature."""
        config = settings(tmp_path / "run", tiny_checkpoint, done.data)
        with contextlib.redirect_stdout(io.StringIO()):
            measured = dry.dry_run(config, questions=1, scanned=2)
        assert list(measured) == ["1 perceiver", "2 reasoner"]
        assert measured["1 perceiver"]["completions"] == GROUP
        first = [
            {k: v for k, v in row.items() if "/" not in str(v)}
            for row in samples(tmp_path / "run/dry_run", 1)
        ]
        assert [row["completion"] for row in first] == [
            row["completion"] for row in samples(done.folder, 1)[:GROUP]
        ]

    def test_controls_have_batches_too(self, tmp_path, done, tiny_checkpoint):
        config = settings(tmp_path / "run", tiny_checkpoint, done.data)
        config.phases = [
            dataclasses.replace(config.phases[0], role=role) for role in ("joint", "baseline")
        ]
        code, text = command(config, tmp_path)
        assert code == 0, text
        assert "1 joint, perceiver  1 joint, reasoner  2 baseline" in text
        roles = [[r["role"] for r in samples(tmp_path / "run/dry_run", n)] for n in (1, 2)]
        assert [list(dict.fromkeys(own)) for own in roles] == [
            ["perceiver", "reasoner"], ["baseline"],
        ]  # fmt: skip
        assert (tmp_path / "run/dry_run/prompts/baseline.txt").is_file()
        assert (tmp_path / "run/dry_run/pictures/2_baseline_row_0_as_seen.png").is_file()

    def test_warnings_where_nothing_can_be_learned(
        self, tmp_path, monkeypatch, done, tiny_checkpoint
    ):
        """Random weights babble to the limit, and real rules give them nothing."""
        monkeypatch.setattr(launch, "Grader", Grader)
        monkeypatch.setattr(experience, "parse_response", parse_response)
        config = settings(tmp_path / "run", tiny_checkpoint, done.data)
        code, text = command(config, tmp_path, "--dry_run")
        assert code == 0
        assert "phase 1 perceiver: the rewards of every group agree" in text
        cut = {r["truncated"] for r in samples(tmp_path / "run/dry_run", 1)}
        assert ("phase 1 perceiver: every completion was cut at max_new_tokens = 5" in text) == (
            cut == {True}
        )


@pytest.mark.parametrize(
    "values, expected",
    [
        ((0.5, 1.0, 0.0), ["every completion was cut at max_new_tokens = 7"]),
        ((1.0, 0.5, 0.5), ["the rewards of every group agree"]),
        ((0.0, 0.0, 1.0), ["everything that the partner wrote was cut"]),
        ((0.9, 0.9, 0.9), []),
    ],
)
def test_warnings(values, expected):
    names = "reward/zero_variance_groups completion/truncated_fraction partner/truncated_fraction"
    given = list(
        dry._warnings("1", dict(zip(names.split(), values, strict=True)) | {"max_new_tokens": 7})
    )
    assert len(given) == len(expected)
    assert all(text in warning for text, warning in zip(expected, given, strict=True))


# --- what it leaves -------------------------------------------------------------------------------


class TestLeaves:
    def test_nothing_but_its_own_folder(self, done):
        assert [path.name for path in done.run.iterdir()] == ["dry_run"]
        names = {path.name for path in done.folder.rglob("*")}
        assert not names & {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "eval"}

    def test_the_full_prompts(self, done):
        texts = {path.stem: path.read_text() for path in (done.folder / "prompts").iterdir()}
        assert list(sorted(texts)) == [
            "perceiver", "reasoner_with_evidence", "reasoner_without_evidence",
        ]  # fmt: skip
        question = VisualSearch()[0].question_with_options
        assert f"Find: {question}" in texts["perceiver"]
        assert f"Zoomed: {question}" in texts["reasoner_with_evidence"]
        assert f"Whole: {question}" in texts["reasoner_without_evidence"]
        assert texts["reasoner_with_evidence"].count("<|image_pad|>") == 2

    def test_pictures_of_each_question(self, done, tiny_checkpoint):
        folder = done.folder / "pictures"
        assert len(list(folder.glob("1_perceiver_row_*.png"))) == 2 * PROMPTS
        assert len(list(folder.glob("2_reasoner_row_*.png"))) == 2 * PROMPTS
        sizes = Processor.from_pretrained(tiny_checkpoint).sizes
        for i, side in enumerate(SIDES):
            record = next(r for r in samples(done.folder, 2) if r["id"] == f"row {i}")
            boxes = [Box(tuple(box), "") for box in record["boxes"]]
            targets = [view.target for view in gather_evidence(*side, boxes, sizes).views]
            with Image.open(folder / f"2_reasoner_row_{i}_as_seen.png") as seen:
                assert seen.height == max(height for height, _ in targets)
                assert seen.width == sum(width for _, width in targets) + 8 * (len(targets) - 1)

    def test_one_page_that_needs_no_other_file(self, done):
        page = (done.folder / "index.html").read_text()
        assert "dry run, nothing was trained" in page
        assert all(f"row {i}" in page for i in range(4))
        assert "data:image/jpeg;base64," in page
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)

    def test_the_real_run_begins_as_if_there_had_been_no_other(self, done):
        """And its first step asks, and gets, what the dry run showed."""
        with contextlib.redirect_stdout(io.StringIO()):
            launch.train(done.config)
        assert (done.run / "config.yaml").is_file()
        rows = (done.run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows if "grad_norm" in row] == [1, 2]
        shown, made = samples(done.folder, 1), samples(done.run, 1)
        assert shown == made
        lengths = {row["id"]: row["prompt_tokens"] for row in made}
        table = done.table("prompts of 4 rows of data.train")
        assert re.search(
            rf"^perceiver +tokens +{min(lengths.values())} +"
            rf"{np.mean(list(lengths.values())):.1f} +{max(lengths.values())} ",
            table,
            re.MULTILINE,
        )
        worst = int(re.search(r"^reasoner, 3 crops +tokens +\d+ +\S+ +(\d+)", table, re.M)[1])
        assert max(row["prompt_tokens"] for row in samples(done.run, 2)) <= worst

        code, text = command(done.config, done.run.parent)
        assert code == 0
        assert "holds checkpoints, from which the real run goes on" in text


# --- what it refuses ------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, monkeypatch, tiny_checkpoint):
    """Makes a dry run that must end with one line before weights are read; returns the line."""

    def never(*args):
        raise AssertionError("this is long work")

    monkeypatch.setattr(dry, "_load_weights", never)

    def run(data: Path, **changes: Any) -> str:
        config = settings(tmp_path / "run", tiny_checkpoint, data)
        code, text = command(dataclasses.replace(config, **changes), tmp_path)
        assert code == 2
        assert "Traceback" not in text
        (line,) = [line for line in text.splitlines() if line.startswith("p2r train: ")]
        assert not (tmp_path / "run" / "config.yaml").exists()
        return line

    return run


def test_a_wrong_image_folder(refused, tmp_path):
    data = write_rows(tmp_path / "data", image="elsewhere/0.png")
    line = refused(data)
    assert "data.train" in line
    assert f"file not found: {data.parent}/elsewhere/0.png" in line
    assert "Relative paths of images start at the folder of the file" in line


def test_images_that_cannot_be_decoded(refused, tmp_path):
    """Their header is whole, so that only decoding tells."""
    data = write_rows(tmp_path / "data")
    for i in (1, 2):
        file = data.parent / f"images/{i}.png"
        file.write_bytes(file.read_bytes()[:2000])
    line = refused(data)
    assert "data.train: 2 of 4 images cannot be decoded (data.max_bad_fraction allows 1.0%)" in line
    assert all(f"row 'row {i}': cannot decode {data.parent}/images/{i}.png" in line for i in (1, 2))


def test_files_that_are_no_images(refused, tmp_path):
    data = write_rows(tmp_path / "data")
    (data.parent / "images/3.png").write_text("<html>not found</html>")
    assert "row 'row 3': cannot decode" in refused(data)


def test_a_few_bad_images_are_a_warning(tmp_path, tiny_checkpoint):
    data = write_rows(tmp_path / "data")
    (data.parent / "images/3.png").write_text("<html>not found</html>")
    config = settings(tmp_path / "run", tiny_checkpoint, data)
    trainer = launch.build_trainer(config, Console(quiet=True))
    trainer.config.data.max_bad_fraction = 0.25
    console = Console(file=io.StringIO())
    scan = dry.scan_source(trainer, "train", trainer.train_source, ("perceiver",), 4, 4, console)
    assert [row.id for row in scan.rows] == ["row 0", "row 1", "row 2"]
    text = " ".join(console.file.getvalue().split())
    assert "warning: 1 of 4 images of data.train cannot be decoded" in text
    assert "row 'row 3'" in text


@pytest.mark.parametrize(
    "bucket, sizes, found",
    [
        ("prompt_tokens", [60], "reasoner, 3 crops, prompt tokens: "),
        ("patches", [100], "reasoner, 3 crops, patches: "),
        ("canvas", [96], "reasoner, 3 crops, longest side of a resized image in pixels: "),
        ("image", [380], r"row 'row 2' .*the source image, longest side in pixels: 384; 3 of 4 "),
    ],
)
def test_a_prompt_over_budget(refused, tmp_path, bucket, sizes, found):
    data = write_rows(tmp_path / "data")
    buckets = dataclasses.replace(BUCKETS, **{bucket: sizes})
    line = refused(data, buckets=buckets)
    assert re.search(found, line)
    assert f"exceeds buckets.{bucket} = {sizes}" in line
    needed = re.search(r": (\d+); \d of 4 scanned rows do", line)[1]
    assert int(needed) > sizes[-1]
    assert f"add a bucket of at least {needed}, or" in line


def begins(*args: Any) -> None:
    """In place of the long work."""
    raise ValueError("long work begins")


def test_the_bucket_that_is_asked_for_is_enough(refused, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data")
    line = refused(data, buckets=dataclasses.replace(BUCKETS, prompt_tokens=[60], patches=[100]))
    needed = [int(n) for n in re.findall(r"add a bucket of at least (\d+)", line)]
    assert len(needed) == 2
    patch, prompt = needed
    large = dataclasses.replace(BUCKETS, prompt_tokens=[prompt], patches=[patch])
    monkeypatch.setattr(dry, "_load_weights", begins)
    assert refused(data, buckets=large) == "p2r train: long work begins"


def test_an_image_that_no_prompt_can_show(refused, tmp_path):
    data = write_rows(tmp_path / "data")
    Image.new("RGB", (384, 1)).save(data.parent / "images/1.png")
    line = refused(data)
    assert "data.train: row 'row 1', perceiver: " in line
    assert "aspect ratio above 200" in line


def test_a_verifier_that_cannot_be_reached(refused, tmp_path):
    pytest.importorskip("openai")
    data = write_rows(tmp_path / "data", answer_form="free_form", options=[])
    verifier = cfg.VerifierConfig(
        kind="endpoint", base_url="http://127.0.0.1:9/v1", model="judge", attempts=1
    )
    line = refused(data, verifier=verifier)
    assert "verifier.base_url http://127.0.0.1:9/v1: cannot be reached" in line


def test_a_model_that_cannot_judge(tmp_path, monkeypatch, tiny_checkpoint):
    """Known once it has its weights, before anything is collected."""
    monkeypatch.setattr(dry, "_collect_all", begins)
    data = write_rows(tmp_path / "data", answer_form="free_form", options=[])
    config = settings(
        tmp_path / "run", tiny_checkpoint, data, verifier=cfg.VerifierConfig(kind="model")
    )
    code, text = command(config, tmp_path)
    assert code == 2
    assert "verifier.kind 'model': this model cannot judge" in text
    assert "Traceback" not in text


def test_free_text_without_a_verifier(refused, tmp_path):
    data = write_rows(tmp_path / "data", answer_form="free_form", options=[])
    assert "verifier" in refused(data)


def test_a_mesh_that_does_not_fit(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "make_mesh", make_mesh)
    line = refused(write_rows(tmp_path / "data"), mesh=cfg.MeshConfig(data=3, fsdp=1))
    assert "mesh {'data': 3, 'fsdp': 1, 'tensor': 1} does not fit 8 device(s)" in line


def test_a_folder_of_a_run_with_other_settings(refused, tmp_path, tiny_checkpoint):
    data = write_rows(tmp_path / "data")
    cli.dump_config(settings(tmp_path / "run", tiny_checkpoint, data), tmp_path / "run/config.yaml")
    config = settings(tmp_path / "run", tiny_checkpoint, data, seed=1)
    code, text = command(config, tmp_path)
    assert code == 2
    assert "was started with other settings (seed)" in text


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, tiny_checkpoint):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 12 bytes")

    monkeypatch.setattr(dry, "_load_weights", full)
    config = settings(tmp_path / "run", tiny_checkpoint, write_rows(tmp_path / "data"))
    code, text = command(config, tmp_path)
    assert code == 2
    assert "Traceback" not in text
    assert "the devices have too little memory" in text.splitlines()[-1]


def test_a_warning_if_a_device_is_too_small(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(dry, "device_bytes", lambda: 2**20)
    data = write_rows(tmp_path / "data")
    config = settings(tmp_path / "run", tiny_checkpoint, data)
    monkeypatch.setattr(dry, "_load_weights", begins)
    code, text = command(config, tmp_path)
    assert code == 2
    assert "the device has 1.00 MiB" in text
    assert re.search(r"warning: phase 1 needs [\d.]+ MiB on a device of 1.00 MiB in the", text)


# --- how it measures ------------------------------------------------------------------------------


def test_rows_are_spread_over_the_data():
    assert dry.spread(3, 512) == [0, 1, 2]
    for count, most in ((1000, 64), (10_000, 512), (65, 64), (100, 7)):
        chosen = dry.spread(count, most)
        assert 1 <= len(chosen) <= most
        assert chosen[0] == 0
        assert chosen[-1] == count - 1
        assert chosen == sorted(set(chosen))


def test_sizes_come_from_the_header(tmp_path, monkeypatch):
    pixels = np.zeros((30, 50, 3), np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    sources = [file, str(file), file.read_bytes(), pixels, Image.fromarray(pixels), lambda: file]
    rows = [Row("r", "q?", "1", "na", image_source=source) for source in sources]
    assert [dry.image_size(row) for row in rows] == [(30, 50)] * len(rows)
    # Of a file that is cut off behind its header, too.
    file.write_bytes(file.read_bytes()[:60])
    assert dry.image_size(rows[0]) == (30, 50)
    with pytest.raises(RowError, match="cannot decode"):
        dry.image_size(Row("r", "q?", "1", "na", image_source=b"no image"))


@pytest.mark.parametrize(
    "sizes", [ImageSizes(16, 2, 4096, 2_097_152), ImageSizes(8, 2, 1024, 5184)], ids=["4B", "tiny"]
)
@pytest.mark.parametrize("size", [(384, 384), (1000, 1500), (8000, 6000), (500, 7000), (12, 9)])
def test_no_box_asks_for_a_larger_crop(sizes, size):
    """Within one grid step of what thousands of random boxes find."""
    rng = np.random.default_rng(0)
    box, side = dry.largest_crop(*size, sizes)

    def crop(box: Box) -> tuple[int, int]:
        evidence = gather_evidence(*size, [box], sizes)
        if not evidence.found:
            return 0, 0
        rows, columns = sizes.grid(evidence.views[1].target)
        return rows * columns, max(evidence.views[1].target)

    assert parse_response(json.dumps([{"bbox_2d": list(box.bbox_2d), "label": "x"}])).boxes
    most, longest = crop(box)[0], 0
    for _ in range(3000):
        corners = rng.uniform(0, 1000, (2, 2)) * rng.choice([0, 1], (2, 2), p=[0.3, 0.7])
        (x1, y1), (x2, y2) = np.sort(corners, axis=0)
        if 0 < x2 - x1 <= 200 * (y2 - y1) and y2 - y1 <= 200 * (x2 - x1):
            patches, long = crop(Box((x1, y1, x2, y2), ""))
            assert patches <= 1.05 * most
            longest = max(longest, long)
    assert longest <= side + 2 * sizes.patch * sizes.merge


def test_pictures_are_what_the_model_gets(tiny_checkpoint):
    processor = Processor.from_pretrained(tiny_checkpoint)
    buckets = Buckets(patches=(320,), prompt_tokens=(128,), canvas=(448,), image=(384,))
    builder = RequestBuilder(processor, load_prompt_set("tiny"), buckets)
    row = VisualSearch()[0]
    image = row.load_image()[:384, :300]
    store = ImageStore.upload([image], buckets)
    request = builder.reasoner(store, 0, "red?", "mca", [Box((100.0, 100.0, 400.0, 300.0), "x")])
    views = dry.seen_images(builder.collate([request], store), 0, 8)
    assert len(views) == len(request.views) == 2
    crop = request.views[1]
    size = crop.target[::-1]
    assert views[1].size == size
    expected = Image.fromarray(image).crop(crop.crop).resize(size, Image.Resampling.BICUBIC)
    gap = np.abs(np.asarray(views[1], np.int32) - np.asarray(expected, np.int32))
    assert gap.max() <= 2
    assert gap.mean() < 0.1


class TestMemory:
    """Against arrays that are there, on a mesh of eight devices."""

    @pytest.fixture(scope="class")
    def trainer(self, tmp_path_factory, tiny_checkpoint):
        folder = tmp_path_factory.mktemp("memory")
        config = settings(folder / "run", tiny_checkpoint, write_rows(folder / "data"))
        config.mesh = cfg.MeshConfig(data=2, fsdp=2, tensor=2)
        config.model.compute_dtype = "bfloat16"
        config.phases = [dataclasses.replace(p, microbatch=0) for p in config.phases]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "make_mesh", make_mesh)
            return launch.build_trainer(config, Console(quiet=True))

    @pytest.fixture(scope="class")
    def params(self, trainer):
        return trainer.load()

    @staticmethod
    def on_first_device(tree: Any) -> int:
        device = jax.devices()[0]
        return sum(
            shard.data.nbytes
            for x in jax.tree.leaves(tree)
            for shard in x.addressable_shards
            if shard.device == device
        )

    def test_of_weights(self, trainer, params):
        assert dry.tree_bytes(trainer.like) == self.on_first_device(params)
        snapshot = trainer._to_snapshot(params)
        assert dry.tree_bytes(trainer.like, "bfloat16") == self.on_first_device(snapshot)
        layout = for_decoding(trainer.like, trainer.mesh)
        rollout = trainer._to_rollout(params)
        assert dry.tree_bytes(trainer.like, "bfloat16", layout) == self.on_first_device(rollout)

    @pytest.mark.parametrize("name", ["adamw", "adafactor"])
    @pytest.mark.parametrize("freeze", [False, True])
    def test_of_the_optimizer(self, trainer, params, name, freeze):
        config = cfg.OptimizerConfig(name=name, freeze_vision=freeze, moment_dtype="bfloat16")
        state = new_state(params, make_optimizer(config, 1))
        mine = dry.optimizer_bytes_of_a_device(config, trainer.like)
        assert mine == self.on_first_device(state.opt_state)
        alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainer.like)
        assert dry.optimizer_bytes_of_a_device(config, alone) == optimizer_bytes(config, alone)

    def test_of_the_caches(self, trainer):
        scan = dry.Scan(
            "train",
            [],
            dataclasses.replace(ImageStore.empty(), shapes=((384, 300),)),
            {role: [dry.Measured("r", 70, 90, 96)] for role in ("perceiver", "reasoner")},
        )
        phase = trainer.phases[0]
        memory = dry.memory_of(trainer, phase, scan)
        sizes = {part.name: part for part in memory.rollout}
        # The partner has the most slots.
        assert sizes["ring cache of the reasoner"].about == "64 slots × 1 × 8 tokens"
        prefix, columns = empty_slots(
            trainer.pipeline.vocabulary.pad,
            text=trainer.pipeline.builder.processor.config.text,
            sampling=dataclasses.replace(phase_sampling(phase.config), group=1),
            slots=64,
            columns=1,
            prompt=128,
            ring=8,
            dtype="bfloat16",
            mesh=trainer.mesh,
        )
        for name, own in (("prefix", prefix), ("ring", columns)):
            part = sizes[f"{name} cache of the reasoner"]
            assert part.bytes == self.on_first_device((own.keys, own.values)), name
        images = ImageStore.upload(
            [np.zeros((384, 300, 3), np.uint8)] * PROMPTS, trainer.pipeline.builder.buckets,
            trainer.mesh,
        )  # fmt: skip
        assert sizes["images"].bytes == self.on_first_device(images.pixels)
        builder = trainer.pipeline.builder
        requests = [builder.plain("perceiver", images, i, "red?", "mca") for i in range(PROMPTS)]
        patches = builder.collate(requests, images).patches
        assert sizes["images as patches"].bytes == self.on_first_device(patches.pixels)

    def test_sums(self, trainer):
        memory = dry.Memory([dry.Part("a", 1)], [dry.Part("b", 2)], [dry.Part("c", 4)])
        assert (memory.total("rollout"), memory.total("update")) == (3, 5)

    def test_controls_and_settings_that_cost_memory(self, trainer, monkeypatch):
        scan = dry.Scan(
            "train",
            [],
            dataclasses.replace(ImageStore.empty(), shapes=((384, 300),)),
            {r: [dry.Measured("r", 70, 90, 96)] for r in ("perceiver", "reasoner", "baseline")},
        )

        def names(stage: str, **changes: Any) -> list[str]:
            phase = trainer.phases[0]
            phase = dataclasses.replace(phase, config=dataclasses.replace(phase.config, **changes))
            return [part.name for part in getattr(dry.memory_of(trainer, phase, scan), stage)]

        assert "weights of the partner" in names("rollout")
        assert "weights of the partner" not in names("rollout", partner="step")
        assert "prefix cache of the baseline" in names("rollout", role="baseline")
        assert any("cache" in name for name in names("rollout", role="joint"))
        assert "gradient, summed" not in names("update")
        assert "gradient, summed" in names("update", microbatch=2)
        assert "weights as computed with" in names("update")
        assert "weights of the start" not in names("always")
        loss = dataclasses.replace(trainer.config.loss, reference="start")
        monkeypatch.setattr(trainer.config, "loss", loss)
        assert "weights of the start" in names("always")


@pytest.mark.parametrize(
    "roles, expected",
    [
        (["perceiver"], ("perceiver", "reasoner")),
        (["joint", "baseline"], ("perceiver", "reasoner", "baseline")),
        (["baseline"], ("baseline",)),
    ],
)
def test_roles_that_write_in_training(roles, expected):
    assert dry.trained_roles([cfg.PhaseConfig(role=role) for role in roles]) == expected
