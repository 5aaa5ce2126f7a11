"""Tables of a study in Markdown, for study.md and a README.

    python -m p2r_jax.study.table STUDY.json --readme README.md

rewrites what stands in README.md between the two markers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def markdown(found: Mapping[str, Any]) -> str:
    """All tables; depends on study.json alone."""
    study = found["study"]
    level = f"{100 * study['confidence']:g} %"
    parts = [_arms(found, level), _measures(found)]
    if found["contrasts"]:
        parts.append(_contrasts(found, level))
    if found["missing"]:
        parts.append(_missing(found))
    return "\n\n".join(parts)


def _arms(found: Mapping[str, Any], level: str) -> str:
    rows = []
    for name, arm in found["arms"].items():
        own = arm["estimate"]
        rows.append(
            [
                f"`{cell(name)}`",
                cell(arm["description"]),
                f"`{cell(arm['metric'])}`",
                percent(arm["before"]),
                f"**{percent(own['value'])}**" if own else "–",
                interval(own),
                interval(own, "bootstrap_"),
                str(own["seeds"] if own else 0),
            ]
        )
    head = ["arm", "", "mode", "before %", "after %", f"{level} interval", "bootstrap", "seeds"]
    return table(head, rows, "lllrrllr")


def _measures(found: Mapping[str, Any]) -> str:
    names = list(found["measures"])
    rows = [
        [f"`{cell(name)}`", *(si(arm["measures"][measure]) for measure in names)]
        for name, arm in found["arms"].items()
    ]
    head = ["mean of the seeds", *(name.replace("_", " ") for name in names)]
    note = "; ".join(f"{k.replace('_', ' ')}: {v}" for k, v in found["measures"].items())
    return f"{table(head, rows, 'l' + 'r' * len(names))}\n\n{note[:1].upper() + note[1:]}."


def _contrasts(found: Mapping[str, Any], level: str) -> str:
    study, rows = found["study"], []
    for contrast in found["contrasts"]:
        own = contrast["estimate"]
        rows.append(
            [
                cell(contrast["name"]) + ("" if contrast["primary"] else " (secondary)"),
                f"`{cell(contrast['first'])}` – `{cell(contrast['second'])}`",
                points(own["value"]) if own else "–",
                interval(own, signed=True),
                interval(own, "bootstrap_", signed=True),
                p_value(contrast.get("p")),
                p_value(contrast.get("p_holm")),
                p_value(contrast.get("p_equivalence")),
                contrast.get("verdict", "no seed that both have"),
            ]
        )
    head = [
        *("contrast", "arms", "points", f"{level} interval", "bootstrap", "p", "p (Holm)"),
        *(f"p (within ±{study['margin']:g})", "verdict"),
    ]
    note = (
        "Differences are paired: same seeds, same questions. Intervals and p are of Student's t "
        "over seeds (over seeds and questions where all seeds have the same questions); beside it "
        "the hierarchical bootstrap, studentised. Holm's correction is over the primary contrasts. "
        f"A verdict needs p below {1 - study['confidence']:.2g}, corrected if primary; "
        f"*equivalent* is a difference within ±{study['margin']:g} points by two one-sided tests."
    )
    return f"{table(head, rows, 'llrllrrrl')}\n\n{note}"


def _missing(found: Mapping[str, Any]) -> str:
    lines = [
        f"- `{cell(one['arm'])}`, seed {one['seed']}: {one['state']}"
        + (f" ({cell(one['reason'])})" if "reason" in one else "")
        for one in found["missing"]
    ]
    return "**Missing**, and not in these numbers:\n\n" + "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    """A Markdown table; alignment: l or r of each column."""
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def cell(text: str) -> str:
    """Text that breaks neither out of a cell nor into markup."""
    text = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return text.replace("<", "&lt;")


def percent(value: float | None) -> str:
    """0.7 -> 70.0"""
    return "–" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """0.03 -> +3.0, a difference in points."""
    return "–" if value is None else f"{100 * value:+.1f}"


def interval(own: Mapping[str, Any] | None, prefix: str = "", signed: bool = False) -> str:
    """Its ends, percent or points."""
    if not own or own[f"{prefix}low"] is None:
        return "–"
    show = points if signed else percent
    joint = " to " if signed else " – "
    return joint.join(show(own[prefix + end]) for end in ("low", "high"))


def p_value(value: float | None) -> str:
    """Two significant digits, none below 0.001."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def si(value: float | None) -> str:
    """Three significant digits with a unit prefix.

    >>> [si(v) for v in (12, 23040, 4.56e14)]
    ['12', '23.0 k', '456 T']
    """
    if value is None:
        return "–"
    size, prefixes = abs(value), ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while float(f"{size:.3g}") >= 1000 and power < len(prefixes) - 1:
        size, power = size / 1000, power + 1
    if not power:
        return f"{value:.3g}"
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{'-' if value < 0 else ''}{size:.{digits}f} {prefixes[power]}"


def section(found: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    return f"{BEGIN}\n{markdown(found)}\n{END}"


def section_of(text: str) -> str | None:
    """The section of a README, markers included; None if it has none."""
    begin, end = text.find(BEGIN), text.find(END)
    return text[begin : end + len(END)] if 0 <= begin < end else None


def rewrite(readme: Path, found: Mapping[str, Any]) -> None:
    """Put the tables between the markers. Raises ValueError if there are none."""
    text = readme.read_text()
    old = section_of(text)
    if old is None:
        raise ValueError(f"{readme} has no lines {BEGIN} and {END}")
    readme.write_text(text.replace(old, section(found)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="study.json")
    parser.add_argument("--readme", type=Path, help="file with the markers; default, print")
    args = parser.parse_args(argv)
    found = json.loads(args.file.read_text())
    if args.readme is None:
        print(markdown(found))
    else:
        rewrite(args.readme, found)


if __name__ == "__main__":
    main()
