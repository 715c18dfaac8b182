"""The front door under pressure, over real sockets: bytes, connections, lazy readers, probes, large bodies."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from quire.engine.tokenizer import Tokenizer
from quire.server import (
    as_chat,
    http_protocol,
    protocol,
    routes_chat,
    routes_decisions,
    routes_render,
    routes_tokenizer,
    routing,
)
from quire.server.app import create_app
from quire.server.config import ServerConfig
from quire.server.generate import Generation
from quire.server.http_protocol import bounded_protocol
from quire.server.probes import Probes

GENEROUS = 60.0
JSON_BODY = {"content-type": "application/json"}


def wait_until(condition, seconds=GENEROUS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class Running:
    """A server on a thread. `blocked()`: its event loop does nothing at all meanwhile."""

    def __init__(self, fake, small_buffers=False, **settings):
        self.config = ServerConfig(**settings)
        self.app = create_app(fake, self.config)
        self.listener = socket.socket()
        if small_buffers:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.listener.bind(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="on", http=bounded_protocol(self.config), ws="none"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    @property
    def state(self):
        return self.app.state.quire

    @property
    def connections(self):
        return self.server.server_state.connections

    @contextlib.contextmanager
    def blocked(self):
        blocked, release = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            release.wait(GENEROUS)

        self.state.dispatcher._loop.call_soon_threadsafe(block)
        assert blocked.wait(GENEROUS)
        try:
            yield
        finally:
            release.set()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(GENEROUS)
        assert not self.thread.is_alive()


@pytest.fixture
def run(fake) -> Iterator:
    started = []

    def start(**settings):
        started.append(Running(fake, **settings))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def post_bytes(path, body, **headers):
    content = json.dumps(body).encode()
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    return head.encode() + content


# ---------------------------------------------------------------- the short way out

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
STREAMS = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "logprobs": 2, "stop": ["or"]}),
    ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True}, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 3}),
]


def in_lockstep(fake, app):
    """No step before the news of the last one are taken: nothing merges, however slow this machine is."""
    step = type(fake)._step

    def after_the_last() -> None:
        dispatcher = app.state.quire.dispatcher

        async def taken() -> None:
            while any(mailbox._news for mailbox in dispatcher._mailboxes.values()):
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(taken(), dispatcher._loop).result(GENEROUS)
        step(fake)

    fake._step = after_the_last


def anonymous(data: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', data)


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_bytes_are_the_same_on_the_short_way_and_on_the_long_one(run, serve, fake, path, body):
    fake.answer = lambda request, index: [*"Hello, naïve wörld 👍!".encode(), 256]
    body = {**body, "stream": True, "request_id": "r1"}
    server = run()
    in_lockstep(fake, server.app)
    went = []
    short = http_protocol._write_now
    http_protocol._write_now = lambda cycle, data: went.append(data) or short(cycle, data)
    try:
        async with httpx.AsyncClient(timeout=GENEROUS) as client:
            direct = await client.post(server.url + path, json=body)
    finally:
        http_protocol._write_now = short
    server.stop()
    async with serve() as client:  # ASGI alone: nobody offers the short way
        in_lockstep(fake, client.app)
        through = await client.post(path, json=body)
    assert direct.status_code == through.status_code == 200
    assert went
    assert anonymous(direct.content) == anonymous(through.content)


async def test_a_stream_byte_for_byte(run, fake):
    fake.answer = lambda request, index: [*b'a\n"', 256]
    server = run()
    in_lockstep(fake, server.app)
    async with httpx.AsyncClient(timeout=GENEROUS) as client:
        answer = await client.post(
            server.url + "/v1/chat/completions", json={**CHAT, "stream": True, "request_id": "r1", "model": "tiny"}
        )
    head = (
        'data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,'
    )
    tail = ',"logprobs":null,"finish_reason":null}]}\n\n'
    expected = "".join(
        [
            f'{head}"delta":{{"role":"assistant","content":""}}{tail}',
            f'{head}"delta":{{"content":"a"}}{tail}',
            f'{head}"delta":{{"content":"\\n"}}{tail}',
            f'{head}"delta":{{"content":"\\""}}{tail}',
            f'{head}"delta":{{"content":""}},"logprobs":null,"finish_reason":"stop","stop_reason":null}}]}}\n\n',
            "data: [DONE]\n\n",
        ]
    )
    assert anonymous(answer.content).decode() == expected


def test_pipelined_streams_do_not_mix(run, fake):
    fake.answer = lambda request, index: [*(b"one" if request.prompt_ids == [49] else b"two"), 256]
    fake.step_seconds = 0.01
    server = run()
    with socket.create_connection(("127.0.0.1", server.port), timeout=GENEROUS) as connection:
        first = post_bytes("/v1/completions", {"prompt": "1", "stream": True})
        second = post_bytes("/v1/completions", {"prompt": "2", "stream": True}, Connection="close")
        connection.sendall(first + second)
        received = b""
        while data := connection.recv(65536):
            received += data
    one, two = received.split(b"HTTP/1.1 200 OK")[1:]
    texts = [b"".join(re.findall(rb'"text":"(\w*)"', answer)) for answer in (one, two)]
    assert texts == [b"one", b"two"]
    assert one.count(b"[DONE]") == two.count(b"[DONE]") == 1


# ---------------------------------------------------------------- connections and readers


def test_connections_are_bounded_and_those_inside_do_not_notice(run, fake):
    fake.answer = lambda request, index: [97] * 300
    fake.step_seconds = 0.005
    server = run(max_connections=8)
    inside = [socket.create_connection(("127.0.0.1", server.port), timeout=GENEROUS) for _ in range(8)]
    inside[0].sendall(
        post_bytes("/v1/completions", {"prompt": "x", "max_tokens": 300, "stream": True}, Connection="close")
    )
    wait_until(lambda: len(server.connections) == 8)
    for _ in range(4):
        refused = httpx.get(server.url + "/health", timeout=GENEROUS)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert "8" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 5
        assert refused.headers["x-should-retry"] == "true"
    received = b""
    while data := inside[0].recv(65536):
        received += data
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    for connection in inside:
        connection.close()
    wait_until(lambda: not server.connections)
    assert httpx.get(server.url + "/health", timeout=GENEROUS).status_code == 200


def test_refused_connections_that_stay_are_bounded_too(run):
    server = run(max_connections=4)
    crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=GENEROUS) for _ in range(40)]
    most = 0

    def seen() -> bool:
        nonlocal most
        most = max(most, len(server.connections))
        return len(server.connections) == 4

    wait_until(seen)  # those past the bound were closed, though nobody of the crowd left
    assert most <= 9
    for connection in crowd:
        connection.close()


def test_a_thousand_connections_at_once_are_all_answered(run):
    server = run(max_connections=256)
    need = 2500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < need:
        pytest.skip("this machine lends too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), hard))

    async def one() -> bytes:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
        except OSError:  # past twice the bound there is no answer
            return b""
        return answer.split(b" ", 2)[1] if answer else b""

    async def everybody() -> list[bytes]:
        return await asyncio.gather(*(one() for _ in range(1000)))

    try:
        answers = asyncio.run(everybody())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(answers) <= {b"200", b"503", b""}
    assert b"200" in answers
    wait_until(lambda: not server.connections)
    assert httpx.get(server.url + "/health", timeout=GENEROUS).status_code == 200


def test_a_hundred_readers_that_do_not_read_cost_little_and_are_cut_off(run, fake):
    """Their buffers are bounded, another's stream goes on, and after write_timeout their requests are aborted."""
    fake.answer = lambda request, index: [97] * 480
    fake.tokens_per_step = 8
    server = run(small_buffers=True, write_timeout=3.0)
    lazy = []
    body = {"prompt": "x", "max_tokens": 480, "n": 4, "stream": True, "logprobs": 5}
    for _ in range(100):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(post_bytes("/v1/completions", body))
        lazy.append(connection)
    wait_until(lambda: len(fake.added) == 100)
    largest = 0

    def all_done() -> bool:
        nonlocal largest
        sizes = [c.transport.get_write_buffer_size() for c in list(server.connections) if c.transport is not None]
        largest = max([largest, *sizes])
        return server.state.admission.open == 0

    victim = httpx.post(server.url + "/v1/completions", json={"prompt": "y", "max_tokens": 64}, timeout=GENEROUS)
    assert victim.json()["usage"]["completion_tokens"] == 64
    wait_until(all_done)
    assert 0 < largest < 1 << 20
    assert fake.aborted
    wait_until(lambda: not server.connections)
    for connection in lazy:
        connection.close()


