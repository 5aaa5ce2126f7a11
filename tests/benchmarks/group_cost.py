"""What a group of G completions costs beyond its prompt: ours against repeating the prompt.

    python -m tests.benchmarks.group_cost                 # the whole grid, about an hour on 2 cores
    python -m tests.benchmarks.group_cost --quick         # P 1024, R 32, G 8 and 16
    python -m tests.benchmarks.group_cost --tail          # continuous batching on a length mix
    python -m tests.benchmarks.group_cost --flops         # no run: FLOPs of the update over ideal
    python -m tests.benchmarks.group_cost --tunix PYTHON  # a text-only step; see tunix_step

One process, the same float32 weights, alternating, best of several; ratios are theirs ÷ ours.
P prompt tokens (almost all of one image), R new tokens, no stop token, G completions.

    copies     transformers on the prompt repeated G times, as TRL calls it  ÷ engine
    generate   transformers, `num_return_sequences=G` (one vision pass)      ÷ engine
    rollout    our engine on the prompt repeated G times                     ÷ engine
    update     gradient on the prompt repeated G times                ÷ shared-prefix gradient
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from p2r_jax.config import LossConfig
from p2r_jax.parallel.flops import matmul_flops
from p2r_jax.qwen3_vl import Qwen3VLConfig, load_pretrained
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.inputs import Patches, Prompts, patch_layout, token_layout
from p2r_jax.qwen3_vl.published import published
from p2r_jax.rl.step import Objective, TrainingBatch, batch_loss
from p2r_jax.rollout.generate import Schedule, generate
from p2r_jax.rollout.sampling import Sampling, Vocabulary

IMAGE, VIDEO, START, END, TEXT = 2040, 2041, 2042, 2043, 32
SIZES = {"layers": 6, "hidden": 512, "mlp": 1536, "heads": 4, "kv_heads": 2, "head_dim": 128}
VOCABULARY = 2048
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": VOCABULARY,
        "hidden_size": SIZES["hidden"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "head_dim": SIZES["head_dim"],
        "intermediate_size": SIZES["mlp"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rope_scaling": {
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
            "rope_type": "default",
        },
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "hidden_act": "gelu_pytorch_tanh",
        "depth": 3,
        "hidden_size": 256,
        "num_heads": 4,
        "intermediate_size": 1024,
        "out_hidden_size": SIZES["hidden"],
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 256,
        "patch_size": 4,
    },
}


# --- inputs -----------------------------------------------------------------------------------


def grid_of(visual_tokens: int) -> tuple[int, int]:
    """Patches (rows, columns) of an image with that many visual tokens, near square."""
    rows = next(n for n in range(int(visual_tokens**0.5), 0, -1) if visual_tokens % n == 0)
    return 2 * rows, 2 * visual_tokens // rows


def make_prompts(config: Qwen3VLConfig, prompt: int, rows: int, images: bool = True) -> Prompts:
    """`rows` prompts of exactly `prompt` tokens: TEXT text tokens and one image, or text alone."""
    rng = np.random.default_rng(0)
    visual = prompt - TEXT - 2 if images else 0
    grids = [[grid_of(visual)]] * rows if images else [[]] * rows
    words = rng.integers(0, 2000, (rows, prompt))
    tokens = [
        np.concatenate([[START], [config.image_token_id] * visual, [END], own[:TEXT]])
        if images
        else own
        for own in words
    ]
    for own in tokens if images else []:
        own[0], own[visual + 1] = config.vision_start_token_id, config.vision_end_token_id
    fields = jax.device_put(token_layout(tokens, grids, config, prompt, pad_token_id=0))
    if not images:
        return Prompts(patches=None, **fields)
    layout = patch_layout(grids, config, 4 * visual)
    shape = (rows, 4 * visual, config.vision.patch_dim)
    pixels = rng.uniform(-1, 1, shape).astype(np.float32)
    patches = Patches(pixels=jnp.asarray(pixels), **layout)
    return Prompts(patches=patches, **fields)


def repeat(prompts: Prompts, group: int) -> Prompts:
    """Each prompt `group` times."""
    by_row = lambda x: jnp.repeat(x, group, axis=0)
    out = jax.tree.map(by_row, dataclasses.replace(prompts, positions=prompts.tokens))
    return dataclasses.replace(out, positions=jnp.repeat(prompts.positions, group, axis=1))


def endless(vocabulary: int) -> Vocabulary:
    """Any ordinary token may be drawn, and none ends a completion."""
    allowed = np.arange(vocabulary) < min(2000, vocabulary)
    return Vocabulary(jnp.asarray(allowed), jnp.zeros(vocabulary, bool), jnp.int32(0))


# --- what is timed ----------------------------------------------------------------------------


def our_rollout(model: Any, prompts: Prompts, sampling: Sampling, rows: int) -> Callable[[], Any]:
    graph, params = nnx.split(model, nnx.Param)
    words = endless(VOCABULARY)
    size = prompts.tokens.shape[1]
    return lambda: generate(
        graph, params, lambda numbers: prompts, range(rows), size, words, sampling
    )


def their_rollout(model: Any, prompts: Prompts, sampling: Sampling) -> Callable[[], Any]:
    """`generate`, which runs the vision tower once for each prompt that it is given."""
    assert prompts.patches is not None
    ids = torch.tensor(np.asarray(prompts.tokens)).long()
    pixels = np.asarray(prompts.patches.pixels)
    last = np.asarray(prompts.patches.row_col).max(1) + 1
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.tensor(pixels.reshape(-1, pixels.shape[-1])),
        "image_grid_thw": torch.tensor([[1, int(h), int(w)] for h, w in last]),
    }
    options = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "num_return_sequences": sampling.group,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": sampling.max_new_tokens,
        "suppress_tokens": list(range(2000, VOCABULARY)),
        "pad_token_id": 0,
    }
    return lambda: model.generate(**inputs, **options)


def make_batch(prompts: Prompts, group: int, length: int) -> TrainingBatch:
    rng = np.random.default_rng(0)
    shape = (prompts.tokens.shape[0], group, length)
    return TrainingBatch(
        prompts,
        jnp.asarray(rng.integers(0, 2000, shape), jnp.int32),
        jnp.ones(shape, bool),
        jnp.zeros(shape),
        jnp.asarray(rng.normal(size=shape[:2]), jnp.float32),
    )


def repeated_batch(batch: TrainingBatch) -> TrainingBatch:
    """The same completions, each as the only one of its own copy of the prompt."""
    group = batch.tokens.shape[1]
    flat = lambda x: x.reshape(-1, 1, *x.shape[2:])
    return TrainingBatch(
        repeat(batch.prompts, group),
        flat(batch.tokens),
        flat(batch.mask),
        flat(batch.sampler_log_probs),
        flat(batch.advantages),
    )


def gradient(graph: nnx.GraphDef, allowed: Any, remat: bool = False, dtype: Any = jnp.float32):
    """(params, batch) -> loss and gradient, as in `train_step`, without the reference's KL."""

    def run(params: nnx.State, batch: TrainingBatch):
        loss = lambda params: batch_loss(
            params, graph, batch, allowed, jnp.float32(batch.mask.size),
            objective=Objective(LossConfig(kl_weight=0.0), horizon=batch.tokens.shape[2]),
            freeze_vision=False, remat=remat, dtype=dtype,
        )  # fmt: skip
        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.jit(run)


