"""A short version of `kill_harness`, and disks that are full or cannot be written."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.rl.kill_harness import STAGES, differences, killed_run_equals_whole_run
from tests.rl.runs import cached
from tests.rl.tiny_run import metric_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_in_a_rollout_an_update_and_a_save_nothing_is_different(tmp_path, tiny_checkpoint):
    """Nor between an evaluation that is the best so far and the checkpoint of its weights."""
    done = killed_run_equals_whole_run(tmp_path, tiny_checkpoint, kills=len(STAGES), seed=1)
    assert {stage for stage, _, _ in done} == set(STAGES)


def test_the_harness_sees_a_difference():
    whole = {"row 0": {"loss": 1.0}, "export": b"1", "checkpoint 8 /params/0": b"2"}
    assert differences(dict(whole), whole) == []
    assert differences(whole | {"export": b"3"}, whole) == ["export"]
    assert differences({"row 0": {"loss": 1.0}, "export": b"1"}, whole) == [
        "checkpoint 8 /params/0"
    ]
    assert differences(whole | {"row 1": {}}, whole) == ["row 1"]


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    test = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(test, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="this machine does not let us mount a small tmpfs (unshare -rm)"
)


def with_mount(run: Path, script: str, model: Path) -> str:
    """Output of a shell script that may mount and run `$TRAIN`; nobody else sees the mounts."""
    train = f"{sys.executable} -m tests.rl.process_run {run} {model} 1"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {"TRAIN": train, "RUN": str(run), "JAX_PLATFORMS": "cpu"}
        | cached(run.parent / "compiled"),
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@needs_mounts
def test_a_full_disk_ends_the_run_with_what_to_do_and_it_goes_on_later(tmp_path, tiny_checkpoint):
    """One checkpoint fits, the second does not; then the disk grows."""
    run = tmp_path / "run"
    run.mkdir()
    size = checkpoint_bytes(tiny_checkpoint) * 3 // 2 // 1024
    output = with_mount(
        run,
        f"""mount -t tmpfs -o size={size}k tmpfs $RUN
        $TRAIN; echo "exit code $?"; ls $RUN/checkpoints
        mount -o remount,size=1g $RUN
        $TRAIN; echo "exit code $?"; cp $RUN/metrics.jsonl {tmp_path}""",
        tiny_checkpoint,
    )
    first, second = output.split("exit code 2", 1)
    assert "a checkpoint could not be written to" in first + second
    assert "the last whole one is of step" in first + second
    assert "resuming at step" in second
    assert "exit code 0" in second
    steps = [row["step"] for row in metric_rows(tmp_path) if row["phase"] != "eval"]
    assert steps == [1, 2, 3]


def checkpoint_bytes(model: Path) -> int:
    """Weights, two moments and the snapshot, float32."""
    with safe_open(model / "model.safetensors", "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return 4 * 4 * sum(math.prod(shape) for shape in shapes)


@needs_mounts
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, tiny_checkpoint):
    run = tmp_path / "run"
    run.mkdir()
    output = with_mount(
        run, 'mount -t tmpfs -o ro tmpfs $RUN; $TRAIN; echo "exit code $?"', tiny_checkpoint
    )
    assert "cannot be written (Read-only file system): set `run`" in output
    assert "exit code 2" in output
    assert "Traceback" not in output
