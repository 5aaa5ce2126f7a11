"""The checkpoint inside the package: it loads, and both roles write what their prompts ask for."""

import dataclasses
import json

from flax import nnx

from p2r_jax.data.loader import evaluation_batches
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.evals.runner import Decoding, evaluate
from p2r_jax.evals.scoring import summarize_modes
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.locate import locate_checkpoint
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.answers import has_answer_tag
from p2r_jax.roles.boxes import parse_response
from p2r_jax.roles.pipeline import Pipeline, default_prompt_set, perceive_and_reason
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.rollout.generate import Schedule
from p2r_jax.sft.dense import DenseConfig
from p2r_jax.sft.warm_start import BUCKETS, WarmStartConfig


def test_the_embedded_model_plays_both_roles():
    folder = locate_checkpoint("tiny")
    row = VisualSearch("test", seed=0)[0]
    result = perceive_and_reason(
        load_pretrained(folder, dtype="float32"),
        row.load_image(),
        row.question,
        options=row.options,
    )
    assert parse_response(result.perceiver_text).well_formed
    assert len(result.boxes) == 1
    assert has_answer_tag(result.reasoner_text)
    assert result.answer in "ABCD"


def test_it_is_the_weak_start_that_the_readme_describes():
    """It boxes the right tile about half the time, reads most characters in a crop and none in the
    overview. Bounds are wide: 128 questions."""
    folder = locate_checkpoint("tiny")
    processor = Processor.from_pretrained(folder)
    graph, params = nnx.split(load_pretrained(folder, dtype="float32"), nnx.Param)
    prompts = load_prompt_set(default_prompt_set(processor.config))
    pipeline = Pipeline.create(graph, processor, prompts, BUCKETS, schedule=Schedule(slots=64))
    batches = evaluation_batches(VisualSearch("test", seed=0), 64, 128)
    modes = ("default", "p2r", "oracle_box")
    records = evaluate(
        pipeline, params, lambda wanted: batches, modes, Decoding.of(28, 10, 16), total=128
    )
    summary = summarize_modes("", records)["modes"]
    assert 0.3 < summary["p2r"]["hit_rate"] < 0.75
    assert summary["oracle_box"]["accuracy"] > 0.55
    assert summary["default"]["accuracy"] < 0.4


def test_it_was_made_by_one_command_with_the_settings_that_are_the_defaults_now():
    """Whoever changes the recipe makes the checkpoint again."""
    made = json.loads((locate_checkpoint("tiny") / "made_by.json").read_text())
    assert made["command"] == "p2r sft --out DIR --seed 0"
    for stage, settings in (("dense", DenseConfig()), ("joint", WarmStartConfig())):
        assert made[stage]["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
        assert made[stage]["seconds"] > 0
