"""The joint stage of the warm start, for ten steps."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import RequestBuilder
from p2r_jax.sft.warm_start import BUCKETS, WarmStartConfig, make_pool, train_roles
from tests.tiny import random_model


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


def test_the_language_model_moves_and_the_tower_stays_as_it_is(tiny_files):
    processor = Processor.from_pretrained(tiny_files)
    model = random_model(processor.config)
    config = WarmStartConfig(steps=10, scenes=16, perceiver_batch=8, reasoner_batch=8)
    builder = RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS)
    before = jax.tree.map(np.asarray, nnx.state(model))
    pools = make_pool(model, builder, VisualSearch(), config)
    rows = list(train_roles(model, pools, config, make_mesh(1, 1, 1, jax.devices()[:1])))
    after = jax.tree.map(np.asarray, nnx.state(model))

    assert [row["step"] for row in rows] == [10]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert not any(jax.tree.leaves(moved["visual"]))
    assert all(jax.tree.leaves(moved["language_model"]))
