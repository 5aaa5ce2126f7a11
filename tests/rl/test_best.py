"""Best weights: which they are, that their checkpoints stay, who starts from and exports them."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console

from p2r_jax import cli
from p2r_jax import config as cfg
from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.evals.intervals import Accuracy
from p2r_jax.rl import launch
from p2r_jax.rl.best import Best, Score, accuracy_of, metric_of, shared_questions
from p2r_jax.rl.checkpointing import Checkpoints, SavedWeights, abstract
from p2r_jax.rl.evaluations import Evaluations
from p2r_jax.rl.model_card import MARK, Exported
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.schedule import Progress, plan_phases
from p2r_jax.rl.step import new_state
from tests.rl.tiny_run import make_config


def config_of(*starts: str, steps: int = 10, rounds: int = 1, **checkpoint) -> TrainConfig:
    """Phases that start so, of so many steps each."""
    phases = [PhaseConfig(steps=steps, prompts=4, start=start) for start in starts]
    return TrainConfig(phases=phases, rounds=rounds, checkpoint=cfg.CheckpointConfig(**checkpoint))


def best_of(config: TrainConfig, scores=(), ended=()) -> Best:
    """scores: accuracy in percent by step. ended: last steps of phases, each followed by the next
    one's start with these weights."""
    best = Best(config, plan_phases(config, 64))
    for number, end in enumerate(ended, 1):
        best.ended(end)
        best.started(number, end)
    for step, percent in dict(scores).items():
        best.add(step, accuracy(percent))
    return best


def accuracy(percent: float, n: int = 100) -> Accuracy:
    return Accuracy.of([1.0] * round(percent * n / 100) + [0.0] * round((100 - percent) * n / 100))


def steps_of(scores) -> list[int]:
    return [score.step for score in scores]


class TestWhichIsBest:
    def test_the_best_first_and_of_equal_ones_the_later(self):
        best = best_of(config_of("last"), {0: 30, 2: 50, 4: 40, 6: 50})
        assert steps_of(best.ranked()) == [6, 2, 4, 0]
        assert steps_of(best.ranked(until=4)) == [2, 4, 0]

    def test_equal_accuracies_of_other_counts_are_equal(self):
        best = best_of(config_of("last"))
        best.add(2, accuracy(75, 100))
        best.add(4, Accuracy.of([1.0, 1.0, 1.0, 0.0]))
        assert steps_of(best.ranked()) == [4, 2]

    def test_a_phase_counts_its_own_and_its_start(self):
        config = config_of("last", "last", "last")
        scores = {0: 90, 5: 40, 10: 50, 15: 45, 20: 35, 25: 60}
        best = best_of(config, scores, ended=(10, 20))
        assert steps_of(best.ranked(0)) == [0, 10, 5]
        assert steps_of(best.ranked(1)) == [10, 15, 20]
        best.started(2, 10)  # It went back.
        assert steps_of(best.ranked(2)) == [25, 10]

    def test_a_phase_that_ended_early_is_over(self):
        best = best_of(config_of("last", "last"), {0: 1, 3: 2, 5: 3}, ended=(4,))
        assert (best.phase_of(4).number, best.phase_of(5).number) == (0, 1)
        assert best.phase_of(0) is None

    def test_the_first_evaluation_of_a_step_counts_and_an_empty_one_does_not(self):
        best = best_of(config_of("last"), {2: 50})
        best.add(2, accuracy(70))
        best.add(4, None)
        best.add(4, Accuracy.of([]))
        assert best.ranked() == [Score(2, *dataclasses.astuple(accuracy(50)))]


