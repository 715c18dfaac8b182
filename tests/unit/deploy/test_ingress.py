"""The way in, before made-up replicas: what is repeated, what is not, and how a stream ends that breaks off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from quire.deploy.ray.call import Call, Part, ReplicaLost
from quire.deploy.ray.ingress import ATTEMPTS, Ingress

Message = dict[str, Any]
STREAM = b"text/event-stream; charset=utf-8"
BODY = json.dumps({"prompt": "once upon a time " * 40}).encode()


def start(status: int = 200, kind: bytes = b"application/json") -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"Content-Type", kind)]}


def body(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Client:
    """Sends one request, and may hang up; `sent` is what came back."""

    def __init__(self, content: bytes = BODY, pieces: int = 1) -> None:
        size = max(-(-len(content) // pieces), 1)
        self._content = [content[i : i + size] for i in range(0, len(content), size)] or [b""]
        self.gone = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self._content:
            piece = self._content.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._content)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        assert not self.sent[-1].get("more_body", False), "the answer is not complete"
        return b"".join(message.get("body", b"") for message in self.sent)


Script = Callable[[Call], AsyncIterator[list[Message]]]


class Replicas:
    """Each request goes to the next script that is not to be avoided; `calls` is what they were asked."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = [(f"replica{i}", script) for i, script in enumerate(scripts)]
        self.calls: list[Call] = []
        self.open = 0

    async def ask(self, call: Call) -> AsyncIterator[Part]:
        self.calls.append(call)
        there = [one for one in self._scripts if one[0] not in call.avoid] or self._scripts
        name, script = there[0]
        self._scripts.remove((name, script))
        self._scripts.append((name, script))
        self.open += 1
        try:
            async for messages in script(call):
                yield Part(name, messages)
        finally:
            self.open -= 1

    async def everyone(self, call: Call) -> list[tuple[str, int, bytes]]:
        answers = []
        for name, script in self._scripts:
            messages = [message async for part in script(call) for message in part]
            content = b"".join(message.get("body", b"") for message in messages)
            answers.append((name, messages[0]["status"], content))
        return answers


def ingress(replicas: Replicas, max_body_bytes: int = 4096) -> Ingress:
    return Ingress(replicas.ask, replicas.everyone, max_body_bytes)


def scope(path: str = "/v1/completions", method: str = "POST") -> Message:
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer k")]
    common = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    return {**common, "client": ("192.0.2.1", 7)}


async def whole(call: Call) -> AsyncIterator[list[Message]]:
    yield [start(), body(b"{}")]


async def stream(call: Call) -> AsyncIterator[list[Message]]:
    yield [start(kind=STREAM), body(b"data: 1\n\n", True)]
    yield [body(b"data: 2\n\n", True), body(b"", False)]


async def dead(call: Call) -> AsyncIterator[list[Message]]:
    raise ReplicaLost("killed")
    yield []


async def dies_between(call: Call) -> AsyncIterator[list[Message]]:
    yield [start(kind=STREAM), body(b"data: 1\n\n", True)]
    raise ReplicaLost("killed")


async def dies_in_json(call: Call) -> AsyncIterator[list[Message]]:
    yield [start(), body(b'{"a":', True)]
    raise ReplicaLost("killed")


def refuses(status: int, code: str = "engine_starting") -> Script:
    async def refusing(call: Call) -> AsyncIterator[list[Message]]:
        yield [start(status), body(json.dumps({"error": {"code": code}}).encode())]

    return refusing


@pytest.mark.parametrize(("script", "expected"), [(whole, b"{}"), (stream, b"data: 1\n\ndata: 2\n\n")])
async def test_an_answer_is_passed_on_as_it_is(script: Script, expected: bytes) -> None:
    client, replicas = Client(pieces=3), Replicas(script)
    await ingress(replicas)(scope(), client.receive, client.send)
    assert (client.status, client.body) == (200, expected)
    (call,) = replicas.calls
    assert (call.body, call.path, call.client) == (BODY, "/v1/completions", ("192.0.2.1", 7))
    assert len(call.chain) == 5
    assert replicas.open == 0


async def test_a_replica_that_is_lost_before_its_first_byte_costs_nothing() -> None:
    client, replicas = Client(), Replicas(dead, dead, stream)
    front = ingress(replicas)
    await front(scope(), client.receive, client.send)
    assert (client.status, client.body) == (200, b"data: 1\n\ndata: 2\n\n")
    assert (front.repeated, front.lost) == (2, 0)


async def test_where_every_replica_is_lost_the_request_ends_with_503() -> None:
    client, replicas = Client(), Replicas(dead)
    await ingress(replicas)(scope(), client.receive, client.send)
    assert client.status == 503
    assert json.loads(client.body)["error"]["code"] == "engine_dead"
    assert len(replicas.calls) == ATTEMPTS


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/completions", b"data: [DONE]\n\n"),
        ("/v1/chat/completions", b"data: [DONE]\n\n"),
        ("/v1/messages", b"event: error"),
        ("/v1/responses", b"event: error"),
    ],
)
async def test_a_stream_that_breaks_off_ends_with_an_error(path: str, last: bytes) -> None:
    client, replicas = Client(), Replicas(dies_between, stream)
    front = ingress(replicas)
    await front(scope(path), client.receive, client.send)
    assert client.body.startswith(b"data: 1\n\n")
    assert last in client.body
    assert b"is not running" in client.body
    assert len(replicas.calls) == 1, "another replica would draw other tokens"
    assert (front.repeated, front.lost) == (0, 1)


