from __future__ import annotations

from pathlib import Path

import pytest

from quire.bench.live import RequestFailed, Session, greedy, start_engine
from quire.bench.simulated import SimulatedEngine
from quire.bench.slo import Load, SloConfig, run, table
from quire.engine.messages import AddRequest
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost

STEP = 0.01  # seconds, of every step


@pytest.fixture
def machine() -> SimulatedEngine:
    config = SchedulerConfig(
        num_blocks=100,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_num_prefill_tokens=64,
        max_model_len=256,
        prefix_caching=False,
    )
    cost = StepCost(tile=16, base=STEP, per_tile=0.0, per_context=0.0, per_pair=0.0)
    return SimulatedEngine(Scheduler(config, cost), cost)


def ask(name: str, output_len: int = 3) -> AddRequest:
    return AddRequest(name, [1] * 8, greedy(output_len))


def test_a_session_times_every_token_on_its_clock(machine: SimulatedEngine) -> None:
    session = Session(machine, machine)
    session.play([(0.5, ask("b", 2)), (0.0, ask("a"))])
    a, b = session.timelines["a"], session.timelines["b"]
    assert a.token_times == pytest.approx([STEP, 2 * STEP, 3 * STEP])
    assert (b.due, b.ttft) == (0.5, pytest.approx(STEP))
    assert b.itls == [pytest.approx(STEP)]
    assert a.finish_reason == b.finish_reason == "length"


def test_what_is_due_during_a_step_has_waited_since_then(machine: SimulatedEngine) -> None:
    session = Session(machine, machine)
    session.play([(0.0, ask("a")), (STEP / 4, ask("b"))])
    assert session.timelines["b"].ttft == pytest.approx(1.75 * STEP)


def test_an_end_can_send_another_and_enough_aborts_the_rest(machine: SimulatedEngine) -> None:
    session = Session(machine, machine)

    def follow(request_id: str) -> None:
        session.send(ask(request_id + "+"))

    session.play([(0.0, ask("a", 1))], follow, enough=lambda: len(session.timelines) == 4)
    assert [t.finish_reason for t in session.timelines.values()] == ["length", "length", "length", "abort"]
    assert not machine.has_work


def test_a_refused_request_is_not_measured(tiny_model: Path) -> None:
    core = start_engine(model=str(tiny_model), threads=1, max_num_seqs=2)
    with pytest.raises(RequestFailed, match="maximum context"):
        Session(core).send(AddRequest("a", [1] * 600, greedy(1)))


def test_streams_go_on_until_the_last_prompt_has_its_token(tiny_model: Path) -> None:
    core = start_engine(model=str(tiny_model), threads=1, max_num_seqs=8)
    config = SloConfig(model=str(tiny_model), streams=2, stream_prompt_len=4, stream_output_len=6, prompts=4)
    load = Load(core, config, seed=0)
    load.run(rate=40.0, seed=0)
    prompts = [t for name, t in load.session.timelines.items() if name.startswith("p")]
    streams = [t for name, t in load.session.timelines.items() if name.startswith("s")]
    assert [(t.prompt_tokens, len(t.token_times)) for t in prompts] == [(448, 1)] * 4
    assert len(streams) > 2
    assert max(t.token_times[-1] for t in streams if t.token_times) <= max(t.token_times[0] for t in prompts)
    figures = load.figures()
    assert figures["gaps"] == sum(len(t.itls) for t in streams)
    assert figures["p50_itl_ms"] <= figures["p99_itl_ms"] <= figures["max_itl_ms"]


def test_both_disciplines_are_measured(tiny_model: Path) -> None:
    config = SloConfig(
        model=str(tiny_model), threads=1, streams=2, stream_prompt_len=4, stream_output_len=50, prompts=3, repetitions=1
    )
    result = run(config)
    for name in ("quire", "prefill_first"):
        assert result[name]["p99_over_slo"] == pytest.approx(result[name]["p99_itl_ms"] / result["slo_ms"])
    assert result["slo_ms"] == pytest.approx(4 * result["decode_step_ms"])
    assert table(result).row_count == 2


@pytest.mark.parametrize("bad", [{"load": 1.0}, {"load": 0.0}, {"streams": 0}, {"slo_itl_ms": 0.0}])
def test_bad_settings_name_their_option(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="--"):
        SloConfig(**bad)  # type: ignore[arg-type]
