"""Drawing tokens: a survey of every row, a shortlist and a cut where there are filters, then the Gumbel race.

    survey      (rows, chunks)   the only pass over all logits; without filters the race is run here
    shortlist   (rows,)          groups of columns that can hold a kept token
    draw        (rows,)          cut and race among the shortlist; or the best of the chunks' winners

Every row decides by itself what it needs, so one call serves any mix of parameters and nothing returns to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .cut import TILE, cut_of, load_shortlisted, mass_from
from .noise import SAMPLE, gumbel_at, gumbel_of
from .order import BEFORE_ALL, chunk_of, id_of, order_key, value_of
from .shortlist import (
    GROUP,
    floor_of,
    load_chunk,
    load_leaders,
    row_best,
    row_mass,
    sound,
    summarise,
    tempered,
    weight_of,
    write_shortlist,
)
from .specialization import Specialization
from .support import on_gpu


@triton.jit
def _filters(numbers, integers, row, rows):
    """A row's temperature, top_k, top_p, min_p, and whether any of the filters is on."""
    t, p, m = tl.load(numbers + row), tl.load(numbers + rows + row), tl.load(numbers + 2 * rows + row)
    k = tl.load(integers + row)
    return t, k, p, m, (k > 0) | (p < 1) | (m > 0)


@triton.jit
def _source(integers, row, rows):
    """Where a row's noise comes from: seed, sample index, position."""
    seed = tl.load(integers + rows + row)
    return seed, tl.load(integers + 2 * rows + row), tl.load(integers + 3 * rows + row)


@triton.jit
def survey(
    logits,
    stride,
    numbers,
    integers,
    best,
    masses,
    leaders,
    races,
    V,
    groups,
    CHUNK: tl.constexpr,
    RACE: tl.constexpr,
):
    """Best key of a chunk; mass and group maxima of a filtered row, else (RACE) the key of the chunk's winner."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, chunks = tl.num_programs(0), tl.num_programs(1)
    values, ids, key = load_chunk(logits, stride, row, chunk, V, CHUNK)
    tl.store(best + row * chunks + chunk, key)
    t, _, _, _, filtered = _filters(numbers, integers, row, rows)
    if t > 0:
        # In an unsound row nothing of this is read; a chunk of -inf alone has no mass.
        top = value_of(key)
        values = tl.where(sound(top), values, -float("inf"))
        top = tl.where(sound(top), top, 0.0)
        if filtered | (not RACE):
            summarise(values, top, t, masses, leaders, row, chunk, chunks, groups, CHUNK)
        else:
            seed, index, position = _source(integers, row, rows)
            quads = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
            # Against the chunk's maximum where the reference takes the row's: the difference is the rounding of the
            # last bit, as that of the noise. The winners meet again against the row's maximum.
            score = tempered(values, top, t) + gumbel_of(seed, index, position, SAMPLE, quads)
            tl.store(races + row * chunks + chunk, tl.max(order_key(score, ids), axis=0))


@triton.jit
def shortlist_rows(
    numbers,
    integers,
    best,
    masses,
    leaders,
    shortlist,
    count,
    floors,
    V,
    chunks,
    groups,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The live groups of every filtered row."""
    row = tl.program_id(0).to(tl.int64)
    t, k, p, m, filtered = _filters(numbers, integers, row, tl.num_programs(0))
    top = value_of(row_best(best, row, chunks, CHUNKS))
    if (t > 0) & filtered & sound(top):
        mass = row_mass(best, masses, row, top, t, chunks, CHUNKS)
        maxima, group, inside = load_leaders(leaders, row, groups, GROUPS)
        x = tempered(maxima, top, t)
        floor = floor_of(x, inside, k, p, m, mass, V)
        write_shortlist(x, floor, group, inside, shortlist, count, floors, row, groups)


