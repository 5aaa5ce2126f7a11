"""`p2r data prepare`: from the files of a benchmark to a prepared dataset.

Everything is written to OUT/.NAME.preparing and gets the name OUT/NAME when it is whole, so what
was killed half way never looks prepared; the same command removes the remains and starts anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from p2r_jax.data.benchmarks import Benchmark, benchmarks, plain
from p2r_jax.data.prepared import BAD_ROWS, INDEX, MARK, is_prepared
from p2r_jax.data.sources import SourceError
from p2r_jax.data.vstar import QUESTIONS


def prepare(
    name: str,
    source: Path,
    out: Path,
    *,
    limit: int | None = None,
    max_bad_fraction: float = 0.01,
) -> Path:
    """Writes OUT/NAME; returns it. Prints progress and what came of the rows.

    Args:
      name: of `benchmarks()`, or any other for a plain .jsonl or .parquet file of rows, or for a
        folder in V*'s layout.
      source: the downloaded folder, or a file.
      limit: only the first records.
      max_bad_fraction: largest share of records that may be bad. They are left out, and listed in
        OUT/NAME/bad_rows.jsonl; if there are more, in OUT/NAME.bad_rows.jsonl.

    Raises:
      SourceError: unknown name, no such files, too many bad rows, another dataset of that name
        there, or another process that prepares it.
    """
    benchmark = _benchmark(name, source)
    out.mkdir(parents=True, exist_ok=True)
    made_from = {"name": name, "source": str(source.resolve()), "limit": limit}
    with _alone(out / f".{name}.lock", name):
        if _already_there(out / name, made_from):
            print(f"{out / name} is prepared already")
            return out / name
        work = out / f".{name}.preparing"
        shutil.rmtree(work, ignore_errors=True)  # what a killed preparation left
        try:
            _prepare(benchmark, source, work, out / name, made_from, max_bad_fraction)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return out / name


def _benchmark(name: str, source: Path) -> Benchmark:
    known = benchmarks()
    if name in known:
        return known[name]
    if name.isidentifier():
        if source.suffix in (".jsonl", ".parquet") and source.name != QUESTIONS:
            return plain(name)
        if (source / QUESTIONS).is_file():  # `p2r data build` writes this layout
            return dataclasses.replace(known["vstar"], name=name, about="questions as V* lays out")
    raise SourceError(
        f"unknown dataset {name!r}: use one of {', '.join(known)}, or a name of your own (letters, "
        "digits, _) with, as --source, a .jsonl or .parquet file of rows or a folder with "
        f"{QUESTIONS}"
    )


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SourceError(f"another process prepares {name} in {path.parent}") from error
        yield


def _already_there(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the same was prepared before; raises SourceError if something else is there."""
    if not folder.exists():
        return False
    if not is_prepared(folder):
        raise SourceError(f"{folder} is there and is no prepared dataset; use another --out")
    about = json.loads((folder / MARK).read_text("utf-8"))
    if {key: about.get(key) for key in made_from} != made_from:
        raise SourceError(
            f"{folder} was prepared from {about['source']} with limit {about['limit']}; remove it, "
            "or use another --out"
        )
    return True


def _prepare(
    benchmark: Benchmark,
    source: Path,
    work: Path,
    target: Path,
    made_from: dict[str, Any],
    max_bad_fraction: float,
) -> None:
    import tensorflow_datasets as tfds

    from p2r_jax.data.builders import BUILDERS, OwnRows, Report

    limit = made_from["limit"]
    total, _ = benchmark.rows(source)
    if limit is not None:
        total = limit if total is None else min(total, limit)
    tfds.disable_progress_bar()  # ours knows the total
    with Progress() as progress:
        task = progress.add_task(f"preparing {target.name}", total=total)
        report = Report(on_record=lambda: progress.advance(task))
        cls = BUILDERS.get(target.name, OwnRows)
        builder = cls(
            source=source,
            report=report,
            limit=limit,
            benchmark=benchmark,
            data_dir=work,
            file_format="array_record",
        )
        builder.download_and_prepare()
    folder = work / builder.name
    if len(report.bad) > max_bad_fraction * report.read:
        listing = target.with_name(f"{target.name}.{BAD_ROWS}")
        _write_lines(listing, report.bad)
        first = report.bad[0]
        raise SourceError(
            f"{source}: {len(report.bad)} of {report.read} rows are bad, more than max_bad_fraction"
            f" = {max_bad_fraction:g}. The first: row {first['id']!r}, field {first['field']!r}: "
            f"{first['problem']}. All are listed in {listing}"
        )
    if not report.index:
        raise SourceError(f"{source} has no rows of {target.name}")
    if report.bad:
        _write_lines(folder / BAD_ROWS, report.bad)
    _write_lines(folder / INDEX, report.index)
    about = {
        **made_from,
        "split": benchmark.split,
        "rows": len(report.index),
        "bad": len(report.bad),
        "images": len({row["image_hash"] for row in report.index}),
    }
    (folder / MARK).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.rename(folder, target)
    print(_summary(about, report.bad, target))


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def _summary(about: dict[str, Any], bad: list[dict[str, Any]], target: Path) -> str:
    text = f"{target}: {about['rows']} rows, {about['images']} images"
    if not bad:
        return f"{text}, no bad rows"
    fields = ", ".join(f"{n} x {field}" for field, n in Counter(b["field"] for b in bad).items())
    return f"{text}; {len(bad)} bad rows ({fields}) left out, see {target / BAD_ROWS}"
