"""The choice of experts, against a sort of each row by itself."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.testing import NAN, cases, normal, pair

INFINITY = float("inf")


@pytest.mark.parametrize(("name", "dtype"), cases("route"))
@pytest.mark.parametrize("renormalize", [False, True])
def test_route(name: str, dtype: torch.dtype, renormalize: bool) -> None:
    ours, _ = pair("route", name)
    for tokens, experts, top_k in ((0, 4, 2), (1, 1, 1), (3, 8, 2), (65, 60, 4), (5, 130, 130)):
        logits = (3 * normal((tokens, experts), torch.float32)).to(dtype)
        weights, ids = ours.run(logits, top_k, renormalize)
        assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
        assert weights.shape == ids.shape == (tokens, top_k)
        probabilities = logits.double().softmax(-1)
        for row, chosen, weight in zip(probabilities, ids.tolist(), weights.double(), strict=True):
            ranked = sorted(range(experts), key=lambda e: (-float(row[e]), e))
            assert chosen == ranked[:top_k]
            expected = row[chosen] / (row[chosen].sum() if renormalize else 1)
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("name", "dtype"), cases("route"))
def test_of_equals_the_lower_id_first(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [0.0] * 6, [-1.0, -0.0, 0.0, -0.0, -1.0, -1.0]], dtype=dtype)
    _, ids = pair("route", name)[0].run(logits, 4, True)
    assert ids.tolist() == [[1, 3, 5, 0], [0, 1, 2, 3], [1, 2, 3, 0]]


@pytest.mark.parametrize(("name", "dtype"), cases("route"))
@pytest.mark.parametrize("renormalize", [False, True])
def test_rows_that_are_no_numbers(name: str, dtype: torch.dtype, renormalize: bool) -> None:
    """Ids index weights, so they are distinct experts whatever the logits are."""
    rows = [[NAN] * 20, [1.0] * 19 + [NAN], [NAN] + [1.0] * 19, [INFINITY] * 20, [-INFINITY] * 20]
    weights, ids = pair("route", name)[0].run(
        torch.tensor([*rows, [-INFINITY] * 18 + [2.0, 3.0]], dtype=dtype), 3, renormalize
    )
    assert weights[:5].isnan().all()
    assert all(len({*row}) == 3 and 0 <= min(row) <= max(row) < 20 for row in ids.tolist())
    assert ids[5].tolist() == [19, 18, 0]
    torch.testing.assert_close(weights[5], torch.tensor([2.0, 1.0, -INFINITY]).softmax(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted({name for name, _ in cases("route")}))
def test_more_experts_than_there_are(name: str) -> None:
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"to {top_k} of 4 experts"):
            pair("route", name)[0].run(torch.ones(2, 4), top_k, False)
