"""SECURITY.md's table of advisories, made of `advisories.toml` and of the marks at the tests.

python tests/security/advisories.py --write
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "SECURITY.md"
BEGIN, END = "<!-- advisories -->\n", "<!-- /advisories -->\n"


def known() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("advisories.toml").read_text())["advisory"]
    return rows


def tests_of(path: Path) -> Iterator[tuple[str, set[str]]]:
    """(`tests/…/test_x.py::test_y`, the advisories it is marked with) of a file's tests."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            marks = [
                mark
                for mark in node.decorator_list
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.advisory"
            ]
            ids = {str(ast.literal_eval(leaf)) for mark in marks for arg in mark.args for leaf in _leaves(arg)}
            yield f"{path.relative_to(ROOT).as_posix()}::{node.name}", ids


def _leaves(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.Starred):
        return _leaves(node.value)
    return [leaf for element in node.elts for leaf in _leaves(element)] if isinstance(node, ast.Tuple) else [node]


def all_tests() -> dict[str, set[str]]:
    return dict(test for path in sorted((ROOT / "tests").rglob("test_*.py")) for test in tests_of(path))


def table() -> str:
    """Markdown, a row for each entry; tests are named without the folder `tests/`."""
    tests = all_tests()
    lines = ["| Advisory | Of | What went wrong | Here |", "|---|---|---|---|"]
    for row in known():
        ids = set(row["ids"])
        found = [name for name, marked in tests.items() if marked & ids]
        named = dict.fromkeys([*found, *row.get("tests", [])])
        here = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in named) or row.get("not_here", "")
        sure = "" if not row.get("unsure") else " (?)"
        lines.append(f"| {', '.join(row['ids'])}{sure} | {row['of']} | {row['fault']} | {here} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """SECURITY.md as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(known())} entries, {sum(len(row['ids']) for row in known())} advisories")
