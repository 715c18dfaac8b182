"""Which part of a model each of N ranks holds, and whether it can be cut so at all.

    attention      query heads in N equal runs, each with the key and value heads that it reads: these are split too, or
                   held by several ranks where there are fewer than ranks
    feed-forward   hidden units in N runs, cut between what the formats of its weights pack together; experts alike
    vocabulary     rows of the embedding and of the logits' matrix in N runs

Everything else (norms, routers, gates) is held by all. After Shoeybi et al. 2019, arXiv 1909.08053.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..kernels.packed import weight_format
from ..kernels.reference.fp8 import BLOCK
from .errors import EngineStartError
from .layout import Cut, MoeWeights, Part, Span, Spans, iter_weights, model_weights
from .model_config import DecoderConfig
from .quant.scheme import Packing

MAX_RANKS = 64
WHOLE_ROWS = ("w8a8", "fp8")  # formats whose activations have one scale per row
ANY_CUT = Spans((0, 1), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1))  # to see which weights are cut, and where


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds. config: the model as it is there, with its own number of heads."""

    config: DecoderConfig
    spans: Spans


def share_of(model: DecoderConfig, rank: int, size: int, rounding: Packing | None = None) -> Share:
    """Of rank `rank` of `size`; the first ranks have the most.

    rounding: what floats become while they are loaded. Raises EngineStartError for a size that the model cannot have.
    """
    _check_heads(model, size)
    head, moe = model.head_dim, model.moe
    queries = model.num_heads // size
    kv_heads = max(1, model.num_kv_heads // size)
    first_kv = rank * queries * model.num_kv_heads // model.num_heads
    units, words = _steps(model, rounding) if size > 1 else (1, 1)
    spans = Spans(
        q=(rank * queries * head, (rank + 1) * queries * head),
        kv=(first_kv * head, (first_kv + kv_heads) * head),
        ffn=_run("feed-forward of", model.ffn, rank, size, units),
        expert=_run("expert of", moe.ffn, rank, size, units) if moe else (0, 0),
        shared=_run("shared expert of", moe.shared_ffn, rank, size, units) if moe and moe.shared_ffn else (0, 0),
        vocab=_run("vocabulary of", model.vocab_size, rank, size, words),
        adds_biases=rank == 0,
    )
    if size > 1:
        _check_parts(model, spans, size, rounding)
    return Share(replace(model, num_heads=queries, num_kv_heads=kv_heads), spans)


def sizes_that_fit(num_heads: int, num_kv_heads: int) -> list[int]:
    """How many ranks can share so many heads."""
    return [
        size
        for size in range(1, min(num_heads, MAX_RANKS) + 1)
        if num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]


def runs(total: int, size: int, step: int = 1) -> list[Span]:
    """0 .. total in `size` runs, as even as can be, that end at multiples of `step`, the longer ones first."""
    steps = -(-total // step)
    ends = [-(-steps * i // size) * step for i in range(size + 1)]
    return [(first, min(last, total)) for first, last in itertools.pairwise(ends)]


def _run(what: str, total: int, rank: int, size: int, step: int) -> Span:
    if -(-total // step) < size:
        raise EngineStartError(
            f"tensor_parallel_size is {size}, but a {what} {total} in steps of {step} has {-(-total // step)} parts; "
            f"give at most {-(-total // step)}"
        )
    return runs(total, size, step)[rank]


def _check_heads(model: DecoderConfig, size: int) -> None:
    fitting = sizes_that_fit(model.num_heads, model.num_kv_heads)
    if size not in fitting:
        raise EngineStartError(
            f"tensor_parallel_size is {size}, but the model has {model.num_heads} heads of attention over "
            f"{model.num_kv_heads} of keys and values; choose {', '.join(map(str, fitting))}"
        )


def _steps(model: DecoderConfig, rounding: Packing | None) -> tuple[int, int]:
    """What hidden units, and what rows of the vocabulary, are cut in multiples of: over all layers."""
    weights = model_weights(model, ANY_CUT)
    units = [_step(model, *one, rounding) for layer in weights.layers for one in _cut_linears(layer.ffn)]
    head = () if weights.lm_head is None else _cut_linears((weights.lm_head,))
    return math.lcm(1, *units), math.lcm(1, *(_step(model, *one, None) for one in head))


def _cut_linears(tree: tuple[object, ...]) -> Iterator[tuple[Part, Cut]]:
    for weight in iter_weights(tree):
        if weight.linear:
            yield from ((part, part.cut) for part in weight.layouts[-1] if part.cut is not None)


def _step(model: DecoderConfig, part: Part, cut: Cut, rounding: Packing | None) -> int:
    """Outputs, or inputs, of a linear that its format keeps together."""
    inputs = cut.dim == len(part.shape) - 1
    storage = model.quantization.storage(part.linear) if model.quantization else None
    if storage is not None:  # in an order of their own, inputs are cut in that order, and not in groups of neighbours
        return 1 if inputs and storage.packing.ordered else storage.step(*part.shape[-2:], int(inputs))
    if rounding is None:
        return 1
    if not inputs:
        return BLOCK if rounding.format == "fp8_block" else 1
    return rounding.group or max(1, weight_format(rounding.format).interleaved(part.shape[-1]))


def _check_parts(model: DecoderConfig, spans: Spans, size: int, rounding: Packing | None) -> None:
    """Raises EngineStartError for a weight that would be cut where its format has no seam."""
    weights = model_weights(model, spans)
    for layer in weights.layers:
        for part, cut in _cut_linears((layer.attention, layer.ffn)):
            _check_part(model, part, cut, size, rounding)
        if isinstance(layer.ffn, MoeWeights):
            for part, _ in _cut_linears((layer.ffn.down,)):
                _check_rows(model, part, size, rounding)


def _check_part(model: DecoderConfig, part: Part, cut: Cut, size: int, rounding: Packing | None) -> None:
    step, total = _step(model, part, cut, rounding), part.shape[cut.dim]
    torn = next((end for span in cut.spans for end in span if end % step and end != total), None)
    refused = f"tensor_parallel_size is {size}, but {part.name} {list(part.shape)}"
    if torn is not None:
        raise EngineStartError(
            f"{refused} would be cut at {torn}, and its format keeps {step} together; give a smaller one, or take "
            "another quantization of the model"
        )
    storage = model.quantization.storage(part.linear) if model.quantization else None
    judge = storage or rounding
    ordered = storage is not None and storage.packing.ordered and cut.dim == len(part.shape) - 1
    why = None if judge is None or ordered else judge.refuses(*part.held[-2:])
    if why is not None:
        raise EngineStartError(f"{refused} cannot be cut into {list(part.held)}: {why}")


def _check_rows(model: DecoderConfig, part: Part, size: int, rounding: Packing | None) -> None:
    """A mixture quantizes what its experts' second product reads by itself, and would do so by each rank's part."""
    storage = model.quantization.storage(part.linear) if model.quantization else None
    packing = storage.packing if storage else rounding
    if packing is not None and packing.format in WHOLE_ROWS:
        raise EngineStartError(
            f"tensor_parallel_size is {size}, but the experts are in {packing.format}, which quantizes whole rows of "
            "activations: no rank has one; give 1, or experts in int8, int4 or fp8_block"
        )
