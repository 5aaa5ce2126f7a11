"""A whole training run small enough for tests: random tiny weights, four steps, one device.

A random model writes gibberish, and gibberish earns nothing. So a text's checksum decides which
boxes it stands for and whether an answer is right: rewards then differ within a group, evidence
depends on what the perceiver wrote, and everything else is the real thing.

As a program, `python -m tests.rl.tiny_run CONFIG`, it is a run that can be killed from outside.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from p2r_jax import config as cfg
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.rl import experience, launch, updates
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.roles.boxes import Box, ParsedBoxes
from p2r_jax.roles.grading import Grader

PROMPTS, GROUP, TOKENS = 4, 2, 5


def make_config(run: Path, model: Path, **changes: Any) -> cfg.TrainConfig:
    """Two perceiver steps, then two reasoner steps; a checkpoint after each."""
    phase = {"steps": 2, "prompts": PROMPTS, "group": GROUP, "microbatch": 2}
    phase |= {"max_new_tokens": TOKENS, "partner_max_new_tokens": TOKENS}
    return dataclasses.replace(
        cfg.TrainConfig(
            run=str(run),
            model=cfg.ModelConfig(
                path=str(model), prompts="tiny", compute_dtype="float32", remat=False
            ),
            mesh=cfg.MeshConfig(fsdp=1),
            # One bucket of each kind: nothing is compiled twice.
            buckets=cfg.BucketConfig(patches=[160], prompt_tokens=[128], canvas=[448], image=[384]),
            phases=[
                cfg.PhaseConfig(role="perceiver", **phase),
                cfg.PhaseConfig(role="reasoner", **phase),
            ],
            # Slots are decoded whether they are used or not; by default there are 64.
            rollout=cfg.RolloutConfig(greedy_slots=PROMPTS),
            optimizer=cfg.OptimizerConfig(learning_rate=1e-3),
            eval=cfg.EvalDuringTraining(
                questions=PROMPTS,
                final_questions=PROMPTS,
                every=1,
                final_modes=["p2r", "oracle_box"],
                batch=PROMPTS,
            ),
            log=cfg.LogConfig(samples_every=1, sample_prompts=2),
            # Tests of the best weights turn it on; others can tell which checkpoints stay.
            checkpoint=cfg.CheckpointConfig(every=1, keep_best=None),
        ),
        **changes,
    )


def checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def boxes_of(text: str) -> ParsedBoxes:
    """One box, a quarter of the image's side, where the checksum says."""
    y, x = divmod(checksum(text) % 4, 2)
    x, y = 100 + 500 * x, 100 + 500 * y
    return ParsedBoxes((Box((float(x), float(y), x + 250.0, y + 250.0), "tile"),), True)


class ChecksumGrader(Grader):
    """Grades by the text's checksum, whatever was asked."""

    def grade(self, answers: Any) -> Any:
        return [float(checksum(answer.response) % 2) for answer in answers]


@functools.cache
def _optimizer(settings: tuple[Any, ...], steps: int) -> Any:
    return make_optimizer(cfg.OptimizerConfig(*settings), steps)


def one_optimizer(config: cfg.OptimizerConfig, steps: int) -> Any:
    """The same object for all runs of a process, since the step is compiled for each object."""
    return _optimizer(dataclasses.astuple(config), steps)


def patches() -> list[tuple[Any, str, Any]]:
    """What to replace, as (where, name, value)."""
    one = jax.devices()[:1]
    return [
        (launch, "make_mesh", lambda data, fsdp, tensor: make_mesh(data, fsdp, tensor, one)),
        (experience, "parse_response", boxes_of),
        (launch, "Grader", ChecksumGrader),
        (updates, "make_optimizer", one_optimizer),
    ]


def fingerprint(params: Any) -> int:
    value = 0
    for leaf in jax.tree.leaves(params):
        value = zlib.crc32(np.asarray(leaf).tobytes(), value)
    return value


def metric_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    for where, name, value in patches():
        setattr(where, name, value)
    run, model = map(Path, sys.argv[1:])
    launch.train(make_config(run, model))


if __name__ == "__main__":
    main()