def test_a_whole_answer_that_nobody_reads_is_cut_off_too(run, fake):
    fake.answer = lambda request, index: [97] * 480
    fake.tokens_per_step = 480
    server = run(small_buffers=True, write_timeout=0.3)
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    lazy.connect(("127.0.0.1", server.port))
    lazy.sendall(post_bytes("/v1/completions", {"prompt": "x", "max_tokens": 480, "n": 8, "logprobs": 5}))
    wait_until(lambda: len(fake.added) == 1)
    wait_until(lambda: not server.connections)
    lazy.close()


# ---------------------------------------------------------------- probes


def test_probes_answer_while_the_event_loop_is_blocked(run, fake):
    server = run()
    probes = Probes(server.app, server.config, 0)
    probes.start()
    url = f"http://127.0.0.1:{probes.port}"
    wait_until(lambda: _status(url + "/health") == 200)
    with server.blocked():
        with pytest.raises(httpx.TimeoutException):  # the detector's own check: the main port is really blocked
            httpx.get(server.url + "/health", timeout=0.5)
        for path in ("/health", "/ready"):
            assert httpx.get(url + path, timeout=GENEROUS).json() == {"status": "ok"}
        metrics = httpx.get(url + "/metrics", timeout=GENEROUS).text
        assert "quire_num_requests_running" in metrics
        fake.age = 1000.0
        hung = httpx.get(url + "/health", timeout=GENEROUS)
        assert (hung.status_code, hung.json()["status"]) == (503, "hung")
        fake.age = 0.0
    assert httpx.get(server.url + "/health", timeout=GENEROUS).status_code == 200
    server.state.admission.draining = True
    assert httpx.get(url + "/ready", timeout=GENEROUS).json() == {"status": "draining"}
    probes.stop()
    assert _status(url + "/health") is None


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/v1/completions", "/nothing"])
def test_only_probes_are_answered_there(run, path):
    server = run()
    probes = Probes(server.app, server.config, 0)
    probes.start()
    url = f"http://127.0.0.1:{probes.port}"
    wait_until(lambda: _status(url + "/health") == 200)
    answer = httpx.get(url + path, timeout=GENEROUS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    probes.stop()


def test_a_port_that_is_taken_is_told_at_once(run):
    server = run()
    with pytest.raises(OSError, match="in use"):
        Probes(server.app, server.config, server.port)
    with pytest.raises(ValueError, match="health_port must be another port than 8000"):
        ServerConfig(health_port=8000)


def _status(url):
    try:
        return httpx.get(url, timeout=GENEROUS).status_code
    except httpx.TransportError:
        return None


@pytest.mark.parametrize(
    "body", [{"stream": True}, {"stream": False}, {"n": 3}, {"max_tokens": -1}], ids=["stream", "whole", "three", "bad"]
)
def test_a_request_is_freed_with_its_connection(run, body):
    """Nobody has to look for what is left of it: garbage that refers to itself stays for thousands of requests."""
    server = run()
    request = post_bytes("/v1/completions", {"prompt": "x", "max_tokens": 3, **body}, Connection="close")

    def ask() -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=GENEROUS) as connection:
            connection.sendall(request)
            while connection.recv(65536):
                pass

    ask()  # what is made once is made
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            ask()
        kinds = (RequestResponseCycle, Generation, protocol.CompletionBody)
        wait_until(lambda: not any(type(found) in kinds for found in gc.get_objects()))
    finally:
        gc.enable()


