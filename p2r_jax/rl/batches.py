"""From experience to what the compiled update takes: advantages, masks, the anchor's rows."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from p2r_jax.config import LossConfig, PhaseConfig
from p2r_jax.parallel.mesh import batch_sharding
from p2r_jax.parallel.multihost import put, to_host
from p2r_jax.rl.advantages import group_advantages, zero_variance_groups
from p2r_jax.rl.experience import Experience
from p2r_jax.rl.rewards import Reward
from p2r_jax.rl.step import AnchorBatch, TrainingBatch
from p2r_jax.rl.stop import RunStopped
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.requests import RequestBuilder


def advantages_of(
    rewards: list[list[Reward]], loss: LossConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (0 where there is none), whether there is one, and advantages; [B, G] each."""
    values = np.array([[r.value if r.value is not None else 0.0 for r in g] for g in rewards])
    valid = np.array([[r.value is not None for r in group] for group in rewards])
    scale = loss.advantage_scale
    advantages = group_advantages(
        values, scale != "none", valid=valid, std_over="batch" if scale == "batch" else "group"
    )
    return values, valid, np.asarray(advantages)


def training_batch(
    experience: Experience,
    loss: LossConfig,
    mesh: Mesh | None,
    lengths: Sequence[int] = (),
    max_dropped_fraction: float = 1.0,
    sampled: Sequence[Sequence[Reward]] | None = None,
) -> tuple[TrainingBatch, dict[str, float]]:
    """The batch of an update, and metrics of what was collected.

    Samples that could not be graded and filling rows are masked out. lengths: what completions may
    be padded to instead of their limit, see `response_length`. sampled: rewards of all groups that
    were sampled, of which dynamic sampling chose; metrics and the limit are about these. Raises
    RunStopped if more of them could not be graded than `max_dropped_fraction`.
    """
    values, valid, advantages = advantages_of(experience.rewards, loss)
    everything = experience.rewards if sampled is None else [list(group) for group in sampled]
    dropped = float(np.mean([reward.value is None for group in everything for reward in group]))
    if dropped > max_dropped_fraction:
        raise RunStopped(
            f"{dropped:.0%} of the samples could not be graded (limit reward.max_dropped_fraction "
            f"= {max_dropped_fraction:.0%}): check the verifier and the answers of the data"
        )
    completions, prompts = experience.completions, experience.prompts
    rows = prompts.tokens.shape[0] - len(values)
    written = completions.mask.sum(-1)
    trained = valid & completions.stopped if loss.mask_truncated else valid
    length = response_length(int(written.max()), completions.tokens.shape[2], lengths)

    def place(x: np.ndarray) -> jax.Array:
        filled = np.pad(x, ((0, rows), *[(0, 0)] * (x.ndim - 1)))
        return put(filled, batch_sharding(mesh) if mesh is not None else None)

    batch = TrainingBatch(
        prompts,
        place(completions.tokens[:, :, :length]),
        place(completions.mask[:, :, :length] & trained[:, :, None]),
        place(completions.log_probs[:, :, :length]),
        place(advantages),
    )
    valid_prompt = to_host(prompts.valid)
    return batch, _reward_metrics(everything) | _box_metrics(experience) | {
        "reward/dropped_fraction": dropped,
        "reward/teaching_groups": float(np.mean(~np.asarray(zero_variance_groups(values, valid)))),
        "tokens/prompts": int(valid_prompt[: len(values)].sum()),
        "tokens/completions": int(written.sum()),
        "completion/length_mean": float(written.mean()),
        "completion/length_min": float(written.min()),
        "completion/length_max": float(written.max()),
        "completion/truncated_fraction": float(1 - completions.stopped.mean()),
        "rollout/steps": completions.steps,
        "rollout/occupancy": completions.occupancy,
    }


def response_length(longest: int, limit: int, lengths: Sequence[int]) -> int:
    """Tokens that the completions of an update are padded to: the smallest of `lengths` that holds
    the longest of them, at most `limit`. Perceivers write 40 tokens where 1024 are allowed.

    >>> response_length(40, 1024, (64, 256))
    64
    >>> response_length(300, 1024, (64, 256))
    1024
    """
    return min([limit, *(length for length in lengths if length >= longest)])


def _reward_metrics(rewards: Sequence[Sequence[Reward]]) -> dict[str, float]:
    values = np.array([[0.0 if r.value is None else r.value for r in g] for g in rewards])
    valid = np.array([[r.value is not None for r in group] for group in rewards])
    graded = values[valid]
    metrics = {
        "reward/mean": float(graded.mean()),
        "reward/std": float(graded.std()),
        "reward/zero_variance_groups": float(np.mean(zero_variance_groups(values, valid))),
    }
    parts: dict[str, list[float]] = collections.defaultdict(list)
    for group in rewards:
        for reward in group:
            for name, value in reward.parts.items():
                parts[name].append(value)
    metrics |= {f"reward/{name}": float(np.mean(v)) for name, v in parts.items()}
    metrics |= {f"reward_std/{name}": float(np.std(v)) for name, v in parts.items()}
    return metrics


def _box_metrics(experience: Experience) -> dict[str, float]:
    areas = [
        (b.bbox_2d[2] - b.bbox_2d[0]) * (b.bbox_2d[3] - b.bbox_2d[1]) / 1e6
        for group in experience.boxes
        for parsed in group
        for b in parsed.boxes
    ]
    return {"boxes/mean_area": float(np.mean(areas))} if areas else {}


def anchor_batch(
    phase: PhaseConfig,
    experience: Experience,
    images: ImageStore,
    builder: RequestBuilder,
    lengths: Sequence[int] = (),
) -> AnchorBatch | None:
    """A few of the idle role's prompts of this very step, with the snapshot's greedy outputs.

    lengths: as for `training_batch`.
    """
    if not phase.role_anchor_prompts or not any(experience.idle_requests):
        return None
    if phase.partner == "step":  # The outputs are not the snapshot's.
        return None
    # The idle reasoner has G prompts a question: take them from as many questions as there are.
    every = list(itertools.chain.from_iterable(experience.idle_requests))
    outputs = list(itertools.chain.from_iterable(experience.idle_outputs))
    count = min(phase.role_anchor_prompts, phase.prompts)
    stride = max(1, len(every) // count)
    requests = every[::stride][:count]
    # Its tokens as they were written: an output cut at the limit has no stop token to imitate.
    rows = [o.tokens for o in outputs[::stride][:count]]
    prompts = builder.collate(requests, images)
    length = response_length(max(map(len, rows)), phase.partner_max_new_tokens, lengths)
    shape = (prompts.tokens.shape[0], 1, length)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        tokens[i, 0, : len(row)] = row
        mask[i, 0, : len(row)] = True
    where: Any = batch_sharding(builder.mesh) if builder.mesh is not None else None
    return AnchorBatch(prompts, put(tokens, where), put(mask, where))
