"""Time one text-only GRPO step of Google's tunix, as a baseline for this project's own step.

Nothing here imports p2r_jax. tunix gets an environment of its own, outside the project's:

    python3 -m venv tunix-venv
    tunix-venv/bin/pip install google-tunix==0.1.7 jax==0.10.2
    tunix-venv/bin/python tests/benchmarks/tunix_step.py --prompt 1024 --response 32 --group 8 \
        --prompts 2 --layers 8 --hidden 256 --mlp 768 --heads 8 --kv-heads 2 --head-dim 32 \
        --vocab 2048 --steps 3

What runs is tunix's complete learner, as its users run it: ``GRPOLearner.train`` over an
``RLCluster`` with the vanilla rollout engine, tunix's own ``Qwen3`` with random float32 weights, a
reference model (KL weight 0.01), AdamW, one iteration per batch, on a mesh of one CPU device.
The tokenizer and the reward are stand-ins that cost next to nothing: a prompt is a string of
numbers, and completions are rewarded 1, 0, 1, 0, … so that the advantages are not all zero. The pad
and end-of-sequence ids lie outside the vocabulary, so every completion has its full length. tunix's
settings are its defaults (no rematerialisation among them) except the temperature (1, which spares
a division of the logits), a key-value cache of exactly prompt + response, and ``--micro``: without
it one micro-batch holds the whole batch, which at the sizes above takes 17.4 GiB for the update;
``--micro 1`` takes about half of that, by gradient accumulation. tunix's rematerialisation is not
offered, as its sampler fails on a model that has it (flax 0.12.8: "Cannot mutate Param from a
different trace level").

One JSON line is printed. ``step_seconds`` is wall time from one request for a batch to the next,
so it holds all that tunix does between; the first ``--warmup`` steps, which compile, are left out
and listed as ``warmup_seconds``. ``compile_seconds`` has an entry for every step, warm-up included,
and should end in zeros. ``rollout_seconds``, ``reference_seconds`` and ``update_seconds`` come from
tunix's own tracer, each from dispatch (or the end of the previous one) to results being ready.
``tokens`` counts prompt and completion tokens of all the sequences in one step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.perf import metrics as perf_metrics
from tunix.perf import span as perf_span
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "numpy")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
SPANS = {"rollout": "rollout", "reference": "refer_inference", "update": "peft_train_step"}


class NumberTokenizer:
    """Text is numbers with spaces between; padding and the end lie outside the vocabulary."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int | None:
        return None

    def pad_id(self) -> int:
        return self.vocab

    def eos_id(self) -> int:
        return self.vocab + 1


