"""The paged cache's memory: how much a block takes, and the tensors of all layers."""

from __future__ import annotations

import torch

from ..kernels.batch import KVSpec, LayerKV
from .model_config import DecoderConfig

FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def kv_spec(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> KVSpec:
    """One layer's cache, in the model's own number format."""
    return KVSpec(block_size, config.num_kv_heads, config.head_dim, FORMAT[dtype])


def block_bytes(spec: KVSpec, num_layers: int) -> int:
    """Bytes of one block: keys and values of block_size tokens in every layer."""
    return 2 * num_layers * spec.block_size * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize


def allocate(spec: KVSpec, num_layers: int, num_blocks: int, device: torch.device) -> list[LayerKV]:
    """Empty caches, one per layer. Zeroed pages are mapped on first use, so unused blocks cost no memory on the CPU."""
    shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
    return [
        LayerKV(spec, *(torch.zeros(shape, dtype=spec.dtype, device=device) for _ in range(2)))
        for _ in range(num_layers)
    ]