def best_of(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Seconds, best of `runs`, alternating; each is run once before to compile."""
    for function in functions.values():
        jax.block_until_ready(function())
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(runs):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function())
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


# --- the tables -------------------------------------------------------------------------------


def grid(cells: Sequence[tuple[int, ...]], rows: int, runs: int, remat: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.Qwen3VLConfig(**CONFIG)
        theirs = transformers.Qwen3VLForConditionalGeneration(config).float().eval()
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder, dtype="float32")
    graph, params = nnx.split(ours, nnx.Param)
    step = gradient(graph, endless(VOCABULARY).allowed, remat)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, {rows} prompts, seconds")
    print("    P    R   G |   engine  rollout   copies generate |   update repeated   ")
    for prompt, length, group in cells:
        prompts = make_prompts(ours.config, prompt, rows)
        many = repeat(prompts, group)
        once, whole = Sampling(length), Sampling(length, group)
        batch = make_batch(prompts, group, length)
        copies = repeated_batch(batch)
        took = best_of(
            {
                "engine": our_rollout(ours, prompts, whole, rows),
                "repeated": our_rollout(ours, many, once, rows * group),
                "copies": their_rollout(theirs, many, once),
                "generate": their_rollout(theirs, prompts, whole),
            },
            runs,
        )
        took |= best_of(
            {"update": lambda b=batch: step(params, b), "again": lambda b=copies: step(params, b)},
            runs,
        )
        print(f"{prompt:5} {length:4} {group:3} | " + " ".join(
            f"{took[name]:8.2f}" for name in ("engine", "repeated", "copies", "generate")
        ) + f" | {took['update']:8.2f} {took['again']:8.2f}")  # fmt: skip
        ratios = [took[name] / took["engine"] for name in ("repeated", "copies", "generate")]
        shown = " ".join(f"{ratio:7.1f}x" for ratio in ratios)
        print(
            f"{'÷':>14} | {'':8} {shown} | {'':8} {took['again'] / took['update']:7.1f}x",
            flush=True,
        )


def tail(runs: int) -> None:
    """Tokens/s with all prompts at once, with a queue, and with a queue and narrow columns.

    Lengths are geometric (every token ends a completion with the same probability), so a few
    completions are many times longer than the mean.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.Qwen3VLConfig(**CONFIG)
        transformers.Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder)
        model = load_pretrained(folder, dtype="float32")
    graph, params = nnx.split(model, nnx.Param)
    count, sampling = 48, Sampling(256, group=8)
    prompts = make_prompts(model.config, 256, count)
    words = endless(VOCABULARY)
    stop = np.arange(VOCABULARY) < 50  # of 2000, about equally likely under random weights
    words = dataclasses.replace(words, stop=jnp.asarray(stop))

    def rollout(schedule: Schedule) -> Any:
        def load(numbers: Sequence[int]) -> Prompts:
            rows = jnp.asarray(numbers)
            picked = dataclasses.replace(prompts, positions=prompts.tokens)
            picked = jax.tree.map(lambda x: x[rows], picked)
            return dataclasses.replace(picked, positions=prompts.positions[:, rows])

        return generate(graph, params, load, range(count), 256, words, sampling, schedule)

    rings = (32, 64, 128)
    cases = {
        "batches of 8 prompts, no refill": None,
        "all 48 prompts at once": Schedule(rings=rings),
        "8 slots": Schedule(slots=8, refill=1, rings=rings),
        "16 slots of 4 columns": Schedule(slots=16, columns=4, refill=2, rings=rings),
        "32 slots of 2 columns": Schedule(slots=32, columns=2, refill=4, rings=rings),
    }

    def batches() -> Any:
        out = []
        for start in range(0, count, 8):
            rows = np.arange(start, start + 8)
            picked = dataclasses.replace(prompts, positions=prompts.tokens)
            picked = jax.tree.map(lambda x, rows=rows: x[rows], picked)
            picked = dataclasses.replace(picked, positions=prompts.positions[:, rows])
            alone, load = Schedule(rings=rings), lambda _, p=picked: p
            out.append(generate(graph, params, load, rows, 256, words, sampling, alone))
        return out

    functions = {
        name: batches if schedule is None else (lambda s=schedule: rollout(s))
        for name, schedule in cases.items()
    }
    results = {name: function() for name, function in functions.items()}
    took = best_of(functions, runs)
    parts = results["batches of 8 prompts, no refill"]
    lengths = np.concatenate([part.mask.sum(-1).ravel() for part in parts])
    print(
        f"{lengths.size} completions: mean {lengths.mean():.0f}, "
        f"median {np.median(lengths):.0f}, longest {lengths.max()} tokens"
    )
    print(f"{'':34} {'tokens/s':>9} {'seconds':>8} {'steps':>6} {'occupancy':>10} {'columns':>8}")
    for name, result in results.items():
        whole = result if isinstance(result, list) else [result]
        drawn, steps = sum(r.mask.sum() for r in whole), sum(r.steps for r in whole)
        columns = 64 if name != "all 48 prompts at once" else 8 * count
        print(
            f"{name:34} {drawn / took[name]:9.0f} {took[name]:8.2f} {steps:6} "
            f"{drawn / (steps * columns):10.0%} {columns:8}"
        )


