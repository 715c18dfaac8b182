"""The same over real sockets: uvicorn, the official client, clients that hang up or do not read, and signals."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from quire.server import http_protocol, routing
from quire.server.app import create_app
from quire.server.attempts import FREE
from quire.server.auth import POLICIES
from quire.server.config import ServerConfig
from quire.server.http_protocol import BoundedProtocol
from quire.server.keys import METRICS


@pytest.fixture
def server(fake):
    """(port, app) of a uvicorn server on a thread."""
    app = create_app(fake, ServerConfig(api_key=("right",)))
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, lifespan="on", http=BoundedProtocol, ws="none"
    )
    instance = uvicorn.Server(config)
    thread = threading.Thread(target=instance.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not instance.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield instance.servers[0].sockets[0].getsockname()[1], app
    instance.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="right", max_retries=0) as client:
        yield client


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_openai_decisions(client):
    questions = [
        {"type": "predicate", "instructions": "It is urgent."},
        {"type": "choice", "name": "who", "instructions": "Who?", "choices": [{"value": "billing"}, {"value": True}]},
        {"type": "score", "instructions": "How angry?", "levels": [{"label": "calm"}, {"label": "cross"}]},
    ]
    decision = client.decisions.create(model="tiny", input="I was charged twice.", questions=questions)
    predicate, choice, score = decision.answers
    assert 0 <= predicate.probability <= 1
    assert choice.choice in ("billing", True)
    assert sum(level.probability for level in score.probabilities) == pytest.approx(1)
    assert decision.usage.input_tokens_details.cached_tokens == 0


def test_openai_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_openai_completions(client):
    answer = client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1, max_tokens=30)
    assert [choice.text for choice in answer.choices] == ["Hello, world!"] * 4
    assert answer.usage.completion_tokens == 56
    assert answer.choices[0].logprobs.tokens[0] == "H"


def test_openai_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body={"top_k": 3, "ignore_eos": False}
    )
    assert answer.choices[0].message.content == "Hello, world!"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_openai_streams(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world!"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 14
    texts = [c.choices[0].text for c in client.completions.create(model="tiny", prompt="x", stream=True)]
    assert "".join(texts) == "Hello, world!"


@pytest.fixture
def roomy(fake) -> None:
    """A context in which tools have a place."""
    fake.facts["max_model_len"] = 4096


def test_openai_tools(roomy, client, fake):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "ä"]}}\n</tool_call>'
    fake.answer = lambda request, index: [*f"Sure.\n{call}\n{call}".encode(), 256]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    ask = {"model": "tiny", "messages": MESSAGES, "tools": tools, "max_tokens": 200}
    whole = client.chat.completions.create(**ask).choices[0]
    assert whole.finish_reason == "tool_calls"
    with client.chat.completions.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert [event.arguments for event in events if event.type == "tool_calls.function.arguments.done"] == [
        '{"a": 1, "b": [2, "ä"]}'
    ] * 2
    for choice in (whole, final):
        assert choice.message.content == "Sure."
        assert [json.loads(each.function.arguments) for each in choice.message.tool_calls] == [
            {"a": 1, "b": [2, "ä"]}
        ] * 2
        again = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "3"}
        history = [*MESSAGES, choice.message.to_dict(), again]
        assert client.chat.completions.create(**{**ask, "messages": history}).choices[0].message.tool_calls


def test_openai_stream_helper(client):
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello, world!"


def test_openai_errors(server, client, fake):
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
        client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
        client.completions.create(model="tiny", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    fake.fail_request = "planned"
    with pytest.raises(openai.APIError, match="could not finish"):
        list(client.completions.create(model="tiny", prompt="x", stream=True))


async def test_openai_async_in_parallel(server):
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="right") as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(model="tiny", prompt="x" * (i + 1), stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert set(await asyncio.gather(*(one(i) for i in range(40)))) == {"Hello, world!"}


def request(body: dict, **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = {
        "Host": "localhost",
        "Authorization": "Bearer right",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **headers,
    }
    head = "POST /v1/completions HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    return head.encode() + content


def raw(port: int, body: dict, **headers: str) -> socket.socket:
    """A connection on which the request has been sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(request(body, **headers))
    return connection


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
def test_a_client_that_hangs_up_is_aborted(server, fake, stream, how):
    port, app = server
    fake.answer = lambda request, index: [97] * 480
    fake.step_seconds = 0.01
    connection = raw(port, {"prompt": "x", "max_tokens": 480, "stream": stream})
    wait_until(lambda: fake.running == 1)
    if stream:
        assert b"200 OK" in connection.recv(100)
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    if how == "half-close":
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    wait_until(lambda: fake.aborted == [fake.added[0].request_id])
    wait_until(lambda: app.state.quire.admission.open == 0)
    connection.close()


