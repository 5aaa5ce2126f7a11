"""A published size with random weights: import, every stage against transformers, export.

    python -m tests.benchmarks.full_size --size 2B           # about 16 GiB of memory, 13 GB of disk
    python -m tests.benchmarks.full_size --size tiny         # the same steps in a minute
    python -m tests.benchmarks.full_size --size 2B --folder /big/disk --keep

Steps, each a process of its own, so that neither both float32 models are in memory at once nor one
step's memory counts for another:

    make         transformers writes a random bfloat16 checkpoint in shards (norms and biases
                 perturbed)
    theirs       transformers in float32, eager attention: every stage of one prompt with two images
    ours         the same by us, from the same files, and the differences
    import       load_pretrained in bfloat16: seconds and peak memory
    export       save_pretrained in bfloat16: seconds and peak memory
    files        every exported tensor against the file it came from, bit by bit
    load back    transformers on both checkpoints: the same logits, bit by bit

Ends with exit code 1 if a gate fails: a stage's relative L2, a tensor or logit that is not the
same, or import or export needing more memory than the parameters, 1.5 times the largest tensor and
1 GiB. What counts is anonymous memory of the whole process, Python and its packages included; the
resident size also holds mapped pages of the checkpoint, as many as the machine has room for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.sizes import SIZES, hf_config

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

GIB = 2**30
MAX_SHARD_BYTES = {"tiny": 40 * 10**6}
"""Otherwise 2 GB: several files of each size."""
STAGE_GATE = 3e-6
"""Relative L2 of every stage and of the logits in float32, as in the parity tests. Through 2B it
grows from 1.1e-6 (vision) to 2.0e-6 (logits); a wrong epsilon, the smallest mistake that the parity
tests know, makes 6.6e-6."""


# --- steps ------------------------------------------------------------------------------------


def shard_bytes(size: str) -> int:
    return MAX_SHARD_BYTES.get(size, 2 * 10**9)


def make(folder: Path, size: str) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(**hf_config(size))
    model = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "source", max_shard_size=shard_bytes(size))
    files = sorted(file.name for file in (folder / "source").glob("*.safetensors"))
    sizes = [parameter.numel() for parameter in model.parameters()]
    return {"files": files, "parameters": sum(sizes), "tensors": len(sizes)}


def inputs_of(size: str) -> dict[str, np.ndarray]:
    """One row: text, an image of 512 by 512, text, a small and flat one, text."""
    config = hf_config(size)
    rng = np.random.default_rng(0)
    grid = np.array([[1, 32, 32], [1, 6, 14]])
    start, end, image = (
        config[name] for name in ("vision_start_token_id", "vision_end_token_id", "image_token_id")
    )
    first, second = ([start, *[image] * int(n), end] for n in grid.prod(1) // 4)
    words = [rng.integers(0, 150_000, n).tolist() for n in (8, 20, 12)]
    ids = np.array([[*words[0], *first, *words[1], *second, *words[2]]])
    pixels = rng.uniform(-1, 1, (grid.prod(1).sum(), 1536)).astype(np.float32)
    return {"ids": ids, "pixels": pixels, "grid": grid, "visual": ids == image}


def torch_model(path: Path, dtype: str) -> tuple[Any, Callable[[Any], Any]]:
    """transformers' model, and its forward pass on the inputs of a size."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()

    def run(inputs: dict[str, np.ndarray]) -> Any:
        with torch.no_grad():
            return model(
                input_ids=torch.tensor(inputs["ids"]),
                attention_mask=torch.ones(inputs["ids"].shape, dtype=torch.long),
                mm_token_type_ids=torch.tensor(inputs["visual"]).int(),
                pixel_values=torch.tensor(inputs["pixels"]),
                image_grid_thw=torch.tensor(inputs["grid"]),
                use_cache=True,
            )

    return model, run


def theirs(folder: Path, size: str) -> dict[str, Any]:
    import torch

    model, run = torch_model(folder / "source", "float32")
    inputs = inputs_of(size)
    with torch.no_grad():
        pixels, grid = torch.tensor(inputs["pixels"]), torch.tensor(inputs["grid"])
        vision = model.model.visual(pixels, grid, return_dict=True)
    begin = time.perf_counter()
    out = run(inputs)
    seconds = time.perf_counter() - begin
    of_layers = lambda kind: np.stack(
        [getattr(layer, kind)[0].transpose(0, 1).numpy() for layer in out.past_key_values.layers]
    )
    np.savez(
        folder / "theirs.npz",
        visual=vision.pooler_output.numpy(),
        deepstack=torch.stack(list(vision.deepstack_features)).numpy(),
        keys=of_layers("keys"),
        values=of_layers("values"),
        logits=out.logits[0].numpy(),
    )
    return {"forward": seconds}


