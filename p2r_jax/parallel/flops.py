"""Matrix-product FLOPs of a function, exactly and without compiling or running it.

The compiler's own count (`compiled.cost_analysis()`) counts the body of a scan once and a Pallas
kernel by its estimate; here the traced program (jaxpr) is walked instead. One multiply-add is two
FLOPs. Only `dot_general` and `conv_general_dilated` count: elementwise work, reductions and
softmax are left out. Numbers are for the whole program, all devices together: partitioning by
sharding does not change a jaxpr, and what `shard_map` runs on every shard is multiplied by the
number of shards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

KernelFlops = Callable[[JaxprEqn], float | None]


def matmul_flops(
    function: Callable[..., Any] | ClosedJaxpr,
    *args: Any,
    trips: int | None = None,
    kernel_flops: KernelFlops | None = None,
    **kwargs: Any,
) -> float:
    """Matrix-product FLOPs of `function(*args, **kwargs)`; see `matmuls`."""
    counts = matmuls(function, *args, trips=trips, kernel_flops=kernel_flops, **kwargs)
    return float(sum(counts.values()))


def matmuls(
    function: Callable[..., Any] | ClosedJaxpr,
    *args: Any,
    trips: int | None = None,
    kernel_flops: KernelFlops | None = None,
    **kwargs: Any,
) -> Counter[str]:
    """FLOPs by kind and shapes of the product, e.g. "dot_general (64, 2048) × (2048, 6144)".

    function: what to trace with the arguments (arrays or `jax.ShapeDtypeStruct`s), or a jaxpr.
        Arguments that are not arrays need a `jax.jit` with static arguments around the function.
    trips: times that every `while` loop runs whose trip count is only known at run time (a `scan`
        and a `fori_loop` with constant bounds have a length of their own). Without it such a loop
        is an error if it multiplies matrices.
    kernel_flops: FLOPs of one call of a Pallas kernel (its equation, which names the kernel and
        its operands), or None for the kernel's own `cost_estimate`. It is an error if neither
        says.

    Work whose result nobody uses does not count (the compiler drops it as well), recomputation
    under `jax.checkpoint` does. Of the branches of a `cond` the most expensive counts.
    """
    if isinstance(function, ClosedJaxpr):
        jaxpr = function.jaxpr
    else:
        traceable = function if hasattr(function, "trace") else jax.jit(function)
        jaxpr = traceable.trace(*args, **kwargs).jaxpr.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(jaxpr, trips, kernel_flops)


def _count(jaxpr: Jaxpr, trips: int | None, kernel_flops: KernelFlops | None) -> Counter[str]:
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _PRODUCTS:
            lhs, rhs = (_shape(var) for var in eqn.invars[:2])
            total[f"{name} {lhs} × {rhs}"] += _PRODUCTS[name](eqn)
        elif name == "pallas_call":
            total[f"{name} {_kernel_name(eqn)}"] += _kernel(eqn, kernel_flops)
        elif name.startswith("ragged_dot"):
            raise ValueError(f"{name} cannot be counted: its FLOPs depend on group sizes (data)")
        else:
            inner = [_count(j, trips, kernel_flops) for j in jaxprs_in_params(eqn.params)]
            if name == "cond":
                inner = [max(inner, key=lambda counts: sum(counts.values()))]
            times = _times(eqn, trips) if any(inner) else 1
            for counts in inner:
                for key, flops in counts.items():
                    total[key] += times * flops
    return total


def _times(eqn: JaxprEqn, trips: int | None) -> int:
    """How often the programs inside an equation run, over all devices."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "while" if trips is None:
            raise ValueError("a while loop multiplies matrices: pass trips=, how often it runs")
        case "while":
            return trips or 0
        case "shard_map":
            # Renamed between JAX 0.9 and 0.10; the axes that are manual in here and not outside.
            renamed = "newly_manual_axes" in eqn.params
            axes = eqn.params["newly_manual_axes" if renamed else "manual_axes"]
            return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    return 1


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _dot(eqn: JaxprEqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    shape = _shape(eqn.invars[0])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(shape[d] for d in contracting)


def _convolution(eqn: JaxprEqn) -> int:
    """Every tap of the window counts, those that meet padding or dilation included."""
    kernel = _shape(eqn.invars[1])
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // out_features


_PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
}


def _kernel_name(eqn: JaxprEqn) -> str:
    return str(eqn.params.get("name_and_src_info") or eqn.params.get("name")).split(" at ")[0]


def _kernel(eqn: JaxprEqn, kernel_flops: KernelFlops | None) -> int:
    flops = kernel_flops(eqn) if kernel_flops is not None else None
    if flops is not None:
        return int(flops)
    # Not by walking the kernel: a grid may skip blocks, which is often why the kernel exists.
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        raise ValueError(
            f"the Pallas kernel {_kernel_name(eqn)} has no cost_estimate: give it one, "
            "or pass kernel_flops="
        )
    return int(estimate.flops)
