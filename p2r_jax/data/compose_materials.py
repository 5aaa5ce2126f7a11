"""What a composed benchmark is made of: photographs, named cut-outs, their licences and splits.

A photograph is any JPEG or PNG.  An object is a PNG or WebP with an alpha channel and a name that
a question can use: "the banana".  Much of what stamp and emoji collections hold cannot be asked
about; it is dropped here, each with its reason:

    plurals and masses   "the glasses is": only countable singulars keep the grammar of templates
    colour words         "a yellow pear" tinted blue
    symbols, line art    letters, arrows, outlines: no surface to tint, no name people agree on
    anything with "of"   "a pair of", "a couple of"

Names that share their last word ("tiger", "Sumatran tiger") or name much the same thing
("tombstone", "grave marker") are one kind: kinds, never single files, are dealt to the splits, and
no scene holds two of one kind, or two with a word in common.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from p2r_jax.data.compose_licences import Licence, find_licence, forget

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.3, "validation": 0.1, "test": 0.6}
"""Of photographs, kinds of objects, and questions.  The test split is what the benchmark is for."""

MIN_PHOTOS = 1
"""Photographs a split needs."""
MIN_KINDS = 6
"""Kinds of objects a split needs: a target, three that carry the wrong options, two more."""

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
OBJECT_SUFFIXES = (".png", ".webp")
MIN_PHOTO_SIDE = 64
MIN_OBJECT_SIDE = 32  # an object is only ever shrunk

_COLOURS = (
    "red orange yellow green blue purple violet pink brown black white grey gray golden gold"
    " silver dark light colored coloured colorful colourful rainbow"
)
_COLOUR_STARTS = tuple(_COLOURS.split())  # "bluebird" too
_OTHER_WORDS = (
    "of and or with for in on letter sign symbol mark number operator note clef flag face"
    " arrow button square circle heart hearts coin dollar cent penny key keycap squared"
    " circled input ideograph script latin person man woman boy girl child people hand finger"
    " hands lower upper half quarter moon sun eye mouth nose ear tooth no not very he she it"
    " his her medium extended variant selector tone indicator emoji the is are your another"
    " lip family adult bubble fist ahead without"
)
_UNNAMEABLE = frozenset(_OTHER_WORDS.split())
_SAME_LOOKS = (
    "tombstone headstone gravestone graveyard marker stone cemetery monument obelisk statue",
    "rabbit bunny hare",
    "duck drake goose swan",
    "camel dromedary",
    "cow bull bison buffalo ox yak zebu gnu",
    "crow raven magpie bird lark",
    "automobile car taxi bus minibus trolleybus truck lorry van tractor ambulance engine vehicle",
    "train tram locomotive metro railway monorail carriage tramway",
    "boat ship ferry sailboat speedboat rowboat canoe motorboat tugboat",
    "house building hotel hospital school bank factory office store cottage inn tavern hut mine"
    " stable warehouse university jailhouse gate city church cathedral mosque synagogue temple"
    " kaaba monastery castle fort fortress tower station stadium",
    "monkey chimpanzee gorilla orangutan ape",
    "mouse rat hamster chipmunk",
    "sheep ram goat",
    "dolphin porpoise whale orca",
    "fish butterflyfish clownfish dolphinfish blowfish",
    "donkey horse mule pony",
    "bee honeybee wasp",
    "ladybug beetle bug",
    "tangerine apricot peach mango pear pomegranate",
    "bear koala",
    "medal rosette",
)
_GROUP = {word: group.split()[0] for group in _SAME_LOOKS for word in group.split()}
_NAME = re.compile(r"[a-z]+(?:[ -][a-z]+){0,2}")


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph.

    Attributes:
      path: the file.
      name: path relative to the folder it was found in, with forward slashes.
      sha256: of the file.
      size: (width, height) as it is looked at, pixels.
      licence: what was found beside it.
    """

    path: Path
    name: str
    sha256: str
    size: tuple[int, int]
    licence: Licence

    def load(self) -> Image.Image:
        """The pixels, upright, RGB."""
        with Image.open(self.path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


@dataclasses.dataclass(frozen=True)
class Cutout:
    """A named object with transparent surroundings.

    Attributes:
      path, name, sha256, licence: as in `Photo`.
      noun: what a question calls it, lower case, without article: "fire engine".
    """

    path: Path
    name: str
    sha256: str
    noun: str
    licence: Licence

    @property
    def kind(self) -> str:
        """The last word of the noun, or one that stands for all that look like it."""
        last = re.split("[ -]", self.noun)[-1]
        return _GROUP.get(last, last)

    @property
    def words(self) -> frozenset[str]:
        return frozenset(re.split("[ -]", self.noun))

    def load(self) -> Image.Image:
        """The pixels, RGBA, cut to what is not transparent."""
        return _load_cutout(self.path)


@dataclasses.dataclass(frozen=True)
class Materials:
    """Photographs and objects by split, and what was left out: {reason: number of files}."""

    photos: dict[str, tuple[Photo, ...]]
    cutouts: dict[str, tuple[Cutout, ...]]
    skipped: dict[str, dict[str, int]]


def gather(photos: Path, objects: Path, seed: int) -> Materials:
    """Finds, checks and splits the material.  The splits share no photograph and no kind of object.

    The result depends on the files' names inside the two folders and their contents, not on where
    the folders are or the order in which the file system lists them.

    Raises:
      ValueError: a folder is missing, or holds too few usable files; says how many are needed.
    """
    for what, folder in (("photos", photos), ("objects", objects)):
        if not folder.is_dir():
            raise ValueError(f"{what} folder not found: {folder}")
    forget()
    _names.cache_clear()
    photo_skips: Counter[str] = Counter()
    object_skips: Counter[str] = Counter()
    found_photos = _find_photos(photos, photo_skips)
    found_cutouts = _find_cutouts(objects, object_skips)
    need_photos, need_kinds = MIN_PHOTOS * len(SPLITS), MIN_KINDS * len(SPLITS)
    if len(found_photos) < need_photos:
        raise ValueError(
            f"{photos}: holds {len(found_photos)} usable photographs"
            f"{_reasons(photo_skips)}; at least {need_photos} are needed"
            f" ({MIN_PHOTOS} for each of {', '.join(SPLITS)}), JPEG or PNG"
        )
    kinds = sorted({cutout.kind for cutout in found_cutouts})
    if len(kinds) < need_kinds:
        raise ValueError(
            f"{objects}: holds {len(found_cutouts)} usable objects of {len(kinds)} kinds"
            f"{_reasons(object_skips)}; at least {need_kinds} kinds are needed ({MIN_KINDS} for"
            f" each of {', '.join(SPLITS)}), PNG or WebP with transparency, named by a .txt beside"
            " them, names.json, or the file name"
        )
    rng = np.random.default_rng([seed, 1])
    photo_of = _deal([photo.name for photo in found_photos], MIN_PHOTOS, rng)
    kind_of = _deal(kinds, MIN_KINDS, rng)
    return Materials(
        {s: tuple(p for p in found_photos if photo_of[p.name] == s) for s in SPLITS},
        {s: tuple(c for c in found_cutouts if kind_of[c.kind] == s) for s in SPLITS},
        {
            "photos": dict(sorted(photo_skips.items())),
            "objects": dict(sorted(object_skips.items())),
        },
    )


def clean_noun(text: str) -> str | None:
    """The noun in a name: "A fire engine." -> "fire engine"; None if no question can use it."""
    words = re.sub(r"[_\s]+", " ", text.strip()).strip(" .!?").split(" ")
    article = 0
    while words[article:] and words[article].lower() in ("a", "an"):
        article += 1
    if (
        text.strip().endswith((".", "!", "?")) and not article
    ):  # a sentence: a mass, a plural, "Sad!"
        return None
    noun = " ".join(words[article:]).lower()
    if not _NAME.fullmatch(noun) or len(noun) < 3:
        return None
    parts = re.split("[ -]", noun)
    if _UNNAMEABLE & set(parts) or any(part.startswith(_COLOUR_STARTS) for part in parts):
        return None
    last = parts[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return None
    return noun


def stem_name(stem: str) -> str | None:
    """A name from a file name: code points of an emoji ("1f34c"), or words ("fire_engine-2")."""
    code = re.fullmatch(r"([0-9a-f]{4,6})(-fe0f)?", stem)
    if code:
        character = chr(min(int(code[1], 16), 0x10FFFF))
        if unicodedata.category(character) == "So" or character >= "\U0001f000":
            return unicodedata.name(character, None)
    if re.fullmatch(r"[0-9a-f]{4,6}(-[0-9a-f]{4,6})+", stem):  # skin tones and joined emoji
        return None
    return re.sub(r"[\d_-]+", " ", stem).strip() or None


def _sha256_of_new(path: Path, seen: set[str], skips: Counter[str]) -> str | None:
    """Of a file whose content was not seen before; None, counted, for a copy."""
    sha256 = _sha256(path)
    if sha256 in seen:
        skips["a copy of another"] += 1
        return None
    seen.add(sha256)
    return sha256


def _find_photos(folder: Path, skips: Counter[str]) -> list[Photo]:
    found = []
    seen: set[str] = set()
    for path in _files(folder, PHOTO_SUFFIXES):
        try:
            with Image.open(path) as image:
                size = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            skips["cannot be read"] += 1
            continue
        if min(size) < MIN_PHOTO_SIDE:
            skips[f"below {MIN_PHOTO_SIDE} pixels"] += 1
            continue
        sha256 = _sha256_of_new(path, seen, skips)
        if sha256 is None:
            continue
        name = path.relative_to(folder).as_posix()
        found.append(Photo(path, name, sha256, size, find_licence(path, folder)))
    return found


def _find_cutouts(folder: Path, skips: Counter[str]) -> list[Cutout]:
    found = []
    seen: set[str] = set()
    for path in _files(folder, OBJECT_SUFFIXES):
        if path.stem.endswith(("_mirror", "_flip")):
            skips["a mirrored variant"] += 1
            continue
        text = _given_name(path, folder)
        noun = clean_noun(text) if text else None
        if noun is None:
            skips["no name a question can use"] += 1
            continue
        sha256 = _sha256_of_new(path, seen, skips)
        if sha256 is None:
            continue
        problem = _unfit(path)
        if problem:
            skips[problem] += 1
            continue
        name = path.relative_to(folder).as_posix()
        found.append(Cutout(path, name, sha256, noun, find_licence(path, folder)))
    return found


def _given_name(path: Path, folder: Path) -> str | None:
    """From the .txt beside the file, names.json beside it or in `folder`, or its own name."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        lines = beside.read_text("utf-8", errors="replace").splitlines()
        return lines[0].lstrip("\ufeff") if lines else None
    for place in (path.parent, folder):
        names = _names(place / "names.json")
        for key in (path.relative_to(place).as_posix(), path.name, path.stem):
            if key in names:
                return names[key]
    return stem_name(path.stem)


@functools.lru_cache(maxsize=64)
def _names(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f'{path}: must be an object {{"file name": "object name"}}')
    return names


def _unfit(path: Path) -> str | None:
    """Why a cut-out cannot be used; None if it can."""
    try:
        image = _load_cutout(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "cannot be read"
    if image.width < MIN_OBJECT_SIDE or image.height < MIN_OBJECT_SIDE:
        return f"below {MIN_OBJECT_SIDE} pixels"
    if max(image.size) > 2.2 * min(image.size):
        return "long and thin"
    image.thumbnail((64, 64), Image.Resampling.BOX)
    alpha = image.getchannel("A")
    solid = np.asarray(alpha) >= 128
    if solid.mean() > 0.97:
        return "no transparency"
    # Line art vanishes when eroded by a fiftieth of its size; a body does not.
    core = np.asarray(alpha.filter(ImageFilter.MinFilter(5))) >= 128
    if solid.mean() < 0.3 or core.sum() < 0.5 * solid.sum():
        return "line art or scattered"
    return None


def _load_cutout(path: Path) -> Image.Image:
    with Image.open(path) as image:
        cutout = image.convert("RGBA")
    box = cutout.getchannel("A").point(lambda a: 255 * (a >= 128)).getbbox()
    if box is None:
        raise ValueError(f"{path}: is wholly transparent")
    return cutout.crop(box)


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _deal(names: Iterable[str], least: int, rng: np.random.Generator) -> dict[str, str]:
    """A split for each name: `least` each, the rest by `SHARES`."""
    names = sorted(names)
    spare = len(names) - least * len(SPLITS)
    sizes = {split: least + int(spare * SHARES[split]) for split in SPLITS}
    sizes["test"] += len(names) - sum(sizes.values())
    dealt = [split for split in SPLITS for _ in range(sizes[split])]
    return {names[i]: split for i, split in zip(rng.permutation(len(names)), dealt, strict=True)}


def _reasons(skips: Counter[str]) -> str:
    if not skips:
        return ""
    return " (left out: " + ", ".join(f"{n} {reason}" for reason, n in skips.most_common()) + ")"
