"""Ten times the load that can be served: as many good tokens as at the peak, and a refusal for the rest."""

from __future__ import annotations

import math
from pathlib import Path

from ...engine.resolve import look_at_machine
from .. import overload
from ..client import ServerError
from .served import Served, SoakError
from .verdict import Row, none

CHECK = "overload"
LAG = "quire_event_loop_lag_seconds"
FACTOR = 10.0
SHARE = 0.95  # of the peak
# A core is left to the client and the front end: all threads of the engine wait for one whose core is taken, and
# refusals take it again and again. Of two threads on two cores they cost an eighth of the tokens (docs/tuning.md).
THREADS = max(1, look_at_machine("cpu").cores - 1)
# The queue is as long as the batch is wide: longer, and those who are let in wait for nothing that anybody gains by.
OPTIONS = (
    *("--threads", str(THREADS), "--max-num-seqs", "64", "--max-queued-requests", "64"),
    *("--log-level", "error"),
)


def check(folder: Path, *, model: str, seconds: float, rounds: int) -> list[Row]:
    """Trials of `seconds` each: the peak and ten times its load in turn, `rounds` times."""
    with Served(folder / CHECK, model, *OPTIONS) as served:
        try:
            result = overload.run(
                overload.OverloadConfig(url=served.url, seconds=seconds, factors=(FACTOR,), rounds=rounds)
            )
        except ServerError as error:
            raise SoakError(str(error)) from error
        metrics = served.metrics()
    trial = result["trials"][-1]
    share = trial["share_of_peak"]
    return [
        Row(
            CHECK,
            f"tokens/s at {FACTOR:g}x, of the peak's, median of {rounds}",
            f"{share:.1%} ({trial['tokens_per_second']:.0f} tok/s)",
            f"≥ {SHARE:.0%}",
            share >= SHARE,
        ),
        none(CHECK, "answers that are neither good nor a refusal", sum(trial["errors"].values())),
        Row(CHECK, "refused", f"{trial['refused']} of {trial['requests']}", "> 0", trial["refused"] > 0),
        *(
            Row(CHECK, what, "-" if math.isnan(trial[name]) else f"{1000 * trial[name]:.0f} ms")
            for what, name in (
                ("time of a refusal, median", "refused_p50"),
                ("time of a refusal, p99", "refused_p99"),
                ("first token of those let in, p99", "ttft_p99"),
            )
        ),
        *(
            Row(CHECK, f"looks at the event loop that came later than {bound * 1000:g} ms", _late(metrics, bound))
            for bound in (0.02, 0.05)
        ),
        none(CHECK, "engine restarts", metrics["quire_engine_restarts_total"]),
    ]


def _late(metrics: dict[str, float], seconds: float) -> str:
    in_time, looks = metrics[f'{LAG}_bucket{{le="{seconds:g}"}}'], metrics[f"{LAG}_count"]
    return f"{1 - in_time / looks:.2%} of {looks:.0f}"
