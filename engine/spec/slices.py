"""Models inside the target that guess for it: they share its cache, its attention and its logits.

nested   y = W_out[:, :m] · act(W_in[:m] · x): the first m hidden units of every feed-forward. Exact for checkpoints
         that were trained so (MatFormer, Devvrit et al. 2023, arXiv 2310.07707), which list their widths
layers   some of the layers, their residuals joined as if there were no others: for any checkpoint
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import Kernels
from ...kernels.packed import PackedWeight, first_inputs, select_rows
from ..decoder import Block, Decoder, FeedForward
from ..errors import EngineStartError
from ..layout import FeedForwardWeights, MoeWeights, model_weights
from ..loader import make_norms
from ..model_config import DecoderConfig
from ..quant.scheme import Packing
from ..reader import Reader
from ..weights import Checkpoint

# Of units, where the checkpoint does not name its widths: what every kernel takes without a remainder.
ALIGNMENT = 32


def check_width(config: DecoderConfig, width: int, rounding: Packing | None = None) -> None:
    """Raises EngineStartError where the first `width` units are no slice of the feed-forwards, with the rule.

    rounding: what float matrices become; None = they stay.
    """
    asked = f"a nested draft of width {width}"
    if config.moe is not None:
        raise EngineStartError(f"{asked} cannot be cut out of a mixture of experts; draft with layers or another model")
    if config.nested_widths and width not in config.nested_widths:
        widths = ", ".join(map(str, config.nested_widths))
        raise EngineStartError(f"{asked} was not trained: the checkpoint's matformer_widths are {widths}; choose one")
    if not config.nested_widths and (width < 1 or config.ffn % width or width % ALIGNMENT):
        raise EngineStartError(
            f"{asked} is no slice of feed-forwards of {config.ffn} units; give a divisor of {config.ffn} that is "
            f"a multiple of {ALIGNMENT}"
        )
    if rounding is not None:
        why = rounding.refuses(width, config.hidden) or rounding.refuses(config.hidden, width)
        if why is not None:
            raise EngineStartError(f"{asked} cannot be rounded to {rounding.format}: {why}")


def check_layers(config: DecoderConfig, layers: Sequence[int]) -> None:
    """Raises EngineStartError for what are not some layers of the target."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= config.num_layers:
        raise EngineStartError(
            f"a draft of the layers {list(layers)} is none of this model: give at least one of 0 to "
            f"{config.num_layers - 1}, in ascending order"
        )


def nested_decoder(
    target: Decoder, folder: Path, kernels: Kernels, width: int, *, rounding: Packing | None = None
) -> Decoder:
    """The target with feed-forwards of their first `width` units, which are read from its folder again.

    rounding: as the target was loaded. Raises EngineStartError (see `check_width`).
    """
    config = target.config
    check_width(config, width, rounding)
    blocks = []
    with Checkpoint(folder, config.quantization) as checkpoint:
        reader = _reader(target, checkpoint, kernels, rounding)
        for i, layer in enumerate(model_weights(config).layers):
            if isinstance(layer.ffn, MoeWeights):
                raise EngineStartError(f"layer {i} is a mixture of experts")
            attention, feed_forward = target.blocks[2 * i : 2 * i + 2]
            blocks += [attention, (_narrow(config, kernels, reader, layer.ffn, width), feed_forward[1])]
    return Decoder(
        dataclasses.replace(config, ffn=width),
        kernels,
        target.embedding,
        target.embed,
        target.first_norm,
        blocks,
        target.lm_head,
        target.windows,
    )


def layers_decoder(target: Decoder, folder: Path, kernels: Kernels, layers: Sequence[int]) -> Decoder:
    """These layers of the target, whose keys and values lie where they always do.

    Raises EngineStartError (see `check_layers`).
    """
    config = target.config
    check_layers(config, layers)
    weights = model_weights(config)
    kept: list[Block] = [block for i in layers for block, _ in target.blocks[2 * i : 2 * i + 2]]
    with Checkpoint(folder, config.quantization) as checkpoint:
        first, joins = make_norms(
            config,
            kernels,
            _reader(target, checkpoint, kernels, None),
            [weights.layers[i] for i in layers],
            weights.norm,
            [block.rows for block in kept],
        )
    blocks = list(zip(kept, joins, strict=True))
    return Decoder(config, kernels, target.embedding, target.embed, first, blocks, target.lm_head, target.windows)


def _reader(target: Decoder, checkpoint: Checkpoint, kernels: Kernels, rounding: Packing | None) -> Reader:
    return Reader(checkpoint, kernels, target.embedding.dtype, target.embedding.device, rounding)


def _narrow(
    config: DecoderConfig, kernels: Kernels, reader: Reader, weights: FeedForwardWeights, width: int
) -> FeedForward:
    def units(rows: Tensor | PackedWeight, first: int) -> Tensor | PackedWeight:
        """Of the joined gate and up, and of their bias."""
        packed = isinstance(rows, PackedWeight)
        index = torch.arange(rows.outputs if packed else len(rows), device=reader.device)
        kept = index[(first + index) % config.ffn < width]
        return select_rows(rows, kept) if packed else rows[kept]

    def inputs(rows: Tensor | PackedWeight, first: int) -> Tensor | PackedWeight:
        if isinstance(rows, Tensor):
            return rows[:, :width].contiguous()
        try:
            return first_inputs(rows, width)
        except ValueError as error:
            name = weights.down.layouts[-1][0].name
            raise EngineStartError(
                f"a nested draft of width {width} cannot be cut out of the quantized {name}: {error}; choose another "
                "width, give the unquantized model (--quantization rounds it while it is loaded), or draft with layers"
            ) from None

    bias = reader.optional(weights.gate_up_bias)
    return FeedForward(
        config,
        kernels,
        gate_up=reader.linear(weights.gate_up, None if bias is None else units(bias, 0), units),
        down=reader.linear(weights.down, reader.optional(weights.down_bias), inputs),
    )
