"""Rounds from files, within a memory limit, to a file: the same result whichever way the bytes go."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flexlora_fast as ff
from flexlora_fast import memory
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, EmptyRoundError, OptionError
from flexlora_fast.tensorfile import TensorFile
from flexlora_fast.work import Work
from tests import oracle, rounds
from tests.checks import assert_identical
from tests.rounds import PREFIX, Client, Layer

FC = [Layer("fc", 96, 64)]


def saved(clients: list[Client], folder: Path) -> list[Path]:
    for c in clients:
        c.adapter().save(folder / c.name)
    return [folder / c.name for c in clients]


def with_extras(clients: list[Client]) -> list[Client]:
    """All but the first have a head, the last also a counter; one lacks a layer."""
    made = [
        c.but(extras={"head.weight": torch.full((7,), float(i), dtype=torch.float16), "n": torch.tensor(i)})
        for i, c in enumerate(clients[1:])
    ]
    return [clients[0].without(next(iter(clients[0].layers))), *made]


def finished(clients: list[Client], folders: list[Path], out: Path | None = None, **options: Any) -> ff.GlobalUpdate:
    agg = ff.Aggregator(**options)
    for c, path in zip(clients, folders, strict=True):
        agg.add(path, c.weight, client=c.name)
    return agg.finish(out)


def many(count: int = 300, rank: int = 8, **options: Any) -> list[Client]:
    """So many clients of a small layer that R = 2,400 takes several pieces."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    return [
        rounds.client(f"c{i:03d}", FC, rank=rank, weight=1 + i % 3, dtype=dtypes[i % 3], **options)
        for i in range(count)
    ]


# -- every way the same, bit for bit ---


@pytest.mark.parametrize("method", ["flexlora", "fedit", "hetlora"])
@pytest.mark.parametrize("model", ["linear", "moe", "mixed", "conv"])
def test_files_and_memory_give_the_same(model: str, method: str, tmp_path: Path) -> None:
    clients = rounds.typical(model, "mixed")
    clients = clients if model in ("moe", "conv") else with_extras(clients)
    folders = saved(clients, tmp_path)
    expected = ff.aggregate(
        [c.adapter() for c in clients], [c.weight for c in clients], method=method, clients=[c.name for c in clients]
    )
    for read in ("add", "finish"):
        assert_identical(expected, finished(clients, folders, method=method, read=read))
        written = finished(clients, folders, tmp_path / "deep" / read, method=method, read=read)
        assert_identical(expected, written)
        assert written.clients == expected.clients and written.seconds.keys() == expected.seconds.keys()
    backwards = finished(clients[::-1], folders[::-1], tmp_path / "backwards", method=method, read="finish")
    assert_identical(expected, backwards)
    assert_identical(expected, ff.GlobalUpdate.load(expected.save(tmp_path / "saved")))


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    clients = with_extras(rounds.typical("weird"))
    update = finished(clients, saved(clients, tmp_path), tmp_path / "u")
    tensors = load_file(tmp_path / "u")
    for layer in update.layers:
        assert torch.equal(tensors[f"U/{layer}"], update[layer].factorization.U)
        assert torch.equal(tensors[f"S/{layer}"], update[layer].factorization.S)
    assert torch.equal(tensors[f"extra/{PREFIX}head.weight"], update.extras[PREFIX + "head.weight"])
    assert sorted(os.listdir(tmp_path)) == ["c0", "c1", "c2", "c3", "c4", "u"]


def test_the_limit_changes_nothing_that_fits(tmp_path: Path) -> None:
    clients = rounds.typical("linear")
    folders = saved(clients, tmp_path)
    expected = finished(clients, folders)
    for limit in ("100MiB", 10**6, "0.5 mb"):
        for read in ("add", "finish"):
            assert_identical(expected, finished(clients, folders, memory_limit=limit, read=read))


