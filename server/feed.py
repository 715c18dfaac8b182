"""The engine's steps for those who watch: frames of what happened since the last one, as `/steps` sends them.

    engine ──StepOutputs──▶ Feed.saw ──▶ steps ──tick──▶ frame ──▶ each Watcher's slots ──▶ its connection

Nothing is kept, computed or asked of the engine while nobody watches. A frame is made once for all watchers; one that
reads too slowly misses frames, and is told how many. No prompt, no answer and no id of a request is in one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ..engine.messages import Holding, StepOutputs, StepStats
from . import errors, sse
from .dispatcher import Dispatcher
from .quantiles import Window, quantile
from .state import State
from .tally import TallyHistogram

MAX_WATCHERS = 16  # a team's screens; each costs a write per frame
FRAME_SECONDS = 0.1  # what an eye takes for motion
QUIET_SECONDS = 1.0  # between frames where nothing happens, as between an idle engine's own signs of life
LEASE_SECONDS = 3.0  # for which the engine is asked to tell more; renewed while anybody watches
STEPS_PER_FRAME = 128  # of the latest; a small model on a GPU makes 100 in the time of a frame
FRAMES_BEHIND = 4  # that wait for one watcher
WINDOW_SECONDS = 30.0  # of percentiles
MAX_TENANTS = 12  # shown by themselves, the largest; the rest are one line

TOTALS = (
    "steps_total", "requests_total", "prompt_tokens_total", "generated_tokens_total", "prefix_query_tokens_total",
    "prefix_hit_tokens_total", "preemptions_total", "evicted_blocks_total", "expired_total", "aborted_total",
    "failed_total", "draft_tokens_total", "accepted_tokens_total", "drafted_by_position", "accepted_by_position",
)  # fmt: skip
NOW = (
    "running", "waiting", "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "queue_seconds", "step_time_error",
)  # fmt: skip


class Watcher:
    """Whoever reads frames, from `Feed.watch` to `close`. sees_names: tenants are told by name."""

    def __init__(self, feed: Feed, sees_names: bool) -> None:
        self.sees_names = sees_names
        self._feed = feed
        self._frames: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._missed = 0
        self._over = False

    def offer(self, frame: bytes) -> None:
        if len(self._frames) >= FRAMES_BEHIND:
            self._frames.popleft()
            self._missed += 1
        self._frames.append(frame)
        self._news.set()

    def end(self) -> None:
        self._over = True
        self._news.set()

    async def frames(self) -> AsyncGenerator[bytes]:
        """As they come, until the server stops; a comment tells how many were missed."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._frames:
                if self._missed:
                    yield b": missed %d\n\n" % self._missed
                    self._missed = 0
                yield self._frames.popleft()
            if self._over:
                return

    def close(self) -> None:
        self._feed.leave(self)


