"""Which metrics are read together: groups of panels, in the order in which they are asked for.

A panel is one chart. Metrics of a joint phase carry the role that they belong to
(`perceiver/reward/mean`): they are further lines of the panel of the plain metric, or a panel of
their own beside one that has several lines already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

ROLES = ("perceiver", "reasoner")

REWARD, PERCEIVER, LOSSES = "Reward and accuracy", "Perceiver", "Losses, KL and clipping"
COMPLETIONS, REST = "Completions", "The rest"

ACCURACY = "eval/accuracy"
OTHER_ACCURACY = "eval/accuracy, other modes"
DRIFT_MODES = ("p2r", "live_perceiver", "live_reasoner")
"""One chart of these shows which role drifts while the other one learns."""

_LIMITS = ("low", "high", "n")
"""Of an evaluation's accuracy; drawn as its interval."""

_ABOUT: dict[str, dict[str, str]] = {
    REWARD: {
        ACCURACY: "",
        "reward/mean": "mean of all completions of a step",
        "reward/answer": "share of right answers, before penalties",
        "reward/std": "of all completions of a step",
        "reward/zero_variance_groups": "share of groups whose rewards all agree",
        OTHER_ACCURACY: "held-out questions, with 95 % intervals",
    },
    PERCEIVER: {
        "reward/boxes": "boxes of a completion",
        "boxes/mean_area": "part of the image that a box covers",
        "reward/parse_ok": "share of box lists that could be parsed",
        "reward/empty": "share of completions without a box",
        "penalties": "share of box lists that broke a rule",
        "eval/hit_rate": "held out: all evidence is in a close crop",
        "eval/mean_iou": "held out: the best box for each true one",
        "eval/mean_area": "held out: part of the image that boxes cover",
    },
    LOSSES: {
        "loss/total": "",
        "loss/policy": "",
        "loss/anchor": "drift of the idle role from what it wrote",
        "kl/mean": "to the reference weights, per token",
        "entropy/mean": "of the next token",
        "clipped tokens": "share of tokens whose ratio was clipped",
        "approx_kl": "to the policy that a step began with",
        "ratio": "to the policy that a step began with",
        "grad_norm": "before clipping",
        "lr": "learning rate",
    },
    COMPLETIONS: {
        "completion/length": "tokens",
        "completion/truncated_fraction": "share cut at max_new_tokens",
        "reward/answer_tag": "share with an <answer> tag",
        "tokens": "of all prompts, all completions of a step",
        "tokens/visual": "in the prompts of a step",
        "partner's tokens": "that the idle role read and wrote in a step",
        "rollout/steps": "decoding steps",
        "rollout/occupancy": "share of columns that drew a token",
    },
    REST: {
        "reward/dropped_fraction": "share of samples that nothing could grade",
        "batches": "batches of questions that a step took",
        "skipped_steps": "gradients not finite, in this phase so far",
        "health/warnings": "of the run so far",
        "sampler_gap": "log-probs of rollout and update, difference",
        "verifier": "judgements of a step",
        "samples": "completions that a step drew",
        "model FLOPs": "of the matrix products of a step",
        "compile/count": "programs compiled in a step",
        "compile/seconds": "of a step; contained in its stages",
    },
}
"""Panels by group, in order, and what they show."""

_LINES: dict[str, dict[str, str]] = {
    "penalties": {"reward/overlap_penalty": "overlap", "reward/label_penalty": "label"},
    "clipped tokens": {
        "clip_high_fraction": "high",
        "clip_low_fraction": "low",
        "dual_clip_fraction": "dual",
    },
    "completion/length": {
        "completion/length_mean": "mean",
        "completion/length_min": "shortest",
        "completion/length_max": "longest",
    },
    "tokens": {"tokens/prompts": "prompts", "tokens/completions": "completions"},
    "partner's tokens": {
        "tokens/partner_prompts": "prompts",
        "tokens/partner_completions": "completions",
    },
    "sampler_gap": {"sampler_gap/mean": "mean", "sampler_gap/max": "largest"},
    "model FLOPs": {
        f"flops/{stage}": stage
        for stage in ("total", "rollout", "partner", "reference", "update", "anchor")
    },
    "verifier": {"verifier/asked": "asked", "verifier/failed": "failed"},
}
"""Panels of several metrics; each other panel is the metric of its title."""