def test_a_client_that_does_not_read_holds_up_nobody_and_is_dropped(fake):
    """Its socket fills; another's stream goes on; after write_timeout its request is aborted."""
    fake.answer = lambda request, index: [97] * 480
    fake.step_seconds = 0.0005
    app = create_app(fake, ServerConfig(write_timeout=0.3))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    protocol = http_protocol.bounded_protocol(ServerConfig(write_timeout=0.3))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", http=protocol)
    instance = uvicorn.Server(config)
    thread = threading.Thread(target=instance.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: instance.started, 20)
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    lazy.connect(("127.0.0.1", port))
    lazy.sendall(request({"prompt": ["x"] * 20, "max_tokens": 480, "stream": True, "n": 8, "logprobs": 5}))
    wait_until(lambda: len(fake.added) == 20)
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "y", "max_tokens": 20}, timeout=20)
    assert answer.status_code == 200
    wait_until(lambda: app.state.quire.admission.open == 0, 30)
    assert fake.aborted
    lazy.close()
    instance.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("head", ["a/b?", "a#", "a\\", "localhost/v1/models?", "x/health?"])
def test_a_host_header_does_not_move_the_path(server, head):
    with socket.create_connection(("127.0.0.1", server[0]), timeout=10) as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {head}\r\nConnection: close\r\n\r\n".encode())
        status = connection.makefile("rb").readline()
    assert status.split()[1] in (b"400", b"401", b"403")


HOSTS = [
    "Host: a/b?",
    "Host: a#",
    "Host: a\\",
    "Host: ",
    "Host: a\r\nHost: localhost",
    "Host: localhost.",
    "Host: localhost/health?",
    "Host: user@localhost",
    "X: no host at all",
]
# How a raw path may be written so that something behind the door reads it as an open one, or the other way round.
SPELLINGS = [
    "{}",
    "http://localhost{}",
    "http://localhost/health?{}",
    "/{}",
    "/health/..{}",
    "/health/%2e%2e{}",
    "/health%2f..{}",
    "{}?/health",
    "{}#/health",
    "{};/health",
    "{}/",
    "{}%00",
    "/.{}",
]


def test_whoever_watches_gets_frames_and_leaves_nothing_behind(server):
    port, app = server
    feed = app.state.feed
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /steps HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
        heard = b""
        while heard.count(b"data: {") < 3:
            heard += connection.recv(65536)
        assert b"text/event-stream" in heard
        assert len(feed._watchers) == 1
    deadline = time.monotonic() + 30
    while feed._watchers or feed._work is not None:
        assert time.monotonic() < deadline, "nobody noticed that the watcher had left"
        time.sleep(0.01)


def test_nothing_but_the_open_routes_answers_without_a_key(server):
    """Host and raw path against every route (CVE-2026-48746): an open route may answer, as itself; no other does."""
    port, _ = server
    unlocked = []
    for path, policy in POLICIES.items():
        if policy.scope in (None, METRICS):
            continue
        method = "POST" if policy.has_body else "GET"
        plain = path.replace("{model:path}", "tiny")
        body = (
            'Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{"prompt":"x"}' if policy.has_body else "\r\n"
        )
        variants = [(host, plain) for host in HOSTS]
        targets = (*SPELLINGS, plain.upper().replace("{", "{{").replace("}", "}}"), plain.replace("/", "%2f"))
        variants += [("Host: localhost", target.format(plain)) for target in targets]
        for host, target in variants:
            head = f"{method} {target} HTTP/1.1\r\n{host}\r\nConnection: close\r\n"
            answer = answer_to(port, head.encode() + body.encode())
            status = int(answer.split()[1]) if answer else 0
            is_health = answer.endswith(b'{"status":"ok"}')
            if status not in (0, 307, 400, 401, 403, 404, 405, 431) and not is_health:
                unlocked.append((method, target, host, answer[:100]))
    assert unlocked == []
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    assert answer_to(port, head + b"Authorization: Bearer right\r\n\r\n").startswith(b"HTTP/1.1 200"), "a control"


