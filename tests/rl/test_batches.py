"""From rewards to what an update takes: advantages, what is masked, and the anchor's rows."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from rich.console import Console

from p2r_jax.config import LossConfig, PhaseConfig
from p2r_jax.data.loader import LoadedRow
from p2r_jax.rl import launch
from p2r_jax.rl.batches import anchor_batch, training_batch
from p2r_jax.rl.experience import Experience
from p2r_jax.rl.rewards import Reward
from p2r_jax.rl.stop import RunStopped
from p2r_jax.rl.trainer import Trainer
from p2r_jax.rl.updates import Collected
from p2r_jax.roles.boxes import ParsedBoxes
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.pipeline import Completion
from p2r_jax.rollout.generate import Completions
from tests.rl.tiny_run import make_config


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_checkpoint, small_world) -> Trainer:
    config = make_config(tmp_path_factory.mktemp("built") / "run", tiny_checkpoint)
    return launch.build_trainer(config, Console(quiet=True))


PHASE = PhaseConfig(role="reasoner", prompts=2, group=3, max_new_tokens=4, role_anchor_prompts=2)


def make_experience(values: list[list[float | None]]) -> Experience:
    """Completions of 1, 2 or 3 tokens, the third one cut, and one filling row."""
    rows, group = len(values), len(values[0])
    mask = np.arange(4) < (np.arange(group) + 1)[:, None]
    mask = np.broadcast_to(mask, (rows, group, 4))
    completions = Completions(
        tokens=np.ones(mask.shape, np.int32),
        log_probs=np.full(mask.shape, -1.0, np.float32),
        mask=mask,
        stopped=np.broadcast_to(np.arange(group) < 2, mask.shape[:2]),
    )
    filled = np.ones((rows + 1, 5), int)
    none = [[] for _ in values]
    return Experience(
        rows=[LoadedRow(types.SimpleNamespace(id=str(i)), np.zeros(1)) for i in range(rows)],
        requests=[],
        prompts=types.SimpleNamespace(tokens=filled, valid=filled),
        completions=completions,
        texts=[[""] * group] * rows,
        rewards=[[Reward(v, {} if v is None else {"answer": v}) for v in g] for g in values],
        partner_texts=none,
        boxes=[[ParsedBoxes((), True)] * group for _ in values],
        idle_requests=none,
        idle_outputs=none,
    )


def batch_of(built: Trainer, experience: Experience, lengths=(), dropped=1.0, **loss):
    return training_batch(experience, LossConfig(**loss), built.mesh, lengths, dropped)


class TestRewards:
    def test_advantages_are_relative_to_the_group(self, built):
        batch, metrics = batch_of(built, make_experience([[1, 0, 0], [1, 1, 1]]))
        std = np.std([1, 0, 0], ddof=1)
        expected = np.array([[2 / 3, -1 / 3, -1 / 3], [0, 0, 0], [0, 0, 0]]) / std
        np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
        assert metrics["reward/mean"] == pytest.approx(4 / 6)
        assert metrics["reward/zero_variance_groups"] == 0.5
        assert metrics["completion/length_mean"] == 2
        assert (metrics["tokens/prompts"], metrics["tokens/completions"]) == (10, 12)
        assert metrics["completion/length_min"] == 1
        assert metrics["completion/length_max"] == 3
        assert metrics["completion/truncated_fraction"] == pytest.approx(1 / 3)

    @pytest.mark.parametrize(
        "scale, std",
        [
            ("group", [np.std([1, 0, 0], ddof=1), 1]),
            ("batch", [np.std([1, 0, 0, 1, 1, 1], ddof=1)] * 2),
            ("none", [1, 1]),
        ],
    )
    def test_what_advantages_are_divided_by(self, built, scale, std):
        experience = make_experience([[1, 0, 0], [1, 1, 1]])
        batch, _ = batch_of(built, experience, advantage_scale=scale)
        expected = np.array([[2 / 3, -1 / 3, -1 / 3], [0, 0, 0]]) / np.array(std)[:, None]
        np.testing.assert_allclose(batch.advantages[:2], expected, atol=1e-5)

    def test_filling_rows_are_not_trained(self, built):
        batch, _ = batch_of(built, make_experience([[1, 0, 0], [1, 1, 1]]))
        assert np.asarray(batch.mask)[:2].sum() == 12
        assert not np.asarray(batch.mask)[2].any()

    def test_a_sample_that_cannot_be_graded_is_dropped_and_counted(self, built):
        """It is not a 0: it leaves mean, deviation, loss and denominators."""
        values = [[1, 0, None], [1, 1, 1]]
        batch, metrics = batch_of(built, make_experience(values))
        mask = np.asarray(batch.mask)
        assert not mask[0, 2].any()
        assert mask[0, :2].any(-1).all()
        np.testing.assert_allclose(
            batch.advantages[0], np.array([0.5, -0.5, 0]) / np.std([1, 0], ddof=1), atol=1e-5
        )
        assert metrics["reward/dropped_fraction"] == pytest.approx(1 / 6)
        assert metrics["reward/mean"] == pytest.approx(4 / 5)
        assert metrics["reward/answer"] == pytest.approx(4 / 5)

    def test_what_dynamic_sampling_left_out_counts_too(self, built):
        """Of four groups two teach; the others, ungraded or of one mind, were replaced."""
        chosen = make_experience([[1, 0, 0], [1, 1, 0]])
        left_out = make_experience([[None, None, 1], [1, 1, 1]])
        sampled = [*chosen.rewards, *left_out.rewards]
        loss = built.config.loss
        _, metrics = training_batch(chosen, loss, built.mesh, (), 0.2, sampled)
        assert metrics["reward/dropped_fraction"] == pytest.approx(2 / 12)
        assert metrics["reward/mean"] == pytest.approx(7 / 10)
        assert metrics["reward/zero_variance_groups"] == 0.5
        assert metrics["reward/teaching_groups"] == 1
        with pytest.raises(RunStopped, match="17% of the samples could not be graded"):
            training_batch(chosen, loss, built.mesh, (), 0.1, sampled)

    def test_too_many_of_them_stop_the_run(self, built):
        experience = make_experience([[1, None, 0], [1, 1, None]])
        batch_of(built, experience, dropped=0.34)
        with pytest.raises(RunStopped, match=r"33% of the samples.*max_dropped_fraction = 20%"):
            batch_of(built, experience, dropped=0.2)

    def test_a_completion_that_was_cut_may_be_left_out_of_the_loss(self, built):
        """Its reward still counts in its group's mean, and it is still told."""
        experience = make_experience([[1, 0, 0], [1, 1, 1]])
        usual, told = batch_of(built, experience)
        batch, metrics = batch_of(built, experience, mask_truncated=True)
        mask = np.asarray(batch.mask)
        assert not mask[:, 2].any()
        np.testing.assert_array_equal(mask[:, :2], np.asarray(usual.mask)[:, :2])
        np.testing.assert_array_equal(batch.advantages, usual.advantages)
        assert metrics == told

    def test_sample_files_show_the_advantages_that_were_used(self, built, monkeypatch):
        loss = LossConfig(advantage_scale="none")
        monkeypatch.setattr(built, "config", dataclasses.replace(built.config, loss=loss))
        builder = built.pipeline.builder
        rows = [LoadedRow(built.train_source[i], np.zeros((32, 32, 3), np.uint8)) for i in range(2)]
        images = ImageStore.upload([row.image for row in rows], builder.buckets)
        experience = dataclasses.replace(
            make_experience([[1, 0, None], [1, 1, 1]]),
            rows=rows,
            requests=[builder.plain("baseline", images, i, "?", "mca") for i in range(2)],
        )
        batch, _ = batch_of(built, experience, advantage_scale="none")
        shown = []

        class Log:
            def samples(self, step, samples, rows):
                shown.extend((s["advantage"], s["reward"], s["truncated"]) for s in samples)

        built._log_samples(
            built.phases[1], [Collected(PHASE, experience, images, experience.rewards)], 1, Log()
        )
        advantages, values, truncated = zip(*shown, strict=True)
        np.testing.assert_allclose(advantages, np.asarray(batch.advantages)[:2].ravel(), atol=1e-6)
        assert values == (1, 0, None, 1, 1, 1)
        assert truncated == (False, False, True) * 2

    @pytest.mark.parametrize("lengths, padded", [((), 4), ((3,), 3), ((2, 3, 8), 3), ((2,), 4)])
    def test_an_update_is_no_longer_than_what_was_written(self, built, lengths, padded):
        """Completions of at most 3 tokens where 4 were allowed."""
        batch, metrics = batch_of(built, make_experience([[1, 0, 0], [1, 1, 1]]), lengths)
        assert batch.tokens.shape == batch.mask.shape == (3, 3, padded)
        assert batch.sampler_log_probs.shape == (3, 3, padded)
        assert np.asarray(batch.mask).sum() == 12
        assert metrics["completion/length_max"] == 3

    def test_a_broken_run_stops(self, built):
        limit = built.config.optimizer.max_skipped
        built.updates.stop_if_broken(limit)
        with pytest.raises(RunStopped, match="non-finite gradient"):
            built.updates.stop_if_broken(limit + 1)


