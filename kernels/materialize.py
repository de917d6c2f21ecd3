"""ΔW = P · diag(d) · Q, the dense update of one layer.

    ΔW[i, j] = Σ_k P[i, k] · d[k] · Q[k, j]        P (m, R), d (R,), Q (R, n), ΔW (m, n)

P and Q are float16, bfloat16 or float32. Both are raised to float32 as they are loaded, d is applied to
float32 values, and the products are summed in float32 without TF32 (``input_precision="ieee"``): the result is as
good as torch's float32 product of float32 copies, and no copy is made. One program computes one tile of ΔW and
walks along R in order, so the result is deterministic.

Reference: FlexLoRA, arXiv 2402.11505, equation 3 (the weighted sum of the clients' B_i·A_i, stacked).
"""

from __future__ import annotations

import torch

from flexlora_fast.kernels._triton import require_runnable, tl, triton

# 64 × 64 accumulators on 4 warps are 32 registers a thread, which leaves room for both operands. BLOCK_R = 16
# spills float32 operands on sm_80; tests hold this choice to zero spills on sm_80, sm_90 and sm_100. It was chosen
# by compiling, not by timing.
BLOCK_M = 64
BLOCK_N = 64
BLOCK_R = 16
# Fused multiply-add is asked for by name because Triton's default for it is about to change.
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit
def materialize_kernel(
    P_ptr,  # [m, R]
    P_stride_m,
    P_stride_r,
    d_ptr,  # [R] float32, contiguous
    Q_ptr,  # [R, n]
    Q_stride_r,
    Q_stride_n,
    out_ptr,  # [m, n] float32
    out_stride_m,
    out_stride_n,
    m,
    n,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(n, BLOCK_N)
    # int64: a vocabulary of 256,000 times a width of 16,384 has more entries than an int32 can count.
    rows = ((tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = ((tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Operands become float32 as they are loaded, also because Triton's interpreter gets bfloat16 arithmetic silently
    # wrong (https://github.com/triton-lang/triton/issues/10945).
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        p = tl.load(
            P_ptr + rows[:, None] * P_stride_m + ranks[None, :] * P_stride_r,
            mask=(rows[:, None] < m) & (ranks[None, :] < R),
            other=0.0,
        ).to(tl.float32)
        q = tl.load(
            Q_ptr + ranks[:, None] * Q_stride_r + columns[None, :] * Q_stride_n,
            mask=(ranks[:, None] < R) & (columns[None, :] < n),
            other=0.0,
        ).to(tl.float32)
        d = tl.load(d_ptr + ranks, mask=ranks < R, other=0.0)
        total = tl.dot(p * d[None, :], q, total, input_precision="ieee")
    tl.store(
        out_ptr + rows[:, None] * out_stride_m + columns[None, :] * out_stride_n,
        total,
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )


def materialize(P: torch.Tensor, d: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """ΔW = P · diag(d) · Q in float32.

    Args:
        P: (m, R), float16, bfloat16 or float32, any strides.
        d: (R,), the coefficients, in any floating dtype; applied in float32.
        Q: (R, n), as P; its dtype may differ.

    Returns:
        (m, n) float32, contiguous, on P's device.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit together.
        BackendError: where the kernel cannot run: CPU tensors outside Triton's interpreter.
    """
    if P.dim() != 2 or Q.dim() != 2 or P.shape[1] != Q.shape[0] or d.shape != P.shape[1:]:
        shapes = f"P {tuple(P.shape)}, d {tuple(d.shape)} and Q {tuple(Q.shape)}"
        raise ValueError(f"materialize: {shapes} do not fit: expected (m, R), (R,) and (R, n)")
    if not P.device == d.device == Q.device:
        raise ValueError(f"materialize: P, d and Q are on {P.device}, {d.device} and {Q.device}: move them together")
    require_runnable("materialize", materialize_kernel, P=P, Q=Q)
    (m, R), n = P.shape, Q.shape[1]
    out = torch.empty((m, n), dtype=torch.float32, device=P.device)
    if m == 0 or n == 0:
        return out
    grid = (triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)
    materialize_kernel[grid](
        P,
        *P.stride(),
        d.to(torch.float32).contiguous(),
        Q,
        *Q.stride(),
        out,
        *out.stride(),
        m,
        n,
        R,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_R=BLOCK_R,
        **OPTIONS,
    )
    return out
