"""The whole server as processes: it answers, survives what clients do, and ends well when anything is killed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

BODY = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


def alive(pid: int) -> bool:
    """Runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def complete(server: Any, **changes: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=BODY | changes, timeout=120)


def stream(server: Any, into: list[str], **changes: object) -> None:
    """Append every data line as it comes; the error's name if the connection breaks."""
    try:
        body = BODY | {"stream": True} | changes
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    into.append(line)
    except httpx.TransportError as error:
        into.append(type(error).__name__)


def text_of(lines: list[str]) -> str:
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_the_openai_client_gets_the_same_text_by_every_route(start_server: Callable[..., Any]):
    server = start_server()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt=BODY["prompt"], max_tokens=20, temperature=0)
    pieces = client.completions.create(model=model, prompt=BODY["prompt"], max_tokens=20, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
    ids = list(BODY["prompt"].encode())
    by_ids = client.completions.create(model=model, prompt=ids, max_tokens=20, temperature=0)
    assert by_ids.choices[0].text == whole.choices[0].text

    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=15, temperature=0, logprobs=True)
    deltas = client.chat.completions.create(model=model, messages=messages, max_tokens=15, temperature=0, stream=True)
    assert "".join(d.choices[0].delta.content or "" for d in deltas) == answer.choices[0].message.content
    assert answer.usage.prompt_tokens == len("<user>hello>")
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens

    # what was asked for and what was counted agree
    echo = client.completions.create(model=model, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    assert len(echo.choices[0].logprobs.token_logprobs) == len(ids) + 1
    assert echo.choices[0].logprobs.token_logprobs[0] is None


def test_many_at_once_equal_one_at_a_time_and_the_counters_add_up(start_server: Callable[..., Any]):
    server = start_server("--max-num-seqs", "6", "--num-blocks", "40", "--block-size", "16", "--max-model-len", "256")
    rng = random.Random(0)
    bodies = [
        {"prompt": [rng.randrange(256) for _ in range(rng.randrange(1, 150))], "max_tokens": rng.randrange(1, 25)}
        | ({"temperature": 1.0, "seed": i} if i % 2 else {})
        for i in range(24)
    ]
    alone = [complete(server, **body).json() for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda body: complete(server, **body).json(), bodies))
    assert [r["choices"] for r in together] == [r["choices"] for r in alone]
    usages = [r["usage"] for r in alone + together]
    assert server.metric("quire_generation_tokens_total") == sum(u["completion_tokens"] for u in usages)
    assert server.metric("quire_prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)


def test_kill_9_of_the_engine_ends_every_stream_within_two_seconds_and_leaves_no_orphan(
    start_server: Callable[..., Any],
):
    server = start_server()
    family = server.family()
    streams: list[list[str]] = [[] for _ in range(5)]
    long = {"max_tokens": 400, "n": 8, "temperature": 1.0}  # seconds: none may end before the last has begun
    threads = [
        threading.Thread(target=stream, args=(server, lines), kwargs=long | {"prompt": f"{i}"})
        for i, lines in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: all(streams))
    os.kill(server.engine_pid(), signal.SIGKILL)
    killed = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - killed < 2
    for lines in streams:
        assert lines[-1] == "data: [DONE]"
        assert "error" in json.loads(lines[-2].removeprefix("data: "))
    health = server.status("/health")
    assert health in (503, None), "503 while the server is still there"
    server.wait_for(lambda: server.process.poll() is not None or complete_status(server) == 503)
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(30)
    server.wait_for(lambda: not any(alive(pid) for pid in family))


def complete_status(server: Any) -> int | None:
    try:
        return complete(server).status_code
    except httpx.TransportError:
        return None


def test_kill_9_of_the_server_leaves_no_engine_behind(start_server: Callable[..., Any]):
    server = start_server()
    family = server.family()
    assert len(family) >= 2
    server.process.kill()
    server.process.wait()
    server.wait_for(lambda: not any(alive(pid) for pid in family), 10)


def test_a_stopped_engine_is_noticed_and_one_that_goes_on_is_well_again(start_server: Callable[..., Any]):
    server = start_server("--hang-timeout", "3")
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        server.wait_for(lambda: server.status("/health") == 503, 10)
        assert server.status("/ready") == 503
    finally:
        os.kill(pid, signal.SIGCONT)
    server.wait_for(lambda: server.status("/health") == 200, 10)
    assert complete(server).status_code == 200
    assert server.engine_pid() == pid
    assert server.metric("quire_engine_hung_total") == 1
    assert server.metric("quire_engine_restarts_total") == 0


def test_sigterm_lets_running_streams_finish_and_refuses_new_ones(start_server: Callable[..., Any]):
    server = start_server()
    expected = complete(server, max_tokens=300).json()["choices"][0]["text"]
    lines: list[str] = []
    thread = threading.Thread(target=stream, args=(server, lines), kwargs={"max_tokens": 300})
    thread.start()
    server.wait_for(lambda: server.metric("quire_generation_tokens_total") > 305)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.status("/ready") in (503, None), 5)
    refused = complete_status(server)
    thread.join(60)
    assert text_of(lines) == expected
    assert refused in (503, None)
    assert server.process.wait(30) == 0


