"""PRA-GRPO from end to end on random tiny weights: what a run does, leaves behind, and survives."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from rich.console import Console

from p2r_jax.config import LossConfig, MeshConfig, PhaseConfig, RolloutConfig
from p2r_jax.data.loader import LoadedRow
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.rl import experience, launch
from p2r_jax.rl.batches import anchor_batch, training_batch
from p2r_jax.rl.experience import Experience, Step
from p2r_jax.rl.rewards import Reward
from p2r_jax.rl.trainer import Trainer
from p2r_jax.roles.boxes import ParsedBoxes
from p2r_jax.roles.pipeline import Completion, Rollout
from p2r_jax.roles.requests import ImageStore
from p2r_jax.rollout.generate import Completions
from p2r_jax.rollout.sampling import Sampling
from tests.rl.tiny_run import (
    GROUP,
    PROMPTS,
    TOKENS,
    fingerprint,
    make_config,
    metric_rows,
    patches,
)

ROOT = Path(__file__).parents[2]
MODES = {
    "before": ["p2r", "oracle_box"],
    "after_phase1_perceiver": ["p2r"],
    "after": ["p2r", "oracle_box"],
}
"""Evaluations of a run; between phases there are fewer modes."""


@pytest.fixture(scope="module", autouse=True)
def _small_world(quick_compilation, tmp_path_factory):
    """Programs are compiled once for all runs of this module, those of other processes included."""
    folder = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in patches():
            patch.setattr(where, name, value)
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


class Run:
    """A run that went through, and the weights each step used."""

    def __init__(self, folder: Path, model: Path, **changes):
        self.folder = folder
        self.weights: list[tuple[str, int, int]] = []
        with pytest.MonkeyPatch.context() as patch:
            for role, collect in experience.COLLECT.items():
                patch.setitem(experience.COLLECT, role, self.watched(role, collect))
            self.summary = launch.train(make_config(folder, model, **changes))
        self.rows = metric_rows(folder)
        self.steps = [row for row in self.rows if row["phase"] != "eval"]

    def watched(self, role, collect):
        def watching(step):
            self.weights.append((role, fingerprint(step.policy), fingerprint(step.partner)))
            return collect(step)

        return watching


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_checkpoint) -> Run:
    return Run(tmp_path_factory.mktemp("whole") / "run", tiny_checkpoint)


class TestOneRoleLearnsAtATime:
    def test_the_partner_stays_at_the_weights_the_phase_began_with(self, whole):
        roles, policies, partners = zip(*whole.weights, strict=True)
        assert roles == ("perceiver", "perceiver", "reasoner", "reasoner")
        assert partners[0] == partners[1] == policies[0]
        assert partners[2] == partners[3] == policies[2]
        assert len(set(policies)) == 4

    def test_so_does_the_kl_reference(self, whole):
        """At a phase's first step the policy is the reference; at the second it has moved."""
        kl = [row["kl/mean"] for row in whole.steps]
        assert kl[0] == pytest.approx(0, abs=1e-9)
        assert kl[2] == pytest.approx(0, abs=1e-9)
        assert min(kl[1], kl[3]) > 1e-7

    def test_the_sampler_and_the_trainer_agree(self, whole):
        for row in whole.steps:
            assert row["sampler_gap/max"] < 1e-4
            assert row["ratio"] == 1


