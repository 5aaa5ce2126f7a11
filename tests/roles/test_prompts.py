"""How prompt sets are read, checked, imported and turned into chat messages."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from p2r_jax.roles import prompts
from p2r_jax.roles.prompts import build_messages, import_prompts, load_prompt_set, write_prompt_set

SHIPPED = ["default", "tiny"]
FORMS = [*prompts.TRAINING_FORMS, *prompts.EVALUATION_FORMS]


def build(prompt_set, role, question="Which colour?", **options):
    options = {"num_images": 1, "answer_form": "mca"} | options
    return build_messages(prompt_set, role, question, **options)


def user_text(messages):
    """The text after the images."""
    return messages[-1]["content"][-1]["text"]


@pytest.fixture
def default():
    return load_prompt_set("default")


# --- build_messages ---------------------------------------------------------------------------


def test_images_come_before_the_text_of_one_user_turn(default):
    system, user = build(default, "reasoner", num_images=3)
    assert system == {
        "role": "system",
        "content": [{"type": "text", "text": default.reasoner.system}],
    }
    assert user["role"] == "user"
    assert [item["type"] for item in user["content"]] == ["image", "image", "image", "text"]


def test_a_newline_can_follow_every_image(default):
    with_newlines = dataclasses.replace(default, newline_after_image=True)
    content = build(with_newlines, "reasoner", num_images=2)[-1]["content"]
    image, newline = {"type": "image"}, {"type": "text", "text": "\n"}
    assert content[:-1] == [image, newline, image, newline]
    assert content[-1] == build(default, "reasoner", num_images=2)[-1]["content"][-1]


def test_an_empty_system_text_means_no_system_turn(default):
    silent = dataclasses.replace(
        default, perceiver=dataclasses.replace(default.perceiver, system="")
    )
    assert [turn["role"] for turn in build(silent, "perceiver")] == ["user"]


@pytest.mark.parametrize("role", prompts.ROLES)
@pytest.mark.parametrize("question", ["What does {x} say?", "{question}", "{", "100 % {0} {{}}"])
def test_a_question_may_contain_braces(default, role, question):
    marked = user_text(build(default, role, "QUESTION"))
    assert user_text(build(default, role, question)) == marked.replace("QUESTION", question)


def test_only_the_reasoner_is_told_about_evidence(default):
    for role in prompts.ROLES:
        told = build(default, role, has_evidence=True) != build(default, role, has_evidence=False)
        assert told == (role == "reasoner")


def test_the_answer_form_is_a_suffix_that_the_perceiver_does_not_get(default):
    for role in ("reasoner", "baseline", "direct"):
        for form, suffix in getattr(default, role).answer_forms.items():
            assert user_text(build(default, role, answer_form=form)).endswith(suffix)
    assert build(default, "perceiver", answer_form="na") == build(
        default, "perceiver", answer_form=None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "judge"}, "unknown role 'judge'"),
        ({"num_images": 0}, "at least one image"),
        ({"answer_form": "essay"}, "no 'essay'"),
        ({"answer_form": None}, "no None"),
    ],
)
def test_a_prompt_that_cannot_be_built_says_why(default, options, message):
    with pytest.raises(ValueError, match=message):
        build(default, **({"role": "reasoner"} | options))


# --- the shipped sets -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_word_every_role_in_every_answer_form(name):
    prompt_set = load_prompt_set(name)
    assert prompt_set.name == name
    for role in prompts.ROLES:
        for form in FORMS:
            assert "Which colour?" in user_text(build(prompt_set, role, answer_form=form))


def test_the_default_perceiver_asks_for_the_json_that_parse_boxes_reads(default):
    text = default.perceiver.text
    assert '[{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]' in text
    assert "0 to 1000" in text
    assert "report []" in text


def test_the_default_reasoner_answers_in_tags_and_the_direct_role_does_not(default):
    for form in FORMS:
        for role in ("reasoner", "baseline"):
            for tag in ("<think>", "</think>", "<answer>", "</answer>"):
                assert tag in user_text(build(default, role, answer_form=form))
        assert "<" not in user_text(build(default, "direct", answer_form=form))


def test_only_the_default_evidence_prompt_speaks_of_outlines_and_crops(default):
    for word in ("outlined", "crops"):
        assert word in default.reasoner.with_evidence
        assert word not in default.reasoner.without_evidence
        assert word not in default.baseline.text


def test_the_single_stage_control_differs_from_the_reasoner_in_evidence_alone(default):
    assert default.baseline.text == default.reasoner.without_evidence
    assert default.baseline.answer_forms == default.reasoner.answer_forms


def test_the_tiny_set_spends_few_words():
    tiny = load_prompt_set("tiny")
    for role in prompts.ROLES:
        for has_evidence in (True, False):
            messages = build(tiny, role, "", has_evidence=has_evidence)
            assert len(user_text(messages).split()) <= 12
            assert 1 <= len(messages[0]["content"][0]["text"].split()) <= 3
    assert tiny.perceiver.text == "Find: {question}"


# --- load_prompt_set --------------------------------------------------------------------------

MINIMAL = """
perceiver: {system: s, text: "find {question}"}
reasoner:
  system: s
  with_evidence: "zoomed {question}"
  without_evidence: "whole {question}"
  answer_forms: &forms {mca: a, na: b, free_form: c}
