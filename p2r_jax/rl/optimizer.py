"""The optimizers of the update: AdamW (the authors') and Adafactor (next to no memory).

Both clip the gradient by its global norm, decay weights by learning rate * weight_decay (decoupled:
the decay does not pass through the second moment) and follow one learning-rate schedule. Its unit
is an optimizer update, of which a training step may make several.

What a layer of the model is, neither knows: its parameters are stacked with those of the other
layers, as [L, inputs, outputs]. AdamW works on single elements, so this changes nothing. Adafactor
keeps the means of squared gradients over each of the two *largest* axes. L is never one of them,
since both must have at least 128 entries (norms and biases, [L, width], are therefore not factored
at all): the second moments of layers do not mix. Its update clipping does mix them: the RMS that is
held below 1 is that of the whole stack, so a single layer whose gradient jumps is cut less than
Adafactor would cut it alone, and the other layers of its stack are cut with it.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from p2r_jax.config import OptimizerConfig
from p2r_jax.parallel.multihost import to_host


def make_schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Learning rate by updates done: warm-up, then constant or a cosine to its final part.

    updates: optimizer updates of the phase. A schedule that is asked beyond them stays where it is.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    after = (
        optax.cosine_decay_schedule(peak, max(updates - warmup, 1), config.final_fraction)
        if config.final_fraction < 1
        else optax.constant_schedule(peak)
    )
    if not warmup:
        return after
    # Update 0 already learns: a first one at rate 0 would waste a whole rollout.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def learning_rate(config: OptimizerConfig, updates: int, done: int) -> float:
    """The rate of the update that follows `done` others, of `updates` in the phase."""
    return float(make_schedule(config, updates)(done))


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """The optimizer of a phase of `updates` optimizer updates, see the module.

    A frozen tower gets no update at all, decay included, and has no state. Adafactor here does not
    scale its updates by the size of the parameter: their RMS is at most the learning rate, which
    thus means what it does for AdamW. Its state has the dtype of the parameters.
    Raises ValueError for an unknown `config.name`.
    """
    if config.name == "adamw":
        direction = _adam(config)
    elif config.name == "adafactor":
        # What `optax.adafactor` consists of, but for the decay, which there is not multiplied by
        # the learning rate. (Passing it a schedule would do that; optax 0.2.6 never advances one.)
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        raise ValueError(f"optimizer.name must be adamw or adafactor, got {config.name!r}")
    trained = optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        direction,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config, updates)),
    )
    if not config.freeze_vision:
        return trained
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, _vision_labels)


def updates_done(opt_state: Any) -> int:
    """Updates that an optimizer has made; skipped ones are none."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return int(to_host(counts[0][1]))


def is_vision(path: tuple[Any, ...]) -> bool:
    """Whether a parameter, given by its path in the model's state, is the vision tower's."""
    return getattr(path[0], "key", None) == "visual"


def _vision_labels(params: nnx.State) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if is_vision(path) else "trained", params
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(
        b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=config.moment_dtype
    )

    def init(params: Any) -> Any:
        # Optax gives the second moment the dtype of the weights. Made float32 here, it stays so.
        state = adam.init(params)
        return state._replace(nu=optax.tree.cast(state.nu, "float32"))

    return optax.GradientTransformation(init, adam.update)
