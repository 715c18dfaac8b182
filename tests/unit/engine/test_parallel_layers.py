"""Layers cut over ranks give what whole ones give, on every rank the same bits: families, formats, heads and sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.engine import ranks_on_threads
from unit.engine.test_quant_checkpoints import CASES, EXACT, LLAMA, MIXTRAL, PHI3, QWEN3_MOE
from unit.engine.test_quant_checkpoints import write as write_quantized
from unit.engine.test_quant_rounding import write

from quire.engine import parallel
from quire.engine.errors import EngineStartError, RankLost
from quire.engine.families import load_config
from quire.engine.kv_cache import kv_spec
from quire.engine.layout import iter_weights, model_weights, weight_bytes
from quire.engine.loader import load_decoder
from quire.engine.parallel import ALONE, Alone, Group
from quire.engine.quant.rounding import parse_quantization
from quire.engine.sharding import runs, share_of, sizes_that_fit
from quire.kernels import Target, resolve
from quire.kernels.batch import RaggedBatch, allocate_layer
from quire.kernels.packed import weight_formats

CPU = torch.device("cpu")
BASE = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 51}
QWEN2 = BASE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
GEMMA2 = BASE | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 32, "sliding_window": 5}
OLMO2 = BASE | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
QWEN2_MOE = BASE | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 70,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-biased": BASE | {"attention_bias": True, "mlp_bias": True},
    "llama-odd": BASE | {"intermediate_size": 75, "head_dim": 18},
    "one-kv-head": BASE | {"num_key_value_heads": 1},
    "qwen2-tied": QWEN2,
    "phi3-joint": PHI3,
    "gemma2": GEMMA2,
    "olmo2": OLMO2,
    "olmo2-one-kv-head": OLMO2 | {"num_key_value_heads": 1},
    "mixtral": MIXTRAL,
    "qwen2-moe": QWEN2_MOE,
    "qwen3-moe": QWEN3_MOE,
}
# Of 256 hidden units and inputs every rank of two has whole blocks of 128.
WIDE = BASE | {"hidden_size": 256, "intermediate_size": 384, "head_dim": 128, "num_key_value_heads": 2}
MOE = MIXTRAL | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TOLERANCE = 1e-4  # of fp32 sums in another order, relative to the largest logit
# The last bit of a sum may decide between two neighbours of fp8, 6 % apart: a model of one rank whose embeddings are
# changed by 1e-6 moves its largest logits by 2.5 % as well.
FP8_TOLERANCE = 5e-2


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Group]]:
    return {size: ranks_on_threads.groups(tmp_path_factory.mktemp("ranks"), size) for size in (2, 4)}


def logits_of(folder: Path, group: Alone = ALONE, rounding: str | None = None, kv: str = "fp32") -> Tensor:
    """Behind each token of one prompt."""
    config = load_config(folder)
    packing = None if rounding is None else parse_quantization(rounding)
    kernels = resolve(Target("cpu", torch.float32, config.head_dim, kv))
    turned = kv.startswith("int4")
    decoder = load_decoder(
        folder, config, kernels, torch.float32, CPU, rounding=packing, turn_values=turned, group=group
    )
    held = share_of(config, group.rank, group.size, packing).config
    cache = [allocate_layer(kv_spec(held, 16, kv), 2, CPU) for _ in range(config.num_layers)]
    ids = torch.tensor([(7 * i + 3) % config.vocab_size for i in range(11)])
    positions = torch.arange(len(ids))
    batch = RaggedBatch(
        input_ids=ids,
        positions=positions,
        slot_mapping=positions + 16,
        cu_q=torch.tensor([0, len(ids)], dtype=torch.int32),
        seq_lens=torch.tensor([len(ids)], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        tree_mask=None,
        logit_rows=positions,
        max_q=len(ids),
        max_seq_len=len(ids),
    )
    with torch.inference_mode():
        return decoder.logits_at(decoder.forward(batch, cache), positions)


def compare(folder: Path, ranks: list[Group], tolerance: float = TOLERANCE, **options: Any) -> None:
    whole = logits_of(folder, **options)
    first, *others = ranks_on_threads.together(len(ranks), lambda rank: logits_of(folder, ranks[rank], **options))
    assert torch.allclose(first, whole, atol=tolerance * whole.abs().max().item(), rtol=0)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, groups, tmp_path):
    write(tmp_path, FAMILIES[name])
    for size in (2, 4):
        compare(tmp_path, groups[size])


@pytest.mark.parametrize("layout", [0, 2])
def test_experts_stored_together_and_joint_matrices(layout, groups, tmp_path):
    write(tmp_path, QWEN2_MOE if layout else PHI3, layout=0 if not layout else -1)
    compare(tmp_path, groups[2])


@pytest.mark.parametrize("name", CASES)
def test_quantized_checkpoints(name, groups, tmp_path):
    write_quantized(tmp_path, name, WIDE)
    compare(tmp_path, groups[2], TOLERANCE if name in EXACT or name.startswith("int") else FP8_TOLERANCE)


@pytest.mark.parametrize("name", ["gptq", "awq", "pack-quantized-asymmetric", "gptq-act-order", "int-quantized"])
def test_quantized_joint_matrices_with_biases(name, groups, tmp_path):
    write_quantized(tmp_path, name, WIDE | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}, layout=0)
    compare(tmp_path, groups[2])


@pytest.mark.parametrize("name", ["gptq", "awq", "pack-quantized", "int-quantized-weights", "fp8-blocks"])
def test_quantized_experts(name, groups, tmp_path):
    write_quantized(tmp_path, name, MOE | {"head_dim": 128})
    compare(tmp_path, groups[2], TOLERANCE if name in EXACT or name.startswith("int") else FP8_TOLERANCE)


@pytest.mark.parametrize("wish", [*weight_formats(), "int4:32", "int8:64", "int4:0"])
def test_weights_that_are_rounded_while_they_are_loaded(wish, groups, tmp_path):
    write(tmp_path, WIDE)
    compare(tmp_path, groups[2], FP8_TOLERANCE if "fp8" in wish else TOLERANCE, rounding=wish)


@pytest.mark.parametrize("wish", ["int8", "int4:32"])
def test_experts_that_are_rounded(wish, groups, tmp_path):
    write(tmp_path, MOE)
    compare(tmp_path, groups[2], rounding=wish)


@pytest.mark.parametrize("kv", ["int4_per_token_head", "int8_per_token_head", "fp8_e4m3"])
def test_formats_of_the_cache(kv, groups, tmp_path):
    write(tmp_path, WIDE)
    compare(tmp_path, groups[2], kv=kv)


def test_a_sum_that_is_wrong_is_seen(groups, tmp_path, monkeypatch):
    """The comparison's negative control."""
    write(tmp_path, BASE)
    monkeypatch.setattr(parallel, "_added", lambda parts: parts[0])
    with pytest.raises(AssertionError):
        compare(tmp_path, groups[2])


