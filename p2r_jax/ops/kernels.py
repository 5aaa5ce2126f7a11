"""Which implementation of attention and image ops runs, on which mesh: the one place that chooses.

    xla           reference implementations (`ops.attention`), spread out by the partitioner
    xla_cpu       the same, ordered for one CPU (`ops.cpu_attention`); decoding as in xla
    pallas_tpu    splash attention and our decode kernel (`ops.splash`, `ops.decode_kernel`), our
                  kernel for evidence images (`ops.image_kernel`)
    pallas_gpu    our Triton kernels, for prompts, vision and updates (`ops.triton_attention`) and
                  for decoding (`ops.triton_decode`)

A kernel is a black box to the partitioner, so each runs under `shard_map`: rows over `data` and
`fsdp`, heads over `tensor`, and every device works on its own share. Letters as in `ops.attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops import attention as xla
from p2r_jax.ops import (
    cpu_attention,
    decode_kernel,
    image,
    image_kernel,
    splash,
    triton_attention,
    triton_decode,
)
from p2r_jax.parallel.mesh import BATCH_AXES, batch_shards

Implementation = Literal["xla", "xla_cpu", "pallas_tpu", "pallas_gpu"]
BY_PLATFORM: dict[str, Implementation] = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
_MODULES: dict[str, ModuleType] = {
    "xla_cpu": cpu_attention,
    "pallas_tpu": splash,
    "pallas_gpu": triton_attention,
}
_DECODING: dict[str, ModuleType] = {"pallas_tpu": decode_kernel, "pallas_gpu": triton_decode}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Attention in its four shapes. Hashable: part of a model's static structure."""

    implementation: Implementation = "xla"
    mesh: Mesh | None = None
    interpret: bool = False
    """Run Pallas kernels in Python on any machine: for tests."""

    def __post_init__(self) -> None:
        names = get_args(Implementation)
        if self.implementation not in names:
            raise ValueError(f"kernels {self.implementation!r}: choose one of {', '.join(names)}")

    @classmethod
    def choose(cls, name: Implementation | Literal["auto"], mesh: Mesh | None) -> Kernels:
        """`auto` is what suits the platform of the mesh's devices, and their number."""
        if name != "auto":
            return cls(name, mesh)
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        alone: Implementation = "xla_cpu" if len(devices) == 1 else "xla"
        return cls(BY_PLATFORM.get(devices[0].platform, alone), mesh)

    def check_heads(self, **heads: int) -> None:
        """Raise ValueError if a kernel could not give every device of `tensor` whole heads."""
        if self.implementation == "xla" or self.mesh is None:
            return
        for name, count in heads.items():
            if count % self.mesh.shape["tensor"]:
                raise ValueError(
                    f"mesh.tensor = {self.mesh.shape['tensor']} does not divide {name} = {count}, "
                    "which the kernels need: choose a divisor and put the other devices on "
                    "mesh.fsdp, or choose kernels: xla"
                )

    def image_ops(self, patch_size: int) -> image.Implementation:
        """What `ops.image` draws, crops and resizes with; our TPU kernel knows one patch size."""
        if self.implementation != "pallas_tpu" or patch_size != image_kernel.PATCH:
            return "xla"
        return "pallas_tpu_interpret" if self.interpret else "pallas_tpu"

    def pin_rows(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Activations on the devices that own their rows.

        Left to itself the partitioner may split widths instead, as weights are split, and then
        every device computes all rows and sums them up in every layer.
        """
        return self._pin(x, PartitionSpec(self._row_axes(x.shape[0])))

    def pin_whole(self, table: Float[Array, "..."]) -> Float[Array, "..."]:
        """A small table on every device, so that each looks up its own rows and no others."""
        return self._pin(table, PartitionSpec())

    def split_kept(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        """What a backward pass keeps of every layer, tokens split over `tensor`.

        Between layers nothing needs whole sequences, so a sum over `tensor` becomes a scatter and a
        gather of the same bytes, and a device keeps its share only (sequence parallelism,
        arXiv 2205.05198). Sequences that do not divide stay whole.
        """
        if self.mesh is None or x.shape[1] % self.mesh.shape["tensor"]:
            return x
        return self._pin(x, PartitionSpec(self._row_axes(x.shape[0]), "tensor"))

    def _pin(self, x: Array, spec: PartitionSpec) -> Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def causal(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        valid: Int[Array, "B S"],
    ) -> Float[Array, "B S H D"]:
        """Prefill: see `ops.attention.causal_attention`."""
        return self._rows("causal_attention", q, k, v, valid)

    def segments(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        segment: Int[Array, "B S"],
    ) -> Float[Array, "B S H D"]:
        """Vision: see `ops.attention.segment_attention`."""
        return self._rows("segment_attention", q, k, v, segment)

    def shared_prefix(
        self,
        q: Float[Array, "B P+G*R H D"],
        k: Float[Array, "B P+G*R K D"],
        v: Float[Array, "B P+G*R K D"],
        prompt_valid: Int[Array, "B P"],
        completion_valid: Int[Array, "B G R"],
    ) -> Float[Array, "B P+G*R H D"]:
        """Update: see `ops.attention.shared_prefix_attention`."""
        return self._rows("shared_prefix_attention", q, k, v, prompt_valid, completion_valid)

    def decode(
        self,
        q: Float[Array, "B G H D"],
        k_new: Float[Array, "B G K D"],
        v_new: Float[Array, "B G K D"],
        prefix: tuple[Float[Array, "L B K P D"], Float[Array, "L B K P D"]],
        suffix: tuple[Float[Array, "L B K G C D"], Float[Array, "L B K G C D"]],
        layer: Int[Array, ""],
        prefix_valid: Int[Array, "B P"],
        suffix_valid: Bool[Array, "B G C"],
    ) -> Float[Array, "B G H D"]:
        """Rollout, on the caches of all layers: see `ops.attention.decode_attention`."""
        if self.implementation not in _DECODING:
            own = lambda cache: jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
            prefix, suffix = jax.tree.map(own, (prefix, suffix))
            return xla.decode_attention(q, k_new, v_new, prefix, suffix, prefix_valid, suffix_valid)

        module = _DECODING[self.implementation]
        run = functools.partial(module.decode_attention, interpret=self.interpret)

        rows = self._row_axes(q.shape[0])
        heads, cache = PartitionSpec(rows, None, "tensor"), PartitionSpec(None, rows, "tensor")
        masks = PartitionSpec(rows)
        specs = (heads,) * 3 + ((cache,) * 2,) * 2 + (PartitionSpec(), masks, masks)
        inputs = q, k_new, v_new, prefix, suffix, layer, prefix_valid, suffix_valid
        return self._spread(run, specs, heads)(*inputs)

    def _rows(self, name: str, q: Array, k: Array, v: Array, *masks: Array) -> Array:
        if self.implementation == "xla":
            return getattr(xla, name)(q, k, v, *masks)
        function = getattr(_MODULES[self.implementation], name)
        options = {} if self.implementation == "xla_cpu" else {"interpret": self.interpret}
        run = functools.partial(function, **options)

        rows = self._row_axes(q.shape[0])
        heads = PartitionSpec(rows, None, "tensor")
        specs = (heads,) * 3 + (PartitionSpec(rows),) * len(masks)
        return self._spread(run, specs, heads)(q, k, v, *masks)

    def _row_axes(self, rows: int) -> tuple[str, ...] | None:
        """Few rows that do not divide over the devices are computed on all of them."""
        divides = self.mesh is None or rows % batch_shards(self.mesh) == 0
        return BATCH_AXES if divides else None

    def _spread(
        self, run: Callable[..., Array], specs: Any, out: PartitionSpec
    ) -> Callable[..., Array]:
        if self.mesh is None:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
