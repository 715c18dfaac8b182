"""Inputs that are nearly right: bytes and JSON with a few things wrong, from a seed."""

from __future__ import annotations

import copy
import random
from typing import Any

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 10**9, 10**18),
    *(
        0.0,
        -0.0,
        0.5,
        1e-300,
        1e300,
        -1e300,
        "",
        "x",
        "\x00",
        "é🙂",
        "..",
        "/etc/passwd",
        "a" * 5000,
        "\u202e",
        "{{ 7*7 }}",
    ),
    *([], [[]], {}, {"": {}}, [None], [0] * 1000, ["a"] * 100, {"type": "x"}, {str(i): i for i in range(50)}),
]
NASTY_BYTES = [
    b"\x00",
    b"\xff",
    b"\x80",
    b"\xc1",
    b"{",
    b"}",
    b'"',
    b"[" * 50,
    b"\xff" * 8,
    b"\x7f" * 8,
    b"\xdf\xff\xff\xff\xff",
]


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four edits: bits flipped, pieces cut, doubled, moved, replaced, or the end lost."""
    edited = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(edited) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64)), max(len(edited) - at, 0))
        match rng.randrange(6):
            case 0 if edited:
                edited[at % len(edited)] ^= 1 << rng.randrange(8)
            case 1:
                del edited[at : at + length]
            case 2:
                edited[at:at] = rng.choice(NASTY_BYTES)
            case 3:
                edited[at : at + length] = rng.randbytes(length)
            case 4:
                edited[at:at] = edited[at : at + length]
            case 5 if rng.random() < 0.3:
                del edited[at:]
    return bytes(edited)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy with one to three places replaced, removed, doubled or nested."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        container, key = _place(rng, root)
        match rng.randrange(6):
            case 0 if container is not root:
                del container[key]
            case 1:
                container[key] = [container[key]]
            case 2 if isinstance(container, dict):
                container[rng.choice(["", "x", "__class__", *container])] = container[key]
            case 3 if isinstance(container[key], int) and not isinstance(container[key], bool):
                container[key] += rng.choice((-(2**31), -2, -1, 1, 2, 2**16, 2**31))
            case _:
                alike = [value for value in NASTY if type(value) is type(container[key])]
                container[key] = copy.deepcopy(rng.choice(alike if alike and rng.random() < 0.6 else NASTY))
    return root[0]


def _place(rng: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """A container and a key in it, deeper with some luck."""
    container: Any = root
    key: Any = 0
    while isinstance(container[key], dict | list) and container[key] and rng.random() < 0.8:
        container = container[key]
        key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
    return container, key