def test_clients_that_leave_give_back_every_block(start_server: Callable[..., Any]):
    """A thousand requests cut off at random moments, streaming or not, while one stream goes on undisturbed."""
    server = start_server("--max-num-seqs", "32", "--max-queued-requests", "2000", "--max-model-len", "512")
    expected = complete(server, max_tokens=400, prompt="victim").json()["choices"][0]["text"]
    victim: list[str] = []
    thread = threading.Thread(target=stream, args=(server, victim), kwargs={"max_tokens": 400, "prompt": "victim"})
    thread.start()

    def leave(i: int) -> None:
        rng = random.Random(i)
        body = json.dumps(BODY | {"prompt": "x" * rng.randrange(1, 100), "max_tokens": 300, "stream": i % 2 == 0})
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            time.sleep(rng.random() * 0.2)
            if i % 3 == 0:  # a reset instead of a goodbye
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(leave, range(1000)))
    thread.join(120)
    assert text_of(victim) == expected
    server.wait_for(lambda: server.metric("quire_num_requests_running") == 0)
    server.wait_for(lambda: server.metric("quire_num_requests_waiting") == 0)
    server.wait_for(lambda: server.metric("quire_kv_cache_usage_perc") == 0)
    assert complete(server, max_tokens=400, prompt="victim").json()["choices"][0]["text"] == expected


def test_bad_requests_leave_a_greedy_stream_as_it_was(start_server: Callable[..., Any]):
    server = start_server()
    expected = complete(server, max_tokens=450).json()["choices"][0]["text"]
    victim: list[str] = []
    thread = threading.Thread(target=stream, args=(server, victim), kwargs={"max_tokens": 450})
    thread.start()
    prompts = ("", [], [[]], None, [-1], [300], [2**63], [1.5], "x" * 10**6)
    bad: list[dict[str, object]] = [{"prompt": prompt} for prompt in prompts]
    numeric = ("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "presence_penalty")
    bad += [{name: value} for name in numeric for value in (-(2**63) - 1, 2**70, "1", [1], {}, True, 1e308)]
    bad += [{"stop": value} for value in ("", ["a", ""], "x" * 2**20, [1], 7)]
    bad += [{"model": "no-such-model"}, {"logit_bias": {"999": 1}}, {"stop_token_ids": [300]}, {"n": 4}]
    for changes in bad:
        response = complete(server, **changes)
        assert 400 <= response.status_code < 500, (changes, response.text[:200])
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for raw in (b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": NaN}', b"null"):
        response = httpx.post(
            f"{server.url}/v1/completions", content=raw, headers={"content-type": "application/json"}, timeout=60
        )
        assert 400 <= response.status_code < 500, (raw, response.text[:200])
    thread.join(120)
    assert text_of(victim) == expected


def test_a_bad_folder_is_reported_before_any_port_opens(tiny_model: Path, tmp_path: Path):
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    run = subprocess.run(
        [sys.executable, "-P", "-m", "quire.server.cli", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert "listening" not in run.stderr + run.stdout
    assert "num_attention_heads" in run.stderr + run.stdout
    assert "Traceback" not in run.stderr + run.stdout
