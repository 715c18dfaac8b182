"""Where the time of a step goes: the model's forward pass, and everything that the engine does around it.

    python -m quire.bench.step --model DIR --batch 1 8 --context 256 --steps 60

One JSON line per batch size, medians over decode steps in milliseconds. `overhead` is the step without the forward
pass: scheduling, gathering the batch, drawing tokens, updating, and encoding the step's message.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.messages import AddRequest, encoder
from ..scheduler.params import SamplingParams


class Stopwatch:
    """Adds up the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - started
            return result

        return timed


def measure(core: EngineCore, batch: int, context: int, steps: int) -> dict[str, float]:
    """Decode `steps` tokens of `batch` greedy sequences after prompts of `context` tokens."""
    rng = random.Random(batch)
    vocab = core.ready.vocab_size
    for i in range(batch):
        prompt = [rng.randrange(vocab) for _ in range(context)]
        params = SamplingParams(max_tokens=steps + 8 * batch, temperature=0.0, ignore_eos=True)
        core.handle(AddRequest(f"{batch}-{i}", prompt, params))
    forward, draw = Stopwatch(), Stopwatch()
    decoder, sampler = core.runner.decoder, core.runner.sampler
    originals = decoder.forward, decoder.logits_at, sampler.draw, sampler.finish
    decoder.forward, decoder.logits_at = forward.wrap(decoder.forward), forward.wrap(decoder.logits_at)  # type: ignore[method-assign]
    sampler.draw, sampler.finish = draw.wrap(sampler.draw), draw.wrap(sampler.finish)  # type: ignore[method-assign]
    rows: list[tuple[float, float, float, float]] = []
    while core.has_work:
        forward.seconds = draw.seconds = 0.0
        started = time.perf_counter()
        encoder.encode(core.outputs(core.step()))
        total = time.perf_counter() - started
        if core.stats.step_tokens == core.stats.step_seqs == batch:
            rows.append((total, forward.seconds, draw.seconds, core.stats.schedule_seconds))
    decoder.forward, decoder.logits_at, sampler.draw, sampler.finish = originals  # type: ignore[method-assign]
    total, model, sampling, scheduling = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
    overhead = 1e3 * statistics.median(row[0] - row[1] for row in rows)
    return {
        "batch": batch,
        "context": context,
        "steps": len(rows),
        "step_ms": round(total, 3),
        "forward_ms": round(model, 3),
        "overhead_ms": round(overhead, 3),
        "sampling_ms": round(sampling, 3),
        "scheduling_ms": round(scheduling, 3),
        "tokens_per_second": round(1e3 * batch / total, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kernels", nargs="*", default=[], metavar="OP=IMPLEMENTATION")
    args = parser.parse_args()
    kernels = dict(pair.split("=") for pair in args.kernels)
    core = EngineCore(EngineConfig(model=args.model, threads=args.threads, kernels=kernels, kv_cache_bytes=1 << 30))
    for batch in args.batch:
        print(json.dumps({"model": args.model} | measure(core, batch, args.context, args.steps)), flush=True)


if __name__ == "__main__":
    main()
