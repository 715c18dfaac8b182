"""How many tokens to guess for whom, anew in every step.

    maximise   (tokens expected of all streams + prompt tokens of the step) / (predicted seconds of the step)

With one stream the rows of a verification are nearly free, and it pays to guess far ahead. In a full batch every row
costs what a prompt's token would, and guessing pays only for who is nearly always right. Nothing is always allowed, so
to guess never costs more than it is believed to bring; what is believed is learned from every step (`acceptance.py`,
`draft_cost.py`), and one per cent of the time is spent on finding out whether it still holds.

Choosing: levels of all streams in order of what they bring per second, each stream's own in their order, and of all
beginnings of that list the best. Levels that are passes of a proposer cost everybody, so the list is also tried with
fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .acceptance import METHOD_MEMORY, REQUEST_MEMORY, Trials, method_rates, survival
from .config import SchedulerConfig
from .draft_cost import DraftCost, levels_of, nodes_by_level, rows_by_level, rows_of
from .drafts import DraftOrder, chain
from .params import Speculative
from .plan import RowResult
from .request import Request
from .roster import Refused
from .step_time import StepShape, StepTimeModel

# Share of the time that is spent on guessing for who is believed not to be worth it: the bound on what is lost by it.
PROBES = 0.01

# Of so many steps with guesses one is taken without, so that it stays known what that takes. At two tokens a step
# more than without, it costs half a per cent.
BASELINE = 128


def most_for(config: SchedulerConfig, wish: Speculative) -> DraftOrder | None:
    """What may be guessed for a request at most; None = nothing. Raises Refused for what the engine does not have."""
    shape = config.draft_shape
    depth = 0 if shape is None else shape.depth
    methods = {"none": None} if shape is None else dict.fromkeys(["none", "ngram", config.draft_method])
    if wish.method is not None and wish.method not in methods:
        raise Refused(f"speculative method is {wish.method!r}: this engine has {', '.join(methods)}")
    if wish.num_tokens is not None and not 0 <= wish.num_tokens <= depth:
        raise Refused(f"speculative num_tokens is {wish.num_tokens}: this engine guesses 0 to {depth}")
    method = wish.method or config.draft_method
    count = depth if wish.num_tokens is None else wish.num_tokens
    if shape is None or method == "none" or not count:
        return None
    # Trees are shaped for the engine's own method; a look-up beside it goes one way.
    return DraftOrder(method, (shape if method == config.draft_method else chain(depth)).cut(count))


class Wish(NamedTuple):
    """A stream, and what may be guessed for it in this step at most."""

    request: Request
    most: DraftOrder


class _Level(NamedTuple):
    """One more level of one stream's guesses."""

    stream: int
    depth: int  # with it
    tokens: float  # expected of it
    nodes: int
    seconds: float  # but for tiles, and for passes of a proposer


class _Room(NamedTuple):
    """What all guesses of a step may add, and seconds that it may take with them."""

    tokens: int
    seconds: float


