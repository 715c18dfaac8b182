"""The suffix automaton against a naive search of the same texts."""

import random
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.spec.outputs import Outputs
from quire.engine.spec.suffix import ROOT, SuffixAutomaton

texts = st.lists(st.lists(st.integers(0, 2), max_size=14), max_size=5)


def written(parts: list[list[int]], automaton: SuffixAutomaton | None = None) -> SuffixAutomaton:
    """All texts in turns, a token of each, as the sequences of a batch are."""
    automaton = automaton or SuffixAutomaton()
    states = [ROOT] * len(parts)
    for i in range(max(map(len, parts), default=0)):
        for k, part in enumerate(parts):
            if i < len(part):
                states[k] = automaton.write(states[k], part[i])
    return automaton


def naive(parts: list[list[int]], tokens: list[int]) -> int:
    """The length of the longest suffix of tokens that stands in a text with something behind it."""
    for length in range(len(tokens), 0, -1):
        suffix = tokens[len(tokens) - length :]
        if any(part[i : i + length] == suffix for part in parts for i in range(len(part) - length)):
            return length
    return 0


def occurs(parts: list[list[int]], tokens: list[int]) -> bool:
    return any(part[i : i + len(tokens)] == tokens for part in parts for i in range(len(part)))


def check(automaton: SuffixAutomaton, parts: list[list[int]], query: list[int]) -> None:
    state, length = automaton.find(query)
    assert length == naive(parts, query)
    if length:
        guess = automaton.read(state, 3)
        assert guess
        assert occurs(parts, query[len(query) - length :] + guess[:1])
        assert all(occurs(parts, guess[i : i + 2]) for i in range(len(guess) - 1))


@settings(max_examples=300, deadline=None)
@given(parts=texts, query=st.lists(st.integers(0, 3), max_size=8))
def test_the_longest_known_suffix_is_found(parts, query):
    automaton = written(parts)
    check(automaton, parts, query)
    for part in parts:
        check(automaton, parts, part)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.integers(0, 1), min_size=1, max_size=60))
def test_it_has_at_most_two_states_for_each_token(text):
    assert written([text]).num_states <= max(2 * len(text), 2)


class Unsplit(SuffixAutomaton):
    """Planted: a transition leads to a longer substring's state, which says more than was read."""

    def _exactly(self, state: int, token: int, target: int) -> int:
        return target


def test_the_check_finds_states_that_were_not_split():
    rng = random.Random(0)
    found = 0
    for _ in range(50):
        parts = [rng.choices(range(3), k=12) for _ in range(3)]
        check(written(parts), parts, parts[0])
        try:
            check(written(parts, Unsplit()), parts, parts[0])
        except AssertionError:
            found += 1
    assert found > 10


def test_what_was_written_last_is_read():
    automaton = written([[5, 6, 7, 1]])
    state = ROOT
    for token in (5, 6, 8, 2):
        state = automaton.write(state, token)
    assert automaton.read(automaton.find([5, 6])[0], 4) == [8, 2]


def test_outputs_of_another_salt_are_never_seen():
    outputs = Outputs()
    outputs.write("a", None, [1, 2, 3, 4])
    assert outputs.continuation("a", [1, 2], 2) == ([3, 4], 2)
    assert outputs.continuation("b", [1, 2], 2) == ([], 0)
    outputs.write("b", None, [1, 2, 9])
    assert outputs.continuation("a", [1, 2], 2) == ([3, 4], 2)
    assert outputs.continuation("b", [1, 2], 2) == ([9], 2)


def test_the_oldest_outputs_are_given_up_first_and_the_rest_is_bounded():
    outputs = Outputs(remembered=200)
    tracemalloc.start()
    try:
        for text in range(100):
            first = 1000 * text
            outputs.write(f"salt {text % 3}", None, range(first, first + 20))
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    kept = [text for text in range(100) if outputs.continuation(f"salt {text % 3}", [1000 * text], 1)[1]]
    assert kept == list(range(100 - len(kept), 100))
    assert 5 <= len(kept) <= 10
    assert size < 200 * 1000


def test_a_sequence_goes_on_after_its_generation_was_given_up():
    outputs = Outputs(remembered=8)
    place = None
    for token in range(40):
        place = outputs.write("", place, [token])
    assert outputs.continuation("", [36, 37], 1) == ([38], 2)
    assert outputs.continuation("", [3], 1) == ([], 0)
