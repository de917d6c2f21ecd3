"""The server's side: sums in, bases out, and at the end an ordinary global update.

Sources. Range, projection and power steps: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review
53 (2011), algorithms 4.1, 4.4 and 5.1; as summed rounds of a federation: FedASK, NeurIPS 2025 (arXiv 2507.09990),
there without encryption. One round: Tropp, Yurtsever, Udell, Cevher, "Streaming low-rank matrix approximation with an
application to scientific simulation", SIAM J. Sci. Comput. 41 (2019) (arXiv 1902.08651), whose third sketch makes it
both smaller and better than the two of "Practical sketching algorithms" (arXiv 1609.00048).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexlora_fast.errors import ProtocolError, WeightError
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.dense import dense_energy
from flexlora_fast.lowrank.factorization import Factorization, finish
from flexlora_fast.lowrank.random import stream
from flexlora_fast.precision import full_precision
from flexlora_fast.secure import matrices, message
from flexlora_fast.secure.encoding import Vector, add
from flexlora_fast.secure.plan import PROBES, Plan, template
from flexlora_fast.secure.sums import Part, Sums, read
from flexlora_fast.update import GlobalUpdate


class Server:
    """One securely aggregated round: while not ``done``, ``receive`` the sum of everybody's ``sketch`` of ``message``.

    It takes sums alone, and no defence or policy: those judge single updates, which it never sees.

    The clients of the last sum are those whose mean the update is; clients that leave before only helped to choose the
    subspace. Nothing here remembers a client, so no error is one's fault: a sum is taken or refused whole, and after a
    refusal the server waits for the same round's sum again.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._template = template(plan)
        self._stage = 1
        self._bases: dict[str, Tensor] = {}
        self._message = message.pack(plan, 1, {})
        self._sums: Sums | None = None

    @property
    def stage(self) -> int:
        """The summed round that is due, from 1; after the last it stays there."""
        return self._stage

    @property
    def done(self) -> bool:
        """Whether all sums are there."""
        return self._sums is not None

    @property
    def message(self) -> bytes:
        """What every client gets before this round: its number and, but in the first, a basis (float32) by layer."""
        return self._message

    @full_precision()
    def receive(self, total: Vector | Mapping[str, Part | Vector]) -> None:
        """Take Σ ``sketch(…)`` modulo M of this round, or the parts of it that edge servers hand on, by their names.

        Raises:
            ProtocolError: another length or dtype, a sum of more clients than the plan has room for (it may have
                wrapped), of one that had another plan or message, with entries that so many clients cannot make, or one
                after the last; of parts, the first for which that is so, by name. EmptyRoundError: of no client.
                WeightError: weights that sum to zero.
        """
        if self.done:
            raise ProtocolError(f"all {self._stage} sums are there; call finish()")
        if isinstance(total, Mapping):
            vectors = {edge: its.vector if isinstance(its, Part) else its for edge, its in total.items()}
            for edge, vector in vectors.items():
                read(vector, self.plan, self._stage, self._message, f"the part of edge {edge!r}")
            total = add(vectors.values())
        _, sums = read(total, self.plan, self._stage, self._message)
        if self._stage < len(self.plan.stages):
            specs = [spec for spec in self.plan.layers if not self.plan.dense(spec)]
            kind = "right" if self._stage % 2 else "left"
            self._bases = {spec.name: _basis(sums[kind, spec.name]) for spec in specs}
            self._stage += 1
            self._message = message.pack(self.plan, self._stage, self._bases)
            return
        if not float(sums["weight", ""]) > 0:
            raise WeightError("the weights of the round sum to zero; a round needs a client of positive weight")
        self._sums = sums

    @full_precision()
    def finish(self) -> GlobalUpdate:
        """The update, as any other: at most rank ``plan.rank``, for ``adapter(rank=…)`` or ``adapter(config=…)``.

        It knows no clients, so ``adapter(client=…)`` is refused. ``norm`` and ``error`` are estimates: the part of ΔW
        that X leaves out is measured by a two-sided sketch E = Φᵀ(ΔW − X)Ψ of its own, ‖ΔW − X‖_F² ≈ m·n·mean(E²),
        unbiased; ``energy_error`` is its standard error. ``excess`` is NaN: no sum tells what the best would have left.
        In one round X is no projection of ΔW, and ``norm`` is √(‖X‖_F² + ‖ΔW − X‖_F²), somewhat more than ‖ΔW‖_F.
        Layers that were sent whole are exact, but for rounding to the plan's integers.

        Raises ``ProtocolError`` while sums are missing.
        """
        if self._sums is None:
            raise ProtocolError(f"round {self._stage} of {len(self.plan.stages)} has no sum yet; receive() it first")
        sums, plan = self._sums, self.plan
        weight = float(sums["weight", ""])
        count = int(sums["clients", ""])
        noise = count * plan.quantum(plan.clip) ** 2 / 12 / weight**2
        layers = {spec.name: self._layer(spec, weight, noise) for spec in plan.layers}
        extras = {}
        for key, form in plan.extras.items():
            having = float(sums["share", key])
            if having > 0:
                mean = sums["extra", key] / having
                extras[key] = (mean if form.dtype.is_floating_point else mean.round()).to(form.dtype)
        rounds = len(plan.stages)
        method = f"flexlora by secure aggregation of {count} client{'s' * (count != 1)} in {rounds} "
        method += "round" + "s" * (rounds != 1)
        return GlobalUpdate(
            dict(sorted(layers.items())), extras, method=method, seed=plan.seed, template=self._template
        )

    def _layer(self, spec: LayerSpec, weight: float, noise: float) -> LayerUpdate:
        """``noise``: variance that rounding to integers leaves in each entry of a mean."""
        assert self._sums is not None
        mean = {kind: total / weight for (kind, name), total in self._sums.items() if name == spec.name}
        key = stream(self.plan.seed, spec.name)
        bias = mean["bias"].float() if "bias" in mean else None
        rank = min(self.plan.rank, spec.m, spec.n)
        if "whole" in mean:
            U, S, Vh = torch.linalg.svd(mean["whole"], full_matrices=False)
            triplets = finish(U[:, :, :rank], S[:, :rank], Vh[:, :rank].mT, key)
            return LayerUpdate(
                spec, Factorization(*triplets, dense_energy(mean["whole"]), "sum"), min(spec.m, spec.n), bias=bias
            )
        if self.plan.rounds == 1:
            U, S, V = _recovered(mean, matrices.core(self.plan, spec))
        elif self._stage % 2:
            U, S, V = _projected(mean["right"], self._bases[spec.name])
        else:
            V, S, U = _projected(mean["left"], self._bases[spec.name])
        U, S, V = finish(U[:, :, :rank], S[:, :rank], V[:, :, :rank], key)
        left, right = matrices.probes(self.plan, spec)
        E = mean["probes"] - (left.mT @ U.double() * S.unsqueeze(1)) @ (V.double().mT @ right)
        rest, error = _mean_square(E)
        size = spec.m * spec.n
        rest = (size * (rest - noise)).clamp_min(0)
        energy = S.square().sum(dim=1) + rest
        f = Factorization(U, S, V, energy, "sketch", self._stage, float("nan"), size * error)
        return LayerUpdate(spec, f, min(spec.m, spec.n), bias=bias)