def test_runs_are_identical_bit_for_bit_and_threads_change_rounding_only(tmp_path: Path) -> None:
    clients = many(40)
    folders = saved(clients, tmp_path)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results += [finished(clients, folders, read="finish") for _ in range(2)]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_identical(results[0], results[1])
    assert_identical(results[2], results[3])
    np.testing.assert_allclose(results[0]["fc"].S, results[2]["fc"].S, rtol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_round_leaves_no_thread(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = saved(rounds.typical("linear"), tmp_path / "in")

    def interrupted(*_: Any) -> None:
        raise error

    for where in ("work.Work.solve_layer", "storage.UpdateWriter.add", "adapter.Adapter.factors_and_bias"):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(f"flexlora_fast.{where}", interrupted)
            ff.aggregate(folders, out=tmp_path / "out")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("flexlora_fast")]
    assert os.listdir(tmp_path) == ["in"]


# -- each byte once ---


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of tensors read, by folder."""
    counts: Counter[str] = Counter()
    fill = TensorFile._fill

    def counted(self: TensorFile, descriptor: int, start: int, views: list[memoryview]) -> None:
        counts[Path(self.path).parent.name] += sum(map(len, views))
        fill(self, descriptor, start, views)

    monkeypatch.setattr(TensorFile, "_fill", counted)
    return counts


def test_each_byte_is_read_once(tmp_path: Path, bytes_read: Counter[str]) -> None:
    clients = with_extras(rounds.typical("linear"))
    folders = saved(clients, tmp_path)
    sizes = {folder.name: Adapter.load(folder).skeleton.nbytes for folder in folders}
    for read in ("add", "finish"):
        bytes_read.clear()
        agg = ff.Aggregator(read=read)
        for folder in folders:
            agg.add(folder)
        assert dict(bytes_read) == (sizes if read == "add" else {})
        agg.finish()
        assert dict(bytes_read) == sizes
    bytes_read.clear()
    ff.aggregate(folders)
    assert dict(bytes_read) == sizes


def test_what_does_not_fit_is_read_again(tmp_path: Path, bytes_read: Counter[str]) -> None:
    """Half of the limit keeps tensors of clients; the others' are read once more, and the result is the same."""
    clients = many(20)
    folders = saved(clients, tmp_path)
    sizes = {folder.name: Adapter.load(folder).skeleton.nbytes for folder in folders}
    agg = ff.Aggregator(memory_limit=sum(sizes.values()))
    for c, folder in zip(clients, folders, strict=True):
        agg.add(folder, c.weight, client=c.name)
    kept = {name for name, client in agg._clients.items() if client.adapter is not client.source}
    assert 0.3 < sum(sizes[name] for name in kept) / sum(sizes.values()) <= 0.5
    agg.memory_limit = 20 * 10**6
    bytes_read.clear()
    update = agg.finish()
    assert bytes_read == {name: size for name, size in sizes.items() if name not in kept}
    assert_identical(update, finished(clients, folders))
    work = Work(agg._weighted(), agg._settings())
    agg.memory_limit = work.scratch + work.held  # now solving needs their room
    bytes_read.clear()
    assert_identical(update, agg.finish())
    assert bytes_read == sizes and agg._kept == 0


# -- folding ---


def folded(clients: list[Client], folders: list[Path], tmp_path: Path, **options: Any) -> ff.GlobalUpdate:
    """Under the smallest limit that takes the round."""
    skeleton = Adapter.load(folders[0]).skeleton
    assert skeleton.nbytes
    limit = 1 << 10
    while True:
        try:
            return finished(clients, folders, memory_limit=limit, read="finish", **options)
        except OptionError as error:
            assert "raise it" in str(error) and error.layer == "fc"
            limit = int(limit * 1.3)


@pytest.mark.parametrize("solver", ["auto", "gram", "krylov"])
def test_folding_loses_nothing(solver: str, tmp_path: Path) -> None:
    clients = many()
    folders = saved(clients, tmp_path)
    exact = finished(clients, folders, solver="gram", memory_limit="1GiB", rank=16)
    update = folded(clients, folders, tmp_path, solver=solver, rank=16)
    assert (exact["fc"].solver, update["fc"].solver) == ("gram", "dense")
    assert update["fc"].total_rank == exact["fc"].total_rank == 2400
    truth = oracle.truth("flexlora", clients, "fc")
    assert abs(update["fc"].norm / truth.norm - 1) <= 1e-6
    error = float(np.linalg.norm(truth.whole - oracle.array(update.delta("fc"))))
    assert error <= (1 + 1e-3) * truth.error(16) and abs(error / update["fc"].error(16) - 1) <= 1e-5
    whole = folded(clients, folders, tmp_path, rank=64)
    assert float(np.linalg.norm(truth.whole - oracle.array(whole.delta("fc")))) <= 1e-6 * truth.norm
    assert_identical(whole, folded(clients[::-1], folders[::-1], tmp_path, rank=64))


def test_folding_experts_biases_and_absent_layers(tmp_path: Path) -> None:
    """In pieces of a few columns, against all at once."""
    clients = [c.but(config=c.config | {"lora_bias": True}) for c in rounds.typical("linear", "mixed")]
    clients = [c.but(bias={x: torch.randn(layer.m) for x, layer in c.layers.items()}) for c in clients]
    lacking = rounds.client("absent").without("h.0.up")
    for made in (rounds.typical("moe"), rounds.patterned("mixed"), clients, [lacking, *clients]):
        named = [c.but(name=f"n{i}") for i, c in enumerate(made)]
        options: dict[str, Any] = {"missing": "renormalize", "tol": 1e-6}
        folders = saved(named, tmp_path / str(id(made)))
        exact = finished(named, folders, solver="svd", **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "PIECE_COLUMNS", 3)
            update = finished(named, folders, solver="dense", **options)
        for layer in exact.layers:
            one, two = exact[layer], update[layer]
            assert two.solver == "dense" and one.total_rank == two.total_rank
            off = (exact.delta(layer) - update.delta(layer)).norm()
            assert float(off) <= 3e-6 * one.norm and abs(one.norm - two.norm) <= 1e-6 * one.norm
            assert (one.bias is None) == (two.bias is None)
            assert one.bias is None or torch.equal(one.bias, two.bias)


@pytest.mark.parametrize("power", [-45, -20, 12, 15])
def test_folding_factors_beyond_the_range_of_products(power: int, tmp_path: Path) -> None:
    """One client of ordinary size, one far beyond 1e±9 in a factor."""
    plain = many(3)
    odd = rounds.client("zz", FC, rank=4, dtype=torch.float64).mapped(lambda _, A, B: (A * 10.0**power, B))
    for clients in ([*plain, odd], [odd.but(name="a"), *plain], [odd]):
        update = ff.aggregate([c.adapter() for c in clients], solver="dense")
        exact = ff.aggregate([c.adapter() for c in clients], solver="gram")
        assert abs(update["fc"].norm / exact["fc"].norm - 1) <= 1e-6
        np.testing.assert_allclose(update["fc"].S[:4], exact["fc"].S[:4], rtol=1e-5)


def test_methods_that_need_all_clients_say_so(tmp_path: Path) -> None:
    folders = saved(many(), tmp_path)
    with pytest.raises(OptionError, match=r"'fc'.*method 'fedit' takes all clients.*memory_limit is 1\.\d MiB; raise"):
        ff.aggregate(folders, method="fedit", memory_limit=1 << 20)


def test_a_limit_too_small_is_said_before_anything_is_read(tmp_path: Path, bytes_read: Counter[str]) -> None:
    folders = saved(many(3), tmp_path)
    with pytest.raises(
        OptionError, match=r"layer 'fc': a layer of 96 outputs and 64 inputs with R = 24 needs 0\.\d MiB"
    ):
        ff.aggregate(folders, memory_limit=1000, out=tmp_path / "out")
    assert not bytes_read and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "limit", [0, -1, 1.5, True, "", "2", "GiB", "2 GiB GiB", "-2GiB", "2XB", "nan", "1e9", b"2GiB", []]
)
def test_limits_that_are_none(limit: Any) -> None:
    if limit == "2":
        assert ff.Aggregator(memory_limit=limit).memory_limit == 2
        return
    with pytest.raises(OptionError, match=r"memory_limit is .*; give bytes or a text such as '2GiB'"):
        ff.Aggregator(memory_limit=limit)


