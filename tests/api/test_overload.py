"""A full house: who is refused, with which words, and when to come back."""

from __future__ import annotations

import asyncio

import pytest

# tile 16, base 10 ms, 16 ms a tile: a token of a prompt costs a millisecond, as does a drawn one beside 16 others
STEP_COST = [16, 0.01, 0.016, 0.0, 0.0]


def completion(http, **body):
    return asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x", **body}))


def check_refusal(response, status, code, *says):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    for part in says:
        assert part in error["message"]
    assert response.headers["x-should-retry"] == "true"
    return int(response.headers["retry-after"])


@pytest.fixture
def busy(fake):
    fake.gate.clear()
    fake.facts = {"step_cost": STEP_COST}
    return fake


async def test_a_predicted_wait_beyond_the_bound_is_refused_with_the_time_that_it_takes(busy, serve, eventually):
    busy.figures = {"queue_seconds": 100.0}
    async with serve(max_queue_seconds=40) as http:
        busy.report()
        admission = http.app.state.quire.admission
        await eventually(lambda: admission.predicted_wait() == 100)
        for _ in range(5):
            retry = check_refusal(await completion(http), 503, "server_overloaded", "about 100.0 s", "longer than 40 s")
            assert 60 <= retry <= 67
        busy.figures = {"queue_seconds": 39.0}
        busy.report()
        await eventually(lambda: admission.predicted_wait() == 39)
        busy.gate.set()
        assert (await completion(http)).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert 'quire_admission_rejections_total{model_name="tiny",reason="server_overloaded"} 5.0' in metrics
    assert 'quire_queue_seconds_predicted{model_name="tiny"} 39.0' in metrics


async def test_nothing_is_tokenized_for_a_refusal(busy, serve, monkeypatch):
    async with serve(max_queued_requests=0) as http:
        state = http.app.state.quire
        slot = state.admission.admit(4)

        def never(*args, **kwargs):
            raise AssertionError("a refused prompt was tokenized")

        monkeypatch.setattr(state.text.tokenizer, "encode", never)
        check_refusal(await completion(http, prompt="x" * 400), 503, "server_overloaded", "4 samples are open")
        slot.release()


async def test_what_was_let_in_counts_until_the_engine_counts_it(busy, serve, eventually):
    """Three prompts of 400 tokens at a millisecond each: the figures of the engine know of none of them at first."""
    taken: list[float] = []
    async with serve(max_queue_seconds=0.5) as http:
        admission = http.app.state.quire.admission
        inside = [completion(http, prompt=[1] * 400, max_tokens=1) for _ in range(3)]
        await eventually(lambda: busy.running == 2)
        check_refusal(await inside[2], 503, "server_overloaded", "about 0.8 s")
        taken.append(admission.predicted_wait())
        busy.report()  # the engine says that it has taken both in, and has nothing waiting
        await eventually(lambda: admission.predicted_wait() == 0)
        inside[2] = completion(http, prompt=[1] * 400, max_tokens=1)
        await eventually(lambda: len(busy.added) == 3)
        busy.gate.set()
        assert [response.status_code for response in await asyncio.gather(*inside)] == [200, 200, 200]
        assert admission.predicted_wait() == 0
    assert taken == [pytest.approx(0.82)]


async def test_prompt_tokens_that_wait_are_bounded(busy, serve, eventually):
    busy.figures = {"queue_seconds": 30.0}
    async with serve(max_queued_tokens=300) as http:
        busy.report()
        admission = http.app.state.quire.admission
        inside = [completion(http, prompt=[[1] * 100, [1] * 50]) for _ in range(2)]
        inside.append(completion(http, prompt=[1] * 20))
        await eventually(lambda: len(busy.added) == 4)  # the third was one too many: 300 wait
        refused = [response for response in [await inside.pop()] if response.status_code == 503]
        retry = check_refusal(refused[0], 503, "server_overloaded", "300 prompt tokens wait, and 300 may")
        assert 1 <= retry <= 3
        assert admission.queued_tokens == pytest.approx(300)
        busy.gate.set()
        assert [response.status_code for response in await asyncio.gather(*inside)] == [200, 200]
        assert admission.queued_tokens == 0
        assert (await completion(http, prompt=[1] * 20)).status_code == 200