baseline: {system: s, text: "whole {question}", answer_forms: *forms}
direct: {system: s, text: "say {question}", answer_forms: *forms}
"""


def load_text(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_prompt_set(path)


def test_a_set_of_ones_own_is_read_from_a_path(tmp_path):
    mine = load_text(tmp_path, MINIMAL)
    assert mine.name == "mine"
    assert user_text(build(mine, "direct", "Q")) == "say Qa"
    assert not mine.newline_after_image


def test_evaluation_forms_are_optional_until_they_are_asked_for(tmp_path):
    mine = load_text(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match=r"prompt set 'mine': reasoner\.answer_forms has no"):
        build(mine, "reasoner", answer_form="yes_no")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("direct:", "driect:", "driect: unknown field"),
        ("direct:", "driect:", "direct: missing"),
        ("perceiver: {system: s, ", "perceiver: {", "perceiver.system: missing"),
        ("{system: s, text", "{system: s, txt", "perceiver.txt: unknown field"),
        ("find {question}", "find {q}", "perceiver.text: has no {question}"),
        ("whole {question}", "whole", "reasoner.without_evidence: has no {question}"),
        ("na: b, ", "", "reasoner.answer_forms.na: missing"),
        ("na: b", "na: b, yesno: d", "reasoner.answer_forms.yesno: unknown field"),
        ("na: b", "na: no", "reasoner.answer_forms.na: expected text"),
        ("&forms {mca: a, na: b, free_form: c}", "&forms [mca]", "expected a mapping from answer"),
        ('{system: s, text: "find', '{system: 3, text: "find', "perceiver.system: expected text"),
        (
            'perceiver: {system: s, text: "find {question}"}',
            "perceiver: 3",
            "perceiver: expected a",
        ),
        ("\nperceiver", "\nnewline_after_image: maybe\nperceiver", "expected true or false"),
    ],
)
def test_a_faulty_set_is_refused_naming_the_file_and_the_field(tmp_path, old, new, fault):
    with pytest.raises(ValueError) as error:
        load_text(tmp_path, MINIMAL.replace(old, new, 1))
    assert "mine.yaml" in str(error.value)
    assert fault in str(error.value)


def test_one_error_lists_every_fault(tmp_path):
    with pytest.raises(ValueError, match=r"direct: missing; .* has no \{question\}"):
        load_text(tmp_path, MINIMAL.replace("find {question}", "find").replace("direct:", "d:"))


@pytest.mark.parametrize("text", ["", "[]", "a: [", "just words"])
def test_what_is_not_a_mapping_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_text(tmp_path, text)


def test_an_unknown_name_lists_the_shipped_sets():
    with pytest.raises(FileNotFoundError, match="named 'defualt'; shipped: default, tiny"):
        load_prompt_set("defualt")


def test_an_installed_package_reads_the_sets_it_carries(tmp_path, monkeypatch):
    folder = tmp_path / "_configs" / "prompts"
    folder.mkdir(parents=True)
    (folder / "carried.yaml").write_text(MINIMAL)
    monkeypatch.setattr(prompts.importlib.resources, "files", lambda package: tmp_path)
    assert load_prompt_set("carried").name == "carried"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_prompt_set(tmp_path / "nowhere.yaml")


# --- write_prompt_set -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_written_set_reads_back_unchanged(tmp_path, name):
    prompt_set = load_prompt_set(name)
    path = tmp_path / "new" / "copy.yaml"
    write_prompt_set(prompt_set, path)
    assert load_prompt_set(path) == prompt_set


text_with_spaces = st.text(st.sampled_from("a \n\t:{}#|>-'\"…\r\x85\u2028人")) | st.text(
    st.characters(exclude_categories=["Cs"])
)


@given(text_with_spaces)
def test_any_text_survives_writing(tmp_path_factory, text):
    base = load_prompt_set("tiny")
    wild = dataclasses.replace(
        base, perceiver=prompts.PerceiverPrompt(system=text, text="{question}" + text)
    )
    path = tmp_path_factory.mktemp("prompts") / "wild.yaml"
    write_prompt_set(wild, path)
    assert load_prompt_set(path) == wild


# --- import_prompts ---------------------------------------------------------------------------

# The shape of the authors' module, in words of our own.
MODULE = """
import json

