"""Whole runs of `tiny_run`, watched, killed and compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest

from p2r_jax.config import TrainConfig
from p2r_jax.rl import experience, launch
from p2r_jax.rl.trainer import Trainer
from tests.rl.tiny_run import fingerprint, metric_rows, patches


def cached(folder: Path) -> dict[str, str]:
    """Environment of a process that takes compiled programs from a folder, and leaves its own."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@contextmanager
def small_world(cache: Path) -> Iterator[None]:
    """What makes a run small; programs are compiled once for all runs that share `cache`, those of
    other processes included.

    In memory they do not outlive it: a process that tests everything would need gigabytes, and what
    a run compiles would depend on the tests before it.
    """
    options = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    jax.clear_caches()
    before = {name: jax.config.values[name] for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in patches():
            patch.setattr(where, name, value)
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            jax.clear_caches()


class Run:
    """A run that went through, or the rest of one that did not, and what each collection used."""

    def __init__(self, config: TrainConfig):
        self.folder = Path(config.run)
        self.weights: list[tuple[str, int, int]] = []
        """Role, policy and partner."""
        self.questions: list[tuple[str, ...]] = []
        self.seeds: list[tuple[int, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            for role, collect in experience.COLLECT.items():
                patch.setitem(experience.COLLECT, role, self.watched(role, collect))
            self.summary = launch.train(config)
        self.rows = metric_rows(self.folder)
        self.steps = [row for row in self.rows if row["phase"] != "eval"]

    def watched(self, role, collect):
        def watching(step):
            self.weights.append((role, fingerprint(step.policy), fingerprint(step.partner)))
            self.questions.append(tuple(loaded.row.id for loaded in step.rows))
            self.seeds.append(tuple(map(int, step.seeds)))
            return collect(step)

        return watching

    def samples(self, step: int) -> list[dict[str, Any]]:
        file = self.folder / "samples" / f"step_{step:06d}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


class Killed(Exception):
    pass


def kill(config: TrainConfig, where: str, call: int) -> None:
    """A run that ends where a method of the trainer is called for the n-th time."""
    calls, original = 0, getattr(Trainer, where)

    def deadly(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            self.checkpoints.manager.wait_until_finished()
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, where, deadly)
        with pytest.raises(Killed):
            launch.train(config)


def straight_and_killed(folder: Path, config: TrainConfig, step: int) -> tuple[Run, Run]:
    """The same run twice: straight through, and killed where its n-th step would begin."""
    whole = Run(dataclasses.replace(config, run=str(folder / "whole")))
    config = dataclasses.replace(config, run=str(folder / "killed"))
    kill(config, "_step", step)
    return whole, Run(config)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what depends on the machine."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "compile/"))} for row in rows
    ]


def assert_same_outcome(run: Path, whole: Run) -> None:
    """Bitwise the same weights, and the same figures but for the time they took."""
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (whole.folder / weights).read_bytes()
    assert figures(metric_rows(run)) == figures(whole.rows)
    for file in sorted((whole.folder / "samples").glob("*.jsonl")):
        assert (run / "samples" / file.name).read_text() == file.read_text()
    summary = json.loads((run / "summary.json").read_text())
    expected = json.loads(json.dumps(whole.summary))
    for parts in (summary, expected):
        del parts["stages"], parts["wall_seconds"]
    assert summary == expected
