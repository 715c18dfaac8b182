"""Token streams on disk, and the batch of any training step as a pure function of the step's number."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .chat import conversations
from .corpus import Module, split_library
from .tokenizer import END_OF_TEXT, IM_START, load_tokenizer, train_tokenizer

# Share of each batch. The library is what the model is for; its tests are twice as long but say less.
MIXTURE = {"library": 0.625, "tests": 0.1875, "chat": 0.1875}
GOLDEN_RATIO = 0.6180339887498949


def prepare(folder: Path) -> None:
    """Train the tokenizer and write `library.npy`, `tests.npy` and `chat.npy` (uint16 token ids) into `folder`."""
    if (folder / "chat.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    split = split_library()
    chats = conversations(split.library, split.tests)
    print(f"{len(chats)} conversations, {sum(map(len, chats)) / 1e6:.1f} MB")
    # The library twice: entries go to what the model is for, not to the idioms of unit tests.
    tokenizer = train_tokenizer([m.text for m in split.library] * 2 + [m.text for m in split.tests] + chats)
    tokenizer.save(str(folder / "tokenizer.json"))

    def write(name: str, texts: list[str]) -> None:
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]
        print(f"{name}: {len(ids):,} tokens, {sum(len(t.encode()) for t in texts) / len(ids):.2f} bytes per token")
        np.save(folder / f"{name}.npy", np.array(ids, dtype=np.uint16))

    def documents(modules: list[Module]) -> list[str]:
        order = np.random.default_rng(0).permutation(len(modules))
        return [END_OF_TEXT + modules[i].text for i in order]

    write("library", documents(split.library))
    write("tests", documents(split.tests))
    write("held_out", documents(split.held_out))
    write("chat", chats)


class Dataset:
    """Windows of the three streams, mixed by share.

    Window k of a stream starts at the fraction (k * golden ratio) mod 1 of it: a low-discrepancy sequence, so every
    token is seen about equally often at any moment, and resuming needs nothing but the step's number.
    """

    def __init__(self, folder: Path):
        self.streams = {name: np.load(folder / f"{name}.npy") for name in MIXTURE}
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")

    @cached_property
    def chat_starts(self) -> np.ndarray:
        """Where a user or system message begins: chat windows start there, as a served conversation does."""
        chat = self.streams["chat"]
        starts = np.flatnonzero(chat == self.tokenizer.token_to_id(IM_START))
        return starts[chat[starts + 1] != self.tokenizer.encode("assistant").ids[0]]

    def batch(self, step: int, sequences: int, length: int) -> Tensor:
        """Token ids [sequences, length + 1]; inputs and targets are its two shifted views."""
        rows = []
        for name, share in MIXTURE.items():
            stream, count = self.streams[name], round(share * sequences)
            for k in range(step * count, (step + 1) * count):
                start = int(k * GOLDEN_RATIO % 1 * (len(stream) - length - 1))
                if name == "chat":
                    start = self.chat_starts[max(0, np.searchsorted(self.chat_starts, start, side="right") - 1)]
                rows.append(stream[start : start + length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def held_out_windows(folder: Path, count: int = 8, length: int = 1024) -> Tensor:
    """A quick look at the held-out modules, evenly spaced: token ids [count, length + 1]."""
    stream = np.load(folder / "held_out.npy")
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([stream[s : s + length + 1].astype(np.int64) for s in starts]))
