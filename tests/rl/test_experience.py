"""Groups that teach something, chosen out of several batches of questions."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from rich.console import Console

from p2r_jax.data.loader import LoadedRow
from p2r_jax.rl import launch
from p2r_jax.rl.batches import anchor_batch, training_batch
from p2r_jax.rl.experience import Experience, choose, teaches
from p2r_jax.rl.rewards import Reward
from p2r_jax.roles.boxes import Box, ParsedBoxes
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.pipeline import Completion
from p2r_jax.rollout.generate import Completions
from tests.rl.tiny_run import make_config

GROUP, TOKENS = 2, 5


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_checkpoint, small_world):
    config = make_config(tmp_path_factory.mktemp("built") / "run", tiny_checkpoint)
    return launch.build_trainer(config, Console(quiet=True))


def rewards_of(*values: float | None) -> list[Reward]:
    return [Reward(value, {}) for value in values]


class TestTeaches:
    @pytest.mark.parametrize(
        "values, expected",
        [
            ((1.0, 0.0), True),
            ((0.0, 0.0, 0.0, 1.0), True),
            ((1.0, 1.0), False),
            ((0.0, 0.0), False),
            ((1.0,), False),
            ((1.0, None), False),  # What could not be graded is no 0,
            ((1.0, None, 0.0), True),  # and does not spoil the others.
            ((None, None), False),
        ],
    )
    def test_if_the_rewards_differ(self, values, expected):
        assert teaches(rewards_of(*values)) is expected


BOX = Box((100.0, 100.0, 400.0, 400.0), "tile")


def load(built, numbers):
    return [
        LoadedRow(row, row.load_image()) for row in map(built.train_source.__getitem__, numbers)
    ]


def requests_of(builder, images, rows):
    """Of the learning reasoner, and of the idle perceiver."""
    questions = [(i, r.row.question_with_options, r.row.answer_form) for i, r in enumerate(rows)]
    return (
        [builder.reasoner(images, *question, [BOX]) for question in questions],
        [[builder.plain("perceiver", images, *question)] for question in questions],
    )


def plain(requests):
    """Requests as values that can be compared."""
    return [(r.tokens.tolist(), r.image, r.views, r.has_evidence) for r in requests]


def make_part(built, numbers: list[int], values: list[list[float | None]]) -> Experience:
    """Experience on rows of these numbers; every array tells which row it belongs to."""
    builder = built.pipeline.builder
    rows = load(built, numbers)
    images = ImageStore.upload([r.image for r in rows], builder.buckets, builder.mesh)
    requests, idle = requests_of(builder, images, rows)
    shape = (len(rows), GROUP, TOKENS)
    filled = np.broadcast_to(np.array(numbers)[:, None, None], shape)
    return Experience(
        rows=rows,
        requests=requests,
        prompts=builder.collate(requests, images),
        completions=Completions(
            tokens=filled.astype(np.int32),
            log_probs=-filled.astype(np.float32),
            mask=np.arange(TOKENS) < 1 + filled % TOKENS,
            stopped=filled[..., 0] % 2 == 0,
            steps=10 * len(numbers),
            occupancy=0.5 if len(numbers) == 4 else 1.0,
        ),
        texts=[[f"answer {n}.{g}" for g in range(GROUP)] for n in numbers],
        rewards=[rewards_of(*own) for own in values],
        partner_texts=[[f"boxes {n}"] for n in numbers],
        boxes=[[ParsedBoxes((BOX,), True)] * GROUP for _ in numbers],
        idle_requests=idle,
        idle_outputs=[[Completion(f"boxes {n}", (n, n))] for n in numbers],
    )


SAME, DIFFERENT, UNGRADED = [1.0, 1.0], [0.0, 1.0], [1.0, None]


@pytest.fixture(scope="module")
def parts(built):
    """4 and 2 questions, of which 1, 3 and 4 teach."""
    return (
        make_part(built, [0, 1, 2, 3], [SAME, DIFFERENT, UNGRADED, DIFFERENT]),
        make_part(built, [4, 5], [DIFFERENT, SAME]),
    )


class TestChoose:
    @pytest.mark.parametrize(
        "count, expected",
        [
            pytest.param(2, [1, 3], id="more than enough teach"),
            pytest.param(3, [1, 3, 4], id="just enough"),
            pytest.param(5, [1, 3, 4, 0, 2], id="filled up with the first of the others"),
        ],
    )
    def test_takes_those_that_teach_in_their_order_and_fills_up(
        self, built, parts, count, expected
    ):
        chosen, _ = choose(parts, count, built.pipeline)
        assert [r.row.id for r in chosen.rows] == [built.train_source[n].id for n in expected]

    def test_everything_of_a_question_goes_with_it(self, built, parts):
        chosen, _ = choose(parts, 4, built.pipeline)
        numbers = [1, 3, 4, 0]
        completions = chosen.completions
        assert completions.tokens[:, 0, 0].tolist() == numbers
        assert completions.log_probs[:, 1, 4].tolist() == [-n for n in numbers]
        assert completions.mask.sum(-1)[:, 0].tolist() == [1 + n % TOKENS for n in numbers]
        assert completions.stopped[:, 0].tolist() == [n % 2 == 0 for n in numbers]
        assert [texts[1] for texts in chosen.texts] == [f"answer {n}.1" for n in numbers]
        assert chosen.partner_texts == [[f"boxes {n}"] for n in numbers]
        assert [own[0].tokens[0] for own in chosen.idle_outputs] == numbers
        values = [[reward.value for reward in group] for group in chosen.rewards]
        assert values == [DIFFERENT, DIFFERENT, DIFFERENT, SAME]
        # What it took is what all batches took: 40 steps half full, and 20 steps full.
        assert completions.steps == 60
        assert completions.occupancy == pytest.approx((40 * 0.5 + 20 * 1.0) / 60)

    def test_prompts_equal_those_collated_freshly(self, built, parts):
        """Images of both batches are in one new store, and every view is cut from its own."""
        chosen, images = choose(parts, 4, built.pipeline)
        builder = built.pipeline.builder
        rows = load(built, [1, 3, 4, 0])
        fresh = ImageStore.upload([r.image for r in rows], builder.buckets, builder.mesh)
        requests, idle = requests_of(builder, fresh, rows)
        assert plain(chosen.requests) == plain(requests)
        assert [plain(own) for own in chosen.idle_requests] == [plain(own) for own in idle]
        expected = builder.collate(requests, fresh)
        jax.tree.map(np.testing.assert_array_equal, chosen.prompts, expected)
        np.testing.assert_array_equal(images.pixels, fresh.pixels)
        assert images.shapes == fresh.shapes
        # The questions' pictures differ, or this would prove little.
        pixels = np.asarray(expected.patches.pixels)
        assert all((pixels[0] != other).any() for other in pixels[1:])

    def test_what_was_chosen_can_be_trained_on(self, built, parts):
        chosen, images = choose(parts, 3, built.pipeline)
        batch, metrics = training_batch(chosen, built.config.loss, built.mesh)
        assert batch.tokens.shape == (3, GROUP, TOKENS)
        assert metrics["reward/zero_variance_groups"] == 0
        anchor = anchor_batch(built.config.phases[1], chosen, images, built.pipeline.builder)
        assert np.asarray(anchor.tokens)[:, 0, 0].tolist() == [1, 3, 4]
