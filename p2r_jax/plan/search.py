"""What to change so that a run fits, and which way is the fastest: tried, not guessed."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2r_jax.config import TrainConfig
from p2r_jax.plan.chips import Slice, islands
from p2r_jax.plan.report import Plan, Row, Watch, gib, make_plan
from p2r_jax.qwen3_vl.config import Qwen3VLConfig

Change = dict[str, Any]
"""New values by the name of the setting; `microbatch` is that of every phase."""


def changed(config: TrainConfig, change: Change) -> TrainConfig:
    """A copy with other settings."""
    own = copy.deepcopy(config)
    for name, value in change.items():
        if name == "microbatch":
            own.phases = [dataclasses.replace(phase, microbatch=value) for phase in own.phases]
            continue
        part, _, field = name.partition(".")
        setattr(getattr(own, part), field, value)
    return own


def remedies(config: TrainConfig, plan: Plan, row: Row) -> Iterator[Change]:
    """Changes that may make one program fit, the cheapest in speed first."""
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    tensor = plan.mesh["tensor"]
    if row.program.stage == "rollout":
        sampled = config.rollout.slots or max(phase.prompts for phase in config.phases)
        for divide in (2, 4, 8):
            if sampled // divide >= shards:
                yield {"rollout.slots": sampled // divide}
            if config.rollout.greedy_slots // divide >= shards:
                yield {"rollout.greedy_slots": config.rollout.greedy_slots // divide}
        if config.rollout.refill != shards:
            yield {"rollout.refill": shards}
    if row.program.stage == "update":
        if not config.model.remat:
            yield {"model.remat": True}
        micro = min(phase.microbatch or phase.prompts for phase in config.phases)
        while micro // 2 >= shards and micro % 2 == 0:
            micro //= 2
            yield {"microbatch": micro}
        if config.optimizer.moment_dtype != "bfloat16" and config.optimizer.name == "adamw":
            yield {"optimizer.moment_dtype": "bfloat16"}
        if config.optimizer.name != "adafactor":
            yield {"optimizer.name": "adafactor"}
    if plan.mesh["fsdp"] % 2 == 0:
        yield {"mesh.tensor": tensor * 2, "mesh.fsdp": -1}


def suggestions(
    config: TrainConfig,
    model: Qwen3VLConfig,
    plan: Plan,
    keep: Path | None,
    watch: Watch = lambda name: None,
    most: int = 8,
) -> list[str]:
    """What became of each remedy for the programs that do not fit, at most `most` for each kind."""
    told = []
    usable = plan.where.chip.usable
    kinds: dict[str, Row] = {}
    for row in sorted(plan.rows, key=lambda row: -row.total):
        kind = ", ".join(row.program.name.split(", ")[:2])
        if row.total > usable:
            kinds.setdefault(kind, row)
    for kind, row in kinds.items():
        for change in list(remedies(config, plan, row))[:most]:
            name = ", ".join(f"{k} {v}" for k, v in change.items())
            watch(f"{kind} with {name}")
            try:
                tried = make_plan(changed(config, change), model, plan.where, keep, only=[kind])
            except (ValueError, RuntimeError) as error:
                told.append(f"{kind}: {name}: cannot be, {error}")
                continue
            if not tried.rows:
                continue
            total = tried.peak.total
            end = "fits" if total <= usable else "still too much"
            told.append(f"{kind}: {name}: {gib(total)} GiB, {end}")
            if total <= usable:
                break
    return told


def candidates(config: TrainConfig, model: Qwen3VLConfig, where: Slice) -> Iterator[Change]:
    """Meshes whose heads divide, and microbatches that they divide, the smallest first."""
    mesh = where.mesh(dataclasses.replace(config.mesh, data=1, fsdp=-1, tensor=1))
    # Between slices or nodes only gradients are summed up.
    chips, data = mesh.size, len(set(islands(mesh)))
    prompts = [phase.prompts // phase.minibatches for phase in config.phases]
    tensor = 1
    while tensor <= chips:
        heads = (model.text.num_key_value_heads, model.vision.num_heads)
        if chips % tensor == 0 and not any(n % tensor for n in heads):
            shards = chips // tensor
            for times in (1, 2, 4):
                micro = shards * times
                if shards % data == 0 and all(n % micro == 0 for n in prompts):
                    change = {"mesh.data": data, "mesh.fsdp": -1, "mesh.tensor": tensor}
                    yield change | {"microbatch": micro}
        tensor *= 2


def search(
    config: TrainConfig,
    model: Qwen3VLConfig,
    where: Slice,
    keep: Path | None,
    watch: Watch = lambda name: None,
) -> list[tuple[Change, Plan | str]]:
    """A plan for each candidate: those that fit, the fastest first, then the others, then what
    cannot be, with the reason.

    The plan of one that does not fit ends with the first program that is too large, and larger
    microbatches on its mesh are not tried.
    """
    found: list[tuple[Change, Plan | str]] = []
    too_large: dict[int, Change] = {}
    for change in candidates(config, model, where):
        if smaller := too_large.get(change["mesh.tensor"]):
            found.append((change, f"microbatch {smaller['microbatch']} does not fit already"))
            continue
        name = ", ".join(f"{k} {v}" for k, v in change.items())
        tell = functools.partial(lambda name, program: watch(f"{name}: {program}"), name)
        try:
            plan = make_plan(changed(config, change), model, where, keep, tell, give_up=True)
            found.append((change, plan))
            if not plan.fits:
                too_large[change["mesh.tensor"]] = change
        except (ValueError, RuntimeError) as error:
            found.append((change, str(error)))

    def rank(item: tuple[Change, Plan | str]) -> tuple[int, float]:
        _, plan = item
        if isinstance(plan, str):
            return 2, 0.0
        return (0, plan.seconds) if plan.fits else (1, float(plan.peak.total))

    return sorted(found, key=rank)
