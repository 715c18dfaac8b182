from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from quire.bench.counters import TokenCounts, read_counters


def exposition(prefix: str) -> str:
    registry = CollectorRegistry()
    prompt = Counter(f"{prefix}prompt_tokens", "p", ["model_name"], registry=registry)
    generation = Counter(f"{prefix}generation_tokens", "g", ["model_name"], registry=registry)
    Gauge(f"{prefix}num_requests_running", "r", registry=registry).set(3)
    for model, tokens in (("a", 5), ("b", 7)):
        prompt.labels(model).inc(tokens)
        generation.labels(model).inc(10 * tokens)
    return generate_latest(registry).decode()


def test_our_names_and_vllms_summed_over_labels() -> None:
    for prefix in ("quire_", "vllm:"):
        assert read_counters(exposition(prefix)) == TokenCounts(12, 120)


def test_our_names_win_when_both_are_shown() -> None:
    both = exposition("vllm:").replace("120", "1").replace("50.0", "0.0") + exposition("quire_")
    assert read_counters(both) == TokenCounts(12, 120)


def test_a_server_without_them() -> None:
    assert read_counters(exposition("other_")) is None
    assert read_counters("") is None


def test_growth() -> None:
    assert TokenCounts(9, 8) - TokenCounts(4, 1) == TokenCounts(5, 7)