def test_the_loops_lag_is_told(run):
    server = run()

    def late(bound: str) -> float:
        text = httpx.get(server.url + "/metrics", timeout=GENEROUS).text
        name = f'quire_event_loop_lag_seconds_bucket{{le="{bound}",model_name="tiny"}} '
        within = float(text.split(name)[1].split("\n")[0])
        count = float(text.split('quire_event_loop_lag_seconds_count{model_name="tiny"} ')[1].split("\n")[0])
        return count - within

    before = late("0.2")
    with server.blocked():
        time.sleep(0.5)
    wait_until(lambda: late("0.2") > before)


# ---------------------------------------------------------------- bodies


def test_large_bodies_are_decoded_beside_the_loop(run, monkeypatch):
    server = run(max_body_bytes=1 << 20)
    decoded_on = []
    decode = routing._decode
    monkeypatch.setattr(
        routing, "_decode", lambda raw: (decoded_on.append((len(raw), threading.current_thread().name)), decode(raw))[1]
    )
    for size in (10, 200_000):
        answer = httpx.post(server.url + "/tokenize", json={"prompt": "x" * size}, timeout=GENEROUS)
        assert answer.status_code == (200 if size == 10 else 400)
    assert not decoded_on[0][1].startswith("text")
    assert decoded_on[1][1].startswith("text")


