"""Image counts and sizes are data: only buckets are compiled.

Fifty random batches go the way of a rollout: images uploaded, patches cut on the device, prompts
run, completions decoded.
"""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from p2r_jax.parallel.compilations import Compilations
from p2r_jax.qwen3_vl import inputs, load_pretrained
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.image_store import ImageStore, render_prompts
from p2r_jax.roles.pipeline import Pipeline
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets
from p2r_jax.rollout import engine
from p2r_jax.rollout.sampling import Sampling

BUCKETS = Buckets(patches=(84, 180, 324), prompt_tokens=(36, 68, 132), canvas=(224,), image=(256,))
"""Sizes of no other test: what was compiled before would not be compiled here."""
ROWS, SETS = 3, 50


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
    model = load_pretrained(tiny_checkpoint, dtype="float32")
    graph, params = nnx.split(model)
    processor = Processor.from_pretrained(tiny_checkpoint)
    return Pipeline.create(graph, processor, load_prompt_set("tiny"), BUCKETS), params


def random_requests(rng, builder, images):
    """Rows of 0 to 4 images: text alone, a plain image, or an overview and the crops of boxes."""
    rows = []
    for count in rng.integers(0, rng.integers(1, 6), ROWS):
        image = int(rng.integers(len(images.shapes)))
        if count == 0:
            rows.append(builder.text("red? " * rng.integers(1, 20)))
        elif count == 1:
            rows.append(builder.plain("perceiver", images, image, "red?", "mca"))
        else:
            corners = np.sort(rng.uniform(0, 1000, (count - 1, 2, 2)), axis=1).reshape(-1, 4)
            boxes = [Box(tuple(box), "x") for box in corners]
            rows.append(builder.reasoner(images, image, "red?", "mca", boxes))
    return rows


def smallest(sizes, needed):
    return min(size for size in sizes if size >= needed)


def buckets_of(rows, sizes):
    """What a batch may compile for: padded tokens and patches, and one or several views a row."""
    tokens = smallest(BUCKETS.prompt_tokens, max(len(row.tokens) for row in rows))
    most = max(len(row.views) for row in rows)
    if most == 0:
        return tokens, None, 0
    grids = [[sizes.grid(view.target) for view in row.views] for row in rows]
    needed = max(sum(h * w for h, w in own) for own in grids)
    return tokens, smallest(BUCKETS.patches, needed), 1 if most == 1 else 4


PROGRAMS = {
    "layout": inputs.layout_program(None),
    "render": render_prompts,
    "prefill": engine.prefill,
    "empty slots": engine.empty_slots,
    "start": engine._start,
    "decode": engine.decode,
}


def cache_sizes():
    return {name: program._cache_size() for name, program in PROGRAMS.items()}


def programs_for(used):
    """How many programs the buckets used so far are worth."""
    tokens = {tokens for tokens, _, _ in used}
    several = {(patches, views) for _, patches, views in used if patches}
    return {
        "layout": len(several),
        "render": len(several),
        "prefill": len({(tokens, patches) for tokens, patches, _ in used}),
        "empty slots": len(tokens),
        "start": len(tokens),
        "decode": len(tokens),
    }


def test_random_images_compile_each_bucket_once(pipeline):
    pipeline, params = pipeline
    rng, sampling = np.random.default_rng(0), Sampling(max_new_tokens=2, group=2)
    before, counted = cache_sizes(), Compilations()
    used, images_of_a_row = set(), set()
    for number in range(SETS):
        shapes = rng.integers(30, 250, (2, 2))
        images = ImageStore.upload([np.zeros((*s, 3), np.uint8) for s in shapes], BUCKETS)
        rows = random_requests(rng, pipeline.builder, images)
        pipeline.sample(params, rows, images, sampling, seeds=range(ROWS))
        used.add(buckets_of(rows, pipeline.builder.processor.sizes))
        images_of_a_row.update(len(row.views) for row in rows)
        compiled = {name: size - before[name] for name, size in cache_sizes().items()}
        assert compiled == programs_for(used), f"set {number}"
        assert counted.count == sum(compiled.values()), f"set {number}"
    counted.close()
    print(f"{len(used)} buckets, {compiled}")
    assert images_of_a_row == {0, 1, 2, 3, 4}
    assert {tokens for tokens, _, _ in used} == set(BUCKETS.prompt_tokens)
    assert {patches for _, patches, _ in used} == {None, *BUCKETS.patches}
