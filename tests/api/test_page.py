"""The live page: its files, who may see what, and a feed that is true, bounded, and costs nothing unwatched."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from quire.engine.messages import Holding, Holdings, StepBatch
from quire.server import feed
from quire.server.keys import digest_of
from quire.server.routes_page import FILES, FOLDER

BATCH = StepBatch(3, 1, 40, 2, 64, 6, 4, 0.0105)
HOLDINGS = Holdings(2, 5, 3, [Holding("alice", 4, 1, 6), Holding("bob", 0, 2, 6)])
FIGURES = {
    "running": 3,
    "waiting": 4,
    "kv_blocks_used": 10,
    "kv_blocks_cached": 20,
    "kv_blocks_total": 99,
    "step_tokens": 113,
    "launched_tokens": 128,
    "predicted_seconds": 0.01,
    "schedule_seconds": 0.001,
    "draft_seconds": 0.002,
    "drafted_by_position": [9, 5],
    "accepted_by_position": [7, 2],
}
STREAM = {"Accept": "text/event-stream"}


async def frames_of(watcher, count):
    found = []
    async with asyncio.timeout(30):
        async for frame in watcher.frames():
            if frame.startswith(b"data: "):
                found.append(json.loads(frame.removeprefix(b"data: ")))
            if len(found) == count:
                return found


# files


async def test_the_page_and_all_that_it_names_is_served(http):
    html = await http.get("/")
    assert html.status_code == 200
    assert html.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:href|src)="/page/([^"]+)"', html.text))
    for name, (content, _) in FILES.items():
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([^"]+)"', content.decode()))
    assert named | {"index.html"} == set(FILES) == {path.name for path in FOLDER.iterdir()}
    for name in FILES:
        response = await http.get(f"/page/{name}")
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_nothing_comes_from_elsewhere_and_nothing_is_inline(http):
    policy = (await http.get("/")).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    for name, (content, _) in FILES.items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[a-z]", text.replace("// ", "")), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
        assert not re.search(r"<[^>]+\s(on[a-z]+|style)=", text), name
        assert not re.search(r"<script(?![^>]*src=)|<style", text), name


@pytest.mark.parametrize(
    "name", ["..%2fapp.py", "../app.py", "style.css%00", "STYLE.CSS", ".", "index", "%2e%2e/keys.py"]
)
async def test_no_other_file_can_be_had(http, name):
    assert (await http.get(f"/page/{name}")).status_code == 404


async def test_one_flag_takes_it_all_away(serve):
    async with serve(live_page=False) as http:
        for path in ("/", "/page/style.css", "/steps"):
            response = await http.get(path)
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "not_found"
        assert (await http.get("/metrics")).status_code == 200


# the feed


async def test_a_frame_tells_what_the_engine_told(http, fake, eventually):
    fake.figures, fake.told = FIGURES, {"batch": BATCH, "holdings": HOLDINGS}
    the_feed = http.app.state.feed
    watcher = the_feed.watch(sees_names=True)
    await eventually(lambda: len(fake.watches) > 0)
    fake.report()
    fake.report()
    stats = http.app.state.quire.metrics
    await eventually(lambda: stats.stats.running == 3)
    got = next(frame for frame in await frames_of(watcher, 3) if frame["steps"])
    assert got["steps"][0] == [3, 1, 40, 2, 64, 6, 4, 15, 10.5, 10.0, 1.0, 2.0]
    assert got["now"] == {name: FIGURES.get(name, 0) for name in feed.NOW}
    assert got["totals"]["drafted_by_position"] == [9, 5]
    assert got["blocks"] == {"shared": 2, "whole": 5, "open": 3, "cached": 20, "empty": 69}
    assert sum(got["blocks"].values()) == 99
    assert got["tenants"] == [
        {"tenant": "alice", "waiting": 4, "running": 1, "blocks": 6},
        {"tenant": "bob", "waiting": 0, "running": 2, "blocks": 6},
    ]
    assert got["life"] == {"state": "serving", "restarts": 0}
    watcher.close()


async def test_totals_and_percentiles_are_those_of_the_metrics(http, fake):
    await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 9})
    first = (await http.get("/steps")).json()
    for _ in range(3):
        await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 9})
    frame = (await http.get("/steps")).json()
    text = (await http.get("/metrics")).text
    for name, metric in (("steps_total", "engine_steps"), ("generated_tokens_total", "engine_generated_tokens")):
        assert f'quire_{metric}_total{{model_name="tiny"}} {float(frame["totals"][name])}' in text
    assert sum(frame["latency"]["ttft"]["counts"]) == 3  # since the first look
    assert sum(frame["latency"]["itl"]["counts"]) == 3 * 8
    assert 0 < frame["latency"]["itl"]["p50"] <= frame["latency"]["itl"]["p99"]
    assert first["latency"]["ttft"]["p50"] is None


async def test_nothing_is_asked_kept_or_run_while_nobody_watches(http, fake, eventually):
    fake.figures, fake.told = FIGURES, {"batch": BATCH, "holdings": HOLDINGS}
    the_feed = http.app.state.feed
    await http.post("/v1/completions", json={"prompt": "x"})
    await asyncio.sleep(3 * feed.FRAME_SECONDS)
    assert fake.watches == []
    assert the_feed._work is None
    watcher = the_feed.watch(sees_names=True)
    await eventually(lambda: len(fake.watches) > 0)
    watcher.close()
    asked = len(fake.watches)
    await asyncio.sleep(3 * feed.FRAME_SECONDS)
    assert len(fake.watches) == asked
    assert the_feed._work is None
    assert not the_feed._steps


async def test_a_watcher_that_does_not_read_misses_frames_and_is_told(http, fake, eventually):
    the_feed = http.app.state.feed
    slow, quick = the_feed.watch(sees_names=True), the_feed.watch(sees_names=True)
    reading = asyncio.ensure_future(frames_of(quick, feed.FRAMES_BEHIND + 3))
    while not reading.done():
        fake.figures["requests_total"] = fake.figures.get("requests_total", 0) + 1
        fake.report()
        await asyncio.sleep(0.02)
    assert len(slow._frames) == feed.FRAMES_BEHIND
    first = await anext(slow.frames())
    assert re.fullmatch(rb": missed [1-9]\d*\n\n", first)
    for watcher in (slow, quick):
        watcher.close()


async def test_a_flood_of_steps_is_bounded(http, fake):
    the_feed = http.app.state.feed
    watcher = the_feed.watch(sees_names=True)
    fake.told = {"batch": BATCH}
    for _ in range(3 * feed.STEPS_PER_FRAME):
        fake.report()
    await asyncio.sleep(0.3)
    assert all(len(frame["steps"]) <= feed.STEPS_PER_FRAME for frame in await frames_of(watcher, 2))
    watcher.close()


async def test_only_so_many_watch_and_a_place_comes_back(http):
    the_feed = http.app.state.feed
    watchers = [the_feed.watch(sees_names=True) for _ in range(feed.MAX_WATCHERS)]
    refused = await http.get("/steps", headers=STREAM)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_watchers")
    assert "retry-after" in refused.headers
    watchers.pop().close()
    watchers.append(the_feed.watch(sees_names=True))
    for watcher in watchers:
        watcher.close()


async def test_the_end_of_the_server_ends_the_stream(http):
    http.app.state.feed.close()
    response = await http.get("/steps", headers=STREAM)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert not http.app.state.feed._watchers


async def test_an_engine_that_dies_is_told(http, fake, eventually):
    watcher = http.app.state.feed.watch(sees_names=True)
    assert (await frames_of(watcher, 1))[0]["life"]["state"] == "serving"
    fake.die()
    states = [frame["life"]["state"] for frame in await frames_of(watcher, 3)]
    assert states[-1] == "dead"
    watcher.close()


# who may see what


def keys_file(path: Path, **scopes: list[str]) -> Path:
    entries = [{"name": name, "sha256": digest_of(name).hex(), "scopes": listed} for name, listed in scopes.items()]
    path.write_text(json.dumps(entries))
    return path


async def test_names_of_tenants_are_for_who_may_see_them(serve, fake, tmp_path, eventually):
    fake.told = {"holdings": HOLDINGS}
    closed = keys_file(tmp_path / "closed.json", alice=["infer"], prometheus=["metrics"])
    async with serve(api_keys_file=closed) as http:
        http.app.state.feed._tenants = HOLDINGS.tenants
        assert (await http.get("/steps")).status_code == 401
        assert (await http.get("/steps", headers={"Authorization": "Bearer alice"})).status_code == 403
        seen = (await http.get("/steps", headers={"Authorization": "Bearer prometheus"})).json()
        assert [tenant["tenant"] for tenant in seen["tenants"]] == ["alice", "bob"]
    half = keys_file(tmp_path / "open.json", alice=["infer"])
    async with serve(api_keys_file=half) as http:  # metrics are open to all here; names are not
        http.app.state.feed._tenants = HOLDINGS.tenants
        response = await http.get("/steps")
        assert [tenant["tenant"] for tenant in response.json()["tenants"]] == ["tenant 1", "tenant 2"]
        assert "alice" not in response.text


async def test_no_prompt_answer_or_id_is_in_a_frame(http, fake, eventually):
    watcher = http.app.state.feed.watch(sees_names=False)
    fake.told = {"batch": BATCH, "holdings": HOLDINGS}
    body = {"prompt": "canary-prompt", "request_id": "canary-id", "user": "canary-user"}
    answer = (await http.post("/v1/completions", json=body)).json()
    frames = json.dumps(await frames_of(watcher, 2))
    for secret in ("canary", answer["choices"][0]["text"], answer["id"], fake.added[0].request_id, "alice"):
        assert secret not in frames
    watcher.close()


def test_many_tenants_are_a_few_lines():
    tenants = [Holding(f"t{i}", i, 0, 1) for i in range(100)]
    told = feed.told_tenants(tenants, sees_names=True)
    assert len(told) == feed.MAX_TENANTS + 1
    assert told[0]["tenant"] == "t99"
    assert told[-1]["tenant"] == f"{100 - feed.MAX_TENANTS} others"
    assert sum(line["waiting"] for line in told) == sum(range(100))