def test_large_bodies_of_bad_json_get_the_same_error_as_small_ones(run):
    server = run(max_body_bytes=1 << 20)
    headers = {"content-type": "application/json"}
    small, large = (
        httpx.post(
            server.url + "/v1/completions", content=b'{"prompt": ' + b" " * size, headers=headers, timeout=GENEROUS
        )
        for size in (10, 200_000)
    )
    assert small.status_code == large.status_code == 400
    assert small.json()["error"]["code"] == large.json()["error"]["code"]


async def test_a_body_of_a_hundred_thousand_keys_is_refused_before_it_is_decoded(http, monkeypatch):
    keys = ",".join(f'"k{i}":1' for i in range(routing.MAX_KEYS + 2))
    headers = {"content-type": "application/json"}
    answer = await http.post("/v1/completions", content="{" + keys + "}", headers=headers)
    assert answer.status_code == 400
    assert f"more than {routing.MAX_KEYS} keys" in answer.json()["error"]["message"]
    text = json.dumps({"prompt": '"a":1,' * (routing.MAX_KEYS + 2)})  # the same in a text is text
    answer = await http.post("/v1/completions", content=text, headers=headers)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("key", ['"k{}" :1', '"k{}"\n\t:1', '"k{}\\\\":1'])
async def test_keys_are_counted_however_they_are_spelled(http, key):
    content = '{"x":{' + ",".join(key.format(i) for i in range(routing.MAX_KEYS)) + "}}"
    answer = await http.post("/v1/completions", content=content, headers=JSON_BODY)
    assert answer.status_code == 400
    assert f"more than {routing.MAX_KEYS} keys" in answer.json()["error"]["message"]


async def test_texts_that_look_like_keys_are_texts(http):
    body = {"prompt": "x", "guided_choice": [f": {i}" for i in range(routing.MAX_KEYS + 2)]}
    answer = await http.post("/v1/completions", json=body)
    assert answer.json()["error"]["param"] == "guided_choice"


@pytest.mark.parametrize("nothing", ["{}", "[]"])
async def test_a_body_of_a_hundred_thousand_nothings_is_refused_before_it_is_decoded(http, nothing):
    content = '{"messages":[' + ",".join([nothing] * routing.MAX_CONTAINERS) + "]}"
    answer = await http.post("/v1/chat/completions", content=content, headers=JSON_BODY)
    assert answer.status_code == 400
    assert f"more than {routing.MAX_CONTAINERS} objects and lists" in answer.json()["error"]["message"]
    text = json.dumps({"prompt": nothing * (routing.MAX_CONTAINERS + 2)})  # the same in a text is text
    answer = await http.post("/v1/completions", content=text, headers=JSON_BODY)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_body_has_so_many_fields_at_most(http):
    body = {"prompt": "x", "max_tokens": 1, **{f"unknown_{i}": i for i in range(routing.MAX_FIELDS - 2)}}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    answer = await http.post("/v1/completions", json={**body, "one_more": 1})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    for part in (f"{routing.MAX_FIELDS + 1} fields", f"at most {routing.MAX_FIELDS}", "leave some out"):
        assert part in message


async def test_unknown_fields_are_spelled_only_for_a_log_that_shows_them(http, monkeypatch):
    shown = []
    monkeypatch.setattr(protocol.errors, "shown", lambda value: shown.append(value) or "")
    answer = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "unknown": 1})
    assert answer.status_code == 200
    assert not shown


