"""The table and the page: what they hold, and that nothing of a study's names breaks out."""

from __future__ import annotations

import copy
import html.parser
import json
import re
from pathlib import Path

import pytest

from p2r_jax.study.report import arms_forest, contrasts_forest, curves, render
from p2r_jax.study.table import main, markdown, p_value, section, section_of, si

ROOT = Path(__file__).parents[2]
NASTY = "</title><script>alert(1)</script> | `x`"


def make_estimate(value: float, reach: float | None = 0.05) -> dict:
    low, high = (None, None) if reach is None else (value - reach, value + reach)
    return {
        "value": value,
        "low": low,
        "high": high,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "standard_error": reach,
        "degrees": 1.0,
        "seeds": 2,
        "questions": 100,
        "crossed": False,
    }


def make_arm(value: float, description: str = "") -> dict:
    point = {"step": 0, "samples": 0.0, "accuracy": 0.3, "low": 0.2, "high": 0.4}
    return {
        "metric": "p2r",
        "description": description,
        "estimate": make_estimate(value),
        "before": 0.3,
        "measures": {"samples": 23040.0, "flops": 4.56e14},
        "seeds": {
            "0": {"accuracy": value, "before": 0.3, "questions": 50, "ungraded": 2, "measures": {}}
        },
        "curve": [point, point | {"step": 2, "samples": 23040.0, "accuracy": value}],
    }


@pytest.fixture
def found():
    first = {"estimate": make_estimate(0.02), "p": 0.04, "p_holm": 0.08, "p_equivalence": 0.01}
    return {
        "study": {
            "name": NASTY,
            "description": NASTY,
            "seeds": [0, 1],
            "margin": 3.0,
            "confidence": 0.95,
        },
        "versions": {"jax": "1.2"},
        "missing": [{"arm": "b", "seed": 1, "state": "failed", "reason": NASTY}],
        "measures": {"samples": "completions", "flops": "all"},
        "arms": {"a": make_arm(0.8, NASTY), "b": make_arm(0.6)},
        "contrasts": [
            {"name": NASTY, "first": "a", "second": "b", "primary": True, "verdict": "equivalent"}
            | first,
            {"name": "none", "first": "b", "second": "a", "primary": False, "estimate": None},
        ],
    }


