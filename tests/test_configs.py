"""Config files: what `--config` makes of them, and the ones that come with the project."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2r_jax import cli
from p2r_jax.config import TrainConfig
from p2r_jax.rl import launch
from p2r_jax.rl.schedule import plan_phases

CONFIGS = Path(__file__).parents[1] / "configs"
CHIPS = {"h100-8": 8, "v5e-16": 16, "v5p-8": 4, "v6e-16": 16}
RELEASED = ["p2r_2b.yaml", "p2r_4b.yaml", "p2r_8b.yaml"]


def train_config(*argv: str) -> TrainConfig:
    parser = cli._train_parser()
    return cli._dataclass_of(parser, parser.parse_args(list(argv)), TrainConfig)


def test_options_override_the_file_and_keep_its_siblings():
    config = train_config(
        "--config",
        str(CONFIGS / "tiny.yaml"),
        "--optimizer.learning_rate=1e-5",
        "--run",
        "elsewhere",
    )
    assert config.run == "elsewhere"
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.freeze_vision is True
    assert config.mesh.cpu_devices == 2
    assert [phase.role for phase in config.phases] == ["perceiver", "reasoner"]


def test_nested_values_of_a_file_reach_their_fields(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: {max_pixels: 4096}\n"
        "phases: [{role: reasoner, steps: 3, prompts: 4, microbatch: 2}]\n"
        "loss: {dual_clip: null, clip_high: 0.3}\n"
        "eval: {modes: [p2r, default]}\n"
    )
    config = train_config("--config", str(file))
    assert config.model.max_pixels == 4096
    assert config.model.path == "tiny"
    (phase,) = config.phases
    assert (phase.role, phase.steps, phase.microbatch, phase.group) == ("reasoner", 3, 2, 8)
    assert (config.loss.dual_clip, config.loss.clip_high, config.loss.clip_low) == (None, 0.3, 0.2)
    assert config.eval.modes == ["p2r", "default"]


def test_a_config_that_was_written_reads_back_equal(tmp_path):
    config = train_config("--config", str(CONFIGS / "tiny.yaml"))
    launch.write_config(config, tmp_path)
    assert train_config("--config", str(tmp_path / "config.yaml")) == config


def files(*names: str) -> list[str]:
    """Options that add up these configs."""
    return [option for name in names for option in ("--config", str(CONFIGS / name))]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_is_valid(file):
    train_config("--config", str(file)).validate()


@pytest.mark.parametrize("mesh", sorted(f.stem for f in (CONFIGS / "mesh").iterdir()))
@pytest.mark.parametrize("recipe", RELEASED)
def test_a_mesh_after_a_recipe_changes_nothing_but_where_and_how_fast(recipe, mesh):
    config = train_config(*files(recipe, f"mesh/{mesh}.yaml"))
    config.validate()
    alone = train_config(*files(recipe))
    assert config.mesh != alone.mesh
    assert dataclasses.replace(config, mesh=alone.mesh, rollout=alone.rollout) == alone
    shards = config.mesh.data * config.mesh.fsdp
    assert all(phase.prompts % (shards * phase.microbatch) == 0 for phase in config.phases)
    assert shards * config.mesh.tensor == CHIPS[mesh]


@pytest.mark.parametrize("recipe", RELEASED)
@pytest.mark.parametrize(
    "name, phases, rounds",
    [
        ("alternating", [("perceiver", 52, 1024), ("reasoner", 52, 2048)], 3),
        ("baseline", [("baseline", 312, 2048)], 1),
        ("joint", [("joint", 156, 1024)], 1),
    ],
)
def test_an_ablation_after_a_recipe_changes_its_phases(recipe, name, phases, rounds):
    """The training data have 10,000 rows; what a phase does not say is the recipe's."""
    config = train_config(*files(recipe, f"ablations/{name}.yaml"))
    config.validate()
    planned = plan_phases(config, 10_000)
    assert [(p.role, p.steps, p.config.max_new_tokens) for p in planned] == phases * rounds
    for phase in config.phases:
        assert (phase.prompts, phase.group, phase.microbatch) == (64, 8, 1)
        assert phase.partner_max_new_tokens == 2048
    alone = train_config(*files(recipe))
    own = {"run", "phases", "rounds", "eval"}
    same = {f.name: getattr(alone, f.name) for f in dataclasses.fields(alone) if f.name in own}
    assert dataclasses.replace(config, **same) == alone


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_recipe_is_the_authors(name):
    """P2R §2, number by number."""
    config = train_config("--config", str(CONFIGS / name))
    assert [phase.steps for phase in plan_phases(config, rows=10_000)] == [156, 156]
    perceiver, reasoner = config.phases
    for phase in config.phases:
        assert (phase.prompts, phase.group, phase.updates_per_step) == (64, 8, 1)
        assert (phase.partner, phase.dynamic_sampling) == ("phase", 0)
        assert phase.temperature == 1.0
        assert phase.partner_max_new_tokens == 2048
        assert phase.role_anchor == 0
    assert (perceiver.role, perceiver.max_new_tokens) == ("perceiver", 1024)
    assert (reasoner.role, reasoner.max_new_tokens) == ("reasoner", 2048)
    assert (config.model.min_pixels, config.model.max_pixels) == (4096, 2_097_152)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-6, 0)
    assert optimizer.final_fraction == 1.0
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.01, 1.0)
    assert not optimizer.freeze_vision
    loss = config.loss
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.2, 3.0)
    assert (loss.kl_weight, loss.kl_kind, loss.aggregation) == (0.01, "k3", "token-mean")
    assert (loss.advantage_scale, loss.ratio_level) == ("group", "token")
    assert (loss.reference, loss.entropy_weight) == ("phase", 0.0)
    assert (loss.mask_truncated, loss.sampler_correction) == (False, None)
    assert (config.rounds, optimizer.reset, config.reward.max_dropped_fraction) == (1, True, 0.2)
    assert (config.eval.every, config.checkpoint.every) == (10, 30)
    assert (config.model.compute_dtype, config.model.remat) == ("bfloat16", True)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_buckets_hold_one_to_four_images(name):
    """2048 visual tokens of 32x32 pixels an image, four patches each, and room for the text."""
    buckets = train_config("--config", str(CONFIGS / name)).buckets
    assert set(buckets.patches) >= {8192, 4 * 8192}
    assert buckets.prompt_tokens[0] == 2560
    assert buckets.prompt_tokens[-1] == 8704
    for images in (1, 2, 3, 4):
        text = 512
        assert any(n >= images * 2048 + text for n in buckets.prompt_tokens)
        assert any(n >= images * 8192 for n in buckets.patches)
