"""Quantized checkpoints, written here from known codes: what is loaded is those codes, and the model is their model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.engine.decoder import Decoder
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.kv_scales import load_kv_scales
from quire.engine.layout import iter_weights, model_weights, weight_bytes
from quire.engine.loader import load_decoder
from quire.engine.spec.slices import nested_decoder
from quire.kernels import Target, ops, resolve
from quire.kernels.batch import KVSpec, RaggedBatch, allocate_layer
from quire.kernels.packed import PackedWeight, weight_format

CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}
GROUP = 32


class Written(NamedTuple):
    """A linear as a checkpoint holds it, and what it means."""

    tensors: dict[str, Tensor]  # by suffix
    dense: Tensor  # [N, K] fp32
    codes: Tensor  # [N, K], as integers around their zero (or fp8), columns in the order of the inputs


# Writers. All of them are naive: one value after another, as the formats are described.


def words(codes: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """codes [A, B] unsigned -> int32 [A, B · bits / 32]: field i of a word holds its stretch's value places[i]."""
    per = 32 // bits
    fields = codes.long().reshape(codes.shape[0], -1, per)
    total = sum(fields[..., place] << bits * i for i, place in enumerate(places or range(per)))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def draw(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def scales_of(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return ((torch.rand(shape, generator=generator) + 0.5) / 40).to(dtype)


def meaning(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """codes [N, K], zeros and scales [G, N], groups [K] -> dense [N, K]."""
    return (codes - zeros[groups].T).float() * scales[groups].T.float()


def gptq(
    generator: torch.Generator,
    outputs: int,
    inputs: int,
    bits: int = 4,
    group: int = GROUP,
    symmetric: bool = True,
    offset: int = 1,
    ordered: bool = False,
) -> Written:
    count = inputs // group
    codes = draw(generator, 0, 1 << bits, outputs, inputs)
    zeros = draw(generator, 0, 1 << bits, count, outputs)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << bits - 1)
    scales = scales_of(generator, count, outputs)
    groups = torch.arange(inputs) // group
    if ordered:  # of the sizes alone, as q, k and v have the same inputs
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    tensors = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words((zeros - offset) % (1 << bits), bits),
        "scales": scales,
        "g_idx": groups.int(),
    }
    return Written(tensors, meaning(codes, zeros, scales, groups), codes - zeros[groups].T)


def awq(generator: torch.Generator, outputs: int, inputs: int) -> Written:
    count, places = inputs // GROUP, (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros = draw(generator, 0, 16, outputs, inputs), draw(generator, 0, 16, count, outputs)
    scales, groups = scales_of(generator, count, outputs), torch.arange(inputs) // GROUP
    tensors = {
        "qweight": words(codes.T.contiguous(), 4, places),
        "qzeros": words(zeros, 4, places),
        "scales": scales,
    }
    return Written(tensors, meaning(codes, zeros, scales, groups), codes - zeros[groups].T)


def packed_integers(
    generator: torch.Generator,
    outputs: int,
    inputs: int,
    bits: int = 4,
    symmetric: bool = True,
    ordered: bool = False,
    group: int | None = GROUP,
) -> Written:
    group = group or inputs
    count, half = inputs // group, 1 << bits - 1
    codes = draw(generator, -half, half, outputs, inputs)
    zeros = (
        torch.zeros(count, outputs, dtype=torch.int64) if symmetric else draw(generator, -half, half, count, outputs)
    )
    scales = scales_of(generator, count, outputs, dtype=torch.bfloat16)
    groups = torch.arange(inputs) // group
    if ordered:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    tensors = {
        "weight_packed": words(codes + half, bits),
        "weight_scale": scales.T.contiguous(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros + half, bits).T.contiguous()
    if ordered:
        tensors["weight_g_idx"] = groups.int()
    return Written(tensors, meaning(codes, zeros, scales, groups), codes - zeros[groups].T)


def plain_integers(
    generator: torch.Generator, outputs: int, inputs: int, per: str = "channel", static: bool = False
) -> Written:
    codes = draw(generator, -127, 128, outputs, inputs)
    count = {"channel": 1, "tensor": 1, "group": inputs // GROUP}[per]
    scale = scales_of(generator, *((1,) if per == "tensor" else (outputs, count)), dtype=torch.float32) / 16
    tensors = {"weight": codes.to(torch.int8), "weight_scale": scale}
    if static:
        tensors["input_scale"] = torch.tensor([0.05])
    spread = scale.reshape(-1, count).expand(outputs, count).repeat_interleave(inputs // count, 1)
    return Written(tensors, codes.float() * spread, codes)


def fp8(
    generator: torch.Generator,
    outputs: int,
    inputs: int,
    per: str = "tensor",
    static: bool = False,
    name: str = "weight_scale",
) -> Written:
    codes = (torch.randn(outputs, inputs, generator=generator) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = {
        "tensor": (),
        "one": (1,),
        "channel": (outputs, 1),
        "block": (-(-outputs // 128), -(-inputs // 128)),
    }[per]
    scale = scales_of(generator, *shape, dtype=torch.float32) / 8
    spread = scale.reshape(1, 1) if scale.numel() == 1 else scale
    if per == "block":
        spread = scale.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
    tensors = {"weight": codes, name: scale}
    if static:
        tensors["input_scale"] = torch.tensor(0.02).reshape(() if per == "tensor" else (1,))
    return Written(tensors, codes.float() * spread, codes)


Writer = Callable[[torch.Generator, int, int], Written]


def group_of(weights: dict[str, Any], layout: str, activations: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate$", "re:.*mlp.gate$"],
    }


INT = {"type": "int", "symmetric": True, "dynamic": False}
FLOAT = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False}
PER_GROUP = {"strategy": "group", "group_size": GROUP}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
FLOAT_TOKEN = TOKEN | {"type": "float"}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = FP8 | {"weight_block_size": [128, 128]}

CASES: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq": (GPTQ, gptq),
    "gptq-asymmetric": (GPTQ | {"sym": False}, lambda g, n, k: gptq(g, n, k, symmetric=False)),
    "gptq-v2": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        lambda g, n, k: gptq(g, n, k, symmetric=False, offset=0),
    ),
    "gptq-v2-under-its-old-name": (GPTQ, lambda g, n, k: gptq(g, n, k, offset=0)),
    "gptq-act-order": (GPTQ | {"desc_act": True}, lambda g, n, k: gptq(g, n, k, ordered=True)),
    "gptq-whole": (GPTQ | {"group_size": -1}, lambda g, n, k: gptq(g, n, k, group=k)),
    "gptq-8": (GPTQ | {"bits": 8}, lambda g, n, k: gptq(g, n, k, bits=8)),
    "gptq-8-act-order": (GPTQ | {"bits": 8, "desc_act": True}, lambda g, n, k: gptq(g, n, k, bits=8, ordered=True)),
    "awq": (AWQ, awq),
    "awq-old-keys": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"},
        awq,
    ),
    "pack-quantized": (group_of(INT | PER_GROUP | {"num_bits": 4}, "pack-quantized"), packed_integers),
    "pack-quantized-asymmetric": (
        group_of(INT | PER_GROUP | {"num_bits": 4, "symmetric": False}, "pack-quantized"),
        lambda g, n, k: packed_integers(g, n, k, symmetric=False),
    ),
    "pack-quantized-act-order": (
        group_of(INT | PER_GROUP | {"num_bits": 4, "actorder": "group"}, "pack-quantized"),
        lambda g, n, k: packed_integers(g, n, k, ordered=True),
    ),
    "pack-quantized-8": (
        group_of(INT | {"strategy": "channel", "num_bits": 8}, "pack-quantized"),
        lambda g, n, k: packed_integers(g, n, k, bits=8, group=None),
    ),
    "int-quantized": (
        group_of(INT | {"strategy": "channel", "num_bits": 8}, "int-quantized", TOKEN),
        plain_integers,
    ),
    "int-quantized-static": (
        group_of(INT | {"strategy": "tensor", "num_bits": 8}, "int-quantized", STATIC),
        lambda g, n, k: plain_integers(g, n, k, "tensor", static=True),
    ),
    "int-quantized-weights": (
        group_of(INT | PER_GROUP | {"num_bits": 8}, "int-quantized"),
        lambda g, n, k: plain_integers(g, n, k, "group"),
    ),
    "float-quantized": (
        group_of(FLOAT | {"strategy": "channel"}, "float-quantized", FLOAT_TOKEN),
        lambda g, n, k: fp8(g, n, k, "channel"),
    ),
    "float-quantized-static": (
        group_of(FLOAT | {"strategy": "tensor"}, "float-quantized", STATIC | {"type": "float"}),
        lambda g, n, k: fp8(g, n, k, "one", static=True),
    ),
    "float-quantized-blocks": (
        group_of(
            FLOAT | {"strategy": "block", "block_structure": [128, 128]},
            "float-quantized",
            FLOAT_TOKEN | {"strategy": "group", "group_size": 128},
        ),
        lambda g, n, k: fp8(g, n, k, "block"),
    ),
    "fp8": (FP8, fp8),
    "fp8-static": (FP8 | {"activation_scheme": "static"}, lambda g, n, k: fp8(g, n, k, static=True)),
    "fp8-blocks": (BLOCKS, lambda g, n, k: fp8(g, n, k, "block", name="weight_scale_inv")),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*.mlp.gate"]},
        lambda g, n, k: fp8(g, n, k, static=True),
    ),
}
EXACT = {name for name in CASES if "fp8" not in name and "float" not in name and name != "modelopt"}
EXACT -= {"int-quantized", "int-quantized-static"}  # these round activations as well
ACT_ORDER = {name for name in CASES if "act-order" in name}


def write(
    folder: Path, case: str, config: dict[str, Any] = LLAMA, layout: int = -1, kept: tuple[str, ...] = ()
) -> dict[str, Written]:
    """A quantized model in `folder`, the dense one of the same meaning in `folder/dense`. Its linears by name.

    kept: linears (by parts of their names) that stay floats
    """
    quantization, writer = CASES[case]
    dense_folder = folder / "dense"
    dense_folder.mkdir(parents=True, exist_ok=True)
    (dense_folder / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    linears: dict[str, Written] = {}
    for weight in iter_weights(model_weights(load_config(dense_folder))):
        # An expert's matrices always lie one by one: nobody stores them joined in these formats.
        parts = weight.layouts[-1 if len(weight.shape) == 3 else layout]
        for part in parts:
            name = part.name if part.name.startswith("lm_head") else f"model.{part.name}"
            if weight.linear and part.name != "lm_head.weight" and not any(k in name for k in kept):
                written = writer(generator, *part.shape)
                linears[part.name] = written
                tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in written.tensors.items()}
                dense[name] = written.dense
            else:
                scale = 1.0 if name.endswith("norm.weight") else 0.3
                dense[name] = tensors[name] = torch.randn(part.shape, generator=generator) * scale
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    save_file({name: t.contiguous() for name, t in dense.items()}, dense_folder / "model.safetensors")
    return linears


def load(folder: Path, **options: Any) -> Decoder:
    config = load_config(folder)
    kernels = resolve(Target("cpu", torch.float32, config.head_dim, "fp32"), dict.fromkeys(ops(), "reference"))
    return load_decoder(folder, config, kernels, torch.float32, CPU, **options)


def logits_of(decoder: Decoder, tokens: list[int]) -> Tensor:
    """[len(tokens), V] of one sequence."""
    spec = KVSpec(64, decoder.config.num_kv_heads, decoder.config.head_dim, "fp32")
    count = len(tokens)
    batch = RaggedBatch(
        input_ids=torch.tensor(tokens),
        positions=torch.arange(count),
        slot_mapping=torch.arange(64, 64 + count),
        cu_q=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        tree_mask=None,
        logit_rows=torch.arange(count),
        max_q=count,
        max_seq_len=count,
    )
    cache = [allocate_layer(spec, 2, "cpu") for _ in range(decoder.config.num_layers)]
    with torch.inference_mode():
        return decoder.logits(decoder.forward(batch, cache))


def greedy(decoder: Decoder, count: int = 12) -> list[int]:
    tokens = [3, 1, 4]
    for _ in range(count):
        tokens.append(int(logits_of(decoder, tokens)[-1].argmax()))
    return tokens


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(EngineStartError) as caught:
        load(folder, **options)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Codes.


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_written(case: str, tmp_path: Path) -> None:
    linears = write(tmp_path, case)
    decoder = load(tmp_path)
    for layer in range(2):
        attention, ffn = (decoder.blocks[2 * layer + i][0] for i in (0, 1))
        prefix = f"layers.{layer}."
        for linear, names in (
            (attention.qkv, [f"{prefix}self_attn.{n}_proj.weight" for n in "qkv"]),
            (attention.o, [f"{prefix}self_attn.o_proj.weight"]),
            (ffn.gate_up, [f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"]),
            (ffn.down, [f"{prefix}mlp.down_proj.weight"]),
        ):
            packed: PackedWeight = linear.packed.weight
            dense = torch.cat([linears[name].dense for name in names])
            assert torch.equal(weight_format(packed.format).dequantize(packed), dense)
            codes = torch.cat([linears[name].codes.float() for name in names])
            assert torch.equal(codes_of(packed), codes)
            assert packed.order is None or case in ACT_ORDER
            static = "static" in case or case == "modelopt"
            assert (packed.input_scale is not None) == static


def codes_of(packed: PackedWeight) -> Tensor:
    """[N, K] around their zero, columns in the order of the inputs: with all scales 1 a weight is its code."""
    ones = PackedWeight(
        packed.format,
        packed.outputs,
        packed.inputs,
        packed.group,
        packed.codes,
        torch.ones_like(packed.scales),
        packed.zeros,
        packed.order,
    )
    return weight_format(packed.format).dequantize(ones)


def test_symmetric_zeros_are_not_kept(tmp_path: Path) -> None:
    for case in ("gptq", "gptq-v2-under-its-old-name", "pack-quantized"):
        write(tmp_path / case, case)
        assert load(tmp_path / case).blocks[0][0].qkv.packed.weight.zeros is None


def test_act_order_is_a_permutation_of_the_inputs(tmp_path: Path) -> None:
    write(tmp_path, "gptq-act-order")
    order = load(tmp_path).blocks[0][0].qkv.packed.weight.order
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))


def test_one_scale_for_a_matrix_becomes_one_per_output(tmp_path: Path) -> None:
    linears = write(tmp_path, "fp8-static")
    packed = load(tmp_path).blocks[0][0].qkv.packed.weight
    parts = [linears[f"layers.0.self_attn.{n}_proj.weight"].tensors["weight_scale"] for n in "qkv"]
    assert torch.equal(packed.scales[0], torch.cat([s.expand(n) for s, n in zip(parts, (64, 32, 32), strict=True)]))


# Models.


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_the_weights_that_were_meant(case: str, tmp_path: Path) -> None:
    write(tmp_path, case)
    ours, dense = load(tmp_path), load(tmp_path / "dense")
    tokens = greedy(dense)
    if case in EXACT:
        assert greedy(ours) == tokens
        torch.testing.assert_close(logits_of(ours, tokens), logits_of(dense, tokens), rtol=1e-4, atol=1e-4)
    else:  # activations are rounded to eight bits
        a, b = logits_of(ours, tokens), logits_of(dense, tokens)
        error = (a - b).norm() / b.norm()
        assert 1e-5 < error < 0.15


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8-blocks", "pack-quantized-asymmetric"])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3-moe"])
def test_experts_that_are_stored_one_by_one(case: str, config: dict[str, Any], tmp_path: Path) -> None:
    linears = write(tmp_path, case, config)
    decoder = load(tmp_path)
    moe = decoder.blocks[1][0]
    block, names = ("block_sparse_moe", ("w1", "w3")) if config is MIXTRAL else ("mlp", ("gate_proj", "up_proj"))
    expected = torch.stack(
        [torch.cat([linears[f"layers.0.{block}.experts.{e}.{name}.weight"].dense for name in names]) for e in range(3)]
    )
    packed = moe.experts.packed.gate_up
    assert torch.equal(weight_format(packed.format).dequantize(packed), expected)
    if case in EXACT:
        assert greedy(decoder) == greedy(load(tmp_path / "dense"))


