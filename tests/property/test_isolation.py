"""A request draws what it draws alone, whatever is added, ended or displaced beside it, with every sampling parameter.

A state machine drives one engine: requests come, some are aborted, some preempted, slots are used again and again.
Whoever ends must have said what it says alone in an engine without cache, neighbours or guesses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from equivalence.paths import engine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from quire.engine.core import EngineCore
from quire.engine.messages import Abort, AddRequest
from quire.scheduler.params import Grammar, Repetition, SamplingParams, Speculative, Thinking
from quire.scheduler.plan import Chunk

ENGINES: dict[str, dict[str, object]] = {
    "few slots": {"max_num_seqs": 3, "num_blocks": 14},
    "overlap": {"max_num_seqs": 4, "overlap": True},
    "guesses": {"max_num_seqs": 4, "num_blocks": 20, "speculative_method": "ngram", "speculative_adaptive": False},
    "trees": {"max_num_seqs": 4, "speculative_method": "ngram", "speculative_tree": "rsd-s:2x3", "overlap": True},
}

shared = [(11 * i + 3) % 256 for i in range(40)]
tokens = st.integers(0, 299)
prompts = st.one_of(
    st.integers(1, 40).map(lambda length: shared[:length]),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),  # that repeat themselves, so that there is something to guess
    st.lists(tokens, min_size=1, max_size=20),
)
grammars = st.sampled_from(
    [
        Grammar(kind="regex", source="[a-d]{3,9}"),
        Grammar(kind="choice", source='["abc", "abd", "x"]'),
        Grammar(
            kind="json_schema", source='{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'
        ),
    ]
)
thoughts = st.builds(
    Thinking, start_ids=st.just((5,)), end_ids=st.just((6, 7)), opened=st.booleans(), budget=st.integers(0, 5)
)
repetitions = st.builds(Repetition, max_pattern_size=st.integers(1, 3), min_count=st.integers(2, 3))


def few(values: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=size).map(tuple)


# Each is left out as often as not: a slot that forgets to forget shows when it goes from one to the other.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "min_tokens": st.integers(0, 4),
    "temperature": st.sampled_from((0.0, 0.3, 1.5)),
    "top_k": st.integers(1, 40),
    "top_p": st.sampled_from((0.2, 0.9)),
    "min_p": st.sampled_from((0.01, 0.3)),
    "presence_penalty": st.sampled_from((-2.0, 1.5)),
    "frequency_penalty": st.sampled_from((-1.0, 2.0)),
    "repetition_penalty": st.sampled_from((0.5, 1.8)),
    "stop_token_ids": few(tokens, 40),
    "ignore_eos": st.just(True),
    "logit_bias": st.dictionaries(tokens, st.sampled_from((-100.0, 5.0, 100.0)), max_size=4),
    "allowed_token_ids": st.lists(tokens, min_size=1, max_size=30, unique=True).map(tuple),
    "bad_words": few(st.lists(tokens, min_size=1, max_size=2).map(tuple), 20),
    "logprobs": st.integers(0, 3),
    "prompt_logprobs": st.integers(0, 2),
    "repetition": repetitions,
    "grammar": grammars,
    "thinking": thoughts,
    "n": st.integers(2, 3),
}


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    chosen = {name: draw(values) for name, values in FIELDS.items() if draw(st.integers(0, 3)) == 0}
    if chosen.get("temperature") == 0.0:
        chosen.pop("n", None)
    if "grammar" in chosen:  # a grammar that nothing allowed fits is an error of its own
        for name in ("allowed_token_ids", "logit_bias", "bad_words", "repetition", "ignore_eos", "min_tokens"):
            chosen.pop(name, None)
    return SamplingParams(max_tokens=draw(st.integers(4, 12)), seed=draw(st.integers(0, 5)), **chosen)


class Said:
    """What one sample has said so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.rated: list[tuple[int, ...]] = []
        self.end: tuple[str, object] | None = None

    def add(self, chunk: Chunk) -> None:
        self.ids += chunk.token_ids
        self.rated += [tuple(token_id for token_id, _ in entry.top) for entry in chunk.logprobs or ()]
        if chunk.finish_reason is not None:
            self.end = (chunk.finish_reason, chunk.stop_reason or chunk.error)  # what forbids every token is an error


def take_in(said: dict[tuple[str, int], Said], chunks: list[Chunk]) -> None:
    for chunk in chunks:
        said.setdefault((chunk.request_id, chunk.index), Said()).add(chunk)


@cache
def engines(model: Path, kind: str) -> tuple[EngineCore, EngineCore]:
    """The one that is driven, and the one in which requests are alone."""
    alone = engine(model, prefix_caching=False, max_num_seqs=3)
    return engine(model, **ENGINES[kind]), alone


def alone(core: EngineCore, request: AddRequest) -> dict[int, Said]:
    said: dict[tuple[str, int], Said] = {}
    take_in(said, core.handle(request))
    while core.has_work:
        take_in(said, core.step())
    return {index: sample for (_, index), sample in said.items()}


