"""Folders that are not what they say: each is refused with the tensor, both shapes and a remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.engine import loader
from quire.engine.decoder import Decoder
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.layout import iter_weights, model_weights
from quire.engine.loader import load_decoder, locate_model
from quire.kernels import Target, ops, resolve
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
MOE = TINY | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
FIRST = "model.layers.0.self_attn.q_proj.weight"


def write_model(folder: Path, config: dict[str, Any] = TINY, layout: int = -1) -> dict[str, Tensor]:
    """A random model; layout -1 = every tensor in the usual place, 0 = joined and stacked ones."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in iter_weights(model_weights(load_config(folder))):
        # Equal values in every layout: the whole parameter is drawn, then cut into its parts.
        values = torch.randn(weight.size, generator=generator) / 4
        for part in weight.layouts[layout]:
            size = torch.Size(part.shape).numel()
            tensors[name(part.name)], values = values[:size].view(part.shape).clone(), values[size:]
    save_file(tensors, folder / "model.safetensors")
    return tensors


def name(part: str) -> str:
    return part if part.startswith("lm_head") else f"model.{part}"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = load_config(folder)
    target = Target("cpu", dtype, config.head_dim, "fp32")
    kernels = resolve(target, dict.fromkeys(ops(), "reference"))
    return load_decoder(folder, config, kernels, dtype, torch.device("cpu"))


def logits_of(decoder: Decoder) -> Tensor:
    spec = KVSpec(4, decoder.config.num_kv_heads, decoder.config.head_dim, "fp32")
    shape = (2, 4, spec.num_kv_heads, spec.head_dim)
    cache = [LayerKV(spec, torch.zeros(shape), torch.zeros(shape)) for _ in range(decoder.config.num_layers)]
    batch = RaggedBatch(
        input_ids=torch.tensor([3, 1, 4]),
        positions=torch.arange(3),
        slot_mapping=torch.arange(4, 7),
        cu_q=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        tree_mask=None,
        logit_rows=torch.arange(3),
        max_q=3,
        max_seq_len=3,
    )
    with torch.inference_mode():
        return decoder.logits(decoder.forward(batch, cache))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(EngineStartError) as caught:
        load(folder)
    return str(caught.value)


# Layouts of one and the same model.


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_joined_and_separate_tensors_are_the_same_model(config: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "usual", config)
    write_model(tmp_path / "joined", config, layout=0)
    torch.testing.assert_close(
        logits_of(load(tmp_path / "usual")), logits_of(load(tmp_path / "joined")), atol=0, rtol=0
    )


def test_mixtral_expert_names_are_in_order(tmp_path: Path) -> None:
    """w1 is the gate, w3 is up, w2 is down: exchanging the first two must change the model."""
    tensors = write_model(tmp_path, MOE)
    before = logits_of(load(tmp_path))
    gates = [name for name in tensors if name.endswith("w1.weight")]
    assert len(gates) == 2 * 3
    for gate in gates:
        up = gate.replace("w1", "w3")
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, tmp_path / "model.safetensors")
    assert not torch.allclose(before, logits_of(load(tmp_path)))


def test_shards_and_an_index_are_the_same_model(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    before = logits_of(load(tmp_path))
    shard(tmp_path, tensors)
    torch.testing.assert_close(logits_of(load(tmp_path)), before, atol=0, rtol=0)


def shard(folder: Path, tensors: dict[str, Tensor]) -> Path:
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in (0, 1):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        names = sorted(tensors)[index::2]
        save_file({n: tensors[n] for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_tied_model_may_carry_a_second_copy_and_old_buffers(tmp_path: Path) -> None:
    write_model(tmp_path, TINY | {"tie_word_embeddings": True})
    before = logits_of(load(tmp_path))
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(32, 16)}))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    torch.testing.assert_close(logits_of(load(tmp_path)), before, atol=0, rtol=0)


def test_weights_are_cast_and_outlive_their_file(tmp_path: Path) -> None:
    write_model(tmp_path)
    before = logits_of(load(tmp_path))
    rewrite(tmp_path, lambda t: t.update({n: v.double() for n, v in t.items()}))
    decoder = load(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    torch.testing.assert_close(logits_of(decoder), before, atol=0, rtol=0)
    assert decoder.embedding.dtype == torch.float32


# Tensors that do not fit.


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda t: t.pop(FIRST))
    message = refusal(tmp_path)
    assert "layers.0.self_attn.q_proj.weight [16, 16] is missing" in message


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, MOE)
    rewrite(tmp_path, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    assert "experts.2.w2.weight [16, 24] is missing" in refusal(tmp_path)


def test_an_untied_model_needs_its_lm_head(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight [32, 16] is missing" in refusal(tmp_path)


def test_both_shapes_of_a_misfit_are_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({FIRST: torch.zeros(16, 15)}))
    message = refusal(tmp_path)
    assert FIRST in message
    assert "[16, 15]" in message
    assert "[16, 16]" in message


def test_a_transposed_tensor_of_the_right_size_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.mlp.gate_proj.weight": torch.zeros(16, 24)}))
    assert "[16, 24]" in refusal(tmp_path)


def test_surplus_tensors_are_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"vision_tower.{i}.weight": torch.zeros(2) for i in range(9)}))
    message = refusal(tmp_path)
    assert "vision_tower.0.weight" in message
    assert "and 4 more" in message


