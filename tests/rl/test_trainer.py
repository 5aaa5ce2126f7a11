"""PRA-GRPO from end to end on random tiny weights: what a run does, and what it leaves behind."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from rich.console import Console

from p2r_jax.config import RolloutConfig
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.inputs import pixel_values
from p2r_jax.rl import launch
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.rollout.sampling import Sampling
from tests.rl.runs import Run
from tests.rl.tiny_run import GROUP, PROMPTS, TOKENS, make_config
from tests.rl.updates import KL_NOISE

LIVE = ["p2r", "live_perceiver", "live_reasoner", "default"]
MODES = {
    "before": ["p2r", "oracle_box"],
    "after_phase1_perceiver": LIVE,
    "after": ["p2r", "oracle_box", *LIVE[1:]],
}
"""Evaluations of a run: before it, the snapshot is the policy, and one mode tells all."""


@pytest.fixture(scope="module", autouse=True)
def _small_world(small_world):
    pass


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
        assert kl[0] == pytest.approx(0, abs=KL_NOISE)
        assert kl[2] == pytest.approx(0, abs=KL_NOISE)
        assert min(kl[1], kl[3]) > 10 * KL_NOISE

    def test_the_sampler_and_the_trainer_agree(self, whole):
        for row in whole.steps:
            assert row["sampler_gap/max"] < 1e-4
            assert row["ratio"] == 1

    def test_the_idle_role_drifts_and_it_shows(self, whole):
        """Its cross-entropy on what the snapshot wrote is told without being trained on."""
        drift = [row["loss/anchor"] for row in whole.steps]
        assert min(drift) > 0
        assert drift[1] > drift[0]
        assert drift[3] > drift[2]


class TestWhatARunLeavesBehind:
    def test_metrics_of_every_step(self, whole):
        names = ("step", "phase", "round", "phase_number", "phase_step", "data/batches")
        assert [tuple(row[name] for name in names) for row in whole.steps] == [
            (1, "perceiver", 1, 1, 1, 1),
            (2, "perceiver", 1, 1, 2, 1),
            (3, "reasoner", 1, 2, 1, 1),
            (4, "reasoner", 1, 2, 2, 1),
        ]
        names = (
            "reward/mean reward/std reward/zero_variance_groups reward/dropped_fraction "
            "reward/answer completion/length_mean completion/length_min completion/length_max "
            "completion/truncated_fraction loss/policy loss/total loss/anchor entropy/mean kl/mean "
            "ratio approx_kl clip_low_fraction clip_high_fraction dual_clip_fraction "
            "sampler_gap/mean sampler_gap/max grad_norm lr skipped_steps tokens/prompts "
            "tokens/completions tokens/seen rollout/steps rollout/occupancy verifier/asked "
            "verifier/failed compile/count compile/seconds reward/teaching_groups samples "
            "tokens/visual tokens/partner_prompts tokens/partner_completions tokens/partner_visual "
            "flops/rollout flops/partner flops/reference flops/update flops/anchor flops/total"
        )
        stages = "data upload weights encode prefill decode partner reward reference update samples"
        names = f"{names} time/step {' '.join(f'time/{stage}' for stage in stages.split())}"
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
            parts = sum(row[f"time/{stage}"] for stage in stages.split())
            assert 0.5 * row["time/step"] < parts <= row["time/step"]

    def test_tokens_seen_are_those_of_all_steps(self, whole):
        """So progress can be compared between runs of other batch sizes."""
        each = [row["tokens/prompts"] + row["tokens/completions"] for row in whole.steps]
        assert [row["tokens/seen"] for row in whole.steps] == np.cumsum(each).tolist()

    def test_what_a_step_cost_is_counted_for_both_roles(self, whole):
        """A perceiver's step asks the partner once for each of its samples, a reasoner's once for
        each question."""
        for row in whole.steps:
            assert row["samples"] == PROMPTS * GROUP
            assert 0 < row["tokens/visual"] < row["tokens/prompts"]
            assert 0 < row["tokens/partner_visual"] < row["tokens/partner_prompts"]
            asked = PROMPTS * (GROUP if row["phase"] == "perceiver" else 1)
            assert asked <= row["tokens/partner_completions"] <= asked * TOKENS
            stages = ["rollout", "partner", "reference", "update", "anchor"]
            total = sum(row[f"flops/{stage}"] for stage in stages)
            assert row["flops/total"] == pytest.approx(total)
            assert row["flops/update"] == pytest.approx(3 * row["flops/rollout"])

    def test_the_time_of_a_save_is_in_the_row_that_follows(self, whole):
        """The row of a step is written before its checkpoint, so that no checkpoint lacks it."""
        assert ["time/save" in row for row in whole.steps] == [False, True, True, True]

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

    def test_short_evaluations_on_the_way(self, whole):
        """After each step here, but for a phase's last one, which a full evaluation follows."""
        for row in whole.steps:
            names = {f"eval/{mode}/accuracy" for mode in LIVE}
            assert names & row.keys() == (names if row["phase_step"] == 1 else set())
            assert ("time/evaluation" in row) == (row["phase_step"] == 1)

    def test_samples_of_every_step(self, whole):
        for step in range(1, 5):
            samples = whole.samples(step)
            assert len(samples) == 2 * GROUP
            for sample in samples:
                assert sample["step"] == step
                assert sample["phase"] == sample["role"] == whole.steps[step - 1]["phase"]
                assert sample["completion"]
                assert sample["reward"] in (0, 1)
                assert len(sample["boxes"]) == 1
                assert (whole.folder / sample["image"]).is_file()

    def test_a_run_that_is_well_has_no_warnings(self, whole):
        """Its phases are shorter than the window."""
        assert (whole.folder / "warnings.jsonl").read_text() == ""
        assert [row["health/warnings"] for row in whole.steps] == [0] * 4
        assert whole.summary["warnings"] == 0

    def test_each_phase_is_judged_by_the_evaluations_around_it(self, whole):
        first, second = whole.summary["phases"]
        assert (first["start"], first["end"]) == ("before", "after_phase1_perceiver")
        assert (second["start"], second["end"]) == ("after_phase1_perceiver", "after")
        for entry in (first, second):
            assert (entry["mode"], entry["n"]) == ("p2r", PROMPTS)
            for side, name in (("accuracy_start", entry["start"]), ("accuracy_end", entry["end"])):
                assert entry[side] == whole.summary[name]["accuracy"]
            assert entry["verdict"] == "no clear change"  # Of four questions.
            assert 0 < entry["p_value"] <= 1

    def test_summary(self, whole):
        written = json.loads((whole.folder / "summary.json").read_text())
        assert written == json.loads(json.dumps(whole.summary))
        for name, modes in MODES.items():
            entry = written[name]
            assert entry["n"] == PROMPTS
            assert 0 <= entry["low"] <= entry["accuracy"] <= entry["high"] <= 1
            assert list(entry["modes"]) == modes

    def test_stages_of_the_summary_are_those_of_all_rows(self, whole):
        """So a run that was resumed ten times has the sums of all its parts."""
        stages = whole.summary["stages"]
        for name in ("decode", "partner", "update", "evaluation"):
            total = sum(row.get(f"time/{name}", 0) for row in whole.rows)
            assert stages[name] == pytest.approx(total, abs=0.051)
        assert "step" not in stages
        assert {"save", "export"} <= stages.keys()
        steps = sum(row["time/step"] for row in whole.steps)
        outside = sum(stages[name] for name in ("evaluation", "save", "export"))
        assert whole.summary["wall_seconds"] == pytest.approx(steps + outside, abs=0.3)

    def test_report_is_one_page_of_its_own(self, whole):
        page = (whole.folder / "report.html").read_text()
        assert "reward/mean" in page
        assert "data:image" in page
        assert "Which character is on the" in page


