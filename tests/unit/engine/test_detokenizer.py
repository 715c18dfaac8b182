"""Text made token by token, and the fold of chunks into deltas."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine.detokenizer import Detokenizer, StopChecker
from quire.engine.outputs import Delta, RequestStream, SampleOutput, SampleStream, TextOptions
from quire.engine.tokenizer import Tokenizer, load_tokenizer
from quire.scheduler.plan import Chunk, TokenLogprob


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return load_tokenizer(byte_level_folder)


def logprobs_of(ids: list[int]) -> list[TokenLogprob]:
    return [TokenLogprob(token_id, -0.5, 1, ((token_id, -0.5),)) for token_id in ids]


def fold(stream: SampleStream, ids: list[int], reason: str | None = "length", stop: int | None = None) -> list[Delta]:
    """One token a chunk, the last with the engine's finish reason."""
    deltas = []
    for i, token_id in enumerate(ids):
        last = i == len(ids) - 1
        deltas.append(
            stream.fold(
                Chunk(
                    "r",
                    0,
                    [token_id],
                    finish_reason=reason if last else None,
                    stop_reason=stop if last else None,
                    logprobs=logprobs_of([token_id]),
                )
            )
        )
    return deltas


def whole(deltas: list[Delta]) -> SampleOutput:
    output = SampleOutput(0)
    for delta in deltas:
        output.add(delta)
    return output


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = [next(i for i in range(3, 259) if tokenizer.token_bytes(i) == bytes([byte])) for byte in "a€🙂".encode()]
    assert [detokenizer.push(i) for i in ids] == ["a", "", "", "€", "", "", "", "🙂"]
    assert detokenizer.finish() == ""


def test_half_a_character_shows_only_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = [next(i for i in range(3, 259) if tokenizer.token_bytes(i) == bytes([byte])) for byte in "🙂".encode()[:3]]
    assert [detokenizer.push(i) for i in ids] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_a_continuation_keeps_its_space_and_a_document_does_not(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    for prompt, text in (([1], "Hello"), ([], "Hello"), ([1, 261], " Hello")):
        detokenizer = Detokenizer(tokenizer, opens_document=tokenizer.opens_document(prompt))
        assert "".join(map(detokenizer.push, hello)) == text


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("hi"), 2, 2]
    assert "".join(map(Detokenizer(tokenizer).push, ids)) == "hi"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(map(shown.push, ids)) == "<|im_start|>hi<|im_end|><|im_end|>"


