"""Kernels for NVIDIA GPUs in Triton; also run on the CPU, slowly, by Triton's interpreter (TRITON_INTERPRET=1)."""
