"""Builds a visual-search benchmark in V*'s layout from photographs and cut-outs.

    OUT/README.md                                 the card
    OUT/manifest.json                             materials with hashes and licences, answer key
    OUT/licences/...                              the licence files that were found
    OUT/test_questions.jsonl                      the test split is V*'s folder form
    OUT/{direct_attributes,relative_position}/test_00012.jpg, test_00012.json
    OUT/train/..., OUT/validation/...             the same layout, test_questions.jsonl included

Everything follows from the seed, the size, the count and the material's bytes.  Images are composed
in `.OUT.building` beside OUT, which is renamed when all is there: OUT is whole or absent.  A build
that was killed goes on where it stopped; a second one at the same time is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2r_jax.data.compose_baselines import LOOKING, looking_baselines
from p2r_jax.data.compose_card import card
from p2r_jax.data.compose_materials import SHARES, SPLITS, Cutout, Materials, Photo, gather
from p2r_jax.data.compose_questions import (
    CATEGORIES,
    KINDS,
    Plan,
    blind_baselines,
    full_text,
    plan_questions,
    shuffled,
)
from p2r_jax.data.compose_scene import SIZES, Scene, compose_scene

VERSION = 1
"""Raise with every change that changes pictures or questions."""

QUALITY = 92  # of JPEG, colour at full resolution
MIN_COUNT = 2 * len(KINDS)


def build_visual_search(
    photos: Path, objects: Path, out: Path, *, size: str = "4k", count: int = 200, seed: int = 0
) -> None:
    """Composes a benchmark; see the module for what is written.

    Args:
      photos: folder with JPEG or PNG photographs, searched recursively.
      objects: folder with PNG or WebP cut-outs (transparent surroundings), searched recursively;
        named by a .txt beside them, by names.json ({"file": "name"}), or by their file names.
      out: folder to make.  Nothing is done if it already holds this very benchmark.
      size: "2k", "4k" or "8k": images 2304, 3840 or 7680 pixels wide.
      count: questions of all splits together; the test split has 60 % of them.
      seed: of everything random.

    Raises:
      ValueError: bad argument, too little material (says how much is needed), `out` holds something
        else, or another process is building it.
    """
    photos, objects, out = Path(photos), Path(objects), Path(out)
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; use one of {', '.join(SIZES)}")
    if count < MIN_COUNT:
        raise ValueError(f"count is {count}; must be at least {MIN_COUNT}, two of every kind")
    if seed < 0:
        raise ValueError(f"seed is {seed}; must not be negative")
    materials = gather(photos, objects, seed)
    fingerprint = _fingerprint(materials, size, count, seed)
    if _is_made(out, fingerprint):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(out):
        if _is_made(out, fingerprint):  # by another process, meanwhile
            return
        building = out.parent / f".{out.name}.building"
        _start_or_resume(building, fingerprint)
        plans = _plans(count, seed)
        with _progress() as bar:
            rows = {
                split: [
                    _make(plan, materials, size, seed, building, load)
                    for plan in bar.track(plans[split], description=f"compose {split}")
                ]
                for split, load in ((split, _loader()) for split in SPLITS)
            }
            looked = _look(rows["test"], materials, size, building, bar)
        _write_rest(building, rows, looked, materials, size, count, seed, fingerprint)
        (building / "state.json").unlink()
        os.rename(building, out)


def _plans(count: int, seed: int) -> dict[str, list[Plan]]:
    sizes = {split: max(1, int(SHARES[split] * count)) for split in SPLITS}
    sizes["test"] += count - sum(sizes.values())
    return {
        split: plan_questions(split, sizes[split], np.random.default_rng([seed, 2, i]))
        for i, split in enumerate(SPLITS)
    }


def _make(
    plan: Plan, materials: Materials, size: str, seed: int, building: Path, load: Any
) -> dict[str, Any]:
    """Composes a question unless it is there already; returns its record."""
    folder = _folder(building, plan.split)
    image_path = folder / plan.category / f"{plan.id}.jpg"
    json_path = image_path.with_suffix(".json")
    if json_path.is_file() and image_path.is_file():  # the JSON is written last
        return json.loads(json_path.read_text("utf-8"))
    entropy = [seed, 3, SPLITS.index(plan.split), plan.number]
    photos = _in_turn(materials.photos[plan.split], plan)
    scene = compose_scene(plan, photos, materials.cutouts[plan.split], SIZES[size], load, entropy)
    record = _record(plan, scene, np.random.default_rng([*entropy, 1 << 20]))
    encoded = io.BytesIO()
    Image.fromarray(scene.image).save(encoded, "JPEG", quality=QUALITY, subsampling=0)
    image_path.parent.mkdir(parents=True, exist_ok=True)
    _write(image_path, encoded.getvalue())
    _write(json_path, _json(record))
    return record


def _record(plan: Plan, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """What is written beside the image: V*'s keys first, then how it was made."""
    shown = shuffled(scene.options, plan.label, rng)
    asked = scene.placed[: scene.targets]
    height, width = scene.image.shape[:2]
    return {
        "target_object": [item.cutout.noun for item in asked],
        "bbox": [_xywh(item.box) for item in asked],
        "question": scene.question,
        "options": scene.options,
        "id": plan.id,
        "kind": plan.kind,
        "label": plan.label,
        "shown": shown,
        "image": f"{plan.category}/{plan.id}.jpg",
        "image_size": [width, height],
        "photo": scene.photo.name,
        "photo_window": [round(v, 2) for v in scene.window],
        "photo_enlarged": round(scene.enlarged, 3),
        "objects": [
            {
                "name": item.cutout.noun,
                "file": item.cutout.name,
                "shows": item.says,
                "bbox": _xywh(item.box),
                "object_bbox": _xywh(item.part(item.sprite.body)),
                "tag_bbox": _xywh(item.part(item.sprite.tag)) if item.sprite.tag else None,
            }
            for item in scene.placed
        ],
        "checks": scene.checks,
    }


