"""The HTML report: complete, offline, safe against what a model writes."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import pytest
from PIL import Image

from p2r_jax.evals import report, scoring
from p2r_jax.evals.report import duration, number, percent, points, write_report
from p2r_jax.evals.report_results import eval_order
from tests.evals.report_page import Page, answer, both_sides, stored, write_jsonl


def reasoner_rest(rows: list[dict[str, Any]]) -> float:
    """Seconds of the second phase that no stage accounts for."""
    return sum(r["time/step"] - 8 for r in rows if r["phase"] == "reasoner")


def is_prompt(page: Page, index: int) -> bool:
    """Whether a folded text, given by its element's number, is a prompt."""
    return page.summaries.get(index, "").startswith("Prompt")


class TestPage:
    def test_default_place_is_the_run_folder(self, tmp_path):
        (tmp_path / "config.yaml").write_text("model: tiny\n")
        assert write_report(tmp_path) == tmp_path / "report.html"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "report.html"]

    def test_every_section_is_there(self, page):
        ids = {a.get("id") for _, a in page.elements}
        sections = {"health", "summary", "curves", "time", "evaluation", "answers", "samples"}
        sections |= {"config"}
        assert sections <= ids
        assert {a["href"] for t, a in page.elements if t == "a"} == {f"#{s}" for s in sections} | {
            "#main"
        }
        assert "Not in this run folder" not in page.text
        assert "unfinished" not in page.text

    def test_nothing_is_loaded_from_elsewhere(self, page):
        for tag, attributes in page.elements:
            for name, value in attributes.items():
                if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                    assert value.startswith("#"), (tag, name, value)
        assert all(p.startswith("data:image/jpeg;base64,") for p in page.pictures)
        assert "http" not in re.sub(r'http-equiv|data:[^"<]*', "", page.source)
        assert "@import" not in page.source

    def test_it_begins_with_before_and_after_and_their_paired_difference(self, page, finished_run):
        before, after = (stored(finished_run, name)["p2r"] for name in ("before", "after"))
        tiles = page.text[page.text.index("p2r · before") :]
        for mode in (before, after):
            assert percent(mode["accuracy"]) in tiles
            assert f"{percent(mode['low'])} – {percent(mode['high'])} · n = 24" in tiles
        (pair,) = {scoring.compare(*both_sides(finished_run, "p2r"))["difference"]}
        assert pair == pytest.approx(after["accuracy"] - before["accuracy"])
        assert f"difference, paired {points(pair)} points" in page.text

    def test_seconds_by_stage_are_those_of_the_rows_and_of_the_summary(self, page, finished_run):
        rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
        spent = sum(row["time/step"] for row in rows if row["phase"] != "eval") - 120 * 8
        assert f"decode completions 360.0 {percent(360 / (360 + 600 + 240 + spent + 12.5))}" in (
            page.text
        )
        assert "export 12.5" in page.text
        assert f"round 1 reasoner {duration(60 * 8 + 80 + reasoner_rest(rows))}" in page.text

    def test_each_picture_is_embedded_once(self, page):
        assert len(set(page.pictures)) == len(page.pictures) > 24
        names = [a["data-picture"] for tag, a in page.elements if tag == "template"]
        assert {a["href"] for tag, a in page.elements if tag == "use"} == {f"#{n}" for n in names}

    def test_pictures_are_scaled_down_to_the_stated_side(self, tmp_path):
        Image.new("RGB", (900, 300)).save(tmp_path / "wide.png")
        write_jsonl(tmp_path / "eval/x.jsonl", answer("a", image="wide.png"))
        page = Page(write_report(tmp_path, image_side=120))
        (picture,) = [a for tag, a in page.elements if tag == "template"]
        assert (picture["data-width"], picture["data-height"]) == ("120", "40")
        data = base64.b64decode(page.pictures[0].removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).size == (120, 40)
        assert "scaled down to 120 pixels" in page.text

    def test_many_pictures_share_the_pixels_of_some(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "FULL_SIZE", 4)
        for i in range(16):
            Image.new("RGB", (900, 300), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows = [answer(str(i), image=f"{i}.png", crops=[f"{i}.png"] * 3) for i in range(16)]
        write_jsonl(tmp_path / "eval/x.jsonl", *rows)
        # 4 of 640 pixels are 16 of 320; room for 12 crops of 240 is that of 48 of 120.
        page = Page(write_report(tmp_path))
        assert "scaled down to 320 pixels, crops to 120." in page.text
        assert {a["data-width"] for tag, a in page.elements if tag == "template"} == {"320"}

    def test_boxes_are_drawn_where_they_are(self, tmp_path):
        boxes = [{"bbox_2d": [100, 200, 300, 400], "label": "cup"}]
        write_jsonl(
            tmp_path / "eval/x.jsonl",
            answer("a", boxes=boxes, true_boxes=[[0, 0, 500, 1000]], width=400, height=200),
        )
        page = Page(write_report(tmp_path))
        (predicted,) = page.of_class("predicted")
        (true,) = page.of_class("truth")
        # The longer side is 1000 units of the drawing, so the shorter one is 500.
        place = ("x", "y", "width", "height")
        assert [predicted[k] for k in place] == ["100.0", "100.0", "200.0", "100.0"]
        assert [true[k] for k in place] == ["0.0", "0.0", "500.0", "500.0"]

    def test_paired_comparison_of_before_and_after(self, page, finished_run):
        sides = [{r["id"]: r["correct"] for r in side} for side in both_sides(finished_run, "p2r")]
        gain = sum(sides[0][i] < sides[1][i] for i in sides[0])
        harm = sum(sides[0][i] > sides[1][i] for i in sides[0])
        assert f"before p2r after p2r all 24 {gain} {harm}" in page.text

    def test_a_group_of_completions_shares_a_card(self, page):
        groups = [a for tag, a in page.elements if tag == "article" and "data-rewards" in a]
        members = page.of_class("member")
        assert len(members) == 4 * len(groups)
        assert {g["data-phase"] for g in groups} == {"round 1 perceiver", "round 1 reasoner"}
        assert {g["data-role"] for g in groups} == {"perceiver", "reasoner"}

    def test_prompts_are_folded_and_truncated_completions_marked(self, page):
        groups = [a for tag, a in page.elements if tag == "article" and "data-rewards" in a]
        assert page.text.count("Prompt, 1,234 tokens <|im_start|>user") == len(groups)
        prompts = [i for i, (_, a) in enumerate(page.elements) if a.get("class") == "text"]
        assert all("open" not in page.elements[i][1] for i in prompts if is_prompt(page, i))
        assert len(page.of_class("cut-mark")) == len(groups)
        assert page.text.count("1 of 4 truncated") == len(groups)
        assert {g["data-cut"] for g in groups} == {"some"}
        assert "42 tokens" in page.text

    def test_a_prompt_that_differs_stands_with_its_completion(self, tmp_path):
        same = {"step": 1, "phase": "perceiver", "role": "perceiver", "id": "a", "image": None}
        write_jsonl(
            tmp_path / "samples/step_000001.jsonl",
            same | {"prompt": "first", "prompt_tokens": 3, "reward": None},
            same | {"prompt": "second", "prompt_tokens": 4, "reward": 1.0},
        )
        text = Page(write_report(tmp_path)).text
        assert "not graded (empty) Prompt, 3 tokens first" in text
        assert "reward 1 (empty) Prompt, 4 tokens second" in text


class TestUntrustedText:
    def test_model_output_cannot_add_elements(self, page, hostile):
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == 2  # The hover data and the page's own script.
        assert "img" not in tags
        assert not any(name.startswith("on") for _, a in page.elements for name in a)
        assert hostile.split("</script>")[0].replace("<", "&lt;")[:10] in page.source

    def test_metric_names_cannot_end_the_embedded_json(self, tmp_path, hostile):
        write_jsonl(
            tmp_path / "metrics.jsonl",
            {"step": 0, "phase": hostile, f"eval/{hostile}/accuracy": 0.5, hostile: 1.0},
            {"step": 1, "phase": hostile, f"eval/{hostile}/accuracy": 0.5, hostile: 2.0},
        )
        page = Page(write_report(tmp_path))
        assert len(page.scripts) == 2
        assert json.loads(page.scripts[0])["charts"]
        assert hostile in page.text

    def test_attributes_and_every_text_field_are_escaped(self, tmp_path):
        hostile = '"><svg onload=alert(1)>\ud83d'  # A lone surrogate, as JSON allows.
        fields = ("id", "mode", "category", "question", "answer", "prediction", "image")
        texts = ("perceiver_text", "reasoner_text")
        record = answer("a") | dict.fromkeys(fields + texts, hostile) | {"options": [hostile]}
        record["boxes"] = [{"bbox_2d": [1, 2, 3, 4], "label": hostile}]
        write_jsonl(tmp_path / "eval/x.jsonl", record)
        write_jsonl(
            tmp_path / "samples/step_1.jsonl",
            dict.fromkeys(("step", "phase", "role", "id", "question", "completion"), hostile)
            | dict.fromkeys(("prompt", "prompt_tokens", "partner_completion", "reward"), hostile),
        )
        write_jsonl(
            tmp_path / "metrics.jsonl",
            {"step": 1, "phase": hostile, "round": 1, "phase_number": 1, f"time/{hostile}": 1.0},
        )
        (tmp_path / "config.yaml").write_text(json.dumps({"phases": [{"role": hostile}]}))
        (tmp_path / "summary.json").write_text(json.dumps({hostile: {"accuracy": 1}, "x": hostile}))
        page = Page(write_report(tmp_path))
        assert page.text.count("onload=alert(1)>") > 20
        assert not any("onload" in name for _, a in page.elements for name in a)

    def test_the_policy_allows_only_the_page_own_script(self, page):
        (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv")]
        assert "default-src 'none'" in policy
        assert re.search(r"script-src 'sha256-[\w+/]+=*'", policy)

    @pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
    def test_files_outside_the_run_folder_are_not_embedded(self, tmp_path, path):
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        run = tmp_path / "run"
        write_jsonl(run / "eval/x.jsonl", answer("a", image=path))
        page = Page(write_report(run))
        assert "not inside the run folder" in page.text
        assert not page.pictures


class TestSelection:
    def test_cards_are_limited_and_the_rest_is_counted(self, finished_run, tmp_path):
        page = Page(write_report(finished_run, tmp_path / "r.html", max_cards=40))
        cards = [a for tag, a in page.elements if tag == "article" and "data-verdict" in a]
        members = page.of_class("member")
        assert len(cards) + len(members) == 40
        left_out = 7 * 24 - len(cards)
        assert f"{len(cards)} of 168 answers are here" in page.text
        assert f"{left_out} are left out" in page.text

    def test_the_newest_answers_of_the_mode_that_counts_come_first(self, page):
        cards = [a for tag, a in page.elements if "data-verdict" in a]
        order = list(dict.fromkeys((a["data-eval"], a["data-mode"]) for a in cards))
        assert order[:3] == [
            ("after", "p2r"),
            ("after", "default"),
            ("after_phase1_perceiver", "p2r"),
        ]
        assert order[-1] == ("before", "default")


class TestCurves:
    def test_metrics_are_grouped_and_modes_share_a_chart(self, page):
        names = re.findall(r'class="name">([^<]+)<', page.source)
        assert names[0] == "eval/accuracy"
        assert names.count("eval/accuracy") == 1
        assert {"reward/mean", "kl/mean", "reward/parse_ok"} <= set(names)
        assert not {"eval/low", "eval/high", "step", "round", "phase_step", "lr"} & set(names)
        assert "The same at every step: lr 1e-06" in page.text
        assert names.index("kl/mean") < names.index("seconds per step, by stage")

    def test_phases_are_marked_in_every_chart(self, page):
        drawings = [a for _, a in page.elements if "data-left" in a]
        assert len(page.of_class("boundary")) == len(drawings) > 10
        assert page.text.count("round 1 perceiver steps 1 – 60") == 1

    def test_each_chart_finds_its_own_values(self, page):
        """The script looks values up by number, in the order of the page."""
        values = json.loads(page.scripts[0])["charts"]
        numbers = [int(a["data-chart"]) for _, a in page.elements if "data-chart" in a]
        assert numbers == list(range(len(values)))
        names = re.findall(r'class="name">([^<]+)<', page.source)
        stacked = [name for name, v in zip(names, values, strict=True) if v["stacked"]]
        assert stacked == ["seconds per step, by stage"]
        accuracy = values[names.index("eval/accuracy")]
        assert [s["name"] for s in accuracy["series"]] == ["p2r", "live_perceiver", "live_reasoner"]


def test_numbers_read_well():
    assert [percent(v) for v in (0.9319, 0, None, float("nan"))] == ["93.2 %", "0.0 %", "–", "–"]
    assert [number(v) for v in (1234, 0.12345, 1e-6, True)] == ["1,234", "0.123", "1e-06", "–"]
    assert [number(v) for v in (1234.56, -20_000.0, 1e20)] == ["1,235", "-20,000", "1e+20"]
    assert [points(v) for v in (0.198, -0.05, 0.0, None)] == ["+19.8", "-5.0", "+0.0", "–"]
    assert [duration(v) for v in (12.34, 512, 3725, 86_400)] == [
        "12.3 s",
        "9 min",
        "1 h 2 min",
        "24 h 0 min",
    ]


def test_evaluations_are_listed_in_the_order_they_were_made():
    names = ["after", "after_phase10_perceiver", "after_phase2_reasoner", "before"]
    assert sorted(names, key=eval_order) == names[::-1]
