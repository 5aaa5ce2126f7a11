"""Which role learns when: epochs as steps, rounds, and settings that cannot work."""

from __future__ import annotations

import dataclasses

import pytest

from p2r_jax.config import LossConfig, PhaseConfig, RolloutConfig, TrainConfig
from p2r_jax.rl.schedule import Progress, microbatches, plan_phases


def phases_of(*phases: PhaseConfig, rows: int, rounds: int = 1):
    return plan_phases(TrainConfig(phases=list(phases), rounds=rounds), rows)


class TestLength:
    @pytest.mark.parametrize(
        "epochs, rows, prompts, steps",
        [
            pytest.param(1.0, 10_000, 64, 156, id="the authors'"),
            pytest.param(2.0, 10_000, 64, 312, id="not 20,000 / 64 = 312.5"),
            pytest.param(3.0, 127, 64, 3, id="almost a second batch in each"),
            pytest.param(0.5, 10_000, 64, 78, id="half of one"),
            pytest.param(1.5, 7, 2, 4, id="4.5 rounded down"),
            pytest.param(1.0, 64, 64, 1, id="just one batch"),
            pytest.param(0.29, 6400, 64, 29, id="not 28.999999999999996"),
        ],
    )
    def test_an_epoch_has_no_partial_batch(self, epochs, rows, prompts, steps):
        (phase,) = phases_of(PhaseConfig(epochs=epochs, prompts=prompts), rows=rows)
        assert phase.steps == steps

    def test_is_one_epoch_by_default(self):
        assert [phase.steps for phase in plan_phases(TrainConfig(), 10_000)] == [156, 156]

    def test_steps_may_be_more_or_less_than_an_epoch(self):
        long, short = PhaseConfig(steps=500), PhaseConfig(steps=1)
        assert [phase.steps for phase in phases_of(long, short, rows=640)] == [500, 1]

    @pytest.mark.parametrize(
        "own",
        [
            pytest.param({}, id="too few rows for a batch"),
            pytest.param({"steps": 3}, id="whatever the steps"),
            pytest.param({"prompts": 8, "epochs": 0.1}, id="too small a part of an epoch"),
        ],
    )
    def test_a_phase_without_a_step_is_named(self, own):
        small = PhaseConfig(prompts=4)
        message = r"phases\[1\] has no step: data.train has 63 rows.*phases\[1\].prompts = (64|8)"
        with pytest.raises(ValueError, match=message):
            phases_of(small, PhaseConfig(**({"prompts": 64} | own)), rows=63)

    def test_updates_are_what_the_learning_rate_goes_over(self):
        own = PhaseConfig(steps=3, prompts=8, minibatches=4, inner_epochs=2)
        (phase,) = phases_of(own, rows=8)
        assert (own.updates_per_step, phase.updates) == (8, 24)


class TestRounds:
    def test_repeat_all_phases_under_numbers_of_their_own(self):
        own = PhaseConfig(steps=1, prompts=8), PhaseConfig("reasoner", steps=2, prompts=8)
        planned = phases_of(*own, rows=8, rounds=3)
        assert [(p.number, p.round, p.role, p.steps) for p in planned] == [
            (0, 0, "perceiver", 1),
            (1, 0, "reasoner", 2),
            (2, 1, "perceiver", 1),
            (3, 1, "reasoner", 2),
            (4, 2, "perceiver", 1),
            (5, 2, "reasoner", 2),
        ]


class TestWhoLearns:
    def test_one_role_as_its_phase_says(self):
        own = PhaseConfig("reasoner", steps=1, prompts=8, temperature=0.7)
        (phase,) = phases_of(own, rows=8)
        assert phase.learning == (own,)

    @pytest.mark.parametrize("cap, expected", [(2048, 2048), (None, 1024)])
    def test_both_of_joint_each_with_its_limit(self, cap, expected):
        own = PhaseConfig(
            "joint", steps=1, max_new_tokens=1024, reasoner_max_new_tokens=cap, temperature=0.7
        )
        (phase,) = phases_of(own, rows=64)
        perceiver, reasoner = phase.learning
        assert (perceiver.role, perceiver.max_new_tokens) == ("perceiver", 1024)
        assert (reasoner.role, reasoner.max_new_tokens) == ("reasoner", expected)
        for learning in phase.learning:
            learning.validate()
            assert (learning.temperature, learning.group) == (0.7, own.group)


