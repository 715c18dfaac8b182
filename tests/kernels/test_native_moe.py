"""Experts by matrix tiles: ragged shapes, few and many tokens of an expert, bits that batch-mates do not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import Target
from quire.kernels.cpu.native import library, tape
from quire.kernels.packed import stack_experts, weight_format
from quire.kernels.testing import NAN, assert_close, normal, pair

AMX = library.levels()[:1] == ["amx"]
pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
needs_tiles = pytest.mark.skipif(not AMX, reason="this processor has no matrix tiles (AMX)")

EXPERTS, WIDTH, HIDDEN, TOP_K = 5, 96, 160, 2
KINDS = ["moe", "moe_int8", "moe_int8-groups", "moe_int4"]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weights(kind: str, width: int = WIDTH, hidden: int = HIDDEN) -> tuple[str, Any, Any]:
    """The op of a kind, and its experts' gate_up and down."""
    op, _, groups = kind.partition("-")
    floats = (
        normal((EXPERTS, 2 * hidden, width), torch.float32) / width**0.5,
        normal((EXPERTS, width, hidden), torch.float32, 1) / hidden**0.5,
    )
    if op == "moe":
        return op, floats[0].bfloat16(), floats[1].bfloat16()
    form = weight_format(op.removeprefix("moe_"))
    group = 32 if groups or op == "moe_int4" else None
    gate_up, down = (stack_experts([form.quantize(w, group) for w in each]) for each in floats)
    return op, gate_up, down


def choices(rows: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Weights and ids; expert 1 is everybody's, so that it has a block of rows where others have few."""
    draw = torch.Generator().manual_seed(seed)
    others = torch.rand(rows, EXPERTS - 1, generator=draw).argsort(-1)[:, : TOP_K - 1]
    ids = torch.cat([others + (others >= 1), torch.ones(rows, 1, dtype=torch.int64)], dim=1)
    return torch.rand(rows, TOP_K, generator=draw), ids


def check(op: str, packed: list[Any], x: Tensor, activation: str) -> None:
    """Against the reference in fp32."""
    ours, oracle = pair(op, "native")
    routes = choices(len(x))
    exact = oracle.prepare(*(w.float() if isinstance(w, Tensor) else w for w in packed))
    result = ours.run(x, ours.prepare(*packed), *routes, activation)
    assert result.dtype == torch.bfloat16
    assert_close(result, oracle.run(x.float(), exact, *routes, activation), torch.bfloat16)


@needs_tiles
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_ragged_numbers_of_rows(kind: str, activation: str) -> None:
    op, *packed = weights(kind)
    for rows in (0, 1, 2, 3, 5, 15, 16, 17, 33, 70):
        check(op, packed, normal((rows, WIDTH), torch.bfloat16, rows), activation)


@needs_tiles
def test_sizes_that_no_tile_divides() -> None:
    op, *packed = weights("moe", 72, 50)
    for rows in (1, 40):
        check(op, packed, normal((rows, 200), torch.bfloat16)[:, :72], "silu")


@needs_tiles
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_others(kind: str) -> None:
    op, *packed = weights(kind)
    ours, _ = pair(op, "native")
    mine = ours.prepare(*packed)
    x, (shares, ids) = normal((300, WIDTH), torch.bfloat16), choices(300)
    together = ours.run(x, mine, shares, ids, "silu")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for some in (slice(0, 1), slice(7, 9), slice(20, 37), slice(100, 300), slice(299, None)):
            assert torch.equal(ours.run(x[some], mine, shares[some], ids[some], "silu"), together[some])


@needs_tiles
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind: str) -> None:
    op, *packed = weights(kind)
    ours, _ = pair(op, "native")
    x = normal((40, WIDTH), torch.bfloat16)
    x[11, 5] = NAN
    result = ours.run(x, ours.prepare(*packed), *choices(40), "silu")
    assert result.isnan().all(-1).nonzero().flatten().tolist() == [11]
    assert result.isnan().sum() == WIDTH


@needs_tiles
def test_experts_that_there_are_not() -> None:
    op, *packed = weights("moe")
    ours, _ = pair(op, "native")
    shares, ids = choices(20)
    for bad in (-1, EXPERTS, 2**40):
        ids[13, 0] = bad
        with pytest.raises(IndexError, match=f"are not all among the {EXPERTS}"):
            ours.run(normal((20, WIDTH), torch.bfloat16), ours.prepare(*packed), shares, ids, "silu")


@needs_tiles
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_tape_holds_the_router_and_the_experts(kind: str) -> None:
    """With more rows than a replay has, as steps are recorded."""
    op, *packed = weights(kind)
    ours, _ = pair(op, "native")
    mine = ours.prepare(*packed)
    route = pair("route", "native")[0].run
    logits, x = torch.zeros(48, EXPERTS, dtype=torch.bfloat16), torch.zeros(48, WIDTH, dtype=torch.bfloat16)
    recorded = tape.record(lambda: ours.run(x, mine, *route(logits, TOP_K, True), "silu"), 48)
    assert len(recorded) == 2
    for rows in (48, 1, 17, 0, 33):
        x[:rows], logits[:rows] = normal((rows, WIDTH), x.dtype, rows), normal((rows, EXPERTS), x.dtype, rows + 1)
        expected = ours.run(x[:rows].clone(), mine, *route(logits[:rows].clone(), TOP_K, True), "silu")
        assert torch.equal(recorded.replay(rows), expected)


def test_what_is_refused() -> None:
    for op in ("moe_int8", "moe_int4"):
        assert "the target in float32" in str(pair(op, "native")[0].when(Target("cpu", torch.float32, 64, "fp32")))


@needs_tiles
def test_groups_that_no_tile_has_are_the_reference_s(caplog: pytest.LogCaptureFixture) -> None:
    form = weight_format("int8")
    gate_up, down = (
        stack_experts([form.quantize(normal(shape, torch.float32), 8)] * 2) for shape in ((48, 40), (40, 24))
    )
    ours, oracle = pair("moe_int8", "native")
    packed = ours.prepare(gate_up, down)
    assert "multiplied by torch: its groups of 8 inputs" in caplog.text
    x, ids, shares = normal((3, 40), torch.bfloat16), torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
    assert torch.equal(
        ours.run(x, packed, shares, ids, "silu"), oracle.run(x, oracle.prepare(gate_up, down), shares, ids, "silu")
    )


@pytest.mark.usefixtures("level")
def test_vectors_for_fp32() -> None:
    """Every instruction set: the reference's results, and bits and NaN of a row that the others do not change."""
    _, *packed = weights("moe", 72, 50)
    gate_up, down = (w.float() for w in packed)
    ours, oracle = pair("moe", "native")
    mine = ours.prepare(gate_up, down)
    x, (shares, ids) = normal((75, 72), torch.float32), choices(75)
    together = ours.run(x, mine, shares, ids, "gelu")
    assert_close(together, oracle.run(x, oracle.prepare(gate_up, down), shares, ids, "gelu"), torch.float32)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for some in (slice(0, 0), slice(0, 1), slice(7, 9), slice(20, 37), slice(74, None)):
            assert torch.equal(ours.run(x[some], mine, shares[some], ids[some], "gelu"), together[some])
    x[11, 5] = NAN
    result = ours.run(x, mine, shares, ids, "gelu")
    assert result.isnan().all(-1).nonzero().flatten().tolist() == [11]
    assert result.isnan().sum() == 72
