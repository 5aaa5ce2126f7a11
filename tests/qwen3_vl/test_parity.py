"""The port equals Hugging Face transformers in float32: logits, every stage, every gradient.

The gates are as tight as float32 allows, because looser ones let wrong models through: a GELU of
the wrong kind moves logits by 1e-4, a wrong epsilon by 7e-6, and neither changes a greedy token.
`TestTheGateCatches` proves that the gate used here sees such mistakes.
"""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from p2r_jax.qwen3_vl import forward_hf
from p2r_jax.qwen3_vl import text as text_module
from tests.qwen3_vl.reference import (
    SCENARIOS,
    jax_policy_loss,
    jax_stages,
    make_batch,
    prompts_of,
    relative_l2,
    scenario,
    to_hf,
    torch_logits,
    torch_policy_loss,
    with_config,
)

LOGITS_GATE = 3e-6
"""Relative L2."""
LOGITS_LARGEST = 1e-4
"""Any single logit."""
GRADIENT_GATE = 1e-4
"""Relative L2 of every single parameter."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_logits_equal_the_reference(pair, name):
    batch = scenario(name, pair.patch_dim)
    expected = torch_logits(pair, batch)[batch.valid]
    actual = np.asarray(forward_hf(pair.model, *batch.arguments()))[batch.valid]
    assert relative_l2(actual, expected) <= LOGITS_GATE
    assert np.abs(actual - expected).max() <= LOGITS_LARGEST


@pytest.fixture(scope="module")
def stages(pairs):
    """Both models' intermediate values on the left-padded batch, by config."""
    out = {}
    for name, pair in pairs.items():
        batch = scenario("left padding", pair.patch_dim)
        prompts = prompts_of(pair, batch)
        inputs = batch.torch()
        with torch.no_grad():
            vision = pair.torch_model.model.visual(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            )
            cache = pair.torch_model(**inputs, use_cache=True).past_key_values
        expected = {
            "visual": vision.pooler_output,
            "deepstack": torch.stack(list(vision.deepstack_features)),
            "keys": torch.stack([layer.keys for layer in cache.layers]).transpose(2, 3),
            "values": torch.stack([layer.values for layer in cache.layers]).transpose(2, 3),
        }
        expected = {k: v.numpy() for k, v in expected.items()}
        actual = {k: np.asarray(v) for k, v in jax_stages(pair.model, prompts).items()}
        real = np.asarray(prompts.patches.image_id)[:, ::4] > 0
        actual["visual"] = actual["visual"][real]
        actual["deepstack"] = actual["deepstack"][:, real]
        for stage in ("keys", "values"):
            actual[stage] = actual[stage][:, batch.valid]
            expected[stage] = expected[stage][:, batch.valid]
        out[name] = (actual, expected)
    return out


@pytest.mark.parametrize("config", ["uneven", "compact"])
class TestStages:
    def test_visual_tokens(self, stages, config):
        actual, expected = stages[config]
        assert relative_l2(actual["visual"], expected["visual"]) <= LOGITS_GATE

    def test_each_deepstack_level(self, stages, config):
        actual, expected = stages[config]
        for level, reference in zip(actual["deepstack"], expected["deepstack"], strict=True):
            assert relative_l2(level, reference) <= LOGITS_GATE

    @pytest.mark.parametrize("kind", ["keys", "values"])
    def test_the_cache_of_each_layer(self, stages, config, kind):
        actual, expected = stages[config]
        for layer, reference in zip(actual[kind], expected[kind], strict=True):
            assert relative_l2(layer, reference) <= LOGITS_GATE


def test_gradients_of_a_policy_gradient_loss_equal_the_reference(pair):
    batch = scenario("left padding", pair.patch_dim)
    advantages = np.array([[1.5], [-0.5], [0.75]], np.float32)
    real = batch.valid[:, :-1] & batch.valid[:, 1:]
    weights = advantages * real
    expected_loss, expected = torch_policy_loss(pair, batch, weights)
    loss, gradient = jax_policy_loss(pair.model, prompts_of(pair, batch), weights)
    actual = to_hf(pair.model, gradient)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert actual.keys() == expected.keys()
    errors = {name: relative_l2(actual[name], expected[name]) for name in expected}
    assert {name: e for name, e in errors.items() if not e <= GRADIENT_GATE} == {}


def test_one_program_serves_every_mix_of_image_sizes(pairs):
    pair = pairs["compact"]
    traces = 0

    @nnx.jit
    def forward(model, prompts):
        nonlocal traces
        traces += 1
        return model(prompts)

    for rows in (
        [(2, (4, 6), 3), (1, (2, 4), 2, (8, 2), 4)],
        [(1, (8, 2), 1, (2, 4), 5), (8, (6, 4), 1)],
    ):
        batch = make_batch(rows, pair.patch_dim)
        actual = np.asarray(forward(pair.model, prompts_of(pair, batch)))
        expected = torch_logits(pair, batch)
        assert relative_l2(actual[batch.valid], expected[batch.valid]) <= LOGITS_GATE
    assert traces == 1


