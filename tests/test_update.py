"""The global update: which adapters it hands out, what it refuses to, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, OptionError, RankError
from flexlora_fast.report import Report
from tests import oracle, rounds
from tests.checks import assert_identical
from tests.rounds import PREFIX, Client, Layer

LAYERS = [Layer("up", 19, 8), Layer("down", 8, 19)]


def clients() -> list[Client]:
    made = [rounds.client(f"c{i}", LAYERS, rank=2 + i, alpha=3 * (i + 1), weight=i + 1) for i in range(3)]
    return [c.but(extras={"head.weight": torch.full((3,), float(i))}) for i, c in enumerate(made)]


def update(**options: Any) -> ff.GlobalUpdate:
    adapters = [c.adapter() for c in clients()]
    return ff.aggregate(adapters, [c.weight for c in clients()], solver="gram", **options)


def off(delta: torch.Tensor, layer: str, rank: int) -> float:
    truth = oracle.truth("flexlora", clients(), layer)
    return float(np.linalg.norm(oracle.array(delta) - truth.at(rank)[0])) / truth.norm


# -- adapter(rank), adapter(config), adapter(client) ---


def test_one_rank_for_all_layers() -> None:
    adapter = update().adapter(rank=3, alpha=12)
    assert [adapter.rank(x) for x in adapter.layers] == [3, 3] and adapter.scale("up") == 4.0
    assert adapter.config["r"] == 3 and not adapter.config["rank_pattern"]
    assert adapter.client is None and list(adapter.extras) == [PREFIX + "head.weight"]
    assert off(adapter.delta("up"), "up", 3) <= 1e-5
    assert adapter.config["lora_alpha"] == 12
    assert update().adapter(rank=3).config["lora_alpha"] == clients()[0].config["lora_alpha"]


def test_a_config_says_ranks_alphas_and_layers() -> None:
    config = {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["up", "down"]}
    config |= {"rank_pattern": {"down": 1}, "alpha_pattern": {"up": 16}}
    adapter = update().adapter(config=config)
    assert (adapter.rank("up"), adapter.scale("up")) == (4, 8.0)
    assert (adapter.rank("down"), adapter.scale("down")) == (1, 2.0)
    assert off(adapter.delta("up"), "up", 4) <= 1e-5 and off(adapter.delta("down"), "down", 1) <= 1e-5
    assert not adapter.extras  # it has no place for a head
    only = update().adapter(config={"r": 2, "target_modules": ["up"], "modules_to_save": ["head"]})
    assert only.layers == ["up"] and list(only.extras) == [PREFIX + "head.weight"]
    with pytest.raises(AdapterError, match=r"targets none.*'gate'.*down, up"):
        update().adapter(config={"target_modules": ["gate"]})
    with pytest.raises(AdapterError, match="DoRA"):
        update().adapter(config=config | {"use_dora": True})


def test_a_client_of_the_round() -> None:
    adapter = update().adapter(client="c1")
    assert adapter.client == "c1" and adapter.config == clients()[1].adapter().config
    assert off(adapter.delta("up"), "up", 3) <= 1e-5
    with pytest.raises(AdapterError, match=r"client 'c7': no such client in this round; it has 3: 'c0', 'c1'"):
        update().adapter(client="c7")


def test_the_default_is_the_largest_rank_kept_in_each_layer() -> None:
    """Layers of which other ranks were kept must not stop it."""
    one = rounds.client("a", LAYERS, rank=2, rank_pattern={"up": 5})
    two = rounds.client("b", LAYERS, rank=2, rank_pattern={"up": 3})
    adapter = ff.aggregate([one.adapter(), two.adapter()]).adapter()
    assert (adapter.rank("up"), adapter.rank("down")) == (5, 2)
    assert adapter.scale("up") == 8 / 5 and adapter.scale("down") == 4.0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 5}, RankError, "layer 'down': rank 5 is more than the 4 .* aggregate again with rank=5"),
        ({"rank": 0}, RankError, "rank 0 is below 1"),
        ({"rank": -2}, RankError, "rank -2 is below 1"),
        ({"rank": 2.5}, RankError, r"rank 2\.5 is no integer"),
        ({"rank": True}, RankError, "rank True is no integer"),
        ({"rank": 2, "client": "c0"}, OptionError, "not several"),
        ({"config": {}, "client": "c0"}, OptionError, "not several"),
        ({"client": "c0", "alpha": 3}, OptionError, "alpha= goes with rank="),
        ({"rank": 2, "split": "C"}, OptionError, "split 'C' is not one of 'B', 'balanced', 'A'"),
        ({"rank": 2, "alpha": 0}, OptionError, "layer 'down': alpha is 0 here"),
        ({"rank": 2, "alpha": float("nan")}, AdapterError, "alpha must be a finite number"),
        ({"rank": 2, "dtype": torch.int32}, AdapterError, "int32"),
        ({"rank": 2, "alpha": 1e-6, "dtype": torch.float16}, AdapterError, r"B overflows torch.float16.*float32"),
    ],
)
def test_adapters_that_cannot_be(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        update().adapter(**options)


def test_a_kept_rank_bounds_what_can_be_asked_for() -> None:
    cut = update(rank=2)
    assert [cut[x].rank for x in cut] == [2, 2] and not cut["up"].complete
    for ask in (
        lambda: cut.adapter(rank=3),
        lambda: cut.adapter(client="c1"),
        lambda: cut.delta("up", 3),
        lambda: cut["up"].error(3),
    ):
        with pytest.raises(RankError, match="more than the 2 triplets"):
            ask()
    whole = update(rank=100)
    assert whole["up"].complete and whole["up"].rank == 8
    assert whole.adapter(rank=64).rank("up") == 64 and whole["up"].error(64) <= 1e-6
    for rank in (-1, 1.0, True):
        with pytest.raises(RankError):
            whole["up"].error(rank)


@pytest.mark.parametrize("method", ["flexlora", "fedit"])
def test_energy_of_the_whole_model(method: str) -> None:
    """Against the dense updates: 1 − Σ‖ΔW − ΔW_r‖²/Σ‖ΔW‖², which is no mean of the layers' shares."""
    u = update(rank=8, method=method)
    whole = {layer: u.delta(layer).double() for layer in u.layers}
    total = sum(float(delta.square().sum()) for delta in whole.values())
    assert u.norm == pytest.approx(total**0.5, rel=1e-6)
    for rank in (0, 1, 3, 8, 100):
        cut = {layer: u.delta(layer, rank).double() if rank else 0 * whole[layer] for layer in u.layers}
        lost = sum(float((whole[layer] - cut[layer]).square().sum()) for layer in u.layers)
        assert u.energy_kept(rank) == pytest.approx(1 - lost / total, abs=1e-6)
    shares = Report(u, ranks=[1, 3]).total["energy_kept"]
    assert shares == pytest.approx({rank: u.energy_kept(rank) for rank in (1, 3)})


