"""A run that looks after itself: which rows of metrics warn, and what it does about it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from p2r_jax.config import HealthConfig, TrainConfig
from p2r_jax.rl import health, launch, watch
from p2r_jax.rl.health import ADVICE, RULES, Monitor
from p2r_jax.rl.stop import RunStopped
from p2r_jax.rl.watch import Watch
from tests.rl.collapse import collapsing_rows, evaluated, healthy_rows, step_row
from tests.rl.runs import Run, assert_same_outcome, kill
from tests.rl.tiny_run import make_config, metric_rows


def warnings(rows, **settings):
    monitor = Monitor(HealthConfig(**settings))
    return [warning for row in rows for warning in monitor.add(row)]


def series(metric, values, phase="perceiver", number=1):
    """Healthy steps but for one metric."""
    return [step_row(i, phase, number, i, **{metric: value}) for i, value in enumerate(values, 1)]


def only(rule, **settings):
    """No other rule."""
    return dict.fromkeys(RULES) | {rule: getattr(HealthConfig(), rule)} | settings


class TestRecordedRuns:
    def test_the_collapse_is_told_by_each_thing_that_showed_it_once_and_in_order(self):
        found = warnings(collapsing_rows())
        assert [w.rule for w in found] == [
            "kl",
            "truncated",
            "entropy_rise",
            "teaching_groups",
            "reward_gap",
        ]
        steps = [w.step for w in found]
        assert steps == sorted(steps)
        assert 140 < steps[0] < 152  # In the middle of it, not at its end.

    def test_each_warning_says_where_what_and_what_to_do(self):
        first = warnings(collapsing_rows())[0]
        assert (first.phase, first.round, first.phase_number) == ("reasoner", 1, 2)
        assert (first.metric, first.threshold) == ("kl/mean", 0.5)
        assert first.value > 0.5
        assert first.phase_step == first.step - 100
        assert "optimizer.learning_rate" in first.message
        assert f"step {first.step}, round 1 reasoner: kl/mean 0." in first.label

    def test_a_healthy_run_is_left_in_peace(self):
        assert warnings(healthy_rows()) == []

    @pytest.mark.parametrize("rule", RULES)
    def test_null_switches_a_rule_off(self, rule):
        every = warnings(collapsing_rows())
        rest = warnings(collapsing_rows(), **{rule: None})
        assert rest == [w for w in every if w.rule != rule]

    def test_every_threshold_has_a_rule_and_every_rule_its_advice(self):
        fields = {f.name for f in dataclasses.fields(HealthConfig)} - {"action", "window"}
        assert fields == set(RULES) == set(ADVICE)


class TestRules:
    """Each on the metric that it is about; `first` is the phase's beginning."""

    @pytest.mark.parametrize(
        "rule, metric, first, bad",
        [
            ("kl", "kl/mean", 0.1, 0.6),
            ("kl", "kl/mean", 0.1, float("inf")),
            ("truncated", "completion/truncated_fraction", 0.1, 0.3),
            ("entropy_collapse", "entropy/mean", 0.5, 0.04),
            ("entropy_rise", "entropy/mean", 0.1, 0.3),
            ("teaching_groups", "reward/teaching_groups", 0.4, 0.2),
            ("only_training", "reward/only_training", 0.0, 0.2),
            ("anchor_rise", "loss/anchor", 0.2, 0.8),
            ("grad_norm_rise", "grad_norm", 0.5, 6.0),
        ],
    )
    def test_warns_beyond_its_threshold_and_once(self, rule, metric, first, bad):
        found = warnings(series(metric, [first] * 15 + [bad] * 10))
        assert [(w.rule, w.metric, w.step) for w in found] == [(rule, metric, 18)]

    def test_an_absolute_gradient_norm_is_off_until_it_is_set(self):
        rows = series("grad_norm", [3.0] * 9)
        assert warnings(rows) == []
        assert [w.rule for w in warnings(rows, grad_norm=2.0)] == ["grad_norm"]

    def test_a_rise_of_next_to_no_entropy_is_no_news(self):
        assert warnings(series("entropy/mean", [0.005] * 10 + [0.05] * 10)) == []

    def test_what_is_not_a_number_or_not_there_says_nothing(self):
        rows = series("kl/mean", [float("nan")] * 20)
        assert warnings(rows) == []
        bare = [{k: v for k, v in row.items() if "/" not in k} for row in rows]
        assert warnings(bare) == []

    @pytest.mark.parametrize(
        "reward, accuracy, said",
        [
            pytest.param([0.6, 0.6], [0.8, 0.62], ["reward_gap"], id="accuracy falls alone"),
            pytest.param([0.6, 0.7], [0.8, 0.72], ["reward_gap"], id="they part"),
            pytest.param([0.6, 0.45], [0.8, 0.65], [], id="both fall"),
            pytest.param([0.6, 0.9], [0.7, 0.7], [], id="accuracy does not fall"),
            pytest.param([0.6, 0.72], [0.8, 0.77], [], id="it may be chance"),
        ],
    )
    def test_reward_and_accuracy_that_part(self, reward, accuracy, said):
        """Of short evaluations, which ask the same questions."""
        values = [reward[0]] * 10 + [reward[1]] * 10
        rows = series("reward/mean", values, "reasoner")
        evaluated(rows[9], p2r=accuracy[0])
        evaluated(rows[19], p2r=accuracy[1])
        assert [w.rule for w in warnings(rows)] == said

    def test_of_a_few_questions_it_says_nothing(self):
        rows = series("reward/mean", [0.6] * 20, "reasoner")
        for row, accuracy, high in ((rows[9], 0.75, 0.95), (rows[19], 0.5, 0.85)):
            row |= {"eval/p2r/accuracy": accuracy, "eval/p2r/high": high}
        assert warnings(rows) == []

    def test_a_run_of_the_baseline_is_judged_by_its_own_mode(self):
        rows = series("reward/mean", [0.6] * 20, "baseline")
        evaluated(rows[9], baseline=0.8, default=0.5)
        evaluated(rows[19], baseline=0.6, default=0.5)
        (warning,) = warnings(rows)
        assert (warning.rule, warning.metric) == (
            "reward_gap",
            "reward/mean - eval/baseline/accuracy",
        )

    @pytest.mark.parametrize(
        "phase, mode, said",
        [
            ("perceiver", "live_reasoner", ["idle_drop"]),
            ("reasoner", "live_perceiver", ["idle_drop"]),
            ("perceiver", "live_perceiver", []),
            ("joint", "live_reasoner", []),
        ],
    )
    def test_the_role_that_does_not_learn_gets_worse(self, phase, mode, said):
        rows = series("kl/mean", [0.1] * 20, phase)
        evaluated(rows[9], p2r=0.8, **{mode: 0.8})
        evaluated(rows[19], p2r=0.8, **{mode: 0.6})
        assert [w.rule for w in warnings(rows)] == said


