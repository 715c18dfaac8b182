"""Quantization while loading, and the rotation of values that goes into the weights with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.engine.decoder import Decoder
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.layout import iter_weights, model_weights, weight_bytes
from quire.engine.loader import load_decoder
from quire.engine.quant import rounding
from quire.engine.quant.rounding import parse_quantization, round_weight
from quire.engine.rotation import turn_columns, turn_rows
from quire.kernels import Target, ops, resolve
from quire.kernels.batch import KVSpec, RaggedBatch, allocate_layer
from quire.kernels.packed import weight_format, weight_formats
from quire.kernels.reference.hadamard import hadamard

CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "phi3": PHI3, "mixtral": MIXTRAL}
WISHES = (*weight_formats(), "int4:32", "int8:64")


def write(folder: Path, config: dict[str, Any] = LLAMA, layout: int = -1, dtype: torch.dtype = torch.float32) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in iter_weights(model_weights(load_config(folder))):
        values = torch.randn(weight.size, generator=generator) * 0.2
        for part in weight.layouts[layout]:
            name = part.name if part.name.startswith("lm_head") else f"model.{part.name}"
            size = torch.Size(part.shape).numel()
            tensors[name], values = values[:size].view(part.shape).to(dtype).clone(), values[size:]
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path, wish: str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    config = load_config(folder)
    kernels = resolve(Target("cpu", dtype, config.head_dim, "fp32"), dict.fromkeys(ops(), "reference"))
    packing = None if wish is None else parse_quantization(wish)
    return load_decoder(folder, config, kernels, dtype, CPU, rounding=packing, **options)


def logits_of(decoder: Decoder, name: str = "fp32") -> Tensor:
    spec = KVSpec(16, decoder.config.num_kv_heads, decoder.config.head_dim, name)
    cache = [allocate_layer(spec, 2, "cpu") for _ in range(decoder.config.num_layers)]
    batch = RaggedBatch(
        input_ids=torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]),
        positions=torch.arange(8),
        slot_mapping=torch.arange(16, 24),
        cu_q=torch.tensor([0, 8], dtype=torch.int32),
        seq_lens=torch.tensor([8], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        tree_mask=None,
        logit_rows=torch.arange(8),
        max_q=8,
        max_seq_len=8,
    )
    with torch.inference_mode():
        return decoder.logits(decoder.forward(batch, cache))


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# Rounding.


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("layout", [-1, 0], ids=["parts", "joined"])
def test_matrices_become_what_their_format_makes_of_them(
    wish: str, layout: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined of their parts, whatever the number of rows that are rounded at once."""
    monkeypatch.setattr(rounding, "SLAB", 128 * 128)
    write(tmp_path, layout=layout)
    tensors = load_file(tmp_path / "model.safetensors")
    form, packing = weight_format(parse_quantization(wish).format), parse_quantization(wish)
    prefix = "model.layers.1.self_attn."
    names = [f"{prefix}{n}_proj.weight" for n in "qkv"] if layout else [f"{prefix}qkv_proj.weight"]
    expected = torch.cat([form.dequantize(form.quantize(tensors[name], packing.group)) for name in names])
    decoder = load(tmp_path, wish)
    packed = decoder.blocks[2][0].qkv.packed.weight
    assert torch.equal(form.dequantize(packed), expected)
    down = form.quantize(tensors["model.layers.0.mlp.down_proj.weight"], packing.group)
    assert torch.equal(decoder.blocks[1][0].down.packed.weight.codes.float(), down.codes.float())


@pytest.mark.parametrize("wish", WISHES)
def test_the_rest_stays_as_it_is(wish: str, tmp_path: Path) -> None:
    write(tmp_path, MIXTRAL)
    decoder, dense = load(tmp_path, wish), load(tmp_path)
    assert torch.equal(decoder.embedding, dense.embedding)
    assert torch.equal(decoder.lm_head.packed.weight, dense.lm_head.packed.weight)
    assert torch.equal(decoder.blocks[1][0].router.packed.weight, dense.blocks[1][0].router.packed.weight)


# Relative errors of logits through two layers of Gaussian weights: those of a matrix (8 bits 0.8 %, fp8 2.6 %, four
# bits 10 %, 8 % in groups of 32), grown by the depth.
LARGEST = {"int4": 0.4, "int4:32": 0.3, "int8": 0.03, "int8:64": 0.03, "w8a8": 0.05, "fp8": 0.15, "fp8_block": 0.15}


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_nearly_the_same(family: str, wish: str, tmp_path: Path) -> None:
    write(tmp_path, FAMILIES[family], layout=0 if family == "phi3" else -1)
    found = error(logits_of(load(tmp_path, wish)), logits_of(load(tmp_path)))
    # A mixture may route a token to another expert, which is no small error.
    assert 1e-4 < found < (LARGEST[wish] if family != "mixtral" else 1.0)


@pytest.mark.parametrize("layout", [-1, 0], ids=["one by one", "stacked"])
def test_experts_are_rounded_wherever_they_lie(layout: int, tmp_path: Path) -> None:
    write(tmp_path, MIXTRAL, layout=layout)
    packed = load(tmp_path, "int8").blocks[1][0].experts.packed
    assert packed.gate_up.codes.shape == (3, 512, 128)
    dense = load(tmp_path).blocks[1][0].experts.packed.down
    assert error(weight_format("int8").dequantize(packed.down), dense) < 0.01


