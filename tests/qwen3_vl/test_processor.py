"""Image sizes and token rows, against transformers."""

from __future__ import annotations

import json
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from p2r_jax.qwen3_vl.processor import ImageSizes, Processor, smart_resize

BUDGET = {"factor": 32, "min_pixels": 4096, "max_pixels": 2_097_152}


@pytest.fixture(scope="module")
def processor(tiny_files) -> Processor:
    return Processor.from_pretrained(tiny_files)


def user(*parts) -> list[dict]:
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return [{"role": "user", "content": content}]


# --- image sizes ------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.sampled_from([8, 16, 28, 32]),
    st.integers(1, 64),
    st.integers(64, 4096),
)
def test_sizes_are_those_of_transformers(height, width, factor, least, most):
    budget = {
        "factor": factor,
        "min_pixels": least * factor**2,
        "max_pixels": most * factor**2,
    }
    try:
        expected = reference(height, width, **budget)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio above 200"):
            smart_resize(height, width, **budget)
    else:
        assert smart_resize(height, width, **budget) == expected


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (512, 512, (512, 512)),
        (48, 80, (64, 64)),  # 1.5 and 2.5 times the factor both round to the even 2
        (1, 1, (64, 64)),
        (5000, 5000, (1440, 1440)),
        (16, 1600, (32, 640)),  # half a factor rounds to 0 rows, then the lower limit acts
    ],
)
def test_worked_examples(height, width, expected):
    assert smart_resize(height, width, **BUDGET) == expected


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_empty_image_is_an_error(size):
    with pytest.raises(ValueError, match="is empty"):
        smart_resize(*size, **BUDGET)


def test_the_largest_image_fills_the_budget():
    sizes = ImageSizes(patch=16, merge=2, min_pixels=4096, max_pixels=2_097_152)
    assert sizes.max_patches == 2048 * 4
    assert sizes.grid(sizes.target_size(1024, 2048)) == (64, 128)


# --- token rows -------------------------------------------------------------------------------


def test_each_image_becomes_one_placeholder_per_visual_token(processor):
    ids = processor.encode(user(None, None, "red?"), [(4, 6), (8, 2)])
    config = processor.config
    start, end = config.vision_start_token_id, config.vision_end_token_id
    image = config.image_token_id
    first = int(np.flatnonzero(ids == start)[0])
    expected = [start, *[image] * 6, end, start, *[image] * 4, end]
    assert ids[first : first + len(expected)].tolist() == expected
    assert ids.dtype == np.int32


def test_the_rest_is_the_chat_template_with_the_generation_prompt(processor):
    ids = processor.encode(user(None, "Find: red?"), [(2, 2)])
    text = processor.tokenizer.decode(ids)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find: red?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("grids", [[], [(2, 2), (2, 2)]])
def test_a_chat_and_its_images_must_agree(processor, grids):
    with pytest.raises(ValueError, match=rf"1 image placeholder\(s\) for {len(grids)} image"):
        processor.encode(user(None, "red?"), grids)


def test_a_placeholder_typed_by_the_user_is_noticed(processor):
    with pytest.raises(ValueError, match=r"2 image placeholder\(s\) for 1 image"):
        processor.encode(user(None, "what is <|image_pad|>?"), [(2, 2)])


def test_decoding_drops_stop_and_padding(processor):
    ids = processor.tokenizer.encode("red tile", add_special_tokens=False)
    assert processor.decode([*ids, *processor.stop_ids, processor.pad_id]) == "red tile"


def test_placeholders_padding_and_unused_rows_are_never_sampled(processor):
    allowed, config = processor.allowed_tokens(), processor.config
    assert allowed.shape == (config.text.vocab_size,)
    banned = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        processor.pad_id,
    }
    assert not allowed[list(banned)].any()
    assert not allowed[len(processor.tokenizer) :].any()
    assert allowed[list(processor.stop_ids)].all()
    assert allowed.sum() == len(processor.tokenizer) - len(banned)


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_files, tmp_path):
    return shutil.copytree(tiny_files, tmp_path / "checkpoint")


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_budgets_come_from_the_file_and_arguments_win(folder):
    sizes = Processor.from_pretrained(folder).sizes
    assert (sizes.min_pixels, sizes.max_pixels) == (1024, 5184)
    sizes = Processor.from_pretrained(folder, 2048, 4096).sizes
    assert (sizes.min_pixels, sizes.max_pixels) == (2048, 4096)


def test_the_older_spelling_of_the_budget_is_read(folder):
    edit(folder / "preprocessor_config.json", size=None, min_pixels=512, max_pixels=1024)
    sizes = Processor.from_pretrained(folder).sizes
    assert (sizes.min_pixels, sizes.max_pixels) == (512, 1024)


def test_several_stop_tokens(folder):
    edit(folder / "generation_config.json", eos_token_id=[2, 0])
    assert Processor.from_pretrained(folder).stop_ids == (2, 0)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("preprocessor_config.json", {"size": None}, "preprocessor_config.json: size.shortest"),
        ("preprocessor_config.json", {"patch_size": 14}, "disagree on patches"),
    ],
)
def test_a_wrong_file_is_named(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(folder)


def test_a_missing_chat_template_is_named(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Processor.from_pretrained(folder)


def test_a_budget_upside_down_is_an_error(folder):
    with pytest.raises(ValueError, match="increasing, got 8192 and 5184"):
        Processor.from_pretrained(folder, min_pixels=8192)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Processor.from_pretrained(tmp_path / "nowhere")
