"""What each role is told: prompt sets, and the one builder that turns them into chat messages.

Wording is data. A prompt set is a YAML file (`configs/prompts/*.yaml`); published weights need the
wording they were trained with, so a set can also be read from the authors' own prompt module.

    newline_after_image: false     # "\\n" after every image of the user turn
    perceiver:                     # writes boxes
      system: …                    # "" = no system turn
      text: …{question}…
    reasoner:                      # answers from evidence, or from the plain image for want of it
      system: …
      with_evidence: …{question}…
      without_evidence: …{question}…
      answer_forms: {mca: …, na: …, free_form: …, one_word: …, caption: …, yes_no: …}
    baseline: {system, text, answer_forms}   # plain image, single-stage reasoning
    direct: {system, text, answer_forms}     # plain image, the answer alone

A user turn reads: images, then the role's text with the question in place of `{question}`, then the
answer form's suffix. Nothing is inserted between text and suffix.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.resources
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Role = Literal["perceiver", "reasoner", "baseline", "direct"]
ROLES: tuple[str, ...] = get_args(Role)

# How an answer is asked for. Every set words the first three; the others occur in evaluation only.
TRAINING_FORMS = ("mca", "na", "free_form")  # option letter, number, free text
EVALUATION_FORMS = ("one_word", "caption", "yes_no")

QUESTION = "{question}"


@dataclass(frozen=True)
class PerceiverPrompt:
    """Asks for boxes.

    Attributes:
      system: the system turn; "" for none.
      text: the user's text, with `{question}`.
    """

    system: str
    text: str


@dataclass(frozen=True)
class ReasonerPrompt:
    """Asks for an answer after perception.

    Attributes:
      system: the system turn; "" for none.
      with_evidence: the user's text, with `{question}`, when the images are the annotated image and
        its crops.
      without_evidence: the same when there is only the original image.
      answer_forms: answer form → suffix.
    """

    system: str
    with_evidence: str
    without_evidence: str
    answer_forms: Mapping[str, str]


@dataclass(frozen=True)
class AnswerPrompt:
    """Asks for an answer from the plain image.

    Attributes:
      system: the system turn; "" for none.
      text: the user's text, with `{question}`.
      answer_forms: answer form → suffix.
    """

    system: str
    text: str
    answer_forms: Mapping[str, str]


@dataclass(frozen=True)
class PromptSet:
    """The wording of every role.

    Attributes:
      perceiver: writes boxes.
      reasoner: answers, given evidence or not.
      baseline: reasons over the plain image; the single-stage control.
      direct: answers at once from the plain image.
      newline_after_image: put "\\n" after every image.
      name: where the set came from; not part of its identity.
    """

    perceiver: PerceiverPrompt
    reasoner: ReasonerPrompt
    baseline: AnswerPrompt
    direct: AnswerPrompt
    newline_after_image: bool = False
    name: str = field(default="", compare=False)


_ROLE_TYPES = {
    "perceiver": PerceiverPrompt,
    "reasoner": ReasonerPrompt,
    "baseline": AnswerPrompt,
    "direct": AnswerPrompt,
}


def build_messages(
    prompt_set: PromptSet,
    role: Role,
    question: str,
    *,
    num_images: int,
    answer_form: str | None,
    has_evidence: bool = True,
) -> list[dict[str, Any]]:
    """One prompt as chat messages in Hugging Face's content-list form.

    Args:
      prompt_set: the wording.
      role: who is asked.
      question: inserted verbatim; it may contain braces.
      num_images: images of the user turn; at least 1. For a reasoner with evidence, the annotated
        image and its crops.
      answer_form: how to answer (`mca`, `na`, ...). The perceiver ignores it.
      has_evidence: whether regions were outlined and cropped. Only the reasoner looks at it.

    Returns:
      A system turn, unless its text is empty, and a user turn. Images are `{"type": "image"}`, to
      be paired with pixels in order.

    Raises:
      ValueError: unknown role, an answer form the set does not word, or no image.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
    if num_images < 1:
        raise ValueError(f"a prompt needs at least one image, got num_images={num_images}")

    prompt = getattr(prompt_set, role)
    if isinstance(prompt, ReasonerPrompt):
        text = prompt.with_evidence if has_evidence else prompt.without_evidence
    else:
        text = prompt.text
    # One pass of `replace`, not `format`: prompts show JSON, and questions may hold braces.
    text = text.replace(QUESTION, question)
    if not isinstance(prompt, PerceiverPrompt):
        text += _suffix(prompt_set, role, prompt.answer_forms, answer_form)

    image: list[dict[str, Any]] = [{"type": "image"}]
    if prompt_set.newline_after_image:
        image.append({"type": "text", "text": "\n"})
    content = [dict(item) for _ in range(num_images) for item in image]
    content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if prompt.system:
        system = [{"type": "text", "text": prompt.system}]
        messages.insert(0, {"role": "system", "content": system})
    return messages


