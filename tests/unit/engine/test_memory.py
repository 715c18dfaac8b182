"""The memory of a GPU, without one: the arithmetic is plain, and what is measured runs over a meter that is made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine import memory
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.graphs import Graphs
from quire.engine.memory import Measured, Reading, describe, largest_step, measure
from quire.engine.resolve import Machine, Resolved, resolve, with_kv_cache
from quire.engine.spec.verification import judge
from quire.kernels.batch import KVSpec

sizes = st.integers(0, 2**36)
MACHINE = Machine(cuda=True, fast_bf16=True, cores=8, free_bytes=70 << 30, capability=(9, 0), total_bytes=80 << 30)


class Meter:
    """A device on which the n-th reading finds what the n-th entry says is taken: (by torch, by others)."""

    TOTAL = 1000

    def __init__(self, *taken: tuple[int, int]) -> None:
        self._taken = list(taken)
        self.settled = 0

    def read(self) -> Reading:
        reserved, outside = self._taken.pop(0)
        return Reading(self.TOTAL, self.TOTAL - reserved - outside, reserved)

    def settle(self) -> None:
        self.settled += 1


def made_up(**sizes: int) -> Measured:
    nothing = dict.fromkeys(("outside", "weights", "activations", "sampler", "graphs"), 0)
    return Measured(**({"total": 1000} | nothing | sizes))


class TestArithmetic:
    def test_the_kv_cache_gets_what_is_left_of_the_share(self):
        assert made_up().kv_cache(0.9) == 900
        assert made_up(weights=500, activations=40, sampler=10, graphs=20, outside=30).kv_cache(0.9) == 300
        assert made_up(weights=950).kv_cache(0.9) == -50

    @given(sizes, sizes, sizes, sizes, sizes, st.floats(0.01, 1.0))
    def test_the_table_adds_up_to_the_device(self, outside, weights, activations, sampler, graphs, share):
        measured = made_up(
            total=2**37, outside=outside, weights=weights, activations=activations, sampler=sampler, graphs=graphs
        )
        table = measured.table(measured.kv_cache(share))
        assert sum(table.values()) == 2**37
        assert table["free"] == 2**37 - int(share * 2**37)

    def test_it_is_shown_line_by_line(self):
        text = describe({"weights": 2**30, "kv_cache": 3 * 2**30, "free": 2**29})
        assert text.splitlines() == [
            "  weights      1.00 GiB",
            "  kv cache     3.00 GiB",
            "  free         0.50 GiB",
            "  total        4.50 GiB",
        ]


def engine(model: Path, **settings: object) -> EngineCore:
    defaults = {"dtype": "float32", "threads": 1, "max_model_len": 96, "max_num_seqs": 4}
    return EngineCore(EngineConfig(model=str(model), **(defaults | settings)))


def settings_of(model: Path, **changes: object) -> Resolved:
    config = EngineConfig(model=str(model), dtype="float32", **changes)
    return resolve(config, load_config(model), MACHINE)


class TestMeasuring:
    def test_what_takes_how_much_is_told_apart(self, tiny_model):
        core = engine(tiny_model)
        meter = Meter((200, 30), (260, 40), (275, 45))
        settings = settings_of(tiny_model, max_num_seqs=4, max_model_len=96, num_blocks=20)
        measured = measure(core.runner, replace(settings, device=core.runner.slots.device), meter)
        assert measured == made_up(weights=200, activations=60, sampler=15, outside=45)
        assert meter.settled == 1

    def test_graphs_count_by_what_the_device_lacks_afterwards(self, tiny_model):
        """Three shapes: the pool with the first takes 50, and each further one 2."""
        core = engine(tiny_model)
        runner, taken = core.runner, []
        runner.graphs = Graphs(
            lambda batch: runner.decoder.forward(batch, runner.cache), runner.slots, lambda f: taken.append(f) or f
        )
        assert len(runner.graphs.shapes.all()) == 3
        meter = Meter((200, 0), (200, 0), (200, 0), (200, 0), (240, 10), (240, 12))
        settings = settings_of(tiny_model, max_num_seqs=4, max_model_len=96, num_blocks=20)
        measured = measure(runner, replace(settings, device=runner.slots.device), meter)
        assert measured.graphs == 50 + 2 * 2
        assert len(taken) == 2

    @pytest.mark.parametrize(
        ("tree", "tokens", "seqs"), [("chain:3", 400, 4), ("rsd-c:2,2", 400, 4), ("chain:3", 10, 2)]
    )
    def test_a_step_full_of_guesses_is_judged(self, tiny_model, monkeypatch, tree, tokens, seqs):
        """As many whole drafts as a step has rows for, each with what it was drawn from."""
        core = engine(tiny_model)
        wishes = {"speculative_method": "ngram", "speculative_tree": tree, "max_num_batched_tokens": tokens}
        settings = settings_of(tiny_model, max_num_seqs=4, max_model_len=96, num_blocks=20, **wishes)
        settings = replace(settings, device=core.runner.slots.device)
        rows = 1 + settings.draft_shape.nodes
        judged = []

        def judging(sampler, logits, slots, positions, drafts):
            verdicts = judge(sampler, logits, slots, positions, drafts)
            assert [verdict.result.error for verdict in verdicts] == [None] * seqs
            assert all(draft.q.shape == (rows, sampler.vocab_size) for draft in drafts)
            judged.append(len(logits))
            return verdicts

        monkeypatch.setattr(memory, "judge", judging)
        measure(core.runner, settings, Meter((0, 0), (0, 0), (0, 0)))
        assert judged == [seqs * rows] == [settings.most_drawn // rows * rows]
        assert core.runner.sampler._slots == [None] * 4

    def test_it_leaves_nothing_behind(self, tiny_model):
        core = engine(tiny_model)
        settings = settings_of(tiny_model, max_num_seqs=4, max_model_len=96, num_blocks=20)
        measure(core.runner, replace(settings, device=core.runner.slots.device), Meter((0, 0), (0, 0), (0, 0)))
        assert core.runner.sampler._slots == [None] * 4

    @pytest.mark.parametrize(("tokens", "seqs", "length"), [(512, 64, 100), (16, 16, 4096), (300, 2, 96), (8, 1, 500)])
    def test_the_largest_step_is_as_large_as_it_may_be(self, tiny_model, tokens, seqs, length):
        wishes = {"max_num_batched_tokens": tokens, "max_num_seqs": seqs, "num_blocks": 500}
        settings = replace(settings_of(tiny_model, **wishes), max_model_len=length)
        rows = largest_step(settings)
        assert all(row.num_tokens > 0 for row in rows)
        assert sorted(row.slot for row in rows) == list(range(seqs))
        assert sum(row.num_tokens for row in rows) == min(tokens, seqs * length)
        assert all(row.start + row.num_tokens == length for row in rows)
        assert [row.num_tokens for row in rows] == sorted(row.num_tokens for row in rows)


class TestSettings:
    def test_on_a_gpu_the_size_is_measured_unless_it_is_given(self, tiny_model):
        assert settings_of(tiny_model).memory_share == 0.9
        assert settings_of(tiny_model, gpu_memory_utilization=0.5).memory_share == 0.5
        assert settings_of(tiny_model, num_blocks=50).memory_share is None
        assert settings_of(tiny_model, kv_cache_bytes=1 << 30).memory_share is None

    def test_two_answers_to_one_question_are_refused(self, tiny_model):
        with pytest.raises(EngineStartError, match="gpu_memory_utilization and num_blocks"):
            settings_of(tiny_model, gpu_memory_utilization=0.5, num_blocks=50)
        with pytest.raises(EngineStartError, match="gpu_memory_utilization and kv_cache_bytes"):
            settings_of(tiny_model, gpu_memory_utilization=0.5, kv_cache_bytes=1 << 30)
        with pytest.raises(EngineStartError, match="gpu_memory_utilization is 1"):
            settings_of(tiny_model, gpu_memory_utilization=1.5)

    def test_on_the_cpu_it_is_refused(self, tiny_model):
        config = EngineConfig(model=str(tiny_model), gpu_memory_utilization=0.5, device="cpu")
        with pytest.raises(EngineStartError, match="the device is the CPU"):
            resolve(config, load_config(tiny_model), replace(MACHINE, cuda=False))

    def test_the_measured_size_replaces_the_guess(self, tiny_model):
        model = load_config(tiny_model)
        config = EngineConfig(model=str(tiny_model), dtype="float32")
        settings = resolve(config, model, MACHINE)
        per_block = model.num_layers * KVSpec(32, model.num_kv_heads, model.head_dim, "fp32").block_bytes
        got = with_kv_cache(config, model, settings, 100 * per_block + 7)
        assert (got.num_blocks, got.kv_cache_bytes, got.memory_share) == (100, 100 * per_block, None)
        assert got.max_model_len == settings.max_model_len == 512
        assert "measured" in got.reasons["num_blocks"]
        short = with_kv_cache(config, model, settings, 5 * per_block)
        assert short.max_model_len == 4 * 32
        assert "KV cache" in short.reasons["max_model_len"]
        with pytest.raises(EngineStartError, match="max_num_batched_tokens"):
            with_kv_cache(config, model, settings, -5)
        with pytest.raises(EngineStartError, match="max_model_len is 500"):
            with_kv_cache(
                replace(config, max_model_len=500), model, replace(settings, max_model_len=500), 5 * per_block
            )
