"""Drafts inside the target: the whole of it is itself, its parts are what their definitions say, others are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quire.engine.decoder import Decoder
from quire.engine.errors import EngineStartError
from quire.engine.families import load_config
from quire.engine.kv_cache import allocate
from quire.engine.layout import iter_weights, model_weights
from quire.engine.loader import BUNDLED_FOLDER, load_decoder
from quire.engine.quant.rounding import parse_quantization
from quire.engine.sampler import Sampler
from quire.engine.sequence_state import SequenceState
from quire.engine.spec.model import ModelProposer
from quire.engine.spec.proposer import View
from quire.engine.spec.segments import Segment, gather
from quire.engine.spec.slices import check_width, layers_decoder, nested_decoder
from quire.engine.spec.vocabulary import check_same_tokenizer
from quire.kernels import Kernels, Target, resolve
from quire.kernels.batch import KVSpec, LayerKV
from quire.models.llama import TARGET, Llama
from quire.scheduler.drafts import parse_shape
from quire.scheduler.params import SamplingParams

CPU = torch.device("cpu")
SIZE = 4
TOKENS = [7, 250, 31, 99, 12, 5, 180, 44, 2, 66, 140]
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "mlp_bias": True},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},  # gate and up are one matrix
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 4},  # norms before and after
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},  # norms after
}


def kernels_for(config: Any, dtype: torch.dtype = torch.float32, form: str = "fp32") -> Kernels:
    return resolve(Target("cpu", dtype, config.head_dim, form))


def load(folder: Path, rounding: str | None = None) -> tuple[Decoder, Kernels]:
    config = load_config(folder)
    kernels = kernels_for(config)
    packing = None if rounding is None else parse_quantization(rounding)
    return load_decoder(folder, config, kernels, torch.float32, CPU, rounding=packing), kernels


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    config = SMALL | {"model_type": family} | FAMILIES[family] | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in iter_weights(model_weights(load_config(folder))):
        for part in weight.layouts[0 if family == "phi3" else -1]:
            name = part.name if part.name.startswith("lm_head") else f"model.{part.name}"
            tensors[name] = torch.randn(part.shape, generator=generator) / 4
    save_file(tensors, folder / "model.safetensors")
    return folder


def empty_cache(decoder: Decoder) -> list[LayerKV]:
    spec = KVSpec(SIZE, decoder.config.num_kv_heads, decoder.config.head_dim, "fp32")
    return allocate(spec, decoder.config.num_layers, 16, CPU)


TABLE = np.arange(1, 9, dtype=np.int32)


@torch.inference_mode()
def logits(decoder: Decoder, tokens: Sequence[int], cache: list[LayerKV] | None = None, start: int = 0) -> Tensor:
    """[n, V] of the tokens, which stand at `start` in their sequence."""
    batch = gather([Segment(TABLE, start, list(tokens), range(len(tokens)))], SIZE, CPU)
    hidden = decoder.forward(batch, empty_cache(decoder) if cache is None else cache)
    return decoder.logits_at(hidden, batch.logit_rows).clone()


# The whole is itself.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_widest_slice_and_all_layers_are_the_model(family: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / family, family)
    decoder, kernels = load(folder)
    tokens = [token % 32 for token in TOKENS]
    expected = logits(decoder, tokens)
    assert torch.equal(logits(nested_decoder(decoder, folder, kernels, 128), tokens), expected)
    assert torch.equal(logits(layers_decoder(decoder, folder, kernels, [0, 1, 2]), tokens), expected)
    assert not torch.allclose(logits(nested_decoder(decoder, folder, kernels, 64), tokens), expected, atol=0.1)
    assert not torch.allclose(logits(layers_decoder(decoder, folder, kernels, [0, 2]), tokens), expected, atol=0.1)


@pytest.mark.parametrize("rounding", ["int8", "int4:32", "w8a8"])
def test_the_widest_slice_of_a_rounded_model_is_the_model(rounding: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", "llama")
    decoder, kernels = load(folder, rounding)
    packing = parse_quantization(rounding)
    whole = nested_decoder(decoder, folder, kernels, 128, rounding=packing)
    tokens = [token % 32 for token in TOKENS]
    assert torch.equal(logits(whole, tokens), logits(decoder, tokens))
    half = nested_decoder(decoder, folder, kernels, 64, rounding=packing)
    plain, _ = load(folder)
    near = logits(nested_decoder(plain, folder, kernels, 64), tokens)
    assert torch.nn.functional.cosine_similarity(logits(half, tokens), near).min() > 0.9


# Parts are what they should be.


@pytest.fixture(scope="module")
def bundled() -> tuple[Decoder, Kernels, Llama]:
    decoder, kernels = load(BUNDLED_FOLDER)
    model = Llama(TARGET)
    tensors = load_file(BUNDLED_FOLDER / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return decoder, kernels, model.eval()


@pytest.mark.parametrize("width", TARGET.widths)
def test_nested_slices_are_the_trained_ones(width: int, bundled: tuple[Decoder, Kernels, Llama]) -> None:
    decoder, kernels, model = bundled
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS]), width)[0]
    ours = logits(nested_decoder(decoder, BUNDLED_FOLDER, kernels, width), TOKENS)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def test_kept_layers_are_a_model_of_their_own(bundled: tuple[Decoder, Kernels, Llama]) -> None:
    decoder, kernels, model = bundled
    kept, every = [1, 2, 5], model.layers
    model.layers = nn.ModuleList(every[i] for i in kept)
    try:
        with torch.inference_mode():
            expected = model(torch.tensor([TOKENS]))[0]
    finally:
        model.layers = every
    cache = empty_cache(decoder)
    ours = logits(layers_decoder(decoder, BUNDLED_FOLDER, kernels, kept), TOKENS, cache)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)
    assert [bool(layer.k.any()) for layer in cache] == [i in kept for i in range(7)]


def behind_a_draft(tiny: Path, part: str, from_root: bool) -> tuple[Tensor, Tensor]:
    """The target's logits of guessed tokens, after its cache was drafted in and as if it never was."""
    decoder, kernels = load(tiny)
    draft = (
        nested_decoder(decoder, tiny, kernels, 64)
        if part == "nested"
        else layers_decoder(decoder, tiny, kernels, [0, 2])
    )
    cache = empty_cache(decoder)
    logits(decoder, TOKENS[:-1], cache)
    sampler = Sampler(kernels, 300, 1, (), CPU)
    state = SequenceState(SamplingParams(max_tokens=9, seed=1), 0, TOKENS, 1, (), 300)
    proposer = ModelProposer(part, draft, cache, sampler, max_tokens=64, eos_token_ids=())
    (found,), took = proposer.propose([View(0, np.array(TOKENS), 1, TABLE, state, parse_shape("chain:4", 4))])
    assert found is not None
    assert (took.method, took.levels, took.rows, took.caught_up) == (part, 4, 4, 0)
    guessed = list(found.tree.tokens)
    last = len(TOKENS) - 1
    if from_root:
        drafted = logits(decoder, [TOKENS[-1], *guessed], cache, last)[1:]
    else:
        drafted = logits(decoder, guessed, cache, last + 1)
    return drafted, logits(decoder, [*TOKENS, *guessed])[last + 1 :]


