"""The backbone against transformers on this machine: vision, prefill, rollout, update.

    python -m tests.benchmarks.backbone                      # float32 and bfloat16
    python -m tests.benchmarks.backbone --quick              # float32, three rounds, 16 new tokens
    python -m tests.benchmarks.backbone --only update --rounds 9 --dtype float32 --json out.json
    python -m tests.benchmarks.backbone --memory             # peak memory, a process each

One process, the same random weights, inputs and number of threads; one round runs everybody once,
in alternating order. `stock` is transformers as it is (SDPA attention), `patched` the same with its
Conv3d patch embedding replaced by the matrix product that it is equal to. Seconds are the best
round's. Ratios are theirs ÷ ours: of the best rounds, in brackets the smallest, median and largest
of a round, then that of the least CPU time (all threads), which other programs disturb less.

    vision    images to visual tokens and DeepStack levels
    prefill   the same, then the prompts through the language model: the cache and the last logits
    rollout   prefill, then new tokens, greedily
    sampled   the same at temperature 1
    decode    the part of the rollout after the prompts have been run
    update    prompt + response: clipped loss, k3 KL, gradient clipping, AdamW of all parameters

Nothing is timed before both sides agree: visual tokens, logits, greedy tokens (float32), loss and
norm of the gradient. In bfloat16 our update keeps float32 weights, as the trainer does; theirs has
bfloat16 weights and moments, which is as fast as it can be.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from p2r_jax.config import LossConfig, OptimizerConfig
from p2r_jax.qwen3_vl import Qwen3VL, Qwen3VLConfig, load_pretrained
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import prompts_from_hf
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.step import Objective, TrainingBatch, batch_log_probs, new_state, train_step
from p2r_jax.rollout.engine import prefill
from p2r_jax.rollout.generate import generate
from p2r_jax.rollout.sampling import Sampling, Vocabulary
from tests.benchmarks.sizes import SIZES, hf_config

transformers.utils.logging.disable_progress_bar()

CASES = ("vision", "prefill", "rollout", "sampled", "update")
ROLLOUTS = {"rollout": "decode", "sampled": "decode sampled"}
"""And the name of the decoding in it."""
SIDES = ("ours", "stock", "patched")
TARGETS = {"prefill": 1.0, "decode": 3.0, "update": 1.5}
"""stock ÷ ours, on a CPU."""
GATES = {"float32": 1e-5, "bfloat16": 5e-2}
"""Relative difference before anything is timed."""
LOSS, OPTIMIZER = LossConfig(), OptimizerConfig()


# --- both sides -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a Hugging Face processor returns, and responses with what the update needs."""

    ids: np.ndarray
    pixels: np.ndarray
    grid: np.ndarray
    responses: np.ndarray
    advantages: np.ndarray
    image_token: int

    @classmethod
    def make(cls, config: Qwen3VLConfig, args: argparse.Namespace) -> Inputs:
        """`args.batch` prompts of one image and text each."""
        rng = np.random.default_rng(0)
        side = args.image // config.vision.patch_size
        visual = side**2 // config.vision.merge_unit
        text = args.prompt - visual - 2
        if text < 1:
            sys.exit(f"--prompt {args.prompt} has no room for {visual} visual tokens and text")
        rows = np.ones((args.batch, 1), np.int64)
        ids = np.concatenate(
            [
                rows * config.vision_start_token_id,
                np.repeat(rows * config.image_token_id, visual, 1),
                rows * config.vision_end_token_id,
                rng.integers(0, 150_000, (args.batch, text)),
            ],
            axis=1,
        )
        patches = (args.batch * side**2, config.vision.patch_dim)
        return cls(
            ids,
            rng.uniform(-1, 1, patches).astype(np.float32),
            np.repeat([[1, side, side]], args.batch, 0),
            rng.integers(0, 150_000, (args.batch, args.new_tokens)),
            rng.normal(size=args.batch).astype(np.float32),
            config.image_token_id,
        )


