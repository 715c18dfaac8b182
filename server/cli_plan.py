"""`quire plan`: does this model fit, and how many requests at once? From its JSON alone, before weights are loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.config import EngineConfig
from .cli_options import err, format_bytes, option, out, parse_bytes

if TYPE_CHECKING:
    from ..engine.model_config import DecoderConfig
    from ..engine.resolve import Resolved

DEFAULTS = EngineConfig()
BUDGET = "Budget"
MANY_BLOCKS = 1 << 31  # enough for any context, to learn the weights' size before the cache's is known


def plan(
    model: Annotated[
        str, typer.Argument(help='"bundled", a folder, or a hub id (only its JSON is downloaded).', metavar="MODEL")
    ] = DEFAULTS.model,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = DEFAULTS.revision,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = DEFAULTS.dtype,
    quantization: Annotated[
        str | None, typer.Option(help="int4, int8, w8a8, fp8, fp8_block: quantize while loading.")
    ] = DEFAULTS.quantization,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULTS.device,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Processes that share the model; sizes are those of one.", min=1)
    ] = DEFAULTS.tensor_parallel_size,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and output together; nothing = the model's own context.", min=1)
    ] = DEFAULTS.max_model_len,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run at once.", min=1)] = DEFAULTS.max_num_seqs,
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.", min=1)] = DEFAULTS.block_size,
    kv_cache_bytes: Annotated[
        Any, option(BUDGET, "Memory for the KV cache, such as 2GiB.", parser=parse_bytes, metavar="SIZE")
    ] = DEFAULTS.kv_cache_bytes,
    kv_cache_dtype: Annotated[
        str, option(BUDGET, "auto, bfloat16, float16, float32, fp8, int8 or int4.")
    ] = DEFAULTS.kv_cache_dtype,
    memory: Annotated[
        Any,
        option(
            BUDGET,
            "Memory for weights and KV cache together (of a rank), of a machine to come; nothing = what is free here.",
            parser=parse_bytes,
            metavar="SIZE",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Say what `quire serve` would make of a model here, without loading it. Exit code 1 if it does not fit."""
    from ..engine.errors import EngineStartError
    from ..engine.families import load_config
    from ..engine.resolve import look_at_machine, resolve

    wishes = EngineConfig(
        model=model,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, DEFAULTS.max_num_batched_tokens),
        block_size=block_size,
        kv_cache_bytes=kv_cache_bytes,
        kv_cache_dtype=kv_cache_dtype,
    )
    if kv_cache_bytes is not None and memory is not None:
        raise typer.BadParameter("give --kv-cache-bytes or --memory, not both", param_hint="--memory")
    config = load_config(config_folder(model, revision))
    machine = look_at_machine(device)
    try:
        if memory is not None:
            weights = resolve(replace(wishes, num_blocks=MANY_BLOCKS), config, machine).weight_bytes
            if memory <= weights:
                raise EngineStartError(f"the weights alone take {weights} bytes; --memory is {memory}")
            wishes = replace(wishes, kv_cache_bytes=memory - weights)
        report = memory_report(config, resolve(wishes, config, machine))
    except EngineStartError as error:
        err.print("[bold red]It does not fit:[/] ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"model": model, **report}, indent=2))
    else:
        _show(model, report)


def memory_report(config: DecoderConfig, resolved: Resolved) -> dict[str, Any]:
    """What a resolved engine holds, on each of its ranks; sizes in bytes.

    max_concurrency: requests of max_model_len tokens in the cache
    """
    from ..engine.layout import count_parameters

    block = resolved.kv_cache_bytes // resolved.num_blocks
    tokens = (resolved.num_blocks - 1) * resolved.block_size  # the null block holds none
    return {
        "model_type": config.model_type,
        "parameters": count_parameters(config),
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "quantization": resolved.quantization,
        "kv_cache_dtype": resolved.kv_cache_dtype,
        "device": str(resolved.device),
        "tensor_parallel_size": resolved.tensor_parallel_size,
        "weight_bytes": resolved.weight_bytes,
        "kv_bytes_per_token": block // resolved.block_size,
        "block_size": resolved.block_size,
        "block_bytes": block,
        "num_blocks": resolved.num_blocks,
        "kv_cache_bytes": resolved.kv_cache_bytes,
        "total_bytes": resolved.weight_bytes + resolved.kv_cache_bytes,
        "cached_tokens": tokens,
        "max_model_len": resolved.max_model_len,
        "max_concurrency": tokens / resolved.max_model_len,
        "reasons": resolved.reasons,
    }


def config_folder(model: str, revision: str | None) -> Path:
    """A folder with the model's config.json; of a hub id only the JSON files are fetched."""
    from ..engine.loader import HUB_ID, locate_model

    if model == DEFAULTS.model or Path(model).expanduser().is_dir() or not HUB_ID.fullmatch(model):
        return locate_model(model, revision)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    from ..engine.errors import EngineStartError

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=["*.json"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise EngineStartError(f"model {model!r}: {str(error).strip().splitlines()[0]}") from None


def _show(model: str, report: dict[str, Any]) -> None:
    from rich.table import Table

    why = report["reasons"]
    table = Table(title=f"{model} ({report['model_type']})", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("Parameters", f"{report['parameters']:,}")
    if report["tensor_parallel_size"] > 1:
        table.add_row("Ranks", str(report["tensor_parallel_size"]), "the sizes below are those of one")
    table.add_row("Weights", format_bytes(report["weight_bytes"]), f"{report['dtype']}: {why['dtype']}")
    table.add_row("", f"quantization: {report['quantization']}", why["quantization"])
    table.add_row("KV cache per token", format_bytes(report["kv_bytes_per_token"]), why["kv_cache_dtype"])
    table.add_row("KV block", format_bytes(report["block_bytes"]), f"{report['block_size']} tokens")
    table.add_row("KV cache", format_bytes(report["kv_cache_bytes"]), f"{report['num_blocks']:,} blocks")
    table.add_row("", "", why["num_blocks"])
    table.add_row("Weights and KV cache", format_bytes(report["total_bytes"]), style="bold")
    table.add_row("Cached tokens", f"{report['cached_tokens']:,}")
    table.add_row("Longest request", f"{report['max_model_len']:,} tokens", why["max_model_len"])
    table.add_row("Requests of that length at once", f"{report['max_concurrency']:.2f}")
    out.print(table)
