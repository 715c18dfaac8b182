"""Quantizing a model on a text, block after block: `quire quantize`.

    text ─ windows ─▶ embedding ─▶ block 1 ─▶ block 2 ─▶ …
                                     │ moments of each linear's inputs
                                     ▼
                             round_with_feedback ─▶ the block runs again, quantized ─▶ the next block's inputs

Each block is calibrated on what the quantized blocks before it give, so that it makes up for their errors too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import Kernels, Target, resolve
from ...kernels.batch import RaggedBatch, allocate_layer
from ...kernels.packed import PackedWeight
from ...kernels.reference.int4 import dequantize_int4
from ..decoder import Decoder
from ..errors import EngineStartError
from ..families import load_config
from ..kv_cache import kv_spec
from ..layout import FeedForwardWeights, Weight, iter_weights, model_weights
from ..linear import Linear, Rows, make_linear
from ..loader import load_decoder
from ..model_config import DecoderConfig
from ..weights import Checkpoint
from .export import write_quantized
from .feedback import round_with_feedback
from .scheme import Packing

log = logging.getLogger(__name__)

BLOCK_SIZE = 32

Progress = Callable[[int, int], None]


class Recorder(Linear):
    """A linear that sums up x xᵀ over the inputs it is given: `moments` [K, K] fp32."""

    __slots__ = ("moments",)

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.run, linear.packed, linear.rows)
        self.moments: Tensor | float = 0.0

    def __call__(self, x: Rows) -> Tensor:
        if isinstance(x, Tensor):
            wide = x.float()
            self.moments = self.moments + wide.T @ wide
        return super().__call__(x)


def quantize_model(
    source: Path,
    target: Path,
    windows: Sequence[Sequence[int]],
    group: int,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the model in `source`, the linears of its layers in four bits, to the new folder `target`.

    windows: token ids of the calibration text, each at most the model's context.
    progress: told of (blocks that are done, of how many).
    What is written is a compressed-tensors checkpoint. Raises EngineStartError for a model that is quantized already
    or has experts, for inputs that no group divides, and where `target` exists.
    """
    config = load_config(source)
    _check(source, target, config, group)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = resolve(Target(device.type, torch.float32, config.head_dim, "fp32"))
    decoder = load_decoder(source, config, kernels, torch.float32, device)
    with Checkpoint(source) as checkpoint, torch.inference_mode():
        quantized = dict(_quantize_layers(config, kernels, decoder, checkpoint, windows, group, progress))
        write_quantized(source, target, checkpoint, quantized, group)


def _check(source: Path, target: Path, config: DecoderConfig, group: int) -> None:
    if config.quantization is not None:
        raise EngineStartError(f"{source} is quantized already ({config.quantization.method}); give its float model")
    if config.moe is not None:
        raise EngineStartError(f"{source} has experts, which cannot be calibrated; serve it with --quantization int4")
    if target.exists():
        raise EngineStartError(f"{target} exists; give a folder that is still to be made")
    packing = Packing("int4", group)
    for layer in model_weights(config).layers:
        for weight in iter_weights((layer.attention, layer.ffn)):
            for part in weight.layouts[-1] if weight.linear else ():
                why = packing.refuses(*part.shape)
                if why is not None:
                    raise EngineStartError(f"tensor {part.name} {list(part.shape)} cannot be packed: {why}")


def _quantize_layers(
    config: DecoderConfig,
    kernels: Kernels,
    decoder: Decoder,
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    group: int,
    progress: Progress,
) -> Iterator[tuple[str, PackedWeight]]:
    """(the float tensor's name, what it becomes), for every linear of every layer."""
    device = decoder.embedding.device
    spec = kv_spec(config, BLOCK_SIZE, "fp32")
    blocks = -(-max(map(len, windows)) // BLOCK_SIZE) + 1
    cache = [allocate_layer(spec, blocks, device) for _ in range(config.num_layers)]
    batches = [one_prompt(window, device) for window in windows]
    samples = [(decoder.step(batch, cache), *decoder.enter(batch.input_ids)) for batch in batches]
    for done, ((block, join), (linears, weights)) in enumerate(zip(decoder.blocks, _linears(config), strict=True)):
        progress(done, len(decoder.blocks))
        recorders = [Recorder(getattr(block, name)) for name in linears]
        for name, recorder in zip(linears, recorders, strict=True):
            setattr(block, name, recorder)
        for step, x, _ in samples:
            block(x, step)
        for name, recorder, (weight, bias) in zip(linears, recorders, weights, strict=True):
            values = checkpoint.read(weight, torch.float32, device)
            packed = round_with_feedback(values, torch.as_tensor(recorder.moments), group)
            offset = None if bias is None else checkpoint.read(bias, torch.float32, device)
            setattr(block, name, make_linear(kernels, dequantize_int4(packed), offset))
            yield from _parts(checkpoint, weight, packed)
        samples = [(step, *join(block(x, step), residual)) for step, x, residual in samples]
        log.info("quantized %s", weights[0][0].layouts[-1][0].name.rpartition(".")[0])


def _linears(config: DecoderConfig) -> Iterator[tuple[tuple[str, ...], list[tuple[Weight, Weight | None]]]]:
    """Of every block of the decoder: the attributes that are linears, and their weights and biases."""
    for layer in model_weights(config).layers:
        a, f = layer.attention, layer.ffn
        yield ("qkv", "o"), [(a.qkv, a.qkv_bias), (a.o, a.o_bias)]
        if isinstance(f, FeedForwardWeights):
            yield ("gate_up", "down"), [(f.gate_up, f.gate_up_bias), (f.down, f.down_bias)]


def _parts(checkpoint: Checkpoint, weight: Weight, packed: PackedWeight) -> Iterator[tuple[str, PackedWeight]]:
    """A joined weight as the checkpoint's own parts of it."""
    first = 0
    for part, _ in checkpoint.sources(weight):
        rows = slice(first, first + part.shape[0])
        zeros = packed.zeros
        yield (
            part.name,
            replace(
                packed,
                outputs=part.shape[0],
                codes=packed.codes[:, rows],
                scales=packed.scales[:, rows],
                zeros=None if zeros is None else zeros[:, rows],
            ),
        )
        first = rows.stop


def one_prompt(ids: Sequence[int], device: torch.device) -> RaggedBatch:
    """A sequence by itself, in the blocks of BLOCK_SIZE from 1 on, with the logits of all its rows."""
    count = len(ids)
    positions = torch.arange(count, device=device)
    return RaggedBatch(
        input_ids=torch.tensor(ids, device=device),
        positions=positions,
        slot_mapping=positions + BLOCK_SIZE,
        cu_q=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([count], dtype=torch.int32, device=device),
        block_table=torch.arange(1, -(-count // BLOCK_SIZE) + 1, dtype=torch.int32, device=device)[None],
        tree_mask=None,
        logit_rows=positions,
        max_q=count,
        max_seq_len=count,
    )