class MatmulEmbed(torch.nn.Module):
    """Their patch embedding as a matrix product, with the same parameters."""

    def __init__(self, stock: Any):
        super().__init__()
        self.proj = stock.proj

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        return torch.nn.functional.linear(
            patches.to(weight.dtype), weight.flatten(1), self.proj.bias
        )


class Theirs:
    def __init__(self, folder: Path, inputs: Inputs, dtype: str):
        self.dtype = getattr(torch, dtype)
        make = transformers.Qwen3VLForConditionalGeneration.from_pretrained
        self.model = make(folder, dtype=self.dtype).eval()
        tower = self.model.model.visual
        self.embeddings = {"stock": tower.patch_embed, "patched": MatmulEmbed(tower.patch_embed)}
        self.prompts = self._with(inputs, inputs.ids)
        self.whole = self._with(inputs, np.concatenate([inputs.ids, inputs.responses], 1))
        self.responses = torch.tensor(inputs.responses)
        self.advantages = torch.tensor(inputs.advantages)[:, None]
        self.reference = torch.zeros(self.responses.shape)
        self.decoding = np.zeros(2)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
        )

    @staticmethod
    def _with(inputs: Inputs, ids: np.ndarray) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(ids.shape, dtype=torch.long),
            "mm_token_type_ids": torch.tensor(ids == inputs.image_token).int(),
            "pixel_values": torch.tensor(inputs.pixels),
            "image_grid_thw": torch.tensor(inputs.grid),
        }

    def use(self, side: str) -> None:
        """`stock` or `patched`, from now on."""
        self.model.model.visual.patch_embed = self.embeddings[side]

    @torch.no_grad()
    def vision(self) -> Any:
        pixels = self.prompts["pixel_values"].to(self.dtype)
        return self.model.model.visual(pixels, self.prompts["image_grid_thw"], return_dict=True)

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        return self.model(**self.prompts, use_cache=True, logits_to_keep=1).logits[:, -1]

    def rollout(self, new_tokens: int, sampled: bool) -> torch.Tensor:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
        clocks = [now()]

        def look(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Called after each new token."""
            clocks.append(now())
            return torch.zeros(len(ids), dtype=torch.bool)

        out = self.model.generate(
            **self.prompts,
            **options,
            do_sample=sampled,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([look]),
        )
        self.decoding = clocks[-1] - clocks[1]
        return out[:, self.prompts["input_ids"].shape[1] :]

    def update(self, exact: bool = False) -> tuple[float, float]:
        """Loss and, if it is asked for, norm of the gradient before it is clipped."""
        self.optimizer.zero_grad()
        keep = self.responses.shape[1] + 1
        logits = self.model(**self.whole, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        log_probs = logits.float().log_softmax(-1)
        log_probs = log_probs.gather(-1, self.responses[..., None])[..., 0]
        ratio, advantages = (log_probs - log_probs.detach()).exp(), self.advantages
        clipped = ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
        policy = torch.maximum(-advantages * ratio, -advantages * clipped)
        bound = torch.minimum(policy, -advantages * LOSS.dual_clip)
        policy = torch.where(advantages < 0, bound, policy)
        difference = (self.reference - log_probs).clamp(-20, 20)
        kl = (difference.exp() - difference - 1).clamp(-10, 10)
        loss = (policy + LOSS.kl_weight * kl).mean()
        loss.backward()
        norm = self.norm_of_gradient() if exact else 0.0
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.grad_clip)
        self.optimizer.step()
        return loss.item(), norm

    def norm_of_gradient(self) -> float:
        """In float64: torch's float32 sum over the embedding alone is wrong by 6e-4."""
        squares = (p.grad.double().square().sum() for p in self.model.parameters())
        return float(sum(squares)) ** 0.5


class Ours:
    def __init__(self, folder: Path, inputs: Inputs, dtype: str, remat: bool):
        self.dtype, self.remat, self.folder = jnp.dtype(dtype), remat, folder
        model = load_pretrained(folder, dtype=dtype)
        self.graph, self.params = nnx.split(model, nnx.Param)
        self.prompts = prompts_from_hf(
            model.config, inputs.ids, np.ones_like(inputs.ids), inputs.pixels, inputs.grid
        )
        rows, self.size = inputs.ids.shape
        every = jnp.ones(model.config.text.vocab_size, bool)
        self.vocabulary = Vocabulary(every, jnp.zeros_like(every), jnp.int32(0))
        zeros = jnp.zeros((rows, 1, inputs.responses.shape[1]))
        self.batch = TrainingBatch(
            self.prompts,
            jnp.asarray(inputs.responses[:, None], jnp.int32),
            jnp.ones(zeros.shape, bool),
            sampler_log_probs=zeros,
            advantages=jnp.asarray(inputs.advantages[:, None]),
        )
        self.objective = Objective(LOSS, horizon=inputs.responses.shape[1])
        self.optimizer = make_optimizer(OPTIMIZER, 100)
        self.state: Any = None
        self.decoding = np.zeros(2)

    def log_probs(self) -> jax.Array:
        return batch_log_probs(
            self.graph,
            self.params,
            self.batch,
            self.vocabulary.allowed,
            objective=self.objective,
            dtype=self.dtype,
        )

    def vision(self) -> tuple[jax.Array, jax.Array]:
        return our_vision(self.graph, self.params, self.prompts)

    def prefill(self) -> jax.Array:
        return our_prefill(self.graph, self.params, self.prompts)[2]

    def rollout(self, new_tokens: int, sampled: bool) -> np.ndarray:
        sampling = Sampling(new_tokens, temperature=1.0 if sampled else 0.0)
        numbers = range(len(self.prompts.tokens))
        self.decoding = np.zeros(2)

        @contextlib.contextmanager
        def stage(name: str) -> Iterator[None]:
            begin = now()
            yield
            if name == "decode":
                self.decoding += now() - begin

        out = generate(
            self.graph,
            self.params,
            lambda _: self.prompts,
            numbers,
            self.size,
            self.vocabulary,
            sampling,
            stage=stage,
        )
        return out.tokens[:, 0]

    def update(self) -> tuple[float, float]:
        """Loss, and norm of the gradient before it is clipped."""
        if self.state is None:
            weights = load_pretrained(self.folder, dtype="float32")
            self.state = new_state(nnx.state(weights, nnx.Param), self.optimizer)
        self.state, (metrics,) = train_step(
            self.state,
            (self.batch,),
            None,
            self.vocabulary.allowed,
            graph=self.graph,
            optimizer=self.optimizer,
            objectives=(self.objective,),
            remat=self.remat,
            dtype=self.dtype,
        )
        return float(metrics["loss/total"]), float(metrics["grad_norm"])


@functools.partial(jax.jit, static_argnames="graph")
def our_vision(graph: nnx.GraphDef, params: nnx.State, prompts: Prompts) -> Any:
    model: Qwen3VL = nnx.merge(graph, params)
    return model.visual(prompts.patches)


@functools.partial(jax.jit, static_argnames="graph")
def our_prefill(graph: nnx.GraphDef, params: nnx.State, prompts: Prompts) -> Any:
    keys, values, last = prefill(graph, params, prompts)
    model: Qwen3VL = nnx.merge(graph, params)
    return keys, values, last @ model.unembedding.T


def save_random(size: str, folder: Path) -> None:
    """Random weights, norms and biases perturbed, as transformers saves them."""
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(**hf_config(size))
    model = transformers.Qwen3VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


# --- that both compute the same ---------------------------------------------------------------


def difference(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def check(ours: Ours, theirs: Theirs, case: str, new_tokens: int, dtype: str) -> dict[str, float]:
    """Relative differences; the update's first step is taken. Raises SystemExit beyond the gate."""
    found: dict[str, float] = {}
    theirs.use("stock")
    if case == "vision":
        tokens = theirs.vision().pooler_output.float()
        own = np.asarray(ours.vision()[0], np.float32)
        found["visual tokens"] = difference(own.reshape(tokens.shape), tokens)
        theirs.use("patched")
        again = theirs.vision().pooler_output.float()
        found["visual tokens, patched"] = difference(again, tokens)
    if case == "prefill":
        found["logits"] = difference(np.float32(ours.prefill()), theirs.prefill().float())
    if case == "rollout":
        own, other = ours.rollout(new_tokens, False), theirs.rollout(new_tokens, False).numpy()
        unequal = float((own != other).mean())
        print(f"  {dtype} greedy tokens that differ: {unequal:.2%}")
        found["greedy tokens"] = unequal if dtype == "float32" else 0.0
    if case == "update":
        log_probs = ours.log_probs()
        noise = 0.1 * np.random.default_rng(1).normal(size=log_probs.shape).astype(np.float32)
        reference = log_probs + noise
        ours.batch = dataclasses.replace(ours.batch, reference_log_probs=reference)
        theirs.reference = torch.tensor(np.asarray(reference)[:, 0])
        loss, norm = zip(ours.update(), theirs.update(exact=True), strict=True)
        found = {"loss": difference(*loss), "gradient norm": difference(*norm)}
    for name, value in found.items():
        print(f"  {dtype} {name}: relative difference {value:.1e}")
        if not value <= GATES[dtype]:
            sys.exit(f"{name} ({dtype}): not the same computation, gate {GATES[dtype]:.0e}")
    return found


# --- time and memory --------------------------------------------------------------------------


def now() -> np.ndarray:
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


Rounds = dict[str, list[np.ndarray]]
"""(wall, CPU) seconds of each round, by side."""


def alternate(
    functions: dict[str, Callable[[], Any]], rounds: int, inner: Callable[[str], np.ndarray]
) -> tuple[Rounds, Rounds]:
    """Seconds of whole calls, and what `inner` says after each of them."""
    for function in functions.values():
        jax.block_until_ready(function())
    took: Rounds = {name: [] for name in functions}
    inside: Rounds = {name: [] for name in functions}
    for number in range(rounds):
        order = list(functions) if number % 2 == 0 else list(functions)[::-1]
        for name in order:
            begin = now()
            jax.block_until_ready(functions[name]())
            took[name].append(now() - begin)
            inside[name].append(inner(name))
    return took, inside


def measure(ours: Ours, theirs: Theirs, case: str, args: argparse.Namespace) -> dict[str, Rounds]:
    """Rounds of the case, and of the decoding in it."""
    arguments = (args.new_tokens, case == "sampled") if case in ROLLOUTS else ()
    name = "rollout" if case in ROLLOUTS else case

    def run(side: str) -> Any:
        if side == "ours":
            return getattr(ours, name)(*arguments)
        theirs.use(side)
        return getattr(theirs, name)(*arguments)

    functions = {side: functools.partial(run, side) for side in SIDES}
    inner = lambda side: (ours if side == "ours" else theirs).decoding
    took, decoding = alternate(functions, args.rounds, inner)
    return {case: took, ROLLOUTS[case]: decoding} if case in ROLLOUTS else {case: took}


def show(part: str, dtype: str, took: Rounds, tokens: int) -> dict[str, Any]:
    """Print a row; `tokens`: new ones in a round, 0 if the part makes none."""
    seconds = {side: np.stack(took[side]) for side in SIDES}
    best = {side: rounds.min(0) for side, rounds in seconds.items()}
    target, shown, ratios = TARGETS.get(part), [], {}
    for side in SIDES[1:]:
        wall, cpu = best[side] / best["ours"]
        each = seconds[side][:, 0] / seconds["ours"][:, 0]
        low, middle, high = min(each), float(np.median(each)), max(each)
        shown.append(f"{wall:5.2f}x ({low:5.2f} {middle:5.2f} {high:5.2f}) {cpu:5.2f}x")
        ratios[side] = {"best": wall, "rounds": [low, middle, high], "cpu": cpu}
    verdict = ""
    if target is not None:
        verdict = f"{target:.1f}x {'ok' if ratios['stock']['best'] >= target else 'MISSED'}"
    walls = " ".join(f"{best[side][0]:8.3f}" for side in SIDES)
    print(f"{part:14} {dtype:8} | {walls} | {' | '.join(shown)} | {verdict}", flush=True)
    if tokens:
        speeds = " ".join(f"{tokens / best[side][0]:8.0f}" for side in SIDES)
        print(f"{'':14} {'tokens/s':8} | {speeds} |")
    return {
        "part": part,
        "dtype": dtype,
        "seconds": {side: rounds.tolist() for side, rounds in seconds.items()},
        "ratios": ratios,
        "target": target,
    }


def memory(args: argparse.Namespace) -> None:
    """Each side and case in a process of its own, run twice: resident memory before, and peak."""
    print(f"{'case':8} {'dtype':8} | GiB before and at most: " + ", ".join(SIDES))
    for dtype in args.dtype:
        for case in args.only:
            shown = []
            for side in SIDES:
                command = [sys.executable, "-m", "tests.benchmarks.backbone", "--peak", side]
                command += ["--only", case, "--dtype", dtype, "--size", args.size]
                for name in ("batch", "image", "prompt", "new_tokens", "threads"):
                    command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
                command += ["--remat"] * args.remat
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                shown.append(done.stdout.split()[-2:])
            print(f"{case:8} {dtype:8} | " + " | ".join(f"{a} {b}" for a, b in shown), flush=True)


def peak(args: argparse.Namespace, folder: Path, inputs: Inputs) -> None:
    """One side alone; prints resident GiB before, and the peak."""
    (dtype,), (case,) = args.dtype, args.only
    mine = args.peak == "ours"
    side = Ours(folder, inputs, dtype, args.remat) if mine else Theirs(folder, inputs, dtype)
    if isinstance(side, Theirs):
        side.use(args.peak)
    elif case == "update":
        side.batch = dataclasses.replace(
            side.batch, reference_log_probs=side.batch.sampler_log_probs
        )
    status = Path("/proc/self/status").read_text()
    before = int(status.partition("VmRSS:")[2].split()[0])
    arguments = (args.new_tokens, case == "sampled") if case in ROLLOUTS else ()
    function = getattr(side, "rollout" if arguments else case)
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{before / 2**20:.2f} {most / 2**20:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", default="tiny", choices=SIZES)
    add("--dtype", nargs="+", default=list(GATES), choices=list(GATES))
    add("--only", nargs="+", default=list(CASES), choices=CASES)
    add("--batch", type=int, default=8)
    add("--image", type=int, default=448, help="pixels of a side")
    add("--prompt", type=int, default=239, help="tokens of a prompt, visual ones included")
    add("--new-tokens", type=int, default=64)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--remat", action="store_true", help="our update recomputes activations")
    add("--quick", action="store_true", help="float32, 3 rounds, 16 new tokens")
    add("--memory", action="store_true", help="peak memory instead of time")
    add("--json", type=Path, help="write all rounds there")
    add("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.dtype, args.rounds, args.new_tokens = ["float32"], 3, 16
    if args.memory:
        memory(args)
        return
    torch.set_num_threads(args.threads)
    if len(os.sched_getaffinity(0)) != args.threads:
        sys.exit(f"XLA takes every CPU it may use: run this under `taskset` with {args.threads}")

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(args.size, folder)
        inputs = Inputs.make(Qwen3VLConfig.from_pretrained(folder), args)
        if args.peak:
            peak(args, folder, inputs)
            return
        tokens = args.batch * args.new_tokens
        print(
            f"{args.size}, {args.batch} prompts of {inputs.ids.shape[1]} tokens with an image of "
            f"{args.image}², {args.new_tokens} new tokens, {args.threads} threads, "
            f"{args.rounds} rounds; seconds\n"
            f"{'':23} | {'ours':>8} {'stock':>8} {'patched':>8} | "
            f"{'stock ÷ ours (rounds) CPU':34} | {'patched ÷ ours':34} | target"
        )
        for dtype in args.dtype:
            ours = Ours(folder, inputs, dtype, args.remat)
            theirs = Theirs(folder, inputs, dtype)
            for case in args.only:
                agreement = check(ours, theirs, case, args.new_tokens, dtype)
                for part, took in measure(ours, theirs, case, args).items():
                    # Decoding is timed from the first new token on.
                    drawn = tokens - args.batch * part.startswith("decode")
                    result = show(part, dtype, took, drawn if case in ROLLOUTS else 0)
                    results.append(result | {"agreement": agreement})
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
