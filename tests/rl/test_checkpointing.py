"""Checkpoints: what they hold, and what becomes of a run whose newest one is torn."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from p2r_jax.config import CheckpointConfig, OptimizerConfig, PhaseConfig, TrainConfig
from p2r_jax.rl import checkpointing
from p2r_jax.rl.best import Best
from p2r_jax.rl.checkpointing import Checkpoints, abstract, environment
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.schedule import Progress, plan_phases
from p2r_jax.rl.step import TrainState, new_state
from p2r_jax.rl.stop import RunStopped

# Orbax leaves half-done reads of a torn checkpoint to the garbage collector, which complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SHAPES = {"kernel": (64, 200), "bias": (200,)}
SETTINGS = {"seed": 3, "loss": {"kl_weight": 0.01}}


def make_state(step: int = 0, shapes=SHAPES, **optimizer) -> tuple[TrainState, dict]:
    """State and snapshot that differ from those of any other step."""
    rng = np.random.default_rng(step)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    state = new_state(params, make_optimizer(OptimizerConfig(**optimizer), 10))
    state = dataclasses.replace(
        state,
        skipped=jnp.int32(step),
        opt_state=jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state.opt_state),
    )
    return state, jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), params)


LIKE = tuple(map(abstract, make_state()))


def open_checkpoints(run: Path, said=None, settings=SETTINGS, **config) -> Checkpoints:
    notify = (lambda text: None) if said is None else said.append
    return Checkpoints(run, CheckpointConfig(**config), settings, notify)


def save(run: Path, *steps: int, **config) -> Path:
    """Checkpoints of these steps in a run folder; returns where they are."""
    checkpoints = open_checkpoints(run, **config)
    for step in steps:
        checkpoints.save(Progress(1, step - 1, step, step + 5), *make_state(step))
    checkpoints.close()
    return run / "checkpoints"


def assert_is(found, step: int) -> None:
    progress, *trees, pending = found
    assert progress == Progress(1, step - 1, step, step + 5)
    assert pending is None
    jax.tree.map(np.testing.assert_array_equal, tuple(trees), make_state(step))
    assert jax.tree.map(lambda x: x.dtype, tuple(trees)) == jax.tree.map(lambda x: x.dtype, LIKE)


def restore(run: Path, said=None):
    return open_checkpoints(run, said).restore(*LIKE)


def data_files(folder: Path) -> list[Path]:
    """Of the arrays, the largest first."""
    files = [f for f in (folder / "state").rglob("*") if f.is_file() and f.parent.name == "d"]
    return sorted(files, key=lambda f: f.stat().st_size, reverse=True)


class TestWhatTheyHold:
    def test_everything_comes_back(self, tmp_path):
        save(tmp_path, 2)
        said: list[str] = []
        assert_is(restore(tmp_path, said), 2)
        assert said == []

    def test_metrics_that_are_not_logged_yet_wait_in_it(self, tmp_path):
        """Saved during the evaluation of a step, whose row is written after it."""
        pending = {"reward/mean": 0.1, "time/step": 1 / 3, "batches": 2}
        checkpoints = open_checkpoints(tmp_path)
        checkpoints.save(Progress(step=2), *make_state(2), pending)
        checkpoints.close()
        assert restore(tmp_path)[3] == pending

    def test_a_new_run_has_none(self, tmp_path):
        checkpoints = open_checkpoints(tmp_path)
        assert checkpoints.restore(*LIKE) is None
        assert checkpoints.saved is None

    def test_the_newest_counts_and_the_oldest_go(self, tmp_path):
        folder = save(tmp_path, 1, 2, 3, keep=2)
        assert sorted(f.name for f in folder.iterdir()) == ["2", "3"]
        checkpoints = open_checkpoints(tmp_path)
        assert_is(checkpoints.restore(*LIKE), 3)
        assert checkpoints.saved == 3

    def test_one_of_a_version_that_knew_of_no_best_is_read(self, tmp_path):
        folder = save(tmp_path, 2)
        (file,) = [f for f in (folder / "2" / "meta").rglob("*") if f.is_file() and _is_ours(f)]
        meta = json.loads(file.read_text())
        del meta["best"]
        file.write_text(json.dumps(meta))
        config = TrainConfig(phases=[PhaseConfig(steps=1), PhaseConfig(steps=5)])
        best = Best(config, plan_phases(config, 64))
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(), SETTINGS, print, None, best)
        assert_is(checkpoints.restore(*LIKE), 2)
        assert (best.scores, best.ends, best.starts) == ({}, {1}, {0: 0, 1: 1})

    def test_settings_and_environment_are_written_beside_the_arrays(self, tmp_path):
        save(tmp_path, 2)
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = open_checkpoints(tmp_path).manager.restore(2, args=args).meta
        assert meta["settings"] == SETTINGS
        assert meta["environment"] == environment()
        assert meta["environment"]["jax"] == jax.__version__
        assert {"python", "devices", "numpy", "orbax-checkpoint"} <= meta["environment"].keys()

    def test_another_environment_is_told_and_restored(self, tmp_path, monkeypatch):
        save(tmp_path, 2)
        other = environment() | {"jax": "0.0.1", "devices": "abacus"}
        monkeypatch.setattr(checkpointing, "environment", lambda: other)
        said: list[str] = []
        assert_is(restore(tmp_path, said), 2)
        (message,) = said
        assert "another environment" in message
        assert f"jax {jax.__version__} -> 0.0.1" in message
        assert "-> abacus" in message
        assert "numpy" not in message

    def test_it_is_laid_out_as_the_new_run_wants_it(self, tmp_path):
        """On another mesh than it was written from."""
        save(tmp_path, 2)
        mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
        split = jax.NamedSharding(mesh, jax.P("fsdp"))
        whole = jax.NamedSharding(mesh, jax.P())
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=split if x.shape[:1] == (64,) else whole
            ),
            LIKE,
        )
        found = open_checkpoints(tmp_path).restore(*like)
        assert_is(found, 2)
        wanted = jax.tree.map(lambda x: x.sharding, like)
        assert jax.tree.map(lambda x: x.sharding, found[1:3]) == wanted


def truncate(folder: Path) -> None:
    file = data_files(folder)[0]
    os.truncate(file, file.stat().st_size // 2)


def delete_data(folder: Path) -> None:
    for file in data_files(folder):
        file.unlink()


def delete_item(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def overwrite_data(folder: Path) -> None:
    """As long as before: a disk that lost what it had promised to write."""
    file = data_files(folder)[0]
    file.write_bytes(bytes(file.stat().st_size))


def garbage_in_meta(folder: Path) -> None:
    (file,) = [f for f in (folder / "meta").rglob("*") if f.is_file() and _is_ours(f)]
    file.write_text('{"progress": {"phase": 1, "ph')


def meta_of_another_version(folder: Path) -> None:
    (file,) = [f for f in (folder / "meta").rglob("*") if f.is_file() and _is_ours(f)]
    file.write_text(json.dumps({"progress": {"phase": 1}}))


def _is_ours(file: Path) -> bool:
    return "settings" in file.read_text()


TORN = [
    truncate,
    delete_data,
    delete_item,
    overwrite_data,
    garbage_in_meta,
    meta_of_another_version,
]


class TestTornCheckpoints:
    @pytest.mark.parametrize("tear", TORN, ids=lambda f: f.__name__)
    def test_the_one_before_is_taken_and_the_torn_one_put_aside(self, tmp_path, tear):
        folder = save(tmp_path, 2, 4)
        tear(folder / "4")
        said: list[str] = []
        checkpoints = open_checkpoints(tmp_path, said)
        assert_is(checkpoints.restore(*LIKE), 2)
        (message,) = said
        assert message.startswith("the checkpoint of step 4 cannot be read and is skipped: ")
        assert len(message) > len("the checkpoint of step 4 cannot be read and is skipped: ")
        assert "\n" not in message
        assert checkpoints.saved == 2
        assert sorted(f.name for f in folder.iterdir()) == ["2"]
        assert (tmp_path / "torn_checkpoints" / "4").is_dir()
        # The run comes to step 4 once more.
        checkpoints.save(Progress(1, 3, 4, 9), *make_state(4))
        checkpoints.close()
        assert_is(restore(tmp_path), 4)

    def test_a_second_torn_one_of_the_same_step_replaces_the_first(self, tmp_path):
        folder = save(tmp_path, 2, 4)
        for _ in range(2):
            delete_data(folder / "4")
            checkpoints = open_checkpoints(tmp_path)
            assert_is(checkpoints.restore(*LIKE), 2)
            checkpoints.save(Progress(1, 3, 4, 9), *make_state(4))
            checkpoints.close()
        assert [f.name for f in (tmp_path / "torn_checkpoints").iterdir()] == ["4"]

    def test_a_run_without_any_whole_one_is_refused(self, tmp_path):
        """It is not started again from scratch over what is there."""
        folder = save(tmp_path, 2, 4)
        for step in ("2", "4"):
            delete_data(folder / step)
        said: list[str] = []
        with pytest.raises(ValueError, match=r"none of the checkpoints.*can be read") as error:
            restore(tmp_path, said)
        assert str(tmp_path / "torn_checkpoints") in str(error.value)
        assert len(said) == 2
        assert {f.name for f in (tmp_path / "torn_checkpoints").iterdir()} == {"2", "4"}

    def test_one_that_another_process_cannot_read_is_put_aside_too(self, tmp_path, monkeypatch):
        folder = save(tmp_path, 2, 4)
        answers = iter([True, False, False])
        monkeypatch.setattr(checkpointing, "any_process", lambda flag: flag or next(answers))
        said: list[str] = []
        assert_is(restore(tmp_path, said), 2)
        assert said == [
            "the checkpoint of step 4 cannot be read and is skipped: another process could not "
            "read it"
        ]
        assert not (folder / "4").exists()

    def test_a_disk_that_fails_once_costs_nothing(self, tmp_path, monkeypatch):
        folder, said, calls = save(tmp_path, 1, 2), [], []
        monkeypatch.setattr(checkpointing.time, "sleep", lambda seconds: None)
        read = Checkpoints._read

        def fails_once(self, step, *like):
            calls.append(step)
            if len(calls) == 1:
                raise OSError(errno.EIO, "Input/output error")
            return read(self, step, *like)

        monkeypatch.setattr(Checkpoints, "_read", fails_once)
        assert_is(restore(tmp_path, said), 2)
        assert calls == [2, 2]
        assert any("failed, again" in text for text in said)
        assert not (folder.parent / "torn_checkpoints").exists()

    def test_one_of_other_data_is_refused_by_name(self, tmp_path):
        rows = {"rows of data.train": 24, "ids of some rows": 7}
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(), SETTINGS, print, rows)
        checkpoints.save(Progress(0, 1, 1, 1), *make_state(1))
        checkpoints.close()
        changed = Checkpoints(
            tmp_path, CheckpointConfig(), SETTINGS, print, rows | {"rows of data.train": 12}
        )
        with pytest.raises(ValueError, match=r"other rows of data\.train"):
            changed.restore(*LIKE)
        assert (tmp_path / "checkpoints" / "1").is_dir()

    def test_one_that_was_not_finished_is_no_checkpoint(self, tmp_path):
        """Killed while it was being written: what orbax then leaves has a name of its own."""
        folder = save(tmp_path, 2, 4)
        name = f"4{checkpointing.ocp.utils.TMP_DIR_SUFFIX}"
        (folder / "4").rename(folder / name)
        said: list[str] = []
        assert_is(restore(tmp_path, said), 2)
        assert said == ["the checkpoint of step 4 was not finished; it is removed"]
        assert [f.name for f in folder.iterdir()] == ["2"]


class TestOtherContents:
    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"shapes": {"kernel": (64, 100), "bias": (100,)}}, id="another model"),
            pytest.param({"name": "adafactor"}, id="another optimizer"),
            pytest.param({"moment_dtype": "bfloat16"}, id="another type of moment"),
        ],
    )
    def test_are_refused_and_left_alone(self, tmp_path, changes):
        folder = save(tmp_path, 2)
        said: list[str] = []
        like = tuple(map(abstract, make_state(**changes)))
        with pytest.raises(ValueError, match="does not fit this run's model or optimizer") as error:
            open_checkpoints(tmp_path, said).restore(*like)
        assert str(folder) in str(error.value)
        assert said == []
        assert_is(restore(tmp_path), 2)


class TestADiskThatIsFull:
    FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(self, *args, **kwargs):
        raise self.FULL

    @pytest.mark.parametrize(
        "method, call",
        [
            pytest.param("save", lambda c: c.save(Progress(step=4), *make_state(4)), id="at once"),
            pytest.param("check_for_errors", Checkpoints.check, id="in the background"),
            pytest.param("wait_until_finished", Checkpoints.wait, id="at the end"),
        ],
    )
    def test_stops_the_run_and_names_folder_and_last_whole_step(
        self, tmp_path, monkeypatch, method, call
    ):
        folder = save(tmp_path, 2)
        checkpoints = open_checkpoints(tmp_path)
        monkeypatch.setattr(checkpoints.manager, method, self.failing)
        with pytest.raises(RunStopped) as error:
            call(checkpoints)
        message = str(error.value)
        assert str(folder) in message
        assert "the last whole one is of step 2" in message
        assert "No space left on device" in message
        assert error.value.__cause__ is self.FULL
        assert checkpoints.saved is None

    def test_says_so_if_there_is_no_whole_one(self, tmp_path, monkeypatch):
        checkpoints = open_checkpoints(tmp_path)
        monkeypatch.setattr(checkpoints.manager, "save", self.failing)
        with pytest.raises(RunStopped, match="there is none yet"):
            checkpoints.save(Progress(step=1), *make_state(1))

    def test_a_write_that_fails_in_the_background_is_noticed(self, tmp_path, monkeypatch):
        """For real: the folder that the second checkpoint goes to cannot be written."""
        checkpoints = open_checkpoints(tmp_path)
        checkpoints.save(Progress(1, 1, 2, 7), *make_state(2))
        checkpoints.wait()

        original = os.rename

        def rename(source, target, *args, **kwargs):
            if str(target).endswith("checkpoints/4"):
                raise self.FULL
            return original(source, target, *args, **kwargs)

        monkeypatch.setattr(os, "rename", rename)
        checkpoints.save(Progress(1, 3, 4, 9), *make_state(4))
        with pytest.raises(RunStopped, match=r"the last whole one is of step 2.*No space left"):
            checkpoints.wait()
        monkeypatch.undo()
        said: list[str] = []
        assert_is(restore(tmp_path, said), 2)
        assert said == ["the checkpoint of step 4 was not finished; it is removed"]

    def test_another_process_that_is_gone_is_no_full_disk(self, tmp_path, monkeypatch):
        checkpoints = open_checkpoints(tmp_path)

        def gone():
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed")

        monkeypatch.setattr(checkpoints.manager, "check_for_errors", gone)
        with pytest.raises(jax.errors.JaxRuntimeError, match="connection closed"):
            checkpoints.check()


@pytest.mark.parametrize("step, due", [(29, False), (30, True), (31, False), (60, True)])
def test_they_are_due_every_so_many_steps(tmp_path, step, due):
    assert open_checkpoints(tmp_path, every=30).due(step) is due
