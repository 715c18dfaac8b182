"""Helm's library has no wheels for 64-bit ARM under Linux; everywhere else its absence is an error."""

from __future__ import annotations

import platform

collect_ignore = ["test_chart.py"] if platform.machine() == "aarch64" else []
