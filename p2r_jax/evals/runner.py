"""Evaluation of one set of weights: every question in every mode, greedy.

    default      the direct prompt on the plain image
    baseline     the single-stage reasoning prompt on the plain image
    p2r          perceiver, then reasoner with its boxes
    oracle_box   reasoner with the true boxes
    random_box   reasoner with boxes of the true size at a random place

Training runs the same code between its phases, and there also

    live_perceiver   p2r with the live perceiver and the frozen partner's reasoner
    live_reasoner    p2r with the frozen partner's perceiver and the live reasoner
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.progress import Progress

from p2r_jax.data.loader import LoadedRow
from p2r_jax.evals.scoring import box_figures, summarize_modes
from p2r_jax.parallel.multihost import is_main
from p2r_jax.roles.answers import (
    Answer,
    choice_letter,
    choice_letters,
    extract_answer,
    has_answer_tag,
)
from p2r_jax.roles.boxes import Box, ParsedBoxes, parse_response
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.pipeline import Pipeline
from p2r_jax.roles.prompts import Role
from p2r_jax.roles.render import crops
from p2r_jax.roles.requests import ImageStore
from p2r_jax.rollout.sampling import Sampling

MODES = ("default", "baseline", "p2r", "oracle_box", "random_box")
LIVE_MODES = ("live_perceiver", "live_reasoner")
"""Modes that need the weights of a frozen partner."""
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How each role writes in an evaluation."""

    perceiver: Sampling
    reasoner: Sampling
    direct: Sampling

    @classmethod
    def greedy(
        cls,
        perceiver: int,
        reasoner: int,
        direct: int,
        repetition_penalty: float = 1.0,
        penalize_prompt: bool = True,
    ) -> Decoding:
        """New tokens of each role at most, and a penalty for all."""
        greedy = Sampling(
            1,
            temperature=0.0,
            repetition_penalty=repetition_penalty,
            penalize_prompt=penalize_prompt,
        )
        caps = (perceiver, reasoner, direct)
        return cls(*(dataclasses.replace(greedy, max_new_tokens=cap) for cap in caps))


def check_modes(modes: Sequence[str], partner: bool = False) -> None:
    """Raise ValueError for an unknown mode. partner: whether there is one."""
    known = (*MODES, *LIVE_MODES) if partner else MODES
    unknown = [mode for mode in modes if mode not in known]
    if unknown or not modes:
        raise ValueError(f"unknown evaluation mode(s) {unknown}; choose from {', '.join(known)}")


def random_boxes(row_id: str, boxes: Sequence[Sequence[float]], seed: int) -> list[Box]:
    """Boxes of the same sizes at uniformly random places; depends on (row, seed) only."""
    rng = np.random.default_rng([seed, zlib.crc32(row_id.encode())])
    out = []
    for x1, y1, x2, y2 in boxes:
        width, height = x2 - x1, y2 - y1
        x, y = rng.uniform(0, 1000 - width), rng.uniform(0, 1000 - height)
        out.append(Box((x, y, x + width, y + height), "random"))
    return out


def evaluate(
    pipeline: Pipeline,
    params: nnx.State,
    batches: Iterable[list[LoadedRow]],
    modes: Sequence[str],
    decoding: Decoding,
    *,
    total: int,
    seed: int = 0,
    grader: Grader | None = None,
    partner: nnx.State | None = None,
    on_record: Callable[[Record, LoadedRow], None] = lambda record, loaded: None,
    description: str = "evaluating",
) -> list[Record]:
    """One record per question and mode, in the layout that `scoring` and `report` read.

    grader: default, one without a verifier; free text then raises ValueError, so check
    `answer_forms` of the source first. on_record is called with each record as soon as its batch is
    done. Modes that need true boxes leave out rows without any.
    """
    check_modes(modes, partner is not None)
    grader = grader or Grader()
    records: list[Record] = []
    with Progress(transient=True, disable=not is_main()) as progress:
        task = progress.add_task(description, total=total)
        for batch in batches:
            images = ImageStore.upload(
                [b.image for b in batch], pipeline.builder.buckets, pipeline.builder.mesh
            )
            perceivers: dict[bool, list[tuple[str, ParsedBoxes]]] = {}
            for mode in modes:
                for record, loaded in _run_mode(
                    pipeline, (params, partner), batch, images, mode, decoding, seed, grader,
                    perceivers,
                ):  # fmt: skip
                    on_record(record, loaded)
                    records.append(record)
            progress.advance(task, len(batch))
    return records


