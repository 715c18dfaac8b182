"""Results that were written: drawn, and compared."""

from __future__ import annotations

import builtins
import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from unit.bench.scripted_server import Script, serving

from quire.bench.compare import NotComparableError, compare, interval, server_differences
from quire.bench.plots import SCALES, batch_shares, panels, share_good
from quire.bench.report import as_json
from quire.bench.report_page import check_report, html_page, write_report
from quire.bench.serve import LoadConfig, run
from quire.bench.timeline import rates, read_look
from quire.server import cli

SETTINGS = {"num_prompts": 40, "random_input_len": 5, "random_output_len": 4, "goodput": {"ttft": 10.0}}


async def measured(**changes: Any) -> dict[str, Any]:
    async with serving(Script()) as url:
        config = LoadConfig(base_url=url, **{"concurrency": 8, **SETTINGS, **changes})
        return dict(json.loads(json.dumps(as_json(await run(config, looks=[])))))


def slower(result: dict[str, Any], factor: float, noise: float = 0.0) -> dict[str, Any]:
    """The same load as if every latency had been `factor` times as long."""
    other = copy.deepcopy(result)
    draw = random.Random(1)
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        other["requests"][name] = [
            None if value is None else value * factor * (1 + noise * (draw.random() - 0.5))
            for value in other["requests"][name]
        ]
    return other


# ---------------------------------------------------------------- compared


async def test_a_difference_is_found_and_only_where_there_is_one() -> None:
    a = await measured()
    (load,) = compare(a, slower(a, 1.3, noise=0.1))
    assert load.pairs == 40
    rows = {row.name: row for row in load.rows}
    row = rows["TTFT median, ms"]
    assert row.low is not None
    assert row.high is not None
    assert row.low < 1.3 < row.high
    assert row.verdict == "higher"
    assert row.difference is not None
    assert row.difference > 0
    (equal,) = compare(a, a)
    assert all(row.ratio == 1 for row in equal.rows)
    assert {row.verdict for row in equal.rows if row.low is not None} == {"no difference seen"}


def test_the_interval_covers_what_it_says() -> None:
    """Samples of two equal distributions: 95 of 100 intervals of the ratio of means hold 1, by the binomial law."""
    import numpy as np

    draw = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        a, b = draw.exponential(1.0, 60), draw.exponential(1.0, 60)
        low, high = interval(a, b, lambda values: float(values.mean()), False, trial)
        held += low <= 1 <= high
    assert 87 <= held < 100  # 95 % of them, and a few less: intervals of small samples are a little short


async def test_pairs_leave_less_to_chance_than_two_samples() -> None:
    a = await measured()
    b = slower(a, 1.1, noise=0.05)
    other = copy.deepcopy(b)
    other["settings"]["seed"] = 9  # as if others had been asked
    (paired,) = compare(a, b)
    (unpaired,) = compare(a, other, across=("seed",))
    assert (paired.pairs, unpaired.pairs) == (40, None)
    width = [
        [row.high - row.low for row in load.rows if row.name == "E2E median, ms" and row.high and row.low]
        for load in (paired, unpaired)
    ]
    assert width[0] < width[1]


