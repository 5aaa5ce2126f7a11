"""The two-stage evaluation by a plain transformers loop and by us: same answers, how many a second.

    python -m tests.benchmarks.two_stage                       # the embedded model, 96 questions
    python -m tests.benchmarks.two_stage --questions 256 --rounds 3

The loop is what people write: one question after the other, Pillow for outlines and crops, the
Hugging Face image processor, `generate` for the perceiver and again for the reasoner, float32. Both
decode greedily, with the same weights and token limits. Rounds alternate in one process; compiling
is not timed, it is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from PIL import Image, ImageDraw
from rich.console import Console
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from p2r_jax.data.loader import LoadedRow, evaluation_batches
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.evals.runner import Decoding, Seconds, evaluate
from p2r_jax.ops.outlines import OUTLINE_COLORS
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.boxes import parse_boxes
from p2r_jax.roles.evidence import View, gather_evidence, plain_view
from p2r_jax.roles.pipeline import Pipeline, default_buckets, default_prompt_set, greedy_schedule
from p2r_jax.roles.prompts import build_messages, load_prompt_set

PERCEIVER, REASONER = 48, 16
"""New tokens at most."""


class Loop:
    """The job without us, but for parsing boxes, wording prompts and naming what is shown."""

    def __init__(self, folder: str, processor: Processor):
        self.processor = processor
        self.prompts = load_prompt_set(default_prompt_set(processor.config))
        self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        vision = processor.config.vision
        self.images = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            do_resize=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        self.banned = np.flatnonzero(~processor.allowed_tokens()).tolist()

    def __call__(self, loaded: LoadedRow) -> tuple[str, str]:
        row, image = loaded.row, Image.fromarray(loaded.image)
        height, width = loaded.image.shape[:2]
        sizes = self.processor.sizes
        asked = row.question_with_options
        overview = (plain_view(height, width, sizes),)
        wrote = self._ask("perceiver", asked, row.answer_form, image, overview, PERCEIVER)
        evidence = gather_evidence(height, width, parse_boxes(wrote), sizes)
        text = self._ask(
            "reasoner", asked, row.answer_form, image, evidence.views, REASONER, evidence.found
        )
        return wrote, text

    def _ask(
        self,
        role: Any,
        question: str,
        form: str,
        image: Image.Image,
        views: tuple[View, ...],
        new_tokens: int,
        found: bool = True,
    ) -> str:
        messages = build_messages(
            self.prompts,
            role,
            question,
            num_images=len(views),
            answer_form=form,
            has_evidence=found,
        )
        inputs = self.images([_rendered(image, view) for view in views], return_tensors="pt")
        grids = [self.processor.sizes.grid(view.target) for view in views]
        ids = torch.tensor(self.processor.encode(messages, grids)[None]).long()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == self.processor.config.image_token_id).int(),
                **inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                suppress_tokens=self.banned,
                eos_token_id=list(self.processor.stop_ids),
                pad_token_id=self.processor.pad_id,
            )
        return self.processor.decode(out[0, ids.shape[1] :].tolist())


def _rendered(image: Image.Image, view: View) -> Image.Image:
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    for i, outline in enumerate(view.outlines):
        colour = OUTLINE_COLORS[i % len(OUTLINE_COLORS)]
        draw.rectangle(outline, outline=colour, width=view.line_width)
    height, width = view.target
    return drawn.crop(view.crop).resize((width, height), Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="checkpoint or run folder")
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    console = Console(highlight=False, soft_wrap=True)

    folder = locate_checkpoint(args.model)
    processor = Processor.from_pretrained(folder)
    source = VisualSearch("test")
    rows = [r for b in evaluation_batches(source, args.batch, args.questions) for r in b]
    batches = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
    graph, params = nnx.split(load_pretrained(folder, dtype="float32"), nnx.Param)
    prompts = load_prompt_set(default_prompt_set(processor.config))
    buckets = default_buckets(processor.sizes, source.config.image_size)
    schedule = greedy_schedule(args.batch)
    pipeline = Pipeline.create(graph, processor, prompts, buckets, schedule=schedule)
    decoding = Decoding.of(PERCEIVER, REASONER, 16)
    loop = Loop(str(folder), processor)

    def ours(seconds: Seconds | None = None) -> list[tuple[str, str]]:
        records = evaluate(
            pipeline,
            params,
            lambda _: batches,
            ["p2r"],
            decoding,
            total=len(rows),
            seconds=seconds,
        )
        return [(r["perceiver_text"], r["reasoner_text"]) for r in records]

    begin = time.perf_counter()
    ours()
    console.print(f"ours, first time (compiling): {time.perf_counter() - begin:.1f} s")
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    stages = Seconds()
    for _ in range(args.rounds):
        begin = time.perf_counter()
        mine = ours(stages)
        times["ours"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        theirs = [loop(row) for row in rows]
        times["loop"].append(time.perf_counter() - begin)
    same = [sum(a[i] == b[i] for a, b in zip(mine, theirs, strict=True)) for i in (0, 1)]
    console.print(f"equal texts of {len(rows)}: perceiver {same[0]}, reasoner {same[1]}")
    for name, values in times.items():
        rate = len(rows) / min(values)
        spread = f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f} s"
        console.print(f"{name}: {rate:.1f} questions/s (min / median / max {spread})")
    ratios = [b / a for a, b in zip(times["ours"], times["loop"], strict=True)]
    console.print(
        f"loop ÷ ours: {min(times['loop']) / min(times['ours']):.1f} "
        f"(rounds {', '.join(f'{r:.1f}' for r in ratios)}), {jax.devices()[0].device_kind}"
    )
    shares = ", ".join(f"{k} {v / args.rounds:.2f} s" for k, v in stages.by_stage.items())
    console.print(f"ours by stage, mean: {shares}")


if __name__ == "__main__":
    main()