class TestWhen:
    def test_one_noisy_step_says_nothing(self):
        values = [0.1] * 8 + [50.0] + [0.1] * 3 + [50.0] + [0.1] * 8
        assert warnings(series("kl/mean", values)) == []
        assert [w.step for w in warnings(series("kl/mean", values), window=1)] == [9, 13]

    def test_again_only_after_it_has_recovered(self):
        """For as long as the window: a value that hangs about its threshold warns once."""
        about = [0.4, 0.6] * 20
        assert len(warnings(series("kl/mean", about), window=2)) <= 1
        twice = [0.6] * 10 + [0.1] * 20 + [0.6] * 10
        assert [w.step for w in warnings(series("kl/mean", twice))] == [5, 33]

    def test_a_new_phase_begins_anew(self):
        first = series("entropy/mean", [0.1] * 10 + [0.3] * 10)
        second = series("entropy/mean", [0.3] * 20, "reasoner", 2)
        assert [(w.rule, w.phase_number) for w in warnings(first + second)] == [("entropy_rise", 1)]
        second = series("kl/mean", [0.7] * 20, "reasoner", 2)
        found = warnings(series("kl/mean", [0.7] * 20) + second)
        assert [(w.rule, w.phase_number) for w in found] == [("kl", 1), ("kl", 2)]

    def test_roles_of_a_joint_phase_are_told_apart(self):
        rows = [
            {"perceiver/kl/mean": 0.1, "reasoner/kl/mean": 0.1 * i, "perceiver/entropy/mean": 0.1}
            | {"step": i, "phase": "joint", "round": 1, "phase_number": 1, "phase_step": i}
            for i in range(1, 21)
        ]
        (warning,) = warnings(rows)
        assert (warning.rule, warning.metric, warning.step) == ("kl", "reasoner/kl/mean", 8)

    def test_the_rules_need_no_accelerator_and_no_jax(self):
        code = "import sys, p2r_jax.rl.health; print('jax' in sys.modules)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.stdout == "False\n", ran.stderr