def test_inputs_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    write(tmp_path, LLAMA | {"intermediate_size": 160})
    with pytest.raises(EngineStartError) as caught:
        load(tmp_path, "int4")
    message = str(caught.value)
    assert "layers.0.mlp.down_proj.weight [128, 160]" in message
    assert "take a group of 32" in message
    assert "int4:GROUP" in message
    load(tmp_path, "int4:32")


def test_the_peak_of_memory_is_the_packed_model_and_two_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the allocator's own account, which has the mapped file in it: pages that the system takes back at will."""
    monkeypatch.setattr(rounding, "SLAB", 1 << 17)  # the model is small, so are the pieces
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "vocab_size": 4096}
    write(tmp_path, config, dtype=torch.bfloat16)
    planned = weight_bytes(load_config(tmp_path), torch.bfloat16, parse_quantization("int8"))
    largest = 4096 * 512 * 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        decoder = load(tmp_path, "int8", torch.bfloat16)
    mapped = (tmp_path / "model.safetensors").stat().st_size * 0.9
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) < mapped:
            now += event.nbytes()
            peak = max(peak, now)
    assert decoder.blocks[0][0].qkv.packed.weight.nbytes > 0
    assert planned < now < planned * 1.1  # what is left is the model, and tables
    assert peak <= planned + 2 * largest
    assert weight_bytes(load_config(tmp_path), torch.bfloat16) > planned + 2 * largest  # or it would say nothing


# The rotation of values.


def test_rotations_by_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = hadamard(torch.eye(16))
    values, outputs = torch.randn(48, 10, generator=generator), torch.randn(10, 48, generator=generator)
    bias = torch.randn(48, generator=generator)
    whole = torch.block_diag(matrix, matrix, matrix)
    torch.testing.assert_close(turn_rows(values, 16, hadamard), whole @ values)
    torch.testing.assert_close(turn_rows(bias, 16, hadamard), whole @ bias)
    torch.testing.assert_close(turn_columns(outputs, 16, hadamard), outputs @ whole.T)


@pytest.mark.parametrize(("family", "layout"), [("llama", -1), ("qwen2", -1), ("phi3", 0), ("llama", 0)])
def test_values_that_are_turned_by_their_weights_change_nothing(family: str, layout: int, tmp_path: Path) -> None:
    write(tmp_path, FAMILIES[family], layout=layout)
    plain, turned = load(tmp_path), load(tmp_path, turn_values=True)
    assert turned.blocks[0][0].turn is None
    weights = [decoder.blocks[0][0].qkv.packed.weight for decoder in (plain, turned)]
    assert torch.equal(weights[0][:192], weights[1][:192])
    assert not torch.allclose(weights[0][192:], weights[1][192:])
    torch.testing.assert_close(logits_of(turned), logits_of(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [-1, 0])
def test_they_are_turned_before_they_are_rounded(layout: int, tmp_path: Path) -> None:
    write(tmp_path, QWEN2, layout=layout)
    packed = load(tmp_path, "int8", turn_values=True).blocks[0][0].qkv.packed
    exact = load(tmp_path, turn_values=True).blocks[0][0].qkv.packed
    assert error(weight_format("int8").dequantize(packed.weight), exact.weight) < 0.01
    assert torch.equal(packed.bias, exact.bias)


def test_values_of_quantized_weights_are_turned_on_the_way(tmp_path: Path) -> None:
    """GPTQ's codes cannot be turned: attention's own input and output are."""
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".layers." in name and "norm" not in name]:
        weight = tensors.pop(name)
        packed = round_weight(weight, parse_quantization("int8"))
        stem = name.removesuffix("weight")
        tensors[stem + "weight"], tensors[stem + "weight_scale"] = packed.codes, packed.scales.T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    plain, turned = load(tmp_path), load(tmp_path, turn_values=True)
    assert turned.blocks[0][0].turn is not None
    torch.testing.assert_close(logits_of(turned), logits_of(plain), rtol=1e-4, atol=1e-4)


# The errors of cached keys and values, through two layers.
CACHES = {"fp8_e4m3": 0.1, "int8_per_token_head": 0.02, "int4_per_token_head": 0.25}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_fewer_bits_are_near(name: str, tmp_path: Path) -> None:
    write(tmp_path, QWEN2)
    turned = name.startswith("int4")
    assert 1e-4 < error(logits_of(load(tmp_path, turn_values=turned), name), logits_of(load(tmp_path))) < CACHES[name]


def test_turned_values_stand_out_less(tmp_path: Path) -> None:
    """Two entries of every head's values are 30 times the others: four bits need the rotation."""
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"].view(2, 32, -1)[:, :2] *= 30
    save_file(tensors, tmp_path / "model.safetensors")
    exact = logits_of(load(tmp_path))
    plain, turned = (
        error(logits_of(load(tmp_path, turn_values=turn), "int4_per_token_head"), exact) for turn in (False, True)
    )
    assert turned < 0.8 * plain
