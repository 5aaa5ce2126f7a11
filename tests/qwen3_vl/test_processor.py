"""Image sizes and token rows, against transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
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


def random_cases(count: int) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Sizes and budgets, a fifth each of: any size up to 9000; any order of magnitude; sides of an
    odd number of half factors, which are ties; aspects about 200; exactly the budget's area."""
    rng = np.random.default_rng(0)
    for case in range(count):
        factor = int(rng.choice([8, 16, 28, 32]))
        least = int(rng.integers(1, 65))
        most = int(rng.integers(least, 4097))
        if case % 5 == 0:
            size = rng.integers(1, 9001, 2)
        elif case % 5 == 1:
            size = np.exp(rng.uniform(0, np.log(9000), 2)).astype(int)
        elif case % 5 == 2:
            size = factor // 2 * (2 * rng.integers(0, 100, 2) + 1)
        elif case % 5 == 3:
            short = rng.integers(1, 45)
            size = rng.permutation([short, 200 * short + rng.integers(-2, 3)])
        else:
            rows, columns = rng.integers(1, 40, 2)
            size = factor * np.array([rows, columns])
            least, most = (rows * columns, 4096) if case % 2 else (1, rows * columns)
        budget = {"min_pixels": int(least) * factor**2, "max_pixels": int(most) * factor**2}
        yield int(size[0]), int(size[1]), {"factor": factor} | budget


def test_sizes_are_those_of_transformers():
    outcomes = Counter()
    for height, width, budget in random_cases(10_000):
        try:
            expected = reference(height, width, **budget)
        except ValueError:
            with pytest.raises(ValueError, match="aspect ratio above 200"):
                smart_resize(height, width, **budget)
            outcomes["refused"] += 1
        else:
            assert smart_resize(height, width, **budget) == expected, (height, width, budget)
            area, factor = expected[0] * expected[1], budget["factor"]
            rounded = round(height / factor) * round(width / factor) * factor**2
            outcomes["kept" if area == rounded else "shrunk" if area < rounded else "grown"] += 1
    assert min(outcomes[kind] for kind in ("refused", "kept", "shrunk", "grown")) > 500


def qwen_vl_utils_size(height, width, *, factor, min_pixels, max_pixels):
    """How the authors of P2R size an image before the processor does: at least one factor a side
    from the start, and no such limit when shrinking."""
    new = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if new[0] * new[1] > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new = [math.floor(side / beta / factor) * factor for side in (height, width)]
    elif new[0] * new[1] < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(side * beta / factor) * factor for side in (height, width)]
    return tuple(new)


@pytest.mark.parametrize("max_pixels", [2_097_152, 4_194_304])
def test_the_authors_two_resizes_in_a_row_give_the_same_size(max_pixels):
    """Not so for a side of 16 pixels or less, half a factor, which their first resize makes a whole
    one, nor for aspects so near 200 that it makes them greater, and the second refuses."""
    budget = BUDGET | {"max_pixels": max_pixels}
    compared = 0
    for height, width, _ in random_cases(10_000):
        short, long = sorted((height, width))
        if short > 16 and long <= 100 * short:
            theirs = qwen_vl_utils_size(height, width, **budget)
            assert smart_resize(height, width, **budget) == theirs, (height, width)
            assert reference(*theirs, **budget) == theirs, (height, width)
            compared += 1
    assert compared > 5000


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
