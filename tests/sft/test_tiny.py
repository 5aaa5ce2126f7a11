"""The files of the embedded tiny model: tokenizer, chat template, configs."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
import transformers
from hypothesis import given, settings
from tokenizers import Tokenizer

from p2r_jax.data.visual_search import SHAPES, VisualSearchConfig
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.prompts import build_messages, load_prompt_set
from p2r_jax.sft.examples import box_text
from p2r_jax.sft.tiny import COORDINATE_STEP, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(tiny_files):
    return transformers.AutoTokenizer.from_pretrained(tiny_files)


@pytest.fixture(scope="module")
def fast(tiny_files) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_files / "tokenizer.json"))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_round_trips(fast, text):
    ids = fast.encode(text, add_special_tokens=False).ids
    assert fast.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_token_each(tokenizer):
    for i, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False) == [i]


def test_every_coordinate_colour_shape_and_glyph_is_one_token(tokenizer):
    config = VisualSearchConfig()
    pieces = [str(n) for n in range(0, 1001, COORDINATE_STEP)]
    pieces += [f" {word}" for word in (*config.colours, *SHAPES)]
    pieces += [*config.glyphs, "<think>", "</think><answer>", "</answer>"]
    for piece in pieces:
        assert len(tokenizer.encode(piece, add_special_tokens=False)) == 1, piece


def test_a_box_costs_about_a_dozen_tokens(tokenizer):
    """Opening, four coordinates and three commas, label opening, two words, closing."""
    text = box_text([[50, 100, 950, 1000]], ["red tile"])
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 12


def test_transformers_reads_the_config(tiny_files):
    config = transformers.AutoConfig.from_pretrained(tiny_files)
    assert isinstance(config, transformers.Qwen3VLConfig)
    ours = Qwen3VLConfig.from_pretrained(tiny_files)
    assert config.text_config.num_hidden_layers == ours.text.num_hidden_layers
    assert config.vision_config.deepstack_visual_indexes == [0, 1]
    assert config.image_token_id == ours.image_token_id == SPECIAL_TOKENS.index("<|image_pad|>")


def test_the_tokenizer_fits_the_embedding(tokenizer, tiny_files):
    rows = Qwen3VLConfig.from_pretrained(tiny_files).text.vocab_size
    assert len(tokenizer) <= rows < len(tokenizer) + 8


def test_the_chat_template_renders_every_role(tokenizer):
    prompts = load_prompt_set("tiny")
    for role in ("perceiver", "reasoner", "baseline", "direct"):
        messages = build_messages(prompts, role, "red?", num_images=2, answer_form="mca")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.startswith("<|im_start|>system\n")
        assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == 2
        assert "red?<|im_end|>\n" in text
        assert text.endswith("<|im_start|>assistant\n")


def test_the_chat_template_takes_plain_text_and_answers(tokenizer):
    chat = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"


def test_stop_and_padding_are_what_generation_uses(tokenizer, tiny_files):
    processor = Processor.from_pretrained(tiny_files)
    assert processor.stop_ids == (tokenizer.eos_token_id,)
    assert processor.pad_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    generation = json.loads((tiny_files / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]


def test_the_folder_is_made_the_same_way_every_time(tiny_files, tmp_path):
    from tests.tiny import write_files

    again = write_files(tmp_path / "again")
    for file in tiny_files.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
