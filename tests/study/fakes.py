"""Studies whose runs are `fake_run`.

As a program, `python -m tests.study.fakes FILE OUT`, it is a study that can be killed.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from p2r_jax.study.run import Job, study

FAKE = Path(__file__).with_name("fake_run.py")

BASE = {
    "model": {"path": "tiny"},
    "mesh": {"data": 1, "fsdp": 1},
    "phases": [{"role": "perceiver", "steps": 2, "prompts": 4, "group": 2}],
    "eval": {"final_modes": ["p2r"], "modes": ["p2r"]},
}


def write_study(folder: Path, **changes: Any) -> Path:
    """Two arms, of which `better` gains 20 points more, and two seeds."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    plan = {
        "base": "base.yaml",
        "arms": {
            "better": {"overrides": {"optimizer": {"learning_rate": 0.4}}},
            "plain": {"overrides": {"optimizer": {"learning_rate": 0.2}}},
        },
        "seeds": [0, 1],
        "contrasts": {"primary": {"gain": "better - plain"}},
        "final_questions": 50,
        "draws": 200,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**plan, **changes}, sort_keys=False))
    return file


def command(job: Job) -> list[str]:
    return [sys.executable, str(FAKE), str(job.config_file)]


def run_study(file: Path, out: Path, **options: Any) -> tuple[bool, str]:
    """Whether all runs went well, and what was printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    return study(file, out, command=command, console=console, **options), printed.getvalue()


if __name__ == "__main__":
    run_study(Path(sys.argv[1]), Path(sys.argv[2]))
