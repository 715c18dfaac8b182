"""Guesses in a plan: which rows have them, and what came of them.

    rows of a step ──most──▶ wishes ──Speculation.choose──▶ levels ──blocks left?──▶ rows with a draft
    rows as they ran, results ──▶ what was accepted, what it took ──▶ Speculation, StepTimeModel

Guesses come last into a step, and take only tokens, promised seconds and blocks that nobody else asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .config import Counters, SchedulerConfig
from .drafts import MAX_NODES, DraftOrder
from .plan import Row, RowResult, StepResult
from .request import Request
from .residency import Residency
from .speculation import Speculation, Wish
from .step_time import StepShape, StepTimeModel, shape_of


class Drafting:
    def __init__(self, config: SchedulerConfig, steps: StepTimeModel, residency: Residency, counters: Counters) -> None:
        self.speculation = Speculation(config, steps)
        self.is_on = False  # the latest plan has guesses, or would have if all its tokens were known
        self._config, self._residency, self._counters = config, residency, counters

    def add(self, rows: dict[Request, Row], seconds: float, *, ahead: bool) -> None:
        """Put guesses into `rows` for streams whose row is their last token, as far as they pay and there is room.

        seconds: that the step may take in all; ahead: it is planned while another is out, and has none whatever is
        wished: only `is_on` is noted.
        """
        self.is_on = False
        if self.speculation.rests():
            return
        wishes = [Wish(request, most) for request, row in rows.items() if (most := self._most(request, row))]
        if not wishes:
            return
        shape = step_shape(rows.values())
        tokens = self._config.max_num_batched_tokens - shape.num_tokens
        depths = self.speculation.choose(wishes, shape, tokens, seconds)
        guessing = Counter(wish.most.method for wish, depth in zip(wishes, depths, strict=True) if depth)
        for wish, depth in zip(wishes, depths, strict=True):
            request, most = wish
            while depth and not self._residency.has_room_ahead(request, most.shape.cut(depth).nodes):
                depth -= 1
            self.is_on = self.is_on or depth > 0
            if depth and ahead:
                continue
            self._counters.depths[depth] += 1
            if depth:
                go_on = self.speculation.go_on(wish, guessing[most.method])
                order = DraftOrder(most.method, most.shape.cut(depth), go_on)
                rows[request] = self._with_draft(request, rows[request], order)

    def learn(self, request: Request, order: DraftOrder, got: RowResult) -> None:
        """How the guesses of one row fared."""
        self.speculation.learn(request, order.method, got)
        if got.draft_error is not None:
            request.draft = None
            self._counters.draft_failures += 1

    def observe(self, ran: Sequence[Row], shape: StepShape, result: StepResult, seconds: float | None) -> None:
        """What a step of these rows took: in all, if that is known, and of that to guess."""
        orders = [row.draft for row in ran if row.draft]
        for done in result.drafting:
            self.speculation.guessed(done, sum(order.method == done.method for order in orders))
        if seconds is not None:
            nodes = sum(row.num_tokens - 1 for row in ran if row.draft)
            self.speculation.observe(shape, nodes, seconds - sum(done.seconds for done in result.drafting))

    def count(self, got: RowResult, drawn: int) -> int:
        """Count a row of which `drawn` tokens were taken; how many of them were guesses."""
        counters = self._counters
        accepted = min(drawn, len(got.token_ids) - 1) if got.drafted else 0
        for level in range(got.draft_depth):
            counters.drafted_at[level] += 1
            counters.accepted_at[level] += level < accepted
        counters.drafted += got.drafted
        counters.accepted += accepted
        return accepted

    def _most(self, request: Request, row: Row) -> DraftOrder | None:
        """What may be guessed behind this row at most: what is accepted, and one token more, may not pass its length,
        and its blocks have to have room for all nodes."""
        if request.draft is None or row.num_tokens > 1 or not request.num_output or not row.samples:
            return None
        method, shape, _ = request.draft
        left = request.group.max_len - request.num_tokens - 1
        if left >= MAX_NODES:
            return request.draft
        shape = shape.cut(max(left, 0))
        while request.num_tokens + shape.nodes > self._config.max_model_len:
            shape = shape.cut(shape.depth - 1)
        return DraftOrder(method, shape) if shape.depth else None

    def _with_draft(self, request: Request, row: Row, order: DraftOrder) -> Row:
        nodes = order.shape.nodes
        new = row.new_block_ids + self._residency.grow_ahead(request, nodes)
        return row._replace(num_tokens=1 + nodes, new_block_ids=new, draft=order)


def step_shape(rows: Iterable[Row]) -> StepShape:
    """Of a step with these rows."""
    shape = shape_of((row.start, 1 if row.draft else row.num_tokens) for row in rows)
    for row in rows:
        if row.draft:
            shape = shape.guessing(row.start, row.num_tokens - 1)
    return shape


def as_run(rows: Sequence[Row], results: Sequence[RowResult]) -> list[Row]:
    """The rows as they were run: often fewer tokens were guessed than there was room for."""
    return [
        row._replace(num_tokens=1 + got.drafted) if row.draft else row for row, got in zip(rows, results, strict=True)
    ]
