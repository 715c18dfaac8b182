"""The live page in a browser: it draws what happens, says what it draws, and can be used without a mouse.

With SCREENSHOTS=FOLDER the pictures of the docs are taken on the way.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import httpx
import pytest
from page.serving import Server, wait_for
from prometheus_client.parser import text_string_to_metric_families

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `browser` is not installed")

pytestmark = pytest.mark.slow

SERVING = "document.querySelector('#life').dataset.state === 'serving'"
STEPS = "Number(document.querySelector('#steps').dataset.steps ?? 0)"
TOKENS = "[...document.querySelectorAll('.tokens .t:not(.special)')]"
# How much of a canvas is painted.
INK = """id => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
  return painted / (data.length / 4);
}"""


def until(page, expression: str, seconds: float = 60) -> None:
    """Asked from outside: the page's policy lets no text become a script, not even playwright's own."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"it never became true: {expression}"
        page.wait_for_timeout(50)


def metrics_of(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def picture(page, name: str, **options) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / name, **options)


def send(page, prompt: str, **fields: object) -> None:
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#send")


def done(page) -> None:
    until(page, "!document.querySelector('#send').disabled")


# the engine at work


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_draws_under_load(server, load, look, scheme):
    page = look(server.url, color_scheme=scheme)
    until(page, f"{SERVING} && {STEPS} > 150")
    before = page.evaluate(f"[{STEPS}, document.querySelector('#steps').toDataURL()]")
    wait_for(lambda: page.evaluate("document.querySelector('#steps').toDataURL()") != before[1])
    for name in ("steps", "blocks", "ttft", "itl"):
        assert page.evaluate(INK, name) > 0.01, name
    assert float(page.text_content("#fig-generated").replace(",", "")) > 0
    assert {row.strip() for row in page.locator("#tenants tbody th").all_text_contents()} <= {
        "alice",
        "bob",
        "research",
    }
    assert "ms" in page.text_content("#itl-percentiles")
    assert page.locator("#spec tbody tr").count() > 0
    assert "quire-py-8m" in page.title()
    # Text in the answers' place as well, for the picture.
    page.check("#logprobs")
    send(page, "Return True if the path is an absolute path", n=2, max_tokens=60)
    done(page)
    picture(page, f"live-page-{scheme}.png", full_page=True)


def test_motion_is_left_out_for_who_wants_none(server, load, look):
    page = look(server.url, reduced_motion="reduce")
    until(page, f"{SERVING} && {STEPS} > 50")
    assert page.evaluate(INK, "steps") > 0.01


def test_figures_are_those_of_the_metrics(server, look):
    page = look(server.url)
    until(page, SERVING)
    page.click("details.totals summary")
    for max_tokens in (7, 30):
        body = {"prompt": "def f(x):", "max_tokens": max_tokens, "ignore_eos": True, "n": 2}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    wait_for(lambda: metrics_of(server.url)["quire_num_requests_running"] == 0)

    def shown() -> dict[str, float]:
        rows = page.locator("#totals tbody tr").all()
        return {
            row.locator("th").text_content(): float(row.locator("td").text_content().replace(",", "")) for row in rows
        }

    expected = metrics_of(server.url)
    wait_for(lambda: shown()["quire_engine_generated_tokens_total"] == expected["quire_engine_generated_tokens_total"])
    found = shown()
    assert len(found) >= 10
    assert found == {name: expected[name] for name in found}
    assert page.text_content("#fig-running") == "0"
    held = page.evaluate("[...document.querySelectorAll('#blocks-key tr')].map(row => row.cells[2].textContent)")
    assert sum(int(cell.replace(",", "")) for cell in held) == 899


def test_steps_can_be_read_by_keyboard_and_held_still(server, load, look):
    page = look(server.url)
    until(page, f"{SERVING} && {STEPS} > 40")
    page.focus("#pause")
    page.keyboard.press("Space")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    page.focus("#steps")
    page.keyboard.press("ArrowLeft")
    first = page.text_content("#steps-reading")
    page.keyboard.press("ArrowLeft")
    second = page.text_content("#steps-reading")
    assert first.startswith("Step ")
    assert second.startswith("Step ")
    assert first != second
    assert "stream" in second
    assert page.evaluate(STEPS) == (page.wait_for_timeout(500), page.evaluate(STEPS))[1]
    page.keyboard.press("Escape")
    assert page.text_content("#steps-reading").strip() == ""


# the playground


def test_text_streams_and_tokens_are_coloured(server, look):
    page = look(server.url)
    until(page, SERVING)
    lengths = page.evaluate_handle("""() => {
      const seen = [];
      new MutationObserver(() => seen.push(document.querySelectorAll('.t').length))
        .observe(document.querySelector('#samples'), {subtree: true, childList: true});
      return seen;
    }""")
    send(page, "Return the largest of two numbers", n=3, max_tokens=40, temperature=1)
    done(page)
    assert page.locator(".sample").count() == 3
    grown = lengths.json_value()
    assert len(set(grown)) > 5, "it came in one piece"
    classes = page.evaluate(f"{TOKENS}.map(t => t.dataset.p)")
    assert len(set(classes)) >= 3
    backgrounds = page.evaluate(
        "[...document.querySelectorAll('.tokens .t')].map(t => getComputedStyle(t).backgroundColor)"
    )
    assert len(set(backgrounds)) >= 3
    page.locator(".tokens .t").first.focus()
    assert page.is_visible("#rivals")
    rows = page.locator("#rivals tr").count()
    assert 5 <= rows <= 6
    first = page.text_content("#rivals")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#rivals") != first
    picture(page, "live-page-tokens.png", clip=page.locator("#playground").bounding_box())
    assert "drawn" in page.text_content("#outcome")


