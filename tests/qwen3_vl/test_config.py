"""config.json: both published forms are read, the older is written, and nothing is guessed."""

from __future__ import annotations

import copy
import json

import pytest
import transformers

from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.published import FOLDER
from tests.qwen3_vl.reference import CONFIGS, hf_config

PUBLISHED = {
    path.stem.removeprefix("config_"): json.loads(path.read_text())
    for path in sorted(FOLDER.glob("config_*.json"))
}


def test_the_published_8b_config():
    config = Qwen3VLConfig.from_hf(PUBLISHED["8B"])
    assert config.tie_word_embeddings is False
    assert config.text.rope_theta == 5e6
    assert config.text.mrope_section == (24, 20, 20)
    assert config.vision.head_dim == 72
    assert config.vision.deepstack_visual_indexes == (8, 16, 24)
    assert config.vision.patch_dim == 1536
    assert config.vision.position_grid == 48


def test_head_width_of_4b_is_not_derived_from_its_hidden_size():
    text = Qwen3VLConfig.from_hf(PUBLISHED["4B"]).text
    assert text.num_attention_heads * text.head_dim == 4096 != text.hidden_size


@pytest.mark.parametrize("size", PUBLISHED)
def test_both_forms_give_the_same_config(size):
    """transformers 5 rewrites the rotary settings when it saves."""
    newer = transformers.Qwen3VLConfig(**copy.deepcopy(PUBLISHED[size])).to_dict()
    assert "rope_theta" not in newer["text_config"]
    assert newer["vision_config"]["model_type"] == "qwen3_vl_vision"
    assert Qwen3VLConfig.from_hf(newer) == Qwen3VLConfig.from_hf(PUBLISHED[size])


@pytest.mark.parametrize("size", PUBLISHED)
def test_what_is_written_is_the_older_form_with_equal_values(size):
    config = Qwen3VLConfig.from_hf(PUBLISHED[size])
    written = config.to_hf()
    assert Qwen3VLConfig.from_hf(json.loads(json.dumps(written))) == config
    for name in ("vision_config", "text_config"):
        ours, published = written[name], PUBLISHED[size][name]
        shared = ours.keys() & published.keys()
        assert {k: ours[k] for k in shared} == {k: published[k] for k in shared}
    # Where the two versions of transformers look for what decides the outputs.
    text = written["text_config"]
    assert text["rope_theta"] == 5e6
    assert text["rope_scaling"]["mrope_section"] == [24, 20, 20]
    assert written["tie_word_embeddings"] == PUBLISHED[size]["tie_word_embeddings"]


def test_tying_is_decided_by_the_outer_key():
    raw = hf_config("uneven")
    raw["text_config"]["tie_word_embeddings"] = True
    assert Qwen3VLConfig.from_hf(raw).tie_word_embeddings is False


def test_config_is_hashable():
    """Hence a static argument of `jax.jit`."""
    assert len({Qwen3VLConfig.from_hf(hf_config(name)) for name in (*CONFIGS, *CONFIGS)}) == 2


def _without(raw, *path):
    *outer, last = path
    for key in outer:
        raw = raw[key]
    del raw[last]


def _set(raw, value, *path):
    *outer, last = path
    for key in outer:
        raw = raw[key]
    raw[last] = value


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: _set(c, "qwen3_vl_moe", "model_type"), "model_type"),
        (lambda c: _without(c, "text_config"), "text_config"),
        (lambda c: _without(c, "text_config", "rope_theta"), "rope_theta"),
        (lambda c: _without(c, "vision_config", "depth"), "vision_config has no depth"),
        (lambda c: _without(c, "text_config", "num_key_value_heads"), "num_key_value_heads"),
        (lambda c: _without(c, "text_config", "rope_scaling", "mrope_section"), "mrope_section"),
        (lambda c: _set(c, [4, 2, 1], "text_config", "rope_scaling", "mrope_section"), "sum to"),
        (lambda c: _set(c, False, "text_config", "rope_scaling", "mrope_interleaved"), "interl"),
        (lambda c: _set(c, "yarn", "text_config", "rope_scaling", "rope_type"), "'yarn'"),
        (lambda c: _set(c, True, "text_config", "attention_bias"), "attention_bias"),
        (lambda c: _set(c, 3, "text_config", "num_key_value_heads"), "num_key_value_heads"),
        (lambda c: _set(c, "gelu", "vision_config", "hidden_act"), "hidden_act"),
        (lambda c: _set(c, {"rope_theta": 1e6}, "vision_config", "rope_parameters"), "rope_theta"),
        (lambda c: _set(c, [1, 5], "vision_config", "deepstack_visual_indexes"), "below depth 5"),
        (lambda c: _set(c, [3, 1], "vision_config", "deepstack_visual_indexes"), "increasing"),
        (lambda c: _set(c, 145, "vision_config", "num_position_embeddings"), "square"),
        (lambda c: _set(c, 64, "vision_config", "out_hidden_size"), "out_hidden_size"),
    ],
)
def test_a_bad_config_is_refused_by_name(change, message):
    raw = hf_config("uneven")
    raw = copy.deepcopy(raw)
    change(raw)
    with pytest.raises(ValueError, match=message) as error:
        Qwen3VLConfig.from_hf(raw, source="somewhere/config.json")
    assert "somewhere/config.json" in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Qwen3VLConfig.from_pretrained(tmp_path)
