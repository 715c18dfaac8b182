"""How much of a GPU's memory the KV cache may have: measured on what else there is, not guessed.

    loaded ──the largest step──▶ + every row drawn, every guess judged ──▶ + two graphs ──▶ the KV cache gets the rest

Each phase runs for real over a cache of two blocks, since no formula knows what libraries and compilers take. What is
outside of torch (the driver's context, other processes) counts as taken.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..scheduler.params import SamplingParams
from ..scheduler.plan import Row
from .resolve import Resolved
from .runner import ModelRunner
from .sampler import Sampler
from .spec.proposer import Draft, DraftTree
from .spec.verification import judge

GIB = 2**30

# Of a draw that takes as much memory as any: filters that rank the vocabulary, edits, and log-probabilities.
GREEDIEST = SamplingParams(max_tokens=1, top_k=50, top_p=0.9, min_p=0.01, presence_penalty=0.5, logprobs=20)


class Reading(NamedTuple):
    """Bytes of a device: all, those that nobody has, and those that torch has taken, in use or not."""

    total: int
    free: int
    reserved: int

    @property
    def outside(self) -> int:
        """Taken, and not by torch."""
        return self.total - self.free - self.reserved


class Meter(Protocol):
    def read(self) -> Reading: ...

    def settle(self) -> None:
        """Give back what torch holds and does not use."""


class CudaMeter:
    def read(self) -> Reading:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return Reading(total, free, torch.cuda.memory_reserved())

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes of a device, before there is a KV cache."""

    total: int
    outside: int
    weights: int
    activations: int
    sampler: int
    graphs: int

    def kv_cache(self, share: float) -> int:
        """What is left for the KV cache if `share` of the device is used; negative when even the rest does not fit."""
        taken = self.outside + self.weights + self.activations + self.sampler + self.graphs
        return int(self.total * share) - taken

    def table(self, kv_cache: int) -> dict[str, int]:
        """The whole device, by what takes it."""
        parts = {
            "weights": self.weights,
            "activations": self.activations,
            "sampler": self.sampler,
            "graphs": self.graphs,
            "kv_cache": kv_cache,
            "outside": self.outside,
        }
        return parts | {"free": self.total - sum(parts.values())}


def measure(runner: ModelRunner, settings: Resolved, meter: Meter) -> Measured:
    """Run what takes the most memory; the runner's cache may be as small as can be."""
    meter.settle()
    loaded = meter.read()
    runner.rehearse(largest_step(settings))
    stepped = meter.read()
    _draw_for_everybody(runner, settings)
    drawn = meter.read()
    graphs = _graph_bytes(runner, meter)
    return Measured(
        total=drawn.total,
        outside=drawn.outside,
        weights=loaded.reserved,
        activations=stepped.reserved - loaded.reserved,
        sampler=drawn.reserved - stepped.reserved,
        graphs=graphs,
    )


def largest_step(settings: Resolved) -> list[Row]:
    """All sequences, as many tokens as a step may have, at the end of the longest contexts."""
    rows, left = [], settings.max_num_batched_tokens
    for slot in range(settings.max_num_seqs):
        others = settings.max_num_seqs - slot - 1
        count = min(left - others, settings.max_model_len)
        rows.append(Row(slot, settings.max_model_len - count, count))
        left -= count
    return sorted(rows, key=lambda row: row.num_tokens)


@torch.inference_mode()
def _draw_for_everybody(runner: ModelRunner, settings: Resolved) -> None:
    sampler, slots = runner.sampler, range(settings.max_num_seqs)
    for slot in slots:
        sampler.add(slot, GREEDIEST, 0, [0], 1)
    logits = torch.zeros(settings.most_drawn, sampler.vocab_size, device=settings.device)
    sampler.sample(logits[: len(slots)], slots, [1] * len(slots))
    if settings.draft_shape is not None:
        _judge_for_everybody(sampler, logits, settings.draft_shape.nodes)
    for slot in slots:
        sampler.remove(slot)


def _judge_for_everybody(sampler: Sampler, logits: Tensor, nodes: int) -> None:
    """Drafts of the whole shape, for as many sequences as a step has rows for. What they
    were drawn from is as large as the logits, and there at the same time."""
    rows = 1 + nodes
    q = torch.full_like(logits, 1 / sampler.vocab_size)
    tree = DraftTree((0,) * nodes, tuple(range(-1, nodes - 1)))
    count = len(logits) // rows
    drafts = [Draft(tree, own) for own in q[: count * rows].split(rows)]
    judge(sampler, logits[: count * rows], range(count), [1] * count, drafts)


def _graph_bytes(runner: ModelRunner, meter: Meter) -> int:
    """Of all graphs: the largest makes the pool that they share, each further one takes about what the second took."""
    graphs = runner.graphs
    if graphs is None:
        return 0
    meter.settle()  # a capture begins so, and what it gives back is not its own
    first, *others = graphs.shapes.all()
    before = meter.read().free
    graphs.capture_now([first])
    pool = before - (between := meter.read().free)
    graphs.capture_now(others[:1])
    return max(0, pool) + max(0, between - meter.read().free) * len(others)


def describe(table: dict[str, int]) -> str:
    """The table as lines for the log."""
    width = max(map(len, table))
    lines = [f"  {name.replace('_', ' '):<{width}} {size / GIB:8.2f} GiB" for name, size in table.items()]
    return "\n".join([*lines, f"  {'total':<{width}} {sum(table.values()) / GIB:8.2f} GiB"])
