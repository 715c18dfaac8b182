from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from quire.bench.sse import EventReader

STREAM = (
    b': keep-alive\n\ndata: {"a": 1}\n\nevent: x\r\ndata:second\r\n\r\n'
    b"data: two\ndata: lines\n\n\ndata: [DONE]\n\ndata: cut"
)
EVENTS = [b'{"a": 1}', b"second", b"two\nlines", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    reader = EventReader()
    pieces = [STREAM[a:b] for a, b in pairwise(bounds)]
    assert [event for piece in pieces for event in reader.feed(piece)] == EVENTS
