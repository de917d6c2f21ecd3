"""What a policy allows beyond single files: quotas of a round, ranks of single clients, uploads of some layers only.
And a disk that is full.
"""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast import layouts
from flexlora_fast.errors import AdapterError, OptionError, RefusedError
from flexlora_fast.gate import Reason, RoundPolicy
from tests import models, rounds
from tests.checks import assert_identical
from tests.rounds import Client

RANKS = range(1, 9)


def policy_for(c: Client, **rules: Any) -> RoundPolicy:
    return RoundPolicy.from_adapter(c.adapter(), **{"ranks": RANKS, **rules})


def encoded(c: Client) -> bytes:
    return save({key: tensor.contiguous() for key, tensor in c.state_dict().items()})


def code_of(call: Any) -> str:
    with pytest.raises((RefusedError, AdapterError)) as caught:
        call()
    assert caught.value.client is not None
    return str(caught.value.code)


# -- quotas ---


@pytest.mark.parametrize("read", ["add", "finish"])
def test_a_full_round_refuses_those_that_come_later(read: Any, tmp_path: Path) -> None:
    clients = [rounds.client(f"c{i}", rank=2) for i in range(4)]
    policy = policy_for(clients[0], max_clients=2)
    agg = ff.Aggregator(policy=policy, read=read, spool=tmp_path)
    agg.add(encoded(clients[0]), client="c0")
    assert code_of(lambda: agg.add(b"junk", client="junk")) == "header"  # takes no place
    agg.add(clients[1].adapter(), client="c1")
    for upload in (encoded(clients[2]), clients[3].adapter(), b"junk"):
        assert code_of(lambda upload=upload: agg.add(upload, client="late")) == Reason.ROUND_FULL
    assert agg.clients == ["c0", "c1"] and len(list(tmp_path.iterdir())) == 1
    assert [r.code for r in agg.refused] == ["header", *["round-full"] * 3]
    plain = ff.Aggregator(read=read)
    for c in clients[:2]:
        plain.add(c.adapter(), client=c.name)
    assert_identical(agg.finish(), plain.finish())


def test_a_round_takes_no_more_bytes_than_its_quota(tmp_path: Path) -> None:
    small, large = encoded(rounds.client("s", rank=1)), encoded(rounds.client("l", rank=8))
    policy = policy_for(rounds.client("s"), max_round_bytes=len(small) + len(large))
    agg = ff.Aggregator(policy=policy, spool=tmp_path)
    agg.add(large, client="a")
    assert code_of(lambda: agg.add(large, client="b")) == Reason.ROUND_BYTES
    assert code_of(lambda: agg.add(rounds.client("l", rank=8).adapter(), client="b")) == Reason.ROUND_BYTES
    agg.add(small, client="c")
    assert code_of(lambda: agg.add(small, client="d")) == Reason.ROUND_BYTES
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == len(small) + len(large)
    assert agg.finish().report().to_dict()["refused"][0]["code"] == "round-bytes"


def test_who_is_refused_after_all_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(rounds.client("a"))
    policy = policy_for(rounds.client("a"), max_clients=1, max_round_bytes=len(content))
    agg = ff.Aggregator(policy=policy, spool=tmp_path)
    with monkeypatch.context() as patch:
        # Fits the policy, but not what the round settled; then a copy that cannot be read again.
        agg._admission._agreed["base_model_name_or_path"] = ("other", "z")
        assert code_of(lambda: agg.add(content, client="a")) == "incompatible"
        agg._admission._agreed.clear()
        patch.setattr(ff.Adapter, "in_memory", _unreadable)
        assert code_of(lambda: agg.add(content, client="b")) == "adapter"
    assert not list(tmp_path.iterdir())
    agg.add(content, client="c")
    agg._refuse("c", AdapterError("for any reason"))
    agg.add(content, client="d")
    assert agg.clients == ["d"] and len(list(tmp_path.iterdir())) == 1


def _unreadable(_: ff.Adapter) -> ff.Adapter:
    raise AdapterError("the disk is gone")


# -- ranks of single clients ---


@pytest.mark.parametrize("form", ["mapping", "function"])
def test_ranks_of_single_clients(form: str, tmp_path: Path) -> None:
    given = {"phone": (2,), "server": range(4, 9)}
    rule = given if form == "mapping" else lambda name: given.get(name, (2, 4))
    policy = policy_for(rounds.client("ref"), client_ranks=rule)
    two, four = rounds.client("a", rank=2), rounds.client("a", rank=4)
    for upload in (encoded(two), two.adapter()):
        agg = ff.Aggregator(policy=policy)
        agg.add(upload, client="phone")
        agg.add(upload, client="anybody")
        assert code_of(lambda upload=upload, agg=agg: agg.add(upload, client="server")) == Reason.RANK
    agg.add(encoded(four), client="server")


