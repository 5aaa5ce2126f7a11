"""What the shipped recipes promise of a v5e-16 and of eight H100, as far as it compiles in seconds.

The whole matrix of recipes and slices: `python -m tests.benchmarks.plan_matrix`, which also writes
the table of launch/README.md. Bytes that chips exchange are kept in golden/: a change of layout
shows as a difference there (write it anew with P2R_WRITE_GOLDEN=1).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from p2r_jax.config import TrainConfig
from p2r_jax.parallel.mesh import batch_shards
from p2r_jax.plan.chips import GIB, Slice
from p2r_jax.plan.report import Plan, make_plan
from p2r_jax.plan.shapes import Shapes
from p2r_jax.qwen3_vl.published import config_of
from p2r_jax.rl.memory import tree_bytes
from tests.benchmarks.plan_matrix import recipe
from tests.compilers import mesh_or_skip

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
QUICK = {
    "v5e-16": ("weights for decoding", "start, ", "decode, ", "grow, "),
    "h100-8": ("weights for decoding", "decode, "),
}
SLICES = {"v5e-16": Slice.parse("v5e-16"), "h100-8": Slice.parse("h100:8")}


@dataclasses.dataclass
class Made:
    name: str
    where: Slice
    config: TrainConfig
    shapes: Shapes
    plan: Plan


@pytest.fixture(scope="module", params=[("p2r_4b", "v5e-16"), ("p2r_4b", "h100-8")], ids="-".join)
def made(request, tmp_path_factory):
    name, mesh = request.param
    where, config = SLICES[mesh], recipe(name, mesh)
    model, keep = config_of(config.model.path), tmp_path_factory.mktemp("promises")
    shapes = Shapes(config, model, mesh_or_skip(where.mesh, config.mesh), where.chip.kernels)
    plan = make_plan(config, model, where, keep, only=QUICK[mesh])
    return Made(f"{name}_{mesh}", where, config, shapes, plan)


def decoding(made):
    return [row for row in made.plan.rows if row.program.name.startswith("decode")]


def test_all_of_it_fits_with_the_other_arrays_beside(made):
    assert len(decoding(made)) == 4  # policy and partner, in either phase
    for row in made.plan.rows:
        assert row.compiled.over is None
        assert row.total < made.where.chip.usable, (row.program.name, row.total / GIB)


def test_decoding_gathers_no_weights(made):
    """A token's collectives are activations: less than the smallest layer's weights together."""
    for row in decoding(made):
        # A GPU reads each cache with a kernel of its own.
        assert row.compiled.kernels == (1 if made.where.chip.name == "v5e" else 2)
        assert sum(row.compiled.exchanged.values()) < 0.02 * GIB


def test_decoding_copies_no_cache(made):
    """Weights, prefixes and suffixes are read once for a token, and little else moves; but XLA for
    GPUs copies each layer's weights out of the stack of all layers."""
    config, shapes = made.config, made.shapes
    weights = tree_bytes(shapes.decoding["language_model"])
    copies = 0 if made.where.chip.name == "v5e" else 2 * weights
    rollouts = [r for phase in config.phases for r in shapes.rollouts(phase, phase)]
    for row, rollout in zip(decoding(made), rollouts, strict=True):
        caches = shapes.slots(rollout, rollout.slots.rings[-1])
        read = sum(tree_bytes((own.keys, own.values)) for own in caches)
        assert row.compiled.moved < 1.05 * (weights + read) + copies, row.program.name
        assert rollout.slots.slots % batch_shards(shapes.mesh) == 0


def test_chips_exchange_what_they_did(made):
    found = {row.program.name: row.compiled.exchanged for row in made.plan.rows}
    file = GOLDEN / f"{made.name}.json"
    if os.environ.get("P2R_WRITE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(file.read_text())