class Feed:
    """Event loop only. It is there before the engine is: `shows` tells it of what serves."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._state: State | None = None
        self._watchers: list[Watcher] = []
        self._steps: deque[list[float]] = deque(maxlen=STEPS_PER_FRAME)
        self._tenants: list[Holding] = []
        self._blocks: dict[str, int] = {}
        self._windows = {name: Window(WINDOW_SECONDS, 1.0) for name in ("ttft", "itl", "contention")}
        self._work: asyncio.Task[None] | None = None
        self._closed = False

    def shows(self, state: State) -> None:
        self._state = state
        self._dispatcher.on_watched = self.saw

    def watch(self, *, sees_names: bool) -> Watcher:
        """Raises 503 where as many watch as may."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise errors.too_many_watchers(MAX_WATCHERS)
        watcher = Watcher(self, sees_names)
        watcher.offer(sse.event({**self.frame(sees_names=sees_names), "steps": []}))  # others have been sent those
        self._watchers.append(watcher)
        if self._closed:
            watcher.end()
        elif self._work is None:
            self._work = asyncio.create_task(self._send_frames())
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """The last one to leave puts out the light."""
        self._watchers.remove(watcher)
        if not self._watchers and self._work is not None:
            self._work.cancel()
            self._work = None
            self._steps.clear()
            for window in self._windows.values():
                window.clear()

    def close(self) -> None:
        """The server stops: nobody is to wait for those who watch."""
        self._closed = True
        for watcher in self._watchers:
            watcher.end()

    def saw(self, message: StepOutputs) -> None:
        """More than figures: the engine has been asked for it."""
        stats, batch, holdings = message.stats, message.batch, message.holdings
        if holdings is not None:
            self._tenants = holdings.tenants
            self._blocks = {
                "shared": holdings.shared_blocks,
                "whole": holdings.whole_blocks,
                "open": holdings.open_blocks,
                "cached": stats.kv_blocks_cached,
                "empty": stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached,
            }
        if batch is not None:
            counts = (batch.decodes, batch.packed_prompts, batch.packed_tokens, batch.chunk_prompts)
            more = (batch.chunk_tokens, batch.drafted, batch.accepted, stats.launched_tokens - stats.step_tokens)
            times = (batch.seconds, stats.predicted_seconds, stats.schedule_seconds, stats.draft_seconds)
            self._steps.append([*counts, *more, *(round(1e3 * seconds, 3) for seconds in times)])

    def frame(self, *, sees_names: bool) -> dict[str, Any]:
        """Everything of now, and the steps since the last frame: see server/README.md."""
        frame: dict[str, Any] = {"life": self._life(), "steps": list(self._steps)}
        if self._state is None:
            return frame
        metrics = self._state.metrics
        stats = metrics.stats
        return {
            **frame,
            "now": {name: getattr(stats, name) for name in NOW},
            "totals": {name: getattr(stats, name) for name in TOTALS},
            "latency": {
                "ttft": self._spread("ttft", metrics.time_to_first_token),
                "itl": self._spread("itl", metrics.inter_token_latency),
                "contention": self._spread("contention", metrics.contention_factor),
            },
            "blocks": self._blocks,
            "tenants": told_tenants(self._tenants, sees_names=sees_names),
        }

    def _life(self) -> dict[str, Any]:
        life = self._dispatcher.life
        state = life.trouble() or "serving"
        if state == "serving" and self._state is not None and self._state.admission.draining:
            state = "draining"
        told: dict[str, Any] = {"state": state, "restarts": life.restarts.total()}
        if life.progress is not None:
            told |= {"phase": life.progress.phase, "done": life.progress.done}
        return told

    def _spread(self, name: str, histogram: TallyHistogram) -> dict[str, Any]:
        counts = self._windows[name].since(time.monotonic(), histogram.counts)
        return {
            **{f"p{percent}": quantile(histogram.bounds, counts, percent / 100) for percent in (50, 90, 99)},
            "bounds": histogram.bounds,
            "counts": counts,
        }

    async def _send_frames(self) -> None:
        """Runs while anybody watches."""
        leased = sent = -math.inf
        life: dict[str, Any] = {}
        moves: tuple[int, ...] = ()
        while True:
            now, last_life, last_moves = time.monotonic(), life, moves
            life = self._life()
            moves = () if self._state is None else _moves(self._state.metrics.stats)
            if life != last_life or now - leased >= LEASE_SECONDS / 3:  # another engine has yet to be asked
                leased = now
                self._dispatcher.watch(LEASE_SECONDS)
            if self._steps or (life, moves) != (last_life, last_moves) or now - sent >= QUIET_SECONDS:
                sent = now
                self._send()
            await asyncio.sleep(FRAME_SECONDS)

    def _send(self) -> None:
        made: dict[bool, bytes] = {}
        for watcher in self._watchers:
            if watcher.sees_names not in made:
                made[watcher.sees_names] = sse.event(self.frame(sees_names=watcher.sees_names))
            watcher.offer(made[watcher.sees_names])
        self._steps.clear()


def told_tenants(tenants: Sequence[Holding], *, sees_names: bool) -> list[dict[str, Any]]:
    """The largest by themselves, the others together; by number where names are not for who asks."""
    ordered = sorted(tenants, key=lambda tenant: (-tenant.running - tenant.waiting, tenant.tenant))
    told = [
        {
            "tenant": tenant.tenant if sees_names else f"tenant {number}",
            "waiting": tenant.waiting,
            "running": tenant.running,
            "blocks": tenant.blocks,
        }
        for number, tenant in enumerate(ordered[:MAX_TENANTS], start=1)
    ]
    rest = ordered[MAX_TENANTS:]
    if rest:
        sums = {name: sum(getattr(tenant, name) for tenant in rest) for name in ("waiting", "running", "blocks")}
        told.append({"tenant": f"{len(rest)} others", **sums})
    return told


def _moves(stats: StepStats) -> tuple[int, ...]:
    return stats.steps_total, stats.requests_total, stats.running, stats.waiting
