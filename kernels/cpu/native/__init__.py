"""The CPU's hot path outside the matrix products, in C++ behind a plain C interface."""
