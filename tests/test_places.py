"""Clients on disk and in host memory: fetched to a device, their table is that of their stacks."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast import files
from flexlora_fast.backends.group import coefficients
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.gather import MEMORY
from flexlora_fast.staging import Arrival, Staging
from flexlora_fast.stored import Stored, Wanted
from flexlora_fast.work import Work
from tests import rounds
from tests.test_resident import CLIENTS, adapter

pytest.importorskip("triton", reason="tables are Triton's")
CPU = torch.device("cpu")
SHAPES = {"a": (30, 20), "b": (30, 20), "c": (20, 50)}


def stored(adapter: ff.Adapter, folder: Path, where: str) -> ff.Adapter:
    """The same client "on disk", read from disk to "memory", or as its "state dict" is."""
    if where == "state dict":
        return adapter
    adapter.save(folder)
    loaded = ff.Adapter.load(folder, client=adapter.client)
    return loaded.in_memory() if where == "memory" else loaded


@contextmanager
def brought(
    clients: Stored, names: Sequence[str], layers: Sequence[str], **options: Any
) -> Iterator[tuple[Wanted, Arrival]]:
    """The layers, on the CPU, through slots of 1 KiB."""
    shares = options.pop("shares", np.full(len(names), 1 / len(names)))
    with (
        clients.opened(names, shares, options.pop("renormalize", False)) as reading,
        Staging("cpu", host_bytes=8192, device_bytes=1 << 20, threads=2) as staging,
    ):
        wanted = reading.of(layers)
        arrival = wanted.bring(staging)
        arrival.wait()
        yield wanted, arrival
        arrival.release()


def columns(table: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The numbers of every column of P and row of Q, read from where a table says that they are."""
    result = []
    for side in (table.P, table.Q):
        found = []
        for address, stride in zip(side.address.tolist(), side.stride.tolist(), strict=True):
            reach = (side.length - 1) * stride + 1
            interface = {
                "data": (address, True),
                "shape": (reach * side.dtype.itemsize,),
                "typestr": "|u1",
                "version": 3,
            }
            raw = np.asarray(type("Memory", (), {"__array_interface__": interface})()).copy()
            found.append(torch.from_numpy(raw).view(side.dtype)[::stride].clone())
        result.append(found)
    return result[0], result[1]


# -- the table ---


