"""A scripted engine behind the real HTTP side, and a tokenizer whose ids are bytes."""

from __future__ import annotations

import asyncio
import json
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineDeadError
from quire.engine.inproc import InprocClient
from quire.engine.messages import Abort, AddRequest, Chunk, EngineDead, EngineReady, StepOutputs, StepStats, Watch
from quire.scheduler.plan import TokenLogprob
from quire.server.app import create_app
from quire.server.config import ServerConfig

EOS = 256
VOCAB_SIZE = 320  # wider than the tokenizer, as real logits are
MAX_MODEL_LEN = 512
SMALL = {"dtype": "float32", "threads": 1, "num_blocks": 64, "block_size": 16, "max_num_seqs": 8, "check": True}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood | default('') }}"
)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level spelling with id = byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def make_folder(path: Path) -> Path:
    """A model folder without weights: token id = byte, 256 = <eos>."""
    path.mkdir()
    tokenizer = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": TEMPLATE}))
    (path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    (path / "generation_config.json").write_text(json.dumps({"top_k": 7, "temperature": 0.5}))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


def logprob_of(token_id: int) -> float:
    """A made-up figure that tells tokens apart."""
    return -(token_id % 16 + 1) / 16


def entry(token_id: int, num_top: int) -> TokenLogprob:
    rivals = [token_id, *((token_id + i) % 256 for i in range(1, VOCAB_SIZE))][: num_top if num_top >= 0 else None]
    return TokenLogprob(token_id, logprob_of(token_id), 1, tuple((rival, logprob_of(rival)) for rival in rivals))


class _Sample:
    def __init__(self, request: AddRequest, index: int, answer: list[int]) -> None:
        self.request = request
        self.index = index
        self.answer = answer
        self.done = 0


class FakeClient:
    """An engine that says what it is told to: `answer(request, sample index)` gives the ids it draws.

    One step gives every sample `tokens_per_step` ids. While `gate` is clear no step happens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer: Callable[[AddRequest, int], list[int]] = lambda request, index: [*b"Hello, world!", EOS]
        self.tokens_per_step = 1
        self.step_seconds = 0.0
        self.finish: str | None = None  # how its samples end, other than by their last token
        self.fail_request: str | None = None  # error text that the next step gives every sample
        self.num_cached = 0
        self.draft = 0  # ids that it guesses for each sample and step: all but the step's last one were right
        self.age = 0.0
        self.expires = True  # it ends what is past its timeout or deadline
        self.unreachable = False  # it refuses to begin whatever has a deadline
        self.facts: dict[str, Any] = {}  # of EngineReady, other than usual
        self.figures: dict[str, Any] = {}  # of StepStats
        self.gate = threading.Event()
        self.gate.set()
        self.added: list[AddRequest] = []
        self.aborted: list[str] = []
        self.watches: list[float] = []  # seconds for which it was to tell more
        self.told: dict[str, Any] = {}  # of StepOutputs, beside chunks and figures
        self.closed = False
        self._inbox: queue.SimpleQueue[AddRequest | Abort | EngineDead | None] = queue.SimpleQueue()
        self._running: list[_Sample] = []
        self._stats = StepStats(kv_blocks_total=100)
        self._dead = False

    def start(self, on_message: Callable[[StepOutputs | EngineDead], None]) -> EngineReady:
        self._on_message = on_message
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        usual = {
            "model_path": str(self.folder),
            "model_type": "llama",
            "num_parameters": 1000,
            "dtype": "float32",
            "device": "cpu",
            "vocab_size": VOCAB_SIZE,
            "max_model_len": MAX_MODEL_LEN,
            "max_logprobs": 20,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "max_n": 128,
            "scheduling_policy": "fcfs",
            "tenants": [],
            "step_cost": [],
            "block_size": 16,
            "num_blocks": 100,
            "eos_token_ids": [EOS],
            "kernels": {"attention": "reference"},
            "reasons": {"dtype": "asked for"},
            "startup_seconds": {"load": 0.5},
            "memory_bytes": {"weights": 4000},
        }
        return EngineReady(**{**usual, **self.facts})

    def report(self) -> None:
        """Send the figures of now, as an idle engine does."""
        self._on_message(StepOutputs([], self._figures(), **self.told))

    def send(self, message: AddRequest | Abort | Watch) -> None:
        if self._dead:
            raise EngineDeadError("gone")
        if isinstance(message, Watch):
            self.watches.append(message.seconds)
            return
        if isinstance(message, Abort):
            self.aborted += message.request_ids
        else:
            self.added.append(message)
        self._inbox.put(message)

    def heartbeat_age(self) -> float:
        return math.inf if self._dead else self.age

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.gate.set()
            self._inbox.put(None)
            self._thread.join(5)

    def die(self) -> None:
        self._dead = True
        self._inbox.put(EngineDead("planned by the test, in /secret/place"))

    @property
    def running(self) -> int:
        return len(self._running)

    def _loop(self) -> None:
        while True:
            message = self._inbox.get() if not self._running or not self._inbox.empty() else False
            if message is None:
                return
            if isinstance(message, EngineDead):
                self._on_message(message)
                return
            if isinstance(message, Abort):
                ids, index = message.request_ids, message.index
                ended = [s for s in self._running if s.request.request_id in ids and index in (None, s.index)]
                self._running = [s for s in self._running if s not in ended]
                if ended:
                    last_news = [Chunk(s.request.request_id, s.index, [], "abort") for s in ended]
                    self._on_message(StepOutputs(last_news, self._figures()))
                self._stats.aborted_total += len(message.request_ids)
            elif isinstance(message, AddRequest):
                self._stats.requests_total += 1
                self._running += [_Sample(message, i, self.answer(message, i)) for i in range(message.params.n)]
                self._stats.prompt_tokens_total += len(message.prompt_ids)
                continue  # take all that is there before the next step
            if not self._inbox.empty():
                continue
            while not self.gate.wait(0.005):
                self._expire()
                if not self._inbox.empty() or not self._running:
                    break
            else:
                self._expire()
                if self._running:
                    self._step()

    def _step(self) -> None:
        time.sleep(self.step_seconds)
        chunks = [self._advance(sample) for sample in self._running]
        self._running = [s for s, chunk in zip(self._running, chunks, strict=True) if chunk.finish_reason is None]
        self._stats.steps_total += 1
        self._stats.running = len(self._running)
        self._stats.generated_tokens_total += sum(len(chunk.token_ids) for chunk in chunks)
        self._on_message(StepOutputs(chunks, self._figures(), **self.told))

    def _figures(self) -> StepStats:
        figures = {field: getattr(self._stats, field) for field in self._stats.__struct_fields__}
        return StepStats(**{**figures, **self.figures})

    def _expire(self) -> None:
        late = {sample: reason for sample in self._running if (reason := self._overdue(sample)) is not None}
        if late:
            self._running = [sample for sample in self._running if sample not in late]
            self._stats.expired_total += len(late)
            chunks = [Chunk(s.request.request_id, s.index, [], "expired", error=reason) for s, reason in late.items()]
            self._on_message(StepOutputs(chunks, self._figures()))

    def _overdue(self, sample: _Sample) -> str | None:
        request = sample.request
        age, deadline = time.monotonic() - request.arrival, request.slo.deadline
        if not self.expires:
            return None
        if deadline is not None and self.unreachable:
            return "unreachable"
        if deadline is not None and age > deadline:
            return "deadline"
        return "timeout" if request.timeout is not None and age > request.timeout else None

    def _advance(self, sample: _Sample) -> Chunk:
        request, params = sample.request, sample.request.params
        chunk = Chunk(request.request_id, sample.index, [])
        if self.fail_request is not None:
            chunk.finish_reason, chunk.error = "error", self.fail_request
            return chunk
        if sample.done == 0:
            chunk.num_cached, chunk.queued_seconds = self.num_cached, 0.001
            if params.prompt_logprobs is not None and sample.index == 0:
                chunk.prompt_logprobs = [entry(token_id, params.prompt_logprobs) for token_id in request.prompt_ids[1:]]
        end = min(sample.done + self.tokens_per_step, params.max_tokens, len(sample.answer))
        chunk.token_ids = sample.answer[sample.done : end]
        stops = {EOS, *params.stop_token_ids} if not params.ignore_eos else set(params.stop_token_ids)
        for i, token_id in enumerate(chunk.token_ids):
            if token_id in stops:
                del chunk.token_ids[i + 1 :]
                chunk.finish_reason, chunk.stop_reason = "stop", None if token_id == EOS else token_id
                break
        sample.done += len(chunk.token_ids)
        chunk.num_drafted, chunk.num_accepted = self.draft, min(self.draft, len(chunk.token_ids) - 1)
        if chunk.finish_reason is None and sample.done >= min(params.max_tokens, len(sample.answer)):
            chunk.finish_reason = "length"
        if chunk.finish_reason is not None and self.finish is not None:
            chunk.finish_reason = self.finish
        if params.logprobs is not None:
            named = tuple((token_id, logprob_of(token_id)) for token_id in params.logprob_token_ids)
            entries = [entry(token_id, params.logprobs) for token_id in chunk.token_ids]
            chunk.logprobs = [drawn._replace(top=drawn.top + named) for drawn in entries]
        return chunk


@pytest.fixture
def fake(folder: Path) -> FakeClient:
    return FakeClient(folder)


Serve = Callable[..., Any]


@asynccontextmanager
async def client_of(app: FastAPI, timeout: float) -> AsyncIterator[httpx.AsyncClient]:
    """An httpx client of an app that runs in this process, and is its `app`."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=timeout) as client:
            client.app = app  # type: ignore[attr-defined]
            yield client


@pytest.fixture
def serve(fake: FakeClient) -> Serve:
    """`async with serve(**ServerConfig fields) as client:` gives an httpx client of the app in this process."""

    @asynccontextmanager
    async def serving(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with client_of(create_app(fake, ServerConfig(**settings)), 10) as client:
            yield client

    return serving


@pytest.fixture
def running(tiny_model: Path) -> Serve:
    """`async with running(engine={...}, **ServerConfig fields) as client:`, on a real engine."""

    @asynccontextmanager
    async def start(engine: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        core = InprocClient(EngineConfig(**{"model": str(tiny_model), **SMALL, **(engine or {})}))
        async with client_of(create_app(core, ServerConfig(**settings)), 120) as client:
            await until_ready(client)
            yield client

    return start


async def until_ready(client: httpx.AsyncClient) -> None:
    """A server answers while its engine starts."""
    async with asyncio.timeout(120):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)


@pytest.fixture
async def http(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve() as client:
        yield client


def events(text: str) -> list[Any]:
    """The payloads of a stream; checks its framing and that it ends with [DONE]."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    frames = [frame for frame in frames if not frame.startswith(":")]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@pytest.fixture
def stream(http: httpx.AsyncClient) -> Callable[..., Awaitable[list[Any]]]:
    """POST with stream=true; the payloads of the answer."""

    async def post(path: str, **body: Any) -> list[Any]:
        response = await http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.text)

    return post


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until `condition()`; a test's own deadline, generous because the machine may be busy."""
    import asyncio

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Awaitable[None]]:
    return eventually


@pytest.fixture(name="events")
def _events() -> Callable[[str], list[Any]]:
    return events