class TestWhichStay:
    def kept(self, best: Best, *steps: int) -> list[int]:
        return sorted(best.kept(steps))

    def test_phase_ends_and_the_best(self):
        best = best_of(config_of("last", "last"), {0: 10, 4: 50, 8: 30, 14: 40}, ended=(10,))
        assert self.kept(best, 2, 4, 6, 8, 10, 12, 14) == [4, 10]

    def test_nothing_if_nothing_is_asked_for(self):
        best = best_of(
            config_of("last", "last", keep_best=None, keep_phase_ends=False), {4: 50}, ended=(10,)
        )
        assert best.metric is None
        assert self.kept(best, 2, 4, 10, 12) == []

    def test_what_the_one_before_would_have_called_best(self):
        """If the newest turns out torn, the run goes on from the one before."""
        best = best_of(config_of("last", keep=2), {4: 50, 6: 60})
        assert self.kept(best, 4, 5, 6) == [4, 6]
        assert self.kept(best, 4, 6, 7) == [6]

    def test_what_the_next_phase_starts_from(self):
        """Phase 2 cannot beat phase 1, and phase 3 wants the best of phase 2."""
        config = config_of("last", "last", "best", keep_phase_ends=False)
        scores = {0: 10, 5: 90, 10: 50, 13: 60, 16: 55}
        best = best_of(config, scores, ended=(10,))
        assert self.kept(best, 5, 10, 13, 16, 17) == [5, 13]
        # Its start is one of its candidates.
        best = best_of(config, {5: 90, 10: 70, 13: 60, 16: 55}, ended=(10,))
        assert self.kept(best, 5, 10, 13, 16, 17) == [5, 10]

    def test_what_a_phase_end_that_stays_would_go_on_with(self):
        config = config_of("last", "best", keep=1)
        best = best_of(config, {0: 10, 5: 60, 10: 50, 15: 90}, ended=(10,))
        assert self.kept(best, 5, 8, 10, 15, 16) == [5, 10, 15]

    def test_the_newest_is_wanted_if_it_is_the_best_so_far(self):
        best = best_of(config_of("last", "best"), {0: 50, 2: 40, 4: 50, 6: 45})
        assert [best.wants(step) for step in (2, 4, 6)] == [False, True, False]
        assert not best.wants(5)

    def test_or_the_best_of_a_phase_that_the_next_one_starts_from(self):
        best = best_of(config_of("last", "last", "best"), {5: 90, 10: 30, 12: 40}, ended=(10,))
        assert best.wants(12)
        best = best_of(config_of("last", "last", "last"), {5: 90, 10: 30, 12: 40}, ended=(10,))
        assert not best.wants(12)


class TestOnDisk:
    def test_everything_comes_back(self):
        config = config_of("last", "best", "last")
        best = best_of(config, {0: 10, 5: 60, 10: 50, 15: 90}, ended=(10,))
        best.started(1, 5)
        again = best_of(config)
        again.load(json.loads(json.dumps(best.to_json())), 15)
        assert (again.scores, again.starts, again.ends) == (best.scores, best.starts, best.ends)
        assert again.scores[15].low == best.scores[15].low

    def test_a_checkpoint_of_a_version_before_tells_where_phases_ended(self):
        best = best_of(config_of("last", "last", "last"), {5: 60})
        best.load(None, 20)
        assert (best.scores, best.starts, best.ends) == ({}, {0: 0, 1: 10}, {10})
        best.load(None, 21)
        assert (best.starts, best.ends) == ({0: 0, 1: 10, 2: 20}, {10, 20})

    def test_by_another_metric_it_begins_anew(self):
        best = best_of(config_of("last"), {5: 60})
        other = best_of(config_of("last", keep_best="oracle_box"), {2: 10})
        other.load(best.to_json(), 5)
        assert other.scores == {}


class TestMetric:
    def metric(self, keep_best="p2r", **settings):
        evaluation = cfg.EvalDuringTraining(**settings)
        checkpoint = cfg.CheckpointConfig(keep_best=keep_best)
        return metric_of(TrainConfig(eval=evaluation, checkpoint=checkpoint))

    @pytest.mark.parametrize(
        "keep_best, settings, expected",
        [
            pytest.param("p2r", {}, "p2r", id="by default"),
            pytest.param("p2r", {"modes": ["baseline"]}, "baseline", id="single-stage control"),
            pytest.param(
                "p2r", {"modes": ["live_reasoner", "crops_only"]}, "crops_only", id="the first own"
            ),
            pytest.param("p2r", {"modes": ["live_reasoner"]}, "p2r", id="before and after alone"),
            pytest.param(
                "p2r",
                {"modes": ["live_reasoner"], "final_modes": ["default"]},
                "default",
                id="no p2r at all",
            ),
            pytest.param("oracle_box", {}, "oracle_box", id="named"),
            pytest.param("p2r", {"every": 0, "final_questions": 0}, None, id="no evaluations"),
            pytest.param(None, {}, None, id="none"),
        ],
    )
    def test_stands_for(self, keep_best, settings, expected):
        assert self.metric(keep_best, **settings) == expected

    @pytest.mark.parametrize(
        "keep_best, settings, message",
        [
            ("grid", {}, r"by grid; there are p2r, default, oracle_box, random_box, or null"),
            ("oracle_box", {"final_questions": 0}, "by oracle_box; there are p2r"),
            ("live_reasoner", {}, r"live_reasoner \(its partner is another one in each phase\)"),
            ("baseline", {"every": 0, "final_questions": 0}, "there are none"),
        ],
    )
    def test_that_no_evaluation_gives_is_refused(self, keep_best, settings, message):
        with pytest.raises(ValueError, match=message):
            self.metric(keep_best, **settings)

    def test_is_checked_before_anything_is_read(self, tmp_path, tiny_checkpoint):
        config = make_config(tmp_path / "run", tiny_checkpoint / "no such folder")
        config.checkpoint.keep_best = "grid"
        with pytest.raises(ValueError, match=r"checkpoint\.keep_best"):
            launch.build_trainer(config, Console(quiet=True))


