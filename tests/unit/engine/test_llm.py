"""The offline API against an engine that follows a script."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quire
from quire.engine.client import OnMessage
from quire.engine.errors import EngineDeadError, EngineStartError, RequestError, TooLongError
from quire.engine.llm import LLM
from quire.engine.messages import Abort, AddRequest, EngineDead, EngineReady, StepOutputs, StepStats
from quire.engine.outputs import SampleOutput
from quire.scheduler.params import SamplingParams, Slo, Speculative
from quire.scheduler.plan import Chunk, TokenLogprob

Script = Callable[[AddRequest], Iterator[Chunk]]


def ready(folder: Path) -> EngineReady:
    return EngineReady(
        model_path=str(folder),
        model_type="llama",
        num_parameters=1,
        dtype="float32",
        device="cpu",
        vocab_size=384,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_n=10_000,
        scheduling_policy="fcfs",
        tenants=[],
        step_cost=[],
        block_size=16,
        num_blocks=9,
        max_logprobs=20,
        eos_token_ids=[2, 0],
        kernels={},
        reasons={},
        startup_seconds={},
        memory_bytes={},
    )


class ScriptedClient:
    """Takes a turn for each request in reverse order of arrival, one chunk each, on a thread of its own."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.folder = folder
        self.script = script
        self.sent: list[AddRequest] = []
        self.aborted: list[str] = []
        self.closed = False
        self.dead = False
        self._running: dict[str, Iterator[Chunk]] = {}
        self._wake = threading.Condition()

    def start(self, on_message: OnMessage) -> EngineReady:
        self._thread = threading.Thread(target=self._loop, args=(on_message,), daemon=True)
        self._thread.start()
        return ready(self.folder)

    def send(self, message: AddRequest | Abort) -> None:
        if self.dead:
            raise EngineDeadError("dead")
        with self._wake:
            if isinstance(message, AddRequest):
                self.sent.append(message)
                self._running[message.request_id] = self.script(message)
            else:
                self.aborted += message.request_ids
                for request_id in message.request_ids:
                    self._running.pop(request_id, None)
            self._wake.notify()

    def heartbeat_age(self) -> float:
        return 0.0

    def close(self) -> None:
        with self._wake:
            self.closed = True
            self._wake.notify()
        self._thread.join()

    def _loop(self, on_message: OnMessage) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.closed or self._running)
                if self.closed:
                    return
                chunks = []
                for request_id, turns in reversed(list(self._running.items())):
                    try:
                        chunk = next(turns, None)
                    except ConnectionError as error:
                        self.dead = True
                        on_message(EngineDead(str(error)))
                        return
                    if chunk is None:
                        del self._running[request_id]
                    else:
                        chunks.append(chunk)
            on_message(StepOutputs(chunks, StepStats()))


def echo(request: AddRequest) -> Iterator[Chunk]:
    """Every sample repeats the prompt, up to max_tokens, one token a turn."""
    ids = request.prompt_ids[: request.params.max_tokens]
    for i, token_id in enumerate(ids):
        for index in range(request.params.n):
            reason = "length" if i == len(ids) - 1 else None
            logprobs = None if request.params.logprobs is None else [TokenLogprob(token_id, -1.0, 1, ())]
            yield Chunk(
                request.request_id, index, [token_id], reason, logprobs=logprobs, num_cached=0 if i == 0 else -1
            )


@pytest.fixture
def connect(byte_level_folder: Path) -> Iterator[Callable[[Script], LLM]]:
    opened: list[LLM] = []

    def make(script: Script) -> LLM:
        llm = LLM.from_client(ScriptedClient(byte_level_folder, script))
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


def client_of(llm: LLM) -> ScriptedClient:
    client = llm._client
    assert isinstance(client, ScriptedClient)
    return client


PARAMS = SamplingParams(max_tokens=50)


