"""A stand-in for `p2r train` that ends in a moment: `python fake_run.py CONFIG`.

Arms are told by their folder: `bad` fails, `again` wants to be started again once, and runs beside
which a file `hold` lies take their time, until it is gone or they are asked to end. `starts` counts
how often a run was begun.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path

import yaml

EXIT_RESTART = 75


def main(file: str) -> int:
    config = yaml.safe_load(Path(file).read_text())
    run = Path(config["run"])
    (run / "eval").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(Path(file).read_text())
    (run / "schedule.json").write_text(json.dumps({"steps": [2]}))
    with (run / "starts").open("a") as starts:
        starts.write("x")
    print(f"seed {config['seed']}")
    arm, root = run.parent.name, run.parents[2]

    def asked(number, frame):
        (run / "asked").write_text("to end")
        sys.exit(EXIT_RESTART)

    signal.signal(signal.SIGTERM, asked)
    (run / "ready").touch()
    while (root / "hold").exists():
        time.sleep(0.02)
    if arm == "bad":
        print("p2r train: <b>no</b> luck", file=sys.stderr)
        return 2
    if arm == "again" and len((run / "starts").read_text()) < 2:
        return EXIT_RESTART
    write_outcome(run, config)
    return 0


def write_outcome(run: Path, config: dict) -> None:
    """As a run of two steps would leave it: arms differ by what their learning rate says."""
    questions, seed = config["eval"]["final_questions"], config["seed"]
    mode, (phase,) = config["eval"]["final_modes"][0], config["phases"]
    rng = random.Random(seed)
    draws = [rng.random() for _ in range(questions)]
    chances = {"before": 0.3, "after": 0.3 + config["optimizer"]["learning_rate"]}
    rows = []
    for name, chance in chances.items():
        right = [draw < chance for draw in draws]
        records = [
            {"id": f"{seed}/{i}", "mode": mode, "correct": int(r)} for i, r in enumerate(right)
        ]
        records.append({"id": "other", "mode": "oracle_box", "correct": 1})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (run / "eval" / f"{name}.jsonl").write_text(text)
        step = 0 if name == "before" else 2
        accuracy = {f"eval/{mode}/accuracy": sum(right) / questions}
        rows.append({"step": step, "phase": "eval", "name": name} | accuracy)
    steps = [
        {"step": step, "phase": phase["role"], "phase_number": 1, "samples": 8, "data/batches": 1}
        | {"tokens/prompts": 100, "tokens/completions": 20, "tokens/visual": 60}
        | {"tokens/partner_prompts": 50, "tokens/partner_completions": 5, "flops/total": 1e9}
        | {"tokens/partner_visual": 40, "time/step": 3.0, "compile/seconds": 1.0}
        | {"skipped_steps": 0}
        for step in (1, 2)
    ]
    rows = [rows[0], *steps, rows[1]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text("{}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