_PREFIXES = {
    "reward": REWARD,
    "boxes": PERCEIVER,
    "loss": LOSSES,
    "kl": LOSSES,
    "entropy": LOSSES,
    "completion": COMPLETIONS,
    "tokens": COMPLETIONS,
    "rollout": COMPLETIONS,
}
"""Where metrics go that `_ABOUT` does not know."""

_KNOWN = {
    metric: (group, title, line)
    for group, titles in _ABOUT.items()
    for title in titles
    for metric, line in _LINES.get(title, {title: ""}).items()
}


@dataclasses.dataclass
class Panel:
    """One chart to be: its metrics, and the name of each one's line ("" if it needs none). `role`
    is set if all of it belongs to one role of a joint phase."""

    title: str
    role: str
    about: str
    members: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sparse(self) -> bool:
        """Of evaluations: some steps only."""
        return self.title.startswith("eval/")

    @property
    def accuracy(self) -> bool:
        return self.title in (ACCURACY, OTHER_ACCURACY)


def panels(names: Iterable[str]) -> dict[str, list[Panel]]:
    """Groups of panels for these metrics; `REST` last. Seconds (`time/...`) have a view of their
    own."""
    names = list(names)
    groups: dict[str, dict[tuple[str, str], Panel]] = {group: {} for group in _ABOUT}
    with_p2r = any(name == "eval/p2r/accuracy" for name in names)
    for name in names:
        place = _place(name, with_p2r)
        if place is None:
            continue
        group, title, role, line = place
        panel = Panel(title, role, _ABOUT[group].get(title, ""))
        groups[group].setdefault((title, role), panel).members[name] = line
    return {group: _ordered(group, found) for group, found in groups.items() if found}


def _place(name: str, with_p2r: bool) -> tuple[str, str, str, str] | None:
    """Group, title and role of the panel, name of the line; None for what no panel shows."""
    first, *rest = name.split("/")
    if first == "time":
        return None
    if first == "eval" and len(rest) > 1:
        mode, title = rest[0], "/".join(["eval", *rest[1:]])
        if title.removeprefix("eval/") in _LIMITS:
            return None
        if title == ACCURACY and with_p2r and mode not in DRIFT_MODES:
            title = OTHER_ACCURACY
        group = _KNOWN[title][0] if title in _KNOWN else REST
        return group, title, "", mode
    role = first if first in ROLES and rest else ""
    base = "/".join(rest) if role else name
    group, title, line = _KNOWN.get(
        base, (_PREFIXES.get(base.split("/")[0], REST) if "/" in base else REST, base, "")
    )
    return (group, title, role, line) if line else (group, title, "", role)


def _ordered(group: str, found: dict[tuple[str, str], Panel]) -> list[Panel]:
    """As in `_ABOUT`, then the unknown ones as they came; and so the lines of each."""
    order = list(_ABOUT[group])
    roles = ("", *ROLES)
    for panel in found.values():
        lines = DRIFT_MODES if panel.sparse else list(_LINES.get(panel.title, {})) or roles[1:]
        rank = {key: number for number, key in enumerate(lines)}
        panel.members = dict(
            sorted(
                panel.members.items(),
                key=lambda item: min(rank.get(part, len(rank)) for part in _parts(*item)),
            )
        )
    return sorted(
        found.values(),
        key=lambda p: (
            order.index(p.title) if p.title in order else len(order),
            roles.index(p.role),
        ),
    )


def _parts(metric: str, line: str) -> tuple[str, str]:
    """What may decide a line's place: its metric without a role, its name."""
    first, _, rest = metric.partition("/")
    return rest if first in ROLES else metric, line
