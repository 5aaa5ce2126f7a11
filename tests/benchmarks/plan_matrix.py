"""Every recipe on every slice that it is meant for, as `p2r plan` sees it; hours on two cores.

    python -m tests.benchmarks.plan_matrix                          # all; prints a Markdown table
    python -m tests.benchmarks.plan_matrix --recipes p2r_4b --slices v5e-16
    python -m tests.benchmarks.plan_matrix --readme launch/README.md   # and puts it there

Each plan is a process of its own, and what has been compiled before is not compiled again (see
`p2r plan --help`). The compilers come with `make test`, or from `p2r_jax[tpu]` and `p2r_jax[cuda]`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from p2r_jax.config import TrainConfig
from tests.compilers import FOLDER

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
WANTED = [
    ("p2r_2b", "v5e-16", "v5e-16"),
    ("p2r_4b", "v5e-16", "v5e-16"),
    ("p2r_8b", "v6e-16", "v6e-16"),
    ("p2r_2b", "v5p-8", "v5p-8"),
    ("p2r_4b", "v5p-8", "v5p-8"),
    ("p2r_8b", "v5p-8", "v5p-8"),
    ("p2r_2b", "h100-8", "h100:8"),
    ("p2r_4b", "h100-8", "h100:8"),
    ("p2r_8b", "h100-8", "h100:8"),
]
"""Recipe, file in configs/mesh, topology."""
HEAD = (
    "| recipe | slice | GiB a chip, rollout | update | usable | | seconds, rollout + update | "
    "slowest compile, s |\n|---|---|---|---|---|---|---|---|"
)
MARKS = "<!-- plan:begin -->", "<!-- plan:end -->"


def recipe(name: str, mesh: str) -> TrainConfig:
    """A shipped recipe with a shipped mesh."""
    from p2r_jax.cli import _dataclass_of, _train_parser

    parser = _train_parser()
    files = [CONFIGS / f"{name}.yaml", CONFIGS / "mesh" / f"{mesh}.yaml"]
    parsed = parser.parse_args([word for file in files for word in ("--config", str(file))])
    return _dataclass_of(parser, parsed, TrainConfig)


def plan(name: str, mesh: str, topology: str) -> dict[str, Any] | str:
    """What `p2r plan --json` prints, or the last line of its error."""
    files = [f"configs/{name}.yaml", f"configs/mesh/{mesh}.yaml"]
    command = [sys.executable, "-m", "p2r_jax.cli", "plan", "--topology", topology, "--json"]
    command += [word for file in files for word in ("--config", file)]
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        return f"exit code {done.returncode}"
    return json.loads(done.stdout)


def line(name: str, mesh: str, found: dict[str, Any] | str) -> str:
    """A row of the table: where memory is tightest in each stage, the roofline, and how long the
    slowest program took to compile."""
    if isinstance(found, str):
        return f"| `{name}` | `{mesh}` | failed: {found} | | | | | |"
    gib = lambda size: f"{size / 2**30:.2f}"
    worst = {
        stage: max((p["total"] for p in found["programs"] if p["stage"] == stage), default=0)
        for stage in ("rollout", "update")
    }
    room = found["usable"] - found["peak"]
    verdict = f"fits, {gib(room)} left" if room >= 0 else f"**too much by {gib(-room)}**"
    seconds = {
        stage: sum(max(p["seconds"].values()) for p in found["programs"] if p["stage"] == stage)
        for stage in ("rollout", "update")
    }
    longest = max(p["compile_seconds"] for p in found["programs"])
    return (
        f"| `{name}` | `{mesh}` | {gib(worst['rollout'])} | {gib(worst['update'])} | "
        f"{gib(found['usable'])} | {verdict} | "
        f"{seconds['rollout']:.0f} + {seconds['update']:.0f} | {longest:.0f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=sorted({r for r, _, _ in WANTED}))
    parser.add_argument("--slices", nargs="+", default=sorted({m for _, m, _ in WANTED}))
    parser.add_argument("--readme", type=Path, help="file with marks between which the table goes")
    args = parser.parse_args(arguments)
    lines = [HEAD]
    print(*lines, sep="\n", flush=True)
    for name, mesh, topology in WANTED:
        if name in args.recipes and mesh in args.slices:
            lines.append(line(name, mesh, plan(name, mesh, topology)))
            print(lines[-1], flush=True)
    if args.readme:
        text = args.readme.read_text()
        begin, end = map(re.escape, MARKS)
        table = "\n".join([MARKS[0], *lines, MARKS[1]])
        args.readme.write_text(re.sub(f"{begin}.*?{end}", lambda _: table, text, flags=re.S))


if __name__ == "__main__":
    main()
