"""The sampler of a step: what each parameter does, and that no sequence ever feels another one or its slot."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.engine import sampler as module
from quire.engine.errors import RequestError
from quire.engine.sampler import NAN_LOGITS, NO_TOKEN_LEFT, Sampler
from quire.kernels import Target, resolve
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import RowResult

V, SLOTS, EOS = 12, 4, 11
TARGET = Target("cpu", torch.float32, 64, "fp32")
TUNED = resolve(TARGET)
REFERENCE = resolve(TARGET, dict.fromkeys(("sample", "greedy", "process_logits", "token_logprobs"), "reference"))
# Log-probabilities of two implementations may differ in the last bit; those of one never depend on the company.
SOLO = resolve(TARGET, dict.fromkeys(("sample", "greedy", "process_logits"), "reference"))


def make(kernels=TUNED, cls=Sampler) -> Sampler:
    return cls(kernels, V, SLOTS, (EOS,), "cpu")


def params(**given_) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **given_})


def model(tokens: list[int]) -> Tensor:
    """Logits [V] that are a function of the tokens before; halves, so that ties happen."""
    generator = torch.Generator().manual_seed(zlib.crc32(bytes(tokens)))
    return (torch.randn(V, generator=generator) * 6).round() / 2


def run_alone(
    p: SamplingParams, prompt: list[int], count: int, index: int = 0, sampler: Sampler | None = None
) -> list[int]:
    sampler, tokens = sampler or make(), list(prompt)
    sampler.add(0, p, index, tokens, len(prompt))
    for _ in range(count):
        (result,) = sampler.sample(model(tokens)[None], [0], [len(tokens)])
        tokens += result.token_ids
    return tokens[len(prompt) :]


class TestParameters:
    LOGITS = torch.arange(V).float() / 4  # the likeliest is V - 1

    def draw(self, p: SamplingParams, tokens=(0,), num_prompt=1, logits: Tensor | None = None) -> RowResult:
        sampler = make()
        sampler.add(2, p, 0, list(tokens), num_prompt)
        return sampler.sample((self.LOGITS if logits is None else logits)[None], [2], [len(tokens)])[0]

    def test_greedy(self):
        assert self.draw(params()).token_ids == [V - 1]
        assert self.draw(params(), logits=torch.zeros(V)).token_ids == [0]

    def test_bias_allow_list_and_bad_words(self):
        assert self.draw(params(logit_bias={3: 100.0})).token_ids == [3]
        assert self.draw(params(allowed_token_ids=(4, 2, 4))).token_ids == [4]
        assert self.draw(params(allowed_token_ids=(4, 2), logit_bias={9: 100.0})).token_ids == [4]
        assert self.draw(params(bad_words=((V - 1,),))).token_ids == [V - 2]

    def test_a_bad_word_is_banned_only_where_it_would_be_completed(self):
        p = params(bad_words=((1, 2, V - 1),))
        assert self.draw(p, tokens=(1, 2)).token_ids == [V - 2]
        assert self.draw(p, tokens=(5, 1, 2), num_prompt=2).token_ids == [V - 2]
        assert self.draw(p, tokens=(2, 1)).token_ids == [V - 1]
        assert self.draw(p, tokens=(2,)).token_ids == [V - 1]

    def test_end_tokens_wait_for_min_tokens(self):
        p = params(min_tokens=2, stop_token_ids=(V - 2,))
        assert self.draw(p).token_ids == [V - 3]
        assert self.draw(p, tokens=(0, 5), num_prompt=1).token_ids == [V - 3]
        assert self.draw(p, tokens=(0, 5, 5), num_prompt=1).token_ids == [V - 1]
        assert self.draw(p, tokens=(0, 5, 5), num_prompt=2).token_ids == [V - 3]

    def test_repetition_counts_prompt_and_output_and_others_output_only(self):
        logits = torch.tensor([1.0, 1.5] + [-9.0] * (V - 2))
        assert self.draw(params(repetition_penalty=2.0), tokens=(1,), logits=logits).token_ids == [0]
        assert self.draw(params(repetition_penalty=2.0), tokens=(5, 1), logits=logits).token_ids == [0]
        for penalty in ({"presence_penalty": 1.0}, {"frequency_penalty": 1.0}):
            assert self.draw(params(**penalty), tokens=(1,), logits=logits).token_ids == [1]
            assert self.draw(params(**penalty), tokens=(5, 1), logits=logits).token_ids == [0]
        twice = {"tokens": (5, 1, 1, 0), "num_prompt": 1, "logits": logits}
        assert self.draw(params(presence_penalty=0.3), **twice).token_ids == [1]
        assert self.draw(params(frequency_penalty=0.6), **twice).token_ids == [0]

    def test_negative_penalties_reward(self):
        logits = torch.tensor([1.0, 1.5] + [-9.0] * (V - 2))
        assert self.draw(params(presence_penalty=-1.0), tokens=(5, 0), logits=logits).token_ids == [0]

    def test_counts_grow_with_every_draw(self):
        sampler = make()
        sampler.add(0, params(frequency_penalty=1.0), 0, [5], 1)
        drawn = [
            sampler.sample(torch.tensor([[1.0, 0.5] + [-9.0] * (V - 2)]), [0], [i])[0].token_ids[0] for i in range(6)
        ]
        assert drawn == [0, 1, 0, 1, 0, 1]

    def test_many_distinct_tokens(self):
        """The table of counts grows past its first room."""
        sampler = Sampler(TUNED, 1000, 1, (), "cpu")
        sampler.add(0, params(presence_penalty=2000.0), 0, [0], 1)
        drawn = [sampler.sample(torch.arange(1000.0)[None], [0], [i])[0].token_ids[0] for i in range(500)]
        assert drawn == list(range(999, 499, -1))

    @pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
    def test_seeds_are_64_bits(self, seed):
        assert run_alone(params(temperature=1.0, seed=seed), [1], 8) == run_alone(
            params(temperature=1.0, seed=seed % 2**64), [1], 8
        )

    def test_seed_and_sample_index_make_the_noise(self):
        runs = {tuple(run_alone(params(temperature=5.0, seed=s), [1], 12, index=i)) for s in (1, 2) for i in (0, 1)}
        assert len(runs) == 4

    def test_nothing_left_to_draw(self):
        for temperature in (0.0, 1.0):
            p = params(allowed_token_ids=(4,), bad_words=((4,),), temperature=temperature, top_p=0.5)
            assert self.draw(p) == RowResult(error=NO_TOKEN_LEFT)


class TestLogprobs:
    LOGITS = TestParameters.LOGITS

    def draw(self, **given_) -> RowResult:
        return TestParameters().draw(params(**given_))

    def test_off_unless_asked_for(self):
        assert self.draw().logprobs is None

    def test_are_the_models_own_before_any_edit(self):
        (plain,) = self.draw(logprobs=2).logprobs
        (edited,) = self.draw(
            logprobs=2, logit_bias={3: 100.0}, temperature=0.5, repetition_penalty=3.0, bad_words=((V - 1,),)
        ).logprobs
        every = TUNED.token_logprobs.run(self.LOGITS[None], torch.tensor([0]), V)
        log_p = dict(zip(every.top_ids[0].tolist(), every.top_logprobs[0].tolist(), strict=True))
        assert plain == (V - 1, log_p[V - 1], 1, ((V - 1, log_p[V - 1]), (V - 2, log_p[V - 2])))
        assert edited == (3, log_p[3], V - 3, plain.top)

    def test_greedy_shows_by_equality(self):
        (found,) = self.draw(logprobs=1).logprobs
        assert found.logprob == found.top[0][1]

    @pytest.mark.parametrize(("k", "count"), [(0, 0), (3, 3), (V + 5, V), (-1, V)])
    def test_counts(self, k, count):
        (found,) = self.draw(logprobs=k).logprobs
        assert [token for token, _ in found.top] == list(range(V - 1, V - 1 - count, -1))

    def test_of_tokens_that_are_named(self):
        (every,) = self.draw(logprobs=-1).logprobs
        log_p = dict(every.top)
        (found,) = self.draw(logprobs=1, logprob_token_ids=(2, V - 1, 0)).logprobs
        assert found[:3] == every[:3]
        assert [token for token, _ in found.top] == [V - 1, 2, 0]  # the best one is listed once
        assert dict(found.top)[found.token_id] == found.logprob
        assert dict(found.top) == pytest.approx({token: log_p[token] for token in (V - 1, 2, 0)}, abs=1e-6)

    def test_of_a_prompt(self):
        logits = torch.stack([model([i]) for i in range(5)])
        targets = [3, 1, 4, 1, 5]
        found = make(REFERENCE).rate(logits, targets, 2).wait()
        log_p = logits.log_softmax(-1)
        assert [f.token_id for f in found] == targets
        assert [f.logprob for f in found] == [log_p[i, t].item() for i, t in enumerate(targets)]
        assert [f.rank for f in found] == [1 + int((logits[i] > logits[i, t]).sum()) for i, t in enumerate(targets)]
        assert all(len(f.top) == 2 and f.top[0][1] == log_p[i].max() for i, f in enumerate(found))
        assert len(make().rate(logits, targets, -1).wait()[0].top) == V

    def test_of_an_unsound_prompt(self):
        logits = torch.stack([model([i]) for i in range(3)])
        logits[1, 4] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            make().rate(logits, [1, 2, 3], 1).wait()


class TestOneBadRowEndsOneRow:
    KINDS = (params(logprobs=1), params(temperature=1.0), params(repetition_penalty=1.3, temperature=0.8, top_p=0.9))

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize("bad", range(3))
    def test_unsound_logits(self, poison, bad):
        logits = torch.stack([model([i]) for i in range(3)])
        clean = self.results(logits)
        logits[bad, 5] = poison
        poisoned = self.results(logits)
        assert poisoned.pop(bad) == RowResult(error=NAN_LOGITS)
        clean.pop(bad)
        assert poisoned == clean

    def test_minus_infinity_everywhere(self):
        logits = torch.stack([model([0]), torch.full((V,), -math.inf), model([2])])
        assert [r.error for r in self.results(logits)] == [None, NAN_LOGITS, None]

    def test_a_fault_in_one_sequences_edits(self, monkeypatch):
        logits = torch.stack([model([i]) for i in range(3)])
        clean = self.results(logits)
        monkeypatch.setattr(module.SequenceState, "edits", lambda self, path: 1 // 0)
        faulty = self.results(logits)
        assert faulty[:2] == clean[:2]
        assert "ZeroDivisionError" in faulty[2].error

    def results(self, logits: Tensor) -> list[RowResult]:
        sampler = make()
        for slot, p in enumerate(self.KINDS):
            sampler.add(slot, p, 0, [slot], 1)
        return sampler.sample(logits, [0, 1, 2], [1, 1, 1])

    def test_an_empty_slot_is_the_runners_mistake(self):
        with pytest.raises(KeyError):
            make().sample(torch.zeros(1, V), [0], [1])


class TestIdsOutsideTheVocabulary:
    @pytest.mark.parametrize("token", [-(2**63), -1, V, 2**31, 2**63 - 1])
    @pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "bad_words", "stop_token_ids", "prompt"])
    def test_are_refused(self, name, token):
        given_ = {
            "logit_bias": {"logit_bias": {token: 1.0}},
            "allowed_token_ids": {"allowed_token_ids": (token,)},
            "bad_words": {"bad_words": ((1, token),)},
            "stop_token_ids": {"stop_token_ids": (token,), "min_tokens": 1},
            "prompt": {"presence_penalty": 1.0},
        }[name]
        with pytest.raises(RequestError, match=f"{name}.*{token}") as caught:
            make().add(0, params(**given_), 0, [token if name == "prompt" else 1], 1)
        assert caught.value.param == name

    def test_an_end_token_past_the_logits_is_never_drawn_anyway(self):
        sampler = Sampler(TUNED, V, 1, (V + 5, EOS), "cpu")
        sampler.add(0, params(min_tokens=1), 0, [1], 1)
        assert sampler.sample(TestParameters.LOGITS[None], [0], [1])[0].token_ids == [EOS - 1]

    def test_an_empty_allow_list_is_refused(self):
        with pytest.raises(RequestError, match="allowed_token_ids is empty"):
            make().add(0, params(allowed_token_ids=()), 0, [1], 1)


ids = st.integers(0, V - 1)
any_params = st.builds(
    SamplingParams,
    max_tokens=st.just(50),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([0.1, 0.6, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.8, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4, 0.7]),
    min_tokens=st.sampled_from([0, 0, 3]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(ids, max_size=2).map(tuple),
    logit_bias=st.dictionaries(ids, st.sampled_from([-3.0, 2.0, 100.0]), max_size=3),
    allowed_token_ids=st.none() | st.lists(ids, min_size=4, max_size=9).map(tuple),
    bad_words=st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    logprobs=st.sampled_from([None, None, 0, 2, -1]),
    logprob_token_ids=st.lists(ids, max_size=3, unique=True).map(tuple),
)


@dataclass
class Sequence:
    """A sequence of the machine, and what it got so far."""

    params: SamplingParams
    prompt: list[int]
    index: int
    length: int
    results: list[RowResult] = field(default_factory=list)
    slot: int | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + [token for result in self.results for token in result.token_ids]

    @property
    def done(self) -> bool:
        return len(self.results) == self.length or any(result.error for result in self.results)


def live(sequences: list[Sequence], sampler: Sampler, random: Random) -> None:
    """Any order of adding, stepping some, preempting into another slot and removing, until all are done."""
    waiting, running = list(sequences), []
    free = list(range(SLOTS))
    while waiting or running:
        random.shuffle(free)
        while waiting and free and random.random() < 0.7:
            sequence = waiting.pop()
            sequence.slot = free.pop()
            sampler.add(sequence.slot, sequence.params, sequence.index, sequence.tokens, len(sequence.prompt))
            running.append(sequence)
        step = random.sample(running, random.randint(0, len(running)))
        if step:
            logits = torch.stack([model(s.tokens) for s in step])
            found = sampler.sample(logits, [s.slot for s in step], [len(s.tokens) for s in step])
            for sequence, result in zip(step, found, strict=True):
                sequence.results.append(result)
        for sequence in list(running):
            if sequence.done or random.random() < 0.1:
                sampler.remove(sequence.slot)
                free.append(sequence.slot)
                running.remove(sequence)
                if not sequence.done:
                    waiting.insert(0, sequence)


def alone(sequence: Sequence) -> list[RowResult]:
    solo = Sequence(sequence.params, sequence.prompt, sequence.index, sequence.length)
    sampler = make(SOLO)
    sampler.add(0, solo.params, solo.index, solo.tokens, len(solo.prompt))
    while not solo.done:
        solo.results += sampler.sample(model(solo.tokens)[None], [0], [len(solo.tokens)])
    return solo.results


any_sequence = st.builds(
    Sequence, any_params, st.lists(ids, min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 6)
)


@given(st.lists(any_sequence, min_size=1, max_size=7), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_every_sequence_equals_its_solo_run(sequences, schedule):
    """Slots are recycled, batch-mates come and go, sequences move: tokens, logprobs and errors stay the same."""
    live(sequences, make(), Random(schedule))
    for sequence in sequences:
        assert sequence.results == alone(sequence)


class KeepsOldBias(Sampler):
    """The planted bug: a recycled slot keeps one field of the sequence before."""

    def remove(self, slot: int) -> None:
        pass

    def add(self, slot, *sequence) -> None:
        before = self._slots[slot]
        super().add(slot, *sequence)
        if before is not None and self._slots[slot]._biased is None:
            self._slots[slot]._biased, self._slots[slot]._bias = before._biased, before._bias
            self._slots[slot].edited |= before.edited


class NoiseFromTheSlot(Sampler):
    """The planted bug: the slot's number reaches the noise."""

    def add(self, slot, *sequence) -> None:
        super().add(slot, *sequence)
        self._slots[slot].seed ^= slot


@pytest.mark.parametrize("cls", [KeepsOldBias, NoiseFromTheSlot])
def test_a_planted_leak_is_caught(cls):
    random = Random(0)
    kinds = [params(temperature=1.0), params(logit_bias={2: 100.0}), params(temperature=1.0, top_k=4)]
    sequences = [Sequence(kinds[i % 3], [i], 0, 4) for i in range(12)]
    live(sequences, make(cls=cls), random)
    assert any(sequence.results != alone(sequence) for sequence in sequences)
