"""A whole decoder of the shape of Llama-3.1 8B with random weights: tokens a second against the bandwidth limit.

The limit of a decode step is the time that its weights and its sequences' keys and values take to be read at the
measured copy bandwidth. transformers' `generate` on the same shape is the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.decoder import Attention, Decoder, FeedForward, make_join, make_norm
from ..engine.linear import Linear, make_linear
from ..engine.model_config import DecoderConfig, RopeConfig
from ..kernels import Kernels, ops
from ..kernels.batch import KVSpec, LayerKV, RaggedBatch
from ..kernels.io_model import compulsory
from ..kernels.reference.rope import rope_table
from .gpu_attention import filled
from .gpu_clock import DEVICE, Ceilings, Timing, capture, free_memory, time_calls, time_launched
from .gpu_correct import COARSE, compare
from .gpu_inputs import batch_of, moved
from .gpu_limits import BF16, BLOCK_SIZE, resolved
from .gpu_products import random_weight
from .gpu_rows import ERROR, Item, Row

SECTION = "model"
CONTEXT = 1024  # keys before each decoded token
PROMPT = 8192
LLAMA_8B = DecoderConfig(
    model_type="llama",
    vocab_size=128256,
    hidden=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn=14336,
    max_position=16384,
    activation="silu",
    norms="pre",
    eps=1e-5,
    norm_offset=0.0,
    qk_norm=None,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    tied=False,
    embedding_scale=1.0,
    attention_scale=128**-0.5,
    attention_softcap=0.0,
    logit_softcap=0.0,
    ropes=(RopeConfig(base=500000.0, rotary_dim=128),),
    layer_ropes=(0,) * 32,
    windows=(None,) * 32,
    moe=None,
    eos_token_ids=(),
)


def items(quick: bool, ceilings: Ceilings) -> Iterator[Item]:
    weights = ("bf16", "int4") if quick else ("bf16", "fp8", "int4")
    batches = (1, 64) if quick else (1, 16, 64, 256)
    small = replace(LLAMA_8B, num_layers=2, layer_ropes=(0,) * 2, windows=(None,) * 2)
    for form in weights:
        name = f"2 layers {form}, captured and not, against the reference kernels"
        yield Item(name, partial(_compare, name, small, form))
    for form in weights:
        yield Item(f"8B {form}", partial(_decode, LLAMA_8B, form, batches, ceilings))
    yield Item("transformers 8B bf16", partial(_transformers, (1,) if quick else (1, 16), ceilings))


def random_decoder(config: DecoderConfig, kernels: Kernels, form: str) -> tuple[Decoder, int]:
    """A decoder with seeded random weights on the device, and the bytes that a step reads of them."""
    torch.manual_seed(0)
    nbytes = 0

    def linear(outputs: int, inputs: int, packed: bool = True) -> Linear:
        nonlocal nbytes
        if packed and form != "bf16":
            weight: Any = random_weight(form, outputs, inputs)
        else:
            weight = (torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5).to(BF16)
        nbytes += weight.nbytes
        return make_linear(kernels, weight, None)

    rope = config.ropes[0]
    table = rope_table(rope.rotary_dim, config.max_position, rope.base, rope.scaling, config.max_position).to(DEVICE)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    blocks: list[Any] = []
    for layer in range(config.num_layers):
        qkv, o = linear(q + 2 * kv, config.hidden), linear(config.hidden, q)
        blocks.append(Attention(config, kernels, layer, 0, qkv, o, table, None))
        gate_up, down = linear(2 * config.ffn, config.hidden), linear(config.hidden, config.ffn)
        blocks.append(FeedForward(config, kernels, gate_up, down))
    norm = torch.ones(config.hidden, device=DEVICE, dtype=BF16)
    wanted = [block.rows for block in blocks[1:]]
    joins = [make_join(config, kernels, None, norm, rows) for rows in [*wanted, None]]
    first = make_norm(config, kernels, norm, blocks[0].rows)
    embedding = torch.randn(config.vocab_size, config.hidden, device=DEVICE, dtype=BF16)
    lm_head = linear(config.vocab_size, config.hidden, packed=False)
    decoder = Decoder(
        config, kernels, embedding, kernels.embed.run, first, list(zip(blocks, joins, strict=True)), lm_head, (None,)
    )
    return decoder, nbytes


def spec_of(config: DecoderConfig, kv: str) -> KVSpec:
    return KVSpec(BLOCK_SIZE, config.num_kv_heads, config.head_dim, kv)


def caches_of(config: DecoderConfig, kv: str, batch: RaggedBatch) -> list[LayerKV]:
    blocks = int(batch.block_table.max()) + 1
    return [filled(spec_of(config, kv), blocks, layer) for layer in range(config.num_layers)]


def random_batch(config: DecoderConfig, q_lens: list[int], contexts: list[int]) -> RaggedBatch:
    batch = batch_of(q_lens, contexts, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    batch.input_ids = torch.randint(config.vocab_size, (batch.num_tokens,), generator=generator)
    batch.logit_rows = batch.cu_q[1:].long() - 1
    return moved(batch, DEVICE)


def step_of(decoder: Decoder, kernels: Kernels, batch: RaggedBatch, caches: list[LayerKV]) -> Callable[[], Tensor]:
    """One greedy step: the logits, whose argmax is taken too."""

    def step() -> Tensor:
        hidden = decoder.forward(batch, caches)
        logits = decoder.logits(hidden[batch.logit_rows])
        kernels.greedy.run(logits)
        return logits

    return step


def _compare(name: str, config: DecoderConfig, form: str) -> list[Row]:
    """Logits of a mixed batch by the table that the engine would take, and by the references, on the device."""
    reference = resolved("bf16", dict.fromkeys(ops(), "reference"))
    results = []
    for kernels in (resolved("bf16"), reference):
        decoder, _ = random_decoder(config, kernels, form)
        batch = random_batch(config, [1, 1, 7, 40], [300, 1000, 64, 0])
        results.append(step_of(decoder, kernels, batch, caches_of(config, "bf16", batch))().clone())
    row = Row(SECTION, name, figure=compare(*results)[0], unit=ERROR)
    if not (row.figure is not None and row.figure <= COARSE[0]):
        row.status = "wrong"
    return [row, _replayed(config, form)]


def _replayed(config: DecoderConfig, form: str) -> Row:
    """A captured decode step, replayed on other tokens and lengths, against the same step launched from Python."""
    kernels = resolved("bf16")
    decoder, _ = random_decoder(config, kernels, form)
    batch = random_batch(config, [1] * 8, [600] * 8)
    step = step_of(decoder, kernels, batch, caches_of(config, "bf16", batch))
    replay, captured = capture(step)
    batch.input_ids.add_(1).remainder_(config.vocab_size)
    batch.seq_lens.sub_(torch.arange(8, device=DEVICE, dtype=torch.int32) * 40)
    batch.positions.copy_(batch.seq_lens - 1)
    rows = torch.arange(8, device=DEVICE)
    block = batch.block_table[rows, batch.positions // BLOCK_SIZE].long()
    batch.slot_mapping.copy_(block * BLOCK_SIZE + batch.positions % BLOCK_SIZE)
    replay()
    replayed = captured.clone()
    launched = step()
    row = Row(SECTION, f"2 layers {form}, replayed on shorter contexts", unit=ERROR)
    row.figure = compare(replayed, launched)[0]
    row.status = "ok" if row.figure == 0 else "wrong"
    return row


def _decode(config: DecoderConfig, form: str, batches: tuple[int, ...], ceilings: Ceilings) -> list[Row]:
    kernels = resolved("bf16")
    decoder, weight_bytes = random_decoder(config, kernels, form)
    rows = []
    for count in batches:
        per_layer = compulsory(spec_of(config, "bf16"), [CONTEXT + 1] * count, [1] * count, config.num_heads, None, 2)
        cache_bytes = config.num_layers * per_layer.codes
        if cache_bytes > 0.85 * free_memory():
            note = f"{cache_bytes / 1e9:.0f} GB of keys and values do not fit"
            rows.append(Row(SECTION, f"8B {form} decode, batch {count}", "skipped", note=note))
            continue
        batch = random_batch(config, [1] * count, [CONTEXT] * count)
        caches = caches_of(config, "bf16", batch)
        step = step_of(decoder, kernels, batch, caches)
        limit = (weight_bytes + config.num_layers * per_layer.total) / ceilings.copy
        launched = Timing(time_launched(step), captured=False)
        graph = time_calls([step])
        for label, timing in (("graph", graph), ("no graph", launched)):
            row = Row(SECTION, f"8B {form} decode, batch {count}, {label}", seconds=timing.seconds)
            row.figure, row.unit, row.share = count / timing.seconds, "tok/s", limit / timing.seconds
            row.note = f"{CONTEXT} keys each; share: of the bandwidth limit"
            if label == "graph" and not timing.captured:
                row.status, row.note = "failed", "could not be captured; this is the time without a graph"
            rows.append(row)
        del step, caches, batch
        torch.cuda.empty_cache()  # or the next size finds its memory in pieces
    rows.append(_prompt(config, form, decoder, kernels, ceilings))
    return rows


def _prompt(config: DecoderConfig, form: str, decoder: Decoder, kernels: Kernels, ceilings: Ceilings) -> Row:
    batch = random_batch(config, [PROMPT], [0])
    step = step_of(decoder, kernels, batch, caches_of(config, "bf16", batch))
    seconds = time_launched(step, 5)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.hidden * (2 * q + 2 * kv) + 3 * config.hidden * config.ffn
    operations = config.num_layers * (2 * PROMPT * matrices + 2 * PROMPT * PROMPT * q)
    peak = (ceilings.fp8 if form == "fp8" else None) or ceilings.bf16
    row = Row(SECTION, f"8B {form} prompt of {PROMPT}", seconds=seconds, figure=PROMPT / seconds, unit="tok/s")
    row.share, row.note = operations / seconds / peak, f"{operations / seconds / 1e12:.0f} TFLOP/s; share: of the peak"
    return row


def _transformers(batches: tuple[int, ...], ceilings: Ceilings) -> list[Row]:
    """Seconds of a token by `generate`, without what the prompt costs: the difference of two lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = LLAMA_8B
    shape = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(previous)
    few, many = 4, 24
    rows = []
    for count in batches:
        prompt = torch.randint(1, c.vocab_size, (count, CONTEXT), device=DEVICE)

        def generate(new: int, prompt: Tensor = prompt) -> None:
            mask = torch.ones_like(prompt)
            model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)

        seconds = (time_launched(partial(generate, many), 3) - time_launched(partial(generate, few), 3)) / (many - few)
        if seconds <= 0:
            raise RuntimeError(f"{many} tokens took no longer than {few}: something else kept the machine busy")
        row = Row(SECTION, f"transformers generate 8B bf16, batch {count}", seconds=seconds, unit="tok/s")
        row.figure = count / seconds
        read = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
        row.share, row.note = read / ceilings.copy / seconds, "peer; share: of the weights' bandwidth limit"
        rows.append(row)
    return rows
