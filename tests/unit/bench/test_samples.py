from __future__ import annotations

from pathlib import Path

import pytest

from quire.bench.samples import SamplesConfig, group_blocks, judge, price, summary
from quire.bench.tasks import Task


@pytest.mark.parametrize(
    ("prompt_len", "output_len", "concurrent", "expected"),
    [
        (64, 1, 8, 4),  # the drawn token is never written: the prompt's own blocks, and nothing else
        (64, 2, 8, 4 + 8),
        (60, 1, 8, 4 + 8),  # each sample has its own copy of the block that is not full
        (60, 5, 8, 4 + 8),
        (60, 6, 8, 4 + 16),
    ],
)
def test_blocks_of_a_group(prompt_len: int, output_len: int, concurrent: int, expected: int) -> None:
    assert group_blocks(prompt_len, output_len, 16, concurrent) == expected


@pytest.mark.parametrize(("prompt_len", "output_len"), [(64, 40), (70, 40), (33, 2)])
def test_a_group_computes_its_prompt_once_and_holds_what_the_formula_says(
    tiny_model: Path, prompt_len: int, output_len: int
) -> None:
    config = SamplesConfig(
        model=str(tiny_model),
        threads=1,
        n=24,
        prompt_len=prompt_len,
        output_len=output_len,
        max_num_seqs=8,
        repetitions=1,
    )
    result = price(config)
    assert result["prompt_tokens_computed"] == prompt_len
    assert result["separate_prompt_tokens_computed"] == 24 * prompt_len
    assert result["concurrent_samples"] == 8
    assert result["peak_blocks"] == result["formula_blocks"]


def test_equal_bodies_are_judged_once() -> None:
    seen: list[str] = []

    def verdict(task: Task, body: str) -> bool:
        seen.append(body)
        return body == "a"

    task = Task("f", "m", "", "", 0, "")
    assert judge(task, ["a", "b", "a", "c", "a"], verdict) == (5, 3)
    assert sorted(seen) == ["a", "b", "c"]


def test_the_summary_has_a_curve_and_a_law() -> None:
    tasks = [Task(name, "m", "", "", 0, "") for name in "fgh"]
    told = summary(tasks, [(10, 0), (10, 2), (10, 9)])
    assert list(told["coverage"]) == ["1", "2", "5", "10"]
    assert told["coverage"]["10"] == pytest.approx(2 / 3)
    assert told["power_law"]["b"] < 0
    assert told["right"] == {"m:f": 0, "m:g": 2, "m:h": 9}