def test_answers_come_in_the_order_of_the_prompts(connect: Callable[[Script], LLM]) -> None:
    llm = connect(echo)
    prompts = ["first prompt", "2", "the third one, longer", "naïve 🙂"]
    answers = llm.generate(prompts, PARAMS, progress=False)
    assert [answer.prompt for answer in answers] == prompts
    assert [answer.outputs[0].text for answer in answers] == prompts
    assert all(answer.outputs[0].token_ids == answer.prompt_ids for answer in answers)
    assert client_of(llm).aborted == []


def test_one_text_ids_and_parameters_for_each(connect: Callable[[Script], LLM]) -> None:
    llm = connect(echo)
    assert llm.generate("alone", PARAMS, progress=False)[0].outputs[0].text == "alone"
    ids = llm.tokenizer.encode("ids")
    each = [replace(PARAMS, max_tokens=1), replace(PARAMS, n=3, top_k=-1, logit_bias={5: 1e6})]
    answers = llm.generate([ids, "abc"], each, progress=False)
    assert answers[0].prompt is None
    assert answers[0].outputs[0].token_ids == ids[:1]
    assert [output.text for output in answers[1].outputs] == ["abc"] * 3
    sent = client_of(llm).sent[-1].params
    assert (sent.top_k, sent.logit_bias) == (0, {5: 100.0})


def test_lists_of_ids_are_taken_as_tuples_are(connect: Callable[[Script], LLM]) -> None:
    """By type they are refused nowhere, and what compares ids knows tuples only."""
    llm = connect(echo)
    lists: Any = {"bad_words": [[5], [6, 7]], "stop_token_ids": {8}, "logprobs": 0, "logprob_token_ids": [9]}
    llm.generate("abc", replace(PARAMS, **lists), progress=False)
    sent = client_of(llm).sent[-1].params
    assert sent.bad_words == ((5,), (6, 7))
    assert (sent.stop_token_ids, sent.logprob_token_ids) == ((8,), (9,))


def test_a_stop_string_ends_the_request_in_the_engine_too(connect: Callable[[Script], LLM]) -> None:
    def endless(request: AddRequest) -> Iterator[Chunk]:
        while True:
            for token_id in request.prompt_ids:
                yield Chunk(request.request_id, 0, [token_id])

    llm = connect(endless)
    answers = llm.generate(["one. two", "x;y"], PARAMS, stop=[". ", ";"], progress=False)
    assert [answer.outputs[0].text for answer in answers] == ["one", "x"]
    assert [answer.outputs[0].stop_reason for answer in answers] == [". ", ";"]
    assert sorted(client_of(llm).aborted) == sorted(request.request_id for request in client_of(llm).sent)


def test_text_options_reach_the_text(connect: Callable[[Script], LLM]) -> None:
    llm = connect(echo)
    marked = "<|im_start|>a.b"
    assert llm.generate(marked, PARAMS, progress=False)[0].outputs[0].text == "a.b"
    shown = llm.generate(
        marked, PARAMS, stop=".", include_stop_str_in_output=True, skip_special_tokens=False, progress=False
    )
    assert shown[0].outputs[0].text == "<|im_start|>a."


def test_defaults_come_from_the_model_and_fit_the_context(connect: Callable[[Script], LLM]) -> None:
    llm = connect(echo)
    answer = llm.generate("def", progress=False)[0]
    used = client_of(llm).sent[-1].params
    assert (used.temperature, used.top_k) == (0.6, 20)
    assert used.max_tokens == 128 - len(answer.prompt_ids)


def test_logprobs_lie_beside_the_tokens(connect: Callable[[Script], LLM]) -> None:
    output = connect(echo).generate("hello", replace(PARAMS, logprobs=1), progress=False)[0].outputs[0]
    assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids


