"""One training or evaluation example, `Row`, and the errors that name it.

Every source (procedural, JSON lines, parquet, tfds) yields `Row` values; everything later in the
data path (plan, loader, rewards, scoring) reads only this type.  A row is small: the image stays
undecoded (a path, bytes, an array or a function) until `load_image` is called, so a source can be
indexed, shuffled and filtered without touching pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import os
import string
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

ANSWER_FORMS = ("mca", "na", "free_form")
"""Option letter, number, free text: the three answer forms of the paper."""

Box: TypeAlias = tuple[float, float, float, float]
"""(x1, y1, x2, y2) in units of 1/1000 of the image width and height."""

ImageSource: TypeAlias = (
    "Callable[[], ImageSource] | bytes | str | os.PathLike[str] | np.ndarray | Image.Image"
)


class RowError(ValueError):
    """A row that cannot be used.  The message names the row and the field."""

    def __init__(self, row_id: str, field: str, problem: str):
        super().__init__(f"row {row_id!r}, field {field!r}: {problem}")
        self.row_id = row_id
        self.field = field
        self.problem = problem

    def __reduce__(self):
        # Exceptions are rebuilt from `args`, which holds the message only; data-loader workers
        # send theirs to the parent process by pickle.
        return RowError, (self.row_id, self.field, self.problem)


@dataclasses.dataclass(frozen=True)
class Row:
    """One question about one image.

    Attributes:
      id: name of the row, unique in its source; every error message carries it.
      question: the question.  Without the options when `options` holds them; some published sets
        write the options into the question, then `options` is empty.
      answer: the true answer.  A capital letter when `answer_form` is "mca".
      answer_form: "mca" (option letter), "na" (number) or "free_form" (text).
      options: texts of options A, B, C, ...  Empty when there are none or they are in `question`.
      boxes: true boxes of the evidence, 0-1000 units, x1 < x2 and y1 < y2.  Empty if unknown.
      category: group under which an evaluation reports the row.
      image_source: where the pixels are: a path, encoded bytes, a uint8 array [H, W, 3], a PIL
        image, or a function that returns one of these (called at each `load_image`).
      image_hash: SHA-256 of the encoded image in hex, of a source that knows it; None = unknown.
      meta: anything else a source wants to pass on; not read by the core.

    Raises:
      RowError: a field is invalid.  The image is only checked by `load_image`.
    """

    id: str
    question: str
    answer: str
    answer_form: str
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    category: str = ""
    image_source: ImageSource = dataclasses.field(default=b"", repr=False, compare=False)
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    image_hash: str | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise RowError(str(self.id), "id", "must be a non-empty string")
        for field in ("question", "answer"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise RowError(self.id, field, f"must be a non-empty string, is {value!r}")
        if self.answer_form not in ANSWER_FORMS:
            raise RowError(
                self.id, "answer_form", f"is {self.answer_form!r}; use one of {ANSWER_FORMS}"
            )
        if not isinstance(self.category, str):
            raise RowError(self.id, "category", f"must be a string, is {self.category!r}")
        object.__setattr__(self, "options", self._checked_options())
        object.__setattr__(self, "boxes", self._checked_boxes())
        if self.answer_form == "mca":
            self._check_choice()

    @property
    def question_with_options(self) -> str:
        """The question followed by one line per option.

        >>> Row("1", "Which?", "B", "mca", options=("red", "blue")).question_with_options
        'Which?\\nA. red\\nB. blue'

        Rows without separate options give `question` unchanged: it has the options already, or
        the answer form needs none.
        """
        lines = [
            f"{letter}. {option}"
            for letter, option in zip(string.ascii_uppercase, self.options, strict=False)
        ]
        return "\n".join([self.question, *lines])

    @functools.cached_property
    def image_key(self) -> str | None:
        """Equal for rows that show the same image, as HR-Bench's rotations do; nothing is decoded.

        SHA-256 of the encoded bytes, in hex: `image_hash`, else of bytes that are in memory; the
        path of a file; None where only reading would tell. Not what `meta` says: a column of that
        name in somebody's file may be of the whole photograph that rows show parts of.
        """
        source = self.image_source
        if self.image_hash:
            return self.image_hash
        if isinstance(source, (bytes, bytearray)):
            return hashlib.sha256(source).hexdigest()
        return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None

    def load_image(self) -> np.ndarray:
        """Decodes the image: uint8 [H, W, 3].

        Pixels are taken as stored: an EXIF orientation tag is not applied, because published box
        annotations and the reference's `Image.open(...).convert("RGB")` refer to the stored grid.

        Raises:
          RowError: the file is missing or not an image; the message names row and file.
          OSError: it could not be read.
        """
        source = self.image_source
        while callable(source):
            source = source()
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
                raise RowError(
                    self.id,
                    "image",
                    f"an array must be uint8 [H, W, 3], is {source.dtype} {list(source.shape)}",
                )
            return source
        if isinstance(source, Image.Image):
            return np.asarray(source.convert("RGB"))
        opened: io.BytesIO | str
        if isinstance(source, (bytes, bytearray)):
            name, opened = f"{len(source)} bytes in memory", io.BytesIO(source)
        elif isinstance(source, (str, os.PathLike)):
            name = opened = os.fspath(source)
        else:
            raise RowError(self.id, "image", f"cannot read an image from {type(source).__name__}")
        try:
            with Image.open(opened) as image:
                return np.asarray(image.convert("RGB"))
        except FileNotFoundError as error:
            raise RowError(self.id, "image", f"file not found: {name}") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # The disk or the network, not the image: perhaps not the next time.
            # Pillow reports broken files through any of these, depending on the format.
            raise RowError(self.id, "image", f"cannot decode {name}: {error}") from error

    def _checked_options(self) -> tuple[str, ...]:
        if isinstance(self.options, str):
            raise RowError(self.id, "options", "must be a list of strings, is one string")
        options = tuple(self.options)
        if len(options) > len(string.ascii_uppercase):
            raise RowError(self.id, "options", f"{len(options)} options; at most 26 have a letter")
        for option in options:
            if not isinstance(option, str) or not option.strip():
                raise RowError(self.id, "options", f"must be non-empty strings, one is {option!r}")
        if len(set(options)) != len(options):
            raise RowError(self.id, "options", f"two options are equal: {list(options)}")
        return options

    def _checked_boxes(self) -> tuple[Box, ...]:
        boxes = []
        for box in self.boxes:
            try:
                x1, y1, x2, y2 = (float(value) for value in box)
            except (TypeError, ValueError):
                raise RowError(self.id, "boxes", f"a box is 4 numbers, got {box!r}") from None
            if not all(math.isfinite(v) and 0 <= v <= 1000 for v in (x1, y1, x2, y2)):
                raise RowError(self.id, "boxes", f"coordinates must be within 0-1000: {box!r}")
            if x1 >= x2 or y1 >= y2:
                raise RowError(self.id, "boxes", f"needs x1 < x2 and y1 < y2: {box!r}")
            boxes.append((x1, y1, x2, y2))
        return tuple(boxes)

    def _check_choice(self) -> None:
        letters = string.ascii_uppercase[: len(self.options) or None]
        if len(self.answer) != 1 or self.answer not in letters:
            raise RowError(
                self.id,
                "answer",
                f"is {self.answer!r}; answer_form 'mca' needs one capital letter"
                f" {letters[0]}-{letters[-1]}",
            )