class TestProgress:
    BEFORE = Progress(phase=1, phase_step=3, step=9, batch=5, tokens=700)

    def test_counts_steps_the_batches_they_took_and_tokens(self):
        assert self.BEFORE.after_step() == Progress(1, 4, 10, 6, 700)
        assert self.BEFORE.after_step(3, 50) == Progress(1, 4, 10, 8, 750)

    def test_rows_are_counted_over_all_phases(self):
        after = self.BEFORE.after_step(2, 50, rows=16).next_phase().after_step(1, 50, rows=8)
        assert (after.batch, after.rows) == (1, 24)

    def test_the_next_phase_starts_with_its_own_first_batch(self):
        assert self.BEFORE.next_phase() == Progress(2, 0, 9, 0, 700)

    def test_what_is_ahead_leaves_out_what_a_phase_that_ended_early_did_not_take(self):
        phases = plan_phases(TrainConfig(phases=[PhaseConfig(steps=4), PhaseConfig(steps=3)]), 64)
        second = Progress().after_step()
        assert [p.ahead(phases) for p in (Progress(), second, second.end_phase())] == [7, 6, 3]
        assert second.end_phase().next_phase().ahead(phases) == 3
        assert second.next_phase().next_phase().ahead(phases) == 0


class TestSettingsThatCannotWork:
    @pytest.mark.parametrize(
        "own, message",
        [
            ({"steps": 3, "epochs": 1.0}, "steps and epochs are both set"),
            ({"steps": 0}, "steps must be at least 1 or null, got 0"),
            ({"epochs": 0.0}, "epochs must be above 0, got 0"),
            ({"prompts": 0}, "prompts must be at least 1, got 0"),
            ({"group": 0}, "group must be at least 1, got 0"),
            ({"minibatches": 0}, "minibatches must be at least 1, got 0"),
            ({"inner_epochs": 0}, "inner_epochs must be at least 1, got 0"),
            ({"dynamic_sampling": -1}, "dynamic_sampling must not be negative, got -1"),
            ({"role_anchor_prompts": -1}, "role_anchor_prompts must not be negative, got -1"),
            ({"microbatch": -2}, "microbatch must not be negative, got -2"),
            ({"prompts": 9, "minibatches": 2}, "prompts = 9 must be a multiple of minibatches = 2"),
            (
                {"prompts": 12, "minibatches": 2, "microbatch": 4},
                "prompts / minibatches = 6 must be a multiple of microbatch = 4",
            ),
            ({"temperature": 0.0}, "temperature must be above 0, got 0"),
            ({"role_anchor": 0.5, "role_anchor_prompts": 0}, "role_anchor needs role_anchor_pro"),
            ({"role": "baseline", "role_anchor": 0.5}, "role_anchor: 'baseline' has no idle role"),
            ({"role": "joint", "role_anchor": 0.5}, "role_anchor: 'joint' has no idle role"),
            ({"reasoner_max_new_tokens": 5}, "reasoner_max_new_tokens is for role 'joint'"),
            (
                {"role": "joint", "reasoner_max_new_tokens": 0},
                "reasoner_max_new_tokens must be at least 1 or null, got 0",
            ),
            ({"role": "joint", "dynamic_sampling": 1}, "dynamic_sampling: 'joint' samples both"),
        ],
    )
    def test_of_a_phase(self, own, message):
        config = TrainConfig(phases=[PhaseConfig(), PhaseConfig(**own)])
        with pytest.raises(ValueError) as error:
            config.validate()
        assert str(error.value).startswith(f"phases[1].{message}")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"phases": []}, "phases: at least one"),
            ({"rounds": 0}, "rounds must be at least 1, got 0"),
            ({"rollout": RolloutConfig(slots=0)}, "rollout.slots must be at least 1, got 0"),
            ({"loss": LossConfig(dual_clip=1.0)}, "loss.dual_clip must be above 1 or null"),
            ({"loss": LossConfig(sampler_correction=0.0)}, "loss.sampler_correction must be above"),
        ],
    )
    def test_of_a_run(self, changes, message):
        with pytest.raises(ValueError) as error:
            TrainConfig(**changes).validate()
        assert str(error.value).startswith(message)

    @pytest.mark.parametrize("name", ["eval.batch", "log.samples_every", "checkpoint.every"])
    def test_of_a_part(self, name):
        config = TrainConfig()
        part, field = name.split(".")
        setattr(config, part, dataclasses.replace(getattr(config, part), **{field: 0}))
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            config.validate()

    def test_the_authors_settings_do(self):
        TrainConfig().validate()


class TestMicrobatches:
    @pytest.mark.parametrize(
        "microbatch, minibatches, shards, parts",
        [
            (0, 1, 4, 1),  # all at once
            (8, 1, 4, 8),
            (1, 1, 4, 16),  # one prompt for each part of the mesh
            (1, 1, 16, 4),
            (1, 2, 4, 8),
            (64, 1, 1, 1),
        ],
    )
    def test_have_at_least_a_prompt_on_every_part_of_the_mesh(
        self, microbatch, minibatches, shards, parts
    ):
        phase = PhaseConfig(prompts=64, microbatch=microbatch, minibatches=minibatches)
        assert microbatches(phase, shards) == parts
