"""A key, a hub token and a marker in every text that a request can hold: none is in anything that the server tells.

Told is: its log at the level of debugging, its metrics, spans, settings, description and errors, and how its objects
show themselves. What a caller sent comes back to that caller alone: as an answer, or as the value of a field that was
refused.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from security.house import House, wait_for

from quire.engine.config import EngineConfig
from quire.server.auth import POLICIES
from quire.server.config import ServerConfig
from quire.server.keys import KeyRing, plain_key

MARK = "canary-prompt-91ce"
TOKEN = "hf_canaryTokenOfTheHub0"
ADMIN_KEY = "canary-key-of-the-admin"
SECRETS = {"prompt": MARK, "hub token": TOKEN, "admin's key": ADMIN_KEY}

TOOL = {"name": "f", "description": MARK, "parameters": {"type": "object", "description": MARK, "properties": {}}}
PART = [{"type": "text", "text": MARK}]
LABELS = {"user": MARK, "metadata": {"note": MARK}, "prompt_cache_key": MARK, "cache_salt": MARK}
SAMPLING = {"max_tokens": 2, "stop": [MARK], "bad_words": [MARK], "ignore_eos": True, "logprobs": 1, "unknown": MARK}
CHAT = {
    "messages": [
        {"role": "system", "content": MARK},
        {"role": "user", "content": PART, "name": MARK},
        {"role": "assistant", "content": MARK, "reasoning": MARK},
        {"role": "user", "content": MARK},
    ],
    "tools": [{"type": "function", "function": TOOL}],
    **SAMPLING,
    "logprobs": True,
}
QUESTION = {"type": "choice", "name": MARK, "instructions": MARK, "choices": [{"value": MARK}, {"value": "b"}]}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": MARK, **SAMPLING, **LABELS}),
    ("/v1/completions", {"prompt": [MARK, MARK], "stream": True, "echo": True, **SAMPLING}),
    ("/v1/completions", {"prompt": MARK, "guided_choice": [MARK, "b"], "max_tokens": 30}),
    ("/v1/completions", {"prompt": MARK, "structured_outputs": {"regex": MARK}, "max_tokens": 30}),
    ("/v1/completions/render", {"prompt": MARK}),
    ("/v1/chat/completions", {**CHAT, **LABELS}),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/chat/completions", {"messages": CHAT["messages"], "functions": [TOOL], "max_tokens": 2}),
    ("/v1/chat/completions/render", CHAT),
    ("/v1/responses", {"input": MARK, "instructions": MARK, "max_output_tokens": 2, **LABELS}),
    ("/v1/responses", {"input": [{"role": "user", "content": MARK}], "max_output_tokens": 2, "stream": True}),
    ("/v1/messages", {"messages": [{"role": "user", "content": PART}], "system": MARK, "max_tokens": 2}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": MARK}]}),
    ("/v1/decisions", {"input": MARK, "questions": [QUESTION]}),
    ("/tokenize", {"prompt": MARK, "return_token_strs": True}),
    ("/detokenize", {"tokens": list(MARK.encode())}),
    ("/abort_requests", {"request_ids": ["x"]}),
]
# What makes each of them wrong, in a field that holds no secret.
SPOILED: list[dict[str, Any]] = [
    {"temperature": -1},
    {"tenant": "another"},
    {"timeout": 0},
    {"max_tokens": 10**6, "max_output_tokens": 10**6},
    {"prompt_embeds": "x"},
]


class _Collector(BaseHTTPRequestHandler):
    """Takes spans, and keeps their bytes in `taken` of its server."""

    def do_POST(self) -> None:
        self.server.taken.append(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Collector)
    server.taken = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def house(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, collector: HTTPServer) -> Iterator[House]:
    """A server that was given all secrets there are, and tells all it may."""
    folder = tmp_path_factory.mktemp("secrets")
    keys = folder / "keys.json"
    digest = hashlib.sha256(ADMIN_KEY.encode()).hexdigest()
    keys.write_text(json.dumps([{"name": "boss", "sha256": digest, "scopes": ["infer", "admin", "metrics"]}]))
    options = ["--api-keys-file", str(keys), "--log-level", "debug", "--max-model-len", "512"]
    options += ["--otlp-traces-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", TOKEN)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        server = House(tiny_model, folder, *options)
    server.headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def found_in(texts: dict[str, str]) -> list[str]:
    return [
        f"the {secret} is in {place}" for place, text in texts.items() for secret, s in SECRETS.items() if s in text
    ]


def test_what_is_told_holds_no_secret(house: House, collector: HTTPServer) -> None:
    told: dict[str, str] = {}
    with house.client() as client:
        for i, (path, body) in enumerate(BODIES):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, (path, body, answer.text)
            assert ADMIN_KEY not in answer.text
            assert TOKEN not in answer.text
            for spoiled in SPOILED:
                answer = client.post(path, json=body | spoiled)
                if answer.status_code != 200:
                    told[f"the error of {path} {i} for {spoiled}"] = answer.text
        assert len(told) > 30
        for name, content in (("half a body", f'{{"prompt": "{MARK}'), ("no object", f'["{MARK}"]')):
            answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400
            told[name] = answer.text
        assert client.get(f"/v1/models/{MARK}").status_code == 404
        told["a wrong key's error"] = client.get("/v1/models", headers={"Authorization": f"Bearer {MARK}"}).text
        for path in POLICIES:
            if not POLICIES[path].has_body and "{" not in path:
                told[path] = client.get(path).text
        assert "quire_generation_tokens_total" in told["/metrics"]
        assert "settings" in told["/server_info"]
    wait_for(lambda: len(b"".join(collector.taken)) > 1000, 60, "a batch of spans")  # type: ignore[attr-defined]
    told["the spans"] = b"".join(collector.taken).decode("latin-1")  # type: ignore[attr-defined]
    told["the log"] = house.log.read_text()
    assert "has the unknown field" in told["the log"]
    assert "GET /v1/models/{model:path} 404" in told["the log"]
    assert not found_in(told)


def test_a_planted_secret_is_found() -> None:
    assert found_in({"a line": f"GET /x?key={ADMIN_KEY}", "another": "nothing", "a span": TOKEN}) == [
        "the admin's key is in a line",
        "the hub token is in a span",
    ]


def test_objects_do_not_show_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("QUIRE_API_KEY", ADMIN_KEY)
    config = ServerConfig(api_key=(ADMIN_KEY,))
    shown = {
        "the server's settings": repr(config),
        "the engine's settings": repr(EngineConfig(model="x")),
        "a key": repr(plain_key(ADMIN_KEY)),
        "the ring of keys": repr(KeyRing((ADMIN_KEY,))) + repr(vars(KeyRing((ADMIN_KEY,)))),
    }
    assert not found_in(shown)
