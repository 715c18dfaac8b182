"""A format that nobody knew of is served as soon as it is registered: no caller names formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.llm import LLM
from quire.kernels import kv_formats, packed, registry
from quire.kernels.kv_formats import KVFormat
from quire.kernels.packed import PackedWeight, WeightFormat
from quire.scheduler.params import SamplingParams


@pytest.fixture
def empty_shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for module, name in ((registry, "_OPS"), (packed, "_FORMATS"), (kv_formats, "_FORMATS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


def register_halves() -> list[str]:
    """Weights as fp16 codes of w / 2; keys and values as their doubles. -> the names of the ops that ran."""
    ran: list[str] = []
    packed.register(
        WeightFormat(
            name="halves",
            quantize=lambda w, group: PackedWeight(
                "halves", *w.shape, w.shape[1], w.float() / 2, torch.full((1, len(w)), 2.0)
            ),
            dequantize=lambda p: p.codes * p.scales.T,
            refuses=lambda outputs, inputs, group: None,
            bits=32,
            output_dim=-2,
        )
    )

    def prepare_linear_halves(weight: PackedWeight, bias: torch.Tensor | None) -> Any:
        return weight, bias

    def linear_halves(x: torch.Tensor, packed: Any) -> torch.Tensor:
        ran.append("linear_halves")
        weight, bias = packed
        return torch.nn.functional.linear(x, weight.codes * weight.scales.T, bias)

    registry.op(prepare=prepare_linear_halves)(linear_halves)

    def encode(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        ran.append("encode")
        return x * 2, None

    kv_formats.register(
        KVFormat(name="doubles", storage=torch.float32, encode=encode, decode=lambda codes, scale: codes / 2)
    )
    return ran


@pytest.mark.usefixtures("empty_shelves")
def test_registered_formats_are_served(tiny_model: Path) -> None:
    prompts, params = [[1, 2, 3], list(range(40))], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

    def tokens(**formats: str) -> list[list[int]]:
        with LLM(str(tiny_model), dtype="float32", **formats) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)]

    plain = tokens()
    ran = register_halves()
    assert tokens(quantization="halves", kv_cache_dtype="doubles") == plain
    assert set(ran) == {"linear_halves", "encode"}
