"""`p2r study`: every arm with every seed, each a fresh process of `p2r train`, then the table.

    OUT/runs/ARM/seed_N.yaml   what the run is given
    OUT/runs/ARM/seed_N/       its run folder, with its output in study.log
    OUT/cache/                 compiled programs, shared by all runs
    OUT/study.json, study.md, report.html

The same command goes on where it stopped: finished runs are skipped, unfinished ones resume
themselves. A run that fails is listed and does not end the others. Several hosts give the same
command each, with --parallel 1: their processes of one run find each other as those of `p2r train`
do, and all hosts go through the runs in the same order. This process never looks for devices, so
that its runs get all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from p2r_jax.config import TrainConfig
from p2r_jax.evals.modes import parse_modes
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.rl.launch import check_phases, check_same_config
from p2r_jax.rl.schedule import learning_roles, plan_phases
from p2r_jax.rl.stop import Preempted, StopRequests
from p2r_jax.study import EXIT_RESTART
from p2r_jax.study.analysis import analyse
from p2r_jax.study.config import Arm, Study, read_study, run_config
from p2r_jax.study.report import render
from p2r_jax.study.results import finished
from p2r_jax.study.table import markdown

RESTARTS = (EXIT_RESTART, 134)
"""Exit codes of a run that is to be started again; 134: another process of it fell silent."""
MAX_RESTARTS = 5
POLL_SECONDS = 0.2
SETTLE_SECONDS = 20.0
"""On several hosts the process that writes the summary may be the last to end."""

CACHE = {
    "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "PYTHONUNBUFFERED": "1",
}
"""Environment of the runs besides JAX_COMPILATION_CACHE_DIR; what is set already stays."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: Arm
    seed: int
    config: TrainConfig = dataclasses.field(compare=False, hash=False)

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run)

    @property
    def config_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        return self.folder / "study.log"

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def state(self) -> str:
        """`finished`, `unfinished` or `not started`."""
        if finished(self.folder):
            return "finished"
        return "unfinished" if (self.folder / "config.yaml").is_file() else "not started"


Command = Callable[[Job], list[str]]


def train_command(job: Job) -> list[str]:
    """`p2r train` in a process of its own."""
    return [sys.executable, "-m", "p2r_jax.cli", "train", "--config", str(job.config_file)]


def study(
    file: str | Path,
    out: str | Path,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    parallel: int = 1,
    dry_run: bool = False,
    table_only: bool = False,
    configs: Sequence[str | Path] = (),
    command: Command = train_command,
    console: Console | None = None,
) -> bool:
    """Run a study, or the rest of it, and write its outputs. False if a run failed.

    arms, seeds: a part of it; default, all. configs: config files over its base. command: what to
    start for a run, in place of `p2r train`.

    Raises ValueError before anything runs, Preempted if it is asked to end.
    """
    console = console or Console()
    plan = read_study(file, configs)
    jobs = plan_jobs(plan, Path(out))
    chosen = _chosen(plan, jobs, arms, seeds)
    if parallel < 1:
        raise ValueError(f"--parallel must be at least 1, got {parallel}")
    for job in jobs:
        check_same_config(job.config, job.folder)
    if dry_run:
        console.print(_plan_table(plan, chosen), highlight=False)
        return True
    failed: dict[Job, str] = {}
    if not table_only:
        with StopRequests() as stops:
            failed = run_jobs(chosen, Path(out), parallel, command, console, stops)
    if not any(job.state == "finished" for job in jobs):
        for job, reason in failed.items():
            console.print(f"{job} failed: {reason}", markup=False, highlight=False)
        raise ValueError(f"no run of the study is finished in {out}: there is nothing to compare")
    write_outputs(plan, jobs, failed, Path(out), console)
    return not failed


