"""Records of an evaluation: appended as they come, taken up again after a kill.

OUT/eval/NAME.jsonl      one record a line, in the order of the questions
OUT/eval/NAME.run.json   what the records depend on; another run does not go on with them
OUT/eval/NAME.json       the summary by mode, written at the end
OUT/eval/images/         pictures of some

In a bucket records are appended some seconds' worth at a time: those since then are lost with the
process, and are made again.
"""

from __future__ import annotations

import io
import json
import time
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from p2r_jax.data.loader import LoadedRow
from p2r_jax.evals.scoring import summarize_modes
from p2r_jax.parallel.multihost import any_process, is_main
from p2r_jax.paths import as_path, is_remote, write_whole
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.render import crops

Record = dict[str, Any]

BUCKET_SECONDS = 10.0
"""Between two appendings to a file in a bucket, which takes no more than one a second."""


class EvalWriter:
    """Writes records as they come, pictures of some, and the summary."""

    def __init__(
        self,
        run: str | Path,
        name: str,
        pictures: int,
        fingerprint: dict[str, Any] | None = None,
        resume: bool = False,
    ):
        """pictures: of how many records of a mode. fingerprint: JSON values that the records depend
        on. resume: go on with the records that are there, if their fingerprint is this one.

        Raises ValueError naming what differs.
        """
        self.folder = as_path(run) / "eval"
        self._flushed = time.monotonic()
        self.name = name
        self.pictures = pictures
        self.pictured: dict[str, int] = {}
        self.earlier: list[Record] = []
        """Records that were there; all processes read them."""
        file, described = self.folder / f"{name}.jsonl", self.folder / f"{name}.run.json"
        if resume and file.is_file():
            self._check(described, fingerprint)
            self.earlier = _whole_lines(file)
            for record in self.earlier:
                if record.get("image"):
                    mode = record["mode"]
                    self.pictured[mode] = self.pictured.get(mode, 0) + 1
        any_process(False)  # Nobody writes before all have read.
        self.active = is_main()
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.json").unlink(missing_ok=True)  # There is none until the end.
            if fingerprint is not None:
                described.write_text(json.dumps(fingerprint, indent=2) + "\n")
            if not self.earlier:
                file.write_text("")
            self.file = file.open("a")

    def _check(self, described: Path, fingerprint: dict[str, Any] | None) -> None:
        before = json.loads(described.read_text()) if described.is_file() else None
        if before == fingerprint:
            return
        now, before = fingerprint or {}, before or {}
        other = [k for k in {**now, **before} if now.get(k) != before.get(k)]
        raise ValueError(
            f"{self.folder / self.name}.jsonl was made with another {', '.join(other)}: give it "
            "another --name, or delete it to start again"
        )

    def __call__(self, record: Record, loaded: LoadedRow) -> None:
        if not self.active:
            return
        done = self.pictured.get(record["mode"], 0)
        if done < self.pictures:
            self.pictured[record["mode"]] = done + 1
            record |= save_pictures(
                self.folder.parent, f"eval/images/{record['id'].replace('/', '_')}", record, loaded
            )
        self.file.write(json.dumps(record) + "\n")
        now = time.monotonic()
        if not is_remote(self.folder) or now - self._flushed > BUCKET_SECONDS:
            self.file.flush()
            self._flushed = now

    def finish(self, records: list[Record]) -> dict[str, Any]:
        """Write and return the summary by mode, of all records; answers that nothing could grade
        are left out and counted as `ungraded`."""
        graded = [record for record in records if record["correct"] is not None]
        summary = summarize_modes(self.name, graded)
        summary["ungraded"] = len(records) - len(graded)
        if not self.active:
            return summary
        self.file.close()
        file = self.folder / f"{self.name}.json"
        write_whole(file, json.dumps(summary, indent=2) + "\n")
        return summary


def _whole_lines(file: Path) -> list[Record]:
    """The records of a file; a last line that was not finished is cut off."""
    raw = file.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end < len(raw) and is_main():
        write_whole(file, raw[:end])
    return [json.loads(line) for line in raw[:end].splitlines()]


def save_pictures(
    run: Path, stem: str, record: Record, loaded: LoadedRow, longest: int | None = None
) -> Record:
    """Save the image and the crops of a record's boxes; returns the fields that point to them.

    longest: side of a picture in pixels; larger ones are shrunk.
    """
    # Ids of two benchmarks may be equal, pictures are not.
    image = run / f"{stem}_{zlib.crc32(loaded.image.tobytes()):08x}.jpg"
    image.parent.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        picture = Image.fromarray(loaded.image)
        picture.thumbnail((longest or picture.width, longest or picture.height))
        _save(picture, image)
    boxes = [Box(tuple(b["bbox_2d"]), b["label"]) for b in record["boxes"]]
    paths = []
    for i, crop in enumerate(crops(loaded.image, boxes)):
        path = run / f"{stem}_{record['mode']}_crop{i}.jpg"
        crop.thumbnail((longest or crop.width, longest or crop.height))
        _save(crop, path)
        paths.append(str(path.relative_to(run)))
    return {"image": str(image.relative_to(run)), "crops": paths}


def _save(picture: Image.Image, path: Path) -> None:
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=90)
    path.write_bytes(encoded.getvalue())
