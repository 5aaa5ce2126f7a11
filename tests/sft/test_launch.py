"""`p2r sft` from nothing to a checkpoint folder, with a few steps of each stage."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.sft import dense, launch
from p2r_jax.sft.dense import render_windows
from p2r_jax.sft.warm_start import WarmStartConfig


@pytest.fixture
def _small(quick_compilation, monkeypatch):
    """Two devices and sixteen scenes."""
    two = jax.devices()[:2]
    monkeypatch.setattr(launch, "make_mesh", lambda data, fsdp: make_mesh(2, 1, 1, two))
    monkeypatch.setattr(launch, "WarmStartConfig", functools.partial(WarmStartConfig, scenes=16))


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_both_stages_leave_a_checkpoint_that_says_how_it_was_made(tmp_path):
    out = tmp_path / "tiny"
    launch.make_warm_start(out, seed=3, dense_steps=2, steps=10)
    made = json.loads((out / "made_by.json").read_text())
    assert made["command"] == "p2r sft --out DIR --seed 3 --dense_steps 2 --steps 10"
    assert made["dense"]["settings"]["steps"] == 2
    assert made["joint"]["last_metrics"].keys() >= {"perceiver/loss", "reasoner/loss"}

    # The tower came from the first stage (exported in bfloat16), and the second left it alone.
    model, tower = (load_pretrained(f, dtype="float32") for f in (out, tmp_path / "tiny.tower"))
    rounded = jax.tree.map(
        lambda x: x.astype("bfloat16").astype("float32"), nnx.state(tower.visual)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model.visual), rounded)
    assert len(Processor.from_pretrained(out).tokenizer) <= model.config.text.vocab_size

    again = tmp_path / "again"
    launch.make_warm_start(again, seed=3, steps=10, tower=str(tmp_path / "tiny.tower"))
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert "--tower" in json.loads((again / "made_by.json").read_text())["command"]


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_a_tower_is_trained_further_on_windows_it_has_not_seen(tmp_path, monkeypatch):
    """Those after the 4,500 steps of the shipped one, as far away as they were at its end."""
    rendered = []

    def watching(source, first, count, sizes, rng, closest):
        rendered.append((first, count, closest))
        return render_windows(source, first, count, sizes, rng, closest)

    monkeypatch.setattr(dense, "render_windows", watching)
    launch.make_warm_start(
        tmp_path / "more", tower="tiny", dense_steps=1, steps=10, taught_glyphs="HP"
    )
    assert rendered[0] == (4500 * 16, 64, dense.CLOSEST_AT_END)
    made = json.loads((tmp_path / "more/made_by.json").read_text())
    steps = [(stage["settings"]["before"], stage["settings"]["steps"]) for stage in made["dense"]]
    assert steps == [(0, 4500), (4500, 1)]
    assert made["joint"]["settings"]["taught_glyphs"] == "HP"
    assert made["command"].endswith("--dense_steps 1 --steps 10 --tower tiny --taught_glyphs HP")
    paths = (locate_checkpoint("tiny"), tmp_path / "more.tower")
    towers = [nnx.state(load_pretrained(f, dtype="float32").visual) for f in paths]
    moved = [float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, towers), strict=True)]
    assert 0 < max(moved) < 0.1  # It goes on from that tower, and does go on.


def test_characters_that_there_are_not_are_refused_before_any_training(tmp_path):
    with pytest.raises(ValueError, match=r"--taught_glyphs: there is no \?, Z in .* HPUX2456"):
        launch.make_warm_start(tmp_path / "tiny", taught_glyphs="HZ?")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    """The checkpoint's, and that of an earlier tower."""
    with pytest.raises(FileExistsError, match="choose another --out"):
        launch.make_warm_start(tmp_path)
    (tmp_path / "tiny.tower").mkdir()
    with pytest.raises(FileExistsError, match=r"tiny\.tower exists"):
        launch.make_warm_start(tmp_path / "tiny")


def test_devices_that_cannot_share_a_batch_are_refused_before_any_training(tmp_path):
    with pytest.raises(ValueError, match="8 devices cannot share a batch of 6"):
        launch.make_warm_start(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
