"""What methods add to frozen weights: in live PEFT models, in files, merged, reported and through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexlora_fast as ff
from flexlora_fast import storage
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, OptionError, UnsupportedAdapterError
from flexlora_fast.tensorfile import TensorFile
from tests import command, rounds
from tests.models import KINDS, base_model, outputs, trained_adapter
from tests.rounds import Layer

MERGING = [name for name, method in ff.methods.METHODS.items() if method.merges]
FC = [Layer("fc", 14, 9)]
SHARES = (0.25, 0.5, 0.25)


def adapters_of(kind: str, ranks: tuple[int, ...] = (4, 4, 4), **options: Any) -> list[ff.Adapter]:
    return [ff.Adapter.from_peft(trained_adapter(i, rank, kind=kind, **options)) for i, rank in enumerate(ranks)]


def frozen_weight(model: Any, layer: str) -> nn.Parameter:
    """A weight of the zoo, found without the package's help."""
    module = model.get_submodule(f"base_model.model.{layer}")
    base = module.get_base_layer()
    name = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
    return getattr(base, getattr(module, "parameter_name", name))


def update_of(clients: list[rounds.Client], method: str, **options: Any) -> ff.GlobalUpdate:
    return ff.aggregate([c.adapter() for c in clients], [c.weight for c in clients], method=method, **options)


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_what_the_whole_sum_would(method: str, kind: str) -> None:
    """Frozen weights and new adapter together are the base model with Σ w·s·B·A in its weights."""
    adapters = adapters_of(kind)
    update = ff.aggregate(adapters, SHARES, method=method, seed=5)
    model, reference = trained_adapter(9, 4, kind=kind), trained_adapter(8, 2, kind=kind)
    before = {layer: frozen_weight(model, layer).clone() for layer in update.layers}
    update.adapter(rank=4).load_into(model)
    assert update.merge_into(model) == update.layers
    for layer in update.layers:
        change = update.base_delta(layer, layout="weight")
        torch.testing.assert_close(frozen_weight(model, layer), before[layer] + change, rtol=0, atol=1e-7)
        whole = sum(w * a.delta(layer, "weight") for w, a in zip(SHARES, adapters, strict=True))
        own = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default").detach()
        torch.testing.assert_close(change + own, whole, rtol=1e-4, atol=1e-5)
        frozen_weight(reference, layer).data += whole
    if kind in ("mha", "mixed") and method != "flora":  # PEFT 0.21 counts out_proj's adapter twice in the forward pass
        return
    with reference.disable_adapter():
        torch.testing.assert_close(outputs(model), outputs(reference), rtol=1e-4, atol=1e-5)


def test_layers_without_an_adapter_get_their_part() -> None:
    """A client that adapts some of the layers shares all base weights with the others."""
    update = ff.aggregate(adapters_of("mixed"), method="flora")
    model = trained_adapter(1, 2, kind="linear")
    names = {"fc": model.get_submodule("base_model.model.fc").get_base_layer().weight}
    zoo = model.get_submodule("base_model.model")
    names |= {"embed": zoo.embed.weight, "conv2": zoo.conv2.weight, "mha": zoo.mha.in_proj_weight}
    names |= {"mha.base_layer.out_proj": zoo.mha.out_proj.weight, "experts": zoo.experts.down_proj}
    assert sorted(names) == update.layers
    before = {layer: weight.clone() for layer, weight in names.items()}
    update.merge_into(model)
    for layer, weight in names.items():
        torch.testing.assert_close(weight - before[layer], update.base_delta(layer, layout="weight"), rtol=0, atol=1e-6)


def test_sums_are_rounded_once() -> None:
    update = ff.aggregate(adapters_of("linear"), method="flora")
    model = trained_adapter(1, 2, dtype=torch.bfloat16)
    weight = frozen_weight(model, "fc")
    expected = (weight.float() + update.base_delta("fc")).bfloat16()
    update.merge_into(model)
    assert torch.equal(weight, expected) and not weight.requires_grad


def test_in_inference_mode() -> None:
    update = ff.aggregate(adapters_of("linear"), method="flora")
    plain, other = trained_adapter(1, 2), trained_adapter(1, 2)
    update.merge_into(plain)
    with torch.inference_mode():
        update.merge_into(other)
    assert torch.equal(frozen_weight(plain, "fc"), frozen_weight(other, "fc"))


