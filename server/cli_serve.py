"""`quire serve`: the settings of the engine and of the HTTP server as options.

Every field of `EngineConfig` and `ServerConfig` is an option of that name; defaults stand in those two classes only.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..engine.config import EngineConfig
from .cli_options import (
    ENV_PREFIX,
    changed_values,
    err,
    option,
    parse_bytes,
    parse_overrides,
    parse_switch,
    parse_weights,
    read_config_file,
    unknown_environment,
)
from .config import ServerConfig

ENGINE, SERVER = EngineConfig(), ServerConfig()
MODEL, MEMORY, BATCH, COMPUTE, AHEAD = "Model", "Memory", "Batching", "Computing", "Speculation"
HTTP, ACCESS, LIMITS, LOGS = "HTTP", "Access", "Limits and timeouts", "Logs and metrics"

ALIASES = {
    "enable-prefix-caching": "prefix-caching",
    "no-enable-prefix-caching": "no-prefix-caching",
    "enable-tokenizer-info-endpoint": "tokenizer-info",
    "kv-cache-memory-bytes": "kv-cache-bytes",
    "num-gpu-blocks-override": "num-blocks",
    "max-num-queued-reqs": "max-queued-requests",
    "max-num-queued-tokens": "max-queued-tokens",
    "tenant-weight": "tenant-weights",
    "spec-method": "speculative-method",
    "spec-model": "speculative-model",
    "spec-tokens": "num-speculative-tokens",
    "shutdown-timeout": "drain-timeout",
    "sse-keep-alive-interval": "keep-alive-interval",
}


def spelling(name: str) -> str:
    """The option that a name means, without its dashes: vLLM's spellings and underscores are accepted."""
    name = name.replace("_", "-")
    return ALIASES.get(name, name)


FREE_PORT = "give one that is free, from 1024 to 65535, or 0 for any, and a --host of this machine"

CONTEXT = {"auto_envvar_prefix": ENV_PREFIX, "token_normalize_func": spelling}


