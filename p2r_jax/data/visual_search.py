"""Visual search: a procedural task that needs perceiving before reasoning.

A scene is a grey image [S, S, 3] (S = 384) with eight coloured tiles, and a small character on
each.  "Which character is on the red tile?" has its answer in strokes two pixels wide: after
shrinking the image to a 64-pixel overview the tiles are plain to see and the characters are gone;
after cropping around the right tile they are legible.  So the Perceiver can know where to look,
never what is there, and the Reasoner can answer only from a well-placed crop.

That the overview hides the characters is a property of the pictures, not a hope: they are drawn so
that shrinking cancels them (`visual_search_glyphs`), and `visual_search_probe` measures it.

Everything about scene `index` follows from (seed, split, index) through NumPy's `SeedSequence` and
`Philox`, so rows are the same in every process and on every machine, in any order; the splits use
different spawn keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import string
from collections.abc import Sequence

import numpy as np

from p2r_jax.data.rows import Box, Row
from p2r_jax.data.visual_search_glyphs import (
    CHARACTERS,
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    INSET,
    PLATE_HEIGHT,
    PLATE_LEVEL,
    PLATE_WIDTH,
    box_sums,
    glyph_patterns,
    mottle_field,
)

SPLITS = ("train", "validation", "test")
_USES = ("layout", "pixels", "question")  # separate random streams of a scene

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 225, 40),
    "orange": (250, 135, 15),
    "purple": (120, 35, 165),
    "cyan": (40, 215, 225),
    "pink": (250, 150, 205),
}
"""Tile colours (RGB).  Far apart, and far from the grey background, also after shrinking."""

SHAPES = ("square", "circle", "diamond", "triangle")
"""Tile shapes.  Each has room for the plate at the smallest tile size."""

_MIN_TILE = 38  # the smallest triangle and diamond that hold the plate

TILE_DTYPE = np.dtype(
    [
        ("colour", np.int32),  # index into config.colours
        ("shape", np.int32),  # index into SHAPES
        ("glyph", np.int32),  # index into config.glyphs
        ("box", np.int32, (4,)),  # left, top, right, bottom of the tile; pixels, right exclusive
        ("glyph_box", np.int32, (4,)),  # the same for the character
    ]
)
"""One tile of a scene."""


@dataclasses.dataclass(frozen=True)
class VisualSearchConfig:
    """What scenes and questions look like.  The defaults are those the probe was run on.

    Attributes:
      image_size: height and width of the scene, pixels.
      grid: tiles lie in distinct cells of a `grid` x `grid` partition.
      tiles: number of tiles; at most the number of cells and of colours.
      tile_size: smallest and largest tile side, pixels.
      cell_margin: least distance of a tile from the border of its cell, pixels.
      colours: names from `COLOURS`; the tiles of a scene have distinct colours.
      glyphs: the characters in use, without A-D.
      overview: height and width of the shrunken scene that must not show the characters, pixels.
      concealment: how much hiding counts against legibility, see `glyph_patterns`.  Lower values
        make the characters easier to read in the crop and, soon, in the overview.
      texture: contrast of the background, grey levels.
      colour_questions, shape_questions, same_questions: relative frequency of the question
        types: "Which character is on the red tile?", "... on the triangle tile?" (asked about a
        shape that occurs once), "Do the red and blue tiles show the same character?".
      options: number of options of the first two types.
    """

    image_size: int = 384
    grid: int = 4
    tiles: int = 8
    tile_size: tuple[int, int] = (38, 46)
    cell_margin: int = 3
    colours: tuple[str, ...] = tuple(COLOURS)
    glyphs: str = "HPUX2456"
    overview: int = 64
    concealment: float = 1e3
    texture: int = 10
    colour_questions: float = 0.75
    shape_questions: float = 0.25
    same_questions: float = 0.0
    options: int = 4

    def __post_init__(self) -> None:
        def check(good: bool, field: str, need: str) -> None:
            if not good:
                raise ValueError(f"visual_search.{field} is {getattr(self, field)!r}: {need}")

        object.__setattr__(self, "tile_size", tuple(self.tile_size))
        object.__setattr__(self, "colours", tuple(self.colours))
        check(set(self.colours) <= set(COLOURS), "colours", f"use names from {list(COLOURS)}")
        check(len(set(self.colours)) == len(self.colours), "colours", "has a repeated name")
        check(set(self.glyphs) <= set(CHARACTERS), "glyphs", f"use characters from {CHARACTERS}")
        check(len(set(self.glyphs)) == len(self.glyphs), "glyphs", "has a repeated character")
        check(self.grid >= 1, "grid", "must be at least 1")
        room = min(self.grid**2, len(self.colours))
        check(1 <= self.tiles <= room, "tiles", f"must be 1 to {room} (cells, colours)")
        low, high = self.tile_size
        largest = self.image_size // self.grid - 2 * self.cell_margin
        check(_MIN_TILE <= low <= high, "tile_size", f"must be increasing, from {_MIN_TILE} up")
        check(high <= largest, "tile_size", f"a cell has room for {largest} pixels")
        check(8 <= self.overview < self.image_size, "overview", "must be 8 to below image_size")
        check(self.concealment >= 0, "concealment", "must not be negative")
        check(0 <= self.texture <= 40, "texture", "must be 0 to 40")
        check(2 <= self.options <= len(self.glyphs), "options", "must be 2 to the number of glyphs")
        weights = [self.colour_questions, self.shape_questions, self.same_questions]
        for field in ("colour_questions", "shape_questions", "same_questions"):
            check(getattr(self, field) >= 0, field, "must not be negative")
        check(sum(weights) > 0, "colour_questions", "all question types have frequency 0")
        check(not self.same_questions or self.tiles > 2, "tiles", "same_questions need 3 or more")


@dataclasses.dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
      index: its index in the source.
      image: uint8 [S, S, 3].
      tiles: structured array [tiles] of `TILE_DTYPE`, in random order.
    """

    index: int
    image: np.ndarray
    tiles: np.ndarray


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
      kind: "colour", "shape" or "same".
      text: the question, without options.
      words: the words that name the tiles, in order: ("red",), ("triangle",), ("red", "blue").
      tiles: indices into `Scene.tiles` of the tiles asked about, in the order of `words`.
      options: texts of the options A, B, ...
      answer: letter of the right option.
    """

    kind: str
    text: str
    words: tuple[str, ...]
    tiles: tuple[int, ...]
    options: tuple[str, ...]
    answer: str


class VisualSearch:
    """Random-access source of visual-search rows, for `grain.MapDataset.source`.

    Args:
      split: "train", "validation" or "test".  No scene is in two splits.
      seed: another seed gives other scenes.
      config: what scenes and questions look like.
      length: number of rows.  Scenes are made on demand, so a large number costs nothing.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        config: VisualSearchConfig | None = None,
        length: int = 1 << 20,
    ):
        if split not in SPLITS:
            raise ValueError(f"visual_search: split is {split!r}; use one of {SPLITS}")
        if seed < 0:
            raise ValueError(f"visual_search: seed is {seed}; must not be negative")
        if length < 1:
            raise ValueError(f"visual_search: length is {length}; must be at least 1")
        self.split = split
        self.seed = seed
        self.config = config or VisualSearchConfig()
        self.length = length

    answer_forms = frozenset({"mca"})
    """All questions have options."""

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"VisualSearch(split={self.split!r}, seed={self.seed}, length={self.length})"

    def __getitem__(self, index: int) -> Row:
        """The row of scene `index`; its image is rendered when loaded."""
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"visual_search: index {index} is not in 0..{self.length - 1}")
        tiles = self.layout(index)
        (question,) = self._ask(tiles, self._rng(index, "question"), 1)
        return self.row(index, tiles, question)

    def row(self, index: int, tiles: np.ndarray, question: Question, suffix: str = "") -> Row:
        """The `Row` of a question about scene `index`; `suffix` keeps several ids apart.

        `meta` has "kind", "words", "asked" (tile indices), "tiles" (`TILE_DTYPE` array), "index".
        """
        return Row(
            id=f"visual_search/{self.split}/{self.seed}/{index}{suffix}",
            question=question.text,
            answer=question.answer,
            answer_form="mca",
            options=question.options,
            boxes=tuple(self.tile_box(tiles[i]) for i in question.tiles),
            category=question.kind,
            image_source=functools.partial(self._render, index),
            meta={
                "kind": question.kind,
                "words": question.words,
                "asked": question.tiles,
                "tiles": tiles,
                "index": index,
            },
        )

    def tile_box(self, tile: np.ndarray) -> Box:
        """The tight box of one tile in 0-1000 units."""
        left, top, right, bottom = (int(v) * 1000 / self.config.image_size for v in tile["box"])
        return left, top, right, bottom

    def render_scene(self, index: int) -> Scene:
        """Scene `index` with its pixels."""
        tiles = self.layout(index)
        return Scene(index, self._render(index, tiles), tiles)

    def questions_for(self, scene: Scene, rng: np.random.Generator, k: int) -> list[Question]:
        """`k` different questions about one scene, types by their configured frequency.

        Raises:
          ValueError: the scene has fewer than `k` different questions.
        """
        return self._ask(scene.tiles, rng, k)

    def layout(self, index: int) -> np.ndarray:
        """What is where in scene `index`, without rendering: [tiles] of `TILE_DTYPE`."""
        config = self.config
        rng = self._rng(index, "layout")
        n = config.tiles
        tiles = np.zeros(n, TILE_DTYPE)
        tiles["colour"] = rng.permutation(len(config.colours))[:n]
        # One shape occurs exactly once, so that every scene has a shape question.
        shapes = rng.permutation(len(SHAPES))
        tiles["shape"] = shapes[rng.integers(1, len(SHAPES), n)]
        tiles["shape"][rng.integers(n)] = shapes[0]
        tiles["glyph"] = rng.integers(0, len(config.glyphs), n)
        if config.same_questions:
            _ensure_equal_and_different(tiles["glyph"], len(config.glyphs), rng)

        cells = rng.permutation(config.grid**2)[:n]
        corner = np.stack([cells % config.grid, cells // config.grid], 1)
        start = corner * config.image_size // config.grid + config.cell_margin
        stop = (corner + 1) * config.image_size // config.grid - config.cell_margin
        size = rng.integers(config.tile_size[0], config.tile_size[1], n, endpoint=True)[:, None]
        left_top = rng.integers(start, stop - size, endpoint=True)
        tiles["box"] = np.concatenate([left_top, left_top + size], 1)

        offset = [
            _plate_offset(shape, s)
            for shape, s in zip(tiles["shape"].tolist(), size[:, 0].tolist(), strict=True)
        ]
        glyph = left_top + offset + INSET + rng.integers(-1, 1, (n, 2), endpoint=True)
        tiles["glyph_box"] = np.concatenate(
            [glyph, glyph + np.array([GLYPH_WIDTH, GLYPH_HEIGHT])], 1
        )
        return tiles

    def _rng(self, index: int, use: str) -> np.random.Generator:
        key = (SPLITS.index(self.split), index, _USES.index(use))
        sequence = np.random.SeedSequence(self.seed, spawn_key=key)
        return np.random.Generator(np.random.Philox(sequence))

    def _render(self, index: int, tiles: np.ndarray | None = None) -> np.ndarray:
        """Pixels of scene `index`: uint8 [S, S, 3].

        Integer arithmetic only, so that every platform gives the same pixels.
        """
        config = self.config
        tiles = self.layout(index) if tiles is None else tiles
        bank = _background_bank(config.image_size, config.texture)
        rng = self._rng(index, "pixels")
        top, left = rng.integers(0, bank.shape[1] - config.image_size, 2, endpoint=True)
        image = bank[
            rng.integers(len(bank)), top : top + config.image_size, left : left + config.image_size
        ].copy()

        scale = config.image_size / config.overview
        mottle = mottle_field()
        corners = rng.integers(0, len(mottle) - PLATE_HEIGHT, (len(tiles), 2)).tolist()
        signs = rng.integers(0, 2, len(tiles)).tolist()
        # A pixel's three channels lie along the row, [height, 3 * width]: NumPy's inner loops are
        # then a row long instead of three values.
        rows = image.reshape(config.image_size, -1)
        for tile, (row, column), sign in zip(tiles.tolist(), corners, signs, strict=True):
            colour, shape, glyph, (left, top, right, bottom), glyph_box = tile
            size = right - left
            mask = _mask_rows(shape, size)
            paint = _paint_row(config.colours[colour], size)
            np.copyto(rows[top:bottom, 3 * left : 3 * right], paint, where=mask)

            x, y = _plate_offset(shape, size)
            x, y = left + x, top + y
            jitter_x, jitter_y = glyph_box[0] - x - INSET[0], glyph_box[1] - y - INSET[1]
            patterns = glyph_patterns(config.glyphs[glyph], scale, config.concealment)
            plate = PLATE_LEVEL + patterns[1 + jitter_y, 1 + jitter_x]
            noise = mottle[row : row + PLATE_HEIGHT, column : column + PLATE_WIDTH]
            plate = plate + noise if sign else plate - noise
            area = np.s_[y : y + PLATE_HEIGHT, 3 * x : 3 * (x + PLATE_WIDTH)]
            rows[area] = plate.astype(np.uint8).repeat(3, axis=1)
        return image

    def _ask(self, tiles: np.ndarray, rng: np.random.Generator, k: int) -> list[Question]:
        pool, weight = self._askable(tiles)
        if k > len(pool):
            raise ValueError(f"visual_search: {k} questions wanted, the scene has {len(pool)}")
        chosen = rng.choice(len(pool), k, replace=False, p=weight)
        return [self._question(tiles, pool[i][0], pool[i][1], rng) for i in chosen]

    def _askable(self, tiles: np.ndarray) -> tuple[list[tuple[str, tuple[int, ...]]], np.ndarray]:
        """All questions (type, tiles) about a scene, and their probabilities."""
        config = self.config
        pool: list[tuple[str, tuple[int, ...]]] = []
        weights: list[float] = []

        def add(kind: str, frequency: float, subjects: Sequence[tuple[int, ...]]) -> None:
            if frequency:
                pool.extend((kind, subject) for subject in subjects)
                weights.extend([frequency / len(subjects)] * len(subjects))

        single = [(i,) for i in range(len(tiles))]
        counts = np.bincount(tiles["shape"], minlength=len(SHAPES))
        add("colour", config.colour_questions, single)
        add("shape", config.shape_questions, [s for s in single if counts[tiles["shape"][s]] == 1])
        if config.same_questions:
            pairs = list(itertools.permutations(range(len(tiles)), 2))
            equal = [(i, j) for i, j in pairs if tiles["glyph"][i] == tiles["glyph"][j]]
            different = [(i, j) for i, j in pairs if tiles["glyph"][i] != tiles["glyph"][j]]
            add("same", config.same_questions / 2, equal)
            add("same", config.same_questions / 2, different)
        return pool, np.array(weights) / sum(weights)

    def _question(
        self, tiles: np.ndarray, kind: str, asked: tuple[int, ...], rng: np.random.Generator
    ) -> Question:
        config = self.config
        if kind == "shape":
            words = tuple(SHAPES[tiles["shape"][i]] for i in asked)
        else:
            words = tuple(config.colours[tiles["colour"][i]] for i in asked)
        glyphs = [int(tiles["glyph"][i]) for i in asked]
        if kind == "same":
            text = f"Do the {words[0]} and {words[1]} tiles show the same character?"
            options = [("yes", "no")[i] for i in rng.permutation(2)]
            right = "yes" if glyphs[0] == glyphs[1] else "no"
        else:
            text = f"Which character is on the {words[0]} tile?"
            others = [i for i in rng.permutation(len(config.glyphs)) if i != glyphs[0]]
            chosen = np.array([glyphs[0], *others[: config.options - 1]])
            options = [config.glyphs[i] for i in rng.permutation(chosen)]
            right = config.glyphs[glyphs[0]]
        answer = string.ascii_uppercase[options.index(right)]
        return Question(kind, text, words, asked, tuple(options), answer)


@functools.cache
def _plate_offset(shape: int, size: int) -> tuple[int, int]:
    """Left and top of the plate within a tile of `size` pixels: central, low in a triangle."""
    x = (size - PLATE_WIDTH) // 2
    if SHAPES[shape] == "triangle":
        return x, size - PLATE_HEIGHT - 1
    return x, (size - PLATE_HEIGHT) // 2


def shape_mask(shape: str, size: int) -> np.ndarray:
    """Pixels of a shape that touches all four sides of its square: bool [size, size]."""
    # Distances from the centre in half pixels keep this in integers for even and odd sizes.
    across = np.abs(np.arange(size) * 2 - (size - 1))
    dx, dy = across[None, :], across[:, None]
    return {
        "square": np.ones((size, size), bool),
        "circle": dx**2 + dy**2 <= size**2,
        "diamond": dx + dy <= size,
        "triangle": dx <= np.arange(1, size + 1)[:, None],
    }[shape]


@functools.cache
def _paint_row(colour: str, size: int) -> np.ndarray:
    """One row of a tile: uint8 [3 * size]."""
    return np.tile(np.array(COLOURS[colour], np.uint8), size)


@functools.cache
def _mask_rows(shape: int, size: int) -> np.ndarray:
    """`shape_mask`, once per channel: bool [size, 3 * size]."""
    return shape_mask(SHAPES[shape], size).repeat(3, axis=1)


@functools.cache
def _background_bank(image_size: int, texture: int) -> np.ndarray:
    """Grey textures to cut backgrounds from: uint8 [8, S + 128, S + 128, 3].

    Drawing noise afresh for each image would cost more than everything else together.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(0)))
    side = image_size + 128
    bank = np.empty((8, side, side, 3), np.uint8)
    for grey in bank:
        level = int(rng.integers(105, 125, endpoint=True))
        fine = box_sums(rng.integers(-128, 128, (side, side), endpoint=True), 3)
        coarse = box_sums(rng.integers(-128, 128, (side, side), endpoint=True), 15)
        # A sum of n^2 values spreads n times as wide as one; 74 is the spread of one.
        wave = fine * texture // (2 * 3 * 74) + coarse * texture // (2 * 15 * 74)
        grey[:] = np.clip(level + wave, 0, 255).astype(np.uint8)[..., None]
    bank.setflags(write=False)
    return bank


def _ensure_equal_and_different(glyphs: np.ndarray, kinds: int, rng: np.random.Generator) -> None:
    """Changes one glyph, if needed, so that some pair is equal and some pair is not."""
    source, target = rng.permutation(len(glyphs))[:2]
    shift = rng.integers(1, kinds)
    distinct = len(np.unique(glyphs))
    if distinct == len(glyphs):
        glyphs[target] = glyphs[source]
    elif distinct == 1:
        glyphs[target] = (glyphs[target] + shift) % kinds