class TestExport:
    @pytest.fixture(scope="class")
    def prompt(self, whole, tmp_path_factory):
        """The trained model's pipeline and one perceiver prompt on a validation image."""
        config = make_config(tmp_path_factory.mktemp("unused"), whole.folder / "export")
        built = launch.build_trainer(config, Console(quiet=True))
        row = built.evaluations.source[0]
        builder = built.pipeline.builder
        images = ImageStore.upload([row.load_image()], builder.buckets)
        question = (0, row.question_with_options, row.answer_form)
        return built, images, builder.plain("perceiver", images, *question)

    def test_transformers_continues_a_prompt_as_the_engine_does(self, whole, prompt):
        built, images, request = prompt
        pipeline = built.pipeline
        count = 12
        ours = pipeline.complete(built.load(), [request], images, Sampling(count))[0].text

        model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            whole.folder / "export", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        (grid,) = (pipeline.builder.processor.sizes.grid(v.target) for v in request.views)
        vision = pipeline.builder.processor.config.vision
        pixels = pixel_values(pipeline.builder.collate([request], images).patches, vision)
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


def test_a_queue_of_prompts_changes_no_completion(whole, tmp_path, tiny_checkpoint):
    """Fewer slots than prompts, one column of each: the same run, in other steps of decoding."""
    queue = RolloutConfig(slots=2, columns=1, refill=1, greedy_slots=2)
    queued = Run(make_config(tmp_path / "run", tiny_checkpoint, rollout=queue))
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
        with pytest.raises(ValueError, match=r"started with other settings \(optimizer, seed\)"):
            launch.train(config)

    def test_how_fast_and_on_what_may_change(self, whole, tiny_checkpoint):
        """A run that was out of memory goes on with fewer slots, and on another mesh; one whose
        judge has moved asks it where it is now."""
        config = make_config(whole.folder, tiny_checkpoint, rollout=RolloutConfig(slots=2))
        config.model.kernels, config.mesh.fsdp = "xla", 8
        config.distributed.heartbeat_seconds = 10
        config.verifier.base_url, config.verifier.concurrency = "http://other/v1", 2
        config.buckets.image_gib, config.eval.image_cache_gib = 8.0, 0.5
        launch.check_same_config(config, Path(config.run))
        config.verifier.kind = "model"
        with pytest.raises(ValueError, match=r"\(verifier\)"):
            launch.check_same_config(config, Path(config.run))

    def test_a_run_that_never_started_may_be_corrected(self, tmp_path, tiny_checkpoint):
        """A mistake in the settings must not make the folder unusable for the corrected ones."""
        config = make_config(tmp_path / "run", tiny_checkpoint / "no such folder")
        with pytest.raises(FileNotFoundError):
            launch.train(config)
        config.model.path = str(tiny_checkpoint)
        launch.check_same_config(config, Path(config.run))


