"""What a step costs, so that runs of other schedules can be matched: samples, tokens, model FLOPs.

Model FLOPs are those of the matrix products that the method needs, counted from the lengths of
what was read and written: one multiply-add is two, attention is the causal half, a prompt counts
once for all completions of its group, a backward pass twice its forward. Padding, recomputation
and free slots of a rollout do not count; `parallel.flops` counts whole programs, with them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from p2r_jax.config import TrainConfig
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.rl.updates import Collected
from p2r_jax.roles.requests import Request, RequestBuilder


@dataclasses.dataclass(frozen=True)
class ModelCosts:
    """FLOPs of one forward pass, by what they grow with."""

    token: int
    """A token in all layers of the decoder."""
    head: int
    """The logits of one position."""
    pair: int
    """A token that attends to a token, in all layers."""
    patch: int
    """A patch in all blocks of the vision tower, and its share of the mergers."""
    patch_pair: int
    """A patch that attends to a patch of its image."""

    @classmethod
    def of(cls, config: Qwen3VLConfig) -> ModelCosts:
        """Of a model."""
        text, vision = config.text, config.vision
        heads = text.num_attention_heads * text.head_dim
        keys = text.num_key_value_heads * text.head_dim
        layer = text.hidden_size * (2 * heads + 2 * keys + 3 * text.intermediate_size)
        width, merged = vision.hidden_size, vision.hidden_size * vision.merge_unit
        block = width * (4 * width + 2 * vision.intermediate_size)
        merger = merged * (merged + vision.out_hidden_size) // vision.merge_unit
        mergers = 1 + len(vision.deepstack_visual_indexes)
        return cls(
            token=2 * text.num_hidden_layers * layer,
            head=2 * text.hidden_size * text.vocab_size,
            pair=4 * text.num_hidden_layers * heads,
            patch=2 * (vision.patch_dim * width + vision.depth * block + mergers * merger),
            patch_pair=4 * vision.depth * width,
        )

    def vision(self, images: Iterable[int]) -> int:
        """The vision tower on images of so many patches."""
        return sum(self.patch * n + self.patch_pair * n * n for n in images)

    def text(self, prompt: int, completions: Iterable[int]) -> int:
        """The decoder on a prompt of so many tokens and the completions that share it."""
        total = self.token * prompt + self.pair * prompt * (prompt + 1) // 2
        for n in map(int, completions):
            total += (self.token + self.head) * n + self.pair * (n * prompt + n * (n + 1) // 2)
        return total


def work_metrics(one: Collected, builder: RequestBuilder, config: TrainConfig) -> dict[str, float]:
    """Of one role's part of a step.

    samples: completions that the role drew, those of groups that dynamic sampling dropped included.
    tokens/visual: in the prompts that it learned from. tokens/partner_...: what the idle role read
    and wrote for these questions. flops/...: by stage; rollout and partner are taken to cost as
    much for a dropped group as for a kept one.
    """
    own, experience = one.role, one.experience
    costs = ModelCosts.of(builder.processor.config)
    image_token = builder.processor.config.image_token_id

    def visual(requests: Sequence[Request]) -> int:
        return sum(int(np.sum(np.asarray(r.tokens) == image_token)) for r in requests)

    def seen(requests: Sequence[Request]) -> int:
        grids = ([builder.processor.sizes.grid(v.target) for v in r.views] for r in requests)
        return sum(costs.vision(h * w for h, w in grid) for grid in grids)

    def read(requests: Sequence[Request], completions: Iterable[Iterable[int]]) -> int:
        rows = zip(requests, completions, strict=True)
        return sum(costs.text(len(request.tokens), lengths) for request, lengths in rows)

    idle = list(itertools.chain.from_iterable(experience.idle_requests))
    outputs = [len(o.tokens) for o in itertools.chain.from_iterable(experience.idle_outputs)]
    samples = sum(map(len, one.sampled))
    kept = sum(map(len, experience.rewards))
    images, words = seen(experience.requests), read(experience.requests, written(one).tolist())
    partner = seen(idle) + read(idle, ([n] for n in outputs))
    passes = (config.loss.kl_weight > 0) + (own.updates_per_step > 1)
    frozen = config.optimizer.freeze_vision
    anchored = min(own.role_anchor_prompts, own.prompts) / max(len(idle), 1)
    if own.partner == "step" or not idle:
        anchored = 0.0
    flops = {
        "rollout": (images + words) * samples / kept,
        "partner": partner * samples / kept,
        "reference": (images + words) * passes,
        "update": ((1 if frozen else 3) * images + 3 * words) * own.inner_epochs,
        # At weight 0 its loss is logged all the same.
        "anchor": partner * anchored * (3 * own.updates_per_step if own.role_anchor else 1),
    }
    return {
        "samples": samples,
        "tokens/visual": visual(experience.requests),
        "tokens/partner_prompts": sum(len(request.tokens) for request in idle),
        "tokens/partner_completions": sum(outputs),
        "tokens/partner_visual": visual(idle),
        **{f"flops/{stage}": float(value) for stage, value in flops.items()},
        "flops/total": float(sum(flops.values())),
    }


def written(one: Collected) -> np.ndarray:
    """Tokens of each completion, [B, G]."""
    return np.asarray(one.experience.completions.mask).sum(-1)
