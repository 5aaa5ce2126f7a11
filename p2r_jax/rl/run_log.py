"""What a run writes for people: metrics.jsonl, TensorBoard, samples with pictures, summary.json."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import zlib
from pathlib import Path
from typing import Any

from p2r_jax.config import LogConfig
from p2r_jax.data.loader import LoadedRow
from p2r_jax.evals.record_file import save_pictures
from p2r_jax.parallel.multihost import is_main

PICTURE_SIDE = 1280
"""Longest side of the pictures of training samples, pixels; there are some in every step."""


def require_wandb(config: LogConfig) -> None:
    """Raise ValueError if it is asked for and missing."""
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "log.wandb_project is set but wandb is missing: pip install 'p2r_jax[wandb]'"
        )


class RunLog:
    """Append-only. Rows of steps that are repeated after a resume replace the old ones."""

    def __init__(self, run: Path, config: LogConfig, start_step: int):
        self.run, self.config = run, config
        self.active = is_main()
        self.metrics_file = run / "metrics.jsonl"
        self.board: Any = None
        self.wandb: Any = None
        if not self.active:
            return
        run.mkdir(parents=True, exist_ok=True)
        self._drop_rows_after(start_step)
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        if config.wandb_project:
            import wandb

            # The same id after a resume: one run there as here.
            own = f"{run.name}-{zlib.crc32(str(run.absolute()).encode()):08x}"
            self.wandb = wandb.init(
                project=config.wandb_project, dir=str(run), id=own, name=run.name, resume="allow"
            )

    def _drop_rows_after(self, step: int) -> None:
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step and self._is_finished(line)]
        temporary = self.metrics_file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.metrics_file)

    def _is_finished(self, line: str) -> bool:
        """False for the row of an evaluation that was cut off before its summary was written."""
        name = json.loads(line).get("name")
        return name is None or (self.run / "eval" / f"{name}.json").is_file()

    def metrics(self, step: int, where: dict[str, Any], values: dict[str, float]) -> None:
        """One line: `where` (phase, ...) and flat numbers."""
        if not self.active:
            return
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step} | where | values) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def seconds(self) -> dict[str, float]:
        """Wall seconds by stage, added up over all rows; those of repeated steps count once."""
        totals: dict[str, float] = collections.defaultdict(float)
        lines = []
        if self.active and self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines()
        for row in map(json.loads, lines):
            for name, value in row.items():
                if name.startswith("time/"):
                    totals[name.removeprefix("time/")] += value
        return dict(totals)

    def samples(self, step: int, samples: list[dict[str, Any]], rows: dict[str, LoadedRow]) -> None:
        """samples/step_N.jsonl with one picture (and crops) per prompt; `rows` by id."""
        if not self.active:
            return
        folder = self.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"step_{step:06d}.jsonl").open("w") as file:
            for number, sample in enumerate(samples):
                stem = f"samples/images/step_{step:06d}_{sample['id'].replace('/', '_')}"
                record = {
                    "boxes": sample["labelled_boxes"],
                    "mode": f"sample{number}",
                }
                pictures = save_pictures(
                    self.run, stem, record, rows[sample["id"]], longest=PICTURE_SIDE
                )
                plain = {k: v for k, v in sample.items() if k != "labelled_boxes"}
                file.write(json.dumps(plain | pictures) + "\n")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step_of(line: str) -> float:
    """Step of a metrics line; a line cut by a crash counts as never written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
