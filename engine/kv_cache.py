"""The paged cache's memory: how much a block takes, and the tensors of all layers."""

from __future__ import annotations

import torch

from ..kernels.batch import KVSpec, LayerKV, allocate_layer
from .model_config import DecoderConfig

FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def kv_spec(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> KVSpec:
    """One layer's cache, in the model's own number format."""
    return KVSpec(block_size, config.num_kv_heads, config.head_dim, FORMAT[dtype])


def block_bytes(spec: KVSpec, num_layers: int) -> int:
    """Bytes of one block: keys and values of block_size tokens in every layer, with their scales."""
    return num_layers * spec.block_bytes


def allocate(spec: KVSpec, num_layers: int, num_blocks: int, device: torch.device) -> list[LayerKV]:
    """Empty caches, one per layer."""
    return [allocate_layer(spec, num_blocks, device) for _ in range(num_layers)]
