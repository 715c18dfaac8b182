"""Tokens, text and bytes: against the library's own decoder, and at every edge a folder or a prompt may have."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from quire.engine.errors import EngineStartError, RequestError, TooLongError
from quire.engine.tokenizer import eos_token_ids, generation_defaults, load_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Zürich 東京 🙂",
    "  two  spaces ",
    "",
    "<|im_start|>user",
    "\x00\x7f\xad",
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trips_and_agrees_with_the_library(byte_level_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    library = Library.from_file(str(byte_level_folder / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["Hello world", "Hello", "é🙂", "a b  c", "a\n"])
def test_sentencepiece_round_trips_and_agrees_with_the_library(sentencepiece_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    library = Library.from_file(str(sentencepiece_folder / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids
    assert ids[0] == 1
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == library.decode(ids) == text


def test_agrees_with_transformers(byte_level_folder: Path) -> None:
    """Users compare with transformers; here it is only the oracle."""
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(byte_level_folder, local_files_only=True)
    tokenizer = load_tokenizer(byte_level_folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == auto(text)["input_ids"]
        assert tokenizer.decode(ids) == auto.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_token_bytes_of_both_kinds(byte_level_folder: Path, sentencepiece_folder: Path) -> None:
    byte_level = load_tokenizer(byte_level_folder)
    assert {byte_level.token_bytes(i) for i in range(3, 259)} == {bytes([byte]) for byte in range(256)}
    assert byte_level.token_bytes(1) == b"<|im_start|>"
    sentencepiece = load_tokenizer(sentencepiece_folder)
    assert [sentencepiece.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert sentencepiece.token_bytes(260) == b" H"
    assert sentencepiece.token_text(3 + 0xE2) == "\ufffd"


@pytest.mark.parametrize("token_id", [-(2**63), -1, 383, 384, 2**31, 2**63])
def test_an_id_without_an_entry_has_no_text(byte_level_folder: Path, token_id: int) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([token_id]) == ""


def test_end_tokens_and_defaults_come_from_the_folder(byte_level_folder: Path, sentencepiece_folder: Path) -> None:
    assert eos_token_ids(byte_level_folder) == [2, 0]
    assert eos_token_ids(sentencepiece_folder) == [2]
    assert generation_defaults(byte_level_folder) == {"temperature": 0.6, "top_k": 20}
    assert generation_defaults(sentencepiece_folder) == {}


@pytest.mark.parametrize("value", ["hot", True, -1, 1e999, [1]])
def test_unusable_defaults_are_refused_by_name(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(EngineStartError, match="temperature"):
        generation_defaults(tmp_path)


@pytest.mark.parametrize("bos", [True, False])
def test_the_folder_decides_about_marks_around_a_prompt(sentencepiece_folder: Path, tmp_path: Path, bos: bool) -> None:
    (tmp_path / "tokenizer.json").write_bytes((sentencepiece_folder / "tokenizer.json").read_bytes())
    settings = {"add_bos_token": bos, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = load_tokenizer(tmp_path).encode("Hello")
    assert (ids[0] == 1, ids[-1] == 2) == (bos, True)


def test_bytes_are_checked_before_tokens(byte_level_folder: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
    tokenizer.check_bytes("a" * (10 * longest), 10)
    for text in ("a" * (10 * longest + 1), "é" * (5 * longest + 1), "a" * 10_000_000):
        with pytest.raises(
            TooLongError, match=r"^This model's maximum context length is 10 tokens\. However, "
        ) as caught:
            tokenizer.check_bytes(text, 10)
        assert caught.value.param == "prompt"


def test_a_text_that_fits_is_never_refused_by_its_bytes(byte_level_folder: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    for token_id in range(3, tokenizer.vocab_size):
        text = tokenizer.token_text(token_id)
        tokenizer.check_bytes(text, max(len(tokenizer.encode(text)), 1))


def test_a_lone_surrogate_is_the_callers_mistake(byte_level_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"U\+D800.*character 1"):
        load_tokenizer(byte_level_folder).encode("a\ud800b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("{}", "cannot be read|this version can read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(EngineStartError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_a_decoder_that_looks_at_neighbours_is_refused(byte_level_folder: Path, tmp_path: Path) -> None:
    description = json.loads((byte_level_folder / "tokenizer.json").read_text())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(EngineStartError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_python_in_the_folder_is_never_touched(byte_level_folder: Path, tmp_path: Path) -> None:
    for path in byte_level_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenizer.Canary", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.py").write_text("raise SystemExit('the canary was imported')")
    opened: list[str] = []
    listening = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if listening and event in ("open", "import", "exec"):
            opened.append(str(args[0]))

    sys.addaudithook(hook)
    load_tokenizer(tmp_path).encode("hello")
    listening = False
    inside = [name for name in opened if str(tmp_path) in name]
    assert inside
    assert not [name for name in inside if not name.endswith((".json", ".jinja"))]


def test_threads_share_one_tokenizer(byte_level_folder: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    expected = [tokenizer.encode(text) for text in TEXTS]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(50):
            if [tokenizer.encode(text) for text in TEXTS] != expected:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