class Tags(html.parser.HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


class TestThePage:
    def test_escapes_everything(self, found):
        page = render(found)
        assert "alert(1)" in page
        assert "<script" not in page
        assert [tag for tag, _ in Tags(page).tags if tag == "script"] == []

    def test_needs_nothing_from_elsewhere(self, found):
        page = render(found)
        for tag, attrs in Tags(page).tags:
            for name in ("src", "href"):
                assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
        assert "default-src 'none'" in page
        assert "url(" not in page
        assert "prefers-color-scheme: dark" in page

    def test_draws_arms_contrasts_and_curves(self, found):
        page = render(found)
        assert page.count('class="chart forest"') == 2
        assert len(re.findall(r'<figure class="chart">', page)) == 2
        assert "NaN" not in page
        assert "2 not graded" in page

    def test_is_whole_without_contrasts_curves_and_intervals(self, found):
        found["contrasts"], found["missing"] = [], []
        for arm in found["arms"].values():
            arm["curve"], arm["estimate"] = [], make_estimate(0.5, None)
        found["arms"]["b"] |= {"estimate": None, "before": None}
        found["arms"]["b"]["measures"] = {"samples": None, "flops": None}
        page = render(found)
        assert 'id="curves"' not in page
        assert 'id="contrasts"' not in page


class TestForest:
    def test_values_lie_where_the_axis_says(self, found):
        plot = arms_forest(found)
        at = {text: x for x, text in plot.ticks}
        first, second = plot.marks
        assert first.x == pytest.approx(at["80"])
        assert second.x == pytest.approx(at["60"])
        assert first.ends[0] < first.x < first.ends[1]
        assert first.y < second.y < plot.bottom

    def test_the_margin_is_drawn_around_zero(self, found):
        plot = contrasts_forest(found)
        low, high = plot.margin
        assert plot.zero == pytest.approx((low + high) / 2)
        assert plot.zero < plot.marks[0].x < high
        assert len(plot.marks) == 1

    def test_an_interval_without_bounds_is_cut_at_the_edges(self, found):
        found["arms"]["a"]["estimate"] |= {"bootstrap_low": 0.0, "bootstrap_high": 1.0}
        plot = arms_forest(found)
        assert plot.marks[0].bootstrap == (plot.left, plot.right)


def test_curves_share_their_axes_and_the_first_arm_is_behind_the_others(found):
    first, second = curves(found)
    assert [len(c.drawing.lines) for c in (first, second)] == [1, 2]
    assert first.drawing.lines[0].raw == second.drawing.lines[0].raw
    assert first.drawing.y_ticks == second.drawing.y_ticks
    assert first.drawing.lines[0].area


class TestTheTable:
    def test_every_row_has_the_columns_of_its_head(self, found):
        lines = [line for line in markdown(found).splitlines() if line.startswith("|")]
        columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
        assert columns == [9] * 4 + [4] * 4 + [10] * 4

    def test_names_break_out_of_no_cell(self, found):
        text = markdown(found)
        assert "<script" not in text
        assert "alert(1)" in text

    def test_says_what_the_study_found(self, found):
        text = markdown(found)
        assert "| **80.0** | 75.0 – 85.0 |" in text
        assert "| 23.0 k | 456 T |" in text
        assert "| +2.0 | -3.0 to +7.0 | -3.0 to +7.0 | 0.04 | 0.08 | 0.01 | equivalent |" in text
        assert "no seed that both have" in text
        assert "- `b`, seed 1: failed (" in text

    @pytest.mark.parametrize(
        "value, text",
        [(0, "0"), (999, "999"), (999.7, "1.00 k"), (99950, "100 k"), (1.5e6, "1.50 M"),
         (23.75, "23.8"), (None, "–")],
    )  # fmt: skip
    def test_large_numbers(self, value, text):
        assert si(value) == text

    def test_p_values(self):
        assert [p_value(p) for p in (None, 0.0004, 0.00123, 0.5)] == [
            "–",
            "< 0.001",
            "0.0012",
            "0.5",
        ]


class TestTheReadme:
    def test_gets_the_table_between_its_markers(self, found, tmp_path, capsys):
        file, readme = tmp_path / "study.json", tmp_path / "README.md"
        file.write_text(json.dumps(found))
        readme.write_text("before\n<!-- study:begin -->\nold\n<!-- study:end -->\nafter\n")
        main([str(file), "--readme", str(readme)])
        text = readme.read_text()
        assert text == f"before\n{section(found)}\nafter\n"
        main([str(file), "--readme", str(readme)])
        assert readme.read_text() == text
        main([str(file)])
        assert capsys.readouterr().out == markdown(found) + "\n"

    def test_without_markers_is_an_error(self, found, tmp_path):
        file, readme = tmp_path / "study.json", tmp_path / "README.md"
        file.write_text(json.dumps(found))
        readme.write_text("nothing\n")
        with pytest.raises(ValueError, match="has no lines <!-- study:begin -->"):
            main([str(file), "--readme", str(readme)])

    def test_of_the_project_says_what_its_study_found(self):
        """`python -m p2r_jax.study.table configs/studies/decoupling.json --readme README.md`"""
        file = ROOT / "configs" / "studies" / "decoupling.json"
        own = section_of((ROOT / "README.md").read_text())
        if own is None or not file.is_file():
            pytest.skip("the study is not in the README")
        assert own == section(json.loads(file.read_text()))


def test_the_table_depends_on_the_json_alone(found):
    again = json.loads(json.dumps(copy.deepcopy(found)))
    assert markdown(again) == markdown(found)
