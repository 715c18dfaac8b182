"""Slots are counted once, at the moment of the check."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.admission import Admission
from quire.server.errors import ApiError


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=50))
async def test_the_count_is_that_of_unreleased_slots(steps):
    admission = Admission(10)
    held = []
    for size, release in steps:
        if release and held:
            slot = held.pop(0)[0]
            slot.release()
            slot.release()
        elif admission.open < 10:
            held.append((admission.admit(size), size))
        else:
            with pytest.raises(ApiError) as refused:
                admission.admit(size)
            assert refused.value.code == "server_overloaded"
        assert admission.open == sum(size for _, size in held) < 10 + 5
        assert admission.requests == len(held)


async def test_a_batch_larger_than_the_house_gets_in_when_there_is_room():
    admission = Admission(2)
    slot = admission.admit(100)
    with pytest.raises(ApiError):
        admission.admit(1)
    slot.release()
    admission.admit(1)


async def test_drain_waits_for_the_last_and_refuses_the_next():
    admission = Admission(10)
    assert await admission.drain(1)  # nobody inside
    admission.draining = False
    slots = [admission.admit(1), admission.admit(1)]
    drain = asyncio.ensure_future(admission.drain(5))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as refused:
        admission.admit(1)
    assert refused.value.code == "server_draining"
    slots[0].release()
    await asyncio.sleep(0)
    assert not drain.done()
    slots[1].release()
    assert await drain


async def test_drain_gives_up():
    admission = Admission(10)
    admission.admit(1)
    assert not await admission.drain(0.01)
