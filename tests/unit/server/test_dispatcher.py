"""Mailboxes merge without losing or reordering anything."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.errors import EngineDeadError
from quire.engine.messages import Abort, AddRequest, EngineDead, StepOutputs, StepStats
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import Chunk, TokenLogprob
from quire.server.dispatcher import Dispatcher, Mailbox
from quire.server.errors import ApiError


class _Observed:
    def __init__(self):
        self.values = []

    def observe(self, value):
        self.values.append(value)


class _Metrics:
    def __init__(self):
        self.time_to_first_token, self.inter_token_latency, self.queue_time = _Observed(), _Observed(), _Observed()


class _Client:
    def __init__(self):
        self.sent = []
        self.dead = False

    def send(self, message):
        if self.dead:
            raise EngineDeadError("gone")
        self.sent.append(message)

    def heartbeat_age(self):
        return 0.0


def chunk(sample, tokens, **fields):
    logprobs = [TokenLogprob(token, -1.0, 1, ()) for token in tokens]
    return Chunk("r", sample, list(tokens), logprobs=logprobs, **fields)


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), max_size=3), st.booleans()), max_size=30))
async def test_whatever_is_taken_adds_up_to_what_was_put(puts):
    mailbox = Mailbox(0.0, _Metrics())
    put: dict[int, list[int]] = {}
    took: dict[int, list[int]] = {}
    for sample, tokens, take in puts:
        put.setdefault(sample, []).extend(tokens)
        mailbox.put(chunk(sample, tokens), 1.0)
        if take:
            for news in await mailbox.take(1.0):
                took.setdefault(news.index, []).extend(news.token_ids)
                assert [logprob.token_id for logprob in news.logprobs] == news.token_ids
    for news in await mailbox.take(0.0):
        took.setdefault(news.index, []).extend(news.token_ids)
    assert took == put


async def test_merging_keeps_the_ends_and_the_beginnings():
    mailbox = Mailbox(0.0, _Metrics())
    mailbox.put(Chunk("r", 0, [], prompt_logprobs=[TokenLogprob(1, -1.0, 1, ())], num_cached=16), 1.0)
    mailbox.put(Chunk("r", 0, [5], prompt_logprobs=[TokenLogprob(2, -1.0, 1, ())], num_drafted=3), 1.0)
    mailbox.put(Chunk("r", 0, [6], finish_reason="stop", stop_reason=6, num_drafted=4, num_accepted=1), 1.0)
    (news,) = await mailbox.take(1.0)
    assert (news.token_ids, news.num_cached, news.finish_reason, news.stop_reason) == ([5, 6], 16, "stop", 6)
    assert [logprob.token_id for logprob in news.prompt_logprobs] == [1, 2]
    assert (news.num_drafted, news.num_accepted) == (7, 1)


async def test_silence_gives_an_empty_list_and_a_failure_comes_after_the_news():
    mailbox = Mailbox(0.0, _Metrics())
    assert await mailbox.take(0.001) == []
    mailbox.put(chunk(0, [1]), 1.0)
    mailbox.fail(ApiError(503, "x", code="x"))
    assert len(await mailbox.take(1.0)) == 1
    with pytest.raises(ApiError):
        await mailbox.take(1.0)


async def test_latencies_are_taken_at_arrival():
    metrics = _Metrics()
    mailbox = Mailbox(10.0, metrics)
    for now, tokens in ((10.5, []), (11.0, [1]), (11.25, [2]), (11.75, [3])):
        mailbox.put(chunk(0, tokens), now)
    assert metrics.time_to_first_token.values == [1.0]
    assert metrics.inter_token_latency.values == [0.25, 0.5]


def add(request_id):
    return AddRequest(request_id, [1], SamplingParams(max_tokens=1))


async def test_messages_for_forgotten_requests_are_dropped_and_aborts_are_sent_once():
    client = _Client()
    dispatcher = Dispatcher(client, 10.0)
    mailbox = Mailbox(0.0, _Metrics())
    dispatcher.send([add("r"), add("s")], mailbox)
    assert dispatcher.forget(["r", "s"], abort=True)
    assert not dispatcher.forget(["r", "s"], abort=True)
    dispatcher._deliver(StepOutputs([chunk(0, [1])], StepStats()))
    assert await mailbox.take(0.0) == []
    assert client.sent[-1] == Abort(["r", "s"])
    assert sum(isinstance(message, Abort) for message in client.sent) == 1


async def test_a_dead_engine_fails_those_inside_and_refuses_the_next():
    client = _Client()
    dispatcher = Dispatcher(client, 10.0)
    mailbox = Mailbox(0.0, _Metrics())
    dispatcher.send([add("r")], mailbox)
    waiting = asyncio.ensure_future(mailbox.take(60))
    await asyncio.sleep(0)
    dispatcher._deliver(EngineDead("why"))
    with pytest.raises(ApiError) as failure:
        await waiting
    assert failure.value.status == 503
    with pytest.raises(ApiError):
        dispatcher.send([add("s")], Mailbox(0.0, _Metrics()))
    dispatcher.forget(["r"], abort=True)
    assert dispatcher.life.trouble() == "dead"


async def test_an_engine_that_dies_between_check_and_send():
    client = _Client()
    dispatcher = Dispatcher(client, 10.0)
    client.dead = True
    with pytest.raises(ApiError) as failure:
        dispatcher.send([add("r")], Mailbox(0.0, _Metrics()))
    assert failure.value.code == "engine_dead"
    assert dispatcher.forget(["r"], abort=True)


async def test_who_waits_is_told_in_time_that_nothing_came_however_often_it_has_waited_before():
    """One alarm serves all waits: a shorter wait sets it earlier, an old one rings for nobody."""
    mailbox = Mailbox(0.0, _Metrics())
    loop = asyncio.get_running_loop()
    for patience in (60.0, 0.05, 0.2, 60.0, 0.1):
        loop.call_later(0.01, mailbox.put, chunk(0, [1]), 1.0)
        assert await asyncio.wait_for(mailbox.take(patience + 30), 20)
        if patience < 1:
            begun = time.monotonic()
            assert await asyncio.wait_for(mailbox.take(patience), 20) == []
            assert time.monotonic() - begun > patience / 2
    mailbox.close()
    mailbox.close()