def test_methods_that_leave_base_weights_alone_change_none() -> None:
    update = ff.aggregate(adapters_of("linear"))
    model = trained_adapter(1, 2)
    before = frozen_weight(model, "fc").clone()
    assert update.base_delta("fc") is None and update.merge_into(model) == []
    assert torch.equal(frozen_weight(model, "fc"), before)


class Packed(nn.Parameter):
    """Stands for a quantizer's own kind of parameter."""


def spoiled(kind: str) -> Any:
    """A model that cannot take the update of "linear"."""
    model = trained_adapter(1, 2)
    layer = model.get_submodule("base_model.model.fc").get_base_layer()
    if kind == "float8":
        layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    elif kind == "integers":
        layer.weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.uint8), requires_grad=False)
    elif kind == "packed":
        layer.weight = Packed(layer.weight.data, requires_grad=False)
    elif kind == "gone":
        del layer.weight
        layer.qweight = torch.zeros(3, dtype=torch.int32)
    elif kind == "meta":
        layer.weight = nn.Parameter(torch.empty(20, 12, device="meta"), requires_grad=False)
    elif kind == "tied":
        model.get_submodule("base_model.model").twin = nn.Linear(12, 20)
        model.get_submodule("base_model.model").twin.weight = layer.weight
    elif kind == "shape":
        layer.weight = nn.Parameter(torch.zeros(20, 13), requires_grad=False)
    elif kind == "overflow":
        layer.weight = nn.Parameter(torch.full((20, 12), 65504.0, dtype=torch.float16), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        (
            "float8",
            UnsupportedAdapterError,
            r"layer 'fc': Linear.weight is Parameter of torch.float8_e4m3fn, a quantized",
        ),
        ("integers", UnsupportedAdapterError, r"torch.uint8, a quantized weight.*unquantized"),
        ("packed", UnsupportedAdapterError, "Linear.weight is Packed of torch.float32, a quantized weight"),
        ("gone", UnsupportedAdapterError, "Linear.weight is no weight that can be added to"),
        ("meta", AdapterError, "has no values yet"),
        ("tied", UnsupportedAdapterError, r"tied to another weight \(.*fc.*twin.*untie"),
        ("shape", IncompatibleAdapterError, r"shape \(20, 13\), the update \(20, 12\)"),
        ("overflow", AdapterError, "would overflow torch.float16"),
    ],
)
def test_what_cannot_be_added_to_is_refused(kind: str, error: type[Exception], match: str) -> None:
    adapters = adapters_of("linear")
    update = ff.aggregate(adapters, method="flora")
    if kind == "overflow":
        update = ff.aggregate([big(a) for a in adapters], method="flora")
    with pytest.raises(error, match=match):
        update.merge_into(spoiled(kind))


def big(adapter: ff.Adapter) -> ff.Adapter:
    factors = {x: (A, 1e4 * B) for x in adapter.layers for A, B in [adapter.factors(x)]}
    specs, scales = {x: adapter.spec(x) for x in factors}, {x: adapter.scale(x) for x in factors}
    return ff.Adapter.from_factors(factors, specs, scales, adapter.config)


