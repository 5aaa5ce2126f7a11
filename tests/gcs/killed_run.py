"""`python -m tests.gcs.killed_run RUN MODEL`: two steps of `tiny_run`, to be killed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from p2r_jax.config import TrainConfig
from p2r_jax.rl import launch
from tests.rl.tiny_run import make_config, patches


def config_of(run: str, model: Path | str) -> TrainConfig:
    config = make_config(Path("unused"), Path("unused"))
    config.phases, config.run, config.model.path = config.phases[:1], run, str(model)
    config.eval = dataclasses.replace(config.eval, every=0, final_modes=["p2r"], modes=["p2r"])
    return config


if __name__ == "__main__":
    for where, name, value in patches():
        setattr(where, name, value)
    launch.train(config_of(*sys.argv[1:]))
