"""Qwen3-VL hyper-parameters, read from and written to Hugging Face ``config.json``.

Both published forms are read: transformers 4.57 (``rope_scaling`` + ``rope_theta``) and 5.x
(``rope_parameters``). The 4.57 form is written, because both versions load it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from p2r_jax.paths import as_path


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes are in patches, channels or pixels as named."""

    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 2304
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Length of a flattened patch: channels x frames x pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def frame_dim(self) -> int:
        """The same of one frame."""
        return self.in_channels * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def position_grid(self) -> int:
        """Side of the square table of learned position embeddings."""
        return round(self.num_position_embeddings**0.5)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 262144


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """A whole model; frozen and hashable, so that it can be a static argument of ``jax.jit``."""

    vision: VisionConfig
    text: TextConfig
    tie_word_embeddings: bool
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Qwen3VLConfig:
        """Read ``config.json`` of a checkpoint folder. Raises ValueError naming the bad field."""
        file = as_path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: {path} is not a Hugging Face checkpoint folder "
                "(expected config.json beside the safetensors files)"
            )
        try:
            raw = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): get it again") from error
        return cls.from_hf(raw, source=str(file))

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> Qwen3VLConfig:
        if raw.get("model_type") != "qwen3_vl":
            raise ValueError(
                f"{source}: model_type is {raw.get('model_type')!r}; only the dense "
                "'qwen3_vl' is supported"
            )
        if "auto_map" in raw:
            raise ValueError(
                f"{source}: auto_map names code that comes with the checkpoint. Such code is never "
                "run, and without it the weights may mean something else: take a checkpoint of "
                "the plain architecture, or delete auto_map if this is one"
            )
        for name in ("vision_config", "text_config"):
            if not isinstance(raw.get(name), dict):
                raise ValueError(f"{source}: has no {name}")
        vision, text = raw["vision_config"], raw["text_config"]
        if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise ValueError(f"{source}: vision_config.hidden_act must be gelu_pytorch_tanh")
        if text.get("hidden_act", "silu") != "silu" or text.get("attention_bias", False):
            raise ValueError(f"{source}: text_config must use silu and attention_bias false")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        theta = rope.get("rope_theta", text.get("rope_theta"))
        if theta is None:
            raise ValueError(
                f"{source}: text_config has no rope_theta. Published Qwen3-VL models use 5000000; "
                "libraries disagree about the default, so it must be written out"
            )
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"{source}: rope_type {rope['rope_type']!r} is not supported (only 'default')"
            )
        vision_rope = vision.get("rope_parameters") or {}
        if vision_rope.get("rope_theta", 10000.0) != 10000.0:
            raise ValueError(f"{source}: vision_config rope_theta must be 10000")
        section = rope.get("mrope_section")
        if section is None:
            raise ValueError(f"{source}: text_config.rope_scaling has no mrope_section")
        if not rope.get("mrope_interleaved", True):
            raise ValueError(f"{source}: only interleaved M-RoPE is supported")
        _require(vision, VisionConfig, f"{source}: vision_config")
        derived = ("head_dim", "mrope_section", "rope_theta")
        _require(text, TextConfig, f"{source}: text_config", *derived)
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        if sum(section) != head_dim // 2:
            raise ValueError(
                f"{source}: mrope_section {section} must sum to head_dim/2 = {head_dim // 2}"
            )
        config = cls(
            vision=VisionConfig(
                **_pick(
                    vision,
                    VisionConfig,
                    deepstack_visual_indexes=tuple(vision["deepstack_visual_indexes"]),
                    rope_theta=10000.0,
                )
            ),
            text=TextConfig(
                **_pick(
                    text,
                    TextConfig,
                    head_dim=head_dim,
                    rope_theta=float(theta),
                    mrope_section=tuple(section),
                )
            ),
            # The outer key decides: 8B and 32B have none in text_config, and some exports disagree.
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            **{
                name: raw[name]
                for name in (
                    "image_token_id",
                    "video_token_id",
                    "vision_start_token_id",
                    "vision_end_token_id",
                )
                if name in raw
            },
        )
        config.validate(source)
        return config

    def validate(self, source: str = "config") -> None:
        """Raise ValueError for combinations that the architecture cannot express."""
        taps = self.vision.deepstack_visual_indexes
        if len(taps) > self.text.num_hidden_layers:
            raise ValueError(f"{source}: {len(taps)} DeepStack levels need as many text layers")
        if list(taps) != sorted(set(taps)) or not all(0 <= t < self.vision.depth for t in taps):
            raise ValueError(
                f"{source}: deepstack_visual_indexes {list(taps)} must be increasing block "
                f"indexes below depth {self.vision.depth}"
            )
        if self.vision.position_grid**2 != self.vision.num_position_embeddings:
            raise ValueError(f"{source}: num_position_embeddings must be a square number")
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(f"{source}: vision out_hidden_size must equal text hidden_size")
        if self.text.num_attention_heads % self.text.num_key_value_heads:
            raise ValueError(f"{source}: num_attention_heads must divide by num_key_value_heads")
        if self.vision.hidden_size % self.vision.num_heads or self.vision.head_dim % 4:
            raise ValueError(f"{source}: vision head width must be a multiple of 4")

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The transformers 4.57 form of ``config.json``."""
        vision, text = dataclasses.asdict(self.vision), dataclasses.asdict(self.text)
        del vision["rope_theta"], vision["layer_norm_eps"]
        section = list(text.pop("mrope_section"))
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": text
            | {
                "model_type": "qwen3_vl_text",
                "hidden_act": "silu",
                "attention_bias": False,
                "dtype": dtype,
                "tie_word_embeddings": self.tie_word_embeddings,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": section,
                    "rope_type": "default",
                },
            },
            "vision_config": vision
            | {
                "model_type": "qwen3_vl",
                "hidden_act": "gelu_pytorch_tanh",
                "deepstack_visual_indexes": list(self.vision.deepstack_visual_indexes),
            },
        }


def _pick(raw: dict[str, Any], cls: type, **fixed: Any) -> dict[str, Any]:
    """The fields of dataclass `cls` that `raw` has, with `fixed` taking precedence."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in raw.items() if name in names} | fixed


def _require(raw: dict[str, Any], cls: type, where: str, *derived: str) -> None:
    """Raise ValueError listing fields without a default that `raw` lacks and nothing derives."""
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.name not in (*raw, *derived)
    ]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}")