class TestSettings:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"window": 0}, r"health\.window"),
            ({"kl": 0.0}, r"health\.kl must be above 0, or null"),
            ({"truncated": 1.5}, r"health\.truncated is a share"),
            ({"entropy_rise": 0.5}, r"health\.entropy_rise is a factor"),
        ],
    )
    def test_that_cannot_work_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(health=HealthConfig(**settings)).validate()

    def test_null_is_allowed_everywhere(self):
        HealthConfig(**dict.fromkeys(RULES)).validate()


class TestFiles:
    """`Watch` as the trainer uses it, on recorded rows."""

    def write(self, run: Path, rows, config=None, begin=0) -> list[str]:
        """Goes through rows as the trainer does; what the console was told."""
        said: list[str] = []
        file = run / "metrics.jsonl"
        one = Watch(run, config or HealthConfig(), begin, said.append)
        for row in rows:
            values = {k: v for k, v in row.items() if k not in ("step", "phase")}
            if row["phase"] != "eval":
                one.after_step(row["step"], {"phase": row["phase"]}, values)
            with file.open("a") as out:
                out.write(json.dumps({"step": row["step"], "phase": row["phase"]} | values) + "\n")
        return said

    def test_rows_and_a_line_for_each_warning(self, tmp_path):
        said = self.write(tmp_path, collapsing_rows())
        rows = [json.loads(line) for line in (tmp_path / "warnings.jsonl").open()]
        expected = [dataclasses.asdict(w) for w in warnings(collapsing_rows())]
        assert rows == [row | {"action": "warn"} for row in expected]
        assert len(said) == len(rows) > 3
        assert said[0].startswith(f"warning: step {rows[0]['step']}, round 1 reasoner: kl/mean")
        logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
        counts = [row["health/warnings"] for row in logged if row["phase"] != "eval"]
        assert (counts[0], counts[-1]) == (0, len(rows))

    def test_a_healthy_run_has_an_empty_file(self, tmp_path):
        assert self.write(tmp_path, healthy_rows()) == []
        assert (tmp_path / "warnings.jsonl").read_text() == ""

    @pytest.mark.parametrize("saved", [120, 145, 150, 165, 180])
    @pytest.mark.parametrize("killed", [151, 170, 180])
    def test_killed_and_resumed_they_are_the_same(self, tmp_path, saved, killed):
        """Rows beyond the checkpoint are dropped, by `RunLog` those of metrics.jsonl."""
        rows = collapsing_rows()
        for run in (tmp_path / "whole", tmp_path / "killed"):
            run.mkdir()
        self.write(tmp_path / "whole", rows)
        self.write(tmp_path / "killed", [row for row in rows if row["step"] <= killed])
        with (tmp_path / "killed" / "warnings.jsonl").open("a") as file:
            file.write('{"step": 1')  # Cut by the crash.
        saved = min(saved, killed)
        metrics = tmp_path / "killed" / "metrics.jsonl"
        kept = [s for s in metrics.read_text().splitlines() if json.loads(s)["step"] <= saved]
        metrics.write_text("".join(line + "\n" for line in kept))
        self.write(tmp_path / "killed", [row for row in rows if row["step"] > saved], begin=saved)
        for name in ("warnings.jsonl", "metrics.jsonl"):
            texts = [(tmp_path / run / name).read_text() for run in ("whole", "killed")]
            assert texts[0] == texts[1]

    def test_a_run_that_was_stopped_stops_again_until_a_person_says_otherwise(self, tmp_path):
        rows = [row for row in collapsing_rows() if row["step"] <= 155]
        self.write(tmp_path, rows)
        stop = HealthConfig(action="stop")
        with pytest.raises(RunStopped, match=r"kl/mean .*--health\.action warn"):
            Watch(tmp_path, stop, 155)
        Watch(tmp_path, HealthConfig(action="warn"), 155)
        Watch(tmp_path, dataclasses.replace(stop, kl=2.0, truncated=0.9, entropy_rise=9.0), 155)

    def test_other_processes_do_what_the_main_one_does(self, tmp_path, monkeypatch):
        """They read and write nothing."""
        monkeypatch.setattr(watch, "is_main", lambda: False)
        monkeypatch.setattr(watch, "gather", lambda own: [~own])
        one = Watch(tmp_path, HealthConfig(action="stop_phase"), 0)
        assert one.after_step(1, {"phase": "perceiver"}, {"kl/mean": 0.1}) is True
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(RunStopped, match="process 0"):
            one.stop(1)


