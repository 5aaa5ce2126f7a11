"""Reading a run folder for the report: defensively, and no more than will be shown.

A run may still be writing, may have been killed, and its records hold whatever a model wrote.  So
nothing here raises on content: what cannot be used is left out and named in `notes`.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from PIL import Image

CROP_SIDE = 240
"""Longest side of an embedded crop, pixels."""

INPUTS = {
    "summary.json": "headline figures and wall time by stage",
    "metrics.jsonl": "training curves",
    "eval/*.jsonl": "answers one by one, and tables counted from them",
    "samples/step_*.jsonl": "training samples",
    "config.yaml": "the configuration",
}
"""What a run folder may hold, and the part of the page it feeds."""


@dataclasses.dataclass
class Pictures:
    """Images of a run, each embedded once however many cards show it.

    `embedded` maps a relative path to {"id", "uri", "width", "height"} (pixels after downscaling);
    `problems` maps a path to why it cannot be shown.
    """

    run: Path
    side: int
    embedded: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, path: Any, side: int | None = None) -> dict[str, Any] | None:
        """Embeds a picture of the run folder; None if there is none to show."""
        if not isinstance(path, str) or not path:
            return None
        if path not in self.embedded and path not in self.problems:
            try:
                uri, size = self._encode(path, side or self.side)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                missing = isinstance(error, FileNotFoundError)
                self.problems[path] = "file not found" if missing else str(error)
            else:
                self.embedded[path] = {
                    "id": f"picture-{len(self.embedded)}",
                    "uri": uri,
                    "width": size[0],
                    "height": size[1],
                }
        return self.embedded.get(path)

    def _encode(self, path: str, side: int) -> tuple[str, tuple[int, int]]:
        # A report is made to be passed on; records must not be able to pull in other files.
        if Path(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError("not inside the run folder")
        with (self.run / path).open("rb") as file, Image.open(file) as image:
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=82, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f"data:image/jpeg;base64,{data}", image.size


def read_jsonl(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """JSON objects of a file, one a line; [] if there is no file.

    Lines that are not objects (a running job's last line may be half written) are skipped and
    counted in `notes`.
    """
    if not path.exists():
        return []
    rows, bad = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number_, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad.append(number_)
    if bad:
        noun = "line is" if len(bad) == 1 else "lines are"
        notes.append(f"{path.name}: {len(bad)} {noun} not a JSON object, first at line {bad[0]}")
    return rows


def stratified(
    items: Iterable[Mapping[str, Any]], limit: int, stratum: Callable[[Any], tuple]
) -> list[Any]:
    """At most `limit` items, taken in turn from every stratum, in the original order.

    Within a stratum items with a picture come first, and then the choice goes by a hash of `id`: it
    does not change between runs of the report, and strata over the same questions tend to show the
    same questions.
    """
    strata: dict[tuple, list[tuple[bool, int, int]]] = collections.defaultdict(list)
    items = list(items)
    for index, item in enumerate(items):
        strata[stratum(item)].append((not item.get("image"), _hash(item.get("id")), index))
    queues = [collections.deque(sorted(members)) for members in strata.values()]
    chosen: list[int] = []
    while queues and len(chosen) < limit:
        for queue in queues[: limit - len(chosen)]:
            chosen.append(queue.popleft()[-1])
        queues = [queue for queue in queues if queue]
    return [items[index] for index in sorted(chosen)]


def pick_samples(
    files: Sequence[Path], limit: int, notes: list[str]
) -> tuple[list[dict[str, Any]], int]:
    """About `limit` training samples, as whole groups, from files spread evenly over the run.

    A long run writes gigabytes of samples, so only the chosen files are read.  Groups with both
    rewarded and unrewarded completions come first: the others carry no advantage.

    Returns: samples, and how many files they come from.
    """
    if limit <= 0 or not files:
        return [], 0
    count = min(len(files), max(2, limit // 8))
    spread = sorted({round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)})
    samples: list[dict[str, Any]] = []
    for position, index in enumerate(spread):
        share = (limit - len(samples)) / (len(spread) - position)
        groups: dict[tuple, list[dict[str, Any]]] = collections.defaultdict(list)
        for row in read_jsonl(files[index], notes):
            groups[str(row.get("step")), str(row.get("role")), str(row.get("id"))].append(row)
        ranked = sorted(
            groups.values(),
            key=lambda g: (len({str(s.get("reward")) for s in g}) == 1, _hash(g[0].get("id"))),
        )
        taken = 0
        for group in ranked:
            if taken and taken + len(group) > share:
                break
            samples += group
            taken += len(group)
    return samples, len(spread)


def boxes_of(value: Any) -> list[dict[str, Any]]:
    """[{"bbox": [4 floats in 0-1000], "label": str}] from either form of a record's boxes."""
    boxes = []
    for item in value if isinstance(value, list) else ():
        bbox, label = item, ""
        if isinstance(item, dict):
            bbox, label = item.get("bbox_2d"), item.get("label") or ""
        if isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox)):
            boxes.append({"bbox": [float(c) for c in bbox], "label": str(label)})
    return boxes


def natural(text: str) -> list[Any]:
    """Sort key that puts step_20 before step_100."""
    return [(int(t), "") if t.isdigit() else (0, t) for t in re.split(r"(\d+)", text)]


def read_text(path: Path) -> str | None:
    """Content of a text file, None if there is no file."""
    return path.read_text("utf-8", errors="replace") if path.is_file() else None


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; {} if there is no file, or with a note if it holds something else."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a JSON object")
        return {}
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (booleans are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _hash(value: Any) -> int:
    return zlib.crc32(str(value).encode("utf-8", "replace"))
