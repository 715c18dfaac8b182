"""Names for full blocks: a chained SHA-256, so that a key stands for everything up to the block's end.

A short or seeded hash would let a crafted prompt name another tenant's block (CVE-2025-25183); the pool compares the
tokens behind a key as well.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_key(*context: str) -> bytes:
    """The parent of a sequence's first block: what K/V depends on besides tokens (salt, KV format, RoPE)."""
    digest = hashlib.sha256(b"quire.root")
    for part in context:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of the block that holds token_ids and follows the block (or root) named `parent`."""
    return hashlib.sha256(b"quire.block" + parent + array("q", token_ids).tobytes()).digest()
