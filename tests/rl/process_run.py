"""A training run in one of several processes, as a program:

    python -m tests.rl.process_run RUN MODEL DEVICES [PROCESS PROCESSES PORT]

Two perceiver steps and a reasoner step of eight prompts, on a mesh of all devices of all processes.
As in `tiny_run`, a text's checksum decides what it is worth; the exchange of grades between
processes is the real one, and RUN_PROCESS.graded tells which answers this process graded.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import yaml

MESHES = {1: (1, 1, 1), 8: (2, 2, 2)}
"""(data, fsdp, tensor) by the number of devices."""


def main(
    run: str, model: str, devices: str, process: str = "0", processes: str = "1", port: str = "0"
) -> int:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    import jax

    from p2r_jax import cli
    from p2r_jax import config as cfg
    from p2r_jax.rl import experience
    from p2r_jax.roles import answers
    from tests.rl.tiny_run import boxes_of, checksum, make_config

    jax.config.update("jax_platforms", "cpu")
    folder = Path(run).parent
    folder.mkdir(parents=True, exist_ok=True)
    graded = folder / f"{Path(run).name}_{process}.graded"

    def grade(response: str, *args: object, **options: object) -> float:
        with graded.open("a") as file:
            file.write(f"{checksum(response)}\n")
        return float(checksum(response) % 2)

    experience.parse_response = boxes_of
    answers.choice_reward = grade

    config = make_config(Path(run), Path(model))
    several = int(processes) > 1
    data, fsdp, tensor = MESHES[int(devices) * int(processes)]
    config = dataclasses.replace(
        config,
        mesh=cfg.MeshConfig(data, fsdp, tensor, cpu_devices=int(devices)),
        distributed=cfg.DistributedConfig(
            coordinator=f"localhost:{port}" if several else None,
            processes=int(processes) if several else None,
            process=int(process) if several else None,
        ),
        phases=[
            dataclasses.replace(phase, prompts=8, microbatch=0, steps=steps)
            for phase, steps in zip(config.phases, (2, 1), strict=True)
        ],
        eval=dataclasses.replace(config.eval, every=0, final_modes=["p2r"], modes=["p2r"]),
    )
    file = folder / f"{Path(run).name}_{process}.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return cli.main(["train", "--config", str(file)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
