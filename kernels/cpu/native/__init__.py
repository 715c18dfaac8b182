"""The CPU's hot path in C++ behind a plain C interface."""
