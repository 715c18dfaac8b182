"""From wishes to values: one pure function, which says of each value where it came from."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..kernels import Kernels, Target
from ..kernels import resolve as resolve_kernels
from ..scheduler.drafts import MAX_NODES, DraftShape
from ..scheduler.policy import POLICIES
from . import cgroup
from .config import EngineConfig
from .errors import EngineStartError
from .kv_cache import FORMAT, block_bytes, choose_kv_format, kv_spec
from .layout import weight_bytes
from .model_config import DecoderConfig
from .quant.rounding import choose_rounding, refuses_gpu
from .quant.scheme import Packing
from .sharding import MAX_RANKS, share_of
from .spec.settings import choose_drafts
from .validation import MAX_N, MAX_TENANT_BYTES, MAX_WEIGHT

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Share of the memory left after the weights that the KV cache may take when nobody says how much. Zeroed pages cost
# nothing until used, so this bounds growth, not the start.
KV_SHARE = 0.4

# Share of a GPU that is used when nobody says how much. The rest is for what cannot be measured at the start: memory
# that torch holds in pieces of the wrong size, logits kept for samples to come.
GPU_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine offers. bytes of free memory: of the device that holds the model.

    capability: of the GPU, as (9, 0) for an H100; (0, 0) where there is none.
    """

    cuda: bool
    fast_bf16: bool
    cores: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)
    total_bytes: int = 0  # of the GPU
    devices: int = 1  # GPUs, where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Every setting with its value. `reasons`: setting -> where the value came from. Bytes are those of one rank.

    quantization    the checkpoint's method, or the format that floats become on the way in, or "none"
    rounding        how they become that; None = they stay
    kv_cache_dtype  a name in kernels/kv_formats.py
    memory_share    of the GPU, to be used; num_blocks is then a guess, until it has been measured. None = it is settled
    draft_method    who guesses ahead, "none" = nobody
    draft_shape     what is guessed for one sequence in one step, at most; None = nothing
    draft           the model that guesses, if it is one of its own
    """

    dtype: torch.dtype
    device: torch.device
    threads: int
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_prefill_tokens: int | None
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    quantization: str
    rounding: Packing | None
    kv_cache_dtype: str
    capability: tuple[int, int]
    memory_share: float | None
    graphs: bool
    overlap: bool
    draft_method: str
    draft_shape: DraftShape | None
    draft: DecoderConfig | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def most_drawn(self) -> int:
        """Rows of a step that tokens are drawn from, at most: of guesses all are."""
        rows = 1 if self.draft_shape is None else 1 + self.draft_shape.nodes
        return min(self.max_num_seqs * rows, self.max_num_batched_tokens)


def look_at_machine(device: str) -> Machine:
    """Facts that `resolve` needs, read from the system."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        free, total = torch.cuda.mem_get_info()
        fast = torch.cuda.is_bf16_supported()
    else:
        free, total = _free_memory(), 0
        fast = torch.cpu._is_avx512_bf16_supported()
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    return Machine(
        cuda=cuda,
        fast_bf16=fast,
        cores=_cores(),
        free_bytes=free,
        capability=capability,
        total_bytes=total,
        devices=torch.cuda.device_count() if cuda else 1,
    )


def _cores() -> int:
    """Cores that this process may use: the affinity mask, cut by what its container may use of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = cgroup.processors()
    return cores if allowed is None else max(1, min(cores, int(allowed)))


def _free_memory() -> int:
    """Bytes that can be had without swapping: the system's, cut by what the container leaves."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    allowed = cgroup.memory()
    return free if allowed is None else min(free, allowed)


def usable_threads(wanted: int | None, cores: int) -> int:
    """As many as were asked for, as far as there are cores: they wait for each other, and more would wait in turn."""
    if wanted is not None and wanted > cores:
        log.warning("threads is %d, this process may use %d cores: %d threads compute", wanted, cores, cores)
    return min(wanted or cores, cores)