def test_quantized_values_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({FIRST: torch.zeros(16, 16, dtype=torch.int8)}))
    message = refusal(tmp_path)
    assert FIRST in message
    assert "I8" in message


# Files that are broken.


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(size: int, tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert "model.safetensors is not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("padding", [1, 2, 3, 7])
def test_values_may_begin_anywhere(padding: int, tmp_path: Path) -> None:
    """Not every writer pads the header to eight bytes: values then lie across the boundaries of their type."""
    write_model(tmp_path)
    expected = logits_of(load(tmp_path))
    path = tmp_path / "model.safetensors"
    stored = path.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    header = stored[8 : 8 + length] + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + stored[8 + length :])
    assert torch.equal(logits_of(load(tmp_path)), expected)


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"not json",
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4], '
        b'"data_offsets": [8, 24]}}',
        b'{"a": ' * 2000,
    ],
)
def test_a_corrupt_header_is_refused(header: bytes, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert str(tmp_path) in refusal(tmp_path)


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "not a whole safetensors file" in refusal(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_in_the_header_loads_or_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if not (tmp_path / "whole").exists():
        write_model(tmp_path)
        path.rename(tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    at = data.draw(st.integers(0, header - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(EngineStartError):  # any other exception fails the test
        load(tmp_path)


# Folders that are not models.


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickled_weights_are_refused_and_not_opened(suffix: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    canary = tmp_path / f"pytorch_model{suffix}"
    canary.mkdir()  # opening it would fail with another error
    message = refusal(tmp_path)
    assert canary.name in message
    assert "safetensors" in message


def test_an_empty_folder_and_an_ambiguous_one_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    load(tmp_path)  # a single file may have any name
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert "no model.safetensors.index.json" in refusal(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert "has no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ""])
def test_an_index_cannot_name_files_elsewhere(file: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {FIRST: file}}))
    assert "is not the name of a safetensors file" in refusal(tmp_path / "model")


def test_an_index_with_a_missing_shard_or_no_map_is_refused(tmp_path: Path) -> None:
    index = shard(tmp_path, write_model(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(tmp_path)
    index.write_text('{"weight_map": []}')
    assert "weight_map" in refusal(tmp_path)


# Names of models.


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert locate_model(str(tmp_path)) == tmp_path


def test_a_path_that_is_not_there_is_never_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    for path in (str(tmp_path / "nothing"), "./nothing", "../a/b", "a/b/c", "~/nothing", ""):
        if path:
            with pytest.raises(EngineStartError, match="no model folder"):
                locate_model(path)


def test_the_bundled_model_lies_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert loader.BUNDLED_FOLDER.parent.name == "models"
    monkeypatch.setattr(loader, "BUNDLED_FOLDER", tmp_path)
    assert locate_model("bundled") == tmp_path
    monkeypatch.setattr(loader, "BUNDLED_FOLDER", tmp_path / "nothing")
    with pytest.raises(EngineStartError, match="bundled model is not installed"):
        locate_model("bundled")


@pytest.mark.parametrize("name", ["bundled", "."])
def test_a_folder_has_no_revision(name: str) -> None:
    with pytest.raises(EngineStartError, match="is no hub id: leave revision out"):
        locate_model(name, "abc")


def test_the_hub_gives_data_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("org/some-model", "abc") == tmp_path
    assert asked["name"] == "org/some-model"
    assert asked["revision"] == "abc"
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "a.safetensors",
            "config.json",
            "chat_template.jinja",
            "modeling.py",
            "a.bin",
            "a.pth",
            "original/a.safetensors",
        ],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == ["a.safetensors", "config.json", "chat_template.jinja"]


def test_an_unreachable_hub_is_a_start_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline with an empty cache: the library's own error, in our words."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EngineStartError, match="org/some-model"):
        locate_model("org/some-model")


def test_windows_share_plans(tmp_path: Path) -> None:
    """One attention plan per distinct window, whatever the number of layers."""
    write_model(tmp_path)
    config = dataclasses.replace(load_config(tmp_path), windows=(4, None))
    kernels = resolve(Target("cpu", torch.float32, config.head_dim, "fp32"), dict.fromkeys(ops(), "reference"))
    decoder = load_decoder(tmp_path, config, kernels, torch.float32, torch.device("cpu"))
    assert decoder.windows == (4, None)
    assert load(tmp_path).windows == (None,)
