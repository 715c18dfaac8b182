"""Results of `quire bench` as figures: each panel draws one question's answer from the JSON alone.

loads (several results of serve)   latency over load, goodput over load, gaps between tokens, batches over time
one result of serve                latency of each request, goodput over the limits, gaps, batches over time
capacity, overload                 what each trial gave, over its rate
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .timeline import rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Json = dict[str, Any]

# Okabe and Ito's colours, which people of all kinds of sight can tell apart.
BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#999999"
CYCLE = (BLUE, ORANGE, GREEN, RED, SKY, "#cc79a7", "#000000")
LATENCIES = {"ttft": "first token", "tpot": "each further token", "e2el": "whole answer"}
SHORTEST = 0.01  # ms: what lies below is one read of several events
SCALES = [2 ** (step / 8) for step in range(-24, 25)]  # of the limits: an eighth to eight times


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure. says: what it shows, for those who cannot see it too; height: of its width."""

    title: str
    says: str
    draw: Callable[[FigureBase], None]
    height: float = 0.42


def panels(result: Json) -> list[Panel]:
    """Of anything that `quire bench serve | capacity | overload --json` writes. Raises ValueError for other JSON."""
    match result:
        case {"benchmark": "serve", "loads": [*loads]} if len(loads) > 1:
            return [_latency_over_load(loads), _goodput_over_load(loads), _gaps(loads), *_batches(loads)]
        case {"benchmark": "serve", "loads": [load]} | ({"benchmark": "serve", "requests": _} as load):
            return [_requests(load), _gaps([load]), _goodput_over_limits(load), *_batches([load])]
        case {"benchmark": "capacity", "trials": dict()}:
            return [_capacity(result)]
        case {"benchmark": "overload", "trials": list()}:
            return [_overload(result)]
    raise ValueError("this is no result of quire bench serve, capacity or overload, as their --json writes it")


def loads_of(result: Json) -> list[Json]:
    """The single loads of a result of serve."""
    loads: list[Json] = result.get("loads", [result])
    return loads


def load_name(load: Json) -> str:
    settings = load["settings"]
    if settings["request_rate"] is not None:
        return f"{settings['request_rate']:g} requests/s"
    if settings.get("trace"):
        return "the trace"
    return f"{settings['concurrency'] or 'all'} at once"


def _offered(load: Json) -> float:
    """Requests a second that were asked for; in a closed loop, those that were answered."""
    rate = load["settings"]["request_rate"]
    return float(load["request_throughput"] if rate is None else rate)


# ---------------------------------------------------------------- latencies


def _latency_over_load(loads: Sequence[Json]) -> Panel:
    loads = sorted(loads, key=_offered)
    rate = [_offered(load) for load in loads]

    def draw(figure: FigureBase) -> None:
        for place, (name, what) in enumerate(LATENCIES.items(), 1):
            axes = figure.add_subplot(1, 3, place)
            for point, colour in (("p50", BLUE), ("p90", SKY), ("p99", ORANGE)):
                key = "median" if point == "p50" else point
                values = [load.get(f"{key}_{name}_ms") for load in loads]
                if any(value is not None for value in values):
                    axes.plot(rate, [_nan(value) for value in values], marker="o", color=colour, label=point)
            _label(axes, "requests/s", f"{what}, ms")
            axes.set_ylim(bottom=0)

    said = "; ".join(
        f"at {_offered(load):.3g} requests/s the median first token takes {_shown(load['median_ttft_ms'])} ms"
        for load in loads
    )
    return Panel("Latency over load", said, draw)


def _requests(load: Json) -> Panel:
    columns = load["requests"]
    failed = [at for at, error in zip(columns["sent_s"], columns["error"], strict=True) if error is not None]

    def draw(figure: FigureBase) -> None:
        for place, name in enumerate(("ttft", "e2el"), 1):
            axes = figure.add_subplot(1, 2, place)
            values = [_nan(value) for value in columns[f"{name}_ms"]]
            axes.scatter(columns["sent_s"], values, s=9, color=BLUE, alpha=0.7, linewidths=0)
            if failed:
                axes.scatter(failed, [0] * len(failed), marker="x", color=RED, label="failed")
            _label(axes, "sent, s", f"{LATENCIES[name]}, ms")
            axes.set_ylim(bottom=0)

    said = f"{load['completed']} requests, {len(failed)} failed; median first token {_shown(load['median_ttft_ms'])} ms"
    return Panel("Latency of each request", said, draw)


