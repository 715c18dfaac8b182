"""The paged cache's memory: in which format keys and values lie, how much a block takes, the tensors of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.batch import KVSpec, LayerKV, allocate_layer
from ..kernels.kv_formats import kv_format, kv_formats
from .errors import EngineStartError
from .model_config import DecoderConfig

FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# What people type for a format's own name.
SHORT_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "fp8": "fp8_e4m3",
    "int8": "int8_per_token_head",
    "int4": "int4_per_token_head",
}


def choose_kv_format(wish: str, model: DecoderConfig, dtype: torch.dtype) -> tuple[str, str]:
    """The format of the cache, and where the choice came from.

    "auto" is what the checkpoint was made for, else the model's own number format. EngineStartError for an unknown wish
    and for heads that the format cannot hold.
    """
    made_for = model.quantization.kv_format if model.quantization else None
    if wish == "auto":
        name, reason = (
            (made_for, "the checkpoint was made for it") if made_for else (FORMAT[dtype], "the model's dtype")
        )
    elif (name := SHORT_NAMES.get(wish, wish)) in kv_formats():
        reason = "given"
    else:
        names = dict.fromkeys((*SHORT_NAMES, *kv_formats()))
        raise EngineStartError(f"kv_cache_dtype is {wish!r}; choose auto, {', '.join(names)}")
    why = kv_format(name).refuses(model.head_dim)
    if why is not None:
        raise EngineStartError(f"kv_cache_dtype is {wish!r}: {why}")
    return name, reason


def kv_spec(config: DecoderConfig, block_size: int, name: str) -> KVSpec:
    """One layer's cache, in a format by its name."""
    return KVSpec(block_size, config.num_kv_heads, config.head_dim, name)


def block_bytes(spec: KVSpec, num_layers: int) -> int:
    """Bytes of one block: keys and values of block_size tokens in every layer, with their scales."""
    return num_layers * spec.block_bytes


def allocate(
    spec: KVSpec,
    num_layers: int,
    num_blocks: int,
    device: torch.device,
    scales: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[LayerKV]:
    """Empty caches, one per layer. scales: the checkpoint's, for formats whose scales are fixed; None = 1."""
    layers = [allocate_layer(spec, num_blocks, device) for _ in range(num_layers)]
    if scales is not None and spec.coding.scale == "static":
        for layer, (k_scale, v_scale) in zip(layers, scales, strict=True):
            layer.k_scale, layer.v_scale = k_scale, v_scale
    return layers
