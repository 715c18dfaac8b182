"""The board in headless Chromium, by Grafana's own components (`board.jsx`, built into `board.js` by npm)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from monitoring.prometheus import Prometheus
from monitoring.queries import board, without_variables

Json = dict[str, Any]

BUILT = Path(__file__).resolve().parents[3] / "build" / "monitoring"  # what `make ops-test` makes
SCRIPT = BUILT / "board.js"
WIDTH = 1600
STEP = 1.0  # seconds
PAGE = "<!doctype html><meta charset=utf-8><body style='margin:8px'><div id=board></div>"


def chromium() -> str | None:
    """The program, where there is one; $CHROMIUM names another."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def ready() -> bool:
    return chromium() is not None and SCRIPT.is_file()


def answers(prometheus: Prometheus, begin: float, end: float) -> Json:
    """What the page is told: the board, and of each panel by its id what Prometheus answers between two times."""
    found: dict[int, dict[str, Any]] = {}
    for panel in board()["panels"]:
        found[panel["id"]] = {
            target["refId"]: prometheus.ask(
                "query_range",
                query=without_variables(target["expr"]),
                start=str(begin),
                end=str(end),
                step=str(STEP),
            )["result"]
            for target in panel.get("targets", ())
        }
    return {"board": board(), "answers": found, "from": 1000 * begin, "to": 1000 * end}


def draw(told: Json, picture: Path) -> list[str]:
    """The whole board goes to `picture`. The titles of panels without anything drawn; raises
    RuntimeError for what the page throws."""
    from playwright.sync_api import sync_playwright

    failures: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.route("**", lambda route: route.fulfill(body=PAGE, content_type="text/html"))
        page.goto("http://board.localhost/")
        page.evaluate("told => { window.quire = told }", told)
        page.add_script_tag(path=SCRIPT)
        page.wait_for_selector("[data-panel]")
        page.wait_for_timeout(1000)  # lines are drawn a frame after their canvas is there
        page.screenshot(path=picture, full_page=True)
        empty = page.evaluate(
            """() => [...document.querySelectorAll('[data-panel]')]
                .filter(one => one.innerText.includes('No data')).map(one => one.dataset.panel)"""
        )
        browser.close()
    if failures:
        raise RuntimeError("; ".join(failures))
    return list(empty)
