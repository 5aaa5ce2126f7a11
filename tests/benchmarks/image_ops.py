"""One overview and three crops of an image, as patches: ours against Pillow and transformers.

    python -m tests.benchmarks.image_ops                     # 2K, 4K and 8K
    python -m tests.benchmarks.image_ops --sizes 4K --rounds 9 --json out.json

Ours is `render_patches` (XLA) on this machine: the image is on the device, numbers go there, the
patches stay. Theirs is what people write: Pillow draws the outlines on a copy of the image, crops
and resizes, then the processor of transformers (the PIL one) makes patches; it is told not to
resize, as that was done. One process; one round runs both, in alternating order. Seconds are the
best round's; the ratio is theirs ÷ ours: of the best rounds, in brackets the smallest, median and
largest of a round. Pixels are compared before anything is timed.

Bytes are counted by leaving JAX no transfer but those that are written out here, and adding those
up: the image and its size once; then, for each set of boxes, the views (these are the boxes) with
their sizes in patches; and back nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
from PIL import Image, ImageDraw
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from p2r_jax.ops.image import Views, render_patches
from p2r_jax.ops.outlines import OUTLINE_COLORS
from p2r_jax.qwen3_vl.inputs import layout_of_grids
from p2r_jax.qwen3_vl.processor import ImageSizes
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.evidence import View, gather_evidence

SIZES = {"2K": (1440, 2560), "4K": (2160, 3840), "8K": (4320, 7680)}
"""Height and width in pixels."""
TOKENS = 2048
"""The budget of a view, visual tokens of 32×32 pixels."""
BUDGET = ImageSizes(patch=16, merge=2, min_pixels=4096, max_pixels=TOKENS * 32**2)
BOXES = [
    Box(corners, "")
    for corners in ((100, 150, 320, 420), (500, 300, 560, 380), (620, 550, 900, 880))
]
"""In thousandths; with their padding the crops are 42 × 47, 26 × 28 and 48 × 53 percent of it."""
TARGET = 1.0


class Theirs:
    def __init__(self, pixels: np.ndarray):
        self.image = Image.fromarray(pixels)
        self.process = Qwen2VLImageProcessorPil(
            patch_size=BUDGET.patch,
            merge_size=BUDGET.merge,
            temporal_patch_size=2,
            do_resize=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )

    def render(self, views: tuple[View, ...]) -> np.ndarray:
        pictures = []
        for view in views:
            image = self.image
            if view.outlines:
                image = image.copy()
                draw = ImageDraw.Draw(image)
                for number, box in enumerate(view.outlines):
                    color = OUTLINE_COLORS[number % len(OUTLINE_COLORS)]
                    draw.rectangle(box, outline=color, width=view.line_width)
            picture = image.crop(view.crop)
            pictures.append(picture.resize(view.target[::-1], Image.Resampling.BICUBIC))
        return self.process(images=pictures, return_tensors="np")["pixel_values"]


class Ours:
    """Counts what it sends: nothing else may be transferred, which JAX watches over."""

    def __init__(self, pixels: np.ndarray, views: tuple[View, ...]):
        self.sent = 0
        self.images, self.sizes = self.send((pixels[None], np.int32([pixels.shape[:2]])))
        self.sent_once, self.sent = self.sent, 0
        targets = [view.target for view in views]
        canvas = tuple(int(side) for side in np.max(targets, axis=0))
        patches = sum(math.prod(BUDGET.grid(target)) for target in targets)

        def render_views(images: Any, sizes: Any, views: Views, grids: Any) -> Any:
            layout = layout_of_grids(grids, size=patches, merge=BUDGET.merge, side=48)
            return render_patches(
                images,
                sizes,
                views,
                layout["image_id"] - 1,
                layout["row_col"],
                canvas=canvas,
                patch_size=BUDGET.patch,
                temporal_patch_size=2,
            )

        self.render_views = jax.jit(render_views)

    def send(self, arrays: Any) -> Any:
        self.sent += sum(array.nbytes for array in jax.tree.leaves(arrays))
        return jax.device_put(arrays)

    def render(self, views: tuple[View, ...]) -> jax.Array:
        with jax.transfer_guard("disallow"):
            numbers = self.send(numbers_of(views))
            return self.render_views(self.images, self.sizes, *numbers)


def numbers_of(views: tuple[View, ...]) -> tuple[Views, np.ndarray]:
    """All that the device is told of one set of boxes: views, and their sizes in patches."""
    count, most = len(views), max(len(view.outlines) for view in views)
    outlines = np.zeros((1, count, most, 4), np.int32)
    for i, view in enumerate(views):
        if view.outlines:
            outlines[0, i, : len(view.outlines)] = view.outlines
    numbers = Views(
        image_index=np.zeros((1, count), np.int32),
        crop=np.int32([[view.crop for view in views]]),
        target=np.int32([[view.target for view in views]]),
        outlines=outlines,
        outline_count=np.int32([[len(view.outlines) for view in views]]),
        line_width=np.int32([[view.line_width for view in views]]),
    )
    return numbers, np.int32([[BUDGET.grid(view.target) for view in views]])


def picture(height: int, width: int) -> np.ndarray:
    """Smooth areas, fine noise and hard edges."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[::7, ::5] = rng.integers(0, 256, pixels[::7, ::5].shape, np.uint8)
    return pixels


def check(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference in grey levels; exits beyond 2, which enlarging may stretch to."""
    if ours.shape != theirs.shape:
        sys.exit(f"not the same patches: {ours.shape} and {theirs.shape}")
    levels = np.abs(ours - theirs) * 127.5
    if levels.max() > 2.01 or levels.mean() > 0.005:
        sys.exit(
            f"not the same pixels: {levels.max():.2f} levels at most, mean {levels.mean():.4f}"
        )
    return float(levels.max())


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: 1 if number % 2 == 0 else -1]:
            begin = time.perf_counter()
            jax.block_until_ready(functions[name]())
            took[name].append(time.perf_counter() - begin)
    return took


def measure(name: str, rounds: int) -> dict[str, Any]:
    height, width = SIZES[name]
    pixels = picture(height, width)
    views = gather_evidence(height, width, BOXES, BUDGET).views
    ours, theirs = Ours(pixels, views), Theirs(pixels)
    begin = time.perf_counter()
    patches = jax.block_until_ready(ours.render(views))
    compiling = time.perf_counter() - begin
    levels = check(np.asarray(patches[0]), theirs.render(views))

    ours.sent = 0
    took = alternate(
        {"ours": lambda: ours.render(views), "theirs": lambda: theirs.render(views)}, rounds
    )
    best = {side: min(seconds) for side, seconds in took.items()}
    ratios = [b / a for a, b in zip(took["ours"], took["theirs"], strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    ratio = best["theirs"] / best["ours"]
    sent = ours.sent // rounds
    print(
        f"{name} {height}x{width} | {patches.shape[1]:5} | {compiling:5.1f} | {levels:4.2f} | "
        f"{best['ours']:6.3f} {best['theirs']:6.3f} | {ratio:5.2f}x ({low:5.2f} {middle:5.2f} "
        f"{high:5.2f}) {'ok' if ratio >= TARGET else 'MISSED'} | {ours.sent_once:>11,} {sent:>5} 0"
        f" | {patches.nbytes:,}",
        flush=True,
    )
    return {
        "size": name,
        "seconds": took,
        "ratio": ratio,
        "rounds": [low, middle, high],
        "levels": levels,
        "bytes": {
            "image": ours.sent_once,
            "views": sent,
            "patches": patches.nbytes,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all rounds there")
    args = parser.parse_args()
    print(
        f"{len(os.sched_getaffinity(0))} CPUs, {args.rounds} rounds, {TOKENS} tokens a view; "
        f"target {TARGET:.0f}x\nsize | patches | compiling s | levels | ours, theirs s | "
        "theirs ÷ ours (rounds) | bytes: image, then views, down | patches, which stay"
    )
    results = [measure(size, args.rounds) for size in args.sizes]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
