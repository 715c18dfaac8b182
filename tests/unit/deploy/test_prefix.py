"""Names of prompts' beginnings: equal as far as the prompts are, different from there on, never another caller's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.deploy.ray.prefix import CHUNK_BYTES, MAX_CHUNKS, beginning, chain, chain_of

TEXT = st.text(max_size=600)
ROLE = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLE, "content": TEXT}), min_size=1, max_size=6)


def common(a: tuple[bytes, ...], b: tuple[bytes, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.binary(max_size=2000), st.binary(max_size=2000), st.binary(max_size=300))
def test_two_chains_agree_exactly_as_far_as_their_texts_do(shared: bytes, one: bytes, other: bytes) -> None:
    a, b = shared + one, shared + other
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(chain(a), chain(b)) == same // CHUNK_BYTES
    assert len(chain(a)) == len(a) // CHUNK_BYTES


@given(MESSAGES, MESSAGES)
def test_a_conversation_that_goes_on_begins_as_before(said: list[Any], more: list[Any]) -> None:
    before = chain_of({"messages": said, "temperature": 0.7, "stream": True}, {})
    after = chain_of({"stream": False, "messages": said + more, "seed": 4}, {})
    # The list's closing bracket is the one byte that the shorter one does not share.
    assert common(before, after) >= (len(beginning({"messages": said})) - 1) // CHUNK_BYTES


@given(TEXT, TEXT)
def test_a_prompt_that_goes_on_begins_as_before(text: str, more: str) -> None:
    before, after = chain_of({"prompt": text}, {}), chain_of({"prompt": text + more}, {})
    assert common(before, after) >= (len(beginning({"prompt": text})) - 1) // CHUNK_BYTES


LONG = {"prompt": "so it begins " * 50}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (LONG, {"authorization": "Bearer another"}),
        (LONG, {"x-api-key": "another"}),
        (LONG | {"cache_salt": "mine"}, {}),
        (LONG | {"tenant": "alice"}, {}),
        ({"prompt": "then it ends " * 50}, {}),
        ({"messages": [{"role": "user", "content": LONG["prompt"]}]}, {}),
    ],
)
def test_what_the_cache_would_not_share_has_other_names(body: dict[str, Any], headers: dict[str, str]) -> None:
    assert not {*chain_of(LONG, {})} & {*chain_of(body, headers)}


def test_tools_and_instructions_come_before_what_was_said() -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "looks " * 100}}
    one = chain_of({"messages": [{"role": "user", "content": "a" * 300}], "tools": [tool]}, {})
    two = chain_of({"tools": [tool], "messages": [{"role": "user", "content": "b" * 300}]}, {})
    assert common(one, two) >= 4


def test_of_several_prompts_the_first_counts() -> None:
    assert chain_of({"prompt": ["x" * 500, "y"]}, {}) == chain_of({"prompt": "x" * 500}, {})
    assert chain_of({"prompt": [[1, 2] * 200, [3]]}, {}) == chain_of({"prompt": [1, 2] * 200}, {})
    assert common(chain_of({"prompt": [7] * 400}, {}), chain_of({"prompt": [7] * 400 + [8] * 400}, {})) >= 5


def test_a_long_prompt_costs_a_bounded_number_of_names() -> None:
    assert len(chain(bytes(10 * MAX_CHUNKS * CHUNK_BYTES))) == MAX_CHUNKS


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": None}, {"prompt": ""}, {"prompt": 7}, {"prompt": [None]}, {"messages": "no list"}, {"input": {}}],
)
def test_odd_bodies_have_a_chain_all_the_same(body: dict[str, Any]) -> None:
    assert chain_of(body, {}) == ()