class Clock:
    """The batches of a run, with the time each was asked for and what was compiled meanwhile."""

    def __init__(self, batches: int, prompts: int, length: int, vocab: int) -> None:
        self.shape = (batches, prompts, length)
        self.vocab = vocab
        self.asked: list[float] = []
        self.compiled: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_: object) -> None:
        if event == COMPILE_EVENT and self.compiled:
            self.compiled[-1] += seconds

    def _mark(self) -> None:
        self.asked.append(time.perf_counter())
        self.compiled.append(0.0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        ids = np.random.default_rng(0).integers(0, self.vocab, self.shape)
        for batch in ids:
            prompts = np.array([" ".join(map(str, row)) for row in batch])
            self._mark()
            yield {"prompts": prompts}
        self._mark()

    def steps(self) -> list[float]:
        return np.diff(self.asked).tolist()


def reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    return [float(i % 2 == 0) for i in range(len(completions))]


def span_seconds(group: perf_span.SpanGroup, name: str) -> float:
    """The time of all spans of this name in a group, at any depth."""
    return sum(
        span_seconds(item, name)
        if isinstance(item, perf_span.SpanGroup)
        else item.duration * (item.name == name)
        for item in group.inner
    )


def model_config(args: argparse.Namespace) -> qwen3.ModelConfig:
    return qwen3.ModelConfig(
        num_layers=args.layers,
        vocab_size=args.vocab,
        embed_dim=args.hidden,
        hidden_dim=args.mlp,
        num_heads=args.heads,
        head_dim=args.head_dim,
        num_kv_heads=args.kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=args.tied,
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    config = model_config(args)
    actor, reference = (qwen3.Qwen3(config, rngs=nnx.Rngs(0)) for _ in range(2))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(actor, nnx.Param)))

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    batches = args.warmup + args.steps
    cluster_config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine="vanilla",
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(args.learning_rate),
            eval_every_n_steps=batches + 1,
            # One more than there are batches: the request after the last one ends its timing.
            max_steps=batches + 1,
            mini_batch_size=args.prompts,
            train_micro_batch_size=args.micro,
            rollout_micro_batch_size=args.prompts,
            compute_logps_micro_batch_size=args.prompts,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=args.response,
            max_prompt_length=args.prompt,
            kv_cache_size=args.prompt + args.response,
            temperature=1.0,
        ),
    )
    queries: list[perf_metrics.PerfSpanQuery] = []

    def keep(query: perf_metrics.PerfSpanQuery) -> perf_metrics.MetricsT:
        queries.append(query)
        return {}

    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=NumberTokenizer(args.vocab),
        cluster_config=cluster_config,
        perf_config=perf_metrics.PerfMetricsConfig(custom_export_fn=keep),
    )
    lengths: list[tuple[int, int]] = []

    def observe(prompts, completions, **_) -> dict:
        lengths.extend(
            (len(p.split()), len(c.split())) for p, c in zip(prompts, completions, strict=True)
        )
        return {}

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=args.group, num_iterations=1, beta=args.beta
        ),
        reward_fns=reward,
        metric_fns=[observe],
    )
    clock = Clock(batches, args.prompts, args.prompt, args.vocab)
    learner.train(clock)

    sequences = args.prompts * args.group
    if lengths != [(args.prompt, args.response)] * (sequences * batches):
        raise RuntimeError(f"not the lengths asked for: {sorted(set(lengths))}")
    cluster.perf.synchronize()
    device = f"{jax.devices()[0].platform}{jax.devices()[0].id}"
    groups = queries[-1]().timeline(device).all_groups("global_step").get()[args.warmup : batches]
    steps = clock.steps()
    losses = cluster.actor_trainer.metrics_logger.get_metric_history("actor", "loss", "train")
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "config": vars(args),
        "parameters": parameters,
        "sequences": sequences,
        "tokens": sequences * (args.prompt + args.response),
        "step_seconds": steps[args.warmup :],
        **{
            f"{key}_seconds": [span_seconds(group, name) for group in groups]
            for key, name in SPANS.items()
        },
        "warmup_seconds": steps[: args.warmup],
        "compile_seconds": clock.compiled[:batches],
        "losses": np.asarray(losses, np.float64).tolist(),
        "weights_shared": bool(
            rl_utils.is_sharing_weights(cluster.actor_trainer.model, cluster.rollout.model())
        ),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpus": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--prompt", type=int, default=1024, help="tokens in each prompt")
    add("--response", type=int, default=32, help="tokens generated in each completion")
    add("--group", type=int, default=8, help="completions of each prompt")
    add("--prompts", type=int, default=2, help="prompts in a batch")
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=256)
    add("--mlp", type=int, default=768)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=32)
    add("--vocab", type=int, default=2048)
    add("--tied", action=argparse.BooleanOptionalAction, default=True, help="tied embedding")
    add("--steps", type=int, default=3, help="steps timed")
    add("--warmup", type=int, default=2, help="steps before those, which compile")
    add("--micro", type=int, default=None, help="prompts in a training micro-batch (all of them)")
    add("--beta", type=float, default=0.01, help="weight of the KL term")
    add("--learning-rate", type=float, default=1e-5)
    print(json.dumps(run(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