def _look(
    rows: list[dict[str, Any]], materials: Materials, size: str, building: Path, bar: Progress
) -> dict[str, list[bool]]:
    """The baselines that look at the images, for each test question."""
    by_name = {cutout.name: cutout for cutout in materials.cutouts["test"]}
    right: dict[str, list[bool]] = {name: [] for name in LOOKING}
    for row in bar.track(rows, description="baselines"):
        asked = [by_name[item["file"]] for item in row["objects"][: len(row["bbox"])]]
        answers = looking_baselines(row, _folder(building, "test"), asked, SIZES[size].budget)
        for name, good in answers.items():
            right[name].append(good)
    return right


def _write_rest(
    building: Path,
    rows: dict[str, list[dict[str, Any]]],
    looked: dict[str, list[bool]],
    materials: Materials,
    size: str,
    count: int,
    seed: int,
    fingerprint: str,
) -> None:
    """Question files, manifest, licences and card."""
    for split in SPLITS:
        lines = [
            {
                "image": row["image"],
                "text": full_text(row["question"], row["shown"]),
                "category": row["image"].split("/")[0],
                "label": row["label"],
                "question_id": row["id"],
            }
            for row in rows[split]
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        _folder(building, split).mkdir(exist_ok=True)
        _write(_folder(building, split) / "test_questions.jsonl", text.encode())
    elsewhere = [row for split in SPLITS if split != "test" for row in rows[split]]
    baselines = blind_baselines(rows["test"], elsewhere) | looked
    everything = [row for split in SPLITS for row in rows[split]]
    photos = {row["photo"] for row in everything}
    objects = {item["file"] for row in everything for item in row["objects"]}
    manifest = {
        "format": "p2r_jax visual-search benchmark",
        "version": VERSION,
        "fingerprint": fingerprint,
        "size": size,
        "width": SIZES[size].width,
        "overview_budget": SIZES[size].budget,
        "count": count,
        "seed": seed,
        "questions": {
            split: {kind: sum(row["kind"] == kind for row in rows[split]) for kind in KINDS}
            for split in SPLITS
        },
        "photos": _used(materials.photos, photos, building),
        "objects": _used(materials.cutouts, objects, building),
        "left_out": materials.skipped,
        "baselines": {name: sum(right) / len(right) for name, right in baselines.items()},
        "answers": {
            row["id"]: {"label": row["label"], "answer": row["options"][0]} for row in everything
        },
    }
    _write(building / "manifest.json", _json(manifest))
    _write(building / "README.md", card(manifest, rows, baselines).encode())


def _used(
    by_split: dict[str, tuple[Photo, ...]] | dict[str, tuple[Cutout, ...]],
    names: set[str],
    building: Path,
) -> list[dict[str, Any]]:
    """Manifest entries of the material that occurs; copies its licence files."""
    entries = []
    for split, items in by_split.items():
        for item in items:
            if item.name not in names:
                continue
            source = item.licence.source
            entry: dict[str, Any] = {"file": item.name, "split": split, "sha256": item.sha256}
            if isinstance(item, Photo):
                entry["size"] = list(item.size)
            else:
                entry["name"] = item.noun
            entry["licence"] = item.licence.statement
            entry["licence_file"] = _keep_licence(source, building) if source else None
            entries.append(entry)
    return entries


def _keep_licence(source: Path, building: Path) -> str:
    content = source.read_bytes()
    name = f"licences/{hashlib.sha256(content).hexdigest()[:12]}-{source.name}"
    path = building / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        _write(path, content)
    return name


def _in_turn(photos: tuple[Photo, ...], plan: Plan) -> list[Photo]:
    """All photographs, beginning with the one whose turn it is; neighbours share one."""
    start = plan.number // 4 % len(photos)
    return [*photos[start:], *photos[:start]]


def _loader() -> Any:
    """Decodes photographs and keeps the last two."""
    return functools.lru_cache(maxsize=2)(lambda photo: photo.load())


def _folder(building: Path, split: str) -> Path:
    return building if split == "test" else building / split


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    return [int(box[0]), int(box[1]), int(box[2] - box[0]), int(box[3] - box[1])]


def _fingerprint(materials: Materials, size: str, count: int, seed: int) -> str:
    """Changes with whatever the result depends on."""
    parts: list[Any] = [VERSION, size, count, seed]
    parts += [(s, p.name, p.sha256) for s in SPLITS for p in materials.photos[s]]
    parts += [(s, c.name, c.sha256, c.noun) for s in SPLITS for c in materials.cutouts[s]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_made(out: Path, fingerprint: str) -> bool:
    """Whether `out` is this very benchmark.  Raises ValueError if it is anything else."""
    if not out.exists():
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        if manifest["fingerprint"] == fingerprint:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{out} exists and is not this benchmark; remove it or choose another folder")


def _start_or_resume(building: Path, fingerprint: str) -> None:
    """Keeps what an interrupted build of the same benchmark has made, and nothing else."""
    state = building / "state.json"
    if building.exists():
        try:
            same = json.loads(state.read_text("utf-8"))["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            shutil.rmtree(building)
        for part in building.rglob(".*.part"):
            part.unlink()
    for category in CATEGORIES:
        (building / category).mkdir(parents=True, exist_ok=True)
    _write(state, _json({"fingerprint": fingerprint}))


@contextlib.contextmanager
def _only_builder(out: Path) -> Iterator[None]:
    """Holds a lock beside `out`; the system releases it if the process dies."""
    path = out.parent / f".{out.name}.lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file: a lock on a removed one keeps nobody out.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError(path)
        except OSError as error:
            raise ValueError(f"{out}: another process is building it; wait for it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """A file that is whole or absent."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