@pytest.mark.usefixtures("small_world")
class TestInTraining:
    """Real runs of the tiny model. KL is zero at a phase's first step and above this at its second,
    where the run is then found unwell."""

    UNWELL = HealthConfig(**dict.fromkeys(RULES) | {"kl": 1e-8, "window": 1})

    def config(self, run: Path, model: Path, action: str, steps: int = 2) -> TrainConfig:
        config = make_config(run, model, health=dataclasses.replace(self.UNWELL, action=action))
        config.phases[0].steps = steps
        return config

    @pytest.fixture(scope="class")
    def shortened(self, small_world, tmp_path_factory, tiny_checkpoint) -> Run:
        """A perceiver phase of four steps that is ended after two."""
        folder = tmp_path_factory.mktemp("shortened") / "run"
        return Run(self.config(folder, tiny_checkpoint, "stop_phase", steps=4))

    def test_a_phase_that_is_ended_early_is_evaluated_and_the_next_one_follows(
        self, shortened, whole
    ):
        """It comes to the weights of a run whose first phase had so many steps to begin with."""
        rows = [(row["step"], row.get("name", row["phase"])) for row in shortened.rows]
        assert rows == [(row["step"], row.get("name", row["phase"])) for row in whole.rows]
        weights = "export/model.safetensors"
        assert (shortened.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()
        found = [json.loads(s) for s in (shortened.folder / "warnings.jsonl").open()]
        assert [(w["step"], w["phase_number"], w["rule"], w["action"]) for w in found] == [
            (2, 1, "kl", "stop_phase"),
            (4, 2, "kl", "stop_phase"),
        ]
        assert [row["health/warnings"] for row in shortened.steps] == [0, 1, 1, 2]
        assert shortened.summary["warnings"] == 2
        assert list(shortened.summary)[:3] == ["before", "after_phase1_perceiver", "after"]

    @pytest.mark.parametrize(
        "every, where, call",
        [
            pytest.param(1, "_step", 2, id="before the step that ends it"),
            pytest.param(9, "_evaluate", 2, id="in the evaluation of its end"),
            pytest.param(1, "_step", 4, id="in the phase after it"),
        ],
    )
    def test_killed_and_resumed_it_comes_to_the_same_schedule(
        self, shortened, tmp_path, tiny_checkpoint, every, where, call
    ):
        config = self.config(tmp_path / "run", tiny_checkpoint, "stop_phase", steps=4)
        config.checkpoint.every = every
        kill(config, where, call)
        rest = Run(config)
        assert_same_outcome(tmp_path / "run", shortened)
        said, expected = (f / "warnings.jsonl" for f in (rest.folder, shortened.folder))
        assert said.read_text() == expected.read_text()

    def test_a_run_that_is_stopped_is_saved_and_a_person_may_let_it_go_on(
        self, whole, tmp_path, tiny_checkpoint
    ):
        config = self.config(tmp_path / "run", tiny_checkpoint, "stop")
        config.checkpoint.every, config.eval.every = 9, 0
        stopped = r"health\.action is stop.*step 2, round 1 perceiver: kl/mean .*saved at step 2"
        with pytest.raises(RunStopped, match=stopped):
            launch.train(config)
        assert [row["step"] for row in metric_rows(tmp_path / "run")] == [0, 1, 2]
        assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
        with pytest.raises(RunStopped, match="kl/mean"):
            launch.train(config)
        assert len(metric_rows(tmp_path / "run")) == 3  # No step more.
        config.health.action = "warn"
        rest = Run(config)
        assert [role for role, _, _ in rest.weights] == ["reasoner", "reasoner"]
        weights = "export/model.safetensors"
        assert (rest.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


def test_the_compared_modes_are_those_of_evaluations():
    from p2r_jax.evals.modes import LIVE_MODES, MODES

    assert set(health.COMPARED) <= set(MODES)
    assert set(health.IDLE_MODE.values()) == set(LIVE_MODES)
