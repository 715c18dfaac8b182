"""Times of GPU work, and the limits of this very card that they are held against.

A kernel of ten microseconds is shorter than its launch from Python, so calls are captured in a CUDA graph and replayed,
as the engine runs them. Buffers are rotated until they exceed the L2 cache several times: weights and pages come from
memory in serving, so they must here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .gpu_isolation import is_fatal

Result = TypeVar("Result")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter for tests of what surrounds the timing

REPLAYS = 20  # of which the median is taken
TIMED_SECONDS = 0.4  # for one figure, so that clocks settle and a table takes minutes
L2_TIMES = 3  # rotated buffers exceed the L2 cache so many times
MOST_COPIES = 64
_measures = True


@dataclass(frozen=True, slots=True)
class Timing:
    seconds: float  # of one call, median
    captured: bool  # in a CUDA graph; else with launches from Python, which short kernels do not hide


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)


def free_memory() -> int:
    """Bytes that can be had on the device."""
    return torch.cuda.mem_get_info()[0]


def only_compile() -> None:
    """From now on this process calls what it is given to time once, so that it is compiled, and measures nothing."""
    global _measures
    _measures = False


def copies_beyond_l2(nbytes: int) -> int:
    """How many buffers of `nbytes` must be gone through in turn, that none is found in the L2 cache."""
    if not _measures:
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_COPIES, -(-L2_TIMES * l2 // max(1, nbytes))))


def capture(call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """(what replays the call on the same memory, the result that each replay writes). Raises what capturing raises."""
    call()  # compiles, and fills what is kept between calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def time_calls(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> Timing:
    """Seconds of one call, as the median over replays of all of them one after the other."""

    if not _measures:
        calls[0]()
        torch.cuda.synchronize()
        return Timing(1.0, captured=True)

    def all_of_them() -> None:
        for call in calls:
            call()

    try:
        replay, _ = capture(all_of_them)
    except Exception as error:
        if is_fatal(str(error)) or "captur" not in str(error):
            raise
        torch.cuda.synchronize()
        return Timing(_median(all_of_them, replays) / len(calls), captured=False)
    return Timing(_median(replay, replays) / len(calls), captured=True)


def time_launched(call: Callable[[], Any], replays: int = REPLAYS) -> float:
    """Seconds of one call that is launched from Python: the device's time and whatever of the launches it waits for."""
    return _median(call, replays)


def _median(run: Callable[[], Any], replays: int) -> float:
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (len(times) < replays and sum(times) < TIMED_SECONDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured by torch's own kernels: bytes/s of a copy (read and written), FLOP/s (or integer op/s) of products."""

    copy: float
    bf16: float
    fp8: float | None = None
    int8: float | None = None
