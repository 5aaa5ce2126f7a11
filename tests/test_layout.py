"""The layers of the package: imports point downwards only.

    cli > plan, study > rl, sft > evals > roles > rollout > data > qwen3_vl > ops > parallel

`p2r_jax/config.py` and `p2r_jax/paths.py` are leaves: everyone may import them, and they import
nothing of the project. Torch is for tests and benchmarks, never for the package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import p2r_jax

ROOT = Path(p2r_jax.__file__).parent
LEAVES = ("config", "paths")
LAYERS = [
    {"parallel"},
    {"ops"},
    {"qwen3_vl"},
    {"data"},
    {"rollout"},
    {"roles"},
    {"evals"},
    {"rl", "sft"},
    {"plan", "study"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a module of `package`, as if absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(outer if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(dotted: str) -> str | None:
    """`p2r_jax.roles.boxes` -> "roles"; None outside the project and for the package itself."""
    first, *rest = dotted.split(".")
    return rest[0] if first == "p2r_jax" and rest and not rest[0].startswith("__") else None


def violations(module: str, source: str) -> list[str]:
    """What a module, given by its path inside the package, imports and must not."""
    parts = module.removesuffix(".py").split("/")
    own = parts[0]
    bad = []
    for dotted in imported(ast.parse(source), ".".join(["p2r_jax", *parts[:-1]])):
        if dotted.split(".")[0] == "torch":
            bad.append(dotted)
        other = layer(dotted)
        if other is None or other == own or other in LEAVES:
            allowed = own not in (*LEAVES, "__init__") or other is None
        else:
            allowed = LEVEL.get(other, len(LAYERS)) < LEVEL.get(own, -1)
        if not allowed:
            bad.append(dotted)
    return bad


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    assert violations(module, (ROOT / module).read_text()) == []


def test_every_folder_has_its_layer():
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__", *LEAVES}
    assert folders | modules <= LEVEL.keys()


@pytest.mark.parametrize(
    "module, line, allowed",
    [
        ("rl/trainer.py", "from p2r_jax.qwen3_vl import Qwen3VL", True),
        ("rl/trainer.py", "from p2r_jax import config", True),
        ("rl/trainer.py", "from p2r_jax.rl.losses import policy_loss", True),
        ("rl/trainer.py", "from .losses import policy_loss", True),
        ("rl/trainer.py", "from ..ops import image", True),
        ("rl/trainer.py", "from p2r_jax import __version__", True),
        ("rl/trainer.py", "import p2r_jax.sft.trainer", False),
        ("ops/image.py", "from p2r_jax.qwen3_vl import Qwen3VL", False),
        ("ops/image.py", "from p2r_jax import data", False),
        ("ops/image.py", "from ..data import rows", False),
        ("ops/image.py", "def f():\n    import p2r_jax.cli", False),
        ("ops/image.py", "import torch.nn as nn", False),
        ("ops/image.py", "from torch import nn", False),
        ("config.py", "import dataclasses", True),
        ("config.py", "from p2r_jax.ops import image", False),
        ("parallel/mesh.py", "from p2r_jax.paths import as_path", True),
        ("paths.py", "from p2r_jax.config import RunConfig", False),
        ("cli.py", "from p2r_jax.rl import trainer", True),
    ],
)
def test_the_rule_itself(module, line, allowed):
    assert (violations(module, line) == []) is allowed