def ours(folder: Path, size: str) -> dict[str, Any]:
    """Stages of our forward pass and how far they are from theirs."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from p2r_jax.qwen3_vl import load_pretrained
    from p2r_jax.qwen3_vl.model import prompts_from_hf

    model = load_pretrained(folder / "source", dtype="float32")
    inputs = inputs_of(size)
    ids = inputs["ids"]
    prompts = prompts_from_hf(
        model.config, ids, np.ones_like(ids), inputs["pixels"], inputs["grid"]
    )
    graph, params = nnx.split(model, nnx.Param)

    @functools.partial(jax.jit, static_argnames="graph")
    def stages(graph: nnx.GraphDef, params: nnx.State, prompts: Any) -> dict[str, jax.Array]:
        model = nnx.merge(graph, params)
        visual, deepstack = model.visual(prompts.patches)
        hidden, (keys, values) = model.language_model(
            model.embed(prompts.tokens, visual, prompts.visual_slot),
            prompts.positions,
            lambda q, k, v, _: (model.kernels.causal(q, k, v, prompts.valid), (k, v)),
            deepstack=deepstack,
            visual_slot=prompts.visual_slot,
        )
        logits = jnp.einsum("bse,ve->bsv", hidden, model.unembedding)
        return {
            "visual": visual[0],
            "deepstack": deepstack[:, 0],
            "keys": keys[:, 0],
            "values": values[:, 0],
            "logits": logits[0],
        }

    compiled = stages.lower(graph, params, prompts).compile()
    begin = time.perf_counter()
    own = jax.block_until_ready(compiled(params, prompts))
    seconds = time.perf_counter() - begin
    table = []
    with np.load(folder / "theirs.npz") as file:
        for name in ("visual", "deepstack", "keys", "values", "logits"):
            actual, expected = np.asarray(own[name]), file[name]
            several = name in ("deepstack", "keys", "values")
            pairs = zip(actual, expected, strict=True) if several else [(actual, expected)]
            rows = [(f"{name} {i}" if several else name, *apart(*p)) for i, p in enumerate(pairs)]
            table += rows
        same = np.argmax(own["logits"], -1) == np.argmax(file["logits"], -1)
    return {"stages": table, "forward": seconds, "argmax equal": float(np.mean(same))}


def apart(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Relative L2 and the largest difference."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {actual.shape} and {expected.shape}")
    difference = np.subtract(actual, expected, dtype=np.float64)
    norm = np.linalg.norm(expected.astype(np.float64))
    return float(np.linalg.norm(difference) / norm), float(np.abs(difference).max())


def import_(folder: Path, size: str) -> dict[str, Any]:
    from p2r_jax.qwen3_vl import load_pretrained

    with watched() as memory:
        model = load_pretrained(folder / "source", dtype="bfloat16")
    return memory | bound(model)


def export(folder: Path, size: str) -> dict[str, Any]:
    from p2r_jax.qwen3_vl import load_pretrained, save_pretrained

    model = load_pretrained(folder / "source", dtype="bfloat16")
    with watched() as memory:
        save_pretrained(model, folder / "export", max_shard_bytes=shard_bytes(size))
    return memory | bound(model)


def bound(model: Any) -> dict[str, int]:
    """What import and export of a model may need, and what that is made of; bytes."""
    from flax import nnx

    leaves = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    parameters = sum(leaf.get_value().nbytes for leaf in leaves.values())
    # Only the embedding and the head are not stacks of several tensors, and they are the largest.
    largest = model.unembedding.nbytes
    return {
        "parameters": parameters,
        "largest": largest,
        "bound": int(parameters + 1.5 * largest + GIB),
    }


def files(folder: Path, size: str) -> dict[str, Any]:
    """Names of tensors that the export lacks, has besides, or holds other bits of."""
    import torch

    source, exported = tensors_of(folder / "source"), tensors_of(folder / "export")
    wrong = [f"missing: {name}" for name in sorted(source.keys() - exported.keys())]
    wrong += [f"besides: {name}" for name in sorted(exported.keys() - source.keys())]
    for name in sorted(source.keys() & exported.keys()):
        before, after = (side[name]() for side in (source, exported))
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            wrong.append(f"{name}: {before.dtype} {before.shape}, {after.dtype} {after.shape}")
        elif not torch.equal(before.view(torch.int16), after.view(torch.int16)):
            wrong.append(f"{name}: other bits")
    names = sorted(file.name for file in (folder / "export").glob("*.safetensors"))
    return {"compared": len(source), "wrong": wrong, "files": names}


def tensors_of(path: Path) -> dict[str, Callable[[], Any]]:
    """Readers of the tensors in a folder's files, by name."""
    from safetensors import safe_open

    handles = [safe_open(file, "pt") for file in sorted(path.glob("*.safetensors"))]
    return {
        name: functools.partial(handle.get_tensor, name)
        for handle in handles
        for name in handle.keys()  # noqa: SIM118 (safe_open is not a mapping)
    }