class TestSettings:
    def test_a_phase_that_starts_with_the_best_follows_one(self):
        with pytest.raises(ValueError, match=r"phases\[0\]\.start: best, but there is no phase"):
            config_of("best", "last").validate()
        config_of("best", "last", rounds=2).validate()

    def test_and_needs_something_that_tells(self):
        with pytest.raises(ValueError, match=r"phases\[1\]\.start: best needs checkpoint\.keep_"):
            config_of("last", "best", keep_best=None).validate()

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"final_questions": 0, "every": 10}, "is not evaluated: set eval.final_questions"),
            ({"modes": ["live_reasoner"]}, "is not evaluated by p2r: add it to eval.modes"),
        ],
    )
    def test_of_the_phase_before(self, settings, message):
        config = config_of("last", "best")
        config.eval = cfg.EvalDuringTraining(**settings)
        with pytest.raises(ValueError, match=rf"phases\[1\]\.start: the phase before {message}"):
            best_of(config)

    def test_export_of_earlier_versions_is_understood(self, tmp_path):
        assert [TrainConfig(export=old).export for old in (True, False)] == ["best", "none"]
        parser = cli._train_parser()
        for text, expected in {"true": "best", "false": "none", "last": "last"}.items():
            (tmp_path / "c.yaml").write_text(f"export: {text}\n")
            parsed = parser.parse_args(["--config", str(tmp_path / "c.yaml")])
            assert cli._dataclass_of(parser, parsed, TrainConfig).export == expected

    @pytest.mark.parametrize("start", ["last", "best"])
    def test_what_is_best_may_change_on_resume_unless_a_phase_starts_from_it(self, tmp_path, start):
        config = config_of("last", start)
        launch.write_config(config, tmp_path)
        config.checkpoint.keep_phase_ends, config.export = False, "last"
        launch.check_same_config(config, tmp_path)
        config.checkpoint.keep_best = "oracle_box"
        if start == "last":
            launch.check_same_config(config, tmp_path)
        else:
            with pytest.raises(ValueError, match=r"\(checkpoint\.keep_best\)"):
                launch.check_same_config(config, tmp_path)

    def test_a_run_of_an_earlier_version_goes_on(self, tmp_path):
        config = config_of("last", "last")
        launch.write_config(config, tmp_path)
        old = yaml.safe_load((tmp_path / "config.yaml").read_text())
        for phase in old["phases"]:
            del phase["start"]
        del old["checkpoint"]["keep_best"], old["checkpoint"]["keep_phase_ends"]
        old["export"] = True
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
        launch.check_same_config(config, tmp_path)
        config.phases[1].start = "best"
        with pytest.raises(ValueError, match=r"\(phases, checkpoint\.keep_best\)"):
            launch.check_same_config(config, tmp_path)


