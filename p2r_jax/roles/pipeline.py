"""Both roles of one model: requests in, texts and boxes out.

`Pipeline` is the compiled machinery that training and evaluation share; `perceive_and_reason` is
the one call for a person with an image and a question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from p2r_jax.parallel.mesh import batch_sharding, batch_shards
from p2r_jax.parallel.multihost import to_host
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.qwen3_vl.processor import ImageSizes, Processor
from p2r_jax.roles.answers import extract_answer
from p2r_jax.roles.boxes import Box, ParsedBoxes, parse_response
from p2r_jax.roles.evidence import Evidence, gather_evidence
from p2r_jax.roles.prompts import PromptSet, load_prompt_set
from p2r_jax.roles.requests import Buckets, ImageStore, Request, RequestBuilder
from p2r_jax.rollout.engine import Completions, Sampling, Vocabulary, generate


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A batch of prompts and their completions, on the device, and the texts."""

    prompts: Prompts
    """B' rows: the requests, filled up to a multiple of the mesh's batch shards."""
    completions: Completions
    outputs: list[list[Completion]]
    """[B][G], without the filling rows."""

    @property
    def texts(self) -> list[list[str]]:
        """[B][G]."""
        return [[output.text for output in group] for group in self.outputs]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion on the host."""

    text: str
    tokens: tuple[int, ...]
    """With the stop token, if there is one."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Runs requests through the model; shared by training, evaluation and `perceive_and_reason`."""

    graph: nnx.GraphDef
    builder: RequestBuilder
    vocabulary: Vocabulary
    batch_rows: int = 32
    """Rows of a batch in `complete`; a constant, so that it does not cost compilations."""

    @classmethod
    def create(
        cls,
        graph: nnx.GraphDef,
        processor: Processor,
        prompts: PromptSet,
        buckets: Buckets,
        mesh: Mesh | None = None,
        batch_rows: int = 32,
    ) -> Pipeline:
        shards = batch_shards(mesh) if mesh is not None else 1
        batch_rows = -(-batch_rows // shards) * shards
        builder = RequestBuilder(processor, prompts, buckets, mesh)
        return cls(graph, builder, Vocabulary.of(processor, mesh), batch_rows)

    def sample(
        self,
        params: nnx.State,
        requests: Sequence[Request],
        images: ImageStore,
        sampling: Sampling,
        seeds: Sequence[int] | np.ndarray,
    ) -> Rollout:
        """G completions of each request in one batch; seeds: one per request."""
        prompts = self.builder.collate(requests, images)
        rows = prompts.tokens.shape[0]
        padded = np.zeros(rows, np.uint32)
        padded[: len(requests)] = seeds
        mesh = self.builder.mesh
        device_seeds = jax.device_put(padded, batch_sharding(mesh) if mesh is not None else None)
        completions = generate(self.graph, params, prompts, self.vocabulary, device_seeds, sampling)
        tokens, mask = to_host((completions.tokens, completions.mask))
        decode = self.builder.processor.decode
        own = [
            [tokens[b, g][mask[b, g]] for g in range(sampling.group)] for b in range(len(requests))
        ]
        outputs = [[Completion(decode(ids), tuple(ids.tolist())) for ids in group] for group in own]
        return Rollout(prompts, completions, outputs)

    def complete(
        self,
        params: nnx.State,
        requests: Sequence[Request],
        images: ImageStore,
        max_new_tokens: int,
    ) -> list[Completion]:
        """The greedy completion of each request, in order.

        Equal requests are answered once. Requests of similar size share a batch, so that short
        prompts do not pay for long ones.
        """
        keys = [(r.image, r.views, r.tokens.tobytes()) for r in requests]
        distinct = dict(zip(keys, requests, strict=True))
        order = sorted(
            distinct, key=lambda key: (len(distinct[key].views), len(distinct[key].tokens))
        )
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
        answers: dict[Any, Completion] = {}
        for start in range(0, len(order), self.batch_rows):
            part = order[start : start + self.batch_rows]
            rows = [distinct[key] for key in part]
            rows += [rows[-1]] * (self.batch_rows - len(rows))
            outputs = self.sample(params, rows, images, sampling, [0] * len(rows)).outputs
            answers |= {key: group[0] for key, group in zip(part, outputs, strict=False)}
        return [answers[key] for key in keys]

    def perceive(
        self,
        params: nnx.State,
        images: ImageStore,
        questions: Sequence[tuple[int, str, str]],
        max_new_tokens: int,
    ) -> list[tuple[str, ParsedBoxes]]:
        """Greedy perceiver. questions: (image index, question with options, answer form)."""
        requests = [self.builder.plain("perceiver", images, *question) for question in questions]
        outputs = self.complete(params, requests, images, max_new_tokens)
        return [(output.text, parse_response(output.text)) for output in outputs]

    def reason(
        self,
        params: nnx.State,
        images: ImageStore,
        questions: Sequence[tuple[int, str, str]],
        boxes: Sequence[Sequence[Box]],
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy reasoner; `boxes` per question, [] for none."""
        requests = [
            self.builder.reasoner(images, *question, own)
            for question, own in zip(questions, boxes, strict=True)
        ]
        return [o.text for o in self.complete(params, requests, images, max_new_tokens)]


def default_prompt_set(config: Qwen3VLConfig) -> str:
    """Name of the prompt set for a model: the embedded one, known by its small vocabulary,
    understands only its own wording."""
    return "tiny" if config.text.vocab_size < 4096 else "default"


def default_buckets(sizes: ImageSizes, image_side: int) -> Buckets:
    """Sizes from small to what 1 to 4 images of the pixel budget need, whatever their aspect
    ratio. Only those that are used cost a compilation."""
    longest = sizes.patch * sizes.merge
    while longest**2 < sizes.max_pixels * 12:  # an outline of aspect ratio 12 still fits
        longest *= 2
    full = sizes.max_patches
    tokens = full // sizes.merge**2
    return Buckets(
        patches=_ladder(64, 4 * full),
        prompt_tokens=_ladder(64, 4 * tokens + 512),
        canvas=_ladder(64, 4 * longest, steps=(1,)),
        image=_ladder(64, image_side, steps=(1,)),
    )


def _ladder(first: int, last: int, steps: tuple[float, ...] = (1, 1.5)) -> tuple[int, ...]:
    """Sizes from `first`, doubling, with `steps` between, up to one that holds `last`."""
    sizes = [first]
    while sizes[-1] < last:
        doubled = first * 2 ** (len(sizes) // len(steps))
        sizes.append(int(doubled * steps[len(sizes) % len(steps)]))
    return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Result:
    """What `perceive_and_reason` found."""

    boxes: list[Box]
    reasoning: str
    """The reasoner's text up to its answer."""
    answer: str
    evidence: Evidence
    perceiver_text: str
    reasoner_text: str


def perceive_and_reason(
    model: Qwen3VL,
    image: np.ndarray | Image.Image,
    question: str,
    *,
    options: Sequence[str] = (),
    answer_form: str | None = None,
    processor: Processor | None = None,
    prompts: PromptSet | str | None = None,
    perceiver_max_new_tokens: int = 256,
    reasoner_max_new_tokens: int = 1024,
) -> Result:
    """Ask one question about one image: perceive, gather evidence, reason (greedy decoding).

    image: uint8 [H, W, 3] or a Pillow image. options: appended as lettered lines. answer_form:
    `mca`, `na`, `free_form` or an evaluation form of the prompt set; default `mca` with options,
    else `free_form`. processor: default, the one beside the weights the model was loaded from.
    prompts: a prompt set, its name or file; default, the one that suits the model.

    Raises ValueError if there is no processor, for arrays of another type or shape, or for images
    with an aspect ratio above 200.
    """
    if processor is None:
        if not model.name_or_path:
            raise ValueError("the model was not loaded from a folder: pass processor=")
        processor = Processor.from_pretrained(model.name_or_path)
    if not isinstance(prompts, PromptSet):
        prompts = load_prompt_set(prompts or default_prompt_set(model.config))
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"image must be uint8 [height, width, 3], is {pixels.dtype} {list(pixels.shape)}"
        )
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    asked = (0, "\n".join([question, *lines]), answer_form or ("mca" if options else "free_form"))

    graph, params = nnx.split(model)
    buckets = default_buckets(processor.sizes, max(pixels.shape[:2]))
    pipeline = Pipeline.create(graph, processor, prompts, buckets, batch_rows=1)
    images = ImageStore.upload([pixels], buckets)
    ((perceiver_text, parsed),) = pipeline.perceive(
        params, images, [asked], perceiver_max_new_tokens
    )
    boxes = list(parsed.boxes)
    (text,) = pipeline.reason(params, images, [asked], [boxes], reasoner_max_new_tokens)
    height, width = pixels.shape[:2]
    evidence = gather_evidence(height, width, boxes, processor.sizes)
    reasoning = text.partition("<answer>")[0].replace("<think>", "").replace("</think>", "")
    return Result(boxes, reasoning.strip(), extract_answer(text), evidence, perceiver_text, text)
