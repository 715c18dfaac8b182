"""Every supported family against transformers: the same random weights must give the same logits.

Our side runs ragged batches over a paged cache with shuffled blocks; theirs runs each sequence whole and alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quire.engine.decoder import Decoder
from quire.engine.families import load_config
from quire.engine.layout import count_parameters
from quire.engine.loader import load_decoder
from quire.engine.model_config import DecoderConfig, RopeConfig
from quire.engine.recorded import RecordedDecoder
from quire.kernels import Target, ops, resolve
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch
from quire.kernels.cpu.native.tape import Unrecordable

BLOCK = 4
LENGTHS = (23, 9, 17)
SPLITS = ((10, 21), (3, 7), (16, 17))  # where each sequence is cut into chunks; the rest is decoded token by token
TOLERANCE = 1e-4  # fp32 logits of magnitude 1 to 10; sums are taken in another order

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
LONGROPE = {  # all LENGTHS are beyond 8, so that transformers takes the long factors for each of them too
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 8,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 3.0, 6.0],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3-partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3-ropes": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 5, "rope_parameters": GEMMA3_ROPE, "sliding_window_pattern": 2},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6}),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **MOE}),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 5, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **MOE},
    ),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "mlp_only_layers": [3],
        },
    ),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 6, "moe_intermediate_size": 32, "head_dim": 16, **MOE}),
    "qwen3-moe-window": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            **MOE,
        },
    ),
}


@dataclass
class Oracle:
    folder: Path
    model: Any
    prompts: list[list[int]]
    logits: list[Tensor]  # per sequence [length, V]


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    family, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    return make_oracle(family, settings, folder)


def make_oracle(family: str, settings: dict[str, Any], folder: Path) -> Oracle:
    config = getattr(transformers, f"{family}Config")(**(SHAPE | settings), attn_implementation="eager")
    torch.manual_seed(0)
    name = family.removesuffix("Text")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, SHAPE["vocab_size"]) for _ in range(length)] for length in LENGTHS]
    with torch.no_grad():
        logits = [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
    return Oracle(folder, model, prompts, logits)


def randomize(model: torch.nn.Module) -> None:
    """Weights in which nothing is neutral: no zero biases, no norms of one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)


