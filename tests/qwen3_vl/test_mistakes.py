"""The gate of `test_parity` catches every mistake that earlier ports are known to have made.

Each test applies one mistake to the port and asks that its logits leave the gate. Most leave the
model plausible, and many leave its greedy tokens unchanged. Mistakes are made in the inputs, the
weights or the config where these express them exactly, else in the code.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from p2r_jax.qwen3_vl import text as text_module
from p2r_jax.qwen3_vl.layers import LayerNorm, RMSNorm
from p2r_jax.qwen3_vl.positions import patch_coordinates
from p2r_jax.qwen3_vl.text import DecoderLayer
from p2r_jax.qwen3_vl.vision import Merger, VisionTower
from tests.qwen3_vl import test_positions
from tests.qwen3_vl.reference import (
    CONFIGS,
    GATE,
    MIXED,
    prompts_of,
    relative_l2,
    scenario,
    torch_logits,
    with_config,
)

SIDE = round(CONFIGS["uneven"]["vision_config"]["num_position_embeddings"] ** 0.5)
GRIDS = [[item for item in row if isinstance(item, tuple)] for row in MIXED]


@pytest.fixture(scope="module")
def error(pairs):
    """Relative L2 of the logits of a left-padded batch of 3, 0 and 1 images."""
    pair = pairs["uneven"]
    batch = scenario("left padding", pair.patch_dim)
    given, expected = prompts_of(pair, batch), torch_logits(pair, batch)[batch.valid]
    compiled = nnx.jit(lambda model, prompts: model(prompts))

    def measure(model=lambda model: model, prompts=lambda prompts: prompts, code=False):
        run = nnx.jit(lambda model, prompts: model(prompts)) if code else compiled
        actual = np.asarray(run(model(pair.model), prompts(given)))[batch.valid]
        value = relative_l2(actual, expected)
        print(f"relative L2 {value:.1e}")
        return value

    assert measure() <= GATE
    yield measure
    assert measure(code=True) <= GATE, "a mistake was left behind"


# --- inputs -----------------------------------------------------------------------------------


def with_patches(prompts, **fields):
    return dataclasses.replace(prompts, patches=dataclasses.replace(prompts.patches, **fields))


def each_image(prompts, names, change):
    """The same prompts; `change(grid, *fields of its patches)` gives the new fields."""
    fields = [np.array(getattr(prompts.patches, name)) for name in names]
    for row, grids in enumerate(GRIDS):
        start = 0
        for grid in grids:
            span = slice(start, start + grid[0] * grid[1])
            new = change(grid, *(field[row, span] for field in fields))
            for field, value in zip(fields, new, strict=True):
                field[row, span] = value
            start = span.stop
    return with_patches(prompts, **dict(zip(names, map(jnp.array, fields), strict=True)))


def in_raster_order(grid, *fields):
    rows, columns = patch_coordinates(grid, 2).T
    order = np.argsort(rows * grid[1] + columns)
    return [field[order] for field in fields]


def raster_positions(prompts):
    """Pixels come block by block, positions are counted row by row."""
    return each_image(prompts, ["row_col", "pos_index", "pos_weight"], in_raster_order)


def raster_patches(prompts):
    """Pixels and positions agree, but four patches in a row become one visual token."""
    names = ["pixels", "row_col", "pos_index", "pos_weight"]
    return each_image(prompts, names, in_raster_order)


def half_pixel_centres(prompts):
    """align_corners=False, which moved every box about the image centre in two engines."""

    def change(grid, *_):
        where = (patch_coordinates(grid, 2) + 0.5) * SIDE / np.asarray(grid) - 0.5
        where = np.clip(where, 0, SIDE - 1)
        low = np.floor(where).astype(np.int32)
        high, part = np.minimum(low + 1, SIDE - 1), where - low
        (r0, c0), (r1, c1), (r, c) = low.T, high.T, part.T
        index = [r0 * SIDE + c0, r0 * SIDE + c1, r1 * SIDE + c0, r1 * SIDE + c1]
        weight = [(1 - r) * (1 - c), (1 - r) * c, r * (1 - c), r * c]
        return np.stack(index, -1), np.stack(weight, -1)

    return each_image(prompts, ["pos_index", "pos_weight"], change)


def transposed_position_table(prompts):
    row, column = jnp.divmod(prompts.patches.pos_index, SIDE)
    return with_patches(prompts, pos_index=column * SIDE + row)


def rows_and_columns_swapped(prompts):
    return with_patches(prompts, row_col=prompts.patches.row_col[..., ::-1])


def no_vision_rotation(prompts):
    return with_patches(prompts, row_col=jnp.zeros_like(prompts.patches.row_col))


def frames_before_channels(prompts):
    pixels = prompts.patches.pixels
    by_frame = pixels.reshape(*pixels.shape[:2], 3, 2, -1).swapaxes(2, 3)
    return with_patches(prompts, pixels=by_frame.reshape(pixels.shape))


def attention_across_images(prompts):
    return with_patches(prompts, image_id=jnp.minimum(prompts.patches.image_id, 1))


def attention_to_padding_patches(prompts):
    return with_patches(prompts, image_id=jnp.maximum(prompts.patches.image_id, 1))


def attention_to_padding_tokens(prompts):
    return dataclasses.replace(prompts, valid=jnp.ones_like(prompts.valid))


def one_position_per_visual_token(prompts):
    one_axis = jnp.maximum(jnp.cumsum(prompts.valid, axis=1) - 1, 0)
    return dataclasses.replace(
        prompts, positions=jnp.broadcast_to(one_axis, prompts.positions.shape)
    )


def text_resumes_after_one_position(prompts):
    """At t + 1 after an image at t, not at t + max(rows, columns)."""
    positions, slots = np.array(prompts.positions), np.asarray(prompts.visual_slot)
    for row, grids in enumerate(GRIDS):
        last = -1
        for h, w in grids:
            last += h * w // 4
            after = int(np.flatnonzero(slots[row] == last)[0]) + 1
            positions[:, row, after:] -= max(h, w) // 2 - 1
    return dataclasses.replace(prompts, positions=jnp.array(positions))


@pytest.mark.parametrize(
    "mistake",
    [
        raster_positions,
        raster_patches,
        half_pixel_centres,
        transposed_position_table,
        rows_and_columns_swapped,
        no_vision_rotation,
        frames_before_channels,
        attention_across_images,
        attention_to_padding_patches,
        attention_to_padding_tokens,
        one_position_per_visual_token,
        text_resumes_after_one_position,
    ],
)
def test_in_the_inputs(error, mistake):
    assert error(prompts=mistake) > GATE


# --- weights ----------------------------------------------------------------------------------


def changed(model, **changes):
    """A copy; `changes` are functions of one weight each, by path with __ for a dot."""
    model = nnx.clone(model)
    for path, change in changes.items():
        weight = operator.attrgetter(path.replace("__", "."))(model)
        weight[...] = change(weight[...])
    return model


def tiled_key_value_heads(model):
    """Query head h reads head h % 2, not h // 2: as if the query heads were dealt out."""
    return changed(
        model,
        language_model__layers__q_proj__kernel=lambda w: w[:, :, [0, 2, 1, 3]],
        language_model__layers__o_proj__kernel=lambda w: w[:, [0, 2, 1, 3]],
    )


