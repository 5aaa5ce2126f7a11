"""Rows of a source for people: their text on the terminal, their true boxes drawn on the image."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import Source
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.render import annotate


def describe(row: Row) -> str:
    """Everything a row says, but its pixels: some lines of text."""
    lines = [
        f"[{row.id}]" + (f" {row.category}" if row.category else ""),
        row.question_with_options,
        f"answer: {row.answer} ({row.answer_form})",
        *(f"box: {', '.join(f'{value:.1f}' for value in box)} of 1000" for box in row.boxes),
    ]
    if "height" in row.meta and "width" in row.meta:
        lines.append(f"image: {row.meta['width']} x {row.meta['height']}")
    return "\n".join(lines)


def show_rows(source: Source, indices: Iterable[int], out: Path | None = None) -> None:
    """Prints rows; with `out`, also writes OUT/NUMBER_ID.jpg, the image with the row's true boxes.

    A row whose image cannot be read is printed with the reason, and no picture is written.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for index in indices:
        row = source[index]
        print(describe(row))
        if out is not None:
            print(f"picture: {_picture(row, index, out)}")
        print()


def _picture(row: Row, index: int, out: Path) -> str:
    try:
        image = row.load_image()
    except RowError as error:
        return f"none: {error.problem}"
    path = out / f"{index:06d}_{re.sub(r'[^A-Za-z0-9]+', '_', row.id)[:60]}.jpg"
    annotate(image, [Box(box, "") for box in row.boxes]).save(path, quality=90)
    return str(path)