async def test_tokens_that_were_computed_or_left_wait_no_more(busy, serve, eventually):
    async with serve(max_queued_tokens=100) as http:
        admission = http.app.state.quire.admission
        leaver = completion(http, prompt=[1] * 400)
        await eventually(lambda: busy.running == 1)
        check_refusal(await completion(http), 503, "server_overloaded", "400 prompt tokens wait")
        leaver.cancel()
        await eventually(lambda: admission.queued_tokens == 0)
        busy.answer = lambda request, index: [97] * 400
        busy.step_seconds = 0.01
        runner = completion(http, prompt=[1] * 101, max_tokens=400)
        busy.gate.set()
        await eventually(lambda: busy._stats.generated_tokens_total > 3)
        assert admission.open == 1
        assert admission.queued_tokens == pytest.approx(0)
        assert (await completion(http)).status_code == 200
        await runner


async def test_a_tenant_that_fills_the_queue_of_tokens_is_the_one_that_waits(busy, serve, eventually):
    async with serve(max_queued_tokens=100) as http:
        greedy = completion(http, tenant="greedy", prompt=[1] * 120)
        await eventually(lambda: len(busy.added) == 1)
        modest = completion(http, tenant="modest", prompt=[1] * 10)
        await eventually(lambda: len(busy.added) == 2)
        check_refusal(
            await completion(http, tenant="greedy"), 429, "tenant_overloaded", "120 prompt tokens", "its share is 50"
        )
        busy.gate.set()
        assert {(await greedy).status_code, (await modest).status_code} == {200}


async def test_a_tenant_that_fills_the_house_is_the_one_that_waits(busy, serve, eventually):
    async with serve(max_queued_requests=4) as http:  # 8 samples in all
        greedy = [completion(http, tenant="greedy", n=2) for _ in range(4)]
        await eventually(lambda: len(busy.added) == 4)
        check_refusal(await completion(http, tenant="greedy"), 503, "server_overloaded")  # nobody else is inside
        modest = [completion(http, tenant="modest") for _ in range(4)]
        await eventually(lambda: len(busy.added) == 8)
        retry = check_refusal(
            await completion(http, tenant="greedy"), 429, "tenant_overloaded", "8 samples", "its share is 4"
        )
        assert 1 <= retry <= 3
        check_refusal(await completion(http, tenant="modest"), 503, "server_overloaded")  # it has its share
        busy.gate.set()
        assert {response.status_code for response in await asyncio.gather(*greedy, *modest)} == {200}
        assert (await completion(http, tenant="greedy")).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert 'quire_admission_rejections_total{model_name="tiny",reason="tenant_overloaded"} 1.0' in metrics


async def test_shares_follow_the_weights(busy, serve, eventually):
    busy.facts |= {"tenants": ["a", "b"], "tenant_weights": {"a": 1.0, "b": 3.0}, "scheduling_policy": "fair"}
    async with serve(max_queued_requests=4) as http:
        inside = [completion(http, tenant="a") for _ in range(8)]
        await eventually(lambda: len(busy.added) == 8)
        inside += [completion(http, tenant="b") for _ in range(6)]
        await eventually(lambda: len(busy.added) == 14)
        check_refusal(await completion(http, tenant="b"), 503, "server_overloaded")
        check_refusal(await completion(http, tenant="a"), 429, "tenant_overloaded", "its share is 2")
        busy.gate.set()
        await asyncio.gather(*inside)


async def test_figures_of_the_step_time_model_are_shown(serve, fake):
    fake.facts = {"step_cost": STEP_COST}
    fake.figures = {
        "step_tokens": 10,
        "launched_tokens": 16,
        "predicted_seconds": 0.25,
        "step_time_error": 0.125,
        "evicted_blocks_total": 7,
        "step_cost": tuple(STEP_COST),
    }
    async with serve() as http:
        await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4})
        text = (await http.get("/metrics")).text
    for line in (
        'quire_step_tokens_useful_total{model_name="tiny"} 40.0',
        'quire_step_tokens_launched_total{model_name="tiny"} 64.0',
        'quire_step_seconds_predicted_total{model_name="tiny"} 1.0',
        'quire_step_time_error_ratio{model_name="tiny"} 0.125',
        'quire_evicted_blocks_total{model_name="tiny"} 7.0',
        'quire_contention_factor_count{model_name="tiny"} 1.0',
    ):
        assert line in text, line


async def test_without_a_model_there_is_no_contention_factor(http):
    await http.post("/v1/completions", json={"prompt": "x"})
    assert 'quire_contention_factor_count{model_name="tiny"} 0.0' in (await http.get("/metrics")).text