def test_a_mapping_of_ranks_is_stored_and_a_function_is_not(tmp_path: Path) -> None:
    quotas = {"max_clients": 3, "max_round_bytes": 10**6, "partial": True}
    policy = policy_for(rounds.client("ref"), client_ranks={"b": (4, 2), "a": (8,)}, **quotas)
    loaded = RoundPolicy.load(policy.save(tmp_path / "p.json"))
    assert loaded == policy and {name: getattr(loaded, name) for name in quotas} == quotas
    with pytest.raises(RefusedError, match=r"allows this client \[8\]"):
        loaded.admit(encoded(rounds.client("a", rank=4)), client="a")
    loaded.admit(encoded(rounds.client("a", rank=4)), client="b")
    for change in ({"max_clients": 4}, {"max_round_bytes": None}, {"partial": False}, {"client_ranks": {"a": (8,)}}):
        assert (
            policy_for(rounds.client("ref"), **{"client_ranks": {"b": (4, 2), "a": (8,)}, **quotas, **change}) != policy
        )
    with pytest.raises(OptionError, match="client_ranks is a function"):
        policy_for(rounds.client("ref"), client_ranks=lambda _: (8,)).to_json()


@pytest.mark.parametrize(
    "rules",
    [
        {"max_clients": 0},
        {"max_clients": True},
        {"max_round_bytes": 1.5},
        {"client_ranks": {"a": ()}},
        {"client_ranks": {"a": (9,)}},
        {"client_ranks": 8},
        {"client_ranks": {"a": 8}},
        {"partial": 1},
    ],
    ids=str,
)
def test_rules_that_no_server_can_mean(rules: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(rules))):
        policy_for(rounds.client("a"), **rules)


# -- some of the layers ---


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_clients_of_fewer_layers(missing: Any, tmp_path: Path) -> None:
    """Equal to the round without a policy, with the same adapters."""
    whole = rounds.client("a", rank=4).but(extras={"head.weight": torch.ones(3, 2)})
    half = rounds.client("b", rank=2).without("h.0.up", "h.1.down").but(extras=whole.extras)
    agg, plain = ff.Aggregator(policy=policy_for(whole, partial=True), missing=missing), ff.Aggregator(missing=missing)
    for c in (whole, half):
        c.adapter().save(tmp_path / c.name)
        agg.add(tmp_path / c.name, client=c.name)
        plain.add(tmp_path / c.name, client=c.name)
    update, expected = agg.finish(), plain.finish()
    assert all(torch.equal(update[layer].S, expected[layer].S) for layer in expected.layers)
    assert (
        update.adapter(client="b").layers == ["h.0.down", "h.1.up"]
        and update.adapter(client="a").layers == update.layers
    )
    alone = policy_for(whole, partial=True).admit(tmp_path / "b", client="b")
    assert alone.layers == ["h.0.down", "h.1.up"] and alone.config["target_modules"] == alone.layers
    assert alone.skeleton.scales == half.scales
    alone.save(tmp_path / "again")
    assert ff.Adapter.load(tmp_path / "again").layers == alone.layers


def test_a_layer_is_there_with_all_its_tensors_or_not_at_all() -> None:
    c = rounds.client("a", lora_bias=True).but(bias={"h.0.up": torch.ones(29)}, extras={"head.weight": torch.ones(3)})
    state = {key: tensor.contiguous() for key, tensor in c.state_dict().items()}
    policy, strict = policy_for(c, partial=True), policy_for(c)
    up = [key for key in state if "h.0.up" in key]
    assert len(up) == 3 and policy.admit(save({k: v for k, v in state.items() if k not in up}), client="a")
    for gone in ([up[0]], [up[1]], [up[2]], up[:2], ["base_model.model.head.weight"]):
        rest = {key: tensor for key, tensor in state.items() if key not in gone}
        assert code_of(lambda rest=rest: policy.admit(save(rest), client="a")) == Reason.MISSING_TENSOR
        assert code_of(lambda rest=rest: strict.admit(save(rest), client="a")) == Reason.MISSING_TENSOR
    head = {"base_model.model.head.weight": torch.ones(3)}
    assert code_of(lambda: policy.admit(save(head), client="a")) == Reason.MISSING_TENSOR
    assert code_of(lambda: policy.admit(save({}), client="a")) == Reason.MISSING_TENSOR
    more = state | {"base_model.model.h.9.up.lora_A.weight": torch.ones(4, 12)}
    assert code_of(lambda: policy.admit(save(more), client="a")) == Reason.UNKNOWN_TENSOR