def test_read_is_add_or_finish() -> None:
    with pytest.raises(OptionError, match="read 'never' is neither"):
        ff.Aggregator(read="never")  # type: ignore[arg-type]


# -- bad clients that are found late ---


def spoilt(c: Client, layer: str) -> Client:
    A, B = (X.clone() for X in c.factors[layer])
    A[0, 0, 0] = torch.nan
    return c.but(factors=c.factors | {layer: (A, B)})


def test_a_bad_client_found_late_is_as_if_it_had_never_come(tmp_path: Path, bytes_read: Counter[str]) -> None:
    clients = rounds.typical("linear")
    bad = [spoilt(clients[1], "h.1.up"), spoilt(clients[3], "h.1.down")]
    good = [clients[0], clients[2], clients[4]]
    everyone = sorted([*good, *bad], key=lambda c: c.name)
    folders = saved(everyone, tmp_path)
    agg = ff.Aggregator(read="finish")
    for c, folder in zip(everyone, folders, strict=True):
        agg.add(folder, c.weight, client=c.name)
    with pytest.raises(AdapterError, match="1 NaN or infinite") as caught:
        agg.finish(tmp_path / "out")
    assert (caught.value.client, caught.value.layer) == ("c3", "h.1.down")
    assert not (tmp_path / "out").exists() and [r.client for r in agg.refused] == ["c3"]
    update = agg.finish(tmp_path / "out")
    assert [r.client for r in update.refused] == ["c3", "c1"] and agg.clients == ["c0", "c2", "c4"]
    expected = finished(good, [tmp_path / c.name for c in good])
    assert_identical(expected, update)
    sizes = {folder.name: Adapter.load(folder).skeleton.nbytes for folder in folders}
    assert all(bytes_read[name] <= 4 * size for name, size in sizes.items())  # three, and the expected round's
    # what was refused may come again, repaired
    agg.add(clients[1].adapter(), clients[1].weight, client="c1")
    assert agg.clients == ["c0", "c1", "c2", "c4"]