@triton.jit
def draw(
    logits,
    stride,
    numbers,
    integers,
    best,
    masses,
    races,
    shortlist,
    count,
    floors,
    ids_out,
    V,
    chunks,
    groups,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token of every row."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    line = logits + row * stride
    t, k, p, m, filtered = _filters(numbers, integers, row, rows)
    first = row_best(best, row, chunks, CHUNKS)
    top = value_of(first)
    token = id_of(first)
    if t > 0:
        if not sound(top):
            # As the reference: NaN spreads over the whole row when its maximum is subtracted, an infinity stays.
            token = tl.where(top != top, 0, token)
        else:
            seed, index, position = _source(integers, row, rows)
            if filtered:
                n = tl.load(count + row)
                groups_of_row = shortlist + row * groups
                mass = row_mass(best, masses, row, top, t, chunks, CHUNKS)
                cut = cut_of(line, groups_of_row, n, tl.load(floors + row), k, p, m, mass, top, t, V, TILE)
                winner = tl.full((), BEFORE_ALL, tl.int64)
                for start in range(0, n * GROUP, TILE):
                    x, ids, keys = load_shortlisted(line, groups_of_row, n, start, top, t, 0.0, V, TILE)
                    score = x + gumbel_at(seed, index, position, SAMPLE, ids)
                    winner = tl.maximum(
                        winner, tl.max(tl.where(keys >= cut, order_key(score, ids), BEFORE_ALL), axis=0)
                    )
                token = id_of(winner)
            else:
                of_chunk = tl.arange(0, CHUNKS)
                ids = id_of(tl.load(races + row * chunks + tl.where(of_chunk < chunks, of_chunk, 0)))
                x = tempered(tl.load(line + ids), top, t)
                score = x + gumbel_at(seed, index, position, SAMPLE, ids)
                token = id_of(tl.max(order_key(score, ids), axis=0))
    tl.store(ids_out + row, token.to(tl.int64))


@triton.jit
def cut_rows(
    logits,
    stride,
    numbers,
    integers,
    best,
    masses,
    shortlist,
    count,
    floors,
    cuts,
    kept_masses,
    V,
    chunks,
    groups,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Every row's cut and the mass from there on; at temperature 0 the cut is the first token's own key."""
    row = tl.program_id(0).to(tl.int64)
    t, k, p, m, filtered = _filters(numbers, integers, row, tl.num_programs(0))
    top = value_of(row_best(best, row, chunks, CHUNKS))
    if (t > 0) & sound(top):
        line = logits + row * stride
        groups_of_row = shortlist + row * groups
        mass = row_mass(best, masses, row, top, t, chunks, CHUNKS)
        cut = tl.full((), BEFORE_ALL, tl.int64)
        if filtered:
            n = tl.load(count + row)
            cut = cut_of(line, groups_of_row, n, tl.load(floors + row), k, p, m, mass, top, t, V, TILE)
            mass = mass_from(line, groups_of_row, n, cut, top, t, V, TILE).to(tl.float32)
        tl.store(cuts + row, cut)
        tl.store(kept_masses + row, mass)


@triton.jit
def spread(
    logits,
    stride,
    numbers,
    integers,
    best,
    cuts,
    kept_masses,
    out,
    V,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The probabilities of a chunk. Grid (rows, chunks)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, _, _, _, _ = _filters(numbers, integers, row, tl.num_programs(0))
    values, ids, _ = load_chunk(logits, stride, row, chunk, V, CHUNK)
    first = row_best(best, row, tl.num_programs(1), CHUNKS)
    top = value_of(first)
    if t > 0:
        if sound(top):
            x = tempered(values, top, t)
            kept = order_key(x, ids) >= tl.load(cuts + row)
            probability = tl.where(kept, tl.div_rn(weight_of(x), tl.load(kept_masses + row)), 0.0)
        else:
            probability = tl.full((CHUNK,), float("nan"), tl.float32)
    else:
        probability = (ids == id_of(first)).to(tl.float32)
    tl.store(out + row * V + ids, probability, mask=ids < V)


class _Survey:
    """A call's parameters side by side, and what the kernels leave for each other.

    numbers  [3, L] float32: temperature, top_p, min_p
    integers [1 or 4, L] int64: top_k, and where there is a race seeds, sample_index, positions
    """

    def __init__(self, logits: Tensor, numbers: tuple[Tensor, ...], integers: tuple[Tensor, ...], race: bool) -> None:
        self.rows, self.vocab = logits.shape
        self.chunk = chunk_of(self.vocab)
        self.chunks = triton.cdiv(self.vocab, self.chunk)
        self.groups = triton.cdiv(self.vocab, GROUP.value)
        self.numbers, self.integers = torch.stack(numbers), torch.stack(integers)
        self.best = self._empty(self.chunks, torch.int64)
        self.masses = self._empty(self.chunks, torch.float32)
        self.leaders = self._empty(self.groups, torch.float32)
        self.races = self._empty(self.chunks, torch.int64)
        self.shortlist = self._empty(self.groups, torch.int32)
        self.count = self._empty(1, torch.int32)
        self.floors = self._empty(1, torch.float32)
        survey[(self.rows, self.chunks)](
            logits,
            logits.stride(0),
            self.numbers,
            self.integers,
            self.best,
            self.masses,
            self.leaders,
            self.races,
            self.vocab,
            self.groups,
            CHUNK=self.chunk,
            RACE=race,
            num_warps=8,
        )
        shortlist_rows[(self.rows,)](
            self.numbers,
            self.integers,
            self.best,
            self.masses,
            self.leaders,
            self.shortlist,
            self.count,
            self.floors,
            self.vocab,
            self.chunks,
            self.groups,
            CHUNKS=self.width,
            GROUPS=triton.next_power_of_2(self.groups),
            num_warps=8,
        )

    @property
    def width(self) -> int:
        return triton.next_power_of_2(self.chunks)

    def _empty(self, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows, columns, dtype=dtype, device=self.numbers.device)


@implements("sample", "triton", when=on_gpu)
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
    """See the reference. One pass over the logits, and with filters some over the few groups that pass the floor."""
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits) > 0:
        s = _Survey(logits, (temperature, top_p, min_p), (top_k, seeds, sample_index, positions), race=True)
        draw[(s.rows,)](
            logits,
            logits.stride(0),
            s.numbers,
            s.integers,
            s.best,
            s.masses,
            s.races,
            s.shortlist,
            s.count,
            s.floors,
            ids,
            s.vocab,
            s.chunks,
            s.groups,
            CHUNKS=s.width,
            TILE=TILE.value,
            num_warps=8,
        )
    return ids


@implements("probabilities", "triton", when=on_gpu)
def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See the reference. Two passes over the logits and one over the result."""
    out = torch.empty(logits.shape, device=logits.device)
    if len(logits) > 0:
        s = _Survey(logits, (temperature, top_p, min_p), (top_k,), race=False)
        cuts = torch.empty(s.rows, dtype=torch.int64, device=logits.device)
        kept_masses = torch.empty(s.rows, device=logits.device)
        cut_rows[(s.rows,)](
            logits,
            logits.stride(0),
            s.numbers,
            s.integers,
            s.best,
            s.masses,
            s.shortlist,
            s.count,
            s.floors,
            cuts,
            kept_masses,
            s.vocab,
            s.chunks,
            s.groups,
            CHUNKS=s.width,
            TILE=TILE.value,
            num_warps=8,
        )
        spread[(s.rows, s.chunks)](
            logits,
            logits.stride(0),
            s.numbers,
            s.integers,
            s.best,
            cuts,
            kept_masses,
            out,
            s.vocab,
            CHUNK=s.chunk,
            CHUNKS=s.width,
            num_warps=8,
        )
    return out


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: a vocabulary of 128k."""
    vocab = 128_256
    chunk = chunk_of(vocab)
    width = triton.next_power_of_2(triton.cdiv(vocab, chunk))
    line = {"logits": "*fp32:16", "stride": "i32:16"}
    params = {"numbers": "*fp32:16", "integers": "*i64:16"}
    surveyed = {"best": "*i64:16", "masses": "*fp32:16"}
    listed = {"shortlist": "*i32:16", "count": "*i32:16", "floors": "*fp32:16"}
    sizes = {"V": "i32:16", "chunks": "i32:16", "groups": "i32"}
    found = {"leaders": "*fp32:16", "races": "*i64:16"}
    return [
        *(
            Specialization(
                f"survey/{'race' if race else 'mass'}",
                survey,
                line | params | surveyed | found | {"V": "i32:16", "groups": "i32"},
                {"CHUNK": chunk, "RACE": race},
                num_warps=8,
                needs=("wide",),
            )
            for race in (True, False)
        ),
        Specialization(
            "shortlist_rows",
            shortlist_rows,
            params | surveyed | {"leaders": "*fp32:16"} | listed | sizes,
            {"CHUNKS": width, "GROUPS": triton.next_power_of_2(triton.cdiv(vocab, GROUP.value))},
            num_warps=8,
        ),
        Specialization(
            "draw",
            draw,
            line | params | surveyed | {"races": "*i64:16"} | listed | {"ids_out": "*i64:16"} | sizes,
            {"CHUNKS": width, "TILE": TILE.value},
            num_warps=8,
        ),
        Specialization(
            "cut_rows",
            cut_rows,
            line | params | surveyed | listed | {"cuts": "*i64:16", "kept_masses": "*fp32:16"} | sizes,
            {"CHUNKS": width, "TILE": TILE.value},
            num_warps=8,
        ),
        Specialization(
            "spread",
            spread,
            line
            | params
            | {"best": "*i64:16", "cuts": "*i64:16", "kept_masses": "*fp32:16", "out": "*fp32:16", "V": "i32:16"},
            {"CHUNK": chunk, "CHUNKS": width},
            num_warps=8,
            needs=("wide",),
        ),
    ]
