"""A composed benchmark is what its files say, is built to the byte again, and survives kills."""

import fcntl
import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from p2r_jax.data import compose
from p2r_jax.data.compose import build_visual_search
from p2r_jax.data.compose_materials import SPLITS
from p2r_jax.data.compose_pixels import luminance, nearest_tint, tag_pixels
from p2r_jax.data.compose_questions import KINDS
from p2r_jax.qwen3_vl.processor import smart_resize
from tests.data.compose_material import write_objects, write_photos

COUNT = 15


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_photos(folder / "photos")
    write_objects(folder / "objects")
    (folder / "photos" / "LICENSE").write_text("Public domain, CC0-1.0.")
    return folder


@pytest.fixture(scope="module")
def built(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "search"
    build_visual_search(material / "photos", material / "objects", out, size="2k", count=COUNT)
    return out


def folder_of(out, split):
    return out if split == "test" else out / split


def records(out, kinds=tuple(KINDS)):
    for split in SPLITS:
        for path in sorted(folder_of(out, split).glob("*_*/*.json")):
            record = json.loads(path.read_text())
            if record["kind"] in kinds:
                yield path, record


def pixels(path):
    with Image.open(path.with_suffix(".jpg")) as image:
        return np.asarray(image.convert("RGB"))


def cut(image, xywh):
    x, y, w, h = xywh
    return image[y : y + h, x : x + w]


def tree(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_each_split_is_a_folder_in_the_layout_of_vstar(built):
    ids = []
    for split in SPLITS:
        folder = folder_of(built, split)
        lines = [json.loads(x) for x in (folder / "test_questions.jsonl").read_text().splitlines()]
        for line in lines:
            assert set(line) == {"image", "text", "category", "label", "question_id"}
            assert line["image"].startswith(line["category"] + "/")
            assert line["category"] in ("direct_attributes", "relative_position")
            assert (folder / line["image"]).is_file()
            beside = json.loads((folder / line["image"]).with_suffix(".json").read_text())
            assert len(beside["target_object"]) == len(beside["bbox"])
            shown = dict(row[1:].split(") ", 1) for row in line["text"].splitlines()[1:-1])
            assert shown[line["label"]] == beside["options"][0]
            assert sorted(shown.values()) == sorted(beside["options"])
            assert len(shown) == (2 if line["category"] == "relative_position" else 4)
            assert line["text"].splitlines()[0] == beside["question"]
            ids.append(line["question_id"])
    assert len(set(ids)) == len(ids) == COUNT


def test_pictures_are_as_wide_as_the_size_says(built):
    for path, record in records(built):
        with Image.open(path.with_suffix(".jpg")) as image:
            assert image.size == tuple(record["image_size"])
            assert image.width == 2304


def test_the_right_colour_is_on_the_object(built):
    seen = 0
    for path, record in records(built, ("colour",)):
        item = record["objects"][0]
        x, y, w, h = item["object_bbox"]
        inner = cut(pixels(path), (x + w // 4, y + h // 4, w // 2, h // 2)).astype(np.float32)
        assert (
            nearest_tint(inner.mean(axis=(0, 1)), tuple(record["shown"]))[0]
            == (record["options"][0])
        )
        seen += 1
    assert seen


def test_the_right_text_is_exactly_where_its_box_says(built):
    seen = 0
    for path, record in records(built, ("word", "number")):
        image = luminance(pixels(path))
        x, y, w, h = record["objects"][0]["tag_bbox"]

        def difference(text, dx=0, dy=0, image=image, box=(x, y, w, h), record=record):
            plate = luminance(tag_pixels(text, int(record["checks"]["text_px"])))
            there = cut(image, (box[0] + dx, box[1] + dy, *box[2:]))
            return np.abs(there - there.mean() - plate + plate.mean()).mean()

        right = record["options"][0]
        assert min(record["shown"], key=difference) == right
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            assert difference(right, dx, dy) > difference(right)
        bx, by, bw, bh = record["bbox"][0]
        assert bx <= x
        assert by < y
        assert (bx + bw, by + bh) >= (x + w, y + h)
        seen += 1
    assert seen


def test_the_right_relation_holds_between_the_boxes(built):
    answers = Counter()
    for _, record in records(built, ("horizontal", "vertical")):
        (ax, ay, aw, ah), (bx, by, bw, bh) = record["bbox"]
        words = record["options"][0].rstrip(".").split()
        first, second = record["target_object"]
        assert " ".join(words[1 : 1 + len(first.split())]) == first
        assert record["options"][0].endswith(f"the {second}.")
        holds = {
            "left": ax + aw < bx,
            "right": ax > bx + bw,
            "above": ay + ah < by,
            "below": ay > by + bh,
        }
        (relation,) = holds.keys() & set(words)
        assert holds[relation]
        answers[relation] += 1
    assert len(answers) == 4


def test_objects_are_too_small_in_the_overview_and_no_smaller(built):
    for _, record in records(built):
        width, height = record["image_size"]
        new_height, new_width = smart_resize(
            height, width, factor=32, min_pixels=16384, max_pixels=524_288
        )
        scale = max(new_width / width, new_height / height)
        for item in record["objects"]:
            x, y, w, h = item["object_bbox"]
            assert max(w, h) == record["checks"]["object_px"]
            assert 12 - scale < max(w, h) * scale <= 12
            x, y, w, h = item["bbox"]
            assert min(x, y, width - x - w, height - y - h) >= 0.03 * height
        if "text_px" in record["checks"]:
            assert 4 - scale < record["checks"]["text_px"] * scale <= 4


def test_wrong_options_are_in_the_scene_and_the_right_one_once(built):
    for _, record in records(built, ("colour", "word", "number")):
        shows = Counter(item["shows"] for item in record["objects"])
        assert shows[record["options"][0]] == 1
        assert set(record["options"]) <= set(shows)


def test_no_two_objects_of_a_scene_share_a_name(built):
    for _, record in records(built):
        words = [word for item in record["objects"] for word in item["name"].split()]
        assert len(words) == len(set(words))
        assert len(record["objects"]) == 6


def test_splits_share_no_photograph_and_no_object(built):
    manifest = json.loads((built / "manifest.json").read_text())
    for what in ("photos", "objects"):
        split_of = {entry["file"]: entry["split"] for entry in manifest[what]}
        assert len(split_of) == len(manifest[what])
        assert len({entry["sha256"] for entry in manifest[what]}) == len(split_of)
        for _, record in records(built):
            used = [record["photo"]] if what == "photos" else [o["file"] for o in record["objects"]]
            assert {split_of[name] for name in used} == {record["id"].split("_")[0]}


def test_the_manifest_has_hashes_licences_and_answers(built, material):
    manifest = json.loads((built / "manifest.json").read_text())
    for what in ("photos", "objects"):
        for entry in manifest[what]:
            content = (material / what / entry["file"]).read_bytes()
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert {entry["licence"] for entry in manifest["photos"]} == {"Public domain, CC0-1.0."}
    kept = built / manifest["photos"][0]["licence_file"]
    assert kept.read_text() == "Public domain, CC0-1.0."
    assert {entry["licence"] for entry in manifest["objects"]} == {"unknown"}
    for _, record in records(built):
        answer = manifest["answers"].pop(record["id"])
        assert answer == {"label": record["label"], "answer": record["options"][0]}
        assert record["shown"]["ABCD".index(record["label"])] == record["options"][0]
    assert manifest["answers"] == {}


def test_the_card_says_what_this_is_and_what_needs_no_model(built):
    text = (built / "README.md").read_text()
    assert "not V\\*Bench or HR-Bench" in text
    assert f"{COUNT} of {COUNT} pictures were enlarged" in text
    assert text.count("| blind: ") == 4
    assert text.count("| looking: ") == 3
    assert "Public domain, CC0-1.0." in text
    looking = json.loads((built / "manifest.json").read_text())["baselines"]
    assert looking["crop, searched"] >= 0.75  # the crop holds the answers


def test_it_is_built_to_the_byte_again_elsewhere(built, material, tmp_path):
    copy = shutil.copytree(material, tmp_path / "moved" / "away")
    out = tmp_path / "again"
    build_visual_search(copy / "photos", copy / "objects", out, size="2k", count=COUNT)
    assert tree(out) == tree(built)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_killed_build_goes_on(built, material, tmp_path, monkeypatch):
    out = tmp_path / "search"
    arguments = (material / "photos", material / "objects", out)
    real, made = compose.compose_scene, []

    def dies_after(number):
        def compose_scene(plan, *rest):
            if len(made) == number:
                raise KeyboardInterrupt
            made.append(plan.id)
            return real(plan, *rest)

        monkeypatch.setattr(compose, "compose_scene", compose_scene)

    dies_after(2)
    with pytest.raises(KeyboardInterrupt):
        build_visual_search(*arguments, size="2k", count=COUNT, seed=5)
    made.clear()
    dies_after(7)  # of another seed: nothing of it may survive
    with pytest.raises(KeyboardInterrupt):
        build_visual_search(*arguments, size="2k", count=COUNT)
    assert not out.exists()
    (out.parent / ".search.building" / "direct_attributes" / ".x.jpg.part").write_bytes(b"half")
    dies_after(None)
    build_visual_search(*arguments, size="2k", count=COUNT)
    assert len(set(made)) == len(made) == COUNT
    assert tree(out) == tree(built)


def test_what_is_there_is_neither_made_again_nor_overwritten(built, material, monkeypatch):
    monkeypatch.setattr(compose, "compose_scene", None)
    photos, objects = material / "photos", material / "objects"
    build_visual_search(photos, objects, built, size="2k", count=COUNT)
    with pytest.raises(ValueError, match="exists and is not this benchmark"):
        build_visual_search(photos, objects, built, size="2k", count=COUNT, seed=1)


def test_a_second_builder_is_refused(material, tmp_path):
    with open(tmp_path / ".search.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is building it"):
            build_visual_search(
                material / "photos", material / "objects", tmp_path / "search", size="2k"
            )
    assert not (tmp_path / ".search.building").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "5k"}, "size is '5k'; use one of 2k, 4k, 8k"),
        ({"count": 9}, "count is 9; must be at least 10"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(material, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_visual_search(material / "photos", material / "objects", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_photographs_without_a_calm_place_are_named(material, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 2, (12, 18, 3), np.uint8) * 255
        noise = Image.fromarray(coarse).resize((360, 240), Image.Resampling.NEAREST)
        fine = np.asarray(noise) ^ (rng.integers(0, 2, (240, 360, 3), np.uint8) * 255)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(fine).save(tmp_path / "photos" / f"busy_{i}.png")
    with pytest.raises(ValueError, match=r"train_00000: no place .*busy_.*calmer"):
        build_visual_search(
            tmp_path / "photos", material / "objects", tmp_path / "out", size="2k", count=10
        )
