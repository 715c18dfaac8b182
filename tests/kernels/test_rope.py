"""Rotary embedding: rotations against the reference and complex numbers, tables against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.batch import KVSpec, allocate_layer
from quire.kernels.reference.rope import rope_table
from quire.kernels.testing import FORMATS, assert_close, cases, challengers, normal, pair

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
LONG = {"short_factor": [1.0 + i / 50 for i in range(16)], "long_factor": [1.0 + i / 4 for i in range(16)]}
SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 4.0}),
    ("dynamic", {"factor": 2.0}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 256}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16, "beta_slow": 2}),
    ("yarn", {"factor": 40.0, "original_max_position_embeddings": 256, "mscale": 0.7, "mscale_all_dim": 1.0}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.5, "truncate": False}),
    ("llama3", LLAMA3),
    ("longrope", {**LONG, "original_max_position_embeddings": 256}),
    ("longrope", {**LONG, "original_max_position_embeddings": 256, "factor": 8.0, "attention_factor": 1.1}),
]


@pytest.mark.parametrize(("kind", "parameters"), SCALINGS)
@pytest.mark.parametrize("length", [200, 1024, 1500])
def test_tables_equal_those_of_transformers(kind: str, parameters: dict[str, Any], length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=1024)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
    # the older spelling of the type, as in files written before transformers 5
    table = rope_table(32, length, 10000.0, {"type": kind, **parameters}, trained_positions=1024)
    torch.testing.assert_close(table, expected, rtol=0, atol=2e-4)  # angles of 1500 rad have 1e-4 of rounding


def test_the_plain_table() -> None:
    table = rope_table(8, 5, 100.0)
    angle = 3 * 100.0 ** (-2 * 2 / 8)  # position 3, angle 2 of 4
    torch.testing.assert_close(table[3, [2, 6]], torch.tensor([angle, angle - torch.pi / 2]).cos())


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "'spiral' is not known; supported are default, linear"),
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "needs original_max_position_embeddings"),
        ({**LLAMA3, "rope_type": "llama3", "high_freq_factor": None}, "lacks 'high_freq_factor'"),
        (
            {**LONG, "rope_type": "longrope", "original_max_position_embeddings": 8},
            "short_factor has 16 entries, half of rotary_dim 64",
        ),
    ],
)
def test_bad_scalings(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_table(64, 8, 1e4, scaling)


def test_an_odd_rotary_dim() -> None:
    with pytest.raises(ValueError, match="rotary_dim is 7"):
        rope_table(7, 8, 1e4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_multiplies_complex_numbers(interleaved: bool) -> None:
    table, positions = rope_table(16, 50, 1e3), torch.tensor([0, 7, 49])
    q = normal((3, 2, 16), torch.float32)
    turned, _ = pair("rope", "reference")[0].run(q, q, positions, table, interleaved)
    pairs = (lambda x: (x[..., ::2], x[..., 1::2])) if interleaved else (lambda x: x.chunk(2, dim=-1))
    cos, sin = table[positions, None].chunk(2, dim=-1)
    expected = torch.complex(*pairs(q)) * torch.complex(cos, sin)
    torch.testing.assert_close(torch.complex(*pairs(turned)), expected)


@pytest.mark.parametrize(("name", "dtype"), challengers("rope"))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 24])
@pytest.mark.parametrize("joined", [False, True])
def test_rope(name: str, dtype: torch.dtype, interleaved: bool, rotary_dim: int, joined: bool) -> None:
    ours, oracle = pair("rope", name)
    table = rope_table(rotary_dim, 100, 1e4)
    for rows in (0, 1, 65):
        positions = torch.arange(rows) * 37 % 100
        qkv = normal((rows, 10, 64), dtype)
        q, k, v = qkv[:, :6], qkv[:, 6:8], qkv[:, 8:].clone()
        if not joined:
            q, k = q.clone(), k.clone()
        expected_q, expected_k = oracle.run(q.clone(), k.clone(), positions, table, interleaved)
        turned_q, turned_k = ours.run(q, k, positions, table, interleaved)
        assert_close(turned_q, expected_q, dtype)
        assert_close(turned_k, expected_k, dtype)
        assert torch.equal(qkv[:, 8:], v)


@pytest.mark.parametrize(("name", "dtype"), cases("rope_kv_write"))
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_keys_are_written(name: str, dtype: torch.dtype, interleaved: bool) -> None:
    table, positions = rope_table(32, 100, 1e4), torch.tensor([3, 99, 0, 7, 7])
    qkv = normal((5, 10, 32), dtype)
    q, k, v = qkv[:, :6], qkv[:, 6:8], qkv[:, 8:]
    slots = torch.tensor([17, 4, 31, 8, 9])
    caches = [allocate_layer(KVSpec(8, 2, 32, FORMATS[dtype]), 4, "cpu") for _ in range(2)]
    turned_q, turned_k = pair("rope", "reference")[0].run(q.clone(), k.clone(), positions, table, interleaved)
    pair("kv_write", "reference")[0].run(turned_k, v, caches[0], slots)
    turned = pair("rope_kv_write", name)[0].run(q, k, v, positions, table, interleaved, caches[1], slots)
    assert_close(turned, turned_q, dtype)
    assert_close(caches[1].k, caches[0].k, dtype)
    assert torch.equal(caches[1].v, caches[0].v)


@given(shift=st.integers(0, 200), near=st.integers(0, 20), far=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_scores_depend_on_distance_alone(shift: int, near: int, far: int) -> None:
    table, x = rope_table(32, 256, 1e4), normal((2, 1, 32), torch.float32)

    def score(a: int, b: int) -> torch.Tensor:
        q, k = pair("rope", "reference")[0].run(x[:1], x[1:], torch.tensor([a]), table, False)
        return (q * pair("rope", "reference")[0].run(k, k, torch.tensor([b]), table, False)[0]).sum()

    # k is turned by a as well, in both, so only the difference b - 0 is left
    torch.testing.assert_close(score(near, far), score(near + shift, far), rtol=1e-4, atol=1e-4)