# Exchanges


def test_large_sums_are_the_same_bits_in_two_steps(groups, monkeypatch):
    x = [torch.randn(12, 64, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in range(4)]

    def both(rank: int) -> tuple[Tensor, Tensor]:
        group = groups[4][rank]
        return group.sum(x[rank]), group.gather(x[rank])

    once = ranks_on_threads.together(4, both)
    monkeypatch.setattr(parallel, "TWO_STEPS_BYTES", 0)
    twice = ranks_on_threads.together(4, both)
    in_order = (((x[0].float() + x[1].float()) + x[2].float()) + x[3].float()).bfloat16()
    for total, _ in (*once, *twice):
        assert torch.equal(total, in_order)


def test_a_row_is_summed_alike_whatever_is_beside_it(groups):
    x = [torch.randn(40, 33, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    whole = ranks_on_threads.together(4, lambda rank: groups[4][rank].sum(x[rank]))[0]
    alone = ranks_on_threads.together(4, lambda rank: groups[4][rank].sum(x[rank][7:8]))[0]
    assert torch.equal(whole[7:8], alone)


def test_columns_of_unequal_ranks_are_joined(groups):
    sizes = [3, 2, 2, 1]
    whole = torch.arange(16.0).view(2, 8)
    parts = whole.split(sizes, 1)
    for joined in ranks_on_threads.together(4, lambda rank: groups[4][rank].join(parts[rank], sizes)):
        assert torch.equal(joined, whole)


def test_a_layer_that_fails_on_one_rank_ends_all(tmp_path):
    pair = ranks_on_threads.groups(tmp_path, 2)

    class Broken:
        rows = None

        def __call__(self, x, step):
            raise MemoryError("planted")

    with pytest.raises(RankLost, match="planted"):
        pair[0].summed(Broken())(torch.ones(1, 2), None)
    assert not issubclass(RankLost, Exception)  # no boundary of one request takes it for its own


# What is held


def test_runs_are_even_and_end_at_steps():
    assert runs(10, 4) == [(0, 3), (3, 5), (5, 8), (8, 10)]
    assert runs(11008, 4, 128) == [(0, 2816), (2816, 5504), (5504, 8320), (8320, 11008)]
    assert runs(51, 2, 8) == [(0, 32), (32, 51)]


def test_which_sizes_fit_heads():
    assert sizes_that_fit(32, 8) == [1, 2, 4, 8, 16, 32]
    assert sizes_that_fit(12, 3) == [1, 3, 6, 12]
    assert sizes_that_fit(6, 6) == [1, 2, 3, 6]


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_hold_everything_once(name, tmp_path):
    """But for what all of them hold: norms, routers, gates, and heads of keys that are fewer than ranks."""
    write(tmp_path, FAMILIES[name])
    config = load_config(tmp_path)
    for size in (2, 4):
        shares = [share_of(config, rank, size) for rank in range(size)]
        bytes_held = [weight_bytes(config, torch.float32, spans=share.spans) for share in shares]
        assert max(bytes_held) == bytes_held[0] < weight_bytes(config, torch.float32)
        for which in ("q", "ffn", "expert", "shared", "vocab"):
            spans = [getattr(share.spans, which) for share in shares]
            assert [first for first, _ in spans[1:]] == [last for _, last in spans[:-1]]
        for share in shares:
            assert share.config.num_heads * size == config.num_heads
            first_head = share.spans.q[0] // config.head_dim
            group = config.num_heads // config.num_kv_heads
            assert share.spans.kv[0] // config.head_dim == first_head // group


def test_only_the_part_is_read(groups, tmp_path, monkeypatch):
    write(tmp_path, BASE)
    config = load_config(tmp_path)
    spans = share_of(config, 1, 2).spans
    decoders = ranks_on_threads.together(2, lambda rank: _load(tmp_path, groups[2][rank]))
    whole, own = model_weights(config), model_weights(config, spans)
    assert len(decoders[1].embedding) == own.embedding.shape[0] < whole.embedding.shape[0]
    cut = [weight for weight in iter_weights(own) if any(part.cut for part in weight.layouts[-1])]
    assert len(cut) == 2 + 4 * config.num_layers


def _load(folder: Path, group: Group) -> Any:
    config = load_config(folder)
    kernels = resolve(Target("cpu", torch.float32, config.head_dim, "fp32"))
    return load_decoder(folder, config, kernels, torch.float32, CPU, group=group)


# What is refused


@pytest.mark.parametrize(
    ("config", "size", "rounding", "words"),
    [
        (BASE, 3, None, ("3", "4 heads of attention over 2", "choose 1, 2, 4")),
        (BASE | {"intermediate_size": 3}, 4, None, ("feed-forward of 3", "give at most 3")),
        (WIDE, 4, "int4", ("feed-forward of 384 in steps of 128", "give at most 3")),
        (MOE, 2, "w8a8", ("experts are in w8a8", "int8, int4 or fp8_block")),
        (MOE, 2, "fp8", ("experts are in fp8",)),
        (BASE, 2, "fp8_block", ("q_proj", "would be cut at 64")),
    ],
)
def test_sizes_that_cannot_be(config, size, rounding, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    packing = None if rounding is None else parse_quantization(rounding)
    with pytest.raises(EngineStartError) as error:
        share_of(load_config(tmp_path), 0, size, packing)
    message = str(error.value)
    assert message.startswith(f"tensor_parallel_size is {size}")
    assert "\n" not in message
    assert all(word in message for word in words), message