class TestWhatIsFoundBeforeTheModelIsLoaded:
    @pytest.fixture
    def config(self, tmp_path, tiny_checkpoint, monkeypatch):
        monkeypatch.delattr(launch, "load_pretrained")
        return make_config(tmp_path / "run", tiny_checkpoint)

    def test_data_that_nothing_can_grade(self, config, tmp_path):
        """Free text without a verifier: found by reading the rows, not in the first step."""
        image = {"image": base64.b64encode(b"not looked at").decode()}
        row = {"question": "What is it?", "answer": "a cat", "answer_form": "free_form"} | image
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(9)))
        config.data.train = str(tmp_path / "rows.jsonl")
        with pytest.raises(ValueError, match="'free_form', which only a verifier can grade"):
            launch.build_trainer(config, Console(quiet=True))
        judge = lambda *asked: True
        trainer = launch.build_trainer(config, Console(quiet=True), judge)
        assert trainer.grader.verifier is judge

    def test_sampling_that_cannot_work(self, config):
        config.phases[1].top_p = 0.0
        with pytest.raises(ValueError, match=r"^phases\[1\]\.top_p"):
            launch.build_trainer(config, Console(quiet=True))

    def test_updates_that_do_not_fill_the_devices(self, config, monkeypatch):
        from p2r_jax.parallel.mesh import make_mesh

        two = jax.devices()[:2]
        monkeypatch.setattr(launch, "make_mesh", lambda *sizes: make_mesh(2, 1, 1, two))
        config.phases[0].microbatch, config.phases[0].minibatches = 0, 4
        with pytest.raises(ValueError, match=r"phases\[0\]: the prompts of an update.*= 2"):
            launch.build_trainer(config, Console(quiet=True))

    def test_modes_that_need_a_partner_where_there_is_none(self, config):
        config.eval.final_modes = ["live_perceiver"]
        with pytest.raises(ValueError, match="unknown evaluation mode"):
            launch.build_trainer(config, Console(quiet=True))
