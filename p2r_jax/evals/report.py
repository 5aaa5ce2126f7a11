"""One self-contained HTML page about a run: results, curves, and what the model saw and wrote.

    RUN/summary.json, metrics.jsonl, eval/*.json(l), samples/step_*.jsonl, config.yaml
        --load--> plain dicts --template--> RUN/report.html

Every input is optional; the page names what is missing.  It works offline: pictures are embedded,
and a content-security policy forbids everything but the page's own script.  Text written by a
model is untrusted and is only ever inserted escaped.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.resources
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from p2r_jax.evals import charts
from p2r_jax.evals.chart_phases import is_step
from p2r_jax.evals.records import sample_of
from p2r_jax.evals.report_changes import Against, Mark, against_rows, marks_of
from p2r_jax.evals.report_gallery import eval_card, sample_groups
from p2r_jax.evals.report_health import health_of
from p2r_jax.evals.report_progress import Progress, progress_of
from p2r_jax.evals.report_results import (
    Evaluation,
    Headline,
    comparisons_of,
    eval_order,
    evaluations_of,
    headline_of,
    mapping,
)
from p2r_jax.evals.run_folder import (
    CROP_SIDE,
    INPUTS,
    Pictures,
    is_number,
    natural,
    pick_samples,
    read_json,
    read_jsonl,
    read_text,
    stratified,
)
from p2r_jax.evals.stage_time import StageTime, stage_time
from p2r_jax.paths import as_path, write_whole

IMAGE_SIDE = 640
"""Longest side of an embedded picture, pixels, if there are few."""

FULL_SIZE = 300
"""Pictures up to which they are embedded at full size; more share the same number of pixels, which
keeps a page of photographs below some 60 MB."""

MAX_CARDS = 1000
"""Answers shown on a page, training samples among them."""

MAX_SAMPLES = 200
"""Training samples among them."""


def write_report(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    max_cards: int = MAX_CARDS,
    image_side: int | None = None,
) -> Path:
    """Writes the report of a run folder and returns its path.

    Args:
      run_dir: folder written by training or evaluation, finished or not; see `INPUTS`.
      out: file to write; default `run_dir/report.html`.  Replaced in one move.
      against: another run folder: answers are marked and compared with its answers to the same
        questions in the same mode.
      max_cards: most answers to show, evaluation and training together; half of them, or what
        evaluation leaves over, are training samples, but at most `MAX_SAMPLES`.
      image_side: longest side of an embedded picture, pixels; default, `IMAGE_SIDE`, less if there
        are many pictures.

    Raises:
      FileNotFoundError: the folder does not exist or holds none of `INPUTS`, or `against` holds no
        evaluation.
    """
    run = as_path(run_dir)
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder at {run}")
    missing = {name: use for name, use in INPUTS.items() if not any(run.glob(name))}
    if len(missing) == len(INPUTS) and not any(run.glob("eval/*.json")):
        raise FileNotFoundError(
            f"nothing to report in {run}: expected at least one of {', '.join(INPUTS)}"
        )
    notes: list[str] = []
    evals = {p.stem: read_jsonl(p, notes) for p in run.glob("eval/*.jsonl")}
    evals = {name: evals[name] for name in sorted(evals, key=eval_order)}
    # The newest evaluation first, and of it the mode that counts.
    records = [{**r, "eval": name} for name, rows in evals.items() for r in rows]
    records.sort(key=lambda r: (list(evals).index(r["eval"]), r.get("mode") == "p2r"), reverse=True)
    sample_files = sorted(run.glob("samples/step_*.jsonl"), key=lambda p: natural(p.name))
    n_samples = min(MAX_SAMPLES, max(max_cards // 2, max_cards - len(records)))
    if not sample_files:
        n_samples = 0
    other = None if against is None else Against.read(as_path(against), notes)
    marks = marks_of(evals, other)

    def marks_on(record: Mapping[str, Any]) -> list[Mark]:
        evaluation, mode, id_ = (record.get(k) for k in ("eval", "mode", "id"))
        try:
            return marks.get((str(evaluation), str(mode), id_, sample_of(record)), [])
        except TypeError:
            return []  # An id that is a list.

    samples, files_used = pick_samples(sample_files, n_samples, notes)
    picked = stratified(
        records,
        max_cards - len(samples),
        # A gain and a harm are right and wrong, and more telling than other answers.
        lambda r: (
            *(str(r.get(k)) for k in ("eval", "mode", "correct")),
            *(mark.base for mark in marks_on(r)[:1]),
        ),
    )
    shown = [*picked, *samples]
    n_crops = sum(len(r["crops"]) for r in shown if isinstance(r.get("crops"), list))
    if image_side is None:
        image_side = _side(IMAGE_SIDE, len({str(r.get("image")) for r in shown}), FULL_SIZE)
    crop_side = _side(CROP_SIDE, n_crops, 3 * FULL_SIZE)
    pictures = Pictures(run, image_side)
    rows = read_jsonl(run / "metrics.jsonl", notes)
    summary = read_json(run / "summary.json", notes)
    stages = {k: float(v) for k, v in mapping(summary.get("stages")).items() if is_number(v)}
    curves = charts.curves(rows)
    time = stage_time(rows, stages) or StageTime.of(stages)
    evaluations = evaluations_of(run, evals, summary, notes)
    finished = {e.name for e in evaluations if e.finished} or set(evals)
    compared = {name: records for name, records in evals.items() if name in finished}
    comparisons = comparisons_of(compared, notes)
    if other is not None:
        comparisons = [*against_rows(compared, other, notes), *comparisons]
    sampled = any(is_number(r.get("sample")) and r["sample"] > 0 for r in records)
    headline = headline_of(evaluations, comparisons)
    progress = progress_of(run, rows, notes)
    context = {
        "name": run.resolve().name,
        "generated": datetime.datetime.now(datetime.UTC),
        "progress": progress,
        "facts": _facts(summary),
        "wall_seconds": summary.get("wall_seconds") or (time.whole.total if time else None),
        "curves": curves,
        "time": time,
        "health": health_of(run, progress, evaluations, comparisons, summary, notes),
        "headline": headline,
        "newest": _newest(rows, headline),
        "evaluations": evaluations,
        "categories": sorted(
            {
                c
                for e in evaluations
                for s in e.modes.values()
                for c in mapping(s.get("by_category"))
            }
        ),
        "comparisons": comparisons,
        "against": other.name if other else None,
        "cards": [
            eval_card(record, pictures, marks_on(record), sampled, crop_side) for record in picked
        ],
        "records_total": len(records),
        "groups": sample_groups(samples, pictures, curves.phases, crop_side),
        "samples_shown": len(samples),
        "sample_files": (files_used, len(sample_files)),
        "config": read_text(run / "config.yaml"),
        "pictures": pictures,
        "image_side": image_side,
        "crop_side": crop_side,
        "missing": _missing(missing, progress),
        "notes": notes,
        "hover": [c.hover for c in _all_charts(curves, time)],
    }
    path = run / "report.html" if out is None else as_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Model output may hold lone surrogates, which UTF-8 cannot carry.
    write_whole(path, render(context).encode("utf-8", errors="replace"))
    return path


def render(context: Mapping[str, Any]) -> str:
    """The page as a string; `context` as built by `write_report`."""
    env = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        percent=percent,
        points=points,
        number=number,
        duration=duration,
        seconds=lambda s: f"{s:,.1f}",
        capitalize_first=lambda t: t[:1].upper() + t[1:],
    )
    script = _resource("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return env.get_template("report.html.jinja").render(
        context,
        script=markupsafe.Markup(script),
        script_digest=digest,
        css=markupsafe.Markup(_resource("report.css")),
    )


def percent(value: Any) -> str:
    """0.9319 -> "93.2 %"; a dash for what is not a finite number."""
    return f"{100 * value:.1f} %" if is_number(value) else "–"


def points(value: Any) -> str:
    """0.198 -> "+19.8": a difference of accuracies, in percentage points."""
    return f"{100 * value:+.1f}" if is_number(value) else "–"


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, counts and thousands in full; a dash for none."""
    if not is_number(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.{digits}g}"


