"""Studies of runs that end in a moment: what is run, what is not run again, what is said of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2r_jax import cli
from p2r_jax.rl.stop import Preempted
from p2r_jax.study import run as study_run
from tests.study.fakes import command, run_study, write_study

ROOT = Path(__file__).parents[2]


def starts(out: Path) -> dict[str, int]:
    """How often each run was begun."""
    files = sorted((out / "runs").glob("*/seed_*/starts"))
    return {f"{f.parents[1].name}/{f.parent.name}": len(f.read_text()) for f in files}


def found(out: Path) -> dict:
    return json.loads((out / "study.json").read_text())


def wait_for(condition, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestAStudy:
    @pytest.fixture(scope="class")
    def done(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("study")
        file, out = write_study(folder), folder / "out"
        went_well, printed = run_study(file, out, parallel=2)
        assert went_well
        return file, out, printed

    def test_runs_every_arm_with_every_seed_once(self, done):
        _, out, printed = done
        names = ("better/seed_0", "better/seed_1", "plain/seed_0", "plain/seed_1")
        assert starts(out) == dict.fromkeys(names, 1)
        assert (out / "runs/plain/seed_1/study.log").read_text() == "seed 1\n"
        assert "plain, seed 1 finished" in printed
        assert "| `better` |" in printed

    def test_shares_compiled_programs(self, done, monkeypatch, tmp_path):
        seen = []

        class Ended:
            def poll(self):
                return 0

        def popen(*args, env, **options):
            seen.append(env)
            return Ended()

        monkeypatch.setattr(study_run.subprocess, "Popen", popen)
        monkeypatch.setattr(study_run, "SETTLE_SECONDS", 0)
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        with pytest.raises(ValueError, match="no run of the study is finished"):
            run_study(write_study(tmp_path), tmp_path / "out", seeds=[0])
        assert {env["JAX_COMPILATION_CACHE_DIR"] for env in seen} == {str(tmp_path / "out/cache")}
        assert seen[0]["JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS"] == "0.3"

    def test_compares_them(self, done):
        _, out, _ = done
        result = found(out)
        (contrast,) = result["contrasts"]
        accuracies = {
            name: [arm["seeds"][s]["accuracy"] for s in "01"]
            for name, arm in result["arms"].items()
        }
        gains = [a - b for a, b in zip(*accuracies.values(), strict=True)]
        assert contrast["estimate"]["value"] == pytest.approx(sum(gains) / 2)
        assert contrast["p_holm"] == contrast["p"]
        assert result["arms"]["better"]["estimate"]["questions"] == 100
        assert not result["arms"]["better"]["estimate"]["crossed"]
        assert result["missing"] == []

    def test_says_what_they_cost(self, done):
        _, out, _ = done
        assert found(out)["arms"]["plain"]["measures"] == {
            "samples": 16,
            "updates": 2,
            "questions": 8,
            "tokens": 350,
            "visual_tokens": 200,
            "flops": 2e9,
            "seconds": 4.0,
        }

    def test_draws_the_curve_by_samples(self, done):
        _, out, _ = done
        curve = found(out)["arms"]["better"]["curve"]
        assert [(p["step"], p["samples"]) for p in curve] == [(0, 0), (2, 16)]
        assert curve[0]["accuracy"] == pytest.approx(found(out)["arms"]["better"]["before"])

    def test_names_no_folder_of_this_machine(self, done):
        file, out, _ = done
        assert str(file.parent) not in (out / "study.json").read_text()

    def test_a_second_time_runs_nothing(self, done):
        file, out, _ = done
        before = (out / "study.json").read_text()
        assert run_study(file, out)[0]
        assert set(starts(out).values()) == {1}
        assert (out / "study.json").read_text() == before

    def test_the_tables_can_be_made_anew(self, done):
        file, out, _ = done
        before = (out / "study.md").read_text()
        (out / "study.md").unlink()
        assert run_study(file, out, table_only=True)[0]
        assert (out / "study.md").read_text() == before
        assert set(starts(out).values()) == {1}

    def test_a_dry_run_says_what_is_done(self, done):
        file, out, _ = done
        _, printed = run_study(file, out, dry_run=True)
        (row,) = [line for line in printed.splitlines() if "better" in line]
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells == ["better", "p2r", "perceiver 2 × 4 × 2", "2", "16", "2", "2"]

    def test_a_run_of_other_settings_is_refused_by_name(self, done, tmp_path):
        _, out, _ = done
        arms = {"better": {}, "plain": {"overrides": {"optimizer": {"learning_rate": 0.2}}}}
        other = write_study(tmp_path, arms=arms)
        with pytest.raises(ValueError, match=r"better/seed_0 was started with other.*optimizer"):
            run_study(other, out)


def test_a_part_of_a_study_tells_what_is_missing(tmp_path):
    file, out = write_study(tmp_path), tmp_path / "out"
    assert run_study(file, out, arms=["plain"], seeds=[1])[0]
    assert starts(out) == {"plain/seed_1": 1}
    assert [(m["arm"], m["seed"], m["state"]) for m in found(out)["missing"]] == [
        ("better", 0, "not started"),
        ("plain", 0, "not started"),
        ("better", 1, "not started"),
    ]
    assert "no seed that both have" in (out / "study.md").read_text()
    with pytest.raises(ValueError, match="no arm is called 'best'"):
        run_study(file, out, arms=["best"])
    with pytest.raises(ValueError, match="--seeds: 7 is none of 0, 1"):
        run_study(file, out, seeds=[7])


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run of the study is finished"):
        run_study(write_study(tmp_path), tmp_path / "out", table_only=True)


def test_a_run_that_fails_ends_no_other(tmp_path):
    arms = {"bad": {}, "good": {}, "again": {}}
    contrasts = {"primary": {"x": "good - bad", "y": "good - again"}}
    file, out = write_study(tmp_path, arms=arms, contrasts=contrasts), tmp_path / "out"
    went_well, printed = run_study(file, out, parallel=2)
    assert not went_well
    assert starts(out) == {
        "again/seed_0": 2,
        "again/seed_1": 2,
        "bad/seed_0": 1,
        "bad/seed_1": 1,
        "good/seed_0": 1,
        "good/seed_1": 1,
    }
    reason = "exit code 2: p2r train: <b>no</b> luck"
    assert found(out)["missing"] == [
        {"arm": "bad", "seed": seed, "state": "failed", "reason": reason} for seed in (0, 1)
    ]
    assert "- `bad`, seed 0: failed (exit code 2: p2r train: &lt;b>no&lt;/b> luck)" in printed
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; luck" in page
    assert "<b>no</b>" not in page
    first, second = found(out)["contrasts"]
    assert first["estimate"] is None
    assert second["verdict"] == "undecided"


def test_two_run_at_once_and_no_more(tmp_path, monkeypatch):
    file, out = write_study(tmp_path), tmp_path / "out"
    out.mkdir()
    hold, rounds = out / "hold", []
    hold.touch()

    def sleep(seconds):
        if len(starts(out)) == 2:
            rounds.append(seconds)
        if len(rounds) == 5:
            assert sorted(starts(out)) == ["better/seed_0", "plain/seed_0"]
            hold.unlink()
        time.sleep(seconds)

    monkeypatch.setattr(study_run, "time", type("", (), {"sleep": staticmethod(sleep)}))
    assert run_study(file, out, parallel=2)[0]
    assert len(rounds) >= 5
    assert list(starts(out).values()) == [1, 1, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere runs outlive a study")
def test_killed_outright_it_takes_its_runs_along_and_goes_on(tmp_path):
    file, out = write_study(tmp_path), tmp_path / "out"
    assert run_study(file, out, seeds=[0], arms=["better"])[0]
    (out / "hold").touch()
    argv = [sys.executable, "-m", "tests.study.fakes", str(file), str(out)]
    process = subprocess.Popen(argv, cwd=ROOT)
    held = out / "runs/plain/seed_0"
    try:
        wait_for((held / "ready").exists)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for((held / "asked").exists)
    finally:
        process.kill()
        (out / "hold").unlink()
    assert run_study(file, out)[0]
    assert starts(out) == {
        "better/seed_0": 1,
        "better/seed_1": 1,
        "plain/seed_0": 2,
        "plain/seed_1": 1,
    }
    assert found(out)["missing"] == []


def test_a_run_that_still_ends_is_waited_for(tmp_path, monkeypatch):
    """Its process holds a lock, even if the study that started it is gone."""
    file, out = write_study(tmp_path), tmp_path / "out"
    (job, *_) = study_run.plan_jobs(study_run.read_study(file), out)
    lock = study_run.Lock(job).take()
    assert lock is not None
    assert study_run.Lock(job).take() is None
    rounds = []

    def sleep(seconds):
        rounds.append(seconds)
        if len(rounds) == 3:
            assert not (job.folder / "starts").exists()
            os.close(lock)
        time.sleep(seconds)

    monkeypatch.setattr(study_run, "time", type("", (), {"sleep": staticmethod(sleep)}))
    assert run_study(file, out, seeds=[0], arms=["better"])[0]
    assert starts(out) == {"better/seed_0": 1}


def test_asked_to_end_it_passes_that_on(tmp_path, monkeypatch):
    file, out = write_study(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "hold").touch()
    ready = out / "runs/better/seed_0/ready"

    def sleep(seconds):
        if ready.exists():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)

    monkeypatch.setattr(study_run, "time", type("", (), {"sleep": staticmethod(sleep)}))
    with pytest.raises(Preempted, match="SIGTERM: 0 of 4 runs are finished; the same command"):
        run_study(file, out)
    assert (ready.parent / "asked").is_file()
    assert starts(out) == {"better/seed_0": 1}


class TestTheCommand:
    @pytest.fixture(autouse=True)
    def _fake(self, monkeypatch):
        study = study_run.study
        monkeypatch.setattr(study_run, "study", lambda *a, **k: study(*a, command=command, **k))

    def test_ends_with_2_if_a_run_failed(self, tmp_path, capsys):
        file = write_study(tmp_path, arms={"bad": {}, "good": {}}, contrasts={})
        argv = ["study", str(file), "--out", str(tmp_path / "out"), "--seeds", "1"]
        with pytest.raises(SystemExit) as end:
            cli.main([*argv, "--arms", "bad,good"])
        assert end.value.code == 2
        assert "failed (exit code 2" in capsys.readouterr().out
        assert cli.main([*argv, "--arms", "good"]) == 0

    def test_says_in_one_line_what_is_wrong(self, tmp_path, capsys):
        file = write_study(tmp_path, seeds=[1, 1])
        assert cli.main(["study", str(file), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"p2r study: {file}: seeds: 1 is there twice\n"
        file = write_study(tmp_path)
        argv = ["study", str(file), "--out", str(tmp_path / "out")]
        assert cli.main([*argv, "--seeds", "one"]) == 2
        assert "--seeds must be whole numbers" in capsys.readouterr().err
        assert cli.main([*argv, "--parallel", "0"]) == 2
        assert "--parallel must be at least 1" in capsys.readouterr().err

    def test_a_dry_run_starts_nothing(self, tmp_path, capsys):
        file, out = write_study(tmp_path), tmp_path / "out"
        assert cli.main(["study", str(file), "--out", str(out), "--dry-run"]) == 0
        assert "plain" in capsys.readouterr().out
        assert not out.exists()
