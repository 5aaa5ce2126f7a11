"""What is answered depends on weights, questions and settings alone: not on batches, meshes,
buckets or processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from p2r_jax import cli

ROOT = Path(__file__).parents[2]
BUCKETS = {"patches": [320], "prompt_tokens": [192], "canvas": [128], "image": [512]}


def command(model: Path, out: Path, *options: str) -> list[str]:
    return [
        "eval", "--model", str(model), "--modes", '["p2r","grid"]', "--limit", "6",
        "--out", str(out), "--pictures", "0", "--perceiver_max_new_tokens", "8",
        "--reasoner_max_new_tokens", "8", *options,
    ]  # fmt: skip


def answers(out: Path) -> dict[tuple[str, str], tuple[str, str, str]]:
    records = [json.loads(line) for line in (out / "eval/eval.jsonl").read_text().splitlines()]
    return {
        (r["id"], r["mode"]): (r["perceiver_text"], r["reasoner_text"], json.dumps(r["boxes"]))
        for r in records
    }


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, tmp_path_factory):
    """On one device's worth of rows at once, all of them in one batch."""
    out = tmp_path_factory.mktemp("expected")
    assert cli.main(command(tiny_checkpoint, out, "--mesh.fsdp", "1", "--mesh.data", "-1")) == 0
    found = answers(out)
    assert len(found) == 12
    assert len({text for _, text, _ in found.values()}) > 1
    return found


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--batch", "4"], id="batches with a short last one"),
        pytest.param(["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"], id="a mesh"),
        pytest.param([f"--buckets={json.dumps(BUCKETS)}"], id="buckets"),
    ],
)
def test_nothing_but_speed_changes(expected, tiny_checkpoint, tmp_path, options):
    assert cli.main(command(tiny_checkpoint, tmp_path, *options)) == 0
    assert answers(tmp_path) == expected


def test_two_processes_answer_as_one(expected, tiny_checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    env = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    both = []
    for i in (0, 1):
        options = {
            "mesh.cpu_devices": 2,
            "mesh.fsdp": 2,
            "mesh.data": 2,
            "distributed.coordinator": f"localhost:{port}",
            "distributed.processes": 2,
            "distributed.process": i,
        }
        given = [part for k, v in options.items() for part in (f"--{k}", str(v))]
        program = [sys.executable, "-m", "p2r_jax.cli", *command(tiny_checkpoint, tmp_path, *given)]
        with (tmp_path / f"{i}.log").open("w") as log:
            both.append(
                subprocess.Popen(program, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{i}.log").read_text()[-3000:] for i in (0, 1))
    assert answers(tmp_path) == expected
    said = [(tmp_path / f"{i}.log").read_text() for i in (0, 1)]
    assert "answers in" in said[0]
    assert "answers in" not in said[1]