def resolve(
    config: EngineConfig, model: DecoderConfig, machine: Machine, draft: DecoderConfig | None = None
) -> Resolved:
    """Decide what was left open. draft: the model that guesses, if it is one of its own.

    Raises EngineStartError naming setting, value and remedy for what cannot be.
    """
    _check_ranges(config)
    reasons: dict[str, str] = {}
    device = _device(config, machine, reasons)
    if config.graphs and device.type == "cpu":
        raise EngineStartError("graphs is on, but the device is the CPU, which has none: leave graphs out")
    dtype = _dtype(config, machine, reasons)

    ranks = config.tensor_parallel_size
    if device.type == "cuda" and ranks > machine.devices:
        raise EngineStartError(
            f"tensor_parallel_size is {ranks}, but torch sees {machine.devices} CUDA devices; give at most that many"
        )
    if device.type == "cpu":  # which the ranks share
        machine = replace(machine, cores=max(1, machine.cores // ranks), free_bytes=machine.free_bytes // ranks)
    threads = usable_threads(config.threads, machine.cores)
    reasons["threads"] = "given" if threads == config.threads else "the cores this process may use"
    reasons["tensor_parallel_size"] = "given" if ranks > 1 else "one process holds the model"

    wanted = config.max_model_len or model.max_position
    if wanted > model.max_position:
        raise EngineStartError(
            f"max_model_len is {wanted}, but the model was made for {model.max_position} tokens; lower it"
        )
    reasons["max_model_len"] = "given" if config.max_model_len else "the model's own context"

    quantization, rounding = _quantization(config, model, machine, reasons)
    kv_cache_dtype, reasons["kv_cache_dtype"] = choose_kv_format(config.kv_cache_dtype, model, dtype)
    share = share_of(model, 0, ranks, rounding)  # of the one that holds the most
    weights = weight_bytes(model, dtype, rounding, share.spans) + (0 if draft is None else weight_bytes(draft, dtype))
    per_block = _block_bytes(config, share.config, kv_cache_dtype, draft, dtype)
    draft_method, draft_shape = choose_drafts(config, reasons)
    if draft_method == "nested" and ranks > 1:
        raise EngineStartError(
            f"speculative_method is 'nested', but its slice would lie on the first of {ranks} ranks "
            "(tensor_parallel_size); choose draft, layers or ngram"
        )
    memory_share = _memory_share(config, device)
    num_blocks, reasons["num_blocks"] = _num_blocks(config, machine, wanted, weights, per_block, memory_share)
    return Resolved(
        dtype=dtype,
        device=device,
        threads=threads,
        tensor_parallel_size=ranks,
        max_model_len=_held(config, wanted, num_blocks, per_block, reasons),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_prefill_tokens=config.max_num_prefill_tokens,
        block_size=config.block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * per_block,
        weight_bytes=weights,
        quantization=quantization,
        rounding=rounding,
        kv_cache_dtype=kv_cache_dtype,
        capability=machine.capability,
        memory_share=memory_share,
        graphs=_on_a_gpu("graphs", config.graphs, device, reasons),
        overlap=_on_a_gpu("overlap", config.overlap, device, reasons),
        draft_method=draft_method,
        draft_shape=draft_shape,
        draft=draft,
        reasons=reasons,
    )


def with_kv_cache(config: EngineConfig, model: DecoderConfig, settings: Resolved, kv_cache_bytes: int) -> Resolved:
    """The settings with a KV cache of a measured size. Raises EngineStartError when it is too small to serve."""
    share = share_of(model, 0, settings.tensor_parallel_size, settings.rounding)
    per_block = _block_bytes(config, share.config, settings.kv_cache_dtype, settings.draft, settings.dtype)
    num_blocks = kv_cache_bytes // per_block
    if num_blocks < 2:
        raise EngineStartError(
            f"gpu_memory_utilization is {settings.memory_share}, which leaves {kv_cache_bytes} bytes for the KV cache, "
            f"and a block takes {per_block}; raise it, lower max_num_batched_tokens or max_num_seqs, or take a smaller "
            "model"
        )
    reasons = settings.reasons | {"num_blocks": f"measured: what {settings.memory_share:.0%} of the GPU leaves"}
    return replace(
        settings,
        max_model_len=_held(config, settings.max_model_len, num_blocks, per_block, reasons),
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * per_block,
        memory_share=None,
        reasons=reasons,
    )


def _block_bytes(
    config: EngineConfig, model: DecoderConfig, kv_format: str, draft: DecoderConfig | None, dtype: torch.dtype
) -> int:
    """Of one block, which a draft model of its own has as well, in its own number format. model: as one rank has it."""
    size = block_bytes(kv_spec(model, config.block_size, kv_format), model.num_layers)
    if draft is not None:
        size += block_bytes(kv_spec(draft, config.block_size, FORMAT[dtype]), draft.num_layers)
    return size


def choose_kernels(config: EngineConfig, settings: Resolved, model: DecoderConfig, kv_format: str) -> Kernels:
    """The table of kernels for one model. Raises EngineStartError for an override that cannot be."""
    target = Target(settings.device.type, settings.dtype, model.head_dim, kv_format, settings.capability)
    try:
        return resolve_kernels(target, config.kernels)
    except ValueError as error:
        raise EngineStartError(f"kernels: {error}") from None


def _held(config: EngineConfig, wanted: int, num_blocks: int, per_block: int, reasons: dict[str, str]) -> int:
    """The longest sequence up to `wanted` tokens that the KV cache holds."""
    capacity = (num_blocks - 1) * config.block_size
    if capacity >= wanted:
        return wanted
    if config.max_model_len or capacity < 2:
        raise EngineStartError(
            f"max_model_len is {wanted}, but the KV cache of {num_blocks} blocks holds {capacity} tokens; give it "
            f"{(-(-wanted // config.block_size) + 1) * per_block} bytes (kv_cache_bytes) or lower max_model_len"
        )
    reasons["max_model_len"] = "what the KV cache holds; the model's own is longer"
    return capacity


def _memory_share(config: EngineConfig, device: torch.device) -> float | None:
    """Of the GPU, when that is what decides the size of the KV cache."""
    wish = config.gpu_memory_utilization
    settled = "num_blocks" if config.num_blocks else "kv_cache_bytes" if config.kv_cache_bytes else None
    if wish is not None and device.type == "cpu":
        raise EngineStartError(f"gpu_memory_utilization is {wish}, but the device is the CPU; give kv_cache_bytes")
    if wish is not None and settled is not None:
        raise EngineStartError(f"gpu_memory_utilization and {settled} both say how large the KV cache is; give one")
    if device.type == "cpu" or settled is not None:
        return None
    return GPU_SHARE if wish is None else wish


def _check_ranges(config: EngineConfig) -> None:
    bounds = {
        "threads": (1, 1024),
        "tensor_parallel_size": (1, MAX_RANKS),
        "max_model_len": (2, 1 << 30),
        "max_num_seqs": (1, 4096),
        "max_num_batched_tokens": (1, 1 << 20),
        "max_num_prefill_tokens": (1, 1 << 20),
        "overtaking": (0, 1_000_000),
        "slo_itl_ms": (0.01, 60_000),
        "max_n": (1, MAX_N),
        "block_size": (1, 1024),
        "num_blocks": (2, 1 << 31),
        "kv_cache_bytes": (1, 1 << 50),
        "gpu_memory_utilization": (0.01, 1.0),
        "num_speculative_tokens": (1, MAX_NODES),
    }
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise EngineStartError(f"{name} is {value}; give a number from {low} to {high}")
    choices = {
        "scheduling_policy": tuple(POLICIES),
        "prefill_chunking": ("tokens", "time"),
        "prefix_eviction": ("lru", "discard", "phase"),
    }
    for name, words in choices.items():
        value = getattr(config, name)
        if value not in words:
            raise EngineStartError(f"{name} is {value!r}; choose {', '.join(words)}")
    for tenant, weight in config.tenant_weights.items():
        if not 0 < weight <= MAX_WEIGHT or not 0 < len(tenant.encode()) <= MAX_TENANT_BYTES:
            raise EngineStartError(
                f"tenant_weights has {tenant!r}: {weight}; give a name of 1 to {MAX_TENANT_BYTES} bytes a number above "
                f"0 and at most {MAX_WEIGHT:g}"
            )
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise EngineStartError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens} and max_num_seqs {config.max_num_seqs}; "
            "a step must hold one token of every sequence: raise the first or lower the second"
        )


