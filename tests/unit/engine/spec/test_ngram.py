"""Guesses by lookup, against a naive search; what one sequence may learn of another."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.engine.spec.ngram import LONGEST, SHORTEST, NgramProposer, continuation, earlier, merge
from quire.engine.spec.proposer import DraftTree, View
from quire.scheduler.drafts import chain, parse_shape


def view(tokens, shape=None, slot=0, num_prompt=None, salt=""):
    num_prompt = len(tokens) if num_prompt is None else num_prompt
    ids = np.array(tokens, np.int64)
    return View(slot, ids, num_prompt, np.zeros(1, np.int32), None, shape or chain(4), salt)  # lookup needs no state


def guess(proposer, *args, **kwargs):
    (draft,), drafting = proposer.propose([view(*args, **kwargs)])
    assert (drafting.method, drafting.levels, drafting.rows) == ("ngram", 0, 0)
    assert drafting.seconds > 0
    assert draft is None or draft.q is None
    return None if draft is None else draft.tree


def naive(tokens, longest=LONGEST):
    """[(start, length)] of all earlier places, longest first, then latest."""
    n, found = len(tokens), []
    for start in range(n - 1, 0, -1):
        length = 0
        while length < min(longest, start) and tokens[start - 1 - length] == tokens[n - 1 - length]:
            length += 1
        if length >= SHORTEST:
            found.append((start, length))
    return sorted(found, key=lambda place: -place[1])


@settings(max_examples=400, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60), longest=st.integers(SHORTEST, 8))
@example(tokens=[0] * 40, longest=8)
@example(tokens=[1, 0, 0, 1, 0, 0], longest=8)
def test_all_earlier_places_are_found_the_longest_first(tokens, longest):
    starts, lengths = earlier(np.array(tokens, np.int64), longest)
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == naive(tokens, longest)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60), depth=st.integers(1, 6))
def test_a_chain_goes_on_as_the_longest_match_did(tokens, depth):
    tree = guess(NgramProposer(), tokens, chain(depth))
    places = naive(tokens)
    if not places:
        assert tree is None
        return
    text = list(tokens)
    for i in range(depth):  # token by token, so that a match that reaches the end goes on with the guess itself
        text.append(text[places[0][0] + i])
    assert tree == DraftTree(tuple(text[len(tokens) :]), tuple(range(-1, depth - 1)))


def test_a_repetition_is_continued_beyond_the_end():
    assert continuation(np.array([7, 1, 2, 3]), 2, 5) == [2, 3, 2, 3, 2]


def test_different_continuations_share_what_they_have_in_common():
    ways = [[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert merge(ways, parse_shape("rsd-c:2,2,1", 1)) == DraftTree((1, 2, 3, 5, 6, 7, 8, 9), (-1, 0, 1, 0, 3, -1, 5, 6))
    assert merge(ways, parse_shape("rsd-s:2x3", 1)) == DraftTree((1, 2, 3, 4, 5, 7), (-1, 0, 1, 1, 0, -1))
    assert merge(ways, chain(2)) == DraftTree((1, 2), (-1, 0))
    assert merge([], chain(2)) == DraftTree((), ())


@settings(max_examples=300, deadline=None)
@given(
    ways=st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=12),
    name=st.sampled_from(["chain:3", "rsd-c:2,2,1", "rsd-c:1,3", "rsd-s:2x3", "rsd-s:3x2"]),
)
def test_a_tree_never_exceeds_its_shape(ways, name):
    shape = parse_shape(name, 1)
    tree = merge(ways, shape)
    assert len(tree.tokens) <= shape.nodes
    assert all(parent < node for node, parent in enumerate(tree.parents))
    depths = tree.depths()
    for node, depth in enumerate(depths):
        siblings = [i for i, parent in enumerate(tree.parents) if parent == tree.parents[node]]
        assert len({tree.tokens[i] for i in siblings}) == len(siblings)
        peers = siblings if shape.kind == "rsd-c" else [i for i in range(len(depths)) if depths[i] == depth]
        assert len(peers) <= shape.widths[depth - 1]
        assert any(tuple(way[:depth]) == tree.path(node) for way in ways)


def test_another_sequence_is_followed_when_it_agrees_on_more():
    proposer = NgramProposer()
    guess(proposer, [50, 1, 2, 3, 4, 5, 6, 7], slot=1, num_prompt=1)
    own = [2, 3, 9, 9, 1, 2, 3]
    assert guess(NgramProposer(), own).tokens == (9, 9, 1, 2)
    assert guess(proposer, own).tokens == (4, 5, 6, 7)
    # Its own text agrees on as much: it goes first.
    assert guess(proposer, [1, 2, 3, 9, 8, 7, 1, 2, 3], slot=2).tokens == (9, 8, 7, 1)


def test_the_same_prompt_is_answered_as_before():
    proposer = NgramProposer()
    prompt = [11, 12, 13, 14, 15]
    for n in range(5, 10):
        guess(proposer, [*prompt, 21, 22, 23, 24][:n], num_prompt=5)
    proposer.enter(0)
    assert guess(proposer, prompt).tokens == (21, 22, 23, 24)


def test_a_continuation_of_another_salt_is_never_proposed():
    proposer = NgramProposer()
    secret = [1, 2, 3, 41, 42, 43, 44, 45]
    guess(proposer, secret, slot=1, num_prompt=1, salt="a")
    assert guess(proposer, [1, 2, 3], slot=2, salt="a").tokens == (41, 42, 43, 44)
    assert guess(proposer, [1, 2, 3], slot=3, salt="b") is None
    assert guess(proposer, [1, 2, 3], slot=4) is None
    # A slot that had the one salt gets a sequence with the other.
    proposer.enter(1)
    assert guess(proposer, [1, 2, 3], slot=1, salt="b") is None
    assert guess(proposer, [2, 3], slot=5, salt="b") is None


@pytest.mark.parametrize("told", [True, False])
def test_a_slot_s_next_sequence_is_a_text_of_its_own(told):
    """The twin that is not told joins both texts, and guesses what nobody wrote."""
    proposer = NgramProposer()
    guess(proposer, [90, 1, 2, 3], num_prompt=1)
    if told:
        proposer.enter(0)
    guess(proposer, [91, 92, 93, 94, 5, 6, 7], num_prompt=6)
    tree = guess(proposer, [80, 2, 3], slot=1)
    assert (tree is None) == told


def test_one_request_of_a_batch_learns_of_the_others_at_once():
    proposer = NgramProposer()
    views = [view([60, 1, 2, 3, 4], slot=0, num_prompt=1), view([61, 1, 2], slot=1, num_prompt=1), view([5], slot=2)]
    drafts, _ = proposer.propose(views)
    assert [draft and draft.tree.tokens for draft in drafts] == [None, (3, 4), None]


def test_a_returning_sequence_is_written_in_bounded_pieces():
    proposer = NgramProposer()
    text = list(range(100)) * 40
    draft = guess(proposer, text, num_prompt=1)
    assert draft.tokens == (0, 1, 2, 3)
    assert proposer._outputs._written <= 256