def flops() -> None:
    print(f"{'P':>5} {'R':>4} {'G':>3} {'TFLOP':>8} {'ideal':>8} {'ratio':>6} {'repeated':>9}")
    for prompt, length, group in ((1024, 32, 8), (2048, 64, 8), (2048, 128, 16), (8704, 1024, 8)):
        ours, repeated, ideal = update_flops(prompt, length, group)
        print(
            f"{prompt:5} {length:4} {group:3} {ours / 1e12:8.2f} {ideal / 1e12:8.2f} "
            f"{ours / ideal:6.3f} {repeated / ideal:8.2f}x"
        )


def update_flops(prompt: int, length: int, group: int) -> tuple[float, float, float]:
    """Matrix-product FLOPs of one prompt's update at Qwen3-VL-2B's sizes: ours, with the prompt
    repeated, and the ideal. The first two are counted on the jaxpr.

    The ideal: every weight matrix once for each token that passes it, attention over exactly the
    pairs that may see each other, three times (forward, both gradients); P + G R tokens and one
    vision pass a prompt. Recomputation is left out everywhere.
    """
    config = Qwen3VLConfig.from_hf(published("2B"))
    graph, params = nnx.split(abstract_model(config), nnx.Param)
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    allowed = jax.ShapeDtypeStruct((config.text.vocab_size,), bool)
    batch = abstract(make_batch(make_prompts(config, prompt, 1), group, length))
    run = lambda p, b, a: gradient(graph, a, dtype=jnp.bfloat16)(p, b)
    plain = jax.checkpoint
    jax.checkpoint = lambda f, **_: f  # nothing is computed twice
    try:
        ours, repeated = (
            matmul_flops(run, abstract(params), own, allowed)
            for own in (batch, jax.eval_shape(repeated_batch, batch))
        )
    finally:
        jax.checkpoint = plain
    return ours, repeated, ideal_update_flops(config, prompt, length, group)