def _device(config: EngineConfig, machine: Machine, reasons: dict[str, str]) -> torch.device:
    if config.device not in ("auto", "cpu", "cuda"):
        raise EngineStartError(f"device is {config.device!r}; choose auto, cpu or cuda")
    if config.device == "cuda" and not machine.cuda:
        raise EngineStartError("device is 'cuda', but torch sees no CUDA device; use 'cpu' or check the driver")
    reasons["device"] = (
        "given" if config.device != "auto" else ("a GPU is there" if machine.cuda else "no GPU is there")
    )
    return torch.device("cuda" if machine.cuda else "cpu")


def _on_a_gpu(name: str, wish: bool | None, device: torch.device, reasons: dict[str, str]) -> bool:
    """A setting that is on for a GPU unless somebody says otherwise."""
    reasons[name] = "given" if wish is not None else f"the device is {device.type}"
    return device.type == "cuda" if wish is None else wish


def _dtype(config: EngineConfig, machine: Machine, reasons: dict[str, str]) -> torch.dtype:
    if config.dtype == "auto":
        reasons["dtype"] = "the machine multiplies bf16 fast" if machine.fast_bf16 else "no fast bf16 on this machine"
        return torch.bfloat16 if machine.fast_bf16 else torch.float32
    if config.dtype not in DTYPES:
        raise EngineStartError(f"dtype is {config.dtype!r}; choose auto, {', '.join(DTYPES)}")
    reasons["dtype"] = "given"
    return DTYPES[config.dtype]


