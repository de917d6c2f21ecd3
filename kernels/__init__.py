"""Triton kernels, one operation a file: the formula, the kernel, the host function."""