class Speculation:
    def __init__(self, config: SchedulerConfig, steps: StepTimeModel) -> None:
        self.cost = DraftCost()
        self._steps = steps
        self._adaptive = config.adaptive_drafts
        self._depth = config.draft_shape.depth if config.draft_shape is not None else 0
        self._methods: dict[str, Trials] = {}
        self._credit = 0.0  # seconds that may be spent on probes
        self._probes = 0
        self._guessed = 0  # steps with guesses since the last one without

    # ---------------------------------------------------------------- what was learned

    def learn(self, request: Request, method: str, got: RowResult) -> None:
        """How one row's guesses fared."""
        if got.draft_depth:
            for trials in (self._own(request), self._method(method)):
                trials.learn(len(got.token_ids) - 1, got.draft_depth)

    def observe(self, shape: StepShape, nodes: int, seconds: float) -> None:
        """A step of this shape, `nodes` guesses among its rows, took so long besides guessing."""
        if nodes:
            self.cost.verified(nodes, self._steps.cost.seconds(shape), seconds)
        else:
            self._steps.observe(shape, seconds)

    def _own(self, request: Request) -> Trials:
        if request.trials is None:
            request.trials = Trials(self._depth, REQUEST_MEMORY)
        return request.trials

    def _method(self, method: str) -> Trials:
        if method not in self._methods:
            self._methods[method] = Trials(self._depth, METHOD_MEMORY)
        return self._methods[method]

    # ---------------------------------------------------------------- how much to guess

    def choose(self, wishes: Sequence[Wish], shape: StepShape, tokens: int, seconds: float) -> list[int]:
        """Levels for each wish, for a step that has this shape without guesses.

        tokens: that guesses may add to it; seconds: that it may take in all, inf = no matter.
        """
        room = _Room(tokens, seconds)
        if not self._adaptive:
            return self._best(self._levels(wishes, shape, 0.0), wishes, shape, room, self._depth)[1]
        plain = self._steps.cost.seconds(shape)
        rate, chosen = shape.num_tokens / plain if plain else 0.0, [0] * len(wishes)
        levels = self._levels(wishes, shape, rate)
        deepest = 1
        while levels:
            better = self._best(levels, wishes, shape, room, deepest)
            if better[0] > rate:
                rate, chosen = better
            if deepest >= self._depth:
                break
            deepest = min(2 * deepest, self._depth)
        return self._find_out(chosen, wishes, shape, room)

    def _levels(self, wishes: Sequence[Wish], shape: StepShape, rate: float) -> list[_Level]:
        """What may be added, the best first. Left out is what brings fewer tokens per second than the step has anyway,
        `rate`, even if no tile and no pass were counted."""
        cost, verifying = self._steps.cost, self.cost.verifying
        beliefs = {most.method: method_rates(self._method(most.method)) for _, most in wishes}
        per_token = cost.per_tile / cost.tile
        found: list[tuple[float, _Level]] = []
        for i, (request, most) in enumerate(wishes):
            per_row = self.cost.of(most.method).b
            before = request.num_tokens + 0.0
            chances = survival(self._own(request), beliefs[most.method])
            steps = zip(chances, nodes_by_level(most), rows_by_level(most), strict=False)
            for depth, (chance, nodes, rows) in enumerate(steps, 1):
                taken = nodes * (verifying.b + cost.per_pair * (before + nodes / 2)) + rows * per_row
                if chance < rate * taken:
                    break
                before += nodes
                found.append((chance / (taken + nodes * per_token + 1e-12), _Level(i, depth, chance, nodes, taken)))
        found.sort(key=lambda item: item[0], reverse=True)
        return [level for _, level in found]

    def _best(
        self, levels: Sequence[_Level], wishes: Sequence[Wish], shape: StepShape, room: _Room, deepest: int
    ) -> tuple[float, list[int]]:
        """Tokens per second, and levels of each wish: the best beginning of `levels`, none of them below `deepest`.

        Not adaptive, all that there is room for.
        """
        cost, verifying = self._steps.cost, self.cost.verifying
        tile, per_tile = cost.tile, cost.per_tile
        base = cost.seconds(shape) - per_tile * -(-shape.num_tokens // tile) + verifying.a
        expected, rows, limit = float(shape.num_tokens), shape.num_tokens, shape.num_tokens + room.tokens
        passes = dict.fromkeys((most.method for _, most in wishes), 0)
        depths = [0] * len(wishes)
        taken: list[_Level] = []
        rate, count = 0.0, 0
        for level in levels:
            i, depth, tokens, nodes, seconds = level
            if depth > deepest or depths[i] != depth - 1 or rows + nodes > limit:
                continue
            method = wishes[i].most.method
            more = 0.0
            if (need := levels_of(wishes[i].most, depth)) > passes[method]:
                more = (need - passes[method]) * self.cost.of(method).a
            whole = base + seconds + more + per_tile * -(-(rows + nodes) // tile)
            if whole > room.seconds:
                continue
            base += seconds + more
            passes[method] = max(passes[method], need)
            rows += nodes
            expected += tokens
            depths[i] = depth
            taken.append(level)
            if expected > rate * whole or not self._adaptive:
                rate, count = expected / whole, len(taken)
        for level in reversed(taken[count:]):
            depths[level.stream] -= 1
        return rate, depths

    def _find_out(self, chosen: list[int], wishes: Sequence[Wish], shape: StepShape, room: _Room) -> list[int]:
        """What was chosen, unless it is time to see whether what is believed still holds: then once otherwise."""
        if any(chosen):
            self._guessed += 1
            if self._guessed > BASELINE:
                self._guessed = 0
                return [0] * len(chosen)
        else:
            self._guessed = 0
        idle = [i for i, depth in enumerate(chosen) if not depth]
        if not idle:
            return chosen
        before = self._seconds(chosen, wishes, shape)
        self._credit += PROBES * before
        i = idle[self._probes % len(idle)]
        probe = chosen.copy()
        probe[i] = wishes[i].most.shape.depth
        after = self._seconds(probe, wishes, shape)
        nodes = sum(wish.most.shape.cut(depth).nodes for wish, depth in zip(wishes, probe, strict=True))
        if after - before > self._credit or after > room.seconds or nodes > room.tokens:
            return chosen
        self._credit -= after - before
        self._probes += 1
        return probe

    def _seconds(self, chosen: Sequence[int], wishes: Sequence[Wish], shape: StepShape) -> float:
        """Of the step with these levels."""
        guessing: dict[str, tuple[int, int]] = {}
        nodes = 0
        for depth, (request, most) in zip(chosen, wishes, strict=True):
            if depth:
                count = most.shape.cut(depth).nodes
                shape = shape.guessing(request.num_tokens - 1, count)
                nodes += count
                levels, rows = guessing.get(most.method, (0, 0))
                guessing[most.method] = max(levels, levels_of(most, depth)), rows + rows_of(most, depth)
        seconds = self._steps.cost.seconds(shape)
        if nodes:
            seconds += self.cost.verifying.a + self.cost.verifying.b * nodes
        for method, (levels, rows) in guessing.items():
            terms = self.cost.of(method)
            seconds += terms.a * levels + terms.b * rows
        return seconds
