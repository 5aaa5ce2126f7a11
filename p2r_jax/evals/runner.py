"""Evaluation of one set of weights: every question in every mode."""

from __future__ import annotations

import dataclasses
import itertools
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flax import nnx
from rich.progress import Progress

from p2r_jax.data.loader import LoadedRow, shared_images
from p2r_jax.data.rows import Row
from p2r_jax.evals.modes import GRID, Mode, donors, parse_modes, random_boxes
from p2r_jax.evals.record_file import Record
from p2r_jax.evals.records import Key, key_of
from p2r_jax.evals.scoring import box_figures
from p2r_jax.parallel.multihost import is_main
from p2r_jax.roles.answers import (
    Answer,
    answer_to,
    choice_letter,
    extract_answer,
    has_answer_tag,
)
from p2r_jax.roles.boxes import Box, ParsedBoxes, parse_response
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import ImageStore, parts, share_of
from p2r_jax.roles.pipeline import Pipeline
from p2r_jax.rollout.sampling import Sampling

PASSED_ON = ("cluster", "image_hash")
"""What records take from `Row.meta`, for scoring: which questions share an image."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How each role writes in an evaluation."""

    perceiver: Sampling
    reasoner: Sampling
    direct: Sampling
    samples: int = 0
    """Times each question is answered, drawn at the temperature of the samplings; 0 = once, greedy.
    """

    @classmethod
    def of(
        cls,
        perceiver: int,
        reasoner: int,
        direct: int,
        *,
        repetition_penalty: float = 1.0,
        penalize_prompt: bool = True,
        samples: int = 0,
        temperature: float = 0.0,
    ) -> Decoding:
        """New tokens of each role at most, and the rest for all."""
        common = Sampling(
            1,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            penalize_prompt=penalize_prompt,
        )
        caps = (perceiver, reasoner, direct)
        p, r, d = (dataclasses.replace(common, max_new_tokens=cap) for cap in caps)
        return cls(p, r, d, samples)


@dataclasses.dataclass
class Seconds:
    """Wall time by stage: load (waiting for images), upload, perceive, answer, grade."""

    by_stage: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.by_stage[stage] += time.perf_counter() - begin


def evaluate(
    pipeline: Pipeline,
    params: nnx.State,
    batches: Callable[[Callable[[Row], bool]], Iterable[list[LoadedRow]]],
    modes: Sequence[str],
    decoding: Decoding,
    *,
    total: int,
    seed: int = 0,
    grader: Grader | None = None,
    partner: nnx.State | None = None,
    on_record: Callable[[Record, LoadedRow], None] = lambda record, loaded: None,
    earlier: Sequence[Record] = (),
    seconds: Seconds | None = None,
    asked: Callable[[Row], str] = lambda row: row.question_with_options,
    description: str = "evaluating",
) -> list[Record]:
    """One record per question, mode and sample, in the layout that `scoring` and `report` read.

    batches: called for each pass over the questions (a second one is only for `shuffled_box`) with
    what tells whether a row has anything to answer, so that no other image is read.
    grader: default, one without a verifier; free text then raises ValueError, so check
    `answer_forms` of the source first. on_record is called with each new record as soon as its
    batch is done. earlier: records that need not be made again; they come first in what is
    returned. asked: how a question is put, options included. Modes that need true boxes leave out
    rows without any.
    """
    parsed = parse_modes(modes, partner is not None)
    first = [mode for mode in parsed if mode.boxes != "shuffled"]
    second = [mode for mode in parsed if mode.boxes == "shuffled"]
    if second and "p2r" not in modes:
        raise ValueError("evaluation mode shuffled_box takes boxes from p2r: add that mode")
    records = list(earlier)
    done = {key_of(record) for record in records}
    clock = seconds or Seconds()
    run = _Run(pipeline, params, partner, decoding, seed, grader or Grader(), clock, asked)
    with Progress(transient=True, disable=not is_main()) as progress:
        task = progress.add_task(description, total=total * (2 if second else 1))
        for group in filter(None, (first, second)):
            if group is second:
                run.take_boxes(records)

            def wanted(row: Row, group: Sequence[Mode] = group) -> bool:
                missing = any(run.missing(row, mode, done) for mode in group)
                if not missing:
                    progress.advance(task)
                return missing

            for batch in run.timed(batches(wanted)):
                for record, loaded in run.batch(batch, group, done):
                    on_record(record, loaded)
                    records.append(record)
                progress.advance(task, len(batch))
    return records


Question = tuple[int, str, str]
"""(index of the image, question with options, answer form)."""


@dataclasses.dataclass
class _Uploaded:
    """Rows whose images are on the devices."""

    rows: list[LoadedRow]
    images: ImageStore
    image_of: list[int]
    """Number of each row's image: rows may share one."""
    perceived: dict[Any, tuple[str, ParsedBoxes]] = dataclasses.field(default_factory=dict)
    """What perceivers wrote to these rows."""