async def test_what_is_not_comparable_is_refused_by_name() -> None:
    a = await measured()
    changes: list[tuple[str, tuple[str, ...], Any]] = [
        ("model_id", ("model_id",), "another"),
        ("client_machine", ("client_machine", "cpus"), 96),
        ("host", ("settings", "base_url"), "http://10.0.0.1:8000"),
        ("random_input_len", ("settings", "random_input_len"), 6),
        ("concurrency", ("settings", "concurrency"), 9),
        ("seed", ("settings", "seed"), 1),
        ("extra_body", ("settings", "extra_body"), {"top_k": 5}),
    ]
    for name, (*path, last), value in changes:
        b = copy.deepcopy(a)
        place = b
        for key in path:
            place = place[key]
        place[last] = value
        with pytest.raises(NotComparableError, match=f"{name} is .* in A, .* in B.*--across {name}"):
            compare(a, b)
        assert compare(a, b, across=(name,))
    b = copy.deepcopy(a)
    b["settings"] |= {"base_url": a["settings"]["base_url"].rpartition(":")[0] + ":1", "goodput": {}}
    assert compare(a, b)[0].pairs == 40, "another port, and limits of the report, change nothing"
    assert "good requests/s" in [row.name for row in compare(a, a)[0].rows]
    assert "good requests/s" not in [row.name for row in compare(a, b)[0].rows], "within other limits others are good"
    b["settings"]["goodput"] = {"ttft": 500.0}
    assert "good requests/s" not in [row.name for row in compare(a, b)[0].rows]
    with pytest.raises(NotComparableError, match="--across colour: a result has no such setting"):
        compare(a, a, across=("colour",))
    with pytest.raises(NotComparableError, match="B is no result"):
        compare(a, {"completed": 3})
    with pytest.raises(NotComparableError, match="A has 1 loads, B 2"):
        compare(a, {"benchmark": "serve", "loads": [a, a]})


async def test_failed_requests_are_in_no_pair() -> None:
    a = await measured()
    b = copy.deepcopy(a)
    for column in ("ttft_ms", "tpot_ms", "e2el_ms"):
        b["requests"][column][3] = None
    b["requests"]["error"][3] = "HTTP 503"
    b["failed"] = 1
    (load,) = compare(a, b)
    assert (load.pairs, load.failed) == (39, (0, 1))


def test_what_the_servers_say_is_told_without_what_is_never_twice_the_same() -> None:
    a = {"server": {"quantization": "none", "step_cost": [1.0], "dtype": "bfloat16"}}
    b = {"server": {"quantization": "int8", "step_cost": [2.0], "dtype": "bfloat16"}}
    assert server_differences(a, b) == {"quantization": ("none", "int8")}
    assert server_differences({"server": None}, b)["dtype"] == (None, "bfloat16")


