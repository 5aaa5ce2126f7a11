"""Small files in the layouts in which benchmarks are published."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

INSTRUCTION = "Answer with the option's letter from the given choices directly."


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    """An encoded image of noise; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def vstar_text(number: int) -> str:
    return f"What colour is thing {number}?\n(A) red\n(B) blue\n(C) dark brown\n(D) white"


def vstar_record(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "image": f"direct_attributes/sa_{number}.jpg",
        "text": f"{vstar_text(number)}\n{INSTRUCTION}",
        "category": "direct_attributes",
        "label": "ABCD"[number % 4],
        "question_id": str(number),
    }
    return {**record, **changes}


def vstar_folder(folder: Path, count: int = 3) -> Path:
    """With true boxes: a JSON beside each image, in pixels of a 40 x 30 image."""
    images = folder / "direct_attributes"
    images.mkdir(parents=True)
    for i in range(count):
        (images / f"sa_{i}.jpg").write_bytes(picture(i, form="JPEG"))
        known = {"target_object": ["cup"], "bbox": [[10, 6, 20, 3]], "options": ["red", "blue"]}
        (images / f"sa_{i}.json").write_text(json.dumps(known))
    lines = [json.dumps(vstar_record(i)) for i in range(count)]
    (folder / "test_questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def hrbench_records(questions: int = 2) -> list[dict[str, Any]]:
    """Each question in four rotations of its options."""
    rows = []
    colours = ["red", "green", "blue", "black"]
    for q in range(questions):
        image = base64.b64encode(picture(q, form="JPEG")).decode()
        for r in range(4):
            options = colours[r:] + colours[:r]
            rows.append(
                {
                    "index": 4 * q + r,
                    "question": f"What colour is thing {q}?",
                    "answer": "ABCD"[options.index("red")],
                    "category": "single" if q % 2 == 0 else "cross",
                    **dict(zip("ABCD", options, strict=True)),
                    "cycle_category": f"cycle {r}",
                    "image": image,
                }
            )
    return rows


def mme_record(number: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "index": number,
        "bytes": base64.b64encode(picture(number)).decode(),
        "question": "How many cars?",
        "multi-choice options": ["(A) 1", "(B) 2", "(C) 3", "(D) 4", "(E) There are none."],
        "answer": "E",
        "category": "Perception/Monitoring",
        "l2-category": "vehicle counting",
    }
    return {**record, **changes}


def p2r_record(number: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "data_source": "zwz",
        "prompt": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": "<image>\nWhat is it?\nA. cup\nB. hat"},
        ],
        "images": [{"bytes": picture(number), "path": None}],
        "reward_model": {"ground_truth": "B", "style": "rule"},
        "extra_info": {"answer_form": "mca", "index": number},
    }
    return {**record, **changes}