@pytest.mark.parametrize("part", ["nested", "layers"])
def test_the_target_overwrites_what_a_part_of_it_wrote(part: str, tiny_model: Path) -> None:
    drafted, fresh = behind_a_draft(tiny_model, part, from_root=True)
    torch.testing.assert_close(drafted, fresh, atol=1e-4, rtol=1e-5)


def test_a_target_that_keeps_a_drafts_keys_is_caught(tiny_model: Path) -> None:
    drafted, fresh = behind_a_draft(tiny_model, "nested", from_root=False)
    assert (drafted - fresh).abs().max() > 0.05


# What is no part is refused.


def refused(folder: Path, width: int, rounding: str | None = None, **changes: Any) -> str:
    config = dataclasses.replace(load_config(folder), **changes)
    with pytest.raises(EngineStartError) as caught:
        check_width(config, width, None if rounding is None else parse_quantization(rounding))
    return str(caught.value)


def test_widths_that_are_no_slices_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    assert load_config(BUNDLED_FOLDER).nested_widths == (1024, 512, 256, 128)
    assert "matformer_widths are 1024, 512, 256, 128" in refused(BUNDLED_FOLDER, 64)
    for width in (-32, 0, 16, 48, 96, 256):
        assert "divisor of 128 that is a multiple of 32" in refused(tiny_model, width)
    check_width(load_config(tiny_model), 32)
    assert "cannot be rounded to int4" in refused(tiny_model, 64, "int4:128")
    mixture = {"num_local_experts": 2, "num_experts_per_tok": 1, "architectures": ["MixtralForCausalLM"]}
    FAMILIES["mixtral"] = mixture
    try:
        folder = write_model(tmp_path / "mixtral", "mixtral")
    finally:
        del FAMILIES["mixtral"]
    assert "mixture of experts" in refused(folder, 64)


@pytest.mark.parametrize("layers", [[], [2, 0], [0, 0], [0, 3], [-1]], ids=str)
def test_layers_that_are_none_are_refused(layers: list[int], tiny_model: Path) -> None:
    decoder, kernels = load(tiny_model)
    with pytest.raises(EngineStartError, match="at least one of 0 to 2, in ascending order"):
        layers_decoder(decoder, tiny_model, kernels, layers)


def test_tokenizers_must_be_the_same(tiny_model: Path, tmp_path: Path) -> None:
    check_same_tokenizer(tiny_model, tiny_model)
    check_same_tokenizer(BUNDLED_FOLDER, BUNDLED_FOLDER.parent / "quire-py-1m")
    text = (tiny_model / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text + "\n")  # other bytes, the same tokens
    check_same_tokenizer(tiny_model, tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace("<eos>", "<end>"))
    with pytest.raises(EngineStartError, match="token 257 is '<end>' there and '<eos>' here"):
        check_same_tokenizer(tiny_model, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(EngineStartError, match=r"tokenizer\.json is missing"):
        check_same_tokenizer(tiny_model, tmp_path)
