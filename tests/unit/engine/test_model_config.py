"""config.json becomes a DecoderConfig: files of released models as they are on the hub, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.engine.errors import EngineStartError
from quire.engine.families import FAMILIES, load_config
from quire.engine.layout import count_parameters, weight_bytes
from quire.engine.model_config import DecoderConfig, RopeConfig

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def shape(model_type: str, layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, **more: Any) -> Any:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    } | more


# What the hub's files say (the keys that matter) and the parameter counts on the model cards.
RELEASED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": (shape("llama", 32, 4096, 14336, 32, 8, 128256, rope_theta=5e5), 8_030_261_248),
    "Llama-2-7b": (shape("llama", 32, 4096, 11008, 32, 32, 32000), 6_738_415_616),
    "Mistral-7B-v0.1": (shape("mistral", 32, 4096, 14336, 32, 8, 32000, sliding_window=4096), 7_241_732_096),
    "Qwen2.5-0.5B": (shape("qwen2", 24, 896, 4864, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    "Qwen3-0.6B": (shape("qwen3", 28, 1024, 3072, 16, 8, 151936, head_dim=128, tie_word_embeddings=True), 596_049_920),
    "Phi-3-mini-4k": (shape("phi3", 32, 3072, 8192, 32, 32, 32064, sliding_window=2047), 3_821_079_552),
    "gemma-2-2b": (shape("gemma2", 26, 2304, 9216, 8, 4, 256000, head_dim=256), 2_614_341_888),
    "gemma-3-1b": (shape("gemma3_text", 26, 1152, 6912, 4, 1, 262144, head_dim=256), 999_885_952),
    "SmolLM3-3B": (shape("smollm3", 36, 2048, 11008, 16, 4, 128256), 3_075_098_624),
    "OLMo-2-1B": (shape("olmo2", 16, 2048, 8192, 16, 16, 100352), 1_484_916_736),
    "Mixtral-8x7B": (shape("mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8), 46_702_792_704),
    "Qwen1.5-MoE-A2.7B": (
        shape("qwen2_moe", 24, 2048, 5632, 16, 16, 151936, num_experts=60, num_experts_per_tok=4)
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1},
        14_315_784_192,
    ),
    "Qwen3-30B-A3B": (
        shape("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, num_experts=128, num_experts_per_tok=8, head_dim=128)
        | {"moe_intermediate_size": 768, "norm_topk_prob": True},
        30_532_122_624,
    ),
}


def read(folder: Path, config: dict[str, Any]) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return load_config(folder)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_parameters(name: str, tmp_path: Path) -> None:
    config, parameters = RELEASED[name]
    decoder = read(tmp_path, config)
    assert count_parameters(decoder) == parameters
    assert weight_bytes(decoder, torch.bfloat16) == 2 * parameters


def test_every_family_has_a_released_example() -> None:
    assert {config["model_type"] for config, _ in RELEASED.values()} == set(FAMILIES)


# Rotary angles, in the files of both generations.


def rope_of(folder: Path, **keys: Any) -> RopeConfig:
    return read(folder, TINY | keys).ropes[0]


def test_rope_keys_of_both_generations_mean_the_same(tmp_path: Path) -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = rope_of(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | numbers)
    new = rope_of(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | numbers)
    assert old == new == RopeConfig(base=5e5, rotary_dim=8, scaling={"rope_type": "llama3"} | numbers)


def test_the_oldest_rope_key_is_type(tmp_path: Path) -> None:
    assert rope_of(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}).scaling == {
        "rope_type": "linear",
        "factor": 2.0,
    }


def test_plain_rope_takes_the_family_base(tmp_path: Path) -> None:
    assert rope_of(tmp_path) == RopeConfig(base=10_000.0, rotary_dim=8)
    assert rope_of(tmp_path, model_type="smollm3").base == 2_000_000.0
    assert rope_of(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7e4}).base == 7e4


def test_yarn_without_a_trained_length_stretches_the_context(tmp_path: Path) -> None:
    scaling = rope_of(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0}).scaling
    assert scaling is not None
    assert scaling["original_max_position_embeddings"] == TINY["max_position_embeddings"]


def test_phi3_long_context_of_both_spellings(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for kind in ("su", "longrope"):
        scaling = rope_of(
            tmp_path, model_type="phi3", original_max_position_embeddings=32, rope_scaling={"type": kind} | factors
        ).scaling
        assert scaling == {"rope_type": "longrope", "original_max_position_embeddings": 32} | factors


def test_gemma3_has_two_bases(tmp_path: Path) -> None:
    gemma = TINY | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2}
    old = gemma | {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8}}
    new = gemma | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    }
    config = read(tmp_path, old)
    assert config == read(tmp_path, new)
    assert [rope.base for rope in config.ropes] == [1e6, 2e4]
    assert config.ropes[1].scaling is None
    assert config.windows == (16, None, 16, None)
    assert config.layer_ropes == (1, 0, 1, 0)


# Windows.


def test_windows_follow_layer_types_where_the_file_has_them(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = read(
        tmp_path,
        TINY | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "layer_types": kinds},
    )
    assert config.windows == (None, 9, 9, None)


def test_qwen_windows_need_their_switch(tmp_path: Path) -> None:
    qwen = TINY | {"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 3}
    assert read(tmp_path, qwen).windows == (None,) * 4
    assert read(tmp_path, qwen | {"use_sliding_window": True}).windows == (None, None, None, 9)


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    mistral = TINY | {"model_type": "mistral"}
    assert read(tmp_path, mistral | {"sliding_window": 128}).windows == (None,) * 4
    assert read(tmp_path, mistral | {"sliding_window": 127}).windows == (127,) * 4
    assert read(tmp_path, mistral | {"sliding_window": None}).windows == (None,) * 4


# The rest.


def test_ends_of_a_turn_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert read(tmp_path, TINY | {"eos_token_id": 5}).eos_token_ids == (7, 5)
    (tmp_path / "generation_config.json").unlink()
    assert read(tmp_path, TINY | {"eos_token_id": 5}).eos_token_ids == (5,)
    assert read(tmp_path, TINY).eos_token_ids == ()


def test_soft_caps_can_be_switched_off(tmp_path: Path) -> None:
    gemma = TINY | {"model_type": "gemma2", "head_dim": 8}
    config = read(tmp_path, gemma)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    config = read(tmp_path, gemma | {"attn_logit_softcapping": None, "final_logit_softcapping": 20})
    assert (config.attention_softcap, config.logit_softcap) == (0.0, 20.0)


def test_code_in_the_folder_is_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    with caplog.at_level("WARNING"):
        read(tmp_path, TINY | {"auto_map": {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}})
    assert not canary.exists()
    assert "auto_map" in caplog.text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": -4}, "num_attention_heads"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"vocab_size": 1_000_000_000}, "vocab_size"),
    ({"vocab_size": "64"}, "vocab_size"),
    ({"hidden_size": 33}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 4}, "head_dim"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope_scaling.short_factor"),
    ({"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"eos_token_id": 64}, "eos_token_id"),
    ({"model_type": "rwkv"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"]}, "layer_types"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "no_rope_layers"),
    ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
    ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts"),
]


@pytest.mark.parametrize(("change", "key"), REFUSED, ids=lambda value: str(value)[:60])
def test_wrong_values_are_refused_by_name(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(EngineStartError) as caught:
        read(tmp_path, TINY | change)
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message
    assert key in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"a": ' * 50_000, '{"vocab_size": ' + "9" * 5000 + "}", "\x00"]
)
def test_broken_json_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineStartError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="cannot read"):
        load_config(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(EngineStartError, match="larger than"):
        load_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    change=st.dictionaries(
        st.sampled_from([*TINY, "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "sliding_window"]), JSON
    ),
)
def test_any_json_gives_a_config_or_a_typed_error(model_type: str, change: dict[str, Any], tmp_path: Path) -> None:
    try:
        config = read(tmp_path, TINY | {"model_type": model_type} | change)
    except EngineStartError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert len(config.windows) == len(config.layer_ropes) == config.num_layers
