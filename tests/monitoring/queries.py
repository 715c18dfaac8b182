"""The questions of the board and of the alert rules, and which metrics and labels they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

STACK = Path(__file__).resolve().parents[2] / "deploy" / "compose"
RULES = STACK / "prometheus" / "alerts.yml"

# What Grafana puts for its variables; the shortest window is that of rates in which a scrape may fail.
VARIABLES = {"$instance": ".*", "$__rate_interval": "20s"}


@dataclass(frozen=True, slots=True)
class Query:
    """where: the panel or rule. legend: Grafana's, with {{labels}}; of a rule "". text: PromQL, without variables."""

    where: str
    legend: str
    text: str


@dataclass(frozen=True, slots=True)
class Selector:
    """Series of this name, of which these labels are asked for: matched, or kept by a sum around them. text: PromQL."""

    name: str
    labels: frozenset[str]
    text: str


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STACK / "grafana" / "dashboards" / "quire.json").read_text(encoding="utf-8"))
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def board_queries() -> Iterator[Query]:
    for panel in board()["panels"]:
        for target in panel.get("targets", ()):
            yield Query(f"panel {panel['title']!r}", target["legendFormat"], without_variables(target["expr"]))


def rule_queries() -> Iterator[Query]:
    for rule in rules():
        yield Query(f"alert {rule['alert']}", "", rule["expr"])


def without_variables(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def selectors(text: str) -> list[Selector]:
    """Raises ValueError for what is no PromQL."""
    found: list[Selector] = []
    _collect(promql_parser.parse(text), frozenset(), found)
    return found


def kept_labels(text: str) -> set[str]:
    """Those that the outermost sums keep: what a legend can name."""
    return set().union(*(one.labels for one in selectors(text)))


def _collect(expr: Any, kept: frozenset[str], found: list[Selector]) -> None:
    match expr:
        case promql_parser.VectorSelector():
            matched = {matcher.name for matcher in expr.matchers.matchers}
            found.append(Selector(expr.name, kept | matched, str(expr)))
        case promql_parser.MatrixSelector():
            _collect(expr.vector_selector, kept, found)
        case promql_parser.AggregateExpr():
            grouped = frozenset(expr.modifier.labels if expr.modifier else ())
            _collect(expr.expr, kept | grouped, found)
        case promql_parser.Call():
            for arg in expr.args:
                _collect(arg, kept, found)
        case promql_parser.BinaryExpr():
            matching = expr.modifier.matching if expr.modifier else None
            joined = frozenset(matching.labels if matching else ())
            _collect(expr.lhs, kept | joined, found)
            _collect(expr.rhs, kept | joined, found)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            _collect(expr.expr, kept, found)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise ValueError(f"{type(expr).__name__}: tell how its metrics are found")
