"""Compile the update of a real size for a TPU slice that is not there; print its memory on a chip.

    python -m tests.benchmarks.compile_update --size 2B --chips v5e:4x4 --prompts 16

Takes minutes and no accelerator. The compiler comes with `make test`, or from libtpu.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.compilers import FOLDER

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.append(str(FOLDER))

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.config import LossConfig, OptimizerConfig
from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.mesh import BATCH_AXES, parameter_shardings
from p2r_jax.parallel.topology import tpu_mesh
from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.inputs import Patches, Prompts
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.step import Objective, TrainingBatch, TrainState, layout_of, train_step

CONFIGS = Path(__file__).parents[1] / "qwen3_vl" / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2B", choices=["2B", "4B", "8B", "32B"])
    parser.add_argument("--chips", default="v5e:4x4")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--kernels", default="pallas_tpu", choices=["pallas_tpu", "xla"])
    for name, value in (("prompts", 16), ("group", 8), ("response", 64), ("prompt", 2560)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--patches", type=int, default=8192)
    parser.add_argument("--microbatches", type=int, default=1)
    args = parser.parse_args()

    mesh = tpu_mesh(args.chips, data=1, fsdp=-1, tensor=args.tensor)
    config = Qwen3VLConfig.from_hf(json.loads((CONFIGS / f"config_{args.size}.json").read_text()))
    graph, weights = nnx.split(abstract_model(config, Kernels(args.kernels, mesh)), nnx.Param)
    params = jax.tree.map(
        lambda p, s: p.replace(
            jax.ShapeDtypeStruct(p.get_value().shape, jnp.float32, sharding=s.get_value())
        ),
        weights,
        parameter_shardings(weights, mesh),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    optimizer = make_optimizer(OptimizerConfig(), 10)
    whole = NamedSharding(mesh, PartitionSpec())
    # A moment has the path of its parameter at the end of its own, and lies where that does.
    by_path = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: Any, x: Any) -> Any:
        own = jax.tree_util.keystr(path)
        of = next((p.sharding for name, p in by_path.items() if own.endswith(name)), whole)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of)

    moments = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    state = TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))

    def rows(*shape: int, dtype: Any = jnp.int32, lead: tuple[int, ...] = ()) -> Any:
        where = NamedSharding(mesh, PartitionSpec(*[None] * len(lead), BATCH_AXES))
        return jax.ShapeDtypeStruct((*lead, args.prompts, *shape), dtype, sharding=where)

    size, group, response, patches = args.prompt, args.group, args.response, args.patches
    prompts = Prompts(
        tokens=rows(size),
        positions=rows(size, lead=(3,)),
        visual_slot=rows(size),
        valid=rows(size),
        next_position=rows(),
        patches=Patches(
            pixels=rows(patches, config.vision.patch_dim, dtype=jnp.float32),
            row_col=rows(patches, 2),
            image_id=rows(patches),
            pos_index=rows(patches, 4),
            pos_weight=rows(patches, 4, dtype=jnp.float32),
        ),
    )
    log_probs = rows(group, response, dtype=jnp.float32)
    batch = TrainingBatch(
        prompts,
        tokens=rows(group, response),
        mask=rows(group, response, dtype=bool),
        sampler_log_probs=log_probs,
        advantages=rows(group, dtype=jnp.float32),
        reference_log_probs=log_probs,
    )
    begin = time.perf_counter()
    compiled = train_step.lower(
        state,
        (batch,),
        None,
        jax.ShapeDtypeStruct((config.text.vocab_size,), bool, sharding=whole),
        graph=graph,
        optimizer=optimizer,
        objectives=(Objective(LossConfig(), horizon=response, microbatches=args.microbatches),),
        remat=True,
        dtype=jnp.bfloat16,
        layout=layout_of(state),
    ).compile()
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    kernels, seconds = compiled.as_text().count("tpu_custom_call"), time.perf_counter() - begin
    print(
        f"{args.size}, {args.prompts} prompts of {size} tokens, {group} completions of {response}, "
        f"{args.chips}: {total / 2**30:.2f} GiB a chip, of which weights, moments and batch "
        f"{memory.argument_size_in_bytes / 2**30:.2f}; {kernels} kernel calls; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
