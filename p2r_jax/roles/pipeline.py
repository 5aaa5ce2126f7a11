"""Both roles of one model: requests in, texts and boxes out.

`Pipeline` is the compiled machinery that training and evaluation share; `perceive_and_reason` is
the one call for a person with an image and a question.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from p2r_jax.ops.kernels import Kernels
from p2r_jax.qwen3_vl.config import Qwen3VLConfig
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.qwen3_vl.processor import ImageSizes, Processor
from p2r_jax.roles.answers import extract_answer
from p2r_jax.roles.boxes import Box, ParsedBoxes, parse_response
from p2r_jax.roles.evidence import P2R, Evidence, Shown, gather_evidence
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.prompts import PromptSet, load_prompt_set
from p2r_jax.roles.requests import Buckets, Request, RequestBuilder, fit
from p2r_jax.rollout.generate import Completions, Schedule, Stage, generate, untimed
from p2r_jax.rollout.sampling import Sampling, Vocabulary


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A batch of prompts on the device, and their completions on the host."""

    prompts: Prompts
    """B' rows: the requests, filled up to a multiple of the mesh's batch shards."""
    completions: Completions
    """B rows."""
    outputs: list[list[Completion]]
    """[B][G]."""

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
    schedule: Schedule
    """Of `complete`; with fixed sizes, so that the number of requests costs no compilation."""

    @classmethod
    def create(
        cls,
        graph: nnx.GraphDef,
        processor: Processor,
        prompts: PromptSet,
        buckets: Buckets,
        mesh: Mesh | None = None,
        schedule: Schedule | None = None,
        kernels: Kernels | None = None,
    ) -> Pipeline:
        """mesh, kernels: those of the model. schedule: of `complete`; default, 32 slots."""
        builder = RequestBuilder(processor, prompts, buckets, mesh, kernels)
        words = Vocabulary.of(processor, mesh)
        return cls(graph, builder, words, schedule or greedy_schedule(32))

    def sample(
        self,
        params: nnx.State,
        requests: Sequence[Request],
        images: ImageStore,
        sampling: Sampling,
        seeds: Sequence[int] | np.ndarray,
        schedule: Schedule | None = None,
        stage: Stage = untimed,
    ) -> Rollout:
        """G completions of each request; seeds: one per request. schedule: default, all at once."""
        with stage("encode"):
            prompts = self.builder.collate(requests, images)
        completions = self._generate(
            params, requests, images, sampling, seeds, schedule or Schedule(), prompts, stage
        )
        return Rollout(prompts, completions, self._outputs(completions))

    def complete(
        self,
        params: nnx.State,
        requests: Sequence[Request],
        images: ImageStore,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion of each request, in order; greedy without seeds, whatever `sampling` says.

        seeds: one per request, for completions drawn as `sampling` says. Equal requests (of equal
        seeds) are answered once. Requests of one bucket share the slots, so that short prompts do
        not pay for long ones; a bucket with fewer than would fill them joins the next.
        """
        temperature = 0.0 if seeds is None else sampling.temperature
        sampling = dataclasses.replace(sampling, group=1, temperature=temperature)
        own = [0] * len(requests) if seeds is None else list(seeds)
        keys = [
            (r.image, r.views, r.tokens.tobytes(), s) for r, s in zip(requests, own, strict=True)
        ]
        distinct = dict(zip(keys, requests, strict=True))
        by_bucket: dict[int, list[Any]] = collections.defaultdict(list)
        by_size = sorted(distinct.items(), key=lambda kv: (len(kv[1].views), len(kv[1].tokens)))
        for key, request in by_size:
            by_bucket[self._bucket([request])].append(key)
        answers: dict[Any, Completion] = {}
        waiting: list[Any] = []
        for bucket in sorted(by_bucket):
            waiting += by_bucket[bucket]
            if len(waiting) < (self.schedule.slots or 1) and bucket != max(by_bucket):
                continue
            completions = self._generate(
                params, [distinct[k] for k in waiting], images, sampling,
                [seed for *_, seed in waiting], self.schedule,
            )  # fmt: skip
            outputs = self._outputs(completions)
            answers |= {key: group[0] for key, group in zip(waiting, outputs, strict=True)}
            waiting = []
        return [answers[key] for key in keys]

    def _generate(
        self,
        params: nnx.State,
        requests: Sequence[Request],
        images: ImageStore,
        sampling: Sampling,
        seeds: Sequence[int] | np.ndarray,
        schedule: Schedule,
        collated: Prompts | None = None,
        stage: Stage = untimed,
    ) -> Completions:
        """collated: the requests as a batch, if there is one already."""

        def load(numbers: Sequence[int]) -> Prompts:
            if collated is not None:
                # All of them, in order, with the filling rows that `collate` adds too.
                last = len(requests) - 1
                rows = [min(i, last) for i in range(collated.tokens.shape[0])]
                if list(numbers) == rows:
                    return collated
            return self.builder.collate([requests[i] for i in numbers], images)

        return generate(
            self.graph, params, load, seeds, self._bucket(requests), self.vocabulary, sampling,
            schedule, stage,
        )  # fmt: skip

    def _bucket(self, requests: Sequence[Request]) -> int:
        longest = max(len(request.tokens) for request in requests)
        return fit(self.builder.buckets.prompt_tokens, longest, "prompt_tokens")

    def _outputs(self, completions: Completions) -> list[list[Completion]]:
        decode = self.builder.processor.decode
        own = [
            [ids[mask] for ids, mask in zip(*group, strict=True)]
            for group in zip(completions.tokens, completions.mask, strict=True)
        ]
        return [[Completion(decode(ids), tuple(ids.tolist())) for ids in group] for group in own]

    def perceive(
        self,
        params: nnx.State,
        images: ImageStore,
        questions: Sequence[tuple[int, str, str]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[tuple[str, ParsedBoxes]]:
        """The perceiver, greedy without seeds. questions: (image index, question with options,
        answer form)."""
        requests = [self.builder.plain("perceiver", images, *question) for question in questions]
        outputs = self.complete(params, requests, images, sampling, seeds)
        return [(output.text, parse_response(output.text)) for output in outputs]

    def reason(
        self,
        params: nnx.State,
        images: ImageStore,
        questions: Sequence[tuple[int, str, str]],
        boxes: Sequence[Sequence[Box]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        shown: Shown = P2R,
    ) -> list[str]:
        """The reasoner, greedy without seeds; `boxes` per question, [] for none."""
        requests = [
            self.builder.reasoner(images, *question, own, shown)
            for question, own in zip(questions, boxes, strict=True)
        ]
        return [o.text for o in self.complete(params, requests, images, sampling, seeds)]


def greedy_schedule(slots: int, rings: tuple[int, ...] = (), refill: int | None = None) -> Schedule:
    """For `Pipeline.complete`: `slots` prompts at once, `refill` of them (by default a quarter) run
    together."""
    return Schedule(slots, refill=min(refill or max(1, slots // 4), slots), rings=rings)


def default_prompt_set(config: Qwen3VLConfig) -> str:
    """Name of the prompt set for a model: the embedded one, known by its small vocabulary,
    understands only its own wording."""
    return "tiny" if config.text.vocab_size < 4096 else "default"


def default_buckets(sizes: ImageSizes, image_side: int, views: int = 4) -> Buckets:
    """Sizes from small to what 1 to `views` images of the pixel budget need, whatever their aspect
    ratio. Only those that are used cost a compilation."""
    longest = sizes.patch * sizes.merge
    while longest**2 < sizes.max_pixels * 12:  # an outline of aspect ratio 12 still fits
        longest *= 2
    full = sizes.max_patches
    tokens = full // sizes.merge**2
    return Buckets(
        patches=_ladder(64, views * full),
        prompt_tokens=_ladder(64, views * tokens + 512),
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
    mesh = model.kernels.mesh
    pipeline = Pipeline.create(
        graph, processor, prompts, buckets, mesh, Schedule(slots=1), model.kernels
    )
    images = ImageStore.upload([pixels], buckets, mesh)
    perceiver, reasoner = Sampling(perceiver_max_new_tokens), Sampling(reasoner_max_new_tokens)
    ((perceiver_text, parsed),) = pipeline.perceive(params, images, [asked], perceiver)
    boxes = list(parsed.boxes)
    (text,) = pipeline.reason(params, images, [asked], [boxes], reasoner)
    height, width = pixels.shape[:2]
    evidence = gather_evidence(height, width, boxes, processor.sizes)
    reasoning = text.partition("<answer>")[0].replace("<think>", "").replace("</think>", "")
    return Result(boxes, reasoning.strip(), extract_answer(text), evidence, perceiver_text, text)
