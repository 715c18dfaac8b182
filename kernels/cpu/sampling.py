"""Sampling on the CPU: never sort a vocabulary to keep a handful, never make noise for a token that is filtered out.

Noise is a function of the column, so a survivor's noise does not depend on whether the others' is computed: the tokens
drawn are the reference's. Rows go one by one: a row's work stays in the cache and takes only the steps it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..reference import sampling as reference
from ..reference.noise import Purpose, philox4x32, philox_key, to_gumbel
from ..reference.sampling import Logprobs, tempered
from ..registry import implements, on

# Leaders looked at first for top-p: found in a seventh of the time of a sort at V = 32768, and a trained model at
# temperature 1 nearly always holds the mass asked for in fewer. A miss costs the sort.
_FIRST_LOOK = 512


@contextmanager
def single_thread() -> Iterator[None]:
    """Keep torch on the calling thread: the steps here take microseconds, and torch forks for a log of 2048 values.

    On idle cores the fork gains nothing (7 us either way for 32768 logs); on busy ones, waiting for a thread that is
    not scheduled was measured at 15 ms. Changing the number takes 0.2 us.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def leaders(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x [L, V], largest first, of equals the lower id first: values and ids, [L, k]."""
    values, ids = x.topk(k, dim=-1)
    if k == 0:
        return values, ids
    cut = (x >= values[:, -1:]).sum(dim=-1) > k  # equals on both sides of the cut: topk took any of them
    ids = ids.sort(dim=-1).values
    values, order = x.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if bool(cut.any()):
        ranked = x[cut].sort(dim=-1, descending=True, stable=True)
        values[cut], ids[cut] = ranked.values[:, :k], ranked.indices[:, :k]
    return values, ids


def _survivors(x: Tensor, top_k: int, top_p: float, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """What the filters leave of one tempered row x [1, V], in the order of the ids: values and ids, [1, C]."""
    vocab = x.shape[-1]
    floor = min_p.log()
    if top_k <= 0 and top_p >= 1:
        ids = (x[0] >= floor).nonzero().T
        return x.gather(-1, ids), ids
    if top_k > 0:
        values, ids = leaders(x, min(top_k, vocab))
        mass = values.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    else:
        table = x.softmax(dim=-1)
        values, ids = leaders(x, min(_FIRST_LOOK, vocab))
        if table.gather(-1, ids).sum() < top_p:
            values, ids = x.sort(dim=-1, descending=True, stable=True)
        mass = table.gather(-1, ids).cumsum(dim=-1, dtype=torch.float64)
    keep = values >= floor
    if top_p < 1:
        keep &= pad(mass[:, :-1], (1, 0)) < top_p
    kept = max(int(keep.sum()), 1)  # what is kept is a beginning of the ranking
    ids, order = ids[:, :kept].sort(dim=-1)
    return values.gather(-1, order), ids


def _gumbel(key: tuple[int, int], counter: tuple[int, int, int], columns: np.ndarray | int) -> Tensor:
    """The reference's noise for one row, [1, C]. NumPy's uint64 products take a third of the time of torch's int64."""
    if isinstance(columns, int):
        drawn = np.stack(philox4x32((np.arange((columns + 3) // 4, dtype=np.uint64), *counter), key), axis=-1)
        drawn = drawn.reshape(-1)[:columns]
    else:
        drawn = np.stack(philox4x32((columns >> np.uint64(2), *counter), key), axis=-1)
        drawn = np.take_along_axis(drawn, (columns & np.uint64(3)).astype(np.int64)[:, None], axis=-1)[:, 0]
    return to_gumbel(torch.from_numpy(drawn.astype(np.float32)))[None]


@implements("sample", "cpu", when=on("cpu"))
@single_thread()
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
    largest, ids = reference.greedy(logits)
    k0, k1 = philox_key(seeds)
    warm = (temperature > 0) & largest.isfinite()
    filters = zip(warm.tolist(), top_k.tolist(), top_p.tolist(), (min_p > 0).tolist(), strict=True)
    sources = zip(k0.tolist(), k1.tolist(), positions.tolist(), sample_index.tolist(), strict=True)
    for row, ((draws, k, p, has_min_p), (*key, position, index)) in enumerate(zip(filters, sources, strict=True)):
        if not draws:
            continue
        one = slice(row, row + 1)
        x = tempered(logits[one], temperature[one])
        counter = (position, index, int(Purpose.SAMPLE))
        if k > 0 or p < 1 or has_min_p:
            x, columns = _survivors(x, k, p, min_p[one])
            g = _gumbel((key[0], key[1]), counter, columns[0].numpy().astype(np.uint64))
            ids[row] = columns[0, (x + g).max(dim=-1).indices[0]]
        else:
            ids[row] = (x + _gumbel((key[0], key[1]), counter, x.shape[-1])).max(dim=-1).indices[0]
    return ids


@implements("token_logprobs", "cpu", when=on("cpu"))
@single_thread()
def token_logprobs(logits: Tensor, ids: Tensor, k: int) -> Logprobs:
    table = logits.log_softmax(dim=-1)
    logprob = table.gather(-1, ids[:, None])
    values, order = leaders(table, k)
    return Logprobs(logprob.squeeze(1), 1 + (table > logprob).sum(dim=-1), order, values)


@implements("greedy", "cpu", when=on("cpu"))
def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference. numpy's argmax is vectorised; torch's maximum with indices takes four times as long."""
    rows = logits.numpy()
    ids = rows.argmax(-1)
    return torch.from_numpy(rows[np.arange(len(ids)), ids]), torch.from_numpy(ids)


process_logits = implements("process_logits", "cpu", when=on("cpu"))(single_thread()(reference.process_logits))
