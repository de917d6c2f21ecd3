"""How far the resident memory of this process rises (Linux): everything counts, whoever allocates it."""

from __future__ import annotations

from pathlib import Path


class Footprint:
    """Begins where it is made: the kernel's high-water mark is reset (``man 5 proc_pid_clear_refs``).

    Memory that was freed before but is still resident can be used again unseen: keep that small.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def rise(self) -> int:
        """Bytes of the highest point so far above the beginning."""
        return max(0, _status("VmHWM") - self.before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
