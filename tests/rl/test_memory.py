"""The memory of a device: against arrays that are there, on a mesh of eight devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from p2r_jax import config as cfg
from p2r_jax.parallel.mesh import for_decoding, make_mesh
from p2r_jax.rl import launch
from p2r_jax.rl.experience import phase_sampling
from p2r_jax.rl.memory import Memory, memory_of, opt_state_bytes, tree_bytes
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.prompt_scan import Scan
from p2r_jax.rl.step import new_state
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.rollout.engine import empty_slots
from tests.rl.dry_runs import settings, write_rows
from tests.rl.tiny_run import PROMPTS


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    pass


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_checkpoint, _small_world):
    folder = tmp_path_factory.mktemp("memory")
    config = settings(folder / "run", tiny_checkpoint, write_rows(folder / "data"))
    config.mesh = cfg.MeshConfig(data=2, fsdp=2, tensor=2)
    config.model.compute_dtype = "bfloat16"
    config.rollout.greedy_slots = 64
    config.phases = [dataclasses.replace(p, microbatch=0) for p in config.phases]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "make_mesh", make_mesh)
        return launch.build_trainer(config, Console(quiet=True))


@pytest.fixture(scope="module")
def params(trainer):
    return trainer.load()


@pytest.fixture(scope="module")
def scan():
    needs = {"prompt_tokens": [70, 60], "patches": [90, 80], "canvas": [96, 96]}
    roles = ("perceiver", "reasoner", "baseline")
    images = dataclasses.replace(ImageStore.empty(), shapes=((384, 300), (100, 100)))
    return Scan("train", [], images, {(r, k): v for r in roles for k, v in needs.items()})


def on_first_device(tree: Any) -> int:
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == device
    )


def test_weights(trainer, params):
    like = trainer.like
    assert tree_bytes(like) == on_first_device(params)
    assert tree_bytes(like, "bfloat16") == on_first_device(trainer._to_snapshot(params))
    layout = for_decoding(like, trainer.mesh)
    assert tree_bytes(like, "bfloat16", layout) == on_first_device(trainer._to_rollout(params))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("freeze", [False, True])
def test_optimizer(trainer, params, name, freeze):
    config = cfg.OptimizerConfig(name=name, freeze_vision=freeze, moment_dtype="bfloat16")
    state = new_state(params, make_optimizer(config, 1))
    assert opt_state_bytes(config, trainer.like) == on_first_device(state.opt_state)


def test_caches(trainer, scan):
    """Those of the partner, which has the most slots."""
    phase, pipeline = trainer.phases[0], trainer.pipeline
    prefix, columns = empty_slots(
        pipeline.vocabulary.pad,
        text=pipeline.builder.processor.config.text,
        sampling=dataclasses.replace(phase_sampling(phase.config), group=1),
        slots=64,
        columns=1,
        prompt=128,
        ring=8,
        dtype="bfloat16",
        mesh=trainer.mesh,
    )
    found = memory_of(trainer, phase, scan).rollout
    prefix_bytes = on_first_device((prefix.keys, prefix.values))
    assert found["prefix cache of the reasoner, 64 slots × 128 tokens"] == prefix_bytes
    ring_bytes = on_first_device((columns.keys, columns.values))
    assert found["ring cache of the reasoner, 64 slots × 1 × 8 tokens"] == ring_bytes


def test_images(trainer, scan):
    builder = trainer.pipeline.builder
    pixels = [np.zeros((384, 300, 3), np.uint8)] * PROMPTS
    images = ImageStore.upload(pixels, builder.buckets, trainer.mesh)
    requests = [builder.plain("perceiver", images, i, "red?", "mca") for i in range(PROMPTS)]
    patches = builder.collate(requests, images).patches
    found = memory_of(trainer, trainer.phases[0], scan).update
    name = f"images, {-(-PROMPTS // 4)} × 384 × 384 × 3, on each device"
    assert found[name] == on_first_device(images.pixels)
    name = "images of the role that learns, as patches"
    assert found[name] == on_first_device(patches.pixels)


def test_the_policy_has_what_its_schedule_says(trainer, scan, monkeypatch):
    """Slots and refill are rounded up to the four devices that rows are split over."""
    phase = dataclasses.replace(
        trainer.phases[0],
        config=dataclasses.replace(trainer.phases[0].config, role="baseline", prompts=24, group=8),
    )
    found = memory_of(trainer, phase, scan).rollout
    assert "prefix cache of the baseline, 24 slots × 128 tokens" in found
    assert "ring cache of the baseline, 24 slots × 8 × 8 tokens" in found
    whole = found["prefill of the baseline, 24 prompts at once"]
    monkeypatch.setattr(trainer.config, "rollout", cfg.RolloutConfig(slots=10, columns=2))
    found = memory_of(trainer, phase, scan).rollout
    assert "ring cache of the baseline, 12 slots × 2 × 8 tokens" in found
    # A sixth of the prompts, but with patches: those of the whole batch are another's.
    vision = trainer.pipeline.builder.processor.config.vision
    part = found["prefill of the baseline, 4 prompts at once"]
    assert part == whole // 6 + 320 * vision.frame_dim


def test_sums():
    memory = Memory({"a": 1}, {"b": 2}, {"c": 4})
    assert (memory.total("rollout"), memory.total("update")) == (3, 5)


def test_controls_and_settings_that_cost_memory(trainer, scan, monkeypatch):
    def names(stage: str, **changes: Any) -> str:
        phase = trainer.phases[0]
        phase = dataclasses.replace(phase, config=dataclasses.replace(phase.config, **changes))
        return "; ".join(getattr(memory_of(trainer, phase, scan), stage))

    assert "weights of the partner" in names("rollout")
    assert "weights of the partner" not in names("rollout", partner="step")
    assert "prefix cache of the baseline" in names("rollout", role="baseline")
    assert "prefix cache" in names("rollout", role="joint")
    assert "summed" not in names("update")
    # Microbatches of two would leave two of the four devices without a prompt.
    assert "summed over 2 microbatches" in names("update", prompts=8, microbatch=2)
    assert "summed" not in names("update", prompts=8, microbatch=2, minibatches=2)
    assert "weights as computed with, bfloat16" in names("update")
    assert "weights of the start" not in names("always")
    loss = dataclasses.replace(trainer.config.loss, reference="start")
    monkeypatch.setattr(trainer.config, "loss", loss)
    assert "weights of the start, bfloat16" in names("always")
