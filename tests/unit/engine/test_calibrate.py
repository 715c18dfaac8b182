"""Four-bit weights calibrated on a text: what rounding gives away is made good, and what is written loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.layout import model_weights
from quire.engine.quant.calibrate import quantize_model
from quire.engine.quant.export import words
from quire.engine.quant.feedback import round_with_feedback
from quire.engine.quant.scheme import unpack_words
from quire.engine.weights import Checkpoint
from quire.kernels.reference.int4 import dequantize_int4, quantize_int4
from quire.kernels.testing import normal

WINDOWS = [[(7 * i + j * j) % 256 for j in range(48)] for i in range(6)]


def correlated(rows: int, inputs: int) -> torch.Tensor:
    """Inputs of a layer as they come: most of their energy in a few directions."""
    return normal((rows, 12), torch.float32, 5) @ normal((12, inputs), torch.float32, 6) + normal(
        (rows, inputs), torch.float32, 7
    )


def test_outputs_suffer_less_than_by_rounding_to_nearest() -> None:
    weight, x = normal((96, 256), torch.float32), correlated(2000, 256)
    exact = x @ weight.T

    def error(values: torch.Tensor) -> float:
        return ((x @ values.T - exact).norm() / exact.norm()).item()

    nearest = error(dequantize_int4(quantize_int4(weight, 64)))
    assert error(dequantize_int4(round_with_feedback(weight, x.T @ x, 64))) < 0.6 * nearest


def test_independent_inputs_have_nothing_to_make_good() -> None:
    weight = normal((40, 128), torch.float32)
    packed, nearest = round_with_feedback(weight, torch.eye(128), 32), quantize_int4(weight, 32)
    assert torch.equal(packed.codes, nearest.codes)
    assert torch.equal(packed.scales, nearest.scales)


def test_inputs_that_never_occur_get_no_weight() -> None:
    weight, x = normal((8, 64), torch.float32), correlated(500, 64)
    x[:, 5] = 0
    values = dequantize_int4(round_with_feedback(weight, x.T @ x, 32))
    assert not values[:, 5].any()
    assert values.isfinite().all()


@pytest.mark.parametrize("columns", [1, 8, 13])
def test_words_hold_the_first_code_lowest(columns: int) -> None:
    codes = torch.arange(3 * columns).reshape(3, columns) % 16
    assert torch.equal(unpack_words(words(codes), 4, 1)[:, :columns].long(), codes)


def test_the_folder_that_is_written_holds_the_model(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"
    quantize_model(tiny_model, target, WINDOWS, 32)
    config = load_config(target)
    assert config.quantization is not None
    written = load_file(target / "model.safetensors")
    source = load_file(tiny_model / "model.safetensors")
    kept = [name for name in source if "proj" not in name or name.endswith("bias")]
    assert kept
    assert all(torch.equal(written[name], source[name]) for name in kept)
    with Checkpoint(target, config.quantization) as checkpoint, Checkpoint(tiny_model) as floats:
        for layer in model_weights(config).layers:
            for weight in (layer.attention.qkv, layer.attention.o, layer.ffn.gate_up, layer.ffn.down):
                parts = [
                    dequantize_int4(checkpoint.packed(part, storage, torch.device("cpu")))
                    for part, storage in checkpoint.sources(weight)
                    if storage is not None
                ]
                exact = floats.read(weight, torch.float32, torch.device("cpu"))
                assert torch.cat(parts).shape == exact.shape
                assert (torch.cat(parts) - exact).norm() < 0.3 * exact.norm()


def test_a_written_folder_is_served(tiny_model: Path, tmp_path: Path) -> None:
    from quire.engine.llm import LLM
    from quire.scheduler.params import SamplingParams

    target = tmp_path / "int4"
    quantize_model(tiny_model, target, WINDOWS, 64)
    with LLM(str(target), dtype="float32") as llm:
        (output,) = llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 5


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "group", "message"),
    [
        (lambda source, target: target.mkdir(), 32, "exists; give a folder that is still to be made"),
        (lambda source, target: None, 48, r"tensor layers.0.self_attn.*proj.weight .* cannot be packed: .*group 48"),
        (
            lambda source, target: change(source, quantization_config={"quant_method": "fp8"}),
            32,
            "is quantized already",
        ),
    ],
)
def test_refusals(
    spoil: Callable[[Path, Path], None], group: int, message: str, tiny_copy: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    spoil(tiny_copy, target)
    with pytest.raises(EngineStartError, match=message):
        quantize_model(tiny_copy, target, WINDOWS, group)


@pytest.fixture
def tiny_copy(tiny_model: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))
