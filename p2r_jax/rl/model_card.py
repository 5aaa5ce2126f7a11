"""What is said of exported weights: on the console, in summary.json and in their README.md."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2r_jax.rl.best import Best, Score

MARK = "<!-- Written by p2r_jax with the weights. Without this line it stays when they change. -->"
"""What a README.md has that is replaced with the weights."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Which weights of a run were exported, and why."""

    settings: Mapping[str, Any]
    """Of the run, as its checkpoints have them."""
    steps: Sequence[int]
    """Of each phase; none where that is not known."""
    step: int
    phase: int | None
    """Number of the phase that took the step, from 0; None = none did, or it is not known."""
    metric: str | None = None
    score: Score | None = None
    """Of these weights by `metric`; None = they were not evaluated."""
    candidates: int | None = None
    """How many evaluations they are the best of; None = they were not chosen."""

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], best: Best, last: int, chosen: Score | None
    ) -> Exported:
        """last: step that is exported if none was chosen."""
        step = last if chosen is None else chosen.step
        phase = best.phase_of(step)
        return cls(
            settings,
            [own.steps for own in best.phases],
            step,
            None if phase is None else phase.number,
            best.metric,
            best.scores.get(step),
            None if chosen is None else len(best.scores),
        )

    @property
    def role(self) -> str | None:
        """That learned in the phase."""
        roles = self._roles()
        return None if self.phase is None or not roles else roles[self.phase % len(roles)]

    def _roles(self) -> list[str]:
        return [str(own.get("role")) for own in self.settings.get("phases", ())]

    @property
    def where(self) -> str:
        """Example: step 20 of 180, phase 1 (perceiver)."""
        text = f"step {self.step} of {sum(self.steps)}" if self.steps else f"step {self.step}"
        return text if self.role is None else f"{text}, phase {(self.phase or 0) + 1} ({self.role})"

    def __str__(self) -> str:
        if self.score is None:
            return f"export: weights of {self.where}, the last"
        figure = f"{self.metric} {self.score}"
        if self.candidates is None:
            return f"export: weights of {self.where}, the last: {figure}"
        if self.step == 0:
            return (
                f"export: no step is better than the start, the best of {self.candidates} "
                f"evaluations: it holds the weights that the run started from, {figure}"
            )
        return (
            f"export: weights of {self.where}, the best of {self.candidates} evaluations: {figure}"
        )

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {"step": self.step}
        if self.phase is not None:
            found |= {"phase": self.phase + 1, "role": self.role}
        found["chosen"] = "last" if self.candidates is None else "best"
        if self.score is not None:
            # Not "accuracy": it is no evaluation of its own.
            found |= {"metric": self.metric, "value": self.score.accuracy}
            found |= {"low": self.score.low, "high": self.score.high, "n": self.score.n}
        return found

    def card(self, before: Path | None = None) -> str:
        """README.md. Of paths only the last part is told: a card is passed on. before: of the
        weights that these replace; if a person wrote that, it stays."""
        if before is not None and before.is_file() and MARK not in (own := before.read_text()):
            return own
        base = posixpath.basename(str(self.settings["model"]["path"]).rstrip("/"))
        roles = self._roles()
        plan = [f"{roles[n % len(roles)]} {count}" for n, count in enumerate(self.steps) if roles]
        rows = {
            "base model": base,
            "method": "PRA-GRPO" + (f"; steps of its phases: {', '.join(plan)}" if plan else ""),
            "weights": self.where + (" (those it started from)" if self.step == 0 else ""),
        }
        if self.score is not None:
            rows[f"{self.metric}, greedy"] = f"{self.score}, validation questions of the run"
        rows["seed"] = str(self.settings.get("seed", "not known"))
        rows["p2r_jax"] = importlib.metadata.version("p2r_jax")
        lines = [
            *("---", "library_name: transformers", "pipeline_tag: image-text-to-text"),
            *("tags: [p2r_jax, pra-grpo]", "---", MARK, ""),
            *(f"# {base}, trained with PRA-GRPO", ""),
            "Perceive-to-Reason: one model in two roles. The perceiver names boxes, the reasoner",
            "answers from them.",
            *("", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())),
        ]
        if self.score is not None:
            lines += ["", "In brackets: the 95 % interval."]
        if self.score is not None and self.candidates is not None:
            lines += [
                f"The step is the best of {self.candidates} by such evaluations, which makes its",
                "figure too good: measure on other questions.",
            ]
        return "\n".join(lines) + "\n"