class TestWhatARunLeavesBehind:
    def test_metrics_of_every_step(self, whole):
        where = [
            (row["step"], row["phase"], row["round"], row["phase_step"]) for row in whole.steps
        ]
        assert where == [
            (1, "perceiver", 0, 1),
            (2, "perceiver", 0, 2),
            (3, "reasoner", 1, 1),
            (4, "reasoner", 1, 2),
        ]
        names = (
            "reward/mean reward/std reward/zero_variance_groups reward/dropped_fraction "
            "reward/answer completion/length_mean completion/length_min completion/length_max "
            "completion/truncated_fraction loss/policy loss/total entropy/mean kl/mean ratio "
            "approx_kl clip_low_fraction clip_high_fraction dual_clip_fraction sampler_gap/mean "
            "sampler_gap/max grad_norm lr skipped_steps time/step time/upload time/rollout "
            "time/partner time/reward time/update time/data tokens/prompts tokens/completions "
            "compile/count compile/seconds"
        )
        own = {
            "perceiver": "overlap_penalty label_penalty parse_ok empty boxes",
            "reasoner": "answer_tag",
        }
        for row in whole.steps:
            expected = {*names.split(), *(f"reward/{n}" for n in own[row["phase"]].split())}
            assert expected - row.keys() == set()
            assert all(np.isfinite(row[name]) for name in expected)
            assert 1 <= row["completion/length_min"] <= row["completion/length_max"] <= TOKENS
            assert row["skipped_steps"] == 0

    def test_a_phase_compiles_its_programs_in_its_first_step(self, whole):
        """Whatever images, boxes and texts come later: with one bucket of each kind."""
        counts = [row["compile/count"] for row in whole.steps]
        assert counts[0] > 0
        assert (counts[1], counts[3]) == (0, 0)

    def test_rewards_vary_or_these_tests_would_prove_little(self, whole):
        assert all(row["reward/zero_variance_groups"] < 1 for row in whole.steps)
        assert all(row["grad_norm"] > 0 for row in whole.steps)

    def test_evaluations_before_between_and_after(self, whole):
        evaluated = [(row["step"], row["name"]) for row in whole.rows if row["phase"] == "eval"]
        assert evaluated == [(0, "before"), (2, "after_phase1_perceiver"), (4, "after")]
        for _, name in evaluated:
            lines = (whole.folder / "eval" / f"{name}.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            modes = [mode for mode in MODES[name] for _ in range(PROMPTS)]
            assert [r["mode"] for r in records] == modes
            assert all((whole.folder / r["image"]).is_file() for r in records)

    def test_samples_of_every_step(self, whole):
        for step in range(1, 5):
            file = whole.folder / "samples" / f"step_{step:06d}.jsonl"
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(samples) == 2 * GROUP
            for sample in samples:
                assert sample["step"] == step
                assert sample["completion"]
                assert sample["reward"] in (0, 1)
                assert len(sample["boxes"]) == 1
                assert (whole.folder / sample["image"]).is_file()

    def test_summary(self, whole):
        written = json.loads((whole.folder / "summary.json").read_text())
        assert written == json.loads(json.dumps(whole.summary))
        for name in ("before", "after_phase1_perceiver", "after"):
            entry = written[name]
            assert entry["n"] == PROMPTS
            assert 0 <= entry["low"] <= entry["accuracy"] <= entry["high"] <= 1
            assert list(entry["modes"]) == MODES[name]
        assert {"rollout", "partner", "update", "export"} <= written["stages"].keys()

    def test_report_is_one_page_of_its_own(self, whole):
        page = (whole.folder / "report.html").read_text()
        assert "reward/mean" in page
        assert "data:image" in page
        assert "Which character is on the" in page


class TestExport:
    @pytest.fixture(scope="class")
    def prompt(self, whole, tiny_checkpoint):
        """The trained model's pipeline and one perceiver prompt on a validation image."""
        config = make_config(whole.folder, tiny_checkpoint)
        config.model.path = str(whole.folder / "export")
        config.run = str(whole.folder.parent / "unused")
        built = launch.build_trainer(config, Console(quiet=True))
        row = built.validation_source[0]
        builder = built.pipeline.builder
        images = ImageStore.upload([row.load_image()], builder.buckets)
        question = (0, row.question_with_options, row.answer_form)
        return built, images, builder.plain("perceiver", images, *question)

    def test_transformers_continues_a_prompt_as_the_engine_does(self, whole, prompt):
        built, images, request = prompt
        pipeline = built.pipeline
        count = 12
        ours = pipeline.complete(built.initial, [request], images, Sampling(count))[0].text

        model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            whole.folder / "export", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        (grid,) = (pipeline.builder.processor.sizes.grid(v.target) for v in request.views)
        pixels = pipeline.builder.collate([request], images).patches.pixels
        ids = torch.tensor(request.tokens)[None].long()
        banned = np.flatnonzero(~pipeline.builder.processor.allowed_tokens()).tolist()
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.tensor(np.asarray(pixels[0, : grid[0] * grid[1]])),
            image_grid_thw=torch.tensor([[1, *grid]]),
            do_sample=False,
            max_new_tokens=count,
            suppress_tokens=banned,
        )[0, ids.shape[1] :]
        assert ours == pipeline.builder.processor.decode(theirs.tolist())
        assert len(ours) > 0

    def test_holds_the_trained_weights(self, whole, tiny_checkpoint):
        before, after = (
            nnx.to_pure_dict(nnx.state(load_pretrained(path, dtype="float32")))
            for path in (tiny_checkpoint, whole.folder / "export")
        )
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(moved))