def test_energy_of_the_whole_model_where_layers_keep_different_ranks() -> None:
    """The rank of one layer must be kept in all, unless that is all of ΔW there."""
    one = rounds.client("a", LAYERS, rank=2, rank_pattern={"up": 5})
    two = rounds.client("b", LAYERS, rank=2, rank_pattern={"up": 3})
    cut = ff.aggregate([one.adapter(), two.adapter()])  # 5 of the 8 in up, 2 of the 4 in down
    assert cut.energy_kept(2) < 1
    with pytest.raises(RankError, match="layer 'down': rank 3 is more than the 2 triplets"):
        cut.energy_kept(3)
    for rank in (-1, 1.0, True):
        with pytest.raises(RankError):
            cut.energy_kept(rank)
    whole = ff.aggregate([one.adapter()])  # 5 in up, 2 in down, and nothing more
    assert whole.energy_kept(2) < 1 and whole.energy_kept(5) == pytest.approx(1, abs=1e-6)
    assert ff.aggregate([one.mapped(lambda _, A, B: (A, B * 0)).adapter()]).energy_kept(1) == 1


def test_lora_bias_that_overflows_is_named() -> None:
    c = rounds.client("c", LAYERS, rank=2, alpha=2, lora_bias=True)
    c = c.but(bias={layer.name: torch.full((layer.m,), 100.0) for layer in LAYERS})
    small = ff.aggregate([c.adapter()]).adapter
    assert small(rank=2, alpha=2).lora_bias("up").tolist() == [100.0] * 19
    with pytest.raises(AdapterError, match=r"lora_B.bias overflows torch.float16"):
        small(rank=2, alpha=2e-3, dtype=torch.float16)


def test_a_round_where_only_some_train_a_bias() -> None:
    plain, biased = rounds.client("a", LAYERS, rank=2), rounds.client("b", LAYERS, rank=2, lora_bias=True)
    biased = biased.but(bias={layer.name: torch.ones(layer.m) for layer in LAYERS})
    adapter = ff.aggregate([plain.adapter(), biased.adapter()]).adapter(rank=2)
    for layer in adapter.layers:
        effect = adapter.scale(layer) * adapter.lora_bias(layer)
        torch.testing.assert_close(effect, torch.full_like(effect, biased.scales[layer] / 2))


# -- padding ---


