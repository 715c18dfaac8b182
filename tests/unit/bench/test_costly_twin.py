"""The costly twin computes its source's function, and weighs what it was asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.bench.costly_twin import write_costly_twin
from quire.engine.llm import LLM
from quire.engine.loader import BUNDLED_FOLDER
from quire.scheduler.params import SamplingParams


def test_the_twin_says_what_its_source_says(tmp_path: Path) -> None:
    write_costly_twin(BUNDLED_FOLDER, tmp_path / "twin", layers=9, ffn=1536)
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["matformer_widths"][:2]) == (9, [1536, 1024])
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3)
    answers = []
    for model in ("bundled", str(tmp_path / "twin")):
        with LLM(model=model, dtype="float32", threads=1) as llm:
            answers.append(llm.generate("def largest(a, b):\n", params)[0].outputs[0])
    assert answers[0].token_ids == answers[1].token_ids
    for ours, theirs in zip(answers[0].logprobs, answers[1].logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_smaller_twin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smaller"):
        write_costly_twin(BUNDLED_FOLDER, tmp_path / "twin", layers=3)
