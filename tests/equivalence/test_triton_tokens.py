"""A whole engine on the Triton kernels, in their interpreter: the tokens of the reference kernels, format by format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quire.engine.llm import LLM
from quire.kernels import Target, implementations, ops
from quire.scheduler.params import SamplingParams

TARGET = Target("cpu", torch.float32, 16, "fp32")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], list(range(40))]  # a decode beside a prompt, and one that shares nothing with it
PARAMS = [
    SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, top_k=20, seed=7, ignore_eos=True),
]
FORMATS = [
    {"quantization": "int4:32", "kv_cache_dtype": "int4"},
    *(
        pytest.param(form, marks=pytest.mark.slow)
        for form in (
            {},
            {"quantization": "int8", "kv_cache_dtype": "int8"},
            {"quantization": "w8a8", "kv_cache_dtype": "fp8"},
            {"quantization": "fp8"},
            {"quantization": "fp8_block"},
        )
    ),
]


def tokens(model: Path, kernels: dict[str, str], form: dict[str, str]) -> list[list[int]]:
    settings = {"max_model_len": 64, "max_num_batched_tokens": 32, "max_num_seqs": 4, "dtype": "float32"} | form
    with LLM(str(model), kernels=kernels, **settings) as llm:
        outputs = [llm.generate(PROMPTS, params, progress=False) for params in PARAMS]
    return [output.outputs[0].token_ids for some in outputs for output in some]


def on_triton() -> dict[str, str]:
    """Every op that has a Triton kernel that runs here."""
    names = (name for name in ops() if "triton" in implementations(name))
    return {name: "triton" for name in names if implementations(name)["triton"].when(TARGET) is None}


@pytest.mark.parametrize("form", FORMATS)
def test_tokens_are_those_of_the_reference(form: dict[str, str], tiny_model: Path) -> None:
    kernels = on_triton()
    assert {"attention", "sample", "linear_int4", "rope_kv_write", "add_rms_norm"} <= set(kernels)
    assert tokens(tiny_model, kernels, form) == tokens(tiny_model, dict.fromkeys(ops(), "reference"), form)