def serve(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help='"bundled", a folder in Hugging Face layout, or a hub id.', envvar="QUIRE_MODEL", metavar="MODEL"
        ),
    ] = ENGINE.model,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of options (`max-model-len: 4096`); environment and command line win over it.",
            callback=read_config_file,
            is_eager=True,
        ),
    ] = None,
    revision: Annotated[str | None, option(MODEL, "Revision of a hub id.")] = ENGINE.revision,
    served_model_name: Annotated[
        list[str] | None, option(MODEL, "Names that requests may use (repeatable); nothing = the folder's name.")
    ] = None,
    max_model_len: Annotated[
        int | None, option(MODEL, "Prompt and output together, in tokens; nothing = the model's own context.", min=1)
    ] = ENGINE.max_model_len,
    generation_config: Annotated[
        str, option(MODEL, "Sampling defaults: auto = the model's own, none = OpenAI's.")
    ] = SERVER.generation_config,
    tool_call_parser: Annotated[
        str,
        option(
            MODEL,
            "How it spells calls of tools: auto (as its chat template says), none, hermes, qwen3_coder, mistral, "
            "mistral_v11, llama3_json, pythonic, deepseek_v3 or deepseek_v31.",
        ),
    ] = SERVER.tool_call_parser,
    reasoning_parser: Annotated[
        str,
        option(MODEL, "How it marks its thinking: auto, none, qwen3, deepseek_r1, magistral or seed_oss."),
    ] = SERVER.reasoning_parser,
    kv_cache_bytes: Annotated[
        Any,
        option(
            MEMORY,
            "Memory for the KV cache, such as 2GiB; nothing = a share of what is free, on a GPU what is left.",
            parser=parse_bytes,
            metavar="SIZE",
        ),
    ] = ENGINE.kv_cache_bytes,
    kv_cache_dtype: Annotated[
        str,
        option(
            MEMORY,
            "Keys and values as auto, bfloat16, float16, float32, fp8, int8 or int4 (the last three approximate).",
        ),
    ] = ENGINE.kv_cache_dtype,
    gpu_memory_utilization: Annotated[
        float | None,
        option(MEMORY, "Share of the GPU's memory to use, all in all; nothing = 0.9.", min=0.01, max=1.0),
    ] = ENGINE.gpu_memory_utilization,
    num_blocks: Annotated[int | None, option(MEMORY, "KV blocks, instead of a size.", min=2)] = ENGINE.num_blocks,
    block_size: Annotated[int, option(MEMORY, "Tokens of a KV block.", min=1)] = ENGINE.block_size,
    prefix_caching: Annotated[
        bool,
        option(MEMORY, "Share the KV cache of equal prompt beginnings."),
    ] = ENGINE.prefix_caching,
    prefix_eviction: Annotated[
        str, option(MEMORY, "Which cached block makes room: lru, discard or phase (predicted).")
    ] = ENGINE.prefix_eviction,
    max_num_seqs: Annotated[int, option(BATCH, "Sequences that run at once.", min=1)] = ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, option(BATCH, "Tokens of one step over all sequences.", min=1)
    ] = ENGINE.max_num_batched_tokens,
    max_num_prefill_tokens: Annotated[
        int | None,
        option(
            BATCH,
            "Of these, prompt tokens while any stream decodes: less = steadier streams, more = faster prompts. "
            "Nothing = as many as fit in a step of 80 ms.",
            min=1,
        ),
    ] = ENGINE.max_num_prefill_tokens,
    prefill_chunking: Annotated[
        str, option(BATCH, "Chunks of a long prompt: tokens = equally long, time = they take equally long.")
    ] = ENGINE.prefill_chunking,
    slo_itl_ms: Annotated[
        float | None,
        option(
            BATCH,
            "Promised gap between two tokens of every stream, in place of --max-num-prefill-tokens.",
            metavar="MILLISECONDS",
        ),
    ] = ENGINE.slo_itl_ms,
    scheduling_policy: Annotated[
        str, option(BATCH, "Who runs first: fcfs, priority, fair (between tenants) or deadline.")
    ] = ENGINE.scheduling_policy,
    overtaking: Annotated[
        float,
        option(
            BATCH,
            "A prompt lets those go first that come within so many times its own prefill time; 0 = none.",
        ),
    ] = ENGINE.overtaking,
    tenant_weights: Annotated[
        list[str] | None,
        option(
            BATCH,
            "A tenant and its share, such as alice=2 (repeatable); requests must then name one of them.",
            metavar="NAME=WEIGHT",
        ),
    ] = None,
    speculative_method: Annotated[
        str,
        option(
            AHEAD,
            "Who guesses tokens ahead for the model to verify: none, ngram (what followed the same tokens before), "
            "draft (a smaller model), nested (a slice of the model) or layers (some of its layers). The output stays "
            "the model's own.",
        ),
    ] = ENGINE.speculative_method,
    speculative_model: Annotated[
        str | None,
        option(
            AHEAD,
            "draft: a folder or hub id. nested: the slice's width, h/2, h/4, h/8 or a number. layers: those that it "
            "keeps, 0,1,6.",
        ),
    ] = ENGINE.speculative_model,
    num_speculative_tokens: Annotated[
        int | None, option(AHEAD, "Tokens guessed one after another; nothing = the method's default.", min=1)
    ] = ENGINE.num_speculative_tokens,
    speculative_tree: Annotated[
        str, option(AHEAD, "chain, or several guesses for each place: rsd-c:2,2,1 or rsd-s:3x4 (width x depth).")
    ] = ENGINE.speculative_tree,
    speculative_adaptive: Annotated[
        Any,
        option(
            AHEAD,
            "on = as many as pay, for each request and step; off = always all of them.",
            parser=parse_switch,
            metavar="on|off",
            show_default="on",
        ),
    ] = ENGINE.speculative_adaptive,
    dtype: Annotated[str, option(COMPUTE, "auto, bfloat16, float16 or float32.")] = ENGINE.dtype,
    quantization: Annotated[
        str | None,
        option(
            COMPUTE,
            "Quantize the layers' matrices while loading: int4, int8, w8a8, fp8, fp8_block, or with a group, int4:32.",
        ),
    ] = ENGINE.quantization,
    device: Annotated[str, option(COMPUTE, "auto, cpu or cuda.")] = ENGINE.device,
    threads: Annotated[
        int | None,
        option(COMPUTE, "CPU threads, at most the cores that this process may use; nothing = all of them.", min=1),
    ] = ENGINE.threads,
    tensor_parallel_size: Annotated[
        int,
        option(COMPUTE, "Processes that share the model, each with a part of every layer: one for each GPU.", min=1),
    ] = ENGINE.tensor_parallel_size,
    kernels: Annotated[
        list[str] | None,
        option(COMPUTE, "Choose an implementation, such as attention=reference (repeatable).", metavar="OP=NAME"),
    ] = None,
    graphs: Annotated[
        bool | None, option(COMPUTE, "Replay steps of decodes as CUDA graphs; nothing = on a GPU.")
    ] = ENGINE.graphs,
    overlap: Annotated[
        bool | None,
        option(COMPUTE, "Launch a step before the last one's tokens are known; nothing = on a GPU."),
    ] = ENGINE.overlap,
    check: Annotated[
        bool, option(COMPUTE, "Verify every KV block after every step; for tests, slow.", "--check/--no-check")
    ] = ENGINE.check,
    host: Annotated[str, option(HTTP, "Address to listen on.")] = SERVER.host,
    port: Annotated[int, option(HTTP, "0 = any free one.", min=0, max=65535)] = SERVER.port,
    health_port: Annotated[
        int | None,
        option(
            HTTP,
            "Where /health, /ready and /metrics are answered as well, however busy the server is; nothing = nowhere.",
            min=1,
            max=65535,
        ),
    ] = SERVER.health_port,
    allowed_hosts: Annotated[
        list[str] | None,
        option(
            HTTP,
            "Host names that requests may be addressed to (repeatable); nothing = loopback names if bound to loopback.",
        ),
    ] = None,
    text_threads: Annotated[
        int, option(HTTP, "Threads that tokenize and render chat templates.", min=1)
    ] = SERVER.text_threads,
    api_key: Annotated[
        list[str] | None,
        option(
            ACCESS,
            "Key that clients must send (repeatable). Shown by ps: prefer QUIRE_API_KEY or --api-key-file.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, option(ACCESS, "File with one key a line.", exists=True, dir_okay=False)
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        option(
            ACCESS,
            "YAML or JSON list of named keys with weights, quotas and scopes (quire keys), read again when it changes.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    insecure_no_auth: Annotated[
        bool, option(ACCESS, "Listen beyond this machine without any key.", "--insecure-no-auth")
    ] = False,
    trust_request_chat_template: Annotated[
        bool,
        option(
            ACCESS, "Take templates from requests.", "--trust-request-chat-template/--no-trust-request-chat-template"
        ),
    ] = SERVER.trust_request_chat_template,
    tokenizer_info: Annotated[
        bool,
        option(ACCESS, "Show marks and chat template at /tokenizer_info.", "--tokenizer-info/--no-tokenizer-info"),
    ] = SERVER.tokenizer_info,
    max_queued_requests: Annotated[
        int,
        option(LIMITS, "Samples that may wait; past it, 503 with Retry-After.", min=0),
    ] = SERVER.max_queued_requests,
    max_queued_tokens: Annotated[
        int | None,
        option(LIMITS, "Prompt tokens that may wait; past it 503 as well; nothing = no such bound.", min=1),
    ] = SERVER.max_queued_tokens,
    max_queue_seconds: Annotated[
        float | None,
        option(LIMITS, "Predicted wait past which 503 as well; nothing = no such bound.", metavar="SECONDS"),
    ] = SERVER.max_queue_seconds,
    max_n: Annotated[int, option(LIMITS, "Samples of one prompt that a request may ask for.")] = ENGINE.max_n,
    max_connections: Annotated[
        int, option(LIMITS, "Open connections; past it, 503 before a byte is read.", min=1)
    ] = SERVER.max_connections,
    max_body_bytes: Annotated[
        Any, option(LIMITS, "Largest request body, such as 2MiB.", parser=parse_bytes, metavar="SIZE")
    ] = SERVER.max_body_bytes,
    max_logprobs: Annotated[
        int, option(LIMITS, "Most likely tokens that a request may ask for.", min=0)
    ] = ENGINE.max_logprobs,
    request_timeout: Annotated[float, option(LIMITS, "Seconds for a whole request.")] = SERVER.request_timeout,
    drain_timeout: Annotated[
        float,
        option(LIMITS, "Seconds that running requests get to finish after SIGTERM.", min=0),
    ] = SERVER.drain_timeout,
    write_timeout: Annotated[
        float, option(LIMITS, "Seconds until a client that does not read is dropped.", min=0)
    ] = SERVER.write_timeout,
    keep_alive_interval: Annotated[
        float,
        option(LIMITS, "Seconds of silence after which a stream gets a comment.", min=0),
    ] = SERVER.keep_alive_interval,
    hang_timeout: Annotated[
        float,
        option(
            LIMITS, "Seconds of silence from the engine until /health says 503; at twice as many it is killed.", min=0
        ),
    ] = SERVER.hang_timeout,
    max_engine_restarts: Annotated[
        int, option(LIMITS, "Times in a row that an engine which ended is started again.", min=0)
    ] = SERVER.max_engine_restarts,
    live_page: Annotated[
        bool, option(LOGS, "The page at / that shows the engine at work.", "--live-page/--no-live-page")
    ] = SERVER.live_page,
    vllm_metrics: Annotated[
        bool, option(LOGS, "Repeat metrics under their vllm: names.", "--vllm-metrics/--no-vllm-metrics")
    ] = SERVER.vllm_metrics,
    otlp_traces_endpoint: Annotated[
        str | None,
        option(LOGS, "Send OpenTelemetry traces there, http://HOST:4318/v1/traces; nothing = none.", metavar="URL"),
    ] = SERVER.otlp_traces_endpoint,
    log_json: Annotated[bool, option(LOGS, "One JSON object a line.", "--log-json/--no-log-json")] = SERVER.log_json,
    log_level: Annotated[str, option(LOGS, "debug, info, warning or error.")] = SERVER.log_level,
) -> None:
    """Serve a model with an OpenAI-compatible HTTP API.

    Every option is also a variable (QUIRE_MAX_MODEL_LEN) and a line of --config. vLLM's spellings are accepted.
    """
    if unknown := unknown_environment(ctx):
        _refuse("; ".join(unknown))
    engine_config, server_config = read_settings(ctx)
    for name, (value, source) in changed_values(ctx, secret=("api_key",)).items():
        err.print(f"{name.replace('_', '-')} = {value}  ({source})", style="dim", markup=False)
    if not run(engine_config, server_config):
        raise typer.Exit(1)


def run(engine_config: EngineConfig, server_config: ServerConfig) -> bool:
    """Serve from an engine in a process of its own until told to stop; False if that went wrong. Ends with exit code 2
    where it cannot be done as asked: before anything is started, or while the engine reads its settings."""
    from ..engine.process import ProcessClient
    from ..engine.supervisor import Supervisor
    from .serve import SettingsRefused
    from .serve import serve as serve_until_stopped

    for name, port in (("port", server_config.port), ("health-port", server_config.health_port)):
        if port is not None and (why := why_not_listen(server_config.host, port)) is not None:
            _refuse(f"--{name} {port}: nothing can listen there on {server_config.host} ({why}); {FREE_PORT}")
    engine = Supervisor(
        ProcessClient,
        engine_config,
        hang_timeout=server_config.hang_timeout,
        max_restarts=server_config.max_engine_restarts,
    )
    try:
        return serve_until_stopped(engine, server_config)
    except SettingsRefused:
        raise typer.Exit(2) from None


def read_settings(ctx: typer.Context) -> tuple[EngineConfig, ServerConfig]:
    """The two settings objects from the options by field name; refuses a door that is open to a network by accident."""
    values = dict(ctx.params)
    values["kernels"] = parse_overrides(values["kernels"] or ())
    values["tenant_weights"] = parse_weights(values["tenant_weights"] or ())
    values["api_key"] = (*(values["api_key"] or ()), *_keys_of(values["api_key_file"]))
    for name in ("served_model_name", "allowed_hosts"):
        values[name] = tuple(values[name] or ())
    if values["api_keys_file"] is not None:
        _check_keys_file(values["api_keys_file"], values["tenant_weights"])
    elif not is_loopback(values["host"]) and not values["api_key"] and not values["insecure_no_auth"]:
        _refuse(
            f"--host {values['host']} can be reached from other machines and no API key is set: set QUIRE_API_KEY, "
            "--api-key-file or --api-keys-file, or say --insecure-no-auth"
        )
    engine = EngineConfig(**{field.name: values[field.name] for field in fields(EngineConfig)})
    try:
        server = ServerConfig(**{field.name: values[field.name] for field in fields(ServerConfig)})
    except ValueError as error:
        name, _, what = str(error).partition(" ")
        raise typer.BadParameter(what, param_hint="--" + name.replace("_", "-")) from None
    return engine, server


def _check_keys_file(path: Path, tenant_weights: dict[str, float]) -> None:
    """Now, while whoever starts the server looks on; it is read again when it is used."""
    from .keys_file import KeysFileError, load_keys

    if tenant_weights:
        _refuse("--tenant-weight and --api-keys-file exclude each other: write `weight` into the file's entries")
    try:
        load_keys(path)
    except KeysFileError as error:
        _refuse(str(error))


def _refuse(why: str) -> NoReturn:
    """One line, and the exit code of a wrong option."""
    err.print(f"quire: {why}", markup=False)
    raise typer.Exit(2)


def why_not_listen(host: str, port: int) -> str | None:
    """What keeps this process from listening there: asked before anything is started, which would have to be ended."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        return error.strerror
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost may resolve to anything, so it does not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys_of(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise typer.BadParameter(f"{path} holds no key", param_hint="--api-key-file")
    return keys
