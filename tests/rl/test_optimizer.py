"""The optimizers: torch's AdamW to rounding, Adafactor's few bytes, and where their state lies."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from p2r_jax.config import OptimizerConfig
from p2r_jax.parallel.mesh import make_mesh, parameter_shardings
from p2r_jax.qwen3_vl import Qwen3VLConfig
from p2r_jax.qwen3_vl.hf import abstract_model
from p2r_jax.qwen3_vl.published import published
from p2r_jax.rl.memory import opt_state_bytes
from p2r_jax.rl.optimizer import learning_rate, make_optimizer, make_schedule
from p2r_jax.rl.step import new_state
from tests.rounding import UNIT, allowance
from tests.small_model import make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

ADAMW = OptimizerConfig()
"""The authors' numbers."""
ADAFACTOR = OptimizerConfig(name="adafactor")
BOTH = pytest.mark.parametrize("config", [ADAMW, ADAFACTOR], ids=lambda c: c.name)

SHAPES = {"kernel": (4, 160, 256), "norm": (4, 160), "heads": (4, 160, 2, 128)}
"""Four stacked layers; all but the norm are large enough for Adafactor's means."""

SPECS = {
    "kernel": PartitionSpec(None, "fsdp", "tensor"),
    "norm": PartitionSpec(None, "fsdp"),
    "heads": PartitionSpec(None, "fsdp", "tensor", None),
}


def make_tree(seed: int, scale: float = 1.0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.normal(size=s)).astype(dtype) for k, s in SHAPES.items()}


def run(config: OptimizerConfig, params, gradients, updates: int = 100):
    """Parameters and state after these gradients."""
    optimizer = make_optimizer(config, updates)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradient):
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    for gradient in gradients:
        params, state = update(params, state, gradient)
    return params, state


def distance(a, b) -> float:
    """Norm of all differences together."""
    return math.sqrt(
        sum(
            float(np.square(np.float64(x) - np.float64(y)).sum())
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    )


def gate(after, before, updates: int) -> float:
    """The distance that rounding makes: of the weights after each update, and of the updates, whose
    longest sums that matter are Adafactor's means. (A norm of other length changes no update.)"""
    size = distance(before, jax.tree.map(np.zeros_like, before))
    longest = max(max(shape) for shape in SHAPES.values())
    return updates * UNIT * size + allowance(longest) * distance(after, before)


def leaf_sharding(x: jax.Array) -> NamedSharding:
    assert isinstance(x.sharding, NamedSharding)
    return x.sharding


class TestAdamW:
    @pytest.mark.parametrize("rate", [1e-6, 1e-2])
    def test_equals_torch(self, rate):
        """In float64, where the weights do not swallow a step of 1e-6. Gradients are small and
        large against eps, and of a norm on both sides of the clip."""
        shapes = {"a": (3, 5), "b": (40,)}
        rng = np.random.default_rng(0)
        start = {k: rng.normal(size=s) for k, s in shapes.items()}
        size = {"a": 1.0, "b": 1e-8}
        gradients = [
            {k: norm * size[k] / 4 * rng.normal(size=s) for k, s in shapes.items()}
            for norm in (0.3, 5.0, 0.1, 40.0, 1.0, 0.5, 2.0, 0.2)
        ]
        norms = [math.sqrt(sum(np.square(g).sum() for g in x.values())) for x in gradients]
        assert min(norms) < 1 < max(norms)

        theirs = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in start.items()}
        optimizer = torch.optim.AdamW(
            theirs.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
        )
        for gradient in gradients:
            for k, p in theirs.items():
                p.grad = torch.tensor(gradient[k])
            torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
            optimizer.step()
        config = dataclasses.replace(ADAMW, learning_rate=rate)
        with jax.enable_x64(True):
            ours, _ = run(config, start, gradients)
            ours = jax.tree.map(np.asarray, ours)
        for k, p in theirs.items():
            moved, expected = ours[k] - start[k], p.detach().numpy() - start[k]
            error = np.linalg.norm(moved - expected) / np.linalg.norm(expected)
            assert error <= 1e-6, (k, error)

    def test_a_bfloat16_first_moment_stays_near_float32(self):
        start = make_tree(0)
        gradients = [make_tree(seed, 0.01) for seed in range(1, 21)]
        config = dataclasses.replace(ADAMW, learning_rate=1e-2)
        rounded = dataclasses.replace(config, moment_dtype="bfloat16")
        whole, state = run(config, start, gradients)
        near, rounded_state = run(rounded, start, gradients)

        def dtypes(state, name):
            return {str(x.dtype) for x in jax.tree.leaves(optax.tree.get(state, name))}

        assert dtypes(state, "mu") == dtypes(state, "nu") == {"float32"}
        assert dtypes(rounded_state, "mu") == {"bfloat16"}
        assert dtypes(rounded_state, "nu") == {"float32"}
        # It is rounded by up to 2^-9 each time, and remembers the last ten or so.
        assert 0 < distance(near, whole) < 10 * 2**-9 * distance(whole, start)

    def test_the_second_moment_of_bfloat16_weights_is_float32(self):
        """In bfloat16 it could not follow gradients that shrink: 0.999 of it rounds to itself."""
        start = make_tree(0, dtype=jnp.bfloat16)
        gradients = [make_tree(1, 0.01, jnp.bfloat16)] + 8 * [make_tree(1, 0.0, jnp.bfloat16)]
        params, state = run(ADAMW, start, gradients)
        assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
        moments = {k: optax.tree.get(state, k) for k in ("mu", "nu")}
        assert {str(x.dtype) for x in jax.tree.leaves(moments)} == {"float32"}
        _, first = run(ADAMW, start, gradients[:1])
        for after, before in zip(
            jax.tree.leaves(moments["nu"]),
            jax.tree.leaves(optax.tree.get(first, "nu")),
            strict=True,
        ):
            np.testing.assert_allclose(after, 0.999**8 * np.asarray(before), rtol=1e-5)


