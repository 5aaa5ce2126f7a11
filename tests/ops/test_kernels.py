"""One object chooses the implementation: all give the same numbers, spread over a mesh or not."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.hf import abstract_model
from tests.rounding import assert_close, judged
from tests.small_model import CONFIG

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, P, G, R, HEADS, KV_HEADS, WIDTH, LAYERS = 4, 16, 2, 8, 4, 2, 64, 3


def random(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(size):
    shapes = ((B, size, HEADS, WIDTH), *[(B, size, KV_HEADS, WIDTH)] * 2)
    return tuple(random(*shape, seed=i) for i, shape in enumerate(shapes))


VALID = jnp.asarray(np.arange(P) < np.array([[16], [3], [9], [1]])).astype(jnp.int32)
OWN_VALID = jnp.asarray(np.arange(R) < np.array([[8, 1], [3, 5], [0, 8], [8, 8]])[..., None])
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (B, P)), axis=1))
CACHES = tuple(
    tuple(random(LAYERS, B, KV_HEADS, *size, WIDTH, seed=s + i) for i in range(2))
    for s, size in ((10, (P,)), (20, (G, R)))
)
STEP = tuple(x[:, :G] for x in qkv(P))
CALLS = {
    "causal": (*qkv(P), VALID),
    "segments": (*qkv(P), SEGMENTS),
    "shared_prefix": (*qkv(P + G * R), VALID, OWN_VALID.astype(jnp.int32)),
    "decode": (*STEP, *CACHES, jnp.int32(1), VALID, OWN_VALID),
}
REAL = {
    "causal": VALID,
    "segments": jnp.ones((B, P)),
    "shared_prefix": jnp.concatenate([VALID, OWN_VALID.reshape(B, -1)], axis=1),
    "decode": jnp.ones((B, G)),
}


@pytest.fixture(scope="module")
def reference():
    """By name, the values and their gate."""
    # The longest sums are a score and, of all keys that are read, the values.
    terms = WIDTH + P + G * R
    return {
        name: judged(getattr(Kernels(), name), *args, terms=terms) for name, args in CALLS.items()
    }


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", ["xla_cpu", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=["one device", "eight devices"])
def test_all_implementations_agree(reference, name, implementation, mesh):
    kernels = Kernels(implementation, mesh and make_mesh(*mesh), interpret=True)
    real = np.asarray(REAL[name], bool)
    out = jax.jit(getattr(kernels, name))(*CALLS[name])
    expected, gate = reference[name]
    assert_close(out[real], expected[real], gate)
    if mesh and (name != "decode" or implementation != "xla_cpu"):
        expected = jax.P(("data", "fsdp"), None, "tensor")
        assert out.sharding.is_equivalent_to(NamedSharding(kernels.mesh, expected), out.ndim)


@pytest.mark.parametrize(
    "platform, count, chosen",
    [
        ("tpu", 8, "pallas_tpu"),
        ("gpu", 8, "pallas_gpu"),
        ("cpu", 1, "xla_cpu"),
        ("cpu", 2, "xla"),
    ],
)
def test_auto_is_what_suits_the_devices_of_the_mesh(platform, count, chosen):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device] * count))
    assert Kernels.choose("auto", mesh).implementation == chosen
    assert Kernels.choose("xla", mesh).implementation == "xla"


def test_auto_without_a_mesh_asks_the_default_device():
    assert Kernels.choose("auto", None) == Kernels("xla_cpu")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match="kernels 'cudnn': choose one of xla, xla_cpu, pallas_tpu, pallas_gpu"
    ):
        Kernels("cudnn")


def test_heads_that_the_mesh_cannot_split_are_refused_before_anything_is_loaded():
    kernels = Kernels("pallas_tpu", make_mesh(1, 1, 8))
    with pytest.raises(ValueError, match="tensor = 8 does not divide num_key_value_heads = 2"):
        abstract_model(CONFIG, kernels)
    abstract_model(CONFIG, Kernels("xla", make_mesh(1, 1, 8)))


def test_rows_that_the_mesh_cannot_split_are_computed_everywhere(reference):
    kernels = Kernels("pallas_tpu", make_mesh(2, 2, 2), interpret=True)
    q, k, v, valid = (x[:1] for x in CALLS["causal"])
    out = jax.jit(kernels.causal)(q, k, v, valid)
    expected, gate = reference["causal"]
    assert_close(out, expected[:1], gate)


class TestKeptActivations:
    """What a backward pass keeps of each layer."""

    @staticmethod
    def spec(shape, tensor=2):
        kernels = Kernels("xla", make_mesh(2, 4 // tensor, tensor))
        out = jax.jit(kernels.split_kept)(jnp.ones(shape)).sharding
        return out.spec if isinstance(out, NamedSharding) else ()

    def test_is_split_over_tensor_by_tokens(self):
        assert self.spec((4, 6, 8))[:2] == (("data", "fsdp"), "tensor")

    def test_stays_whole_where_tokens_do_not_divide(self):
        assert "tensor" not in self.spec((4, 7, 8))

    def test_rows_that_do_not_divide_are_everywhere(self):
        assert self.spec((3, 6, 8))[:2] == (None, "tensor")

    def test_without_a_mesh_nothing_is_said(self):
        x = jnp.ones((1, 2, 3))
        assert Kernels().split_kept(x) is x
