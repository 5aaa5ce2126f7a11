"""`launch/tpu_queued.sh` against a fake gcloud whose workers are shells on this machine.

What Google's own side does (queueing, preemption, the boot of a TPU VM) is made up; the flags are
the real ones, and everything that runs on a worker runs for real, with stand-ins for p2r and uv.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.fake_gcloud import locked, write_state

LAUNCH = Path(__file__).parents[2] / "launch"
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")

P2R = """#!/bin/bash
env >~/environment
echo "$@" >>~/commands
trap 'exit 75' TERM
until [ -e "$FAKE_GCLOUD/finish" ]; do sleep 0.05; done
exit "$(cat "$FAKE_GCLOUD/finish")"
"""
PYTHON = """#!/bin/bash
exec {python} "${{@//gs:\\/\\//$FAKE_GCLOUD/bucket/}}"
"""
INSTALL = """#!/bin/bash
set -e
mkdir -p ~/p2r/.venv/bin
cp "$FAKE_GCLOUD"/stubs/* ~/p2r/.venv/bin
"""


class Cloud:
    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        for part in ("bin", "stubs", "bucket", "checkout"):
            (folder / part).mkdir()
        fake = Path(__file__).parent / "fake_gcloud.py"
        self.write("bin/gcloud", f'#!/bin/bash\nexec {sys.executable} {fake} "$@"\n')
        self.write("bin/curl", '#!/bin/bash\necho "$FAKE_WORKER"\n')
        self.write("bin/systemd-run", '#!/bin/bash\necho "$2"; shift 2; exec "$@"\n')
        self.write("stubs/p2r", P2R)
        self.write("stubs/python", PYTHON.format(python=sys.executable))
        shutil.copytree(LAUNCH, folder / "checkout" / "launch")
        self.write("checkout/launch/install.sh", INSTALL)
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder / "checkout")]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], check=True)
        self.resources = {"other": {"state": "ACTIVE", "labels": {}, "boot": ""}}
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GIT_")
        } | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(folder),
            "PROJECT": "project",
            "ZONE": "us-west4-a",
            "NAME": "p2r-4b",
            "BUCKET": "gs://bucket",
            "SERVICE_ACCOUNT": "p2r@project.iam.gserviceaccount.com",
            "POLL": "0.2",
            "PRICE": "1.5",
        }

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def start(self, *words: str, **settings: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self.folder / "checkout" / "launch" / "tpu_queued.sh"), *words],
            env=self.environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *words: str, **settings: str) -> tuple[int, str]:
        process = self.start(*words, **settings)
        output = process.communicate(timeout=30)[0]
        return process.returncode, output

    @property
    def resources(self) -> dict[str, dict]:
        return json.loads((self.folder / "state.json").read_text())

    @resources.setter
    def resources(self, resources: dict[str, dict]) -> None:
        write_state(self.folder, resources)

    def calls(self, command: str) -> list[tuple[list[str], dict[str, str]]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [(p, f) for c, p, f in map(json.loads, lines) if c.split()[-1] == command]

    def commands(self, worker: int) -> list[str]:
        file = self.folder / "workers" / str(worker) / "commands"
        return file.read_text().splitlines() if file.exists() else []

    def until(self, condition, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.05)

    def signal_workers(self, number: signal.Signals) -> None:
        for file in self.folder.glob("workers/*/p2r/entry.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), number)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for process in made.started:
        process.kill()
    made.signal_workers(signal.SIGKILL)


