"""The table of kernels: declared, registered, resolved, and every refusal said aloud."""

from __future__ import annotations

import pytest
import torch

from quire.kernels import Target, implementations, ops, registry, resolve
from quire.kernels.cpu.native import library

CPU = Target("cpu", torch.float32, 64, "fp32")
BEST = "native" if library.problem is None else "cpu"  # without a compiler torch's operators serve


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with one op of its own."""
    monkeypatch.setattr(registry, "_OPS", {})

    @registry.op
    def double(x: int) -> int:
        return 2 * x


def test_every_op_has_a_reference() -> None:
    assert {"attention", "linear", "rms_norm", "rope"} <= set(ops())
    for name in ops():
        assert implementations(name)["reference"].op == name


def test_preference_and_reasons() -> None:
    kernels = resolve(CPU)
    assert kernels.describe()["linear"] == BEST
    assert kernels.linear is implementations("linear")[BEST]
    assert kernels.reasons()["linear"]["reference"] == f"less preferred than {BEST}"


def test_a_refusal_is_explained() -> None:
    kernels = resolve(Target("cuda", torch.float32, 64, "fp32"))
    assert kernels.attention.name != "cpu"
    assert kernels.reasons()["attention"]["cpu"] == "runs on cpu, the target is cuda"
    assert "int4" in resolve(Target("cpu", torch.float32, 64, "int4")).reasons()["attention"]["cpu"]


def test_overrides() -> None:
    kernels = resolve(CPU, {"attention": "reference"})
    assert kernels.attention.name == "reference"
    assert kernels.reasons()["attention"]["cpu"] == "overridden by reference"
    assert kernels.linear.name == BEST


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"atention": "reference"}, r"unknown op 'atention'; choose from .*attention"),
        ({"attention": "cuda"}, r"no implementation 'cuda'; choose from reference, cpu"),
    ],
)
def test_bad_overrides(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(CPU, overrides)


def test_an_override_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be used: runs on cpu"):
        resolve(Target("cuda", torch.float32, 64, "fp32"), {"attention": "cpu"})


def test_the_table_is_frozen() -> None:
    kernels = resolve(CPU)
    with pytest.raises(AttributeError, match="never changed"):
        kernels.attention = kernels.linear  # type: ignore[misc]
    with pytest.raises(AttributeError, match="no op 'atention'"):
        _ = kernels.atention


@pytest.mark.usefixtures("toy")
def test_registration_checks() -> None:
    with pytest.raises(ValueError, match="signature"):
        registry.implements("double", "cpu", when=registry.always)(lambda y: 2 * y)
    with pytest.raises(ValueError, match="declared twice"):

        @registry.op
        def double(x: int) -> int:
            return x

    with pytest.raises(ValueError, match="no rank"):
        registry.implements("double", "fpga", when=registry.always)(lambda x: 2 * x)
    with pytest.raises(ValueError, match="prepare"):
        registry.implements("double", "cpu", when=registry.always, prepare=abs)(lambda x: 2 * x)
    registry.implements("double", "cpu", when=registry.always)(lambda x: x + x)
    with pytest.raises(ValueError, match="two implementations"):
        registry.implements("double", "cpu", when=registry.always)(lambda x: x + x)
    assert resolve(CPU).double.run(4) == 8