def test_experts_with_an_order_of_their_own_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq-act-order", MIXTRAL)
    message = refusal(tmp_path)
    assert "experts.0.w1.weight" in message
    assert "act-order" in message


@pytest.mark.parametrize("kept", ["experts.1.", "experts.2.w1.", "w2."])
def test_experts_that_are_stored_in_several_ways_are_refused(kept: str, tmp_path: Path) -> None:
    write(tmp_path, "gptq", MIXTRAL, kept=(kept,))
    message = refusal(tmp_path)
    assert "experts" in message
    assert "floats" in message


@pytest.mark.parametrize("case", ["gptq", "awq", "pack-quantized", "fp8", "fp8-blocks"])
def test_matrices_that_are_stored_joined(case: str, tmp_path: Path) -> None:
    linears = write(tmp_path, case, PHI3, layout=0)
    assert "layers.0.self_attn.qkv_proj.weight" in linears
    packed = load(tmp_path).blocks[0][0].qkv.packed.weight
    dense = linears["layers.0.self_attn.qkv_proj.weight"].dense
    assert torch.equal(weight_format(packed.format).dequantize(packed), dense)


@pytest.mark.parametrize("case", ["gptq", "int-quantized"])
def test_biases_stay_with_their_rows(case: str, tmp_path: Path) -> None:
    write(tmp_path, case, QWEN2)
    decoder, dense = load(tmp_path), load(tmp_path / "dense")
    assert torch.equal(decoder.blocks[0][0].qkv.packed.bias, dense.blocks[0][0].qkv.packed.bias)


