"""Buckets, the accounts of keys, and wrong keys by address; a clock that the test moves."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.attempts import ADDRESSES, FREE, KEYS_PER_ADDRESS, Attempts
from quire.server.bucket import Bucket
from quire.server.errors import ApiError
from quire.server.keys import EVERYBODY, Key
from quire.server.quotas import Quotas


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock)


def refused(call: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


# buckets


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(-50, 50)), max_size=30))
def test_a_bucket_never_holds_more_than_it_can_and_its_forecast_comes_true(moves: list[tuple[float, int]]) -> None:
    now, bucket = 0.0, Bucket(60, 2.0, 0.0)
    for pause, amount in moves:
        now += pause
        bucket.take(amount, now)
        assert bucket.level(now) <= 60
        wait = bucket.seconds_until(60, now)
        assert bucket.level(now + wait) == pytest.approx(60)
        now += wait


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = Bucket(10, 1.0, 100.0)
    bucket.take(10, 100.0)
    assert bucket.level(50.0) == 0
    assert bucket.seconds_until(1, 50.0) == 1.0


# requests a minute


def test_requests_a_minute_come_back_steadily(quotas: Quotas, clock: Clock) -> None:
    alice, bob = Key(name="alice", rpm=6), Key(name="bob", rpm=6)
    for _ in range(6):
        quotas.count(alice)
    error = refused(lambda: quotas.count(alice))
    assert error.retry_after == pytest.approx(10)
    assert "6 requests a minute" in error.message
    quotas.count(bob)
    clock.now += 9
    refused(lambda: quotas.count(alice))
    clock.now += 1
    quotas.count(alice)
    refused(lambda: quotas.count(alice))
    clock.now += 3600
    for _ in range(6):
        quotas.count(alice)
    refused(lambda: quotas.count(alice))


def test_retry_after_is_whole_seconds_never_early_and_jittered(quotas: Quotas) -> None:
    key = Key(name="a", rpm=1)
    quotas.count(key)
    seen = {refused(lambda: quotas.count(key)).headers()["Retry-After"] for _ in range(50)}
    assert all(re.fullmatch(r"\d+", value) and 60 <= int(value) <= 67 for value in seen)
    assert len(seen) > 1


def test_who_has_no_limits_is_never_refused(quotas: Quotas) -> None:
    for _ in range(1000):
        quotas.count(EVERYBODY)
        quotas.lease(EVERYBODY, 10**9)
    assert quotas.headers(EVERYBODY) == {}


# tokens a minute


def test_tokens_are_charged_in_advance_and_corrected_at_the_end(quotas: Quotas, clock: Clock) -> None:
    key = Key(name="a", tpm=600)
    lease = quotas.lease(key, 500)
    error = refused(lambda: quotas.lease(key, 200))
    assert error.retry_after == pytest.approx(10)
    assert error.headers()["x-should-retry"] == "true"
    assert lease.settle(50)
    assert not lease.settle(50), "only once"
    second = quotas.lease(key, 550)
    second.settle(650)
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "0"
    assert refused(lambda: quotas.lease(key, 1)).retry_after == pytest.approx(10.1), "100 tokens are owed"
    clock.now += 10.1
    quotas.lease(key, 1)


def test_a_request_that_never_began_costs_no_tokens(quotas: Quotas) -> None:
    key = Key(name="a", tpm=600)
    for _ in range(10):
        quotas.lease(key, 600).settle(0)


def test_a_request_that_no_waiting_lets_in_says_so_once(quotas: Quotas) -> None:
    error = refused(lambda: quotas.lease(Key(name="a", tpm=600), 601))
    assert error.headers() == {"x-should-retry": "false"}
    assert "601" in error.message
    assert "600" in error.message
    assert "max_tokens" in error.message


def test_a_refused_lease_takes_nothing(quotas: Quotas) -> None:
    key = Key(name="a", tpm=600, max_concurrent=1)
    lease = quotas.lease(key, 100)
    for _ in range(5):
        refused(lambda: quotas.lease(key, 100))
    lease.settle(100)
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "500"


# requests at once


def test_places_come_back_when_requests_end(quotas: Quotas) -> None:
    key = Key(name="a", max_concurrent=2)
    leases = [quotas.lease(key, 1) for _ in range(2)]
    error = refused(lambda: quotas.lease(key, 1))
    assert "2 requests at once" in error.message
    assert int(error.headers()["Retry-After"]) >= 1
    leases[0].settle(1)
    leases[0].settle(1)
    quotas.lease(key, 1)
    refused(lambda: quotas.lease(key, 1))


# the file is read again


def test_new_limits_hold_at_once_and_forgive_nothing(quotas: Quotas) -> None:
    for _ in range(5):
        quotas.count(Key(name="a", rpm=6))
    quotas.count(Key(name="a", rpm=8))
    quotas.count(Key(name="a", rpm=8))
    quotas.count(Key(name="a", rpm=8))
    refused(lambda: quotas.count(Key(name="a", rpm=8)))
    refused(lambda: quotas.count(Key(name="a", rpm=4)))
    quotas.count(Key(name="a"))


def test_accounts_of_keys_that_went_are_forgotten_once_their_requests_have_ended(quotas: Quotas) -> None:
    lease = quotas.lease(Key(name="gone"), 1)
    quotas.count(Key(name="gone-too"))
    quotas.count(Key(name="stays", rpm=1))
    quotas.keep({"stays"})
    assert set(quotas._accounts) == {"gone", "stays"}
    refused(lambda: quotas.count(Key(name="stays", rpm=1)))
    lease.settle(1)
    quotas.keep({"stays"})
    assert set(quotas._accounts) == {"stays"}


# headers


def test_headers_say_what_is_left_and_when_all_is(quotas: Quotas, clock: Clock) -> None:
    key = Key(name="a", rpm=60, tpm=120)
    assert quotas.headers(key) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "60",
        "x-ratelimit-reset-requests": "0ms",
        "x-ratelimit-limit-tokens": "120",
        "x-ratelimit-remaining-tokens": "120",
        "x-ratelimit-reset-tokens": "0ms",
    }
    quotas.count(key)
    clock.now += 0.5
    quotas.lease(key, 21).settle(181)
    headers = quotas.headers(key)
    assert headers["x-ratelimit-remaining-requests"] == "59"
    assert headers["x-ratelimit-reset-requests"] == "500ms"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "1m31s"
    clock.now += 80
    assert quotas.headers(key)["x-ratelimit-reset-tokens"] == "11s"
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "99"


# wrong keys


def test_an_address_that_guesses_is_told_to_wait(clock: Clock) -> None:
    attempts = Attempts(clock)
    for _ in range(FREE):
        assert attempts.wait("192.0.2.1", None) == 0
        attempts.failed("192.0.2.1")
    assert attempts.wait("192.0.2.1", None) == pytest.approx(3)
    assert attempts.wait("192.0.2.1", "alice") == pytest.approx(3), "a right guess looks like a wrong one"
    assert attempts.wait("192.0.2.2", None) == 0
    clock.now += 3
    assert attempts.wait("192.0.2.1", None) == 0


def test_a_key_that_opened_from_there_before_still_does(clock: Clock) -> None:
    attempts = Attempts(clock)
    attempts.opened("192.0.2.1", "alice")
    for _ in range(FREE):
        attempts.failed("192.0.2.1")
    assert attempts.wait("192.0.2.1", "alice") == 0
    assert attempts.wait("192.0.2.1", "bob") > 0
    for i in range(KEYS_PER_ADDRESS):
        attempts.opened("192.0.2.1", f"key{i}")
    assert attempts.wait("192.0.2.1", "alice") > 0, "so many are remembered"


def test_a_network_of_ipv6_is_one_address(clock: Clock) -> None:
    attempts = Attempts(clock)
    for i in range(FREE):
        attempts.failed(f"2001:db8::{i:x}")
    assert attempts.wait("2001:db8::ffff:1", None) > 0
    assert attempts.wait("2001:db8:0:1::1", None) == 0
    for _ in range(FREE):
        attempts.failed("::ffff:192.0.2.9")
    assert attempts.wait("192.0.2.9", None) > 0


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "", "testclient", "unix:"])
def test_this_machine_and_the_unknown_are_not_counted(clock: Clock, address: str) -> None:
    attempts = Attempts(clock)
    for _ in range(10 * FREE):
        attempts.failed(address)
    assert attempts.wait(address, None) == 0


def test_the_table_is_bounded(clock: Clock) -> None:
    attempts = Attempts(clock)
    for i in range(3 * ADDRESSES):
        attempts.failed(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}")
    assert len(attempts._callers) == ADDRESSES


def test_two_threads_take_turns() -> None:
    """One that comes while another is in the middle of its change, here where it looks at the clock, waits for it."""
    held: list[bool] = []
    done = threading.Event()

    def other() -> None:
        attempts.opened("192.0.2.2", "bob")
        done.set()

    def now() -> float:
        if not held:
            held.append(True)
            thread.start()
            held.append(not done.wait(0.2))
        return 0.0

    thread = threading.Thread(target=other)
    attempts = Attempts(now)
    attempts.failed("192.0.2.1")
    thread.join(60)
    assert held == [True, True]
    assert done.is_set()
