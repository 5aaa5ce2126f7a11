"""The checkpoint inside the package: it loads, and both roles write what their prompts ask for."""

from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.qwen3_vl import load_pretrained
from p2r_jax.qwen3_vl.locate import default_prompt_set, locate_checkpoint
from p2r_jax.roles.answers import has_answer_tag
from p2r_jax.roles.boxes import parse_response
from p2r_jax.roles.pipeline import perceive_and_reason


def test_the_embedded_model_plays_both_roles():
    folder = locate_checkpoint("tiny")
    row = VisualSearch("test", seed=0)[0]
    result = perceive_and_reason(
        load_pretrained(folder, dtype="float32"),
        row.load_image(),
        row.question,
        options=row.options,
        prompts=default_prompt_set(folder),
    )
    assert parse_response(result.perceiver_text).well_formed
    assert len(result.boxes) == 1
    assert has_answer_tag(result.reasoner_text)
    assert result.answer in "ABCD"


def test_the_embedded_model_says_how_it_was_made():
    assert (locate_checkpoint("tiny") / "made_by.json").is_file()
