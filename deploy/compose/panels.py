"""How a panel of a Grafana board is spelled: questions in PromQL, and what draws the answers."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

COLUMNS = 24  # of Grafana's grid
HEIGHTS = {"stat": 4, "timeseries": 8, "heatmap": 8, "bargauge": 8}  # in its rows of 30 pixels
WINDOW = "$__rate_interval"  # at least four scrapes: what a rate needs to survive one that failed
ONES = 'instance=~"$instance"'


def rate(name: str, *by: str, where: str = "", every: str = WINDOW) -> str:
    """Growth a second of a counter, summed over the chosen servers for each value of the labels `by`."""
    return f"sum{_by(by)}(rate({chosen(name, where)}[{every}]))"


def share(part: str, whole: str, *by: str, where: str = "", every: str = WINDOW) -> str:
    """How much of the growth of `whole` is that of `part`; `where` narrows the part."""
    return f"{rate(part, *by, where=where, every=every)} / {rate(whole, *by, every=every)}"


def quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', 'le')})"


def percentiles(histogram: str) -> dict[str, str]:
    return {f"p{round(100 * q)}": quantile(q, histogram) for q in (0.5, 0.95, 0.99)}


def mean(histogram: str) -> str:
    return f"{rate(histogram + '_sum')} / {rate(histogram + '_count')}"


def total(name: str, *by: str, where: str = "") -> str:
    return f"sum{_by(by)}({chosen(name, where)})"


def highest(name: str, *by: str) -> str:
    return f"max{_by(by)}({chosen(name)})"


def chosen(name: str, where: str = "") -> str:
    """The series of the servers that are chosen on the board."""
    return f"{name}{{{ONES}{', ' + where if where else ''}}}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def panel(
    kind: str, title: str, text: str, unit: str, queries: dict[str, str], *, width: int = 8, stacked: bool = False
) -> Json:
    """`queries`: legend to PromQL. `text`: what the panel answers, shown behind its (i). `unit`: Grafana's id of it."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    instant, heat = kind == "bargauge", kind == "heatmap"
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": source,
            "expr": expr,
            "legendFormat": "{{le}}" if heat else legend,
            "format": "heatmap" if heat else "time_series",
            "instant": instant,
            "range": not instant,
        }
        for i, (legend, expr) in enumerate(queries.items())
    ]
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": source,
        "gridPos": {"w": width, "h": HEIGHTS[kind]},
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, **_drawn(kind, stacked)}, "overrides": []},
        "options": _OPTIONS[kind] | ({"yAxis": {"unit": unit}} if heat else {}),
    }


def _drawn(kind: str, stacked: bool) -> Json:
    if kind != "timeseries":
        return {"color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": [{"color": "green"}]}}
    return {
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 40 if stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        }
    }


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _REDUCE, "colorMode": "value", "graphMode": "area", "textMode": "value"},
    "bargauge": {"reduceOptions": _REDUCE, "orientation": "vertical", "displayMode": "basic", "valueMode": "color"},
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "cellGap": 0,
        "tooltip": {"mode": "single"},
        "legend": {"show": False},
    },
}


def stat(title: str, text: str, unit: str, query: str, width: int = 3) -> Json:
    return panel("stat", title, text, unit, {"": query}, width=width)


def lines(title: str, text: str, unit: str, queries: dict[str, str], **layout: Any) -> Json:
    return panel("timeseries", title, text, unit, queries, **layout)


def datasource() -> Json:
    """The variable that says which Prometheus is asked."""
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def servers() -> Json:
    """The variable that says which servers are looked at."""
    query = "label_values(quire_engine_state, instance)"
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": "instance"},
        "refresh": 2,  # with the range of time: servers come and go
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def alerts() -> Json:
    """Marks on all panels, where alerts fire."""
    return {
        "name": "Alerts",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Quire.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}}",
    }


def placed(rows: dict[str, list[Json]]) -> list[Json]:
    """Rows one below the other, their panels from left to right, each with an id."""
    found: list[Json] = []
    top = 0
    for title, panels in rows.items():
        found.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, top, COLUMNS, 1)}
        )
        left, top, below = 0, top + 1, 0
        for one in panels:
            width, height = one["gridPos"]["w"], one["gridPos"]["h"]
            if left + width > COLUMNS:
                left, top, below = 0, top + below, 0
            found.append(one | {"gridPos": _at(left, top, width, height)})
            left, below = left + width, max(below, height)
        top += below
    return [{"id": i, **one} for i, one in enumerate(found, 1)]


def _at(x: int, y: int, w: int, h: int) -> Json:
    return {"x": x, "y": y, "w": w, "h": h}
