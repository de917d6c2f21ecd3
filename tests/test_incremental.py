"""Grams that grow as clients arrive: the same round bit for bit, whoever comes when, and never from stale factors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import incremental
from flexlora_fast.backends import cpu
from flexlora_fast.layouts import LayerSpec
from tests.checks import assert_identical

needs_extension = pytest.mark.skipif(not cpu.usable("float32"), reason="Grams grow on the extension's products only")
M, N, RANK = 150, 210, 8


def adapter(i: int, *, rank: int = RANK, dtype: torch.dtype = torch.float32, layers: int = 2) -> ff.Adapter:
    generator = torch.Generator().manual_seed(i)
    state = {}
    for layer in range(layers):
        name = f"base_model.model.layers.{layer}.fc"
        state[f"{name}.lora_A.weight"] = torch.randn(rank, N, generator=generator).to(dtype)
        state[f"{name}.lora_B.weight"] = torch.randn(M, rank, generator=generator).to(dtype)
    return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 16}, f"client-{i:02d}")


def feed(adapters, weights=None, **options) -> ff.Aggregator:
    aggregator = ff.Aggregator(rank=6, solver="krylov", **options)
    for i, one in enumerate(adapters):
        aggregator.add(one, weight=1 + i if weights is None else weights[i])
    return aggregator


def at_once(adapters, weights) -> ff.GlobalUpdate:
    return ff.aggregate(adapters, weights, rank=6, solver="krylov")


@pytest.fixture
def no_other_grams(monkeypatch):
    def fail(stack):
        raise AssertionError("the Grams were computed again")

    return lambda: monkeypatch.setattr(cpu, "gram", fail)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_as_all_at_once(dtype, no_other_grams):
    ranks = [8, 3, 1, 30, 5, 16] * 5
    adapters = [adapter(i, rank=rank, dtype=dtype) for i, rank in enumerate(ranks)]
    expected = at_once(adapters, list(range(1, 31)))
    aggregator = feed(adapters)
    no_other_grams()
    assert_identical(aggregator.finish(), expected)


@needs_extension
def test_order_of_arrival_does_not_matter(no_other_grams):
    adapters = [adapter(i) for i in range(40)]
    expected = at_once(adapters, list(range(1, 41)))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    aggregator = feed([adapters[i] for i in order], [1 + i for i in order])
    no_other_grams()
    assert_identical(aggregator.finish(), expected)
    assert_identical(aggregator.finish(), expected)  # and once more from the same Grams


@needs_extension
def test_clients_of_weight_zero_and_without_a_layer(no_other_grams):
    adapters = [adapter(i, layers=1 + i % 2) for i in range(40)]
    weights = [float(i % 3) for i in range(40)]
    expected = at_once(adapters, weights)
    aggregator = feed(adapters, weights)
    no_other_grams()
    assert_identical(aggregator.finish(), expected)


@needs_extension
def test_a_refused_client_leaves_no_trace():
    adapters = [adapter(i) for i in range(40)]
    aggregator = feed(adapters[:20], range(1, 21))
    bad = adapter(99)
    bad.state_dict()["base_model.model.layers.0.fc.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(ff.errors.AdapterError, match="client-99"):
        aggregator.add(bad)
    for i in range(20, 40):
        aggregator.add(adapters[i], weight=1 + i)
    result = aggregator.finish()
    assert [refusal.client for refusal in result.refused] == ["client-99"]
    assert_identical(result, at_once(adapters, list(range(1, 41))))


@needs_extension
def test_factors_written_to_after_arrival_count_as_they_are():
    adapters = [adapter(i) for i in range(40)]
    aggregator = feed(adapters)
    adapters[3].state_dict()["base_model.model.layers.1.fc.lora_B.weight"].mul_(2)
    assert_identical(aggregator.finish(), at_once(adapters, list(range(1, 41))))


@needs_extension
@pytest.mark.parametrize("case", ["mixed dtypes", "no room", "another method"])
def test_where_grams_do_not_grow_the_result_is_the_same(case, monkeypatch):
    dtypes = [torch.float32, torch.bfloat16] if case == "mixed dtypes" else [torch.float32]
    adapters = [adapter(i, dtype=dtypes[i % len(dtypes)]) for i in range(40)]
    if case == "no room":
        monkeypatch.setattr(incremental.GramTable, "__init__", _without_room(incremental.GramTable.__init__))
    method = "fedit" if case == "another method" else "flexlora"
    expected = ff.aggregate(adapters, list(range(1, 41)), rank=6, method=method)
    aggregator = ff.Aggregator(rank=6, method=method)
    for i, one in enumerate(adapters):
        aggregator.add(one, weight=1 + i)
    assert_identical(aggregator.finish(), expected)


def _without_room(init):
    return lambda self, limit, wanted: init(self, 1000, wanted)


@needs_extension
def test_files_are_read_once_and_their_grams_grow(tmp_path, monkeypatch, no_other_grams):
    adapters = [adapter(i) for i in range(30)]
    for one in adapters:
        one.save(tmp_path / one.client)
    paths = [tmp_path / one.client for one in adapters]
    aggregator = ff.Aggregator(rank=6, solver="krylov")
    for path in paths:
        aggregator.add(path, client=path.name)
    no_other_grams()
    expected_names = [one.client for one in adapters]
    assert aggregator.finish().layers == ["layers.0.fc", "layers.1.fc"] and aggregator.clients == expected_names


@needs_extension
@pytest.mark.parametrize("enough", [True, False])
def test_grams_go_before_the_factors_they_hold(tmp_path, enough):
    aggregator = ff.Aggregator(rank=6, solver="krylov")
    for one in [adapter(i) for i in range(30)]:
        one.save(tmp_path / one.client)
        aggregator.add(tmp_path / one.client, client=one.client)
    kept, table = aggregator._kept, aggregator._grams
    assert kept and table is not None and table.nbytes
    room = kept + table.nbytes - (0 if enough else 1)
    work = SimpleNamespace(scratch=aggregator.memory_limit - room, held=0, ahead=0)
    aggregator._make_room(work, incremental.KeptGrams(table, 0))
    assert (table.nbytes > 0) is enough
    assert aggregator._kept == kept  # with the Grams gone there is room again
    assert aggregator.finish().layers == ["layers.0.fc", "layers.1.fc"]


def test_a_table_over_its_limit_lets_go_and_takes_no_more():
    table = incremental.GramTable(10_000, lambda spec, columns, sixteen: True)
    for i in range(40):
        table.take(f"{i}", adapter(i))
    assert table.nbytes == 0
    assert table.of("layers.0.fc", [("0", *reversed(adapter(0).factors("layers.0.fc")))]) is None


def test_the_planner_is_asked_before_anything_is_computed():
    asked: list[tuple[int, bool]] = []

    def wanted(spec: LayerSpec, columns: int, sixteen: bool) -> bool:
        asked.append((columns, sixteen))
        return False

    table = incremental.GramTable(1 << 30, wanted)
    for i in range(20):
        table.take(f"{i}", adapter(i, dtype=torch.bfloat16))
    assert table.nbytes == 0 and asked[0] == (128, True)


def test_kept_grams_are_bounded_and_handed_over_once():
    kept = incremental.KeptGrams(None, limit=2 * 2 * 36 * 4)
    G = torch.arange(36.0).reshape(1, 6, 6)
    for name in ("x", "y", "z"):
        kept.keep(name, ["a", "b", "c"], [1, 3, 2], G, 2 * G)
    assert kept.nbytes == 2 * 2 * 36 * 4 and kept.of("z", []) is None  # there was no room for it

    def factors(*clients):
        return [(client, torch.empty(0), torch.empty(0)) for client in clients]

    left, right = kept.of("x", factors("a", "c"))
    index = torch.tensor([0, 4, 5])
    assert torch.equal(left[0], G[0][index][:, index]) and torch.equal(right, 2 * left)
    assert kept.of("x", factors("a", "c")) is None and kept.nbytes == 2 * 36 * 4
    assert kept.of("y", factors("a", "b", "c"))[0] is G
    assert kept.nbytes == 0
