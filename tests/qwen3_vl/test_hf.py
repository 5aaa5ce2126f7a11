"""Checkpoints travel between Hugging Face and the port without losing a bit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from p2r_jax.parallel.mesh import make_mesh, parameter_shardings
from p2r_jax.qwen3_vl import Qwen3VLConfig, forward_hf, hf, load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.names import TABLE, canonical_name, flat_state, parameters
from p2r_jax.qwen3_vl.tensor_files import TensorFolder, TensorWriter
from tests.qwen3_vl.reference import relative_l2, scenario, to_hf, torch_logits

PUBLISHED = {
    # size: tensors, parameters, parameters of the vision tower
    "2B": (625, 2_127_532_032, 406_957_056),
    "4B": (713, 4_437_815_808, 415_347_712),
    "8B": (750, 8_767_123_696, 576_388_336),
    "32B": (1058, 33_357_390_064, 595_266_800),
}


def published_config(size: str) -> dict:
    return json.loads((Path(__file__).parent / "configs" / f"config_{size}.json").read_text())


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def tensors_of(model) -> dict[str, np.ndarray]:
    return to_hf(model, nnx.state(model, nnx.Param))


def torch_parameters(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


class TestPublishedModels:
    @pytest.mark.parametrize("size", PUBLISHED)
    def test_names_and_shapes_without_allocating_anything(self, size):
        """Against the modules that transformers would build, and the published totals."""
        raw = published_config(size)
        with torch.device("meta"):
            reference = transformers.Qwen3VLForConditionalGeneration(
                transformers.Qwen3VLConfig(**raw)
            )
        expected = {n: tuple(p.shape) for n, p in torch_parameters(reference).items()}

        config = Qwen3VLConfig.from_hf(raw)
        flat = flat_state(nnx.state(hf.abstract_model(config)))
        table = parameters(config, {name: x.shape for name, x in flat.items()})
        actual = {name: p.hf_shape for p in table for name in p.names}
        assert actual == expected

        visual = [s for name, s in actual.items() if name.startswith("model.visual.")]
        totals = len(actual), *(sum(map(math.prod, x)) for x in (actual.values(), visual))
        assert totals == PUBLISHED[size]
        assert {p.path for p in table} == set(flat)

    @pytest.mark.parametrize("size", ["2B", "8B"])
    def test_eight_devices_hold_an_eighth_each(self, size):
        """On fsdp 4 x tensor 2 only norms, biases and the like are held more than once."""
        abstract = nnx.state(hf.abstract_model(Qwen3VLConfig.from_hf(published_config(size))))
        shardings = parameter_shardings(abstract, make_mesh(fsdp=4, tensor=2))
        shapes, placed = flat_state(abstract), flat_state(shardings)
        held = sum(
            math.prod(placed[path].get_value().shard_shape(variable.shape))
            for path, variable in shapes.items()
        )
        assert held * 8 <= 1.01 * PUBLISHED[size][1]


class TestRoundTrip:
    def test_every_parameter_survives_export_bit_for_bit(self, pair, tmp_path):
        save_pretrained(pair.model, tmp_path / "out", dtype="float32")
        again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
        )
        expected = torch_parameters(pair.torch_model)
        actual = torch_parameters(again)
        assert actual.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(actual[n], expected[n])] == []

        batch = scenario("right padding", pair.patch_dim)
        with torch.no_grad():
            logits = again(**batch.torch()).logits.numpy()
        np.testing.assert_array_equal(logits, torch_logits(pair, batch))

    def test_bfloat16_is_exact(self, pairs, tmp_path):
        """transformers in bfloat16 -> port -> transformers, and the files themselves."""
        raw = pairs["compact"].folder
        half = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            raw, dtype=torch.bfloat16
        )
        half.save_pretrained(tmp_path / "theirs")
        model = load_pretrained(tmp_path / "theirs")
        assert {str(p.dtype) for p in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
        save_pretrained(model, tmp_path / "ours")
        again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "ours")
        expected, actual = torch_parameters(half), torch_parameters(again)
        assert {p.dtype for p in actual.values()} == {torch.bfloat16}
        assert [n for n in expected if not torch.equal(actual[n], expected[n])] == []
        written = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert written["text_config"]["dtype"] == "bfloat16"

    def test_a_tied_head_is_written_once(self, pairs, tmp_path):
        for name, written in (("uneven", True), ("compact", False)):
            save_pretrained(pairs[name].model, tmp_path / name)
            tensors = load_file(tmp_path / name / "model.safetensors")
            assert ("lm_head.weight" in tensors) is written

    def test_files_say_that_they_are_for_pytorch(self, pairs, tmp_path):
        save_pretrained(pairs["compact"].model, tmp_path / "out")
        with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}


class TestShards:
    def test_written_shards_load_on_both_sides(self, pair, tmp_path):
        out = tmp_path / "out"
        save_pretrained(pair.model, out, dtype="float32", max_shard_bytes=200_000)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in out.glob("*.safetensors"))
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert set(index["weight_map"].values()) == set(files)
        held = tensors_of(pair.model)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())

        theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            out, dtype=torch.float32
        )
        theirs = torch_parameters(theirs)
        ours = tensors_of(load_pretrained(out, dtype="float32"))
        assert theirs.keys() == ours.keys() == held.keys()
        for name, value in held.items():
            np.testing.assert_array_equal(ours[name], value)
            np.testing.assert_array_equal(theirs[name].detach().numpy(), value)

    def test_shards_of_transformers_load(self, pairs, tmp_path):
        pair = pairs["uneven"]
        pair.torch_model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        ours = tensors_of(load_pretrained(tmp_path, dtype="float32"))
        for name, value in tensors_of(pair.model).items():
            np.testing.assert_array_equal(ours[name], value)

    def test_files_that_change_while_they_are_read_are_noticed(self, pairs, tmp_path):
        folder = shutil.copytree(pairs["compact"].folder, tmp_path / "out")
        reading = TensorFolder(folder)
        reading.close()  # As it does now and then, to give memory back.
        shutil.copy(folder / "model.safetensors", tmp_path / "new")
        os.replace(tmp_path / "new", folder / "model.safetensors")
        with pytest.raises(ValueError, match="changed while it was read"):
            reading.read("model.language_model.norm.weight")

    def test_a_missing_shard_is_named(self, pairs, tmp_path):
        out = tmp_path / "out"
        save_pretrained(pairs["compact"].model, out, max_shard_bytes=200_000)
        gone = sorted(out.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(FileNotFoundError, match=gone.name):
            load_pretrained(out)


class TestSaving:
    def test_an_existing_folder_is_never_overwritten(self, pairs, tmp_path):
        with pytest.raises(FileExistsError, match="choose another folder"):
            save_pretrained(pairs["compact"].model, tmp_path)

    def test_a_failed_export_leaves_nothing_behind(self, pairs, tmp_path, monkeypatch):
        monkeypatch.setattr(TensorWriter, "write", _disk_full)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(pairs["compact"].model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_replacing_leaves_the_old_export_until_the_new_one_is_whole(
        self, pairs, tmp_path, monkeypatch
    ):
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
    def test_a_kill_while_it_is_replaced_loses_nothing(self, pairs, tmp_path, monkeypatch, moment):
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

    def test_a_link_stays_a_link(self, pairs, tmp_path):
        big, link = tmp_path / "big", tmp_path / "out"
        save_pretrained(pairs["compact"].model, big, dtype="float32")
        link.symlink_to(big)
        size = (big / "model.safetensors").stat().st_size
        for _ in range(2):
            save_pretrained(pairs["compact"].model, link, overwrite=True)
        assert link.is_symlink()
        assert (big / "model.safetensors").stat().st_size < size
        assert {path.name for path in tmp_path.iterdir()} == {"big", "out"}

    def test_a_file_in_its_place_is_not_replaced(self, pairs, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(FileExistsError):
            save_pretrained(pairs["compact"].model, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").read_text() == "mine"

    def test_what_cannot_be_carried_along_is_known_before_the_work(
        self, pairs, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(TensorWriter, "write", None)
        with pytest.raises(FileNotFoundError, match="gone"):
            save_pretrained(pairs["compact"].model, tmp_path / "out", files_from=tmp_path / "gone")
        assert list(tmp_path.iterdir()) == []

    def test_a_type_that_cannot_be_written_is_named(self, pairs, tmp_path):
        with pytest.raises(ValueError, match=r"written as int8: choose one of .*bfloat16"):
            save_pretrained(pairs["compact"].model, tmp_path / "out", dtype="int8")
        assert list(tmp_path.iterdir()) == []

    def test_what_a_killed_export_left_is_in_nobodys_way(self, pairs, tmp_path):
        left = tmp_path / ".out.partial"
        left.mkdir()
        (left / "model.safetensors").write_text("half")
        save_pretrained(pairs["compact"].model, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        load_pretrained(tmp_path / "out")

    def test_tokenizer_and_processor_files_come_along(self, pairs, tmp_path):
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


def _disk_full(*_, **__):
    raise OSError("disk full")


@pytest.fixture
def editable(pairs, tmp_path):
    """A copy of the tied checkpoint, and a function that rewrites its tensors."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(pairs["compact"].folder, folder)

    def edit(change):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        replaced = change(tensors)
        save_file(tensors if replaced is None else replaced, file, metadata={"format": "pt"})
        return folder

    return edit