def plan_jobs(plan: Study, out: Path) -> list[Job]:
    """All runs: every arm with the first seed, then with the second, and so on, so that a part of
    a study compares as much as it can. Raises ValueError naming an arm whose config cannot work."""
    folder = out / "runs"
    configs = {
        arm.name: _checked(arm, run_config(plan, arm, plan.seeds[0], folder)) for arm in plan.arms
    }
    return [
        Job(
            arm,
            seed,
            dataclasses.replace(
                configs[arm.name], run=str(folder / arm.name / f"seed_{seed}"), seed=seed
            ),
        )
        for seed in plan.seeds
        for arm in plan.arms
    ]


def _checked(arm: Arm, config: TrainConfig) -> TrainConfig:
    try:
        parse_modes(config.eval.modes, partner=True)
        parse_modes(config.eval.final_modes)
        locate_checkpoint(config.model.path)
        sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        if min(sizes) > 0:  # Else it depends on the devices, which are not asked for here.
            check_phases(config, AbstractMesh(sizes, ("data", "fsdp", "tensor")))  # type: ignore
    except (ValueError, OSError) as error:
        raise ValueError(f"arm {arm.name!r}: {error}") from error
    return config


def _chosen(
    plan: Study, jobs: Sequence[Job], arms: Sequence[str], seeds: Sequence[int]
) -> list[Job]:
    for name in arms:
        plan.arm(name)
    unknown = [seed for seed in seeds if seed not in plan.seeds]
    if unknown:
        raise ValueError(f"--seeds: {unknown[0]} is none of {', '.join(map(str, plan.seeds))}")
    return [
        job
        for job in jobs
        if (not arms or job.arm.name in arms) and (not seeds or job.seed in seeds)
    ]


def _plan_table(plan: Study, jobs: Sequence[Job]) -> Table:
    """What there is to do, by arm."""
    table = Table(title=f"{plan.name}: {len(jobs)} runs")
    for name in ("arm", "outcome", "phases", "updates", "samples", "runs", "finished"):
        table.add_column(name, overflow="fold")
    for arm in plan.arms:
        own = [job for job in jobs if job.arm == arm]
        if not own:
            continue
        config = own[0].config
        known = all(phase.steps is not None for phase in config.phases)
        phases = plan_phases(config, sys.maxsize) if known else ()
        samples = sum(
            phase.steps * learning.prompts * learning.group
            for phase in phases
            for learning in learning_roles(phase.config)
        )
        text = ", ".join(
            f"{p.role} {p.steps if p.steps is not None else f'{p.epochs or 1:g} epochs'}"
            f" × {p.prompts} × {p.group}"
            for p in config.phases
        )
        table.add_row(
            arm.name,
            arm.metric,
            f"{config.rounds} × ({text})" if config.rounds > 1 else text,
            f"{sum(phase.updates for phase in phases):,}" if known else "by epochs",
            f"{samples:,}" if known else "by epochs",
            str(len(own)),
            str(sum(job.state == "finished" for job in own)),
        )
    return table