numbers = itertools.count()


def machine(model: Path, kind: str, core: EngineCore | None = None) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        found: ClassVar[list[str]] = []  # requests that said something else than alone

        def __init__(self) -> None:
            super().__init__()
            driven, self.solo = engines(model, kind)
            self.core = core or driven
            self.open: dict[str, AddRequest] = {}
            self.said: dict[tuple[str, int], Said] = {}
            self.expected: dict[str, dict[int, Said]] = {}
            while self.core.has_work:  # of an example that failed
                self.core.handle(Abort([request.request_id for request in self.core.scheduler.running]))
                self.core.step()

        @rule(prompt=prompts, params=sampling(), guesses=st.sampled_from((None, "none")))
        def add(self, prompt: list[int], params: SamplingParams, guesses: str | None) -> None:
            wish = Speculative(method=guesses)
            request = AddRequest(f"r{next(numbers)}", prompt, params)
            self.expected[request.request_id] = alone(self.solo, request)
            self.open[request.request_id] = request
            take_in(self.said, self.core.handle(replace_wish(request, wish)))

        @rule(count=st.integers(1, 4))
        def step(self, count: int) -> None:
            for _ in range(count):
                take_in(self.said, self.core.step())
            self.compare()

        # What is drawn must not depend on the state of the engine, which remembers earlier examples on purpose.

        @rule(which=st.integers(0, 10), index=st.sampled_from((None, 0, 1)))
        def abort(self, which: int, index: int | None) -> None:
            names = list(self.open)
            if names:
                take_in(self.said, self.core.handle(Abort([names[which % len(names)]], index)))
                self.compare()

        @rule(which=st.integers(0, 10))
        def preempt(self, which: int) -> None:
            running = sorted(self.core.scheduler.running, key=lambda request: request.order)
            if running and not self.core._out:
                self.core.scheduler._preempt(running[which % len(running)])

        def compare(self) -> None:
            for (name, index), said in self.said.items():
                expected = self.expected[name][index]
                if said.end is None or said.end[0] == "abort":
                    same = said.ids == expected.ids[: len(said.ids)]
                else:
                    same = (said.ids, said.end, said.rated) == (expected.ids, expected.end, expected.rated)
                if not same:
                    self.found.append(name)
                    raise AssertionError(f"{self.open[name]} said {said.ids}, {said.end}; alone it says {expected.ids}")

        def teardown(self) -> None:
            steps = 0
            while self.core.has_work:
                take_in(self.said, self.core.step())
                steps += 1
                assert steps < 3000
            self.compare()
            assert self.core.scheduler.pool.num_used == 0

    return Machine


def replace_wish(request: AddRequest, wish: Speculative) -> AddRequest:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return AddRequest(**fields | {"speculative": wish})


def run(made: type[RuleBasedStateMachine], examples: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        made,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=checks,
            phases=phases,
        ),
    )


@pytest.mark.advisory(
    *("CVE-2026-114049", "GHSA-v97p-wpxp-px84", "GHSA-fpch-3xrf-7q96", "CVE-2026-44223", "CVE-2026-93840"),
    *("CVE-2026-93989", "CVE-2026-105757", "CVE-2026-9540", "CVE-2026-110807", "CVE-2026-110809"),
)
@pytest.mark.parametrize("kind", ENGINES)
def test_each_request_is_as_if_alone(tiny_model: Path, kind: str) -> None:
    run(machine(tiny_model, kind), 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_each_request_is_as_if_alone_at_length(tiny_model: Path, kind: str) -> None:
    run(machine(tiny_model, kind), 1500)


def keep_bias(core: EngineCore) -> None:
    """A slot whose table of biases is not cleared for the next request."""
    add, kept = core.runner.sampler.add, {}

    def stale(slot: int, params: SamplingParams, *rest: Any) -> None:
        kept.setdefault(slot, params.logit_bias)
        add(slot, replace(params, logit_bias=params.logit_bias or kept[slot]), *rest)
        kept[slot] = params.logit_bias or kept[slot]

    core.runner.sampler.add = stale  # type: ignore[method-assign]


def forget_allowed(core: EngineCore) -> None:
    """A preempted request that comes back without what it allowed."""
    add, seen = core.runner.sampler.add, set()

    def forgetful(slot: int, params: SamplingParams, *rest: Any) -> None:
        key = (params.seed, params.allowed_token_ids)
        back = key in seen
        seen.add(key)
        add(slot, replace(params, allowed_token_ids=None) if back else params, *rest)

    core.runner.sampler.add = forgetful  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [keep_bias, forget_allowed])
def test_a_slot_that_remembers_is_found(tiny_model: Path, fault: Callable[[EngineCore], None]) -> None:
    core = engine(tiny_model, **ENGINES["few slots"])
    fault(core)
    made = machine(tiny_model, "few slots", core)
    with pytest.raises(Exception):  # noqa: B017, PT011  (what hypothesis makes of a fault that comes and goes)
        run(made, 60, [Phase.generate])
    assert made.found
