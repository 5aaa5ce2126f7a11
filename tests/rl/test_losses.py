"""The objective of PRA-GRPO: the authors' numbers, and the properties a sharded step relies on."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2r_jax.rl import losses
from tests.rounding import allowance, worst

# Compiled once per shape: far quicker here than operation by operation, and how they are used.
OPTIONS = ("clip_low", "clip_high", "dual_clip", "ratio_level", "aggregation", "horizon")
policy_loss = jax.jit(losses.policy_loss, static_argnames=OPTIONS)
policy_loss_terms = jax.jit(losses.policy_loss_terms, static_argnames=OPTIONS[:4])
kl_estimate = jax.jit(losses.kl_estimate, static_argnames="kind")
sampler_correction = jax.jit(losses.sampler_correction, static_argnames="cap")
aggregate = jax.jit(losses.aggregate, static_argnames=OPTIONS[4:])
aggregate_terms = jax.jit(losses.aggregate_terms, static_argnames=OPTIONS[4:])

FEW = worst(16)
"""Relative, of an element: a logarithm or an exponential is off by a few units however it is
computed, and beside it are a handful of products, differences and quotients."""


def order(log_probs, old, advantages, mask, count=None) -> float:
    """What rounding may change in the loss, a mean of terms that are each rounded and then added up
    in some order. Their signs differ, so this is not relative to the mean.

    count: that the sum is divided by, if not by the tokens.
    """
    terms, _ = policy_loss_terms(log_probs, old, advantages, mask)
    counted = np.abs(np.asarray(terms, np.float64))[np.asarray(mask, bool)]
    return (FEW + allowance(counted.size)) * counted.sum() / float(count or counted.size)


GRPO = json.loads((Path(__file__).parents[1] / "golden" / "grpo.json").read_text())
golden = pytest.mark.parametrize("case", GRPO, ids=lambda case: f"{np.shape(case['mask'])}")

# Golden names (verl's) of the estimators.
KL_KINDS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "abs": "abs"}


def padded(values):
    """A golden array, padded with zeros to the shape of the largest so that all share programs."""
    rows, tokens = np.max([np.shape(case["mask"]) for case in GRPO], axis=0) - np.shape(values)
    return np.pad(np.asarray(values, np.float32), ((0, rows), (0, tokens)))


def arrays(case, *names):
    return [padded(case[name]) for name in names]


# --- the authors' numbers ---------------------------------------------------------------------


@golden
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_policy_loss_equals_the_authors(case, aggregation):
    inputs = arrays(case, "logp", "old_logp", "advantage_std_norm", "mask")
    loss = policy_loss(*inputs, aggregation=aggregation)
    gate = order(*inputs, count=losses.aggregation_count(inputs[-1], aggregation))
    np.testing.assert_allclose(loss, case["policy_loss"][aggregation], rtol=0, atol=gate)


@golden
@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_estimates_equal_the_authors(case, kind):
    estimate = kl_estimate(*arrays(case, "logp", "ref_logp"), kind)
    expected = padded(case["kl_per_token"][KL_KINDS[kind]])
    # What cancels in exp(d) - d - 1, which is clipped; beyond 20 so is d.
    d = np.minimum(np.abs(padded(case["ref_logp"]) - padded(case["logp"])), 20)
    assert (np.abs(estimate - expected) <= FEW * (np.abs(expected) + d + 1)).all()


@jax.jit
@jax.value_and_grad
def total_loss_and_gradient(logp, old_logp, ref_logp, advantages, mask):
    policy = policy_loss(logp, old_logp, advantages, mask)
    return policy + 0.01 * aggregate(kl_estimate(logp, ref_logp), mask, "token-mean")


@golden
def test_total_loss_and_its_gradient_equal_the_authors(case):
    inputs = arrays(case, "logp", "old_logp", "ref_logp", "advantage_std_norm", "mask")
    value, gradient = total_loss_and_gradient(*inputs)
    logp, old_logp, _, advantages, mask = inputs
    # The KL estimate is at most 10; so is its derivative, but for 1 + d.
    gate = order(logp, old_logp, advantages, mask) + 0.01 * FEW * (10 + 20 + 1)
    np.testing.assert_allclose(value, case["loss"], rtol=0, atol=gate)
    # Of a token: the advantage times a ratio that dual clipping holds below 3.
    gate = FEW * (3 * np.abs(advantages).max() + 0.01 * (10 + 20 + 1)) / mask.sum()
    np.testing.assert_allclose(gradient, padded(case["grad_logp"]), rtol=0, atol=gate)


# --- the policy loss --------------------------------------------------------------------------

ONES = jnp.ones((1, 1))


def loss_at(ratio, advantage, **options):
    return policy_loss(jnp.log(ratio) * ONES, 0 * ONES, advantage * ONES, ONES, **options)


def gradient_at(ratio, advantage, **options):
    """d loss / d log_prob, which equals d loss / d ratio · ratio."""
    return jax.grad(
        lambda log_prob: policy_loss(log_prob * ONES, 0 * ONES, advantage * ONES, ONES, **options)
    )(jnp.log(ratio))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "learns"),
    [
        (1.0, 1.1, -1.1, True),
        (1.0, 1.3, -1.2, False),  # has become likely enough
        (1.0, 0.5, -0.5, True),
        (-1.0, 0.9, 0.9, True),
        (-1.0, 0.7, 0.8, False),  # has become unlikely enough
        (-1.0, 1.5, 1.5, True),
        (-1.0, 5.0, 3.0, False),  # dual clip: one token does not dominate the batch
    ],
)
def test_clipping_stops_learning_only_where_the_policy_has_moved_enough(
    advantage, ratio, loss, learns
):
    np.testing.assert_allclose(loss_at(ratio, advantage), loss, rtol=FEW)
    assert (gradient_at(ratio, advantage) != 0) == learns


def test_clip_higher_widens_one_side():
    np.testing.assert_allclose(loss_at(1.25, 1.0, clip_high=0.28), -1.25, rtol=FEW)
    np.testing.assert_allclose(loss_at(0.75, -1.0, clip_high=0.28), 0.8, rtol=FEW)


def test_dual_clip_can_be_turned_off_but_not_set_below_one():
    np.testing.assert_allclose(loss_at(5.0, -1.0, dual_clip=None), 5.0, rtol=FEW)
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        loss_at(5.0, -1.0, dual_clip=1.0)


def test_on_policy_the_gradient_is_that_of_reinforce():
    log_probs = jnp.array([[-0.5, -1.0], [-2.0, -0.1]])
    advantages = jnp.array([1.0, -2.0])
    gradient = jax.grad(
        lambda x: policy_loss(x, jax.lax.stop_gradient(x), advantages, jnp.ones((2, 2)))
    )(log_probs)
    np.testing.assert_allclose(gradient, -advantages[:, None] * jnp.ones((2, 2)) / 4)


def example(shape=(2, 3, 5), seed=0):
    """log_probs, old_log_probs, advantages (one per sequence), mask."""
    random = np.random.default_rng(seed)
    log_probs = -random.exponential(size=shape).astype(np.float32)
    old = log_probs + 0.3 * random.normal(size=shape).astype(np.float32)
    advantages = random.normal(size=shape[:-1]).astype(np.float32)
    lengths = random.integers(1, shape[-1], (*shape[:-1], 1), endpoint=True)
    return log_probs, old, advantages, np.arange(shape[-1]) < lengths


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_groups_and_flat_batches_give_the_same_loss(aggregation):
    grouped = example()
    flat = [x.reshape(6, *x.shape[2:]) for x in grouped]
    options = {"aggregation": aggregation, "horizon": 8}
    gate = order(*grouped, count=losses.aggregation_count(grouped[-1], aggregation))
    np.testing.assert_allclose(
        policy_loss(*grouped, **options), policy_loss(*flat, **options), rtol=0, atol=gate
    )


def test_an_advantage_per_sequence_means_the_same_for_each_of_its_tokens():
    log_probs, old, advantages, mask = example()
    per_token = jnp.broadcast_to(advantages[..., None], log_probs.shape)
    np.testing.assert_allclose(
        policy_loss(log_probs, old, advantages, mask),
        policy_loss(log_probs, old, per_token, mask),
        rtol=0,
        atol=order(log_probs, old, advantages, mask),
    )


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_nothing_in_a_masked_position_matters(garbage, ratio_level):
    log_probs, old, advantages, mask = example()

    def loss(log_probs, old):
        policy = policy_loss(log_probs, old, advantages, mask, ratio_level=ratio_level)
        return policy + aggregate(kl_estimate(log_probs, old, "k3", mask), mask, "token-mean")

    loss = jax.jit(jax.value_and_grad(loss))
    expected = loss(log_probs, old)
    spoilt = [np.where(mask, x, garbage) for x in (log_probs, old)]
    value, gradient = loss(*spoilt)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, np.where(mask, expected[1], 0.0))


def test_no_gradient_reaches_anything_but_the_policy():
    log_probs, old, advantages, mask = example()

    def loss(old, advantages, ref):
        policy = policy_loss(log_probs, old, advantages, mask)
        return policy + aggregate(kl_estimate(log_probs, ref), mask, "token-mean")

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(old, advantages, old):
        assert not gradient.any()


def test_statistics_count_the_tokens_whose_ratio_was_clipped():
    ratios = jnp.array([[1.5, 0.5, 1.0, 9.0], [1.5, 0.5, 5.0, 9.0]])
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0]])
    advantages = jnp.array([1.0, -1.0])
    _, stats = policy_loss_terms(jnp.log(ratios), jnp.zeros((2, 4)), advantages, mask)
    counted = {name: (round(float(total), 5), int(n)) for name, (total, n) in stats.items()}
    assert counted == {
        "ratio": (10.0, 6),
        "approx_kl": (-round(float(jnp.log(1.5 * 0.5 * 1.5 * 0.5 * 5.0)), 5), 6),
        "clip_high_fraction": (1.0, 6),  # 1.5 where favoured
        "clip_low_fraction": (1.0, 6),  # 0.5 where disfavoured
        "dual_clip_fraction": (1.0, 6),  # 5.0 where disfavoured
    }


def test_gspo_gives_every_token_its_sequences_mean_ratio():
    log_probs = jnp.log(jnp.array([[1.0, 1.21, 7.0]]))
    mask = jnp.array([[1, 1, 0]])
    inputs = (jnp.zeros((1, 3)), jnp.ones(1), mask)
    loss, _ = policy_loss_terms(log_probs, *inputs, ratio_level="sequence")
    np.testing.assert_allclose(loss, [[-1.1, -1.1, 0.0]], rtol=FEW)
    gradient = jax.grad(
        lambda x: policy_loss(x, *inputs, ratio_level="sequence", aggregation="seq-mean-token-mean")
    )(log_probs)
    np.testing.assert_allclose(gradient, [[-0.55, -0.55, 0.0]], rtol=FEW)
    with pytest.raises(ValueError, match="ratio_level 'word'"):
        policy_loss_terms(log_probs, *inputs, ratio_level="word")


# --- sampler and trainer ----------------------------------------------------------------------


def test_sampler_correction_is_one_where_sampler_and_trainer_agree():
    log_probs, _, _, mask = example()
    weights, stats = sampler_correction(log_probs, log_probs, mask)
    assert (weights == 1).all()
    assert all(total == 0 and count == mask.sum() for total, count in stats.values())


def test_sampler_correction_weighs_by_the_truncated_ratio():
    trainer = jnp.log(jnp.array([[0.5, 0.2, 0.9, 0.3]]))
    sampler = jnp.log(jnp.array([[0.4, 0.4, 0.1, jnp.nan]]))
    mask = jnp.array([[1, 1, 1, 0]])
    weights, stats = sampler_correction(trainer, sampler, mask, cap=2.0)
    np.testing.assert_allclose(weights, [[1.25, 0.5, 2.0, 1.0]], rtol=FEW)
    np.testing.assert_allclose(stats["sampler_prob_gap"], (0.1 + 0.2 + 0.8, 3), rtol=FEW)
    assert stats["sampler_weight_capped_fraction"] == (1, 3)

    inputs = (trainer, trainer, jnp.ones(1), mask)
    loss, _ = policy_loss_terms(*inputs, weights=weights)
    np.testing.assert_allclose(loss, -weights * mask, rtol=FEW)


# --- the KL term ------------------------------------------------------------------------------


def test_k1_and_k3_have_the_kl_as_their_mean_and_k3_is_never_negative():
    probs = np.array([0.5, 0.3, 0.2])
    reference = np.array([0.2, 0.5, 0.3])
    true_kl = (probs * np.log(probs / reference)).sum()
    k1, k3 = (kl_estimate(np.log(probs), np.log(reference), kind) for kind in ("k1", "k3"))
    np.testing.assert_allclose((probs * k1).sum(), true_kl, rtol=1e-5)
    np.testing.assert_allclose((probs * k3).sum(), true_kl, rtol=1e-5)
    assert (k3 >= 0).all()


def test_k3_stays_finite_and_stops_pulling_when_the_reference_is_far_away():
    far = jnp.array([-1000.0])
    assert kl_estimate(far, jnp.zeros(1)) == 10.0
    assert jax.grad(lambda x: kl_estimate(x, jnp.zeros(1)).sum())(far) == 0


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="KL kind 'k4'"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")


# --- aggregation ------------------------------------------------------------------------------

VALUES = jnp.array([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
LENGTHS_3_1_0 = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("aggregation", "total", "count"),
    [
        ("token-mean", 10.0, 4),
        ("seq-mean-token-sum", 10.0, 2),
        ("seq-mean-token-mean", 2.0 + 4.0, 2),
        ("seq-mean-token-sum-norm", 10.0 / 5, 2),
    ],
)
def test_each_aggregation_by_hand(aggregation, total, count):
    assert aggregate_terms(VALUES, LENGTHS_3_1_0, aggregation, horizon=5) == (total, count)
    assert aggregate(VALUES, LENGTHS_3_1_0, aggregation, horizon=5) == total / count
    assert losses.aggregation_count(LENGTHS_3_1_0, aggregation) == count


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_microbatches_add_up_to_the_batch_in_value_and_gradient(aggregation):
    log_probs, old, advantages, mask = example((6, 7))
    whole_count = losses.aggregation_count(mask, aggregation)

    def part(log_probs, old, advantages, mask):
        loss, _ = policy_loss_terms(log_probs, old, advantages, mask)
        return aggregate_terms(loss, mask, aggregation, horizon=9)[0] / whole_count

    def whole(log_probs):
        return policy_loss(log_probs, old, advantages, mask, aggregation=aggregation, horizon=9)

    value, gradient = jax.jit(jax.value_and_grad(whole))(log_probs)
    part = jax.jit(jax.value_and_grad(part))
    slices = [slice(0, 2), slice(2, 4), slice(4, 6)]
    parts = [part(log_probs[s], old[s], advantages[s], mask[s]) for s in slices]
    gate = order(log_probs, old, advantages, mask, count=whole_count)
    np.testing.assert_allclose(sum(v for v, _ in parts), value, rtol=0, atol=gate)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=FEW)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_padding_a_batch_changes_nothing(aggregation):
    log_probs, old, advantages, mask = example((4, 5))
    padded = [np.pad(x, ((0, 2), (0, 3))[: x.ndim]) for x in (log_probs, old, advantages, mask)]
    options = {"aggregation": aggregation, "horizon": 5}
    inputs = log_probs, old, advantages, mask
    gate = order(*inputs, count=losses.aggregation_count(mask, aggregation))
    np.testing.assert_allclose(
        policy_loss(*padded, **options), policy_loss(*inputs, **options), rtol=0, atol=gate
    )


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_a_batch_in_which_nothing_counts_has_loss_zero(aggregation):
    assert aggregate(VALUES, jnp.zeros((3, 3)), aggregation, horizon=5) == 0


def test_faulty_aggregations_are_refused():
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; expected one of token-mean"):
        aggregate(VALUES, LENGTHS_3_1_0, "mean")
    with pytest.raises(ValueError, match="needs horizon"):
        aggregate(VALUES, LENGTHS_3_1_0, "seq-mean-token-sum-norm")


def test_half_precision_log_probs_are_computed_in_float32():
    log_probs, old, advantages, mask = example()
    half = [x.astype(jnp.bfloat16) for x in (log_probs, old)]
    back = [x.astype(jnp.float32) for x in half]
    loss = policy_loss(*half, advantages, mask)
    assert loss.dtype == jnp.float32
    gate = order(*back, advantages, mask)
    np.testing.assert_allclose(loss, policy_loss(*back, advantages, mask), rtol=0, atol=gate)
    assert kl_estimate(*half).dtype == jnp.float32
