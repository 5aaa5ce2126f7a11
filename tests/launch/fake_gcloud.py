#!/usr/bin/env python3
"""A `gcloud` for tests: a bucket, queued resources and two workers in the folder FAKE_GCLOUD.

It writes down every call, refuses flags that the real one does not know
(`schemas/gcloud_flags.json`), and runs what is sent to a worker with `ssh --command` in a shell
whose home is the worker's own folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

WORKERS = 2
FOLDER = Path(os.environ.get("FAKE_GCLOUD", "."))
KNOWN = json.loads((Path(__file__).parent / "schemas" / "gcloud_flags.json").read_text())


def parse(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Command, positional arguments, flags. Exits as gcloud does if there is no such flag."""
    command = max((c for c in KNOWN["commands"] if words[: len(c.split())] == c.split()), key=len)
    rest, flags, positional = words[len(command.split()) :], {}, []
    for word in rest:
        name, _, value = word.partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif name in KNOWN["commands"][command] + KNOWN["everywhere"]:
            flags[name] = value
        else:
            sys.exit(f"ERROR: (gcloud) unrecognized arguments: {word}")
    return command, positional, flags


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time: calls, and tests that change what is there."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_state(folder: Path, resources: dict[str, dict]) -> None:
    """At once: tests read it at any time."""
    (folder / "state.tmp").write_text(json.dumps(resources))
    os.replace(folder / "state.tmp", folder / "state.json")


def local(url: str) -> Path:
    """Where the fake bucket keeps gs://..., or the path itself."""
    return FOLDER / "bucket" / url[5:] if url.startswith("gs://") else Path(url)


def home(worker: int) -> Path:
    return FOLDER / "workers" / str(worker)


def end_workers(number: signal.Signals) -> None:
    for file in FOLDER.glob("workers/*/p2r/entry.pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(file.read_text()), number)


def ssh(flags: dict[str, str]) -> int:
    chosen = range(WORKERS) if flags["--worker"] == "all" else [int(flags["--worker"])]
    codes = []
    for worker in chosen:
        home(worker).mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"HOME": str(home(worker)), "FAKE_WORKER": str(worker)}
        shell = ["bash", "-c", flags["--command"]]
        codes.append(subprocess.run(shell, cwd=home(worker), env=environment).returncode)
    return max(codes)


def main() -> int:
    command, positional, flags = parse(sys.argv[1:])
    with (FOLDER / "calls.jsonl").open("a") as file:
        file.write(json.dumps([command, positional, flags]) + "\n")
    state_file = FOLDER / "state.json"
    resources = json.loads(state_file.read_text())
    name = positional[0] if positional else ""
    match command.split()[-1]:
        case "create":
            assert name not in resources
            labels = dict(pair.split("=") for pair in flags["--labels"].split(","))
            boot = Path(flags["--metadata-from-file"].removeprefix("startup-script=")).read_text()
            resources[name] = {"state": "WAITING_FOR_RESOURCES", "labels": labels, "boot": boot}
        case "describe" | "delete" | "ssh" if name not in resources:
            print(f"ERROR: NOT_FOUND: Resource '{name}' was not found", file=sys.stderr)
            return 1
        case "describe" if "labels" in flags["--format"]:
            print(resources[name]["labels"].get(flags["--format"].rstrip(")").split(".")[-1], ""))
        case "describe":
            print(resources[name]["state"])
            if resources[name]["state"] == "WAITING_FOR_RESOURCES":
                resources[name]["state"] = "ACTIVE"
        case "delete":
            assert "--quiet" in flags
            assert "--force" in flags
            del resources[name]
            end_workers(signal.SIGKILL)
            shutil.rmtree(FOLDER / "workers", ignore_errors=True)
        case "ssh":
            return ssh(flags) if resources[name]["state"] == "ACTIVE" else 255
        case "cp":
            local(positional[1]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local(positional[0]), local(positional[1]))
        case "cat":
            if not local(name).is_file():
                return 1
            sys.stdout.buffer.write(local(name).read_bytes())
        case "rm":
            for path in local(name).parent.glob(local(name).name):
                path.unlink()
    write_state(FOLDER, resources)
    return 0


if __name__ == "__main__":
    # What a worker calls belongs to the call that reached the worker.
    with contextlib.nullcontext() if "FAKE_WORKER" in os.environ else locked(FOLDER):
        sys.exit(main())
