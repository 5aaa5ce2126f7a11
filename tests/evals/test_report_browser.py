"""The report in a real browser, where one is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from p2r_jax.evals.report import write_report


def test_in_a_browser(finished_run, tmp_path):
    """The script runs under the page's own policy, without errors, and a filter hides cards."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    original = write_report(finished_run, tmp_path / "report.html").read_text("utf-8")
    # The real page, then a copy whose policy lets a test script choose two filters.
    dom, log = _dump_dom(browser, tmp_path / "report.html", tmp_path)
    assert "CONSOLE" not in log
    assert "<title>tiny-two-phase · p2r report</title>" in dom
    first, total = map(int, re.search(r"<output[^>]*>(\d+) of (\d+) shown", dom).groups())
    assert first == len(cards_shown(dom)) < total

    script = """<script>
      const bar = document.querySelector("[data-gallery=answer-cards]");
      document.querySelector("#answers .more").click();
      document.title = bar.querySelector("output").textContent;
      bar.querySelector("[data-field=mode]").value = "=p2r";
      bar.querySelector("[data-search]").value = "VSTAR-003 disc";
      bar.dispatchEvent(new Event("input"));
      document.querySelector("#answer-cards .card:not([hidden]) .zoom").click();
      document.querySelector("[data-chart]").dispatchEvent(
        new KeyboardEvent("keydown", {key: "Home"}));
    </script></body>"""
    steered = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", original)
    (tmp_path / "steered.html").write_text(steered.replace("</body>", script), "utf-8")
    dom, log = _dump_dom(browser, tmp_path / "steered.html", tmp_path)
    assert "CONSOLE" not in log
    assert f"<title>{2 * first} of {total} shown</title>" in dom
    shown = cards_shown(dom)
    assert len(shown) == 3  # Question 3 in every evaluation.
    assert all('data-mode="p2r"' in card for card in shown)
    assert re.search(r'<dialog id="zoom"[^>]* open=""', dom)
    assert re.search(r'<div id="tooltip"[^>]*>step 0\np2r  38 %   33 – 43<', dom)


def cards_shown(dom: str) -> list[str]:
    """Tags of the answers that no filter hides."""
    cards = re.findall(r"<article class=\"card[^>]*>", dom)
    return [card for card in cards if "hidden" not in card]


def _dump_dom(browser: str, page: Path, scratch: Path) -> tuple[str, str]:
    profile = scratch / f"profile-{page.stem}"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--enable-logging=stderr",
    ]
    result = subprocess.run(
        [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr
