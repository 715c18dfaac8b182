"""What reading a shared prefix once is worth: attention of a group of decodes with and without it, in one run.

    python -m quire.bench.shared_prefix --group 64 --prefix 2048 --suffix 32 --heads 14/2/64 --threads 2

One JSON line per setting: milliseconds per layer, the fastest of alternating passes (what else runs on the machine can
only add to a call), and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..kernels import Target, resolve
from ..kernels.batch import KVSpec, LayerKV, RaggedBatch, SharedPrefix

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def decodes(group: int, prefix: int, suffix: int, block_size: int) -> RaggedBatch:
    """Sequences of one row each, on `prefix` keys that they share and `suffix` of their own, the row's included."""
    shared, own = prefix // block_size, -(-suffix // block_size)
    shuffled = torch.randperm(shared + group * own, dtype=torch.int32) + 1
    table = torch.cat([shuffled[:shared].expand(group, -1), shuffled[shared:].view(group, own)], dim=1)
    end = shared * block_size + suffix
    return RaggedBatch(
        input_ids=torch.zeros(group, dtype=torch.int64),
        positions=torch.full((group,), end - 1),
        slot_mapping=table[:, -1].long() * block_size + (suffix - 1) % block_size,
        cu_q=torch.arange(group + 1, dtype=torch.int32),
        seq_lens=torch.full((group,), end, dtype=torch.int32),
        block_table=table,
        tree_mask=None,
        logit_rows=torch.zeros(0, dtype=torch.int64),
        max_q=1,
        max_seq_len=end,
        shared=(SharedPrefix(tuple(range(group)), shared),),
    )


def measure(
    group: int, prefix: int, suffix: int, heads: Sequence[int], dtype: str, layers: int, passes: int
) -> dict[str, float]:
    """heads: query heads, KV heads, head size. Each pass goes through the caches of all layers, as a step does."""
    q_heads, kv_heads, dim = heads
    spec = KVSpec(16, kv_heads, dim, dtype)
    batch = decodes(group, prefix, suffix, spec.block_size)
    shape = (int(batch.block_table.max()) + 1, spec.block_size, kv_heads, dim)
    caches = [LayerKV(spec, *torch.randn(2, *shape).to(DTYPES[dtype]).unbind()) for _ in range(layers)]
    q = torch.randn(group, q_heads, dim).to(DTYPES[dtype])
    attention = resolve(Target("cpu", DTYPES[dtype], dim, dtype)).attention
    plans = [attention.prepare(b, spec.block_size, None) for b in (replace(batch, shared=()), batch)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(passes):
        for plan, taken in zip(plans, seconds, strict=True):
            for cache in caches:
                started = time.perf_counter()
                attention.run(q, cache, plan, dim**-0.5, 0.0, None)
                taken.append(time.perf_counter() - started)
    apart, shared = (1e3 * min(taken) for taken in seconds)
    return {"apart_ms": round(apart, 4), "shared_ms": round(shared, 4), "ratio": round(apart / shared, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, nargs="+", default=[64])
    parser.add_argument("--prefix", type=int, nargs="+", default=[2048])
    parser.add_argument("--suffix", type=int, nargs="+", default=[32])
    parser.add_argument("--heads", nargs="+", default=["4/2/64", "14/2/64"], metavar="QUERY/KV/SIZE")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for heads, dtype, group, prefix, suffix in itertools.product(
        args.heads, args.dtype, args.group, args.prefix, args.suffix
    ):
        setting = {"heads": heads, "dtype": dtype, "group": group, "prefix": prefix, "suffix": suffix}
        figures = measure(group, prefix, suffix, [int(n) for n in heads.split("/")], dtype, args.layers, args.passes)
        print(json.dumps(setting | {"threads": args.threads} | figures), flush=True)


if __name__ == "__main__":
    main()
