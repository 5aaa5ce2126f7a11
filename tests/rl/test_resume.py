"""A run that is killed, or asked to end, goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from flax import nnx

from p2r_jax.config import MeshConfig
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.rl import experience, launch
from p2r_jax.rl.evaluations import Evaluations
from p2r_jax.rl.stop import Preempted
from tests.rl.runs import Run, assert_same_outcome, kill, straight_and_killed
from tests.rl.tiny_run import PROMPTS, make_config, metric_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    pass


class TestKilled:
    @pytest.mark.parametrize(
        "every, where, call",
        [
            pytest.param(1, "_step", 2, id="within a phase"),
            pytest.param(3, "_step", 2, id="before the first checkpoint"),
            pytest.param(1, "_evaluate", 2, id="in the evaluation between two phases"),
            pytest.param(1, "_export", 1, id="after the last step"),
        ],
    )
    def test_equals_a_run_that_never_stopped(
        self, whole, tmp_path, tiny_checkpoint, every, where, call
    ):
        config = make_config(tmp_path / "run", tiny_checkpoint)
        config.checkpoint.every = every
        kill(config, where, call)
        launch.train(config)
        assert_same_outcome(tmp_path / "run", whole)

    def test_with_a_torn_checkpoint_it_goes_on_from_the_one_before(
        self, whole, tmp_path, tiny_checkpoint, capsys
    ):
        """The step in between is taken again, and its row is there once."""
        config = make_config(tmp_path / "run", tiny_checkpoint)
        kill(config, "_step", 4)
        folder = tmp_path / "run" / "checkpoints"
        assert sorted(f.name for f in folder.iterdir()) == ["2", "3"]
        files = [f for f in (folder / "3" / "state").rglob("*") if f.parent.name == "d"]
        largest = max(files, key=lambda f: f.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        capsys.readouterr()
        rest = Run(config)
        printed = " ".join(capsys.readouterr().out.split())
        assert "the checkpoint of step 3 cannot be read and is skipped" in printed
        assert "resuming at step 2 of 4" in printed
        assert [role for role, _, _ in rest.weights] == ["reasoner", "reasoner"]
        assert_same_outcome(tmp_path / "run", whole)

    def test_by_sigkill_at_any_moment(self, whole, tmp_path, tiny_checkpoint):
        """Another process, killed as soon as its second step is logged: that step's checkpoint may
        be whole, half written or not begun."""
        run = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.rl.tiny_run", str(run), str(tiny_checkpoint)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        deadline = time.monotonic() + 300
        try:
            while not self.has_step(run, 2):
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (run / "export").exists()
        launch.train(make_config(run, tiny_checkpoint))
        assert_same_outcome(run, whole)

    @staticmethod
    def has_step(run: Path, step: int) -> bool:
        file = run / "metrics.jsonl"
        return file.exists() and f'"phase_step": {step},' in file.read_text()


class TestAskedToEnd:
    """By SIGTERM, in runs that would not save anything before a phase ends."""

    @pytest.fixture
    def config(self, tmp_path, tiny_checkpoint):
        config = make_config(tmp_path / "run", tiny_checkpoint)
        config.checkpoint.every = 100
        return config

    def preempt(self, config, where, name, call):
        """A run that gets SIGTERM when something is called for the n-th time."""
        calls, original = 0, where[name] if isinstance(where, dict) else getattr(where, name)

        def signalled(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        before = signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            (patch.setitem if isinstance(where, dict) else patch.setattr)(where, name, signalled)
            with pytest.raises(Preempted) as request:
                launch.train(config)
        assert signal.getsignal(signal.SIGTERM) == before
        return str(request.value)

    def saved(self, config):
        return sorted(f.name for f in (Path(config.run) / "checkpoints").iterdir())

    def test_in_a_rollout_it_saves_the_step_before_and_goes_on_from_there(self, whole, config):
        message = self.preempt(config, experience.COLLECT, "perceiver", 2)
        assert message.startswith("SIGTERM: the run is saved at step 1 of 4; the same command")
        assert self.saved(config) == ["1"]
        assert len(metric_rows(Path(config.run))) == 2  # the evaluation before, and step 1
        rest = Run(config)
        assert [role for role, _, _ in rest.weights] == ["perceiver", "reasoner", "reasoner"]
        assert_same_outcome(Path(config.run), whole)

    def test_before_the_first_step_there_is_nothing_to_save(self, whole, config):
        message = self.preempt(config, experience.COLLECT, "perceiver", 1)
        assert "saved at step 0 of 4" in message
        assert self.saved(config) == []
        launch.train(config)
        assert_same_outcome(Path(config.run), whole)

    @pytest.mark.parametrize("killed_again", [False, True])
    def test_in_the_evaluation_of_a_step_nothing_of_the_step_is_lost(
        self, whole, config, killed_again
    ):
        """Its update has happened, its row is not written yet. Whoever goes on evaluates again and
        writes it, once, even if that one is killed before it has saved anything."""
        message = self.preempt(config, Evaluations, "short", 1)
        assert "saved at step 1 of 4" in message
        assert self.saved(config) == ["1"]
        assert len(metric_rows(Path(config.run))) == 1
        if killed_again:
            kill(config, "_step", 1)
        rest = Run(config)
        assert len(rest.weights) == 3
        assert_same_outcome(Path(config.run), whole)

    def test_between_two_phases(self, whole, config):
        """In the full evaluation, which is made again."""
        message = self.preempt(config, Evaluations, "full", 2)
        assert "saved at step 2 of 4" in message
        assert self.saved(config) == ["2"]
        launch.train(config)
        assert_same_outcome(Path(config.run), whole)


@pytest.mark.slow
class TestTheDemosSettings:
    """What configs/tiny.yaml turns on: two devices, the role anchor, a frozen tower, a schedule;
    and the baseline role, which no shipped config uses."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, tiny_checkpoint):
        """The same run twice: straight through, and killed before its second step."""
        with pytest.MonkeyPatch.context() as patch:
            two = jax.devices()[:2]
            patch.setattr(launch, "make_mesh", lambda *sizes: make_mesh(2, 1, 1, two))
            folder = tmp_path_factory.mktemp("demo")
            return straight_and_killed(folder, self.config(folder, tiny_checkpoint), step=2)

    def config(self, run, model):
        config = make_config(run, model)
        perceiver, _ = config.phases
        perceiver = dataclasses.replace(
            perceiver, microbatch=0, role_anchor=0.5, role_anchor_prompts=2
        )
        baseline = dataclasses.replace(perceiver, role="baseline", steps=1, role_anchor=0.0)
        config.phases = [perceiver, baseline]
        config.mesh = MeshConfig(data=2, fsdp=1)
        config.optimizer = dataclasses.replace(
            config.optimizer, freeze_vision=True, warmup_steps=1, final_fraction=0.1
        )
        config.eval = dataclasses.replace(config.eval, final_questions=0, every=0)
        return config

    def test_the_anchor_is_part_of_the_perceivers_steps(self, runs):
        rows = runs[0].rows
        assert [row["phase"] for row in rows] == ["perceiver", "perceiver", "baseline"]
        assert ["loss/anchor" in row for row in rows] == [True, True, False]
        assert all(row["loss/anchor"] > 0 for row in rows[:2])

    def test_the_rate_warms_up_and_falls(self, runs):
        peak = 1e-3
        assert [row["lr"] for row in runs[0].rows] == pytest.approx([peak / 2, peak, peak / 2])

    def test_the_tower_stays_and_the_rest_moves(self, runs, tiny_checkpoint):
        before, after = (
            nnx.to_pure_dict(nnx.state(load_pretrained(path, dtype="float32")))
            for path in (tiny_checkpoint, runs[0].folder / "export")
        )
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert not any(jax.tree.leaves(moved["visual"]))
        assert all(jax.tree.leaves(moved["language_model"]))

    def test_killed_and_resumed_nothing_is_different(self, runs):
        """Two devices share the rollout and the update, and neither run writes other numbers."""
        whole, killed = runs
        assert_same_outcome(killed.folder, whole)


