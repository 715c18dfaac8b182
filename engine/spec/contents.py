"""What lies in the blocks of a cache whose filling nobody tells it about: a draft model's own.

Its blocks have the numbers of the target's, and the scheduler gives those out, shares, frees and reuses them without a
word. So each block is named by its content: by the tokens that its keys and values were computed for, and a hash of all
that stood before them. Prefix hits, preemption and reuse then need no hooks: what fits is used, what does not is
computed again. Two hashes that are equal by accident would cost acceptance, never a wrong token.
"""

from __future__ import annotations

import numpy as np

_START = 0  # the hash of nothing


class CacheContents:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._parents = np.zeros(num_blocks, np.int64)  # hash of the tokens before the block
        self._tokens = np.zeros((num_blocks, block_size), np.int64)
        self._counts = np.zeros(num_blocks, np.int64)  # of the leading tokens that are there
        self._seen: dict[int, tuple[int, int]] = {}  # slot -> its full blocks that were found right, and their hash

    def enter(self, slot: int) -> None:
        """Another sequence has this slot now."""
        self._seen.pop(slot, None)

    def count(self, slot: int, token_ids: np.ndarray, table: np.ndarray) -> int:
        """How many leading tokens of the sequence [n] have their keys and values in its blocks."""
        size = self.block_size
        blocks, key = self._seen.get(slot, (0, _START))
        while True:
            tokens = token_ids[blocks * size : (blocks + 1) * size]
            held = self._held(table[blocks], key, tokens) if len(tokens) else 0
            if held < size:
                self._seen[slot] = blocks, key
                return blocks * size + held
            blocks, key = blocks + 1, _hash(key, tokens)

    def _held(self, block: int, parent: int, tokens: np.ndarray) -> int:
        if self._parents[block] != parent:
            return 0
        count = min(int(self._counts[block]), len(tokens))
        differs = np.flatnonzero(self._tokens[block, :count] != tokens[:count])
        return int(differs[0]) if len(differs) else count

    def record(self, slot: int, token_ids: np.ndarray, table: np.ndarray, used: int) -> None:
        """The keys and values of all these tokens [m] are there now; slots up to `used` hold anything behind them."""
        size = self.block_size
        blocks, key = self._seen[slot]
        for i in range(blocks, -(-used // size)):
            tokens = token_ids[i * size : (i + 1) * size]
            block = table[i]
            self._parents[block], self._counts[block] = key, len(tokens)
            self._tokens[block, : len(tokens)] = tokens
            key = _hash(key, tokens)


def _hash(parent: int, tokens: np.ndarray) -> int:
    """64 bits."""
    return hash((parent, tokens.tobytes()))
