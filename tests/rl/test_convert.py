"""`p2r convert`: weights in, trained weights out, and nothing lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from p2r_jax import cli
from p2r_jax import config as cfg
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl import arrays, load_pretrained
from p2r_jax.qwen3_vl.new_folder import CARRIED_FILES
from p2r_jax.qwen3_vl.tensor_files import TensorWriter
from p2r_jax.rl import convert as module
from p2r_jax.rl.checkpointing import Checkpoints
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.schedule import Progress
from p2r_jax.rl.step import new_state


def run(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def same_tensors(a: Path, b: Path) -> None:
    left, right = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name])


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    assert run("from-hf", tiny_checkpoint, out, "--dtype", "float32") == 0
    return out


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 3 and 5, whose weights are the model's times the
    step; the optimizer and the snapshot hold other numbers."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = {"model": {"path": str(tiny_checkpoint)}}
    checkpoints = Checkpoints(folder, cfg.CheckpointConfig(), settings, notify=lambda text: None)
    params = nnx.state(load_pretrained(tiny_checkpoint, dtype="float32"), nnx.Param)
    for step in (3, 5):
        scaled = jax.tree.map(lambda x, step=step: x * step, params)
        state = new_state(scaled, make_optimizer(cfg.OptimizerConfig(), 10))
        snapshot = jax.tree.map(lambda x: x - 1, params)
        checkpoints.save(Progress(0, step, step, 0), state, snapshot)
    checkpoints.close()
    return folder


class TestFromHuggingFace:
    def test_a_converted_folder_loads_as_the_original_does(self, converted, tiny_checkpoint):
        ours, theirs = (
            nnx.to_pure_dict(nnx.state(load_pretrained(path, dtype="float32")))
            for path in (converted, tiny_checkpoint)
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    def test_it_loads_onto_a_mesh_in_another_type(self, converted):
        model = load_pretrained(converted, make_mesh(fsdp=4, tensor=2), "bfloat16")
        kernel = model.language_model.layers.q_proj.kernel.get_value()
        assert kernel.dtype == "bfloat16"
        assert kernel.sharding.shard_shape(kernel.shape)[1] * 4 == kernel.shape[1]

    def test_tokenizer_and_config_come_along(self, converted, tiny_checkpoint):
        carried = {f.name for f in tiny_checkpoint.iterdir() if f.name in CARRIED_FILES}
        assert carried
        held = {f.name for f in converted.iterdir()}
        assert held == carried | {"config.json", "jax_weights"}

    def test_there_and_back_is_the_same_file(self, converted, tiny_checkpoint, tmp_path):
        assert run("to-hf", converted, tmp_path / "back", "--dtype", "float32") == 0
        same_tensors(tmp_path / "back", tiny_checkpoint)

    def test_weights_of_another_model_are_listed(self, converted, tmp_path):
        folder = shutil.copytree(converted, tmp_path / "other")
        raw = json.loads((folder / "config.json").read_text())
        raw["text_config"]["intermediate_size"] += 8
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=r"shape of language_model\.layers\.down_proj"):
            load_pretrained(folder)

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_a_damaged_folder_is_named(self, converted, tmp_path, capsys, damage):
        folder = shutil.copytree(converted, tmp_path / "damaged")
        files = [f for f in (folder / "jax_weights").rglob("*") if f.is_file() and "d" in f.parts]
        largest = max(files, key=lambda f: f.stat().st_size)
        if damage == "gone":
            largest.unlink()
        else:
            largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        name = largest.relative_to(folder / "jax_weights").parts[0]
        assert run("to-hf", folder, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert name in error
        assert "is damaged" in error or "can be read" in error
        assert not (tmp_path / "out").exists()

    def test_large_arrays_are_kept_in_parts(self, tmp_path, monkeypatch):
        """Whole ones would be read, and decompressed, by every host."""
        monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**16)
        value = jax.random.normal(jax.random.key(0), (8, 64, 256))
        arrays.save_array(tmp_path, "kernel", value)
        (described,) = (tmp_path / "kernel").rglob("array_metadatas/*")
        (found,) = json.loads(described.read_text())["array_metadatas"]
        assert np.prod(found["array_metadata"]["chunk_shape"]) * 4 <= 2**16
        like = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        np.testing.assert_array_equal(arrays.restore_array(tmp_path, "kernel", like), value)

    def test_converting_twice_says_what_to_do(self, converted, tmp_path, capsys):
        assert run("from-hf", converted, tmp_path / "again") == 2
        assert "was converted already" in capsys.readouterr().err


class TestToHuggingFace:
    def test_a_run_gives_its_newest_policy(self, trained, tiny_checkpoint, tmp_path, capsys):
        assert run("to-hf", trained, tmp_path / "out", "--dtype", "float32") == 0
        original = load_file(tiny_checkpoint / "model.safetensors")
        exported = load_file(tmp_path / "out" / "model.safetensors")
        assert exported.keys() == original.keys()
        for name, value in original.items():
            np.testing.assert_array_equal(exported[name], value * 5)
        said = capsys.readouterr().out
        assert "weights of step 5" in said
        assert "peak memory of this process" in said
        load_pretrained(tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").is_file()

    @pytest.mark.parametrize("how", ["--step", "folder"])
    def test_any_checkpoint_can_be_named(self, trained, tmp_path, how):
        source = [trained, "--step", 3] if how == "--step" else [trained / "checkpoints" / "3"]
        assert run("to-hf", source[0], tmp_path / "out", *source[1:]) == 0
        whole = run("to-hf", trained, tmp_path / "newest")
        assert whole == 0
        three, five = (
            load_file(tmp_path / n / "model.safetensors")["model.language_model.norm.weight"]
            for n in ("out", "newest")
        )
        np.testing.assert_allclose(
            three.astype(np.float32) * 5, five.astype(np.float32) * 3, rtol=0.02
        )

    def test_no_optimizer_state_is_read(self, trained, tmp_path, monkeypatch):
        read, names = module.restore_arrays, []

        def restore(folder, like, within=()):
            names.extend((*within, name) for name in like)
            assert len(like) == 1
            return read(folder, like, within)

        monkeypatch.setattr(module, "restore_arrays", restore)
        assert run("to-hf", trained, tmp_path / "out") == 0
        assert {group for group, _ in names} == {"params"}

    def test_a_step_belongs_to_a_run(self, trained, converted, tmp_path, capsys):
        assert run("to-hf", trained / "checkpoints" / "3", tmp_path / "out", "--step", 5) == 2
        assert "checkpoint of step 3, not of 5" in capsys.readouterr().err
        assert run("to-hf", converted, tmp_path / "out", "--step", 5) == 2
        assert "has no --step" in capsys.readouterr().err

    def test_a_step_that_is_not_there_is_named(self, trained, tmp_path, capsys):
        assert run("to-hf", trained, tmp_path / "out", "--step", 4) == 2
        assert "no checkpoint of step 4; there are [3, 5]" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_base_model_that_moved_can_be_given(self, trained, tiny_checkpoint, tmp_path, capsys):
        run_folder = shutil.copytree(trained, tmp_path / "run")
        for step in (3, 5):
            file = run_folder / "checkpoints" / str(step) / "meta" / "metadata"
            meta = json.loads(file.read_text())
            meta["settings"]["model"]["path"] = "/gone"
            file.write_text(json.dumps(meta))
        assert run("to-hf", run_folder, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "/gone, which is not there" in error
        assert "--files_from" in error
        assert run("to-hf", run_folder, tmp_path / "out", "--files_from", tiny_checkpoint) == 0

    def test_a_folder_that_is_neither_is_refused(self, tiny_checkpoint, tmp_path, capsys):
        assert run("to-hf", tiny_checkpoint, tmp_path / "out") == 2
        assert "is neither a run folder" in capsys.readouterr().err

    def test_a_full_disk_leaves_nothing_behind(self, trained, tmp_path, monkeypatch, capsys):
        def fail(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr(TensorWriter, "write", fail)
        assert run("to-hf", trained, tmp_path / "out") == 2
        assert "No space left" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_options_of_the_other_direction_are_refused(tiny_checkpoint, tmp_path, capsys):
    assert run("from-hf", tiny_checkpoint, tmp_path / "out", "--step", 3) == 2
    assert "for to-hf" in capsys.readouterr().err