class TestAdafactor:
    def test_is_optax_s_but_for_the_decay(self):
        start = make_tree(0)
        gradients = [make_tree(seed, 0.01) for seed in range(1, 5)]
        config = dataclasses.replace(
            ADAFACTOR, learning_rate=1e-2, weight_decay=0.0, warmup_steps=2, final_fraction=0.1
        )
        ours, _ = run(config, start, gradients)
        schedule = make_schedule(config, 100)
        optimizer = optax.chain(
            optax.clip_by_global_norm(config.grad_clip),
            optax.adafactor(schedule, multiply_by_parameter_scale=False),
        )
        theirs = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(theirs)
        for gradient in gradients:
            change, state = optimizer.update(gradient, state, theirs)
            theirs = optax.apply_updates(theirs, change)
        assert distance(ours, theirs) < gate(theirs, start, len(gradients))

    def test_no_step_is_larger_than_the_learning_rate(self):
        """So the rate means what it does for AdamW; weights of another size change nothing."""
        start = make_tree(0, 100.0)
        config = dataclasses.replace(ADAFACTOR, learning_rate=1.0, weight_decay=0.0)
        after, _ = run(config, start, [make_tree(1)])
        for name, weights in start.items():
            rms = np.sqrt(np.square(np.asarray(after[name]) - weights).mean())
            assert 0.9 < rms < 1.01, name

    def test_takes_next_to_no_memory(self):
        params = make_tree(0)
        kernels = sum(math.prod(SHAPES[k]) for k in ("kernel", "heads"))
        norm = math.prod(SHAPES["norm"])
        counters = 8
        assert opt_state_bytes(ADAMW, params) == 8 * (kernels + norm) + counters
        rounded = dataclasses.replace(ADAMW, moment_dtype="bfloat16")
        assert opt_state_bytes(rounded, params) == 6 * (kernels + norm) + counters
        assert opt_state_bytes(ADAFACTOR, params) < 0.02 * 4 * kernels + 4 * norm

    @BOTH
    def test_the_bytes_are_those_of_the_state(self, config):
        params = jax.tree.map(jnp.asarray, make_tree(0))
        state = make_optimizer(config, 3).init(params)
        assert opt_state_bytes(config, params) == sum(x.nbytes for x in jax.tree.leaves(state))

    def test_bytes_of_a_real_size(self):
        """Qwen3-VL-4B. Its vision heads are narrower than 128: their moment is kept in full."""
        hf = published("4B")
        params = nnx.state(abstract_model(Qwen3VLConfig.from_hf(hf)), nnx.Param)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        assert opt_state_bytes(ADAMW, params) == 8 * count + 8
        assert opt_state_bytes(ADAFACTOR, params) < 0.08 * 8 * count
        frozen = dataclasses.replace(ADAFACTOR, freeze_vision=True)
        assert opt_state_bytes(frozen, params) < 0.002 * 8 * count

    def test_layers_of_a_stack_share_the_clipping_but_no_moments(self):
        calm = make_tree(1, 1e-4)
        jump = jax.tree.map(np.copy, calm)
        for gradient in jump.values():
            gradient[0] *= 100
        config = dataclasses.replace(ADAFACTOR, learning_rate=1.0, weight_decay=0.0, grad_clip=1e9)
        before, state = run(config, make_tree(0), 9 * [calm])
        moments = optax.tree.get(state, "v_row"), optax.tree.get(state, "v_col")
        assert [x["kernel"].shape for x in moments] == [(4, 160), (4, 256)]
        # One scalar each where nothing is factored.
        assert [x["norm"].shape for x in moments] == [(1,), (1,)]
        usual, usual_state = run(config, make_tree(0), 10 * [calm])
        after, after_state = run(config, make_tree(0), [*(9 * [calm]), jump])
        for name in ("v_row", "v_col"):
            a, b = (optax.tree.get(s, name)["kernel"] for s in (usual_state, after_state))
            np.testing.assert_array_equal(a[1:], b[1:])
            assert (a[0] != b[0]).all()
        steps = [(x["kernel"] - before["kernel"])[1:] for x in (usual, after)]
        ratio = np.linalg.norm(steps[1]) / np.linalg.norm(steps[0])
        assert 0.1 < ratio < 0.9
        assert distance(steps[1], ratio * steps[0]) < 1e-4 * np.linalg.norm(steps[1])


