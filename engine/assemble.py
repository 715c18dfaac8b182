"""What every rank of an engine does at its start: from settings to a runner that is warm.

    EngineConfig ─▶ Resolved ─▶ ranks meet ─▶ weights ─▶ what they leave of the GPU ─▶ KV cache ─▶ warm

Alone or together, in one order: where ranks exchange something each does so as often as the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..kernels import Kernels
from ..kernels.batch import LayerKV
from ..kernels.kv_formats import kv_format
from .config import EngineConfig
from .decoder import Decoder
from .errors import EngineStartError
from .families import load_config
from .grammar import Grammars, Vocabulary
from .graphs import CudaCapture
from .kv_cache import allocate, kv_spec
from .kv_scales import load_kv_scales
from .loader import load_decoder, locate_model
from .memory import CudaMeter, describe, measure
from .model_config import DecoderConfig
from .parallel import Alone
from .recorded import recorded
from .resolve import Machine, Resolved, choose_kernels, resolve, with_kv_cache
from .runner import ModelRunner
from .sampler import Sampler
from .sharding import Share, share_of
from .slots import SlotTable
from .spec.build import Drafter, load_draft_config, load_drafter, make_proposers
from .startup import Startup
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembled:
    path: Path
    model: DecoderConfig
    settings: Resolved
    kernels: Kernels
    grammars: Grammars
    runner: ModelRunner
    memory: dict[str, int]  # bytes, of this rank


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What does not change with the size of the cache."""

    path: Path
    model: DecoderConfig
    share: Share
    kernels: Kernels
    decoder: Decoder
    drafter: Drafter | None
    grammars: Grammars


def assemble(config: EngineConfig, machine: Machine, meet: Callable[[Resolved], Alone], startup: Startup) -> Assembled:
    """Load the model, and get everything ready to run steps.

    machine: the same on all ranks, since the settings that come of it must be
    meet: waits for all ranks of these settings
    Raises EngineStartError, and RankLost where another rank does not go on.
    """
    with startup.phase("read configuration"):
        path = locate_model(config.model, config.revision)
        model = load_config(path)
        draft = load_draft_config(config, path)
        settings = resolve(config, model, machine, draft)
        kernels = choose_kernels(config, settings, model, settings.kv_cache_dtype)
    startup.settle()
    torch.set_num_threads(settings.threads)
    with startup.phase("load weights"):
        group = meet(settings)
        loaded = _load(config, settings, path, model, kernels, group, startup)
    with startup.phase("read vocabulary"):
        loaded.grammars.warm()
    memory = {"weights": settings.weight_bytes}
    if settings.memory_share is not None:
        with startup.phase("measure memory"):
            # Graphs hold on to the cache that they were captured over: this runner goes, with its own.
            trial = _runner(loaded, replace(settings, num_blocks=2))
            measured = measure(trial, settings, meter := CudaMeter())
            del trial
            meter.settle()
            settings = with_kv_cache(config, model, settings, group.least(measured.kv_cache(settings.memory_share)))
        memory = measured.table(settings.kv_cache_bytes)
        log.info("memory of the GPU:\n%s", describe(memory))
    memory["kv_cache"] = settings.kv_cache_bytes
    with startup.phase("allocate KV cache"):
        runner = _runner(loaded, settings)
    with startup.phase("warm up"):
        runner.warm_up(min(settings.max_num_batched_tokens, settings.max_model_len), startup.advance)
    return Assembled(path, model, settings, loaded.kernels, loaded.grammars, runner, memory)


def _load(
    config: EngineConfig,
    settings: Resolved,
    path: Path,
    model: DecoderConfig,
    kernels: Kernels,
    group: Alone,
    startup: Startup,
) -> _Loaded:
    decoder = load_decoder(
        path,
        model,
        kernels,
        settings.dtype,
        settings.device,
        settings.max_model_len,
        rounding=settings.rounding,
        turn_values=kv_format(settings.kv_cache_dtype).rotates_keys,
        group=group,
        advance=startup.advance,
    )
    drafter = load_drafter(config, settings, path, decoder, kernels)
    share = share_of(model, group.rank, group.size, settings.rounding)
    grammars = Grammars(lambda: Vocabulary(load_tokenizer(path), model.vocab_size))
    return _Loaded(path, model, share, kernels, decoder, drafter, grammars)


def _runner(loaded: _Loaded, settings: Resolved) -> ModelRunner:
    model, kernels, device = loaded.model, loaded.kernels, settings.device
    cache = _allocate(loaded, settings)
    slots = SlotTable(settings.max_num_seqs, settings.max_model_len, settings.block_size, device)
    ends = tuple(model.eos_token_ids)
    sampler = Sampler(kernels, model.vocab_size, settings.max_num_seqs, ends, device, loaded.grammars)
    taped = recorded(loaded.decoder, kernels, cache, settings.max_num_batched_tokens, settings.most_drawn)
    proposers = make_proposers(settings, loaded.drafter, cache, sampler, model.eos_token_ids)
    return ModelRunner(taped, kernels, cache, slots, sampler, CudaCapture() if settings.graphs else None, proposers)


def _allocate(loaded: _Loaded, settings: Resolved) -> list[LayerKV]:
    model, (first, last) = loaded.model, loaded.share.spans.kv
    spec = kv_spec(loaded.share.config, settings.block_size, settings.kv_cache_dtype)
    scales = None
    if spec.coding.scale == "static":
        heads = slice(first // model.head_dim, last // model.head_dim)
        scales = load_kv_scales(loaded.path, model, settings.device, heads)
    try:
        return allocate(spec, model.num_layers, settings.num_blocks, settings.device, scales)
    except (RuntimeError, MemoryError) as error:
        raise EngineStartError(
            f"the KV cache of {settings.kv_cache_bytes} bytes cannot be allocated ({type(error).__name__}); "
            "lower kv_cache_bytes, num_blocks, gpu_memory_utilization or max_num_seqs"
        ) from None
