"""The controller: how much is guessed for whom, and what it makes of how that fared."""

from __future__ import annotations

import itertools
import math

import pytest

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.drafts import DraftOrder, parse_shape
from quire.scheduler.params import SamplingParams, Speculative
from quire.scheduler.plan import DraftPass, RowResult
from quire.scheduler.request import Group, Request
from quire.scheduler.roster import Refused
from quire.scheduler.speculation import FREE_PROBES, Speculation, Wish, most_for
from quire.scheduler.step_time import StepCost, StepShape, StepTimeModel

FREE = StepCost(tile=64, base=1e-2, per_tile=1e-4, per_context=1e-8, per_pair=1e-9)  # rows cost next to nothing
BOUND = StepCost(tile=1, base=1e-4, per_tile=1e-3, per_context=1e-8, per_pair=1e-9)  # and here nothing else does
PARAMS = SamplingParams(max_tokens=200)


def controller(cost: StepCost, shape: str = "chain:4", *, method: str = "draft", adaptive: bool = True) -> Speculation:
    control = Speculation(config(shape, method, adaptive), StepTimeModel(cost))
    for name in ("draft", "ngram"):
        control.cost._times[name] = 2  # and cost nothing, as far as is known
    return control


def config(shape: str = "chain:4", method: str = "draft", adaptive: bool = True) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=400,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=1024,
        draft_method=method,
        draft_shape=parse_shape(shape, 0),
        adaptive_drafts=adaptive,
    )


def wish(rate: float, control: Speculation, shape: str = "chain:4", method: str = "draft") -> Wish:
    """A stream whose guesses were right so often, at every level that was reached."""
    group = Group("r", [1] * 50, PARAMS, 0, 250, 0.0)
    request = Request(group, 0, [1] * 50, (0.0, 0), PARAMS, 50)
    order = DraftOrder(method, parse_shape(shape, 0))
    control.learn(request, method, RowResult([0], draft_depth=1))
    assert request.trials is not None
    depth = len(request.trials.tried)
    request.trials.tried, request.trials.accepted = [1000.0] * depth, [1000 * rate] * depth  # of a long memory
    return Wish(request, order)


def choose(control: Speculation, wishes: list[Wish], tokens: int = 400, seconds: float = math.inf) -> list[int]:
    streams = len(wishes)
    return control.choose(wishes, StepShape(streams, 50 * streams), tokens, seconds)


def test_all_levels_where_rows_are_free_and_guesses_right():
    control = controller(FREE)
    assert choose(control, [wish(0.9, control)]) == [4]


def test_nothing_where_every_row_costs_what_a_token_costs():
    control = controller(BOUND)
    assert choose(control, [wish(0.9, control) for _ in range(32)]) == [0] * 32


def test_each_stream_has_its_own_depth():
    control = controller(StepCost(1, 1e-3, 5e-4, 0.0, 0.0))
    often, seldom = choose(control, [wish(0.95, control), wish(0.1, control)])
    assert often > seldom == 0


def test_nobody_guesses_whose_proposer_takes_too_long():
    control = controller(FREE)
    for _ in range(5):
        control.cost.guessed(DraftPass("draft", 4, 4, 4 * 0.02), 1)
    assert choose(control, [wish(0.9, control)]) == [0]
    assert choose(control, [wish(0.9, control, method="ngram")]) == [4], "another proposer is another matter"


def test_passes_are_shared_by_all_streams():
    """A level costs a proposer the same for one stream as for eight: it pays for eight."""
    control = controller(FREE)
    for streams in (1, 2, 1, 2, 1, 2):
        control.cost.guessed(DraftPass("draft", 4, 4 * streams, 4 * 0.012), streams)
    assert control.cost.of("draft").a == pytest.approx(0.012, rel=0.01)
    assert choose(control, [wish(0.9, control)]) == [0]
    assert min(choose(control, [wish(0.9, control) for _ in range(8)])) == 0
    control.cost.of("draft").a = 0.006
    assert min(choose(control, [wish(0.9, control) for _ in range(8)])) >= 1


def test_what_verifying_takes_beyond_the_model_is_learned():
    control = controller(FREE)
    wishes = [wish(0.4, control)]
    assert choose(control, wishes) == [4]
    for nodes in (1, 2, 3, 4) * 10:
        shape = StepShape(1, 50).guessing(49, nodes)
        control.observe(shape, nodes, FREE.seconds(shape) + 0.001 + 0.005 * nodes)
    assert control.cost.verifying.a == pytest.approx(0.001, rel=0.2)
    assert control.cost.verifying.b == pytest.approx(0.005, rel=0.05)
    assert choose(control, wishes) == [0]
    assert control._steps.cost == FREE, "steps with guesses say nothing of steps without"


