"""What tensor parallelism adds to a decoder: sums and joins between ranks, put around the layers that need them.

    column-parallel (q, k, v, gate, up)    each rank has some outputs: nothing is exchanged
    row-parallel (o, down)                 each rank has some inputs: the block's outputs are summed
    vocabulary                             embeddings are summed (all but one are zero), logits joined

A layer does not know of ranks: the loader asks its `Alone` or `Group` to wrap what has to be exchanged, and alone that
is nothing. Sums are taken in the order of the ranks, whatever the library would do and however many rows there are:
every rank has the same bits, so every rank draws the same tokens, and a request's do not depend on its batch-mates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.packed import QuantizedRows, RowFormat
from ..kernels.reference.rows import LARGEST
from .decoder import Block, QkNormed, Step
from .errors import RankLost
from .linear import Linear, Rows

Embed = Callable[[Tensor, Tensor, float], Tensor]

# Where a sum is larger than so many bytes and there are more than two ranks, each adds up its part and the parts are
# joined: 2 (N - 1) / N of the bytes instead of N - 1, for a second exchange. Reckoned from 450 GB/s and 10 µs for an
# exchange, not measured.
TWO_STEPS_BYTES = 1 << 20

# Nobody waits so long: a rank that ends is seen to, and one that hangs is noticed by the supervisor.
TIMEOUT = timedelta(hours=1)

# Between two looks at whether the other ranks live, while an exchange of gloo is not over.
LOOK_EVERY = timedelta(seconds=0.5)


class Alone:
    """The only rank: nothing is exchanged."""

    rank, size = 0, 1

    def summed(self, block: Block) -> Block:
        """The block whose outputs are the sum of all ranks'."""
        return block

    def embedding(self, embed: Embed, table: Tensor) -> Embed:
        """The look-up in all ranks' rows [V, d], of which this one has `table`."""
        return embed

    def logits(self, linear: Linear, outputs: int) -> Linear:
        """The product with the outputs of all ranks, of which this one has so many."""
        return linear

    def whole_rows(self, linear: Linear) -> Linear:
        """The row-parallel product that quantizes activations by the largest of the whole row, not of a part of it."""
        return linear

    def norms(self, norm_qk: QkNormed, queries: int, kv_heads: int) -> QkNormed:
        """The norm over all heads of a row at once, of which this rank has so many queries.

        kv_heads: of the model
        """
        return norm_qk

    def least(self, number: int) -> int:
        """The smallest of all ranks'."""
        return number


ALONE = Alone()


