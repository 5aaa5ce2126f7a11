"""Manifests, image and scripts of `launch/`, as far as they can be checked without a cloud.

Scripts by shellcheck, the Dockerfile by hadolint, manifests by the schemas in `schemas/` (each says
where it is from), gcloud command lines by the flags that the real one lists in its help.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from p2r_jax import cli

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCHEMAS = Path(__file__).parent / "schemas"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOBSETS = sorted(LAUNCH.glob("gke_jobset_*.yaml"))
README = (LAUNCH / "README.md").read_text()


def tool(name: str) -> str:
    """A program that the test extra installs."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is missing: pip install -e '.[test]'"
    return found


def problems(instance: object, schema: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(json.loads((SCHEMAS / schema).read_text()))
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(instance)]


def jobset(file: Path) -> dict:
    """The manifest as the command at its top makes it."""
    text = file.read_text()
    for name, value in {"NAME": "p2r-4b", "IMAGE": "image:1", "BUCKET": "gs://bucket"}.items():
        text = text.replace(f"${{{name}}}", value)
    assert "${" not in text
    return yaml.safe_load(text)


def train_options() -> set[str]:
    text = cli._train_parser().format_help()
    return set(re.findall(r"--[a-z_.]+", text))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in script.read_text()


def test_dockerfile():
    done = subprocess.run(
        [tool("hadolint"), str(LAUNCH / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_copies_what_the_build_context_holds():
    shown = [x[1:] for x in (ROOT / ".dockerignore").read_text().splitlines() if x[:1] == "!"]
    lines = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    copied = [name for line in lines for name in line.split()]
    for name in copied:
        assert name.split("/")[0] in shown
        for kind in ("tpu", "cuda"):
            assert (ROOT / name.replace("${KIND}", kind)).exists()


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_versions_are_pinned_and_fit_the_project(kind):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = {}
    for line in (LAUNCH / f"requirements-{kind}.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9.-]+==[a-z0-9.+]+", line), line
            name, version = line.split("==")
            pins[name] = version
    for text in [*project["dependencies"], *extras[kind], *extras.get("gcs", [])]:
        wanted = Requirement(text)
        name = re.sub(r"[._]", "-", wanted.name.lower())
        assert wanted.specifier.contains(pins[name]), f"{text}, pinned {pins[name]}"
    jax = pins["jax"]
    assert pins["jaxlib"] == jax
    assert pins["libtpu" if kind == "tpu" else "jax-cuda13-plugin"]


@pytest.mark.parametrize("file", JOBSETS, ids=lambda path: path.name)
def test_jobset_schema(file):
    assert problems(jobset(file), "jobset.json") == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: m["spec"].update(maxRestarts=3),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"].update(backofLimit=0),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
            "containers"
        ][0].update(args="--config x"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
            "containers"
        ][0]["env"].append({"name": "A", "value": 1}),
    ],
)
def test_the_schema_itself(break_it):
    manifest = jobset(JOBSETS[0])
    break_it(manifest)
    assert problems(manifest, "jobset.json")


@pytest.mark.parametrize("file", JOBSETS, ids=lambda path: path.name)
def test_jobset_says_what_it_means(file):
    spec = jobset(file)["spec"]
    (job,) = [x["template"]["spec"] for x in spec["replicatedJobs"]]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {x["name"]: x["value"] for x in container["env"]}
    assert job["parallelism"] == job["completions"]
    # Any pod that fails makes JobSet start all again, but for the codes that want a person.
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "p2r", "operator": "In", "values": [1, 2]}
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert env["MAX_RESTARTS"] == "0"
    assert env["RUN"] == "gs://bucket/runs/p2r-4b"
    # What is forgotten ends.
    assert job["activeDeadlineSeconds"] <= 24 * 3600
    assert spec["ttlSecondsAfterFinished"]
    if "gpu" in file.name:
        assert env["COORDINATOR"].startswith("p2r-4b-worker-0-0.p2r-4b:")
        assert int(env["PROCESSES"]) == job["completions"]
    else:
        x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert x * y == chips * job["completions"]


@pytest.mark.parametrize("file", JOBSETS, ids=lambda path: path.name)
def test_jobset_arguments_are_settings_of_p2r(file):
    (job,) = jobset(file)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    parsed = cli._train_parser().parse_args(container["args"])
    assert parsed.model.path == "gs://bucket/weights/Qwen3-VL-4B-Instruct"
    devices = parsed.mesh.data * parsed.mesh.fsdp * parsed.mesh.tensor
    assert devices == 16


def test_skypilot_schema():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert problems(task, "skypilot.json") == []
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    task["resources"]["job_recovery"]["recover_on_exit_codes"] = ["75"]
    assert problems(task, "skypilot.json")


@pytest.mark.parametrize(
    "code, restarts, states, requeued",
    [
        (75, 0, ("75", "75"), True),
        (75, 0, ("stopped", "137"), True),
        (75, 50, ("75", "75"), False),
        (75, 0, ("75", "2"), False),  # a bad setting on one worker, a lost process on the other
        (0, 0, ("0", "0"), False),
        (2, 0, ("2",), False),
    ],
)
def test_slurm_queues_again_what_was_saved(tmp_path, code, restarts, states, requeued):
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    for worker, state in enumerate(states):
        (logs / f"worker-{worker}.exit").write_text(f"{state}\n")
    for name, body in {
        "srun": f'echo "$JAX_LOCAL_DEVICE_IDS $*" >{tmp_path}/started; exit {code}',
        "scontrol": f'echo "$*" >{tmp_path}/requeued',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RUN": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_GPUS_ON_NODE": "4",
    }
    script = [str(LAUNCH / "slurm_gpu.sbatch"), "--config", "a b.yaml"]
    assert subprocess.run(["bash", *script], env=environment).returncode == code
    said = (tmp_path / "started").read_text()
    assert said == "0,1,2,3 --kill-on-bad-exit=0 launch/entry.sh --config a b.yaml\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def shell_of(text: str) -> list[str]:
    """Command lines of the bash blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_skypilot_runs_valid_shell(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/bash\n" + task["setup"] + "\n" + task["run"])
    done = subprocess.run(
        # SkyPilot sets the variables; values hold no spaces.
        [tool("shellcheck"), "-e", "SC2086,SC2154", str(script)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_gcloud_commands_of_the_readme_have_known_flags():
    known = json.loads((SCHEMAS / "gcloud_flags.json").read_text())
    lines = [line for line in shell_of(README) if line.startswith("gcloud ")]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        fitting = [c for c in known["commands"] if words[: len(c.split())] == c.split()]
        assert fitting, f"not looked up: {line}"
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= {*known["commands"][max(fitting, key=len)], *known["everywhere"]}, line


def test_files_and_settings_named_in_the_readme_exist():
    for name in re.findall(r"\b((?:launch|configs)/[\w./-]+\w)", README):
        assert (ROOT / name).exists(), name
    options = train_options()
    for line in shell_of(README):
        for option in re.findall(r" (--(?:model|data|mesh|phases|run)[a-z_.]*)", line):
            assert option in options, f"{option}: {line}"


def test_readme_says_which_slice_was_compiled():
    between = README.split("<!-- plan:begin -->")[1].split("<!-- plan:end -->")[0]
    assert "| `p2r_4b` | `v5e-16` |" in between
    assert "plan_matrix --readme launch/README.md" in README
