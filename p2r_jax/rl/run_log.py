"""What a run writes for people: metrics.jsonl, TensorBoard, samples with pictures, summary.json.

In a bucket metrics.jsonl grows by whole rows, each there before the checkpoint that vouches for it,
so that a resumed run drops and keeps the same rows as on a disk.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

from p2r_jax.config import LogConfig
from p2r_jax.data.loader import LoadedRow
from p2r_jax.evals.record_file import save_pictures
from p2r_jax.parallel.multihost import is_main
from p2r_jax.paths import is_remote, read_range, write_whole

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
            self.board = _Board(run / "tensorboard", start_step + 1)
        if config.wandb_project:
            import wandb

            # The same id after a resume: one run there as here.
            own = f"{run.name}-{zlib.crc32(str(run.absolute()).encode()):08x}"
            files = tempfile.gettempdir() if is_remote(run) else str(run)
            self.wandb = wandb.init(
                project=config.wandb_project, dir=files, id=own, name=run.name, resume="allow"
            )

    def _drop_rows_after(self, step: int) -> None:
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text().splitlines()
        kept = [line for line in lines if step_of(line) <= step and self._is_finished(line)]
        write_whole(self.metrics_file, "".join(line + "\n" for line in kept))

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
            self.board.add(step, values)
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


class _Board:
    """TensorBoard's writer. The library sends a file to a bucket anew with every flush; here it
    writes to a disk, and what is new is appended in the bucket."""

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX import SummaryWriter

        self._folder, self._sent = folder, collections.Counter[str]()
        self._scratch = tempfile.TemporaryDirectory() if is_remote(folder) else None
        files = self._scratch.name if self._scratch else str(folder)
        self._writer = SummaryWriter(files, purge_step=purge_step)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._send()

    def _send(self) -> None:
        for file in Path(self._scratch.name).iterdir() if self._scratch else ():
            new = read_range(file, self._sent[file.name], file.stat().st_size)
            if new:
                with (self._folder / file.name).open("ab") as out:
                    out.write(new)
                self._sent[file.name] += len(new)

    def close(self) -> None:
        self._writer.close()
        self._send()
        if self._scratch:
            self._scratch.cleanup()


def step_of(line: str) -> float:
    """Step of a metrics line; a line cut by a crash counts as never written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
