"""What a request's prompt begins with, as a chain of short names: chains begin alike where prompts do.

    body ──▶ beginning(): the parts that a template puts first, first ──▶ chain(): a name for every CHUNK_BYTES so far

Whoever routes has neither the model's template nor its tokenizer. It needs neither: text that begins alike becomes
tokens that begin alike. A name stands for everything up to its chunk's end, as the names of KV blocks do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

Chain = tuple[bytes, ...]

# A KV block of 32 tokens is about so much text (3 to 5 bytes a token in most languages).
CHUNK_BYTES = 128

# A quarter of a mebibyte of text. Who has that much in common has found its replica; naming more takes milliseconds.
MAX_CHUNKS = 2048

NAME_BYTES = 8  # two names among a million that are equal by chance: 1 in 37 million; all it costs is a worse choice

# In the order in which chat templates write them.
FIELDS = ("documents", "tools", "system", "instructions", "messages", "input", "prompt")

# What the cache of a prompt depends on besides its text: whose it is (keys have caches of their own), and its salt.
CREDENTIALS = ("authorization", "x-api-key")
SALTS = ("tenant", "cache_salt")


def chain_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Chain:
    """The chain of a request by its JSON body and its headers (names in lower case); of several prompts the first's."""
    whose = [headers.get(name, "") for name in CREDENTIALS] + [body.get(name) for name in SALTS]
    return chain(beginning(body), msgspec.json.encode(whose))


def beginning(body: Mapping[str, Any]) -> bytes:
    """The prompt's parts as JSON. A longer list, or a longer text at its end, changes nothing before."""
    parts = {name: body[name] for name in FIELDS if body.get(name)}
    prompt = parts.get("prompt")
    if isinstance(prompt, list) and isinstance(prompt[0], str | list):
        parts["prompt"] = prompt[0]
    return b"".join(msgspec.json.encode(part) for part in parts.values())


def chain(text: bytes, root: bytes = b"") -> Chain:
    """Names of the full chunks of `text`, at most MAX_CHUNKS. `root`: what else must be equal."""
    name = hashlib.blake2b(root, digest_size=NAME_BYTES).digest()
    names = []
    for start in range(0, min(len(text) // CHUNK_BYTES, MAX_CHUNKS) * CHUNK_BYTES, CHUNK_BYTES):
        name = hashlib.blake2b(name + text[start : start + CHUNK_BYTES], digest_size=NAME_BYTES).digest()
        names.append(name)
    return tuple(names)
