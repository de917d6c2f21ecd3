"""What a user could run instead, for one layer: each takes the clients' (B, A, w·s) and k, and answers with B', A'.

``authors_loop`` and ``peft_svd`` are the released code's rule and the real package. Every other dense method gets the
strongest simple start, one product of the stacked factors, so that what is compared is the decomposition. Those in
torch alone compute where the factors are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import Clients, stack_of
from flexlora_fast.lowrank.solve import solve

OURS = "flexlora_fast"
ESTIMATED = "flexlora_fast, estimated certificate"


class Answer(NamedTuple):
    """B' (m, k) with all of S, A' (k, n); the solver and its steps where the flops depend on them."""

    B: Tensor
    A: Tensor
    solver: str = ""
    steps: int = 0


def ours(clients: Clients, k: int, certificate: str = "exact") -> Answer:
    """Stacking, planning, solving and the certificate, which no peer computes."""
    f = solve(stack_of(clients), k, certificate=certificate)
    return Answer(f.U[0] * f.S[0].float(), f.V[0].T, f.solver, f.iterations)


def stacked(clients: Clients) -> tuple[Tensor, Tensor]:
    """P (m, R) with the coefficients, Q (R, n)."""
    return torch.cat([B * c for B, _, c in clients], dim=1), torch.cat([A for _, A, _ in clients])


def dense_delta(clients: Clients) -> Tensor:
    P, Q = stacked(clients)
    return P @ Q


def authors_loop(clients: Clients, k: int) -> Answer:
    """FlexLoRA's released server rule (FederatedScope, branch FlexLoRA).

    ΔW client by client in a dense sum; one thin ``torch.svd``; then B = U_r·diag(S_r) anew for every client, without
    deduplicating ranks. The answer returned is the one for the target rank k, formed as one more client's.
    """
    first_B, first_A, _ = clients[0]
    delta = torch.zeros(first_B.shape[0], first_A.shape[1], device=first_B.device)
    for B, A, c in clients:
        delta += (B @ A) * c
    U, S, V = torch.svd(delta)
    B_k = torch.empty(0)
    for r in (*(A.shape[0] for _, A, _ in clients), k):
        B_k = U[:, :r] @ torch.diag(S[:r])
    return Answer(B_k, V[:, :k].T)


def full_svd(clients: Clients, k: int) -> Answer:
    U, S, Vh = torch.linalg.svd(dense_delta(clients), full_matrices=False)
    return Answer(U[:, :k] * S[:k], Vh[:k])


class PeftModel:
    """A real PEFT model of one Linear that holds every client as an adapter; ``merge`` is what is timed."""

    def __init__(self, clients: Clients, k: int) -> None:
        from peft import LoraConfig, get_peft_model

        m, n = clients[0][0].shape[0], clients[0][1].shape[1]
        base = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False, device="meta"))
        empty = torch.empty(m, n, device=clients[0][0].device)
        base[0].weight = torch.nn.Parameter(empty, requires_grad=False)
        for i, (_, A, _) in enumerate(clients):
            r = A.shape[0]
            config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False)
            if i == 0:
                self.model = get_peft_model(base, config, adapter_name="0")
            else:
                self.model.add_adapter(str(i), config)
        layer = self.model.base_model.model[0]
        for i, (B, A, _) in enumerate(clients):
            layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = A, B
        self.layer, self.k = layer, k
        self.weights = [c for _, _, c in clients]

    @torch.no_grad()
    def merge(self) -> Answer:
        """``add_weighted_adapter(combination_type="svd")`` with PEFT's own defaults."""
        if "merged" in self.model.peft_config:
            self.model.delete_adapter("merged")
        self.model.base_model.add_weighted_adapter(
            [str(i) for i in range(len(self.weights))], self.weights, "merged", "svd", svd_rank=self.k
        )
        return Answer(self.layer.lora_B["merged"].weight.data, self.layer.lora_A["merged"].weight.data)


