"""What Prometheus scrapes: names, and sums that equal what callers were told."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.outputs import TextOptions
from quire.scheduler.params import SamplingParams
from quire.server.generate import GenerateRequest, Generation, Prompt
from quire.server.keys import EVERYBODY

GATEWAY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info")


async def scrape(http) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = await http.get("/metrics")
    assert response.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def total(samples, name, **labels) -> float:
    return sum(v for (n, have), v in samples.items() if n == name and labels.items() <= dict(have).items())


async def test_sums_equal_the_usages_that_were_told(http, fake, events):
    rng = random.Random(3)
    fake.answer = lambda request, index: [97] * rng.randint(1, 30)
    fake.num_cached = 1
    told = {"prompt_tokens": 0, "completion_tokens": 0, "cached": 0}

    async def one(i: int) -> None:
        body = {"prompt": ["x" * rng.randint(1, 9)] * rng.randint(1, 2), "n": rng.randint(1, 2), "max_tokens": 20}
        body["stop"] = ["aaaaa"] if i % 3 == 0 else None
        if i % 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            usage = events((await http.post("/v1/completions", json=body)).text)[-1]["usage"]
        else:
            usage = (await http.post("/v1/completions", json=body)).json()["usage"]
        told["prompt_tokens"] += usage["prompt_tokens"]
        told["completion_tokens"] += usage["completion_tokens"]
        told["cached"] += usage["prompt_tokens_details"]["cached_tokens"]

    await asyncio.gather(*(one(i) for i in range(30)))
    samples = await scrape(http)
    assert total(samples, "quire_prompt_tokens_total") == told["prompt_tokens"]
    assert total(samples, "quire_generation_tokens_total") == told["completion_tokens"]
    assert total(samples, "quire_prompt_tokens_cached_total") == told["cached"]
    assert total(samples, "quire_request_generation_tokens_sum") == told["completion_tokens"]


async def test_the_aborted_count_with_the_last_usage_they_could_have_been_told(http, fake):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.002
    state = http.app.state.quire
    generation = Generation(
        GenerateRequest(
            prompts=[Prompt([1, 2, 3], SamplingParams(max_tokens=400))],
            text_options=TextOptions(),
            arrival=time.monotonic(),
        ),
        name=("", "x"),
        registry=state.registry,
        dispatcher=state.dispatcher,
        tokenizer=state.text.tokenizer,
        metrics=state.metrics,
        experience=state.experience,
        config=state.config,
        slot=state.admission.admit(1),
        lease=state.door.quotas.lease(EVERYBODY, 403),
    )
    with generation:
        generation.start()
        async with aclosing(generation.deltas()) as batches:
            async for _ in batches:
                if generation.usage.completion_tokens > 5:
                    break
    samples = await scrape(http)
    assert total(samples, "quire_prompt_tokens_total") == 3
    assert total(samples, "quire_generation_tokens_total") == generation.usage.completion_tokens > 5
    assert total(samples, "quire_requests_aborted_total", stage="running") == 1
    assert total(samples, "quire_request_success_total") == 0


async def test_latencies_and_ends_are_counted_per_sample(http, fake):
    await http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 5})
    await http.post("/v1/completions", json={"prompt": "a"})
    samples = await scrape(http)
    assert total(samples, "quire_time_to_first_token_seconds_count") == 5
    assert total(samples, "quire_e2e_request_latency_seconds_count") == 5
    assert total(samples, "quire_request_queue_time_seconds_count") == 5
    assert total(samples, "quire_inter_token_latency_seconds_count") == 4 * 4 + 13
    assert total(samples, "quire_request_success_total", finished_reason="length") == 4
    assert total(samples, "quire_request_success_total", finished_reason="stop") == 1
    assert total(samples, "quire_engine_steps_total") == total(samples, "quire_iteration_tokens_total_count") > 0


async def test_what_alerts_are_about_is_there_before_it_happens(http):
    """A counter that appears with its first event hides that event from every rate."""
    samples = await scrape(http)
    for name, labels in (
        ("quire_requests_aborted_total", {"stage": "waiting"}),
        ("quire_requests_expired_total", {"reason": "deadline"}),
        ("quire_admission_rejections_total", {"reason": "server_overloaded"}),
        ("quire_request_errors_total", {"code": "500", "reason": "engine_error"}),
    ):
        found = [
            value for (have, own), value in samples.items() if have == name and labels.items() <= dict(own).items()
        ]
        assert found == [0.0], name


async def test_errors_are_counted_by_code_and_reason(http, fake):
    await http.post("/v1/completions", json={"prompt": "x", "n": 0})
    await http.post("/v1/completions", json={"prompt": "x" * 600})
    await http.post("/v1/completions", json={"prompt": "x", "model": "nope"})
    await http.get("/nothing")
    fake.fail_request = "planned"
    await http.post("/v1/completions", json={"prompt": "x", "stream": True})
    samples = await scrape(http)
    for code, reason in (
        ("400", "invalid_value"),
        ("400", "context_length_exceeded"),
        ("404", "model_not_found"),
        ("404", "not_found"),
        ("500", "engine_error"),
    ):
        assert total(samples, "quire_request_errors_total", code=code, reason=reason) == 1
    assert total(samples, "quire_http_requests_total", handler="/v1/completions", status="400") == 2
    assert total(samples, "quire_http_requests_total", handler="other", status="404") == 1


async def test_label_values_come_from_fixed_sets(http):
    """Whatever strangers send, the number of series stays the same."""

    async def strange(i: int) -> None:
        await http.get(f"/made-up-{i}")
        await http.request(f"METHOD{i}", "/v1/completions")
        await http.get(f"/v1/models/made-up-{i}", headers={"X-Request-Id": f"id-{i}"})
        await scrape(http)

    await strange(0)
    before = await scrape(http)
    for i in range(20):
        await strange(i)
    after = await scrape(http)
    assert set(after) == set(before)
    assert "made-up" not in str(after)
    assert "METHOD" not in str(after)


@pytest.mark.parametrize("aliases", [True, False])
async def test_gateway_gauges_are_there_before_any_request_and_under_both_names(serve, aliases):
    async with serve(vllm_metrics=aliases) as http:
        samples = await scrape(http)
        names = {name for name, _ in samples}
        assert {f"quire_{name}" for name in GATEWAY} <= names
        assert {f"vllm:{name}" for name in GATEWAY} <= names or not aliases
        assert any(name.startswith("vllm:") for name in names) == aliases
        assert total(samples, "quire_cache_config_info", block_size="16", num_gpu_blocks="100") == 1
        assert total(samples, "quire_num_requests_running") == 0
        if aliases:
            await http.post("/v1/completions", json={"prompt": "x"})
            samples = await scrape(http)
            for name in ("generation_tokens_total", "time_to_first_token_seconds_count", "request_success_total"):
                assert total(samples, f"vllm:{name}", engine="0") == total(samples, f"quire_{name}") > 0
