"""Records survive a kill: what was written is kept, the rest is made, and the file is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2r_jax import cli
from p2r_jax.data.rows import Row
from p2r_jax.evals import launch

ROOT = Path(__file__).parents[2]
MODES = '["default","p2r","shuffled_box"]'


def command(model: Path, out: Path, *options: str) -> list[str]:
    return [
        "eval", "--model", str(model), "--modes", MODES, "--limit", "12", "--batch", "4",
        "--out", str(out), "--pictures", "3", "--perceiver_max_new_tokens", "6",
        "--reasoner_max_new_tokens", "6", "--direct_max_new_tokens", "4",
        "--mesh.fsdp", "1", "--mesh.data", "-1", *options,
    ]  # fmt: skip


def evaluate(model: Path, out: Path, *options: str) -> int:
    return cli.main(command(model, out, *options))


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tmp_path_factory) -> Path:
    """An evaluation that ran to its end."""
    out = tmp_path_factory.mktemp("whole")
    assert evaluate(tiny_checkpoint, out) == 0
    return out / "eval"


def copy_of(whole: Path, out: Path, lines: int, torn: str = "") -> Path:
    """What a kill after so many records leaves."""
    folder = out / "eval"
    folder.mkdir(parents=True)
    kept = (whole / "eval.jsonl").read_text().splitlines(keepends=True)[:lines]
    (folder / "eval.jsonl").write_text("".join(kept) + torn)
    (folder / "eval.run.json").write_text((whole / "eval.run.json").read_text())
    return folder


class TestResume:
    @pytest.mark.parametrize("lines, torn", [(1, ""), (10, '{"id": "cut'), (30, ""), (36, "{")])
    def test_after_any_record_it_ends_with_the_same_file(
        self, whole, tiny_checkpoint, tmp_path, lines, torn
    ):
        folder = copy_of(whole, tmp_path, lines, torn)
        assert evaluate(tiny_checkpoint, tmp_path, "--resume", "true") == 0
        for name in ("eval.jsonl", "eval.json", "eval.run.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()

    def test_a_finished_one_answers_nothing_again(
        self, whole, tiny_checkpoint, tmp_path, monkeypatch
    ):
        copy_of(whole, tmp_path, 36)
        monkeypatch.setattr(launch.Pipeline, "complete", None)
        monkeypatch.setattr(Row, "load_image", None)  # Nor does it read an image.
        assert evaluate(tiny_checkpoint, tmp_path, "--resume", "true") == 0

    def test_an_unfinished_one_is_not_overwritten_unasked(
        self, whole, tiny_checkpoint, tmp_path, capsys
    ):
        folder = copy_of(whole, tmp_path, 10)
        before = (folder / "eval.jsonl").read_bytes()
        assert evaluate(tiny_checkpoint, tmp_path) == 2
        assert "was not finished: go on with --resume true" in capsys.readouterr().err
        assert (folder / "eval.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        "options, named",
        [
            (["--seed", "1"], "another questions, seed"),
            (["--limit", "11"], "another questions"),
            (["--repetition_penalty", "1.2"], "another decoding"),
            (["--preset", "authors"], "another pixel budget, decoding, preset"),
            (["--dtype", "bfloat16"], "another dtype"),
        ],
    )
    def test_other_settings_do_not_go_on_with_it(
        self, whole, tiny_checkpoint, tmp_path, capsys, options, named
    ):
        folder = copy_of(whole, tmp_path, 10)
        before = (folder / "eval.jsonl").read_bytes()
        assert evaluate(tiny_checkpoint, tmp_path, "--resume", "true", *options) == 2
        assert named in capsys.readouterr().err
        assert (folder / "eval.jsonl").read_bytes() == before


def test_killed_while_it_writes_it_resumes_to_the_same_content(whole, tiny_checkpoint, tmp_path):
    """A real process and SIGKILL, twice."""
    file = tmp_path / "eval" / "eval.jsonl"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # As in this process: the same programs.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    options = ["--resume", "true"]
    program = [sys.executable, "-m", "p2r_jax.cli", *command(tiny_checkpoint, tmp_path, *options)]
    seen = 0
    for wanted in (5, 18):
        process = subprocess.Popen(program, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 300
            while seen < wanted and process.poll() is None and time.monotonic() < deadline:
                seen = file.read_bytes().count(b"\n") if file.is_file() else 0
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert seen >= wanted
    subprocess.run(program, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    assert file.read_bytes() == (whole / "eval.jsonl").read_bytes()


class TestSamples:
    def test_each_is_drawn_for_itself_and_the_same_again(self, tiny_checkpoint, tmp_path):
        options = ["--samples", "3", "--modes", '["p2r"]', "--limit", "4"]
        for name, batch in (("a", "4"), ("b", "2")):
            out = tmp_path / name
            assert evaluate(tiny_checkpoint, out, *options, "--batch", batch) == 0
        a, b = (
            [json.loads(x) for x in (tmp_path / n / "eval/eval.jsonl").read_text().splitlines()]
            for n in ("a", "b")
        )
        key = lambda r: (r["id"], r["sample"])
        texts = {key(r): r["reasoner_text"] for r in a}
        assert len(texts) == len(a) == 12
        assert texts == {key(r): r["reasoner_text"] for r in b}
        assert len({texts[a[0]["id"], i] for i in range(3)}) > 1


def test_a_shuffled_box_needs_p2r(tiny_checkpoint, tmp_path, capsys):
    assert evaluate(tiny_checkpoint, tmp_path, "--modes", '["shuffled_box"]') == 2
    assert "takes boxes from p2r: add that mode" in capsys.readouterr().err
