"""Logits and gradients of a small model on any mesh; as a program, in one of several processes:

    python -m tests.qwen3_vl.sharded_run FOLDER OUT PROCESS PROCESSES PORT

On each of PROGRAM_MESHES it loads FOLDER, writes what it computes, and how many numbers it read,
to OUT/MESH_PROCESS.npz, and takes part in saving the model to OUT/MESH, where MESH is such as
1x4x2.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from p2r_jax.config import DistributedConfig
from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.mesh import batch_sharding, make_mesh, parameter_shardings, replicated
from p2r_jax.parallel.multihost import put, start
from p2r_jax.qwen3_vl import Qwen3VL, Qwen3VLConfig, load_pretrained, save_pretrained
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.tensor_files import TensorFolder, TensorWriter
from tests.small_model import make_prompts

NAMES = (
    "three images", "text", "one image", "two images", "text", "one image", "three images", "text",
)  # fmt: skip
"""Eight rows, so that every mesh of eight devices can split them."""
PROGRAM_MESHES = ((1, 4, 2), (2, 2, 2))
"""(data, fsdp, tensor). Of two processes of four devices, each holds half of every parameter on
the first mesh, and all of them on the second."""
SHARD_BYTES = 30_000
"""Of the files that are written: several, in the middle of layers."""


def perturbed(config: Qwen3VLConfig) -> Qwen3VL:
    """A random model. Norms of one and biases of zero would hide that shards are mixed up."""
    graph, state = nnx.split(abstract_model(config))
    rng = np.random.default_rng(0)

    def one(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        centre = float("scale" in jax.tree_util.keystr(path))
        return jnp.asarray(centre + 0.2 * rng.normal(size=shape.shape), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(one, state))


def left_padded() -> tuple[Prompts, np.ndarray]:
    """The batch, and an advantage for each token that follows a real one."""
    prompts = jax.tree.map(np.asarray, make_prompts(NAMES, side="left"))
    advantages = np.random.default_rng(1).normal(size=(len(NAMES), 1)).astype(np.float32)
    return prompts, advantages * (prompts.valid[:, :-1] & prompts.valid[:, 1:])


def placed(batch: tuple[Prompts, np.ndarray], mesh: Mesh) -> tuple[Prompts, jax.Array]:
    prompts, weights = batch
    rows = batch_sharding(mesh)
    where = jax.tree.map(lambda _: rows, prompts)
    by_axis = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    where = dataclasses.replace(where, positions=by_axis)
    return jax.tree.map(put, prompts, where), put(weights, rows)


def on_mesh(model: Qwen3VL, mesh: Mesh, kernels: Kernels | None = None) -> Qwen3VL:
    """The same weights, split over a mesh."""
    graph, _ = nnx.split(abstract_model(model.config, kernels or Kernels("xla", mesh)))
    state = nnx.state(model)
    shardings = jax.tree.map(
        lambda variable: variable.get_value(),
        parameter_shardings(state, mesh),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return nnx.merge(graph, jax.device_put(state, shardings))


def logits_and_gradient(
    model: Qwen3VL, batch: tuple[Prompts, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits [B, P, V], and by path the gradient of -(sum of advantage x log-probability)."""
    logits, gradient = _run(*nnx.split(model, nnx.Param), *batch)
    flat = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(gradient)}
    return logits, flat


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph: nnx.GraphDef, params: nnx.State, prompts: Prompts, weights: jax.Array) -> Any:
    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        x, deepstack = model.embed_prompts(prompts, remat=True)
        hidden, _ = model.language_model(
            x,
            prompts.positions,
            lambda q, k, v, _: (model.kernels.causal(q, k, v, prompts.valid), None),
            deepstack=deepstack,
            visual_slot=prompts.visual_slot,
            remat=True,
        )
        logits = hidden @ model.unembedding.T
        log_probs = jax.nn.log_softmax(logits)[:, :-1]
        chosen = jnp.take_along_axis(log_probs, prompts.tokens[:, 1:, None], -1)[..., 0]
        return -(weights * chosen).sum(), logits

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradient


def title(mesh: tuple[int, int, int]) -> str:
    return "x".join(map(str, mesh))


def main(folder: str, out: str, process: str, processes: str, port: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    start(
        DistributedConfig(
            coordinator=f"localhost:{port}", processes=int(processes), process=int(process)
        )
    )
    read, counted = TensorFolder.read, []

    def count(folder: TensorFolder, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        tensor = read(folder, name, part)
        counted.append(tensor.size)
        return tensor

    TensorFolder.read = count  # type: ignore[method-assign]
    for sizes in PROGRAM_MESHES:
        mesh = make_mesh(*sizes)
        counted.clear()
        model = load_pretrained(folder, mesh, dtype="float32")
        logits, gradient = logits_and_gradient(model, placed(left_padded(), mesh))
        # One program, instead of one for each shape.
        whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(gradient | {"logits": logits})
        arrays = {name: np.asarray(x.addressable_data(0)) for name, x in whole.items()}
        numbers = {"numbers_read": np.int64(sum(counted))}
        np.savez(Path(out, f"{title(sizes)}_{process}.npz"), **arrays, **numbers)
        save_pretrained(
            model,
            Path(out, title(sizes)),
            files_from=folder,
            dtype="float32",
            max_shard_bytes=SHARD_BYTES,
        )
    # One process cannot write: both say so, nobody waits, and nothing is left.
    if process == "1":
        TensorWriter.write = _disk_full  # type: ignore[method-assign]
    try:
        save_pretrained(model, Path(out, "full"), files_from=folder, max_shard_bytes=SHARD_BYTES)
    except OSError as error:
        Path(out, f"full_{process}.txt").write_text(str(error))


def _disk_full(*_: object) -> None:
    raise OSError("disk full")


if __name__ == "__main__":
    main(*sys.argv[1:])