def test_nothing_is_written_where_anything_does_not_fit() -> None:
    update = ff.aggregate(adapters_of("mixed"), method="flora")
    model = trained_adapter(1, 2, kind="mixed")
    zoo = model.get_submodule("base_model.model")
    zoo.fc.get_base_layer().weight = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(IncompatibleAdapterError):
        update.merge_into(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(IncompatibleAdapterError, match="the model has no module 'strange'"):
        update_of([rounds.client("a", [Layer("strange", 3, 4)])], "flora").merge_into(trained_adapter(1, 2))
    with pytest.raises(AdapterError, match="is not a model with PEFT adapters"):
        update.merge_into(base_model())
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        update.merge_into(model, "other")


# -- files ---


@pytest.mark.parametrize(
    ("method", "new"),
    [
        ("flora", True),
        ("fedex-lora", True),
        ("ffa-lora", True),
        ("florist", True),
        ("fedit", False),
        ("raflora", False),
    ],
)
def test_a_file_is_of_the_new_format_only_where_it_must_be(method: str, new: bool, tmp_path: Path) -> None:
    clients = rounds.fitted(method, [rounds.client(f"c{i}", "mixed", rank=2 + i) for i in range(3)])
    update = update_of(clients, method)
    path = update.save(tmp_path / "u.safetensors")
    assert TensorFile(path).metadata["format"] == (storage.FORMAT_MORE if new else storage.FORMAT)
    again = ff.GlobalUpdate.load(path)
    for layer in update.layers:
        one, two = update[layer], again[layer]
        assert (one.merges, one.fresh, one.any_rank, one.rank) == (two.merges, two.fresh, two.any_rank, two.rank)
        assert_equal(update.base_delta(layer), again.base_delta(layer))
        assert_equal(update.delta(layer, 1), again.delta(layer, 1))
        assert one.error(1) == two.error(1)
    for name in ("c0", "c2"):
        one, two = (u.adapter(client=name).state_dict() for u in (update, again))
        assert all(torch.equal(one[key], two[key]) for key in one)
    streamed = ff.Aggregator(method=method)
    for c in clients:
        streamed.add(c.adapter(), c.weight, client=c.name)
    written = streamed.finish(tmp_path / "streamed.safetensors")
    assert all(torch.equal(written.delta(x), update.delta(x)) for x in update.layers)
    assert all(torch.equal(ff.GlobalUpdate.load(again.save(tmp_path / "v")).delta(x), update.delta(x)) for x in again)


def assert_equal(one: Tensor | None, two: Tensor | None) -> None:
    assert (one is None and two is None) or (one is not None and two is not None and torch.equal(one, two))


def test_damaged_base_is_no_update(tmp_path: Path) -> None:
    update = update_of([rounds.client(f"c{i}", FC, rank=1) for i in range(2)], "flora")
    layer = update["fc"]
    broken = {
        "fc": layer.__class__(layer.spec, layer.factorization, 2, base=(torch.zeros(1, 14, 2), torch.zeros(1, 3, 9)))
    }
    path = ff.GlobalUpdate(broken, method="flora").save(tmp_path / "u.safetensors")
    with pytest.raises(AdapterError, match=r"damaged .*what goes into the frozen weight of layer 'fc' has shapes"):
        ff.GlobalUpdate.load(path)


# -- merged, journalled, shown ---


def policy() -> ff.RoundPolicy:
    return ff.RoundPolicy.from_adapter(rounds.client("a", FC).adapter(), ranks=range(1, 9), max_weight=10)


@pytest.mark.parametrize("method", ["flora", "ffa-lora", "florist:tau=1"])
def test_parts_of_a_round_add_up(method: str) -> None:
    name = method.partition(":")[0]
    clients = rounds.fitted(name, rounds.typical("mixed"))
    flat = update_of(clients, method, rank=50, tol=0)
    parts = [update_of(part, method, rank=50, tol=0) for part in (clients[:2], clients[2:])]
    merged = ff.merge(parts, [sum(c.weight for c in part) for part in (clients[:2], clients[2:])], rank=50, tol=0)
    assert merged.method == method
    for layer in flat.layers:
        torch.testing.assert_close(merged.delta(layer), flat.delta(layer), rtol=1e-4, atol=1e-5 * flat[layer].norm)
        assert (merged[layer].merges, merged[layer].frozen) == (flat[layer].merges, flat[layer].frozen)


@pytest.mark.parametrize("method", ["fedex-lora", "raflora"])
def test_parts_that_do_not_add_up_are_refused(method: str) -> None:
    clients = rounds.fitted(method, rounds.typical())
    with pytest.raises(
        OptionError, match=f"updates of method '{method}' do not add up .*or use one of flexlora, fedit"
    ):
        ff.merge([update_of(clients[:2], method), update_of(clients[2:], method)])


@pytest.mark.parametrize("method", ["flora", "fedex-lora:residual=2", "ffa-lora", "florist:tau=0.5"])
def test_a_journalled_round_is_the_same_after_its_server_died(method: str, tmp_path: Path) -> None:
    clients = rounds.fitted(method.partition(":")[0], [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(3)])
    with ff.Round.open(tmp_path / "round", policy=policy(), method=method) as round_:
        for c in clients:
            c.adapter().save(tmp_path / c.name)
            round_.add(tmp_path / c.name, c.weight, client=c.name)
    with ff.Round.open(tmp_path / "round") as round_:
        update = round_.finish()
    plain = update_of(clients, method)
    assert update.method == plain.method == method
    for layer in plain.layers:
        assert torch.equal(update.delta(layer), plain.delta(layer))
        assert_equal(update.base_delta(layer), plain.base_delta(layer))


@pytest.mark.parametrize("method", MERGING)
def test_frameworks_refuse_what_their_messages_do_not_carry(method: str) -> None:
    from flexlora_fast.integrations.served import Served

    with pytest.raises(OptionError, match=f"method '{method}' has clients add to their frozen weights"):
        Served(policy(), options={"method": method})


@pytest.mark.parametrize("method", [*MERGING, "ffa-lora", "raflora"])
def test_defences_by_coordinates_privacy_and_shared_clients_are_refused(method: str) -> None:
    with pytest.raises(OptionError, match=f"method '{method}' is not made from such a sum alone"):
        ff.Aggregator(method=method, defence="median")
    privacy = ff.Privacy(clip=0.5, noise_multiplier=1.0, rate=0.01, denominator=100, delta=1e-6)
    with pytest.raises(OptionError, match=f"method '{method}' is not made from a sum of one term for each client"):
        ff.Aggregator(2, method=method, privacy=privacy, policy=policy())
    assert not ff.methods.METHODS[method].folds  # so that ranks of a process group take whole layers


@pytest.mark.parametrize("method", ["flora", "fedex-lora:residual=1"])
def test_reports_say_that_frozen_weights_change(method: str, tmp_path: Path) -> None:
    clients = rounds.fitted(method.partition(":")[0], [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(3)])
    report = update_of(clients, method).report()
    assert "clients add a part to their frozen weights" in report.summary()
    document = json.loads(json.dumps(report.to_dict()))
    assert document["method"] == method
    for row in document["layers"]:
        assert (row["base_error"] > 0) == (method != "flora")
        assert all(share == pytest.approx(1) for share in row["energy_kept"].values()) or method != "flora"
    if method == "flora":  # a curve of ones
        assert report.plot_energy(tmp_path / "energy.png").stat().st_size > 1000


def test_the_command_line_writes_an_adapter_begun_anew_for_each_client(tmp_path: Path) -> None:
    for i in range(3):
        rounds.client(f"c{i}", FC, rank=2).adapter().save(tmp_path / "in" / f"c{i}")
    folders = sorted(map(str, (tmp_path / "in").iterdir()))
    done = command.run("aggregate", *folders, "--method", "flora", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    update = ff.GlobalUpdate.load(tmp_path / "out" / "global_update.safetensors")
    assert update.method == "flora" and update.base_delta("fc") is not None
    factors = [ff.Adapter.load(tmp_path / "out" / "clients" / f"c{i}").factors("fc") for i in range(3)]
    assert not any(B.any() for _, B in factors)
    assert not torch.equal(factors[0][0], factors[1][0])
    wrong = command.run("aggregate", *folders, "--method", "florist:tau=2", "--out", tmp_path / "other")
    assert wrong.exit_code == 2 and "florist: tau is 2" in " ".join(wrong.output.split())


def test_the_command_line_goes_on_without_a_client_of_another_A(tmp_path: Path) -> None:
    clients = rounds.fitted("ffa-lora", [rounds.client(f"c{i}", FC, rank=2) for i in range(4)])
    clients[2] = clients[2].mapped(lambda _, A, B: (2 * A, B))
    for c in clients:
        c.adapter().save(tmp_path / "in" / c.name)
    folders = sorted(map(str, (tmp_path / "in").iterdir()))
    done = command.run("aggregate", *folders, "--method", "ffa-lora", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [refusal["client"] for refusal in document["refused"]] == ["c2"]


def test_the_command_lists_all_methods() -> None:
    done = command.run("methods")
    assert done.exit_code == 0 and all(name in done.output for name in ff.methods.METHODS)
    document = json.loads(command.run("methods", "--json").stdout)
    rows = {row["name"]: row for row in document["methods"]}
    assert list(rows) == list(ff.methods.METHODS)
    assert rows["florist"]["settings"] == {"tau": 0.9} and rows["fedex-lora"]["mixed_ranks"] is False
    assert rows["ffa-lora"]["trains"] == ["B"] and [x for x in rows if rows[x]["merges"]] == MERGING
