"""Fixtures that more than one folder uses."""

from __future__ import annotations

import os

# Two threads everywhere: results of a reduction may depend on how many share it.
os.environ.setdefault("OMP_NUM_THREADS", "2")
