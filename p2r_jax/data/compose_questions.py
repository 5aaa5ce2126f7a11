"""Questions of a composed benchmark: kinds, templates, options, and what can be had blindly.

    colour      What is the color of the banana?                        4 options
    word        What word is written on the tag below the banana?       4 options
    number      What number is written on the tag below the banana?     4 options
    horizontal  Is the banana on the left or right side of the drum?    2 options
    vertical    Is the banana above or below the drum?                  2 options

The first three are V*'s `direct_attributes`, the last two its `relative_position`, about as
frequent as there.  Guards against answers without looking: within a kind the letters are balanced
to within one question, and so are the colours and relations that are right; the options of a tag
are four texts that look alike when shrunk, the right one drawn evenly among them (drawn first, it
would be the one that shares most with the others).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from p2r_jax.data.compose_pixels import TINTS, luminance, tag_pixels

KINDS: dict[str, tuple[str, int, float]] = {
    "colour": ("direct_attributes", 4, 0.24),
    "word": ("direct_attributes", 4, 0.18),
    "number": ("direct_attributes", 4, 0.18),
    "horizontal": ("relative_position", 2, 0.20),
    "vertical": ("relative_position", 2, 0.20),
}
"""Category, number of options and share of each kind."""

CATEGORIES = ("direct_attributes", "relative_position")
LETTERS = "ABCD"
INSTRUCTION = "Answer with the option's letter from the given choices directly."

_WORDS = (
    "BALL BELL BULL BOLT BELT BOAT BEAT BOOT BOOK COOK COOL POOL TOOL TOLL TALL TELL TALE"
    " TAPE CAPE CAPS CUPS CAGE PAGE PALE SALE SALT HALT HALL HULL HEEL HEAL HEAT HEAD HERB"
    " HERO ZERO LAND LEND LEAD LEAN LOAN LOAD ROAD READ REED SEED SEND SAND BAND BOND BONE"
    " CONE CORE CORN CARD CART CAST COST POST PORT PART PARK BARK BARN BORN HORN HOLE POLE"
    " ROLE ROSE NOSE NOTE VOTE TONE TUNE DUNE DUST RUST REST NEST TEST TEXT NEXT"
)
WORDS = tuple(_WORDS.split())
"""Of tags: short, common, each with others that differ in a letter."""

NUMBERS = tuple(str(number) for number in range(100, 1000))

_NATIVE_DIFFERENCE = 15.0  # between two texts of one question, grey levels RMS over the plate


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is decided about a question before anything is composed.

    Attributes:
      split, number: which question it is; `number` counts within the split.
      kind: from `KINDS`.
      label: letter of the right option.
      answer: the right colour or relation; "" for texts, which depend on the size of the image.
    """

    split: str
    number: int
    kind: str
    label: str
    answer: str

    @property
    def category(self) -> str:
        return KINDS[self.kind][0]

    @property
    def id(self) -> str:
        return f"{self.split}_{self.number:05d}"


def plan_questions(split: str, count: int, rng: np.random.Generator) -> list[Plan]:
    """`count` questions of a split, kinds in random order."""
    sizes = {kind: int(share * count) for kind, (_, _, share) in KINDS.items()}
    by_remainder = sorted(KINDS, key=lambda k: sizes[k] - KINDS[k][2] * count)
    for kind in by_remainder[: count - sum(sizes.values())]:
        sizes[kind] += 1
    made = []
    for kind, size in sizes.items():
        options = KINDS[kind][1]
        right = {
            "colour": tuple(TINTS),
            "horizontal": ("left", "right"),
            "vertical": ("above", "below"),
        }.get(kind, ("",))
        # Pairs (letter, answer) in turn, so that the two are balanced and independent.
        pairs = [(LETTERS[i], r) for i in range(options) for r in right]
        order = _balanced(pairs, options, len(right), size, rng)
        made += [(kind, *pair) for pair in order]
    made = [made[i] for i in rng.permutation(count)]
    return [Plan(split, i, kind, label, answer) for i, (kind, label, answer) in enumerate(made)]


def _balanced(
    pairs: Sequence[tuple[str, str]],
    letters: int,
    answers: int,
    size: int,
    rng: np.random.Generator,
) -> list[tuple[str, str]]:
    """`size` pairs in which letters, and answers, differ in frequency by at most one."""
    letter_order, answer_order = rng.permutation(letters), rng.permutation(answers)
    rows = [pairs[i * answers : (i + 1) * answers] for i in letter_order]
    out = []
    for i in range(size):
        # A Latin walk: after lcm steps the letters shift against the answers.
        shift = i // int(np.lcm(letters, answers))
        out.append(rows[(i + shift) % letters][answer_order[i % answers]])
    return out


def phrase(kind: str, names: Sequence[str]) -> str:
    """The question, without options, about objects called `names`."""
    return {
        "colour": "What is the color of the {0}?",
        "word": "What word is written on the tag below the {0}?",
        "number": "What number is written on the tag below the {0}?",
        "horizontal": "Is the {0} on the left or right side of the {1}?",
        "vertical": "Is the {0} above or below the {1}?",
    }[kind].format(*names)


