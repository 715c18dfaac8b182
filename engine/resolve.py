"""From wishes to values: one pure function, which says of each value where it came from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..scheduler.policy import POLICIES
from .config import EngineConfig
from .errors import EngineStartError
from .kv_cache import block_bytes, kv_spec
from .layout import weight_bytes
from .model_config import DecoderConfig
from .validation import MAX_N, MAX_TENANT_BYTES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Share of the memory left after the weights that the KV cache may take when nobody says how much. Zeroed pages cost
# nothing until used, so this bounds growth, not the start.
KV_SHARE = 0.4


MAX_WEIGHT = 1e6  # of a tenant: shares beyond that starve everybody else


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine offers. bytes of free memory: of the device that holds the model."""

    cuda: bool
    fast_bf16: bool
    cores: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Every setting with its value. `reasons`: setting -> where the value came from."""

    dtype: torch.dtype
    device: torch.device
    threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_prefill_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    reasons: dict[str, str] = field(default_factory=dict)


def look_at_machine(device: str) -> Machine:
    """Facts that `resolve` needs, read from the system."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        free = torch.cuda.mem_get_info()[0]
        fast = torch.cuda.is_bf16_supported()
    else:
        free = _free_memory()
        fast = torch.cpu._is_avx512_bf16_supported()
    return Machine(cuda=cuda, fast_bf16=fast, cores=_cores(), free_bytes=free)


def _cores() -> int:
    """Cores that this process may use: the affinity mask, cut by the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _free_memory() -> int:
    """Bytes that can be had without swapping: the system's, cut by the cgroup's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return free


def resolve(config: EngineConfig, model: DecoderConfig, machine: Machine) -> Resolved:
    """Decide what was left open. Raises EngineStartError naming setting, value and remedy for what cannot be."""
    _check_ranges(config)
    reasons: dict[str, str] = {}
    device = _device(config, machine, reasons)
    dtype = _dtype(config, machine, reasons)

    threads = config.threads or machine.cores
    reasons["threads"] = "given" if config.threads else "the cores this process may use"

    wanted = config.max_model_len or model.max_position
    if wanted > model.max_position:
        raise EngineStartError(
            f"max_model_len is {wanted}, but the model was made for {model.max_position} tokens; lower it"
        )
    reasons["max_model_len"] = "given" if config.max_model_len else "the model's own context"

    weights = weight_bytes(model, dtype)
    spec = kv_spec(model, config.block_size, dtype)
    per_block = block_bytes(spec, model.num_layers)
    num_blocks, reasons["num_blocks"] = _num_blocks(config, machine, wanted, weights, per_block)
    capacity = (num_blocks - 1) * config.block_size
    if capacity < wanted:
        if config.max_model_len or capacity < 2:
            raise EngineStartError(
                f"max_model_len is {wanted}, but the KV cache of {num_blocks} blocks holds {capacity} tokens; give it "
                f"{(-(-wanted // config.block_size) + 1) * per_block} bytes (kv_cache_bytes) or lower max_model_len"
            )
        wanted = capacity
        reasons["max_model_len"] = f"what the KV cache holds (the model's own is {model.max_position})"
    return Resolved(
        dtype=dtype,
        device=device,
        threads=threads,
        max_model_len=wanted,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_prefill_tokens=config.max_num_prefill_tokens,
        block_size=config.block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * per_block,
        weight_bytes=weights,
        reasons=reasons,
    )


def _check_ranges(config: EngineConfig) -> None:
    bounds = {
        "threads": (1, 1024),
        "max_model_len": (2, 1 << 30),
        "max_num_seqs": (1, 4096),
        "max_num_batched_tokens": (1, 1 << 20),
        "max_num_prefill_tokens": (1, 1 << 20),
        "overtaking": (0, 1_000_000),
        "slo_itl_ms": (1, 60_000),
        "max_n": (1, MAX_N),
        "block_size": (1, 1024),
        "num_blocks": (2, 1 << 31),
        "kv_cache_bytes": (1, 1 << 50),
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


def _dtype(config: EngineConfig, machine: Machine, reasons: dict[str, str]) -> torch.dtype:
    if config.dtype == "auto":
        reasons["dtype"] = "the machine multiplies bf16 fast" if machine.fast_bf16 else "no fast bf16 on this machine"
        return torch.bfloat16 if machine.fast_bf16 else torch.float32
    if config.dtype not in DTYPES:
        raise EngineStartError(f"dtype is {config.dtype!r}; choose auto, {', '.join(DTYPES)}")
    reasons["dtype"] = "given"
    return DTYPES[config.dtype]


def _num_blocks(
    config: EngineConfig, machine: Machine, max_model_len: int, weights: int, per_block: int
) -> tuple[int, str]:
    if config.num_blocks:
        return config.num_blocks, "given"
    if config.kv_cache_bytes:
        if config.kv_cache_bytes < 2 * per_block:
            raise EngineStartError(
                f"kv_cache_bytes is {config.kv_cache_bytes}; one block takes {per_block}, and two are the least"
            )
        return config.kv_cache_bytes // per_block, "kv_cache_bytes"
    if weights > machine.free_bytes:
        raise EngineStartError(
            f"the weights take {weights} bytes and {machine.free_bytes} are free; use a smaller model or dtype"
        )
    enough = config.max_num_seqs * -(-max_model_len // config.block_size) + 1
    share = int((machine.free_bytes - weights) * KV_SHARE) // per_block
    if enough <= share:
        return enough, "max_num_seqs full contexts"
    return max(2, share), f"{KV_SHARE:.0%} of the memory that the weights leave"