USER = {"role": "user", "content": "x"}
TURNS = {"messages": [USER], "max_tokens": 1}
CHAT_ROUTE = "/v1/chat/completions"
LISTS = [
    (CHAT_ROUTE, {"messages": [USER] * 10_001}, "messages", "at most 10000"),
    (CHAT_ROUTE, {**TURNS, "tools": [{}] * 200}, "tools", "at most 128"),
    (CHAT_ROUTE, {**TURNS, "functions": [{}] * 200}, "functions", "at most 128"),
    (CHAT_ROUTE, {**TURNS, "stop_token_ids": [1] * 200}, "stop_token_ids", "at most 128"),
    (CHAT_ROUTE, {**TURNS, "bad_words": ["a"] * 200}, "bad_words", "at most 128"),
    (CHAT_ROUTE, {**TURNS, "logprob_token_ids": [1] * 600_000}, "logprob_token_ids", "at most 524288"),
    (CHAT_ROUTE, {**TURNS, "allowed_token_ids": [1] * 600_000}, "allowed_token_ids", "at most 524288"),
    ("/v1/responses", {"input": [USER] * 10_001}, "input", "at most 10000"),
    ("/v1/responses", {"input": "x", "tools": [{}] * 200}, "tools", "at most 128"),
    ("/v1/messages", {**TURNS, "messages": [USER] * 10_001}, "messages", "at most 10000"),
    ("/v1/messages", {**TURNS, "tools": [{}] * 200}, "tools", "at most 128"),
    ("/tokenize", {"messages": [USER], "tools": [{}] * 200}, "tools", "at most 128"),
]


@pytest.mark.parametrize(
    ("path", "body", "field", "most"), LISTS, ids=[f"{path} {field}" for path, _, field, _ in LISTS]
)
async def test_a_long_list_is_refused_before_anything_looks_at_its_entries(http, monkeypatch, path, body, field, most):
    def never(*args):
        raise AssertionError("its size was taken")

    for module in (routes_chat, as_chat):
        monkeypatch.setattr(module, "chat_size", never)
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    for part in (f"`{field}` has {len(body[field])} ", most):
        assert part in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "module", "name"),
    [
        ("/tokenize", {"prompt": "abc", "return_token_strs": True}, Tokenizer, "token_text"),
        ("/detokenize", {"tokens": [97]}, routes_tokenizer, "json_answer"),
        ("/tokenize", {"prompt": "abc"}, routes_tokenizer, "json_answer"),
        ("/v1/completions/render", {"prompt": "abc"}, routes_render, "json_answer"),
        (
            "/v1/decisions",
            {"input": "a", "questions": [{"type": "predicate", "instructions": "b"}]},
            routes_decisions,
            "answer_of",
        ),
    ],
)
async def test_what_grows_with_the_body_is_done_on_a_text_thread(http, monkeypatch, path, body, module, name):
    done_on = set()
    function = getattr(module, name)

    def seen(*args):
        done_on.add(threading.current_thread().name[:4])
        return function(*args)

    monkeypatch.setattr(module, name, seen)
    answer = await http.post(path, json=body)
    assert answer.status_code == 200
    assert done_on == {"text"}


# ---------------------------------------------------------------- deadlines in a header


@pytest.mark.parametrize("stream", [True, False])
async def test_a_header_may_carry_the_timeout(http, fake, stream):
    fake.gate.clear()
    body = {"prompt": "x", "stream": stream, "timeout": 50}
    answer = await http.post("/v1/completions", json=body, headers={"x-request-timeout-ms": "60"})
    assert answer.status_code == 504
    assert "0.06 s" in answer.json()["error"]["message"]
    assert fake.added[0].timeout == 0.06


async def test_the_shorter_of_header_and_body_holds(http, fake):
    await http.post("/v1/completions", json={"prompt": "x", "timeout": 5}, headers={"x-request-timeout-ms": "70000"})
    await http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-timeout-ms": "9" * 300})
    assert [request.timeout for request in fake.added] == [5, 600]


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "", "soon", "٣"])
async def test_a_header_that_is_no_count_is_refused(http, fake, value):
    headers = {"x-request-timeout-ms": value.encode()}
    answer = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout-ms"
    assert fake.added == []
