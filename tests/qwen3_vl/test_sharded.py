"""A model spread over devices and processes computes what it computes on one device.

Logits and every gradient, on a left-padded batch of rows with no, one, two and three images. Only
sums are taken in another order.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.hlo import collectives
from p2r_jax.parallel.mesh import RULES, batch_shards, make_mesh
from p2r_jax.qwen3_vl import Qwen3VL, forward_hf, load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.hf import abstract_model
from tests.qwen3_vl.reference import relative_l2
from tests.qwen3_vl.sharded_run import (
    NAMES,
    PROGRAM_MESHES,
    SHARD_BYTES,
    left_padded,
    logits_and_gradient,
    on_mesh,
    perturbed,
    placed,
    title,
)
from tests.rounding import STEP, allowance, moved
from tests.small_model import CONFIG, PROMPT_TOKENS, content

ROOT = Path(__file__).parents[2]
CONDITION = 20
"""By how much more logits and gradients move than the weights, relatively."""
GATE = allowance(len(NAMES) * PROMPT_TOKENS, CONDITION)
"""Relative L2, of the logits and of the gradient of every single parameter; the longest sum is a
gradient's over all tokens."""
SECONDS = 300


def odd_config(heads: int, kv_heads: int):
    """Few of its sizes divide by tensor = 2 or fsdp = 4."""
    text = dataclasses.replace(
        CONFIG.text,
        vocab_size=97,
        hidden_size=34,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=47,
    )
    vision = dataclasses.replace(
        CONFIG.vision, hidden_size=12, num_heads=3, intermediate_size=25, out_hidden_size=34
    )
    return dataclasses.replace(CONFIG, text=text, vision=vision)


class OneDevice(NamedTuple):
    """A model, where it is saved, and what it computes."""

    model: Qwen3VL
    folder: Path
    values: dict[str, np.ndarray]


def computed(model: Qwen3VL, batch) -> dict[str, np.ndarray]:
    """Logits, and the gradient of each parameter by path."""
    logits, gradient = logits_and_gradient(model, batch)
    return jax.tree.map(np.asarray, gradient | {"logits": logits})


def assert_equal_but_for_rounding(actual, expected) -> None:
    assert set(actual) == set(expected)
    errors = differences(actual, expected)
    assert {name: error for name, error in errors.items() if not error <= GATE} == {}


def differences(actual, expected) -> dict[str, float]:
    """Relative L2. Logits on padding are left out: they mean nothing."""
    real = left_padded()[0].valid.astype(bool)
    kept = lambda name, x: np.asarray(x)[real] if name == "logits" else x
    return {
        name: relative_l2(kept(name, actual[name]), kept(name, value))
        for name, value in expected.items()
    }


def on_one_device(config, folder: Path) -> OneDevice:
    model = perturbed(config)
    save_pretrained(model, folder, dtype="float32", max_shard_bytes=SHARD_BYTES)
    return OneDevice(model, folder, computed(model, left_padded()))


def condition(alone: OneDevice) -> float:
    graph, state = nnx.split(alone.model)
    other = computed(nnx.merge(graph, moved(state)), left_padded())
    return max(differences(other, alone.values).values()) / STEP


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> OneDevice:
    return on_one_device(CONFIG, tmp_path_factory.mktemp("one") / "model")


