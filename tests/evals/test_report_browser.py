"""The report in a real browser, where one is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from p2r_jax.evals.report import write_report
from tests.evals.browser import NAMES, Browser, installed
from tests.evals.report_page import Page, write_jsonl

SHOWN = '[...document.querySelectorAll("#answer-cards .card:not([hidden])")]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = installed()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_in_a_browser(finished_run, tmp_path, browser):
    """The script runs under the page's own policy, without errors, and shows a page of cards."""
    browser.open(write_report(finished_run, tmp_path / "report.html"))
    assert browser.run("document.title") == "tiny-two-phase · p2r report"
    count = 'document.querySelector("[data-gallery=answer-cards] output").textContent'
    first, _, total = browser.run(count).split()[:3]
    assert browser.run(f"{SHOWN}.length") == int(first) < int(total)
    browser.run('document.querySelector("#answers > .more button").click()')
    assert browser.run(count) == f"{2 * int(first)} of {total} shown"

    search(browser, "VSTAR-003 disc", mode="p2r")
    modes = browser.run(f"{SHOWN}.map((card) => card.dataset.mode)")
    assert modes == ["p2r"] * 3  # Question 3 in every evaluation.
    browser.run(f"{SHOWN}[0].querySelector('.zoom').click()")
    assert browser.run('document.getElementById("zoom").open') is True
    browser.run('document.querySelector("#zoom .close").click()')
    browser.run("""document.querySelector("[data-chart]").dispatchEvent(
      new KeyboardEvent("keydown", {key: "Home"}))""")
    tooltip = browser.run('document.getElementById("tooltip").textContent')
    assert tooltip.startswith("step 0\np2r  38 %   33 – 43")
    assert browser.complaints == []


def test_what_the_console_says_is_heard(tmp_path, browser):
    (tmp_path / "x.html").write_text("<script>console.log(1); nonsense()</script>")
    browser.open(tmp_path / "x.html")
    assert len(browser.complaints) == 2


def test_pictures_are_made_when_their_cards_come_near(finished_run, tmp_path, browser):
    path = write_report(finished_run, tmp_path / "report.html")
    embedded = Page(path).pictures
    browser.open(path)
    made = '[...document.querySelectorAll("#pictures image")].map((i) => i.href.baseVal)'
    # Two frames after the load every observer has spoken once.
    frames = "requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn = true; }))"
    browser.run(f"{frames}; 0")
    browser.wait_for("window.drawn")
    assert browser.run(made) == []  # The window is at the top, the answers are far down.
    browser.run('document.querySelector("#answer-cards").scrollIntoView()')
    browser.wait_for(f"({made}).length")
    drawn = browser.run(made)
    assert set(drawn) < set(embedded)
    assert len(drawn) == len(set(drawn))
    assert browser.run('document.querySelectorAll("template").length') == len(embedded) - len(drawn)
    width = "document.querySelector('#answer-cards .card use').getBoundingClientRect().width"
    assert browser.run(width) > 100  # It is drawn, and not only there.
    assert browser.complaints == []


def test_every_filter_leaves_the_cards_it_names(finished_run, tmp_path, browser):
    other = tmp_path / "other run"
    shutil.copytree(finished_run / "eval", other / "eval")
    changed = [json.loads(line) for line in (other / "eval/after.jsonl").open()]
    for record in changed[::3]:
        record["correct"] = 1 - record["correct"]
    write_jsonl(other / "eval/after.jsonl", *changed)
    path = write_report(finished_run, tmp_path / "report.html", against=other)
    cards = [a for tag, a in Page(path).elements if tag == "article" and "data-verdict" in a]
    browser.open(path)
    for fields in (
        {"verdict": "wrong"},
        {"verdict": "right", "category": "relative_position", "mode": "p2r"},
        {"change": "gain over other run"},
        {"change": "harm against other run", "eval": "after"},
        {"change": "gain over default", "verdict": "wrong"},
        {"hit": "miss", "change": "harm against before"},
        {},
    ):
        search(browser, "", **fields)
        shown = browser.run(f"{SHOWN}.map((card) => ({{...card.dataset}}))")
        expected = [card for card in cards if all(_has(card, *f) for f in fields.items())]
        assert len(shown) == len(expected), fields
        found = [{f"data-{k}": v for k, v in card.items()} for card in shown]
        assert all(_has(card, *f) for card in found for f in fields.items()), fields
        impossible = fields == {"change": "gain over default", "verdict": "wrong"}
        assert bool(shown) != impossible, fields
    assert browser.complaints == []


def search(browser: Browser, words: str, **fields: str) -> None:
    """Chooses filters as a person does, and shows all that is left."""
    browser.run(f"""(() => {{
      const bar = document.querySelector("[data-gallery=answer-cards]");
      bar.querySelector("[data-reset]").click();
      for (const [name, value] of Object.entries({json.dumps(fields)})) {{
        const field = bar.querySelector(`[data-field=${{name}}]`);
        field.value = "=" + value;
        if (field.value !== "=" + value) throw new Error(`no ${{name}} ${{value}}`);
      }}
      bar.querySelector("[data-search]").value = {json.dumps(words)};
      bar.dispatchEvent(new Event("input"));
      const more = document.querySelector("#answers > .more");
      while (!more.hidden) more.querySelector("button").click();
    }})()""")


def _has(card: dict[str, str | None], field: str, value: str) -> bool:
    own = card.get(f"data-{field}")
    return value in json.loads(own or "[]") if field == "change" else own == value
