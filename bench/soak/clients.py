"""Clients over real sockets: who stays to the end, who leaves in the middle, and who must not notice either."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import aiohttp
import msgspec

from ..client import COMPLETIONS, DONE
from ..sse import EventReader
from .mix import Ask
from .served import LOOK_SECONDS, SoakError

PATIENCE = aiohttp.ClientTimeout(total=600)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, no time; closing sends a reset instead of an end


@dataclass(slots=True)
class Answer:
    """What one request came to, on time.monotonic()."""

    status: int = 0
    code: str = ""  # of the error, which may come after the stream has begun
    text: str = ""
    finished: int = 0  # samples with a finish_reason
    done: bool = False  # [DONE] came, or the whole body
    sent: float = field(default_factory=time.monotonic)
    began: float = 0.0  # the first event, or the body; the end of one of which nothing came
    ended: float = 0.0

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.code and self.done and self.finished > 0


@asynccontextmanager
async def session(*, resets: bool = False) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections that serve one request each; with `resets` they close by RST, otherwise by FIN."""

    def opened(address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        if resets:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return made

    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=opened)
    async with aiohttp.ClientSession(connector=connector, timeout=PATIENCE) as opened_session:
        yield opened_session


async def stay(
    http: aiohttp.ClientSession, url: str, ask: Ask, headers: dict[str, str] | None = None, into: Answer | None = None
) -> Answer:
    """Read the answer to its end, whatever it is; a broken connection is an answer of which nothing more came."""
    answer = into or Answer()
    try:
        async with http.post(url + ask.path, json=ask.body, headers=headers) as response:
            answer.status = response.status
            if response.content_type == "text/event-stream":
                reader = EventReader()
                async for piece in response.content.iter_any():
                    for data in reader.feed(piece):
                        answer.began = answer.began or time.monotonic()
                        if data == DONE:
                            answer.done = True
                        else:
                            _take(answer, msgspec.json.decode(data))
            else:
                _take(answer, msgspec.json.decode(await response.read()))
                answer.done = True
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
        answer.code = answer.code or type(error).__name__
    answer.ended = time.monotonic()
    answer.began = answer.began or answer.ended
    return answer


def _take(answer: Answer, payload: dict[str, Any]) -> None:
    if "error" in payload:
        answer.code = payload["error"]["code"]
    for choice in payload.get("choices", ()):
        said = choice.get("delta") or choice.get("message") or choice
        answer.text += said.get("text") or said.get("content") or ""
        answer.finished += choice.get("finish_reason") is not None


MOMENTS = ("sending", "queued", "prefill", "decode", "last")


async def leave(http: aiohttp.ClientSession, url: str, ask: Ask, rng: random.Random, pace: Pace) -> str:
    """Begin a request and leave it at a random one of MOMENTS; "ended" if it was faster. A stream is left by what has
    come of it, a whole answer by the time that such ones take. Raises SoakError if the request is refused."""
    moment = rng.choice(MOMENTS)
    seconds = pace.moment(moment, ask, rng)
    pieces = rng.randint(1, 8) if moment == "decode" else None
    body = msgspec.json.encode(ask.body)
    begin = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            data = _half_of(body) if moment == "sending" else body
            async with http.post(url + ask.path, data=data, headers={"Content-Type": "application/json"}) as response:
                if response.status != 200:
                    raise SoakError(f"HTTP {response.status} {await response.text()} to {body[:300].decode()}")
                for number in count(1):
                    piece = await response.content.readany()
                    if not piece:
                        pace.learn(ask, time.monotonic() - begin)
                        return "ended"
                    if number == pieces or (moment == "last" and b'"finish_reason":"' in piece):
                        return moment
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass
    return moment


async def _half_of(body: bytes) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    await asyncio.Event().wait()


class Pace:
    """How long whole answers take here and now, by their length: what moments to leave them at are made from."""

    def __init__(self) -> None:
        self._seconds_per_token = 0.01

    def moment(self, moment: str, ask: Ask, rng: random.Random) -> float | None:
        """Seconds after which the client leaves; None: it leaves by what it reads."""
        whole = self._seconds_per_token * ask.body["max_tokens"]
        match moment:
            case "sending" | "queued":
                return rng.uniform(0, 0.02)
            case "prefill":
                return rng.uniform(0.02, 0.02 + 0.2 * whole)
            case _ if ask.body["stream"]:
                return None
            case "decode":
                return rng.uniform(0.2 * whole, whole)
            case _:
                return rng.uniform(0.9 * whole, 1.2 * whole)

    def learn(self, ask: Ask, seconds: float) -> None:
        """A request that was not left in time took so long."""
        self._seconds_per_token += 0.1 * (seconds / ask.body["max_tokens"] - self._seconds_per_token)


# Without guesses of a model, which change what a seed draws; on a server with --dtype float32, where sums do not depend
# on who else is in the batch.
VICTIM = Ask(
    COMPLETIONS,
    {
        "prompt": "def read(path):",
        "max_tokens": 64,
        "temperature": 0.8,
        "seed": 5,
        "ignore_eos": True,
        "stream": True,
        "speculative": {"method": "none"},
    },
)


class Victim:
    """Somebody who asks the same again and again, and must always get what was said when nobody else was there."""

    def __init__(self) -> None:
        self.asked = self.changed = 0
        self._alone: str | None = None

    async def alone(self, http: aiohttp.ClientSession, url: str) -> None:
        self._alone = (await stay(http, url, VICTIM)).text

    async def go_on(self, http: aiohttp.ClientSession, url: str) -> None:
        """Until it is cancelled."""
        while True:
            answer = await stay(http, url, VICTIM)
            self.asked += 1
            self.changed += not answer.whole or answer.text != self._alone


async def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """As `wait_for`, while requests go on."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SoakError(f"{what} did not come within {seconds:g} s")
        await asyncio.sleep(LOOK_SECONDS)


@contextmanager
def in_background(*work: Any) -> Iterator[list[asyncio.Task[Any]]]:
    """These coroutines run meanwhile, and are cancelled then."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


class Standstill:
    """The longest time for which this process did not get to run: how far a time that it measured can be wrong."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            self.seconds = max(self.seconds, time.monotonic() - before - 0.01)
