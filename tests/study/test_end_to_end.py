"""A study of real runs: the tiny model with random weights, one or two steps each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from p2r_jax import cli

TOKENS = 5


@pytest.fixture
def file(tmp_path, tiny_checkpoint) -> Path:
    base = {
        "model": {
            "path": str(tiny_checkpoint),
            "prompts": "tiny",
            "compute_dtype": "float32",
            "remat": False,
        },
        "mesh": {"data": 1, "fsdp": 1, "cpu_devices": 1},
        # One bucket of each kind: nothing is compiled twice.
        "buckets": {"patches": [160], "prompt_tokens": [128], "canvas": [448], "image": [384]},
        "data": {"order": "run"},
        "rollout": {"greedy_slots": 4},
        "eval": {
            "questions": 4,
            "every": 0,
            "batch": 4,
            "modes": ["p2r"],
            "final_modes": ["p2r"],
        },
        "log": {"tensorboard": False, "samples_every": 1, "sample_prompts": 2},
        "export": False,
    }
    phase = {"steps": 1, "prompts": 4, "group": 2}
    phase |= {"max_new_tokens": TOKENS, "partner_max_new_tokens": TOKENS}
    perceiver, reasoner = phase | {"role": "perceiver"}, phase | {"role": "reasoner"}
    plan = {
        "base": ["base.yaml"],
        "arms": {
            "one": {"overrides": {"phases": [perceiver]}},
            "two": {"overrides": {"phases": [perceiver, reasoner]}},
        },
        "seeds": [0, 1],
        "contrasts": {"primary": {"more": "two - one"}},
        "final_questions": 4,
        "draws": 100,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path / "study.yaml"


@pytest.mark.slow
def test_two_arms_and_two_seeds(file, tmp_path, monkeypatch, capfd):
    """Through the command, and again, when there is nothing left to do."""
    # The tests' eight devices are not for the runs.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    out = tmp_path / "out"
    argv = ["study", str(file), "--out", str(out)]
    assert cli.main(argv) == 0, capfd.readouterr()
    assert any((out / "cache").iterdir())
    found = json.loads((out / "study.json").read_text())
    assert found["missing"] == []
    costs = {name: arm["measures"] for name, arm in found["arms"].items()}
    assert [costs[name]["samples"] for name in ("one", "two")] == [8, 16]
    assert [costs[name]["updates"] for name in ("one", "two")] == [1, 2]
    assert [costs[name]["questions"] for name in ("one", "two")] == [4, 8]
    for measure in ("tokens", "visual_tokens", "flops"):
        assert 0 < costs["one"][measure] < costs["two"][measure]
    for arm in found["arms"].values():
        assert [s["questions"] for s in arm["seeds"].values()] == [4, 4]
        assert len(arm["curve"]) >= 2
    ids = {
        (arm, seed): [
            json.loads(line)["id"]
            for line in (out / f"runs/{arm}/seed_{seed}/samples/step_000001.jsonl").open()
        ]
        for arm in ("one", "two")
        for seed in (0, 1)
    }
    assert ids["one", 0] == ids["two", 0] != ids["one", 1] == ids["two", 1]
    assert (out / "runs/two/seed_1/report.html").is_file()

    written = {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("metrics.jsonl")}
    assert cli.main(argv) == 0
    assert {f: f.stat().st_mtime_ns for f in written} == written
