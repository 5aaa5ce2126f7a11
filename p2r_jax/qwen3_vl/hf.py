"""Hugging Face checkpoints, both ways, from one table of names.

A parameter of the port is one Hugging Face tensor, or one per layer stacked on a leading axis.
`linear` weights are (out, in) there and (*in, *out) here; everything else is a reshape. Square
matrices make a forgotten transpose pass every shape check, so nothing here guesses.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.flax import save_file

from p2r_jax.ops.kernels import Implementation, Kernels
from p2r_jax.parallel.mesh import parameter_shardings
from p2r_jax.parallel.multihost import is_main, put, to_host
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.model import Qwen3VL

MAX_SHARD_BYTES = 5 * 10**9


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
    for pattern, replacement in ALIASES:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def _shapes(config: Qwen3VLConfig, entry: Name, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor for one (unstacked) parameter of the given shape."""
    if entry.path == "visual.patch_embed.kernel":
        v = config.vision
        return (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    if entry.inputs:
        return (
            int(np.prod(shape[entry.inputs :])),
            int(np.prod(shape[: entry.inputs])),
        )
    return (int(np.prod(shape)),) if entry.path.endswith("bias") else shape


def _to_port(entry: Name, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if entry.inputs:
        tensor = tensor.reshape(tensor.shape[0], -1).T
    return tensor.reshape(shape)


def _to_hf(entry: Name, value: jax.Array, hf_shape: tuple[int, ...]) -> jax.Array:
    if entry.inputs:
        value = value.reshape(int(np.prod(value.shape[: entry.inputs])), -1).T
    return value.reshape(hf_shape)


def _entries(
    config: Qwen3VLConfig, state: dict[str, Any]
) -> Iterator[tuple[Name, list[str], tuple[int, ...], tuple[int, ...]]]:
    """(entry, Hugging Face names, shape of one, Hugging Face shape of one) per parameter."""
    for entry in TABLE:
        if entry.path not in state:
            continue
        shape = tuple(state[entry.path].shape)
        stacked = "{i}" in entry.hf
        names = [entry.hf.format(i=i) for i in range(shape[0])] if stacked else [entry.hf]
        one = shape[1:] if stacked else shape
        yield entry, names, one, _shapes(config, entry, one)


def _flat(state: nnx.State) -> dict[str, Any]:
    """State as {"visual.blocks.qkv.kernel": variable}."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


class _Folder:
    """Tensors of one or several safetensors files by canonical name, read lazily."""

    def __init__(self, path: Path):
        files = sorted(path.glob("*.safetensors"))
        index = path / "model.safetensors.index.json"
        if index.is_file():
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path / name for name in wanted]
            gone = [str(f) for f in files if not f.is_file()]
            if gone:
                raise FileNotFoundError(f"{index} names files that do not exist: {gone}")
        if not files:
            other = [f.name for f in path.glob("*.bin")]
            hint = f" (pickle files such as {other[0]} are refused)" if other else ""
            raise FileNotFoundError(f"{path} holds no .safetensors files{hint}")
        self.where: dict[str, tuple[Any, str]] = {}
        for file in files:
            handle = safe_open(file, framework="flax")
            for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                canonical = canonical_name(name)
                if canonical in self.where:
                    raise ValueError(
                        f"{file} holds {name}, but {canonical} was read before: the same tensor "
                        "is there twice (files of two exports in one folder?)"
                    )
                self.where[canonical] = (handle, name)

    def shape(self, name: str) -> tuple[int, ...]:
        handle, own = self.where[name]
        return tuple(handle.get_slice(own).get_shape())

    def read(self, name: str) -> np.ndarray:
        handle, own = self.where[name]
        return np.asarray(handle.get_tensor(own))


def abstract_model(config: Qwen3VLConfig, kernels: Kernels | None = None) -> Qwen3VL:
    """The module tree with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Qwen3VL(config, nnx.Rngs(0), kernels))


def load_pretrained(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = "bfloat16",
    kernels: Implementation | Literal["auto"] = "auto",
) -> Qwen3VL:
    """Load a Hugging Face Qwen3-VL folder (one safetensors file or a sharded index).

    mesh: where to place parameters (see `parallel.mesh`); None = the default device.
    dtype: of all parameters. kernels: attention, see `ops.kernels`. Raises FileNotFoundError for a
    missing folder or file and ValueError listing every missing, unexpected and mis-shaped tensor
    at once.
    """
    path = Path(path)
    config = Qwen3VLConfig.from_pretrained(path)
    folder = _Folder(path)
    graph, state = nnx.split(abstract_model(config, Kernels.choose(kernels, mesh)))
    flat = _flat(state)
    entries = list(_entries(config, flat))

    expected = {name: shape for _, names, _, shape in entries for name in names}
    extra = set(folder.where) - set(expected)
    embedding = "model.language_model.embed_tokens.weight"
    written_twice = {"lm_head.weight", embedding} <= folder.where.keys()
    # Some tools write the tied head a second time; harmless only if it is the same matrix.
    if (
        config.tie_word_embeddings
        and written_twice
        and np.array_equal(folder.read("lm_head.weight"), folder.read(embedding))
    ):
        extra.discard("lm_head.weight")
    problems = [f"missing: {n}" for n in sorted(set(expected) - set(folder.where))]
    problems += [f"unexpected: {n}" for n in sorted(extra)]
    problems += [
        f"shape of {n}: {folder.shape(n)} in the file, {s} in config.json"
        for n, s in expected.items()
        if n in folder.where and folder.shape(n) != s
    ]
    if problems:
        more = [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        shown = "\n  ".join(problems[:40] + more)
        raise ValueError(f"{path} does not match its config.json ({len(problems)}):\n  {shown}")

    shardings = _flat(parameter_shardings(state, mesh)) if mesh is not None else {}
    for entry, names, one, _ in entries:
        tensors = [_to_port(entry, folder.read(name), one) for name in names]
        value = np.stack(tensors) if "{i}" in entry.hf else tensors[0]
        value = value.astype(jnp.dtype(dtype))
        where = shardings[entry.path].get_value() if mesh is not None else None
        flat[entry.path].set_value(put(value, where))
    model = nnx.merge(graph, state)
    model.name_or_path = str(path)
    return model


CARRIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What a checkpoint folder holds besides weights and config.json."""


def save_pretrained(
    model: Qwen3VL,
    path: str | Path,
    *,
    files_from: str | Path | None = None,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers loads: safetensors shards, index, config (4.57 form).

    files_from: a checkpoint folder whose tokenizer, chat template, processor and generation files
    are carried along. Written beside the target and renamed, so a killed export never looks whole.
    Raises FileExistsError if `path` exists.
    """
    path = Path(path)
    if not is_main():
        # Every tensor is gathered by all processes; one of them writes.
        _write(model, None, jnp.dtype(dtype), max_shard_bytes)
        return
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another folder or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write(model, temporary, jnp.dtype(dtype), max_shard_bytes)
        if files_from is not None:
            for file in sorted(Path(files_from).iterdir()):
                if file.name in CARRIED_FILES:
                    shutil.copyfile(file, temporary / file.name)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(model: Qwen3VL, folder: Path | None, dtype: Any, max_shard_bytes: int) -> None:
    """folder: None on a process that only takes part in gathering."""
    flat = _flat(nnx.state(model, nnx.Param))
    shards: list[dict[str, Any]] = [{}]
    size = total = 0
    for entry, names, _, hf_shape in _entries(model.config, flat):
        value = flat[entry.path].get_value()
        for i, name in enumerate(names):
            one = value[i] if "{i}" in entry.hf else value
            # A NumPy transpose is a strided view, whose bytes safetensors would write in the wrong
            # order; a JAX array is always dense.
            tensor = jnp.asarray(_to_hf(entry, one, hf_shape), dtype)
            if jax.process_count() > 1:
                tensor = to_host(tensor)
            if folder is None:
                continue
            if size + tensor.nbytes > max_shard_bytes and shards[-1]:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
    if folder is None:
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = json.dumps(model.config.to_hf(str(dtype)), indent=2)
    (folder / "config.json").write_text(config + "\n")
