"""What a user could run instead, for one layer: each takes the clients' (B, A, w·s) and k, and returns B', A'.

``dense_loop`` is FlexLoRA's released server rule (form ΔW client by client, full SVD), with the fair
``full_matrices=False``; the others are the strongest tools a user would reach for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

Clients = list[tuple[Tensor, Tensor, float]]
Answer = tuple[Tensor, Tensor]


def dense_delta(clients: Clients) -> Tensor:
    """ΔW as the paper's code forms it: one product and one sum per client."""
    delta = torch.zeros(clients[0][0].shape[0], clients[0][1].shape[1])
    for B, A, c in clients:
        delta += (B @ A) * c
    return delta


def dense_loop(clients: Clients, k: int) -> Answer:
    U, S, Vh = torch.linalg.svd(dense_delta(clients), full_matrices=False)
    return U[:, :k] * S[:k], Vh[:k]


def qr_core(clients: Clients, k: int) -> Answer:
    """QR of both stacks and the SVD of the core (NVFlare's HLoRA example, with the scale it leaves out)."""
    Qb, Rb = torch.linalg.qr(torch.cat([B * c for B, _, c in clients], dim=1))
    Qa, Ra = torch.linalg.qr(torch.cat([A for _, A, _ in clients]).T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    return Qb @ (U[:, :k] * S[:k]), Vh[:k] @ Qa.T


def sklearn_randomized(clients: Clients, k: int) -> Answer:
    U, S, Vh = randomized_svd(dense_delta(clients).numpy(), k, random_state=0)
    return torch.from_numpy(U * S), torch.from_numpy(Vh)


def svd_lowrank(clients: Clients, k: int) -> Answer:
    U, S, V = torch.svd_lowrank(dense_delta(clients), q=k + 10, niter=4)
    return U[:, :k] * S[:k], V[:, :k].T


def propack(clients: Clients, k: int) -> Answer:
    """PROPACK's Lanczos on the factored operator: exact, and the strongest CPU library found."""
    P = torch.cat([B * c for B, _, c in clients], dim=1).numpy()
    Q = torch.cat([A for _, A, _ in clients]).numpy()
    op = LinearOperator(
        (P.shape[0], Q.shape[1]), matvec=lambda x: P @ (Q @ x), rmatvec=lambda y: Q.T @ (P.T @ y), dtype=np.float32
    )
    U, S, Vh = svds(op, k=k, solver="propack", tol=1e-4, rng=np.random.default_rng(0))
    order = np.argsort(-S)
    return torch.from_numpy(U[:, order] * S[order]), torch.from_numpy(Vh[order].copy())


PEERS: dict[str, Callable[[Clients, int], Answer]] = {
    "torch.linalg.svd loop": dense_loop,
    "QR + QR + core SVD": qr_core,
    "sklearn randomized_svd": sklearn_randomized,
    "torch.svd_lowrank (niter 4)": svd_lowrank,
    "PROPACK on the factors": propack,
}
