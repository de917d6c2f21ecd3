"""cuSOLVER's batched symmetric eigensolver, called in the library that torch has loaded.

``cusolverDnXsyevBatched`` came with CUDA 12.6.2; its signature is that of
https://docs.nvidia.com/cuda/cusolver/#cusolverdnxsyevbatched.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading

import torch
from torch import Tensor

from flexlora_fast.errors import BackendError

_REAL64 = 1  # CUDA_R_64F
_VECTORS = 1  # CUSOLVER_EIG_MODE_VECTOR
_LOWER = 0  # CUBLAS_FILL_MODE_LOWER
_handles = threading.local()
_recorded: list[object] = []


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if sys.platform != "linux":
        return f"not looked for on {sys.platform}"
    # A call of torch's own loads the version that torch was built for.
    torch.linalg.eigh(torch.eye(2, device="cuda"))
    major = int((torch.version.cuda or "0").split(".")[0])
    for name in (f"libcusolver.so.{12 if major == 13 else 11}", "libcusolver.so.12", "libcusolver.so.11"):
        try:
            library = ctypes.CDLL(name)
            _ = library.cusolverDnXsyevBatched
        except (OSError, AttributeError):
            continue
        return library
    return f"no libcusolver with cusolverDnXsyevBatched (CUDA 12.6.2 or newer) beside torch {torch.__version__}"


def obstacle() -> str | None:
    """Why the solver cannot be called here; None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def eigh(C: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (b, l) ascending and eigenvectors (b, l, l) of the symmetric float64 C (b, l, l) on a GPU.

    Nothing is waited for: like torch's ``cholesky_ex``, a matrix that does not converge comes back as it is.

    Raises ``BackendError`` where the library refuses the call.
    """
    library = _library()
    if isinstance(library, str):
        raise BackendError(f"cuSOLVER's batched eigensolver cannot be called: {library}")
    b, n, _ = C.shape
    A = C.clone(memory_format=torch.contiguous_format)  # becomes the eigenvectors, column by column
    values = torch.empty(b, n, dtype=torch.float64, device=C.device)
    info = torch.empty(b, dtype=torch.int32, device=C.device)
    with torch.cuda.device(C.device):
        handle, params = _handle(library, C.device)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check("cusolverDnSetStream", library.cusolverDnSetStream(handle, stream))
        size = ctypes.c_int64
        problem = (handle, params, _VECTORS, _LOWER, size(n), _REAL64, _pointer(A), size(n), _REAL64, _pointer(values))
        device_bytes, host_bytes = ctypes.c_size_t(), ctypes.c_size_t()
        status = library.cusolverDnXsyevBatched_bufferSize(
            *problem, _REAL64, ctypes.byref(device_bytes), ctypes.byref(host_bytes), size(b)
        )
        _check("cusolverDnXsyevBatched_bufferSize", status)
        work = torch.empty(max(device_bytes.value, 1), dtype=torch.uint8, device=C.device)
        host = ctypes.create_string_buffer(max(host_bytes.value, 1))
        if torch.cuda.is_current_stream_capturing():
            _recorded.append(host)  # a graph may read it each time it is replayed
        status = library.cusolverDnXsyevBatched(
            *problem, _REAL64, _pointer(work), device_bytes, host, host_bytes, _pointer(info), size(b)
        )
        _check("cusolverDnXsyevBatched", status)
    return values, A.mT


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _handle(library: ctypes.CDLL, device: torch.device) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """A handle and default parameters for the current stream of a device, by thread: a handle belongs to one thread,
    and to one stream, since what the library keeps with it is written to by everything that runs.

    All recordings of CUDA graphs have one of their own, made ahead: while one is recorded it would be too late.
    """
    kept: dict[object, tuple[ctypes.c_void_p, ctypes.c_void_p]] = _handles.__dict__.setdefault("kept", {})
    recording = (device, None)
    wanted = recording if torch.cuda.is_current_stream_capturing() else (device, torch.cuda.current_stream(device))
    for key in (wanted, recording):
        if key not in kept:
            handle, params = ctypes.c_void_p(), ctypes.c_void_p()
            _check("cusolverDnCreate", library.cusolverDnCreate(ctypes.byref(handle)))
            _check("cusolverDnCreateParams", library.cusolverDnCreateParams(ctypes.byref(params)))
            kept[key] = handle, params
    return kept[wanted]


def _check(call: str, status: int) -> None:
    if status:
        raise BackendError(
            f"{call} returned status {status}; `flexlora-fast doctor` says which libraries were found, and "
            "device='cpu' works without them"
        )