def head_tied_by_force(model):
    return changed(model, lm_head=lambda _: model.language_model.embed_tokens[...])


def no_deepstack(model):
    return changed(
        model,
        visual__deepstack_mergers__fc2__kernel=jnp.zeros_like,
        visual__deepstack_mergers__fc2__bias=jnp.zeros_like,
    )


@pytest.mark.parametrize("mistake", [tiled_key_value_heads, head_tied_by_force, no_deepstack])
def test_in_the_weights(error, mistake):
    assert error(model=mistake) > GATE


# --- config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, value",
    [
        ("text", {"rope_theta": 5e5}),
        ("text", {"rope_theta": 1e6}),
        ("text", {"rms_norm_eps": 1e-5}),
        ("vision", {"layer_norm_eps": 1e-5}),
        ("vision", {"deepstack_visual_indexes": (1, 2, 4)}),
    ],
    ids=[
        "the class default of theta",
        "theta of Qwen2-VL",
        "a common epsilon, text",
        "a common epsilon, vision",
        "taps counted from one",
    ],
)
def test_in_the_config(error, part, value):
    def change(model):
        changed_part = dataclasses.replace(getattr(model.config, part), **value)
        return with_config(model, dataclasses.replace(model.config, **{part: changed_part}))

    assert error(model=change) > GATE


