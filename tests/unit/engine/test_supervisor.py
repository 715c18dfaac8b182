"""An engine that ends, hangs or cannot start, played by one that does as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quire.engine import supervisor
from quire.engine.client import Heartbeat, OnMessage
from quire.engine.config import EngineConfig
from quire.engine.errors import EngineDeadError, EngineStartError
from quire.engine.messages import (
    Abort,
    EngineDead,
    EngineHung,
    EngineReady,
    Progress,
    StepOutputs,
    StepStats,
    add_totals,
)
from quire.engine.supervisor import Supervisor

FACTS: dict[str, Any] = {
    "model_path": "/models/tiny",
    "model_type": "llama",
    "num_parameters": 1000,
    "dtype": "float32",
    "device": "cpu",
    "vocab_size": 300,
    "max_model_len": 512,
    "max_logprobs": 20,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_n": 128,
    "scheduling_policy": "fcfs",
    "tenants": [],
    "step_cost": [],
    "block_size": 16,
    "num_blocks": 77,
    "eos_token_ids": [1],
    "kernels": {},
    "reasons": {},
    "startup_seconds": {},
    "memory_bytes": {},
}


class Engine:
    """Starts at once unless it is to fail, or to take until it is killed; dies and falls silent when told to."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.facts: dict[str, Any] = {}
        self.fails: str | Exception | None = None
        self.takes_for_ever = False
        self.tell: OnMessage = lambda message: None
        self.age = 0.0
        self.sent: list[object] = []
        self.killed = threading.Event()
        self.closed = False

    def start(self, on_message: OnMessage) -> EngineReady:
        self.tell = on_message
        on_message(Progress("load weights", {}, 0.5, True))
        if self.takes_for_ever:
            assert self.killed.wait(30)
        if isinstance(self.fails, Exception):
            raise self.fails
        if self.fails is not None or self.killed.is_set():
            raise EngineStartError(self.fails or "killed")
        on_message(StepOutputs([], StepStats()))  # nobody may hear this before the engine is ready
        return EngineReady(**(FACTS | self.facts))

    def send(self, message: object) -> None:
        self.sent.append(message)

    def heartbeat_age(self) -> float:
        return self.age

    def kill(self) -> None:
        self.killed.set()
        self.tell(EngineDead("killed by SIGKILL"))

    def close(self) -> None:
        self.closed = True


class House:
    """A supervisor and the engines that it made, with all that it said."""

    def __init__(self, **settings: Any) -> None:
        self.engines: list[Engine] = []
        self.news: list[Any] = []
        self.prepare: Callable[[Engine], None] = lambda engine: None
        self.supervisor = Supervisor(
            self._make, EngineConfig(model="tiny"), **({"hang_timeout": 60.0, "max_restarts": 3} | settings)
        )

    def _make(self, config: EngineConfig) -> Engine:
        engine = Engine(config)
        self.prepare(engine)
        self.engines.append(engine)
        return engine

    def start(self) -> Engine:
        self.supervisor.start(self.news.append)
        return self.engines[0]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"it never came true; {self.news}"
            time.sleep(0.005)

    def heard(self, kind: type) -> list[Any]:
        return [message for message in self.news if isinstance(message, kind)]


@pytest.fixture
def houses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., House]]:
    monkeypatch.setattr(supervisor, "TICK", 0.01)
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.0, 0.01))
    built: list[House] = []

    def build(**settings: Any) -> House:
        built.append(House(**settings))
        return built[-1]

    yield build
    for house in built:
        house.supervisor.close()
        assert all(engine.closed for engine in house.engines)


def test_a_dead_engine_is_followed_by_its_double(houses: Callable[..., House]) -> None:
    house = houses()
    first = house.start()
    house.supervisor.send(Abort(["a"]))
    first.tell(EngineDead("killed"))
    assert house.news[-1] == EngineDead("killed", "crash", final=False)
    house.wait_for(lambda: bool(house.heard(EngineReady)))
    second = house.engines[1]
    assert first.closed
    assert not second.closed
    assert (second.config.num_blocks, second.config.max_model_len, second.config.model) == (77, 512, "/models/tiny")
    house.supervisor.send(Abort(["b"]))
    assert (first.sent, second.sent) == ([Abort(["a"])], [Abort(["b"])])
    second.tell(StepOutputs([], StepStats()))
    assert [type(message) for message in house.news] == [Progress, EngineDead, Progress, EngineReady, StepOutputs]


def test_nothing_can_be_sent_while_no_engine_serves(houses: Callable[..., House]) -> None:
    house = houses()
    first = house.start()
    house.prepare = lambda engine: setattr(engine, "takes_for_ever", True)
    first.tell(EngineDead("killed"))
    house.wait_for(lambda: len(house.engines) == 2)
    with pytest.raises(EngineDeadError):
        house.supervisor.send(Abort(["a"]))
    assert house.supervisor.heartbeat_age() == float("inf")
    assert house.engines[1].sent == []  # closing now ends the start that is under way


