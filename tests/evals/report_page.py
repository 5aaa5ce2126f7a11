"""Reading a report back: its elements and text, and records to make one of."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any


class Page(html.parser.HTMLParser):
    """Elements of a page: (tag, attributes), and the text of each script and picture."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.pictures: list[str] = []
        """As data URIs, which the script makes images of."""
        self.words: list[str] = []
        self.ended = False
        self.summaries: dict[int, str] = {}
        """By number of the element before: what a fold is called."""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ended = False
        if tag == "script":
            self.scripts.append("")
        if tag == "template":
            self.pictures.append("")

    def handle_data(self, data):
        if self.lasttag == "summary" and not self.ended:
            self.summaries[len(self.elements) - 2] = data
        if self.lasttag == "script" and not self.ended:
            self.scripts[-1] += data
        elif self.lasttag == "template" and not self.ended:
            self.pictures[-1] += data
        elif self.lasttag != "style" or self.ended:
            self.words.append(data)

    def handle_endtag(self, tag):
        self.ended = True

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def stored(run: Path, name: str) -> dict[str, Any]:
    """Summaries of an evaluation's modes, as training wrote them."""
    return json.loads((run / f"eval/{name}.json").read_text())["modes"]


def both_sides(run: Path, mode: str) -> list[list[dict[str, Any]]]:
    """Records of a mode before and after training."""
    sides = [map(json.loads, (run / f"eval/{name}.jsonl").open()) for name in ("before", "after")]
    return [[r for r in side if r["mode"] == mode] for side in sides]


def write_jsonl(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(id_: str, **fields: Any) -> dict[str, Any]:
    """An evaluation record with every field."""
    return {
        "id": id_,
        "mode": "p2r",
        "category": "a",
        "question": "Which?",
        "options": ["red", "blue"],
        "answer": "A",
        "prediction": "A",
        "correct": 1,
        "perceiver_text": "[]",
        "parse_ok": True,
        "boxes": [],
        "true_boxes": [],
        "reasoner_text": "<answer>A</answer>",
        "hit": None,
        "iou": None,
        "area": None,
        "width": 400,
        "height": 300,
        "image": None,
        "crops": [],
        **fields,
    }
