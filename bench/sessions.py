"""Traffic with a memory: requests whose prompts repeat what was said before, as token ids.

multi_turn   people who talk with applications, beside programs that ask once and programs that draw many samples
adversarial  whatever looks worth keeping is never wanted again, and the other way round; roles change
scan         the same prompts in a circle, a little more than a cache holds
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

VOCABULARY = 32_000


class TraceRequest(NamedTuple):
    """One request of a trace, with the answers it will get.

    time     of arrival [s]
    prompt   token ids
    outputs  token ids of each of its n samples
    tenant   the application that sends it
    """

    time: float
    prompt: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    tenant: str

    @property
    def n(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True, kw_only=True)
class App:
    """What one application sends: a share of the traffic, lengths in tokens, times in seconds.

    Lengths and gaps are lognormal: (median, sigma of the logarithm).
    """

    tenant: str
    share: float  # of all sessions
    system: int  # length of the system prompt
    message: tuple[float, float]
    answer: tuple[float, float]
    stay: float = 0.0  # chance that a session goes on after a turn
    gap: tuple[float, float] = (45.0, 1.4)  # from an answer to the next message: a mean of 2 min, 1 % above 19 min
    n: int = 1


# Shares and lengths are chosen so that most blocks are never wanted again and most hits are conversations, as traces of
# hosted chat show; `portal` sends both, so that the tenant alone tells nothing.
APPS = (
    App(tenant="assistant", share=0.08, system=300, message=(60, 0.8), answer=(180, 0.7), stay=0.80),
    App(tenant="support", share=0.05, system=600, message=(40, 0.6), answer=(120, 0.6), stay=0.65),
    App(tenant="coding", share=0.02, system=200, message=(250, 0.9), answer=(300, 0.7), stay=0.85),
    App(tenant="portal", share=0.03, system=250, message=(80, 0.8), answer=(150, 0.7), stay=0.75),
    App(tenant="portal", share=0.10, system=250, message=(300, 0.6), answer=(60, 0.6)),
    App(tenant="extract", share=0.45, system=400, message=(1200, 0.7), answer=(60, 0.5)),
    App(tenant="classify", share=0.20, system=150, message=(200, 0.6), answer=(8, 0.3)),
    App(tenant="sampler", share=0.07, system=100, message=(150, 0.6), answer=(200, 0.6), n=4),
)


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """`sessions` begin within `seconds`, as a Poisson process; a one-shot request is a session of one turn."""

    sessions: int = 2000
    seconds: float = 3600.0
    context: int = 4096  # tokens of prompt and answer at most: a session ends there
    decode_seconds: float = 0.02  # a token
    apps: tuple[App, ...] = APPS


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(VOCABULARY), k=count))


def _lognormal(draw: random.Random, law: tuple[float, float]) -> float:
    return law[0] * draw.lognormvariate(0.0, law[1])


def multi_turn(config: SessionConfig, seed: int) -> list[TraceRequest]:
    """Sessions of all applications, by time."""
    draw = random.Random(seed)
    systems = {tenant: _tokens(draw, 4096) for tenant in sorted({app.tenant for app in config.apps})}
    starts = sorted(draw.uniform(0, config.seconds) for _ in range(config.sessions))
    apps = draw.choices(config.apps, [app.share for app in config.apps], k=config.sessions)
    requests = [
        request
        for start, app in zip(starts, apps, strict=True)
        for request in _session(config, app, systems[app.tenant][: app.system], start, draw)
    ]
    return sorted(requests, key=lambda request: request.time)


def _session(
    config: SessionConfig, app: App, system: tuple[int, ...], start: float, draw: random.Random
) -> Iterator[TraceRequest]:
    said, time = system, start
    while True:
        prompt = said + _tokens(draw, 1 + int(_lognormal(draw, app.message)))
        outputs = tuple(_tokens(draw, 1 + int(_lognormal(draw, app.answer))) for _ in range(app.n))
        if len(prompt) + max(map(len, outputs)) > config.context:
            return
        yield TraceRequest(time, prompt, outputs, app.tenant)
        if draw.random() >= app.stay:
            return
        said = prompt + outputs[0]
        time += config.decode_seconds * len(outputs[0]) + _lognormal(draw, app.gap)


def scan(blocks: int, block_size: int, seed: int, *, rounds: int = 6) -> list[TraceRequest]:
    """A tenth more blocks of prompts than a cache of `blocks` holds, one a second, `rounds` times in the same order."""
    draw = random.Random(seed)
    length = 10 * block_size + 1
    texts = [_tokens(draw, length) for _ in range(blocks // 9)]
    return [TraceRequest(float(i), texts[i % len(texts)], ((0,),), "scan") for i in range(len(texts) * rounds)]


def adversarial(blocks: int, block_size: int, seed: int, *, rounds: int = 12) -> list[TraceRequest]:
    """Against a cache of `blocks` blocks: rounds that each fill it twice, then a scan.

    In a round one tenant draws two samples and comes back to one of them after half a cache, so that LRU finds it; the
    other talks twice at once, as in a conversation, and never again. In the next round they change roles, so that
    whatever was learned of them is wrong.
    """
    draw = random.Random(seed)
    prompt, answer = 8 * block_size, 4 * block_size
    per_step = (8 + 4 + 4) + 1 + (8 + 4) + (1 + 4)  # blocks: a first question, its return, and two turns of talk
    steps, lag = max(2, 2 * blocks // per_step), max(1, blocks // (2 * per_step))
    requests: list[TraceRequest] = []
    time = 0.0
    for turn in range(rounds):
        returning, leaving = ("a", "b") if turn % 2 == 0 else ("b", "a")
        asked: list[tuple[int, ...]] = []
        for step in range(steps):
            question, reply = _tokens(draw, prompt), _tokens(draw, answer)
            requests.append(TraceRequest(time, question, (reply, _tokens(draw, answer)), returning))
            asked.append(question + reply + _tokens(draw, 4))
            if step >= lag:
                requests.append(TraceRequest(time + 2, asked[step - lag], (_tokens(draw, 4),), returning))
            talk, said = _tokens(draw, prompt), _tokens(draw, answer)
            requests.append(TraceRequest(time + 4, talk, (said,), leaving))
            more = talk + said + _tokens(draw, block_size)
            requests.append(TraceRequest(time + 8, more, (_tokens(draw, answer),), leaving))
            time += 10
    requests += [request._replace(time=time + request.time) for request in scan(blocks, block_size, seed)]
    return sorted(requests, key=lambda request: request.time)
