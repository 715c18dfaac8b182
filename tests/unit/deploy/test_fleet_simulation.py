"""Routing under conversations, on a simulated fleet: prefixes are worth it, and nobody is crowded for them."""

from __future__ import annotations

from quire.bench.hardware import read_profile
from quire.deploy.ray.simulate import Traffic, at_random, figures, play, prefix_aware, trace, two_choices

TRAFFIC = Traffic(replicas=2, rate=1.5, requests=250, seed=3)


def test_prefix_aware_routing_finds_more_and_waits_less() -> None:
    """In simulated seconds: the same on every machine."""
    profile = read_profile("h100-8b")
    ways = (at_random(), two_choices(), prefix_aware(TRAFFIC, profile))
    played = [play(TRAFFIC, profile, way) for way in ways]
    for outcomes in played:
        assert [outcome.arrival for outcome in outcomes] == trace(TRAFFIC)
        assert {outcome.finish for outcome in outcomes} == {"length"}
    by_chance, two, aware = map(figures, played)
    assert aware.hit_tokens >= 1.3 * by_chance.hit_tokens
    assert aware.hit_tokens >= 1.3 * two.hit_tokens
    assert aware.ttft_p50 <= by_chance.ttft_p50
    assert aware.seconds <= 1.1 * two.seconds