class Runner:
    """The least that can drive a decoder: a paged cache with shuffled blocks, and steps of any chunks."""

    def __init__(self, decoder: Decoder, prompts: list[list[int]], taped: bool = False) -> None:
        config = decoder.config
        self.prompts = prompts
        self.done = [0] * len(prompts)
        width = max(-(-len(prompt) // BLOCK) for prompt in prompts)
        blocks = list(range(1, 1 + width * len(prompts)))
        random.Random(2).shuffle(blocks)
        self.table = torch.tensor(blocks, dtype=torch.int32).view(len(prompts), width)
        spec = KVSpec(BLOCK, config.num_kv_heads, config.head_dim, "fp32")
        shape = (len(blocks) + 1, BLOCK, config.num_kv_heads, config.head_dim)
        nothing = float("nan")  # a slot that is read before it is written shows
        self.cache = [
            LayerKV(spec, torch.full(shape, nothing), torch.full(shape, nothing)) for _ in range(config.num_layers)
        ]
        self.decoder = RecordedDecoder(decoder, self.cache, sum(map(len, prompts)), len(prompts)) if taped else decoder
        self.vocab_size = config.vocab_size

    def step(self, ends: list[int]) -> list[Tensor]:
        """Compute each sequence up to its end; the logits of its new rows."""
        active = [s for s, end in enumerate(ends) if end > self.done[s]]
        ids, positions, slots, counts = [], [], [], []
        for s in active:
            rows = range(self.done[s], ends[s])
            ids += [self.prompts[s][p] for p in rows]
            positions += list(rows)
            slots += [int(self.table[s, p // BLOCK]) * BLOCK + p % BLOCK for p in rows]
            counts.append(len(rows))
        batch = RaggedBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_q=torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
            seq_lens=torch.tensor([ends[s] for s in active], dtype=torch.int32),
            block_table=self.table[active],
            tree_mask=None,
            logit_rows=torch.arange(len(ids)),
            max_q=max(counts),
            max_seq_len=max(ends[s] for s in active),
        )
        hidden = self.decoder.forward(batch, self.cache)
        split = iter(self.decoder.logits(hidden[batch.logit_rows]).split(counts))
        out = [next(split) if s in active else torch.empty(0, self.vocab_size) for s in range(len(ends))]
        self.done = list(ends)
        return out


@torch.inference_mode()
def run(decoder: Decoder, prompts: list[list[int]], schedule: Iterator[list[int]], taped: bool = False) -> list[Tensor]:
    runner = Runner(decoder, prompts, taped)
    steps = [runner.step(ends) for ends in schedule]
    return [torch.cat(rows) for rows in zip(*steps, strict=True)]


def whole() -> Iterator[list[int]]:
    yield list(LENGTHS)


def chunked() -> Iterator[list[int]]:
    """Two chunks, then decodes, as long as a sequence has tokens."""
    for cut in zip(*SPLITS, strict=True):
        yield list(cut)
    ends = [split[-1] for split in SPLITS]
    while ends != list(LENGTHS):
        ends = [min(end + 1, length) for end, length in zip(ends, LENGTHS, strict=True)]
        yield ends


def load(folder: Path, kernels: str, config: DecoderConfig | None = None) -> Decoder:
    config = config or load_config(folder)
    overrides = dict.fromkeys(ops(), "reference") if kernels == "reference" else {}
    table = resolve(Target("cpu", torch.float32, config.head_dim, "fp32"), overrides)
    return load_decoder(folder, config, table, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kernels", ["reference", "cpu", "taped"])
def test_logits_equal_those_of_transformers(oracle: Oracle, kernels: str) -> None:
    decoder = load(oracle.folder, kernels)
    if kernels == "taped" and decoder.config.head_dim % 16:
        with pytest.raises(Unrecordable, match="attention is not native"):
            run(decoder, oracle.prompts, whole(), taped=True)
        return
    for schedule in (whole, chunked):
        ours = run(decoder, oracle.prompts, schedule(), taped=kernels == "taped")
        for logits, expected in zip(ours, oracle.logits, strict=True):
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_parameters_are_counted_without_loading(oracle: Oracle) -> None:
    assert count_parameters(load_config(oracle.folder)) == sum(p.numel() for p in oracle.model.parameters())


# What each setting does must show in the logits, or the comparison above proves nothing about it.
NEUTRALISED: list[tuple[str, dict[str, Any]]] = [
    ("llama-llama3", {"ropes": (RopeConfig(base=5e5, rotary_dim=16),)}),
    ("llama-yarn", {"ropes": (RopeConfig(base=1e4, rotary_dim=16),)}),
    ("phi3-partial", {"ropes": (RopeConfig(base=1e4, rotary_dim=16),)}),
    ("phi3", {"windows": (None,) * 3}),
    ("gemma2", {"windows": (None,) * 3}),
    ("gemma2", {"windows": (6, None, 6)}),
    ("gemma2", {"attention_softcap": 0.0}),
    ("gemma2", {"logit_softcap": 0.0}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"norm_offset": 0.0}),
    ("gemma2", {"attention_scale": 0.25}),
    ("gemma2", {"activation": "silu"}),
    ("gemma3", {"layer_ropes": (0, 0, 0)}),
    ("smollm3", {"layer_ropes": (0, 0, 0)}),
    ("qwen2", {"eps": 1e-2}),
]


@pytest.mark.parametrize(("case", "change"), NEUTRALISED, ids=lambda value: str(value)[:40])
def test_every_setting_shows_in_the_logits(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    family, settings = CASES[case]
    oracle = make_oracle(family, settings, tmp_path)
    wrong = replace(load_config(tmp_path), **change)
    logits = torch.cat(run(load(tmp_path, "reference", wrong), oracle.prompts, whole()))
    assert (logits - torch.cat(oracle.logits)).abs().max() > 10 * TOLERANCE
