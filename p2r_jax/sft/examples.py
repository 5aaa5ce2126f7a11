"""Supervised examples for both roles of the visual-search task, with the tower run in advance.

The tower is frozen here, so each image's visual tokens are computed once and stored. An example is
a token row (prompt ++ target), what of it is a target, and `links`: which position is to attend
where (used by the attention losses of `warm_start`, in supervised training only).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from string import ascii_uppercase

import jax
import numpy as np
from flax import nnx
from rich.progress import track

from p2r_jax.data.visual_search import Question, Scene, VisualSearch
from p2r_jax.qwen3_vl.inputs import token_layout
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.evidence import View
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.requests import Request, RequestBuilder
from p2r_jax.sft.tiny import COORDINATE_STEP


@dataclasses.dataclass(frozen=True)
class Link:
    """Position `query` of the row should attend to position `key` in layer `layer`."""

    layer: int
    query: int
    key: int


@dataclasses.dataclass
class Example:
    request: Request
    target: str
    tokens: np.ndarray
    links: list[Link]


@dataclasses.dataclass
class Examples:
    """A pool of examples as arrays: I examples, S tokens, M visual tokens, K links."""

    tokens: np.ndarray  # [I, S]
    positions: np.ndarray  # [3, I, S]
    valid: np.ndarray  # [I, S]
    visual_slot: np.ndarray  # [I, S]
    is_target: np.ndarray  # [I, S], True where the *next* token is trained
    visual: np.ndarray  # [I, M, E]
    deepstack: np.ndarray  # [J, I, M, E]
    links: np.ndarray  # [I, K, 3] (layer, query, key); layer -1 = none

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, pick: np.ndarray) -> dict[str, np.ndarray]:
        return {
            field.name: (
                getattr(self, field.name)[:, pick]
                if field.name in ("positions", "deepstack")
                else getattr(self, field.name)[pick]
            )
            for field in dataclasses.fields(self)
        }


def snapped_box(box: Sequence[float], rng: np.random.Generator, jitter: float = 0.0) -> list[int]:
    """The box in whole coordinate steps, at least one step wide; `jitter` in steps."""
    steps = 1000 // COORDINATE_STEP
    scaled = np.asarray(box) / COORDINATE_STEP + rng.uniform(-jitter, jitter, 4)
    x1, y1, x2, y2 = np.clip(np.round(scaled), 0, steps).astype(int)
    x1, y1 = min(x1, steps - 1), min(y1, steps - 1)
    corners = (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))
    return [int(v) * COORDINATE_STEP for v in corners]


def box_text(boxes: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """The perceiver's target: compact JSON."""
    parts = [
        f'{{"bbox_2d":[{",".join(map(str, box))}],"label":"{label}"}}'
        for box, label in zip(boxes, labels, strict=True)
    ]
    return f"[{','.join(parts)}]"


