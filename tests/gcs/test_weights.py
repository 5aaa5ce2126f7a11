"""Paths and weights in Google Cloud Storage, against a server on this machine."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from p2r_jax import paths
from p2r_jax.data.sources import load_source
from p2r_jax.evals.report import write_report
from p2r_jax.evals.score import score_file
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.paths import BucketPath, as_path, files_in
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.hf import save_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.new_folder import new_folder
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.qwen3_vl.tensor_files import TensorFolder
from p2r_jax.rl.convert import from_hf, to_hf
from tests.gcs_server import start


class TestPaths:
    def test_a_local_path_is_a_plain_one(self):
        assert as_path("a/b") == Path("a/b")
        assert type(as_path("a/b")) is type(Path("a/b"))

    def test_it_stays_in_its_bucket_whatever_is_asked_of_it(self, folder):
        assert str(folder.absolute()) == str(folder.resolve()) == str(folder)
        assert str(folder / "x" / "y.json").startswith("gs://bucket/")
        assert isinstance(folder.with_name("z").parent, BucketPath)

    def test_a_file_grows_by_whole_flushes(self, folder):
        with (folder / "log.jsonl").open("a") as file:
            file.write('{"a": 1}\n')
        killed = (folder / "log.jsonl").open("a")
        killed.write('{"a": 2}\n')
        killed.flush()
        killed.write('{"a": 3}\n{"a"')
        assert (folder / "log.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
        assert files_in(folder) == {"log.jsonl": 18}

    def test_an_answer_that_is_lost_appends_nothing_twice(self, folder, server):
        file = folder / "log.jsonl"
        for text in ("a\n", "b\n"):
            server.lose_answer_of = "compose"
            with file.open("a") as opened:
                opened.write(text)
        assert server.lose_answer_of is None
        assert file.read_text() == "a\nb\n"

    def test_what_others_write_is_seen(self, folder, server):
        """Listings are not kept."""
        assert files_in(folder) == {}
        server.put("bucket", f"{folder.name}/deep/file", b"12345")
        assert files_in(folder) == {"deep/file": 5}
        assert [path.name for path in folder.iterdir()] == ["deep"]

    def test_of_a_large_file_only_the_range_is_read(self, folder, server, monkeypatch):
        monkeypatch.setattr(paths, "_PIECE", 1000)
        data = np.random.default_rng(0).bytes(20_000)
        (folder / "file").write_bytes(data)
        server.reads.clear()
        assert paths.read_range(folder / "file", 17, 12_345) == data[17:12_345]
        assert sum(size for _, size in server.reads) == 12_345 - 17
        assert len(server.reads) == 13


class TestErrors:
    """Each is one sentence that names the path and what to do."""

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"^gs://b/run .*pip install 'p2r_jax\[gcs\]'$"):
            as_path("gs://b/run")

    def test_without_credentials(self, server, caplog):
        for use in (as_path, load_pretrained, load_source, write_report, score_file):
            with pytest.raises(OSError, match="application-default login") as caught:
                use("gs://private/folder")
            message = str(caught.value)
            assert message.startswith("gs://private/folder cannot be reached")
            assert "Anonymous caller" in message
            assert "\n" not in message
        assert caplog.records == []

    def test_a_bucket_that_there_is_not(self, server):
        with pytest.raises(FileNotFoundError, match="gs://nowhere/x: there is no bucket nowhere"):
            as_path("gs://nowhere/x")

    @pytest.mark.parametrize("name", ["gs://", "gs:/bucket/x", "s3://bucket/x"])
    def test_another_scheme_or_no_bucket(self, name):
        with pytest.raises(ValueError, match="gs://BUCKET"):
            as_path(name)

    def test_a_folder_without_weights(self, folder):
        with pytest.raises(FileNotFoundError, match="neither a Hugging Face checkpoint folder"):
            locate_checkpoint(folder)


def assert_equal_weights(a: nnx.Module, b: nnx.Module) -> None:
    pairs = zip(*(jax.tree.leaves(nnx.state(model)) for model in (a, b)), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)


class TestWeights:
    def test_are_written_and_read_bit_for_bit(self, folder, tiny_checkpoint):
        model = load_pretrained(tiny_checkpoint, dtype="float32")
        save_pretrained(model, folder / "out", files_from=tiny_checkpoint, dtype="float32")
        local = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
        assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == local
        assert list(folder.iterdir()) == [folder / "out"]
        read = load_pretrained(str(folder / "out"), dtype="float32")
        assert_equal_weights(read, model)
        with pytest.raises(FileExistsError):
            save_pretrained(model, folder / "out")
        processor = Processor.from_pretrained(folder / "out")
        assert processor.stop_ids == Processor.from_pretrained(tiny_checkpoint).stop_ids

    def test_in_several_files_over_a_mesh_each_byte_is_read_once(
        self, folder, tiny_checkpoint, server
    ):
        model = load_pretrained(tiny_checkpoint, dtype="float32")
        save_pretrained(model, folder, dtype="float32", max_shard_bytes=4 * 2**20)
        files = {name: size for name, size in files_in(folder).items() if name.startswith("model-")}
        assert len(files) > 1
        server.reads.clear()
        read = load_pretrained(folder, make_mesh(data=2, fsdp=4, tensor=1), dtype="float32")
        assert_equal_weights(read, model)
        tensors = [size for name, size in server.reads if name.endswith(".safetensors")]
        header = 8 + 4000  # of each file, once when it is looked at and once when it is read
        assert sum(tensors) < sum(files.values()) + 4 * len(files) * header

    def test_a_process_reads_only_the_rows_that_its_devices_hold(
        self, folder, tiny_checkpoint, server
    ):
        (folder / "model.safetensors").write_bytes(
            (tiny_checkpoint / "model.safetensors").read_bytes()
        )
        remote, local = TensorFolder(folder), TensorFolder(tiny_checkpoint)
        name = "model.language_model.embed_tokens.weight"
        for part in [(), (slice(5, 9),), (slice(4, 9), slice(3, 7)), (slice(0, 2), slice(0, 1))]:
            server.reads.clear()
            value = remote.read(name, part)
            np.testing.assert_array_equal(value, local.read(name, part))
            (_, size) = server.reads[-1]
            assert size == len(value) * local.shapes[name][1] * 4

    @pytest.mark.parametrize("damage", ["cut", "header", "empty"])
    def test_a_damaged_file_is_named(self, folder, tiny_checkpoint, damage):
        raw = (tiny_checkpoint / "model.safetensors").read_bytes()
        broken = {"cut": raw[:-8], "header": raw[:8] + b"{]" + raw[10:], "empty": b""}[damage]
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"gs://.*model.safetensors is damaged"):
            TensorFolder(folder)

    def test_are_converted_from_and_to_a_bucket(self, folder, tiny_checkpoint, tmp_path, capsys):
        model = load_pretrained(tiny_checkpoint, dtype="float32")
        save_pretrained(model, folder / "hf", files_from=tiny_checkpoint, dtype="float32")
        from_hf(str(folder / "hf"), str(tmp_path / "arrays"), "float32")
        to_hf(str(tmp_path / "arrays"), str(folder / "again"), "float32")
        assert f"wrote {folder / 'again'}: 0.01 GB" in capsys.readouterr().out
        there = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
        assert {path.name: path.read_bytes() for path in (folder / "again").iterdir()} == there
        with pytest.raises(FileExistsError):
            to_hf(str(tmp_path / "arrays"), str(folder / "again"), "float32")

    def test_are_kept_as_arrays_in_a_bucket(self, folder, tiny_checkpoint):
        from_hf(tiny_checkpoint, folder / "arrays", "float32")
        model = load_pretrained(tiny_checkpoint, dtype="float32")
        assert_equal_weights(load_pretrained(folder / "arrays", dtype="float32"), model)
        to_hf(folder / "arrays", folder / "hf", "float32")
        weights = (tiny_checkpoint / "model.safetensors").read_bytes()
        assert (folder / "hf" / "model.safetensors").read_bytes() == weights


DYING_SAVE = """
import os, signal, sys
from p2r_jax import paths
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.hf import save_pretrained

