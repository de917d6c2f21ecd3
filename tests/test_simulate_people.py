"""Who the clients of a run are: their ranks, and their rows."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk

import flexlora_fast as ff
from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate import partition, ranks
from flexlora_fast.simulate.prepare import prepare
from flexlora_fast.simulate.spec import PAPER_TYPES, Ranks, RankType
from tests.simulations import WORDS, Colours, colours, experiment  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("distribution", "shares"),
    [
        # FlexLoRA's released code, over its four types from light to heavy.
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("heavy-tail-light", [0.80, 0.05, 0.05, 0.10]),
        ("heavy-tail-strong", [0.05, 0.05, 0.10, 0.80]),
        ("normal", [0.056, 0.444, 0.444, 0.056]),
    ],
)
def test_types_are_drawn_as_in_the_paper(distribution: str, shares: list[float]) -> None:
    drawn = ranks.assign(Ranks(distribution=distribution), 20_000, (7,))
    counts = Counter(kind.label for kind in drawn)
    found = [counts[kind.label] / 20_000 for kind in PAPER_TYPES]
    assert found == pytest.approx(shares, abs=0.01)
    assert [kind.label for kind in PAPER_TYPES] == ["8", "30", "30/200", "200"]
    assert drawn[:50] == ranks.assign(Ranks(distribution=distribution), 20_000, (7,))[:50]
    assert drawn[:50] != ranks.assign(Ranks(distribution=distribution), 20_000, (8,))[:50]


@pytest.mark.parametrize("types", range(1, 8))
def test_shares_are_shares_for_any_number_of_types(types: int) -> None:
    for name, shares in ranks.SHARES.items():
        found = shares(types)
        assert len(found) == types and sum(found) == pytest.approx(1) and min(found) > 0, name


def test_one_rank_or_a_list_and_everyone_the_smallest() -> None:
    assert [kind.r for kind in ranks.assign(Ranks(all=4), 3, (0,))] == [4, 4, 4]
    assert [kind.r for kind in ranks.assign(Ranks(each=[2, 8]), 5, (0,))] == [2, 8, 2, 8, 2]
    assert [kind.r for kind in ranks.assign(Ranks(each=[4, 2, 8], everyone="smallest"), 3, (0,))] == [2, 2, 2]
    strong = Ranks(distribution="heavy-tail-strong", everyone="largest")
    assert {kind.label for kind in ranks.assign(strong, 50, (0,))} == {"200"}


def test_feed_forward_layers_have_their_own_rank() -> None:
    layers = {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.mlp.up_proj": (96, 64),
        "encoder.layer.0.attention.output.dense": (64, 64),
        "encoder.layer.0.output.dense": (64, 96),
    }
    state = {}
    for name, (m, n) in layers.items():
        state |= {f"{name}.lora_A.weight": torch.zeros(2, n), f"{name}.lora_B.weight": torch.zeros(m, 2)}
    adapter = ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 4})
    found = ranks.of_layers(ranks.config(RankType(r=30, ffn=200), Ranks(all=1).attention), adapter)
    assert [found[name] for name in layers] == [30, 64, 30, 64]  # 200 is more than min(m, n)


def test_dirichlet_is_a_skewed_partition_and_the_same_again() -> None:
    labels = np.repeat(np.arange(6), 300)
    parts = partition.dirichlet(labels, 8, 0.1, (0, 1), 20)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1800)) and min(map(len, parts)) >= 20
    assert all(
        np.array_equal(a, b) for a, b in zip(parts, partition.dirichlet(labels, 8, 0.1, (0, 1), 20), strict=True)
    )

    def largest_share(alpha: float) -> float:
        parts = partition.dirichlet(labels, 8, alpha, 3, 20)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert largest_share(0.1) > 0.6 and largest_share(1000.0) < 0.25
    with pytest.raises(OptionError, match="10 examples cannot give 3 clients 5 each"):
        partition.dirichlet([0] * 10, 3, 0.3, 0, 5)
    with pytest.raises(OptionError, match=r"no Dirichlet\(0.01\) draw gives 8 clients 15 examples"):
        partition.dirichlet([0] * 120, 8, 0.01, 0, 15)


def test_even_and_natural_partitions() -> None:
    parts = partition.iid(10, 3, 0)
    assert sorted(map(len, parts)) == [3, 3, 4] and set(np.concatenate(parts)) == set(range(10))
    owners = np.array(["b", "a", "b", "c", "b", "a"])
    assert {name: rows.tolist() for name, rows in partition.natural(owners, None, 2).items()} == {
        "a": [1, 5],
        "b": [0, 2, 4],
    }
    assert list(partition.natural(owners, 1, 1)) == ["b"]
    with pytest.raises(OptionError, match="2 of 3 clients have 2 rows or more, and 3 are asked for"):
        partition.natural(owners, 3, 2)


@pytest.mark.usefixtures("colours")
def test_a_clients_rows_are_a_slice_of_what_is_stored(tmp_path: Path) -> None:
    natural = {"clients": {"partition": "natural"}, "ranks": {"all": 2}, "evaluation__limit": None}
    people = prepare(experiment(**natural), tmp_path)
    rows = load_from_disk(tmp_path / "data/train")
    assert [client.name for client in people.clients] == [f"owner {i}" for i in range(4)]
    assert sum(client.train for client in people.clients) == len(rows) == 60
    for client in people.clients:
        own = rows[client.first : client.first + client.train]
        assert set(own["client"]) == {client.name} and set(own["category"]) == {client.category}
        assert client.labels == np.bincount(own["label"], minlength=len(WORDS)).tolist()
    assert sum(client.eval for client in people.clients) == people.rows["test"] == 60
    told = json.loads((tmp_path / "clients.json").read_text())
    assert told[0]["ranks"] == {"r": 2, "rank_pattern": {}} and told[0]["type"] == "2"


@pytest.mark.usefixtures("colours")
def test_clients_that_take_no_part_are_not_tested(tmp_path: Path) -> None:
    natural = {"clients": {"partition": "natural", "number": 2}, "ranks": {"all": 2}, "evaluation__limit": None}
    people = prepare(experiment(**natural), tmp_path)
    test = load_from_disk(tmp_path / "data/test")
    assert set(test["client"]) == {client.name for client in people.clients} and len(people.clients) == 2
    assert len(test) == sum(client.eval for client in people.clients) < 60
    assert len(set(load_from_disk(tmp_path / "data/unseen")["client"])) == 4


@pytest.mark.usefixtures("colours")
def test_a_part_without_rows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Colours.rows
    monkeypatch.setattr(
        Colours, "rows", lambda self, seed, part: rows(self, seed, part).select(range(60 * (part != 1)))
    )
    with pytest.raises(DataError, match="task 'colours' leaves no row for 'test'"):
        prepare(experiment(), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("colours")
def test_thousands_of_clients_take_little_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    people = prepare(
        experiment(task__rows=30_000, task__clients=3_000, clients={"partition": "natural"}, ranks={"all": 2}), tmp_path
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(people.clients) > 2_900 and peak < 100 << 20
