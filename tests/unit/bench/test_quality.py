"""Quality tables: every token is scored once, and a format's figures come from that format."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.quality import QualityConfig, measure, windows


@given(
    lengths=st.lists(st.integers(0, 60), max_size=5),
    length=st.integers(2, 16),
    tokens=st.integers(1, 200),
)
def test_every_token_is_scored_once(lengths: list[int], length: int, tokens: int) -> None:
    texts, first = [], 0
    for count in lengths:
        texts.append(list(range(first, first + count)))
        first += count
    scored = [token for window in windows(texts, length, tokens) for token in window.ids[-window.fresh :].tolist()]
    predicted = [token for text in texts for token in text[1:]]  # nothing predicts a text's first token
    assert scored == predicted[:tokens]
    assert all(len(window.ids) <= length + 1 for window in windows(texts, length, tokens))


def test_formats_are_measured_against_the_plain_model(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    config = QualityConfig(
        model="bundled",
        weights=("int8", "int4"),
        kv=("int4_per_token_head",),
        text=text,
        tokens=150,
        window=64,
    )
    plain, int8, int4, kv = measure(config)["rows"]
    assert plain["kl"] == pytest.approx(0, abs=1e-6)
    assert plain["change"] == 0
    assert 0 < int8["kl"] < int4["kl"]
    assert 0 < kv["kl"] < int4["kl"]
    assert plain["tokens"] == 150
    assert int4["weight_share"] < int8["weight_share"] < 1 == plain["weight_share"]
    assert kv["kv_share"] == pytest.approx(34 / 128)
