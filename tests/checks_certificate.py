"""Aggregator checks on what comes with a result: certificate, vectors, determinism, the file, adapters from folders."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import flexlora_fast as ff
from tests.checks import CERTIFIED, EXACT, EXACT_SOLVERS, EXCESS, FLOAT32_FLOOR, Case, assert_identical
from tests.oracle import Truth


def check_certificate(case: Case) -> None:
    """‖ΔW‖, the spectrum, and the error at every rank are those of float64."""
    clients = case.round()
    for kept in (3, 1000):
        update = case.aggregate(clients, rank=kept)
        for layer in update.layers:
            about, truth = update[layer], case.truth(clients, layer)
            norm, whole = truth.norm, case.sliced and not case.traits.merges
            exact = whole or about.solver in EXACT_SOLVERS
            assert abs(about.norm - norm) <= 1e-6 * norm
            assert abs(about.energy - norm**2) <= 1e-6 * norm**2
            S, true = about.factorization.S.cpu().numpy(), truth.spectrum
            assert S.dtype == np.float64 and (S >= 0).all() and (np.diff(S) <= 0).all()
            over = S - true[:, : S.shape[1]] * (1 + 1e-6)
            assert over.max() <= 1e-7 * norm
            if about.solver in EXACT_SOLVERS:
                assert np.abs(S - true[:, : S.shape[1]]).max() <= 1e-6 * norm
            for rank in range(about.rank + 1):
                assert_certified(about, truth, rank, exact)


def assert_certified(about: ff.LayerUpdate, truth: Truth, rank: int, exact: bool) -> None:
    """error(rank) against float64: resolved to 1e-6 of the norm, or to float32's floor plus the excess allowed."""
    error, best, norm = about.error(rank), truth.error(rank), truth.norm
    if exact:
        assert abs(error - best) <= 1e-6 * norm, f"{about.name} at rank {rank}: {error:.6e}, truly {best:.6e}"
    else:
        low, high = best**2 - (CERTIFIED * norm) ** 2, ((1 + EXCESS) * best) ** 2 + (CERTIFIED * norm) ** 2
        high += 2 * error * about.base_error  # the bound of two parts that were cut
        assert low <= error**2 <= high, f"{about.name} at rank {rank}: {error:.6e}, truly {best:.6e}"
    assert abs(about.energy_kept(rank) - (1 - (about.cut_off(rank) / about.norm) ** 2)) <= 1e-9


def check_vectors(case: Case) -> None:
    """U and V are orthonormal float32, and the entry of largest magnitude in each column of U is positive."""
    update = case.aggregate(case.round(), rank=1000)
    for layer in update.layers:
        f = update[layer].factorization
        for X in (f.U.cpu(), f.V.cpu()):
            assert X.dtype == torch.float32
            assert (X.double().mT @ X.double() - torch.eye(X.shape[2])).abs().max() <= EXACT, layer
        peak = f.U.gather(1, f.U.abs().argmax(dim=1, keepdim=True))
        assert (peak > 0).all()


def check_deterministic(case: Case) -> None:
    """Bit for bit from run to run, and when finished twice; another thread count only moves rounding."""
    clients = case.round()
    agg = ff.Aggregator(**case.options)
    for c in clients:
        agg.add(c.adapter(), c.weight, client=c.name)
    first = agg.finish()
    assert_identical(first, agg.finish())
    assert_identical(first, case.aggregate(clients))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = case.aggregate(clients)
    finally:
        torch.set_num_threads(threads)
    for layer in first.layers:
        norm = first[layer].norm
        assert (first.delta(layer) - other.delta(layer)).norm() <= 2 * FLOAT32_FLOOR * norm
        assert (first[layer].factorization.S - other[layer].factorization.S).abs().max() <= EXACT * norm


def check_save_and_load(case: Case) -> None:
    """A file gives the same update again, bit for bit, and the same adapters."""
    clients = [c.but(extras={"head.weight": torch.full((2, 3), float(i))}) for i, c in enumerate(case.round())]
    update = case.aggregate(clients)
    with tempfile.TemporaryDirectory() as folder:
        path = update.save(Path(folder) / "deep" / "round.safetensors")
        again = ff.GlobalUpdate.load(path)
        assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left
    assert_identical(update, again)
    assert (again.clients, again.refused, again.method, again.seed) == (update.clients, [], case.method, 0)
    assert again.seconds == update.seconds
    one, two = (u.adapter(client="c2") for u in (update, again))
    assert one.config == two.config and one.layers == two.layers
    assert all(torch.equal(one.state_dict()[k].cpu(), v) for k, v in two.state_dict().items())


def check_folders_are_adapters(case: Case) -> None:
    """Paths of PEFT folders give bit for bit what the adapters in memory give."""
    clients = case.round()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / c.name for c in clients]
        for c, path in zip(clients, paths, strict=True):
            c.adapter().save(path)
        names, weights = [c.name for c in clients], [c.weight for c in clients]
        read = ff.aggregate(paths, weights, clients=names, **case.options)
        assert_identical(read, case.aggregate(clients))


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
