"""NVIDIA's command-line tools: where they are, and how a program is run under one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Beside PATH: where CUDA's packages put them.
_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_NCU_HOMES = Path("/opt/nvidia/nsight-compute")


class Ran(NamedTuple):
    """``code`` is None where the time was up; output of both streams together."""

    code: int | None
    output: str

    @property
    def last(self) -> str:
        """The last line that says anything."""
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "no output")


def find(name: str) -> str | None:
    """A tool's path; None where it is not installed."""
    folders = [*_FOLDERS, *sorted((str(path) for path in _NCU_HOMES.glob("*")), reverse=True)]
    home = os.environ.get("CUDA_HOME")
    if home:
        folders = [f"{home}/bin", f"{home}/compute-sanitizer", *folders]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ran:
    """Run it to its end, or until its time is up; then it is killed with everything that it started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Ran(None, output)
    except BaseException:  # also when this process is told to stop
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ran(process.returncode, output)
