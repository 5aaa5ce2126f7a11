"""The rollout engine: what it draws, with which probability, and what that depends on.

Teacher forcing is the judge: every completion is written behind its own copy of the prompt and
scored by one plain causal forward. Prompts have images of mixed sizes and different lengths.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from p2r_jax.ops.kernels import Kernels
from p2r_jax.parallel.compilations import Compilations
from p2r_jax.parallel.mesh import batch_sharding, make_mesh, parameter_shardings, replicated
from p2r_jax.rl.step import completion_log_probs
from p2r_jax.rollout import engine
from p2r_jax.rollout import generate as generate_module
from p2r_jax.rollout.engine import last_index
from p2r_jax.rollout.generate import Completions, Schedule, generate
from p2r_jax.rollout.sampling import Sampling
from tests.small_model import (
    BANNED,
    NUM_PATCHES,
    PAD,
    PROMPT_TOKENS,
    ROWS,
    STOP,
    VOCABULARY,
    content,
    make_model,
    make_prompts,
    nats,
    plain_scores,
    repeated_prompts,
    vocabulary,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = tuple(ROWS)
SEEDS = {name: 100 + i for i, name in enumerate(NAMES)}
B, G, R = 4, 5, 8
SAMPLING = Sampling(max_new_tokens=R, group=G, temperature=0.8)
GATE = nats(SAMPLING.temperature)
"""Cached decoding and teacher forcing add up the same numbers in another order."""


@pytest.fixture(scope="module")
def model():
    return make_model()


def complete(
    model,
    names,
    sampling,
    words=None,
    seeds=SEEDS,
    schedule=None,
    num_tokens=PROMPT_TOKENS,
    **padding,
) -> Completions:
    """seeds: by name, or one for each prompt."""
    own = [seeds[name] for name in names] if isinstance(seeds, dict) else seeds

    def load(numbers):
        return make_prompts([names[i] for i in numbers], num_tokens, **padding)

    return generate(*model, load, own, num_tokens, words or vocabulary(), sampling, schedule)


def assert_same(actual, row, expected, expected_row, group=G):
    for field in ("tokens", "mask", "stopped"):
        np.testing.assert_array_equal(
            getattr(actual, field)[row], getattr(expected, field)[expected_row][:group]
        )
    np.testing.assert_allclose(
        actual.log_probs[row], expected.log_probs[expected_row][:group], rtol=0, atol=GATE
    )


@pytest.fixture(scope="module")
def sampled(model) -> Completions:
    return complete(model, NAMES, SAMPLING)


@pytest.fixture(scope="module")
def greedy(model) -> Completions:
    return complete(model, NAMES, Sampling(max_new_tokens=R, temperature=0.0))


def teacher_forced(model, completions: Completions, temperature=1.0):
    """Log-probs and likeliest tokens, [B, G, R]."""
    rows, starts = repeated_prompts(NAMES, completions.tokens, completions.mask)
    targets = completions.tokens.reshape(-1, R)
    scores = plain_scores(*model, rows, starts, targets, vocabulary().allowed, temperature)
    return [np.asarray(x).reshape(completions.tokens.shape) for x in scores]


class TestProbabilities:
    def test_sampled_ones_equal_teacher_forcing(self, model, sampled):
        expected, _, _ = teacher_forced(model, sampled, SAMPLING.temperature)
        mask = sampled.mask
        np.testing.assert_allclose(sampled.log_probs[mask], expected[mask], rtol=0, atol=GATE)

    def test_greedy_ones_equal_teacher_forcing_at_temperature_one(self, model, greedy):
        expected, _, _ = teacher_forced(model, greedy)
        mask = greedy.mask
        np.testing.assert_allclose(greedy.log_probs[mask], expected[mask], rtol=0, atol=GATE)

    def test_the_update_sees_the_samplers_probabilities(self, model, sampled):
        """So that the policy that sampled is the policy that is trained."""
        graph, params = model

        @jax.jit
        def score(params, tokens, mask):
            return completion_log_probs(
                nnx.merge(graph, params),
                make_prompts(NAMES),
                tokens,
                mask,
                vocabulary().allowed,
                SAMPLING.temperature,
            )[0]

        mask = sampled.mask
        actual = np.asarray(score(params, sampled.tokens, mask))
        np.testing.assert_allclose(sampled.log_probs[mask], actual[mask], rtol=0, atol=GATE)

    def test_draws_follow_the_distribution(self, model):
        """Also the shortest completion: one token, straight from the prompt."""
        count = 20_000
        sampling = Sampling(max_new_tokens=1, group=count, temperature=0.8)
        drawn = complete(model, NAMES[:1], sampling)
        tokens, log_probs = drawn.tokens[0, :, 0], drawn.log_probs[0, :, 0]
        frequency = np.bincount(tokens, minlength=VOCABULARY) / count
        probability = np.zeros(VOCABULARY)
        probability[tokens] = np.exp(log_probs)
        assert probability.sum() == pytest.approx(1, abs=0.01)
        deviation = np.sqrt(probability * (1 - probability) / count)
        assert (np.abs(frequency - probability) <= 5 * deviation + 1e-9).all()


class TestGreedy:
    def test_takes_the_likeliest_token(self, model, greedy):
        assert greedy.tokens.shape == (B, 1, R)
        _, _, likeliest = teacher_forced(model, greedy)
        np.testing.assert_array_equal(greedy.tokens[greedy.mask], likeliest[greedy.mask])

    def test_seeds_do_not_matter(self, model, greedy):
        again = complete(
            model,
            NAMES,
            Sampling(max_new_tokens=R, temperature=0.0),
            seeds=dict.fromkeys(NAMES, 7),
        )
        np.testing.assert_array_equal(again.tokens, greedy.tokens)


class TestWhatACompletionDependsOn:
    """Weights, prompt, seed and index in the group; never on the rest of the batch."""

    def test_seeds_and_indexes_make_completions_differ(self, model, sampled):
        texts = sampled.tokens.reshape(B * G, R)
        assert len(np.unique(texts, axis=0)) == B * G
        other = complete(model, NAMES, SAMPLING, seeds={k: v + 1 for k, v in SEEDS.items()})
        assert (other.tokens != sampled.tokens).any(-1).all()

    def test_equal_prompts_with_different_seeds_differ(self, model):
        tokens = complete(model, [NAMES[0]] * B, SAMPLING, seeds=list(range(B))).tokens
        assert len(np.unique(tokens.reshape(B * G, R), axis=0)) == B * G

    def test_not_on_its_place_in_the_batch_or_on_its_neighbours(self, model, sampled):
        names = (NAMES[3], NAMES[1], NAMES[0], NAMES[1])
        moved = complete(model, names, SAMPLING)
        for row, name in enumerate(names):
            assert_same(moved, row, sampled, NAMES.index(name))

    def test_not_on_the_side_that_is_padded(self, model, sampled):
        padded = complete(model, NAMES, SAMPLING, side="left")
        for row in range(B):
            assert_same(padded, row, sampled, row)

    def test_not_on_batch_group_or_padded_sizes(self, model, sampled):
        """One row alone, fewer completions, and the next bucket of tokens and of patches."""
        sampling = dataclasses.replace(SAMPLING, group=2)
        sizes = {"num_tokens": 2 * PROMPT_TOKENS, "num_patches": 2 * NUM_PATCHES}
        alone = complete(model, NAMES[:1], sampling, **sizes)
        assert_same(alone, 0, sampled, 0, group=2)

    def test_a_longer_limit_only_goes_on(self, model, sampled):
        longer = complete(model, NAMES, dataclasses.replace(SAMPLING, max_new_tokens=R + 4))
        np.testing.assert_array_equal(
            longer.tokens[:, :, :R][sampled.mask], sampled.tokens[sampled.mask]
        )
        np.testing.assert_array_equal(longer.mask[:, :, :R], sampled.mask)
        assert longer.mask[:, :, R][~sampled.stopped].all()


class TestEnds:
    def test_a_stop_token_ends_a_completion_and_belongs_to_it(self, sampled):
        stops = np.isin(sampled.tokens, STOP)
        for b, g in np.ndindex(B, G):
            used = int(sampled.mask[b, g].sum())
            assert (np.flatnonzero(sampled.mask[b, g]) == np.arange(used)).all()
            assert not stops[b, g, : used - 1].any()
            assert sampled.stopped[b, g] == stops[b, g, used - 1]
            assert sampled.stopped[b, g] or used == R
            assert (sampled.tokens[b, g, used:] == PAD).all()
            assert (sampled.log_probs[b, g, used:] == 0).all()
            assert (sampled.log_probs[b, g, :used] < 0).all()

    def test_the_batch_has_both_kinds(self, sampled):
        """Some end early, at different lengths, and some are cut: the test above sees all of it."""
        assert len(set(sampled.mask.sum(-1).flat)) > 3
        assert set(sampled.stopped.flat) == {True, False}

    def test_without_stop_tokens_all_are_cut(self, model):
        endless = complete(model, NAMES, SAMPLING, vocabulary(stop=()))
        assert endless.mask.all()
        assert not endless.stopped.any()

    def test_padding_that_is_also_a_stop_token(self, model, sampled):
        """As in the published tokenizers: the first one counts, the padding after it does not."""
        words = dataclasses.replace(vocabulary(), pad=jnp.int32(STOP[0]))
        same = complete(model, NAMES, SAMPLING, words)
        np.testing.assert_array_equal(same.mask, sampled.mask)
        np.testing.assert_array_equal(same.tokens[same.mask], sampled.tokens[sampled.mask])
        assert (same.tokens[~same.mask] == STOP[0]).all()


class TestBannedTokens:
    @pytest.fixture(scope="class")
    def biased(self, model):
        """One of two banned tokens is always the likeliest by far: their rows are opposite."""
        graph, params = model
        head = params["lm_head"].get_value()
        row = 1000 * head[0]
        params = jax.tree.map(lambda x: x, params)
        params["lm_head"] = params["lm_head"].replace(head.at[0].set(row).at[1].set(-row))
        return graph, params

    @pytest.mark.parametrize("temperature", [0.8, 0.0])
    def test_are_never_drawn(self, biased, temperature):
        sampling = Sampling(R, G if temperature else 1, temperature)
        out = complete(biased, NAMES, sampling)
        assert not np.isin(out.tokens[out.mask], BANNED).any()
        assert np.isfinite(out.log_probs).all()
        free = complete(biased, NAMES, sampling, vocabulary(banned=()))
        assert np.isin(free.tokens[free.mask], BANNED).mean() > 0.9

    def test_have_no_share_of_the_probability(self, model, biased, sampled):
        out = complete(biased, NAMES, SAMPLING)
        np.testing.assert_array_equal(out.tokens, sampled.tokens)
        np.testing.assert_allclose(out.log_probs, sampled.log_probs, atol=GATE)


def test_last_index_under_either_padding():
    valid = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert last_index(valid).tolist() == [3, 1, 3, 0]


@pytest.fixture(scope="module")
def on_mesh(model):
    """The same model with prompts split over data and fsdp, weights over tensor."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    graph, _ = make_model(kernels=Kernels(mesh=mesh))
    shardings = jax.tree.map(
        lambda v: v.get_value(),
        parameter_shardings(model[1], mesh, fsdp=False),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return graph, jax.device_put(model[1], shardings), mesh


@pytest.mark.parametrize(
    "schedule, limits",
    [
        (Schedule(), {}),
        (Schedule(slots=4, columns=2), {}),
        (Schedule(slots=8, refill=4), {"top_k": 9, "top_p": 0.8, "repetition_penalty": 1.5}),
    ],
)
def test_eight_devices_equal_one(model, on_mesh, schedule, limits):
    """With all prompts at once, and with a queue; 5 prompts do not fill 4 shards twice."""
    sampling = dataclasses.replace(SAMPLING, **limits)
    sampled = complete(model, NAMES, sampling)
    graph, params, mesh = on_mesh
    rows, names = batch_sharding(mesh), [*NAMES, NAMES[0]]
    by_axis = jax.NamedSharding(mesh, jax.P(None, *rows.spec))

    def load(numbers):
        prompts = make_prompts([names[i] for i in numbers])
        split = dataclasses.replace(jax.tree.map(lambda _: rows, prompts), positions=by_axis)
        return jax.device_put(prompts, split)

    words = jax.device_put(vocabulary(), replicated(mesh))
    seeds = [SEEDS[name] for name in names]
    out = generate(graph, params, load, seeds, PROMPT_TOKENS, words, sampling, schedule)
    for row, name in enumerate(names):
        assert_same(out, row, sampled, NAMES.index(name))


@pytest.mark.parametrize("mesh", [None, (2, 1, 2)], ids=["one device", "four devices"])
def test_the_tpu_kernels_draw_the_same_completions(model, sampled, mesh):
    """Interpreted: splash for vision and prompts, our kernel for every decoding step."""
    mesh = mesh and make_mesh(*mesh, jax.devices()[:4])
    graph, _ = make_model(kernels=Kernels("pallas_tpu", mesh, interpret=True))
    sampling = dataclasses.replace(SAMPLING, group=2)
    out = complete((graph, model[1]), NAMES, sampling, schedule=Schedule(slots=4, refill=4))
    for row in range(B):
        assert_same(out, row, sampled, row, group=2)


def test_nothing_is_compiled_twice_on_a_mesh(on_mesh):
    """A layout that changed on its way through the programs would compile them again."""
    graph, params, mesh = on_mesh
    words = jax.device_put(vocabulary(), replicated(mesh))
    rows = batch_sharding(mesh)
    by_axis = jax.NamedSharding(mesh, jax.P(None, *rows.spec))

    def load(numbers):
        prompts = make_prompts([NAMES[i % B] for i in numbers])
        split = dataclasses.replace(jax.tree.map(lambda _: rows, prompts), positions=by_axis)
        return jax.device_put(prompts, split)

    def run(count):
        schedule, seeds = Schedule(slots=4, refill=4), list(range(count))
        generate(graph, params, load, seeds, PROMPT_TOKENS, words, SAMPLING, schedule)

    run(9)
    counted = Compilations()
    run(5)
    run(12)
    counted.close()
    assert counted.count == 0


def test_caches_stay_where_they_are(on_mesh):
    """Rows over data and fsdp, heads over tensor, before and after every program."""
    graph, params, mesh = on_mesh
    seen = []

    def spy(name):
        run = getattr(generate_module, name)

        def spied(*args, **kwargs):
            out = run(*args, **kwargs)
            seen.append(out[1] if isinstance(out, tuple) else out)
            return out

        return spied

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty_slots", "fill", "decode", "resize"):
            patch.setattr(generate_module, name, spy(name))
        names = list(NAMES) * 2
        generate(
            graph,
            params,
            lambda numbers: make_prompts([names[i] for i in numbers]),
            list(range(8)),
            PROMPT_TOKENS,
            jax.device_put(vocabulary(), replicated(mesh)),
            dataclasses.replace(SAMPLING, max_new_tokens=12),
            Schedule(slots=4, rings=(8,)),
        )
    assert len(seen) > 6
    specs = {x.keys.sharding.spec for x in seen}
    assert specs == {jax.P(None, ("data", "fsdp"), "tensor")}
    assert {x.tokens.sharding.spec for x in seen} == {jax.P(("data", "fsdp"))}


class TestSchedule:
    """Slots, columns and cache lengths change speed and memory, never a completion."""

    NAMES = (*NAMES, *NAMES[::-1], NAMES[2])
    SEEDS = tuple(range(9))

    @pytest.fixture(scope="class")
    def at_once(self, model) -> Completions:
        return complete(model, self.NAMES, SAMPLING, seeds=self.SEEDS)

    @pytest.mark.parametrize(
        "schedule",
        [
            Schedule(slots=1),
            Schedule(slots=2, columns=1),
            Schedule(slots=4, columns=2, refill=1, rings=(8, 100)),
            Schedule(slots=3, columns=3, refill=3),
            Schedule(slots=20),
        ],
    )
    def test_never_changes_a_completion(self, model, at_once, schedule):
        out = complete(model, self.NAMES, SAMPLING, seeds=self.SEEDS, schedule=schedule)
        for row in range(len(self.NAMES)):
            assert_same(out, row, at_once, row)

    def test_prompts_may_be_shorter_than_the_slots(self, model, at_once):
        """The bucket of the whole queue is the slots'; a batch of short prompts has its own."""
        longest = {name: len(content(name)[0]) for name in NAMES}

        def load(numbers):
            names = [self.NAMES[i] for i in numbers]
            return make_prompts(names, max(longest[name] for name in names))

        out = generate(
            *model, load, self.SEEDS, PROMPT_TOKENS, vocabulary(), SAMPLING, Schedule(slots=2)
        )
        for row in range(len(self.NAMES)):
            assert_same(out, row, at_once, row)

    def test_occupancy_counts_the_tokens_of_all_steps(self, model, at_once):
        for schedule in (Schedule(), Schedule(slots=2, columns=2, refill=1)):
            out = complete(model, self.NAMES, SAMPLING, seeds=self.SEEDS, schedule=schedule)
            columns = (schedule.slots or len(self.NAMES)) * (schedule.columns or G)
            assert out.occupancy == pytest.approx(out.mask.sum() / (out.steps * columns))
        assert 0 < at_once.occupancy < 1

    def test_all_at_once_takes_as_many_steps_as_the_longest(self, at_once):
        assert at_once.steps == at_once.mask.sum(-1).max()

    def test_a_ring_grows_with_the_oldest_completion_and_shrinks_after_it(self, model, monkeypatch):
        """Without stop tokens every completion goes on to its limit: the ring grows twice."""
        rings = []

        def spied(state, *, ring, mesh):
            rings.append(ring)
            return engine.resize(state, ring=ring, mesh=mesh)

        monkeypatch.setattr(generate_module, "resize", spied)
        sampling, names = dataclasses.replace(SAMPLING, max_new_tokens=20), self.NAMES[:3]
        words = vocabulary(stop=())
        out = complete(model, names, sampling, words, schedule=Schedule(slots=1, rings=(8, 16)))
        assert rings == [16, 24, 8, 16, 24, 8, 16, 24]
        whole = complete(model, names, sampling, words)
        for row in range(3):
            assert_same(out, row, whole, row)

    def test_a_ring_that_grows_keeps_what_belongs_to_younger_completions(self, model):
        """Of one age, a full ring may be turned unnoticed; these have stopped and begun apart."""
        sampling = dataclasses.replace(SAMPLING, max_new_tokens=20)
        schedule = Schedule(slots=2, columns=3, refill=1, rings=(8, 16))
        whole = complete(model, self.NAMES, sampling, seeds=self.SEEDS)
        out = complete(model, self.NAMES, sampling, seeds=self.SEEDS, schedule=schedule)
        for row in range(len(self.NAMES)):
            assert_same(out, row, whole, row)

    def test_each_program_is_compiled_once(self, model):
        """Whatever the number of prompts, and whatever they do."""
        schedule = Schedule(slots=3, refill=2)
        complete(model, self.NAMES, SAMPLING, seeds=self.SEEDS, schedule=schedule)
        counted = Compilations()
        for count in (1, 4, 7):
            complete(model, self.NAMES[:count], SAMPLING, seeds=[5] * count, schedule=schedule)
        counted.close()
        assert counted.count == 0

    @pytest.mark.parametrize("name", ["slots", "columns", "refill"])
    def test_an_impossible_one_is_refused(self, name):
        with pytest.raises(ValueError, match=rf"{name} must be at least 1 or null, got 0"):
            Schedule(**{name: 0})
        with pytest.raises(ValueError, match="rings must be at least 1"):
            Schedule(rings=(0, 8))

    def test_prompts_that_do_not_fit_the_slots_are_refused(self, model):
        load = lambda numbers: make_prompts([NAMES[i] for i in numbers], 2 * PROMPT_TOKENS)
        with pytest.raises(ValueError, match="48 tokens do not fit prompt_tokens = 24"):
            generate(*model, load, [0, 1], PROMPT_TOKENS, vocabulary(), SAMPLING)

    def test_prompts_on_another_mesh_than_the_model_are_refused(self, model):
        load = lambda numbers: make_prompts([NAMES[i % 4] for i in range(8)])
        with pytest.raises(ValueError, match="in 8 rows where 2 were asked for"):
            generate(*model, load, [0, 1], PROMPT_TOKENS, vocabulary(), SAMPLING)

    def test_no_prompts_are_refused(self, model):
        with pytest.raises(ValueError, match="no prompt"):
            complete(model, (), SAMPLING)


class TestRepetitionPenalty:
    @pytest.mark.parametrize("prompt_counts", [True, False])
    def test_seen_tokens_are_those_of_prompt_and_completion(self, model, prompt_counts):
        plain = Sampling(R, temperature=0.0)
        strict = dataclasses.replace(plain, repetition_penalty=1e6, penalize_prompt=prompt_counts)
        out = complete(model, NAMES, strict, vocabulary(stop=()))
        for row, name in enumerate(NAMES):
            own = out.tokens[row, 0].tolist()
            assert len(set(own)) == R
            if prompt_counts:
                assert not set(own) & set(content(name)[0])
        if not prompt_counts:
            free = complete(model, NAMES, plain, vocabulary(stop=()))
            np.testing.assert_array_equal(out.tokens[:, :, 0], free.tokens[:, :, 0])

    def test_each_completion_has_its_own_memory(self, model):
        """Also where a column goes on with the next completion of a prompt."""
        sampling = dataclasses.replace(SAMPLING, repetition_penalty=1.5)
        whole = complete(model, NAMES, sampling)
        queued = complete(model, NAMES, sampling, schedule=Schedule(slots=2, columns=2))
        for row in range(B):
            assert_same(queued, row, whole, row)
        free = complete(model, NAMES, SAMPLING)
        assert (free.tokens != whole.tokens).any()

    def test_log_probs_are_those_of_the_plain_distribution(self, model):
        """They are what the update computes; the penalty only decides what is drawn."""
        sampling = Sampling(R, G, 0.8, top_k=8, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
        out = complete(model, NAMES, sampling)
        expected, _, _ = teacher_forced(model, out, 0.8)
        np.testing.assert_allclose(out.log_probs[out.mask], expected[out.mask], rtol=0, atol=GATE)


def test_bfloat16_weights_give_the_probabilities_of_a_bfloat16_forward(model):
    """Nearly: caches, hidden states and products round in another order."""
    low = model[0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), model[1])
    out = complete(low, NAMES, SAMPLING)
    assert out.log_probs.dtype == np.float32
    expected, _, _ = teacher_forced(low, out, SAMPLING.temperature)
    gap = np.abs(out.log_probs - expected)[out.mask]
    assert gap.mean() < 0.02
    assert gap.max() < 0.2
