"""Runs that are not the authors': several updates a step, both roles at once, rounds, groups that
are replaced. Each of them once straight through, and once killed and resumed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from p2r_jax.config import LossConfig, PhaseConfig, TrainConfig
from p2r_jax.data.loader import training_batches
from p2r_jax.rl import updates
from p2r_jax.rl.updates import Updates
from tests.rl.runs import Run, assert_same_outcome, straight_and_killed
from tests.rl.tiny_run import GROUP, PROMPTS, TOKENS, make_config
from tests.rl.updates import KL_NOISE

PHASE = PhaseConfig(
    steps=2,
    prompts=PROMPTS,
    group=GROUP,
    microbatch=2,
    max_new_tokens=TOKENS,
    partner_max_new_tokens=TOKENS,
    role_anchor_prompts=0,
)


def lean(folder, model, *phases: PhaseConfig, **changes) -> TrainConfig:
    """No evaluations, which all runs make alike, but for those that a test is about."""
    config = make_config(folder, model, phases=list(phases), **changes)
    config.eval = dataclasses.replace(config.eval, every=0, final_questions=0)
    return config


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    pass


class Same:
    """What all variants have in common."""

    def test_nothing_is_sampled_with_the_same_noise_twice(self, runs):
        """Neither in another step, nor by another role, nor on a further batch of questions."""
        whole, _ = runs
        seeds = [seed for own in whole.seeds for seed in own]
        assert len(seeds) == len(set(seeds)) == PROMPTS * len(whole.weights)

    def test_killed_and_resumed_nothing_is_different(self, runs):
        whole, killed = runs
        assert_same_outcome(killed.folder, whole)

    def test_weights_move_in_every_step(self, runs):
        whole, _ = runs
        assert all(row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in whole.steps)


class TestSeveralUpdatesAStep(Same):
    """Two halves of the questions, gone through twice, so four updates. The rate goes down over
    the phase's eight; nothing is compared with a reference."""

    @pytest.fixture(scope="class")
    def seen(self):
        """Tokens, ratio and microbatches of each update."""
        return []

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, tiny_checkpoint, seen):
        folder = tmp_path_factory.mktemp("several")
        phase = dataclasses.replace(PHASE, minibatches=2, inner_epochs=2)
        loss = LossConfig(kl_weight=0.0, sampler_correction=2.0)
        config = lean(folder, tiny_checkpoint, phase, loss=loss)
        config.optimizer.final_fraction = 0.1
        original = updates.train_step

        def watching(state, batches, *args, objectives, **kwargs):
            after, metrics = original(state, batches, *args, objectives=objectives, **kwargs)
            ratio, parts = float(metrics[0]["ratio"]), objectives[0].microbatches
            seen.append((np.asarray(batches[0].tokens), ratio, parts))
            return after, metrics

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(updates, "train_step", watching)
            return straight_and_killed(folder, config, step=2)

    def test_each_half_is_taken_twice(self, runs, seen):
        tokens = [tokens for tokens, _, _ in seen]
        assert len(tokens) == 16
        assert {parts for _, _, parts in seen} == {1}  # A half is one microbatch.
        for first in range(0, 16, 4):
            assert tokens[first].shape[0] == PROMPTS // 2
            np.testing.assert_array_equal(tokens[first], tokens[first + 2])
            np.testing.assert_array_equal(tokens[first + 1], tokens[first + 3])
            assert (tokens[first] != tokens[first + 1]).any()

    def test_the_ratio_is_taken_against_the_policy_the_step_began_with(self, runs, seen):
        """Only in the first update it is 1; of the four, a row tells the mean."""
        ratios = [ratio for _, ratio, _ in seen]
        for first in range(0, 16, 4):
            assert ratios[first] == pytest.approx(1, abs=1e-4)
            assert min(abs(ratio - 1) for ratio in ratios[first + 1 : first + 4]) > 1e-3
        told = [row["ratio"] for row in runs[0].steps]
        assert told == pytest.approx([np.mean(ratios[:4]), np.mean(ratios[4:8])])

    def test_old_log_probs_are_the_trainers_own(self, runs):
        """The sampler agrees with them, however far the policy has moved since."""
        assert all(row["sampler_gap/max"] < 1e-4 for row in runs[0].steps)

    def test_the_rate_follows_updates_not_steps(self, runs):
        """It is told as it was for the first of a step's updates."""
        share = [(0.1 + 0.9 * (1 + np.cos(np.pi * done / 8)) / 2) for done in (0, 4)]
        assert [row["lr"] for row in runs[0].steps] == pytest.approx([1e-3 * s for s in share])

    def test_without_a_kl_weight_there_is_no_reference_pass(self, runs):
        for row in runs[0].steps:
            assert "kl/mean" not in row
            assert "time/reference" not in row

    def test_no_anchor_prompts_no_anchor(self, runs):
        assert all("loss/anchor" not in row for row in runs[0].steps)

    def test_a_correction_is_told_of(self, runs):
        for row in runs[0].steps:
            assert row["sampler_gap/capped_fraction"] == 0
            assert 0 <= row["sampler_gap/prob"] < 1e-4


