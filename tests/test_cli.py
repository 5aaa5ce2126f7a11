"""The `p2r` command: help, errors a person can act on, and exit codes for launchers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from p2r_jax import cli
from p2r_jax.config import TrainConfig
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.rl import launch
from p2r_jax.rl.stop import Preempted, RunStopped


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    try:
        code = cli.main(list(argv))
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


@pytest.fixture
def picture(tmp_path) -> str:
    from PIL import Image

    file = tmp_path / "scene.png"
    Image.fromarray(VisualSearch().render_scene(0).image).save(file)
    return str(file)


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_every_command_has_help(capsys, command):
    argv = [command, "--help"] if command else ["--help"]
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 0
    assert "usage: p2r" in capsys.readouterr().out


def test_help_needs_neither_jax_nor_torch():
    code = (
        "import sys, p2r_jax.cli; "
        "print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- errors -----------------------------------------------------------------------------------


def one_line(err: str) -> str:
    """The line that says what is wrong; there is no traceback."""
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_a_bad_key_of_a_config_file_is_named(capsys, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("optimizer: {learning_rat: 1.0e-5}\n")
    code, err = run(capsys, "train", "--config", str(file))
    assert code != 0
    assert "learning_rat" in one_line(err)


def test_a_bad_option_is_named(capsys):
    code, err = run(capsys, "train", "--no_such_thing", "3")
    assert code != 0
    assert "no_such_thing" in one_line(err)


@pytest.mark.parametrize(
    "option, name",
    [
        ("--optimizer.learning_rate=fast", "learning_rate"),
        ("--model.compute_dtype=float64", "compute_dtype"),
        ("--mesh.fsdp=two", "fsdp"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(capsys, option, name):
    code, err = run(capsys, "train", option)
    assert code != 0
    assert "Traceback" not in err
    assert name in err


def test_a_missing_config_file_is_named(capsys):
    code, err = run(capsys, "train", "--config", "nowhere.yaml")
    assert code != 0
    assert "nowhere.yaml" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "phase, field",
    [
        ({"steps": 0}, "phases[0].steps"),
        ({"prompts": 6, "microbatch": 4}, "phases[0].prompts"),
        ({"temperature": 0.0}, "phases[0].temperature"),
        ({"steps": 3, "epochs": 1.0}, "phases[0].steps and epochs"),
        ({"role_anchor": 0.5, "role_anchor_prompts": 0}, "phases[0].role_anchor"),
        ({"role": "baseline", "role_anchor": 0.5}, "phases[0].role_anchor"),
        ({"role": "joint", "dynamic_sampling": 1}, "phases[0].dynamic_sampling"),
    ],
)
def test_a_field_that_cannot_work_is_named(capsys, tmp_path, phase, field):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"phases": [phase], "run": str(tmp_path / "run")}))
    code, err = run(capsys, "train", "--config", str(file))
    assert code == 2
    assert field in one_line(err)
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_named(capsys, tmp_path, picture):
    for argv in (
        ["eval", "--model", "nowhere", "--out", str(tmp_path / "out")],
        ["ask", "red?", "--image", picture, "--model", "nowhere"],
        ["train", "--model.path", "nowhere", "--run", str(tmp_path / "run")],
    ):
        code, err = run(capsys, *argv)
        assert code == 2
        assert one_line(err).startswith(f"p2r {argv[0]}: nowhere is neither")
        assert err.count("\n") == 1


def test_a_missing_image_is_named(capsys, tiny_checkpoint):
    argv = ["ask", "red?", "--image", "nowhere.png", "--model", str(tiny_checkpoint)]
    code, err = run(capsys, *argv)
    assert (code, err) == (2, "p2r ask: no image at nowhere.png\n")


@pytest.mark.parametrize("cut", [0, 10, 2000])
def test_a_broken_image_is_named(capsys, tmp_path, tiny_checkpoint, picture, cut):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(picture).read_bytes()[:cut])
    argv = ["ask", "red?", "--image", str(broken), "--model", str(tiny_checkpoint)]
    code, err = run(capsys, *argv)
    assert code == 2
    assert one_line(err).startswith(f"p2r ask: {broken} is not an image")


def test_a_bad_mode_is_named(capsys, tmp_path):
    out = tmp_path / "out"
    code, err = run(capsys, "eval", "--modes", '["p2r", "guess"]', "--out", str(out))
    assert code == 2
    assert "guess" in one_line(err)
    assert not out.exists()


def test_a_missing_benchmark_is_named(capsys, tmp_path, tiny_checkpoint):
    argv = ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    for name in ("nowhere.jsonl", "nowhere"):
        code, err = run(capsys, "eval", "--benchmark", name, *argv)
        assert code == 2
        assert name in one_line(err)


def test_an_offset_beyond_the_data_is_named(capsys, tmp_path, tiny_checkpoint):
    argv = ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--mesh.fsdp=8"]
    code, err = run(capsys, "eval", "--offset", str(1 << 20), *argv)
    assert code == 2
    assert "offset 1048576" in one_line(err)


def test_a_mesh_that_does_not_fit_is_named(capsys, tmp_path, tiny_checkpoint):
    argv = ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--mesh.fsdp=3"]
    code, err = run(capsys, "eval", *argv)
    assert code == 2
    assert "8 device(s)" in one_line(err)


def test_a_report_of_nothing_says_what_was_expected(capsys, tmp_path):
    code, err = run(capsys, "report", str(tmp_path))
    assert code == 2
    assert "nothing to report" in one_line(err)
    code, err = run(capsys, "report", str(tmp_path / "nowhere"))
    assert code == 2
    assert "no run folder" in one_line(err)


def test_a_warm_start_never_overwrites(capsys, tmp_path):
    code, err = run(capsys, "sft", "--out", str(tmp_path))
    assert code == 2
    assert "exists" in one_line(err)


def test_a_missing_prompt_module_is_named(capsys, tmp_path):
    argv = ["prompts", "import", "nowhere.py", "--out", str(tmp_path / "own.yaml")]
    code, err = run(capsys, *argv)
    assert code == 2
    assert "nowhere.py" in one_line(err)


# --- exit codes -------------------------------------------------------------------------------


class TestExitCodes:
    """What launchers act on: 75 means the same command again, 2 means a person, 1 means a bug."""

    @pytest.fixture
    def train(self, capsys, monkeypatch):
        """Code and standard error of a training that ends with an exception, or well."""

        def ending(error: BaseException | None) -> tuple[int, str]:
            def train(config):
                assert isinstance(config, TrainConfig)
                if error is not None:
                    raise error

            monkeypatch.setattr(launch, "train", train)
            return run(capsys, "train")

        return ending

    def test_0_if_all_went_well(self, train):
        assert train(None) == (0, "")

    def test_75_if_the_run_was_asked_to_end(self, train):
        text = "SIGTERM: the run is saved at step 3 of 4"
        assert train(Preempted(text)) == (75, f"p2r train: {text}\n")

    @pytest.mark.parametrize(
        "error", [RunStopped("too many"), ValueError("a setting"), OSError("a disk")]
    )
    def test_2_if_a_person_must_change_something(self, train, error):
        assert train(error) == (2, f"p2r train: {error}\n")

    def test_1_and_where_it_happened_if_it_is_a_bug(self, train):
        code, err = train(ZeroDivisionError("oh"))
        assert code == 1
        assert "Traceback" in err
        assert err.endswith("ZeroDivisionError: oh\n")

    def test_a_traceback_on_request(self, train, monkeypatch):
        monkeypatch.setenv("P2R_TRACEBACK", "1")
        with pytest.raises(ValueError, match="a setting"):
            train(ValueError("a setting"))

    def test_2_if_the_devices_are_too_small_even_with_several_processes(self, train, monkeypatch):
        """Started again it would fail again."""
        import jax

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        code, said = train(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
        assert code == 2
        assert "too little memory: lower phases[i].microbatch" in said

    @pytest.mark.parametrize("processes, expected", [(1, 1), (2, 75)])
    def test_75_if_another_process_is_gone(self, train, monkeypatch, processes, expected):
        """Alone, the same error can only be a bug."""
        import jax

        monkeypatch.setattr(jax, "process_count", lambda: processes)
        code, err = train(jax.errors.JaxRuntimeError("UNAVAILABLE: closed\nmore\nand more"))
        assert code == expected
        if expected == 75:
            assert "goes on from the last checkpoint. UNAVAILABLE: closed" in one_line(err)
            assert "and more" not in err

    def test_a_second_ctrl_c_is_not_caught(self, train):
        with pytest.raises(KeyboardInterrupt):
            train(KeyboardInterrupt())

    def test_one_of_several_processes_ends_at_once(self, train, monkeypatch):
        """An orderly end would wait for the others, which wait for this one."""
        import jax

        class Ended(BaseException):
            pass

        def end(code):
            raise Ended(code)

        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(cli.os, "_exit", end)
        with pytest.raises(Ended, match="2"):
            train(RunStopped("too many"))
        # When all were asked to end, they do so in order.
        assert train(Preempted("SIGTERM"))[0] == 75

    def test_settings_that_are_not_a_process_of_several_are_named(self, capsys, tmp_path):
        argv = ["--run", str(tmp_path / "run"), "--distributed.processes", "2"]
        code, err = run(capsys, "train", *argv)
        assert code == 2
        assert "distributed.coordinator" in one_line(err)

    @pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
    def test_a_dry_run_does_not_train(self, train, monkeypatch, flag, capsys):
        from p2r_jax.rl import dry_run

        configs = []
        monkeypatch.setattr(dry_run, "dry_run", configs.append)
        monkeypatch.setattr(launch, "train", lambda config: pytest.fail("it trained"))
        assert run(capsys, "train", flag, "--seed", "3") == (0, "")
        assert [config.seed for config in configs] == [3]


# --- the commands themselves ------------------------------------------------------------------


def test_ask_prints_the_answer_and_saves_the_picture(
    capsys, monkeypatch, tmp_path, tiny_checkpoint, picture
):
    from p2r_jax.roles.pipeline import Completion, Pipeline

    texts = iter(
        [
            '[{"bbox_2d":[100,200,300,400],"label":"red [tile]"}]',
            "<think>it is 2</think><answer>B</answer>",
        ]
    )
    monkeypatch.setattr(Pipeline, "complete", lambda *args: [Completion(next(texts), ())])
    out = tmp_path / "answer.png"
    argv = ["--image", picture, "--model", str(tiny_checkpoint), "--out", str(out)]
    assert cli.main(["ask", "Which?", *argv, "--options", '["H", "2"]']) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "box: [100, 200, 300, 400] red [tile]",
        "reasoning: it is 2",
        "answer: B",
    ]
    assert out.is_file()


def test_eval_writes_samples_and_summary(capsys, tmp_path, tiny_checkpoint, quick_compilation):
    options = {
        "model": str(tiny_checkpoint),
        "modes": ["default", "p2r"],
        "limit": 3,
        "batch": 8,
        "pictures": 1,
        "out": str(tmp_path / "out"),
        "perceiver_max_new_tokens": 3,
        "reasoner_max_new_tokens": 3,
        "direct_max_new_tokens": 2,
        "mesh": {"fsdp": 8},
        "buckets": {
            "patches": [320],
            "prompt_tokens": [160],
            "canvas": [96, 448],
            "image": [384],
        },
    }
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump(options))
    assert cli.main(["eval", "--config", str(file)]) == 0
    assert "95 % interval" in capsys.readouterr().out
    assert len((tmp_path / "out/eval/eval.jsonl").read_text().splitlines()) == 6
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.html").is_file()