class TestSharedQuestions:
    def test_are_those_of_the_shorter_evaluations(self):
        config = TrainConfig()
        assert shared_questions(config) == 200
        config.eval.final_questions = 50
        assert shared_questions(config) == 50
        config.eval = cfg.EvalDuringTraining(every=0)
        assert shared_questions(config) == 1000

    def record(self, number: int, mode: str, correct: float | None) -> dict:
        boxes = {"boxes": [], "category": "", "prediction": "A"}
        return {"id": str(number), "mode": mode, "correct": correct} | boxes

    def test_of_a_full_evaluation_only_they_count(self, tmp_path):
        """Also if one of them could not be read: no other takes its place."""
        config = TrainConfig(run=str(tmp_path))
        config.eval.questions, config.eval.final_questions = 4, 8
        source = [types.SimpleNamespace(id=str(i)) for i in range(8)]
        evaluations = Evaluations(config, plan_phases(config, 64), None, source, None)
        records = [
            self.record(i, mode, float(i >= 3) if mode == "p2r" else 1.0)
            for i in (0, 1, 3, 4, 5, 6, 7)
            for mode in ("oracle_box", "p2r")
        ]
        found = evaluations._on_shared(records)
        assert (found.accuracy, found.n) == (1 / 3, 3)
        # And the same from what it left on disk.
        (tmp_path / "eval").mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "eval" / "before.jsonl").write_text(lines)
        evaluations.read_shared("before")
        assert evaluations.shared == found
        evaluations.read_shared("gone")
        assert evaluations.shared is None

    def test_what_could_not_be_graded_does_not_count(self):
        records = [self.record(0, "p2r", 1.0), self.record(1, "p2r", None)]
        assert accuracy_of(records, "p2r", None).n == 1
        assert accuracy_of(records[1:], "p2r", None) is None

    def test_before_training_the_metric_is_among_the_modes(self, tmp_path):
        config = TrainConfig(run=str(tmp_path))
        config.eval.modes = ["baseline"]
        evaluations = Evaluations(config, plan_phases(config, 64), None, [], None)
        assert evaluations._modes("before") == [*config.eval.final_modes, "baseline"]


SHAPES = {"kernel": (64, 20), "bias": (20,)}


def make_state(step: int):
    """State and snapshot that differ from those of any other step."""
    rng = np.random.default_rng(step)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    state = new_state(params, make_optimizer(cfg.OptimizerConfig(), 10))
    moved = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state.opt_state)
    return dataclasses.replace(state, opt_state=moved), params


class TestCheckpoints:
    """By orbax, for real."""

    def open(self, run: Path, best: Best, said=None) -> Checkpoints:
        notify = (lambda text: None) if said is None else said.append
        settings = {"model": {"path": "models/base"}, "seed": 3}
        return Checkpoints(run, best.config.checkpoint, settings, notify, {}, best)

    def train(self, run: Path, config: TrainConfig, percent: dict[int, float], until: int) -> Best:
        """Save as the trainer does: every second step, phase ends, and what is best so far."""
        best = best_of(config)
        checkpoints, step = self.open(run, best), 0
        for phase in best.phases:
            best.started(phase.number, step)
            for phase_step in range(1, phase.steps + 1):
                step += 1
                if step > until:
                    checkpoints.close()
                    return best
                best.add(step, accuracy(percent[step]) if step in percent else None)
                if phase_step == phase.steps or step % 2 == 0 or best.wants(step):
                    checkpoints.save(Progress(phase.number, phase_step, step), *make_state(step))
            best.ended(step)
        checkpoints.close()
        return best

    def there(self, run: Path) -> list[int]:
        return sorted(int(folder.name) for folder in (run / "checkpoints").iterdir())

    def test_the_right_ones_stay_among_many(self, tmp_path):
        percent = {1: 20, 3: 70, 5: 60, 7: 65, 11: 30, 13: 71, 15: 50}
        config = config_of("last", "last", keep=2)
        self.train(tmp_path, config, percent, until=20)
        assert self.there(tmp_path) == [10, 13, 18, 20]

    def test_only_the_newest_if_nothing_else_is_asked_for(self, tmp_path):
        config = config_of("last", "last", keep=2, keep_best=None, keep_phase_ends=False)
        self.train(tmp_path, config, {3: 70}, until=16)
        assert self.there(tmp_path) == [14, 16]

    def test_what_is_known_comes_back_with_the_checkpoint(self, tmp_path):
        config = config_of("last", "best", keep=2)
        best = self.train(tmp_path, config, {1: 20, 3: 70, 13: 30}, until=14)
        assert self.there(tmp_path) == [3, 10, 12, 14]
        like = tuple(map(abstract, make_state(0)))
        again = best_of(config)
        self.open(tmp_path, again).restore(*like)
        assert again.to_json() == best.to_json()

    def test_a_torn_newest_one_takes_what_it_knew_with_it(self, tmp_path):
        config = config_of("last", keep=2)
        self.train(tmp_path, config, {1: 20, 3: 70, 5: 80}, until=5)
        (tmp_path / "checkpoints" / "5" / "meta" / "metadata").write_text("{")
        again = best_of(config)
        found = self.open(tmp_path, again).restore(*map(abstract, make_state(0)))
        assert found[0].step == 4
        assert steps_of(again.ranked()) == [3, 1]
        assert self.there(tmp_path) == [3, 4]  # Its best is there, too.

    def test_weights_of_an_earlier_step_with_and_without_the_optimizer(self, tmp_path):
        best = self.train(tmp_path, config_of("last"), {3: 70}, until=6)
        checkpoints = self.open(tmp_path, best)
        like = abstract(make_state(0)[0])
        for optimizer in (True, False):
            found, (expected, _) = checkpoints.weights(3, like, optimizer), make_state(3)
            jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
            if optimizer:
                jax.tree.map(np.testing.assert_array_equal, found.opt_state, expected.opt_state)
            else:
                assert found.opt_state == ()

    def test_those_of_a_damaged_one_are_none_and_it_is_said(self, tmp_path, monkeypatch):
        monkeypatch.setattr("p2r_jax.rl.checkpointing.time.sleep", lambda seconds: None)
        said: list[str] = []
        best = self.train(tmp_path, config_of("last"), {3: 70}, until=6)
        for file in (tmp_path / "checkpoints" / "3" / "state").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.unlink()
        checkpoints = self.open(tmp_path, best, said)
        assert checkpoints.weights(3, abstract(make_state(0)[0]), False) is None
        assert said[0].startswith("the checkpoint of step 3 cannot be read: ")

    def test_steps_are_found_by_name(self, tmp_path):
        best = self.train(tmp_path, config_of("last"), {1: 20, 3: 70}, until=6)
        assert SavedWeights.find(tmp_path).step == SavedWeights.find(tmp_path, "last").step == 6
        assert SavedWeights.find(tmp_path, "best").step == 3
        with pytest.raises(ValueError, match=r"step 5; there are \[3, 4, 6\], of which 3 is best"):
            SavedWeights.find(tmp_path, 5)
        # The evaluation after the last checkpoint is not in it.
        best.add(6, accuracy(90))
        best.write(tmp_path)
        assert SavedWeights.find(tmp_path, "best").step == 6
        best.add(0, accuracy(95))
        best.write(tmp_path)
        with pytest.raises(ValueError, match=r"no step of .* is better than .*\[3, 4, 6\], of whi"):
            SavedWeights.find(tmp_path, "best")

    def test_a_run_without_evaluations_has_no_best(self, tmp_path):
        self.train(tmp_path, config_of("last", keep_best=None), {}, until=4)
        with pytest.raises(ValueError, match=r"nothing in .* tells .* there are \[2, 4\]"):
            SavedWeights.find(tmp_path, "best")