def _quantization(
    config: EngineConfig, model: DecoderConfig, machine: Machine, reasons: dict[str, str]
) -> tuple[str, Packing | None]:
    rounding = choose_rounding(config.quantization, model.quantization)
    formats = model.quantization.formats if model.quantization else (rounding.format,) if rounding else ()
    for name in formats:
        why = refuses_gpu(name, machine.capability)
        if why is not None:
            raise EngineStartError(f"quantization: {why}")
    if model.quantization is not None:
        reasons["quantization"] = "the checkpoint's"
        return model.quantization.method, None
    reasons["quantization"] = "given" if rounding else "the checkpoint's weights are floats"
    return config.quantization or "none", rounding


def _num_blocks(
    config: EngineConfig,
    machine: Machine,
    max_model_len: int,
    weights: int,
    per_block: int,
    memory_share: float | None,
) -> tuple[int, str]:
    if weights > machine.free_bytes:
        raise EngineStartError(
            f"the weights take {weights} bytes and {machine.free_bytes} are free; use a smaller model or dtype"
        )
    if config.num_blocks:
        return config.num_blocks, "given"
    if config.kv_cache_bytes:
        if config.kv_cache_bytes < 2 * per_block:
            raise EngineStartError(
                f"kv_cache_bytes is {config.kv_cache_bytes}; one block takes {per_block}, and two are the least"
            )
        return config.kv_cache_bytes // per_block, "kv_cache_bytes"
    if memory_share is not None:
        taken = machine.total_bytes - machine.free_bytes + weights
        return max(2, (int(memory_share * machine.total_bytes) - taken) // per_block), "before measuring"
    enough = config.max_num_seqs * -(-max_model_len // config.block_size) + 1
    share = int((machine.free_bytes - weights) * KV_SHARE) // per_block
    if enough <= share:
        return enough, "max_num_seqs full contexts"
    return max(2, share), f"{KV_SHARE:.0%} of the memory that the weights leave"