def test_room_is_not_exceeded():
    control = controller(FREE)
    wishes = [wish(0.9, control) for _ in range(8)]
    assert sum(choose(control, wishes, tokens=5)) == 5
    assert sum(choose(control, wishes, tokens=0)) == 0
    tight = StepCost(1, 1e-2, 1e-4, 0.0, 0.0)
    control = controller(tight)
    wishes = [wish(0.9, control) for _ in range(8)]
    assert sum(choose(control, wishes, seconds=1e-2 + 8e-4 + 5.5e-4)) == 5
    assert choose(control, wishes, seconds=1e-3) == [0] * 8


def test_a_tree_is_ordered_by_whole_levels():
    control = controller(FREE, "rsd-s:3x4")
    wishes = [wish(0.9, control, "rsd-s:3x4")]
    assert choose(control, wishes) == [4]
    assert choose(control, wishes, tokens=8) == [2]


def test_not_adaptive_takes_all_that_there_is_room_for():
    control = controller(BOUND, adaptive=False)
    wishes = [wish(0.0, control) for _ in range(4)]
    assert choose(control, wishes) == [4] * 4
    assert sum(choose(control, wishes, tokens=9)) == 9


def test_a_method_recovers_by_probes_that_cost_a_small_share_of_the_time():
    control = controller(FREE)
    for _ in range(10):
        control.cost.guessed(DraftPass("draft", 4, 4, 0.008), 1)
    stream = wish(0.0, control)
    stream.request.trials = None
    for _ in range(1000):
        control.learn(stream.request, "draft", RowResult([0], draft_depth=4))
    assert stream.request.trials.tried[0] == pytest.approx(10)
    count = 0
    for _ in range(2000):
        if choose(control, [stream]) != [0]:
            count += 1
            control.learn(stream.request, "draft", RowResult([0], draft_depth=4))
    lost = count * 0.002  # each has one level
    assert 0 < lost <= 0.005 * 2000 * FREE.seconds(StepShape(1, 50)) + (FREE_PROBES + 1) * 0.002
    for _ in range(3000):
        if choose(control, [stream]) != [0]:
            control.learn(stream.request, "draft", RowResult([0] * 5, draft_depth=4))
    chosen = [choose(control, [stream])[0] for _ in range(20)]
    assert chosen.count(4) >= 19, "guesses are right again, and nobody found out"  # one may be the baseline's


def test_a_probe_that_has_to_wait_is_not_lost():
    control = controller(FREE)
    control.cost.of("draft").a = 0.002
    stream = wish(0.0, control)
    while choose(control, [stream]) == [0]:
        pass
    assert choose(control, [stream]) != [0]
    control.learn(stream.request, "draft", RowResult([0], draft_depth=4))
    assert choose(control, [stream]) == [0]


def test_a_step_without_guesses_now_and_then_keeps_it_known_what_that_takes():
    control = controller(FREE)
    chosen = [choose(control, [wish(0.9, control)])[0] for _ in range(400)]
    assert 2 <= chosen.count(0) <= 4


def test_one_stream_finds_out_what_a_method_costs():
    control = controller(FREE)
    control.cost._times.clear()
    wishes = [wish(0.9, control) for _ in range(3)] + [wish(0.9, control, method="ngram")]
    for _ in range(2):
        assert choose(control, wishes) == [4, 0, 0, 4]
        control.cost.guessed(DraftPass("draft", 4, 4, 0.001), 1)
        control.cost.guessed(DraftPass("ngram", 0, 0, 0.001), 1)
    assert choose(control, wishes) == [4, 4, 4, 4]


def test_a_full_house_is_not_asked_in_every_step():
    control = controller(BOUND)
    assert choose(control, [wish(0.1, control) for _ in range(32)]) == [0] * 32
    assert [control.rests() for _ in range(10)] == [True] * 8 + [False] * 2
    control = controller(FREE)
    choose(control, [wish(0.9, control)])
    assert not control.rests()


def test_one_request_learns_from_the_others_until_it_has_trials_of_its_own():
    control = controller(FREE)
    stranger = Request(Group("s", [1], PARAMS, 1, 300, 0.0), 0, [1] * 50, (0.0, 1), PARAMS, 1)
    known = wish(0.5, control).request
    for _ in range(300):
        control.learn(known, "draft", RowResult([0, 0], draft_depth=2))  # the first right, the second wrong
    (level, *deeper) = sorted(control._levels([Wish(stranger, DraftOrder("draft", parse_shape("chain:4", 0)))], 0.0))
    assert level[3] == pytest.approx(1.0, abs=0.03)
    assert all(other[3] < 0.05 for other in deeper)
    for _ in range(60):
        control.learn(stranger, "draft", RowResult([0], draft_depth=2))
    assert control._levels([Wish(stranger, DraftOrder("draft", parse_shape("chain:4", 0)))], 0.0)[0][3] < 0.35