class _Run:
    """What stays the same over the batches of an evaluation."""

    def __init__(
        self,
        pipeline: Pipeline,
        params: nnx.State,
        partner: nnx.State | None,
        decoding: Decoding,
        seed: int,
        grader: Grader,
        seconds: Seconds,
        asked: Callable[[Row], str],
    ):
        self.pipeline, self.decoding, self.seed = pipeline, decoding, seed
        self.grader, self.seconds, self.asked = grader, seconds, asked
        # parse_modes knows better than to ask for a partner that is not there.
        self.weights = {False: params, True: params if partner is None else partner}
        self.donated: dict[tuple[str, int], list[Box]] = {}
        """By row id and sample: the boxes that the perceiver gave another row."""

    def take_boxes(self, records: Sequence[Record]) -> None:
        """For `shuffled_box`: what p2r wrote, dealt out to other questions."""
        own = {(r["id"], r["sample"]): r for r in records if r["mode"] == "p2r"}
        image_of: dict[str, Hashable] = {
            r["id"]: r.get("image_hash") or r["id"] for r in own.values()
        }
        for row, donor in donors(image_of, self.seed).items():
            for sample in self.samples:
                if (donor, sample) in own:
                    boxes = own[donor, sample]["boxes"]
                    self.donated[row, sample] = [
                        Box(tuple(b["bbox_2d"]), b["label"]) for b in boxes
                    ]

    @property
    def samples(self) -> range:
        return range(max(1, self.decoding.samples))

    def timed(self, batches: Iterable[list[LoadedRow]]) -> Iterator[list[LoadedRow]]:
        iterator = iter(batches)
        while True:
            with self.seconds("load"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def batch(
        self, batch: list[LoadedRow], modes: Sequence[Mode], done: Collection[Key]
    ) -> Iterator[tuple[Record, LoadedRow]]:
        """The records of a batch that are not done, by mode, sample and row."""
        first, *others = self._parts(batch)
        records = self._part(first, batch, modes, done)
        if others:  # Else they are in order, and are told as they come.
            more = (record for part in others for record in self._part(part, batch, modes, done))
            records = iter(sorted(itertools.chain(records, more), key=lambda record: record[0]))
        yield from (record for _, record in records)

    def _parts(self, batch: list[LoadedRow]) -> list[list[int]]:
        """Numbers of the rows whose images are uploaded together: most often all of them."""
        numbers = shared_images([loaded.row for loaded in batch])
        firsts = [batch[numbers.index(number)] for number in range(max(numbers) + 1)]
        builder = self.pipeline.builder
        shards = share_of(builder.mesh).shards_of(len(firsts))
        shards = [s if r.shard is None else r.shard for r, s in zip(firsts, shards, strict=True)]
        together = parts([loaded.size for loaded in firsts], shards, builder.buckets)
        return [[i for i, number in enumerate(numbers) if number in part] for part in together]

    def _part(
        self,
        part: list[int],
        batch: list[LoadedRow],
        modes: Sequence[Mode],
        done: Collection[Key],
    ) -> Iterator[tuple[tuple[int, int, int], tuple[Record, LoadedRow]]]:
        """Records with what sorts them, of some rows of a batch."""
        wanted = [
            (number, sample, rows)
            for number, mode in enumerate(modes)
            for sample in self.samples
            if (rows := [i for i in part if sample in self.missing(batch[i].row, mode, done)])
        ]
        if not wanted:
            return
        with self.seconds("upload"):
            uploaded = self._upload([batch[i] for i in part])
        for number, sample, rows in wanted:
            own = [part.index(i) for i in rows]
            records = self._answer(uploaded, modes[number], sample, own)
            for i, record in zip(rows, records, strict=True):
                yield (number, sample, i), record

    def _upload(self, rows: list[LoadedRow]) -> _Uploaded:
        numbers = shared_images([loaded.row for loaded in rows])
        firsts = [rows[numbers.index(number)] for number in range(max(numbers) + 1)]
        # Few sizes, however many rows share an image.
        room = min(len(rows), 1 << (len(firsts) - 1).bit_length())
        builder = self.pipeline.builder
        return _Uploaded(
            rows, ImageStore.of_rows(firsts, builder.buckets, builder.mesh, room), numbers
        )

    def missing(self, row: Row, mode: Mode, done: Collection[Key]) -> list[int]:
        """Samples of a row that are to be answered in this mode."""
        if mode.boxes == "true" and not row.boxes:
            return []
        return [s for s in self.samples if (row.id, mode.name, s) not in done]

    def _answer(
        self, uploaded: _Uploaded, mode: Mode, sample: int, rows: list[int]
    ) -> list[tuple[Record, LoadedRow]]:
        """Records of one mode. rows: of `uploaded`."""
        batch = uploaded.rows
        chosen = [batch[i].row for i in rows]
        questions = [
            (uploaded.image_of[i], self.asked(row), row.answer_form)
            for i, row in zip(rows, chosen, strict=True)
        ]
        texts: list[str | None] = [None for _ in rows]
        boxes: list[list[Box]] = [[] for _ in rows]
        if mode.boxes in ("perceiver", "random"):
            wrote = self._perceive(uploaded, mode.frozen[0], sample, rows, questions)
            boxes = [list(parsed.boxes) for _, parsed in wrote]
            if mode.boxes == "perceiver":
                texts = [text for text, _ in wrote]
            else:
                corners = [[box.bbox_2d for box in own] for own in boxes]
                boxes = [
                    random_boxes(row.id, own, self.seed)
                    for row, own in zip(chosen, corners, strict=True)
                ]
        elif mode.boxes == "true":
            boxes = [[Box(box, "true") for box in row.boxes] for row in chosen]
        elif mode.boxes == "shuffled":
            boxes = [self.donated.get((row.id, sample), []) for row in chosen]
        elif mode.boxes == "grid":
            boxes = [GRID for _ in rows]
        with self.seconds("answer"):
            seeds = self._seeds(chosen, mode, sample)
            answers = self._write(mode, uploaded.images, questions, boxes, seeds)
        graded = [_answer(mode, batch[i], text) for i, text in zip(rows, answers, strict=True)]
        with self.seconds("grade"):
            grades = self.grader.grade(graded)
        return [
            (_record(mode, sample, batch[i], text, own, answer, grade), batch[i])
            for i, text, own, answer, grade in zip(rows, texts, boxes, graded, grades, strict=True)
        ]

    def _perceive(
        self,
        uploaded: _Uploaded,
        frozen: bool,
        sample: int,
        rows: list[int],
        questions: Sequence[Question],
    ) -> list[tuple[str, ParsedBoxes]]:
        """Each perceiver writes once for all modes. questions: of these rows."""
        perceived = uploaded.perceived
        missing = [
            (i, question)
            for i, question in zip(rows, questions, strict=True)
            if (frozen, sample, i) not in perceived
        ]
        if missing:
            seeds = self._seeds([uploaded.rows[i].row for i, _ in missing], None, sample)
            with self.seconds("perceive"):
                wrote = self.pipeline.perceive(
                    self.weights[frozen],
                    uploaded.images,
                    [question for _, question in missing],
                    self.decoding.perceiver,
                    seeds,
                )
            for (i, _), own in zip(missing, wrote, strict=True):
                perceived[frozen, sample, i] = own
        return [perceived[frozen, sample, i] for i in rows]

    def _write(
        self,
        mode: Mode,
        images: ImageStore,
        questions: Sequence[Question],
        boxes: Sequence[Sequence[Box]],
        seeds: list[int] | None,
    ) -> list[str]:
        params = self.weights[mode.frozen[1]]
        if mode.role == "reasoner":
            return self.pipeline.reason(
                params, images, questions, boxes, self.decoding.reasoner, seeds, mode.shown
            )
        sampling = self.decoding.direct if mode.role == "direct" else self.decoding.reasoner
        builder = self.pipeline.builder
        requests = [builder.plain(mode.role, images, *question) for question in questions]
        return [o.text for o in self.pipeline.complete(params, requests, images, sampling, seeds)]

    def _seeds(self, rows: Sequence[Any], mode: Mode | None, sample: int) -> list[int] | None:
        """None for greedy decoding. A draw depends on (row, mode or perceiver, sample, seed)."""
        if not self.decoding.samples:
            return None
        who = "perceiver" if mode is None else mode.name
        return [zlib.crc32(f"{self.seed} {row.id} {who} {sample}".encode()) for row in rows]


def _answer(mode: Mode, loaded: LoadedRow, text: str) -> Answer:
    """The completion as it is graded in this mode."""
    # A direct answer carries no tag; everywhere else an answer outside its tag is wrong.
    return dataclasses.replace(answer_to(loaded.row, text), require_tag=mode.role != "direct")


def _record(
    mode: Mode,
    sample: int,
    loaded: LoadedRow,
    perceiver_text: str | None,
    boxes: list[Box],
    answer: Answer,
    grade: float | None,
) -> Record:
    row = loaded.row
    height, width = loaded.size
    text = answer.response
    tagged = has_answer_tag(text) or not answer.require_tag
    prediction = extract_answer(text) if tagged else None
    if prediction is not None and row.answer_form == "mca":
        prediction = choice_letter(prediction, answer.letters) or None
    corners = [box.bbox_2d for box in boxes]
    record = {
        "id": row.id,
        "mode": mode.name,
        "sample": sample,
        "category": row.category,
        "question": row.question,
        "options": list(row.options),
        "answer": row.answer,
        "answer_form": row.answer_form,
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
    }
    meta: Mapping[str, Any] = row.meta
    record |= {name: meta[name] for name in PASSED_ON if name in meta}
    if "cycle_category" in meta:
        record["meta"] = {"cycle_category": meta["cycle_category"]}
    if mode.measures_boxes:
        record |= box_figures(corners, row.boxes, width, height)
    return record
