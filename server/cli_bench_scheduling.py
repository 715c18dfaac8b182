"""`quire bench capacity | fairness | eviction`: what the scheduler decides, simulated or at a running server."""

from __future__ import annotations

from typing import Annotated

from .cli_bench_report import JsonFile, ReportFile, Seed, measuring, show, words
from .cli_options import option

WHERE, LOAD, SEARCH = "Where", "Load", "Search"

Simulate = Annotated[bool, option(WHERE, "Play the scheduler on the clock of a profile.", "--simulate")]
Profile = Annotated[str, option(WHERE, "h100-8b, a100-7b, or a file that `bench idealized --json` wrote.")]
Url = Annotated[str | None, option(WHERE, "A running server, such as http://127.0.0.1:8000.")]
ApiKey = Annotated[
    str | None,
    option(WHERE, "Key, if the server wants one.", envvar=["QUIRE_API_KEY", "OPENAI_API_KEY"], show_default=False),
]


def bench_capacity(
    simulate: Simulate = False,
    profile: Profile = "h100-8b",
    url: Url = None,
    model: Annotated[str | None, option(WHERE, "Served name; nothing = the model that the server has.")] = None,
    api_key: ApiKey = None,
    trace: Annotated[str, option(LOAD, "sharegpt, arxiv (Poisson arrivals), or a JSON-lines file.")] = "sharegpt",
    num_requests: Annotated[int, option(LOAD, "Requests of one trial.", min=2)] = 2048,
    max_trial_seconds: Annotated[float, option(LOAD, "At a server: arrivals of one trial end then.")] = 1800.0,
    noise: Annotated[float, option(LOAD, "Simulated: deviation of the logarithm of a step's time.", min=0)] = 0.0,
    slo: Annotated[str, option(SEARCH, "Time between tokens: strict, relaxed, or milliseconds.")] = "strict",
    start_rate: Annotated[float | None, option(SEARCH, "Requests a second of the first trial.")] = None,
    systems: Annotated[
        str | None,
        option(SEARCH, "Simulated, separated by commas: prefill_first, decode_first, static_512, …, quire."),
    ] = None,
    overtaking: Annotated[
        float | None, option(SEARCH, "Simulated: of quire, as in `quire serve`; nothing = its default.")
    ] = None,
    jobs: Annotated[int, option(SEARCH, "Simulated: systems searched at once.", min=1)] = 1,
    seed: Seed = 0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """The highest request rate within a latency objective, by simulation beside other disciplines, or of a server."""
    with measuring(json_file, report_file) as bar:
        from ..bench import capacity

        result = capacity.run(
            capacity.CapacityConfig(
                simulate=simulate,
                profile=profile,
                url=url,
                model=model,
                api_key=api_key,
                trace=trace,
                slo=slo,
                num_requests=num_requests,
                max_trial_seconds=max_trial_seconds,
                start_rate=start_rate,
                systems=capacity.SYSTEMS if systems is None else words(systems),
                overtaking=overtaking,
                noise=noise,
                jobs=jobs,
                seed=seed,
            ),
            lambda system, trial: bar.show(0, None, f"{system} at {trial.rate:.3g} requests/s"),
        )
    show(capacity.table(result), capacity.as_json(result), json_file, report_file)


def bench_fairness(
    simulate: Simulate = False,
    profile: Profile = "h100-8b",
    url: Url = None,
    model: Annotated[
        str | None, option(WHERE, "Served name, or without --url the model of the engine in this process.")
    ] = None,
    api_key: ApiKey = None,
    threads: Annotated[int | None, option(WHERE, "CPU threads of the engine in this process.", min=1)] = None,
    policies: Annotated[
        str | None, option(LOAD, "Of strict_fcfs, fcfs, priority, fair, deadline, by commas; nothing = all.")
    ] = None,
    flood_requests: Annotated[int, option(LOAD, "Requests that come at once.", min=1)] = 100,
    flood_prompt_len: Annotated[
        int | None, option(LOAD, "Tokens of each; nothing = three quarters of the room, at most 3072.", min=1)
    ] = None,
    flood_output_len: Annotated[int, option(LOAD, "Tokens drawn for each.", min=1)] = 256,
    visits: Annotated[int, option(LOAD, "Requests of the other tenant.", min=1)] = 60,
    visit_prompt_len: Annotated[
        int | None, option(LOAD, "Tokens of each; nothing = a quarter of the context, at most 512.", min=1)
    ] = None,
    visit_output_len: Annotated[int, option(LOAD, "Tokens drawn for each.", min=1)] = 16,
    visit_rate: Annotated[float, option(LOAD, "Visits a second on average, as a Poisson process.")] = 4.0,
    max_num_prefill_tokens: Annotated[
        int | None,
        option(WHERE, "Prompt tokens of a step beside streams; nothing = simulated 256, else the default.", min=1),
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """One tenant floods the engine; how long does another wait for its first token, under each policy?

    Without --simulate and --url, an engine in this process is measured.
    """
    with measuring(json_file):
        from ..bench import fairness

        result = fairness.run(
            fairness.FairnessConfig(
                simulate=simulate,
                profile=profile,
                url=url,
                model=model,
                api_key=api_key,
                threads=threads,
                policies=fairness.POLICIES if policies is None else words(policies),
                flood_requests=flood_requests,
                flood_prompt_len=flood_prompt_len,
                flood_output_len=flood_output_len,
                visits=visits,
                visit_prompt_len=visit_prompt_len,
                visit_output_len=visit_output_len,
                visit_rate=visit_rate,
                max_num_prefill_tokens=max_num_prefill_tokens,
                seed=seed,
            )
        )
    show(fairness.table(result), result, json_file)


def bench_eviction(
    fractions: Annotated[str, option(LOAD, "Cache sizes, as shares of a trace's working set.")] = "0.1,0.3,0.6",
    block_size: Annotated[int, option(LOAD, "Tokens per KV block.", min=1)] = 16,
    sessions: Annotated[int, option(LOAD, "Sessions of the multi-turn trace.", min=1)] = 2000,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Which order of eviction keeps the blocks that are wanted again: hit tokens beside the offline optimum."""
    with measuring(json_file):
        from ..bench import eviction
        from ..bench.sessions import SessionConfig

        result = eviction.run(
            eviction.EvictionConfig(
                fractions=tuple(float(share) for share in words(fractions)),
                block_size=block_size,
                seed=seed,
                sessions=SessionConfig(sessions=sessions),
            )
        )
    show(eviction.table(result), result, json_file)
