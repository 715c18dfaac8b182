"""`quire bench`, and its first command: load on a running server, by the option names of `vllm bench`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_bench_engine import (
    bench_idealized,
    bench_kernels,
    bench_prefill,
    bench_quality,
    bench_samples,
    bench_slo,
    bench_speculative,
)
from .cli_bench_frontend import bench_frontend, bench_overload
from .cli_bench_report import ReportFile, check_files, failures, words, write
from .cli_bench_results import bench_compare, bench_report
from .cli_bench_scheduling import bench_capacity, bench_eviction, bench_fairness
from .cli_options import option, out
from .cli_progress import bar

if TYPE_CHECKING:
    from ..bench.serve import LoadConfig

bench_app = typer.Typer(
    help="Measure a running server, an engine of this process, or the scheduler.", no_args_is_help=True
)

LOAD, ASKED, REPORT, SERVER = "Load", "What is asked", "Report", "Server"


@bench_app.callback()
def bench() -> None:
    pass


@bench_app.command("serve", context_settings={"allow_extra_args": True})
def bench_serve(
    ctx: typer.Context,
    model: Annotated[
        str | None, option(SERVER, 'Served name; "bundled" or nothing = the model that the server has.', "--model")
    ] = None,
    base_url: Annotated[str, option(SERVER, "Where the server is.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        str, option(SERVER, "/v1/completions (token ids) or /v1/chat/completions (text).")
    ] = "/v1/completions",
    api_key: Annotated[
        str | None,
        option(SERVER, "Key, if the server wants one.", envvar=["QUIRE_API_KEY", "OPENAI_API_KEY"], show_default=False),
    ] = None,
    request_timeout: Annotated[float, option(SERVER, "Seconds until a request counts as failed.")] = 600.0,
    num_prompts: Annotated[
        int | None, option(LOAD, "Requests to send; nothing = 100, or all of a trace.", min=1)
    ] = None,
    num_warmups: Annotated[int, option(LOAD, "Requests before them that are not counted.", min=0)] = 1,
    concurrency: Annotated[
        int | None,
        option(LOAD, "Requests in flight; nothing = all at once.", "--concurrency", "--max-concurrency", min=1),
    ] = None,
    request_rate: Annotated[
        str | None,
        option(
            LOAD,
            "Open loop: requests a second on average, or several such loads one after another, 1,2,4; nothing = closed "
            "loop.",
            metavar="FLOAT[,FLOAT …]",
        ),
    ] = None,
    burstiness: Annotated[
        float, option(LOAD, "Shape of the gaps of an open loop: 1 = Poisson, below 1 = in bursts, above 1 = even.")
    ] = 1.0,
    trace: Annotated[
        str | None,
        option(
            LOAD,
            "Open loop with the arrivals and lengths of a file: JSON lines of our own or of Mooncake, CSV of Azure or "
            "BurstGPT (bench/README.md).",
        ),
    ] = None,
    time_scale: Annotated[
        float, option(LOAD, "Seconds of the replay for one of the trace: 0.5 = twice as fast.")
    ] = 1.0,
    length_scale: Annotated[float, option(LOAD, "Tokens of the replay for one of the trace.")] = 1.0,
    too_long: Annotated[
        str, option(LOAD, "Requests of a trace that the server's context does not hold: refuse or skip.")
    ] = "refuse",
    dataset: Annotated[
        str,
        option(
            ASKED,
            "random, sharegpt-like (lognormal lengths, scaled to the context), or a .jsonl / ShareGPT .json file.",
            "--dataset",
            "--dataset-name",
        ),
    ] = "random",
    random_input_len: Annotated[int, option(ASKED, "Prompt tokens of a random request.", min=1)] = 256,
    random_output_len: Annotated[int, option(ASKED, "Output tokens of a random request.", min=1)] = 64,
    random_range_ratio: Annotated[
        float, option(ASKED, "Random lengths vary evenly by this share up and down.", min=0, max=0.99)
    ] = 0.0,
    random_prefix_len: Annotated[int, option(ASKED, "Tokens in front that all made-up prompts share.", min=0)] = 0,
    output_len: Annotated[int | None, option(ASKED, "Output tokens of every request, of any dataset.", min=1)] = None,
    ignore_eos: Annotated[
        bool | None, option(ASKED, "Write to the full length; nothing = yes for made-up prompts, no for a file's.")
    ] = None,
    temperature: Annotated[float, option(ASKED, "0 = greedy.", min=0)] = 0.0,
    extra_body: Annotated[
        str, option(ASKED, "JSON object with more fields for every request, such as '{\"top_k\": 5}'.")
    ] = "{}",
    seed: Annotated[int, option(ASKED, "Of lengths, prompts and arrivals.")] = 0,
    goodput: Annotated[
        list[str] | None,
        option(REPORT, "Limits in ms that a good request meets: ttft:500 tpot:50 e2el:2000.", metavar="NAME:MS …"),
    ] = None,
    metric_percentiles: Annotated[str, option(REPORT, "Percentiles to print.")] = "50,90,95,99",
    json_file: Annotated[
        Path | None, option(REPORT, "Write the result here as JSON.", "--json", "--result-filename")
    ] = None,
    report_file: ReportFile = None,
) -> None:
    """Put a load on a running server; report latencies, throughput and errors. Exit code 1 if any request failed."""
    from ..bench.metrics import parse_goodput
    from ..bench.serve import LoadConfig

    if ctx.args and not goodput:
        raise typer.BadParameter(f"unexpected {' '.join(ctx.args)}")
    with failures():
        check_files(json_file, report_file)
        rates = parse_rates(request_rate)
        config = LoadConfig(
            base_url=base_url,
            endpoint=endpoint,
            model=model,
            api_key=api_key,
            num_prompts=num_prompts,
            num_warmups=num_warmups,
            concurrency=concurrency,
            request_rate=rates[0],
            burstiness=burstiness,
            trace=trace,
            time_scale=time_scale,
            length_scale=length_scale,
            too_long=too_long,
            dataset=dataset,
            random_input_len=random_input_len,
            random_output_len=random_output_len,
            random_range_ratio=random_range_ratio,
            random_prefix_len=random_prefix_len,
            output_len=output_len,
            ignore_eos=ignore_eos,
            temperature=temperature,
            extra_body=parse_object("--extra-body", extra_body),
            request_timeout=request_timeout,
            goodput=parse_goodput([*(goodput or []), *ctx.args]),  # as in vLLM, one --goodput takes several words
            percentiles=tuple(parse_numbers("--metric-percentiles", metric_percentiles)),
            seed=seed,
        )
        # Other prompts for each load, or the prefix cache would know those of the one before it.
        loads = [replace(config, request_rate=rate, seed=seed + number) for number, rate in enumerate(rates)]
        failed = measure(loads, json_file, report_file)
    if failed:
        raise typer.Exit(1)


def parse_rates(text: str | None) -> list[float | None]:
    """ "1,2.5" -> [1.0, 2.5]; None, and vLLM's "inf", mean all at once."""
    rates = parse_numbers("--request-rate", "inf" if text is None else text)
    return [None if rate == math.inf else rate for rate in rates]


