"""Acceptance heads from files: both layouts are the formula, and a file that does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

from quire.engine.errors import EngineStartError
from quire.engine.spec.acceptance import AcceptanceHead, head_path, load_head
from quire.engine.spec.confidence import Confidence, Drawn

D = 8
CPU = torch.device("cpu")


def tensors(depth: int, block: str = "blocks.{}", out: str = "out", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{block.format(i)}.": (D, D) for i in range(depth)} | {f"{out}.": (2, D)}
    return {
        name + kind: torch.randn(shape if kind == "weight" else shape[:1], generator=generator)
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
    }


def write(path: Path, values: dict[str, Tensor], **metadata: str) -> Path:
    save_file(values, head_path(path), {"format": "pt"} | metadata)
    return head_path(path)


def load(path: Path, hidden: int = D) -> AcceptanceHead:
    head = load_head(path, hidden, torch.float32, CPU)
    assert isinstance(head, AcceptanceHead)
    return head


def formula(values: dict[str, Tensor], blocks: list[str], out: str, x: Tensor) -> Tensor:
    for name in blocks:
        x = x + silu(x @ values[f"{name}.weight"].T + values[f"{name}.bias"])
    logits = x @ values[f"{out}.weight"].T + values[f"{out}.bias"]
    return logits.exp()[:, 1] / logits.exp().sum(-1)


X = torch.randn(5, D, generator=torch.Generator().manual_seed(9))
SEEN = Drawn(X, torch.empty(0), torch.empty(0), torch.empty(0))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_blocks_of_their_own(depth: int, tmp_path: Path) -> None:
    values = tensors(depth)
    head = load(write(tmp_path, values, depth=str(depth), threshold="0.35"))
    assert head.threshold == 0.35
    expected = formula(values, [f"blocks.{i}" for i in range(depth)], "out", X)
    torch.testing.assert_close(head.acceptance(SEEN), expected)


@pytest.mark.parametrize("stored", [1, 3])
def test_the_published_layout_repeats_one_block(stored: int, tmp_path: Path) -> None:
    """Its three blocks are one module; writers of safetensors store it once, or as often as it is named."""
    values = tensors(1, "model.{}.linear", "model.3")
    for i in range(1, stored):
        values |= {f"model.{i}.linear.{kind}": values[f"model.0.linear.{kind}"].clone() for kind in ("weight", "bias")}
    head = load(write(tmp_path, values))
    assert len(head.blocks) == 3
    assert head.threshold == 0.7
    torch.testing.assert_close(head.acceptance(SEEN), formula(values, ["model.0.linear"] * 3, "model.3", X))


def test_a_shared_block_of_our_own(tmp_path: Path) -> None:
    values = tensors(1)
    head = load(write(tmp_path, values, depth="3"))
    torch.testing.assert_close(head.acceptance(SEEN), formula(values, ["blocks.0"] * 3, "out", X))
    assert not torch.allclose(head.acceptance(SEEN), formula(values, ["blocks.0"], "out", X))


def refusal(path: Path, hidden: int = D) -> str:
    with pytest.raises(EngineStartError) as caught:
        load_head(path, hidden, torch.float32, CPU)
    return str(caught.value)


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = tensors(2)
    path = write(tmp_path, values)
    assert "blocks.0.weight has shape [8, 8], the draft model's hidden size asks for [16, 16]" in refusal(path, 16)
    path = write(tmp_path, {name: value for name, value in values.items() if name != "blocks.1.bias"})
    assert "blocks.1.bias is missing" in refusal(path)
    path = write(tmp_path, {name: value for name, value in values.items() if not name.startswith("out")})
    assert "one last linear" in refusal(path)
    path = write(tmp_path, values | {"extra": torch.zeros(1)})
    assert "extra belongs to no acceptance head of 2 blocks" in refusal(path)
    path = write(tmp_path, values, depth="three")
    assert "depth = 'three'" in refusal(path)
    path = write(tmp_path, values, depth="9999")
    assert "at most 64" in refusal(path)
    path = write(tmp_path, values, depth="4")
    assert "blocks.2.weight is missing" in refusal(path)
    for threshold in ("1.5", "nan", "high"):
        assert f"threshold = '{threshold}'" in refusal(write(tmp_path, values, threshold=threshold))
    path.write_bytes(b"no head")
    assert "not a whole safetensors file" in refusal(path)
    assert "not a whole safetensors file" in refusal(tmp_path / "nowhere")


def units(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden.weight": (count, 6), "hidden.bias": (count,), "out.weight": (1, count), "out.bias": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_what_is_known_at_once(tmp_path: Path) -> None:
    values = units()
    head = load_head(write(tmp_path, values), D, torch.bfloat16, CPU)
    assert isinstance(head, Confidence)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    logits[1, 3] = -torch.inf  # may not be drawn
    tokens, temperatures = torch.tensor([1, 2, 8, 0]), torch.tensor([0.0, 1.0, 0.5, 1.0])
    expected = []
    for row, token, temperature in zip(logits, tokens, temperatures, strict=True):
        q = row.softmax(-1)
        first, second = q.sort(descending=True).values[:2]
        entropy = -sum(x * x.log() for x in q if x > 0)
        f = torch.stack([q[token].log(), first.log(), second.log(), entropy, q[token], temperature])
        x = values["hidden.weight"] @ f + values["hidden.bias"]
        expected.append((values["out.weight"][0] @ silu(x) + values["out.bias"][0]).sigmoid())
    drawn = Drawn(torch.empty(0), logits, tokens, temperatures)
    torch.testing.assert_close(head.acceptance(drawn), torch.stack(expected))
    assert head.least(0.4) == 0.4


def test_a_head_of_hidden_states_keeps_its_threshold(tmp_path: Path) -> None:
    head = load(write(tmp_path, tensors(1), threshold="0.35"))
    assert head.least(0.1) == head.least(0.9) == 0.65


def test_heads_of_units_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = units()
    path = write(tmp_path, values | {"hidden.weight": torch.zeros(3, 5)})
    assert "hidden.weight has shape [3, 5], a head of 2 units has [2, 6]" in refusal(path)
    path = write(tmp_path, {name: value for name, value in values.items() if name != "out.bias"})
    assert "out.bias is missing" in refusal(path)
    path = write(tmp_path, values | {"blocks.0.weight": torch.zeros(2, 2)})
    assert "blocks.0.weight belongs to no head" in refusal(path)
    assert "2000 units; at most 1024" in refusal(write(tmp_path, units(2000)))
    assert "hidden.weight has shape []" in refusal(write(tmp_path, values | {"hidden.weight": torch.zeros(())}))
