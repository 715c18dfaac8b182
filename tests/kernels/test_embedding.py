"""Rows by their numbers: embeddings of tokens, rows that are taken from others."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.testing import cases, device_of, normal, pair


@pytest.mark.parametrize(("name", "dtype"), cases("embed"))
@pytest.mark.parametrize("scale", [1.0, 7.4375])
def test_embed(name: str, dtype: torch.dtype, scale: float) -> None:
    ours, _ = pair("embed", name)
    table = normal((50, 131), dtype)
    for count in (0, 1, 3, 70):
        ids = torch.randint(50, (count,), generator=torch.Generator().manual_seed(count))
        rows = ours.run(ids, table, scale)
        assert rows.dtype == dtype
        assert torch.equal(rows, (table[ids].double() * scale).to(dtype))


@pytest.mark.parametrize(("name", "dtype"), cases("take_rows"))
def test_take_rows(name: str, dtype: torch.dtype) -> None:
    ours, _ = pair("take_rows", name)
    x = normal((9, 100), dtype)
    for rows in ([], [8], [0, 8, 3, 3]):
        taken = ours.run(x, torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(taken, x[rows])
        taken.zero_()
    assert x.all(), "rows were not copied"


@pytest.mark.parametrize("name", sorted({name for name, _ in cases("embed") if device_of(name) == "cpu"}))
def test_ids_that_the_table_lacks(name: str) -> None:
    for bad in (-1, 5, 2**40):
        ids = torch.tensor([0, 4, bad])
        with pytest.raises(IndexError, match=rf"ids .*{bad}.* are not all among the 5 embeddings"):
            pair("embed", name)[0].run(ids, torch.ones(5, 8), 1.0)
        with pytest.raises(IndexError, match=rf"rows .*{bad}.* are not all among the 5 rows"):
            pair("take_rows", name)[0].run(torch.ones(5, 8), ids)
