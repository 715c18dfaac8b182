from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.prefill import LAYOUTS, PrefillConfig, draw_lengths, in_rows, layouts, padded, run, table

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 50))
def test_padding_makes_a_batch_as_long_as_its_longest(some: list[int], batch_size: int) -> None:
    layout = padded(some, batch_size)
    assert [len(batch) for batch in layout[:-1]] == [batch_size] * (len(layout) - 1)
    assert [length for batch in layout for length in batch] == [
        max(some[i // batch_size * batch_size :][:batch_size]) for i in range(len(some))
    ]


@given(lengths)
def test_rows_hold_every_prompt_once_and_are_full(some: list[int]) -> None:
    (batch,) = in_rows(some)
    assert sum(batch) % max(some) == 0
    rest = list(batch)
    for length in some:
        rest.remove(length)
    assert sum(rest) == sum(batch) - sum(some)


@given(lengths, st.integers(1, 50))
def test_sorting_never_costs_tokens_and_packing_costs_none(some: list[int], batch_size: int) -> None:
    some = some * batch_size  # whole batches: where the last one is short, luck may favour any order
    config = PrefillConfig(batch_size=batch_size, sorted_batch_size=batch_size)
    computed = {name: sum(map(sum, layout)) for name, layout in layouts(config, some).items()}
    assert computed["packed"] == sum(some)
    assert computed["sorted"] <= computed["padded"]
    assert min(computed.values()) == computed["packed"]


@pytest.mark.parametrize("law", ["log-uniform", "uniform"])
def test_lengths_are_seeded_and_reach_both_ends(law: str) -> None:
    config = PrefillConfig(num_prompts=5000, min_len=8, max_len=64, lengths=law)
    drawn = draw_lengths(config)
    assert drawn == draw_lengths(config)
    assert (min(drawn), max(drawn)) == (8, 64)
    short = sum(length < 23 for length in drawn) / len(drawn)  # 8 · √8, the middle of the logarithms
    assert short == pytest.approx(0.5 if law == "log-uniform" else 15 / 57, abs=0.03)


@pytest.mark.parametrize(
    "bad", [{"lengths": "zipf"}, {"min_len": 0}, {"max_len": 7}, {"batch_size": 0}, {"repetitions": 0}]
)
def test_bad_settings_name_their_option(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--"):
        PrefillConfig(**bad)  # type: ignore[arg-type]


def test_every_layout_computes_what_it_says(tiny_model: Path) -> None:
    config = PrefillConfig(
        model=str(tiny_model), threads=1, num_prompts=6, min_len=2, max_len=40, batch_size=3, repetitions=1
    )
    result = run(config)
    expected = layouts(config, draw_lengths(config))
    for name in LAYOUTS:
        assert result[f"{name}_computed_tokens"] == sum(map(sum, expected[name]))
        assert result[f"{name}_tok_s"] > 0
    assert result["prompt_tokens"] == result["packed_computed_tokens"]
    assert result["packed_over_packed"] == 1
    assert 0 < result["useful_fraction"] <= 1
    assert table(result).row_count == len(LAYOUTS)