async def test_compare_from_the_command_line(tmp_path: Path) -> None:
    a = await measured()
    for name, result in (("a", a), ("b", slower(a, 1.5)), ("c", a | {"model_id": "other"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    args = ["bench", "compare", str(tmp_path / "a.json")]
    done = CliRunner().invoke(cli.app, [*args, str(tmp_path / "b.json"), "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "higher" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["loads"][0]["rows"]
    assert next(row for row in rows if row["name"] == "E2E median, ms")["ratio"] == pytest.approx(1.5)
    for other in ("c", "absent"):
        refused = CliRunner().invoke(cli.app, [*args, str(tmp_path / f"{other}.json")])
        assert refused.exit_code == 1
        assert refused.output.count("\n") == 1
    assert "absent.json cannot be read" in refused.output


# ---------------------------------------------------------------- drawn


class Page(HTMLParser):
    """Whether every tag is closed, what is loaded from elsewhere, and the words."""

    EMPTY = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.figures: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "svg":
            self.figures.append(values["aria-label"] or "")
        link = values.get("src") or values.get("href") or values.get("xlink:href") or ""
        if tag in ("script", "link", "img", "iframe") or (link and not link.startswith("#")):
            self.outside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


LOOKS = [
    {"seconds": t, "running": t, "waiting": 0.0, "prompt_tokens": 100 * t, "drawn_tokens": 40 * t}
    | {"useful_tokens": 140 * t, "launched_tokens": 200 * t}
    for t in (0.0, 0.5, 1.0, 1.5)
]


async def test_a_page_needs_nothing_else_and_says_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = await measured() | {"model_id": "<script>alert(1)</script> & $x$", "looks": LOOKS}
    path = tmp_path / "report.html"
    write_report(result, path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == []
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    titles = [label.partition(":")[0] for label in page.figures]
    assert titles == [
        "Latency of each request",
        "Gaps between tokens",
        "Goodput over the limits",
        "What the batches were made of",
    ]
    assert html_page(result, panels(result)) == text, "equal results give equal pages"
    write_report(result, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


async def test_several_loads_are_drawn_over_the_load() -> None:
    pytest.importorskip("matplotlib")
    loads = [await measured(request_rate=rate, concurrency=None) for rate in (500.0, 2000.0)]
    shown = panels({"benchmark": "serve", "loads": loads})
    assert [panel.title for panel in shown] == ["Latency over load", "Goodput over load", "Gaps between tokens"]
    assert "at 500 requests/s" in shown[0].says
    Page(html_page({"benchmark": "serve", "loads": loads}, shown))


CAPACITY = {
    "benchmark": "capacity",
    "settings": {"slo": "100"},
    "slo_ms": 100.0,
    "max_delay_s": 2.0,
    "capacity_qps": {"quire": 2.0},
    "trials": {
        "quire": [
            {"rate": 2.0, "tbt_p99": 0.05, "delay_p50": 0.1},
            {"rate": 4.0, "tbt_p99": 0.2, "delay_p50": None},
            {"rate": 9.0, "tbt_p99": None, "delay_p50": None},
        ]
    },
}
TRIAL = {"completed": 5, "refused": 0, "errors": {}, "ttft_p99": 0.1, "refused_p99": None, "share_of_peak": 1.0}
OVERLOAD = {
    "benchmark": "overload",
    "settings": {"url": "x"},
    "trials": [
        {**TRIAL, "factor": factor, "rate": rate, "tokens_per_second": 90.0}
        for factor, rate in ((None, 5.0), (1.0, 5.0), (2.0, 10.0))
    ],
}


@pytest.mark.parametrize("result", [CAPACITY, OVERLOAD])
def test_searches_are_drawn_too(result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    assert len(Page(html_page(result, panels(result))).figures) == 1


@pytest.mark.parametrize("result", [{}, {"benchmark": "serve"}, {"benchmark": "serve", "loads": []}, {"a": [1]}])
def test_other_json_is_no_result(result: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no result of quire bench"):
        panels(result)


async def test_goodput_over_the_limits_agrees_with_the_summary() -> None:
    result = await measured(goodput={"ttft": 0.005, "e2el": 0.02})
    assert share_good(result, 1.0) * 40 / result["duration"] == pytest.approx(result["request_goodput"])
    shares = [share_good(result, scale) for scale in SCALES]
    assert shares == sorted(shares)
    assert share_good(result, 1e9) == 1.0


def test_a_report_that_cannot_be_is_refused_before_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.html or \.png"):
        check_report(tmp_path / "report.txt")
    with pytest.raises(ValueError, match="there is no folder"):
        check_report(tmp_path / "absent" / "report.html")
    monkeypatch.setattr("quire.bench.report_page.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'quire[bench]'")):
        check_report(tmp_path / "report.html")


def test_without_matplotlib_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are described, and results compared, by machines that draw nothing."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> Any:
        assert not name.startswith("matplotlib")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert panels(CAPACITY)[0].says == "quire: 2 requests/s"


# ---------------------------------------------------------------- looked at


def test_looks_know_both_names_and_sum_over_labels() -> None:
    page = """# TYPE quire_num_requests_running gauge
quire_num_requests_running{model_name="a"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 2.0
# TYPE quire_engine_prompt_tokens_total counter
quire_engine_prompt_tokens_total{model_name="a"} 5.0
quire_engine_prompt_tokens_total{model_name="b"} 6.0
"""
    assert read_look(page, 1.5) == {"seconds": 1.5, "running": 3.0, "waiting": 2.0, "prompt_tokens": 11.0}


def test_what_batches_were_made_of() -> None:
    assert rates(LOOKS, "prompt_tokens") == [100.0, 100.0, 100.0]
    assert rates(LOOKS, "steps") == []
    parts = batch_shares(LOOKS)
    assert list(parts) == ["prompts", "drawn", "padding"]
    assert parts["padding"] == [60.0, 60.0, 60.0]


async def test_the_server_is_looked_at_only_for_a_report() -> None:
    async with serving(Script()) as url:
        config = LoadConfig(base_url=url, **SETTINGS)
        assert (await run(config)).looks == []
        looks: list[dict[str, float]] = []
        result = await run(config, looks=looks)
    assert result.looks is looks
    assert looks
