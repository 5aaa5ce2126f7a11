"""Names a question can use, cut-outs worth asking about, licences, and disjoint splits."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from p2r_jax.data.compose_licences import dep5_statement, find_licence, forget
from p2r_jax.data.compose_materials import (
    MIN_KINDS,
    SPLITS,
    _deal,
    clean_noun,
    gather,
    stem_name,
)
from tests.data.compose_material import NAMES, cutout, write_objects, write_photos


@pytest.mark.parametrize(
    "text, noun",
    [
        ("A banana.", "banana"),
        ("An old Dutch windmill.", "old dutch windmill"),
        ("FIRE ENGINE", "fire engine"),
        ("teddy_bear", "teddy bear"),
        ("jack-o-lantern", "jack-o-lantern"),
        ("A bus.", "bus"),
        ("cactus", "cactus"),
        ("A dress!", "dress"),
        ("Confetti.", None),  # a mass
        ("Sad.", None),
        ("glasses", None),  # plurals
        ("A pair of socks.", None),
        ("A yellow pear.", None),  # would be tinted
        ("bluebird", None),
        ("The letter K.", None),
        ("Three.", None),
        ("A very big old red house.", None),
        ("A", None),
        ("", None),
        ("50 cents (0.50 €)", None),
    ],
)
def test_nouns(text, noun):
    assert clean_noun(text) == noun


@example("A_A_A")
@given(st.text(max_size=40) | st.from_regex(r"(A |an )?[a-z]{1,9}([ _-][a-z]{1,9}){0,4}[.!s]?"))
def test_any_text_is_a_usable_noun_or_none(text):
    noun = clean_noun(text)
    if noun is not None:
        assert re.fullmatch(r"[a-z]+([ -][a-z]+){0,2}", noun)
        assert not re.search(r"(?<![sui])s$", noun)
        assert clean_noun(noun) == noun


@pytest.mark.parametrize(
    "stem, name",
    [
        ("1f34c", "BANANA"),
        ("2708-fe0f", "AIRPLANE"),
        ("1f469-1f3fb", None),  # a skin tone
        ("1fabb0", None),
        ("beef", "beef"),  # a word, though also a code point
        ("fire_engine-2", "fire engine"),
        ("0042", None),
    ],
)
def test_names_of_files(stem, name):
    assert stem_name(stem) == name


def test_names_come_from_beside_the_file(tmp_path):
    write_photos(tmp_path / "photos")
    write_objects(tmp_path / "objects")
    materials = gather(tmp_path / "photos", tmp_path / "objects", 0)
    found = {c.name: c.noun for cutouts in materials.cutouts.values() for c in cutouts}
    assert sorted(found.values()) == sorted(NAMES)
    assert (found["item00.png"], found["item01.png"]) == (NAMES[0], NAMES[1])


def shape(draw):
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    draw(ImageDraw.Draw(image))
    return image


@pytest.mark.parametrize(
    "image, reason",
    [
        (shape(lambda d: d.ellipse((5, 5, 95, 95), outline=(0, 0, 0, 255), width=3)), "line art"),
        (shape(lambda d: d.rectangle((0, 40, 99, 79), fill=(9, 9, 9, 255))), "long and thin"),
        (shape(lambda d: d.rectangle((0, 0, 99, 99), fill=(9, 9, 9, 255))), "no transparency"),
        (shape(lambda d: d.ellipse((50, 50, 70, 70), fill=(9, 9, 9, 255))), "below 32 pixels"),
        (cutout(0), "a copy of another"),
    ],
)
def test_unfit_cutouts_are_left_out_and_counted(tmp_path, image, reason):
    write_photos(tmp_path / "photos")
    write_objects(tmp_path / "objects")
    image.save(tmp_path / "objects" / "wheel.png")
    materials = gather(tmp_path / "photos", tmp_path / "objects", 0)
    assert [why for why in materials.skipped["objects"] if reason in why]
    assert sum(materials.skipped["objects"].values()) == 1


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path):
    write_photos(tmp_path / "photos")
    write_objects(tmp_path / "objects")
    (tmp_path / "photos" / "x.jpg").write_bytes(b"\xff\xd8 no")
    (tmp_path / "objects" / "wheel.png").write_bytes(b"")
    skipped = gather(tmp_path / "photos", tmp_path / "objects", 0).skipped
    assert skipped == {"photos": {"cannot be read": 1}, "objects": {"cannot be read": 1}}


def test_too_little_material_says_how_much_is_needed(tmp_path):
    write_photos(tmp_path / "photos", 2)
    write_objects(tmp_path / "objects")
    with pytest.raises(ValueError, match="2 usable photographs; at least 3 are needed"):
        gather(tmp_path / "photos", tmp_path / "objects", 0)
    write_photos(tmp_path / "photos", 3)
    write_objects(tmp_path / "few", [*NAMES[:-2], "glasses", "big tiger"])
    message = r"17 usable objects of 16 kinds \(left out: 1 no name .*\); at least 18 kinds"
    with pytest.raises(ValueError, match=message):
        gather(tmp_path / "photos", tmp_path / "few", 0)
    with pytest.raises(ValueError, match="photos folder not found"):
        gather(tmp_path / "nothing", tmp_path / "objects", 0)


def test_a_bad_names_file_is_named(tmp_path):
    write_photos(tmp_path / "photos")
    write_objects(tmp_path / "objects")
    (tmp_path / "objects" / "names.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"names\.json: must be an object"):
        gather(tmp_path / "photos", tmp_path / "objects", 0)


def test_things_that_look_alike_are_of_one_kind(tmp_path):
    write_photos(tmp_path / "photos")
    write_objects(tmp_path / "objects", [*NAMES, "sumatran tiger", "tombstone", "grave marker"])
    for seed in range(4):
        materials = gather(tmp_path / "photos", tmp_path / "objects", seed)
        split_of = {c.noun: split for split in SPLITS for c in materials.cutouts[split]}
        assert split_of["tiger"] == split_of["sumatran tiger"]
        assert split_of["tombstone"] == split_of["grave marker"]


@given(st.integers(3 * MIN_KINDS, 90), st.integers(0, 99))
def test_every_split_gets_enough_and_all_are_dealt(count, seed):
    names = [f"kind {i}" for i in range(count)]
    dealt = _deal(names, MIN_KINDS, np.random.default_rng(seed))
    sizes = {split: list(dealt.values()).count(split) for split in SPLITS}
    assert sorted(dealt) == sorted(names)
    assert min(sizes.values()) >= MIN_KINDS
    assert sizes["test"] == max(sizes.values())


DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2002 Someone
License: GPL-2+

Files: 16.04/lake_by_A.jpg
 16.04/hill_*.jpg
Copyright: A, 2018
  B, 2019
License: CC-BY-4.0

License: CC-BY-4.0
 Text.
"""


