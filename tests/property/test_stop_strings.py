"""Stop strings against a search in the whole text, at any chunking."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from quire.engine.detokenizer import StopChecker
from quire.engine.outputs import SampleOutput, SampleStream, TextOptions
from quire.engine.tokenizer import Tokenizer, load_tokenizer
from quire.scheduler.plan import Chunk

ALPHABET = "ab€🙂"  # few characters, so that stops overlap the text, each other and themselves
TEXT = st.text(ALPHABET, max_size=40)
STOPS = st.lists(
    st.one_of(st.text(ALPHABET, min_size=1, max_size=5), st.text(ALPHABET, min_size=6, max_size=64)), max_size=4
)
CUTS = st.lists(st.integers(1, 7), min_size=1, max_size=10)


def naive(text: str, stops: list[str], include: bool, first_end: int = 0) -> tuple[str, str | None]:
    """Look at every beginning of the text: the first that ends with a stop string, the longest one where several do."""
    for end in range(max(first_end, 1), len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    pieces, position = [], 0
    while position < len(text):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(text[position : position + size])
        position += size
    return pieces


@settings(max_examples=1000, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=CUTS, include=st.booleans())
def test_as_a_search_in_the_whole_text(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    checker = StopChecker(tuple(stops), include)
    expected, expected_stop = naive(text, stops, include)
    shown, found = "", None
    for piece in pieces_of(text, cuts):
        released = checker.push(piece)
        shown += released.text
        assert expected.startswith(shown), "a part of a stop string leaked"
        if released.stop is not None:
            found = released.stop
            break
    else:
        shown += checker.finish()
    assert (shown, found) == (expected, expected_stop)


@settings(max_examples=500, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=CUTS)
def test_only_what_may_become_a_stop_string_is_held(text: str, stops: list[str], cuts: list[int]) -> None:
    if naive(text, stops, False)[1] is not None:
        return
    checker = StopChecker(tuple(stops))
    seen = shown = ""
    for piece in pieces_of(text, cuts):
        seen += piece
        shown += checker.push(piece).text
        prefixes = [stop[:n] for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert len(seen) - len(shown) == max(map(len, prefixes), default=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level: one token per byte, so that characters are torn as well."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@settings(max_examples=500, deadline=None)
@given(text=TEXT.filter(bool), stops=STOPS, cuts=CUTS, include=st.booleans(), min_tokens=st.integers(0, 60))
def test_the_whole_fold(
    tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool, min_tokens: int
) -> None:
    """Streamed in chunks of tokens: the same text, tokens and reason as a search in the text of all tokens.

    A stop string counts from the first character on that is complete with min_tokens tokens.
    """
    id_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    ids = [id_of[bytes([byte])] for byte in text.encode()]
    ends = [len(text[: i + 1].encode()) for i in range(len(text))]  # tokens that complete each character
    first_end = next((i + 1 for i, tokens in enumerate(ends) if tokens >= min_tokens), len(text) + 1)
    expected, expected_stop = naive(text, stops, include, first_end)

    options = TextOptions(stop=tuple(stops), include_stop_str_in_output=include)
    stream = SampleStream(tokenizer, options, min_tokens=min_tokens)
    output = SampleOutput(0)
    position = turn = 0
    while position < len(ids) and output.finish_reason is None:
        size = cuts[turn % len(cuts)]
        reason = "length" if position + size >= len(ids) else None
        output.add(stream.fold(Chunk("r", 0, ids[position : position + size], reason)))
        assert expected.startswith(output.text)
        position, turn = position + size, turn + 1

    assert output.text == expected
    if expected_stop is None:
        assert (output.finish_reason, output.token_ids) == ("length", ids)
    else:
        assert (output.finish_reason, output.stop_reason) == ("stop", expected_stop)
        matched = len(expected) if include else len(expected) + len(expected_stop)
        assert output.token_ids == ids[: ends[matched - 1]]
    assert len(output.token_ids) == len(output.offsets) == stream.num_tokens