def test_the_gate_is_that_of_a_model_of_this_condition(one):
    assert 0.3 * CONDITION < condition(one) < CONDITION


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2)], ids=title
)
def test_eight_devices_compute_what_one_computes(one, sizes):
    mesh = make_mesh(*sizes)
    model, batch = on_mesh(one.model, mesh), placed(left_padded(), mesh)
    layers, blocks = model.language_model.layers, model.visual.blocks
    for parameter in (
        model.language_model.embed_tokens,
        layers.q_proj.kernel,
        layers.k_proj.kernel,
        layers.up_proj.kernel,
        blocks.qkv.kernel,
        blocks.fc1.kernel,
    ):
        value = parameter.get_value()
        parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
        assert {shard.data.size for shard in value.addressable_shards} == {value.size // parts}
    logits, gradient = logits_and_gradient(model, batch)
    # Rows stay apart: a device that computed all of them would be right, and of no use.
    assert logits.sharding.shard_shape(logits.shape)[0] == len(logits) // batch_shards(mesh)
    assert_equal_but_for_rounding(gradient | {"logits": logits}, one.values)


def test_forward_only_weights_travel(one):
    """Not activations: split by width, as weights are, they would be summed up in every layer."""
    mesh = make_mesh(fsdp=8)
    graph, params = nnx.split(on_mesh(one.model, mesh))
    prompts, _ = placed(left_padded(), mesh)
    forward = jax.jit(lambda params, prompts: nnx.merge(graph, params)(prompts))
    found = collectives(forward.lower(params, prompts).compile().as_text())
    assert {c.kind for c in found} <= {"all-gather", "all-to-all"}
    # The look-up of tokens finds a slice of each row on each device, and puts them together.
    rows, width = prompts.tokens.shape[0] // 8, CONFIG.text.hidden_size
    moved = rows * prompts.tokens.shape[1] * width * 4
    assert all(c.bytes <= moved for c in found if c.kind == "all-to-all")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_so_they_do_with_the_kernels_of_an_accelerator(one, implementation):
    """Each device runs the kernel on its own rows and heads, forward and backward."""
    mesh = make_mesh(2, 2, 2)
    model = on_mesh(one.model, mesh, Kernels(implementation, mesh, interpret=True))
    assert_equal_but_for_rounding(computed(model, placed(left_padded(), mesh)), one.values)


def test_rows_that_the_mesh_cannot_split_are_computed_on_all_devices(one):
    names = ("text", "one image", "three images")
    tokens, grids, pixels = zip(*map(content, names), strict=True)
    size = max(map(len, tokens))
    ids, mask = np.zeros((2, len(names), size), np.int64)
    for row, own in enumerate(tokens):
        ids[row, size - len(own) :], mask[row, size - len(own) :] = own, 1
    thw = np.array([(1, *grid) for own in grids for grid in own])
    batch = (ids, mask, np.concatenate(pixels), thw)
    real = mask.astype(bool)
    expected, actual = (
        np.asarray(forward_hf(model, *batch))[real]
        for model in (one.model, on_mesh(one.model, make_mesh(2, 2, 2)))
    )
    assert relative_l2(actual, expected) <= GATE


class TestSizesThatDoNotDivide:
    """The partitioner could pad them; here such a dimension is held whole by every device."""

    @pytest.mark.parametrize(
        "heads, kv_heads", [(4, 1), (6, 3)], ids=["one kv head", "three kv heads"]
    )
    def test_they_are_held_whole_and_nothing_changes(self, tmp_path, heads, kv_heads):
        alone = on_one_device(odd_config(heads, kv_heads), tmp_path / "model")
        mesh = make_mesh(1, 4, 2)
        model = load_pretrained(alone.folder, mesh, dtype="float32")
        split = collections.defaultdict(set)
        for _, parameter in nnx.to_flat_state(nnx.state(model)):
            axes, value = parameter.get_metadata()["axes"], parameter.get_value()
            for axis, where in zip(axes[::-1], value.sharding.spec[::-1], strict=False):
                split[axis].add(where)
        whole = {axis for axis in RULES if axis is not None and split[axis] == {None}}
        assert whole == {"embed", "vocab", "kv_heads", "vision_heads", "mlp"}
        assert split["heads"] == {"tensor"}
        assert split["vision_embed"] == {"fsdp"}
        assert condition(alone) < CONDITION
        assert_equal_but_for_rounding(computed(model, placed(left_padded(), mesh)), alone.values)

    @pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
    @pytest.mark.parametrize(
        "part, field, name",
        [
            ("text", "num_key_value_heads", "num_key_value_heads = 1"),
            ("vision", "num_heads", "vision_num_heads = 1"),
        ],
    )
    def test_kernels_refuse_heads_that_they_would_have_to_halve(
        self, implementation, part, field, name
    ):
        changed = dataclasses.replace(getattr(CONFIG, part), **{field: 1})
        config = dataclasses.replace(CONFIG, **{part: changed})
        with pytest.raises(ValueError, match=f"mesh.tensor = 2 does not divide {name}"):
            abstract_model(config, Kernels(implementation, make_mesh(1, 4, 2)))
        abstract_model(config, Kernels(implementation, make_mesh(1, 8, 1)))


@pytest.fixture(scope="module")
def two_processes(one, tmp_path_factory) -> Path:
    """The folder that two processes of four devices have written to."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "tests.qwen3_vl.sharded_run", str(one.folder), str(out)]
    logs = [out / f"{i}.log" for i in range(2)]
    processes = []
    try:
        for i, log in enumerate(logs):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [*command, str(i), "2", str(port)],
                        cwd=ROOT,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                    )
                )
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return out


@pytest.mark.parametrize("sizes", PROGRAM_MESHES, ids=title)
class TestTwoProcesses:
    @pytest.mark.parametrize("process", [0, 1])
    def test_each_gets_what_one_device_computes(self, one, two_processes, sizes, process):
        with np.load(two_processes / f"{title(sizes)}_{process}.npz") as values:
            computed = {name: x for name, x in values.items() if name != "numbers_read"}
            assert_equal_but_for_rounding(computed, one.values)

    def test_each_reads_what_its_devices_hold(self, one, two_processes, sizes):
        """Half of what is split over both of them on the first mesh, everything on the second."""
        whole = sum(x.size for x in jax.tree.leaves(nnx.state(one.model)))
        read = [
            int(np.load(two_processes / f"{title(sizes)}_{i}.npz")["numbers_read"]) for i in (0, 1)
        ]
        if sizes == (2, 2, 2):
            assert read == [whole, whole]
        else:
            assert max(read) < 0.6 * whole
            assert sum(read) >= whole

    def test_together_they_write_the_folder_they_read(self, one, two_processes, sizes):
        """Byte for byte: every tensor, which file it is in, index and config."""
        written = files(two_processes / title(sizes))
        expected = files(one.folder)
        assert len([name for name in expected if name.endswith(".safetensors")]) > 3
        assert written.keys() == expected.keys()
        assert [name for name in expected if written[name] != expected[name]] == []


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_if_one_cannot_write_both_say_so_and_nothing_is_left(two_processes):
    said = [(two_processes / f"full_{i}.txt").read_text() for i in (0, 1)]
    assert "another process could not write its part" in said[0]
    assert said[1] == "disk full"
    assert not [path for path in two_processes.iterdir() if path.name in ("full", ".full.partial")]
