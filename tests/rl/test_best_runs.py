"""Whole runs that keep, start from and export their best weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from p2r_jax import cli
from p2r_jax import config as cfg
from p2r_jax.config import TrainConfig
from p2r_jax.evals.report_results import eval_order
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.arrays import array_types, restore_arrays
from p2r_jax.rl import launch
from p2r_jax.rl.best import Best
from p2r_jax.rl.checkpointing import OPTIMIZER, PARAMS, Checkpoints
from p2r_jax.rl.trainer import Trainer
from tests.rl.runs import Killed, Run, assert_same_outcome, kill
from tests.rl.test_best import accuracy
from tests.rl.tiny_run import PROMPTS, make_config


@contextmanager
def scripted(percent: dict[int, float]) -> Iterator[None]:
    """An evaluation of step N has the accuracy `percent[N]`."""
    original = Best.add

    def add(self, step, found):
        original(self, step, accuracy(percent.get(step, 0)) if found else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Best, "add", add)
        yield


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    pass


@pytest.fixture
def percent():
    """To be filled with what evaluations of steps find."""
    values: dict[int, float] = {}
    with scripted(values):
        yield values


CURVE = {0: 50, 1: 25, 2: 75, 3: 50, 4: 60, 5: 25}
"""Three perceiver steps, of which the second is best, and two reasoner steps."""


def two_phases(run: Path, model: Path, start: str = "best") -> TrainConfig:
    """A checkpoint only where the schedule of best ones and phase ends says so."""
    config = make_config(run, model)
    perceiver, reasoner = config.phases
    config.phases = [
        dataclasses.replace(perceiver, steps=3),
        dataclasses.replace(reasoner, start=start),
    ]
    config.checkpoint = cfg.CheckpointConfig(every=100, keep=1)
    config.eval = dataclasses.replace(
        config.eval, final_modes=["p2r"], modes=["p2r"], final_questions=PROMPTS
    )
    return config


def params_of(run: Path, step: int) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / str(step) / "state"
    return restore(folder, PARAMS)


def restore(folder: Path, part: str) -> dict[str, np.ndarray]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
        for name, x in array_types(folder, (part,)).items()
    }
    return restore_arrays(folder, like, (part,))


def exported_params(folder: Path) -> dict[str, np.ndarray]:
    state = nnx.state(load_pretrained(folder, dtype="float32"), nnx.Param)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same_arrays(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


class TestARun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory, tiny_checkpoint):
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch, scripted(CURVE):
            patch.setattr(Trainer, "_say", lambda self, text: said.append(text))
            run = Run(two_phases(tmp_path_factory.mktemp("best") / "run", tiny_checkpoint))
        run.said = said
        return run

    def test_best_ones_and_phase_ends_stay(self, run):
        there = sorted(int(f.name) for f in (run.folder / "checkpoints").iterdir())
        assert there == [2, 3, 5]

    def test_the_next_phase_starts_with_the_best(self, run):
        """Policy and snapshot of its first step are the policy that step 3 began with."""
        assert [role for role, _, _ in run.weights] == ["perceiver"] * 3 + ["reasoner"] * 2
        (_, second, _), (_, policy, partner) = run.weights[2:4]
        assert policy == partner == second
        assert run.said[0].startswith(
            "phase 2 (reasoner) starts with the weights of step 2, the best of phase 1: p2r 75.0 %"
        )
        best = json.loads((run.folder / "best.json").read_text())
        assert best["starts"] == {"0": 0, "1": 2}

    def test_that_phase_is_judged_by_the_weights_that_it_began_with(self, run):
        """Whose evaluation comes between those of both phases, and on the report too."""
        names = [row["name"] for row in run.rows if row["phase"] == "eval"]
        assert names == ["before", "after_phase1_perceiver", "phase2_reasoner_start", "after"]
        assert sorted(names, key=eval_order) == names
        assert [row["step"] for row in run.rows if row.get("name") == names[2]] == [3]
        first, second = run.summary["phases"]
        assert (first["start"], first["end"]) == ("before", "after_phase1_perceiver")
        assert (second["start"], second["end"]) == ("phase2_reasoner_start", "after")

    def test_the_export_holds_the_best_weights_and_says_so(self, run):
        assert_same_arrays(exported_params(run.folder / "export"), params_of(run.folder, 2))
        expected = {"step": 2, "phase": 1, "role": "perceiver", "chosen": "best", "metric": "p2r"}
        assert expected.items() <= run.summary["export"].items()
        assert (run.summary["export"]["value"], run.summary["export"]["n"]) == (0.75, 100)
        assert run.said[1].startswith(
            "export: weights of step 2 of 5, phase 1 (perceiver), the best of 6 evaluations: p2r 75"
        )
        card = (run.folder / "export" / "README.md").read_text()
        assert "step 2 of 5, phase 1 (perceiver)" in card
        assert str(run.folder.parent) not in card

    def test_convert_finds_them_by_name(self, run, tmp_path, capsys):
        out = tmp_path / "out"
        arguments = ["to-hf", str(run.folder), str(out), "--step", "best", "--dtype", "float32"]
        assert cli.main(["convert", *arguments]) == 0
        ours, theirs = (
            load_file(folder / "model.safetensors") for folder in (out, run.folder / "export")
        )
        assert_same_arrays(ours, theirs)
        assert (out / "README.md").read_text() == (run.folder / "export/README.md").read_text()
        arguments[4] = "4"
        assert cli.main(["convert", "to-hf", str(run.folder), f"{out}2", "--step", "4"]) == 2
        assert "there are [2, 3, 5], of which 2 is best" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "where, call",
        [
            pytest.param("_step", 3, id="after the best"),
            pytest.param("_evaluate", 2, id="before the phase's evaluation"),
            pytest.param("_start_phase", 1, id="after it"),
            pytest.param("_evaluate", 3, id="before the evaluation of what it starts from"),
            pytest.param("_step", 5, id="in the phase that went back"),
            pytest.param("_export", 1, id="before the export"),
        ],
    )
    def test_killed_and_resumed_nothing_is_different(
        self, run, percent, tmp_path, tiny_checkpoint, where, call
    ):
        percent.update(CURVE)
        config = two_phases(tmp_path / "run", tiny_checkpoint)
        kill(config, where, call)
        launch.train(config)
        assert_same_outcome(tmp_path / "run", run)
        for name in ("best.json", "export/README.md"):
            assert (tmp_path / "run" / name).read_text() == (run.folder / name).read_text()

    def test_killed_between_an_improvement_and_its_checkpoint(
        self, run, percent, tmp_path, tiny_checkpoint, monkeypatch
    ):
        """Nothing but its row and best.json knows of it; both are made again."""
        percent.update(CURVE)
        config = two_phases(tmp_path / "run", tiny_checkpoint)
        save = Trainer._save

        def killed(self):
            if self.live.progress.step == 2:
                raise Killed
            save(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_save", killed)
            with pytest.raises(Killed):
                launch.train(config)
        known = json.loads((tmp_path / "run" / "best.json").read_text())
        assert [score["step"] for score in known["scores"]] == [0, 1, 2]
        assert not (tmp_path / "run" / "checkpoints" / "2").exists()
        launch.train(config)
        assert_same_outcome(tmp_path / "run", run)

    @pytest.mark.slow
    def test_best_weights_that_cannot_be_read_make_room_for_the_next(
        self, percent, tmp_path, tiny_checkpoint, monkeypatch
    ):
        percent.update(CURVE)
        said: list[str] = []
        weights = Checkpoints.weights

        def unreadable(self, step, *rest):
            return None if step == 2 else weights(self, step, *rest)

        monkeypatch.setattr(Checkpoints, "weights", unreadable)
        monkeypatch.setattr(Trainer, "_say", lambda self, text: said.append(text))
        run = Run(two_phases(tmp_path / "run", tiny_checkpoint))
        assert said[0].startswith("the weights of step 2, p2r 75.0 %")
        assert "starts with the weights of step 3," in said[1]
        assert run.weights[3][1] != run.weights[2][1]
        assert run.summary["export"]["step"] == 4


def test_if_no_step_beats_the_start_its_weights_are_exported(
    percent, tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    """And started from, by the phase that wants the best."""
    percent.update({0: 50, 1: 25, 2: 25, 3: 25, 4: 25, 5: 25})
    said: list[str] = []
    monkeypatch.setattr(Trainer, "_say", lambda self, text: said.append(text))
    run = Run(two_phases(tmp_path / "run", tiny_checkpoint))
    assert "starts with the weights of step 0" in said[0]
    assert "no step is better than the start" in said[1]
    assert run.weights[3][1] == run.weights[0][1]
    assert_same_arrays(exported_params(run.folder / "export"), exported_params(tiny_checkpoint))
    assert run.summary["export"]["step"] == 0
    assert (
        cli.main(["convert", "to-hf", str(run.folder), str(tmp_path / "x"), "--step", "best"]) == 2
    )
    assert "no step of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("export", ["last", "none"])
def test_other_exports(percent, tmp_path, tiny_checkpoint, export):
    percent.update({0: 50})
    config = two_phases(tmp_path / "run", tiny_checkpoint, start="last")
    config.phases = [dataclasses.replace(config.phases[0], steps=1)]
    config.export = export
    run = Run(config)
    if export == "none":
        assert not (run.folder / "export").exists()
        assert "export" not in run.summary
    else:
        assert_same_arrays(exported_params(run.folder / "export"), params_of(run.folder, 1))
        assert run.summary["export"]["chosen"] == "last"


@pytest.mark.slow
def test_the_single_stage_control_goes_by_its_own_mode(percent, tmp_path, tiny_checkpoint):
    percent.update({0: 10, 1: 70, 2: 20})
    config = two_phases(tmp_path / "run", tiny_checkpoint)
    config.phases = [dataclasses.replace(config.phases[0], role="baseline", steps=2)]
    config.eval = dataclasses.replace(config.eval, modes=["baseline"], final_modes=["default"])
    run = Run(config)
    assert run.summary["export"]["metric"] == "baseline"
    assert run.summary["export"]["step"] == 1
    assert_same_arrays(exported_params(run.folder / "export"), params_of(run.folder, 1))


@pytest.mark.slow
def test_in_later_rounds_the_first_phase_follows_the_last(
    percent, tmp_path, tiny_checkpoint, monkeypatch
):
    """With one optimizer for the run, whose state goes back with the weights: phases 2 to 4 start
    with steps 0 (the start is better than step 1), 2 (the last one) and 2 again."""
    percent.update({0: 50, 1: 25, 2: 75, 3: 10, 4: 10})
    config = two_phases(tmp_path / "run", tiny_checkpoint)
    config.phases = [dataclasses.replace(p, steps=1, start="best") for p in config.phases]
    config.rounds, config.optimizer.reset = 2, False
    optimizers: list[dict[str, np.ndarray]] = []
    start = Trainer._start_phase

    def watching(self, phase, log):
        start(self, phase, log)
        leaves = jax.tree.leaves(self.live.state.opt_state)
        optimizers.append({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)})

    monkeypatch.setattr(Trainer, "_start_phase", watching)
    run = Run(config)
    best = json.loads((run.folder / "best.json").read_text())
    assert best["starts"] == {"0": 0, "1": 0, "2": 2, "3": 2}
    first, second, third, fourth = (policy for _, policy, _ in run.weights)
    assert (first, third) == (second, fourth)
    assert first != third
    fresh, *kept = optimizers
    assert not any(leaf.any() for leaf in fresh.values())
    for state in kept:
        assert_same_arrays(state, restore(run.folder / "checkpoints" / "2" / "state", OPTIMIZER))
    assert run.summary["export"]["step"] == 2
    assert_same_arrays(exported_params(run.folder / "export"), params_of(run.folder, 2))
