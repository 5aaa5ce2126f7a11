"""One self-contained HTML page about a run: results, curves, and what the model saw and wrote.

    RUN/summary.json, metrics.jsonl, eval/*.json(l), samples/step_*.jsonl, config.yaml
        --load--> plain dicts --template--> RUN/report.html

Every input is optional; the page names what is missing.  It works offline: pictures are embedded,
and a content-security policy forbids everything but the page's own script.  Text written by a
model is untrusted and is only ever inserted escaped.
"""

from __future__ import annotations

import base64
import collections
import datetime
import hashlib
import importlib.resources
import itertools
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from p2r_jax.evals import charts, scoring
from p2r_jax.evals.run_folder import (
    CROP_SIDE,
    INPUTS,
    Pictures,
    boxes_of,
    is_number,
    natural,
    pick_samples,
    read_json,
    read_jsonl,
    read_text,
    stratified,
)

IMAGE_SIDE = 640
"""Longest side of an embedded picture, pixels."""

MAX_CARDS = 200
"""Answers shown on a page.  At 60-100 kB a picture this keeps a page near 20 MB."""


def write_report(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    max_cards: int = MAX_CARDS,
    image_side: int = IMAGE_SIDE,
) -> Path:
    """Writes the report of a run folder and returns its path.

    Args:
      run_dir: folder written by training or evaluation, finished or not; see `INPUTS`.
      out: file to write; default `run_dir/report.html`.  Replaced in one move.
      max_cards: most answers to show, evaluation and training together; a quarter of them, or
        what evaluation leaves over, are training samples.
      image_side: longest side of an embedded picture, pixels.

    Raises:
      FileNotFoundError: the folder does not exist or holds none of `INPUTS`.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder at {run}")
    missing = {name: use for name, use in INPUTS.items() if not any(run.glob(name))}
    if len(missing) == len(INPUTS) and not any(run.glob("eval/*.json")):
        raise FileNotFoundError(
            f"nothing to report in {run}: expected at least one of {', '.join(INPUTS)}"
        )
    notes: list[str] = []
    pictures = Pictures(run, image_side)
    evals = {p.stem: read_jsonl(p, notes) for p in run.glob("eval/*.jsonl")}
    evals = {name: evals[name] for name in sorted(evals, key=_eval_order)}
    records = [{**r, "eval": name} for name, rows in evals.items() for r in rows]
    sample_files = sorted(run.glob("samples/step_*.jsonl"), key=lambda p: natural(p.name))
    n_samples = max(max_cards // 4, max_cards - len(records)) if sample_files else 0
    samples, files_used = pick_samples(sample_files, n_samples, notes)
    picked = stratified(
        records,
        max_cards - len(samples),
        lambda r: tuple(str(r.get(k)) for k in ("eval", "mode", "correct")),
    )
    curves = charts.curves(read_jsonl(run / "metrics.jsonl", notes))
    results = _results(evals, run, notes)
    context = {
        "name": run.resolve().name,
        "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "summary": _summary(run, notes),
        "curves": curves,
        "geometry": charts,
        "results": results,
        "categories": sorted(
            {c for row in results for c in _mapping(row["summary"].get("by_category"))}
        ),
        "comparisons": _comparisons(evals, notes),
        "cards": [_eval_card(record, pictures) for record in picked],
        "records_total": len(records),
        "groups": _sample_groups(samples, pictures),
        "samples_shown": len(samples),
        "sample_files": (files_used, len(sample_files)),
        "config": read_text(run / "config.yaml"),
        "pictures": pictures,
        "image_side": image_side,
        "crop_side": CROP_SIDE,
        "missing": missing,
        "notes": notes,
        "hover": [c.hover for group in curves.groups for c in group.charts],
    }
    path = run / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # Model output may hold lone surrogates, which UTF-8 cannot carry.
    temporary.write_bytes(render(context).encode("utf-8", errors="replace"))
    os.replace(temporary, path)
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
        number=number,
        duration=duration,
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


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, counts in full; a dash for what is none."""
    if not is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def duration(seconds: Any) -> str:
    """3725 -> "1 h 2 min"; 12.34 -> "12.3 s"."""
    if not is_number(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, hours = round(seconds / 60), int(round(seconds / 60) // 60)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _summary(run: Path, notes: list[str]) -> dict[str, Any]:
    """Headline rows, wall time by stage, and whatever else summary.json says in one value."""
    summary = read_json(run / "summary.json", notes)
    entries: dict[str, dict[str, Any]] = {}
    for name, value in summary.items():
        if _has_accuracy(value):  # The headline mode; all modes are in the evaluation table.
            entries[name] = {k: v for k, v in value.items() if k != "modes"}
        elif isinstance(value, dict) and isinstance(value.get("modes"), dict):
            entries |= {f"{name}, {m}": v for m, v in value["modes"].items() if _has_accuracy(v)}
    shown = ("accuracy", "low", "high", "n")
    numbers = [k for e in entries.values() for k, v in e.items() if is_number(v)]
    figures = [k for k in numbers if k not in shown and not k.startswith("hit_")]
    stages = _mapping(summary.get("stages"))
    return {
        "entries": entries,
        "figures": list(dict.fromkeys(k for k in figures if not k.endswith("_n"))),
        "stages": {k: float(v) for k, v in stages.items() if is_number(v) and v >= 0},
        "facts": {k: v for k, v in summary.items() if isinstance(v, (str, int, float))},
    }


def _results(
    evals: Mapping[str, Sequence[Mapping[str, Any]]], run: Path, notes: list[str]
) -> list[dict[str, Any]]:
    """One row per evaluation and mode, counted from the records, else as stored beside them."""
    names = sorted({p.stem for p in run.glob("eval/*.json")} | set(evals), key=_eval_order)
    rows = []
    for name in names:
        try:
            modes = scoring.summarize_modes(name, evals.get(name, []))["modes"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"eval/{name}.jsonl cannot be scored: {type(error).__name__}: {error}")
            modes = {}
        if not modes:
            stored = read_json(run / "eval" / f"{name}.json", notes).get("modes")
            modes = dict(_mapping(stored))
        rows += [
            {"eval": name, "mode": mode, "summary": summary}
            for mode, summary in modes.items()
            if _has_accuracy(summary)
        ]
    return rows


def _comparisons(
    evals: Mapping[str, Sequence[Mapping[str, Any]]], notes: list[str]
) -> list[dict[str, Any]]:
    """Paired tests: `default` with every other mode, and each evaluation with the next."""
    sides = {
        (name, mode): records
        for name in evals
        for mode, records in scoring.by_mode(
            r for r in evals[name] if isinstance(r.get("mode"), str)
        ).items()
    }
    pairs = [
        ((n, "default"), (n, m)) for n, m in sides if m != "default" and (n, "default") in sides
    ]
    for mode in dict.fromkeys(mode for _, mode in sides):
        names = [name for name, other in sides if other == mode]
        pairs += [((a, mode), (b, mode)) for a, b in itertools.pairwise(names)]
    rows = []
    for a, b in pairs:
        try:
            if not {r["id"] for r in sides[a]} & {r["id"] for r in sides[b]}:
                continue  # Two benchmarks: nothing to pair.
            rows.append({"a": a, "b": b, **scoring.compare(sides[a], sides[b])})
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            notes.append(f"{' '.join(a)} and {' '.join(b)} cannot be compared: {problem}")
    return rows


def _eval_card(record: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    options = record.get("options")
    if isinstance(options, dict):
        options = list(options.values())
    crops = record.get("crops")
    return {
        **{k: record.get(k) for k in ("id", "eval", "answer", "prediction", "hit")},
        **{k: record.get(k) for k in ("iou", "area", "parse_ok", "perceiver_text")},
        "mode": str(record.get("mode") or ""),
        "category": str(record.get("category") or ""),
        "question": record.get("question") or "",
        "reasoner_text": record.get("reasoner_text"),
        "right": record.get("correct") == 1,
        "options": list(zip(string.ascii_uppercase, options, strict=False))
        if isinstance(options, (list, tuple))
        else [],
        "view": _view(record, pictures),
        "crops": [
            {"path": crop, "picture": pictures.add(crop, CROP_SIDE)}
            for crop in (crops if isinstance(crops, list) else [])
        ],
    }


def _sample_groups(
    samples: Sequence[Mapping[str, Any]], pictures: Pictures
) -> list[dict[str, Any]]:
    """Completions of one prompt in one step, together: the group an advantage compares."""
    groups: dict[tuple, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for s in samples:
        key = (s.get(k) for k in ("step", "phase", "role", "id"))
        groups[tuple("" if part is None else str(part) for part in key)].append(s)
    cards = []
    for (step, phase, role, id_), members in groups.items():
        views = [_view(member, pictures) for member in members]
        shared = all(view == views[0] for view in views)
        cards.append(
            {
                "step": step,
                "phase": phase,
                "role": role,
                "id": id_,
                "question": members[0].get("question") or "",
                "answer": members[0].get("answer"),
                "shared_view": views[0] if shared else None,
                "rewards": [m.get("reward") for m in members],
                "members": [
                    {
                        **{k: m.get(k) for k in ("completion", "reward", "advantage")},
                        "partner": m.get("partner_completion"),
                        "parts": _parts(m),
                        "view": None if shared else view,
                    }
                    for m, view in zip(members, views, strict=True)
                ],
            }
        )
    return cards


def _view(record: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """What a figure draws: the picture, or an empty canvas of its shape, and boxes on it."""
    path = record.get("image")
    picture = pictures.add(path)
    source: Mapping[str, Any] = picture or record
    width, height = source.get("width"), source.get("height")
    if not (is_number(width) and is_number(height) and width > 0 and height > 0):
        width, height = 4, 3
    scale = 1000 / max(width, height)
    canvas = (round(width * scale, 1), round(height * scale, 1))

    def rectangles(value: Any) -> list[dict[str, Any]]:
        shapes = []
        for box in boxes_of(value):
            x1, y1, x2, y2 = (min(max(c, 0.0), 1000.0) / 1000 for c in box["bbox"])
            shapes.append(
                {
                    **box,
                    "x": round(x1 * canvas[0], 1),
                    "y": round(y1 * canvas[1], 1),
                    "width": round(max(0.0, x2 - x1) * canvas[0], 1),
                    "height": round(max(0.0, y2 - y1) * canvas[1], 1),
                }
            )
        return shapes

    return {
        "path": path,
        "picture": picture,
        "problem": pictures.problems.get(path) if isinstance(path, str) else None,
        "canvas": canvas,
        "scale": (canvas[0] / width, canvas[1] / height),
        "boxes": rectangles(record.get("boxes")),
        "true_boxes": rectangles(record.get("true_boxes")),
    }


def _parts(sample: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in _mapping(sample.get("reward_parts")).items() if is_number(v)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _has_accuracy(value: Any) -> bool:
    return isinstance(value, dict) and "accuracy" in value


def _eval_order(name: str) -> tuple[int, list[Any]]:
    """`before` first, `after` last, other names in numeric order between."""
    rank = 0 if name.startswith("before") else 2 if name == "after" else 1
    return rank, natural(name)


def _resource(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
