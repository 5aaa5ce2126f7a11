"""What a study's YAML may say, and the errors for what it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from p2r_jax.rl.schedule import learning_roles, plan_phases
from p2r_jax.study.config import merge, read_study, run_config
from p2r_jax.study.run import plan_jobs
from tests.study.fakes import BASE, write_study

SHIPPED = Path(__file__).parents[2] / "configs" / "studies"


def arm(**given):
    return {"better": given, "plain": {}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seedz": [1]}, "seedz is not known; there are arms, base, confidence"),
        ({"arms": {}}, "arms: at least one is needed"),
        ({"arms": {"a/b": {}}}, "arms.a/b: a name is letters, digits"),
        ({"arms": arm(overides={})}, r"arms.better.overides is not known"),
        ({"arms": arm(overrides=[1])}, r"arms.better.overrides must be a mapping"),
        ({"arms": arm(overrides={"seed": 3})}, "arms.better.overrides.seed: the study decides it"),
        ({"settings": {"run": "x"}}, "settings.run: the study decides it"),
        (
            {"arms": arm(overrides={"eval": {"final_questions": 3}})},
            "set final_questions of the study",
        ),
        ({"arms": arm(metric=3)}, "arms.better: metric and description must be text"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, -1]}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is there twice"),
        ({"base": 3}, "base must be a config file or a list"),
        ({"contrasts": {"main": {}}}, "contrasts.main is not known"),
        ({"contrasts": {"primary": {"x": "better"}}}, "contrasts.primary.x must read ARM - ARM"),
        (
            {"contrasts": {"secondary": {"x": "better - best"}}},
            "contrasts.secondary.x: no arm is called 'best': better, plain",
        ),
        ({"contrasts": {"primary": {"x": "plain - plain"}}}, "both sides are 'plain'"),
        (
            {
                "contrasts": {
                    "primary": {"x": "plain - better"},
                    "secondary": {"x": "better - plain"},
                }
            },
            "contrasts: 'x' is there twice",
        ),
        ({"margin": 0}, "margin must be above 0"),
        ({"margin": "wide"}, "margin must be a number"),
        ({"confidence": 95}, "confidence must be at least 0.5 and below 1"),
        ({"draws": 3}, "draws must be at least 100"),
        ({"final_questions": 0}, "final_questions must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(tmp_path, changes, message):
    file = write_study(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_study(file)
    assert str(file) in str(error.value)


def test_an_arm_that_is_there_twice_is_an_error(tmp_path):
    file = write_study(tmp_path)
    file.write_text(file.read_text().replace("  plain:\n", "  better:\n"))
    with pytest.raises(ValueError, match="'better' is there twice"):
        read_study(file)


def test_anchors_may_be_merged_and_overridden(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "definitions:\n"
        "  p: &p {role: perceiver, steps: 2}\n"
        "  r: &r {<<: *p, role: reasoner}\n"
        "arms: {a: {overrides: {phases: [{<<: *r, steps: 3}, *r]}}}\n"
        "seeds: [0]\n"
    )
    (arm,) = read_study(file).arms
    first, second = arm.overrides["phases"]
    assert first == {"role": "reasoner", "steps": 3}
    assert second == {"role": "reasoner", "steps": 2}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"optimizer": {"learning_rat": 1}}, "arm 'better': .*learning_rat"),
        ({"phases": [{"role": "painter"}]}, "arm 'better': .*painter"),
        ({"phases": [{"steps": 0}]}, r"arm 'better': phases\[0\].steps must be at least 1"),
        ({"phases": [{"prompts": 3}], "mesh": {"data": 2}}, r"arm 'better': phases\[0\].*prompts"),
        ({"eval": {"modes": ["seen"]}}, r"arm 'better': unknown evaluation mode"),
        (
            {"eval": {"modes": ["default"], "final_modes": ["default"]}},
            "arm 'better': its metric 'p2r' is not evaluated at the end",
        ),
        ({"model": {"path": "nowhere"}}, "arm 'better': nowhere is neither"),
    ],
)
def test_every_arms_config_is_checked(tmp_path, overrides, message):
    plan = read_study(write_study(tmp_path, arms=arm(overrides=overrides)))
    with pytest.raises(ValueError, match=message):
        plan_jobs(plan, tmp_path / "out")


def test_a_base_that_is_not_there_is_named(tmp_path):
    plan = read_study(write_study(tmp_path, base="none.yaml"))
    with pytest.raises(ValueError, match=r"none\.yaml"):
        plan_jobs(plan, tmp_path / "out")


def test_what_a_run_is_given(tmp_path):
    """Base, settings, overrides, then what belongs to the study; paths from the study's folder."""
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"optimizer": {"beta1": 0.5, "beta2": 0.6}}))
    file = write_study(tmp_path, settings={"optimizer": {"beta1": 0.7, "eps": 1e-6}})
    plan = read_study(file, [more])
    config = run_config(plan, plan.arm("better"), 3, "somewhere")
    own = config.optimizer
    assert (own.learning_rate, own.beta1, own.beta2, own.eps) == (0.4, 0.7, 0.6, 1e-6)
    assert (config.run, config.seed, config.eval.final_questions) == ("somewhere", 3, 50)
    assert [phase.prompts for phase in config.phases] == [BASE["phases"][0]["prompts"]]