raise SystemExit("this file must never be executed")

TEMPLATES = {
    "default": {
        "pre_prompt": "Q: {question}\\n",
        "mca_post_prompt": "letter\\n", "na_post_prompt": "number\\n",
        "free_form_post_prompt": "text\\n", "yes_no_post_prompt": "yes or no\\n",
    },
    "thinking": {
        "pre_prompt": ("Q: {question}\\n" "Think. \\n"),
        "mca_post_prompt": "think, letter\\n", "na_post_prompt": "think, number\\n",
        "free_form_post_prompt": "think, text\\n",
    },
    "p2r": {
        "perceive_pre_prompt": "Q: {question}\\n",
        "perceive_image_post_prompt": 'As JSON: [{"bbox_2d": [x1, y1, x2, y2]}]',
        "pre_prompt": "Q: {question}\\nThink.\\n",
        "image_pre_prompt": "Q: {question}\\nSee the crops. Think.\\n",
        "mca_post_prompt": "reason, letter\\n", "na_post_prompt": "reason, number\\n",
        "free_form_post_prompt": "reason, text\\n",
    },
    "grounding": {"pre_prompt": "Locate {description}.\\n"},
}

def build_system_prompt() -> str:
    return "You are an assistant."
"""


def import_text(tmp_path, text, **options):
    path = tmp_path / "prompt.py"
    path.write_text(text)
    return import_prompts(path, **options)


def test_the_authors_modes_become_roles_word_for_word(tmp_path):
    imported = import_text(tmp_path, MODULE)
    said = {
        role: user_text(build(imported, role, "why?", answer_form="na")) for role in prompts.ROLES
    }
    assert said == {
        "perceiver": 'Q: why?\nAs JSON: [{"bbox_2d": [x1, y1, x2, y2]}]',
        "reasoner": "Q: why?\nSee the crops. Think.\nreason, number\n",
        "baseline": "Q: why?\nThink. \nthink, number\n",
        "direct": "Q: why?\nnumber\n",
    }
    fallback = build(imported, "reasoner", "why?", answer_form="na", has_evidence=False)
    assert user_text(fallback) == "Q: why?\nThink.\nreason, number\n"
    assert fallback[0]["content"][0]["text"] == "You are an assistant."
    assert set(imported.direct.answer_forms) == {"mca", "na", "free_form", "yes_no"}


def test_an_imported_set_can_be_kept_as_yaml(tmp_path):
    imported = import_text(tmp_path, MODULE, newline_after_image=True)
    write_prompt_set(imported, tmp_path / "authors.yaml")
    assert load_prompt_set(tmp_path / "authors.yaml") == imported
    assert yaml.safe_load((tmp_path / "authors.yaml").read_text())["newline_after_image"] is True


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"perceive_pre_prompt"', '"percieve_pre_prompt"', r"Expected .*p2r\(perceive_pre_prompt"),
        ('"perceive_pre_prompt"', '"percieve_pre_prompt"', r"Found .*p2r\(percieve_pre_prompt"),
        ("TEMPLATES = {", "TEMPLATES = load({", "no literal dict at the top level"),
        ("You are an assistant.", "{name}", None),
        ('return "You are an assistant."', "return load()", "no system prompt"),
        ("import json", "import json ???", "not a Python module"),
        ("See the crops.", "{question}", None),
        (
            '{question}\\n",\n        "perceive_im',
            '{q}\\n",\n        "perceive_im',
            "has no {quest",
        ),
    ],
)
def test_a_module_of_another_shape_is_refused_with_what_was_found(tmp_path, old, new, fault):
    text = MODULE.replace(old, new, 1)
    if new == "TEMPLATES = load({":
        text = text.replace("\n}\n", "\n})\n", 1)
    if fault is None:
        import_text(tmp_path, text)
        return
    with pytest.raises(ValueError, match=fault) as error:
        import_text(tmp_path, text)
    assert "prompt.py" in str(error.value)


def test_a_missing_module_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompt\.py"):
        import_prompts(tmp_path / "prompt.py")
