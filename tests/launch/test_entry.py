"""`launch/entry.sh`: restarts, signals, logs, export; with a stand-in for p2r, then for real.

The real run is the one that a pod does, with two processes of one CPU device each: one worker is
preempted, both end with a checkpoint, and both go on when it is back.
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

import pytest

from tests import gcs_server

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "launch" / "entry.sh"


def environment(binaries: Path, **settings: object) -> dict[str, str]:
    kept = dict(os.environ)
    flags = kept.get("XLA_FLAGS", "").split()
    kept["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    path = f"{binaries}:{Path(sys.executable).parent}:{kept['PATH']}"
    given = {name: str(value) for name, value in settings.items()}
    return kept | {"PATH": path, "JAX_PLATFORMS": "cpu", "BACKOFF": "0"} | given


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class StandIn:
    """A p2r that ends with the next of the given codes each time it is called."""

    def __init__(self, folder: Path, body: str = ""):
        self.folder = folder
        self.file = folder / "bin" / "p2r"
        self.file.parent.mkdir()
        self.file.write_text(
            f'#!/bin/bash\necho "$@" >>{folder}/calls\n{body}\n'
            f"read -r code <{folder}/codes; sed -i 1d {folder}/codes; exit $code\n"
        )
        self.file.chmod(0o755)

    def run(self, *codes: int, arguments: tuple[str, ...] = (), **settings: object):
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        return subprocess.run(
            ["bash", str(ENTRY), *arguments],
            env=environment(self.file.parent, **({"RUN": self.folder / "run"} | settings)),
            capture_output=True,
            text=True,
            timeout=30,
        )

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def state(self, worker: int = 0) -> str:
        return (self.folder / "run" / "logs" / f"worker-{worker}.exit").read_text().strip()


def test_it_starts_again_until_the_run_is_done(tmp_path):
    p2r = StandIn(tmp_path, "echo step of $RUN; echo trouble >&2")
    done = p2r.run(75, 134, 137, 143, 0, arguments=("--config", "a b.yaml"))
    assert done.returncode == 0
    assert p2r.calls == [f"train --config a b.yaml --run {tmp_path}/run"] * 5
    assert p2r.state() == "0"
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    for text in (log, done.stdout):  # the log holds what was printed, and all of it was printed
        assert text.count("step of") == text.count("trouble") == 5


@pytest.mark.parametrize("code", [1, 2])
def test_what_wants_a_person_is_not_tried_again(tmp_path, code):
    p2r = StandIn(tmp_path)
    assert p2r.run(code, EXPORT="hf").returncode == code
    assert len(p2r.calls) == 1
    assert p2r.state() == str(code)


def test_it_gives_up_after_so_many_restarts(tmp_path):
    p2r = StandIn(tmp_path)
    done = p2r.run(*[75] * 9, MAX_RESTARTS=2)
    assert done.returncode == 75
    assert len(p2r.calls) == 3
    assert p2r.state() == "75"
    assert "no restart: there were 2 already" in done.stdout


def test_restarts_wait_longer_and_longer(tmp_path):
    out = StandIn(tmp_path).run(75, 75, 0, BACKOFF="1").stdout
    assert "starting again in 1 s" in out
    assert "starting again in 2 s" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end_it_lets_the_run_save_itself(tmp_path, number):
    save = f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 75' TERM"
    p2r = StandIn(tmp_path, f"{save}; touch {tmp_path}/ready; sleep 9 & wait")
    settings = environment(
        p2r.file.parent, RUN=tmp_path / "run", ON_FINISH=f"touch {tmp_path}/finished"
    )
    process = subprocess.Popen(["bash", str(ENTRY)], env=settings)
    until(lambda: (tmp_path / "ready").exists())
    process.send_signal(number)
    assert process.wait(10) == 75
    assert (tmp_path / "saved").exists()
    assert p2r.state() == "stopped"
    assert not (tmp_path / "finished").exists()
    assert len(p2r.calls) == 1


def test_asked_to_end_before_p2r_can_save_it_wants_a_restart(tmp_path):
    p2r = StandIn(tmp_path, "exec sleep 9")
    process = subprocess.Popen(
        ["bash", str(ENTRY)], env=environment(p2r.file.parent, RUN=tmp_path / "run")
    )
    until(lambda: (tmp_path / "calls").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75


def test_asked_to_end_between_two_starts_it_does(tmp_path):
    p2r = StandIn(tmp_path)
    (tmp_path / "codes").write_text("134\n0\n")
    settings = environment(p2r.file.parent, RUN=tmp_path / "run", BACKOFF=9)
    process = subprocess.Popen(
        ["bash", str(ENTRY)], env=settings, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "starting again in 9 s" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 75
    process.stdout.close()
    assert len(p2r.calls) == 1


def test_worker_0_exports_and_finishes_and_all_copy_their_logs(tmp_path):
    p2r = StandIn(tmp_path)
    p2r.run(
        0, WORKER=1, EXPORT="hf", ON_FINISH=f"touch {tmp_path}/finished", LOG_URL=tmp_path / "b"
    )
    assert len(p2r.calls) == 1
    assert not (tmp_path / "finished").exists()
    p2r.run(0, 0, EXPORT="hf", ON_FINISH=f"touch {tmp_path}/finished", LOG_URL=tmp_path / "b")
    assert p2r.calls[1:] == [f"train --run {tmp_path}/run", f"convert to-hf {tmp_path}/run hf"]
    assert (tmp_path / "finished").exists()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        f"worker-{i}.{kind}" for i in (0, 1) for kind in ("log", "exit")
    }
    assert (tmp_path / "b" / "worker-0.exit").read_text() == "0\n"


def test_what_was_exported_is_not_exported_again(tmp_path):
    """A worker that was preempted between the export and its end starts once more."""
    done, half = tmp_path / "done", tmp_path / "half"
    done.mkdir()
    half.mkdir()
    (done / "config.json").write_text("{}")
    p2r = StandIn(tmp_path)
    assert p2r.run(0, EXPORT=done).returncode == 0
    assert len(p2r.calls) == 1
    assert p2r.run(0, 0, EXPORT=half).returncode == 0
    assert p2r.calls[2] == f"convert to-hf {tmp_path}/run {half}"


def test_a_failed_export_shows_in_the_exit_code(tmp_path):
    p2r = StandIn(tmp_path)
    assert p2r.run(0, 2, EXPORT="hf").returncode == 2
    assert p2r.state() == "2"


def test_data_are_copied_first_and_once(tmp_path):
    source = tmp_path / "bucket" / "data"
    (source / "inner").mkdir(parents=True)
    (source / "a.array_record").write_text("a")
    (source / "inner" / "b.png").write_text("b")
    p2r, target = StandIn(tmp_path), tmp_path / "local"
    assert p2r.run(0, DATA_FROM=source, DATA_TO=target).returncode == 0
    assert (target / "inner" / "b.png").read_text() == "b"
    before = (target / "a.array_record").stat().st_mtime_ns
    assert p2r.run(0, DATA_FROM=source, DATA_TO=target).returncode == 0
    assert (target / "a.array_record").stat().st_mtime_ns == before
    assert p2r.run(0, DATA_FROM=tmp_path / "no", DATA_TO=target).returncode != 0
    assert len(p2r.calls) == 2


def test_a_run_in_a_bucket_keeps_its_logs_there(tmp_path):
    p2r = StandIn(tmp_path, "echo $JAX_COMPILATION_CACHE_DIR")
    with gcs_server.running() as server:
        server.buckets["b"] = {}
        server.put("b", "data/inner/a.array_record", b"rows")
        done = p2r.run(
            *(75, 0),
            RUN="gs://b/runs/n",
            DATA_FROM="gs://b/data",
            DATA_TO=tmp_path / "local",
            LOG_DIR=tmp_path / "logs",
        )
        assert done.returncode == 0, done.stdout
        objects = {name: stored.data for name, stored in server.buckets["b"].items()}
    assert (tmp_path / "local" / "inner" / "a.array_record").read_bytes() == b"rows"
    assert objects["runs/n/logs/worker-0.exit"] == b"0\n"
    assert objects["runs/n/logs/worker-0.log"] == (tmp_path / "logs/worker-0.log").read_bytes()
    assert done.stdout.count("gs://b/runs/n/compiled") == 2


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            {"COORDINATOR": "host:1", "PROCESSES": 2, "JOB_COMPLETION_INDEX": 1},
            "--distributed.coordinator host:1 --distributed.processes 2 --distributed.process 1",
        ),
        ({"DISTRIBUTED": "on"}, "--distributed.enabled on"),
    ],
)
def test_workers_are_told_of_each_other(tmp_path, settings, expected):
    p2r = StandIn(tmp_path)
    p2r.run(0, **settings)
    assert p2r.calls[0].endswith(f"/run {expected}")


def test_without_a_run_folder_it_says_so(tmp_path):
    settings = {k: v for k, v in environment(tmp_path).items() if k != "RUN"}
    done = subprocess.run(["bash", str(ENTRY)], env=settings, capture_output=True, text=True)
    assert done.returncode != 0
    assert "set RUN" in done.stderr


class Workers:
    """Two real workers of a run of the embedded model, cut down to three steps."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run = folder / "run"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.all = [self.start(0), self.start(1)]

    def start(self, worker: int) -> subprocess.Popen[bytes]:
        phase = {"role": "perceiver", "steps": 3, "prompts": 4, "group": 2}
        phase |= {"max_new_tokens": 5, "partner_max_new_tokens": 5}
        arguments = {
            "config": ROOT / "configs" / "tiny.yaml",
            "mesh.cpu_devices": 1,
            "phases": json.dumps([phase]),
            "buckets.patches": "[160]",
            "buckets.prompt_tokens": "[160]",
            "buckets.canvas": "[448]",
            "rollout.greedy_slots": 4,
            "eval.every": 0,
            "eval.final_modes": "[p2r]",
            "eval.modes": "[p2r]",
            "eval.questions": 4,
            "eval.final_questions": 4,
            "eval.batch": 4,
            "checkpoint.every": 1,
        }
        settings = environment(
            self.folder,
            RUN=self.run,
            WORKER=worker,
            COORDINATOR=f"localhost:{self.port}",
            PROCESSES=2,
            EXPORT=self.folder / "hf",
            JAX_DISABLE_MOST_OPTIMIZATIONS=1,
            JAX_COMPILATION_CACHE_DIR=self.folder / "compiled",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0,
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1,
        )
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        return subprocess.Popen(
            ["bash", str(ENTRY), *words], env=settings, start_new_session=True, cwd=ROOT
        )

    def steps(self) -> list[int]:
        file = self.run / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [row["step"] for row in map(json.loads, lines) if row["phase"] != "eval"]

    def log(self, worker: int) -> str:
        return (self.run / "logs" / f"worker-{worker}.log").read_text()

    def kill(self) -> None:
        for process in self.all:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GNU tail and stat")
def test_two_real_workers_go_on_after_a_preemption(tmp_path):
    workers = Workers(tmp_path)
    try:
        until(lambda: workers.steps() or any(p.poll() is not None for p in workers.all), 200)
        assert workers.steps(), workers.log(0)[-3000:]
        workers.all[1].send_signal(signal.SIGTERM)
        assert workers.all[1].wait(60) == 75, workers.log(1)[-3000:]
        # Worker 0 starts again by itself and waits; a launcher brings the other one back.
        workers.all.append(workers.start(1))
        for worker in (0, 2):
            assert workers.all[worker].wait(120) == 0, workers.log(0)[-3000:]
    finally:
        workers.kill()
    assert workers.steps() == [1, 2, 3]
    for worker in (0, 1):
        assert workers.log(worker).count("p2r train ended with exit code 75") == 1
        assert workers.log(worker).count("p2r train ended with exit code 0") == 1
    assert "starting again" in workers.log(0)
    assert "resuming at step" in workers.log(0)
    assert (workers.run / "summary.json").is_file()
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert "export to" not in workers.log(1)