@pytest.mark.parametrize("where", ["disk", "memory", "state dict", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("missing", ["zero", "renormalize"])
@pytest.mark.parametrize("layers", [["a", "b"], ["b", "a"], ["c"]])
def test_the_table_is_that_of_the_stacks(
    missing: Any, layers: list[str], dtype: torch.dtype, where: str, tmp_path: Path
) -> None:
    from flexlora_fast.kernels.table import Table

    agg, clients = ff.Aggregator(rank=3, solver="filtered", missing=missing), Stored()
    for i, (name, ranks) in enumerate(CLIENTS.items()):
        made = adapter(name, ranks, alpha=3 + i, dtype=dtype)
        one = ("disk", "memory", "state dict", "disk")[i] if where == "mixed" else where
        agg.add(stored(made, tmp_path / name, one), weight=0.0 if name == "absent" else 1.0 + i, client=name)
        clients.take(name, stored(made, tmp_path / name, one))
    work = Work(agg._weighted(), agg._settings())
    plans = {plan.spec.name: plan for plan in work.plans}
    stacks = []
    for layer in layers:
        ((_, read),) = work.pieces_of(plans[layer])
        stacks.append(work.stack_of(plans[layer].spec, read())[0])
    expected, names = Table(stacks), [client.name for client in work.clients]
    assert clients.has(names)
    options = {"shares": [client.share for client in work.clients], "renormalize": missing == "renormalize"}
    with brought(clients, names, layers, **options) as (wanted, arrival):
        found, d = wanted.table(SHAPES[layers[0]], arrival)
        assert found.ranks == expected.ranks and found.W == expected.W and found.offsets.equal(expected.offsets)
        assert found.d.equal(expected.d)
        assert torch.allclose(torch.from_numpy(d), coefficients(stacks, found.W, CPU), rtol=1e-15)
        for side in "PQ":
            mine, theirs = found.side(side), expected.side(side)  # type: ignore[arg-type]
            assert (mine.length, mine.dtype, mine.run) == (theirs.length, theirs.dtype, theirs.run)
            assert mine.stride.equal(theirs.stride)
        for mine, theirs in zip(columns(found), columns(expected), strict=True):
            assert len(mine) == len(theirs) and all(x.equal(y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("model", [name for name in rounds.MODELS if name != "moe"])
@pytest.mark.parametrize("where", ["disk", "memory", "state dict"])
def test_every_kind_of_layer_is_where_its_factors_are(model: str, where: str, tmp_path: Path) -> None:
    """Convolutions, embeddings and transposed weights are stored as the factors are; experts are not taken."""
    client = rounds.client(model=model, rank=3)
    made = stored(client.adapter(), tmp_path / "saved", where)
    clients = Stored()
    clients.take("c", made)
    if any(made.spec(layer).experts > 1 for layer in made.layers):
        assert not clients.has(["c"])
        return
    for layer in made.layers:
        with brought(clients, ["c"], [layer]) as (wanted, arrival):
            spec, (A, B) = made.spec(layer), made.factors(layer)
            table, d = wanted.table((spec.m, spec.n), arrival)
            P, Q = columns(table)
            assert torch.stack(P, dim=1).equal(B[0]) and torch.stack(Q).equal(A[0])
            assert d.tolist() == [[made.scale(layer)] * made.rank(layer)]


def test_neighbours_in_a_file_are_neighbours_on_the_way(tmp_path: Path) -> None:
    """Client by client as in its file, whatever the order of the layers: then they are read in one go."""
    names = sorted(CLIENTS)
    clients = Stored()
    for name in names:
        clients.take(name, stored(adapter(name, CLIENTS[name]), tmp_path / name, "disk"))
    with clients.opened(names, [0.25] * 4, False) as reading:
        wanted = reading.of(["b", "a"])
        ranges = wanted.ranges
        assert len(ranges) == sum(2 * len({"a", "b"} & set(CLIENTS[name])) for name in names)
        assert wanted.client.tolist() == sorted(wanted.client.tolist())
        for i in range(4):
            mine = ranges.start[wanted.client == i]
            assert (np.diff(mine) > 0).all() and len(set(ranges.descriptor[wanted.client == i])) == 1
            assert (mine[1:] == mine[:-1] + ranges.nbytes[wanted.client == i][:-1]).all()


# -- which clients ---


def test_what_is_unusual_is_left_to_the_usual_way(tmp_path: Path) -> None:
    clients = Stored()
    plain = adapter("plain", {"a": 2})
    state = plain.state_dict()
    key = "base_model.model.a.lora_A.weight"
    unusual = {
        "float64": adapter("float64", {"a": 2}, dtype=torch.float64),
        "float64 on disk": stored(adapter("x", {"a": 2}, dtype=torch.float64), tmp_path / "float64", "disk"),
        "transposed": ff.Adapter.from_state_dict(state | {key: state[key].T.contiguous().T}, plain.config),
        "elsewhere": ff.Adapter.from_state_dict({k: v.to("meta") for k, v in state.items()}, plain.config),
        "experts": rounds.client(model="moe").adapter(),
    }
    bias = {"base_model.model.a.lora_B.bias": torch.ones(30)}
    unusual["a bias"] = ff.Adapter.from_state_dict(state | bias, plain.config | {"lora_bias": True})
    mixed = adapter("mixed", {"a": 2, "b": 2}).state_dict()
    mixed = {k: v.bfloat16() if ".b." in k else v for k, v in mixed.items()}
    unusual["mixed dtypes"] = ff.Adapter.from_state_dict(mixed, plain.config)
    for name, client in unusual.items():
        clients.take(name, client)
        assert not clients.has([name]), name
    clients.take("plain", plain)
    assert clients.has(["plain"]) and not clients.has(["plain", "float64"]) and not clients.has(["never came"])
    clients.take("bfloat16", adapter("bfloat16", {"a": 2}, dtype=torch.bfloat16))
    assert clients.has(["bfloat16"]) and not clients.has(["plain", "bfloat16"])
    clients.drop("plain")
    clients.drop("never came")
    assert not clients.has(["plain"])


# -- files ---


def on_disk(folder: Path, names: Sequence[str]) -> Stored:
    clients = Stored()
    for name in names:
        clients.take(name, stored(adapter(name, {"a": 2, "c": 3}), folder / name, "disk"))
    return clients


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_files_are_open_while_they_are_read(tmp_path: Path) -> None:
    names, before = ["x", "y", "z"], descriptors()
    clients = on_disk(tmp_path, names)
    assert descriptors() == before
    with clients.opened(names, [1 / 3] * 3, False) as reading:
        assert descriptors() == before + 3
        assert len(set(reading.of(["a"]).ranges.descriptor.tolist())) == 3
        reading.check()
    assert descriptors() == before


@pytest.mark.parametrize("what", ["removed", "rewritten"])
def test_a_file_that_changed_before_is_an_error(what: str, tmp_path: Path) -> None:
    names, before = ["x", "y", "z"], descriptors()
    clients = on_disk(tmp_path, names)
    path = tmp_path / "y" / "adapter_model.safetensors"
    path.unlink() if what == "removed" else path.write_bytes(path.read_bytes() + b" ")
    message = "client 'y': .*(cannot be read any more|has changed)"
    with pytest.raises(AdapterError, match=message), clients.opened(names, [1 / 3] * 3, False):
        pass
    assert descriptors() == before


def test_a_file_that_is_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    """Named by client and layer when it is read; and one that was only written to, by ``check``."""
    names = ["x", "y", "z"]
    clients = on_disk(tmp_path, names)
    path = tmp_path / "y" / "adapter_model.safetensors"
    with (
        clients.opened(names, [1 / 3] * 3, False) as reading,
        Staging("cpu", host_bytes=8192, device_bytes=1 << 20) as staging,
    ):
        wanted = reading.of(["c"])
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(
            AdapterError, match=r"client 'y', layer 'c': .*ends too early.*have it sent again"
        ) as caught:
            wanted.bring(staging)
        assert (caught.value.client, caught.value.layer) == ("y", "c")
        with pytest.raises(AdapterError, match=r"client 'y': .*has changed"):
            reading.check()
        reading.of(["a"]).bring(staging).release()


def test_the_limit_of_open_files_is_raised_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, now = [100, 1000], [30]
    monkeypatch.setattr(files.os, "listdir", lambda _: [None] * now[0])
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    files.allow_open(6)
    assert limits == [100, 1000]
    files.allow_open(7)
    assert limits == [101, 1000]
    files.allow_open(906)
    assert limits == [1000, 1000]
    with pytest.raises(OptionError, match=r"907 files are to be held open beside 30 others.*may have 1000; raise"):
        files.allow_open(907)
    limits[:] = [100, resource.RLIM_INFINITY]
    files.allow_open(5000)
    assert limits == [5094, resource.RLIM_INFINITY]


# -- time ---


def test_nothing_takes_time_per_factor(tmp_path: Path) -> None:
    """100 clients of 224 layers, 44,800 factors: noted, and asked for all at once."""
    state = {}
    for layer in range(224):
        state[f"base_model.model.{layer}.fc.lora_A.weight"] = torch.ones(4, 8)
        state[f"base_model.model.{layer}.fc.lora_B.weight"] = torch.ones(8, 4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    save_file(state, tmp_path / "adapter_model.safetensors")
    names = [f"client-{i}" for i in range(100)]
    adapters = {
        "disk": [ff.Adapter.load(tmp_path) for _ in names],
        "memory": [ff.Adapter.load(tmp_path).in_memory() for _ in names],
    }
    for where, clients in adapters.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            all_ = Stored()
            for name, client in zip(names, clients, strict=True):
                all_.take(name, client)
            with all_.opened(names, [1 / 100] * 100, False) as reading:
                wanted = reading.of(clients[0].layers)
            seconds.append(time.perf_counter() - start)
        assert len(wanted.ranges) == 100 * 448
        assert (wanted.ranges.descriptor == MEMORY).all() == (where == "memory")
        assert min(seconds) < 0.25, (where, seconds)