def ideal_update_flops(config: Qwen3VLConfig, prompt: int, length: int, group: int) -> float:
    text, vision = config.text, config.vision
    heads = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * heads + 2 * kv + 3 * text.intermediate_size)
    fed = prompt + group * (length - 1)
    # Two products over every pair of a query and a key that it reads.
    own = length - 1
    pairs = prompt * (prompt + 1) / 2 + group * (own * prompt + own * (own + 1) / 2)
    decoder = text.num_hidden_layers * (layer * fed + 2 * heads * pairs)
    head = text.vocab_size * text.hidden_size * group * length
    visual = prompt - TEXT - 2
    patches = visual * vision.merge_unit
    width = vision.hidden_size
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    merged = width * vision.merge_unit
    merger = (1 + len(vision.deepstack_visual_indexes)) * merged * (merged + text.hidden_size)
    tower = vision.depth * (block * patches + 2 * width * patches**2)
    tower += vision.patch_dim * width * patches + merger * visual
    return 2.0 * 3 * (decoder + head + tower)


def against_tunix(python: str, runs: int) -> None:
    """A text-only GRPO step: rollout, reference log-probs and update; tunix repeats the prompt."""
    from p2r_jax.config import OptimizerConfig
    from p2r_jax.rl.optimizer import make_optimizer
    from p2r_jax.rl.step import batch_log_probs, new_state, train_step

    rows, prompt, length, group = 1, 1024, 32, 8
    config = Qwen3VLConfig.from_hf(CONFIG)
    from p2r_jax.qwen3_vl import Qwen3VL

    graph, params = nnx.split(Qwen3VL(config, nnx.Rngs(0)), nnx.Param)
    prompts = make_prompts(config, prompt, rows, images=False)
    words, sampling = endless(VOCABULARY), Sampling(length, group)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    objective = Objective(LossConfig(), horizon=length)
    snapshot = jax.tree.map(jnp.copy, params)
    state = new_state(params, optimizer)

    def step() -> None:
        nonlocal state
        out = generate(graph, state.params, lambda _: prompts, range(rows), prompt, words, sampling)
        batch = dataclasses.replace(
            make_batch(prompts, group, length),
            tokens=jnp.asarray(out.tokens),
            mask=jnp.asarray(out.mask),
            sampler_log_probs=jnp.asarray(out.log_probs),
        )
        reference = batch_log_probs(
            graph, snapshot, batch, words.allowed, objective=objective, dtype=jnp.float32
        )
        batch = dataclasses.replace(batch, reference_log_probs=reference)
        state, metrics = train_step(
            state, (batch,), None, words.allowed,
            graph=graph, optimizer=optimizer, objectives=(objective,),
        )  # fmt: skip
        jax.block_until_ready(metrics)

    ours = best_of({"step": step}, max(runs, 3))["step"]
    command = [python, str(Path(__file__).with_name("tunix_step.py"))]
    command += ["--prompt", str(prompt), "--response", str(length), "--group", str(group)]
    command += [
        "--prompts",
        str(rows),
        "--vocab",
        str(VOCABULARY),
        "--steps",
        str(max(runs, 3) + 1),
    ]
    for name, value in SIZES.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads(printed.strip().splitlines()[-1])
    theirs = min(result["step_seconds"][1:])
    print(f"GRPO step, P {prompt}, R {length}, G {group}, {rows} prompts, text only: tunix "
          f"{theirs:.2f} s, ours {ours:.2f} s, {theirs / ours:.1f}x")  # fmt: skip
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cells", nargs="+", metavar="P,R,G", help="of the grid, instead of all")
    parser.add_argument("--tail", action="store_true")
    parser.add_argument("--flops", action="store_true")
    parser.add_argument("--tunix", metavar="PYTHON", help="of an environment with google-tunix")
    parser.add_argument("--remat", action="store_true", help="in updates: P 2048 needs 24 GiB else")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1)
    args = parser.parse_args()
    if args.flops:
        flops()
    elif args.tail:
        tail(args.runs)
    elif args.tunix:
        if not Path(args.tunix).is_file():
            sys.exit(
                f"no Python at {args.tunix}: tests/benchmarks/tunix_step.py says how to make one"
            )
        against_tunix(args.tunix, args.runs)
    else:
        cells = [(p, r, g) for p in (256, 1024, 2048) for r in (32, 128) for g in (4, 8, 16)]
        quick = [(1024, 32, 8), (1024, 32, 16)]
        chosen = [tuple(map(int, cell.split(","))) for cell in args.cells or ()]
        grid(chosen or (quick if args.quick else cells), args.prompts, args.runs, args.remat)


if __name__ == "__main__":
    main()
