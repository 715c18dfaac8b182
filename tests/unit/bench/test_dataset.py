from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.dataset import Ask, random_shapes, read_asks, sharegpt_like_shapes, text_asks, token_asks


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 0.99), st.integers(0, 99))
def test_random_lengths_stay_in_range(input_len: int, output_len: int, ratio: float, seed: int) -> None:
    for shape in random_shapes(20, input_len, output_len, ratio, seed):
        assert max(1, input_len * (1 - ratio) - 1) <= shape.prompt_len <= input_len * (1 + ratio) + 1
        assert max(1, output_len * (1 - ratio) - 1) <= shape.output_len <= output_len * (1 + ratio) + 1


def test_without_a_ratio_every_length_is_the_same() -> None:
    assert {(s.prompt_len, s.output_len) for s in random_shapes(50, 17, 5, 0.0, 0)} == {(17, 5)}


def test_sharegpt_lengths_have_the_traces_medians_and_tails() -> None:
    shapes = sharegpt_like_shapes(20_000, context=1 << 20, seed=0)
    prompts = sorted(s.prompt_len for s in shapes)
    outputs = sorted(s.output_len for s in shapes)
    assert statistics.median(prompts) == pytest.approx(1730, rel=0.03)
    assert prompts[int(0.9 * len(prompts))] == pytest.approx(5696, rel=0.03)
    assert statistics.median(outputs) == pytest.approx(415, rel=0.03)
    assert outputs[int(0.9 * len(outputs))] == pytest.approx(834, rel=0.03)


@pytest.mark.parametrize("context", [512, 2048, 8192, 1 << 17])
def test_sharegpt_lengths_fit_the_context(context: int) -> None:
    for shape in sharegpt_like_shapes(500, context, seed=1):
        assert shape.prompt_len + shape.output_len <= min(context, 8192)
        assert min(shape.prompt_len, shape.output_len) >= 4


def test_token_prompts_have_their_lengths_their_ids_and_a_shared_prefix() -> None:
    shapes = random_shapes(10, 20, 5, 0.5, 0)
    asks = token_asks(shapes, [3, 5, 9], seed=0, prefix_len=8)
    assert [len(a.token_ids or ()) - 8 for a in asks] == [s.prompt_len for s in shapes]
    assert len({(a.token_ids or ())[:8] for a in asks}) == 1
    assert len({(a.token_ids or ())[8:] for a in asks}) > 1
    assert {i for a in asks for i in a.token_ids or ()} <= {3, 5, 9}
    assert asks == token_asks(shapes, [3, 5, 9], seed=0, prefix_len=8)
    assert asks != token_asks(shapes, [3, 5, 9], seed=1, prefix_len=8)


def test_text_prompts_have_as_many_words_as_the_ratio_gives() -> None:
    asks = text_asks(random_shapes(5, 30, 5, 0.0, 0), tokens_per_word=1.5, seed=0)
    assert [len((a.text or "").split()) for a in asks] == [20] * 5


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_jsonl_rows_of_all_kinds(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": "hi", "max_tokens": 3}, {"prompt": [1, 2], "max_tokens": 4}, {"messages": chat, "max_tokens": 5}]
    asks = read_asks(write(tmp_path / "d.jsonl", *rows), 3, None, seed=0)
    assert sorted(asks, key=lambda a: a.output_len or 0) == [
        Ask(text="hi", output_len=3),
        Ask(token_ids=(1, 2), output_len=4),
        Ask(messages=tuple(chat), output_len=5),
    ]


def test_a_short_file_is_repeated_and_output_len_overrides(tmp_path: Path) -> None:
    asks = read_asks(write(tmp_path / "d.jsonl", {"prompt": "a", "max_tokens": 3}, {"prompt": "b"}), 5, 9, seed=0)
    assert len(asks) == 5
    assert {a.output_len for a in asks} == {9}
    assert {a.text for a in asks[:2]} == {"a", "b"}


def test_sharegpt_file_takes_the_first_turn_and_skips_what_has_no_answer(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "x"}]
    path = tmp_path / "share.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    assert read_asks(path, 2, None, seed=0) == [Ask(text="q", answer="a")] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": ""}', "row 1"),
        ('{"prompt": "a"}\n{"prompt": [true]}', "row 2"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens 0"),
        ('{"prompt": "a", "max_tokens": "9"}', "max_tokens '9'"),
        ("[1]", "expected an object"),
        ("{broken", "not valid JSON"),
        ("", "no usable rows"),
    ],
)
def test_bad_files_are_refused_by_row(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_asks(path, 1, None, seed=0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        read_asks(tmp_path / "nothing-here.jsonl", 1, None, seed=0)
