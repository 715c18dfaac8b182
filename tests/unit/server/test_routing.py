"""How much structure a body has is known before anything is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server import routing
from quire.server.errors import ApiError

ODD_TEXT = st.text(alphabet='":{}[]\\, \n/aé')
VALUES = st.recursive(
    ODD_TEXT | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_TEXT, inner, max_size=4),
    max_leaves=20,
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", " : "), (",\n", "\r\n\t:")])


def keys_in(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(keys_in(item) for item in value.values())
    return sum(keys_in(item) for item in value) if isinstance(value, list) else 0


def containers_in(value: Any) -> int:
    if isinstance(value, dict | list):
        return 1 + sum(containers_in(item) for item in (value.values() if isinstance(value, dict) else value))
    return 0


def told(raw: bytes, max_keys: int, max_containers: int) -> str:
    """The refusal, looking at three bytes at once; empty where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "MAX_KEYS", max_keys)
        patch.setattr(routing, "MAX_CONTAINERS", max_containers)
        patch.setattr(routing, "COUNTED_BYTES", 3)
        try:
            routing._check_structure(raw)
        except ApiError as error:
            return error.message
    return ""


@given(VALUES, SEPARATORS)
def test_keys_objects_and_lists_are_counted_exactly_however_they_are_spelled(value, separators):
    raw = json.dumps({"body": value}, separators=separators, ensure_ascii=False).encode()
    keys, containers = 1 + keys_in(value), 1 + containers_in(value)
    assert told(raw, keys, containers) == ""
    assert f"more than {keys - 1} keys" in told(raw, keys - 1, containers)
    assert f"more than {containers - 1} objects and lists" in told(raw, keys, containers - 1)