class TestForeignNames:
    @pytest.mark.parametrize(
        "old, new",
        [
            ("model.visual.", "visual."),
            ("model.language_model.", "language_model.model."),
            ("model.language_model.", "model."),
        ],
    )
    def test_prefixes_of_other_exporters_are_understood(self, editable, pairs, old, new):
        folder = editable(
            lambda tensors: {
                new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()
            }
        )
        ours = tensors_of(load_pretrained(folder, dtype="float32"))
        for name, value in tensors_of(pairs["compact"].model).items():
            np.testing.assert_array_equal(ours[name], value)

    def test_canonical_names_are_left_alone(self):
        names = [e.hf.format(i=0) for e in TABLE]
        assert [canonical_name(n) for n in names] == names
        assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"


class TestRefusals:
    EMBEDDING = "model.language_model.embed_tokens.weight"
    NORM = "model.language_model.norm.weight"

    def test_everything_wrong_is_listed_at_once(self, editable):
        def spoil(tensors):
            del tensors[self.NORM]
            del tensors["model.visual.merger.norm.bias"]
            tensors["model.language_model.layers.3.mlp.up_proj.weight"] = np.ones((2, 2), "f4")
            tensors["model.visual.pos_embed.weight"] = np.ones((49, 95), "f4")

        with pytest.raises(ValueError, match=r"does not match its config\.json \(4\)") as error:
            load_pretrained(editable(spoil))
        message = str(error.value)
        assert f"missing: {self.NORM}" in message
        assert "missing: model.visual.merger.norm.bias" in message
        assert "unexpected: model.language_model.layers.3.mlp.up_proj.weight" in message
        assert "shape of model.visual.pos_embed.weight: (49, 95) in the file, (49, 96)" in message

    def test_a_long_list_says_how_much_it_leaves_out(self, editable):
        folder = editable(lambda tensors: {self.NORM: tensors[self.NORM]})
        with pytest.raises(ValueError, match=r"\.\.\. and \d+ more"):
            load_pretrained(folder)

    def test_one_tensor_under_two_names_is_refused(self, editable):
        folder = editable(lambda t: t.update({"model.norm.weight": t[self.NORM] + 1}))
        with pytest.raises(ValueError, match=rf"{self.NORM} .*twice"):
            load_pretrained(folder)

    def test_a_redundant_tied_head_is_accepted_if_equal(self, editable, pairs):
        folder = editable(lambda t: t.update({"lm_head.weight": t[self.EMBEDDING].copy()}))
        model = load_pretrained(folder, dtype="float32")
        assert model.lm_head is None
        np.testing.assert_array_equal(
            bits(model.unembedding), bits(pairs["compact"].model.unembedding)
        )

    def test_a_redundant_tied_head_is_refused_if_different(self, editable):
        folder = editable(lambda t: t.update({"lm_head.weight": t[self.EMBEDDING] + 1e-3}))
        with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight"):
            load_pretrained(folder)

    def test_a_tied_head_without_its_embedding_is_refused(self, editable):
        folder = editable(lambda t: t.update({"lm_head.weight": t.pop(self.EMBEDDING)}))
        with pytest.raises(ValueError, match=rf"missing: {self.EMBEDDING}"):
            load_pretrained(folder)

    def test_a_missing_untied_head_is_refused(self, pairs, tmp_path):
        shutil.copytree(pairs["uneven"].folder, tmp_path, dirs_exist_ok=True)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
            load_pretrained(tmp_path)

    def test_pickle_files_are_refused(self, pairs, tmp_path):
        shutil.copy(pairs["compact"].folder / "config.json", tmp_path)
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin are refused"):
            load_pretrained(tmp_path)

    def test_code_that_comes_with_a_checkpoint_is_refused(self, editable):
        folder = editable(lambda tensors: None)
        raw = json.loads((folder / "config.json").read_text())
        raw["auto_map"] = {"AutoModel": "modeling.Mine"}
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=r"config\.json: auto_map names code"):
            load_pretrained(folder)

    def test_quantized_weights_are_refused_by_name(self, editable):
        folder = editable(lambda t: t.update({self.NORM: t[self.NORM].astype(np.int8)}))
        with pytest.raises(ValueError, match=rf"{self.NORM} \(I8\)\. Quantized weights"):
            load_pretrained(folder)

    @pytest.mark.parametrize("kept", [0, 5, 1000, -1], ids=["empty", "5", "1000", "all but one"])
    def test_a_download_that_did_not_finish_is_named(self, editable, kept):
        file = editable(lambda tensors: None) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"{file.name} is damaged.*get it again"):
            load_pretrained(file.parent)

    @pytest.mark.parametrize(
        "name, text",
        [
            ("config.json", '{"model_type": "qwen3'),
            ("model.safetensors.index.json", '{"weight_map"'),
            ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
            ("model.safetensors.index.json", "[]"),
        ],
    )
    def test_json_that_is_damaged_is_named(self, editable, name, text):
        folder = editable(lambda tensors: None)
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=re.escape(name)):
            load_pretrained(folder)

    def test_an_index_cannot_name_files_elsewhere(self, editable):
        folder = editable(lambda tensors: None)
        shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
        index = {"weight_map": {self.NORM: "../other.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"outside of its folder: \['\.\./other"):
            load_pretrained(folder)

    def test_a_config_without_theta_is_refused(self, editable):
        folder = editable(lambda tensors: None)
        raw = json.loads((folder / "config.json").read_text())
        del raw["text_config"]["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match="rope_theta"):
            load_pretrained(folder)

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not a Hugging Face checkpoint folder"):
            load_pretrained(tmp_path / "nowhere")


class TestMesh:
    @pytest.fixture(scope="class")
    def sharded(self, pairs):
        return load_pretrained(
            pairs["uneven"].folder, mesh=make_mesh(fsdp=4, tensor=2), dtype="float32"
        )

    def test_eight_devices_give_the_logits_of_one(self, pairs, sharded):
        batch = scenario("left padding", pairs["uneven"].patch_dim)
        one, eight = (
            np.asarray(forward_hf(model, *batch.arguments()))[batch.valid]
            for model in (pairs["uneven"].model, sharded)
        )
        assert relative_l2(eight, one) <= 3e-6

    def test_parameters_are_placed_by_the_rules(self, sharded):
        kernel = sharded.language_model.layers.q_proj.kernel.get_value()
        assert kernel.shape == (4, 48, 4, 16)  # layers, width, heads, head width
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 12, 2, 16)}

    @pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
    def test_each_part_is_read_once(self, pairs, monkeypatch, sizes):
        """Replicated or not: of every tensor the bytes that some device holds, and those once."""
        read, counted = TensorFolder.read, []

        def count(self, name, part=()):
            out = read(self, name, part)
            counted.append(out.size)
            return out

        monkeypatch.setattr(TensorFolder, "read", count)
        load_pretrained(pairs["uneven"].folder, make_mesh(*sizes), "float32")
        whole = sum(x.size for x in jax.tree.leaves(nnx.state(pairs["uneven"].model)))
        assert sum(counted) == whole

    def test_a_sharded_model_is_saved_whole(self, pairs, sharded, tmp_path):
        save_pretrained(sharded, tmp_path / "out", dtype="float32")
        ours = load_file(tmp_path / "out" / "model.safetensors")
        for name, value in tensors_of(pairs["uneven"].model).items():
            np.testing.assert_array_equal(ours[name], value)


def test_dtype_is_that_of_every_parameter(pairs):
    model = load_pretrained(pairs["compact"].folder, dtype=jnp.float16)
    assert {str(p.dtype) for p in jax.tree.leaves(nnx.state(model))} == {"float16"}