def test_aggregate_stops_at_a_bad_client(tmp_path: Path) -> None:
    clients = with_extras(rounds.typical("linear"))
    clients[2] = clients[2].but(extras={"head.weight": torch.full((7,), torch.inf)})
    with pytest.raises(AdapterError, match=r"head\.weight.*7 NaN or infinite") as caught:
        ff.aggregate(saved(clients, tmp_path), clients=[c.name for c in clients])
    assert caught.value.client == "c2"
    with pytest.raises(AdapterError) as caught:
        finished(clients, [tmp_path / c.name for c in clients])
    assert caught.value.client == "c2"


def test_only_bad_clients(tmp_path: Path) -> None:
    clients = [spoilt(c, "h.0.up") for c in rounds.typical("linear")]
    agg = ff.Aggregator(read="finish")
    for folder in saved(clients, tmp_path):
        agg.add(folder)
    with pytest.raises(AdapterError, match="NaN"):
        agg.finish()
    with pytest.raises(EmptyRoundError, match="5 were refused"):
        agg.finish()


@pytest.mark.parametrize("out", [None, "out"])
def test_a_file_that_changes_between_add_and_finish(out: str | None, tmp_path: Path) -> None:
    clients = rounds.typical("linear")
    folders = saved(clients, tmp_path / "in")
    agg = ff.Aggregator(read="finish")
    for c, folder in zip(clients, folders, strict=True):
        agg.add(folder, c.weight, client=c.name)
    clients[2].mapped(lambda _, A, B: (A, 2 * B)).adapter().save(folders[2])
    with pytest.raises(AdapterError, match="has changed since it was opened") as caught:
        agg.finish(out and tmp_path / out)
    assert caught.value.client == "c2" and caught.value.layer == "h.0.down"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flexlora_fast")]
    kept = [i for i in range(5) if i != 2]
    expected = finished([clients[i] for i in kept], [folders[i] for i in kept])
    assert_identical(expected, agg.finish())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = rounds.typical("linear")
    folders = saved(clients, tmp_path / "in")
    done = finished(clients, folders, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexlora_fast.tensorfile.TensorWriter.add", full)
    with pytest.raises(OSError, match="No space left"):
        finished(clients, folders, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert_identical(done, ff.GlobalUpdate.load(tmp_path / "out"))


def test_clients_of_weight_zero_are_never_read(tmp_path: Path, bytes_read: Counter[str]) -> None:
    clients = rounds.typical("linear")
    folders = saved([*clients[:2], spoilt(clients[2], "h.0.up")], tmp_path)
    update = ff.aggregate(folders, [1, 2, 0])
    assert len(update.clients) == 2 and folders[2].name not in bytes_read


def test_ten_thousand_clients_take_little_beside_their_tensors(tmp_path: Path) -> None:
    """A few hundred bytes each: config, layers and header are shared (measured on 2,000)."""
    import tracemalloc

    clients = [rounds.client("c0", rank=2)]
    (folder,) = saved(clients, tmp_path)
    agg = ff.Aggregator(read="finish")
    agg.add(folder, client="first")
    tracemalloc.start()
    for i in range(2000):
        agg.add(folder, client=f"client-{i:05d}")
    used = tracemalloc.get_traced_memory()[0] / 2000
    tracemalloc.stop()
    assert used < 2048