def test_making_a_config_leaves_the_study_as_it_was(tmp_path):
    """It is written into study.json later."""
    overrides = {"phases": [{"role": "reasoner", "steps": 2, "prompts": 4}]}
    plan = read_study(write_study(tmp_path, arms=arm(overrides=overrides)))
    before = json.dumps(plan.plain())
    plan_jobs(plan, tmp_path / "out")
    assert json.dumps(plan.plain()) == before


def test_lists_are_replaced_whole():
    base = {"a": {"b": [1, 2], "c": 1}, "d": 1}
    assert merge(base, {"a": {"b": [3]}, "d": {"e": 2}}) == {"a": {"b": [3], "c": 1}, "d": {"e": 2}}
    assert base["a"]["b"] == [1, 2]


class TestTheShippedStudy:
    @pytest.fixture(scope="class")
    def jobs(self):
        plan = read_study(SHIPPED / "decoupling.yaml")
        return [job for job in plan_jobs(plan, Path("out")) if job.seed == plan.seeds[0]]

    def test_arms_draw_as_many_samples_and_make_as_many_updates(self, jobs):
        assert len(jobs) == 8
        counts = set()
        for job in jobs:
            phases = plan_phases(job.config, 10**6)
            samples = sum(
                phase.steps * learning.prompts * learning.group
                for phase in phases
                for learning in learning_roles(phase.config)
            )
            counts.add((samples, sum(phase.updates for phase in phases)))
        assert len(counts) == 1

    def test_arms_differ_in_nothing_but_what_they_are_about(self, jobs):
        allowed = {
            "alternate_4": {"phases", "rounds"},
            "single_stage": {"phases", "model", "buckets", "eval"},
            "alternate_authors_rule": {"reward"},
        }
        first = vars(jobs[0].config)
        for job in jobs[1:]:
            changed = {k for k, v in vars(job.config).items() if v != first[k]} - {"run"}
            assert changed == allowed.get(job.arm.name, {"phases"}), job.arm.name
            assert job.config.data.order == "run"

    def test_one_stage_sees_as_many_visual_tokens_as_two(self, jobs):
        from p2r_jax.qwen3_vl.locate import TINY
        from p2r_jax.qwen3_vl.processor import Processor

        (model,) = [job.config.model for job in jobs if job.arm.name == "single_stage"]
        tokens = {}
        for name, limits in (
            ("roles", (None, None)),
            ("single", (model.min_pixels, model.max_pixels)),
        ):
            sizes = Processor.from_pretrained(TINY, *limits).sizes
            height, width = sizes.grid(sizes.target_size(384, 384))
            tokens[name] = height * width // 4
        assert tokens["roles"] == 16
        assert abs(tokens["single"] - 3 * tokens["roles"]) <= 1