def write_outputs(
    plan: Study, jobs: Iterable[Job], failed: dict[Job, str], out: Path, console: Console
) -> dict[str, Any]:
    """study.json, study.md and report.html, of what is finished; returns the first."""
    missing = [
        {"arm": job.arm.name, "seed": job.seed, "state": "failed" if job in failed else job.state}
        | ({"reason": failed[job]} if job in failed else {})
        for job in jobs
        if job.state != "finished"
    ]
    runs = {(j.arm.name, j.seed): (j.folder, j.config) for j in jobs if j.state == "finished"}
    found = analyse(plan, runs, missing)
    _write(out / "study.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    text = markdown(found)
    _write(out / "study.md", f"# {plan.name}\n\n{text}\n")
    page = out / "report.html"
    _write(page, render(found))
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return found


# --- processes ------------------------------------------------------------------------------------


class Lock:
    """Held by a run's process for as long as it lives, whatever becomes of the study. One for each
    host, since each has a process of the run."""

    def __init__(self, job: Job):
        self.file = job.folder.with_name(f".{job.folder.name}.{socket.gethostname()}.lock")

    def take(self) -> int | None:
        """A file descriptor to pass on, or None while another process holds it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


@dataclasses.dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    task: Any


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    parallel: int,
    command: Command,
    console: Console,
    stops: StopRequests,
) -> dict[Job, str]:
    """Run what is not finished, `parallel` at once; returns why those failed that did.

    Raises Preempted, once all processes have saved themselves and ended, if the study is asked to
    end.
    """
    environment = CACHE | {"JAX_COMPILATION_CACHE_DIR": str((out / "cache").resolve())} | os.environ
    waiting, running = collections.deque(jobs), list[_Running]()
    started = collections.Counter[Job]()
    failed: dict[Job, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        whole = bar.add_task("runs", total=len(jobs))
        try:
            while waiting or running:
                if stops.received is not None:
                    break
                held = 0
                while len(running) < parallel and held < len(waiting):
                    job = waiting.popleft()
                    if job.state == "finished":  # Asked now: another host may just have seen it.
                        bar.advance(whole)
                        continue
                    process = _start(job, command(job), environment)
                    if process is None:  # That of a study that was killed is still ending.
                        waiting.append(job)
                        held += 1
                        continue
                    started[job] += 1
                    running.append(_Running(job, process, bar.add_task(str(job), total=None)))
                time.sleep(POLL_SECONDS)
                for one in list(running):
                    code = one.process.poll()
                    if code is None:
                        done, total = _steps(one.job.folder)
                        bar.update(one.task, completed=done, total=total)
                        continue
                    running.remove(one)
                    bar.remove_task(one.task)
                    if code in RESTARTS and started[one.job] <= MAX_RESTARTS:
                        waiting.appendleft(one.job)
                        continue
                    bar.advance(whole)
                    reason = _why_failed(one.job, code)
                    if reason is not None:
                        failed[one.job] = reason
                    said = "finished" if reason is None else f"failed: {reason}"
                    console.print(f"{one.job} {said}", markup=False, highlight=False)
        finally:
            _end(running)
    if stops.received is not None:
        raise Preempted(
            f"{stops.received}: {sum(job.state == 'finished' for job in jobs)} of {len(jobs)} runs "
            "are finished; the same command goes on from there"
        )
    return failed


def _start(
    job: Job, command: Sequence[str], environment: dict[str, str]
) -> subprocess.Popen[bytes] | None:
    """A process that holds the run's lock, or None if one does already."""
    lock = Lock(job).take()
    if lock is None:
        return None
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(_plain(job.config), sort_keys=False)
        _write(job.config_file, settings)
        tied = [sys.executable, "-m", "p2r_jax.study.tied", str(os.getpid()), *command]
        with job.log.open("ab") as log:
            return subprocess.Popen(
                tied,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on.
            )
    finally:
        os.close(lock)


def _end(running: Sequence[_Running]) -> None:
    """Ask all to save themselves and end, and wait for it."""
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    for one in running:
        one.process.wait()


def _why_failed(job: Job, code: int) -> str | None:
    for _ in range(int(SETTLE_SECONDS / POLL_SECONDS) if code == 0 else 0):
        if job.state == "finished":
            return None
        time.sleep(POLL_SECONDS)
    lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "no output")
    said = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said}: {last[-300:]}"


def _steps(folder: Path) -> tuple[int, int | None]:
    """Steps that a run has made, and will have."""
    total, done = None, 0
    try:
        total = sum(json.loads((folder / "schedule.json").read_text())["steps"])
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            for line in file.read().splitlines()[-2:]:
                done = int(json.loads(line)["step"])
    except (OSError, ValueError, KeyError):
        pass  # Not written yet, or half a line.
    return done, total


def _write(path: Path, text: str) -> None:
    """A whole file or none, also where several hosts write the same one."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def _plain(config: TrainConfig) -> Any:
    """As YAML has it (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
