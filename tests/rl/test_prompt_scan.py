"""Rows measured before a run: as the builder of requests would, at their worst, or refused."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from p2r_jax.data.sources import SourceError, load_source
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.qwen3_vl.processor import ImageSizes, Processor
from p2r_jax.rl.prompt_scan import Scan, largest_crop, roles_asked, scan_rows, spread
from p2r_jax.roles.boxes import Box, parse_response
from p2r_jax.roles.evidence import gather_evidence
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets, RequestBuilder
from tests.rl.dry_runs import BUCKETS, SIDES, write_rows


@pytest.fixture(scope="module")
def builder(tiny_checkpoint):
    processor = Processor.from_pretrained(tiny_checkpoint)
    return RequestBuilder(processor, load_prompt_set("tiny"), Buckets.of(BUCKETS))


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data")


def scan(data, builder, allowed: float = 0.01, **buckets) -> Scan:
    """All rows, as both roles are asked about them. buckets: instead of the usual ones."""
    own = Buckets.of(dataclasses.replace(BUCKETS, **buckets))
    builder = RequestBuilder(builder.processor, builder.prompts, own)
    roles = ("perceiver", "reasoner")
    return scan_rows("train", load_source(str(data)), range(4), roles, builder, allowed)


def test_what_rows_need(data, builder):
    """Of the plain image, counted again here; with crops, more of everything."""
    found, source = scan(data, builder), VisualSearch()
    assert found.images.shapes == tuple(SIDES)
    assert found.problem == ""
    store = dataclasses.replace(ImageStore.empty(), shapes=tuple(SIDES))
    requests = [
        builder.plain("perceiver", store, i, source[i].question_with_options, "mca")
        for i in range(4)
    ]
    targets = [request.views[0].target for request in requests]
    tokens = [len(request.tokens) for request in requests]
    assert len(set(tokens)) > 1
    plain = {
        "prompt_tokens": tokens,
        "patches": [h // 8 * (w // 8) for h, w in targets],
        "canvas": [max(target) for target in targets],
    }
    assert {kind: n for (role, kind), n in found.needs.items() if role == "perceiver"} == plain
    for kind, values in plain.items():
        worst = found.needs["reasoner", kind]
        assert all(large > small for large, small in zip(worst, values, strict=True))
    three = [Box((0, 0, 900, 900), "")] * 3
    crops = [
        builder.reasoner(store, i, row.question_with_options, "mca", three)
        for i, row in enumerate(found.rows)
    ]
    assert all(
        len(request.tokens) <= worst
        for request, worst in zip(crops, found.needs["reasoner", "prompt_tokens"], strict=True)
    )
    assert found.needs["source image", "image"] == [max(side) for side in SIDES]


@pytest.mark.parametrize("kept", [2000, 60], ids=["a whole header", "half a header"])
def test_images_that_cannot_be_decoded(data, builder, kept):
    for i in (1, 2):
        file = data.parent / f"images/{i}.png"
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(SourceError) as raised:
        scan(data, builder)
    line = str(raised.value)
    assert "data.train: 2 of 4 images cannot be decoded (data.max_bad_fraction allows 1.0%)" in line
    assert all(f"row 'row {i}': cannot decode {data.parent}/images/{i}.png" in line for i in (1, 2))


def test_a_few_of_them_are_left_out(data, builder):
    (data.parent / "images/3.png").write_text("<html>not found</html>")
    found = scan(data, builder, allowed=0.25)
    assert [row.id for row in found.rows] == ["row 0", "row 1", "row 2"]
    assert {len(values) for values in found.needs.values()} == {3}
    assert found.problem.startswith("data.train: 1 of 4 images cannot be decoded")
    assert "row 'row 3'" in found.problem


@pytest.mark.parametrize(
    "kind, sizes, found",
    [
        ("prompt_tokens", [60], r"\(reasoner: (\d+) tokens; 4 of 4 scanned rows do\)"),
        ("patches", [100], r"\(reasoner: (\d+) patches; 4 of 4 scanned rows do\)"),
        ("canvas", [96], r"\(reasoner: (\d+) px a side; 4 of 4 scanned rows do\)"),
        ("image", [380], r"row 'row 2' .*\(source image: (384) px a side; 3 of 4 scanned rows do"),
    ],
)
def test_a_prompt_over_budget(data, builder, kind, sizes, found):
    """The bucket that is asked for is enough."""
    with pytest.raises(ValueError, match=rf"data\.train: .* exceeds buckets\.{kind} = ") as raised:
        scan(data, builder, **{kind: sizes})
    line = str(raised.value)
    needed = int(re.search(found, line)[1])
    assert f"add a bucket of at least {needed}, or " in line
    scan(data, builder, **{kind: [needed]})
    with pytest.raises(ValueError, match=f"at least {needed}"):
        scan(data, builder, **{kind: [needed - 1]})


def test_all_buckets_are_named_at_once(data, builder):
    with pytest.raises(ValueError, match=r"buckets\.patches .* Also, .* buckets\.prompt_tokens "):
        scan(data, builder, prompt_tokens=[60], patches=[100])


def test_an_image_that_no_prompt_can_show(data, builder):
    Image.new("RGB", (384, 1)).save(data.parent / "images/1.png")
    with pytest.raises(ValueError, match=r"data\.train: row 'row 1', perceiver: .*ratio above 200"):
        scan(data, builder)


@pytest.mark.parametrize(
    "names, roles",
    [
        (["perceiver"], ["perceiver", "reasoner"]),
        (["joint", "baseline"], ["perceiver", "reasoner", "baseline"]),
        (["baseline"], ["baseline"]),
        (["oracle_box", "default"], ["reasoner", "direct"]),
        (["live_perceiver"], ["perceiver", "reasoner"]),
    ],
)
def test_roles_that_are_asked(names, roles):
    assert roles_asked(names) == roles


def test_rows_are_spread_over_the_data():
    assert spread(3, 512) == [0, 1, 2]
    for count, most in ((1000, 64), (10_000, 512), (65, 64), (100, 7)):
        chosen = spread(count, most)
        assert 1 <= len(chosen) <= most
        assert chosen[0] == 0
        assert chosen[-1] == count - 1
        assert chosen == sorted(set(chosen))


@pytest.mark.parametrize(
    "sizes", [ImageSizes(16, 2, 4096, 2_097_152), ImageSizes(8, 2, 1024, 5184)], ids=["4B", "tiny"]
)
@pytest.mark.parametrize("size", [(384, 384), (1000, 1500), (8000, 6000), (500, 7000), (12, 9)])
def test_no_box_asks_for_a_larger_crop(sizes, size):
    """Within one grid step of what thousands of random boxes find."""
    rng = np.random.default_rng(0)
    box, side = largest_crop(*size, sizes)

    def crop(box: Box) -> tuple[int, int]:
        evidence = gather_evidence(*size, [box], sizes)
        if not evidence.found:
            return 0, 0
        rows, columns = sizes.grid(evidence.views[1].target)
        return rows * columns, max(evidence.views[1].target)

    assert parse_response(json.dumps([{"bbox_2d": list(box.bbox_2d), "label": "x"}])).boxes
    most, longest = crop(box)[0], 0
    for _ in range(3000):
        corners = rng.uniform(0, 1000, (2, 2)) * rng.choice([0, 1], (2, 2), p=[0.3, 0.7])
        (x1, y1), (x2, y2) = np.sort(corners, axis=0)
        if 0 < x2 - x1 <= 200 * (y2 - y1) and y2 - y1 <= 200 * (x2 - x1):
            patches, long = crop(Box((x1, y1, x2, y2), ""))
            assert patches <= 1.05 * most
            longest = max(longest, long)
    assert longest <= side + 2 * sizes.patch * sizes.merge
    # The narrowest that count as boxes, which are rarely drawn.
    assert max(crop(Box(ends, ""))[1] for ends in ((0, 0, 5, 1000), (0, 0, 1000, 5))) <= side