def _run_mode(
    pipeline: Pipeline,
    weights: tuple[nnx.State, nnx.State | None],
    batch: list[LoadedRow],
    images: ImageStore,
    mode: str,
    decoding: Decoding,
    seed: int,
    grader: Grader,
    perceivers: dict[bool, list[tuple[str, ParsedBoxes]]],
) -> list[tuple[Record, LoadedRow]]:
    """weights: live and frozen. perceivers: what each of them wrote to this batch, filled in."""
    params = weights[0]
    partner = params if weights[1] is None else weights[1]  # check_modes knows better
    chosen = [
        (i, b)
        for i, b in enumerate(batch)
        if mode not in ("oracle_box", "random_box") or b.row.boxes
    ]
    if not chosen:
        return []
    questions = [(i, b.row.question_with_options, b.row.answer_form) for i, b in chosen]
    perceived: list[str | None] = [None for _ in chosen]
    boxes: list[list[Box]] = [[] for _ in chosen]
    if mode == "default" or mode == "baseline":
        role: Role = "direct" if mode == "default" else "baseline"
        requests = [pipeline.builder.plain(role, images, *question) for question in questions]
        sampling = decoding.direct if mode == "default" else decoding.reasoner
        answers = [o.text for o in pipeline.complete(params, requests, images, sampling)]
    else:
        if mode in ("p2r", *LIVE_MODES):
            frozen = mode == "live_reasoner"
            if frozen not in perceivers:
                own = partner if frozen else params
                perceivers[frozen] = pipeline.perceive(own, images, questions, decoding.perceiver)
            found = perceivers[frozen]
            perceived = [text for text, _ in found]
            boxes = [list(parsed.boxes) for _, parsed in found]
        elif mode == "oracle_box":
            boxes = [[Box(box, "true") for box in b.row.boxes] for _, b in chosen]
        else:
            boxes = [random_boxes(b.row.id, b.row.boxes, seed) for _, b in chosen]
        own = partner if mode == "live_perceiver" else params
        answers = pipeline.reason(own, images, questions, boxes, decoding.reasoner)
    graded = [_answer(mode, b, text) for (_, b), text in zip(chosen, answers, strict=True)]
    grades = grader.grade(graded)
    return [
        (_record(mode, b, text, own, answer, grade), b)
        for (_, b), text, own, answer, grade in zip(
            chosen, perceived, boxes, graded, grades, strict=True
        )
    ]


def _answer(mode: str, loaded: LoadedRow, text: str) -> Answer:
    """The completion as it is graded in this mode."""
    row = loaded.row
    return Answer(
        text,
        row.answer,
        row.answer_form,
        question=row.question_with_options,
        letters=choice_letters(len(row.options), row.answer),
        # A direct answer carries no tag; everywhere else an answer outside its tag is wrong.
        require_tag=mode != "default",
    )


def _record(
    mode: str,
    loaded: LoadedRow,
    perceiver_text: str | None,
    boxes: list[Box],
    answer: Answer,
    grade: float | None,
) -> Record:
    row = loaded.row
    height, width = loaded.image.shape[:2]
    text = answer.response
    tagged = has_answer_tag(text) or not answer.require_tag
    prediction = extract_answer(text) if tagged else None
    if prediction is not None and row.answer_form == "mca":
        prediction = choice_letter(prediction, answer.letters) or None
    corners = [box.bbox_2d for box in boxes]
    return {
        "id": row.id,
        "mode": mode,
        "category": row.category,
        "question": row.question,
        "options": list(row.options),
        "answer": row.answer,
        "prediction": prediction,
        "correct": grade,
        "perceiver_text": perceiver_text,
        "parse_ok": None if perceiver_text is None else parse_response(perceiver_text).well_formed,
        "boxes": [{"bbox_2d": list(b.bbox_2d), "label": b.label} for b in boxes],
        "true_boxes": [list(box) for box in row.boxes],
        "reasoner_text": text,
        "width": width,
        "height": height,
        "image": None,
        "crops": [],
    } | (box_figures(corners, row.boxes, width, height) if mode in ("p2r", *LIVE_MODES) else {})


class EvalWriter:
    """Writes records to RUN/eval/NAME.jsonl as they come, pictures of some, and the summary."""

    def __init__(self, run: Path, name: str, pictures: int):
        self.folder = run / "eval"
        self.name = name
        self.pictures = pictures
        self.pictured: dict[str, int] = {}
        self.active = is_main()
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = (self.folder / f"{name}.jsonl").open("w")

    def __call__(self, record: Record, loaded: LoadedRow) -> None:
        if not self.active:
            return
        done = self.pictured.get(record["mode"], 0)
        if done < self.pictures:
            self.pictured[record["mode"]] = done + 1
            record |= save_pictures(
                self.folder.parent, f"eval/images/{record['id'].replace('/', '_')}", record, loaded
            )
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def finish(self, records: list[Record]) -> dict[str, Any]:
        """Write and return the summary by mode. Answers that nothing could grade are left out and
        counted as `ungraded`."""
        graded = [record for record in records if record["correct"] is not None]
        summary = summarize_modes(self.name, graded)
        summary["ungraded"] = len(records) - len(graded)
        if not self.active:
            return summary
        self.file.close()
        file = self.folder / f"{self.name}.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(temporary, file)
        return summary


def save_pictures(
    run: Path, stem: str, record: Record, loaded: LoadedRow, longest: int | None = None
) -> Record:
    """Save the image and the crops of a record's boxes; returns the fields that point to them.

    longest: side of a picture in pixels; larger ones are shrunk.
    """
    from PIL import Image

    # Ids of two benchmarks may be equal, pictures are not.
    image = run / f"{stem}_{zlib.crc32(loaded.image.tobytes()):08x}.jpg"
    image.parent.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        picture = Image.fromarray(loaded.image)
        picture.thumbnail((longest or picture.width, longest or picture.height))
        picture.save(image, quality=90)
    boxes = [Box(tuple(b["bbox_2d"]), b["label"]) for b in record["boxes"]]
    paths = []
    for i, crop in enumerate(crops(loaded.image, boxes)):
        path = run / f"{stem}_{record['mode']}_crop{i}.jpg"
        crop.thumbnail((longest or crop.width, longest or crop.height))
        crop.save(path, quality=90)
        paths.append(str(path.relative_to(run)))
    return {"image": str(image.relative_to(run)), "crops": paths}
