"""A run's warnings where people see them: console, RUN/warnings.jsonl, metrics; and what follows.

The main process decides for all, since only it reads and writes the files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from p2r_jax.config import HealthConfig
from p2r_jax.parallel.multihost import gather, is_main
from p2r_jax.paths import write_whole
from p2r_jax.rl.health import HealthWarning, Monitor
from p2r_jax.rl.run_log import step_of
from p2r_jax.rl.stop import RunStopped

FILE = "warnings.jsonl"


class Watch:
    """Of one run, from a step on."""

    def __init__(
        self, run: Path, config: HealthConfig, step: int, notify: Callable[[str], None] = print
    ):
        """step: the last one whose row stays; metrics.jsonl holds none beyond it. notify: told each
        warning. Raises RunStopped if what stopped the run before still holds."""
        self.config, self.file, self.notify = config, run / FILE, notify
        self.monitor = Monitor(config)
        if is_main():
            for line in _lines(run / "metrics.jsonl"):
                self.monitor.add(json.loads(line))
            kept = [line for line in _lines(self.file) if step_of(line) <= step]
            write_whole(self.file, "".join(line + "\n" for line in kept))
            self.monitor.count = len(kept)
        if config.action == "stop" and _on_main(bool(self.monitor.active)):
            raise RunStopped(self._reason())

    def after_step(self, step: int, where: dict[str, Any], metrics: dict[str, float]) -> bool:
        """Whether `health.action` is due after a step, the same on all processes; warns, and adds
        `health/warnings`, the count so far, to the metrics of its row."""
        found = self.monitor.add({"step": step} | where | metrics) if is_main() else []
        metrics["health/warnings"] = self.monitor.count
        if found:
            with self.file.open("a") as file:
                for warning in found:
                    entry = dataclasses.asdict(warning) | {"action": self.config.action}
                    file.write(json.dumps(entry) + "\n")
                    self.notify(f"warning: {warning.label}. {warning.message}")
            if self.config.action == "stop_phase":
                self.notify("the phase ends here (health.action)")
        return self.config.action != "warn" and _on_main(bool(found))

    def stop(self, step: int) -> None:
        """Raise RunStopped, which names what the run was stopped for."""
        raise RunStopped(f"{self._reason()} The run is saved at step {step}.")

    def _reason(self) -> str:
        if not is_main():
            return "process 0 stopped the run (health.action): see its output."
        active: list[HealthWarning] = self.monitor.active
        said = "; ".join(warning.label for warning in active)
        advice = " ".join(dict.fromkeys(warning.message for warning in active))
        return (
            f"health.action is stop, and the run is not well: {said}. {advice} To go on "
            "nevertheless, give the same command with another threshold or --health.action warn."
        )


def _on_main(flag: bool) -> bool:
    """What the main process says. All processes must call it."""
    return bool(gather(np.asarray([flag]))[0].any())


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
