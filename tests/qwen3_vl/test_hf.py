"""Checkpoints travel between Hugging Face and the port without losing a bit."""

from __future__ import annotations

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from p2r_jax.parallel.mesh import make_mesh, parameter_shardings
from p2r_jax.qwen3_vl import Qwen3VLConfig, forward_hf, hf, load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.names import flat_state, parameters
from p2r_jax.qwen3_vl.published import published
from p2r_jax.qwen3_vl.tensor_files import TensorFolder
from tests.qwen3_vl.reference import relative_l2, scenario, tensors_of, torch_logits

PUBLISHED = {
    # size: tensors, parameters, parameters of the vision tower
    "2B": (625, 2_127_532_032, 406_957_056),
    "4B": (713, 4_437_815_808, 415_347_712),
    "8B": (750, 8_767_123_696, 576_388_336),
    "32B": (1058, 33_357_390_064, 595_266_800),
}


def published_config(size: str) -> dict:
    return published(size)


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
