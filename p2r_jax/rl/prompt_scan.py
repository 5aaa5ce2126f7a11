"""Rows of the data before a run: can their images be decoded, do their prompts fit the buckets?

What a reasoner is asked depends on the boxes that it is given. It is measured at its worst: with
crops as large as boxes can make them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import SourceError
from p2r_jax.qwen3_vl.processor import ImageSizes
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.boxes import MAX_CROPS, Box, crop_rectangle
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.requests import RequestBuilder

IMAGE = "source image"
"""Stands among the roles: the image itself must fit a bucket too."""
UNITS = {
    "patches": "patches",
    "prompt_tokens": "tokens",
    "canvas": "px a side",
    "image": "px a side",
}
"""What each kind of bucket counts; of images, the longest side."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """Some rows of one split, and how large a bucket requests about them need."""

    split: str
    rows: list[Row]
    """Those whose image can be decoded."""
    images: ImageStore
    """Sizes of their images, without pixels."""
    needs: dict[tuple[str, str], list[int]]
    """By role (or `IMAGE`) and kind of bucket: a number for each row."""
    problem: str = ""
    """What is wrong with the images of the other rows."""


def scan_splits(trainer: Trainer, most: int) -> list[Scan]:
    """Up to `most` of the training rows, and of the validation rows if any are used. Raises as
    `scan_rows` does."""
    config, train, validation = trainer.config, trainer.train_source, trainer.evaluations.source
    settings, builder = config.eval, trainer.pipeline.builder
    used = max(settings.final_questions, settings.questions if settings.every else 0)
    roles = roles_asked([phase.role for phase in config.phases])
    splits = [("train", train, len(train), roles)]
    if used:
        roles = roles_asked([*settings.modes, *settings.final_modes])
        splits.append(("validation", validation, min(used, len(validation)), roles))
    allowed = config.data.max_bad_fraction
    return [
        scan_rows(split, source, spread(count, most), asked, builder, allowed)
        for split, source, count, asked in splits
    ]


def roles_asked(names: Sequence[str]) -> list[str]:
    """Roles that get requests. names: of roles that learn, or of modes of an evaluation."""
    alone = {"baseline": ["baseline"], "default": ["direct"]}
    alone |= {"oracle_box": ["reasoner"], "random_box": ["reasoner"]}
    roles = {role for name in names for role in alone.get(name, ["perceiver", "reasoner"])}
    return [role for role in ("perceiver", "reasoner", "baseline", "direct") if role in roles]


def spread(count: int, most: int, runs: int = 16) -> list[int]:
    """Up to `most` numbers below `count`, in a few runs of neighbours.

    Not singly: of a parquet file whole groups of rows are read.

    >>> spread(100, 6, runs=3)
    [0, 1, 49, 50, 98, 99]
    """
    if count <= most:
        return list(range(count))
    runs = min(runs, most)
    length = most // runs
    starts = np.linspace(0, count - length, runs).astype(int)
    return sorted({int(start) + i for start in starts for i in range(length)})


def scan_rows(
    split: str,
    source: Any,
    numbers: Sequence[int],
    roles: Sequence[str],
    builder: RequestBuilder,
    max_bad_fraction: float,
) -> Scan:
    """Decode the images of these rows, and measure what each role is asked about them.

    Raises SourceError if more images than `max_bad_fraction` cannot be decoded, and ValueError for
    a row that no request can be made of, or whose request fits no bucket.
    """
    rows, problem = [source[i] for i in numbers], ""
    with ThreadPoolExecutor(8) as pool:  # Pillow lets others run while it decodes.
        decoded = list(zip(rows, pool.map(_image_size, rows), strict=True))
    if bad := [error for _, error in decoded if isinstance(error, RowError)]:
        first = "; ".join(f"row {error.row_id!r}: {error.problem}" for error in bad[:3])
        problem = (
            f"data.{split}: {len(bad)} of {len(rows)} images cannot be decoded "
            f"(data.max_bad_fraction allows {max_bad_fraction:.1%}), first {first}"
        )
        if len(bad) > max_bad_fraction * len(rows) or len(bad) == len(rows):
            raise SourceError(f"{problem}. Repair these files, or leave out their rows")
    good = [(row, size) for row, size in decoded if not isinstance(size, RowError)]
    images = dataclasses.replace(ImageStore.empty(), shapes=tuple(size for _, size in good))
    needs: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for number, (row, size) in enumerate(good):
        for role in roles:
            try:
                needed = _needs_of(builder, images, number, row, role)
            except ValueError as error:
                raise ValueError(f"data.{split}: row {row.id!r}, {role}: {error}") from error
            for kind, value in needed.items():
                needs[role, kind].append(value)
        needs[IMAGE, "image"].append(max(size))
    scan = Scan(split, [row for row, _ in good], images, dict(needs), problem)
    _refuse_large(scan, builder)
    return scan


def _image_size(row: Row) -> tuple[int, int] | RowError:
    """Height and width, or why there is no image."""
    try:
        height, width, _ = row.load_image().shape
    except RowError as error:
        return error
    return height, width


def _needs_of(
    builder: RequestBuilder, images: ImageStore, number: int, row: Row, role: Any
) -> dict[str, int]:
    """By kind of bucket. Raises ValueError if there is no such request, as the trainer would."""
    question, sizes = (row.question_with_options, row.answer_form), builder.processor.sizes
    longest = 0
    if role == "reasoner":
        box, longest = largest_crop(*images.shapes[number], sizes)
        request = builder.reasoner(images, number, *question, [box] * MAX_CROPS)
    else:
        request = builder.plain(role, images, number, *question)
    targets = [view.target for view in request.views]
    return {
        "prompt_tokens": len(request.tokens),
        "patches": sum(math.prod(sizes.grid(target)) for target in targets),
        "canvas": max(longest, *map(max, targets)),
    }


@functools.cache
def largest_crop(height: int, width: int, sizes: ImageSizes) -> tuple[Box, int]:
    """A box whose crop takes the most patches, and the longest side in pixels that the crop of some
    other box is resized to.

    Which crop is largest depends on how its sides round, so many are tried. In a corner of the
    image a crop can be as narrow as anywhere.
    """
    # The first and the last make the narrowest box that there is. Up to 900 the padding, which is
    # limited on large images, may reach the other edge.
    ends = (1000, *range(900, 19, -20), 5)
    crop = lambda end: crop_rectangle(width, height, (0, 0, end, end))
    widths = {crop(end)[2]: end for end in ends}
    heights = {crop(end)[3]: end for end in ends}
    targets = {(900, 900): (0, 0)}
    for (w, x), (h, y) in itertools.product(widths.items(), heights.items()):
        with contextlib.suppress(ValueError):  # too long for its width: never cropped
            targets[x, y] = sizes.target_size(h, w)
    x, y = max(targets, key=lambda corner: math.prod(targets[corner]))
    return Box((0.0, 0.0, float(x), float(y)), "largest crop"), max(map(max, targets.values()))


def _refuse_large(scan: Scan, builder: RequestBuilder) -> None:
    """Raise ValueError with the worst row for each kind of bucket that is too small for some."""
    lower, problems = f"lower model.max_pixels (now {builder.processor.sizes.max_pixels})", []
    for kind, unit in UNITS.items():
        sizes = getattr(builder.buckets, kind)
        over = [
            (value, row.id, role)
            for (role, own), values in scan.needs.items()
            for row, value in zip(scan.rows, values, strict=True)
            if own == kind and value > sizes[-1]
        ]
        if over:
            needed, worst, role = max(over)
            count = len({row for _, row, _ in over})
            problems.append(
                f"row {worst!r} exceeds buckets.{kind} = {list(sizes)} ({role}: {needed} {unit}; "
                f"{count} of {len(scan.rows)} scanned rows do): add a bucket of at least {needed}, "
                f"or {'shrink the images' if kind == 'image' else lower}"
            )
    if problems:
        raise ValueError(f"data.{scan.split}: " + ". Also, ".join(problems))
