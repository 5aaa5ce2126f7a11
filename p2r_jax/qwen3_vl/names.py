"""The one table of names, Hugging Face's and ours, that import and export both read.

A parameter of the port is one Hugging Face tensor, or one for each layer stacked on a leading axis.
A `linear` weight is (out, in) there and (*in, *out) here; everything else is a reshape. Square
matrices make a forgotten transpose pass every shape check, so nothing here guesses.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from p2r_jax.qwen3_vl.config import Qwen3VLConfig


@dataclasses.dataclass(frozen=True)
class Name:
    """`hf` with {i} for the layer; `path` into the nnx state; `inputs` > 0 marks a linear weight
    whose kernel has that many input axes."""

    hf: str
    path: str
    inputs: int = 0


def _linear(hf: str, path: str, inputs: int = 1, bias: bool = True) -> list[Name]:
    names = [Name(f"{hf}.weight", f"{path}.kernel", inputs)]
    return [*names, Name(f"{hf}.bias", f"{path}.bias")] if bias else names


def _norm(hf: str, path: str, bias: bool = True) -> list[Name]:
    names = [Name(f"{hf}.weight", f"{path}.scale")]
    return [*names, Name(f"{hf}.bias", f"{path}.bias")] if bias else names


def _merger(hf: str, path: str) -> list[Name]:
    return [
        *_norm(f"{hf}.norm", f"{path}.norm"),
        *_linear(f"{hf}.linear_fc1", f"{path}.fc1"),
        *_linear(f"{hf}.linear_fc2", f"{path}.fc2"),
    ]


_BLOCK, _LAYER = "model.visual.blocks.{i}", "model.language_model.layers.{i}"
_TEXT = "language_model.layers"
TABLE: tuple[Name, ...] = (
    *_linear("model.visual.patch_embed.proj", "visual.patch_embed"),
    Name("model.visual.pos_embed.weight", "visual.pos_embed"),
    *_norm(f"{_BLOCK}.norm1", "visual.blocks.norm1"),
    *_norm(f"{_BLOCK}.norm2", "visual.blocks.norm2"),
    *_linear(f"{_BLOCK}.attn.qkv", "visual.blocks.qkv"),
    *_linear(f"{_BLOCK}.attn.proj", "visual.blocks.proj", inputs=2),
    *_linear(f"{_BLOCK}.mlp.linear_fc1", "visual.blocks.fc1"),
    *_linear(f"{_BLOCK}.mlp.linear_fc2", "visual.blocks.fc2"),
    *_merger("model.visual.merger", "visual.merger"),
    *_merger("model.visual.deepstack_merger_list.{i}", "visual.deepstack_mergers"),
    Name("model.language_model.embed_tokens.weight", "language_model.embed_tokens"),
    *_linear(f"{_LAYER}.self_attn.q_proj", f"{_TEXT}.q_proj", bias=False),
    *_linear(f"{_LAYER}.self_attn.k_proj", f"{_TEXT}.k_proj", bias=False),
    *_linear(f"{_LAYER}.self_attn.v_proj", f"{_TEXT}.v_proj", bias=False),
    *_linear(f"{_LAYER}.self_attn.o_proj", f"{_TEXT}.o_proj", inputs=2, bias=False),
    *_norm(f"{_LAYER}.self_attn.q_norm", f"{_TEXT}.q_norm", bias=False),
    *_norm(f"{_LAYER}.self_attn.k_norm", f"{_TEXT}.k_norm", bias=False),
    *_linear(f"{_LAYER}.mlp.gate_proj", f"{_TEXT}.gate_proj", bias=False),
    *_linear(f"{_LAYER}.mlp.up_proj", f"{_TEXT}.up_proj", bias=False),
    *_linear(f"{_LAYER}.mlp.down_proj", f"{_TEXT}.down_proj", bias=False),
    *_norm(f"{_LAYER}.input_layernorm", f"{_TEXT}.input_norm", bias=False),
    *_norm(f"{_LAYER}.post_attention_layernorm", f"{_TEXT}.post_attention_norm", bias=False),
    *_norm("model.language_model.norm", "language_model.norm", bias=False),
    Name("lm_head.weight", "lm_head"),
)

# Prefixes that other tools' exports use, tried in order.
ALIASES: tuple[tuple[str, str], ...] = (
    (r"^visual\.", "model.visual."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)


def canonical_name(name: str) -> str:
    """The name in published checkpoints of a tensor that another tool may call otherwise."""
    for pattern, replacement in ALIASES:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


Read = Callable[[str, tuple[slice, ...]], np.ndarray]
"""(name of a Hugging Face tensor, slices of it, perhaps fewer than it has axes) -> that part."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the port, and the Hugging Face tensors that it is made of."""

    path: str
    """Into the nnx state, such as "visual.blocks.qkv.kernel"."""
    names: tuple[str, ...]
    """Of the tensors: one, or one for each layer."""
    stacked: bool
    """Whether there is a leading layer axis."""
    inputs: int
    """Input axes of a linear weight, else 0."""
    shape: tuple[int, ...]
    """Of one layer in the port."""
    hf_shape: tuple[int, ...]
    """Of one tensor at Hugging Face."""

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """One layer as Hugging Face shapes it."""
        if self.inputs:
            matrix = value.reshape(math.prod(self.shape[: self.inputs]), -1)
            value = np.empty(matrix.shape[::-1], matrix.dtype)
            _transpose(matrix, value)
        return value.reshape(self.hf_shape)

    def read(self, index: Sequence[slice], out: np.ndarray, read: Read) -> None:
        """Fill `out` with the part `index` of this parameter (layer axis included, if stacked).

        Only that part is asked of `read`, whatever the transposition between the two layouts.
        """
        ranges = [range(*s.indices(n)) for s, n in zip(index, self._whole(), strict=True)]
        layers, own = (ranges[0], ranges[1:]) if self.stacked else (range(1), ranges)
        for i, layer in enumerate(layers):
            target = out[i] if self.stacked else out
            self._read_one(self.names[layer], own, target, read)

    def _whole(self) -> tuple[int, ...]:
        return (len(self.names), *self.shape) if self.stacked else self.shape

    def _read_one(self, name: str, own: list[range], out: np.ndarray, read: Read) -> None:
        if not self.inputs:
            if self.shape == self.hf_shape:
                out[...] = read(name, tuple(slice(r.start, r.stop) for r in own))
            else:  # A bias: flat at Hugging Face.
                parts = [read(name, (s,)) for s in _spans(self.shape, own)]
                out[...] = np.concatenate(parts).reshape(out.shape)
            return
        inputs, outputs = own[: self.inputs], own[self.inputs :]
        columns = _spans(self.shape[: self.inputs], inputs)
        rows = _spans(self.shape[self.inputs :], outputs)
        # The patch embedding has more axes than two: of it, whole rows are read.
        flat = len(self.hf_shape) == 2
        bands = []
        for row in rows:
            if flat:
                bands.append([read(name, (row, column)) for column in columns])
            else:
                band = read(name, (row,)).reshape(row.stop - row.start, -1)
                bands.append([band[:, column] for column in columns])
        block = bands[0][0] if len(bands) == len(columns) == 1 else np.block(bands)
        _transpose(block, out.reshape(block.shape[::-1]))