def test_wrong_keys_are_counted_by_the_address_that_a_local_proxy_names(server):
    def ask(key: str, forwarded: str) -> bytes:
        head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
        return answer_to(server[0], (head + forwarded + "\r\n").encode()).split()[1]

    far, near = "X-Forwarded-For: 192.0.2.7\r\n", ""
    assert {ask("wrong", near) for _ in range(2 * FREE)} == {b"401"}, "the proxy itself is not counted"
    answers = [ask("wrong", far) for _ in range(2 * FREE)]
    assert answers[:FREE] == [b"401"] * FREE
    assert b"429" in answers
    assert ask("right", near) == b"200"


def answer_to(port: int, *pieces: bytes) -> bytes:
    """Everything that comes back until the connection closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except OSError:  # refused while still sending
            pass
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
        except OSError:  # reset after the answer: it did not read all that was sent
            pass
        return received


@pytest.mark.parametrize(
    "headers",
    [
        b"X: " + b"a" * 20_000 + b"\r\n",
        b"X: " + b"a" * 2_000_000,
        b"".join(b"X-%d: a\r\n" % i for i in range(101)),
    ],
)
def test_oversized_headers_are_refused(server, headers):
    answer = answer_to(server[0], b"GET /health HTTP/1.1\r\nHost: localhost\r\n", headers, b"\r\n")
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 431") and b'"code":"headers_too_large"' in answer)
    assert httpx.get(f"http://127.0.0.1:{server[0]}/health").status_code == 200


def test_an_oversized_path_is_refused(server):
    assert answer_to(server[0], b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"NOT HTTP\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http_gets_our_error(server, garbage):
    answer = answer_to(server[0], garbage)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"invalid_http"' in answer


def test_smuggling_shapes_are_refused(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for lengths in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"Content-Length: -5\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ):
        assert b" 200 " not in answer_to(server[0], head + lengths).split(b"\r\n")[0]


def test_slow_headers_and_slow_bodies_are_cut_off(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(routing, "BODY_SECONDS", 0.1)
    assert answer_to(server[0]) == b""
    assert answer_to(server[0], b"GET /hea") == b""
    with raw(server[0], {}, **{"Content-Length": "500"}) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "REST_SECONDS", 0.2)
    with raw(server[0], {}, **{"Content-Length": str(1 << 40)}) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")

        def is_cut_off() -> bool:
            try:
                connection.sendall(b" " * 65536)
            except OSError:
                return True
            return False

        wait_until(is_cut_off)


def test_a_refused_body_that_ends_leaves_the_connection_whole(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "REST_SECONDS", 30)
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=20)
    for _ in range(3):
        headers = {"Authorization": "Bearer right", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", b" " * (3 << 20), headers)
        answer = connection.getresponse()
        assert answer.status == 413
        answer.read()
    connection.close()


def test_keep_alive_connections_outlive_the_header_timer(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.2)
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=10)
    for _ in range(3):  # http.client raises if the server has closed in between
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        time.sleep(0.3)
    connection.close()


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from conftest import FakeClient, make_folder
from quire.server.config import ServerConfig
from quire.server.serve import serve
fake = FakeClient(make_folder(Path({folder!r})))
fake.answer = lambda request, index: [97] * request.params.max_tokens
fake.step_seconds = 0.01
ok = serve(fake, ServerConfig(port={port}, drain_timeout={drain}, **{more!r}))
print("closed" if fake.closed else "open")
sys.exit(0 if ok else 1)
"""


