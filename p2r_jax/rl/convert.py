"""Weights to and from Hugging Face folders: `p2r convert`."""

from __future__ import annotations

import functools
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from rich.console import Console

from p2r_jax.paths import as_path, files_in
from p2r_jax.qwen3_vl.arrays import array_types, array_types_of, restore_array, restore_arrays
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.export import export
from p2r_jax.qwen3_vl.hf import (
    ARRAYS,
    abstract_model,
    check_contents,
    convert_to_arrays,
)
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.names import flat_state
from p2r_jax.rl.best import ranked, scores_of
from p2r_jax.rl.checkpointing import PARAMS, SavedWeights
from p2r_jax.rl.model_card import Exported


def from_hf(source: str | Path, out: str | Path, dtype: str = "bfloat16") -> None:
    """Hugging Face folder to one with JAX arrays, in parts that hosts read on their own.

    Raises ValueError or OSError before anything is written, or leaving nothing behind.
    """
    console, begin = _console(), time.perf_counter()
    source, out = locate_checkpoint(source), as_path(out)
    if (source / ARRAYS).is_dir():
        raise ValueError(f"{source} was converted already: give it to --model.path as it is")
    convert_to_arrays(source, out, dtype, progress=True)
    _report(out, begin, console)


def to_hf(
    source: str | Path,
    out: str | Path,
    dtype: str = "bfloat16",
    step: int | Literal["best", "last"] | None = None,
    files_from: str | Path | None = None,
) -> None:
    """The weights of a run, one of its checkpoints or a converted folder, for transformers.

    Reads one parameter at a time, and nothing of the optimizer. step: of a run, or its best one by
    its own evaluations; default, the last, its newest checkpoint. files_from: the checkpoint that
    the run started from, if it is no longer where it was. Raises ValueError or OSError naming what
    cannot be used.
    """
    console, begin = _console(), time.perf_counter()
    source, out = as_path(source), as_path(out)
    files_from = as_path(files_from) if files_from else None
    saved = SavedWeights.find(source, step)
    converted = source / ARRAYS
    readme = None
    if saved is not None:
        folder, base, readme = saved.folder, files_from or _base(saved), card_of(saved)
        console.print(f"weights of step {saved.step}; config and tokenizer of {base}")
        found = array_types(folder, (PARAMS,))
    elif converted.is_dir() and step is None:
        folder, base = converted, files_from or source
        found = array_types_of(folder)
    else:
        raise ValueError(
            f"{source} is neither a run folder, nor one of its checkpoints, nor a folder that "
            "`p2r convert from-hf` wrote" + (" (which has no --step)" if step is not None else "")
        )
    config = Qwen3VLConfig.from_pretrained(base)
    flat = flat_state(nnx.state(abstract_model(config), nnx.Param))
    shapes = {name: tuple(x.shape) for name, x in flat.items()}
    check_contents(folder, shapes, {name: x.shape for name, x in found.items()}, str(base))
    device = SingleDeviceSharding(jax.local_devices()[0])

    @functools.lru_cache(maxsize=1)
    def value(name: str) -> jax.Array:
        like = jax.ShapeDtypeStruct(shapes[name], found[name].dtype, sharding=device)
        if saved is None:
            return restore_array(folder, name, like)
        return restore_arrays(folder, {name: like}, (PARAMS,))[name]

    export(config, shapes, value, out, files_from=base, dtype=dtype, progress=True, readme=readme)
    _report(out, begin, console)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False)


def _base(saved: SavedWeights) -> Path:
    try:
        return locate_checkpoint(saved.model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the run started from {saved.model}, which is not there: name the folder that holds "
            "its config.json and tokenizer with --files_from"
        ) from error


def card_of(saved: SavedWeights) -> str:
    """README.md of a checkpoint's weights."""
    record, meta = saved.record or {"metric": None, "scores": []}, saved.meta
    scores = ranked(scores_of(record))
    score = next((score for score in scores if score.step == saved.step), None)
    return Exported(
        meta["settings"],
        (meta.get("data") or {}).get("steps of each phase", ()),
        saved.step,
        meta["progress"]["phase"],
        record["metric"],
        score,
        len(scores) if score is not None and score == scores[0] else None,
    ).card()


def _report(out: Path, begin: float, console: Console) -> None:
    size = sum(files_in(out).values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    console.print(
        f"wrote {out}: {size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s; "
        f"peak memory of this process {peak / 2**30:.2f} GiB"
    )
