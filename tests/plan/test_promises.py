"""What the shipped recipes promise of a v5e-16, as far as it compiles in seconds.

The whole matrix of recipes and slices: `python -m tests.benchmarks.plan_matrix`, which also writes
the table of launch/README.md. Bytes that chips exchange are kept in golden/: a change of layout
shows as a difference there (write it anew with P2R_WRITE_GOLDEN=1).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from p2r_jax.config import TrainConfig
from p2r_jax.parallel.mesh import batch_shards
from p2r_jax.plan.chips import GIB, Slice
from p2r_jax.plan.report import make_plan
from p2r_jax.plan.shapes import Shapes
from p2r_jax.qwen3_vl.published import config_of
from p2r_jax.rl.memory import tree_bytes
from tests.benchmarks.plan_matrix import recipe

GOLDEN = Path(__file__).parent / "golden"
QUICK = ("weights for decoding", "start, ", "decode, ", "grow, ")
RECIPES = ("p2r_4b",)
V5E = Slice.parse("v5e-16")


@pytest.fixture(scope="module", params=RECIPES)
def made(request, tmp_path_factory):
    pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
    config = recipe(request.param, "v5e-16")
    model = config_of(config.model.path)
    keep = tmp_path_factory.mktemp("promises")
    shapes = Shapes(config, model, V5E.mesh(config.mesh), "pallas_tpu")
    return request.param, config, shapes, make_plan(config, model, V5E, keep, only=QUICK)


def decoding(made):
    return [row for row in made[3].rows if row.program.name.startswith("decode")]


def test_all_of_it_fits_with_the_other_arrays_beside(made):
    _, _, _, plan = made
    assert len(decoding(made)) == 4  # policy and partner, in either phase
    for row in plan.rows:
        assert row.compiled.over is None
        assert row.total < V5E.chip.usable, (row.program.name, row.total / GIB)


def test_decoding_gathers_no_weights(made):
    """A token's collectives are activations: less than the smallest layer's weights together."""
    for row in decoding(made):
        assert row.compiled.kernels == 1
        assert sum(row.compiled.exchanged.values()) < 0.02 * GIB


def test_decoding_copies_no_cache(made):
    """Weights, prefixes and suffixes are read once for a token, and little else moves."""
    _, config, shapes, _ = made
    assert isinstance(config, TrainConfig)
    rollouts = [r for phase in config.phases for r in shapes.rollouts(phase, phase)]
    for row, rollout in zip(decoding(made), rollouts, strict=True):
        caches = shapes.slots(rollout, rollout.slots.rings[-1])
        read = sum(tree_bytes((own.keys, own.values)) for own in caches)
        ideal = tree_bytes(shapes.decoding["language_model"]) + read
        assert row.compiled.moved < 1.35 * ideal, row.program.name
        assert rollout.slots.slots % batch_shards(shapes.mesh) == 0


def test_chips_exchange_what_they_did(made):
    name, _, _, plan = made
    found = {row.program.name: row.compiled.exchanged for row in plan.rows}
    file = GOLDEN / f"{name}_v5e-16.json"
    if os.environ.get("P2R_WRITE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(file.read_text())
