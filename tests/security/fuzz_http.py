"""Bodies, requests by our own description of them, and bytes that are nearly HTTP: sent to a server, and judged."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
from security import house
from security.mutate import mutated_bytes, mutated_json
from security.tally import Tally


def check_answer(tally: Tally, response: httpx.Response, what: object) -> None:
    """Served, or refused with a typed 4xx; 503 and 429 where the house says that it is full."""
    if response.status_code < 400:
        tally.taken += 1
        return
    try:
        house.check_tells_nothing(response, what)
        error = response.json()["error"]
        assert {"message", "type"} <= set(error)
        assert response.status_code < 500 or response.status_code in (503, 504)
    except (AssertionError, ValueError, KeyError) as trouble:
        tally.troubles.append(f"{what!r:.200}: {response.status_code} {response.text[:200]} {trouble!r:.100}")
        return
    tally.refused += 1
    tally.how[f"{response.status_code} {error.get('code') or error['type']}"] += 1


@contextmanager
def running_house() -> Iterator[house.House]:
    from conftest import make_tiny_model, write_byte_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch, "tiny"), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        write_byte_tokenizer(model)
        server = house.House(model, Path(scratch), "--max-num-seqs", "8", "--request-timeout", "20")
        try:
            yield server.wait_until_ready()
        finally:
            server.kill()


Attack = Callable[[house.House, Tally, int, int], None]  # server, what comes of it, inputs, seed


def on_a_house(attack: Attack) -> Callable[[int, int], Tally]:
    """`attack` on a server of its own, whose engine must be the same in the end, idle and well."""

    def attacked(count: int, seed: int) -> Tally:
        tally = Tally()
        with running_house() as server:
            engine = server.engine_pid()
            attack(server, tally, count, seed)
            if server.engine_pid() != engine:
                tally.troubles.append("the engine is another one")
            house.wait_for(server.is_idle, house.SETTLE_SECONDS, "idleness after")
            if server.status("/ready") != 200:
                tally.troubles.append("not ready in the end")
        return tally

    return attacked


# Each as long as its route's fields have kinds, for the mutations to have something of each kind to spoil.
GOOD_BODIES: dict[str, dict[str, Any]] = json.loads("""
{
  "/v1/completions": {
    "prompt": "x", "max_tokens": 2, "n": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["a"],
    "logit_bias": {"5": 1.0}, "stop_token_ids": [5], "bad_words": ["b"], "logprobs": 1, "stream": false
  },
  "/v1/chat/completions": {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 2, "logprobs": true,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto", "stream_options": {"include_usage": true}, "stream": true
  },
  "/v1/responses": {
    "input": [{"role": "user", "content": "x"}], "max_output_tokens": 2, "stream": false, "tools": []
  },
  "/v1/messages": {
    "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "system": "s", "model": "tiny"
  },
  "/tokenize": {"prompt": "x", "add_special_tokens": true},
  "/detokenize": {"tokens": [1, 2, 3]}
}
""")


def bodies(server: house.House, tally: Tally, count: int, seed: int) -> None:
    """Bodies that are nearly right, as JSON and as bytes, on every route that takes one."""
    rng = random.Random(seed)
    json_type = {"Content-Type": "application/json"}
    with server.client() as client:
        for _ in range(count):
            path = rng.choice(list(GOOD_BODIES))
            body = mutated_json(rng, GOOD_BODIES[path])
            content = json.dumps(body).encode()
            if rng.random() < 0.2:
                content = mutated_bytes(rng, content)
            try:
                check_answer(tally, client.post(path, content=content, headers=json_type), (path, content))
            except httpx.TransportError as error:
                tally.troubles.append(f"{path} {content!r:.200}: {type(error).__name__}")


def described(server: house.House, tally: Tally, count: int, seed: int) -> None:
    """What schemathesis makes of our own /openapi.json: right by the schema, and wrong by it."""
    import schemathesis

    schema = schemathesis.openapi.from_dict(httpx.get(server.url + "/openapi.json", headers=server.headers).json())
    operations = [result.ok() for result in schema.get_all_operations()]
    with server.client() as client:
        for operation in operations:
            for mode in schemathesis.GenerationMode:
                with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                    _attempt(client, operation, mode, tally, max(count // (2 * len(operations)), 1), seed)


def _attempt(client: httpx.Client, operation: Any, mode: Any, tally: Tally, count: int, seed: int) -> None:
    try:
        cases = operation.as_strategy(generation_mode=mode)
    except Exception:  # a route without parameters has nothing to be wrong
        return

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def attempt(case: Any) -> None:
        request = case.as_transport_kwargs(base_url=str(client.base_url))
        request.pop("cookies", None)
        headers = {name: str(value) for name, value in (request.pop("headers", None) or {}).items()}
        try:
            answer = client.request(**request, headers={**headers, "Authorization": client.headers["Authorization"]})
        except (httpx.TransportError, UnicodeError, ValueError, TypeError) as error:  # what no client can send
            tally.how[f"not sent: {type(error).__name__}"] += 1
            return
        check_answer(tally, answer, (operation.label, request))

    attempt()


def raw(server: house.House, tally: Tally, count: int, seed: int) -> None:
    """Requests that are nearly HTTP: answered with a status below 500, or the connection is closed."""
    rng = random.Random(seed)
    key = f"Authorization: Bearer {house.KEYS[0]}\r\n"
    body = b'{"prompt": "x", "max_tokens": 1}'
    good = [
        f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{key}Connection: close\r\n\r\n".encode(),
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{key}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body,
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{key}Content-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
        + b"20\r\n"
        + body
        + b"\r\n0\r\n\r\n",
    ]
    for _ in range(count):
        data = mutated_bytes(rng, rng.choice(good))
        answer = server.raw(data, timeout=0.05)
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
        if status >= 500 and status != 503:
            tally.troubles.append(f"{data!r:.300}: {answer[:200]!r}")
        elif 200 <= status < 300:
            tally.taken += 1
        else:
            tally.refused += 1
            tally.how[str(status or "closed or waiting")] += 1