def _gaps(loads: Sequence[Json]) -> Panel:
    loads = [load for load in loads if load["itl_quantiles_ms"]]

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        share = [q / 200 for q in range(201)]
        for load, colour in zip(loads, _colours(loads), strict=True):
            axes.plot(
                [max(value, SHORTEST) for value in load["itl_quantiles_ms"]], share, color=colour, label=load_name(load)
            )
        axes.set_xscale("log")
        _label(axes, "gap between two events with text, ms", "share of gaps that are shorter")
        axes.set_ylim(0, 1)

    marks = [(load_name(load), load["itl_quantiles_ms"][100], load["itl_quantiles_ms"][198]) for load in loads]
    said = "; ".join(f"{name}: half below {half:.3g} ms, 99 % below {most:.3g} ms" for name, half, most in marks)
    return Panel("Gaps between tokens", said or "no answer had a second token", draw)


# ---------------------------------------------------------------- goodput


def _goodput_over_load(loads: Sequence[Json]) -> Panel:
    loads = sorted(loads, key=_offered)
    rate = [_offered(load) for load in loads]
    answered = [load["request_throughput"] for load in loads]
    good = [load["request_goodput"] for load in loads]
    told = all(value is not None for value in good)

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        axes.plot(rate, rate, color=GREY, linestyle=":", label="offered")
        axes.plot(rate, answered, marker="o", color=BLUE, label="answered")
        if told:
            axes.plot(rate, good, marker="o", color=GREEN, label="within the limits")
        _label(axes, "offered, requests/s", "requests/s")
        axes.set_ylim(bottom=0)

    if told:
        said = "; ".join(f"of {at:.3g} requests/s {value:.3g} were good" for at, value in zip(rate, good, strict=True))
    else:
        said = "; ".join(
            f"of {at:.3g} requests/s {value:.3g} were answered" for at, value in zip(rate, answered, strict=True)
        )
    return Panel("Goodput over load", said + ("" if told else " (no --goodput limits were given)"), draw)


def share_good(load: Json, scale: float) -> float:
    """The share of all requests that met every limit times `scale`; without limits, nothing can be said."""
    limits = {name: 1000 * limit * scale for name, limit in load["settings"]["goodput"].items()}
    columns = load["requests"]
    good = sum(
        error is None and all((columns[f"{name}_ms"][i] or 0.0) <= limit for name, limit in limits.items())
        for i, error in enumerate(columns["error"])
    )
    return good / len(columns["error"])


def _goodput_over_limits(load: Json) -> Panel:
    limits = load["settings"]["goodput"]
    if not limits:
        return _shares(load)
    shares = [share_good(load, scale) for scale in SCALES]

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        axes.plot(SCALES, shares, color=GREEN)
        axes.axvline(1, color=GREY, linestyle=":", label="the limits that were given")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g} x")
        _label(axes, "limits, as multiples of those given", "share of requests within them")
        axes.set_ylim(0, 1.02)

    given = ", ".join(f"{name} {1000 * limit:g} ms" for name, limit in limits.items())
    return Panel("Goodput over the limits", f"{share_good(load, 1.0):.1%} of the requests were within {given}", draw)


def _shares(load: Json) -> Panel:
    """Without limits: what share of the requests any limit would have passed."""
    columns = load["requests"]

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        for name, colour in (("ttft", BLUE), ("e2el", ORANGE)):
            values = sorted(value for value in columns[f"{name}_ms"] if value is not None)
            shares = [(i + 1) / len(columns["error"]) for i in range(len(values))]
            axes.step(values, shares, where="post", color=colour, label=LATENCIES[name])
        axes.set_xscale("log")
        _label(axes, "limit, ms", "share of requests within it")
        axes.set_ylim(0, 1.02)

    return Panel("Goodput over the limit", "the share of requests within a limit, for every limit", draw)


# ---------------------------------------------------------------- batches


def _batches(loads: Sequence[Json]) -> list[Panel]:
    return [
        _batch(load, f" at {load_name(load)}" if len(loads) > 1 else "") for load in loads if len(load["looks"]) > 2
    ]