def test_rows_without_guesses_teach_nothing():
    control = controller(FREE)
    stream = wish(0.5, control).request
    before = list(stream.trials.tried)
    control.learn(stream, "draft", RowResult([0]))
    assert stream.trials.tried == before


CASES = list(
    itertools.product([FREE, BOUND, StepCost(4, 2e-3, 2e-3, 0.0, 0.0), StepCost(1, 4e-3, 5e-4, 0, 0)], range(6))
)


@pytest.mark.parametrize(("cost", "case"), CASES)
def test_nearly_the_best_of_all_choices(cost: StepCost, case: int):
    """Against an exhaustive search over four streams, with and without a proposer that costs."""
    rates = [(0.9,) * 4, (0.1, 0.95, 0.5, 0.7), (0.3,) * 4, (0.8, 0.1, 0.1, 0.1), (0.6, 0.6, 0.9, 0.9), (0.05,) * 4][
        case
    ]
    control = controller(cost, "chain:3")
    control.cost.of("draft").a, control.cost.of("draft").b = 0.05 * cost.base, 0.02 * cost.base
    control.cost.verifying.a = 0.02 * cost.base
    wishes = [wish(rate, control, "chain:3") for rate in rates]
    shape = StepShape(4, 200)
    chances = [[0.0] + [level[3] for level in sorted(control._levels([w], 0.0), key=lambda l: l[1])] for w in wishes]

    def worth(depths: tuple[int, ...]) -> float:
        tokens = 4 + sum(sum(chance[: depth + 1]) for chance, depth in zip(chances, depths, strict=True))
        return tokens / control._seconds(depths, wishes, shape)

    best = max(map(worth, itertools.product(range(4), repeat=4)))
    chosen = tuple(control.choose(wishes, shape, 100, math.inf))
    assert worth((0, 0, 0, 0)) <= worth(chosen) * (1 + 1e-9)
    assert worth(chosen) >= 0.97 * best


@pytest.mark.parametrize(
    ("wished", "order"),
    [
        (Speculative(), DraftOrder("draft", parse_shape("rsd-s:2x3", 0))),
        (Speculative(num_tokens=2), DraftOrder("draft", parse_shape("rsd-s:2x2", 0))),
        (Speculative(method="draft", num_tokens=3), DraftOrder("draft", parse_shape("rsd-s:2x3", 0))),
        (Speculative(method="ngram"), DraftOrder("ngram", parse_shape("chain:3", 0))),
        (Speculative(method="none"), None),
        (Speculative(num_tokens=0), None),
    ],
)
def test_what_a_request_may_wish(wished: Speculative, order: DraftOrder | None):
    assert most_for(config("rsd-s:2x3"), wished) == order


@pytest.mark.parametrize(
    ("wished", "message"),
    [
        (Speculative(method="layers"), "'layers': this engine has none, ngram, draft"),
        (Speculative(num_tokens=5), "num_tokens is 5: this engine guesses 0 to 4"),
        (Speculative(num_tokens=-1), "num_tokens is -1"),
    ],
)
def test_what_the_engine_does_not_have_is_refused(wished: Speculative, message: str):
    with pytest.raises(Refused, match=message):
        most_for(config(), wished)


def test_an_engine_that_guesses_nothing_refuses_methods_and_numbers():
    plain = SchedulerConfig(num_blocks=9, block_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=16)
    assert most_for(plain, Speculative()) is most_for(plain, Speculative(method="none")) is None
    for wished in (Speculative(method="ngram"), Speculative(num_tokens=1)):
        with pytest.raises(Refused):
            most_for(plain, wished)


def test_what_another_guess_must_be_worth_follows_its_cost():
    """rate · seconds of a pass / acceptance of the next, in the step as it was chosen."""
    control = controller(FREE)
    stream = wish(0.8, control)
    floors = []
    for seconds in (0.0, 2e-4, 5e-4, 1e-3):
        control.cost.of("draft").a = seconds
        assert choose(control, [stream]) == [4]
        floors.append(control.go_on(stream, 1))
    tokens = 1 + 0.8 + 0.8**2 + 0.8**3 + 0.8**4
    rate, row = tokens / (1e-2 + 1e-4 + 4 * 1e-3), 1e-4 / 64
    assert floors[3] == pytest.approx(rate * (1e-3 + row) / 0.8, rel=0.01)
    assert floors == sorted(floors)
    assert floors[0] < 0.01, "what costs nothing may be worth next to nothing"
    assert control.go_on(stream, 4) == pytest.approx(rate * (1e-3 / 4 + row) / 0.8, rel=0.01), "a pass is shared"


def test_whole_shapes_are_asked_for_where_nothing_is_to_adapt():
    control = controller(FREE, adaptive=False)
    control.cost.of("draft").a = 1e-3
    stream = wish(0.8, control)
    assert choose(control, [stream]) == [4]
    assert control.go_on(stream, 1) == 0.0