def test_a_completion_says_what_the_server_says(server, look):
    page = look(server.url)
    until(page, SERVING)
    page.locator("label", has_text="Completion").click()
    assert not page.is_visible("#system")
    body = {"prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0}
    expected = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    for shown in (True, False):
        page.set_checked("#logprobs", shown)
        send(page, "def add(a, b):", max_tokens=24, temperature=0)
        done(page)
        text = page.evaluate(
            "[...document.querySelectorAll('.tokens .t:not(.special)')].map(t => t.textContent).join('')"
        )
        assert (text if shown else page.text_content(".tokens")) == expected


def test_a_conversation_goes_on(server, look):
    page = look(server.url)
    until(page, SERVING)
    bodies: list[dict[str, object]] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.url.endswith("/completions") else None)
    for message in ("Return the largest of two numbers", "Return the smallest of two numbers"):
        send(page, message, max_tokens=16, temperature=0)
        done(page)
    assert [turn["role"] for turn in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert page.locator("#talk li").count() == 3


def test_stop_lets_go_of_the_request(server, look):
    page = look(server.url)
    until(page, SERVING)
    aborted = metrics_of(server.url).get("quire_requests_aborted_total", 0)
    page.locator("label", has_text="Completion").click()
    send(page, "x = [", max_tokens=1900, temperature=1.5)
    until(page, "document.querySelectorAll('.t').length > 5")
    page.click("#stop-button")
    done(page)
    assert page.text_content(".sample small") == "stopped"
    wait_for(lambda: metrics_of(server.url)["quire_requests_aborted_total"] == aborted + 1)
    wait_for(lambda: metrics_of(server.url)["quire_num_requests_running"] == 0)


def test_what_the_server_refuses_is_said(server, look):
    page = look(server.url)
    until(page, SERVING)
    send(page, "x " * 5000)
    until(page, "document.querySelector('#problem').textContent !== ''")
    assert "context" in page.text_content("#problem")
    assert page.input_value("#prompt") != "", "what was typed is not lost"


def test_nobody_needs_a_mouse(server, look):
    """From the top of the page to an answer and its tokens: Tab, arrows, Ctrl+Enter, Escape."""
    page = look(server.url)
    until(page, SERVING)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement.name") == "mode"
        if "logprobs" in seen:
            break
    assert {"mode", "system", "prompt", "temperature", "n", "send", "logprobs"} <= seen
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("Return the sum of a list")
    page.keyboard.press("Control+Enter")
    done(page)
    page.focus(".tokens")
    assert page.evaluate("document.activeElement.className").startswith("t")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#rivals")
    for _ in range(8):
        page.keyboard.press("Shift+Tab")  # and out again


# colour, contrast, names


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1440, 1000), (390, 844)])
def test_axe_finds_nothing(server, load, look, scheme, size):
    page = look(server.url, color_scheme=scheme, viewport={"width": size[0], "height": size[1]}, bypass_csp=True)
    until(page, f"{SERVING} && {STEPS} > 20")
    send(page, "Return the largest of two numbers", n=2, max_tokens=30, temperature=1.2)
    done(page)
    page.click("details.totals summary")
    page.click("details.more summary")
    page.wait_for_timeout(300)
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= size[0], "the page can be scrolled sideways"


def test_axe_would_find_something(server, look):
    page = look(server.url, bypass_csp=True)
    page.evaluate("document.querySelector('label[for=prompt]').remove()")
    page.evaluate("document.querySelector('#send').style.color = '#9bf'")
    assert axe.Axe().run(page).violations_count > 0


# keys, and the end of an engine


def test_a_key_is_asked_for_and_used(look, tmp_path):
    (tmp_path / "keys").write_text("right\n")
    server = Server(tmp_path / "server.log", "--api-key-file", str(tmp_path / "keys"))
    try:
        page = look(server.url)
        until(page, SERVING)  # figures are open until a key is there for them
        send(page, "Return 1", max_tokens=4)
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.type("right")
        page.keyboard.press("Enter")
        until(page, "!document.querySelector('#key-dialog').open")
        send(page, "Return 1", max_tokens=4)
        until(page, "document.querySelectorAll('.t').length > 0")
        done(page)
        assert page.evaluate("document.cookie") == ""
    finally:
        server.stop()


def test_the_end_of_an_engine_and_the_next_one_are_shown(look, tmp_path):
    server = Server(tmp_path / "server.log")
    try:
        page = look(server.url)
        until(page, SERVING)
        states = page.evaluate_handle("""() => {
          const seen = [];
          new MutationObserver(() => seen.push(document.querySelector('#life').dataset.state))
            .observe(document.querySelector('#life'), {attributes: true});
          return seen;
        }""")
        send(page, "a " * 20, max_tokens=1500, temperature=0.05, n=8)  # the model repeats itself to the end
        until(page, "document.querySelectorAll('.t').length > 3")
        server.kill_engine()
        until(page, "document.querySelector('#life').dataset.state === 'restarting'")
        picture(page, "live-page-restarting.png", clip={"x": 0, "y": 0, "width": 1440, "height": 80})
        until(page, "document.querySelector('#problem').textContent !== ''")
        until(page, SERVING)
        assert "restarting" in states.json_value()
        assert "after a restart" in page.text_content("#life-text")
        before = page.evaluate(STEPS)
        page.wait_for_timeout(500)
        send(page, "Return the largest of two numbers", max_tokens=40)
        done(page)
        until(page, f"{STEPS} > {before}")
        server.stop()
        until(page, "document.querySelector('#life').dataset.state === 'unreachable'")
    finally:
        server.stop()
