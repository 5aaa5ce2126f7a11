"""What a study compares: read from YAML, checked before anything runs.

    base: [../tiny.yaml]          # config files of `p2r train` that add up, from this file's folder
    settings: {...}               # over the base, for all arms
    arms:
      alternate:                  # the run folders and the table have this name
        description: one round    # optional
        metric: p2r               # evaluation mode that is the arm's outcome; default p2r
        overrides: {rounds: 1}    # over base and settings; lists are replaced whole
    seeds: [0, 1, 2]
    contrasts:
      primary: {schedule: alternate - joint}    # corrected together (Holm)
      secondary: {...}
    margin: 3                     # equivalence: points of accuracy
    draws: 10000                  # of the bootstrap
    final_questions: 1000         # of the evaluations before training and at its end
    definitions: {...}            # not read: a place for YAML anchors

`run`, `seed` and `eval.final_questions` belong to the study and cannot be set elsewhere.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from p2r_jax.config import TrainConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
OWN = ("run", "seed")
"""Settings of a run that the study decides."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    metric: str = "p2r"
    """Evaluation mode whose accuracy is the outcome."""
    description: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The difference of two arms."""

    name: str
    first: str
    second: str
    primary: bool

    def __str__(self) -> str:
        return f"{self.first} - {self.second}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of arms, each trained with every seed."""

    name: str
    base: tuple[str, ...]
    """Config files as they were given, relative to `folder`."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    contrasts: tuple[Contrast, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    description: str = ""
    margin: float = 3.0
    """Points of accuracy; a difference that lies within counts as none."""
    confidence: float = 0.95
    draws: int = 10_000
    final_questions: int | None = None
    """None = as the base says."""
    folder: Path = dataclasses.field(default=Path(), compare=False)

    def arm(self, name: str) -> Arm:
        """Raises ValueError naming the arms that there are."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"no arm is called {name!r}: {', '.join(a.name for a in self.arms)}")

    def plain(self) -> dict[str, Any]:
        """As JSON or YAML has it, without folders of this machine."""
        return {
            "name": self.name,
            "description": self.description,
            "base": list(self.base),
            "settings": dict(self.settings),
            "arms": {
                arm.name: {
                    "metric": arm.metric,
                    "description": arm.description,
                    "overrides": dict(arm.overrides),
                }
                for arm in self.arms
            },
            "seeds": list(self.seeds),
            "contrasts": {
                kind: {c.name: str(c) for c in self.contrasts if c.primary is primary}
                for kind, primary in (("primary", True), ("secondary", False))
            },
            "margin": self.margin,
            "confidence": self.confidence,
            "draws": self.draws,
            "final_questions": self.final_questions,
        }


def read_study(file: str | Path, more: Sequence[str | Path] = ()) -> Study:
    """A study from its YAML file. more: config files over its base, relative to here.

    Raises ValueError naming the file and the field, OSError if it cannot be read.
    """
    path = Path(file)
    try:
        raw = _load(path)
        base = raw.get("base") or []
        base = [base] if isinstance(base, str) else base
        if not isinstance(base, list) or not all(isinstance(name, str) for name in base):
            raise ValueError("base must be a config file or a list of them")
        extra = [os.path.relpath(Path(name).resolve(), path.resolve().parent) for name in more]
        return _study(raw, path, (*base, *extra))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _study(raw: Mapping[str, Any], path: Path, base: tuple[str, ...]) -> Study:
    known = {f.name for f in dataclasses.fields(Study)} - {"folder"}
    _only(raw, known | {"definitions"}, "")
    arms_raw = _mapping(raw.get("arms"), "arms")
    if not arms_raw:
        raise ValueError("arms: at least one is needed")
    arms = []
    for name, given in arms_raw.items():
        where = f"arms.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{where}: a name is letters, digits, _, - and . only")
        own = _mapping(given, where)
        _only(own, {"metric", "description", "overrides"}, where)
        overrides = _mapping(own.get("overrides"), f"{where}.overrides")
        _unowned(overrides, f"{where}.overrides")
        metric, description = own.get("metric", "p2r"), own.get("description", "")
        if not isinstance(metric, str) or not isinstance(description, str):
            raise ValueError(f"{where}: metric and description must be text")
        arms.append(Arm(name, metric, description, overrides))
    seeds = raw.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(_whole(s) and s >= 0 for s in seeds):
        raise ValueError(f"seeds must be a list of whole numbers from 0 on, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: {_first_twice(seeds)} is there twice")
    settings = _mapping(raw.get("settings"), "settings")
    _unowned(settings, "settings")
    study = Study(
        name=str(raw.get("name", path.stem)),
        base=base,
        arms=tuple(arms),
        seeds=tuple(seeds),
        contrasts=tuple(_contrasts(_mapping(raw.get("contrasts"), "contrasts"))),
        settings=settings,
        description=str(raw.get("description", "")),
        margin=_number(raw, "margin", 3.0),
        confidence=_number(raw, "confidence", 0.95),
        draws=raw.get("draws", 10_000),
        final_questions=raw.get("final_questions"),
        folder=path.resolve().parent,
    )
    _check(study)
    return study