async def test_a_whole_answer_that_breaks_off_is_not_made_to_look_complete() -> None:
    client = Client()
    with pytest.raises(RuntimeError, match="broke off"):
        await ingress(Replicas(dies_in_json))(scope(), client.receive, client.send)
    assert client.sent[-1]["more_body"] is True


async def test_who_is_refused_with_503_is_offered_to_another_replica() -> None:
    client, replicas = Client(), Replicas(refuses(503), whole)
    await ingress(replicas)(scope(), client.receive, client.send)
    assert (client.status, client.body) == (200, b"{}")
    assert [call.avoid for call in replicas.calls] == [(), ("replica0",)]
    assert replicas.open == 0


@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
async def test_a_refusal_by_all_is_the_answer(replicas: int) -> None:
    client, fleet = Client(), Replicas(*[refuses(503)] * replicas)
    await ingress(fleet)(scope(), client.receive, client.send)
    assert client.status == 503
    assert json.loads(client.body)["error"]["code"] == "engine_starting"
    assert len(fleet.calls) == min(replicas + 1, ATTEMPTS)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 504])
async def test_other_errors_are_the_callers_own(status: int) -> None:
    client, replicas = Client(), Replicas(refuses(status), whole)
    await ingress(replicas)(scope(), client.receive, client.send)
    assert client.status == status
    assert len(replicas.calls) == 1


async def test_a_client_that_leaves_ends_the_call() -> None:
    begun = asyncio.Event()

    async def endless(call: Call) -> AsyncIterator[list[Message]]:
        yield [start(kind=STREAM), body(b"data: 1\n\n", True)]
        begun.set()
        await asyncio.Event().wait()

    client, replicas = Client(), Replicas(endless)
    asking = asyncio.create_task(ingress(replicas)(scope(), client.receive, client.send))
    await begun.wait()
    assert replicas.open == 1
    client.gone.set()
    await asking
    assert replicas.open == 0


async def test_a_body_that_is_too_large_reaches_no_replica() -> None:
    client, replicas = Client(bytes(5000), pieces=5), Replicas(whole)
    await ingress(replicas)(scope(), client.receive, client.send)
    assert client.status == 413
    assert not replicas.calls


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"prompt": ' + b"[" * 5000, b'{"a": 1e999}'])
async def test_what_is_wrong_with_a_body_is_the_applications_to_say(content: bytes) -> None:
    client, replicas = Client(content), Replicas(refuses(400))
    await ingress(replicas, max_body_bytes=1 << 20)(scope(), client.receive, client.send)
    assert client.status == 400
    (call,) = replicas.calls
    assert (call.body, call.chain) == (content, ())


def page(requests: int, waiting: int) -> Script:
    registry = CollectorRegistry()
    Counter("quire_requests", "Requests.", ["code"], registry=registry).labels("200").inc(requests)
    Gauge("quire_waiting", "Waiting.", registry=registry).set(waiting)

    async def metrics(call: Call) -> AsyncIterator[list[Message]]:
        yield [start(), body(generate_latest(registry))]

    return metrics


async def test_metrics_are_those_of_all_replicas() -> None:
    client = Client(b"")
    await ingress(Replicas(page(3, 1), page(5, 0)))(scope("/metrics", "GET"), client.receive, client.send)
    lines = client.body.decode().splitlines()
    assert 'quire_requests_total{code="200",replica="replica0"} 3.0' in lines
    assert 'quire_requests_total{code="200",replica="replica1"} 5.0' in lines
    assert 'quire_waiting{replica="replica1"} 0.0' in lines
    assert sum(line.startswith("# TYPE quire_waiting") for line in lines) == 1


async def test_metrics_that_are_refused_are_refused() -> None:
    client = Client(b"")
    replicas = Replicas(refuses(401, "invalid_api_key"), refuses(401, "invalid_api_key"))
    await ingress(replicas)(scope("/metrics", "GET"), client.receive, client.send)
    assert client.status == 401
    assert json.loads(client.body)["error"]["code"] == "invalid_api_key"


async def test_requests_are_ended_wherever_they_run() -> None:
    def ended(*names: str) -> Script:
        async def script(call: Call) -> AsyncIterator[list[Message]]:
            yield [start(), body(json.dumps({"aborted": names}).encode())]

        return script

    client = Client(b'{"request_ids": ["a", "b", "c"]}')
    await ingress(Replicas(ended("a"), ended("a", "c")))(scope("/abort_requests"), client.receive, client.send)
    assert sorted(json.loads(client.body)["aborted"]) == ["a", "c"]


async def test_the_lifespan_is_answered() -> None:
    sent: list[Message] = []
    news = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        return news.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await ingress(Replicas(whole))({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
