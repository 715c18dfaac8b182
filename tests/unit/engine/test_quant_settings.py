"""What is asked for and what cannot be: quantization in config.json, on the command line, and on a given GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.kv_cache import SHORT_NAMES, choose_kv_format
from quire.engine.layout import count_parameters, weight_bytes
from quire.engine.model_config import DecoderConfig
from quire.engine.quant.rounding import choose_rounding, parse_quantization, refuses_gpu, round_weight
from quire.engine.resolve import Machine, resolve
from quire.kernels.kv_formats import kv_formats
from quire.kernels.packed import weight_format, weight_formats

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
BYTES = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def groups(weights: dict[str, Any], layout: str, activations: dict[str, Any] | None = None, **keys: Any) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": [],
    } | keys


def read(folder: Path, quantization: object = None, **changes: Any) -> DecoderConfig:
    config = TINY | ({} if quantization is None else {"quantization_config": quantization}) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return load_config(folder)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
REFUSED: list[tuple[Any, str]] = [
    (7, "quantization_config"),
    ({}, "quant_method is missing"),
    ({"quant_method": "bitsandbytes"}, "awq, compressed-tensors, fp8, gptq, modelopt"),
    ({"quant_method": "mxfp4"}, "--quantization"),
    ({"quant_method": "gptq"}, "bits"),
    (GPTQ | {"bits": 3}, "must be 4 or 8"),
    (GPTQ | {"bits": 2}, "must be 4 or 8"),
    (GPTQ | {"bits": "4"}, "bits"),
    (GPTQ | {"group_size": 0}, "group_size"),
    (GPTQ | {"group_size": -2}, "group_size"),
    (GPTQ | {"checkpoint_format": "marlin"}, "gptq or gptq_v2"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
    (GPTQ | {"dynamic": {"+:(": {}}}, "no regular expression"),
    (GPTQ | {"dynamic": {"x" * 2000: {}}}, "longer than"),
    (GPTQ | {"dynamic": {"+:.*": {"bits": 5}}}, "must be 4 or 8"),
    (GPTQ | {"dynamic": {"+:.*": 5}}, "must be an object"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemm"),
    ({"quant_method": "awq", "bits": 3}, "bits"),
    ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point"),
    ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size"),
    ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": "gate"}, "list of strings"),
    (FP8 | {"activation_scheme": "sometimes"}, "dynamic or static"),
    (FP8 | {"weight_block_size": [64, 128]}, "[128, 128]"),
    (FP8 | {"weight_block_size": [128, 128], "activation_scheme": "static"}, "dynamic"),
    (FP8 | {"fmt": "e5m2"}, "e4m3"),
    (FP8 | {"kv_cache_scheme": "static"}, "kv_cache_scheme"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "FP8"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo"),
    (groups(WEIGHTS, "marlin-24"), "pack-quantized"),
    (groups(WEIGHTS, ""), "pack-quantized"),
    (groups(WEIGHTS | {"num_bits": 3}, "pack-quantized"), "4 or 8"),
    (groups(WEIGHTS | {"strategy": "tensor"}, "pack-quantized"), "group or channel"),
    (groups(WEIGHTS | {"group_size": None}, "pack-quantized"), "group_size"),
    (groups(WEIGHTS | {"actorder": "random"}, "pack-quantized"), "actorder"),
    (groups(WEIGHTS | {"dynamic": True}, "pack-quantized"), "dynamic"),
    (groups(WEIGHTS, "pack-quantized", TOKEN), "int-quantized"),
    (groups(BYTES | {"symmetric": False}, "int-quantized", TOKEN), "symmetric"),
    (groups(BYTES | {"num_bits": 4}, "int-quantized", TOKEN), "pack-quantized"),
    (groups(BYTES | {"strategy": "group", "group_size": 64}, "int-quantized", TOKEN), "channel or tensor"),
    (groups(BYTES, "int-quantized", TOKEN | {"symmetric": False}), "symmetric"),
    (groups(BYTES, "int-quantized", TOKEN | {"num_bits": 4}), "input_activations"),
    (groups(BYTES, "int-quantized", TOKEN | {"dynamic": False}), "tensor"),
    (groups(BYTES | {"type": "float"}, "float-quantized"), "plain activations"),
    (groups(BYTES | {"type": "float", "strategy": "group"}, "float-quantized", TOKEN | {"type": "float"}), "block"),
    (groups(WEIGHTS, "pack-quantized", ignore=["re:*"]), "no regular expression"),
    (groups(WEIGHTS, "pack-quantized", ignore="lm_head"), "list of strings"),
    (groups(WEIGHTS, "pack-quantized", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    (groups(WEIGHTS, "pack-quantized", transform_config={"r1": {}}), "transform_config"),
    (groups(WEIGHTS, "pack-quantized", kv_cache_scheme={"type": "int", "num_bits": 8}), "kv_cache_scheme"),
    (groups(WEIGHTS, "pack-quantized", config_groups=[]), "config_groups"),
]


@pytest.mark.parametrize(("quantization", "said"), REFUSED, ids=lambda value: str(value)[-60:])
def test_what_no_kernel_multiplies_is_refused_by_name(quantization: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(EngineStartError) as caught:
        read(tmp_path, quantization)
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message
    assert "quantization_config" in message
    assert said in message
    assert len(message) < 600


def test_harmless_keys_are_read_past(tmp_path: Path) -> None:
    extra = {"damp_percent": 0.1, "true_sequential": True, "static_groups": False, "model_name_or_path": None}
    assert read(tmp_path, GPTQ | extra).quantization.formats == ("int4",)
    dense = {"sparsity_config": {"format": "dense"}, "transform_config": {}, "kv_cache_scheme": None}
    assert read(tmp_path, groups(WEIGHTS, "pack-quantized", **dense)).quantization.kv_format is None


def test_groups_of_linears_have_their_own_layouts(tmp_path: Path) -> None:
    """The first rule that matches a linear decides; one that no target names stays floats."""
    quantization = groups(WEIGHTS, "mixed-precision")
    quantization["config_groups"] = {
        "a": {"targets": ["re:.*self_attn.*"], "weights": BYTES, "input_activations": TOKEN, "format": "int-quantized"},
        "b": {"targets": ["model.layers.0.mlp.up_proj"], "weights": WEIGHTS, "format": "pack-quantized"},
    }
    quantization["ignore"] = ["re:.*o_proj"]
    scheme = read(tmp_path, quantization).quantization
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    stored = [scheme.storage(f"model.layers.0.{name}") for name in names]
    assert [s and s.packing.format for s in stored] == ["w8a8", None, "int4", None]
    assert scheme.formats == ("w8a8", "int4")


# Wishes.


def test_formats_by_name_and_group() -> None:
    for name in weight_formats():
        assert parse_quantization(name).group == weight_format(name).group
    assert parse_quantization("int4:32")[:2] == ("int4", 32)
    assert parse_quantization("int8:0")[:2] == ("int8", 0)


@pytest.mark.parametrize("wish", ["int3", "", "gptq", "int4:", "int4:-1", "int4:x", "INT4"])
def test_a_wish_that_is_no_format_is_refused(wish: str) -> None:
    with pytest.raises(EngineStartError, match="quantization is"):
        parse_quantization(wish)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    scheme = read(tmp_path, GPTQ).quantization
    for wish in (None, "gptq", "int4"):
        assert choose_rounding(wish, scheme) is None
    for wish in ("int8", "awq", "int4:32"):
        with pytest.raises(EngineStartError, match="quantized already"):
            choose_rounding(wish, scheme)
    with pytest.raises(EngineStartError, match="not quantized"):
        choose_rounding("gptq", None)
    assert choose_rounding(None, None) is None


@pytest.mark.parametrize(
    ("name", "capability", "refused"),
    [
        ("fp8", (8, 0), True),
        ("fp8_block", (8, 6), True),
        ("fp8", (8, 9), False),
        ("fp8", (9, 0), False),
        ("fp8", (10, 0), False),
        ("fp8", (0, 0), False),
        ("int4", (8, 0), False),
        ("w8a8", (8, 0), False),
        ("int4", (7, 5), True),
    ],
)
def test_old_gpus_are_told(name: str, capability: tuple[int, int], refused: bool) -> None:
    why = refuses_gpu(name, capability)
    assert (why is not None) == refused
    if why is not None:
        assert name in why
        assert f"{capability[0]}.{capability[1]}" in why
        assert ("int8" in why) == (capability >= (8, 0))


# Plans.

CPU = Machine(cuda=False, fast_bf16=False, cores=1, free_bytes=1 << 30)


def test_a_gpu_that_is_too_old_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    machine = dataclasses.replace(CPU, cuda=True, capability=(8, 0))
    with pytest.raises(EngineStartError, match=r"capability 8\.9"):
        resolve(EngineConfig(quantization="fp8"), read(tmp_path), machine)
    with pytest.raises(EngineStartError, match=r"capability 8\.9"):
        resolve(EngineConfig(), read(tmp_path, FP8), machine)
    assert resolve(EngineConfig(quantization="w8a8"), read(tmp_path), machine).quantization == "w8a8"


@pytest.mark.parametrize("wish", [*weight_formats(), "int4:32", "int8:64"])
def test_the_planned_size_is_that_of_the_packed_weights(wish: str, tmp_path: Path) -> None:
    """Of each matrix of a layer, rounded for real; the rest in two bytes each."""
    model, packing = read(tmp_path), parse_quantization(wish)
    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    rest = count_parameters(model) - 2 * sum(n * k for n, k in shapes)
    packed = 2 * sum(round_weight(torch.ones(shape), packing).nbytes for shape in shapes)
    assert weight_bytes(model, torch.bfloat16, packing) == packed + 2 * rest
    settings = resolve(EngineConfig(quantization=wish, dtype="bfloat16"), model, CPU)
    assert settings.weight_bytes == packed + 2 * rest
    assert settings.reasons["quantization"] == "given"


def test_a_smaller_cache_holds_more_blocks(tmp_path: Path) -> None:
    model = read(tmp_path)
    blocks = {
        wish: resolve(
            EngineConfig(kv_cache_dtype=wish, dtype="bfloat16", kv_cache_bytes=1 << 20), model, CPU
        ).num_blocks
        for wish in ("auto", "fp8", "int8", "int4")
    }
    # 64 entries in two bytes, in one, in one with a scale of two bytes, in half a one with such a scale
    assert blocks["fp8"] == pytest.approx(2 * blocks["auto"], abs=1)
    assert blocks["int8"] == pytest.approx(blocks["auto"] * 128 / 66, abs=1)
    assert blocks["int4"] == pytest.approx(blocks["auto"] * 128 / 34, abs=1)


def test_every_spelling_of_a_cache_format_is_one(tmp_path: Path) -> None:
    model = read(tmp_path)
    assert set(SHORT_NAMES.values()) == set(kv_formats())
    for wish, name in SHORT_NAMES.items():
        for spelling in (wish, name):
            assert choose_kv_format(spelling, model, torch.float32) == (name, "given")
    assert choose_kv_format("auto", model, torch.float32)[0] == "fp32"
    with pytest.raises(EngineStartError, match=r"kv_cache_dtype is 'int2'; choose auto, bfloat16"):
        choose_kv_format("int2", model, torch.float32)


def test_a_cache_that_the_checkpoint_was_made_for(tmp_path: Path) -> None:
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
    model = read(tmp_path, groups(WEIGHTS, "pack-quantized", kv_cache_scheme=scheme))
    assert choose_kv_format("auto", model, torch.bfloat16) == ("fp8_e4m3", "the checkpoint was made for it")
    assert choose_kv_format("bfloat16", model, torch.bfloat16)[0] == "bf16"


def test_heads_that_cannot_be_rotated_are_refused(tmp_path: Path) -> None:
    model = read(tmp_path, head_dim=48)
    with pytest.raises(EngineStartError, match="48; int8_per_token_head takes any"):
        choose_kv_format("int4", model, torch.float32)
    assert choose_kv_format("int8", model, torch.float32)[0] == "int8_per_token_head"