class TestJoint(Same):
    """Both roles learn in every step, each with the live other one for a partner."""

    SHORT = TOKENS - 2

    @pytest.fixture(scope="class")
    def seen(self):
        """What the compiled update was given: batches and objectives of each step."""
        return []

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, tiny_checkpoint, seen):
        folder = tmp_path_factory.mktemp("joint")
        phase = dataclasses.replace(
            PHASE, role="joint", reasoner_max_new_tokens=self.SHORT, partner="step"
        )
        original = updates.train_step

        def watching(state, batches, anchor, *args, objectives, **kwargs):
            seen.append(([np.asarray(b.mask) for b in batches], anchor, objectives))
            return original(state, batches, anchor, *args, objectives=objectives, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(updates, "train_step", watching)
            return straight_and_killed(folder, lean(folder, tiny_checkpoint, phase), step=2)

    def test_both_roles_learn_from_the_same_questions(self, runs):
        whole, _ = runs
        assert [role for role, _, _ in whole.weights] == ["perceiver", "reasoner"] * 2
        assert whole.questions[0] == whole.questions[1]
        assert whole.questions[2] == whole.questions[3] != whole.questions[0]

    def test_the_partner_is_the_policy_of_the_step(self, runs):
        whole, _ = runs
        policies = [policy for _, policy, _ in whole.weights]
        assert [partner for _, _, partner in whole.weights] == policies
        assert policies[0] == policies[1] != policies[2] == policies[3]

    def test_metrics_of_each_role_are_under_its_name(self, runs):
        for row in runs[0].steps:
            assert (row["phase"], row["data/batches"]) == ("joint", 1)
            for name in ("reward/mean", "loss/policy", "kl/mean", "entropy/mean", "ratio"):
                assert np.isfinite(row[f"perceiver/{name}"])
                assert np.isfinite(row[f"reasoner/{name}"])
            assert row["perceiver/loss/policy"] != row["reasoner/loss/policy"]
            assert "perceiver/reward/boxes" in row
            assert "reasoner/reward/answer_tag" in row
            assert row["reasoner/completion/length_max"] <= self.SHORT
            both = [row["perceiver/reward/mean"], row["reasoner/reward/mean"]]
            assert row["reward/mean"] == pytest.approx(np.mean(both))
            both = [row["perceiver/loss/total"], row["reasoner/loss/total"]]
            assert row["loss/total"] == pytest.approx(sum(both))
            # What belongs to the update has no prefix.
            for name in ("grad_norm", "lr", "skipped_steps", "time/update"):
                assert name in row
                assert not any(f"{role}/{name}" in row for role in ("perceiver", "reasoner"))
            assert not any("loss/anchor" in name for name in row)

    def test_one_update_takes_both_each_with_its_own_length(self, runs, seen):
        assert len(seen) == 4  # two steps, and of the killed run one and the other
        for masks, anchor, objectives in seen:
            assert anchor is None
            assert [mask.shape for mask in masks] == [
                (PROMPTS, GROUP, TOKENS),
                (PROMPTS, GROUP, self.SHORT),
            ]
            assert [o.horizon for o in objectives] == [TOKENS, self.SHORT]
            assert [o.microbatches for o in objectives] == [2, 2]

    def test_samples_show_both(self, runs):
        for step in (1, 2):
            samples = runs[0].samples(step)
            roles = [sample["role"] for sample in samples]
            assert roles == ["perceiver"] * 2 * GROUP + ["reasoner"] * 2 * GROUP
            assert {sample["phase"] for sample in samples} == {"joint"}
            assert all("Find: " in s["prompt"] for s in samples[: 2 * GROUP])
            assert not any("Find: " in s["prompt"] for s in samples[2 * GROUP :])


class TestRounds(Same):
    """Two phases of one step, twice; one optimizer for the run, and the KL to its start."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, tiny_checkpoint):
        folder = tmp_path_factory.mktemp("rounds")
        one = dataclasses.replace(PHASE, steps=1)
        phases = one, dataclasses.replace(one, role="reasoner")
        loss = LossConfig(reference="start")
        config = lean(folder, tiny_checkpoint, *phases, rounds=2, loss=loss)
        config.optimizer = dataclasses.replace(
            config.optimizer, reset=False, final_fraction=0.1, warmup_steps=1
        )
        config.eval = dataclasses.replace(config.eval, final_questions=2, modes=["p2r"])
        return straight_and_killed(folder, config, step=3)

    def test_rows_say_round_and_phase(self, runs):
        where = [(r["phase"], r["round"], r["phase_number"], r["step"]) for r in runs[0].steps]
        assert where == [
            ("perceiver", 1, 1, 1),
            ("reasoner", 1, 2, 2),
            ("perceiver", 2, 3, 3),
            ("reasoner", 2, 4, 4),
        ]

    def test_the_partner_is_that_of_the_phase(self, runs):
        assert all(policy == partner for _, policy, partner in runs[0].weights)
        assert len({policy for _, policy, _ in runs[0].weights}) == 4

    def test_questions_of_the_second_round_come_in_another_order(self, runs):
        assert len(set(runs[0].questions)) == 4

    def test_every_phase_has_an_evaluation_of_its_own(self, runs):
        names = ["before", "after_phase1_perceiver", "after_phase2_reasoner"]
        names += ["after_phase3_perceiver", "after"]
        assert [row["name"] for row in runs[0].rows if row["phase"] == "eval"] == names
        assert all(name in runs[0].summary for name in names)

    def test_one_schedule_goes_over_all_phases(self, runs):
        """A warm-up of one update, and then the cosine of the three others."""
        share = [0.5, *((0.1 + 0.9 * (1 + np.cos(np.pi * done / 3)) / 2) for done in range(3))]
        assert [row["lr"] for row in runs[0].steps] == pytest.approx([1e-3 * s for s in share])

    def test_the_reference_is_the_start_of_the_run(self, runs):
        """To the phase's own start the KL would be 0 in each of these steps."""
        kl = [row["kl/mean"] for row in runs[0].steps]
        assert kl[0] == pytest.approx(0, abs=KL_NOISE)
        assert min(kl[1:]) > 10 * KL_NOISE


class TestOneOptimizer:
    """`optimizer.reset`: whether moments outlive their phase."""

    @pytest.mark.parametrize("reset", [False, True])
    def test_a_phase_begins_with_the_moments_of_the_one_before(
        self, tmp_path, tiny_checkpoint, monkeypatch, reset
    ):
        from p2r_jax.rl.optimizer import updates_done

        counts = []
        original = Updates.run

        def watching(self, phase, state, *args):
            counts.append(updates_done(state.opt_state))
            return original(self, phase, state, *args)

        monkeypatch.setattr(Updates, "run", watching)
        one = dataclasses.replace(PHASE, steps=1)
        config = lean(tmp_path / "run", tiny_checkpoint, one, rounds=2, export=False)
        config.optimizer.reset = reset
        Run(config)
        assert counts == ([0, 0] if reset else [0, 1])


class TestDynamicSampling(Same):
    """Groups of two agree half of the time, so that four questions seldom teach at once."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, tiny_checkpoint):
        folder = tmp_path_factory.mktemp("dynamic")
        phases = (
            dataclasses.replace(PHASE, dynamic_sampling=3, role_anchor_prompts=2, steps=3),
            dataclasses.replace(PHASE, role="reasoner", steps=1),
        )
        return straight_and_killed(folder, lean(folder, tiny_checkpoint, *phases), step=3)

    def test_further_batches_replace_groups_that_agree(self, runs):
        whole, _ = runs
        perceiver, reasoner = whole.steps[:3], whole.steps[3:]
        assert all(1 <= row["data/batches"] <= 4 for row in perceiver)
        assert max(row["data/batches"] for row in perceiver) > 1
        for row in perceiver:
            assert row["reward/teaching_groups"] == 1 or row["data/batches"] == 4
        assert [row["data/batches"] for row in reasoner] == [1]

    def test_no_question_is_asked_twice_and_none_is_left_out(self, runs, tiny_checkpoint):
        """The next step goes on where the last one stopped; so does a run that was killed."""
        whole, killed = runs
        used = sum(row["data/batches"] for row in whole.steps[:3])
        assert len(whole.questions) == used + 1
        from p2r_jax.data.sources import load_source

        source = load_source("visual_search", split="train", seed=0)
        batches = training_batches(source, PROMPTS, seed=0)
        expected = [tuple(r.row.id for r in next(batches)) for _ in range(used)]
        assert whole.questions[:used] == expected
        left = whole.steps[2]["data/batches"] + 1
        assert killed.questions == whole.questions[-left:]

    def test_the_update_takes_as_many_questions_as_always(self, runs):
        for row in runs[0].steps[:3]:
            assert row["tokens/completions"] <= PROMPTS * GROUP * TOKENS
            assert row["loss/anchor"] > 0
