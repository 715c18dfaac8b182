"""Writing a quantized checkpoint: the model's folder again, its linears as compressed-tensors' pack-quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.packed import PackedWeight
from ...kernels.reference.int4 import unpack_int4
from ..config_fields import read_json
from ..weights import Checkpoint

# What a folder has beside its weights: configuration, tokenizer, chat template. Nothing that could be code.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")
LEFT_OUT = {"config.json", "model.safetensors.index.json"}
PER_WORD = 8  # codes of four bits in an int32


def write_quantized(
    source: Path, target: Path, checkpoint: Checkpoint, quantized: Mapping[str, PackedWeight], group: int
) -> None:
    """quantized: the float tensor's name (without a leading `model.`) -> what takes its place. All else is copied.

    `target` appears whole or not at all: it is written beside its place and renamed.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in LEFT_OUT:
                shutil.copy(path, unfinished / path.name)
    tensors: dict[str, Tensor] = {}
    for name, stored in checkpoint.items():
        if name in quantized:
            tensors |= _packed(stored.removesuffix("weight"), quantized[name])
        else:
            tensors[stored] = checkpoint.tensor(name).contiguous()
    weights = unfinished / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # as the others are: who serves may be another user
    config = read_json(source / "config.json") | {"quantization_config": _description(group)}
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(target)


def _packed(stem: str, weight: PackedWeight) -> dict[str, Tensor]:
    if weight.zeros is None:
        raise ValueError("weights are written with their zero points")
    return {
        f"{stem}weight_packed": words(unpack_int4(weight.codes, weight.group)),
        f"{stem}weight_scale": weight.scales.T.contiguous().cpu(),
        f"{stem}weight_zero_point": words(weight.zeros).T.contiguous(),
        f"{stem}weight_shape": torch.tensor([weight.outputs, weight.inputs]),
    }


def words(codes: Tensor) -> Tensor:
    """codes [R, C] in 0 .. 15 -> [R, ceil(C / 8)] int32, the first in the lowest bits."""
    codes = torch.nn.functional.pad(codes.cpu().to(torch.int64), (0, -codes.shape[1] % PER_WORD))
    shifts = 4 * torch.arange(PER_WORD)
    total = (codes.unflatten(1, (-1, PER_WORD)) << shifts).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def _description(group: int) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
