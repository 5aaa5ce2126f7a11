"""Reading the fields of an evaluation record, old or new, whatever wrote it.

A record is one answer to one question in one mode: the JSON object that `evals.runner` appends to
`RUN/eval/NAME.jsonl`. Optional fields: `sample` (0 to k-1, where a question was answered k times),
`cluster` (rotations of one question share it), `image_hash`, `answer_form`, and `meta`, what the
benchmark's row said besides, such as HR-Bench's `cycle_category`.
"""

from __future__ import annotations

import string
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from p2r_jax.evals.answer_rules import RULES, Form, authors, options_in

Record: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, str, int]
"""(row id, mode, sample)."""


def verdict(record: Record) -> int:
    """1 or 0. Raises ValueError if `correct` is anything else: no verdict is not a wrong answer."""
    value = record.get("correct")
    if value not in (0, 1):  # Also accepts bools and 0.0 / 1.0.
        raise ValueError(f"record {record.get('id')!r}: 'correct' must be 0 or 1, is {value!r}")
    return int(value)


def sample_of(record: Record) -> int:
    """Which of several answers to a question this is; 0 if there is one."""
    return record.get("sample") or 0


def key_of(record: Record) -> Key:
    """What tells a record from all others of an evaluation."""
    return record["id"], record["mode"], sample_of(record)


def rotation(record: Record) -> Hashable | None:
    """HR-Bench's `cycle_category`, None for other benchmarks. Published splits name the four values
    differently, so they are only ever grouped."""
    meta = record.get("meta")
    value = meta.get("cycle_category") if isinstance(meta, Mapping) else None
    return record.get("cycle_category") if value is None else value


def clusters(records: Sequence[Record]) -> list[Hashable] | None:
    """For each record what it shares with others, None if nothing repeats.

    The image if every record names it (all questions about an image are easy or hard together, and
    a question's rotations share one), else the question of which it is a rotation, else, where
    questions are answered several times, the question.
    """
    sampled = any(sample_of(record) for record in records)
    for field in ("image_hash", "cluster", *(("id",) if sampled else ())):
        values = [record.get(field) for record in records]
        if None not in values:
            return values if len(set(values)) < len(values) else None
    return None


def options_of(record: Record) -> tuple[list[str], int]:
    """Texts of the options, from the question if they are in it ([] if nowhere), and how many there
    are, 4 if nothing tells."""
    options = record.get("options")
    if isinstance(options, Mapping):
        options = list(options.values())
    texts = [str(option) for option in options] if isinstance(options, list) else []
    texts = texts or options_in(str(record.get("question") or ""))
    answer = str(record.get("answer") or "")
    known = string.ascii_uppercase.find(answer) + 1 if len(answer) == 1 else 0
    return texts, max(len(texts) or 4, known)


def form_of(record: Record, choices: int) -> Form:
    """The benchmark whose form the question has, told by its rotations and number of options."""
    if rotation(record) is not None:
        return "hrbench"
    return "mme_realworld" if choices > 4 else "vstar"


def is_choice(record: Record) -> bool:
    """Whether the true answer is an option letter; told by itself in records without a form."""
    form = record.get("answer_form")
    if isinstance(form, str):
        return form == "mca"
    answer = record.get("answer")
    return isinstance(answer, str) and len(answer) == 1 and answer in string.ascii_uppercase


def requires_tag(record: Record) -> bool:
    """Whether an answer outside `<answer>` is wrong: in every mode but the direct one."""
    return record.get("mode") != "default"


def chosen(record: Record) -> dict[str, str | None]:
    """The option that each rule reads in a record's answer, by the rule's name."""
    text = record.get("reasoner_text")
    response = text if isinstance(text, str) else ""
    options, choices = options_of(record)
    form = form_of(record, choices)
    return {
        name: authors(response, options, choices, form, requires_tag(record))
        if rule is authors
        else rule(response, options, choices, form)
        for name, rule in RULES.items()
    }


def by_category(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each category, sorted by its name; "" for those without one."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("category") or "", []).append(record)
    return {name: groups[name] for name in sorted(groups)}