# --- a run that is killed -------------------------------------------------------------------------


class Killed(Exception):
    pass


def assert_same_outcome(run: Path, whole: Run) -> None:
    """Bitwise the same weights, and the same figures but for the time they took."""
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (whole.folder / weights).read_bytes()

    def figures(rows):
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "compile/"))}
            for row in rows
        ]

    assert figures(metric_rows(run)) == figures(whole.rows)
    for file in sorted((whole.folder / "samples").glob("*.jsonl")):
        assert (run / "samples" / file.name).read_text() == file.read_text()
    summary = json.loads((run / "summary.json").read_text())
    for name in ("before", "after_phase1_perceiver", "after"):
        assert summary[name] == json.loads(json.dumps(whole.summary[name]))


class TestKilledAndResumed:
    @pytest.mark.parametrize(
        "every, where, call",
        [
            pytest.param(1, "_step", 2, id="within a phase"),
            pytest.param(3, "_step", 2, id="before the first checkpoint"),
            pytest.param(1, "_evaluate", 2, id="in the evaluation between two phases"),
            pytest.param(1, "_export", 1, id="after the last step"),
        ],
    )
    def test_equals_a_run_that_never_stopped(
        self, whole, tmp_path, tiny_checkpoint, monkeypatch, every, where, call
    ):
        config = make_config(tmp_path / "run", tiny_checkpoint)
        config.checkpoint.every = every
        calls, original = 0, getattr(Trainer, where)

        def deadly(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                self.checkpoints.manager.wait_until_finished()
                raise Killed
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, where, deadly)
            with pytest.raises(Killed):
                launch.train(config)
        launch.train(config)
        assert_same_outcome(tmp_path / "run", whole)

    def test_by_sigkill_at_any_moment(self, whole, tmp_path, tiny_checkpoint):
        """Another process, killed as soon as its second step is logged: that step's checkpoint may
        be whole, half written or not begun."""
        run = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.rl.tiny_run", str(run), str(tiny_checkpoint)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        deadline = time.monotonic() + 300
        try:
            while not self.has_step(run, 2):
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (run / "export").exists()
        launch.train(make_config(run, tiny_checkpoint))
        assert_same_outcome(run, whole)

    @staticmethod
    def has_step(run: Path, step: int) -> bool:
        file = run / "metrics.jsonl"
        return file.exists() and f'"phase_step": {step},' in file.read_text()


