"""Evaluation modes: who answers, from which boxes, and how much of the evidence is shown.

    default          the direct prompt on the plain image
    baseline         the single-stage reasoning prompt on the plain image; also called thinking
    p2r              perceiver, then reasoner with its boxes
    oracle_box       reasoner with the true boxes
    random_box       reasoner with boxes as large as the perceiver's, at random places
    shuffled_box     reasoner with the perceiver's boxes of another question
    grid             reasoner with the whole image cut in four, at the cost of three crops
    annotated_only   p2r without crops: the outlined image alone
    crops_only       p2r without the outlined image: the crops alone

Training runs the same code between its phases, and there also

    live_perceiver   p2r with the live perceiver and the frozen partner's reasoner
    live_reasoner    p2r with the frozen partner's perceiver and the live reasoner

Every mode that shows boxes takes options: `p2r:crops=1` crops the first box only (0: the plain
image), `p2r:padding=0` cuts boxes exactly, `p2r:crops=5,padding=0.05` both.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from p2r_jax.roles.boxes import Box
from p2r_jax.roles.evidence import P2R, Shown
from p2r_jax.roles.prompts import Role

Boxes = Literal["none", "perceiver", "true", "random", "shuffled", "grid"]


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to answer a question."""

    name: str
    """As it was asked for, options included: what records and tables say."""
    role: Role
    """Who answers."""
    boxes: Boxes = "none"
    """Where the boxes come from that the reasoner is shown."""
    shown: Shown = P2R
    frozen: tuple[bool, bool] = (False, False)
    """Whether perceiver and reasoner are the frozen partner."""

    @property
    def measures_boxes(self) -> bool:
        """Whether the boxes are a perceiver's, to be compared with true ones."""
        return self.boxes == "perceiver"


GRID = [Box((x, y, x + 500.0, y + 500.0), "tile") for y in (0.0, 500.0) for x in (0.0, 500.0)]
# Five views for the price of p2r's four.
_GRID_SHOWN = Shown(overview="plain", crops=4, padding=0.0, budget=4 / 5)

_KNOWN = {
    mode.name: mode
    for mode in (
        Mode("default", "direct"),
        Mode("baseline", "baseline"),
        Mode("thinking", "baseline"),
        Mode("p2r", "reasoner", "perceiver"),
        Mode("oracle_box", "reasoner", "true"),
        Mode("random_box", "reasoner", "random"),
        Mode("shuffled_box", "reasoner", "shuffled"),
        Mode("grid", "reasoner", "grid", _GRID_SHOWN),
        Mode("annotated_only", "reasoner", "perceiver", Shown(show_crops=False)),
        Mode("crops_only", "reasoner", "perceiver", Shown(overview="none")),
        Mode("live_perceiver", "reasoner", "perceiver", frozen=(False, True)),
        Mode("live_reasoner", "reasoner", "perceiver", frozen=(True, False)),
    )
}
MODES = tuple(name for name, mode in _KNOWN.items() if not any(mode.frozen) and name != "thinking")
LIVE_MODES = tuple(name for name, mode in _KNOWN.items() if any(mode.frozen))
"""Modes that need the weights of a frozen partner."""


def parse_modes(names: Sequence[str], partner: bool = False) -> list[Mode]:
    """The modes of these names. partner: whether there are frozen weights.

    Raises ValueError for unknown modes and options, for none, and for one that is there twice.
    """
    known = (*MODES, *LIVE_MODES) if partner else MODES
    bases = [name.partition(":")[0] for name in names]
    unknown = [name for name in bases if name not in (*known, "thinking")]
    if unknown or not names:
        raise ValueError(f"unknown evaluation mode(s) {unknown}; choose from {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"an evaluation mode is there twice: {', '.join(names)}")
    return [_with_options(_KNOWN[base], name) for base, name in zip(bases, names, strict=True)]


def _with_options(mode: Mode, name: str) -> Mode:
    text = name.partition(":")[2]
    if not text:
        return dataclasses.replace(mode, name=name.rstrip(":"))
    if mode.boxes in ("none", "grid"):
        raise ValueError(f"evaluation mode {name!r}: {mode.name} takes no options")
    shown = mode.shown
    for option in text.split(","):
        key, _, value = option.partition("=")
        try:
            if key == "crops" and 0 <= int(value) <= 8:
                shown = dataclasses.replace(shown, crops=int(value))
            elif key == "padding" and 0 <= float(value) <= 1:
                shown = dataclasses.replace(shown, padding=float(value))
            else:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"evaluation mode {name!r}: {option!r} must be crops=0 to 8 or padding=0 to 1"
            ) from None
    return dataclasses.replace(mode, name=name, shown=shown)


def random_boxes(row_id: str, boxes: Sequence[Sequence[float]], seed: int) -> list[Box]:
    """Boxes of the same sizes at uniformly random places; depends on (row, seed) only."""
    rng = np.random.default_rng([seed, zlib.crc32(row_id.encode())])
    out = []
    for x1, y1, x2, y2 in boxes:
        width, height = x2 - x1, y2 - y1
        x, y = rng.uniform(0, 1000 - width), rng.uniform(0, 1000 - height)
        out.append(Box((x, y, x + width, y + height), "random"))
    return out


def donors(image_of: dict[str, Hashable], seed: int) -> dict[str, str]:
    """For each row id another row's, of another image if there is one; depends on ids and seed
    only. image_of: what tells images apart, by row id."""
    order = sorted(image_of, key=lambda i: (zlib.crc32(f"{seed} {i}".encode()), i))
    out = {}
    for place, own in enumerate(order):
        others = order[place + 1 :] + order[:place]
        foreign = (other for other in others if image_of[other] != image_of[own])
        out[own] = next(foreign, others[0] if others else own)
    return out
