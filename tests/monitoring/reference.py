"""docs/metrics.md's tables, made of the metrics themselves.

PYTHONPATH=tests python -m monitoring.reference --write
"""

from __future__ import annotations

import sys
from pathlib import Path

from monitoring.families import Family, families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics -->\n", "<!-- /metrics -->\n"

# A family stands under the heading that has the longest beginning of its name.
SECTIONS = {
    "Requests": (
        "quire_time_to_first", "quire_inter_token", "quire_e2e", "quire_request", "quire_contention", "quire_slo",
        "quire_admission", "quire_http", "quire_prompt", "quire_generation",
    ),
    "Steps and memory of the engine": (
        "quire_engine", "quire_step", "quire_iteration", "quire_num", "quire_kv", "quire_prefix", "quire_cache",
        "quire_memory", "quire_startup", "quire_queue", "quire_recomputed", "quire_evicted", "quire_discarded",
        "quire_graph", "quire_eager",
    ),
    "Life of the engine": ("quire_engine_sta", "quire_engine_restarts", "quire_engine_h"),
    "Guessing ahead": ("quire_spec_decode",),
    "Tenants": ("quire_tenant",),
    "The API process": ("quire_event_loop", "process_"),
}  # fmt: skip


def section_of(family: Family) -> str:
    """Raises ValueError for a family that has no place yet: SECTIONS wants its beginning."""
    fitting = [(len(one), title) for title, some in SECTIONS.items() for one in some if family.name.startswith(one)]
    return max(fitting)[1]


def tables() -> str:
    """Markdown, a table for each heading."""
    parts = []
    for title in SECTIONS:
        rows = [_row(family) for family in families() if section_of(family) == title]
        parts.append(
            "\n".join([f"## {title}\n", "| name | type | labels | unit | |", "|---|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def page() -> str:
    """docs/metrics.md as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


def _row(family: Family) -> str:
    labels = [f"`{label}`" + ("¹" if label in family.extra_labels else "") for label in family.labels]
    needs = {"": "", "named tenants": "¹", "speculation": "²"}[family.needs] + ("³" if family.alias else "")
    return _cells(f"`{family.name}`{needs}", family.type, ", ".join(labels), family.unit, family.text)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(families())} metrics")
