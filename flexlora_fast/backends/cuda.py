"""Host functions of the CUDA kernels in csrc/cuda, one an operation: arguments checked, geometry, launch.

The geometry (grid, block, dynamic shared memory) is here alone, whichever way the kernels were compiled
(``launcher``); the formulas are those at the top of each kernel's file, where the algorithms are, too. Nothing here
waits for the device. Matrices are contiguous unless it says otherwise, L of them, on one GPU.

Every function raises ``ValueError``, quoting the value, where shapes, dtypes or sizes do not fit, and ``BackendError``
where the kernel cannot be launched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.backends import eigen
from flexlora_fast.backends.launcher import MOST_BLOCKS, launch
from flexlora_fast.backends.transfer import moved

# Rows of a panel that one block of gram64 adds up. Of the shape alone, so that results do not depend on how many
# layers there are; four or more blocks a layer fill a GPU with a few dozen layers.
_ROWS = 1024
_TILE = 80  # gram64's, and the largest panel that it has in one


def signs(addresses: Sequence[tuple[int, int]], rows: int, cols: int, *, device: torch.device) -> Tensor:
    """Matrices (len(addresses), rows, cols) of ±1 in float32: ``lowrank.random.signs_of``, bit for bit."""
    quads = rows * _ceil(cols, 4)
    if quads >= 1 << 30:
        raise ValueError(f"signs of {rows} rows and {cols} columns: a matrix must have less than 2^32 entries")
    out = torch.empty(len(addresses), rows, cols, device=device)
    if out.numel():
        pairs = moved(torch.tensor(list(addresses), dtype=torch.int64), device)
        grid = (len(addresses), min(_ceil(quads, 256), MOST_BLOCKS))
        launch("flexlora_signs", grid, (256,), (pairs, rows, cols, out), device=device)
    return out


def gram64(X: Tensor, Y: Tensor, *, symmetric: bool = False, only: Tensor | None = None) -> Tensor:
    """XᵀY (L, w, v) float64 of float32 X (L, m, w) and Y (L, m, v), whose rows are contiguous: ``small.gram64``.

    symmetric: the result is (it is where X is Y): one triangle is computed, and mirrored.
    only: (L,) bool, the layers to compute; nothing is written for others.
    """
    _check("X", X, torch.float32, "Lmw", contiguous=False)
    _check("Y", Y, torch.float32, "Lmv", contiguous=False)
    (L, m, w), v = X.shape, Y.shape[2]
    symmetric = symmetric or X is Y
    if Y.shape[:2] != X.shape[:2] or (symmetric and v != w):
        raise ValueError(f"X and Y have shapes {tuple(X.shape)} and {tuple(Y.shape)}: expected (L, m, w) and (L, m, v)")
    slices = max(1, _ceil(m, _ROWS))
    parts = torch.empty(L, slices, w, v, dtype=torch.float64, device=X.device)
    if parts.numel() == 0:
        return parts[:, 0]
    side = _ceil(w, _TILE)
    tiles = side * (side + 1) // 2 if symmetric else side * _ceil(v, _TILE)
    strides = (X.stride(0), X.stride(1), Y.stride(0), Y.stride(1))
    tall = (X, Y, parts, only, *strides, m, w, v, _ROWS, int(symmetric))
    launch("flexlora_gram64", (tiles, slices, L), (128,), tall, shared_bytes=45056, device=X.device)
    if slices == 1:
        return parts[:, 0]
    out = torch.empty(L, w, v, dtype=torch.float64, device=X.device)
    flat = (parts, out, only, w, v, slices, int(symmetric))
    launch("flexlora_gram64_sum", (_ceil(w, 8), L), (256,), flat, device=X.device)
    return out


def whiten(gram: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """T (L, l, l) in float64 or float32, upper triangular, and where it was shifted, (L,) bool: ``small.whiten``."""
    L, l = _square("gram", gram)  # noqa: E741
    T = torch.empty_like(gram, dtype=dtype)
    shifted = _unwritten(gram, torch.bool)
    if T.numel():
        workspace, shared = _memory(gram, 10 * l + 8, _packed(l))
        outputs = (T, None) if dtype == torch.float64 else (None, T)
        arguments = (gram, *outputs, shifted, workspace, l)
        launch("flexlora_whiten", (L,), (256,), arguments, shared_bytes=shared, device=gram.device)
    return T, shifted


def condition(gram: Tensor) -> Tensor:
    """T (L, l, l) float32: ``small.condition``, rounded."""
    L, l = _square("gram", gram)  # noqa: E741
    T = torch.empty_like(gram, dtype=torch.float32)
    if T.numel():
        workspace, shared = _memory(gram, 10 * l + 8, _packed(l))
        launch("flexlora_condition", (L,), (256,), (gram, T, workspace, l), shared_bytes=shared, device=gram.device)
    return T


def ritz(gram: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values (L, l) float64, rotation (L, l, l) float32, shifted (L,) bool: ``small.ritz``, values at least 0."""
    T, small, shifted, spoiled = ritz_begin(gram, core)
    values, vectors = eigen.on_cuda()[1](small)
    found, rotation, _ = ritz_end(T, values, vectors, spoiled, T.shape[1], last=False)
    return found, rotation, shifted


