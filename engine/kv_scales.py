"""A checkpoint's fixed scales of keys and values: what eight-bit caches are divided by, found by calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .errors import EngineStartError
from .model_config import DecoderConfig
from .quant.scheme import SCALES, Entry, check_scales
from .weights import Checkpoint


def kv_scale_names(layer: int) -> tuple[tuple[str, str], ...]:
    """Where checkpoints keep those of keys and of values: compressed-tensors, ModelOpt."""
    prefix = f"layers.{layer}.self_attn."
    return (f"{prefix}k_scale", f"{prefix}v_scale"), (f"{prefix}k_proj.k_scale", f"{prefix}v_proj.v_scale")


def all_kv_scale_names(config: DecoderConfig) -> Iterator[str]:
    """Every such name, that of queries included, which no kernel here wants in eight bits."""
    for layer in range(config.num_layers):
        yield f"layers.{layer}.self_attn.q_scale"
        for names in kv_scale_names(layer):
            yield from names


def load_kv_scales(
    path: Path, config: DecoderConfig, device: torch.device, heads: slice = slice(None)
) -> list[tuple[Tensor, Tensor]] | None:
    """Per layer the scales of keys and values, [Hk] fp32 each; None where the checkpoint has none.

    heads: of keys and values, those that are wanted.

    Raises EngineStartError for scales that are incomplete or wrong, and for none where config.json promises some.
    """
    promised = config.quantization is not None and config.quantization.kv_format is not None
    with Checkpoint(path, config.quantization) as checkpoint:
        pairs = [_present(checkpoint, layer) for layer in range(config.num_layers)]
        if not promised and not any(pairs):
            return None
        scales = []
        for layer, pair in enumerate(pairs):
            k, v = (
                _read(checkpoint, name, config.num_kv_heads)[heads].to(device)
                for name in pair or kv_scale_names(layer)[0]
            )
            scales.append((k, v))
        return scales


def _present(checkpoint: Checkpoint, layer: int) -> tuple[str, str] | None:
    return next((names for names in kv_scale_names(layer) if any(name in checkpoint for name in names)), None)


def _read(checkpoint: Checkpoint, name: str, heads: int) -> Tensor:
    checkpoint.check_entry(name, Entry("", ((), (1,), (heads,)), SCALES))
    scale = checkpoint.tensor(name).float()
    try:
        check_scales(name, scale)
    except ValueError as error:
        raise EngineStartError(f"{checkpoint.folder}: tensor {error}") from None
    return scale.reshape(-1).expand(heads).contiguous()