@pytest.mark.parametrize("split", ["B", "balanced", "A"])
def test_padding_holds_no_update_and_can_learn(split: str) -> None:
    """Beyond the rank of ΔW one factor is zero, the other has unit vectors outside the span while there is room."""
    whole = update(rank=100)
    small, wide = (whole.adapter(rank=r, alpha=r, split=split) for r in (8, 12))
    for layer in wide.layers:
        A, B = (X[0].float() for X in wide.factors(layer))
        torch.testing.assert_close(wide.delta(layer), small.delta(layer), rtol=1e-5, atol=1e-5)
        fresh, zero = (B[:, 8:].T, A[8:]) if split == "A" else (A[8:], B[:, 8:].T)
        assert not zero.any()
        torch.testing.assert_close(fresh.norm(dim=1), torch.ones(4))
        used = (B[:, :8].T if split == "A" else A[:8]) if layer == ("up" if split == "A" else "down") else None
        if used is not None:  # 19 dimensions, 8 used: the 4 new ones find room
            assert (fresh @ used.T).abs().max() <= 1e-5 * float(used.norm())
            assert (fresh @ fresh.T - torch.eye(4)).abs().max() <= 1e-5
    again = update(rank=100).adapter(rank=12, alpha=12, split=split)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in wide.state_dict().items())


# -- as a mapping ---


def test_it_is_a_mapping_of_layers() -> None:
    u = update()
    assert list(u) == u.layers == ["down", "up"] and len(u) == 2
    assert "up" in u and "nope" not in u and u.get("nope") is None and u.get("up") is u["up"]
    assert dict(u.items())["up"].name == "up"
    with pytest.raises(AdapterError, match=r"no layer 'upp'; did you mean 'up'"):
        u["upp"]
    with pytest.raises(AdapterError, match=r"no layer 'nope'; see update\.layers"):
        u.delta("nope")
    with pytest.raises(OptionError, match="layout 'dense' is neither 'matrix' nor 'weight'"):
        u.delta("up", layout="dense")


@pytest.mark.parametrize("model", ["conv1d_hf", "embedding", "conv", "moe"])
def test_weight_layout_is_that_of_the_adapters(model: str) -> None:
    u = ff.aggregate([rounds.client("a", model, rank=2).adapter(), rounds.client("b", model, rank=3).adapter()])
    adapter = u.adapter(rank=3)
    for layer in u.layers:
        for layout in ("matrix", "weight"):
            one, other = u.delta(layer, 3, layout), adapter.delta(layer, layout)
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# -- the file ---


def test_a_file_keeps_every_bit(tmp_path: Path) -> None:
    rounded = rounds.typical("mixed", "mixed")
    agg = ff.Aggregator(rank=4)
    for c in rounded:
        agg.add(c.adapter(), c.weight, client=c.name)
    with pytest.raises(ff.errors.WeightError):
        agg.add(rounded[0].adapter(), -1, client="refused")
    before = agg.finish()
    after = ff.GlobalUpdate.load(before.save(tmp_path / "u.safetensors"))
    assert_identical(before, after)
    assert after.refused == before.refused and after.clients == before.clients
    for c in before.clients:
        one, two = before.adapter(client=c.name), after.adapter(client=c.name)
        assert all(torch.equal(one.state_dict()[k], v) and v.dtype == one.state_dict()[k].dtype
                   for k, v in two.state_dict().items())  # fmt: skip
    again = after.save(tmp_path / "again.safetensors")
    assert_identical(before, ff.GlobalUpdate.load(again))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["V/up"]
    save_file(tensors, path, metadata_of(path))


def edit(path: Path, **changes: Any) -> None:
    about = json.loads(metadata_of(path)["update"])
    save_file(load_file(path), path, metadata_of(path) | {"update": json.dumps(about | changes)})


SPOILT: dict[str, Any] = {
    "cut short": lambda p: p.write_bytes(p.read_bytes()[:-5]),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("not a tensor in sight, but long enough for a header length"),
    "gone": lambda p: p.unlink(),
    "an adapter": lambda p: save_file({"x": torch.ones(2)}, p, {"format": "pt"}),
    "no metadata": lambda p: save_file({"x": torch.ones(2)}, p),
    "half JSON": lambda p: save_file(load_file(p), p, metadata_of(p) | {"update": '{"layers": {'}),
    "JSON list": lambda p: save_file(load_file(p), p, metadata_of(p) | {"update": "[]"}),
    "no JSON": lambda p: save_file(load_file(p), p, {"format": metadata_of(p)["format"]}),
    "a tensor less": drop_tensor,
    "layers as list": lambda p: edit(p, layers=["up"]),
    "facts missing": lambda p: edit(p, layers={"up": {}}),
    "clients as numbers": lambda p: edit(p, clients=[1, 2]),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_files_that_are_no_update_are_refused_by_name(spoil: Any, tmp_path: Path) -> None:
    path = update().save(tmp_path / "u.safetensors")
    spoil(path)
    with pytest.raises(AdapterError, match=r"u\.safetensors"):
        ff.GlobalUpdate.load(path)


def test_saving_over_a_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = update().save(tmp_path / "u.safetensors")
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("flexlora_fast.tensorfile.TensorWriter.finish", full)
    with pytest.raises(OSError, match="disk full"):
        update().save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["u.safetensors"]
