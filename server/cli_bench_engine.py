"""`quire bench` of what needs no server: measured in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_bench_report import JsonFile, Seed, measuring, show
from .cli_options import option

ENGINE, LOAD = "Engine", "Load"

Model = Annotated[str, option(ENGINE, '"bundled", a folder in Hugging Face layout, or a hub id.')]
Threads = Annotated[
    int | None, option(ENGINE, "CPU threads, at most the cores this process may use; nothing = all of them.", min=1)
]
Repetitions = Annotated[int, option(LOAD, "Measurements of each kind, in turn; medians are told.", min=1)]


def bench_prefill(
    model: Model = "bundled",
    threads: Threads = None,
    max_num_batched_tokens: Annotated[int, option(ENGINE, "Tokens of one step.", min=1)] = 512,
    num_prompts: Annotated[int, option(LOAD, "Prompts of one measurement.", min=1)] = 64,
    min_len: Annotated[int, option(LOAD, "Tokens of the shortest prompt.", min=1)] = 8,
    max_len: Annotated[int, option(LOAD, "Tokens of the longest prompt.", min=1)] = 512,
    lengths: Annotated[str, option(LOAD, "Between them: log-uniform or uniform.")] = "log-uniform",
    batch_size: Annotated[int, option(LOAD, "Prompts of a padded batch.", min=1)] = 64,
    sorted_batch_size: Annotated[int, option(LOAD, "Prompts of a length-sorted padded batch.", min=1)] = 16,
    repetitions: Repetitions = 5,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Prompts packed into steps against prompts padded to batches: prompt tokens a second, same engine and kernels."""
    with measuring(json_file):
        from ..bench import prefill

        result = prefill.run(
            prefill.PrefillConfig(
                model=model,
                threads=threads,
                num_prompts=num_prompts,
                min_len=min_len,
                max_len=max_len,
                lengths=lengths,
                batch_size=batch_size,
                sorted_batch_size=sorted_batch_size,
                max_num_batched_tokens=max_num_batched_tokens,
                repetitions=repetitions,
                seed=seed,
            )
        )
    show(prefill.table(result), result, json_file)


