"""What a person sets, and nothing else: frozen, spelled as on the command line, None = decided at start.

`resolve.py` turns these wishes into `Resolved` and says for each value where it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BUNDLED_MODEL = "bundled"  # the target model that lies in the package's own models/ folder


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    model                   "bundled", a folder in Hugging Face layout, or a hub id
    revision                of a hub id
    dtype                   "bfloat16", "float16", "float32", or "auto": bf16 where that is fast, else fp32
    quantization            what the layers' matrices become while they are loaded: "int4", "int8", "w8a8", "fp8",
                            "fp8_block", a group size behind a colon ("int4:32"); None = as the checkpoint has them
    device                  "auto", "cpu", "cuda"
    threads                 that compute on the CPU, of each rank, at most the cores this process may use; None = all of
                            these, shared out among the ranks
    tensor_parallel_size    processes that share the model, each with a part of every layer (docs/parallel.md); on GPUs
                            each has its own. Sizes of memory are those of one of them
    max_model_len           prompt and output together; None = the model's own context
    max_num_seqs            sequences that may run at once
    max_num_batched_tokens  tokens of one step over all sequences
    max_num_prefill_tokens  of these, prompt tokens while any stream decodes: the bound on how long a prompt holds it
                            up. None = as many as a step of 80 ms is predicted to take in (scheduler/budget.py)
    scheduling_policy       who runs first (scheduler/policy.py): "fcfs", "priority", "fair" between tenants, "deadline"
    overtaking              a prompt stands behind those that come within so many times its own prefill time: short ones
                            may overtake long ones for so long, and no longer. 0 = strictly in order of arrival. Under
                            overload this decides who carries it; docs/scheduling.md measures several
    tenant_weights          {tenant: share} for `fair`; when given, requests must name one of them
    slo_itl_ms              promised gap between two tokens of every stream: a step takes as many prompt tokens as its
                            predicted time allows. It replaces max_num_prefill_tokens
    prefill_chunking        "tokens" = chunks of a long prompt are equally long, "time" = they take equally long
    max_n                   samples of one prompt that a request may ask for
    block_size              tokens per KV block
    num_blocks              KV blocks; None = from kv_cache_bytes
    kv_cache_bytes          memory for the KV cache; None = on a GPU what gpu_memory_utilization leaves, on the CPU a
                            share of what is free after the weights are loaded
    gpu_memory_utilization  share of the GPU's memory that may be used, by all that runs on it: what weights,
                            activations and graphs turn out to leave of it is the KV cache's; None = 0.9
    kv_cache_dtype          of keys and values: "auto" = what the checkpoint was made for, else dtype; "bfloat16",
                            "float16", "float32", "fp8", "int8", "int4". Eight and four bits change what is computed
    prefix_caching          share full blocks between prompts with equal beginnings
    prefix_eviction         which cached block makes room: "lru", "discard", "phase" (predicted; scheduler/eviction.py)
    speculative_method      who guesses tokens ahead, for the target to verify: "none"; "ngram", what followed the same
                            tokens before; "draft", a smaller model; "nested", a slice of the target; "layers", some of
                            its layers. It changes how fast tokens come, not which (engine/spec/)
    speculative_model       of "draft" a folder or hub id; of "nested" the width of the slice, "h/2", "h/4", "h/8" or a
                            number of FFN channels; of "layers" the layers that it keeps, "0,1,6"; else None
    num_speculative_tokens  guessed one after another, at most; None = the method's default
    speculative_tree        "chain", or several guesses for each place: "rsd-c:2,2,1", "rsd-s:3x4" (scheduler/drafts.py)
    speculative_adaptive    guess as much as pays, for each request and step; False = always the whole shape
    max_logprobs            rivals per token that a request may ask for; -1 = up to the whole vocabulary
    kernels                 {op: implementation}, to override the choice of the registry
    graphs                  replay steps of decodes as CUDA graphs; None = on a GPU
    overlap                 launch a step before the one before it is collected; None = on a GPU. On the CPU the model
                            takes the cores that planning would use, and the launch is the whole step
    check                   verify every block count after every step (tests; too slow to serve with)
    """

    model: str = BUNDLED_MODEL
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    threads: int | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_prefill_tokens: int | None = None
    scheduling_policy: str = "fcfs"
    overtaking: float = 200.0
    tenant_weights: dict[str, float] = field(default_factory=dict)
    slo_itl_ms: float | None = None
    prefill_chunking: str = "tokens"
    max_n: int = 128
    block_size: int = 32
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    prefix_eviction: str = "lru"
    speculative_method: str = "none"
    speculative_model: str | None = None
    num_speculative_tokens: int | None = None
    speculative_tree: str = "chain"
    speculative_adaptive: bool = True
    max_logprobs: int = 20
    kernels: dict[str, str] = field(default_factory=dict)
    graphs: bool | None = None
    overlap: bool | None = None
    check: bool = False