def test_a_debian_copyright_file_is_read_by_stanza(tmp_path):
    share = tmp_path / "usr" / "share"
    (share / "doc" / "pack").mkdir(parents=True)
    (share / "pictures").mkdir()
    (share / "doc" / "pack" / "copyright").write_text(DEP5)
    for name in ("lake_by_A.jpg", "other.jpg"):
        (share / "pictures" / name).write_bytes(b"")
    found = find_licence(share / "pictures" / "lake_by_A.jpg", share / "pictures")
    assert found.statement == "CC-BY-4.0; copyright A, 2018 B, 2019"
    assert found.source == share / "doc" / "pack" / "copyright"
    other = find_licence(share / "pictures" / "other.jpg", share / "pictures")
    assert other.statement == "GPL-2+; copyright 2002 Someone"
    assert dep5_statement("Files: a.png\nLicense: MIT\n", share / "b.png") is None


def test_the_nearest_licence_counts(tmp_path):
    inner = tmp_path / "collection" / "set" / "inner"
    inner.mkdir(parents=True)
    file = inner / "a.png"
    file.write_bytes(b"")
    assert find_licence(file, tmp_path / "collection" / "set").statement == "unknown"
    forget()
    (tmp_path / "README.md").write_text("License: outside\n")
    assert find_licence(file, tmp_path / "collection" / "set").statement == "unknown"
    forget()
    (tmp_path / "collection" / "package.json").write_text(json.dumps({"license": "MIT"}))
    assert find_licence(file, tmp_path / "collection" / "set").statement == "MIT"
    forget()
    (inner / "README").write_text("Pictures.\nLicence: CC0\n")
    assert find_licence(file, tmp_path / "collection" / "set").statement == "Licence: CC0"
    (inner / "a.png.license").write_text("SPDX-License-Identifier: CC-BY-4.0")
    assert "CC-BY-4.0" in find_licence(file, tmp_path / "collection" / "set").statement