model = load_pretrained(sys.argv[1], dtype="bfloat16")
copy, moved = paths.copy_file, []

def dying(source, target):
    if moved:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(source)
    copy(source, target)

paths.copy_file = dying
save_pretrained(model, sys.argv[2], overwrite=True)
"""


class TestASaveThatDies:
    def test_while_it_writes_nothing_is_seen(self, folder, tiny_checkpoint):
        def write():
            with new_folder(folder / "out", tiny_checkpoint) as new:
                (new / "model.safetensors").write_bytes(b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write()
        assert not folder.exists()

    def test_while_it_is_put_in_its_place_the_next_call_finishes_it(self, folder, tiny_checkpoint):
        """Killed between the files of an export that replaces another."""
        out, model = folder / "out", load_pretrained(tiny_checkpoint, dtype="float32")
        save_pretrained(model, out, dtype="float32")
        process = start("-c", DYING_SAVE, str(tiny_checkpoint), str(out))
        assert process.wait(120) == -signal.SIGKILL, process.stdout.read()
        assert out.exists()
        with pytest.raises(FileNotFoundError):  # Half of it is there; nobody takes it for whole.
            locate_checkpoint(out)
        with pytest.raises(FileExistsError):
            save_pretrained(model, out)
        assert list(folder.iterdir()) == [out]
        assert json.loads((out / "config.json").read_text())["text_config"]["dtype"] == "bfloat16"
        assert_equal_weights(load_pretrained(out), load_pretrained(tiny_checkpoint))