def batch_shares(looks: list[dict[str, float]]) -> dict[str, list[float]]:
    """Tokens a second of the engine's steps by what they were for, between each look and the next."""
    parts = {
        "prompts": rates(looks, "prompt_tokens"),
        "drawn": rates(looks, "drawn_tokens"),
        "guessed in vain": rates(looks, "wasted_tokens"),
    }
    useful, launched = rates(looks, "useful_tokens"), rates(looks, "launched_tokens")
    if useful and launched:
        parts["padding"] = [max(0.0, all_ - real) for all_, real in zip(launched, useful, strict=True)]
    return {name: values for name, values in parts.items() if any(values)}


def _batch(load: Json, where: str) -> Panel:
    looks = load["looks"]
    parts = batch_shares(looks)
    seconds = [look["seconds"] for look in looks]

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot(2, 1, 1)
        if parts:
            colours = {"prompts": BLUE, "drawn": GREEN, "guessed in vain": RED, "padding": GREY}
            axes.stackplot(seconds[1:], *parts.values(), labels=list(parts), colors=[colours[name] for name in parts])
        _label(axes, "", "tokens/s of the steps")
        axes = figure.add_subplot(2, 1, 2, sharex=axes)
        for name, colour in (("running", GREEN), ("waiting", ORANGE)):
            axes.plot(seconds, [look.get(name, float("nan")) for look in looks], color=colour, label=name)
        axes.set_ylim(bottom=0)
        _label(axes, "s", "samples")

    most = max((look.get("running", 0.0) for look in looks), default=0.0)
    wait = max((look.get("waiting", 0.0) for look in looks), default=0.0)
    said = f"up to {most:.0f} samples ran and {wait:.0f} waited"
    return Panel(f"What the batches were made of{where}", said, draw, height=0.6)


# ---------------------------------------------------------------- searches


def _capacity(result: Json) -> Panel:
    found = result["trials"]

    def draw(figure: FigureBase) -> None:
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        for (system, trials), colour in zip(found.items(), _colours(found), strict=True):
            tried = sorted((trial for trial in trials if trial["tbt_p99"] is not None), key=lambda trial: trial["rate"])
            rate = [trial["rate"] for trial in tried]
            left.plot(rate, [1e3 * trial["tbt_p99"] for trial in tried], marker="o", color=colour, label=system)
            right.plot(rate, [_nan(trial["delay_p50"]) for trial in tried], marker="o", color=colour, label=system)
            for axes in (left, right):
                axes.axvline(result["capacity_qps"][system], color=colour, linestyle=":", linewidth=1)
        left.axhline(result["slo_ms"], color=GREY, linestyle="--", label="objective")
        right.axhline(result["max_delay_s"], color=GREY, linestyle="--", label="bound")
        _label(left, "requests/s", "P99 time between tokens, ms")
        _label(right, "requests/s", "median scheduling delay, s")

    said = "; ".join(f"{system}: {rate:.3g} requests/s" for system, rate in result["capacity_qps"].items())
    return Panel("Capacity within the objective", said, draw)


def _overload(result: Json) -> Panel:
    trials = sorted(result["trials"], key=lambda trial: (trial["rate"], trial["factor"] or 0))

    def draw(figure: FigureBase) -> None:
        rate = [trial["rate"] for trial in trials]
        left, middle, right = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
        left.plot(rate, [trial["tokens_per_second"] for trial in trials], marker="o", color=GREEN)
        _label(left, "offered, requests/s", "good tokens/s")
        counts = {
            "answered": [trial["completed"] for trial in trials],
            "refused": [trial["refused"] for trial in trials],
            "errors": [sum(trial["errors"].values()) for trial in trials],
        }
        middle.stackplot(rate, *counts.values(), labels=list(counts), colors=[GREEN, ORANGE, RED])
        _label(middle, "offered, requests/s", "requests")
        right.plot(
            rate, [1e3 * _nan(trial["ttft_p99"]) for trial in trials], marker="o", color=BLUE, label="first token"
        )
        right.plot(
            rate, [1e3 * _nan(trial["refused_p99"]) for trial in trials], marker="o", color=ORANGE, label="refusal"
        )
        _label(right, "offered, requests/s", "P99, ms")
        for axes in (left, right):
            axes.set_ylim(bottom=0)

    said = "; ".join(
        f"at {trial['rate']:.3g} requests/s {trial['share_of_peak']:.0%} of the peak's tokens" for trial in trials
    )
    return Panel("Asked for too much", said, draw)


# ---------------------------------------------------------------- small


def _colours(of: Sequence[Any] | dict[str, Any]) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(len(of))]


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")