def qr_core(clients: Clients, k: int) -> Answer:
    """QR of both stacks and the SVD of the core, as NVFlare's HLoRA example, which leaves the scale out."""
    root = [(B * c**0.5, A * c**0.5) for B, A, c in clients]  # HLoRA splits the weight evenly
    Qb, Rb = torch.linalg.qr(torch.cat([B for B, _ in root], dim=1))
    Qa, Ra = torch.linalg.qr(torch.cat([A for _, A in root]).T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Answer(Qb @ U[:, :k] * S[:k], Vh[:k] @ Qa.T)


def two_stage_sketch(clients: Clients, k: int) -> Answer:
    """FedASK's two linear sketches, client by client: Y = Σ c·B(AΩ), Q = qr(Y), Z = Σ c·Aᵀ(BᵀQ), SVD of Zᵀ.

    Its authors sketch with as many columns as the rank; ten more are given here, as is usual (Halko et al. 2011).
    """
    omega = torch.randn(clients[0][1].shape[1], k + 10, generator=torch.Generator().manual_seed(0)).to(clients[0][1])
    Y = sum((B @ (A @ omega)) * c for B, A, c in clients)
    Q = torch.linalg.qr(Y)[0]
    Z = sum((A.T @ (B.T @ Q)) * c for B, A, c in clients)
    U, S, Vh = torch.linalg.svd(Z.T, full_matrices=False)
    return Answer(Q @ U[:, :k] * S[:k], Vh[:k])


def sklearn_randomized(clients: Clients, k: int) -> Answer:
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = randomized_svd(dense_delta(clients).numpy(), k, random_state=0)
    return Answer(torch.from_numpy(U * S), torch.from_numpy(Vh))


def svd_lowrank(clients: Clients, k: int) -> Answer:
    """``torch.svd_lowrank`` with oversampling and twice its default power iterations: its default leaves 1 to 2 %."""
    delta = dense_delta(clients)
    torch.manual_seed(0)
    U, S, V = torch.svd_lowrank(delta, q=min(k + 10, *delta.shape), niter=4)
    return Answer(U[:, :k] * S[:k], V[:, :k].T)


def propack(clients: Clients, k: int) -> Answer:
    """PROPACK's Lanczos on the factored operator: the strongest CPU library found. ``steps`` counts products."""
    from scipy.sparse.linalg import LinearOperator, svds

    P, Q = (X.numpy() for X in stacked(clients))
    products = 0

    def apply(left: np.ndarray, right: np.ndarray, x: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return left @ (right @ x)

    op = LinearOperator(
        (P.shape[0], Q.shape[1]), matvec=lambda x: apply(P, Q, x), rmatvec=lambda y: apply(Q.T, P.T, y), dtype=P.dtype
    )
    U, S, Vh = svds(op, k=k, solver="propack", tol=1e-4, rng=np.random.default_rng(0))
    order = np.argsort(-S)
    B, A = torch.from_numpy(U[:, order] * S[order]), torch.from_numpy(Vh[order].copy())
    return Answer(B, A, steps=products)


def _plain(method: Callable[[Clients, int], Answer]) -> Callable[[Clients, int], Callable[[], Answer]]:
    return lambda clients, k: lambda: method(clients, k)


# Each prepares (untimed) and returns the call to time. Only PEFT has something to prepare: the model with its adapters.
METHODS: dict[str, Callable[[Clients, int], Callable[[], Answer]]] = {
    OURS: _plain(ours),
    ESTIMATED: _plain(functools.partial(ours, certificate="estimate")),
    "FlexLoRA authors' loop": _plain(authors_loop),
    "PEFT add_weighted_adapter": lambda clients, k: PeftModel(clients, k).merge,
    "dense + linalg.svd": _plain(full_svd),
    "dense + svd_lowrank": _plain(svd_lowrank),
    "sklearn randomized_svd": _plain(sklearn_randomized),
    "QR + QR + core SVD": _plain(qr_core),
    "two-stage sketch": _plain(two_stage_sketch),
    "PROPACK on the factors": _plain(propack),
}
PEERS = tuple(name for name in METHODS if name not in (OURS, ESTIMATED))
