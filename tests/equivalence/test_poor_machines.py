"""The same tokens on machines that lack something: instructions, cores, memory, sizes that kernels like."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.messages import AddRequest
from quire.engine.resolve import Machine, look_at_machine, resolve, usable_threads
from quire.kernels import ops
from quire.kernels.cpu.native import library
from quire.scheduler.params import SamplingParams

REFERENCE = dict.fromkeys(ops(), "reference")
MACHINE = Machine(cuda=False, fast_bf16=False, cores=2, free_bytes=1 << 30)


@pytest.fixture(params=library.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, plain C++ among them."""
    if library.problem is not None:
        pytest.skip(library.problem)
    library.use_level(library.levels().index(request.param))
    yield request.param
    library.use_level(0)


def greedy_tokens(model: Path, **settings: object) -> dict[str, list[int]]:
    """Of prompts short and long, some with a beginning in common, computed together."""
    usual = {"dtype": "float32", "threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 48, "check": True}
    core = EngineCore(EngineConfig(model=str(model), **(usual | settings)))  # type: ignore[arg-type]
    shared = [(7 * i + 5) % 256 for i in range(60)]
    tokens: dict[str, list[int]] = {}
    for i, length in enumerate((1, 17, 60, 33)):
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        core.handle(AddRequest(f"r{i}", shared[:length] if i % 2 else shared[-length:], params))
    while core.has_work:
        for chunk in core.step():
            assert chunk.error is None
            tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
    assert all(len(found) == 6 for found in tokens.values())
    return tokens


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, list[int]]:
    return greedy_tokens(tiny_model, kernels=REFERENCE)


def test_every_instruction_set(level: str, tiny_model: Path, expected: dict[str, list[int]]) -> None:
    assert greedy_tokens(tiny_model) == expected


def test_no_library(tiny_model: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", "the C++ library is not built")
    assert greedy_tokens(tiny_model) == expected


@pytest.mark.parametrize("weights", [None, "int8", "w8a8"])
def test_sizes_that_no_kernel_divides(weights: str | None, odd_model: Path) -> None:
    """Served, by whoever can."""
    expected = greedy_tokens(odd_model, kernels=REFERENCE, quantization=weights)
    assert greedy_tokens(odd_model, quantization=weights) == expected


def test_sizes_that_a_format_cannot_have(odd_model: Path) -> None:
    with pytest.raises(EngineStartError, match="54 inputs are no multiple of the group 128"):
        greedy_tokens(odd_model, quantization="int4")


class TestThreads:
    def test_more_than_there_are_cores(self, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            settings = resolve(EngineConfig(threads=64), load_config(tiny_model), MACHINE)
        assert settings.threads == 2
        assert settings.reasons["threads"] == "the cores this process may use"
        assert "threads is 64, this process may use 2 cores" in caplog.text

    def test_fewer(self, caplog: pytest.LogCaptureFixture) -> None:
        assert [usable_threads(wanted, 4) for wanted in (None, 1, 3, 4)] == [4, 1, 3, 4]
        assert not caplog.text

    def test_fewer_processors_than_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for allowed, threads in ((0.5, 1), (1.9, 1), (None, look_at_machine("cpu").cores), (4096.0, None)):
            monkeypatch.setattr("quire.engine.cgroup.processors", lambda allowed=allowed: allowed)
            assert look_at_machine("cpu").cores == (threads or look_at_machine("cpu").cores)


class TestMemory:
    @pytest.mark.parametrize("wish", [{}, {"num_blocks": 4}, {"kv_cache_bytes": 1 << 20}])
    def test_less_than_the_weights(self, wish: dict[str, int], tiny_model: Path) -> None:
        """Whoever says how large the KV cache is: the weights come first."""
        machine = dataclasses.replace(MACHINE, free_bytes=1000)
        with pytest.raises(EngineStartError, match=r"the weights take \d+ bytes and 1000 are free"):
            resolve(EngineConfig(**wish), load_config(tiny_model), machine)  # type: ignore[arg-type]

    def test_a_container_with_less_than_the_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quire.engine.cgroup.memory", lambda: 12345)
        assert look_at_machine("cpu").free_bytes == 12345
        monkeypatch.setattr("quire.engine.cgroup.memory", lambda: 1 << 62)
        assert look_at_machine("cpu").free_bytes < 1 << 62