@pytest.mark.parametrize(("model", "layers"), [("mha", "mha"), ("moe", "experts")])
def test_layers_of_one_module_come_together(model: str, layers: str) -> None:
    both = rounds.client("a", [*rounds.MODELS[model], rounds.Layer("fc", 5, 7)])
    policy = policy_for(both, partial=True)
    names = [name for name in both.layers if name != "fc"]
    only = policy.admit(encoded(both.without(*names)), client="a")
    assert only.layers == ["fc"]
    without = policy.admit(encoded(both.without("fc")), client="a")
    assert without.layers == sorted(names)
    state = {k: v.contiguous() for k, v in both.state_dict().items() if layouts.split_key(k)[0] != names[0]}
    assert code_of(lambda: policy.admit(save(state), client="a")) == Reason.MISSING_TENSOR


@pytest.mark.parametrize("gone", [("fc",), ("embed", "conv2"), ("mha", "mha.base_layer.out_proj"), ("experts",)])
def test_peft_loads_an_adapter_of_fewer_layers(gone: tuple[str, ...], tmp_path: Path) -> None:
    policy = RoundPolicy.from_model(models.trained_adapter(0, 4, kind="mixed"), ranks=(4,), partial=True)
    rest = [layer for layer in policy.specs if layer not in gone]
    assert len(rest) == len(policy.specs) - len(gone)
    state = ff.Adapter.from_peft(models.trained_adapter(1, 4, kind="mixed")).state_dict()
    upload = save({k: v.contiguous() for k, v in state.items() if layouts.split_key(k)[0] in rest})
    policy.admit(upload, client="a").save(tmp_path / "a")
    loaded = ff.Adapter.from_peft(models.reload(tmp_path / "a"))
    assert loaded.layers == rest and all(torch.equal(loaded.state_dict()[k], state[k]) for k in loaded.state_dict())


# -- from shapes ---


def test_shapes_of_convolutions_and_embeddings(tmp_path: Path) -> None:
    for model in ("conv", "embedding", "conv1d_hf", "linear"):
        c = rounds.client("a", model, rank=2)
        shapes = {n: (x.m, *x.tail) if x.tail else (x.m, x.n) for n, x in c.layers.items() if x.kind != "embedding"}
        tables = {name: (x.m, x.n) for name, x in c.layers.items() if x.kind == "embedding"}
        policy = RoundPolicy.from_config(c.config, shapes, embeddings=tables, ranks=RANKS)
        assert policy == policy_for(c)


@pytest.mark.parametrize(
    ("config", "shapes", "says"),
    [
        ({"target_parameters": ["experts.up"]}, {"experts": (4, 3)}, "from_model"),
        ({}, {"fc": (4,)}, "the shape of 'fc'"),
        ({}, {"fc": (4, 0)}, "the shape of 'fc'"),
        ({}, {"fc": (4, -3)}, "the shape of 'fc'"),
        ({}, {"fc": (4, 3.0)}, "the shape of 'fc'"),
        ({}, {"fc": (1,) * 6}, "the shape of 'fc'"),
    ],
)
def test_shapes_that_are_none(config: dict[str, Any], shapes: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        RoundPolicy.from_config({"r": 2, **config}, shapes, ranks=(2,))


# -- a full disk ---


@pytest.mark.parametrize("where", ["write", "open"])
def test_a_disk_that_is_full_costs_nobody_anything(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``OSError`` (the server's trouble, not the client's), nothing half there, and the round goes on."""
    content = encoded(rounds.client("a"))
    policy = policy_for(rounds.client("a"), max_clients=1, max_round_bytes=len(content))
    agg = ff.Aggregator(policy=policy, spool=tmp_path)
    gc.collect()  # what tests before this one left
    before = len(os.listdir("/proc/self/fd"))

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for spool in (tmp_path, None):
        with monkeypatch.context() as patch:
            patch.setattr("flexlora_fast.gate.intake._write" if where == "write" else "os.open", full)
            if where == "open":
                patch.setattr("tempfile.mkstemp", full)
            with pytest.raises(OSError, match="No space left"):
                policy.admit(content, client="a", spool=spool)
            with pytest.raises(OSError, match="No space left"):
                agg.add(content, client="a")
    gc.collect()
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == before
    assert not agg.clients and not agg.refused
    agg.add(content, client="a")
    assert agg.finish().layers
