"""Kill a training run at random moments, again and again, and show that nothing is different.

    python -m tests.rl.kill_harness --kills 20 --seed 0

A run of eight steps (two rounds of two perceiver and two reasoner steps; role anchor, dynamic
sampling, two updates a step; a checkpoint every second step) goes through once. Then the same run
is started over and over and gets SIGKILL in a rollout, in an update, while it saves or between an
evaluation that is the best so far and its checkpoint, at a random step and after a random delay,
until so many kills are done; then it may finish. The reasoner starts with the perceiver's best
weights. Its metrics, its evaluations, which step is best, its exported weights and every array of
its last checkpoint must be bit-identical.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.rl.runs import cached

ROOT = Path(__file__).parents[2]
STAGES = ("decode", "update", "save", "improve")
VARIES = ("time/", "compile/")
"""Metrics that no two runs share."""
LONGEST_DELAY = {"decode": 0.1, "update": 0.6, "save": 0.3, "improve": 0.1}
"""Seconds after the beginning of a stage; about what it takes."""


def run_here(run: str, model: str, stages: str) -> None:
    """The run itself; it writes the stage that it is in to the file `stages`, a line for each."""
    from p2r_jax.rl import experience, launch, trainer
    from p2r_jax.rl.best import Best
    from p2r_jax.rl.checkpointing import Checkpoints
    from tests.rl.tiny_run import make_config, patches

    for where, name, value in patches():
        setattr(where, name, value)
    file = open(stages, "a", buffering=1)  # noqa: SIM115  open as long as the process lives
    step = 0

    class Telling(experience.Clock):
        def __call__(self, name: str) -> Any:
            file.write(f"{step} {name}\n")
            return super().__call__(name)

    save = Checkpoints.save

    def telling_save(self: Checkpoints, progress: Any, *rest: Any) -> None:
        file.write(f"{progress.step} save\n")
        save(self, progress, *rest)

    add = Best.add

    def telling_add(self: Best, step: int, found: Any) -> None:
        add(self, step, found)
        if step and self.wants(step):
            file.write(f"{step} improve\n")
            time.sleep(1.5 * LONGEST_DELAY["improve"])  # Or the kill might come after the save.

    Best.add = telling_add
    original = trainer.Trainer._step

    def counting(self: trainer.Trainer, *args: Any) -> Any:
        nonlocal step
        step = self.live.progress.step + 1
        return original(self, *args)

    trainer.Clock, Checkpoints.save, trainer.Trainer._step = Telling, telling_save, counting
    config = make_config(Path(run), Path(model))
    phases = [
        dataclasses.replace(
            phase, role_anchor=0.5, role_anchor_prompts=2, dynamic_sampling=1, minibatches=2,
            microbatch=0,
        )
        for phase in config.phases
    ]  # fmt: skip
    phases[1].start = "best"
    config = dataclasses.replace(config, phases=phases, rounds=2)
    config.checkpoint.every, config.checkpoint.keep_best = 2, "p2r"
    config.eval = dataclasses.replace(config.eval, modes=["p2r"], final_modes=["p2r"])
    launch.train(config)


class Run:
    """The run in a process of its own."""

    def __init__(self, folder: Path, model: Path, cache: Path):
        self.folder, self.stages = folder, folder.with_suffix(".stages")
        self.log = folder.with_suffix(".log")
        self.stages.write_text("")
        options = {"JAX_PLATFORMS": "cpu", **cached(cache)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, "--run", str(folder), "--model", str(model),
                 "--stages", str(self.stages)],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | options,
            )  # fmt: skip

    def moments(self) -> Iterator[tuple[int, str]]:
        """(step, stage) as they begin, until the process ends."""
        with self.stages.open() as file:
            while self.process.poll() is None:
                line = file.readline()
                if line.endswith("\n"):
                    step, stage = line.split()
                    yield int(step), stage
                else:
                    time.sleep(0.002)

    def kill_in(self, stage: str, skip: int, delay: float) -> int | None:
        """SIGKILL `delay` seconds after the stage begins for the (skip + 1)-th time; the step it
        happened in, or None if the run ended before."""
        for step, now in self.moments():
            if now == stage:
                if not skip:
                    time.sleep(delay)
                    self.process.send_signal(signal.SIGKILL)
                    self.process.wait()
                    return step
                skip -= 1
        if self.process.returncode:
            raise RuntimeError(f"the run failed:\n{self.log.read_text()[-3000:]}")
        return None

    def finish(self) -> None:
        if self.process.wait():
            raise RuntimeError(f"the run failed:\n{self.log.read_text()[-3000:]}")


def outcome(run: Path) -> dict[str, Any]:
    """All that must be the same: rows, evaluations, and the bytes of every array."""
    import orbax.checkpoint as ocp

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        f"row {i}": {k: v for k, v in row.items() if not k.startswith(VARIES)}
        for i, row in enumerate(rows)
    }
    for file in sorted((run / "eval").glob("*.json*")):
        found[f"eval/{file.name}"] = file.read_text()
    for file in sorted((run / "samples").glob("*.jsonl")):
        found[f"samples/{file.name}"] = file.read_text()
    found["export"] = (run / "export" / "model.safetensors").read_bytes()
    for name in ("best.json", "export/README.md"):
        found[name] = (run / name).read_text()
    found["summary"] = json.loads((run / "summary.json").read_text())["export"]
    step = max(int(path.name) for path in (run / "checkpoints").iterdir())
    state = ocp.StandardCheckpointer().restore(run / "checkpoints" / str(step) / "state")
    for path, leaf in _leaves(state):
        found[f"checkpoint {step} {path}"] = np.asarray(leaf).tobytes()
    return found


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in sorted(tree.items()):
            yield from _leaves(value, f"{path}/{name}")
    else:
        yield path, tree


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]


def killed_run_equals_whole_run(
    folder: Path, model: Path, kills: int, seed: int, stages: tuple[str, ...] = STAGES
) -> list[tuple[str, int, float]]:
    """Where it was killed: (stage, step, seconds into the stage). Raises AssertionError naming what
    differs."""
    cache = folder / "compiled"
    whole = Run(folder / "whole", model, cache)
    whole.finish()
    choice, done = random.Random(seed), []
    order = itertools.cycle(stages)
    while len(done) < kills:
        stage = next(order)
        delay = choice.uniform(0, LONGEST_DELAY[stage])
        run = Run(folder / "killed", model, cache)
        step = run.kill_in(stage, choice.randrange(3), delay)
        if step is None:  # It was through before; a new one begins.
            _assert_same(folder)
            subprocess.run(["rm", "-rf", str(folder / "killed")], check=True)
            continue
        done.append((stage, step, delay))
        print(f"kill {len(done)}: {1000 * delay:.0f} ms into {stage} of step {step}", flush=True)
    Run(folder / "killed", model, cache).finish()
    _assert_same(folder)
    return done


def _assert_same(folder: Path) -> None:
    expected = outcome(folder / "whole")
    different = differences(outcome(folder / "killed"), expected)
    assert not different, f"not as in the run that was never stopped: {sorted(different)[:20]}"
    print(f"bit-identical: {len(expected)} rows, files and arrays", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="p2r_jax/assets/tiny", help="checkpoint folder")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--stages", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_here(args.run, args.model, args.stages)
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = killed_run_equals_whole_run(Path(folder), Path(args.model), args.kills, args.seed)
    by_stage = {stage: sum(1 for s, _, _ in done if s == stage) for stage in STAGES}
    print(f"{len(done)} kills {by_stage}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
