"""What the fleet does for real: two replicas of a small model on this machine, by HTTP through Serve's own proxy.

python -m quire.deploy.ray.measure routing     hit tokens and throughput, prefix-aware, by two choices and at random
python -m quire.deploy.ray.measure kill        a replica is killed under load: who is lost, and when it is replaced
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

MODEL = Path(__file__).parents[2] / "models" / "quire-py-1m"
APP = "quire"
OBJECT_STORE_BYTES = 100 << 20  # calls and parts of answers are small, and pass by
WAIT_SECONDS = 300.0  # for what takes seconds, on a machine that may be busy with other things


@dataclass(frozen=True, kw_only=True)
class Talks:
    """Sessions of chat that take turns: each answers when it is its place in the queue, so that all are remembered at
    once. sizes in words, a little over two tokens each.
    """

    sessions: int = 32
    turns: int = 6
    concurrency: int = 4
    system: int = 20  # the same for all sessions
    message: int = 50
    answer: int = 24  # tokens
    seed: int = 0


@dataclass(slots=True)
class Answer:
    """error: "" = complete."""

    began: float
    ended: float = 0.0
    first: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    streamed: bool = True
    text: str = ""
    error: str = ""


@dataclass
class Load:
    """What came of a load."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max(a.ended for a in self.answers) - min(a.began for a in self.answers)

    @property
    def hit_tokens(self) -> int:
        return sum(a.cached_tokens for a in self.answers)

    @property
    def finished(self) -> int:
        return sum(not a.error for a in self.answers)

    def summary(self) -> dict[str, Any]:
        prompt_tokens = sum(a.prompt_tokens for a in self.answers)
        firsts = sorted(a.first - a.began for a in self.answers if a.first)
        return {
            "requests": len(self.answers),
            "finished": self.finished,
            "prompt_tokens": prompt_tokens,
            "hit_tokens": self.hit_tokens,
            "hit_share": round(self.hit_tokens / max(prompt_tokens, 1), 4),
            "requests_per_second": round(len(self.answers) / self.seconds, 2),
            "tokens_per_second": round((prompt_tokens + sum(a.tokens for a in self.answers)) / self.seconds, 1),
            "ttft_p50_ms": round(1000 * firsts[len(firsts) // 2], 1) if firsts else None,
        }


# ---------------------------------------------------------------- the fleet


@contextmanager
def cluster() -> Iterator[str]:
    """Ray and Serve on this machine alone, on a free port; its address. Nothing of it is left."""
    import ray
    from ray import serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        num_cpus=4,  # what Ray may hand out, not what there is: replicas take one each
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def run(**settings: Any) -> None:
    """The application with these settings, in place of one that runs; returns when it serves."""
    from ray import serve

    from .app import build

    usual = {"model": str(MODEL), "replicas": 2, "dtype": "float32", "log-level": "warning"}
    serve.run(build(usual | settings), name=APP, route_prefix="/")


def kill_replica() -> str:
    """End one engine's actor, as a machine that fails would; its name."""
    import ray

    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    name = min(name for name in names if "#Engine#" in name)
    ray.kill(ray.get_actor(name, namespace="serve"))
    return name.rpartition("#")[2]


async def replicas(http: aiohttp.ClientSession, url: str) -> set[str]:
    """Names of those that answer."""
    try:
        async with http.get(f"{url}/metrics") as response:
            page = await response.text()
    except aiohttp.ClientError:
        return set()
    lines = [line for line in page.splitlines() if line.startswith("quire_num_requests_running{")]
    return {line.partition('replica="')[2].partition('"')[0] for line in lines}


# ---------------------------------------------------------------- the load


def words(draw: random.Random, count: int) -> str:
    """Text of a kind that the small model has seen."""
    return " ".join(draw.choices(WORDS, k=count))


WORDS = (
    "def",
    "return",
    "self",
    "class",
    "for",
    "in",
    "range",
    "if",
    "else",
    "while",
    "print",
    "value",
    "name",
    "data",
)


async def ask(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """One chat, streamed or whole as `body` says. What goes wrong is in the answer."""
    answer = Answer(time.monotonic(), streamed=bool(body.get("stream")))
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:200]}"
            elif answer.streamed:
                await _read_events(response, answer)
            else:
                content = json.loads(await response.read())
                answer.text = content["choices"][0]["message"]["content"]
                _count(answer, content["usage"])
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        answer.error = type(error).__name__
    answer.ended = time.monotonic()
    return answer


async def _read_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    answer.error = "the stream ended in silence"
    async for line in response.content:
        if line.startswith(b"data: [DONE]"):
            if answer.error == "the stream ended in silence":
                answer.error = ""
        elif line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                answer.error = event["error"]["code"]
                continue
            answer.first = answer.first or time.monotonic()
            answer.text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if event.get("usage"):
                _count(answer, event["usage"])


def _count(answer: Answer, usage: dict[str, Any]) -> None:
    answer.prompt_tokens = usage["prompt_tokens"]
    answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    answer.tokens = usage["completion_tokens"]


def session_to(timeout: float = WAIT_SECONDS) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout))