def test_spaces_between_special_tokens(sentencepiece_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    monkeypatch.setattr(tokenizer, "_bytes", [b"", b" <s>", b" </s>"])
    for spaces, text in ((True, " <s> </s>"), (False, " <s></s>")):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert detokenizer.push(1) + detokenizer.push(2) == text


def test_a_stop_string_across_tokens_never_leaks(tokenizer: Tokenizer) -> None:
    stream = SampleStream(tokenizer, TextOptions(stop=("END!",)))
    ids = [i for char in "one EN two END! three" for i in tokenizer.encode(char)]
    deltas = fold(stream, ids)
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert "one EN two ".startswith(shown)
    output = whole(deltas)
    assert (output.text, output.finish_reason, output.stop_reason) == ("one EN two ", "stop", "END!")
    assert "one EN two '" in repr(output)
    assert output.token_ids == ids[: len("one EN two END!")]
    assert stream.num_tokens == len(output.token_ids) == len(output.logprobs or ())


def test_held_text_goes_as_soon_as_it_is_harmless() -> None:
    stops = StopChecker(("abcab", "bd"))
    assert stops.push("ab").text == ""
    assert stops.push("ca").text == ""
    assert stops.push("x").text == "abcax"
    assert stops.push("ab").text == ""
    assert stops.push("a").text == "ab"  # "a" may still begin "abcab"
    assert stops.finish() == "a"


def test_the_stop_that_is_completed_first_wins_and_of_those_the_longest() -> None:
    assert StopChecker(("xabz", "b")).push("xabz") == ("xa", "b")
    assert StopChecker(("c", "bc", "abc")).push("xabc") == ("x", "abc")


def test_included_stop_string_is_shown_and_nothing_is_held() -> None:
    stops = StopChecker(("END",), include_stop=True)
    assert stops.push("a E") == ("a E", None)
    assert stops.push("NDx") == ("ND", "END")


def test_a_stop_string_waits_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = [i for char in "a.b.c." for i in tokenizer.encode(char)]
    for min_tokens, text in ((0, "a"), (2, "a"), (3, "a.b"), (5, "a.b.c"), (7, "a.b.c.")):
        output = whole(fold(SampleStream(tokenizer, TextOptions(stop=(".",)), min_tokens=min_tokens), ids))
        assert output.text == text


def test_the_stop_token_has_no_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi")
    letter = tokenizer.encode("z")
    for include, text in ((False, "hi"), (True, "hiz")):
        options = TextOptions(include_stop_str_in_output=include)
        output = whole(fold(SampleStream(tokenizer, options), [*ids, *letter], "stop", letter[0]))
        assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", letter[0])
        assert output.token_ids == [*ids, *letter]
    visible = TextOptions(skip_special_tokens=False)
    assert whole(fold(SampleStream(tokenizer, visible), [*ids, 2], "stop")).text == "hi"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_chunking_changes_nothing(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode("naïve 🙂 text, stop here, and more")
    reference = whole(fold(SampleStream(tokenizer, TextOptions(stop=("here", "zzz"))), ids))
    stream = SampleStream(tokenizer, TextOptions(stop=("here", "zzz")))
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    output = whole([stream.fold(Chunk("r", 0, part, logprobs=logprobs_of(part))) for part in parts])
    assert (output.text, output.token_ids, output.offsets, output.logprobs) == (
        reference.text,
        reference.token_ids,
        reference.offsets,
        reference.logprobs,
    )
    assert output.text == "naïve 🙂 text, stop "


def test_logprobs_wait_for_their_text(tokenizer: Tokenizer) -> None:
    stream = SampleStream(tokenizer, TextOptions(stop=("xyz",)))
    ids = [i for char in "axyq" for i in tokenizer.encode(char)]
    deltas = fold(stream, ids)
    assert [delta.text for delta in deltas] == ["a", "", "", "xyq"]
    assert [len(delta.logprobs or ()) for delta in deltas] == [1, 0, 0, 3]
    assert [delta.offsets for delta in deltas] == [[0], [], [], [1, 2, 3]]
    assert deltas[1].is_empty


def test_offsets_point_at_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("def add(a, b): naïve")
    output = whole(fold(SampleStream(tokenizer, TextOptions()), ids))
    for token_id, offset in zip(output.token_ids, output.offsets, strict=True):
        piece = tokenizer.token_text(token_id)
        if "\ufffd" not in piece:
            assert output.text.startswith(piece, offset)


def test_after_the_end_nothing_counts(tokenizer: Tokenizer) -> None:
    stream = SampleStream(tokenizer, TextOptions(stop=("b",)))
    fold(stream, tokenizer.encode("b"), None)
    late = stream.fold(Chunk("r", 0, tokenizer.encode("c"), finish_reason="abort"))
    assert late.is_empty
    assert stream.finish_reason == "stop"


def test_a_sample_is_aborted_when_its_text_is_complete_and_the_engine_goes_on(tokenizer: Tokenizer) -> None:
    stream = RequestStream(tokenizer, TextOptions(stop=("b",)), [5], n=2)
    (b,) = tokenizer.encode("b")
    delta = stream.fold(Chunk("r", 0, [b], num_cached=32, prompt_logprobs=logprobs_of([7])))
    assert (stream.finished, stream.ended_early(delta)) == (False, True)
    delta = stream.fold(Chunk("r", 1, [], finish_reason="length", prompt_logprobs=logprobs_of([8])))
    assert (stream.finished, stream.ended_early(delta)) == (True, False)
    assert stream.num_cached == 32
    assert stream.prompt_logprobs == logprobs_of([7, 8])


def test_a_request_that_the_engine_ended_is_not_aborted(tokenizer: Tokenizer) -> None:
    stream = RequestStream(tokenizer, TextOptions(stop=("b",)), [5])
    delta = stream.fold(Chunk("r", 0, tokenizer.encode("ab"), finish_reason="length"))
    assert (stream.finished, stream.ended_early(delta)) == (True, False)


def test_an_error_is_carried_to_the_end(tokenizer: Tokenizer) -> None:
    stream = SampleStream(tokenizer, TextOptions(stop=("ab",)))
    stream.fold(Chunk("r", 0, tokenizer.encode("a")))
    delta = stream.fold(Chunk("r", 0, [], finish_reason="error", error="no finite logits"))
    assert (delta.text, delta.finish_reason, delta.error) == ("a", "error", "no finite logits")
