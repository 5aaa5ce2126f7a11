"""The card of a composed benchmark: README.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from p2r_jax.data.compose_baselines import LOOKING
from p2r_jax.data.compose_materials import SPLITS
from p2r_jax.data.compose_questions import BLIND, CATEGORIES, KINDS, phrase
from p2r_jax.data.compose_scene import (
    BORDER,
    BUDGETS,
    MAX_TEXTURE,
    MIN_CONTRAST,
    MIN_TINT_MARGIN,
    OVERVIEW_OBJECT,
    OVERVIEW_TEXT,
    overview_scale,
)
from p2r_jax.data.visual_search_probe import wilson_interval

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def card(manifest: Mapping[str, Any], rows: Rows, baselines: Mapping[str, Sequence[bool]]) -> str:
    """The text of the card.

    Args:
      manifest: as written.
      rows: the records of all questions by split.
      baselines: for each baseline, which test questions it answers rightly.
    """
    everything = [row for split in SPLITS for row in rows[split]]
    enlarged = [row["photo_enlarged"] for row in everything]
    upscaled = sum(factor > 1.0 for factor in enlarged)
    parts = [
        f"# Composed visual search, {manifest['size']}, seed {manifest['seed']}",
        "Questions about objects too small to make out in an overview, composed from photographs"
        " and named cut-outs by p2r_jax (`p2r data build visual-search`). The layout is V*'s"
        " folder form. **This is not V\\*Bench or HR-Bench; its numbers compare with neither.**",
        "## Questions",
        _questions(rows),
        "`bbox` is [x, y, width, height] in pixels and exact: sprites are rendered at their final"
        " size. For tags it holds the object and its tag. The first of `options` is right; `shown`"
        " is their order in the question.",
        "## What is hidden from the overview",
        _sizes(manifest, everything),
        f"An object's longer side is the largest that stays within {OVERVIEW_OBJECT} pixels, and"
        f" capitals within {OVERVIEW_TEXT}, in an overview of"
        f" {manifest['overview_budget']:,} pixels; a crop as P2R makes it (a tenth of the image"
        " on every side, not enlarged) shows both at the size they have in the image.",
        _caveats(manifest),
        f"Each picture was measured when made: contrast of objects with what was there before at"
        f" least {MIN_CONTRAST:g} (mean L\\*a\\*b\\* distance; least here"
        f" {min(r['checks']['contrast'] for r in everything):g}); texture around them at most"
        f" {MAX_TEXTURE:g} grey levels; tinted objects nearer to their own colour than to any"
        f" other by {MIN_TINT_MARGIN:g} (a\\*b\\* plane); nothing within {BORDER:.0%} of the"
        " border; no two objects of one kind or with a word in common. `checks` in the JSON beside"
        " an image holds its numbers.",
        "## Baselines",
        _baselines(manifest, rows["test"], baselines),
        "Test split, accuracy in % with Wilson 95 % intervals. A model has learned nothing here"
        " unless it beats the blind rows. The looking rows are not models: they know the cut-out,"
        " its size and the font, which makes them strong where a model is weak, and the reverse."
        ' "Told where" shows what the overview still holds once the place is known: colours,'
        " and part of the texts, so those questions are hard to *find*, not impossible to read.",
        "## How it was made",
        f"- {len(manifest['photos'])} photographs, {len(manifest['objects'])} objects;"
        " photographs and kinds of objects of a split occur in no other.",
        f"- Photographs are cut to between 4:3 and 16:9 and resized to {manifest['width']} pixels"
        f" in width. {upscaled} of {len(everything)} pictures were enlarged for that (at most"
        f" {max(enlarged):.2f} times), so their background has less detail than their size"
        " suggests.",
        "- Six to eight objects a picture, turned by up to 15°, lit and grained like their"
        " surroundings, with a soft shadow. They do not fit the scene in meaning or scale.",
        "- The wrong colours and texts are on other objects of the same picture.",
        "- Whether a photograph itself shows something of an object's name is not checked.",
        f"- Left out: {_left_out(manifest)}.",
        "## Licences",
        _licences(manifest),
        "Quoted from files beside the material (`licences/`), not interpreted; `manifest.json` has"
        " every file with its SHA-256. What you may do with the pictures follows from *all* of"
        " them.",
    ]
    return "\n\n".join(parts) + "\n"


def _questions(rows: Rows) -> str:
    lines = [
        "| category | template | options | " + " | ".join(SPLITS) + " |",
        "|---|---|---|" + "---|" * len(SPLITS),
    ]
    for kind, (category, options, _) in KINDS.items():
        numbers = [sum(row["kind"] == kind for row in rows[split]) for split in SPLITS]
        cells = [category, phrase(kind, ("X", "Y")), options, *numbers]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("| all | | | " + " | ".join(str(len(rows[split])) for split in SPLITS) + " |")
    return "\n".join(lines)


def _sizes(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| | image | " + " | ".join(f"overview of {b:,} px" for b in BUDGETS.values()) + " |",
        "|---|---|" + "---|" * len(BUDGETS),
    ]
    for what, key in (("object, longer side", "object_px"), ("capitals, height", "text_px")):
        having = [row for row in rows if key in row["checks"]]
        if not having:
            continue
        columns = [[row["checks"][key] for row in having]]
        for budget in BUDGETS.values():
            scales = [overview_scale(row["image_size"], budget) for row in having]
            columns.append([a * b for a, b in zip(columns[0], scales, strict=True)])
        lines.append(f"| {what}, px | " + " | ".join(_range(column) for column in columns) + " |")
    heights = sorted({row["image_size"][1] for row in rows})
    lines.append(
        f"\nImages are {manifest['width']} pixels wide and {heights[0]} to {heights[-1]} high."
        f" 2,097,152 and 4,194,304 pixels are the authors' budgets in training and evaluation."
    )
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} – {high:.3g}"


def _caveats(manifest: Mapping[str, Any]) -> str:
    if manifest["size"] == "2k":
        return (
            "At this size the authors' budgets hide little or nothing: they shrink the image by a"
            " sixth, or not at all. Evaluate with a budget of 524,288 pixels per image."
        )
    if manifest["size"] == "4k":
        return (
            "The overview is half as large as the image, so text that is 4 pixels tall there is 8"
            " in the crop, or 16 in one that is enlarged twofold. Within 4,194,304 pixels the"
            " overview is larger by 1.4: say which budget a number was measured with."
        )
    return "Within 4,194,304 pixels the overview is larger by 1.4: say which budget you used."


def _baselines(
    manifest: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Sequence[bool]],
) -> str:
    columns = {"all": [True] * len(rows)}
    columns |= {c: [KINDS[row["kind"]][0] == c for row in rows] for c in CATEGORIES}
    for name, kinds in (("colour", ("colour",)), ("word or number", ("word", "number"))):
        columns[name] = [row["kind"] in kinds for row in rows]
    chance = [1 / len(row["shown"]) for row in rows]
    head = [f"{name} (n = {sum(chosen)})" for name, chosen in columns.items()]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    expected = [
        f"{100 * sum(c for c, use in zip(chance, chosen, strict=True) if use) / sum(chosen):.1f}"
        if any(chosen)
        else ""
        for chosen in columns.values()
    ]
    lines.append("| chance | " + " | ".join(expected) + " |")
    for name, description in {**BLIND, **LOOKING}.items():
        cells = []
        for chosen in columns.values():
            used = [good for good, use in zip(baselines[name], chosen, strict=True) if use]
            cells.append(_share(sum(used), len(used)))
        kind = "blind" if name in BLIND else "looking"
        lines.append(f"| {kind}: {description} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(right: int, n: int) -> str:
    if not n:
        return ""
    low, high = wilson_interval(right, n)
    return f"{100 * right / n:.1f} ({100 * low:.0f} – {100 * high:.0f})"


def _left_out(manifest: Mapping[str, Any]) -> str:
    parts = [
        f"{number} {what} ({reason})"
        for what, reasons in manifest["left_out"].items()
        for reason, number in reasons.items()
    ]
    return ", ".join(parts) or "nothing"


def _licences(manifest: Mapping[str, Any]) -> str:
    lines = ["| material | licence found | files |", "|---|---|---|"]
    for what in ("photos", "objects"):
        counted = Counter(entry["licence"] for entry in manifest[what])
        for licence, number in counted.most_common():
            lines.append(f"| {what} | {licence.replace('|', '/')} | {number} |")
    return "\n".join(lines)
