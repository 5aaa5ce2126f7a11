"""Checkpoints that make a killed run go on as if it had not been: orbax, asynchronous and atomic.

A checkpoint holds the weights, the phase-start snapshot, the optimizer, and where the run is. Data
order and randomness follow from (seed, phase, step), so nothing else is needed. It does not depend
on the mesh or on the number of processes: what is restored is laid out as the new run wants it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from flax import nnx

from p2r_jax.config import CheckpointConfig
from p2r_jax.parallel.multihost import any_process, is_main, on_main
from p2r_jax.paths import is_remote, move_folder, remove_folder
from p2r_jax.qwen3_vl.arrays import restore_arrays
from p2r_jax.rl.best import FILE, Best, StayingCheckpoints, ranked, scores_of
from p2r_jax.rl.schedule import Progress
from p2r_jax.rl.step import TrainState, with_state
from p2r_jax.rl.stop import RunStopped

PARAMS = "params"
"""The policy's weights in a checkpoint."""
OPTIMIZER = "opt_state"
"""The optimizer's state there."""
COMMIT = "commit_success.txt"
"""What orbax writes last of a checkpoint in a bucket; on a disk it renames the folder."""


class Checkpoints:
    """Saves and restores (Progress, TrainState, snapshot) under RUN/checkpoints."""

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        settings: dict[str, Any] | None = None,
        notify: Callable[[str], None] = print,
        data: dict[str, Any] | None = None,
        best: Best | None = None,
    ):
        """settings: of the run, written into each checkpoint. notify: told what a person should
        know of damaged checkpoints. data: JSON values that describe the data; a checkpoint that
        has others is refused. best: what the run knows of its evaluations; it is saved, restored,
        and asked which checkpoints stay beside the newest."""
        self.every, self.notify, self.settings = config.every, notify, settings or {}
        self.data, self.best = data or {}, best
        self.folder = (run / "checkpoints").absolute()
        self.saved: int | None = None
        """Step of the newest checkpoint."""
        on_main(self._remove_unfinished)
        policies = ocp.checkpoint_managers
        stay = [policies.LatestN(config.keep), *([StayingCheckpoints(best)] if best else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(stay),
            enable_async_checkpointing=True,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def _remove_unfinished(self) -> None:
        # Orbax would do this in the background, perhaps until the same step is saved again.
        there = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for unfinished in filter(_is_unfinished, there):
            step = unfinished.name.split(".")[0]
            self.notify(f"the checkpoint of step {step} was not finished; it is removed")
            remove_folder(unfinished)

    def due(self, step: int) -> bool:
        """Whether it is time to save after `step` steps."""
        return step % self.every == 0

    def save(
        self,
        progress: Progress,
        state: TrainState,
        snapshot: nnx.State,
        pending: dict[str, float] | None = None,
    ) -> None:
        """Start saving; returns before the bytes are on disk. Raises RunStopped, see `check`.

        pending: metrics of the step that are not logged yet.
        """
        tree = _tree(state, snapshot)
        meta = {
            "progress": dataclasses.asdict(progress),
            "pending": pending,
            "best": None if self.best is None else self.best.to_json(),
            "data": self.data,
            "contents": _fingerprint(tree),
            "settings": self.settings,
            "environment": environment(),
        }
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), state=ocp.args.StandardSave(tree))
        self._guarded(lambda: self.manager.save(progress.step, args=args))
        self.saved = progress.step

    def check(self) -> None:
        """Raise RunStopped if a checkpoint that was being written failed."""
        self._guarded(self.manager.check_for_errors)

    def wait(self) -> None:
        """Until everything is on disk. Raises RunStopped, see `check`."""
        self._guarded(self.manager.wait_until_finished)

    def close(self) -> None:
        """Wait, and stop."""
        self.wait()
        self.manager.close()

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except jax.errors.JaxRuntimeError:
            raise  # Another process, not the disk.
        except Exception as error:
            whole = self.manager.all_steps()
            last = f"the last whole one is of step {max(whole)}" if whole else "there is none yet"
            raise RunStopped(
                f"a checkpoint could not be written to {self.folder} ({last}): make room there, "
                f"then give the same command again. {_first_line(error)}"
            ) from error

    def restore(
        self, like: TrainState, snapshot: Any
    ) -> tuple[Progress, TrainState, Any, dict[str, float] | None] | None:
        """What `save` was given, of the newest checkpoint that can be read; None if there is none.

        like, snapshot: `jax.ShapeDtypeStruct`s with the shardings wanted. A damaged checkpoint is
        moved to RUN/torn_checkpoints, with a message. Raises ValueError for a checkpoint of another
        model or optimizer, and if none of them can be read.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            found, problem = None, None
            try:
                found = self._read_insisting(step, like, snapshot)
            except _OtherData as error:
                raise ValueError(
                    f"{self.folder} is of a run on other data ({error}): give it the data that it "
                    "was started with, or choose another `run` folder"
                ) from error
            except _OtherContents as error:
                raise ValueError(
                    f"{self.folder} does not fit this run's model or optimizer: use another `run` "
                    "folder or the settings in its config.yaml"
                ) from error
            except jax.errors.JaxRuntimeError:
                raise
            except Exception as error:
                problem = _first_line(error)
            if not any_process(found is None):
                self.saved = step
                return found
            self._set_aside(step, problem or "another process could not read it")
        if steps:
            raise ValueError(
                f"none of the checkpoints of this run can be read; they are now in "
                f"{self.folder.parent / 'torn_checkpoints'}. Delete {self.folder.parent} to start "
                "again"
            )
        return None

    def _read_insisting(self, step: int, like: TrainState, snapshot: Any) -> Any:
        """A disk that fails now and then must not cost a whole checkpoint; nor a bucket, whose
        libraries say so in other ways."""
        remote = is_remote(self.folder)
        final = (FileNotFoundError, _OtherContents, _OtherData, jax.errors.JaxRuntimeError)
        for wait in (1.0, 4.0):
            try:
                return self._read(step, like, snapshot)
            except Exception as error:
                if isinstance(error, final) or not (remote or isinstance(error, OSError)):
                    raise
                self.notify(f"reading the checkpoint of step {step} failed, again: {error}")
                time.sleep(wait)
        return self._read(step, like, snapshot)

    def _read(
        self, step: int, like: TrainState, snapshot: Any
    ) -> tuple[Progress, TrainState, Any, dict[str, float] | None]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self.manager.restore(step, args=args).meta
        tree = _tree(like, snapshot)
        if meta["contents"] != _fingerprint(tree):
            raise _OtherContents
        other = [name for name, value in self.data.items() if meta["data"].get(name) != value]
        if other:
            raise _OtherData(f"other {', '.join(other)}")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(tree))
        read = self.manager.restore(step, args=args).state
        now, before = environment(), meta["environment"]
        changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if now[k] != before.get(k)]
        if changed:
            self.notify(f"the checkpoint was written with another environment: {changed}")
        state = TrainState(
            _refill(like.params, read[PARAMS], _named),
            _refill(like.opt_state, read[OPTIMIZER], _numbered),
            read["skipped"],
        )
        frozen = _refill(snapshot, read["snapshot"], _named)
        progress = Progress(**meta["progress"])
        if self.best is not None:
            self.best.load(meta.get("best"), progress.step)
        return progress, state, frozen, meta["pending"]

    def steps(self) -> list[int]:
        """That there are checkpoints of, one that is being written included."""
        return sorted(self.manager.all_steps())

    def weights(self, step: int, like: TrainState, optimizer: bool) -> TrainState | None:
        """Of the checkpoint of a step, which is written; None, with a message, if it is damaged.

        like: as of `restore`. optimizer: whether its state is read too; else it is ().
        """
        found = problem = None
        for wait in (1.0, 4.0, None):  # As in `_read_insisting`.
            try:
                found = self._read_weights(step, like, optimizer)
                break
            except (OSError, ValueError) as error:
                problem = _first_line(error)
                if wait is not None:
                    time.sleep(wait)
        if not any_process(found is None):
            return found
        problem = problem or "another process could not read it"
        self.notify(f"the checkpoint of step {step} cannot be read: {problem}")
        return None

    def _read_weights(self, step: int, like: TrainState, optimizer: bool) -> TrainState:
        folder = self.folder / str(step) / "state"
        read = restore_arrays(folder, _named(like.params), (PARAMS,))
        params, opt_state = _refill(like.params, read, _named), ()
        if optimizer:
            read = restore_arrays(folder, _numbered(like.opt_state), (OPTIMIZER,))
            opt_state = _refill(like.opt_state, read, _numbered)
        return with_state(params, opt_state)

    def _set_aside(self, step: int, problem: str) -> None:
        self.notify(f"the checkpoint of step {step} cannot be read and is skipped: {problem}")
        if is_main():
            aside = self.folder.parent / "torn_checkpoints"
            aside.mkdir(exist_ok=True)
            remove_folder(aside / str(step), ignore_errors=True)
            move_folder(self.folder / str(step), aside / str(step), COMMIT)
        any_process(False)  # Nobody goes on before it is gone.
        self.manager.reload()


class _OtherContents(Exception):
    """Shapes or types of another model or optimizer."""


class _OtherData(Exception):
    """What differs."""


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """The policy of one checkpoint, for whoever reads nothing else of it."""

    step: int
    folder: Path
    """With the arrays, of which PARAMS are the weights; see `qwen3_vl.arrays`."""
    model: str
    """The checkpoint that the run started from, as its settings name it."""
    meta: dict[str, Any]
    """What `Checkpoints.save` wrote beside the arrays."""
    record: dict[str, Any] | None
    """What the run knows of its evaluations, see `Best.to_json`."""

    @classmethod
    def find(
        cls, path: Path, step: int | Literal["best", "last"] | None = None
    ) -> SavedWeights | None:
        """Of a run folder (its newest checkpoint, that of `step`, or its best one) or a
        checkpoint's own folder; None for any other folder. Raises ValueError for a step that there
        is not."""
        step = None if step == "last" else step
        path = path.resolve()
        folder = path if path.name == "checkpoints" else path / "checkpoints"
        if (path / "meta").is_dir() and path.name.isdigit():
            if step not in (None, int(path.name)):
                raise ValueError(f"{path} is the checkpoint of step {path.name}, not of {step}")
            found = path
        elif folder.is_dir():
            steps = _steps(folder)
            if step == "best":
                step = _best_step(folder, steps)
            if step not in [None, *steps] or not steps:
                wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
                raise ValueError(f"{folder} holds {wanted}; {_there_are(folder, steps)}")
            found = folder / str(steps[-1] if step is None else step)
        else:
            return None
        try:
            meta = json.loads((found / "meta" / "metadata").read_text())
            model = meta["settings"]["model"]["path"]
            record = _record(found.parent, _steps(found.parent))
            return cls(int(found.name), found / "state", model, meta, record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{found} is not a whole checkpoint of a run: {error!r}; there are "
                f"{_steps(found.parent)}"
            ) from error


def _is_unfinished(path: Path) -> bool:
    if is_remote(path):
        return path.name.isdigit() and not (path / COMMIT).is_file()
    return ".orbax-checkpoint-tmp" in path.name


def _steps(folder: Path) -> list[int]:
    found = (p for p in folder.iterdir() if p.name.isdigit() and not _is_unfinished(p))
    return sorted(int(p.name) for p in found)


def _record(folder: Path, steps: list[int]) -> dict[str, Any] | None:
    """What a run knows of its evaluations. The newest checkpoint lacks the one that came after."""
    file = folder.parent / FILE
    if file.is_file():
        return json.loads(file.read_text())
    if not steps:
        return None
    return json.loads((folder / str(steps[-1]) / "meta" / "metadata").read_text()).get("best")


def _ranked(folder: Path, steps: list[int]) -> list[int]:
    """Steps whose weights were evaluated and can be had, the best first."""
    try:
        record = _record(folder, steps)
        scores = [] if record is None else ranked(scores_of(record))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # Who asks for another step needs no evaluations.
    return [score.step for score in scores if score.step in [0, *steps]]


def _best_step(folder: Path, steps: list[int]) -> int:
    best = _ranked(folder, steps)
    if not best:
        raise ValueError(
            f"nothing in {folder.parent} tells which of its checkpoints is best: name one with "
            f"--step; there are {steps or 'none'}"
        )
    if best[0] == 0:
        raise ValueError(
            f"no step of {folder.parent} is better than the weights that it started from: take "
            f"those, or name one with --step; {_there_are(folder, steps)}"
        )
    return best[0]


def _there_are(folder: Path, steps: list[int]) -> str:
    best = [step for step in _ranked(folder, steps) if step]
    return f"there are {steps or 'none'}" + (f", of which {best[0]} is best" if best else "")


def environment() -> dict[str, str]:
    """Versions that a run's numbers may depend on, and what it runs on."""
    packages = ("p2r_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {
        "python": platform.python_version(),
        "devices": jax.devices()[0].device_kind,
    }


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays, without the arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return text.splitlines()[0][:300]


def _fingerprint(tree: dict[str, Any]) -> int:
    """Of the shapes and types of all leaves."""
    leaves = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]
    return zlib.crc32(repr(leaves).encode())


# Orbax needs to know nothing of our containers: weights are leaves by name ("lm_head"), as in
# `qwen3_vl.names`, and the optimizer's are numbered.


def _named(params: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _numbered(tree: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _refill(like: Any, leaves: dict[str, Any], names: Callable[[Any], dict[str, Any]]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names(like)])


def _tree(state: TrainState, snapshot: Any) -> dict[str, Any]:
    return {
        PARAMS: _named(state.params),
        OPTIMIZER: _numbered(state.opt_state),
        "skipped": state.skipped,
        "snapshot": _named(snapshot),
    }