def _transpose(matrix: np.ndarray, out: np.ndarray, band: int = 64) -> None:
    """out = matrix.T, in bands that fit a cache: three times as fast as at once."""
    for i in range(0, len(matrix), band):
        out[:, i : i + band] = matrix[i : i + band].T


def _spans(shape: Sequence[int], parts: Sequence[range]) -> list[slice]:
    """The part of an array of `shape`, as slices of the flattened array, in its order."""
    whole = [len(r) == n for r, n in zip(parts, shape, strict=True)]
    cut = next((k for k in reversed(range(len(shape))) if not whole[k]), 0)
    inner = math.prod(shape[cut + 1 :])
    strides = [math.prod(shape[k + 1 :]) for k in range(cut)]
    spans = []
    for outer in itertools.product(*parts[:cut]):
        base = sum(i * stride for i, stride in zip(outer, strides, strict=True))
        start = base + parts[cut].start * inner
        spans.append(slice(start, start + len(parts[cut]) * inner))
    return spans


def flat_state(state: nnx.State) -> dict[str, Any]:
    """State as {"visual.blocks.qkv.kernel": variable}."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def parameters(config: Qwen3VLConfig, shapes: dict[str, tuple[int, ...]]) -> list[Parameter]:
    """All parameters of a model in the order of files; shapes: by path, layer axis included.

    A tied head is no parameter.
    """
    out = []
    for entry in TABLE:
        if entry.path not in shapes:
            continue
        shape = shapes[entry.path]
        stacked = "{i}" in entry.hf
        names = [entry.hf.format(i=i) for i in range(shape[0])] if stacked else [entry.hf]
        one = tuple(shape[1:] if stacked else shape)
        hf_shape = _hf_shape(config, entry, one)
        out.append(Parameter(entry.path, tuple(names), stacked, entry.inputs, one, hf_shape))
    return out


def _hf_shape(config: Qwen3VLConfig, entry: Name, shape: tuple[int, ...]) -> tuple[int, ...]:
    if entry.path == "visual.patch_embed.kernel":
        v = config.vision
        return (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    if entry.inputs:
        return (math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs]))
    return (math.prod(shape),) if entry.path.endswith("bias") else shape