def test_chat_renders_and_answers_each_conversation(connect: Callable[[Script], LLM]) -> None:
    llm = connect(echo)
    hello = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(hello, PARAMS, progress=False)
    assert answer.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.prompt_ids[0] == 1
    two = llm.chat([hello, [*hello, {"role": "assistant", "content": "yes"}]], PARAMS, progress=False)
    assert len(two) == 2
    (continued,) = llm.chat(
        [*hello, {"role": "assistant", "content": "yes and"}], PARAMS, continue_final_message=True, progress=False
    )
    assert (continued.prompt or "").endswith("assistant\nyes and")


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        (["ok", "a" * 10_000], PARAMS, r"^prompts\[1\]: This model's maximum context length is 128 tokens"),
        (["ok", "w o r d " * 30], PARAMS, r"^prompts\[1\]: This model's maximum context length is 128 tokens"),
        (["ok", [1, 384]], PARAMS, r"^prompts\[1\]: prompt\[1\] = 384"),
        (["ok", []], PARAMS, r"^prompts\[1\]: prompt has no tokens"),
        (["ok", ""], PARAMS, r"^prompts\[1\]: prompt has no tokens"),
        (["ok", 5], PARAMS, r"^prompts\[1\]: must be text"),
        (["ok", "bad \ud800"], PARAMS, r"^prompts\[1\]: .*surrogate"),
        (["ok", "ok"], [PARAMS, replace(PARAMS, temperature=-1)], r"^prompts\[1\]: temperature"),
        (["ok", "ok"], [PARAMS], "1 entries for 2 prompts"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_is_sent(
    connect: Callable[[Script], LLM], prompts: list[str], params: SamplingParams, says: str
) -> None:
    llm = connect(echo)
    with pytest.raises(RequestError, match=says):
        llm.generate(prompts, params, progress=False)
    assert client_of(llm).sent == []


def test_too_long_stays_too_long(connect: Callable[[Script], LLM]) -> None:
    with pytest.raises(TooLongError):
        connect(echo).generate("x " * 200, PARAMS, progress=False)


def test_one_failed_request_leaves_the_others(connect: Callable[[Script], LLM]) -> None:
    def fails(request: AddRequest) -> Iterator[Chunk]:
        if request.params.seed == 13:
            yield Chunk(request.request_id, 0, [], "error", error="no finite logits")
        else:
            yield from echo(request)

    good, bad = connect(fails).generate(["good", "bad"], [PARAMS, replace(PARAMS, seed=13)], progress=False)
    assert good.outputs[0].text == "good"
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error) == ("error", "no finite logits")


def test_a_dead_engine_is_an_exception(connect: Callable[[Script], LLM]) -> None:
    def dies(request: AddRequest) -> Iterator[Chunk]:
        yield Chunk(request.request_id, 0, [5])
        raise ConnectionError("killed by signal 9")

    llm = connect(dies)
    with pytest.raises(EngineDeadError, match="signal 9"):
        llm.generate("x", PARAMS, progress=False)
    with pytest.raises(EngineDeadError):
        llm.generate("x", PARAMS, progress=False)