def _basis(Y: Tensor) -> Tensor:
    """Orthonormal columns that span those of Y (E, side, width), float32."""
    # Columns of unit length: rounding in QR is relative to the longest, and a sum may be zero in a layer.
    norms = torch.linalg.vector_norm(Y, dim=1, keepdim=True)
    return torch.linalg.qr(Y / torch.where(norms > 0, norms, 1.0))[0].float()


def _projected(K: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of K·W⁺ for K = D·W (E, a, width), W = ``basis`` (E, b, width): left vectors, values, right vectors.

    D·W·W⁺ is D on the span of W. W is orthonormal up to float32, which QR takes into account.
    """
    Q, R = torch.linalg.qr(basis.double())
    coefficients = torch.linalg.solve_triangular(R, K, upper=True, left=False)  # D·Q
    left, S, Vh = torch.linalg.svd(coefficients, full_matrices=False)
    return left, S, Q @ Vh.mT


def _recovered(mean: dict[str, Tensor], cores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of Q·(ΦᵀQ)⁺·(ΦᵀΔWΨ)·(PᵀΨ)⁺·Pᵀ with Q, P for the spans of ΔW·Ω and ΔWᵀ·Γ (arXiv 1902.08651, eq. 2.8)."""
    Q, P = _basis(mean["right"]).double(), _basis(mean["left"]).double()
    Phi, Psi = cores
    core = _solved(Psi.mT @ P, _solved(Phi.mT @ Q, mean["core"]).mT).mT
    U, S, Vh = torch.linalg.svd(core)
    return Q @ U, S, P @ Vh.mT


def _solved(X: Tensor, Y: Tensor) -> Tensor:
    """X⁺·Y for X (E, 4·width, width), by QR: ``torch.linalg.lstsq`` gives other last bits at each call (torch 2.13).

    X is an orthonormal basis seen through four times as many random signs, whose condition is about 3.
    """
    Q, R = torch.linalg.qr(X)
    return torch.linalg.solve_triangular(R, Q.mT @ Y, upper=True)


def _mean_square(E: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of E² over rows and columns (…, 32, 32), and its standard error: (E,) each.

    Rows are independent given the columns' probes, and the other way round, so that the variance of the mean is that of
    the rows' means plus that of the columns' means, over 32 (what single entries vary by is counted in both, which
    errs on the side of caution).
    """
    squares = E.square()
    variance = (squares.mean(dim=1).var(dim=1) + squares.mean(dim=2).var(dim=1)) / PROBES
    return squares.mean(dim=(1, 2)), variance.sqrt()