class TestOneStreamOfQuestions:
    """`data.order: run`."""

    @pytest.fixture
    def config(self, tmp_path, tiny_checkpoint):
        config = make_config(tmp_path / "run", tiny_checkpoint)
        config.data.order = "run"
        return config

    def test_goes_on_over_phases_and_kills(self, config):
        """A phase takes up where the one before stopped, a resumed run where it was killed; the
        rows are those of one phase as long as all of them."""
        kill(config, "_step", 4)
        rest = Run(config)
        alone = dataclasses.replace(config, run=f"{config.run}_alone")
        alone.phases = [dataclasses.replace(config.phases[1], steps=4)]
        expected = Run(alone).questions
        assert len({id for batch in expected for id in batch}) == 4 * PROMPTS
        assert rest.questions == expected[3:]
        shown = [rest.samples(step)[0]["id"] for step in (1, 2, 3, 4)]
        assert shown == [batch[0] for batch in expected]

    def test_is_not_how_a_run_of_another_order_goes_on(self, config):
        launch.require_writable(Path(config.run))
        launch.write_config(config, Path(config.run))
        config.data = dataclasses.replace(config.data, order="phase")
        with pytest.raises(ValueError, match=r"other settings \(data\)"):
            launch.train(config)

    def test_runs_of_earlier_versions_go_on(self, config, tmp_path):
        """Their config names no order."""
        config.data = dataclasses.replace(config.data, order="phase")
        launch.require_writable(Path(config.run))
        launch.write_config(config, Path(config.run))
        file = Path(config.run) / "config.yaml"
        file.write_text(file.read_text().replace("  order: phase\n", ""))
        assert "order" not in file.read_text()
        launch.check_same_config(config, Path(config.run))
