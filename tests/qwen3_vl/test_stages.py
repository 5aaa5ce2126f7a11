"""Every stage of the port equals its counterpart in transformers, not only the logits.

Both models run whole and are listened to: transformers by forward hooks, the port by callbacks from
inside its compiled scans. So it is the modules of training and rollout that are compared, and the
first stage that differs names the mistake.
"""

from __future__ import annotations

import collections

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf_module

from p2r_jax.ops.kernels import Kernels
from p2r_jax.qwen3_vl.model import Qwen3VL
from p2r_jax.qwen3_vl.text import DecoderLayer, TextDecoder
from p2r_jax.qwen3_vl.vision import Merger, VisionBlock
from tests.qwen3_vl.reference import GATE, Pair, prompts_of, relative_l2, scenario


class Recorder:
    """Values by stage, in the order they were made."""

    def __init__(self):
        self.values = collections.defaultdict(list)

    def __call__(self, stage, value):
        self.values[stage].append(np.asarray(value))

    def traced(self, stage, value):
        """For code that is being compiled: records in each of its runs, each turn of a scan."""
        jax.debug.callback(lambda x: self(stage, x), value, ordered=True)


def listen_to_the_port(record, patch):
    def around(owner, method, listen):
        run = getattr(owner, method)

        def heard(self, *args, **kwargs):
            out = run(self, *args, **kwargs)
            listen(self, args, out)
            return out

        patch.setattr(owner, method, heard)

    def attention(name):
        def listen(self, args, out):
            for part, value in zip(("query", "key", "value"), args, strict=False):
                record(f"{name} {part}", value)
            record(f"{name} attended", out)

        return listen

    def vision_block(self, args, out):
        record("vision block in", args[0])
        record("vision block out", out)

    def decoder_layer(self, args, out):
        record("decoder layer in", args[0])
        record("decoder layer out", out[0])

    def merger(self, args, out):
        record("deepstack merger" if self.norm_after_merge else "merger", out)

    around(Kernels, "segments", attention("vision"))
    around(Kernels, "causal", attention("decoder"))
    around(VisionBlock, "__call__", vision_block)
    around(Merger, "__call__", merger)
    around(DecoderLayer, "__call__", decoder_layer)
    around(TextDecoder, "__call__", lambda self, args, out: record("final norm", out[0]))
    around(Qwen3VL, "__call__", lambda self, args, out: record("logits", out))


def port_stages(pair: Pair, batch) -> dict[str, list[np.ndarray]]:
    """Real patches, real visual tokens and real tokens of each stage, in batch order."""
    record, prompts = Recorder(), prompts_of(pair, batch)
    with pytest.MonkeyPatch.context() as patch:
        listen_to_the_port(record.traced, patch)
        jax.block_until_ready(nnx.jit(lambda model, prompts: model(prompts))(pair.model, prompts))
        jax.effects_barrier()
    patches = np.asarray(prompts.patches.image_id) > 0

    def real(stage, value):
        if "merger" in stage:
            return value[patches[:, ::4]]
        return value[patches if stage.startswith("vision") else batch.valid]

    return {k: [real(k, v) for v in values] for k, values in record.values.items()}


def reference_stages(pair: Pair, batch) -> dict[str, list[np.ndarray]]:
    record, model = Recorder(), pair.torch_model
    hooks = []

    def hook(module, listen):
        hooks.append(module.register_forward_hook(lambda _, args, out: listen(args, out)))

    def block(name):
        def listen(args, out):
            record(f"{name} in", args[0])
            record(f"{name} out", out)

        return listen

    visual, language = model.model.visual, model.model.language_model
    for module in visual.blocks:
        hook(module, block("vision block"))
    for module in language.layers:
        hook(module, block("decoder layer"))
    hook(visual.merger, lambda _, out: record("merger", out))
    for module in visual.deepstack_merger_list:
        hook(module, lambda _, out: record("deepstack merger", out))
    hook(language.norm, lambda _, out: record("final norm", out))
    hook(model.lm_head, lambda _, out: record("logits", out))
    eager = hf_module.eager_attention_forward

    def attention(module, query, key, value, *args, **kwargs):
        out = eager(module, query, key, value, *args, **kwargs)
        name = "vision" if isinstance(module, hf_module.Qwen3VLVisionAttention) else "decoder"
        for part, heads_first in {"query": query, "key": key, "value": value}.items():
            record(f"{name} {part}", heads_first.transpose(1, 2))
        record(f"{name} attended", out[0])
        return out

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(hf_module, "eager_attention_forward", attention)
        model(**batch.torch())
    for handle in hooks:
        handle.remove()
    images = len(batch.image_grid_thw)

    def real(stage, values):
        if stage.startswith(("vision block", "merger", "deepstack")):
            return values
        if stage.startswith("vision"):  # called once for each image
            calls = [v[0] for v in values]
            return [np.concatenate(calls[i : i + images]) for i in range(0, len(calls), images)]
        return [v[batch.valid] for v in values]

    return {stage: real(stage, values) for stage, values in record.values.items()}


@pytest.mark.parametrize("name", ["left padding", "strips"])
def test_every_stage_equals_the_reference(pair, name):
    batch = scenario(name, pair.patch_dim)
    actual, expected = port_stages(pair, batch), reference_stages(pair, batch)
    vision, text = pair.model.config.vision, pair.model.config.text
    attention = ("query", "key", "value", "attended")
    assert {stage: len(values) for stage, values in actual.items()} == {
        "vision block in": vision.depth,
        "vision block out": vision.depth,
        **{f"vision {part}": vision.depth for part in attention},
        "merger": 1,
        "deepstack merger": len(vision.deepstack_visual_indexes),
        "decoder layer in": text.num_hidden_layers,
        "decoder layer out": text.num_hidden_layers,
        **{f"decoder {part}": text.num_hidden_layers for part in attention},
        "final norm": 1,
        "logits": 1,
    }
    errors = {
        f"{stage} {i}": relative_l2(*pair_of_values)
        for stage in actual
        for i, pair_of_values in enumerate(zip(actual[stage], expected[stage], strict=True))
    }
    print(f"{len(errors)} stages, at most {max(errors.values()):.1e}")
    assert {stage: error for stage, error in errors.items() if not error <= GATE} == {}
