"""Text to token ids and back, from a model folder's tokenizer.json.

    text ──encode──▶ ids          id ──token_bytes──▶ bytes ──UTF-8──▶ text

Text *is* the tokens' bytes laid end to end and read as UTF-8, a broken sequence giving U+FFFD. The same definition
serves whole decodes, streams and log-probabilities, so they cannot disagree. For valid UTF-8 it is what the
file's own decoder gives.

Only JSON is read: no Python, no pickle, no network. Everything here may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from .config_fields import MAX_VOCAB, ConfigFields, read_json
from .errors import EngineStartError, RequestError, TooLongError

# Vocabularies hold runs of up to 256 spaces, but text that averages more than this per token is padding, not a prompt:
# common text has 3 to 5 bytes per token.
MAX_PLAUSIBLE_TOKEN_BYTES = 64
SPACE_MARK = "▁"  # SentencePiece's visible space
MAX_TOKEN_ID = 2**31 - 1


class Tokenizer:
    """One model's vocabulary.

    vocab_size            ids this tokenizer knows; the model's logits may be wider (padded) and bound what is *valid*
    special_ids           ids that `skip_special_tokens` hides
    eos_token_ids         ids that end a sample, as the folder says
    named_tokens          {"bos_token": "<s>", ...}, what chat templates refer to
    generation_defaults   sampling values that the folder recommends (see `generation_defaults`)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        description = read_json(path)
        try:
            self._encoder = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise EngineStartError(f"{path} is not a tokenizer this version can read: {error}") from None
        self._encoder.no_truncation()
        self._encoder.no_padding()
        settings_path = self.folder / "tokenizer_config.json"
        settings = ConfigFields(settings_path, read_json(settings_path) if settings_path.is_file() else {})
        self.named_tokens = _named_tokens(settings)
        _apply_affixes(self._encoder, settings, self.named_tokens)

        added = self._encoder.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids = eos_token_ids(self.folder)
        self.generation_defaults = generation_defaults(self.folder)
        self.vocab_size = self._encoder.get_vocab_size(with_added_tokens=True)
        vocabulary = self._encoder.get_vocab()
        largest = max(vocabulary.values(), default=-1)
        if largest >= MAX_VOCAB:
            raise EngineStartError(f"{path}: a token has the id {largest}; ids are less than {MAX_VOCAB}")
        to_bytes, self._drops_first_space = _byte_reader(path, description)
        pieces = {token_id: to_bytes(piece) for piece, token_id in vocabulary.items()}
        self._bytes = [pieces.get(token_id, b"") for token_id in range(largest + 1)]
        self._longest = max(map(len, self._bytes), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; marks such as <s> are put around it if the model wants them and `add_special_tokens`.

        Raises RequestError for text that UTF-8 cannot express (a lone surrogate).
        """
        check_encodable(text)
        # The batch call, even for one text: it lets other threads run meanwhile; `encode` holds the interpreter's lock.
        (encoding,) = self._encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` as the beginning of a document. Ids beyond the vocabulary have no text."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in hidden)
        return self.at_start(data).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text; b"" for an id without an entry (padding of the logits)."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """One token alone, as log-probabilities show it: part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def at_start(self, data: bytes) -> bytes:
        """`data` as it reads at a document's beginning: SentencePiece puts a space there that the text never had."""
        return data[1:] if self._drops_first_space and data.startswith(b" ") else data

    def opens_document(self, prompt_ids: Iterable[int]) -> bool:
        """Whether text that follows `prompt_ids` is the first of its document."""
        return all(token_id in self.special_ids for token_id in prompt_ids)

    def check_bytes(self, text: str, max_model_len: int, param: str = "prompt") -> None:
        """Refuse, before it costs anything, text that cannot fit `max_model_len` tokens. Raises TooLongError."""
        limit = max_model_len * min(self._longest, MAX_PLAUSIBLE_TOKEN_BYTES)
        # A character is at least one byte, so most text passes or fails without being encoded.
        if len(text) * 4 > limit and (size := len(check_encodable(text, param))) > limit:
            raise TooLongError(
                f"This model's maximum context length is {max_model_len} tokens. However, your {param} has {size} "
                f"bytes, and {limit} is the most that could fit. Please shorten the {param}.",
                param,
            )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a local model folder. Raises EngineStartError with the file at fault."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise EngineStartError(
            f"{path} is missing. A tokenizer in another format is converted once with "
            "`transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    return Tokenizer(folder)


def check_encodable(text: str, param: str = "prompt") -> bytes:
    """`text` as UTF-8. Raises RequestError where it has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which is not "
            "text; send valid Unicode",
            param,
        ) from None


def eos_token_ids(folder: str | Path) -> list[int]:
    """Ids that end a sample: those of generation_config.json, then those of config.json."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file():
            found += ConfigFields(path, read_json(path)).integers("eos_token_id", 0, MAX_TOKEN_ID)
    return list(dict.fromkeys(found))


def generation_defaults(folder: str | Path) -> dict[str, float | int]:
    """Sampling values that generation_config.json recommends, under the names of `SamplingParams`.

    They hold for requests that leave the field out, as in other engines; `do_sample` is not one of them there either.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    fields = ConfigFields(path, read_json(path))
    defaults: dict[str, float | int] = {}
    for name, low, high in (
        ("temperature", 0.0, 2.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.01, 100.0),
    ):
        if fields.has(name):
            defaults[name] = fields.number(name, low, high)
    if fields.has("top_k"):
        defaults["top_k"] = fields.integer("top_k", 0, MAX_TOKEN_ID)
    if fields.has("max_new_tokens"):
        defaults["max_tokens"] = fields.integer("max_new_tokens", 1, MAX_TOKEN_ID)
    return defaults


def _named_tokens(settings: ConfigFields) -> dict[str, str]:
    """bos_token and its like; older files write a token as an object with its `content`."""
    named: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = settings.values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named


def _apply_affixes(encoder: tokenizers.Tokenizer, settings: ConfigFields, named: dict[str, str]) -> None:
    """`add_bos_token` and `add_eos_token`, where the folder states them, override tokenizer.json's own marks."""
    if not settings.has("add_bos_token") and not settings.has("add_eos_token"):
        return
    wanted = [named.get(name, "") if settings.flag(f"add_{name}", False) else "" for name in ("bos_token", "eos_token")]
    marks = [(mark, token_id) for mark in wanted if mark and (token_id := encoder.token_to_id(mark)) is not None]
    before, after = (mark if any(mark == known for known, _ in marks) else "" for mark in wanted)
    single = " ".join(part for part in (before, "$A", after) if part)
    encoder.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=marks)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves, the others for U+0100 onwards in order (Radford et al. 2019, GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _byte_reader(path: Path, description: dict[str, Any]) -> tuple[Callable[[str], bytes], bool]:
    """How one vocabulary entry becomes bytes, from tokenizer.json's `decoder`, and whether the first space is dropped.

    Known: byte-level (GPT-2, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Mistral, Gemma).
    Others join pieces by rules that look at neighbours, so that a token alone has no bytes: EngineStartError.
    """
    decoder = description.get("decoder") or {}
    steps: list[dict[str, Any]] = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        alphabet = _byte_level_alphabet()

        def from_byte_level(piece: str) -> bytes:
            """Added tokens are written as they are, so one with a character outside the alphabet is plain text."""
            try:
                return bytes([alphabet[char] for char in piece])
            except KeyError:
                return piece.encode("utf-8")

        return from_byte_level, False

    sentencepiece = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if not {"Replace", "Metaspace"} & set(kinds) or not set(kinds) <= sentencepiece:
        raise EngineStartError(
            f"{path}: decoder {kinds} is not supported; byte-level and SentencePiece vocabularies are"
        )
    replacements = [(SPACE_MARK, " ")] if "Metaspace" in kinds else []
    for step in steps:
        if step.get("type") == "Replace":
            pattern, content = step.get("pattern"), step.get("content")
            if (
                not isinstance(pattern, dict)
                or not isinstance(pattern.get("String"), str)
                or not isinstance(content, str)
            ):
                raise EngineStartError(f"{path}: a decoder that replaces by regular expression is not supported")
            replacements.append((pattern["String"], content))
    byte_pieces = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if "ByteFallback" in kinds else {}
    drops_first_space = any(
        (step.get("type") == "Strip" and step.get("start"))
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )

    def from_sentencepiece(piece: str) -> bytes:
        if piece in byte_pieces:
            return byte_pieces[piece]
        for pattern, content in replacements:
            piece = piece.replace(pattern, content)
        return piece.encode("utf-8")

    return from_sentencepiece, drops_first_space
