"""Slots are counted once, at the moment of the check; whoever has filled the house is the one who waits."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.engine.messages import StepStats
from quire.server.admission import Admission
from quire.server.cost import Cost
from quire.server.errors import ApiError


def refused(admission: Admission, tenant: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        admission.admit(1, tenant=tenant)
    return caught.value


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
            assert refused(admission).code == "server_overloaded"
        assert admission.open == sum(size for _, size in held) < 10 + 5
        assert admission.requests == len(held)


async def test_a_batch_larger_than_the_house_gets_in_when_there_is_room():
    admission = Admission(2)
    slot = admission.admit(100)
    assert refused(admission).status == 503
    slot.release()
    admission.admit(1)


async def test_samples_give_their_places_back_one_by_one():
    admission = Admission(4)
    slot = admission.admit(4)
    refused(admission)
    slot.sample_ended()
    assert (admission.open, admission.requests) == (3, 1)
    other = admission.admit(1)
    for _ in range(3):
        slot.sample_ended()
    assert (admission.open, admission.requests) == (1, 2), "it is inside until its answer is out"
    slot.release()
    other.release()
    assert (admission.open, admission.requests) == (0, 0)


async def test_drain_waits_for_the_last_and_refuses_the_next():
    admission = Admission(10)
    assert await admission.drain(1)  # nobody inside
    admission.draining = False
    slots = [admission.admit(1), admission.admit(1)]
    drain = asyncio.ensure_future(admission.drain(5))
    await asyncio.sleep(0)
    assert refused(admission).code == "server_draining"
    slots[0].release()
    slots[1].sample_ended()
    await asyncio.sleep(0)
    assert not drain.done()
    slots[1].release()
    assert await drain


async def test_drain_gives_up():
    admission = Admission(10)
    admission.admit(1)
    assert not await admission.drain(0.01)


# predicted wait


async def test_what_was_let_in_counts_until_the_engine_has_it_and_not_a_moment_longer():
    admission = Admission(100, places=10, max_queue_seconds=5)
    first = admission.admit(1, Cost(2.0, 1.0))
    second = admission.admit(1, Cost(4.0, 1.0))
    assert admission.predicted_wait() == 6.0  # their samples find places: only the prompts are in the way
    assert refused(admission).status == 503
    first.sent(1)
    admission.saw_step(StepStats(requests_total=0, queue_seconds=0.5))
    assert admission.predicted_wait() == 6.5
    admission.saw_step(StepStats(requests_total=1, queue_seconds=2.5))
    assert admission.predicted_wait() == 6.5  # 2.5 by the engine, 4 still on the way
    second.sent(2)
    second.release()  # it went before it was seen
    assert admission.predicted_wait() == 2.5
    admission.saw_step(StepStats(requests_total=2, queue_seconds=0.0))
    assert admission.predicted_wait() == 0.0
    first.release()
    assert admission.predicted_wait() == 0.0


async def test_samples_beyond_the_places_are_in_the_way_too():
    admission = Admission(1000, places=10)
    admission.admit(8, Cost(1.0, 80.0))
    assert admission.predicted_wait() == 1.0
    admission.admit(8, Cost(1.0, 80.0))  # six of them find no place
    assert admission.predicted_wait() == pytest.approx(2.0 + 60.0)
    admission.admit(100, Cost(0.0, 100.0))
    assert admission.predicted_wait() == pytest.approx(162.0)


@pytest.mark.parametrize(("wait", "low", "high"), [(5.1, 1, 3), (65.0, 60, 67), (1e6, 3600, 3600)])
async def test_retry_after_is_when_the_wait_is_back_under_the_bound(wait, low, high):
    admission = Admission(10, max_queue_seconds=5)
    admission.saw_step(StepStats(queue_seconds=wait))
    for _ in range(50):
        error = refused(admission)
        assert low <= int(error.headers()["Retry-After"]) <= high
        assert f"about {wait:.1f} s" in error.message


async def test_a_house_full_of_samples_knows_its_pace():
    admission = Admission(10, places=2)
    slot = admission.admit(19, Cost(5.0, 185.0))  # ten seconds a sample, and ten of them must go
    assert 100 <= int(refused(admission).headers()["Retry-After"]) <= 111
    for _ in range(7):
        slot.sample_ended()
    assert 30 <= int(refused(admission).headers()["Retry-After"]) <= 34
    free = Admission(10)
    free.admit(10)  # nothing is known of its cost
    assert 1 <= int(refused(free).headers()["Retry-After"]) <= 2


async def test_a_full_house_that_is_slower_than_predicted_says_what_it_sees():
    now = 0.0
    admission = Admission(10, clock=lambda: now)
    slot = admission.admit(200, Cost(0.0, 20.0))  # a tenth of a second a sample, it is believed
    for _ in range(100):
        now += 2.0
        slot.sample_ended()
    assert 182 - 10 <= int(refused(admission).headers()["Retry-After"]) <= 202  # 91 must go, two seconds each
    now += 128.0  # and now it stands still
    assert 182 < int(refused(admission).headers()["Retry-After"]) < 400
    for _ in range(95):
        slot.sample_ended()
    admission.admit(1)
    assert not admission._ends, "what a house with room did says nothing of a full one"


# tenants


async def test_who_holds_more_than_its_share_of_a_full_house_waits_and_others_get_in():
    admission = Admission(12, weights={"b": 2.0})
    for _ in range(12):
        admission.admit(1, tenant="a")
    assert (refused(admission, "a").status, refused(admission, "a").code) == (503, "server_overloaded")
    held = [admission.admit(1, tenant="b") for _ in range(8)]  # two thirds of twelve
    assert refused(admission, "b").status == 503
    error = refused(admission, "a")
    assert (error.status, error.code, error.type) == (429, "tenant_overloaded", "rate_limit_error")
    assert "12 samples, and its share is 4" in error.message
    admission.admit(1, tenant="c")
    for slot in held:
        slot.release()


async def test_shares_of_the_wait_go_by_what_requests_cost():
    admission = Admission(1000, places=10, max_queue_seconds=10)
    admission.admit(1, Cost(12.0, 0.0), "a")
    admission.admit(1, Cost(4.0, 0.0), "b")
    error = refused(admission, "a")
    assert (error.status, error.code) == (429, "tenant_overloaded")
    assert "its share is 5" in error.message
    admission.admit(1, Cost(1.5, 0.0), "b")
    assert refused(admission, "b").status == 429  # 5.5 s of 5


async def test_one_huge_request_leaves_others_their_share():
    admission = Admission(10, places=4)
    admission.admit(10_000, tenant="a")
    assert refused(admission, "a").status == 503
    slots = [admission.admit(1, tenant="b") for _ in range(5)]
    assert refused(admission, "b").status == 503
    assert refused(admission, "a").status == 429
    slots[0].release()
    admission.admit(1, tenant="b")


async def test_made_up_tenants_cannot_fill_more_than_a_second_house():
    admission = Admission(10)
    for _ in range(10):
        admission.admit(1, tenant="a")
    guests = [admission.admit(1, tenant=f"made-up {i}") for i in range(10)]
    assert refused(admission, "one more").status == 503
    assert refused(admission, "a").status == 429
    guests[0].release()
    admission.admit(1, tenant="one more")


class House(RuleBasedStateMachine):
    """Whatever comes and goes, the books are those of a plain count."""

    def __init__(self):
        super().__init__()
        self.admission = Admission(12, places=4, max_queue_seconds=20, weights={"b": 3.0})
        self.slots = {}  # slot -> open samples
        self.sent = 0
        self.taken = 0
        self.queue = 0.0
        self.unseen = {}  # slot -> its number, None = not sent

    @rule(size=st.integers(1, 6), seconds=st.integers(0, 6), tenant=st.sampled_from("abc"))
    def arrive(self, size, seconds, tenant):
        full = self.admission.open >= 12 or self.admission.predicted_wait() > 20
        mine = sum(n for s, n in self.slots.items() if s.tenant == tenant)
        try:
            slot = self.admission.admit(size, Cost(float(seconds), 0.0), tenant)
        except ApiError as error:
            assert full
            if error.status == 429:
                assert any(s.tenant != tenant for s in self.slots)
                assert mine or any(s.tenant == tenant for s in self.slots)
        else:
            self.slots[slot] = size
            self.unseen[slot] = None

    @precondition(lambda self: any(number is None for number in self.unseen.values()))
    @rule()
    def send(self):
        slot = next(slot for slot, number in self.unseen.items() if number is None)
        self.sent += 1
        self.unseen[slot] = self.sent
        slot.sent(self.sent)

    @rule(queue=st.integers(0, 30), more=st.integers(0, 2))
    def step(self, queue, more):
        self.taken = min(self.sent, self.taken + more)
        self.unseen = {s: n for s, n in self.unseen.items() if n is None or n > self.taken}
        self.queue = float(queue)
        self.admission.saw_step(StepStats(queue_seconds=self.queue, requests_total=self.taken))

    @precondition(lambda self: self.slots)
    @rule(which=st.integers(0, 100), a_sample=st.booleans())
    def end(self, which, a_sample):
        slot = list(self.slots)[which % len(self.slots)]
        if self.slots[slot] and a_sample:
            slot.sample_ended()
            self.slots[slot] -= 1
        else:
            slot.release()
            del self.slots[slot]
            self.unseen.pop(slot, None)

    @invariant()
    def the_books_balance(self):
        assert self.admission.open == sum(self.slots.values())
        assert self.admission.requests == len(self.slots)
        expected = self.queue + sum(slot.cost.prompts for slot in self.unseen)
        assert self.admission.predicted_wait() == pytest.approx(expected)
        assert self.admission._idle.is_set() == (not self.slots)


TestHouse = House.TestCase