class TestWhatIsSaid:
    SETTINGS = types.MappingProxyType(
        {"model": {"path": "/home/me/Base-4B/"}, "seed": 3, "phases": [{"role": "perceiver"}]}
    )

    def exported(self, scores, chosen: bool = True, last: int = 10) -> Exported:
        best = best_of(config_of("last"), scores)
        return Exported.of(self.SETTINGS, best, last, best.ranked()[0] if chosen else None)

    def test_a_chosen_step(self):
        exported = self.exported({0: 10, 4: 40})
        assert str(exported) == (
            "export: weights of step 4 of 10, phase 1 (perceiver), the best of 2 evaluations: "
            "p2r 40.0 % [30.9-49.8] (n=100)"
        )
        card = exported.card()
        for text in ("Base-4B", "step 4 of 10", "40.0 % [30.9-49.8] (n=100)", "| seed | 3 |"):
            assert text in card
        assert "best of 2" in card
        assert "/home" not in card
        assert exported.summary()["value"] == 0.4

    def test_the_last_one(self):
        exported = self.exported({0: 10, 4: 40}, chosen=False)
        assert str(exported) == "export: weights of step 10 of 10, phase 1 (perceiver), the last"
        assert "best of" not in exported.card()
        assert exported.summary() == {
            "step": 10, "phase": 1, "role": "perceiver", "chosen": "last"
        }  # fmt: skip

    def test_the_start(self):
        exported = self.exported({0: 50, 4: 40})
        assert str(exported).startswith("export: no step is better than the start, the best of 2")
        assert "step 0 of 10 (those it started from)" in exported.card()

    def test_a_card_that_a_person_wrote_stays(self, tmp_path):
        file = tmp_path / "README.md"
        exported = self.exported({4: 40})
        file.write_text(exported.card().replace("step 4", "step 2"))
        assert "step 4" in exported.card(file)
        file.write_text(exported.card().replace(MARK, "my own"))
        assert "my own" in exported.card(file)
