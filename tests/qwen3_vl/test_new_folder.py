"""An export is there whole or not at all, and what was there before is not lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2r_jax.qwen3_vl import load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.tensor_files import TensorWriter


def _disk_full(*_, **__):
    raise OSError("disk full")


def test_an_existing_folder_is_never_overwritten(pairs, tmp_path):
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_pretrained(pairs["compact"].model, tmp_path)


def test_a_failed_export_leaves_nothing_behind(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorWriter, "write", _disk_full)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(pairs["compact"].model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_replacing_leaves_the_old_export_until_the_new_one_is_whole(pairs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_pretrained(pairs["compact"].model, out, dtype="float32")
    before = (out / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", _disk_full)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(pairs["compact"].model, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    save_pretrained(pairs["compact"].model, out, overwrite=True)
    assert (out / "model.safetensors").stat().st_size < len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["between the renames", "before the second one"])
def test_a_kill_while_it_is_replaced_loses_nothing(pairs, tmp_path, monkeypatch, moment):
    model, out = pairs["compact"].model, tmp_path / "out"
    save_pretrained(model, out, dtype="float32")
    before = (out / "model.safetensors").read_bytes()
    replace, killed = os.replace, []

    def dying(source, target):
        if Path(target) == out and Path(source).name.endswith(".partial"):
            killed.append(target)
            raise KeyboardInterrupt
        if killed and moment == "between the renames":
            raise SystemExit  # Nothing runs any more.
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            save_pretrained(model, out, overwrite=True)
    assert killed
    # Whatever is left, a next call that fails too must not cost the old export.
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", _disk_full)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(model, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(pairs, tmp_path):
    big, link = tmp_path / "big", tmp_path / "out"
    save_pretrained(pairs["compact"].model, big, dtype="float32")
    link.symlink_to(big)
    size = (big / "model.safetensors").stat().st_size
    for _ in range(2):
        save_pretrained(pairs["compact"].model, link, overwrite=True)
    assert link.is_symlink()
    assert (big / "model.safetensors").stat().st_size < size
    assert {path.name for path in tmp_path.iterdir()} == {"big", "out"}


def test_a_file_in_its_place_is_not_replaced(pairs, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        save_pretrained(pairs["compact"].model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_what_cannot_be_carried_along_is_known_before_the_work(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorWriter, "write", None)
    with pytest.raises(FileNotFoundError, match="gone"):
        save_pretrained(pairs["compact"].model, tmp_path / "out", files_from=tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_cannot_be_written_is_named(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"written as int8: choose one of .*bfloat16"):
        save_pretrained(pairs["compact"].model, tmp_path / "out", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_in_nobodys_way(pairs, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    save_pretrained(pairs["compact"].model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_pretrained(tmp_path / "out")


def test_tokenizer_and_processor_files_come_along(pairs, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    carried = {"tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json"}
    left = {"config.json", "model.safetensors.index.json", "old.safetensors", "trainer.pt"}
    for name in carried | left:
        (source / name).write_text("theirs")
    save_pretrained(pairs["compact"].model, tmp_path / "out", files_from=source)
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert out == carried | {"config.json", "model.safetensors"}
    assert (tmp_path / "out" / "config.json").read_text() != "theirs"