class TestBoth:
    @BOTH
    def test_a_loss_falls(self, config):
        """A regression through two stacked layers."""
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(64, 128)).astype(np.float32)
        truth = (0.1 * rng.normal(size=(2, 128, 128))).astype(np.float32)

        def output(weights):
            x = inputs
            for layer in range(2):
                x = jnp.tanh(x @ weights[layer])
            return x

        target = output(truth)
        loss = jax.jit(lambda w: jnp.square(output(w) - target).mean())
        weights = jnp.asarray(truth + (0.05 * rng.normal(size=truth.shape)).astype(np.float32))
        optimizer = make_optimizer(dataclasses.replace(config, learning_rate=2e-3), 100)
        state, losses = optimizer.init(weights), []
        for _ in range(30):
            value, gradient = jax.value_and_grad(loss)(weights)
            change, state = optimizer.update(gradient, state, weights)
            weights = optax.apply_updates(weights, change)
            losses.append(float(value))
        assert losses[-1] < 0.5 * losses[0]

    @BOTH
    def test_decay_is_the_learning_rate_times_weight_decay(self, config):
        """Without a gradient nothing else moves; the rate changes from one update to the next."""
        config = dataclasses.replace(
            config, learning_rate=0.5, weight_decay=0.2, warmup_steps=2, final_fraction=0.1
        )
        start = make_tree(0)
        after, _ = run(config, start, 5 * [make_tree(0, 0.0)], updates=6)
        rates = [learning_rate(config, 6, done) for done in range(5)]
        assert len(set(rates)) == 5
        kept = math.prod(1 - 0.2 * rate for rate in rates)
        for name, weights in start.items():
            np.testing.assert_allclose(after[name], kept * weights, rtol=1e-5)

    @BOTH
    def test_the_gradient_is_clipped_over_all_parameters(self, config):
        """Every gradient is counted as one of norm 1, however long: the moments show it."""
        params, gradient = make_tree(0), make_tree(1)
        norm = distance(gradient, make_tree(1, 0.0))
        short = jax.tree.map(lambda g: g / np.float32(norm), gradient)
        (_, clipped), (_, expected) = (run(config, params, [g]) for g in (gradient, short))
        for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)

    @BOTH
    def test_a_frozen_tower_stays_and_has_no_state(self, config):
        """Weight decay alone would move everything."""
        _, params = make_model()
        config = dataclasses.replace(config, learning_rate=0.1, weight_decay=0.1)
        frozen = dataclasses.replace(config, freeze_vision=True)
        start = jax.tree.map(np.asarray, params)
        gradients = 3 * [jax.tree.map(jnp.ones_like, params)]
        after, _ = run(frozen, params, gradients)
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), *map(nnx.to_pure_dict, (start, after))
        )
        assert not any(jax.tree.leaves(moved.pop("visual")))
        assert all(jax.tree.leaves(moved))
        free, _ = run(config, params, gradients)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), start, free)))
        tower, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(params)
        tower = {"visual": rest.pop("visual")}
        assert opt_state_bytes(frozen, params) == opt_state_bytes(config, rest)
        assert opt_state_bytes(frozen, tower) < 100

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match=r"optimizer\.name must be adamw or adafactor"):
            make_optimizer(OptimizerConfig(name="sgd"), 1)  # type: ignore[arg-type]


