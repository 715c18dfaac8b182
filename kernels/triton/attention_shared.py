"""Attention to keys that several sequences share: read once for rows of all of them.

    RaggedBatch.shared ─▶ plan: the rows of each group, laid end to end ─▶ shared: tiles of them over the group's keys
                                                                         ─▶ states, which `reduce` merges with the rest

The rest of a sequence's keys are left to attention_short.py, which starts behind the shared ones. Results are those of
a batch without groups up to rounding: sums are taken in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import SHORT_ROWS, RaggedBatch
from .attention_long import owner_of
from .attention_short import most_segments, segment_keys
from .attention_tile import STEPWISE, attend, load_queries, nothing_seen, static_scale, store_part

# Keys that are not read again, from which on a group is worth its own launch in every layer, some 10 µs of the host's
# and the device's time: 65,536 keys of 8 heads of 128 in bf16 are 80 µs of an H100's memory, of 2 heads of 64 10 µs.
MIN_SAVED = 65_536


class SharedPlan(NamedTuple):
    """The groups of a step on the device; sizes on the host are bounds."""

    shared_keys: Tensor  # [S] int32: keys that a sequence reads with others, 0 where it does not
    rows: Tensor  # int32: of the batch, group after group
    cu_rows: Tensor  # [groups + 1] int32: into rows
    seqs: Tensor  # [groups] int32: a member of each
    num_groups: int
    most_segments: int


def plan_shared(batch: RaggedBatch, block_size: int) -> SharedPlan | None:
    """None where no group of short sequences saves enough. Copies to the device, so that no graph can capture it."""
    groups = [
        group
        for group in batch.shared
        if max(group.seqs) < batch.short_seqs and (len(group.seqs) - 1) * group.num_blocks * block_size >= MIN_SAVED
    ]
    if not groups:
        return None
    device = batch.cu_q.device

    def on_device(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

    members = on_device([seq for group in groups for seq in group.seqs])
    keys = on_device([group.num_blocks * block_size for group in groups for _ in group.seqs])
    counts = batch.cu_q[members + 1] - batch.cu_q[members]
    ends = counts.cumsum(0)
    # How many rows there are is known on the device alone: the places behind the last are never used.
    places = torch.arange(len(members) * min(batch.max_q, SHORT_ROWS), device=device)
    owner = torch.searchsorted(ends, places, right=True).clamp_(max=len(members) - 1)
    last_members = torch.tensor([len(group.seqs) for group in groups]).cumsum(0) - 1
    return SharedPlan(
        shared_keys=torch.zeros_like(batch.seq_lens).index_copy_(0, members, keys.int()),
        rows=(batch.cu_q[members[owner]] + places - (ends - counts)[owner]).int(),
        cu_rows=torch.nn.functional.pad(ends[on_device(last_members.tolist())], (1, 0)).int(),
        seqs=on_device([group.seqs[0] for group in groups]).int(),
        num_groups=len(groups),
        most_segments=max(most_segments(group.num_blocks * block_size) for group in groups),
    )


@triton.jit(do_not_specialize=STEPWISE)
def shared(
    q,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    part_acc,
    part_m,
    part_l,
    shared_keys,
    rows,
    cu_rows,
    seqs,
    block_table,
    q_row_stride,
    q_head_stride,
    table_stride,
    factor,
    softcap,
    parts,
    num_groups,
    FORM: tl.constexpr,
):
    """One tile of a group's queries over one segment of its keys. Grid: (kv_heads, tiles, segments).

    FORM: without tree and window, for every row sees all of these keys.
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    head = tl.program_id(0)
    segment = tl.program_id(2)
    group, first_query = owner_of(tl.program_id(1), cu_rows, 0, num_groups - 1, FORM)
    first_row = tl.load(cu_rows + group)
    count = tl.load(cu_rows + group + 1) - first_row
    seq = tl.load(seqs + group)
    num_keys = tl.load(shared_keys + seq)
    keys = segment_keys(num_keys)
    begin = segment * keys
    if (first_query < count * FORM.group) & (begin < num_keys):
        query = first_query + tl.arange(0, BLOCK_M)
        member = query // FORM.group
        valid = member < count
        q_head = head * FORM.group + query % FORM.group
        row = tl.load(rows + first_row + member, mask=valid, other=0)
        last = tl.zeros([BLOCK_M], tl.int32) + num_keys
        acc, m, l = attend(
            load_queries(q, row, q_head, valid, q_row_stride, q_head_stride, FORM),
            head,
            (last, last, last),
            num_keys,
            begin,
            tl.minimum(begin + keys, num_keys),
            k_pages,
            v_pages,
            k_scales,
            v_scales,
            block_table + seq.to(tl.int64) * table_stride,
            factor * static_scale(k_scales, head, FORM),
            softcap,
            nothing_seen(FORM),
            FORM,
            True,
        )
        state = (acc * static_scale(v_scales, head, FORM), m, l)
        place = (row.to(tl.int64) * FORM.q_heads + q_head) * parts + segment
        store_part((part_acc, part_m, part_l), place, valid, state, FORM)