def parse_numbers(option: str, text: str) -> list[float]:
    """ "50,99" -> [50.0, 99.0]. Raises ValueError naming the option."""
    try:
        numbers = [float(word) for word in words(text)]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{option} {text}: give a number, or several as 1,2,4")
    return numbers


def parse_object(option: str, text: str) -> dict[str, Any]:
    """Raises ValueError naming the option."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text}: must be a JSON object")
    return value


def measure(loads: list[LoadConfig], json_file: Path | None, report_file: Path | None) -> bool:
    """Run, show, write; True if a request failed."""
    import asyncio

    import uvloop

    from ..bench.report import as_json, table
    from ..bench.serve import run
    from ..bench.timeline import Look

    results: list[dict[str, Any]] = []
    for number, config in enumerate(loads, 1):
        looks: list[Look] | None = None if report_file is None else []
        # uvloop spends less per event, which counts where client and server share the cores.
        with (
            bar("requests" if len(loads) == 1 else f"load {number} of {len(loads)}") as shown,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            result = runner.run(run(config, shown.show, looks))
        out.print(table(result))
        results.append(as_json(result))
    whole = results[0] if len(results) == 1 else {"benchmark": "serve", "loads": results}
    write(whole, json_file, report_file)
    return any(result["failed"] for result in results)


COMMANDS: dict[str, Callable[..., None]] = {
    "capacity": bench_capacity,
    "slo": bench_slo,
    "fairness": bench_fairness,
    "frontend": bench_frontend,
    "overload": bench_overload,
    "prefill": bench_prefill,
    "samples": bench_samples,
    "eviction": bench_eviction,
    "idealized": bench_idealized,
    "speculative": bench_speculative,
    "quality": bench_quality,
    "compare": bench_compare,
    "report": bench_report,
}
for name, command in COMMANDS.items():
    bench_app.command(name)(command)
bench_app.command("kernels", context_settings={"allow_extra_args": True})(bench_kernels)