class TestMesh:
    """Eight devices: data, fsdp and tensor have two each."""

    @pytest.fixture(scope="class")
    def mesh(self):
        return make_mesh(2, 2, 2, jax.devices()[:8])

    @pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
    def test_adam_s_moments_lie_where_the_model_s_weights_do(self, mesh, moment_dtype):
        _, params = make_model()
        shardings = jax.tree.map(
            lambda v: v.get_value(),
            parameter_shardings(params, mesh),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        config = dataclasses.replace(ADAMW, moment_dtype=moment_dtype)
        state = new_state(jax.device_put(params, shardings), make_optimizer(config, 3))
        for name in ("mu", "nu"):
            assert jax.tree.map(leaf_sharding, optax.tree.get(state.opt_state, name)) == shardings

    def test_adafactor_s_means_are_whole_and_the_rest_is_split_like_the_weights(self, mesh):
        split = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
        state = new_state(jax.device_put(make_tree(0), split), make_optimizer(ADAFACTOR, 3))
        assert leaf_sharding(optax.tree.get(state.opt_state, "v")["norm"]) == split["norm"]
        for name in ("v_row", "v_col"):
            moments = optax.tree.get(state.opt_state, name)
            assert all(leaf_sharding(x).is_fully_replicated for x in moments.values())
        assert {leaf_sharding(x).mesh for x in jax.tree.leaves(state)} == {mesh}

    @BOTH
    def test_updates_equal_those_on_one_device(self, mesh, config):
        config = dataclasses.replace(config, learning_rate=1e-2)
        split = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
        params, gradients = make_tree(0), [make_tree(seed) for seed in range(1, 4)]
        expected, _ = run(config, params, gradients)
        moved = [jax.device_put(g, split) for g in gradients]
        actual, _ = run(config, jax.device_put(params, split), moved)
        assert distance(actual, expected) < gate(expected, params, len(gradients))


class TestSchedule:
    def test_constant_by_default(self):
        rates = [learning_rate(ADAMW, 10, done) for done in (0, 5, 9)]
        assert rates == 3 * [pytest.approx(1e-6)]

    def test_warm_up_rises_to_the_peak_and_its_first_update_already_learns(self):
        config = OptimizerConfig(learning_rate=4.0, warmup_steps=3)
        rates = [learning_rate(config, 10, done) for done in range(5)]
        np.testing.assert_allclose(rates, [1, 2, 3, 4, 4], rtol=1e-6)

    def test_cosine_falls_to_its_final_part_and_stays_there(self):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final_fraction=0.1)
        rates = [learning_rate(config, 12, done) for done in range(2, 15)]
        assert rates[0] == 1
        assert rates[5] == pytest.approx(0.55)
        assert rates == sorted(rates, reverse=True)
        assert rates[-3:] == 3 * [pytest.approx(0.1)]

    @BOTH
    def test_the_optimizer_follows_it(self, config):
        config = dataclasses.replace(
            config, learning_rate=1.0, weight_decay=0.0, warmup_steps=3, final_fraction=0.1
        )
        constant = dataclasses.replace(config, warmup_steps=0, final_fraction=1.0)
        moved = []
        for c in (config, constant):
            optimizer = make_optimizer(c, 6)
            params = jax.tree.map(jnp.asarray, make_tree(0))
            state, update = optimizer.init(params), jax.jit(optimizer.update)
            for _ in range(5):
                change, state = update(make_tree(1), state, params)
                moved.append(float(optax.global_norm(change)))
        ratios = np.divide(moved[:5], moved[5:])
        rates = [learning_rate(config, 6, done) for done in range(5)]
        np.testing.assert_allclose(ratios, rates, rtol=1e-4)