def test_an_interrupted_call_aborts_what_runs(
    connect: Callable[[Script], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = connect(echo)

    def interrupt(*_: object) -> Iterator[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "_fold", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a long prompt", "another"], PARAMS, progress=False)
    assert len(client_of(llm).aborted) == 2
    assert llm.generate("again", PARAMS, progress=False)[0].outputs[0].text == "again"


def test_promises_reach_the_engine(connect: Callable[[Script], LLM]) -> None:
    llm = connect(echo)
    slo, plain = Slo(ttft=0.5, deadline=20.0), Speculative(method="none")
    terms: dict[str, Any] = {"slo": slo, "timeout": 5, "tenant": "me", "speculative": plain}
    llm.generate(["a", "b"], PARAMS, progress=False, **terms)
    llm.chat([{"role": "user", "content": "hi"}], PARAMS, progress=False, **terms)
    list(llm.samples("a", PARAMS, **terms))
    sent = client_of(llm).sent
    assert len(sent) == 4
    told = {(request.slo, request.timeout, request.tenant, request.speculative) for request in sent}
    assert told == {(slo, 5, "me", plain)}


def test_outputs_say_how_guessing_went_text_held_back_included(connect: Callable[[Script], LLM]) -> None:
    def guessed(request: AddRequest) -> Iterator[Chunk]:
        ids = request.prompt_ids
        yield Chunk(request.request_id, 0, ids[:2], num_drafted=4, num_accepted=1)  # might become the stop string
        yield Chunk(request.request_id, 0, ids[2:5], num_drafted=3, num_accepted=2)
        yield Chunk(request.request_id, 0, ids[5:], "length", num_drafted=4, num_accepted=4)

    llm = connect(guessed)
    letters = [token_id for letter in "abxyzabcde" for token_id in llm.tokenizer.encode(letter)]
    (answer,) = llm.generate([letters], PARAMS, stop="abc", progress=False)
    (output,) = answer.outputs
    assert (output.num_drafted, output.num_accepted) == (11, 1 + 2 + 3)
    assert output.text == "abxyz"


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"slo": Slo(ttft=-1.0)}, r"slo\.ttft_ms"),
        ({"slo": {"ttft_ms": 5}}, "slo must be a Slo"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"tenant": "x" * 65}, "tenant"),
        ({"tenant": None}, "tenant"),
        ({"speculative": {"method": "none"}}, "speculative must be a Speculative"),
        ({"speculative": Speculative(method="eagle")}, r"speculative\.method must be one of none .*, got 'eagle'"),
        ({"speculative": Speculative(num_tokens=5)}, r"speculative\.num_tokens must be a whole number from 0 to 0"),
    ],
)
def test_promises_that_are_none_are_refused_before_anything_is_sent(
    connect: Callable[[Script], LLM], terms: dict[str, Any], says: str
) -> None:
    llm = connect(echo)
    for call in (
        lambda: llm.generate("x", PARAMS, progress=False, **terms),
        lambda: llm.chat([{"role": "user", "content": "hi"}], PARAMS, progress=False, **terms),
        lambda: llm.samples("x", PARAMS, **terms),
    ):
        with pytest.raises(RequestError, match=says):
            call()
    assert client_of(llm).sent == []


def test_what_runs_out_of_time_is_told_and_leaves_the_others(connect: Callable[[Script], LLM]) -> None:
    def expires(request: AddRequest) -> Iterator[Chunk]:
        yield Chunk(request.request_id, 0, request.prompt_ids[:1])
        if request.params.seed == 13:
            yield Chunk(request.request_id, 0, [], "expired", error="deadline")
        else:
            yield Chunk(request.request_id, 0, request.prompt_ids[1:], "length")

    good, late = connect(expires).generate(["good", "late"], [PARAMS, replace(PARAMS, seed=13)], progress=False)
    assert good.outputs[0].text == "good"
    assert (late.outputs[0].finish_reason, late.outputs[0].error) == ("expired", "deadline")
    assert len(late.outputs[0].token_ids) == 1


# samples


def countdown(request: AddRequest) -> Iterator[Chunk]:
    """Sample i repeats the first token n - i times, so that the last of them ends first; the longest are endless."""
    n = request.params.n
    for turn in range(1, 50):
        for index in range(n):
            length = n - index
            if turn <= length:
                yield Chunk(request.request_id, index, request.prompt_ids[:1], "length" if turn == length else None)


def test_samples_come_as_they_end(connect: Callable[[Script], LLM]) -> None:
    llm = connect(countdown)
    samples = list(llm.samples("a", replace(PARAMS, n=5)))
    assert [sample.index for sample in samples] == [4, 3, 2, 1, 0]
    assert [sample.text for sample in samples] == ["a" * i for i in range(1, 6)]
    assert client_of(llm).aborted == []


