"""The `p2r` command: help, configs, and errors a person can act on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from p2r_jax import cli
from p2r_jax.config import TrainConfig
from p2r_jax.data.visual_search import VisualSearch

CONFIGS = Path(__file__).parents[1] / "configs"
RELEASED = ["p2r_2b.yaml", "p2r_4b.yaml", "p2r_8b.yaml"]


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    try:
        code = cli.main(list(argv))
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


def train_config(*argv: str) -> TrainConfig:
    parser = cli._train_parser()
    return cli._dataclass_of(parser, parser.parse_args(list(argv)), TrainConfig)


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


# --- configs ----------------------------------------------------------------------------------


def test_options_override_the_file_and_keep_its_siblings():
    config = train_config(
        "--config",
        str(CONFIGS / "tiny.yaml"),
        "--optimizer.learning_rate=1e-5",
        "--run",
        "elsewhere",
    )
    assert config.run == "elsewhere"
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.freeze_vision is True
    assert config.mesh.cpu_devices == 2
    assert [phase.role for phase in config.phases] == ["perceiver", "reasoner"]


def test_nested_values_of_a_file_reach_their_fields(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: {max_pixels: 4096}\n"
        "phases: [{role: reasoner, steps: 3, prompts: 4, microbatch: 2}]\n"
        "loss: {dual_clip: null, clip_high: 0.3}\n"
        "eval: {modes: [p2r, default]}\n"
    )
    config = train_config("--config", str(file))
    assert config.model.max_pixels == 4096
    assert config.model.path == "tiny"
    (phase,) = config.phases
    assert (phase.role, phase.steps, phase.microbatch, phase.group) == ("reasoner", 3, 2, 8)
    assert (config.loss.dual_clip, config.loss.clip_high, config.loss.clip_low) == (None, 0.3, 0.2)
    assert config.eval.modes == ["p2r", "default"]


def test_a_config_that_was_written_reads_back_equal(tmp_path):
    config = train_config("--config", str(CONFIGS / "tiny.yaml"))
    cli.dump_config(config, tmp_path / "run" / "config.yaml")
    assert train_config("--config", str(tmp_path / "run" / "config.yaml")) == config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_is_valid(file):
    train_config("--config", str(file)).validate()


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_recipe_is_the_authors(name):
    """P2R §2, number by number."""
    config = train_config("--config", str(CONFIGS / name))
    perceiver, reasoner = config.phases
    for phase in config.phases:
        assert (phase.steps, phase.prompts, phase.group) == (156, 64, 8)
        assert phase.temperature == 1.0
        assert phase.partner_max_new_tokens == 2048
        assert phase.role_anchor == 0
    assert (perceiver.role, perceiver.max_new_tokens) == ("perceiver", 1024)
    assert (reasoner.role, reasoner.max_new_tokens) == ("reasoner", 2048)
    assert (config.model.min_pixels, config.model.max_pixels) == (4096, 2_097_152)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-6, 0)
    assert optimizer.final_fraction == 1.0
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.01, 1.0)
    assert not optimizer.freeze_vision
    loss = config.loss
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.2, 3.0)
    assert (loss.kl_weight, loss.kl_kind, loss.aggregation) == (0.01, "k3", "token-mean")
    assert loss.normalize_by_std
    assert (config.eval.every, config.checkpoint.every) == (10, 30)
    assert (config.model.compute_dtype, config.model.remat) == ("bfloat16", True)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_buckets_hold_one_to_four_images(name):
    """2048 visual tokens of 32x32 pixels an image, four patches each, and room for the text."""
    buckets = train_config("--config", str(CONFIGS / name)).buckets
    assert set(buckets.patches) >= {8192, 4 * 8192}
    assert buckets.prompt_tokens[0] == 2560
    assert buckets.prompt_tokens[-1] == 8704
    for images in (1, 2, 3, 4):
        text = 512
        assert any(n >= images * 2048 + text for n in buckets.prompt_tokens)
        assert any(n >= images * 8192 for n in buckets.patches)


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
        ({"prompts": 6, "microbatch": 4}, "phases[0].microbatch"),
        ({"temperature": 0.0}, "phases[0].temperature"),
        ({"role_anchor": 0.5, "role_anchor_prompts": 65}, "phases[0].role_anchor_prompts"),
        ({"role": "baseline", "role_anchor": 0.5}, "phases[0]"),
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
