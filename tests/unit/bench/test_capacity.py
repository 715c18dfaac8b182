"""The capacity search against systems whose capacity is known, and its live mode against a scripted server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from quire.bench.capacity import (
    GROWTH,
    SYSTEMS,
    TOLERANCE,
    CapacityConfig,
    Found,
    Result,
    Trial,
    as_json,
    make_scheduler,
    play,
    run,
    search,
    table,
    unit_trace,
)
from quire.bench.capacity_live import FROM_METRICS, FROM_TTFT, LiveServer, grown, judge, quantile, read_queue_times
from quire.bench.client import ServerError
from quire.bench.hardware import PROFILES, read_profile
from quire.bench.metrics import Record
from quire.scheduler.simulate import Simulation
from quire.scheduler.step_time import StepCost
from quire.scheduler.traces import at_rate


@given(st.floats(0.05, 500), st.floats(0.1, 100))
def test_the_search_finds_a_threshold_to_its_tolerance(threshold: float, start: float) -> None:
    trials = search(lambda rate: Trial(rate, rate <= threshold, 1), start)
    capacity = Found("x", trials).capacity
    if threshold < start / 40:
        assert capacity in (0.0, pytest.approx(threshold, rel=1))  # given up, or nearly
    elif threshold < start * 100:
        assert threshold / (1 + TOLERANCE) <= capacity <= threshold
        assert len(trials) <= 20


def test_what_passes_nowhere_has_no_capacity() -> None:
    trials = search(lambda rate: Trial(rate, False, 1), 1.0)
    assert Found("x", trials).capacity == 0
    assert len(trials) <= 11


def test_a_trial_too_short_to_overload_anything_is_told() -> None:
    found = Found("x", search(lambda rate: Trial(rate, True, 10), 1.0, most=5.0))
    assert 5 / GROWTH < found.capacity <= 5
    assert not found.bounded
    result = Result(small(num_requests=10), 0.1, [found], "first step")
    assert as_json(result)["bounded"] == {"x": False}
    console = Console(width=160, file=StringIO())
    console.print(table(result))
    assert isinstance(console.file, StringIO)
    assert "--num-requests" in console.file.getvalue()
    assert Found("x", search(lambda rate: Trial(rate, rate < 3, 10), 1.0, most=5.0)).bounded


# ---------------------------------------------------------------- closed forms


def profile(path: Path, cost: StepCost, **changed: int) -> str:
    limits = {"num_blocks": 5000, "block_size": 16, "max_num_seqs": 4, "max_model_len": 8192} | changed
    path.write_text(json.dumps({"cost": cost._asdict()} | limits))
    return str(path)


def trace(path: Path, rows: list[tuple[float, int, int]]) -> str:
    lines = [json.dumps({"time": at, "prompt_len": prompt, "output_len": output}) for at, prompt, output in rows]
    path.write_text("\n".join(lines))
    return str(path)


def test_capacity_by_delay_is_the_closed_form(tmp_path: Path) -> None:
    """D/D/1: request i waits i (1 - 1/r) seconds, so that of 101 the median waits 2 at r = 1 / (1 - 2/50)."""
    config = CapacityConfig(
        simulate=True,
        profile=profile(tmp_path / "p.json", StepCost(16, 1.0, 0.0, 0.0, 0.0), max_num_seqs=1),
        trace=trace(tmp_path / "t.jsonl", [(5.0 + i, 4, 1) for i in range(101)]),
        slo="1500",
        systems=("decode_first", "quire"),
    )
    for capacity in run(config).capacities.values():
        exact = 1 / (1 - 2 / 50)
        assert exact / (1 + TOLERANCE) <= capacity <= exact


def test_capacity_by_tbt_is_the_closed_form(tmp_path: Path) -> None:
    """A stream of 0.01 s steps, interrupted at rate r for 1.01 s: one gap in a hundred is long at r = 1 / 2.01."""
    rows = [(0.0, 1, 4001), *((1.0 + i, 1000, 1) for i in range(400))]
    config = CapacityConfig(
        simulate=True,
        profile=profile(tmp_path / "p.json", StepCost(16, 0.01, 0.0, 0.0, 2e-6)),
        trace=trace(tmp_path / "t.jsonl", rows),
        slo="500",
        start_rate=0.3,
        systems=("prefill_first",),
    )
    (capacity,) = run(config).capacities.values()
    exact = 1 / 2.01
    assert exact / (1 + TOLERANCE) ** 2 <= capacity <= exact * (1 + TOLERANCE)


# ---------------------------------------------------------------- simulated


SHORT_CONTEXT = {"num_blocks": 1500, "max_num_seqs": 32, "max_model_len": 1024}  # scales the lengths down: fast


@pytest.fixture
def machine(tmp_path: Path) -> str:
    return profile(tmp_path / "machine.json", read_profile("a100-7b").cost, **SHORT_CONTEXT)


def small(machine: str = "a100-7b", **changed: Any) -> CapacityConfig:
    return CapacityConfig(**{"simulate": True, "profile": machine, "num_requests": 60} | changed)


def test_a_result_is_a_function_of_the_seed(machine: str) -> None:
    one, other = run(small(machine)), run(small(machine, jobs=2))
    assert repr(one.found) == repr(other.found)  # not equality: NaN is not equal to itself
    assert set(one.capacities) == set(SYSTEMS)
    assert run(small(machine, seed=1, systems=("quire",))).capacities["quire"] != one.capacities["quire"]


def test_ours_serves_more_than_prefill_first_under_a_strict_objective(machine: str) -> None:
    capacities = run(small(machine, num_requests=200, slo="60", systems=("prefill_first", "quire"))).capacities
    assert capacities["quire"] > 1.5 * capacities["prefill_first"]


def test_requests_are_scaled_in_time_only() -> None:
    config = small(num_requests=2000)
    unit = unit_trace(config, 32768)
    assert unit[-1].time == pytest.approx(2000, rel=0.1)
    assert max(arrival.prompt_len + arrival.output_len for arrival in unit) <= 8192
    fast = at_rate(unit, 10.0)
    assert [a[1:] for a in fast] == [a[1:] for a in unit]


def test_a_trial_that_cannot_pass_is_given_up() -> None:
    config = small(num_requests=400)
    machine = read_profile("a100-7b")
    unit = unit_trace(config, machine.max_model_len)
    simulation = Simulation(make_scheduler("static_512", machine, 0.1), at_rate(unit, 50.0), machine.cost)
    trial = play(simulation, 50.0, 0.1)
    assert not trial.passed
    assert math.isnan(trial.delay_p50)
    assert simulation.scheduler.has_work


def test_noisy_steps_leave_a_capacity(machine: str) -> None:
    quiet, noisy = (run(small(machine, noise=noise, systems=("quire",))).capacities["quire"] for noise in (0.0, 0.05))
    assert 0.5 * quiet < noisy < 2 * quiet


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"simulate": False}, "--simulate"),
        ({"url": "http://localhost:1"}, "--simulate"),
        ({"slo": "tight"}, "--slo tight"),
        ({"slo": "-3"}, "--slo -3"),
        ({"slo": "nan"}, "--slo nan"),
        ({"systems": ("vllm",)}, "--systems vllm"),
        ({"num_requests": 1}, "--num-requests 1"),
        ({"start_rate": 0.0}, "--start-rate 0"),
        ({"max_trial_seconds": -1.0}, "--max-trial-seconds -1"),
        ({"noise": -0.1}, "--noise -0.1"),
        ({"simulate": False, "url": "http://localhost:1"}, "milliseconds"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        small(**changed)


def test_a_trace_too_long_for_the_machine_is_refused(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", [(0.0, 10, 10), (1.0, 40_000, 10)])
    with pytest.raises(ValueError, match=r"40000 \+ 10 tokens, the context 32768"):
        run(small(trace=path))
    with pytest.raises(ValueError, match="different times"):
        run(small(trace=trace(tmp_path / "t.jsonl", [(1.0, 10, 10), (1.0, 10, 10)])))


def test_reports_show_every_system_and_have_no_nan(machine: str) -> None:
    result = run(small(machine, slo="3", systems=("static_512", "quire")))  # milliseconds: nothing can
    assert result.capacities == {"static_512": 0, "quire": 0}
    result = replace(result, found=[*result.found, *run(small(machine, systems=("decode_first",))).found])
    text = json.dumps(as_json(result), allow_nan=False)
    assert set(json.loads(text)["capacity_qps"]) == {"static_512", "quire", "decode_first"}
    console = Console(width=160, file=StringIO())
    console.print(table(result))
    assert isinstance(console.file, StringIO)
    assert "decode_first" in console.file.getvalue()


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda path: path.stem)
def test_every_number_of_a_profile_has_a_source(path: Path) -> None:
    data = json.loads(path.read_text())
    numbers = {*data["cost"], *(name for name, value in data.items() if isinstance(value, int))}
    assert numbers == set(data["sources"])
    read_profile(path.stem)


def test_the_published_decode_step_and_tile_effect_are_near() -> None:
    """Sarathi-Serve: the strict objective of 0.1 s is five decode steps; 257 tokens cost a third more than 256."""
    machine = read_profile("a100-7b")
    assert 5 * machine.reference_seconds == pytest.approx(0.1, rel=0.3)
    cost = machine.cost
    assert (cost.base + 3 * cost.per_tile) / (cost.base + 2 * cost.per_tile) == pytest.approx(1.32, abs=0.1)
    flops = 1024 * 13.96e9 / (cost.base + 8 * cost.per_tile)
    assert 0.5 < flops / 312e12 < 0.65


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cost": None}, "needs"),
        ({"num_blocks": 1}, "num_blocks is 1"),
        ({"max_model_len": "long"}, "max_model_len is 'long'"),
        ({"cost": {"tile": 0, "base": 1, "per_tile": 1, "per_context": 1, "per_pair": 1}}, "tile is 0"),
        ({"cost": {"tile": 16, "base": 1, "per_tile": -1, "per_context": 1, "per_pair": 1}}, "per_tile is -1"),
        ({"cost": {"tile": 16, "base": 0, "per_tile": 0, "per_context": 1, "per_pair": 1}}, "take no time"),
        ({"cost": {"tile": 16}}, "base is None"),
    ],
)
def test_a_broken_profile_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "p.json"
    profile(path, StepCost(16, 1.0, 1.0, 0.0, 0.0))
    read_profile(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=named):
        read_profile(str(path))
    with pytest.raises(ValueError, match="neither a file nor one of a100-7b"):
        read_profile("b200")


# ---------------------------------------------------------------- live


def exposition(counts: list[int], name: str = "quire_request_queue_time_seconds") -> str:
    bounds = ["0.1", "1.0", "+Inf"]
    lines = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, counts, strict=True)]
    return "\n".join([f"# TYPE {name} histogram", *lines, f"{name}_sum 1", f"{name}_count {counts[-1]}", ""])


def test_quantiles_of_a_histograms_growth() -> None:
    before, after = (read_queue_times(exposition(counts)) for counts in ([10, 10, 10], [14, 18, 20]))
    assert before is not None
    assert after is not None
    growth = grown(before, after)
    assert growth == {0.1: 4, 1.0: 8, math.inf: 10}
    assert quantile(growth, 20) == pytest.approx(0.05)
    assert quantile(growth, 60) == pytest.approx(0.55)
    assert quantile(growth, 99) == math.inf
    assert math.isnan(quantile(grown(after, after), 50))
    assert read_queue_times("# TYPE other counter\nother_total 3\n") is None


def record(gap: float, ttft: float = 0.1, error: str | None = None) -> Record:
    times = [ttft + gap * i for i in range(5)]
    return Record(chunk_times=times, last=times[-1], output_tokens=5, error=error)


def test_a_live_trial_is_judged_by_gaps_delay_and_failures() -> None:
    def passed(records: list[Record], queued: dict[float, float] | None = None) -> bool:
        return judge(records, 1.0, 0.2, queued).passed

    assert passed([record(0.1)])
    assert not passed([record(0.3)])
    assert not passed([record(0.1), record(0.1, error="timeout")])
    assert not passed([record(0.1, ttft=2.5)])
    assert passed([record(0.1, ttft=2.5)], {1.0: 1.0, math.inf: 1.0})
    assert not passed([record(0.1)], {2.0: 0.0, 4.0: 1.0, math.inf: 1.0})


class Slots:
    """A server with two slots, each of which takes `pause` seconds a token; it knows how long requests queued."""

    def __init__(self, pause: float, *, tells: bool) -> None:
        self.pause = pause
        self.tells = tells
        self.waits: list[float] = []
        self.prompts: list[tuple[int, ...]] = []
        self.slots = asyncio.Semaphore(2)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "max_model_len": 64}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        words = (await request.json())["prompt"].split()
        return web.json_response({"tokens": list(range(10, 10 + len(words))), "count": len(words)})

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.tells:
            return web.Response(text="# TYPE other counter\nother_total 3\n")
        counts = [sum(wait <= bound for wait in self.waits) for bound in (0.1, 1.0, math.inf)]
        return web.Response(text=exposition(counts))

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.prompts.append(tuple(body["prompt"]))
        loop = asyncio.get_running_loop()
        came = loop.time()
        async with self.slots:
            self.waits.append(loop.time() - came)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            count = body["max_tokens"]
            for number in range(1, count + 1):
                await asyncio.sleep(self.pause)
                end = "length" if number == count else None
                await self.send(response, {"choices": [{"index": 0, "text": "x", "finish_reason": end}]})
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            await self.send(response, {"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
        return response

    async def send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


@asynccontextmanager
async def serving(slots: Slots) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/v1/models", slots.models)
    app.router.add_post("/tokenize", slots.tokenize)
    app.router.add_get("/metrics", slots.metrics)
    app.router.add_post("/v1/completions", slots.generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def live(url: str, **changed: Any) -> CapacityConfig:
    return CapacityConfig(url=url, slo="500", num_requests=12, max_trial_seconds=30.0, **changed)


@pytest.mark.parametrize(("tells", "known"), [(True, FROM_METRICS), (False, FROM_TTFT)])
async def test_a_live_trial_has_its_requests_and_tells_where_delays_are_from(tells: bool, known: str) -> None:
    slots = Slots(0.001, tells=tells)
    async with serving(slots) as url:
        server = LiveServer(live(url))
        first = await asyncio.to_thread(server.trial, 50.0)
        asked = list(slots.prompts)
        second = await asyncio.to_thread(server.trial, 50.0)
    assert first.passed
    assert second.passed
    assert first.requests == second.requests == 12
    assert server.delay_from == known
    again = slots.prompts[len(asked) :]
    assert sorted(map(len, asked)) == sorted(map(len, again))  # the same lengths
    assert not set(asked) & set(again)  # of other tokens, which no prefix cache knows


async def test_a_live_trial_ends_its_arrivals_in_time() -> None:
    slots = Slots(0.001, tells=False)
    async with serving(slots) as url:
        config = CapacityConfig(url=url, slo="500", num_requests=1000, max_trial_seconds=0.5)
        trial = await asyncio.to_thread(LiveServer(config).trial, 20.0)
    assert 1 <= trial.requests <= 30


async def test_a_live_trial_plays_the_arrivals_of_a_file(tmp_path: Path) -> None:
    """Two bursts of five, one request a second on average: at 20 a second the second one comes after 0.45 s."""
    rows = [{"time": at, "prompt_len": 4 + i, "output_len": 1} for at in (7.0, 107.0) for i in range(5)]
    trace = tmp_path / "bursts.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with serving(Slots(0.001, tells=False)) as url, aiohttp.ClientSession() as session:
        asks, times = await LiveServer(live(url, trace=str(trace)))._load(session, "tiny", 64, 20.0)
    assert times == pytest.approx([0.0] * 5 + [0.45] * 5)
    assert [len(ask.token_ids or ()) for ask in asks[:-1]] == [4, 5, 6, 7, 8] * 2


async def test_a_live_search_yields_one_server() -> None:
    async with serving(Slots(0.0005, tells=True)) as url:
        seen: list[str] = []
        config = live(url, start_rate=64.0)
        result = await asyncio.to_thread(run, config, lambda system, trial: seen.append(system))
    assert set(result.capacities) == {"server"}
    assert set(seen) == {"server"}
    assert result.capacities["server"] > 0
    assert not result.found[0].bounded  # twelve requests do not overload it
    json.dumps(as_json(result), allow_nan=False)


async def test_no_server_is_told_with_a_remedy() -> None:
    with pytest.raises(ServerError, match="quire serve"):
        await asyncio.to_thread(run, live("http://127.0.0.1:9"))
