"""Model folders with tokenizers small enough to make in a test, and an engine that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = ["def add(a, b):\n    return a + b\n", "The quick brown fox", "Zürich 東京 🙂 naïve", "    if x == 1:\n"] * 4
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_json(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GPT-2, Llama 3 and Qwen: ids 0 to 2 are special, any text round-trips."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
            "chat_template": CHATML,
        },
    )
    write_json(folder, "config.json", {"eos_token_id": 0, "vocab_size": 384})
    write_json(folder, "generation_config.json", {"eos_token_id": [2, 0], "temperature": 0.6, "top_k": 20})
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama 2 and Mistral: visible spaces, one put before the text, byte fallback, <s> before every prompt."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁H", "e", "l", "o", "▁w", "r", "d", "a", "b", "c", "H", "w", " "]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "H"), ("▁", "w")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder, "config.json", {"eos_token_id": 2})
    return folder


@pytest.fixture
def folder_with_template(byte_level_folder: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """The byte-level folder with another chat template, or with none."""

    def make(template: str | None) -> Path:
        for name in ("tokenizer.json", "config.json", "generation_config.json"):
            (tmp_path / name).write_bytes((byte_level_folder / name).read_bytes())
        settings = {"bos_token": "<|endoftext|>"} | ({} if template is None else {"chat_template": template})
        write_json(tmp_path, "tokenizer_config.json", settings)
        return tmp_path

    return make
