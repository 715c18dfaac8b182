"""The front end's bench believes no stream that it has not checked, and its scripted engine says what it was told."""

from __future__ import annotations

import json

import pytest

from quire.bench import frontend
from quire.bench.client import ServerError
from quire.server.cli_bench_frontend import serve_scripted

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


WHOLE = HEAD + chunk(event("ab")) + chunk(event("c") + event("")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def test_a_whole_stream_is_counted_by_its_events() -> None:
    assert frontend._checked(WHOLE, "abc") == 2


@pytest.mark.parametrize(
    "spoiled",
    [
        WHOLE.replace(b'"c"', b'"d"'),
        WHOLE.replace(b"[DONE]", b"[DOME]"),
        WHOLE[: WHOLE.index(b"data: [DONE]") - 3] + b"0\r\n\r\n",
        WHOLE.replace(b"200 OK", b"503 No"),
    ],
)
def test_a_spoiled_stream_is_refused(spoiled: bytes) -> None:
    with pytest.raises(ServerError):
        frontend._checked(spoiled, "abc")


@pytest.mark.slow
def test_both_endpoints_are_measured_with_every_byte_checked() -> None:
    config = frontend.FrontendConfig(streams=(1, 3), tokens=60, repetitions=1)
    result = frontend.run(config, serve_scripted)
    assert [(row["endpoint"], row["streams"]) for row in result["measurements"]] == [
        ("completions", 1),
        ("completions", 3),
        ("chat", 1),
        ("chat", 3),
    ]
    for row in result["measurements"]:
        assert row["tokens"] == 60 * row["streams"] >= row["events"] > 0
        assert 0 < row["loop_us"] <= row["process_us"]