class TestRoleAnchor:
    @pytest.fixture(scope="class")
    def asked(self, built):
        """Each of two questions asked three times, as in a perceiver phase."""
        builder = built.pipeline.builder
        rows = [built.train_source[i] for i in range(2)]
        images = ImageStore.upload([row.load_image() for row in rows], builder.buckets)
        requests = [
            [builder.plain("perceiver", images, i, row.question_with_options, row.answer_form)] * 3
            for i, row in enumerate(rows)
        ]
        texts = [["one", "two", "three"], ["four tiles", "five", "six"]]
        encode = builder.processor.tokenizer.encode
        outputs = [
            [Completion(t, tuple(encode(t, add_special_tokens=False))) for t in group]
            for group in texts
        ]
        stopped = (*outputs[0][0].tokens, builder.processor.stop_ids[0])
        outputs[0][0] = Completion("one", stopped)
        experience = make_experience([[1, 0, 0], [1, 1, 1]])
        experience = dataclasses.replace(experience, idle_requests=requests, idle_outputs=outputs)
        return experience, images

    def test_trains_nothing_by_default_but_is_told(self):
        assert PhaseConfig().role_anchor == 0
        assert PhaseConfig().role_anchor_prompts > 0

    @pytest.mark.parametrize("prompts", [0, 2])
    def test_without_prompts_or_without_an_idle_role_there_is_none(self, built, asked, prompts):
        experience, images = asked
        if prompts:
            experience = make_experience([[1, 0, 0], [1, 1, 1]])  # of a baseline
        phase = dataclasses.replace(PHASE, role_anchor_prompts=prompts)
        assert anchor_batch(phase, experience, images, built.pipeline.builder) is None

    @pytest.mark.parametrize("prompts", [2, 16])
    def test_repeats_what_the_snapshot_wrote_to_different_questions(self, built, asked, prompts):
        """On as many prompts as are asked for, at most one of each question."""
        phase = dataclasses.replace(PHASE, role_anchor_prompts=prompts)
        anchor = anchor_batch(phase, *asked, built.pipeline.builder)
        processor = built.pipeline.builder.processor
        assert anchor.mask.shape[:2] == (2, 1)
        for row, text in enumerate(["one", "four tiles"]):
            tokens = np.asarray(anchor.tokens)[row, 0][np.asarray(anchor.mask)[row, 0]]
            assert processor.decode(tokens) == text
            # The second was cut at its limit: no stop token is made up for it.
            assert (tokens[-1] == processor.stop_ids[0]) == (row == 0)
        prompts = np.asarray(anchor.prompts.tokens)
        assert (prompts[0] != prompts[1]).any()
