"""What a kernel takes of a GPU: compiled to machine code for targets that need not be there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_fast.errors import BackendError
from flexlora_fast.kernels._triton import triton
from flexlora_fast.kernels.configuration import Configuration

# A100 (sm_80), H100 and H200 (sm_90), B200 (sm_100).
TARGETS = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """What one program takes: registers of a thread, bytes of shared memory, spilled bytes of a thread."""

    registers: int
    shared: int
    spilled: int


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    chosen: Configuration,
    target: int,
    *,
    aligned: bool,
) -> Any:
    """Triton's ``CompiledKernel`` of ``kernel`` for sm_<target>, not loaded; arguments and errors as ``resources``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.runtime.JITFunction):
        raise BackendError("TRITON_INTERPRET=1 replaces the compiler: unset it to see what kernels take")
    constants = {**constants, **chosen.constants}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes if aligned else None),
        target=GPUTarget("cuda", target, 32),
        options=chosen.options,
    )


def resources(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    chosen: Configuration,
    target: int,
    *,
    aligned: bool,
) -> Resources:
    """Compile ``kernel`` for sm_<target> and read what it takes.

    Args:
        kernel: a ``triton.jit`` function, not interpreted.
        types: Triton's names of the argument types ("*fp32"); arguments left out are int32.
        constants: its constants, beside those of ``chosen``.
        chosen: tile sizes and launch options.
        target: compute capability, 90 for 9.0.
        aligned: whether all addresses and sizes are multiples of 16, as Triton finds out at a launch.

    Raises:
        BackendError: under TRITON_INTERPRET=1, which replaces the compiler.
    """
    done = compiled(kernel, types, constants, chosen, target, aligned=aligned)
    usage = _usage(done.asm["cubin"])
    return Resources(usage["REG"], done.metadata.shared, usage["STACK"] + usage["LOCAL"])


def _usage(cubin: bytes) -> dict[str, int]:
    """The disassembler's figures; it comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in report.splitlines() if "REG:" in line)
    pairs = (field.split(":") for field in line.split() if field.count(":") == 1)
    return {name: int(value) for name, value in pairs if value.isdigit()}