def relation_options(kind: str, answer: str, names: Sequence[str]) -> list[str]:
    """Both options of a relation, the right one first."""
    if kind == "horizontal":
        sentences = {s: f"The {names[0]} is on the {s} side of the {names[1]}." for s in _SIDES}
    else:
        sentences = {s: f"The {names[0]} is {s} the {names[1]}." for s in ("above", "below")}
    return [sentences.pop(answer), *sentences.values()]


_SIDES = ("left", "right")


def colour_options(answer: str, rng: np.random.Generator) -> list[str]:
    """Four colours, the right one first."""
    wrong = [tint for tint in TINTS if tint != answer]
    return [answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3])]


def text_options(
    kind: str, height: int, scale: float, rng: np.random.Generator
) -> tuple[list[str], dict[str, float]]:
    """Four texts that look alike in the overview and differ in the crop, the right one first.

    Args:
      kind: "word" or "number".
      height: of capitals, pixels of the image.
      scale: overview pixels per image pixel.

    Returns:
      the texts, and the least difference of two of them, grey levels RMS over the plate:
      {"native": ..., "overview": ...}.
    """
    pool, native, small = _pool(kind, height, round(scale, 4))
    chosen = [int(rng.integers(len(pool)))]
    for i in np.argsort(_rms(small, small[chosen[0]]), kind="stable"):
        if all(_rms(native[j], native[i]) >= _NATIVE_DIFFERENCE for j in chosen):
            chosen.append(int(i))
        if len(chosen) == 4:
            break
    if len(chosen) < 4:
        raise ValueError(f"no four texts {height} pixels tall can be told apart")
    chosen = [chosen[i] for i in rng.permutation(4)]
    pairs = [(i, j) for i in chosen for j in chosen if i < j]
    least = {
        "native": round(min(float(_rms(native[i], native[j])) for i, j in pairs), 1),
        "overview": round(min(float(_rms(small[i], small[j])) for i, j in pairs), 1),
    }
    return [pool[i] for i in chosen], least


@functools.lru_cache(maxsize=16)
def _pool(kind: str, height: int, scale: float) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """All texts of a kind, and their tags in grey [texts, h, w]: in the image, in the overview."""
    texts = WORDS if kind == "word" else NUMBERS
    native = np.stack([luminance(tag_pixels(text, height)) for text in texts])
    return texts, native, np.stack([_shrunk(plane, scale) for plane in native])


def _shrunk(plane: np.ndarray, scale: float) -> np.ndarray:
    size = (max(1, round(plane.shape[1] * scale)), max(1, round(plane.shape[0] * scale)))
    image = Image.fromarray(plane.round().astype(np.uint8))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)


def _rms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(a - b).mean(axis=(-2, -1)))


def shuffled(options: Sequence[str], label: str, rng: np.random.Generator) -> list[str]:
    """The options in the order shown, the right one (given first) at `label`."""
    wrong = [options[i] for i in 1 + rng.permutation(len(options) - 1)]
    at = LETTERS.index(label)
    return [*wrong[:at], options[0], *wrong[at:]]


def full_text(question: str, shown: Sequence[str]) -> str:
    """A question as V* words it: options and instruction included."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, shown, strict=False)]
    return "\n".join([question, *lines, INSTRUCTION])


BLIND = {
    "letter": "always the most frequent letter of this split",
    "letter by template": "the most frequent letter of this split for each template",
    "option by template": "the option most often right elsewhere for the template (fit on the other"
    " splits)",
    "most in common": "the option that shares most characters with the others",
}
"""Ways to answer without the image."""


def blind_baselines(
    rows: Sequence[Mapping[str, object]], elsewhere: Sequence[Mapping[str, object]]
) -> dict[str, list[bool]]:
    """Which rows each way of `BLIND` answers rightly.

    Args:
      rows: with keys "kind", "label" and "shown" (options in the order shown).
      elsewhere: rows of the other splits.
    """
    by_template: defaultdict[object, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_template[row["kind"]][str(row["label"])] += 1
    overall = Counter(str(row["label"]) for row in rows)
    prior: defaultdict[object, Counter[str]] = defaultdict(Counter)
    for row in elsewhere:
        prior[row["kind"]][_answer_key(row, LETTERS.index(str(row["label"])))] += 1
    right: dict[str, list[bool]] = {name: [] for name in BLIND}
    for row in rows:
        shown = row["shown"]
        assert isinstance(shown, list)
        indices = range(len(shown))
        common = [sum(_common(shown[i], shown[j]) for j in indices if j != i) for i in indices]
        guesses = {
            "letter": overall.most_common(1)[0][0],
            "letter by template": by_template[row["kind"]].most_common(1)[0][0],
            "option by template": LETTERS[
                max(indices, key=lambda i: prior[row["kind"]][_answer_key(row, i)])
            ],
            "most in common": LETTERS[max(indices, key=lambda i: common[i])],
        }
        for name, guess in guesses.items():
            right[name].append(guess == row["label"])
    return right


def _answer_key(row: Mapping[str, object], index: int) -> str:
    """An option without the names in it: "left" for "The banana is on the left side of ..."."""
    shown = row["shown"]
    assert isinstance(shown, list)
    words = set(str(shown[index]).rstrip(".").split())
    relation = words & {"left", "right", "above", "below"}
    return min(relation) if relation and row["kind"] in ("horizontal", "vertical") else shown[index]


def _common(a: str, b: str) -> int:
    return sum(x == y for x, y in zip(a, b, strict=False))
