"""Checkpoints that others wrote: their names are understood, and what is wrong is named."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.names import TABLE, canonical_name
from tests.qwen3_vl.reference import tensors_of


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
            np.asarray(model.unembedding), np.asarray(pairs["compact"].model.unembedding)
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