class TestTheDemosSettings:
    """What configs/tiny.yaml turns on: two devices, the role anchor, a frozen tower, a schedule;
    and the baseline role, which no shipped config uses."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, tiny_checkpoint):
        """The same run twice: straight through, and killed in its second step."""
        folder = tmp_path_factory.mktemp("demo")
        original, calls = Trainer._step, 0

        def deadly(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                self.checkpoints.manager.wait_until_finished()
                raise Killed
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            two = jax.devices()[:2]
            patch.setattr(launch, "make_mesh", lambda *sizes: make_mesh(2, 1, 1, two))
            launch.train(self.config(folder / "whole", tiny_checkpoint))
            with pytest.MonkeyPatch.context() as kill:
                kill.setattr(Trainer, "_step", deadly)
                with pytest.raises(Killed):
                    launch.train(self.config(folder / "killed", tiny_checkpoint))
            launch.train(self.config(folder / "killed", tiny_checkpoint))
        return folder / "whole", folder / "killed"

    def config(self, run, model):
        config = make_config(run, model)
        perceiver, _ = config.phases
        perceiver = dataclasses.replace(
            perceiver, microbatch=0, role_anchor=0.5, role_anchor_prompts=2
        )
        baseline = dataclasses.replace(perceiver, role="baseline", steps=1, role_anchor=0.0)
        config.phases = [perceiver, baseline]
        config.mesh = MeshConfig(data=2, fsdp=1)
        config.optimizer = dataclasses.replace(
            config.optimizer, freeze_vision=True, warmup_steps=1, final_fraction=0.1
        )
        config.eval = dataclasses.replace(config.eval, final_questions=0)
        return config

    def test_the_anchor_is_part_of_the_perceivers_steps(self, runs):
        rows = metric_rows(runs[0])
        assert [row["phase"] for row in rows] == ["perceiver", "perceiver", "baseline"]
        assert ["loss/anchor" in row for row in rows] == [True, True, False]
        assert all(row["loss/anchor"] > 0 for row in rows[:2])

    def test_the_rate_warms_up_and_falls(self, runs):
        peak = 1e-3
        rates = [row["lr"] for row in metric_rows(runs[0])]
        assert rates == pytest.approx([peak / 2, peak, peak / 2])

    def test_the_tower_stays_and_the_rest_moves(self, runs, tiny_checkpoint):
        before, after = (
            nnx.to_pure_dict(nnx.state(load_pretrained(path, dtype="float32")))
            for path in (tiny_checkpoint, runs[0] / "export")
        )
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert not any(jax.tree.leaves(moved["visual"]))
        assert all(jax.tree.leaves(moved["language_model"]))

    def test_killed_and_resumed_it_ends_with_the_same_weights(self, runs):
        whole, killed = ((run / "export/model.safetensors").read_bytes() for run in runs)
        assert whole == killed


def test_a_queue_of_prompts_changes_no_completion(whole, tmp_path, tiny_checkpoint):
    """Fewer slots than prompts, one column of each: the same run, in other steps of decoding."""
    queue = RolloutConfig(slots=2, columns=1, refill=1, greedy_slots=2)
    queued = Run(tmp_path / "run", tiny_checkpoint, rollout=queue)
    for ours, theirs in zip(queued.steps, whole.steps, strict=True):
        for name in ("reward/mean", "completion/length_mean", "tokens/completions"):
            assert ours[name] == theirs[name]
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], abs=1e-5)
        assert ours["rollout/steps"] > theirs["rollout/steps"]
        assert 0 < ours["rollout/occupancy"] <= 1


class TestResumingWithOtherSettings:
    def test_is_refused_with_the_names_of_the_settings(self, whole, tiny_checkpoint):
        config = make_config(whole.folder, tiny_checkpoint, seed=1)
        config.optimizer.learning_rate = 0.5
        with pytest.raises(ValueError, match=r"started with other settings \(seed, optimizer\)"):
            launch.train(config)

    def test_how_fast_and_on_what_may_change(self, whole, tiny_checkpoint):
        """A run that was out of memory goes on with fewer slots, and on another mesh."""
        config = make_config(whole.folder, tiny_checkpoint, rollout=RolloutConfig(slots=2))
        config.model.kernels, config.mesh.fsdp = "xla", 8
        launch._check_same_config(config, Path(config.run))

    def test_a_run_that_never_started_may_be_corrected(self, tmp_path, tiny_checkpoint):
        """A mistake in the settings must not make the folder unusable for the corrected ones."""
        config = make_config(tmp_path / "run", tiny_checkpoint / "no such folder")
        with pytest.raises(FileNotFoundError):
            launch.train(config)
        config.model.path = str(tiny_checkpoint)
        launch._check_same_config(config, Path(config.run))


class TestDataThatNothingCanGrade:
    def test_is_refused_before_the_model_is_loaded(self, tmp_path, tiny_checkpoint, monkeypatch):
        """Free text without a verifier: found by reading the rows, not in the first step."""
        image = {"image": base64.b64encode(b"not looked at").decode()}
        row = {"question": "What is it?", "answer": "a cat", "answer_form": "free_form"} | image
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        config = make_config(tmp_path / "run", tiny_checkpoint)
        config.data.train = str(tmp_path / "rows.jsonl")
        with monkeypatch.context() as patch:
            patch.delattr(launch, "load_pretrained")
            with pytest.raises(ValueError, match="'free_form', which only a verifier can grade"):
                launch.build_trainer(config, Console(quiet=True))
        trainer = launch.build_trainer(config, Console(quiet=True), lambda *asked: True)
        assert trainer.grade(trainer.train_source[0], "a cat") in (0, 1)


# --- bookkeeping of rewards -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_checkpoint) -> Trainer:
    config = make_config(tmp_path_factory.mktemp("built") / "run", tiny_checkpoint)
    return launch.build_trainer(config, Console(quiet=True))


PHASE = PhaseConfig(role="reasoner", prompts=2, group=3, max_new_tokens=4)


def make_experience(values: list[list[float | None]]) -> Experience:
    """Completions of 1, 2 or 3 tokens, and one filling row."""
    rows, group = len(values), len(values[0])
    mask = np.arange(4) < (np.arange(group) + 1)[:, None]
    mask = np.broadcast_to(mask, (rows, group, 4))
    completions = Completions(
        tokens=np.ones(mask.shape, np.int32),
        log_probs=np.full(mask.shape, -1.0, np.float32),
        mask=mask,
        stopped=np.broadcast_to(np.arange(group) < 2, mask.shape[:2]),
    )
    rewards = [[Reward(v, {} if v is None else {"answer": v}) for v in g] for g in values]
    nothing = [[ParsedBoxes((), True)] * group for _ in values]
    filled = np.ones((rows + 1, 5), int)
    prompts = types.SimpleNamespace(tokens=filled, valid=filled)
    rollout = Rollout(prompts, completions, [[Completion("", ())] * group] * rows)
    return Experience(rollout, rewards, [[]] * rows, nothing, [], [])


def batch_of(built: Trainer, experience: Experience):
    return training_batch(experience, built.config.loss, built.mesh)


class TestRewards:
    def test_advantages_are_relative_to_the_group(self, built):
        batch, metrics = batch_of(built, make_experience([[1, 0, 0], [1, 1, 1]]))
        std = np.std([1, 0, 0], ddof=1)
        expected = np.array([[2 / 3, -1 / 3, -1 / 3], [0, 0, 0], [0, 0, 0]]) / std
        np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
        assert metrics["reward/mean"] == pytest.approx(4 / 6)
        assert metrics["reward/zero_variance_groups"] == 0.5
        assert metrics["completion/length_mean"] == 2
        assert (metrics["tokens/prompts"], metrics["tokens/completions"]) == (10, 12)
        assert metrics["completion/length_min"] == 1
        assert metrics["completion/length_max"] == 3
        assert metrics["completion/truncated_fraction"] == pytest.approx(1 / 3)

    def test_filling_rows_are_not_trained(self, built):
        batch, _ = batch_of(built, make_experience([[1, 0, 0], [1, 1, 1]]))
        assert np.asarray(batch.mask)[:2].sum() == 12
        assert not np.asarray(batch.mask)[2].any()

    def test_a_sample_that_cannot_be_graded_is_dropped_and_counted(self, built):
        """It is not a 0: it leaves mean, deviation, loss and denominators."""
        values = [[1, 0, None], [1, 1, 1]]
        batch, metrics = batch_of(built, make_experience(values))
        mask = np.asarray(batch.mask)
        assert not mask[0, 2].any()
        assert mask[0, :2].any(-1).all()
        np.testing.assert_allclose(
            batch.advantages[0], np.array([0.5, -0.5, 0]) / np.std([1, 0], ddof=1), atol=1e-5
        )
        assert metrics["reward/dropped_fraction"] == pytest.approx(1 / 6)
        assert metrics["reward/mean"] == pytest.approx(4 / 5)
        assert metrics["reward/answer"] == pytest.approx(4 / 5)

    def test_too_many_of_them_stop_the_run(self, built):
        with pytest.raises(RuntimeError, match=r"33% of the samples.*max_dropped_fraction = 20%"):
            batch_of(built, make_experience([[1, None, 0], [1, 1, None]]))

    def test_sample_files_show_the_advantages_that_were_used(self, built, monkeypatch):
        loss = LossConfig(normalize_by_std=False)
        monkeypatch.setattr(built, "config", dataclasses.replace(built.config, loss=loss))
        experience = make_experience([[1, 0, None], [1, 1, 1]])
        batch, _ = batch_of(built, experience)
        rows = [LoadedRow(built.train_source[i], np.zeros(1)) for i in range(2)]
        shown = []

        class Log:
            def samples(self, step, samples, rows):
                shown.extend(sample["advantage"] for sample in samples)

        nothing = dict.fromkeys(("policy", "partner", "images", "seeds", "schedule", "clock"))
        step = Step(phase=PHASE, pipeline=built.pipeline, rows=rows, grade=built.grade, **nothing)
        built._log_samples(step, experience, 1, Log())
        np.testing.assert_allclose(shown, np.asarray(batch.advantages)[:2].ravel(), atol=1e-6)

    @pytest.mark.parametrize("lengths, padded", [((), 4), ((3,), 3), ((2, 3, 8), 3), ((2,), 4)])
    def test_an_update_is_no_longer_than_what_was_written(self, built, lengths, padded):
        """Completions of at most 3 tokens where 4 were allowed."""
        experience = make_experience([[1, 0, 0], [1, 1, 1]])
        batch, metrics = training_batch(experience, built.config.loss, built.mesh, lengths)
        assert batch.tokens.shape == batch.mask.shape == (3, 3, padded)
        assert batch.sampler_log_probs.shape == (3, 3, padded)
        assert np.asarray(batch.mask).sum() == 12
        assert metrics["completion/length_max"] == 3

    def test_a_broken_run_stops(self, built):
        limit = built.config.optimizer.max_skipped
        built._stop_if_broken(limit)
        with pytest.raises(RuntimeError, match="non-finite gradient"):
            built._stop_if_broken(limit + 1)


class TestRoleAnchor:
    @pytest.fixture(scope="class")
    def asked(self, built):
        """Each of two questions asked three times, as in a perceiver phase."""
        builder = built.pipeline.builder
        rows = [built.train_source[i] for i in range(2)]
        images = ImageStore.upload([row.load_image() for row in rows], builder.buckets)
        requests = [
            builder.plain("perceiver", images, i, row.question_with_options, row.answer_form)
            for i, row in enumerate(rows)
            for _ in range(3)
        ]
        texts = ["one", "two", "three", "four tiles", "five", "six"]
        encode = builder.processor.tokenizer.encode
        outputs = [Completion(t, tuple(encode(t, add_special_tokens=False))) for t in texts]
        outputs[0] = Completion("one", (*outputs[0].tokens, builder.processor.stop_ids[0]))
        experience = make_experience([[1, 0, 0], [1, 1, 1]])
        experience.idle_requests, experience.idle_outputs = requests, outputs
        return experience, images

    def test_is_off_by_default(self, built, asked):
        assert PhaseConfig().role_anchor == 0
        assert anchor_batch(PHASE, *asked, built.pipeline.builder) is None

    def test_repeats_what_the_snapshot_wrote_to_different_questions(self, built, asked):
        phase = dataclasses.replace(PHASE, role_anchor=0.5, role_anchor_prompts=2)
        anchor = anchor_batch(phase, *asked, built.pipeline.builder)
        processor = built.pipeline.builder.processor
        assert anchor.mask.shape[:2] == (2, 1)
        for row, text in enumerate(["one", "four tiles"]):
            tokens = np.asarray(anchor.tokens)[row, 0][np.asarray(anchor.mask)[row, 0]]
            assert processor.decode(tokens) == text
            # The second was cut at its limit: no stop token is made up for it.
            assert (tokens[-1] == processor.stop_ids[0]) == (row == 0)
        prompts = np.asarray(anchor.prompts.tokens)
        assert (prompts[0] != prompts[1]).any()