def test_the_first_verified_sample_is_the_last_one(connect: Callable[[Script], LLM]) -> None:
    llm = connect(countdown)
    asked: list[int] = []

    def verify(sample: SampleOutput) -> bool:
        asked.append(sample.index)
        return len(sample.text) == 3

    seen = []
    for sample in llm.samples("a", replace(PARAMS, n=40), verify):
        seen.append(sample.index)
        cancelled = list(client_of(llm).aborted)
    assert seen == asked == [39, 38, 37]
    assert cancelled == [client_of(llm).sent[0].request_id], "before the caller gets it"
    assert llm.generate("again", PARAMS, progress=False)[0].outputs[0].finish_reason == "length"


def test_a_sample_that_failed_is_no_candidate(connect: Callable[[Script], LLM]) -> None:
    def fails(request: AddRequest) -> Iterator[Chunk]:
        yield Chunk(request.request_id, 0, [], "error", error="no finite logits")
        yield Chunk(request.request_id, 1, [], "expired", error="timeout")
        yield Chunk(request.request_id, 2, request.prompt_ids, "stop")

    asked: list[int] = []
    llm = connect(fails)
    samples = list(llm.samples("a", replace(PARAMS, n=3), lambda sample: bool(asked.append(sample.index))))
    assert [sample.finish_reason for sample in samples] == ["error", "expired", "stop"]
    assert asked == [2]


def test_leaving_the_loop_and_a_verifier_that_raises_cancel_the_rest(connect: Callable[[Script], LLM]) -> None:
    llm = connect(countdown)
    loop = llm.samples("a", replace(PARAMS, n=40))
    next(loop)
    loop.close()
    assert len(client_of(llm).aborted) == 1

    def broken(sample: SampleOutput) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(llm.samples("a", replace(PARAMS, n=40), broken))
    assert len(client_of(llm).aborted) == 2
    assert llm.generate("again", PARAMS, progress=False)[0].outputs[0].finish_reason == "length"


def test_a_call_in_the_middle_of_the_loop_is_refused_and_not_a_deadlock(connect: Callable[[Script], LLM]) -> None:
    llm = connect(countdown)
    loop = llm.samples("a", replace(PARAMS, n=4))
    next(loop)
    with pytest.raises(RuntimeError, match="in the middle of samples"):
        llm.generate("x", PARAMS, progress=False)
    assert len(list(loop)) == 3
    llm.generate("x", PARAMS, progress=False)


def test_nothing_is_sent_before_the_first_sample_is_asked_for(connect: Callable[[Script], LLM]) -> None:
    llm = connect(countdown)
    loop = llm.samples("a", replace(PARAMS, n=4))
    assert client_of(llm).sent == []
    loop.close()
    with pytest.raises(RequestError, match=r"^n must be"):
        llm.samples("a", replace(PARAMS, n=10_001))
    with pytest.raises(RequestError, match="stop"):
        llm.samples("a", PARAMS, stop="")


def test_thousands_of_samples(connect: Callable[[Script], LLM]) -> None:
    def quick(request: AddRequest) -> Iterator[Chunk]:
        for index in range(request.params.n):
            yield Chunk(request.request_id, index, request.prompt_ids, "length")

    llm = connect(quick)
    assert [sample.index for sample in llm.samples("a", replace(PARAMS, n=10_000))] == list(range(10_000))
    (answer,) = llm.generate("a", replace(PARAMS, n=3000), progress=False)
    assert [output.index for output in answer.outputs] == list(range(3000))


def test_a_folder_that_cannot_be_read_closes_the_engine(tmp_path: Path) -> None:
    client = ScriptedClient(tmp_path, echo)
    with pytest.raises(EngineStartError, match=r"tokenizer\.json"):
        LLM.from_client(client)
    assert client.closed


def test_leaving_the_block_closes(byte_level_folder: Path) -> None:
    client = ScriptedClient(byte_level_folder, echo)
    with LLM.from_client(client):
        pass
    assert client.closed


def test_importing_the_package_brings_nothing_heavy() -> None:
    code = "import sys, quire; quire.LLM; print(sorted({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert quire.SamplingParams is SamplingParams
    with pytest.raises(AttributeError):
        _ = quire.nothing
