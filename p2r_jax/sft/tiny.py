"""The embedded tiny model: its shape, its tokenizer and the files around it.

The full Qwen3-VL graph, only small: 64-pixel images make 4x4 visual tokens. The tokenizer is
byte-level BPE (any text round-trips) whose pieces are chosen so that a box list costs few tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from p2r_jax.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Fixed punctuation is one piece each; a number is one piece, so that a coordinate in steps of 50
# is one token and the text is still plain JSON.
PIECES = (
    r'\[\{"bbox_2d":\[|\],"label":"|"\},\{"bbox_2d":\[|"\}\]'
    r"|<think>|</think><answer>|</answer>|\n[A-Z]\. |\d+| ?[A-Za-z]+|[^\sA-Za-z\d]|\s"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

COORDINATE_STEP = 50
"""Box corners are taught in multiples of this (in 1/1000), each number one token of the tokenizer;
the text is still ordinary JSON."""

MIN_PIXELS, MAX_PIXELS = 1024, 5184
"""Budget of every image, overview or crop: near-square images become 64x64 pixels."""


def tiny_config(vocab_size: int) -> Qwen3VLConfig:
    """A 64-pixel Qwen3-VL of about two million parameters with every part of the real graph."""
    ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    width = 128
    return Qwen3VLConfig(
        vision=VisionConfig(
            hidden_size=96,
            depth=3,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=width,
            deepstack_visual_indexes=(0, 1),
            patch_size=8,
            num_position_embeddings=64,
        ),
        text=TextConfig(
            vocab_size=-(-vocab_size // 8) * 8,
            hidden_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=320,
            rope_theta=10000.0,
            mrope_section=(6, 5, 5),
            max_position_embeddings=4096,
        ),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def build_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Byte-level BPE in which every piece of `corpus` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_processor_files(tokenizer: Tokenizer, config: Qwen3VLConfig, folder: Path) -> None:
    """Everything but weights and config.json that a checkpoint folder carries."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    end, pad = "<|im_end|>", "<|endoftext|>"
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": pad,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text.max_position_embeddings,
        },
        "preprocessor_config.json": {
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            "patch_size": config.vision.patch_size,
            "temporal_patch_size": config.vision.temporal_patch_size,
            "merge_size": config.vision.spatial_merge_size,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
        },
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": [tokenizer.token_to_id(end)],
            "pad_token_id": tokenizer.token_to_id(pad),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