def load_prompt_set(name_or_path: str | Path) -> PromptSet:
    """Reads a prompt set: one that is shipped, by name (`default`, `tiny`), or a YAML file.

    Raises:
      FileNotFoundError: no such file, or no shipped set of that name; lists those there are.
      ValueError: not a valid prompt set; names the file and every field at fault.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise FileNotFoundError(f"no prompt set at {path}")
        return _parse(path.read_text(encoding="utf-8"), source=str(path), name=path.stem)

    shipped = _shipped_sets()
    if path.name not in shipped:
        raise FileNotFoundError(
            f"no prompt set named {path.name!r}; shipped: {', '.join(sorted(shipped))}. "
            "Give a path ending in .yaml for a set of your own"
        )
    file = shipped[path.name]
    return _parse(file.read_text(encoding="utf-8"), source=str(file), name=path.name)


def write_prompt_set(prompt_set: PromptSet, path: str | Path) -> None:
    """Writes a prompt set that `load_prompt_set` reads back unchanged; makes parent directories."""
    values = dataclasses.asdict(prompt_set)
    del values["name"]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    path.write_text(text, encoding="utf-8")


def import_prompts(py_file: str | Path, newline_after_image: bool = False) -> PromptSet:
    """Reads the prompts of the authors' `evaluation/prompt.py`. The file is parsed, never executed.

    It must hold a literal dict with an entry per mode (`default`, `thinking`, `p2r`), each a dict
    of texts, and the system prompt as the constant that a function returns or a name holds. Other
    entries are ignored.

    Args:
      py_file: from the user's own clone of the authors' repository.
      newline_after_image: False as in the authors' evaluation, True as in their training.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a module; says what was found and what was expected.
    """
    path = Path(py_file)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt module at {path}")
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a Python module: {error}") from error

    modes = _find_modes(module, path)
    system = _find_system_prompt(module, path)
    p2r = modes["p2r"]
    values = {
        "newline_after_image": newline_after_image,
        "perceiver": {
            "system": system,
            "text": p2r["perceive_pre_prompt"] + p2r["perceive_image_post_prompt"],
        },
        "reasoner": {
            "system": system,
            "with_evidence": p2r["image_pre_prompt"],
            "without_evidence": p2r["pre_prompt"],
            "answer_forms": _imported_forms(p2r),
        },
    }
    for role, mode in (("baseline", "thinking"), ("direct", "default")):
        values[role] = {
            "system": system,
            "text": modes[mode]["pre_prompt"],
            "answer_forms": _imported_forms(modes[mode]),
        }
    return _from_values(values, source=str(path), name=path.stem)


# --- reading YAML -----------------------------------------------------------------------------


def _shipped_sets() -> dict[str, Traversable]:
    """Name → file of the sets that come with the package, installed or in a source checkout."""
    installed = importlib.resources.files("p2r_jax").joinpath("_configs", "prompts")
    checkout = Path(__file__).resolve().parents[2] / "configs" / "prompts"
    for folder in (installed, checkout):
        if folder.is_dir():
            return {f.name[:-5]: f for f in folder.iterdir() if f.name.endswith(".yaml")}
    raise FileNotFoundError(
        f"the shipped prompt sets are missing: neither {installed} nor {checkout} exists. "
        "Reinstall the package"
    )


def _parse(text: str, source: str, name: str) -> PromptSet:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"prompt set {source}: not valid YAML: {error}") from error
    return _from_values(values, source, name)


def _from_values(values: Any, source: str, name: str) -> PromptSet:
    """A checked prompt set; one error names every field at fault."""
    faults = list(_faults(values))
    if faults:
        raise ValueError(f"prompt set {source}: " + "; ".join(faults))
    roles = {role: cls(**values[role]) for role, cls in _ROLE_TYPES.items()}
    return PromptSet(
        **roles, newline_after_image=values.get("newline_after_image", False), name=name
    )


def _faults(values: Any) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"expected a mapping with {', '.join(ROLES)}, got {type(values).__name__}"
        return
    yield from _key_faults("", values, required=ROLES, optional=("newline_after_image",))
    if not isinstance(values.get("newline_after_image", False), bool):
        yield "newline_after_image: expected true or false"
    for role in ROLES:
        if role in values:
            yield from _role_faults(role, values[role])


def _role_faults(role: str, values: Any) -> Iterator[str]:
    fields = [f.name for f in dataclasses.fields(_ROLE_TYPES[role])]
    if not isinstance(values, dict):
        yield f"{role}: expected a mapping with {', '.join(fields)}"
        return
    yield from _key_faults(f"{role}.", values, required=fields)
    for name in fields:
        if name not in values:
            continue
        if name == "answer_forms":
            yield from _form_faults(f"{role}.answer_forms", values[name])
        elif not isinstance(values[name], str):
            yield f"{role}.{name}: expected text, got {values[name]!r}"
        elif name != "system" and QUESTION not in values[name]:
            yield f"{role}.{name}: has no {QUESTION}"


def _form_faults(where: str, forms: Any) -> Iterator[str]:
    if not isinstance(forms, dict):
        yield f"{where}: expected a mapping from answer form to text"
        return
    yield from _key_faults(f"{where}.", forms, TRAINING_FORMS, EVALUATION_FORMS)
    for form, text in forms.items():
        if not isinstance(text, str):
            yield f'{where}.{form}: expected text ("" for none), got {text!r}'


def _key_faults(where: str, values: dict, required: Any, optional: Any = ()) -> Iterator[str]:
    known = (*required, *optional)
    for key in values:
        if key not in known:
            yield f"{where}{key}: unknown field (known: {', '.join(known)})"
    for key in required:
        if key not in values:
            yield f"{where}{key}: missing"


def _suffix(
    prompt_set: PromptSet, role: str, forms: Mapping[str, str], answer_form: str | None
) -> str:
    if answer_form is None or answer_form not in forms:
        raise ValueError(
            f"prompt set {prompt_set.name!r}: {role}.answer_forms has no {answer_form!r}; "
            f"it has {', '.join(forms)}"
        )
    return forms[answer_form]


# --- writing YAML -----------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, as a person would."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    lines = text.split("\n")
    if all(line.isprintable() or not line for line in lines):
        style = "|" if len(lines) > 1 else None
    else:
        style = '"'  # a block cannot hold control characters and Unicode's other line breaks
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


# --- reading the authors' module --------------------------------------------------------------

_MODE_TEXTS = {
    "default": ("pre_prompt",),
    "thinking": ("pre_prompt",),
    "p2r": ("perceive_pre_prompt", "perceive_image_post_prompt", "image_pre_prompt", "pre_prompt"),
}


def _form_key(form: str) -> str:
    return f"{form}_post_prompt"


def _imported_forms(texts: Mapping[str, str]) -> dict[str, str]:
    forms = (*TRAINING_FORMS, *EVALUATION_FORMS)
    return {form: texts[_form_key(form)] for form in forms if _form_key(form) in texts}


def _find_modes(module: ast.Module, path: Path) -> dict[str, dict[str, str]]:
    """The first literal dict of the module that has every mode with every text it needs."""
    wanted = {
        mode: (*texts, *map(_form_key, TRAINING_FORMS)) for mode, texts in _MODE_TEXTS.items()
    }
    found = []
    for name, value in _assignments(module):
        if not isinstance(value, dict):
            continue
        if all(
            isinstance(value.get(mode), dict)
            and all(isinstance(value[mode].get(key), str) for key in keys)
            for mode, keys in wanted.items()
        ):
            return value
        found.append(f"{name}: {_describe(value)}")
    raise ValueError(
        f"{path}: no dict with the expected prompts. Expected {_describe(wanted)}. "
        f"Found {'; '.join(found) or 'no literal dict at the top level'}"
    )


def _find_system_prompt(module: ast.Module, path: Path) -> str:
    candidates = dict(_assignments(module))
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.body:
            last = node.body[-1]
            if isinstance(last, ast.Return) and isinstance(last.value, ast.Constant):
                candidates[node.name] = last.value.value
    for name, value in candidates.items():
        if "system" in name.lower() and isinstance(value, str):
            return value
    raise ValueError(
        f"{path}: no system prompt. Expected a function returning a constant, or a constant, with "
        f"'system' in its name. Found {', '.join(candidates) or 'neither'}"
    )


def _assignments(module: ast.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of the top-level assignments whose value is a literal."""
    for node in module.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        try:
            literal = ast.literal_eval(value)
        except (ValueError, TypeError, RecursionError):
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id, literal


def _describe(modes: Mapping) -> str:
    return ", ".join(
        f"{mode}({', '.join(map(str, texts))})" if isinstance(texts, Mapping | tuple) else str(mode)
        for mode, texts in modes.items()
    )
