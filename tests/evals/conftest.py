"""A run folder as training leaves it, small, with values and pictures of a plausible shape."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from p2r_jax.evals import scoring
from p2r_jax.evals.report import write_report
from tests.evals.report_page import Page

HOSTILE = "<script>document.title='owned'</script> </script><img src=x onerror=alert(1)> &amp;"
"""What a model could write to break out of the page."""

CATEGORIES = ("direct_attributes", "relative_position")
COLORS = ("crimson", "seagreen", "royalblue", "goldenrod")
PHASE_STEPS = 60
DRIFT_MODES = ("p2r", "live_perceiver", "live_reasoner")
CONFIG = """rounds: 1
phases:
- role: perceiver
  steps: 60
- role: reasoner
  steps: 60
eval:
  final_questions: 24
export: true
"""
WIDTH, HEIGHT = 480, 320


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-phase run: three evaluations of 24 questions, samples.  Do not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny-two-phase")


@pytest.fixture(scope="session")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of that run."""
    return Page(write_report(finished_run, tmp_path_factory.mktemp("out") / "report.html"))


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


def make_run(run: Path, questions: int = 24) -> Path:
    """Writes a run folder and returns it; deterministic."""
    rng = random.Random(0)
    for folder in ("eval", "samples", "images"):
        (run / folder).mkdir(parents=True)
    boxes = [_picture(run / f"images/q{i}.jpg", rng) for i in range(questions)]
    summary: dict[str, Any] = {"model": "tiny", "seed": 17}
    skills = {"before": 0.35, "after_phase1_perceiver": 0.6, "after": 0.8}
    for name, skill in skills.items():
        records = [
            _record(run, i, mode, boxes[i], skill, rng)
            for mode in (DRIFT_MODES if "phase" in name else ("default", "p2r"))
            for i in range(questions)
        ]
        write_jsonl(run / f"eval/{name}.jsonl", records)
        stored = scoring.summarize_modes(name, records)
        (run / f"eval/{name}.json").write_text(json.dumps(stored))
        summary[name] = {k: v for k, v in stored["modes"]["p2r"].items() if k != "by_category"}
    rows = [_evaluation_row("before", 0, 0.38)]
    for step in range(1, 2 * PHASE_STEPS + 1):
        rows.append(_metrics(step, rng))
        if step % PHASE_STEPS == 0:
            name = "after" if step > PHASE_STEPS else "after_phase1_perceiver"
            rows.append(_evaluation_row(name, step, 0.38 + 0.2 * step / PHASE_STEPS))
    write_jsonl(run / "metrics.jsonl", rows)
    seconds = {"decode": 360.0, "update": 600.0, "evaluation": 240.0, "export": 12.5}
    (run / "summary.json").write_text(json.dumps(summary | {"stages": seconds}))
    for step in range(1, 2 * PHASE_STEPS, 20):
        write_jsonl(run / f"samples/step_{step:06d}.jsonl", _samples(step, boxes, rng))
    (run / "config.yaml").write_text(CONFIG)
    return run


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _picture(path: Path, rng: random.Random) -> list[int]:
    """A cluttered scene with one small target; returns the target's box, 0-1000."""
    image = Image.new("RGB", (WIDTH, HEIGHT), rng.choice(["#cfd8dc", "#e8e0d0", "#354a5f"]))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, size = rng.randrange(WIDTH), rng.randrange(HEIGHT), rng.randrange(6, 40)
        draw.rectangle([x, y, x + size, y + size], fill=rng.choice(["#90a4ae", "#b0a080", "#667"]))
    x1, y1 = rng.randrange(60, 800), rng.randrange(60, 800)
    box = [x1, y1, x1 + rng.randrange(50, 110), y1 + rng.randrange(50, 120)]
    pixels = [c / 1000 * (WIDTH, HEIGHT)[i % 2] for i, c in enumerate(box)]
    draw.ellipse(pixels, fill=rng.choice(COLORS))
    image.save(path, quality=85)
    return box


def _near(box: list[int], spread: int, rng: random.Random) -> list[int]:
    shift = [rng.randint(-spread, spread) for _ in range(2)]
    return [min(1000, max(0, c + shift[i % 2])) for i, c in enumerate(box)]


