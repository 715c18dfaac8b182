"""What lies below a body: bytes that are no HTTP, headers, hosts, paths, connections that do not end."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from security.house import KEYS, House, check_refusal, check_tells_nothing, descendants

from quire.server.auth import POLICIES
from quire.server.keys import INFER

KEY = f"Authorization: Bearer {KEYS[0]}\r\n".encode()
BODY = b'{"prompt": "x", "max_tokens": 1}'
JSON = b"Content-Type: application/json\r\n"


CLOSE = b"Connection: close\r\n"


def head(*lines: bytes, path: bytes = b"/v1/completions", method: bytes = b"POST") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + KEY + JSON + b"".join(lines) + b"\r\n"


def statuses(answer: bytes) -> list[int]:
    """Of every response on the connection, in order."""
    return [int(found) for found in re.findall(rb"(?:\A|\r\n|\}|\n)HTTP/1\.[01] (\d{3}) ", answer)]


def check_refused(answer: bytes, what: object = None) -> None:
    """Refused in HTTP, or the connection was closed without a word; never served."""
    found = statuses(answer)
    assert not found or all(400 <= status < 500 for status in found), (what, answer[:300])


@contextlib.contextmanager
def connection(house: House):
    with socket.create_connection(("127.0.0.1", house.port), timeout=30) as made:
        yield made


# ---------------------------------------------------------------- headers


@pytest.mark.advisory("CVE-2025-48956")
def test_headers_without_end(victim: House) -> None:
    before = victim.rss()
    endless = [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"a" * (16 << 20)),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"".join(b"X-%d: y\r\n" % i for i in range(10_000)) + b"\r\n"),
        (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: y\r\n" + b" folded\r\n" * 100_000 + b"\r\n",),
        (b"A" * (4 << 20),),
        (b"\r\n" * 100_000,),
    ]
    for pieces in endless:
        check_refused(victim.raw(*pieces, timeout=3), pieces[0][:40])
    assert victim.rss() - before < 32 << 20


def test_connections_that_say_nothing_or_little(victim: House) -> None:
    """Many of them at once; others are served meanwhile. What ends them is looked at with shorter times elsewhere."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connection(victim)) for _ in range(100)]
        for i, made in enumerate(slow):
            made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: aaaaaaaaa"[: 1 + i % 60])
        for _ in range(5):
            assert victim.post(content=BODY).status_code == 200
            for made in slow[:10]:
                with contextlib.suppress(OSError):
                    made.sendall(b"a")
    with contextlib.ExitStack() as stack:  # bodies that do not come
        for _ in range(30):
            stack.enter_context(connection(victim)).sendall(head(b"Content-Length: 1000\r\n") + b"{")
        assert victim.post(content=BODY).status_code == 200


@pytest.mark.slow
def test_who_takes_forever_is_closed(victim: House) -> None:
    begin = time.monotonic()
    with connection(victim) as made:
        made.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        made.settimeout(60)
        assert made.recv(1000) == b""
    assert time.monotonic() - begin > 1


# ---------------------------------------------------------------- bodies


@pytest.mark.advisory("CVE-2025-23310", "CVE-2025-23311")
def test_chunks_of_every_kind(victim: House) -> None:
    chunked = b"Transfer-Encoding: chunked\r\n"
    one_byte = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    assert statuses(victim.raw(head(chunked, CLOSE), one_byte)) == [200]
    padded = b"1\r\n \r\n" * 100_000 + one_byte
    assert statuses(victim.raw(head(chunked, CLOSE), padded)) == [200]
    beyond = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert statuses(victim.raw(head(chunked), *[beyond] * 40, timeout=2)) in ([413], [])
    for bad in (
        b"ZZ\r\n",
        b"-1\r\n",
        b"0x5\r\n12345\r\n0\r\n\r\n",
        b"ffffffffffffffff1\r\n",
        b"7fffffffffffffff\r\n",
        b"5\n12345\n0\n\n",
        b"5;" + b"x" * 100_000 + b"\r\n12345\r\n0\r\n\r\n",
        b"5\r\n123456789\r\n0\r\n\r\n",
        b"0\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"\r\n\r\n",
        b"",
    ):
        answer = victim.raw(head(chunked), bad, timeout=2)
        check_refused(answer, bad[:30])


