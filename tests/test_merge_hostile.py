"""Updates of edge servers that are broken or lie: refused by the edge's name, never merged in silence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError
from tests import rounds

CLIENTS = [c.but(extras={"head.weight": torch.full((2, 3), float(i))}) for i, c in enumerate(rounds.typical("linear"))]
LAYER = "h.0.up"


def edge(clients: list[rounds.Client], prefix: str) -> ff.GlobalUpdate:
    names = [f"{prefix}{i}" for i in range(len(clients))]
    return ff.aggregate([c.adapter() for c in clients], [c.weight for c in clients], rank=40, clients=names)


NORTH, SOUTH = edge(CLIENTS[:2], "n"), edge(CLIENTS[2:], "s")


def with_layer(**changes: Any) -> ff.GlobalUpdate:
    """The southern update with another layer; fields of the factorization among ``changes``."""
    layer = SOUTH[LAYER]
    inner = {name: changes.pop(name) for name in ("U", "S", "V", "energy") if name in changes}
    layer = dataclasses.replace(layer, factorization=dataclasses.replace(layer.factorization, **inner), **changes)
    return dataclasses.replace(SOUTH, layer_updates=SOUTH.layer_updates | {LAYER: layer})


def with_shares(of: Any) -> ff.GlobalUpdate:
    return dataclasses.replace(
        SOUTH, clients=[dataclasses.replace(client, weight=of(client.weight)) for client in SOUTH.clients]
    )


def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


F = SOUTH[LAYER].factorization
BROKEN: dict[str, tuple[ff.GlobalUpdate, str]] = {
    "NaN": (with_layer(U=spoilt(F.U, math.nan)), "U holds NaN"),
    "Inf": (with_layer(V=spoilt(F.V, math.inf)), "V holds NaN or Inf"),
    "a NaN spectrum": (with_layer(S=F.S * math.nan), "S holds NaN"),
    "a negative spectrum": (with_layer(S=-F.S), "a singular value is negative"),
    "rows missing": (with_layer(U=F.U[:, 1:]), "U has shape"),
    "columns missing": (with_layer(V=F.V[:, :, 1:]), "V has shape"),
    "an error that is none": (with_layer(inherited=math.nan), "inherited is nan"),
    "an error below zero": (with_layer(inherited=-1.0), "inherited is -1.0"),
    "a norm that is none": (with_layer(energy=F.energy * math.nan), r"‖ΔW‖_F² is nan"),
    "a norm below the spectrum's": (with_layer(energy=F.energy / 2), r"more than ‖ΔW‖_F²"),
    "values beyond its norm": (with_layer(S=F.S * 1e20), r"more than ‖ΔW‖_F²"),
    "a bias of NaN": (with_layer(bias=torch.full((SOUTH[LAYER].spec.m,), math.nan)), "bias holds NaN"),
    "a bias of another shape": (with_layer(bias=torch.zeros(2)), "bias has shape"),
    "NaN shares": (with_shares(lambda share: math.nan), "the share of client 'south/s0' is nan"),
    "negative shares": (with_shares(lambda share: -share), "the share of client 'south/s0' is -"),
    "a share of a million": (with_shares(lambda share: 1e6), "is 1000000.0, and shares are 0 to 1"),
    "shares of 1 each": (with_shares(lambda share: 1.0), "shares sum to 3"),
    "a head of NaN": (
        dataclasses.replace(SOUTH, extras={key: x * math.nan for key, x in SOUTH.extras.items()}),
        r"tensor '.*head.weight' holds NaN",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_edge_that_is_not_sound_is_refused_by_name(what: str) -> None:
    update, why = BROKEN[what]
    with pytest.raises(AdapterError, match=f"south is not sound: .*{why}.*merge without it"):
        ff.merge([NORTH, update], names=["north", "south"])


def test_a_refused_edge_leaves_no_file(tmp_path: Any) -> None:
    with pytest.raises(AdapterError, match="south is not sound"):
        ff.merge([NORTH, BROKEN["NaN"][0]], names=["north", "south"], out=tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_saved_one_is_looked_at_as_well(tmp_path: Any) -> None:
    BROKEN["NaN"][0].save(tmp_path / "south")
    with pytest.raises(AdapterError, match="south is not sound: U holds NaN"):
        ff.merge([NORTH, ff.GlobalUpdate.load(tmp_path / "south")], names=["north", "south"])


def test_records_in_which_nobody_has_a_layer() -> None:
    none = [dataclasses.replace(client, ranks={}) for client in SOUTH.clients]
    renormalized = [dataclasses.replace(x, missing="renormalize") for x in (NORTH, SOUTH)]
    alone = dataclasses.replace(renormalized[1], clients=none)
    with pytest.raises(AdapterError, match="none of the clients in the records has it"):
        ff.merge([alone], names=["south"])


def test_weights_that_are_given_count_whatever_an_edge_says() -> None:
    boasting = dataclasses.replace(SOUTH, weight=1e12)
    merged = ff.merge([NORTH, boasting], weights=[NORTH.weight or 0, SOUTH.weight or 0])
    honest = ff.merge([NORTH, SOUTH])
    assert all(torch.equal(merged.delta(layer), honest.delta(layer)) for layer in honest)