def duration(seconds: Any) -> str:
    """3725 -> "1 h 2 min"; 12.34 -> "12.3 s"."""
    if not is_number(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, hours = round(seconds / 60), int(round(seconds / 60) // 60)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _side(full: int, count: int, room: int) -> int:
    """Longest side of each of `count` pictures that share the pixels of `room` full ones."""
    return full if count <= room else round(full * math.sqrt(room / count))


def _categories(evaluations: Sequence[Evaluation]) -> list[str]:
    modes = (summary for e in evaluations for summary in e.modes.values())
    return sorted({name for summary in modes for name in mapping(summary.get("by_category"))})


def _newest(rows: Sequence[Mapping[str, Any]], headline: Headline | None) -> dict[str, Any] | None:
    """The newest short evaluation of the headline's mode, if no full one came after it."""
    name = f"eval/{headline.mode if headline else 'p2r'}"
    found = [r for r in rows if is_step(r.get("step")) and is_number(r.get(f"{name}/accuracy"))]
    row = max(found, key=lambda r: (r["step"], r.get("phase") == "eval"), default=None)
    if row is None or row.get("phase") == "eval":
        return None
    return {"step": row["step"]} | {k: row.get(f"{name}/{k}") for k in ("accuracy", "low", "high")}


def _missing(missing: Mapping[str, str], progress: Progress | None) -> dict[str, str]:
    """Inputs that are not there, without what an unfinished run is known to write later."""
    later = progress is not None and not progress.finished
    return {k: v for k, v in missing.items() if not (later and k == "summary.json")}


def _all_charts(curves: charts.Curves, time: StageTime | None) -> Iterator[charts.Chart]:
    """In the order of the page, which numbers them."""
    yield from (chart for group in curves.groups if not group.rest for chart in group.charts)
    if time and time.chart:
        yield time.chart
    yield from (chart for group in curves.groups if group.rest for chart in group.charts)


def _facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever else summary.json says in one value."""
    shown = {k: v for k, v in summary.items() if isinstance(v, (str, int, float))}
    return {k: v for k, v in shown.items() if k != "wall_seconds"}


def _resource(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
