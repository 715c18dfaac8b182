"""How many tokens to guess for whom, anew in every step.

    maximise   (tokens expected of all streams + prompt tokens of the step) / (predicted seconds of the step)

With one stream the rows of a verification are nearly free, and it pays to guess far ahead. In a full batch every row
costs what a prompt's token would, and guessing pays only for who is nearly always right. Nothing is always allowed, so
to guess never costs more than it is believed to bring; what is believed is learned from every step (`acceptance.py`,
`draft_cost.py`).

Probes find out whether it still holds: one level more for one stream than is believed to pay. What they lose, by what
is known after them, is half a per cent of the time at most; those that win cost nothing, and go on.

Choosing: levels of all streams in order of what they bring per second, each stream's own in their order, and of all
beginnings of that list the best. Levels that are passes of a proposer cost everybody, so the list is also tried with
fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .acceptance import BELIEF_WEIGHT, METHOD_MEMORY, REQUEST_MEMORY, Trials, method_rates
from .config import SchedulerConfig
from .draft_cost import DraftCost, nodes_by_level, num_passes, rows_by_level
from .drafts import DraftOrder, chain
from .params import Speculative
from .plan import DraftPass, RowResult
from .request import Request
from .roster import Refused
from .step_time import StepShape, StepTimeModel

# Share of the time that probes may lose: the next one waits until the loss of the last has become so little.
PROBES = 0.005

# So many are made before that bound holds: what is believed at first comes of steps that paid for memory and
# compilation, or of a machine that was busy with something else.
FREE_PROBES = 8

# Steps between probes at least, also between those that are free or win: what holds a machine up is over sooner or
# later, and free ones are not to be spent on it all at once.
PAUSE = 8

# Of so many steps with guesses one is taken without, so that it stays known what that takes. At two tokens a step
# more than without, it costs half a per cent.
BASELINE = 128

# The list of levels is tried down to these, and to its end.
DEPTHS = (1, 2, 4, 8, 16, 32)

# Deciding takes 2 to 8 µs a stream with three to eight levels. When it did not pay for anybody, it is asked again after
# so many steps for each stream: the answer of a full house rarely changes.
REST = 0.25


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


class _Probe(NamedTuple):
    """One level of guesses more for a stream than is believed to pay.

    depth  levels that are believed to
    shape  of the step with those of all streams
    rate   tokens per second of it
    """

    request: Request
    most: DraftOrder
    depth: int
    shape: StepShape
    rate: float


class _Room(NamedTuple):
    """What all guesses of a step may add, and seconds that it may take with them."""

    tokens: int
    seconds: float


# One more level of one stream's guesses: -(tokens per second by itself), its depth, the stream, tokens expected of it,
# nodes, and seconds but for tiles and passes. A step makes a hundred, so it is a bare tuple; in order, what brings most
# is first, and of one stream the upper level.
_Level = tuple[float, int, int, float, int, float]


# A level of all streams with one order: depth, nodes, how often guesses of such requests are right times its weight,
# seconds without context, seconds for each token of context, and seconds as a share of tiles.
_Row = tuple[int, int, float, float, float, float]


class Speculation:
    def __init__(self, config: SchedulerConfig, steps: StepTimeModel) -> None:
        self.cost = DraftCost()
        self._steps = steps
        self._adaptive = config.adaptive_drafts
        self._depth = config.draft_shape.depth if config.draft_shape is not None else 0
        self._methods: dict[str, Trials] = {}
        self._rate = 0.0  # tokens per second of the step that was chosen last, as far as is known
        self._debt = 0.0  # seconds lost by probes that have yet to be made up for
        self._probe: _Probe | None = None  # in the latest plan, or the one before: it may have to wait
        self._probes = 0
        self._since_probe = 0  # steps
        self._guessed = 0  # steps with guesses since the last one without
        self._rest = 0  # steps for which it was decided that nothing is guessed

    # ---------------------------------------------------------------- what was learned

    def learn(self, request: Request, method: str, got: RowResult) -> None:
        """How one row's guesses fared."""
        if self._probe is not None and self._probe.request is request:
            self._settle(self._probe, len(got.token_ids) - 1)
        if got.draft_depth:
            for trials in (self._own(request), self._method(method)):
                trials.learn(len(got.token_ids) - 1, got.draft_depth)

    def observe(self, shape: StepShape, nodes: int, seconds: float) -> None:
        """A step of this shape, `nodes` guesses among its rows, took so long besides guessing."""
        known = self._steps.cost
        if nodes:
            self.cost.verified(shape, nodes, seconds, known)
        else:
            self._steps.observe(shape, seconds)
            if self._steps.cost is not known:
                self.cost.judge_anew(self._steps.cost)

    def guessed(self, done: DraftPass, streams: int) -> None:
        """What a proposer did for so many streams. What it had to catch up with is lost with a probe."""
        seconds = self.cost.guessed(done, streams)
        probe = self._probe
        if probe is not None and probe.most.method == done.method and self._probes >= FREE_PROBES:
            self._debt += seconds

    def _settle(self, probe: _Probe, accepted: int) -> None:
        """Lost is what a probe cost, as is known now that it was made, less what its tokens would have taken without.

        What it won is not saved up: good times are not to pay for bad ones.
        """
        self._probe = None
        self._probes += 1
        self._since_probe = 0
        if self._probes > FREE_PROBES:
            cost, (method, most, _) = self._steps.cost, probe.most
            before, after = most.cut(probe.depth), most.cut(probe.depth + 1)
            more = probe.shape.guessing(probe.request.num_tokens - 1, after.nodes - before.nodes)
            seconds = cost.seconds(more) - cost.seconds(probe.shape) + self.cost.seconds([DraftOrder(method, after)])
            if probe.depth:
                seconds -= self.cost.seconds([DraftOrder(method, before)])
            self._debt = max(self._debt + seconds - max(accepted - probe.depth, 0) / probe.rate, 0.0)

    def _own(self, request: Request) -> Trials:
        if request.trials is None:
            request.trials = Trials(self._depth, REQUEST_MEMORY)
        return request.trials

    def _method(self, method: str) -> Trials:
        if method not in self._methods:
            self._methods[method] = Trials(self._depth, METHOD_MEMORY)
        return self._methods[method]

    # ---------------------------------------------------------------- how much to guess

    def rests(self) -> bool:
        """Whether nothing is guessed in the next step, as was decided in one before. Ask once a step."""
        self._rest -= self._rest > 0
        return self._rest > 0

    def choose(self, wishes: Sequence[Wish], shape: StepShape, tokens: int, seconds: float) -> list[int]:
        """Levels for each wish, for a step that has this shape without guesses.

        tokens: that guesses may add to it; seconds: that it may take in all, inf = no matter.
        """
        room = _Room(tokens, seconds)
        self._probe = None
        if not self._adaptive:
            return self._best(self._levels(wishes, 0.0), wishes, shape, room, self._depth, 0.0)[1]
        plain = self._steps.cost.seconds(shape)
        rate, chosen = shape.num_tokens / plain, [0] * len(wishes)
        levels = self._levels(wishes, rate)
        end = max((level[1] for level in levels), default=0)
        for deepest in (*(depth for depth in DEPTHS if depth < end), end):
            better = self._best(levels, wishes, shape, room, deepest, rate)
            if better[0] > rate:
                rate, chosen = better
        self._rate = rate
        if any(chosen):
            if self._forbear(chosen, wishes):
                return chosen
            self._guessed += 1
            if self._guessed > BASELINE:
                self._guessed = 0
                return [0] * len(chosen)
        else:
            self._guessed = 0
        self._rest = 0 if any(chosen) else 1 + int(REST * len(wishes))
        steps = max(self._rest, 1)
        due = not self._debt and self._since_probe >= PAUSE
        self._debt = max(self._debt - PROBES * plain * steps, 0.0)
        self._since_probe += steps
        probing = self._with_probe(chosen, wishes, shape, room, rate) if due else None
        if probing is None:
            return chosen
        self._rest = 0
        return probing

    def go_on(self, wish: Wish, streams: int) -> float:
        """How likely all guesses of a chain must be right for one more to pay, in the step that was chosen last.

        One more wins a token if it is right as well, and takes seconds that bring `_rate` tokens each otherwise: it
        pays while P(all so far) · P(the next) >= rate · seconds. What would be won behind it is left out: a chain that
        is in doubt rarely gets there. streams: those that share the passes of this method.
        """
        if not self._adaptive:
            return 0.0
        request, most = wish
        guessing, own = self.cost.of(most.method), self._own(request)
        seconds = guessing.a / streams + guessing.b + self.cost.verifying.b
        seconds += self._steps.cost.work_seconds(request.num_tokens, 1)
        belief = BELIEF_WEIGHT * method_rates(self._method(most.method))[0]
        return self._rate * seconds * (own.tried[0] + BELIEF_WEIGHT) / (own.accepted[0] + belief)

    def _forbear(self, chosen: list[int], wishes: Sequence[Wish]) -> bool:
        """Of a method whose cost is not known leave only one stream: it may be large. Whether any had to go."""
        tried: set[str] = set()
        forborne = False
        for i, (_, most) in enumerate(wishes):
            if chosen[i] and not self.cost.is_known(most.method):
                if most.method in tried:
                    chosen[i], forborne = 0, True
                tried.add(most.method)
        return forborne

    def _levels(self, wishes: Sequence[Wish], rate: float) -> list[_Level]:
        """What may be added, the best first. Left out is what brings fewer tokens per second than `rate`, even if no
        tile and no pass were counted."""
        tables: dict[DraftOrder, list[_Row]] = {}
        levels: list[_Level] = []
        for i, (request, most) in enumerate(wishes):
            table = tables.get(most)
            if table is None:
                table = tables[most] = self._table(most)
            own, context, chance = self._own(request), request.num_tokens, 1.0
            for row, accepted, tried in zip(table, own.accepted, own.tried, strict=False):
                depth, nodes, belief, fixed, per_context, tiles = row
                chance *= (accepted + belief) / (tried + BELIEF_WEIGHT)
                seconds = fixed + per_context * context
                if chance < rate * seconds:
                    break
                levels.append((-chance / (seconds + tiles), depth, i, chance, nodes, seconds))
        levels.sort()
        return levels

    def _table(self, most: DraftOrder) -> list[_Row]:
        """By level, what does not depend on the stream."""
        cost, per_node, per_row = self._steps.cost, self.cost.verifying.b, self.cost.of(most.method).b
        table: list[_Row] = []
        above = 0  # nodes
        for i, rate in enumerate(method_rates(self._method(most.method))[: most.shape.depth]):
            nodes, rows = nodes_by_level(most)[i], rows_by_level(most)[i]
            fixed = nodes * (per_node + cost.per_pair * (above + nodes / 2)) + rows * per_row
            tiles = nodes * (cost.per_tile / cost.tile + 1e-12)
            table.append((i + 1, nodes, BELIEF_WEIGHT * rate, fixed, nodes * cost.per_pair, tiles))
            above += nodes
        return table

    def _best(
        self,
        levels: Sequence[_Level],
        wishes: Sequence[Wish],
        shape: StepShape,
        room: _Room,
        deepest: int,
        least: float,
    ) -> tuple[float, list[int]]:
        """Tokens per second, and levels of each wish: the best beginning of `levels`, none of them below `deepest`.

        least: tokens per second without. What brings fewer than the best so far is worth no tile of its own, but may
        fill one up. Not adaptive, all is taken that there is room for.
        """
        cost = self._steps.cost
        tile, per_tile = cost.tile, cost.per_tile
        base = cost.seconds(shape) - per_tile * -(-shape.num_tokens // tile) + self.cost.verifying.a
        expected, rows, limit = float(shape.num_tokens), shape.num_tokens, shape.num_tokens + room.tokens
        methods = [most.method for _, most in wishes]
        per_pass = {method: self.cost.of(method).a for method in set(methods)}
        passes = dict.fromkeys(per_pass, 0)
        depths = [0] * len(wishes)
        taken: list[int] = []  # streams, once for each level
        adaptive, rate, count = self._adaptive, least, 0
        tiles = -(-rows // tile)
        for worth, depth, i, tokens, nodes, seconds in levels:
            if depth > deepest or depths[i] != depth - 1 or rows + nodes > limit:
                continue
            method = methods[i]
            new = num_passes(method, depth) - passes[method]
            if new > 0:
                seconds += new * per_pass[method]
            filled = -(-(rows + nodes) // tile)
            if filled > tiles and -worth < rate and adaptive:
                break
            whole = base + seconds + per_tile * filled
            if whole > room.seconds:
                continue
            if new > 0:
                passes[method] += new
            base += seconds
            rows, tiles = rows + nodes, filled
            expected += tokens
            depths[i] = depth
            taken.append(i)
            if expected > rate * whole or not adaptive:
                rate, count = expected / whole, len(taken)
        for i in taken[count:]:
            depths[i] -= 1
        return rate, depths

    def _with_probe(
        self, chosen: Sequence[int], wishes: Sequence[Wish], shape: StepShape, room: _Room, rate: float
    ) -> list[int] | None:
        """With one level more for one stream than is believed to pay, if there is room. rate: without it."""
        open_ones = [i for i, (_, most) in enumerate(wishes) if chosen[i] < most.shape.depth]
        if not open_ones:
            return None
        i = open_ones[self._probes % len(open_ones)]
        request, most = wishes[i]
        probing = list(chosen)
        probing[i] += 1
        nodes = sum(most.shape.cut(depth).nodes for depth, (_, most) in zip(probing, wishes, strict=True))
        if nodes > room.tokens or self._seconds(probing, wishes, shape) > room.seconds:
            return None
        self._probe = _Probe(request, most, chosen[i], self._with_guesses(chosen, wishes, shape), rate)
        return probing

    def _seconds(self, chosen: Sequence[int], wishes: Sequence[Wish], shape: StepShape) -> float:
        """Of the step with these levels."""
        orders = [
            DraftOrder(most.method, most.shape.cut(depth))
            for depth, (_, most) in zip(chosen, wishes, strict=True)
            if depth
        ]
        return self._steps.cost.seconds(self._with_guesses(chosen, wishes, shape)) + self.cost.seconds(orders)

    def _with_guesses(self, chosen: Sequence[int], wishes: Sequence[Wish], shape: StepShape) -> StepShape:
        for depth, (request, most) in zip(chosen, wishes, strict=True):
            if depth:
                shape = shape.guessing(request.num_tokens - 1, most.shape.cut(depth).nodes)
        return shape
