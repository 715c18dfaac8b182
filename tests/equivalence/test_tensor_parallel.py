"""A request's tokens do not depend on how many ranks share the model: every path of two ranks gives those of one.

The other rank is a thread here; tests/process has it as a process.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from equivalence.paths import GREEDY, PATHS, SAMPLED, combined, drive, engine, requests
from llguidance import LLMatcher
from unit.engine import ranks_on_threads

from quire.engine import ranks
from quire.engine.core import EngineCore
from quire.engine.errors import EngineStartError, RankLost
from quire.engine.grammar import Vocabulary
from quire.engine.messages import Abort, AddRequest
from quire.engine.orders import checksum
from quire.scheduler.params import Grammar, SamplingParams
from quire.scheduler.plan import RowResult, StepResult

SPECULATION: dict[str, dict[str, object]] = {
    "draft": {"speculative_method": "draft", "num_speculative_tokens": 3},
    "layers": {"speculative_method": "layers", "speculative_model": "0,2", "num_speculative_tokens": 3},
    "draft-trees": {"speculative_method": "draft", "speculative_tree": "rsd-s:2x3"},
}
ALONE = ("overlap", "lookup", "few_tokens", "fair")
PAIRS = [("odd_chunks", "scarce_blocks"), ("overlap", "few_slots"), ("lookup_trees", "tiny_blocks")]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EngineCore]]:
    """Engines of two ranks."""
    monkeypatch.setattr(ranks, "_start", ranks_on_threads.start)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a rank that has what it waited for gets the interpreter at once
    cores: list[EngineCore] = []

    def make(model: Path, **settings: object) -> EngineCore:
        cores.append(engine(model, tensor_parallel_size=2, **settings))
        return cores[-1]

    yield make
    for core in cores:
        core.close()
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def solo(tiny_model: Path) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Each request alone, on one rank."""
    core = engine(tiny_model, prefix_caching=False)
    return {name: answer for request in requests() for name, answer in drive(core, [[request]]).items()}


@pytest.mark.parametrize("names", [*((name,) for name in ALONE), *PAIRS], ids="+".join)
def test_tokens_are_those_of_one_rank(names, tiny_model, solo, shared):
    assert drive(shared(tiny_model, **combined(names)), [requests()]) == solo


@pytest.mark.slow
@pytest.mark.parametrize("names", list(itertools.combinations(set(PATHS) - {"graphs"}, 2)), ids="+".join)
def test_every_pair_of_paths(names, tiny_model, solo, shared):
    assert drive(shared(tiny_model, **combined(names)), [requests()]) == solo


def test_prefix_hits_and_preemptions_happen(tiny_model, solo, shared):
    core = shared(tiny_model, num_blocks=15)
    assert drive(core, [requests()]) == solo
    assert drive(core, [requests()]) == solo
    assert core.scheduler.counters.prefix_hit_tokens > 0
    scarce = shared(tiny_model, num_blocks=7)
    assert drive(scarce, [requests()]) == solo
    assert scarce.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("name", SPECULATION)
def test_guesses_are_judged_alike(name, tiny_model, narrow_model, solo, shared):
    """Greedy requests, whose tokens do not depend on guesses; sampled ones behind guesses are equal in distribution."""
    asked = SPECULATION[name] | {"speculative_adaptive": False}
    if asked["speculative_method"] == "draft":
        asked["speculative_model"] = str(tiny_model)
    core = shared(tiny_model, **asked)
    greedy = [msgspec.structs.replace(request, params=GREEDY) for request in requests()]
    expected = drive(engine(tiny_model), [greedy])
    assert drive(core, [greedy]) == expected
    assert core.scheduler.counters.accepted > 0
    drive(core, [requests()])  # drawn guesses: each step compares what both ranks drew


@pytest.mark.parametrize(
    "settings",
    [{"quantization": "int4:32"}, {"quantization": "w8a8"}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "int4"}],
    ids=str,
)
def test_quantized(settings, tiny_model, shared):
    assert drive(shared(tiny_model, **settings), [requests()]) == drive(engine(tiny_model, **settings), [requests()])


def test_logprobs_are_close(tiny_model, shared):
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=5, prompt_logprobs=2)
    request = AddRequest("r", [(7 * i) % 256 for i in range(41)], params)
    (first, whole), (second, parts) = (_logprobs(core, request) for core in (engine(tiny_model), shared(tiny_model)))
    assert first == second
    assert whole == pytest.approx(parts, abs=1e-4)


def _logprobs(core: EngineCore, request: AddRequest) -> tuple[list[int], list[float]]:
    core.handle(request)
    ids, values = [], []
    while core.has_work:
        for chunk in core.step():
            assert chunk.error is None
            for one in [*(chunk.prompt_logprobs or []), *(chunk.logprobs or [])]:
                ids += [one.token_id, *(token for token, _ in one.top)]
                values += [one.logprob, *(logprob for _, logprob in one.top)]
    return ids, values