def test_watch_trains_through_a_preemption_and_leaves_nothing(cloud):
    watch = cloud.start("watch", "--config", "a b.yaml")
    cloud.until(lambda: cloud.commands(0) and cloud.commands(1))
    first = cloud.resources["p2r-4b"]["labels"]

    # The slice is taken away: a warning to its processes, then it is gone.
    state = cloud.folder / "bucket" / "bucket/runs/p2r-4b/logs/worker-0.exit"
    with locked(cloud.folder):
        cloud.signal_workers(signal.SIGTERM)
        cloud.until(lambda: state.exists() and state.read_text() == "stopped\n")
        cloud.resources = {
            name: old | ({"state": "SUSPENDED"} if name == "p2r-4b" else {})
            for name, old in cloud.resources.items()
        }
    cloud.until(lambda: len(cloud.calls("create")) == 2)
    cloud.until(lambda: cloud.commands(0) and cloud.commands(1))
    assert cloud.resources["p2r-4b"]["labels"] == first  # still the same time to end
    assert cloud.commands(1) == [
        "train --config a b.yaml --run gs://bucket/runs/p2r-4b --distributed.enabled on"
    ]

    (cloud.folder / "finish").write_text("0")
    output = watch.communicate(timeout=30)[0]
    assert watch.returncode == 0, output
    assert "training ended with exit code 0" in output
    assert set(cloud.resources) == {"other"}
    assert {tuple(names) for names, _ in cloud.calls("delete")} == {("p2r-4b",)}
    for _, flags in cloud.calls("create"):
        assert "--spot" in flags
        assert flags["--valid-until-duration"] == "12h"


def test_exit_code_that_wants_a_person_ends_it_too(cloud):
    (cloud.folder / "finish").write_text("2")
    code, output = cloud.run("watch")
    assert code == 2, output
    assert len(cloud.commands(0)) == 0, "the slice is deleted"
    assert set(cloud.resources) == {"other"}


def test_every_slice_deletes_itself_when_its_time_is_up(cloud):
    begin = time.time()
    code, output = cloud.run("create", MAX_HOURS="5", SPOT="0")
    assert code == 0, output
    assert "16 chips" not in output
    assert "80 chip hours = $120" in output
    assert "on demand" in output
    made = cloud.resources["p2r-4b"]
    assert begin + 4.9 * 3600 < int(made["labels"]["p2r_delete_at"]) < begin + 5.1 * 3600
    (_, flags), *_ = cloud.calls("create")
    assert "--spot" not in flags

    # A stand-in for systemd-run prints when and runs at once what it is given.
    boot = subprocess.run(
        ["bash", "-c", made["boot"]], env=cloud.environment, capture_output=True, text=True
    )
    assert boot.returncode == 0, boot.stderr
    seconds = int(boot.stdout.split("--on-active=")[1].split()[0])
    assert 4.9 * 3600 < seconds < 5.1 * 3600
    assert set(cloud.resources) == {"other"}


def test_step_by_step_with_stop_and_a_worker_that_ends_the_slice(cloud):
    for words in (["create"], ["setup"], ["run", "--seed", "1"]):
        code, output = cloud.run(*words)
        assert code == 0, output
    cloud.until(lambda: cloud.commands(0) and cloud.commands(1))
    cloud.run("run", "--seed", "1")
    assert len(cloud.commands(0)) == 1, "what runs is not started again"
    assert "worker 0: running" in cloud.run("status")[1]

    code, output = cloud.run("stop")
    assert code == 0, output
    assert "stopped" in output
    assert "p2r-4b" in cloud.resources

    # What worker 0 does once training has ended (it waits half a minute first).
    environment = (cloud.folder / "workers" / "0" / "environment").read_text()
    (ending,) = [x for x in environment.splitlines() if x.startswith("ON_FINISH=sleep 30; ")]
    ending = ending.removeprefix("ON_FINISH=sleep 30; ")
    subprocess.run(["bash", "-c", ending], env=cloud.environment, check=True)
    assert set(cloud.resources) == {"other"}


def test_delete_refuses_what_others_made(cloud):
    code, output = cloud.run("delete", NAME="other")
    assert code == 2
    assert "was not made by this script" in output
    assert cloud.calls("delete") == []
    assert cloud.run("delete", NAME="nothing")[0] == 0


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"NAME": "Not OK"}, "NAME must be like p2r-4b"),
        ({"PROJECT": ""}, "set PROJECT"),
        ({"ACCELERATOR": "v9-16"}, "set RUNTIME"),
    ],
)
def test_bad_settings_make_nothing(cloud, settings, said):
    code, output = cloud.run("create", **settings)
    assert code != 0
    assert said in output
    assert set(cloud.resources) == {"other"}
