"""Streams of any bytes: the pieces are the whole, whatever the chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from quire.engine.detokenizer import Detokenizer
from quire.engine.outputs import SampleOutput, SampleStream, TextOptions
from quire.engine.tokenizer import Tokenizer, load_tokenizer
from quire.scheduler.plan import Chunk

CHARACTERS = st.sampled_from(["a", " ", "\n", "é", "€", "🙂", "\ufffd", "𝒳"])
# Valid text, torn text, and noise.
DATA = st.one_of(
    st.binary(max_size=40),
    st.lists(CHARACTERS, max_size=12).map(lambda parts: "".join(parts).encode()),
    st.lists(st.one_of(CHARACTERS.map(str.encode), st.binary(min_size=1, max_size=2)), max_size=12).map(b"".join),
)


@pytest.fixture(scope="module")
def library() -> Library:
    """Byte-level: one token per byte, then "<|x|>" as a special token."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|x|>"])
    return library


@pytest.fixture(scope="module")
def tokenizer(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def id_of(tokenizer: Tokenizer) -> dict[int, int]:
    return {tokenizer.token_bytes(token_id)[0]: token_id for token_id in range(256)}


@settings(max_examples=400, deadline=None)
@given(data=DATA)
def test_the_pieces_are_the_whole(tokenizer: Tokenizer, library: Library, id_of: dict[int, int], data: bytes) -> None:
    ids = [id_of[byte] for byte in data]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    text = "".join(pieces) + detokenizer.finish()
    assert text == tokenizer.decode(ids) == library.decode(ids) == data.decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(data=DATA, special=st.lists(st.integers(0, 40), max_size=4), skip=st.booleans())
def test_special_tokens_in_between(
    tokenizer: Tokenizer, id_of: dict[int, int], data: bytes, special: list[int], skip: bool
) -> None:
    ids = [id_of[byte] for byte in data]
    for position in special:
        ids.insert(min(position, len(ids)), 256)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(data=DATA, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_nothing_torn_is_ever_shown(tokenizer: Tokenizer, id_of: dict[int, int], data: bytes, cuts: list[int]) -> None:
    """Whatever a stream has shown so far is the beginning of the whole, so no U+FFFD stands for half a character."""
    ids = [id_of[byte] for byte in data]
    whole = data.decode("utf-8", "replace")
    stream = SampleStream(tokenizer, TextOptions())
    output = SampleOutput(0)
    position = 0
    while position < len(ids):
        size = cuts[position % len(cuts)]
        last = position + size >= len(ids)
        output.add(stream.fold(Chunk("r", 0, ids[position : position + size], "length" if last else None)))
        assert whole.startswith(output.text)
        position += size
    assert output.text == whole
    assert output.token_ids == ids
    assert output.offsets == sorted(output.offsets)
