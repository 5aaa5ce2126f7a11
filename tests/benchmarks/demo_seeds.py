"""The demo from many seeds: does each phase teach, whatever the seed, warm start and thread count?

    python -m tests.benchmarks.demo_seeds --out runs/demo_seeds                     # 5 seeds x tiny
    python -m tests.benchmarks.demo_seeds --out runs/demo_seeds --warm-starts tiny other_tiny \\
        --seeds 5 --threads 1 2 --parallel 2 --readme README.md

Each run is a fresh process of `p2r train --config configs/tiny.yaml`; seeds take the thread counts
in turn. Runs that are finished are not made again, and one that was killed goes on. The table tells
of every run and of the range over runs; the gates say which of the promises hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@dataclasses.dataclass(frozen=True)
class Run:
    """One demo: its seed, the checkpoint that it starts from, and how many cores it has."""

    seed: int
    warm_start: str
    threads: int

    @property
    def name(self) -> str:
        return f"{Path(self.warm_start).name}_seed{self.seed}_threads{self.threads}"

    def make(self, out: Path, config: Path, extra: Sequence[str]) -> Path:
        """Run it, or what is left of it; returns its folder. Raises RuntimeError if it fails."""
        folder = out / self.name
        if (folder / "summary.json").is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "p2r_jax.cli", "train", "--config", str(config)]
        command += ["--run", str(folder), "--seed", str(self.seed)]
        command += ["--model.path", self.warm_start]
        command += ["--mesh.data", str(self.threads), "--mesh.cpu_devices", str(self.threads)]
        with (folder / "console.log").open("a") as log:
            done = subprocess.run([*command, *extra], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{self.name} ended with {done.returncode}: see {log.name}")
        return folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Accuracies of a run, as shares: p2r with live weights before, between and after the phases,
    and what the idle role lost or won in each phase."""

    before: float
    perceiver: float
    reasoner: float
    hits: tuple[float, float, float]
    drift: tuple[float, float]
    seconds: float

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        summary = json.loads((folder / "summary.json").read_text())
        between = next(name for name in summary if name.startswith("after_phase"))
        evals = [summary[name]["modes"] for name in ("before", between, "after")]
        before, middle, after = (modes["p2r"]["accuracy"] for modes in evals)
        return cls(
            before,
            middle,
            after,
            tuple(modes["p2r"]["hit_rate"] for modes in evals),  # type: ignore[arg-type]
            (
                evals[1]["live_reasoner"]["accuracy"] - before,
                evals[2]["live_perceiver"]["accuracy"] - middle,
            ),
            summary["wall_seconds"],
        )

    @property
    def gains(self) -> tuple[float, float]:
        return self.perceiver - self.before, self.reasoner - self.perceiver


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t over runs; without width for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return mean, mean - half, mean + half


def gates(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, bool, str]]:
    """(promise, whether it holds, what was measured)."""
    final = [o.reasoner for o in outcomes]
    yield "mean final accuracy at least 85 %", np.mean(final) >= 0.85, f"{np.mean(final):.1%}"
    yield "worst final accuracy at least 78 %", min(final) >= 0.78, f"{min(final):.1%}"
    for i, (role, least) in enumerate((("perceiver", 0.12), ("reasoner", 0.05))):
        gains = [o.gains[i] for o in outcomes]
        mean, low, high = mean_interval(gains)
        said = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        yield (
            f"{role} phase gains {100 * least:.0f} points on average, interval above 0",
            mean >= least and low > 0,
            said,
        )
    worst = min(min(o.gains) for o in outcomes)
    yield "no phase loses more than 2 points", worst >= -0.02, f"worst {100 * worst:+.1f}"
    drift = min(min(o.drift) for o in outcomes)
    yield "the idle role loses at most 2 points", drift >= -0.02, f"worst {100 * drift:+.1f}"


def table(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row a run, then median and range."""
    head = (
        "| warm start | seed | threads | start % | after perceiver % | after reasoner % "
        "| perceiver gains | reasoner gains | hits % | idle role, by phase |"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|---|"]

    def cells(o: Outcome) -> list[str]:
        accuracy = [f"{100 * v:.1f}" for v in (o.before, o.perceiver, o.reasoner)]
        gains = [f"{100 * v:+.1f}" for v in o.gains]
        hits = " → ".join(f"{100 * v:.0f}" for v in o.hits)
        return [*accuracy, *gains, hits, ", ".join(f"{100 * v:+.1f}" for v in o.drift)]

    for run, outcome in zip(runs, outcomes, strict=True):
        own = [Path(run.warm_start).name, str(run.seed), str(run.threads), *cells(outcome)]
        rows.append(f"| {' | '.join(own)} |")
    for name, pick in (("median", np.median), ("worst", np.min), ("best", np.max)):
        values = [
            f"{100 * pick([value(o) for o in outcomes]):.1f}"
            for value in (
                lambda o: o.before,
                lambda o: o.perceiver,
                lambda o: o.reasoner,
                lambda o: o.gains[0],
                lambda o: o.gains[1],
            )
        ]
        rows.append(f"| **{name}** | | | {' | '.join(values)} | | |")
    return "\n".join(rows)


def report(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    """The table and the gates."""
    lines = [table(runs, outcomes), ""]
    lines += [
        f"- {'holds' if good else '**does not hold**'}: {promise} ({measured})"
        for promise, good, measured in gates(outcomes)
    ]
    return "\n".join(lines)


def write_section(readme: Path, text: str) -> None:
    """Put the table between its markers."""
    page = readme.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--warm-starts", nargs="+", default=["tiny"])
    parser.add_argument("--seeds", type=int, default=5, help="of each warm start, from 0")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("--readme", type=Path, help="file whose table is written anew")
    arguments, extra = parser.parse_known_args(argv)
    runs = [
        Run(seed, warm_start, arguments.threads[seed % len(arguments.threads)])
        for warm_start in arguments.warm_starts
        for seed in range(arguments.seeds)
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    # What is compiled once serves all runs; a disk that is read changes no number.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.out / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

    def one(run: Run) -> Any:
        begin = time.perf_counter()
        folder = run.make(arguments.out, arguments.config, extra)
        outcome = Outcome.read(folder)
        print(f"{run.name}: {outcome} ({time.perf_counter() - begin:.0f} s)", flush=True)
        return outcome

    with ThreadPoolExecutor(arguments.parallel) as pool:
        outcomes = list(pool.map(one, runs))
    text = report(runs, outcomes)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)
    if arguments.readme is not None:
        write_section(arguments.readme, text)


if __name__ == "__main__":
    main()