class Group(Alone):
    """One of several ranks."""

    def __init__(
        self, backend: Any, rank: int, size: int, device: torch.device, check: Callable[[], None] = lambda: None
    ) -> None:
        """
        backend  torch's process group, of NCCL or gloo
        check    raises RankLost where another rank has ended
        """
        self.rank, self.size = rank, size
        self._backend, self._device, self._check = backend, device, check

    # ---------------------------------------------------------------- exchanges

    def gather(self, x: Tensor) -> Tensor:
        """Of all ranks [N, *shape of x], which is the same on all of them. Raises RankLost."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._wait(lambda: self._backend._allgather_base(out, x.contiguous()))
        return out.view(self.size, *x.shape)

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks, added in their order in fp32, and rounded once."""
        if self.size == 2 or x.nbytes < TWO_STEPS_BYTES or x.numel() % self.size:
            return _added(self.gather(x))
        parts = torch.empty_like(x).view(self.size, -1)
        self._wait(lambda: self._backend.alltoall_base(parts.view(-1), x.contiguous().view(-1), [], []))
        return self.gather(_added(parts)).view(x.shape)

    def join(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Columns of all ranks side by side: [T, sizes[rank]] -> [T, sum(sizes)]."""
        missing = max(sizes) - x.shape[1]
        parts = self.gather(torch.nn.functional.pad(x, (0, missing)) if missing else x)
        if min(sizes) == max(sizes):
            return parts.transpose(0, 1).reshape(len(x), -1)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)

    def sizes(self, number: int) -> list[int]:
        """Every rank's number."""
        return self.gather(torch.tensor([number], device=self._device)).flatten().tolist()

    def least(self, number: int) -> int:
        return min(self.sizes(number))

    def _wait(self, exchange: Callable[[], Any]) -> None:
        try:
            work = exchange()
            if self._device.type == "cuda":
                work.wait()  # the stream does, not this thread
            else:
                self._look_meanwhile(work)
        except RankLost:
            _keep_for_good(self._backend)
            raise
        except Exception as error:
            raise RankLost(f"another rank has gone ({type(error).__name__})") from error

    def _look_meanwhile(self, work: Any) -> None:
        """gloo does not always notice that a rank has gone while a message to it is about to be sent, and waits on."""
        while True:
            try:
                work.wait(LOOK_EVERY)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises why it failed, unless it was done just now
                    return
            self._check()

    # ---------------------------------------------------------------- around layers

    def summed(self, block: Block) -> Block:
        return _Summed(block, self)

    def embedding(self, embed: Embed, table: Tensor) -> Embed:
        sizes = self.sizes(len(table))
        first, count = sum(sizes[: self.rank]), len(table)

        def look_up(ids: Tensor, table: Tensor, scale: float) -> Tensor:
            own = ids - first
            others = (own < 0) | (own >= count)
            rows = embed(own.masked_fill(others, 0), table, scale)
            return self.sum(rows.masked_fill(others[:, None], 0))

        return look_up

    def logits(self, linear: Linear, outputs: int) -> Linear:
        sizes = self.sizes(outputs)
        return Linear(lambda x, packed: self.join(linear.run(x, packed), sizes), linear.packed, linear.rows)

    def whole_rows(self, linear: Linear) -> Linear:
        form = linear.rows
        if form is None or form.scale is not None:
            return linear
        return Linear(lambda x, packed: linear.run(self._quantized(x, form), packed), linear.packed)

    def _quantized(self, x: Tensor, to: RowFormat) -> QuantizedRows:
        """`quantize_rows` of a row that the ranks have in parts."""
        largest, wide = LARGEST[to.codes], x.float()
        scales = self.gather(wide.abs().amax(1, keepdim=True)).amax(0) / largest
        scales = torch.where(scales == 0, 1.0, scales)
        scaled = (wide / scales).clamp(-largest, largest)
        return QuantizedRows((scaled.round() if to.codes == torch.int8 else scaled).to(to.codes), scales, x.dtype)

    def in_order(self, linear: Linear, columns: Tensor, inputs: int) -> Linear:
        """The product with inputs of an order of their own: of all ranks', of which this one has so many, `columns`."""
        sizes = self.sizes(inputs)
        return Linear(lambda x, packed: linear.run(self.join(x, sizes).index_select(1, columns), packed), linear.packed)

    def norms(self, norm_qk: QkNormed, queries: int, kv_heads: int) -> QkNormed:
        own_queries = slice(self.rank * queries, (self.rank + 1) * queries)
        copies = max(1, self.size // kv_heads)  # ranks that hold the same head of keys
        own = max(1, kv_heads // self.size)
        own_keys = slice(self.rank // copies * own, self.rank // copies * own + own)

        def whole_row(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            all_q = self.gather(q).transpose(0, 1).flatten(1, 2)
            all_k = self.gather(k)[::copies].transpose(0, 1).flatten(1, 2)
            q, k = norm_qk(all_q, all_k)
            return q[:, own_queries], k[:, own_keys]

        return whole_row


def _added(parts: Tensor) -> Tensor:
    """parts [N, ...] -> [...], one after another."""
    total = parts[0].float() + parts[1].float()
    for part in parts[2:]:
        total += part
    return total.to(parts.dtype)


class _Summed:
    """A block of which each rank computes a part."""

    def __init__(self, block: Block, group: Group) -> None:
        self.block, self.rows, self._sum = block, block.rows, group.sum

    def __call__(self, x: Rows, step: Step) -> Tensor:
        try:
            part = self.block(x, step)
        except Exception as error:  # the others wait for this part, and would take the next one for it
            raise RankLost(f"a layer failed on one rank ({type(error).__name__}: {error})") from error
        return self._sum(part)


def _keep_for_good(backend: Any) -> None:
    """Its destructor would wait for its thread, which waits for a rank that is gone."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))


def connect(
    meeting: Path, rank: int, size: int, device: torch.device, check: Callable[[], None] = lambda: None
) -> Group:
    """Wait for all ranks. meeting: a file that none of them has made yet, in a folder that nobody else may read.

    Connections are made on the loopback interface, and between GPUs by NCCL.
    """
    store = dist.FileStore(str(meeting), size)
    backend: Any
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = TIMEOUT
        backend = dist.ProcessGroupNCCL(store, rank, size, nccl)
    else:
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._timeout = TIMEOUT
        gloo._threads = 1
        backend = dist.ProcessGroupGloo(store, rank, size, gloo)
    group = Group(backend, rank, size, device, check)
    group.sizes(rank)  # NCCL connects at the first exchange, which no graph may record
    return group