def singular(gram: Tensor, core: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (L, k) float64, both sides' rotations (L, l, k) float32, shifted (L,) bool: ``small.singular``."""
    T, small, shifted, spoiled = ritz_begin(gram, core)
    values, vectors = eigen.on_cuda()[1](small)
    S, rotation, scaled = ritz_end(T, values, vectors, spoiled, k, last=True)
    assert scaled is not None
    return S, rotation, scaled, shifted


def ritz_begin(gram: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T and C = Tᵀ·core·T (L, l, l) float64 with Tᵀ·gram·T = I; shifted as ``whiten`` has it, and spoiled, (L,) bool.

    Where C is not finite, it is spoiled, and zero.
    """
    L, l = _square("gram", gram)  # noqa: E741
    if _square("core", core) != (L, l):
        raise ValueError(f"gram and core have shapes {tuple(gram.shape)} and {tuple(core.shape)}: expected the same")
    T, small = torch.empty_like(gram), torch.empty_like(gram)
    shifted, spoiled = _unwritten(gram, torch.bool), _unwritten(gram, torch.bool)
    if T.numel():
        workspace, shared = _memory(gram, 26 * l + 8, 2 * _packed(l))
        arguments = (gram, core, T, small, shifted, spoiled, workspace, l)
        launch("flexlora_ritz", (L,), (256,), arguments, shared_bytes=shared, device=gram.device)
    return T, small, shifted, spoiled


def ritz_end(
    T: Tensor, values: Tensor, vectors: Tensor, spoiled: Tensor, k: int, *, last: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k leading Ritz vectors' rotation (L, l, k) float32, from the eigenproblem of what ``ritz_begin`` gave.

    Args:
        values (L, l) float64 ascending, vectors (L, l, l) float64, one a column: as ``eigen.on_cuda()`` gives them.
        last: for the singular triplets of ΔW.

    Returns the values found (L, k) float64, descending, at least 0, NaN where spoiled; the rotation; and None. Where it
    is the last: the values' roots S; the rotation; and the rotation over S (L, l, k) float32, 0 where S ≤ 1e-7 of the
    largest.
    """
    L, l = _square("T", T)  # noqa: E741
    rows = vectors.mT.contiguous()  # the kernel wants a vector a row, which is how cuSOLVER writes them
    _square("vectors", rows)
    _check("values", values, torch.float64, "Ll")
    if rows.shape != T.shape or values.shape != (L, l) or spoiled.shape != (L,) or not 1 <= k <= max(l, 1):
        shapes = [tuple(x.shape) for x in (T, values, vectors, spoiled)]
        raise ValueError(f"T, values, vectors, spoiled have shapes {shapes}, k = {k}: expected l×l, l, l×l, 1; k ≤ l")
    rotation = torch.empty(L, l, k, device=T.device)
    scaled = torch.empty_like(rotation) if last else None
    found = torch.empty(L, k, dtype=torch.float64, device=T.device)
    if rotation.numel():
        shared = _fits(T.device, 64 * (l | 1))
        arguments = (T, rows, values, spoiled, rotation, scaled, found, l, k)
        grid = (_ceil(l, 32) * _ceil(k, 32), L)
        launch("flexlora_rotate", grid, (256,), arguments, shared_bytes=shared, device=T.device)
    return found, rotation, scaled


def jacobi_eigh(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (L, l) ascending and eigenvectors (L, l, l), one a column, of the symmetric float64 C (L, l, l).

    As ``torch.linalg.eigh`` has them; and whether they converged, (L,) bool: what is not finite gives NaN, and false.
    """
    L, l = _square("C", C)  # noqa: E741
    values, rows, converged = torch.empty_like(C[:, 0]), torch.empty_like(C), _unwritten(C, torch.bool)
    if C.numel():
        workspace, shared = _memory(C, 3 * l, l * (l | 1))
        arguments = (C, values, rows, converged, workspace, l)
        launch("flexlora_jacobi_eigh", (L,), _pairs(l), arguments, shared_bytes=shared, device=C.device)
    return values, rows.mT, converged


def jacobi_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (L, l, l), S (L, l) descending and V (L, l, l) with A = U·diag(S)·Vᵀ, for float64 A (L, l, l).

    Columns of U whose S is 0 are 0. The last: whether they converged, (L,) bool, as ``jacobi_eigh`` has it.
    """
    L, l = _square("A", A)  # noqa: E741
    U, S, V, converged = torch.empty_like(A), torch.empty_like(A[:, 0]), torch.empty_like(A), _unwritten(A, torch.bool)
    if A.numel():
        workspace, shared = _memory(A, 3 * l, 2 * l * (l | 1))
        arguments = (A, U, S, V, converged, workspace, l)
        launch("flexlora_jacobi_svd", (L,), _pairs(l), arguments, shared_bytes=shared, device=A.device)
    return U, S, V, converged


def orthonormalize(Y: Tensor) -> Tensor:
    """An orthonormal basis (L, m, l) float32 of the columns of Y, zeros at the places of dependent ones.

    Cholesky QR twice, with pivoting, and a third time for layers that need it; ``reference.orthonormalize``.
    """
    T, _, again = root(gram64(Y, Y))
    Q = apply_right(Y, T)
    for only in (None, again):
        T, _, _ = root(gram64(Q, Q, only=only), only)
        apply_right(Q, T, out=Q, only=only)
    return Q


def root(gram: Tensor, only: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """T (L, l, l) float64 with orthonormal or zero columns in Y·T, for Y of this Gram matrix.

    Returns T; the columns kept (L,) int32, −1 where the Gram matrix is not finite; and where a third pass is due,
    (L,) bool. only: (L,) bool, the layers to compute; nothing is written for others.
    """
    L, l = _square("gram", gram)  # noqa: E741
    T = torch.empty_like(gram)
    rank = _unwritten(gram, torch.int32, whole=only is None)
    again = _unwritten(gram, torch.bool, whole=only is None)
    if T.numel():
        workspace, shared = _memory(gram, 12 * l + 16, _packed(l))
        arguments = (gram, T, rank, again, only, workspace, l)
        launch("flexlora_root", (L,), (256,), arguments, shared_bytes=shared, device=gram.device)
    return T, rank, again


def apply_right(Y: Tensor, T: Tensor, *, out: Tensor | None = None, only: Tensor | None = None) -> Tensor:
    """Y·T (L, m, l) float32, summed in float64, for float32 Y (L, m, l), whose rows are contiguous, and T (L, l, l).

    out: where to, which may be Y. only: (L,) bool, the layers to compute; nothing is written for others, which is
    why it wants ``out``.
    """
    _check("Y", Y, torch.float32, "Lml", contiguous=False)
    out = torch.empty_like(Y, memory_format=torch.contiguous_format) if out is None and only is None else out
    if out is None:
        raise ValueError("`only` leaves layers as they are in `out`, which is not given")
    _check("out", out, torch.float32, "Lml", contiguous=False)
    L, m, l = Y.shape  # noqa: E741
    if _square("T", T) != (L, l) or out.shape != Y.shape:
        shapes = [tuple(x.shape) for x in (Y, T, out)]
        raise ValueError(f"Y, T, out have shapes {shapes}: expected (L, m, l), (L, l, l), (L, m, l)")
    if out.numel():
        shared = _fits(Y.device, 32 * ((l + 3) // 8 * 8 + 4) + 2688)
        strides = (Y.stride(0), Y.stride(1), out.stride(0), out.stride(1))
        arguments = (Y, T, out, only, *strides, m, l)
        launch("flexlora_apply_right", (_ceil(m, 64), L), (128,), arguments, shared_bytes=shared, device=Y.device)
    return out


def scale_grams(G: Tensor, M: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G and M (L, W, W) float32 scaled in place; norms (L, W) float32, bad (L,) bool, energy (L,) float64.

    ``small.scale_grams``; d (L, W) float64.
    """
    L, W = _square("G", G, torch.float32)
    _check("d", d, torch.float64, "LW")
    if _square("M", M, torch.float32) != (L, W) or d.shape != (L, W):
        shapes = [tuple(x.shape) for x in (G, M, d)]
        raise ValueError(f"G, M, d have shapes {shapes}: expected (L, W, W), (L, W, W), (L, W)")
    p, r = torch.empty(2, L, W, device=G.device).unbind()
    bad, energy = _unwritten(G, torch.bool), _unwritten(G, torch.float64)
    if G.numel():
        count = _ceil(W, 8)
        parts = torch.empty(L, count, dtype=torch.float64, device=G.device)
        launch("flexlora_norms", (L,), (256,), (G, M, d, p, r, bad, W, W), device=G.device)
        arguments = (G, M, p, r, parts, W)
        launch("flexlora_scale", (count, L), (256,), arguments, shared_bytes=2304, device=G.device)
        launch("flexlora_energy", (L,), (256,), (parts, energy, count), shared_bytes=2304, device=G.device)
    return p, bad, energy


def chebyshev(
    product: Tensor, now: Tensor, before: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, *, out: Tensor
) -> Tensor:
    """out = a·product + b·now + c·before for (L, W, w) float32 and coefficients (L, w) float32 of each column.

    Without ``before`` and ``c`` the last term is left out. out: where to, which may be one of the others.
    """
    panels = {"product": product, "now": now, "before": before, "out": out}
    for name, panel in panels.items():
        if panel is not None:
            _check(name, panel, torch.float32, "LWw")
    for name, column in {"a": a, "b": b, "c": c}.items():
        if column is not None:
            _check(name, column, torch.float32, "Lw")
    L, W, w = product.shape
    if {x.shape for x in panels.values() if x is not None} != {product.shape} or (before is None) != (c is None):
        raise ValueError("product, now, before and out must have one shape, and c goes with before")
    if {x.shape for x in (a, b, c) if x is not None} != {(L, w)}:
        raise ValueError(f"a, b and c must have shape {(L, w)}, the layers and columns of product")
    if _ceil(W * w, 1024) * 1024 >= 1 << 31:
        raise ValueError(f"product has {W * w} entries a layer: the kernel counts less than 2^31")
    if out.numel():
        arguments = (product, now, before, out, a, b, c, W, w)
        launch("flexlora_chebyshev", (_ceil(W * w, 1024), L), (256,), arguments, device=out.device)
    return out


# -- checks and memory ---


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _unwritten(matrices: Tensor, dtype: torch.dtype, *, whole: bool = True) -> Tensor:
    """One number for each matrix, for a kernel to write; zeros where it may not write the ``whole``."""
    make = torch.empty if whole and matrices.numel() else torch.zeros
    return make(matrices.shape[0], dtype=dtype, device=matrices.device)


def _pairs(l: int) -> tuple[int]:  # noqa: E741
    """Threads for l columns that are rotated in pairs: 8 a pair, in whole warps, 512 at most."""
    return (min(512, _ceil(8 * _ceil(l, 2), 32) * 32),)


def _packed(l: int) -> int:  # noqa: E741
    """Doubles of a packed triangular l×l matrix."""
    return l * (l + 1) // 2


def _check(name: str, X: Tensor, dtype: torch.dtype, axes: str, *, contiguous: bool = True) -> None:
    """``axes``: a letter each. Without ``contiguous``, neighbours in a row still have to be."""
    good = X.is_contiguous() if contiguous else X.dim() > 0 and (X.stride(-1) == 1 or X.shape[-1] <= 1)
    if X.dtype != dtype or X.dim() != len(axes) or not good:
        expected = f"{'contiguous ' if contiguous else 'rows of '}{dtype} ({', '.join(axes)})"
        raise ValueError(f"{name} is {X.dtype} {tuple(X.shape)} with strides {X.stride()}: expected {expected}")


def _square(name: str, X: Tensor, dtype: torch.dtype = torch.float64) -> tuple[int, int]:
    """The number and size of square matrices."""
    _check(name, X, dtype, "Lll")
    if X.shape[1] != X.shape[2]:
        raise ValueError(f"{name} has shape {tuple(X.shape)}: expected square matrices")
    return X.shape[0], X.shape[1]


@functools.cache
def _most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block can have on this GPU."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _fits(device: torch.device, doubles: int) -> int:
    """The bytes of so many doubles in shared memory; ValueError where the GPU's blocks have less."""
    if 8 * doubles > (most := _most_shared(device)):
        raise ValueError(
            f"matrices this large need {8 * doubles} bytes of shared memory a block, and {device} has {most}"
        )
    return 8 * doubles


def _memory(matrices: Tensor, fixed: int, packed: int) -> tuple[Tensor | None, int]:
    """Where a kernel keeps ``packed`` doubles a matrix, beside ``fixed`` ones in shared memory; its shared bytes.

    In shared memory (no workspace) as far as the GPU has it, otherwise in a workspace.
    """
    if 8 * (fixed + packed) <= _most_shared(matrices.device):
        return None, 8 * (fixed + packed)
    workspace = torch.empty(matrices.shape[0], packed, dtype=torch.float64, device=matrices.device)
    return workspace, _fits(matrices.device, fixed)