def test_bfloat16_is_as_close_to_float32_as_the_reference_is(pairs):
    """Both round, differently; being much further from float32 would mean rounding too early."""
    pair = pairs["uneven"]
    batch = scenario("right padding", pair.patch_dim)
    truth = torch_logits(pair, batch)[batch.valid]
    with torch.no_grad():
        half = copy.deepcopy(pair.torch_model).bfloat16()
        reference = half(**batch.torch()).logits.float().numpy()[batch.valid]
    graph, state = nnx.split(pair.model)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    actual = forward_hf(rounded, *batch.arguments())
    assert actual.dtype == jnp.bfloat16
    actual = np.asarray(actual.astype(jnp.float32))[batch.valid]
    assert relative_l2(actual, truth) <= 1.5 * relative_l2(reference, truth)


class TestTheGateCatches:
    """Each of these mistakes was made by some earlier port, and leaves the model plausible."""

    @pytest.fixture(scope="class")
    def check(self, pairs):
        pair = pairs["uneven"]
        batch = scenario("left padding", pair.patch_dim)
        expected = torch_logits(pair, batch)[batch.valid]
        forward = nnx.jit(lambda model, prompts: model(prompts))

        def error(change_prompts=None, change_config=None, retrace=False):
            model, prompts = pair.model, prompts_of(pair, batch)
            if change_config:
                model = with_config(model, change_config(model.config))
            if change_prompts:
                prompts = change_prompts(prompts)
            run = nnx.jit(lambda model, prompts: model(prompts)) if retrace else forward
            return relative_l2(np.asarray(run(model, prompts))[batch.valid], expected)

        assert error() <= LOGITS_GATE
        return error

    @pytest.mark.parametrize(
        "field, value",
        [
            ("text", {"rope_theta": 5e5}),
            ("vision", {"layer_norm_eps": 1e-5}),
            ("vision", {"deepstack_visual_indexes": (1, 2, 4)}),
        ],
        ids=["the class default of theta", "a common epsilon", "taps counted from one"],
    )
    def test_a_wrong_setting(self, check, field, value):
        def change(config):
            part = dataclasses.replace(getattr(config, field), **value)
            return dataclasses.replace(config, **{field: part})

        assert check(change_config=change) > LOGITS_GATE

    @pytest.mark.parametrize("approximate", [True, False], ids=["in the mergers", "in the blocks"])
    def test_the_wrong_gelu(self, check, monkeypatch, approximate):
        gelu = jax.nn.gelu
        monkeypatch.setattr(jax.nn, "gelu", lambda x, **_: gelu(x, approximate=approximate))
        assert check(retrace=True) > LOGITS_GATE

    def test_chunked_instead_of_interleaved_rotary_axes(self, check, monkeypatch):
        monkeypatch.setattr(text_module, "mrope_axes", lambda section: np.repeat(range(3), section))
        assert check(retrace=True) > LOGITS_GATE

    def test_rows_and_columns_swapped_in_the_vision_rotation(self, check):
        def change(prompts):
            return _with_patches(prompts, row_col=prompts.patches.row_col[..., ::-1])

        assert check(change) > LOGITS_GATE

    def test_attention_across_images(self, check):
        def change(prompts):
            return _with_patches(prompts, image_id=jnp.minimum(prompts.patches.image_id, 1))

        assert check(change) > LOGITS_GATE

    def test_position_tables_stretched_to_half_pixel_centres(self, check, pairs):
        """align_corners=False, which moved every box about the image centre in two engines."""
        side = pairs["uneven"].model.config.vision.position_grid

        def change(prompts):
            patches = prompts.patches
            index, weight = np.array(patches.pos_index), np.array(patches.pos_weight)
            for row, first, grid in ((0, 0, (4, 6)), (0, 24, (8, 2)), (2, 0, (6, 4))):
                span = slice(first, first + grid[0] * grid[1])
                index[row, span], weight[row, span] = _half_pixel_centres(
                    np.asarray(patches.row_col)[row, span], grid, side
                )
            return _with_patches(prompts, pos_index=jnp.array(index), pos_weight=jnp.array(weight))

        assert check(change) > LOGITS_GATE

    def test_padding_keys_attended_to(self, check):
        def change(prompts):
            return dataclasses.replace(prompts, valid=jnp.ones_like(prompts.valid))

        assert check(change) > LOGITS_GATE

    def test_positions_that_count_visual_tokens_one_by_one(self, check):
        def change(prompts):
            one_axis = jnp.maximum(jnp.cumsum(prompts.valid, axis=1) - 1, 0)
            return dataclasses.replace(
                prompts, positions=jnp.broadcast_to(one_axis, prompts.positions.shape)
            )

        assert check(change) > LOGITS_GATE


def _with_patches(prompts, **fields):
    return dataclasses.replace(prompts, patches=dataclasses.replace(prompts.patches, **fields))


def _half_pixel_centres(row_col, grid, side):
    """As `position_interpolation`, for torch's align_corners=False."""
    where = np.clip((row_col + 0.5) * side / np.asarray(grid) - 0.5, 0, side - 1)
    low = np.floor(where).astype(np.int32)
    high, part = np.minimum(low + 1, side - 1), where - low
    (r0, c0), (r1, c1), (r, c) = low.T, high.T, part.T
    index = [r0 * side + c0, r0 * side + c1, r1 * side + c0, r1 * side + c1]
    weight = [(1 - r) * (1 - c), (1 - r) * c, r * (1 - c), r * c]
    return np.stack(index, -1), np.stack(weight, -1)