def _record(
    run: Path, i: int, mode: str, true_box: list[int], skill: float, rng: random.Random
) -> dict[str, Any]:
    p2r = mode != "default"
    right = rng.random() < (skill if p2r else 0.4)
    answer = "ABCD"[i % 4]
    prediction = answer if right else rng.choice([*(c for c in "ABCD" if c != answer), None])
    pred = [_near(true_box, 25 if right else 260, rng)] if p2r and i != 5 else []
    crops = []
    if pred:
        name = f"images/q{i}_{mode}_{right}.png"
        with Image.open(run / f"images/q{i}.jpg") as image:
            image.crop(scoring.crop_rectangle(WIDTH, HEIGHT, pred[0])).save(run / name)
        crops = [name]
    said = (
        HOSTILE if i == 3 else "The target sits near the lower edge; its fill is clearly visible."
    )
    return {
        "id": f"vstar-{i:03d}",
        "mode": mode,
        "category": CATEGORIES[i % 2],
        "question": f"What is the color of the small disc number {i}?",
        "options": list(COLORS),
        "answer": answer,
        "prediction": prediction,
        "correct": int(right),
        "perceiver_text": json.dumps([{"bbox_2d": b, "label": "disc"} for b in pred])
        if p2r
        else None,
        "parse_ok": (i != 5) if p2r else None,
        "boxes": [{"bbox_2d": b, "label": "disc"} for b in pred],
        "true_boxes": [true_box],
        "reasoner_text": f"<think>{said}</think><answer>{prediction or ''}</answer>",
        "width": WIDTH,
        "height": HEIGHT,
        "image": f"images/q{i}.jpg",
        "crops": crops,
        **(
            scoring.box_figures(pred, [true_box], WIDTH, HEIGHT)
            if p2r
            else {"hit": None, "iou": None, "area": None}
        ),
    }


def _metrics(step: int, rng: random.Random) -> dict[str, Any]:
    number, local = divmod(step - 1, PHASE_STEPS)
    phase, progress = ("perceiver", "reasoner")[number], local / PHASE_STEPS
    reward = 0.35 + 0.2 * number + 0.25 * progress + rng.gauss(0, 0.05)
    row: dict[str, Any] = {"step": step, "phase": phase, "round": 1}
    row |= {"phase_number": number + 1, "phase_step": local + 1}
    row |= {
        "reward/mean": reward,
        "reward/std": 0.42 - 0.1 * progress + rng.gauss(0, 0.02),
        "reward/zero_variance_groups": 0.3 + 0.2 * progress + rng.gauss(0, 0.04),
        "completion/length_mean": 60 + 200 * number + rng.gauss(0, 6),
        "kl/mean": 1e-4 + 3e-3 * progress**2 + abs(rng.gauss(0, 2e-4)),
        "entropy/mean": 1.1 * math.exp(-progress) + rng.gauss(0, 0.03),
        "loss/policy": float("nan") if step == 77 else rng.gauss(0, 0.02),
        "grad_norm": 1.5 + abs(rng.gauss(0, 0.5)),
        "lr": 1e-6,
        "time/decode": 3.0,
        "time/update": 5.0,
        "time/step": 9 + rng.random(),
    }
    if phase == "perceiver":
        row["reward/parse_ok"] = 0.9 + 0.1 * progress + rng.gauss(0, 0.01)
    if step % 20 == 0 and step % PHASE_STEPS:
        row |= _accuracies(DRIFT_MODES, 0.38 + 0.2 * step / PHASE_STEPS, 0.1)
        row["time/evaluation"] = 20.0
    return row


def _evaluation_row(name: str, step: int, accuracy: float) -> dict[str, Any]:
    """Of a full evaluation, between phases."""
    modes = DRIFT_MODES if "phase" in name else ("default", "p2r")
    row = {"step": step, "phase": "eval", "name": name, "time/evaluation": 40.0}
    return row | _accuracies(modes, accuracy, 0.05)


def _accuracies(modes: tuple[str, ...], accuracy: float, half: float) -> dict[str, float]:
    row = {}
    for mode in modes:
        own = accuracy - 0.1 * (mode == "live_reasoner")
        row |= {f"eval/{mode}/accuracy": own}
        row |= {f"eval/{mode}/low": own - half, f"eval/{mode}/high": own + half}
    return row


def _samples(step: int, boxes: list[list[int]], rng: random.Random) -> list[dict[str, Any]]:
    role = ("perceiver", "reasoner")[(step - 1) // PHASE_STEPS]
    samples = []
    for i in (step // 20, step // 20 + 7):
        frozen = [_near(boxes[i], 40, rng)]
        for g in range(4):
            pred = [_near(boxes[i], 150, rng)] if role == "perceiver" else frozen
            reward = float(rng.random() < 0.6)
            answer = f"<think>{HOSTILE if g == 3 else 'a disc'}</think><answer>B</answer>"
            written = json.dumps([{"bbox_2d": pred[0], "label": "disc"}])
            first, second = (written, answer) if role == "perceiver" else (answer, written)
            samples.append(
                {
                    "step": step,
                    "phase": role,
                    "role": role,
                    "id": f"train-{i}",
                    "question": f"What is the color of the small disc number {i}?",
                    "answer": "B",
                    "prompt": f"<|im_start|>user\n<|image_pad|>Which? {HOSTILE}<|im_end|>",
                    "prompt_tokens": 1234,
                    "completion": first,
                    "completion_tokens": 40 + g,
                    "truncated": g == 2,
                    "reward": reward,
                    "reward_parts": {"correct": reward, "overlap": 0.0, "label": 0.0},
                    "advantage": 1.5 * reward - 0.9,
                    "partner_completion": second,
                    "boxes": pred,
                    "true_boxes": [boxes[i]],
                    "image": f"images/q{i}.jpg",
                }
            )
    return samples
