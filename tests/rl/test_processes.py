"""Several processes train the run that one process trains; they die together and go on together.

Real processes, gloo between them, real signals. Each has four virtual devices.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from p2r_jax.rl.stop import EXIT_RESTART
from tests.rl.runs import cached
from tests.rl.tiny_run import metric_rows

ROOT = Path(__file__).parents[2]
STEPS = 3
SECONDS = 600
VARIES = ("time/", "compile/")
"""Metrics that no two runs share."""


class Processes:
    """A run in `count` processes of `devices` virtual devices each."""

    def __init__(self, run: Path, model: Path, devices: int, count: int = 1):
        self.run = run
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        run.parent.mkdir(parents=True, exist_ok=True)
        self.logs = [run.parent / f"{run.name}_{i}.log" for i in range(count)]
        self.all = []
        for i, log in enumerate(self.logs):
            arguments = [run, model, devices, i, count, port]
            with log.open("w") as file:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.rl.process_run", *map(str, arguments)],
                        cwd=ROOT,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | cached(run.parent / "compiled") | {"JAX_PLATFORMS": "cpu"},
                    )
                )

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Exit codes of all; whoever does not end in time is killed and fails the test."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.all]
        finally:
            self.kill()

    def finish(self) -> Path:
        codes = self.wait()
        assert codes == [0] * len(self.all), self.output()
        return self.run

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not any(row["step"] >= step for row in rows_of(self.run, finished=False)):
            if any(p.poll() is not None for p in self.all) or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"no step {step}:\n{self.output()}")
            time.sleep(0.05)

    def output(self, process: int | None = None) -> str:
        logs = self.logs if process is None else [self.logs[process]]
        return "\n".join(log.read_text()[-3000:] for log in logs)

    def kill(self) -> None:
        for process in self.all:
            process.kill()
            process.wait()


def rows_of(run: Path, finished: bool = True) -> list[dict]:
    """Metrics of the steps; of a run that is going on, those whose line is whole."""
    if finished:
        return [row for row in metric_rows(run) if row["phase"] != "eval"]
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [row for row in map(json.loads, lines) if row["phase"] != "eval"]


def same(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(VARIES)}


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def assert_equal_but_for_rounding(run: Path, expected: Path) -> None:
    for ours, theirs in zip(rows_of(run), rows_of(expected), strict=True):
        for name in ("loss/total", "kl/mean", "entropy/mean", "loss/anchor"):
            # Advantages of a group add up to 0, and so does the loss but for the KL: nanounits.
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-8), name
        for name in ("reward/mean", "tokens/completions", "completion/length_mean"):
            assert ours[name] == theirs[name], name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    mine, other = weights(run), weights(expected)
    for name, value in other.items():
        # Adam moves an element by the sign of a gradient that may be rounding: not element by
        # element.
        error = np.linalg.norm(mine[name] - value) / np.linalg.norm(value)
        assert error <= 1e-3, (name, error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_programs) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "compiled").symlink_to(compiled_programs)
    return folder


@pytest.fixture(scope="module")
def one(folder, tiny_checkpoint) -> Path:
    """One process, one device."""
    return Processes(folder / "one", tiny_checkpoint, devices=1).finish()


@pytest.fixture(scope="module")
def two(folder, tiny_checkpoint) -> Path:
    """Two processes of four devices."""
    return Processes(folder / "two", tiny_checkpoint, devices=4, count=2).finish()


def test_two_processes_train_what_one_device_trains(one, two):
    assert len(rows_of(two)) == STEPS
    assert any(row["kl/mean"] > 1e-3 for row in rows_of(two))  # or the comparison says little
    assert_equal_but_for_rounding(two, one)


def test_so_does_one_process_of_eight_devices(one, folder, tiny_checkpoint):
    eight = Processes(folder / "eight", tiny_checkpoint, devices=8).finish()
    assert_equal_but_for_rounding(eight, one)


def test_each_answer_is_graded_once_by_its_owner(one, two):
    """The two share what the one has graded, about evenly."""

    def graded(run: Path, process: int) -> list[str]:
        return (run.parent / f"{run.name}_{process}.graded").read_text().split()

    shares = [graded(two, process) for process in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(graded(one, 0))
    assert abs(len(shares[0]) - len(shares[1])) <= len(graded(one, 0)) / 4


def test_only_one_process_writes_for_people(two):
    names = {path.name for path in two.iterdir()}
    assert {"metrics.jsonl", "samples", "summary.json", "report.html", "export", "eval"} <= names
    steps = [row["step"] for row in rows_of(two)]
    assert steps == sorted(set(steps))
    other = (two.parent / "two_1.log").read_text()
    assert "parameters on 8 cpu device(s) in 2 processes" in (two.parent / "two_0.log").read_text()
    assert "parameters on" not in other


def test_if_one_dies_the_other_says_so_and_both_go_on_later(two, folder, tiny_checkpoint):
    run = folder / "killed"
    processes = Processes(run, tiny_checkpoint, devices=4, count=2)
    processes.until_step(1)
    processes.all[1].send_signal(signal.SIGKILL)
    codes = processes.wait(seconds=300)
    assert codes[1] == -signal.SIGKILL
    # A computation with the other fails at once. Who waits for the coordinator instead hears of it
    # after distributed.heartbeat_seconds, and JAX ends that process itself.
    assert codes[0] in (EXIT_RESTART, -signal.SIGABRT), processes.output()
    if codes[0] == EXIT_RESTART:
        assert "most likely because one of them ended" in processes.output(0)
    assert not (run / "export").exists()

    Processes(run, tiny_checkpoint, devices=4, count=2).finish()
    assert [same(row) for row in rows_of(run)] == [same(row) for row in rows_of(two)]
    for name, value in weights(two).items():
        np.testing.assert_array_equal(weights(run)[name], value, err_msg=name)


@pytest.mark.slow
def test_preempted_on_two_processes_it_goes_on_in_one(one, folder, tiny_checkpoint):
    """One of them gets the signal; both save, end, and ask to be started again."""
    run = folder / "preempted"
    processes = Processes(run, tiny_checkpoint, devices=4, count=2)
    processes.until_step(1)
    processes.all[1].send_signal(signal.SIGTERM)
    codes = processes.wait(seconds=300)
    assert codes == [EXIT_RESTART, EXIT_RESTART], processes.output()
    assert "SIGTERM: the run is saved at step" in processes.output(1)
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert 1 <= saved < STEPS

    again = Processes(run, tiny_checkpoint, devices=8)
    again.finish()
    assert f"resuming at step {saved} of {STEPS}" in again.output()
    assert_equal_but_for_rounding(run, one)