def test_engines_that_end_one_after_another_are_given_up(houses: Callable[..., House]) -> None:
    house = houses(max_restarts=3)
    house.start()
    for count in (1, 2, 3):
        house.engines[-1].tell(EngineDead("killed"))
        house.wait_for(lambda count=count: len(house.heard(EngineReady)) == count)
    house.engines[-1].tell(EngineDead("killed"))
    assert [message.final for message in house.heard(EngineDead)] == [False, False, False, True]
    time.sleep(0.1)
    assert len(house.engines) == 4


def test_an_engine_that_served_for_long_begins_a_new_row(
    houses: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.0)
    house = houses(max_restarts=1)
    house.start()
    for count in range(1, 6):
        house.engines[-1].tell(EngineDead("killed"))
        house.wait_for(lambda count=count: len(house.heard(EngineReady)) == count)
    assert not any(message.final for message in house.heard(EngineDead))


def test_starts_that_fail_count_as_ends(houses: Callable[..., House]) -> None:
    house = houses(max_restarts=2)
    first = house.start()
    house.prepare = lambda engine: setattr(engine, "fails", "no memory")
    first.tell(EngineDead("killed"))
    house.wait_for(lambda: house.heard(EngineDead)[-1].final)
    assert [message.kind for message in house.heard(EngineDead)] == ["crash", "start", "start"]
    assert "no memory" in house.heard(EngineDead)[-1].reason


def test_a_start_that_the_system_refuses_is_tried_again(houses: Callable[..., House]) -> None:
    house = houses(max_restarts=2)
    first = house.start()
    house.prepare = lambda engine: setattr(engine, "fails", OSError(24, "Too many open files"))
    first.tell(EngineDead("killed"))
    house.wait_for(lambda: len(house.engines) == 2)
    house.prepare = lambda engine: None
    house.wait_for(lambda: bool(house.heard(EngineReady)))
    assert [message.kind for message in house.heard(EngineDead)] == ["crash", "start"]
    assert "OSError: [Errno 24] Too many open files" in house.heard(EngineDead)[-1].reason


def test_a_start_that_hangs_is_killed(houses: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.05)
    house = houses(max_restarts=1)
    first = house.start()
    house.prepare = lambda engine: setattr(engine, "takes_for_ever", True)
    first.tell(EngineDead("killed"))
    house.wait_for(lambda: house.heard(EngineDead)[-1].final)
    assert house.engines[1].killed.is_set()


def test_another_model_under_the_same_name_is_refused(houses: Callable[..., House]) -> None:
    house = houses(max_restarts=1)
    first = house.start()
    house.prepare = lambda engine: engine.facts.update(vocab_size=301)
    first.tell(EngineDead("killed"))
    house.wait_for(lambda: house.heard(EngineDead)[-1].final)
    assert "vocab_size is 301 and was 300" in house.heard(EngineDead)[-1].reason


def test_silence_is_reported_once_and_then_ended(houses: Callable[..., House]) -> None:
    house = houses(hang_timeout=0.2)
    first = house.start()
    first.age = 1000.0
    house.wait_for(lambda: bool(house.heard(EngineReady)))
    assert first.killed.is_set()
    first.tell(EngineDead("killed by SIGKILL"))  # its last word comes late
    assert [message.kind for message in house.heard(EngineDead)] == ["hang"]
    assert len(house.heard(EngineHung)) == 1
    house.supervisor.send(Abort(["a"]))


def test_an_engine_that_speaks_again_in_time_is_left_alone(
    houses: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "KILL_AFTER", 1e6)
    house = houses(hang_timeout=0.05)
    first = house.start()
    for count in (1, 2):
        first.age = 1000.0
        house.wait_for(lambda count=count: len(house.heard(EngineHung)) == count)
        first.age = 0.0
        house.wait_for(lambda: not house.supervisor._hung)
    assert not first.killed.is_set()


@pytest.mark.parametrize("age", [3600.1, 3599.9])  # its last word came before, or after, the supervisor's last look
def test_a_machine_that_stood_still_does_not_make_its_engine_hang(monkeypatch: pytest.MonkeyPatch, age: float) -> None:
    now = 100.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    silence = supervisor._Silence()
    now += 3600.0
    assert silence.after(age) <= 2 * supervisor.TICK
    for _ in range(1000):  # the detector does detect
        now += supervisor.TICK
        seconds = silence.after(now)
    assert seconds > 100 * supervisor.TICK


def test_an_engine_that_says_that_it_is_busy_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("quire.engine.client.time.monotonic", lambda: now)
    heartbeat = Heartbeat()
    heartbeat.beat(30.0)
    now += 100.0
    assert heartbeat.age() == 0.0
    now += 30.0
    assert heartbeat.age() == pytest.approx(10.0)
    heartbeat.beat()
    now += 5.0
    assert heartbeat.age() == pytest.approx(5.0)


def test_totals_go_on_where_the_last_engine_left_them() -> None:
    before = StepStats(steps_total=10, drafted_by_position=[5, 2], kv_blocks_total=76)
    after = add_totals(StepStats(steps_total=1, running=3, drafted_by_position=[1], kv_blocks_total=76), before)
    assert (after.steps_total, after.running, after.kv_blocks_total) == (11, 3, 76)
    assert after.drafted_by_position == [6, 2]