class Process:
    """A server process with a scripted engine."""

    def __init__(self, tmp_path: Path, drain: float, **more: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        here = str(Path(__file__).parent)
        script = SCRIPT.format(here=here, folder=str(tmp_path / "tiny"), port=self.port, drain=drain, more=more)
        self.popen = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.url = f"http://localhost:{self.port}"
        wait_until(lambda: self.status("/ready") == 200, 60)

    def status(self, path: str) -> int:
        assert self.popen.poll() is None, self.popen.stderr.read()
        try:
            return httpx.get(self.url + path, timeout=10).status_code
        except httpx.TransportError:
            return 0

    def post(self, **body: object) -> httpx.Response:
        return httpx.post(self.url + "/v1/completions", json={"prompt": "x", **body}, timeout=30)

    def stop(self) -> tuple[int, str, str]:
        out, err = self.popen.communicate(timeout=30)
        return self.popen.returncode, out, err


def stream_of(process: Process, results: list[str], **body: object) -> threading.Thread:
    thread = threading.Thread(target=lambda: results.append(process.post(stream=True, **body).text))
    thread.start()
    return thread


def test_sigterm_drains(tmp_path):
    process = Process(tmp_path, drain=20)
    results: list[str] = []
    thread = stream_of(process, results, max_tokens=150)
    time.sleep(0.3)
    process.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: process.status("/ready") == 503)
    refused = process.post()
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    thread.join(20)
    assert '"finish_reason":"length"' in results[0]
    assert results[0].endswith("data: [DONE]\n\n")
    code, out, err = process.stop()
    assert (code, out.strip()) == (0, "closed"), err
    assert "Traceback" not in err


@pytest.mark.parametrize("drain", [0.3, 60])
def test_streams_that_outlive_the_drain_or_a_second_signal_get_an_error_event(tmp_path, drain):
    process = Process(tmp_path, drain)
    results: list[str] = []
    thread = stream_of(process, results, max_tokens=480)
    time.sleep(0.3)
    process.popen.send_signal(signal.SIGTERM)
    if drain == 60:
        time.sleep(0.2)
        process.popen.send_signal(signal.SIGTERM)
    thread.join(20)
    assert '"code":"server_draining"' in results[0]
    assert results[0].endswith("data: [DONE]\n\n")
    code, out, err = process.stop()
    assert (code, out.strip()) == (0, "closed"), err
    assert "Traceback" not in err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_health_port_tells_of_the_drain_and_closes_with_the_server(tmp_path):
    port = free_port()
    process = Process(tmp_path, drain=20, health_port=port)
    url = f"http://localhost:{port}"
    wait_until(lambda: status_of(url + "/ready") == 200)
    results: list[str] = []
    thread = stream_of(process, results, max_tokens=150)
    time.sleep(0.3)
    process.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: status_of(url + "/ready") == 503)
    assert status_of(url + "/health") == 200
    thread.join(20)
    assert results[0].endswith("data: [DONE]\n\n")
    code, out, err = process.stop()
    assert (code, out.strip()) == (0, "closed"), err
    assert "Traceback" not in err
    assert status_of(url + "/health") is None


def test_a_health_port_that_is_taken_ends_the_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        here = str(Path(__file__).parent)
        script = SCRIPT.format(
            here=here, folder=str(tmp_path / "tiny"), port=free_port(), drain=1, more={"health_port": port}
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"nothing can listen on health_port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def status_of(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return None


def test_a_server_that_runs_out_of_descriptors_lives_and_does_not_spin(tmp_path):
    """More callers than descriptors: those inside are served, and when callers leave there is room again."""
    process = Process(tmp_path, drain=20)
    resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (64, 64))
    results: list[str] = []
    thread = stream_of(process, results, max_tokens=300)
    time.sleep(0.3)
    crowd = [socket.create_connection(("127.0.0.1", process.port), timeout=10) for _ in range(120)]
    before = processor_ticks(process.popen.pid)
    time.sleep(2.0)
    spent = processor_ticks(process.popen.pid) - before
    for connection in crowd:
        connection.close()
    wait_until(lambda: process.status("/health") == 200, 60)
    thread.join(60)
    assert results[0].endswith("data: [DONE]\n\n")
    assert process.post().status_code == 200
    process.popen.send_signal(signal.SIGTERM)
    code, _, err = process.stop()
    assert code == 0, err
    # A loop that tries to accept without a pause uses a whole processor, whatever else the machine does with the other.
    assert spent < 1.0 * os.sysconf("SC_CLK_TCK")


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