def load_back(folder: Path, size: str) -> dict[str, Any]:
    import torch

    inputs, logits = inputs_of(size), []
    for name in ("source", "export"):
        model, run = torch_model(folder / name, "bfloat16")
        logits.append(run(inputs).logits)
        del model, run
    unequal = int((logits[0].view(torch.int16) != logits[1].view(torch.int16)).sum())
    return {"logits": logits[0].numel(), "unequal": unequal}


STEPS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "make": make,
    "theirs": theirs,
    "ours": ours,
    "import": import_,
    "export": export,
    "files": files,
    "load back": load_back,
}


# --- memory -----------------------------------------------------------------------------------


def status() -> dict[str, int]:
    """Bytes by name of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Time and memory of what runs inside: bytes resident before it and at most, and the anonymous
    part of that, which is sampled."""
    # The kernel's own high-water mark starts anew, where it lets us.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    memory: dict[str, float] = {"before": status()["VmRSS"], "anonymous": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            memory["anonymous"] = max(memory["anonymous"], status()["RssAnon"])

    thread = threading.Thread(target=sample)
    thread.start()
    begin = time.perf_counter()
    try:
        yield memory
    finally:
        memory["seconds"] = time.perf_counter() - begin
        done.set()
        thread.join()
        memory["resident"] = status()["VmHWM"]


# --- the report -------------------------------------------------------------------------------


def report(results: dict[str, dict[str, Any]]) -> list[str]:
    """Print what was found; returns the gates that failed."""
    failed = []
    own, other = results["ours"], results["theirs"]
    print(f"\n{'stage':14} {'relative L2':>12} {'max |delta|':>12}")
    for name, relative, largest in own["stages"]:
        wrong = not relative <= STAGE_GATE
        print(f"{name:14} {relative:12.1e} {largest:12.1e}{' <-- too far' * wrong}")
        failed += [f"{name}: relative L2 {relative:.1e} > {STAGE_GATE:.0e}"] * wrong
    print(
        f"greedy tokens equal: {own['argmax equal']:.1%}; a forward pass: {own['forward']:.1f} s, "
        f"transformers {other['forward']:.1f} s"
    )
    for name in ("import", "export"):
        cost = results[name]
        shown = {key: f"{cost[key] / GIB:.2f}" for key in cost}
        fits = cost["anonymous"] <= cost["bound"]
        print(
            f"{name}: {cost['seconds']:.1f} s; at most {shown['anonymous']} GiB, "
            f"{'within' if fits else 'MORE THAN'} the bound {shown['bound']} (parameters "
            f"{shown['parameters']} + 1.5 x {shown['largest']} + 1); resident {shown['resident']} "
            f"with mapped files, {shown['before']} before"
        )
        failed += [f"{name} needs {shown['anonymous']} GiB"] * (not fits)
    compared = results["files"]
    print(
        f"files: {compared['compared']} tensors compared, {len(compared['wrong'])} wrong; "
        f"{len(compared['files'])} files"
    )
    failed += compared["wrong"]
    back = results["load back"]
    print(f"load back: {back['unequal']} of {back['logits']:,} bfloat16 logits differ")
    failed += [f"{back['unequal']} logits differ"] * (back["unequal"] > 0)
    return failed


def run_steps(folder: Path, size: str) -> dict[str, dict[str, Any]]:
    """Every step in a process of its own."""
    results: dict[str, dict[str, Any]] = {}
    for name in STEPS:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "tests.benchmarks.full_size", "--step", name]
        command += ["--size", size, "--folder", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"step {name!r} failed with exit code {done.returncode}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2B", choices=SIZES)
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default, a temporary one")
    parser.add_argument("--keep", action="store_true", help="the checkpoints are not removed")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step](args.folder, args.size)))
        return
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="full_size_", dir=args.folder))
    try:
        failed = report(run_steps(folder, args.size))
    finally:
        if args.keep:
            print(f"kept in {folder}")
        else:
            shutil.rmtree(folder)
    for line in failed[:40]:
        print(f"FAILED {line}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