def test_requests_inside_requests(victim: House) -> None:
    """A second request that a proxy in front would not have seen is never answered."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + KEY + b"\r\n"
    long = str(len(hidden)).encode()
    for lines, body in (
        ((b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"), b"0\r\n\r\n" + hidden),
        ((b"Transfer-Encoding: chunked\r\n", b"Content-Length: " + long + b"\r\n"), b"0\r\n\r\n" + hidden),
        ((b"Content-Length: 0\r\n", b"Content-Length: " + long + b"\r\n"), hidden),
        ((b"Content-Length: 0, " + long + b"\r\n",), hidden),
        ((b"Content-Length: +0\r\n",), hidden),
        ((b"Content-Length : 0\r\n",), hidden),
        ((b"Content-Length: -1\r\n",), hidden),
        ((b"Content-Length: 0x0\r\n",), hidden),
        ((b"Transfer-Encoding: xchunked\r\n",), b"0\r\n\r\n" + hidden),
        ((b"Transfer-Encoding: identity, chunked, identity\r\n",), b"0\r\n\r\n" + hidden),
        ((b"Transfer-Encoding : chunked\r\n",), b"0\r\n\r\n" + hidden),
        ((b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n"), b"0\r\n\r\n" + hidden),
        ((b"X: y\rContent-Length: 0\r\n",), hidden),
        ((b"X: y\nContent-Length: 0\r\n",), hidden),
        ((b"X: \x00\r\n",), hidden),
    ):
        answer = victim.raw(head(*lines), body, timeout=1)
        assert 200 not in statuses(answer), (lines, answer[:500])
        assert b'"object":"list"' not in answer, (lines, answer[:500])


@pytest.mark.advisory("CVE-2024-12886", "CVE-2026-66959", "CVE-2026-66960")
def test_compressed_bodies_stay_compressed(victim: House) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    before = victim.rss()
    for name, encoding in itertools.product(
        ("Content-Encoding", "Transfer-Encoding"), ("gzip", "deflate", "br", "zstd")
    ):
        lines = f"{name}: {encoding}\r\nContent-Length: {len(bomb)}\r\n".encode()
        answer = victim.raw(head(lines, CLOSE), bomb)
        check_refused(answer, (name, encoding))
    for encoding in ("gzip", "GZIP", "gzip, identity", "x-gzip"):
        response = victim.post(content=bomb, headers={"Content-Encoding": encoding})
        assert response.status_code == 415, encoding
    assert victim.rss() - before < 32 << 20


def test_bodies_that_are_no_json_by_name(victim: House) -> None:
    """A page of another origin can send these without asking first, so they must do nothing."""
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/jsonx",
    ):
        response = victim.post(content=BODY, headers={"Content-Type": kind, "Origin": "https://evil.example"})
        check_refusal(response, kind)
        assert response.status_code == 415


# ---------------------------------------------------------------- hosts, origins, paths, methods


HOSTS = [
    *(
        b"a/b?",
        b"a#",
        b"a\\",
        b"x/v1/models?",
        b"localhost/health?",
        b"localhost#",
        b"localhost\\@evil",
        b"evil.example",
    ),
    *(
        b"localhost.evil.example",
        b"127.0.0.1.nip.io",
        b"localhost.",
        b"",
        b"*",
        b"[::1",
        b"localhost:99999999",
        b"\xff",
        b"0",
    ),
    *(b"user@localhost", b"localhost, evil", b"2130706433", b"0x7f.1", b"localhost:8000:8000"),
]


@pytest.mark.advisory("CVE-2026-48746", "CVE-2026-48710", "CVE-2024-28224", "CVE-2025-62593")
def test_no_host_name_opens_a_route(victim: House) -> None:
    """Every route, without a key, under every name that ever moved a path: never 200 where a key is needed."""
    paths = [
        path.replace("{model:path}", "tiny").encode() for path, policy in POLICIES.items() if policy.scope == INFER
    ]
    assert len(paths) >= 7
    for path, host in itertools.product(paths, HOSTS):
        for method in (b"GET", b"POST"):
            request = method + b" " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
            answer = victim.raw(request)
            assert set(statuses(answer)) & {400, 401, 403, 405, 429}, (path, host, answer[:200])
    targets = [
        b"http://localhost/v1/models",
        b"//v1/models",
        b"/v1/../v1/models",
        b"/health/../v1/models",
        b"/%76%31/models",
    ]
    targets += [
        b"/V1/models",
        b"/v1/models;x",
        b"/v1/models#/health",
        b"/v1/models?/health",
        b"/v1//models",
        b"*",
        b"/v1/models/.",
    ]
    targets += [
        b"/health/%2e%2e/v1/models",
        b"\\v1\\models",
        b"/v1/models%00",
        b"/./v1/models",
        b"/version/../v1/models",
    ]
    for target in targets:
        answer = victim.raw(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        found = statuses(answer)
        assert found, target
        assert set(found) <= {400, 401, 403, 404, 405, 429}, (target, answer[:200])
    for two in (b"Host: localhost\r\nHost: evil.example\r\n", b"Host: evil.example\r\nHost: localhost\r\n", b""):
        answer = victim.raw(b"GET /v1/models HTTP/1.1\r\n" + two + b"Connection: close\r\n\r\n")
        assert 200 not in statuses(answer), two


def test_pages_of_other_origins_get_no_leave(victim: House) -> None:
    with victim.client(Origin="https://evil.example") as client:
        for method, path in itertools.product(
            ("GET", "POST", "OPTIONS", "DELETE"), ("/v1/models", "/v1/completions", "/metrics")
        ):
            ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
            response = client.request(method, path, headers=ask)
            assert not [name for name in response.headers if name.startswith("access-control")], (method, path)
            assert method != "OPTIONS" or response.status_code == 405


@pytest.mark.advisory(
    *("CVE-2023-48022", "CVE-2026-27482", "CVE-2023-43654", "CVE-2024-35198", "CVE-2025-10164", "CVE-2026-86793"),
    *("CVE-2026-15976", "CVE-2026-92972", "CVE-2026-76850", "CVE-2026-119706", "CVE-2025-23327", "CVE-2026-114052"),
    *("CVE-2025-63389", "CVE-2025-23319", "CVE-2025-23320", "CVE-2025-23334"),
)
def test_there_is_no_administrators_door(victim: House) -> None:
    paths = [
        *(
            "/update_weights_from_tensor",
            "/update_weights_from_disk",
            "/update_weights",
            "/load_lora_adapter",
            "/pause",
        ),
        *("/admin", "/shutdown", "/reset_prefix_cache", "/sleep", "/wake_up", "/invocations", "/generate", "/route"),
        *("/v1/load_lora_adapter", "/api/jobs", "/api/pull", "/api/create", "/models", "/v2/repository/index"),
        *("/v2/systemsharedmemory", "/v2/logging", "/flush_cache", "/start_profile", "/get_internal_state", "/debug"),
        *(
            "/docs",
            "/redoc",
            "/console",
            "/.env",
            "/.git/config",
            "/static/../../etc/passwd",
            "/v1/files",
            "/collective_rpc",
        ),
    ]
    with victim.client() as client:
        for path, method in itertools.product(paths, ("GET", "POST", "PUT", "DELETE", "PATCH")):
            response = client.request(method, path, json={} if method in ("POST", "PUT", "PATCH") else None)
            assert response.status_code == 404, (method, path)
            check_tells_nothing(response)


@pytest.mark.advisory("CVE-2025-63389", "CVE-2026-48746", "CVE-2026-27482")
def test_every_route_and_method_wants_the_key(victim: House) -> None:
    methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")
    with victim.client(Authorization="Bearer wrong", **{"Content-Type": "application/json"}) as client:
        for (path, policy), method in itertools.product(POLICIES.items(), methods):
            if policy.scope == INFER:
                response = client.request(method, path.replace("{model:path}", "tiny"), content=b"{}")
                assert response.status_code in (400, 401, 404, 405, 429), (method, path, response.status_code)
                check_tells_nothing(response)


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 1000, b"GET\r\n\r\n"]
)
def test_what_is_no_http(victim: House, junk: bytes) -> None:
    check_refused(victim.raw(junk, timeout=3), junk)


def test_upgrades_and_tunnels(victim: House) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"
    assert 101 not in statuses(victim.raw(head(upgrade, path=b"/v1/models", method=b"GET"), timeout=1))
    assert 200 not in statuses(victim.raw(b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n", timeout=1))
    h2c = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    assert 101 not in statuses(victim.raw(head(h2c, path=b"/v1/models", method=b"GET"), timeout=1))


# ---------------------------------------------------------------- who listens, and what is written


@pytest.mark.advisory(
    *("CVE-2025-30202", "CVE-2025-47277", "CVE-2024-11041", "CVE-2025-29783", "CVE-2025-30165", "CVE-2025-32444"),
    *("CVE-2026-3059", "CVE-2026-3060", "CVE-2026-3989", "CVE-2024-42478", "CVE-2025-51471"),
)
def test_one_port_is_open_and_the_engines_socket_is_private(victim: House) -> None:
    family = [victim.process.pid, *descendants(victim.process.pid)]
    inodes = set()
    for pid in family:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    listening, speaking = [], []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if f"socket:[{columns[9]}]" not in inodes:
                continue
            if columns[3] == "0A" or table.startswith("udp"):
                listening.append(columns[1])
            elif not columns[1].endswith(f":{victim.port:04X}"):
                speaking.append(columns[2])
    assert listening == [f"0100007F:{victim.port:04X}"]
    assert not speaking  # it calls nobody
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    paths = {Path(columns[7]) for columns in sockets if len(columns) > 7 and f"socket:[{columns[6]}]" in inodes}
    files = [path for path in paths if path.exists()]
    for path in files:  # where one is left at all: both ends are connected
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert path.parent.stat().st_mode & 0o777 == 0o700, path


@pytest.mark.advisory("CVE-2025-23327")
def test_no_caller_writes_a_line_of_the_log(victim: House) -> None:
    begin = victim.log.stat().st_size
    evil = 'x\r\n{"level":"info"}\x1b[2J\u2028\x00'
    with victim.client() as client:
        client.post("/v1/completions", json={"prompt": evil, "n": evil})
        client.post("/v1/completions", json={"prompt": "x", "model": evil, "user": evil, evil: 1})
        client.get("/v1/models/%0d%0a%7b%22level%22%3a%22forged%22%7d%1b[2J")
        client.get("/" + "a" * 10_000)
        client.get("/v1/models", headers={"X-Request-Id": "forged", "User-Agent": "\x1b[2J"})
    victim.raw(b"GET /v1/models\x1b[2J HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \x1b[2J\r\n\r\n", timeout=3)
    with victim.log.open("rb") as log:
        log.seek(begin)
        lines = log.read().decode().splitlines()
    assert lines
    for line in lines:
        assert len(line) <= 10_000
        assert line.isprintable()
        entry = json.loads(line)
        assert set(entry) >= {"time", "level", "logger", "message"}
        assert entry["level"] != "forged"


@pytest.mark.advisory("CVE-2026-22778", "CVE-2026-54236")
def test_no_key_and_no_prompt_is_written_anywhere(victim: House) -> None:
    canary = "canary-prompt-77ab"
    with victim.client() as client:
        for path, body in (
            ("/v1/completions", {"prompt": canary, "max_tokens": 2}),
            ("/v1/completions", {"prompt": canary, "n": "bad"}),
            ("/v1/completions", {"prompt": [canary, 1]}),
            ("/v1/completions", {"prompt": canary * 10_000}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": canary}], "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": canary, "extra": 1}, {"role": canary}]}),
            ("/tokenize", {"prompt": canary}),
        ):
            client.post(path, json=body)
            client.post(path + "?key=" + KEYS[0], json=body)
        texts = [client.get(path).text for path in ("/metrics", "/version", "/openapi.json", "/v1/models", "/nothing")]
    texts.append(victim.log.read_text())
    for pid in (victim.process.pid, *descendants(victim.process.pid)):
        texts.append(Path(f"/proc/{pid}/cmdline").read_text())
        if pid != victim.process.pid:
            texts.append(Path(f"/proc/{pid}/environ").read_text())
    for text in texts:
        for secret in (canary, *KEYS):
            assert secret not in text, text[max(text.index(secret) - 200, 0) :][:300]