def test_grammars_mask_on_both_ranks(tiny_model, shared):
    params = SamplingParams(max_tokens=12, seed=3, grammar=Grammar(kind="regex", source="[ab]{4}[0-9]{3}"))
    request = AddRequest("r", [1, 2, 3], params)
    answer = drive(shared(tiny_model), [[request]])
    assert answer == drive(engine(tiny_model), [[request]])
    assert bytes(answer["r", 0][0][:7]).decode()[:4].strip("ab") == ""


def test_grammars_are_compiled_once_a_rank_and_beside_its_loop(tiny_model, shared, monkeypatch):
    compiled: list[tuple[str, str]] = []

    def watch(vocabulary: Vocabulary, grammar: Grammar, compile_it=Vocabulary.compile) -> LLMatcher:
        compiled.append((grammar.source, threading.current_thread().name))
        return compile_it(vocabulary, grammar)

    monkeypatch.setattr(Vocabulary, "compile", watch)
    monkeypatch.setattr("quire.engine.grammar.MAX_KEPT", 1)
    sources = [f"[ab]{{{i + 1}}}[0-9]{{3}}" for i in range(6)]
    params = [SamplingParams(max_tokens=9, seed=3, grammar=Grammar(kind="regex", source=source)) for source in sources]
    wrong = SamplingParams(max_tokens=9, grammar=Grammar(kind="regex", source="("))
    asked = [AddRequest(f"r{i}", [1, 2, 3], some) for i, some in enumerate(params)]
    core = shared(tiny_model, max_num_seqs=2)
    assert core.handle(AddRequest("wrong", [1, 2, 3], wrong)) == []
    assert core.handle(AddRequest("left", [1, 2, 3], params[0])) == []
    core.handle(Abort(["left"]))
    while core.has_work:
        core.step()
    assert drive(core, [asked]) == drive(engine(tiny_model, max_num_seqs=2), [asked])
    assert {thread for _, thread in compiled} == {"grammar_0"}
    assert {compiled.count((source, "grammar_0")) for source in sources[1:]} == {3}  # with the engine of one rank


def test_many_samples_and_aborts(tiny_model, shared):
    request = AddRequest("r", [(7 * i) % 256 for i in range(41)], SamplingParams(max_tokens=6, seed=3, n=9))
    settings = {"max_num_seqs": 3}
    assert drive(shared(tiny_model, **settings), [[request]]) == drive(engine(tiny_model, **settings), [[request]])


def test_a_rank_that_draws_other_tokens_ends_the_engine(tiny_model, shared, monkeypatch):
    """A planted fault: one rank turns its logits around."""
    core = shared(tiny_model, max_num_seqs=4)
    lm_head = core.runner.decoder.lm_head
    monkeypatch.setattr(lm_head, "run", lambda x, packed, run=lm_head.run: run(x, packed).flip(1))
    core.handle(AddRequest("r", [1, 2, 3], replace(SAMPLED[0], max_tokens=50)))
    with pytest.raises(RankLost, match="rank 1 has drawn other tokens"):
        _run(core, 60)


def _run(core: EngineCore, steps: int) -> None:
    for _ in range(steps):
        core.step()


def test_checksums_tell_results_apart():
    same = [StepResult(1, [RowResult([1, 2]), RowResult(error="x")]) for _ in range(2)]
    assert checksum(same[0]) == checksum(same[1])
    for other in ([RowResult([1, 3]), RowResult(error="x")], [RowResult([1, 2]), RowResult()], [RowResult([1, 2])]):
        assert checksum(StepResult(1, other)) != checksum(same[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 3}, "3, but the model has 4 heads of attention over 2"),
        ({"tensor_parallel_size": 65}, "65; give a number from 1 to 64"),
        ({"tensor_parallel_size": 2, "speculative_method": "nested", "speculative_model": "h/2"}, "choose draft"),
    ],
)
def test_what_cannot_be_is_refused_before_a_rank_is_started(settings, words, tiny_model, monkeypatch):
    monkeypatch.setattr(ranks, "_start", None)
    with pytest.raises(EngineStartError, match=words):
        engine(tiny_model, **settings)


def test_more_ranks_than_gpus(tiny_model):
    from quire.engine.config import EngineConfig
    from quire.engine.families import load_config
    from quire.engine.resolve import Machine, resolve

    machine = Machine(cuda=True, fast_bf16=True, cores=8, free_bytes=1 << 36, capability=(9, 0), total_bytes=1 << 36)
    config = EngineConfig(model=str(tiny_model), tensor_parallel_size=2)
    with pytest.raises(EngineStartError, match="tensor_parallel_size is 2, but torch sees 1 CUDA devices"):
        resolve(config, load_config(tiny_model), machine)
    fits = resolve(config, load_config(tiny_model), replace(machine, devices=2))
    whole = resolve(replace(config, tensor_parallel_size=1), load_config(tiny_model), machine)
    assert fits.kv_cache_bytes // fits.num_blocks * 2 == whole.kv_cache_bytes // whole.num_blocks
    assert fits.weight_bytes < 0.55 * whole.weight_bytes
