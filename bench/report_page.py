"""A result of `quire bench` as a page that needs nothing else (.html), or as one picture (.png)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .plots import Json, Panel, load_name, loads_of, panels

WIDTH = 9.0  # inches of a figure
SUFFIXES = (".html", ".png")

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 2rem 0; background: #fff; color: #000; border-radius: .5rem; padding: 1rem }
figure svg { width: 100%; height: auto }
figcaption { font-size: .9rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { text-align: left; padding: .2rem .8rem; border-bottom: 1px solid #8884 }
td.n { text-align: right; font-variant-numeric: tabular-nums }
"""


def check_report(path: Path) -> None:
    """Whether a report can be written there, to be asked before a long measurement. Raises ValueError with a remedy."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--report {path}: give a name that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--report {path}: there is no folder {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise ValueError(f"--report {path} needs matplotlib, which is not installed: pip install 'quire[bench]'")


def write_report(result: Json, path: Path) -> None:
    """Raises ValueError for JSON that is no result, and as `check_report`."""
    check_report(path)
    shown = panels(result)
    if path.suffix == ".html":
        path.write_text(html_page(result, shown), encoding="utf-8")
    else:
        path.write_bytes(picture(result, shown))


# ---------------------------------------------------------------- HTML


def html_page(result: Json, shown: list[Panel]) -> str:
    title = f"quire bench {result['benchmark']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table("Facts", ("", ""), facts(result)),
        *_tables(result),
        *(_figure(panel) for panel in shown),
        _table("Settings", ("", ""), list(_settings(result))),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def facts(result: Json) -> list[tuple[str, str]]:
    """What was measured, and where."""
    if result["benchmark"] != "serve":
        return [(key, str(value)) for key, value in result.items() if isinstance(value, str | int | float)]
    first = loads_of(result)[0]
    server = first["server"] or {}
    machine = first["client_machine"]
    named = ("version", "device", "dtype", "quantization", "kv_cache_dtype", "max_model_len", "max_num_seqs")
    return [
        ("Model", first["model_id"]),
        ("When", first["date"]),
        ("Server", ", ".join(f"{name} {server[name]}" for name in named if name in server) or "does not say"),
        ("Client", f"{machine['system']}, {machine['cpus']} processors"),
    ]


def _tables(result: Json) -> Iterator[str]:
    if result["benchmark"] != "serve":
        return
    loads = loads_of(result)
    names = ["", *(load_name(load) for load in loads)]
    rows: list[tuple[str, list[Any]]] = [
        ("completed", [load["completed"] for load in loads]),
        ("failed", [load["failed"] for load in loads]),
        ("requests/s", [load["request_throughput"] for load in loads]),
        ("good requests/s", [load["request_goodput"] for load in loads]),
        ("output tokens/s", [load["output_throughput"] for load in loads]),
        ("prompt tokens, cached of all", [_of_all(load) for load in loads]),
    ]
    for key in ("ttft", "tpot", "itl", "e2el"):
        for point in ("mean", "median", *(f"p{q:g}" for q in loads[0]["settings"]["percentiles"] if q != 50)):
            rows.append((f"{key.upper()} {point}, ms", [load.get(f"{point}_{key}_ms") for load in loads]))
    yield _table("Figures", tuple(names), [(name, *map(_shown, values)) for name, values in rows])
    errors = [
        (load_name(load), str(count), kind, load["error_examples"].get(kind, ""))
        for load in loads
        for kind, count in load["errors"].items()
    ]
    if errors:
        yield _table("Failures", ("load", "how many", "what", "an example"), errors)


def _of_all(load: Json) -> str:
    return f"{load['total_cached_tokens']} / {load['total_input_tokens']}"


def _settings(result: Json) -> Iterator[tuple[str, str]]:
    for name, value in (loads_of(result)[0] if result["benchmark"] == "serve" else result)["settings"].items():
        yield name.replace("_", "-"), str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head) if any(head) else ""
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td class="n">{escape(cell)}</td>' if len(row) > 2 else f"<td>{escape(cell)}</td>" for cell in row[1:]
        )
        + "</tr>"
        for row in rows
    )
    thead = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f"<h2>{escape(title)}</h2>\n<table>{thead}<tbody>{lines}</tbody></table>"


def _figure(panel: Panel) -> str:
    """The picture is drawing commands in the page; what it shows is also said in words."""
    svg = _svg(panel)
    label = escape(f"{panel.title}: {panel.says}", quote=True)
    return (
        f"<h2>{escape(panel.title)}</h2>\n<figure>"
        f"{svg.replace('<svg ', f'<svg role={chr(34)}img{chr(34)} aria-label={chr(34)}{label}{chr(34)} ', 1)}"
        f"<figcaption>{escape(panel.says)}</figcaption></figure>"
    )


# ---------------------------------------------------------------- pictures


def _svg(panel: Panel) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, so that it can be searched and read out; and equal results give equal pages.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(WIDTH, WIDTH * panel.height), layout="constrained")
        panel.draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().partition("<svg ")[1] + buffer.getvalue().partition("<svg ")[2]


def picture(result: Json, shown: list[Panel]) -> bytes:
    from matplotlib.figure import Figure

    heights = [panel.height for panel in shown]
    figure = Figure(figsize=(WIDTH, WIDTH * (sum(heights) + 0.08)), layout="constrained", dpi=120)
    figure.suptitle(", ".join(value for _, value in facts(result)[:2]) or result["benchmark"], parse_math=False)
    places = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)
    for place, panel in zip(places[:, 0], shown, strict=True):
        place.suptitle(panel.title, fontsize="medium")
        panel.draw(place)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
