"""`truncation: auto`: where a conversation is too long, its oldest turns are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ...engine.errors import TooLongError

T = TypeVar("T")


def longest_that_fits(messages: list[dict[str, Any]], prepare: Callable[[list[dict[str, Any]]], T]) -> T:
    """`prepare` of the conversation, without as few as possible of its oldest messages.

    System messages at its head stay, and what is left begins with one of a user: no result without its call. Found by
    halving, so that a conversation of a thousand turns is written ten times, not a thousand. Raises TooLongError if the
    last turn alone does not fit.
    """
    try:
        return prepare(messages)
    except TooLongError as error:
        refusal = error
    head = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    starts = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
    found: list[T] = []
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        try:
            found = [prepare(messages[:head] + messages[starts[middle] :])]
            high = middle
        except TooLongError as error:
            refusal = error
            low = middle + 1
    if not found:
        raise refusal
    return found[0]
