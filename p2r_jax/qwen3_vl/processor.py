"""Chat messages and image sizes to token rows: the host half of preprocessing.

Pixels are handled on the device (`ops.image`); here an image is only its size. Files are the
ones every Hugging Face checkpoint carries: tokenizer, chat template, preprocessor_config.json,
generation_config.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from p2r_jax.paths import as_path, local_files
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.new_folder import CARRIED_FILES
from p2r_jax.qwen3_vl.positions import Grid

MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Size (height, width) in pixels that an image is resized to: multiples of `factor`.

    Keeps the aspect ratio as nearly as the factor allows and the area within
    [min_pixels, max_pixels]. Rounds half to even, as the reference does. Raises ValueError for
    empty images and aspect ratios above 200.
    """
    if min(height, width) < 1:
        raise ValueError(f"image size {height}x{width} is empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"image size {height}x{width}: aspect ratio above {MAX_ASPECT_RATIO}")
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """The pixel budget of every image, and what it means in patches."""

    patch: int
    """Pixels per side of a patch."""
    merge: int
    """Patches per side of a visual token."""
    min_pixels: int
    max_pixels: int

    @property
    def max_patches(self) -> int:
        """Patches of the largest image within the budget."""
        return self.max_pixels // (self.patch * self.merge) ** 2 * self.merge**2

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (height, width) an image of this size is resized to; see `smart_resize`."""
        return smart_resize(
            height,
            width,
            factor=self.patch * self.merge,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )

    def grid(self, target: tuple[int, int]) -> Grid:
        """Patches (rows, columns) of an image resized to `target`."""
        return target[0] // self.patch, target[1] // self.patch


@dataclasses.dataclass(frozen=True)
class Processor:
    """Tokenizer, chat template and image budget of one checkpoint."""

    tokenizer: Any
    config: Qwen3VLConfig
    sizes: ImageSizes
    stop_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def from_pretrained(
        cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Read a checkpoint folder; pixel budgets override those of preprocessor_config.json.

        Raises FileNotFoundError or ValueError naming the file and field.
        """
        path = as_path(path)
        config = Qwen3VLConfig.from_pretrained(path)
        raw = _read_json(path / "preprocessor_config.json")
        if raw.get("patch_size", config.vision.patch_size) != config.vision.patch_size:
            raise ValueError(
                f"{path}: preprocessor_config.json and config.json disagree on patches"
            )
        size = raw.get("size", {})
        min_pixels = min_pixels or size.get("shortest_edge") or raw.get("min_pixels")
        max_pixels = max_pixels or size.get("longest_edge") or raw.get("max_pixels")
        if not min_pixels or not max_pixels or min_pixels > max_pixels:
            raise ValueError(
                f"{path}/preprocessor_config.json: size.shortest_edge and size.longest_edge (pixel "
                f"counts) must be given and increasing, got {min_pixels} and {max_pixels}"
            )
        with local_files(path, (*CARRIED_FILES, "config.json")) as files:
            tokenizer = AutoTokenizer.from_pretrained(str(files), trust_remote_code=False)
        if not tokenizer.chat_template:
            raise ValueError(f"{path} has no chat template (chat_template.jinja)")
        stop = _read_json(path / "generation_config.json").get("eos_token_id")
        stop = stop if stop is not None else tokenizer.eos_token_id
        stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[-1]
        vision = config.vision
        sizes = ImageSizes(vision.patch_size, vision.spatial_merge_size, min_pixels, max_pixels)
        return cls(tokenizer, config, sizes, stop_ids, pad)

    def encode(self, messages: list[dict[str, Any]], grids: Sequence[Grid]) -> np.ndarray:
        """Token ids of a chat (with the generation prompt), one placeholder per visual token.

        messages: Hugging Face content-list form; grids: patches of each image, in order. Raises
        ValueError if the chat and `grids` disagree on the number of images.
        """
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        is_image = ids == self.config.image_token_id
        if int(is_image.sum()) != len(grids):
            raise ValueError(
                f"the chat has {int(is_image.sum())} image placeholder(s) for {len(grids)} image(s)"
            )
        repeats = np.ones(len(ids), np.int64)
        repeats[is_image] = [h * w // self.config.vision.merge_unit for h, w in grids]
        return np.repeat(ids, repeats)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a completion; stop and padding tokens are dropped."""
        dropped = {*self.stop_ids, self.pad_id}
        kept = [int(t) for t in tokens if int(t) not in dropped]
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def prompt_text(self, tokens: np.ndarray) -> str:
        """A prompt for people: every image is one placeholder."""
        image = tokens == self.config.image_token_id
        first = np.concatenate([[True], tokens[1:] != tokens[:-1]])
        return self.tokenizer.decode(tokens[~image | first], skip_special_tokens=False)

    def allowed_tokens(self) -> np.ndarray:
        """Bool [V]: what may be sampled. Image, video and padding placeholders, and rows of the
        embedding that no token uses, never are."""
        allowed = np.zeros(self.config.text.vocab_size, bool)
        allowed[: len(self.tokenizer)] = True
        banned = {
            self.config.image_token_id,
            self.config.video_token_id,
            self.config.vision_start_token_id,
            self.config.vision_end_token_id,
            self.pad_id,
        } - set(self.stop_ids)
        allowed[list(banned)] = False
        return allowed


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