def bench_slo(
    model: Model = "bundled",
    threads: Threads = None,
    slo_itl_ms: Annotated[
        float | None, option(ENGINE, "Promised gap between two tokens; nothing = four decode steps, measured first.")
    ] = None,
    streams: Annotated[int, option(LOAD, "Sequences that decode all the time.", min=1)] = 8,
    stream_prompt_len: Annotated[int, option(LOAD, "Prompt tokens of a stream.", min=1)] = 64,
    stream_output_len: Annotated[int, option(LOAD, "Output tokens of a stream; another follows it.", min=1)] = 512,
    prompts: Annotated[int, option(LOAD, "Long prompts of one measurement.", min=1)] = 40,
    prompt_len: Annotated[
        int | None, option(LOAD, "Tokens of a long prompt; nothing = seven eighths of the context.", min=1)
    ] = None,
    load: Annotated[float, option(LOAD, "Share of an engine's time that the long prompts would take alone.")] = 0.6,
    repetitions: Repetitions = 3,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Do streams keep a promised gap between tokens while long prompts arrive? Beside the prefill-first discipline."""
    with measuring(json_file):
        from ..bench import slo

        result = slo.run(
            slo.SloConfig(
                model=model,
                threads=threads,
                slo_itl_ms=slo_itl_ms,
                streams=streams,
                stream_prompt_len=stream_prompt_len,
                stream_output_len=stream_output_len,
                prompts=prompts,
                prompt_len=prompt_len,
                load=load,
                repetitions=repetitions,
                seed=seed,
            )
        )
    show(slo.table(result), result, json_file)


def bench_samples(
    model: Model = "bundled",
    threads: Threads = None,
    max_num_seqs: Annotated[int, option(ENGINE, "Sequences that run at once.", min=1)] = 64,
    n: Annotated[int, option(LOAD, "Samples of one prompt, and requests that are compared with them.", min=1)] = 1000,
    prompt_len: Annotated[int, option(LOAD, "Tokens of the prompt.", min=1)] = 1024,
    output_len: Annotated[int, option(LOAD, "Tokens of each sample.", min=1)] = 32,
    repetitions: Repetitions = 3,
    task_samples: Annotated[
        int, option("Coverage", "Samples of each task of the coverage study; 0 = no study.", min=0)
    ] = 100,
    parse_tasks: Annotated[int, option("Coverage", "Functions of the study that only have to parse.", min=0)] = 30,
    task_tokens: Annotated[int, option("Coverage", "Tokens of a task's sample at most.", min=1)] = 64,
    temperature: Annotated[float, option("Coverage", "Of the study's samples.", min=0)] = 0.6,
    top_p: Annotated[float, option("Coverage", "Of the study's samples.", min=0.0, max=1)] = 0.95,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Many samples of one prompt against as many requests, then what share of coding tasks repeated samples solve.

    The study runs code that the model wrote, in a subprocess under limits.
    """
    with measuring(json_file):
        from ..bench import samples

        result = samples.run(
            samples.SamplesConfig(
                model=model,
                threads=threads,
                n=n,
                prompt_len=prompt_len,
                output_len=output_len,
                max_num_seqs=max_num_seqs,
                repetitions=repetitions,
                task_samples=task_samples,
                parse_tasks=parse_tasks,
                task_tokens=task_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
        )
    show(samples.table(result), result, json_file)


def bench_idealized(
    model: Model = "bundled",
    threads: Threads = None,
    output_len: Annotated[int, option(LOAD, "Output tokens of every request.", min=2)] = 64,
    repetitions: Repetitions = 7,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Fit the time of a request that has the engine for itself. The JSON is a profile: `bench capacity --profile`."""
    with measuring(json_file):
        from ..bench import idealized

        result = idealized.run(
            idealized.IdealizedConfig(
                model=model, threads=threads, output_len=output_len, repetitions=repetitions, seed=seed
            )
        )
    show(idealized.table(result), result, json_file)


def bench_speculative(
    threads: Threads = None,
    prompts: Annotated[int, option(LOAD, "Held-out texts that contexts are made of.", min=1)] = 200,
    depth: Annotated[int, option(LOAD, "Guesses of the chains that methods are compared by.", min=1)] = 6,
    rounds: Annotated[int, option(LOAD, "Rounds at every context, for each shape.", min=1)] = 4,
    output_len: Annotated[int, option(LOAD, "Output tokens of every timed request.", min=2)] = 96,
    repetitions: Repetitions = 5,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Guessing ahead with the bundled models: tokens of a round by method and tree, and the speed of a costly twin."""
    with measuring(json_file):
        from ..bench import speculative

        result = speculative.run(
            speculative.SpeculativeConfig(
                threads=threads,
                prompts=prompts,
                depth=depth,
                rounds=rounds,
                output_len=output_len,
                repetitions=repetitions,
                seed=seed,
            )
        )
    show(speculative.table(result), result, json_file)


def bench_quality(
    model: Model = "bundled",
    weights: Annotated[
        str, option(ENGINE, "Formats of weights, or folders with the model quantized, each with plain KV; by commas.")
    ] = "int8,w8a8,fp8,fp8_block,int4",
    kv: Annotated[
        str, option(ENGINE, "Formats of keys and values, each with plain weights; by commas.")
    ] = "fp8_e4m3,int8_per_token_head,int4_per_token_head",
    text: Annotated[
        Path | None, option(LOAD, "A text to read; nothing = the modules that the bundled model never saw.")
    ] = None,
    tokens: Annotated[int, option(LOAD, "Tokens to score.", min=1)] = 40_000,
    window: Annotated[int, option(LOAD, "Tokens that the model reads at once.", min=2)] = 1024,
    json_file: JsonFile = None,
) -> None:
    """What formats cost in bits per byte and KL divergence against bf16, and what they save in memory."""
    with measuring(json_file):
        from ..bench import quality

        result = quality.measure(
            quality.QualityConfig(
                model=model,
                weights=tuple(filter(None, weights.split(","))),
                kv=tuple(filter(None, kv.split(","))),
                text=text,
                tokens=tokens,
                window=window,
            )
        )
    show(quality.table(result), result, json_file)


def bench_kernels(
    ctx: typer.Context,
    device: Annotated[str, option(ENGINE, "cpu; the kernels of a GPU are measured by bench/gpu_check.py.")] = "cpu",
    threads: Threads = None,
    model: Annotated[
        str | None,
        option(
            LOAD, 'Take the layers\' shape from "bundled", a folder, or a hub id; nothing = half a billion weights.'
        ),
    ] = None,
    rows: Annotated[
        list[str] | None, option(LOAD, "Tokens of a step: 1 16 256; nothing = powers from 1 to 1,024.", metavar="N …")
    ] = None,
    ops: Annotated[
        list[str] | None, option(LOAD, "linear attention …; nothing = every op with a compiled kernel.", metavar="OP …")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """The compiled CPU kernels one by one: times and rates, beside the limits of the machine and torch's operators."""
    with measuring(json_file):
        from ..bench import kernels

        words = [*(rows or []), *(ops or []), *ctx.args]  # one option takes several words; a number can only be of rows
        result = kernels.run(
            kernels.KernelsConfig(
                device=device,
                threads=threads,
                model=model,
                rows=tuple(int(word) for word in words if word.isdigit()) or kernels.ROWS,
                ops=tuple(word for word in words if not word.isdigit()),
            )
        )
    show(kernels.table(result), result, json_file)