# --- code -------------------------------------------------------------------------------------


def gelu(patch, approximate):
    run = jax.nn.gelu
    patch.setattr(jax.nn, "gelu", lambda x, **_: run(x, approximate=approximate))


def chunked_rotary_axes(patch):
    patch.setattr(text_module, "mrope_axes", lambda section: np.repeat(range(3), section))


def no_norm_of_queries_and_keys(patch):
    run = RMSNorm.__call__
    patch.setattr(RMSNorm, "__call__", lambda self, x: x if x.ndim == 4 else run(self, x))


def norm_of_queries_and_keys_after_rotation(patch):
    run, normalise = DecoderLayer.__call__, RMSNorm.__call__

    def layer(self, x, cos, sin, attend, layer_input):
        def late(q, k, v, layer_input):
            return attend(normalise(self.q_norm, q), normalise(self.k_norm, k), v, layer_input)

        return run(self, x, cos, sin, late, layer_input)

    no_norm_of_queries_and_keys(patch)
    patch.setattr(DecoderLayer, "__call__", layer)


def main_merger_normalises_what_is_merged(patch):
    run = Merger.__call__

    def merge(self, x):
        if self.norm_after_merge:
            return run(self, x)
        wide = LayerNorm(self.merged_width, self.norm.eps)
        for name in ("scale", "bias"):
            getattr(wide, name)[...] = jnp.tile(getattr(self.norm, name)[...], 4)
        # A copy: what is assigned to a module inside `nnx.jit` stays assigned outside.
        wrong = nnx.clone(self)
        wrong.norm, wrong.norm_after_merge = wide, True
        return run(wrong, x)

    patch.setattr(Merger, "__call__", merge)


def deepstack(patch, change):
    """change: (visual tokens, levels) to what the language model gets of them."""
    run = VisionTower.__call__
    patch.setattr(
        VisionTower, "__call__", lambda self, *args, **kwargs: change(*run(self, *args, **kwargs))
    )


def before_the_layer(visual, levels):
    """The input of layer j is the output of layer j - 1."""
    return visual + levels[0], levels[1:]


def at_the_layers_of_the_taps(visual, levels):
    """Layers 0, 1, 3 of the decoder, as in the vision tower."""
    return visual, jnp.insert(levels, 2, 0, axis=0)


def in_reverse(visual, levels):
    return visual, levels[::-1]


CODE = {
    "tanh GELU in the mergers": functools.partial(gelu, approximate=True),
    "exact GELU in the vision blocks": functools.partial(gelu, approximate=False),
    "rotary axes in chunks": chunked_rotary_axes,
    "no norm of queries and keys": no_norm_of_queries_and_keys,
    "norm of queries and keys after rotation": norm_of_queries_and_keys_after_rotation,
    "main merger normalises what is merged": main_merger_normalises_what_is_merged,
    "DeepStack before the layer": functools.partial(deepstack, change=before_the_layer),
    "DeepStack at the taps": functools.partial(deepstack, change=at_the_layers_of_the_taps),
    "DeepStack in reverse": functools.partial(deepstack, change=in_reverse),
}


@pytest.mark.parametrize("name", CODE)
def test_in_the_code(error, monkeypatch, name):
    CODE[name](monkeypatch)
    assert error(code=True) > GATE


def test_the_one_that_no_gate_sees_fails_its_exact_test(monkeypatch):
    """Axes dealt out in threes to the end: wrong in frequencies of 4e-7 only."""

    def uncut(section):
        return np.arange(sum(section)) % 3

    monkeypatch.setattr(test_positions, "mrope_axes", uncut)
    with pytest.raises(AssertionError):
        test_positions.TestRotaryAxes().test_published_models()
    with pytest.raises(AssertionError):
        test_positions.TestRotaryAxes().test_short_sections()