def _token_of(view: View, first: int, x: float, y: float, builder: RequestBuilder) -> int | None:
    """Position in the row of the visual token that covers source pixel (x, y) of `view`."""
    left, top, right, bottom = view.crop
    if not (left <= x < right and top <= y < bottom):
        return None
    sizes = builder.processor.sizes
    rows, columns = (side // (sizes.patch * sizes.merge) for side in view.target)
    row = int((y - top) / (bottom - top) * rows)
    column = int((x - left) / (right - left) * columns)
    return first + row * columns + column


def _image_starts(tokens: np.ndarray, builder: RequestBuilder) -> list[int]:
    """Position of the first visual token of each image of the row."""
    config = builder.processor.config
    return [int(i) + 1 for i in np.flatnonzero(tokens == config.vision_start_token_id)]


class ExampleMaker:
    """Turns questions about scenes into supervised examples of either role."""

    def __init__(self, source: VisualSearch, builder: RequestBuilder, seed: int):
        self.source, self.builder = source, builder
        self.tokenizer = builder.processor.tokenizer
        self.rng = np.random.default_rng(seed)
        self.end = self._ids("<|im_end|>")
        self.coordinates = {self._ids(str(c))[0] for c in range(0, 1001, COORDINATE_STEP)}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _finish(self, request: Request, target: str, links: list[Link]) -> Example:
        ids = np.asarray([*self._ids(target), *self.end], np.int32)
        return Example(request, target, np.concatenate([request.tokens, ids]), links)

    def _word_positions(self, tokens: np.ndarray, words: Sequence[str]) -> list[int]:
        out = []
        for word in words:
            (token,) = self._ids(" " + word)
            out.append(int(np.flatnonzero(tokens == token)[0]))
        return out

    def _pointers(
        self, request: Request, view: int, scene: Scene, question: Question
    ) -> list[Link]:
        """Layer 0: the asked word looks at its tile in image `view`."""
        start = _image_starts(request.tokens, self.builder)[view]
        words = self._word_positions(request.tokens, question.words)
        links = []
        for word, tile in zip(words, question.tiles, strict=True):
            box = scene.tiles[tile]["box"]
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            key = _token_of(request.views[view], start, x, y, self.builder)
            if key is not None:
                links.append(Link(0, word, key))
        return links

    def perceiver(
        self, images: ImageStore, image: int, scene: Scene, question: Question, taught: set[str]
    ) -> Example:
        """True boxes for words in `taught`, a random tile's box for the others."""
        row = self.source.row(scene.index, scene.tiles, question)
        request = self.builder.plain("perceiver", images, image, row.question_with_options, "mca")
        tiles = [
            tile if word in taught else int(self.rng.integers(len(scene.tiles)))
            for word, tile in zip(question.words, question.tiles, strict=True)
        ]
        boxes = [snapped_box(self.source.tile_box(scene.tiles[t]), self.rng) for t in tiles]
        target = box_text(boxes, [f"{word} tile" for word in question.words])
        links = self._pointers(request, 0, scene, question)
        # Layer 1: whatever writes a coordinate looks at the word it is about.
        words = self._word_positions(request.tokens, question.words)
        numbers = [i for i, token in enumerate(self._ids(target)) if token in self.coordinates]
        for i, number in enumerate(numbers):
            links.append(Link(1, len(request.tokens) + number - 1, words[i // 4]))
        return self._finish(request, target, links)

    def reasoner(
        self,
        images: ImageStore,
        image: int,
        scene: Scene,
        question: Question,
        boxes: Sequence[Box],
        taught: Sequence[str],
    ) -> Example:
        """Reads the character in the crop, then looks the option up. Characters that are not in
        `taught` are called by a random option's name, with its letter."""
        row = self.source.row(scene.index, scene.tiles, question)
        asked = row.question_with_options
        request = self.builder.reasoner(images, image, asked, "mca", boxes)
        glyphs = [self.source.config.glyphs[scene.tiles[t]["glyph"]] for t in question.tiles]
        letter = question.answer
        if len(glyphs) == 1 and glyphs[0] not in taught:
            choice = int(self.rng.integers(len(question.options)))
            glyphs, letter = [question.options[choice]], ascii_uppercase[choice]
        target = f"<think>{' '.join(glyphs)}</think><answer>{letter}</answer>"
        links: list[Link] = []
        start = len(request.tokens)
        for view in range(1, len(request.views)):
            links += self._pointers(request, view, scene, question)
        for i, word in enumerate(self._word_positions(request.tokens, question.words)):
            links.append(Link(1, start + 2 * i, word))
        if len(glyphs) == 1:
            (glyph,) = self._ids(glyphs[0])
            options = [int(i) for i in np.flatnonzero(request.tokens == glyph)]
            answer = start + 2  # reads <think> glyph </think><answer>
            links += [Link(0, option, option - 1) for option in options]
            links += [Link(0, answer, answer - 1)]
            links += [Link(1, answer, option) for option in options[-1:]]
        return self._finish(request, target, links)

    def direct(self, images: ImageStore, image: int, scene: Scene, question: Question) -> Example:
        """The answer alone, from the overview: teaches the form, cannot teach the content."""
        row = self.source.row(scene.index, scene.tiles, question)
        request = self.builder.plain("direct", images, image, row.question_with_options, "mca")
        return self._finish(request, question.answer, [])

    def whole(self, images: ImageStore, image: int, scene: Scene, question: Question) -> Example:
        """A reasoner without evidence."""
        row = self.source.row(scene.index, scene.tiles, question)
        request = self.builder.reasoner(images, image, row.question_with_options, "mca", [])
        glyph = self.source.config.glyphs[self.rng.integers(len(self.source.config.glyphs))]
        letter = "ABCD"[self.rng.integers(len(question.options))]
        return self._finish(request, f"<think>{glyph}</think><answer>{letter}</answer>", [])


def pack(
    examples: Sequence[tuple[Example, ImageStore]],
    model: Qwen3VL,
    builder: RequestBuilder,
    num_visual: int,
    batch: int,
) -> Examples:
    """Run the tower over all examples (which come in runs of `batch` per image store)."""
    num_tokens = -(-max(len(e.tokens) for e, _ in examples) // 8) * 8
    graph, params = nnx.split(model.visual)

    @jax.jit
    def tower(params, patches):
        return nnx.merge(graph, params)(patches)

    visual, deepstack = [], []
    for begin in track(range(0, len(examples), batch), description="running the tower"):
        part = examples[begin : begin + batch]
        # Questions about one image share its views: the tower sees each set of views once.
        keys = [(e.request.image, e.request.views) for e, _ in part]
        distinct = {key: e.request for key, (e, _) in zip(keys, part, strict=True)}
        place = {key: i for i, key in enumerate(distinct)}
        requests = list(distinct.values())
        requests += [requests[-1]] * (-len(requests) % 16)
        merged, taps = tower(params, builder.collate(requests, part[0][1]).patches)
        pick = [place[key] for key in keys]
        pad = num_visual - merged.shape[1]
        visual.append(np.pad(np.asarray(merged)[pick], ((0, 0), (0, pad), (0, 0))))
        deepstack.append(np.pad(np.asarray(taps)[:, pick], ((0, 0), (0, 0), (0, pad), (0, 0))))
    all_examples = [e for e, _ in examples]
    grids = [
        [builder.processor.sizes.grid(v.target) for v in e.request.views] for e in all_examples
    ]
    layout = token_layout(
        [e.tokens for e in all_examples],
        grids,
        builder.processor.config,
        num_tokens,
        builder.processor.pad_id,
    )
    del layout["next_position"]
    most = max(len(e.links) for e in all_examples)
    links = np.full((len(all_examples), max(most, 1), 3), -1, np.int32)
    is_target = np.zeros(layout["tokens"].shape, bool)
    for i, example in enumerate(all_examples):
        for j, link in enumerate(example.links):
            links[i, j] = (link.layer, link.query, link.key)
        is_target[i, len(example.request.tokens) - 1 : len(example.tokens) - 1] = True
    return Examples(
        **layout,
        is_target=is_target,
        visual=np.concatenate(visual),
        deepstack=np.concatenate(deepstack, axis=1),
        links=links,
    )
