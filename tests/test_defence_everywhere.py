"""Every rule on ways through a round that between them pair methods, solvers, gaps, reads, layers and dtypes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast import defence
from flexlora_fast.defence import Coordinates
from flexlora_fast.errors import OptionError
from tests import checks, defences, oracle, rounds, where
from tests.defences import alike, attacked
from tests.rounds import PREFIX, Client
from tests.test_defence_coordinates import by_hand

RULES = [*defences.RULES, "fltrust", "median", "trimmed-mean:fraction=0.25"]


@dataclasses.dataclass(frozen=True)
class Way:
    method: str
    solver: str
    missing: str
    read: str
    model: str
    dtype: str
    extras: bool = False

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))


WAYS = [
    Way("flexlora", "auto", "zero", "finish", "linear", "float32", extras=True),
    Way("flexlora", "krylov", "renormalize", "add", "moe", "bfloat16"),
    Way("flexlora", "gram", "renormalize", "add", "linear", "float16", extras=True),
    Way("flexlora", "dense", "zero", "finish", "conv", "mixed"),
    Way("flexlora", "factored", "renormalize", "finish", "mha", "float32"),
    Way("flexlora", "subspace", "zero", "add", "embedding", "bfloat16"),
    Way("flexlora", "filtered", "zero", "add", "mixed", "float32"),
    Way("fedit", "svd", "zero", "add", "weird", "mixed"),
    Way("fedit", "krylov", "renormalize", "finish", "moe", "float16"),
    Way("hetlora", "gram", "renormalize", "add", "linear", "mixed", extras=True),
    Way("hetlora", "dense", "zero", "finish", "mixed", "bfloat16"),
]


def made(rule: str, model: str) -> Any:
    if rule == "fltrust":
        return defence.FLTrust(reference=alike(1, model, spread=0.1)[0].adapter())
    return defence.get(rule)


def members(way: Way) -> list[Client]:
    """Eight of equal weight, two of them hostile; some lack a layer, some have a bias and a head."""
    clients = [c.but(weight=1.0) for c in attacked(alike(8, way.model), "noise ×3", 2)]
    dtypes = rounds.DTYPES[way.dtype]
    clients = [c.mapped(_cast(dtypes[i % len(dtypes)])) for i, c in enumerate(clients)]
    first = next(iter(clients[0].layers))
    if way.model in ("linear", "conv", "mixed"):
        for i in (3, 4, 6, 7):
            clients[i] = clients[i].without(first)
    if way.extras:
        for i in (0, 2, 5):
            c, layer = clients[i], clients[i].layers[first]
            clients[i] = c.but(
                bias={first: torch.linspace(-1, i, layer.m)},
                extras={"head.weight": torch.full((2, 3), 1.0 + i)},
                config=c.config | {"modules_to_save": ["head"], "lora_bias": True},
            )
    return clients


def _cast(dtype: torch.dtype) -> Any:
    def cast(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A.to(dtype), B.to(dtype)

    return cast


def finished(way: Way, clients: Sequence[Client], rule: Any, folder: Path, **options: Any) -> ff.GlobalUpdate:
    agg = ff.Aggregator(
        method=way.method,
        solver=way.solver,
        missing=way.missing,  # type: ignore[arg-type]
        read=way.read,  # type: ignore[arg-type]
        device=where.DEVICE,
        defence=rule,
        progress=False,
        **options,
    )
    for c in clients:
        c.adapter().save(folder / c.name)
        agg.add(folder / c.name, c.weight, client=c.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "defence .* judges low-rank updates alone")
        return agg.finish()


def judged(update: ff.GlobalUpdate, clients: Sequence[Client]) -> list[Client]:
    """What the round summed up: every client that is not rejected, with its share and its update times its factor."""
    sent = []
    for v, c in zip(update.verdicts, clients, strict=True):
        assert v.client == c.name
        if v.share:
            scales = {layer: s * v.factor for layer, s in c.scales.items()}
            sent.append(c.but(scales=scales, weight=v.share))
    return sent


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_round_is_what_its_verdicts_say(name: str, way: Way, tmp_path: Path) -> None:
    rule, clients = made(name, way.model), members(way)
    if isinstance(rule, Coordinates) and way.method != "flexlora":
        with pytest.raises(OptionError, match="takes the place of the sum over clients"):
            finished(way, clients, rule, tmp_path)
        return
    update = finished(way, clients, rule, tmp_path)
    assert update.refused == []
    case = checks.Case(way.method, way.solver, way.model, way.dtype)
    if isinstance(rule, Coordinates):
        for layer in update.layers:
            truth = oracle.Truth(by_hand(rule.name, clients, layer, way.missing))
            checks.assert_best(update, layer, truth, update[layer].rank, checks.batched(update.delta(layer)))
        return
    norms = np.linalg.norm(defences.vectors(clients), axis=1)
    np.testing.assert_allclose([v.norm for v in update.verdicts], norms, rtol=1e-5)
    sent = judged(update, clients)
    checks.assert_right(case, update, sent, way.missing)
    if way.extras:
        heads = [(c.weight, c.extras["head.weight"]) for c in sent if c.extras]
        if heads:
            mean = sum(w * x for w, x in heads) / math.fsum(w for w, _ in heads)
            torch.testing.assert_close(update.extras[PREFIX + "head.weight"], mean)


@pytest.mark.parametrize("read", ["add", "finish"])
@pytest.mark.parametrize("name", RULES[:-2])
def test_folded_rounds_are_judged_as_whole_ones(name: str, read: str, tmp_path: Path) -> None:
    """Factors that do not fit the limit come in pieces, two at a time, for the Gram and for the sum."""
    layers = [rounds.Layer("fc", 40, 30)]
    clients = [rounds.client(f"c{i}", layers, rank=300, alpha=300 * 3.0 ** (i == 0)) for i in range(8)]
    rule = name
    if name == "fltrust":  # random directions of this many entries have nothing in common
        rule = defence.FLTrust(reference=clients[1].adapter())  # type: ignore[assignment]
    way = Way("flexlora", "auto", "zero", read, "linear", "float32")
    whole = finished(way, clients, rule, tmp_path)
    folded = finished(way, clients, rule, tmp_path, memory_limit=5 << 19)
    for one, two in zip(whole.verdicts, folded.verdicts, strict=True):
        assert one.status == two.status and one.norm == pytest.approx(two.norm, rel=1e-9)
        assert one.share * one.factor == pytest.approx(two.share * two.factor, abs=1e-6)
    case = checks.Case("flexlora", "dense", "linear")
    checks.assert_right(case, folded, judged(folded, clients))


@pytest.mark.parametrize("name", RULES)
def test_clients_that_are_all_the_same(name: str) -> None:
    """Nobody stands out, whatever their number; FoolsGold takes them for copies, which it says."""
    first = alike(1)[0]
    for count in (1, 2, 3, 6):
        clients = [first.but(name=f"c{i}", weight=1.0) for i in range(count)]
        rule = made(name, "linear")
        if name == "foolsgold" and count > 1:
            with pytest.raises(ff.errors.EmptyRoundError, match=r"cosine 1\.000 with the client most like it"):
                ff.aggregate([c.adapter() for c in clients], defence=rule)
            continue
        update = ff.aggregate([c.adapter() for c in clients], defence=rule, device=where.DEVICE)
        assert all(v.factor == pytest.approx(1) or name == "fltrust" for v in update.verdicts if v.share)
        if name != "fltrust":  # that one has the reference's length
            for layer in update.layers:
                truth = first.adapter().delta(layer)
                torch.testing.assert_close(update.delta(layer), truth, rtol=0, atol=1e-5 * float(truth.norm()))


@pytest.mark.parametrize("name", RULES)
def test_two_clients_have_no_majority_and_no_accident(name: str) -> None:
    """One of them a hundred times as long: whichever counts, the result is finite and adds up."""
    clients = [c.but(weight=1.0) for c in attacked(alike(2), "scaling ×100", 1)]
    update = ff.aggregate([c.adapter() for c in clients], defence=made(name, "linear"), device=where.DEVICE)
    assert math.isfinite(update.norm) and update.norm > 0
    if update.verdicts:
        assert math.fsum(v.share for v in update.verdicts) == pytest.approx(1)
        checks.assert_right(checks.Case("flexlora", "auto", "linear"), update, judged(update, clients))
