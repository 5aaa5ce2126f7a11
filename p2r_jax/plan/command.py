"""`p2r plan`: compile a run for a slice and print what it needs; no accelerator is used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from p2r_jax.config import TrainConfig
from p2r_jax.plan.chips import Slice
from p2r_jax.plan.report import Plan, Watch, gib, make_plan, markdown, table, verdict
from p2r_jax.plan.search import search, suggestions
from p2r_jax.qwen3_vl.published import config_of
from p2r_jax.rl.launch import check_phases


def plan(
    config: TrainConfig,
    topology: str,
    slices: int = 1,
    output: str | None = None,
    search_meshes: bool = False,
    cache: bool = True,
) -> bool:
    """Print the plan; returns whether the run fits. output: `json` or `markdown` instead of a table
    for the terminal. search_meshes: rank meshes and microbatches instead.

    Raises ValueError, FileNotFoundError or ModuleNotFoundError naming what is wrong.
    """
    jax.config.update("jax_platforms", "cpu")  # Nothing may wait for a real accelerator.
    config.validate()
    where, model = Slice.parse(topology, slices), config_of(config.model.path)
    keep = cache_folder() if cache else None
    console = Console(stderr=True)
    if search_meshes:
        with watching(console) as watch:
            found = search(config, model, where, keep, watch)
        _print_ranking(found, output)
        return any(isinstance(own, Plan) and own.fits for _, own in found)
    check_phases(config, where.mesh(config.mesh))
    with watching(console) as watch:
        made = make_plan(config, model, where, keep, watch)
        tried = [] if made.fits else suggestions(config, model, made, keep, watch)
    _print_plan(made, tried, output)
    return made.fits


def cache_folder() -> Path:
    """Where results are kept: $XDG_CACHE_HOME/p2r_jax/plan."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "p2r_jax" / "plan"


@contextlib.contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Shows what is being compiled: a moving line on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield lambda name: console.print(f"compiling {name}", markup=False, highlight=False)
        return
    with console.status("compiling") as status:
        yield lambda name: status.update(f"compiling {escape(name)}")


def _print_plan(made: Plan, tried: list[str], output: str | None) -> None:
    if output == "json":
        print(json.dumps(made.as_dict() | {"tried": tried}, indent=1))
        return
    lines = verdict(made) + [f"tried: {text}" for text in tried]
    if output == "markdown":
        print(markdown(made), "", *lines, sep="\n")
        return
    console = _wide()
    console.print(table(made))
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_ranking(found: list[tuple[dict[str, Any], Plan | str]], output: str | None) -> None:
    rows = []
    for change, own in found:
        what = ", ".join(f"{name} {value}" for name, value in change.items())
        if isinstance(own, str):
            rows.append((what, "", "", own))
            continue
        seconds = f"{own.seconds:.0f}" if own.fits else ""
        least = "" if own.complete else "at least "
        end = "fits" if own.fits else "does not fit"
        rows.append((what, least + gib(own.peak.total), seconds, end))
    if output == "json":
        every = [own if isinstance(own, str) else own.as_dict() for _, own in found]
        print(
            json.dumps([{"change": c, "plan": p} for (c, _), p in zip(found, every, strict=True)])
        )
        return
    made = Table("settings", "GiB a chip", "seconds a step of every phase", "")
    for row in rows:
        made.add_row(*map(escape, row))
    _wide().print(made)


def _wide() -> Console:
    """Not narrower than the table, where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=180)
