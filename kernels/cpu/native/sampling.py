"""From logits to tokens: every op of kernels/reference/sampling.py; see src/sampling.h, logprobs.h and edits.h.

All logits are read once or twice, by all threads; what is left is done on the few tokens that can matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.sampling import LogitEdits, Logprobs
from ...registry import Target, implements, on
from . import library
from .library import OUT_OF_MEMORY, OUT_OF_RANGE, Kernel

# Logits up to which one thread is faster: another that sleeps takes 40 us to come (measured on a Sapphire Rapids core),
# in which one core races through so many, or reads eight times as many.
_RACED_ALONE = 1 << 15
_READ_ALONE = 1 << 18

_greedy = Kernel("greedy", "ipiipp")
_sample = Kernel("sample", "ipiipppppppp")
_probabilities = Kernel("probabilities", "ipiippppp")
_token_logprobs = Kernel("token_logprobs", "ipiipipppp")
_process_logits = Kernel("process_logits", "ipiip" + "ipppp" + "ippp" + "ipp" + "ipp" + "ipp")


def usable(target: Target) -> str | None:
    """Logits are fp32, whatever the model computes in."""
    return on("cpu")(target) or library.problem


def _rows(logits: Tensor) -> tuple[int, int, int, int]:
    """Of logits [L, V] fp32 whose rows are contiguous: L, address, V, row stride."""
    rows, columns = logits.shape
    return rows, logits.data_ptr(), columns, logits.stride(0)


def _check(status: int, op: str) -> None:
    if status == OUT_OF_RANGE:
        raise IndexError(f"{op}: a row or a token id is outside of the logits")
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"{op}: no memory for the working buffers")


def _threads(logits: Tensor, alone: int) -> int | None:
    """For `Kernel`: one if there are at most so many logits."""
    return 1 if logits.numel() <= alone else None


def _aligned(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@implements("greedy", "native", when=usable)
def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference. One pass."""
    logits = _aligned(logits)
    values = torch.empty(logits.shape[0], dtype=torch.float32)
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    threads = _threads(logits, _READ_ALONE)
    _check(_greedy(*_rows(logits), values.data_ptr(), ids.data_ptr(), threads=threads), "greedy")
    return values, ids


@implements("sample", "native", when=usable)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
) -> Tensor:
    """See the reference."""
    logits = _aligned(logits)
    columns = [
        column.contiguous() for column in (temperature, top_k, top_p, min_p, seeds, sample_index, positions)
    ]  # kept, so that what a copy owns outlives the call
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    addresses = [column.data_ptr() for column in columns]
    threads = _threads(logits, _RACED_ALONE)
    _check(_sample(*_rows(logits), *addresses, ids.data_ptr(), threads=threads), "sample")
    return ids


@implements("probabilities", "native", when=usable)
def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See the reference."""
    logits = _aligned(logits)
    columns = [column.contiguous() for column in (temperature, top_k, top_p, min_p)]
    out = torch.empty(logits.shape, dtype=torch.float32)
    addresses = [column.data_ptr() for column in columns]
    threads = _threads(logits, _RACED_ALONE)
    _check(_probabilities(*_rows(logits), *addresses, out.data_ptr(), threads=threads), "probabilities")
    return out


@implements("token_logprobs", "native", when=usable)
def token_logprobs(logits: Tensor, ids: Tensor, k: int) -> Logprobs:
    """See the reference. IndexError for an id outside of the vocabulary."""
    logits, ids = _aligned(logits), ids.contiguous()
    rows, vocab = logits.shape
    k = min(k, vocab)
    found = Logprobs(
        torch.empty(rows, dtype=torch.float32),
        torch.empty(rows, dtype=torch.int64),
        torch.empty((rows, k), dtype=torch.int64),
        torch.empty((rows, k), dtype=torch.float32),
    )
    addresses = [tensor.data_ptr() for tensor in found]
    threads = _threads(logits, _RACED_ALONE)
    _check(_token_logprobs(*_rows(logits), ids.data_ptr(), k, *addresses, threads=threads), "token_logprobs")
    return found


@implements("process_logits", "native", when=usable)
def process_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """See the reference. IndexError for a row or a column outside of the logits, or masks of another width."""
    logits = _aligned(logits)
    if edits.masks is not None and edits.masks.bits.shape[1] != -(-logits.shape[1] // 32):
        raise IndexError(f"process_logits: masks of {edits.masks.bits.shape[1]} words for {logits.shape[1]} columns")
    out = torch.empty(logits.shape, dtype=torch.float32)
    slots: list[int] = []
    kept = []  # what a copy owns outlives the call
    for kind, fields in zip(edits, (4, 3, 2, 2, 2), strict=True):
        tensors = [] if kind is None else [tensor.contiguous() for tensor in kind]
        kept += tensors
        slots.append(tensors[0].shape[0] if tensors else 0)
        slots += [tensor.data_ptr() for tensor in tensors] or [0] * fields
    threads = _threads(logits, _READ_ALONE)
    _check(_process_logits(*_rows(logits), out.data_ptr(), *slots, threads=threads), "process_logits")
    return out
