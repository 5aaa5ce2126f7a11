"""V* Bench: its folder with true boxes, and its parquet form without.

In the folder `test_questions.jsonl` lists the questions, and beside each image lies a JSON of the
same stem with `target_object` and `bbox`, [x, y, width, height] in pixels for each.  That folder
holds other sets too (`GPT4V-hard`, `OCR`); what is not listed is not part of the benchmark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from p2r_jax.data.benchmarks import (
    Benchmark,
    choice_row,
    find_files,
    image_of,
    lettered_options,
    needed,
)
from p2r_jax.data.rows import Box, Row, RowError
from p2r_jax.data.tables import Record, Table

QUESTIONS = "test_questions.jsonl"
FOLDERS = ("V-Star-with-BBox", "V-Star", "vstar-bench", "vstar_bench")

_INSTRUCTION = re.compile(
    r"\s*Answer with the option'?s letter from the given choices directly\.?\s*$"
)


def split_text(text: str) -> tuple[str, list[str], str]:
    """(question, options, both) of a published text.

    The third is the text without its last line, which tells a model how to answer: that is how the
    authors of P2R put the question. Options are [] if the text has none in parentheses.

    >>> split_text("Which?\\n(A) red\\n(B) blue\\nAnswer with the option's letter from the given "
    ...            "choices directly.")
    ('Which?', ['red', 'blue'], 'Which?\\n(A) red\\n(B) blue')
    """
    asked = _INSTRUCTION.sub("", text).strip()
    question, *rest = re.split(r"\n\s*(?=\([A-Z]\))", asked)
    options = lettered_options(rest)
    return (question.strip(), options, asked) if options else (asked, [], asked)


def boxes_of(annotation: Any, width: int, height: int) -> list[Box]:
    """True boxes in 0-1000 units from [x, y, width, height] in pixels, cut to the image.

    Raises ValueError for what is no list of boxes that lie in the image.
    """
    boxes = []
    for box in annotation:
        x, y, w, h = (float(value) for value in box)
        if not all(math.isfinite(v) for v in (x, y, w, h)):
            raise ValueError(f"a box is not finite: {box}")
        corners = (
            max(x, 0.0) / width * 1000,
            max(y, 0.0) / height * 1000,
            min(x + w, width) / width * 1000,
            min(y + h, height) / height * 1000,
        )
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise ValueError(f"a box lies outside the image of {width} x {height} pixels: {box}")
        boxes.append(corners)
    return boxes


def vstar_row(record: Record, path: Path, number: int) -> Row:
    """A question of either form."""
    id = str(needed(record, "question_id", f"{path.name}:{number}"))
    question, options, asked = split_text(str(needed(record, "text", id)))
    image = image_of(needed(record, "image", id), id, _image_folders(path))
    annotation = image.with_suffix(".json") if isinstance(image, Path) else None
    meta: dict[str, Any] = {"question_id": id}
    boxes: Sequence[Box] = ()
    if annotation is not None and annotation.is_file():
        boxes, meta["target_object"] = _annotated(annotation, image, id)
    return choice_row(
        id,
        question,
        asked,
        options,
        needed(record, "label", id),
        boxes=tuple(boxes),
        category=str(record.get("category", "")),
        image_source=image,
        meta=meta,
    )


def _image_folders(path: Path) -> list[Path]:
    return [path.parent, path.parent.parent]


def _annotated(annotation: Path, image: Any, id: str) -> tuple[list[Box], list[str]]:
    """True boxes and the names of what is in them."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RowError(id, "image", f"cannot decode {image}: {error}") from error
    try:
        known = json.loads(annotation.read_bytes())
        names = [str(name) for name in known.get("target_object", [])]
        return boxes_of(known.get("bbox", []), width, height), names
    except (TypeError, ValueError, AttributeError) as error:
        raise RowError(id, "boxes", f"{annotation.name}: {error}") from error


def _find(source: Path) -> Table:
    for folder in [source, *(source / name for name in FOLDERS)]:
        questions = folder / QUESTIONS
        if questions.is_file():
            return Table([questions], "image")
    only_test = lambda path: "train" not in path.rpartition("/")[2]
    return Table(find_files(source, "vstar", FOLDERS, only_test, (".parquet", ".jsonl")), "image")


VSTAR = Benchmark("vstar", "test", _find, vstar_row, "V* Bench")