async def talk(url: str, talks: Talks) -> Load:
    """All turns of all sessions; a session that has had its turn goes to the end of the queue."""
    draw = random.Random(talks.seed)
    system = {"role": "system", "content": words(draw, talks.system)}
    queue = deque([[system] for _ in range(talks.sessions)])
    left = dict.fromkeys(map(id, queue), talks.turns)
    load = Load()

    async def worker(http: aiohttp.ClientSession) -> None:
        while queue:
            said = queue.popleft()
            left[id(said)] -= 1
            said.append({"role": "user", "content": words(draw, talks.message)})
            answer = await ask(http, url, _body(said, talks.answer, stream=True))
            load.answers.append(answer)
            said.append({"role": "assistant", "content": answer.text})
            if left[id(said)]:
                queue.append(said)

    async with session_to() as http:
        await asyncio.gather(*(worker(http) for _ in range(talks.concurrency)))
    return load


def _body(messages: list[dict[str, str]], tokens: int, *, stream: bool) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "seed": 1, "stream": stream}
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


@dataclass
class Killed:
    load: Load
    name: str
    replaced_seconds: float

    def summary(self) -> dict[str, Any]:
        failures = [a for a in self.load.answers if a.error]
        return {
            "killed": self.name,
            "requests": len(self.load.answers),
            "finished": self.load.finished,
            "finished_share": round(self.load.finished / len(self.load.answers), 4),
            "lost_streams": sum(a.streamed for a in failures),
            "lost_whole": sum(not a.streamed for a in failures),
            "errors": sorted({a.error for a in failures}),
            "replaced_after_s": round(self.replaced_seconds, 1),
        }


async def kill_under_load(url: str, requests: int = 600, concurrency: int = 8, tokens: int = 128) -> Killed:
    """Every second request streams. A replica is killed after a third of them; they go on at least until it has been
    replaced.
    """
    draw, load = random.Random(1), Load()
    done = asyncio.Event()

    async def worker(http: aiohttp.ClientSession) -> None:
        while len(load.answers) < requests or not done.is_set():
            messages = [{"role": "user", "content": words(draw, 30)}]
            load.answers.append(await ask(http, url, _body(messages, tokens, stream=draw.random() < 0.5)))

    async def kill(http: aiohttp.ClientSession) -> tuple[str, float]:
        try:
            while len(load.answers) < requests // 3:
                await asyncio.sleep(0.01)
            before = await replicas(http, url)
            name = await asyncio.to_thread(kill_replica)
            began = time.monotonic()
            while len((await replicas(http, url)) - {name}) < len(before):
                if time.monotonic() - began > WAIT_SECONDS:
                    raise TimeoutError("the replica was not replaced")
                await asyncio.sleep(0.2)
            return name, time.monotonic() - began
        finally:
            done.set()

    async with session_to() as http:
        (name, seconds), *_ = await asyncio.gather(kill(http), *(worker(http) for _ in range(concurrency)))
    return Killed(load, name, seconds)


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m quire.deploy.ray.measure")
    parser.add_argument("what", choices=("routing", "kill"))
    parser.add_argument("--sessions", type=int, default=Talks.sessions)
    parser.add_argument("--turns", type=int, default=Talks.turns)
    parser.add_argument("--concurrency", type=int, default=None)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--num-blocks", type=int, default=None, help="of each replica's KV cache")
    args = parser.parse_args()
    cache = {} if args.num_blocks is None else {"num-blocks": args.num_blocks}
    with cluster() as url:
        if args.what == "kill":
            run(**cache)
            print(
                json.dumps(asyncio.run(kill_under_load(url, args.requests, args.concurrency or 8)).summary(), indent=1)
            )
            return
        for routing in ("random", "two_choices", "prefix"):
            run(routing=routing, **cache)
            talks = Talks(sessions=args.sessions, turns=args.turns, concurrency=args.concurrency or Talks.concurrency)
            print(routing, json.dumps(asyncio.run(talk(url, talks)).summary()), flush=True)


if __name__ == "__main__":
    main()
