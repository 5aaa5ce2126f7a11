"""`p2r data prepare`: from the files of a benchmark to a prepared dataset.

Everything is written to OUT/.NAME.preparing and gets the name OUT/NAME when it is whole, so what
was killed half way never looks prepared. The same command goes on after the last whole file of
examples, if the source is as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from p2r_jax.data.benchmarks import Benchmark, benchmarks, plain
from p2r_jax.data.prepared import BAD_ROWS, INDEX, MARK, is_prepared, publish
from p2r_jax.data.sources import SourceError
from p2r_jax.data.vstar import QUESTIONS
from p2r_jax.paths import as_path, is_remote

PROGRESS = "progress.json"
"""In the folder of what is being prepared: the records of its whole files."""


def prepare(
    name: str,
    source: Path,
    out: str | Path,
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
    out = as_path(out)
    out.mkdir(parents=True, exist_ok=True)
    # What is for a bucket is made on a disk, and copied there whole.
    disk = Path(tempfile.gettempdir()) if is_remote(out) else out
    made_from = {"name": name, "source": str(source.resolve()), "limit": limit}
    with _alone(disk / f".{name}.lock", name):
        if _already_there(out / name, made_from):
            print(f"{out / name} is prepared already")
            return out / name
        work = disk / f".{name}.preparing"
        try:
            _prepare(benchmark, source, work, out / name, made_from, max_bad_fraction)
        except SourceError:  # Of the data: to be mended, and read anew.
            shutil.rmtree(work, ignore_errors=True)
            raise
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

    from p2r_jax.data.builders import BUILDERS, VERSION, OwnRows, Report

    cls = BUILDERS.get(target.name, OwnRows)
    folder, progress_file = work / cls.name, work / PROGRESS
    of = [made_from, _fingerprint(source)]
    new: dict[str, Any] = {"of": of, "read": 0, "bad": [], "index": []}
    state = _left(progress_file, folder / VERSION / "dataset_info.json", of) or new
    if state is new:
        shutil.rmtree(work, ignore_errors=True)
        (folder / VERSION).mkdir(parents=True)
    else:
        print(f"{target.name}: going on after {state['read']} records")
    limit = made_from["limit"]
    total, _ = benchmark.rows(source)
    if limit is not None:
        total = limit if total is None else min(total, limit)
    tfds.disable_progress_bar()  # ours knows the total
    with Progress() as progress:
        task = progress.add_task(f"preparing {target.name}", total=total)
        progress.advance(task, state["read"])
        report = Report(state["read"], state["bad"], state["index"], lambda: progress.advance(task))
        builder = cls(
            source=source,
            report=report,
            limit=limit,
            benchmark=benchmark,
            data_dir=work,
            file_format="array_record",
        )

        def saved() -> None:
            state["read"] = report.read
            temporary = progress_file.with_suffix(".tmp")
            temporary.write_text(json.dumps(state, ensure_ascii=False, default=str), "utf-8")
            os.replace(temporary, progress_file)

        builder.write(source, folder / VERSION, saved)
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
    publish(folder, target)
    print(_summary(about, report.bad, target))


def _fingerprint(source: Path) -> list[Any]:
    """What changes if a source file does, or a file of a source folder: names, sizes and times."""
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        found = file.stat()
        digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode())
    return [len(files), digest.hexdigest()]


def _left(progress: Path, info: Path, of: list[Any]) -> dict[str, Any] | None:
    """What a killed preparation of the same source had done, if its files say so too."""
    try:
        state = json.loads(progress.read_text("utf-8"))
        lengths = json.loads(info.read_text("utf-8"))["splits"][0]["shardLengths"]
    except (OSError, ValueError, LookupError):
        return None
    # Killed between the two, they differ by a file.
    whole = sum(map(int, lengths)) == len(state.get("index", ()))
    return state if whole and state.get("of") == of else None


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def _summary(about: dict[str, Any], bad: list[dict[str, Any]], target: Path) -> str:
    text = f"{target}: {about['rows']} rows, {about['images']} images"
    if not bad:
        return f"{text}, no bad rows"
    fields = ", ".join(f"{n} x {field}" for field, n in Counter(b["field"] for b in bad).items())
    return f"{text}; {len(bad)} bad rows ({fields}) left out, see {target / BAD_ROWS}"
