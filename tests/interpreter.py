"""Code that runs in Triton's interpreter, in a process of its own: Triton reads its environment on import."""

from __future__ import annotations

import subprocess

import pytest

from tests.test_kernels import HAS_TRITON, release, run_python

needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or (release("triton") < (3, 7) and release("numpy") >= (2, 4)),
    reason="Triton's interpreter is not here, or is 3.6's, which takes one-element arrays of numpy 2.4 for integers",
)


def run_interpreted(code: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", code, TRITON_INTERPRET="1")