def _contrasts(raw: Mapping[str, Any]) -> Iterable[Contrast]:
    _only(raw, {"primary", "secondary"}, "contrasts")
    for kind in ("primary", "secondary"):
        for name, text in _mapping(raw.get(kind), f"contrasts.{kind}").items():
            # Names of arms may hold a minus; one between spaces is the operator.
            parts = text.split(" - ") if isinstance(text, str) else []
            if len(parts) != 2:
                raise ValueError(f"contrasts.{kind}.{name} must read ARM - ARM, got {text!r}")
            yield Contrast(str(name), parts[0].strip(), parts[1].strip(), kind == "primary")


def _check(study: Study) -> None:
    names = [contrast.name for contrast in study.contrasts]
    if len(set(names)) < len(names):
        raise ValueError(f"contrasts: {_first_twice(names)!r} is there twice")
    for contrast in study.contrasts:
        kind = "primary" if contrast.primary else "secondary"
        where = f"contrasts.{kind}.{contrast.name}"
        for side in (contrast.first, contrast.second):
            try:
                study.arm(side)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if contrast.first == contrast.second:
            raise ValueError(f"{where}: both sides are {contrast.first!r}")
    if study.margin <= 0 or study.margin >= 100:
        raise ValueError(f"margin must be above 0 points and below 100, got {study.margin}")
    if not 0.5 <= study.confidence < 1:
        raise ValueError(f"confidence must be at least 0.5 and below 1, got {study.confidence}")
    if not _whole(study.draws) or study.draws < 100:
        raise ValueError(f"draws must be at least 100, got {study.draws!r}")
    questions = study.final_questions
    if questions is not None and (not _whole(questions) or questions < 1):
        raise ValueError(f"final_questions must be at least 1, got {questions!r}")


# --- the config of a run --------------------------------------------------------------------------


def run_config(study: Study, arm: Arm, seed: int, run: str | Path) -> TrainConfig:
    """What `p2r train` is given for one arm and seed.

    Raises ValueError naming the arm and the setting.
    """
    try:
        merged: dict[str, Any] = {}
        for name in study.base:
            merged = merge(merged, _load(study.folder / name))
        merged = merge(merge(merged, study.settings), arm.overrides)
        merged = merge(merged, {"run": str(run), "seed": seed})
        if study.final_questions is not None:
            merged = merge(merged, {"eval": {"final_questions": study.final_questions}})
        config = train_config(merged)
        config.validate()
        evaluated = (*config.eval.final_modes, *config.eval.modes)
        if not config.eval.final_questions:
            raise ValueError("eval.final_questions is 0: the outcome is the accuracy on these")
        if arm.metric not in evaluated:
            raise ValueError(
                f"its metric {arm.metric!r} is not evaluated at the end: add it to "
                f"eval.final_modes, which are {', '.join(config.eval.final_modes)}"
            )
    except OSError as error:
        raise ValueError(f"base: {error}") from error
    except ValueError as error:
        raise ValueError(f"arm {arm.name!r}: {error}") from error
    return config


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """As `p2r train --config FILE` reads them. Raises ValueError naming an unknown field or a value
    of the wrong type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, nested_key=None)
    try:
        # The parser changes what it is given.
        made = parser.instantiate_classes(parser.parse_object(copy.deepcopy(dict(settings))))
    except (ArgumentError, TypeError, KeyError) as error:
        raise ValueError(_short(str(error))) from error
    return TrainConfig(**{f.name: made[f.name] for f in dataclasses.fields(TrainConfig)})


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, everything else is replaced.

    >>> merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
    {'a': {'b': 1, 'c': [3]}}
    """
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        merged[key] = merge(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _short(message: str) -> str:
    """jsonargparse's message without the help that it repeats."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)[:400]


class _UniqueKeys(yaml.SafeLoader):
    """A key that is there twice is an error: YAML would keep the last one and say nothing."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            line = node.start_mark.line + 1
            raise ValueError(f"{_first_twice(keys)!r} is there twice (mapping at line {line})")
        return node


def _load(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(file.read_text(), _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a mapping")
    return raw


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return value


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        at = f"{where}." if where else ""
        raise ValueError(f"{at}{unknown[0]} is not known; there are {', '.join(sorted(known))}")


def _unowned(settings: Mapping[str, Any], where: str) -> None:
    for name in OWN:
        if name in settings:
            raise ValueError(f"{where}.{name}: the study decides it (seeds, --out)")
    evaluation = settings.get("eval")
    if isinstance(evaluation, Mapping) and "final_questions" in evaluation:
        raise ValueError(f"{where}.eval.final_questions: set final_questions of the study")


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_twice(values: Sequence[Any]) -> Any:
    return next(v for i, v in enumerate(values) if v in values[:i])
