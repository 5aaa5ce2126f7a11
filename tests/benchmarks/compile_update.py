"""Compile the update of real sizes for TPU slices that are not there; print its memory on a chip.

    python -m tests.benchmarks.compile_update                               # 2B on v5e:4x4
    python -m tests.benchmarks.compile_update --sizes 4B --prompts 32 --programs update
    python -m tests.benchmarks.compile_update --sizes 2B 4B 8B --chips v5e:4x4 v5p:2x2x2

Two programs of each size and slice, every one compiled in a process of its own:

    gradient    forward and backward pass of the policy loss: float32 weights in, gradients out
    update      the whole step, with AdamW's moments, as the trainer calls it

Takes minutes and no accelerator. The compiler comes with `make test`, or from libtpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from tests.compilers import FOLDER

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.append(str(FOLDER))

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from p2r_jax.config import LossConfig, OptimizerConfig
from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.mesh import BATCH_AXES, parameter_shardings
from p2r_jax.parallel.topology import tpu_mesh
from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.inputs import Patches, Prompts
from p2r_jax.rl.optimizer import make_optimizer
from p2r_jax.rl.step import (
    Objective,
    TrainingBatch,
    TrainState,
    batch_loss,
    layout_of,
    train_step,
)
from tests.benchmarks.sizes import SIZES, hf_config

PROGRAMS = ("gradient", "update")


def abstract_params(
    config: Qwen3VLConfig, kernels: str, mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State]:
    graph, weights = nnx.split(abstract_model(config, Kernels(kernels, mesh)), nnx.Param)
    params = jax.tree.map(
        lambda p, s: p.replace(
            jax.ShapeDtypeStruct(p.get_value().shape, jnp.float32, sharding=s.get_value())
        ),
        weights,
        parameter_shardings(weights, mesh),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return graph, params


def abstract_state(params: nnx.State, optimizer: Any, mesh: Mesh) -> TrainState:
    whole = NamedSharding(mesh, PartitionSpec())
    # A moment has the path of its parameter at the end of its own, and lies where that does.
    by_path = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: Any, x: Any) -> Any:
        own = jax.tree_util.keystr(path)
        of = next((p.sharding for name, p in by_path.items() if own.endswith(name)), whole)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of)

    moments = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    return TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


def abstract_batch(config: Qwen3VLConfig, args: argparse.Namespace, mesh: Mesh) -> TrainingBatch:
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
    return TrainingBatch(
        prompts,
        tokens=rows(group, response),
        mask=rows(group, response, dtype=bool),
        sampler_log_probs=log_probs,
        advantages=rows(group, dtype=jnp.float32),
        reference_log_probs=log_probs,
    )


def lower(program: str, args: argparse.Namespace, mesh: Mesh) -> Any:
    """The program on abstract arrays that lie on `mesh`."""
    config = Qwen3VLConfig.from_hf(hf_config(args.sizes[0]))
    graph, params = abstract_params(config, args.kernels, mesh)
    batch = abstract_batch(config, args, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    allowed = jax.ShapeDtypeStruct((config.text.vocab_size,), bool, sharding=whole)
    objective = Objective(LossConfig(), horizon=args.response, microbatches=args.microbatches)
    shared: dict[str, Any] = {"graph": graph, "remat": True, "dtype": jnp.bfloat16}
    if program == "update":
        optimizer = make_optimizer(OptimizerConfig(), 10)
        state = abstract_state(params, optimizer, mesh)
        return train_step.lower(
            state,
            (batch,),
            None,
            allowed,
            optimizer=optimizer,
            objectives=(objective,),
            layout=layout_of(state),
            **shared,
        )

    def gradient(params: nnx.State, batch: TrainingBatch, allowed: jax.Array) -> Any:
        def loss(params: nnx.State) -> jax.Array:
            count = batch.mask.sum().astype(jnp.float32)
            return batch_loss(
                params,
                batch=batch,
                allowed=allowed,
                count=count,
                objective=objective,
                freeze_vision=False,
                **shared,
            )[0]

        return jax.value_and_grad(loss)(params)

    out = (whole, jax.tree.map(lambda x: x.sharding, params))
    return jax.jit(gradient, out_shardings=out).lower(params, batch, allowed)


def compile_one(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of the first program, size and slice; GiB of one chip."""
    mesh = tpu_mesh(args.chips[0], data=1, fsdp=-1, tensor=args.tensor)
    begin = time.perf_counter()
    compiled = lower(args.programs[0], args, mesh).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    parts = {
        "total": total,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    return {name: part / 2**30 for name, part in parts.items()} | {
        "chips": mesh.size,
        "kernels": compiled.as_text().count("tpu_custom_call"),
        "seconds": seconds,
    }


def compile_apart(program: str, size: str, chips: str) -> dict[str, Any] | str:
    """`compile_one` in a process of its own; the last line of its error if it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.compile_update", *sys.argv[1:], "--one"]
    command += ["--programs", program, "--sizes", size, "--chips", chips]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", "--size", nargs="+", default=["2B"], choices=SIZES)
    parser.add_argument("--chips", nargs="+", default=["v5e:4x4"])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--kernels", default="pallas_tpu", choices=["pallas_tpu", "xla"])
    for name, value in (("prompts", 16), ("group", 8), ("response", 64), ("prompt", 2560)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--patches", type=int, default=8192)
    parser.add_argument(
        "--microbatches", type=int, default=1, help="of the update; a gradient is of one"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(compile_one(args)))
        return
    print(
        f"{args.prompts} prompts of {args.prompt} tokens and {args.patches} patches, {args.group} "
        f"completions of {args.response}; bfloat16 on float32 weights, kernels {args.kernels}; "
        "GiB a chip\n"
        f"{'size':5} {'slice':11} {'chips':>5} {'program':9} | {'total':>6} = {'arguments':>9} + "
        f"{'results':>7} + {'temporary':>9} | {'kernels':>7} {'seconds':>7}"
    )
    failed = False
    for size in args.sizes:
        for chips in args.chips:
            for program in args.programs:
                own = compile_apart(program, size, chips)
                if isinstance(own, str):
                    failed = True
                    print(f"{size:5} {chips:11} {'':5} {program:9} | FAILED {own}", flush=True)
                    continue
                print(
                    f"{size:5} {chips:11} {own['chips']:5} {program:9} | {own['total']:6.2f} = "
                    f"{own['arguments']:9.2f} + {own['results']:7.2f} + {own['temporary']:9.2f} | "
                    f"{own['kernels']:7} {own['seconds']:7.0f}",
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
