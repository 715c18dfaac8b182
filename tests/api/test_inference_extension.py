"""What the endpoint picker of the Gateway API inference extension reads from a model server: names, types and meaning.

Source: its model server protocol (docs/proposals/003-model-server-protocol of
kubernetes-sigs/gateway-api-inference-extension). The picker looks for vLLM's names unless it is told others, so both
are there with --vllm-metrics, which the chart sets where it makes a pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from api.conftest import until_ready
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.config import EngineConfig
from quire.engine.inproc import InprocClient
from quire.server.app import create_app
from quire.server.config import ServerConfig

QUEUED, RUNNING, USAGE, SHAPE = (
    "num_requests_waiting",
    "num_requests_running",
    "kv_cache_usage_perc",
    "cache_config_info",
)
PREFIXES = ("quire_", "vllm:")
BLOCKS, BLOCK_SIZE = 64, 16


@pytest.fixture
async def http(tiny_model: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A real engine with room for one sample at a time."""
    engine = EngineConfig(
        model=str(tiny_model), dtype="float32", threads=1, num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=1
    )
    app = create_app(InprocClient(engine), ServerConfig(vllm_metrics=True))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            await until_ready(client)
            yield client


async def families(http: httpx.AsyncClient) -> dict[str, Metric]:
    text = (await http.get("/metrics")).text
    return {family.name: family for family in text_string_to_metric_families(text)}


async def values(http: httpx.AsyncClient) -> dict[str, float]:
    """Of the three gauges, which are the same under both prefixes and one series each."""
    found = await families(http)
    told = [{name: found[prefix + name].samples for name in (QUEUED, RUNNING, USAGE)} for prefix in PREFIXES]
    ours, aliased = ({name: [sample.value for sample in samples] for name, samples in one.items()} for one in told)
    assert ours == aliased
    return {name: value for name, (value,) in ours.items()}


async def test_the_gauges_are_there_at_zero_load(http: httpx.AsyncClient) -> None:
    assert await values(http) == {QUEUED: 0, RUNNING: 0, USAGE: 0}
    found = await families(http)
    for prefix in PREFIXES:
        assert all(found[prefix + name].type == "gauge" for name in (QUEUED, RUNNING, USAGE, SHAPE))


async def test_they_mean_what_the_picker_takes_them_for(http: httpx.AsyncClient) -> None:
    """Three requests, room for one: one runs, two are queued, and the cache is used by the one that runs."""
    body = {"prompt": "x" * 60, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    requests = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(3)]
    seen: list[dict[str, float]] = []
    while not all(request.done() for request in requests):
        seen.append(await values(http))
        await asyncio.sleep(0.005)
    assert [request.result().status_code for request in requests] == [200] * 3
    assert {(now[RUNNING], now[QUEUED]) for now in seen} >= {(1, 2), (1, 1), (1, 0)}
    busy = [now[USAGE] for now in seen if now[RUNNING] == 1]
    tokens = 60 + 400
    # Of one sample alone: never more than its tokens fill (a block may be begun ahead), and nearly that in the end.
    # Block 0 holds nothing.
    assert 0 < min(busy) <= max(busy) <= (tokens // BLOCK_SIZE + 2) / (BLOCKS - 1)
    assert max(busy) > 0.8 * tokens / BLOCK_SIZE / BLOCKS
    while await values(http) != {QUEUED: 0, RUNNING: 0, USAGE: 0}:
        await asyncio.sleep(0.01)


async def test_the_shape_of_the_cache_is_in_labels(http: httpx.AsyncClient) -> None:
    found = await families(http)
    for prefix in PREFIXES:
        (sample,) = found[prefix + SHAPE].samples
        assert sample.value == 1
        assert int(sample.labels["block_size"]) == BLOCK_SIZE
        assert 0 < int(sample.labels["num_gpu_blocks"]) <= BLOCKS


async def test_no_adapters_are_told_of_as_there_are_none(http: httpx.AsyncClient) -> None:
    """The metric of adapters is for servers that have some: a picker would send requests for them here."""
    assert not [name for name in await families(http) if "lora" in name]
    answer = await http.post("/v1/completions", json={"prompt": "x", "model": "an-adapter"})
    assert answer.status_code == 404