def test_linears_that_the_configuration_leaves_out(tmp_path: Path) -> None:
    quantization = group_of(INT | PER_GROUP | {"num_bits": 4}, "pack-quantized")
    quantization["ignore"] = ["lm_head", "re:.*\\.v_proj", "model.layers.1.mlp.down_proj"]
    CASES["left-out"] = (quantization, packed_integers)
    try:
        write(tmp_path, "left-out", QWEN2, kept=("v_proj", "layers.1.mlp.down_proj"))
    finally:
        del CASES["left-out"]
    decoder, dense = load(tmp_path), load(tmp_path / "dense")
    assert len(decoder.blocks[0][0].qkv.packed) == 3  # q and k in four bits beside v in floats
    assert isinstance(decoder.blocks[3][0].down.packed.weight, Tensor)
    assert greedy(decoder) == greedy(dense)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("gptq", {"dynamic": {"-:.*v_proj": {}}}),
        ("awq", {"modules_to_not_convert": ["v_proj"]}),
        ("fp8", {"modules_to_not_convert": ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]}),
        ("fp8", {"ignored_layers": ["v_proj"]}),
        ("modelopt", {"ignore": ["lm_head", "*v_proj"]}),
    ],
)
def test_every_way_of_leaving_linears_out(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    quantization, writer = CASES[case]
    CASES["left-out"] = (quantization | change, writer)
    try:
        write(tmp_path, "left-out", kept=("v_proj",))
    finally:
        del CASES["left-out"]
    scheme = load_config(tmp_path).quantization
    assert scheme.storage("model.layers.0.self_attn.v_proj") is None
    assert scheme.storage("model.layers.0.self_attn.q_proj") is not None
    assert scheme.storage("lm_head") is None
    values = load(tmp_path).blocks[0][0].qkv.packed[2]
    assert torch.equal(values.packed.weight, load_file(tmp_path / "model.safetensors")["model." + V])


V = "layers.0.self_attn.v_proj.weight"


def test_settings_of_single_linears(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: other bits for some; q, k and v that differ are multiplied one by one."""
    quantization = GPTQ | {"dynamic": {"+:.*v_proj": {"bits": 8}}}
    CASES["mixed"] = (quantization, lambda g, n, k: gptq(g, n, k, bits=8 if (n, k) == (32, 64) else 4))
    changed = {"+:.*(k_proj|v_proj)": {"bits": 8}}
    CASES["mixed"][0]["dynamic"] = changed
    try:
        write(tmp_path, "mixed")
    finally:
        del CASES["mixed"]
    parts = load(tmp_path).blocks[0][0].qkv.packed
    assert [part.packed.weight.format for part in parts] == ["int4", "int8", "int8"]
    assert greedy(load(tmp_path)) == greedy(load(tmp_path / "dense"))


def test_modelopt_may_describe_itself_in_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "modelopt")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    own = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    config = load_config(tmp_path)
    assert (config.quantization.method, config.quantization.kv_format) == ("modelopt", "fp8_e4m3")
    assert load(tmp_path).blocks[0][0].qkv.rows.scale == pytest.approx(0.02)


def test_a_quantized_logits_matrix(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    quantization = GPTQ | {"lm_head": True}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    written = gptq(torch.Generator().manual_seed(9), 48, 64)
    rewrite(
        tmp_path, lambda t: (t.pop("lm_head.weight"), t.update({f"lm_head.{s}": v for s, v in written.tensors.items()}))
    )
    packed = load(tmp_path).lm_head.packed.packed.weight
    assert torch.equal(weight_format("int4").dequantize(packed), written.dense)


def test_biases_of_zeros_mean_nothing(tmp_path: Path) -> None:
    """Writers of quantized linears add them where the model has none; any other value belongs to another model."""
    write(tmp_path, "gptq")
    bias = "model.layers.0.mlp.down_proj.bias"
    rewrite(tmp_path, lambda t: t.update({bias: torch.zeros(64)}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({bias: torch.ones(64)}))
    assert "layers.0.mlp.down_proj.bias" in refusal(tmp_path)


@pytest.mark.parametrize("case", sorted(set(CASES) - ACT_ORDER))
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_the_planned_size_is_the_real_one(case: str, config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, case, config)
    decoder = load(tmp_path)
    planned = weight_bytes(load_config(tmp_path), torch.float32)
    assert planned == pytest.approx(bytes_of(decoder), rel=0.02)  # scales may be wider than planned for


def bytes_of(decoder: Decoder) -> int:
    """Of all weights that a decoder of reference kernels holds, norms left out."""
    total = decoder.embedding.nbytes + decoder.lm_head.packed.weight.nbytes
    for block, _ in decoder.blocks:
        for name in ("qkv", "o", "gate_up", "down", "router"):
            if hasattr(block, name):
                total += getattr(block, name).packed.weight.nbytes
        if hasattr(block, "experts"):
            total += block.experts.packed.gate_up.nbytes + block.experts.packed.down.nbytes
    return total


# Values that no weight has.

Q = "model.layers.0.self_attn.q_proj."
SCALE = {"gptq": "scales", "awq": "scales", "fp8": "weight_scale", "fp8-blocks": "weight_scale_inv"} | dict.fromkeys(
    ("pack-quantized", "int-quantized", "float-quantized"), "weight_scale"
)


@pytest.mark.parametrize("case", SCALE)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_none_is_refused(case: str, value: float, tmp_path: Path) -> None:
    write(tmp_path, case)
    name = Q + SCALE[case]
    rewrite(tmp_path, lambda t: t[name].view(-1)[-1:].fill_(value))
    message = refusal(tmp_path)
    assert "layers.0.self_attn.q_proj." in message
    assert "positive and finite" in message


@pytest.mark.parametrize("case", SCALE)
def test_a_scale_that_is_missing_or_misshapen_is_named(case: str, tmp_path: Path) -> None:
    write(tmp_path, case)
    name = Q + SCALE[case]
    rewrite(tmp_path, lambda t: t.update({name: torch.ones(3, 5)}))
    message = refusal(tmp_path)
    assert name in message
    assert "[3, 5]" in message
    rewrite(tmp_path, lambda t: t.pop(name))
    assert f"{name.removeprefix('model.')} [" in refusal(tmp_path)


@pytest.mark.parametrize("case", ["int-quantized-static", "float-quantized-static", "fp8-static", "modelopt"])
def test_a_static_scale_of_activations_is_checked(case: str, tmp_path: Path) -> None:
    write(tmp_path, case)
    rewrite(tmp_path, lambda t: t[Q + "input_scale"].fill_(0))
    assert "input_scale" in refusal(tmp_path)
    rewrite(tmp_path, lambda t: t.pop(Q + "input_scale"))
    assert "q_proj.input_scale" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("case", "suffix"),
    [("gptq", "qweight"), ("gptq", "qzeros"), ("awq", "qzeros"), ("pack-quantized-asymmetric", "weight_zero_point")],
)
def test_a_tensor_of_a_linear_that_is_missing_is_named(case: str, suffix: str, tmp_path: Path) -> None:
    write(tmp_path, case)
    rewrite(tmp_path, lambda t: t.pop(Q + suffix))
    assert f"q_proj.{suffix} [" in refusal(tmp_path)


def test_another_dtype_is_named(tmp_path: Path) -> None:
    write(tmp_path, "fp8")
    rewrite(tmp_path, lambda t: t.update({Q + "weight": t[Q + "weight"].float()}))
    message = refusal(tmp_path)
    assert "F32" in message
    assert "F8_E4M3" in message


@pytest.mark.parametrize(("at", "value", "said"), [(0, -1, "-1"), (5, 2, "0 to 1"), (0, 1, "33 inputs")])
def test_groups_that_do_not_exist_are_refused(at: int, value: int, said: str, tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    rewrite(tmp_path, lambda t: t[Q + "g_idx"][at].fill_(value))
    message = refusal(tmp_path)
    assert "q_proj.g_idx" in message
    assert said in message or "31 inputs" in message


def test_eight_bits_with_zero_points_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq-8")
    rewrite(tmp_path, lambda t: t[Q + "qzeros"].fill_(0))
    message = refusal(tmp_path)
    assert "zero points" in message
    assert "four bits" in message


def test_a_shape_that_contradicts_config_json_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "pack-quantized")
    rewrite(tmp_path, lambda t: t[Q + "weight_shape"].fill_(7))
    assert "[7, 7]" in refusal(tmp_path)


def test_zero_points_of_a_symmetric_format_must_be_zero(tmp_path: Path) -> None:
    write(tmp_path, "int-quantized")
    rewrite(tmp_path, lambda t: t.update({Q + "weight_zero_point": torch.zeros(64, 1, dtype=torch.int8)}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t[Q + "weight_zero_point"].fill_(1))
    assert "weight_zero_point" in refusal(tmp_path)


def test_groups_that_divide_no_inputs_are_refused(tmp_path: Path) -> None:
    """160 inputs of the last matrix in groups of 64."""
    CASES["wide"] = (GPTQ | {"group_size": 64}, lambda g, n, k: gptq(g, n, k, group=64 if k == 64 else 32))
    try:
        write(tmp_path, "wide")
    finally:
        del CASES["wide"]
    message = refusal(tmp_path)
    assert "layers.0.mlp.down_proj.weight [64, 160]" in message
    assert "take a group of 32" in message


def test_surplus_tensors_of_a_quantized_model_are_named(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    rewrite(tmp_path, lambda t: t.update({Q + "workspace": torch.zeros(3)}))
    assert "q_proj.workspace" in refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "awq")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "not a whole safetensors file" in refusal(tmp_path)


def test_the_file_may_go_away_after_loading(tmp_path: Path) -> None:
    write(tmp_path, "fp8-blocks")
    decoder = load(tmp_path)
    before = greedy(decoder)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert greedy(decoder) == before


# Scales of keys and values.


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (("k_scale", "v_scale"), ()),
        (("k_scale", "v_scale"), (1,)),
        (("k_scale", "v_scale"), (2,)),
        (("k_proj.k_scale", "v_proj.v_scale"), ()),
    ],
)
def test_scales_of_keys_and_values_are_one_per_head(
    names: tuple[str, str], shape: tuple[int, ...], tmp_path: Path
) -> None:
    write(tmp_path, "float-quantized")
    config = load_config(tmp_path)
    assert load_kv_scales(tmp_path, config, CPU) is None
    for i, name in enumerate(names):
        made = {f"model.layers.{n}.self_attn.{name}": torch.full(shape, 0.5 + n + i) for n in range(2)}
        rewrite(tmp_path, lambda t, made=made: t.update(made))
    scales = load_kv_scales(tmp_path, config, CPU)
    assert [[s.tolist() for s in pair] for pair in scales] == [[[0.5] * 2, [1.5] * 2], [[1.5] * 2, [2.5] * 2]]
    load(tmp_path)  # they are no surplus


def test_wrong_scales_of_keys_and_values_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "fp8")
    config = load_config(tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"model.layers.0.self_attn.{n}_scale": torch.ones(1) for n in "kv"}))
    name = "model.layers.1.self_attn.k_scale"
    for value, said in ((torch.zeros(1), "positive"), (torch.ones(3), r"\[3\]"), (torch.ones(1), "v_scale")):
        rewrite(tmp_path, lambda t, value=value: t.update({name: value}))
        with pytest.raises(EngineStartError, match=said):
            load_kv_scales(tmp_path, config, CPU)


def test_promised_scales_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, "float-quantized")
    quantization = CASES["float-quantized"][0] | {
        "kv_cache_scheme": {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    config = load_config(tmp_path)
    assert config.quantization.kv_format == "fp8_e4m3"
    with pytest.raises(EngineStartError, match=r"layers\.0\.self_attn\.k_scale"):
        load_kv_scales(tmp_path, config, CPU)


# Anything at all.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(["gptq-act-order", "awq", "pack-quantized-asymmetric", "fp8-blocks"]), data=st.data())
def test_a_changed_byte_in_the_header_loads_or_is_refused(case: str, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / case
    if not folder.exists():
        write(folder, case, LLAMA | {"num_hidden_layers": 1})
        (folder / "model.safetensors").rename(folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content)
    with suppress(EngineStartError):  # any other exception fails the test
        load(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats(allow_nan=False)
    | st.sampled_from(["Linear", "re:(", ""]),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.sampled_from(["weights", "a"]), children),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(sorted(CASES)), data=st.data())
def test_a_changed_setting_is_read_or_refused(case: str, data: st.DataObject, tmp_path: Path) -> None:
    quantization = json.loads(json.dumps(CASES[case][0]))
    at = quantization
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    with suppress(EngineStartError):
        weight_bytes(load_config(tmp_path), torch.bfloat16)


# Slices for drafts.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("family", "layout"), [(LLAMA, -1), (PHI3, 0)], ids=["llama", "phi3"])
def test_a_nested_draft_is_the_first_units_of_what_was_written(
    case: str, family: dict[str, Any], layout: int, tmp_path: Path
) -> None:
    linears = write(tmp_path, case, family, layout)
    decoder = load(tmp_path)
    kernels = resolve(Target("cpu", torch.float32, decoder.config.head_dim, "fp32"), dict.fromkeys(ops(), "reference"))
    if case in ACT_ORDER:
        with pytest.raises(
            EngineStartError, match=r"layers\.0\.mlp\.down_proj\.weight: .*\(act-order\).*draft with layers"
        ):
            nested_decoder(decoder, tmp_path, kernels, 32)
        return
    ffn = nested_decoder(decoder, tmp_path, kernels, 32).blocks[3][0]
    names = ["gate_up"] if layout == 0 else ["gate", "up"]
    joined = torch.cat([linears[f"layers.1.mlp.{name}_proj.weight"].dense for name in names])
    wide = {"gate_up": joined.view(2, 160, 64)[:, :32].flatten(0, 1)}
    wide["down"] = linears["layers.1.mlp.down_proj.weight"].dense[:, :32]
    for name, dense in wide.items():
        packed: PackedWeight = getattr(ffn, name).packed.weight
        assert (packed.outputs, packed.inputs) == dense.shape
        assert torch.equal(weight_format(packed.format).dequantize(packed), dense)


@pytest.mark.parametrize("case", sorted(EXACT - ACT_ORDER))
def test_a_nested_draft_answers_as_that_of_the_dense_model(case: str, tmp_path: Path) -> None:
    """By the kernels that serve; one matrix of the pair that is joined stays floats where the format tells them."""
    write(tmp_path, case, kept=() if case == "int-quantized-weights" else ("layers.1.mlp.up_proj",))
    found = []
    for folder in (tmp_path, tmp_path / "dense"):
        config = load_config(folder)
        kernels = resolve(Target("cpu", torch.float32, config.head_dim, "fp32"))
        decoder = load_decoder(folder, config, kernels, torch.float32, CPU)
        found.append(logits_of(nested_decoder(decoder, folder, kernels, 32), [3, 1, 4, 1, 5]))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    assert (found[0] - logits_of(decoder, [3, 1, 4, 1, 5])).abs().max() > 0.01


def test_a_width_that_ends_within_a_group_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq", LLAMA | {"matformer_widths": [160, 48]})
    decoder = load(tmp_path)
    kernels = resolve(Target("cpu", torch.float32, decoder.config.head_dim, "fp32"))
    with pytest.raises(EngineStartError, match="its first 48 inputs end in the middle of a group of 32; choose"):
        nested_decoder(decoder, tmp_path, kernels, 48)
