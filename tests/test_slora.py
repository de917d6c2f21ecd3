"""SLoRA: nested masks by address, sparse training in live models, averages ∝ nnz, and the one SVD."""

from __future__ import annotations

import itertools
import math

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import flexlora_fast as ff
from flexlora_fast import errors
from flexlora_fast.methods.slora import FLEXLORA_DENSITIES, Mask, SparseDelta, SparseLayer, SparseTuning, initial
from flexlora_fast.methods.slora import average as averaged
from tests import models

SIDES = {"h.0.up": (29, 12), "h.0.down": (11, 23), "row": (1, 9), "col": (9, 1), "one": (1, 1), "wide": (5, 123)}
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": list(SIDES)}


def dense(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(m, n, generator=generator).to(dtype) for layer, (m, n) in SIDES.items()}


def masked(D, mask, layer):
    """The dense float64 statement: D where the mask is, 0 elsewhere."""
    out = np.zeros(D.numel())
    at = mask.positions(layer, *D.shape).numpy()
    out[at] = D.double().flatten().numpy()[at]
    return out.reshape(D.shape)


# -- masks ---


def test_masks_are_addressed_nested_and_of_their_density():
    m, n = 301, 277
    sets = []
    for density in (0, *FLEXLORA_DENSITIES.values(), 0.5, 1):
        at = Mask(3, density).positions("fc", m, n)
        assert at.dtype == torch.int64 and bool((at.diff() > 0).all())
        assert abs(len(at) - density * m * n) <= 5 * math.sqrt(m * n * density * (1 - density))
        sets.append(set(at.tolist()))
    assert len(sets[0]) == 0 and len(sets[-1]) == m * n
    assert all(small <= large for small, large in itertools.pairwise(sets))
    other = [Mask(4, 0.5).positions("fc", m, n), Mask(3, 0.5).positions("fc2", m, n)]
    for at in other:  # of another seed or layer: independent
        assert abs(len(sets[-2] & set(at.tolist())) - m * n / 4) < 5 * math.sqrt(m * n) / 2
    rows = torch.bincount(Mask(3, 0.5).positions("fc", m, n) // n, minlength=m)
    assert abs(float(rows.float().mean()) - n / 2) < 3 and float(rows.float().std()) < 1.3 * math.sqrt(n) / 2


def test_densities_by_layer_follow_patterns():
    mask = Mask(0, 0.1, {"up": 0.5, r"h\.1\..*": 0.0})
    assert [mask.density_of(x) for x in ("h.0.up", "up", "h.0.setup", "h.1.down")] == [0.5, 0.5, 0.1, 0.0]
    assert len(mask.positions("h.1.down", 50, 50)) == 0
    for density in (-0.1, 1.1, math.nan, True, "0.1"):
        with pytest.raises(errors.OptionError, match="give a number from 0 to 1"):
            Mask(0, density)
        with pytest.raises(errors.OptionError, match="'up'"):
            Mask(0, 0.1, {"up": density})
    with pytest.raises(errors.OptionError, match="no regular expression"):
        Mask(0, 0.1, {"(": 0.5})


# -- what clients send ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sparse_delta_holds_and_saves_only_its_values(dtype, tmp_path):
    mask = Mask(1, 0.3, {"wide": 0.01, "row": 0})
    delta = SparseDelta.of(mask, dense(dtype=dtype), client="anna")
    for layer, D in dense(dtype=dtype).items():
        np.testing.assert_array_equal(delta[layer].double().numpy(), masked(D, mask, layer))
        assert delta[layer].dtype == torch.float32
    count = sum(len(mask.positions(layer, *sides)) for layer, sides in SIDES.items())
    assert delta.nbytes == count * dtype.itemsize
    path = delta.save(tmp_path / "new" / "delta.safetensors")
    again = SparseDelta.load(path, client="anna", shapes=SIDES)
    assert (again.seed, list(again)) == (1, sorted(SIDES)) and again.nbytes == delta.nbytes
    for layer in SIDES:
        assert torch.equal(again.parts[layer].values, delta.parts[layer].values)
        assert again.parts[layer].values.dtype == dtype
    assert path.stat().st_size < count * dtype.itemsize + 4096


def test_what_is_no_sparse_delta(tmp_path):
    mask = Mask(0, 0.5)
    delta = SparseDelta.of(mask, dense(), client="anna")
    part = delta.parts["wide"]
    with pytest.raises(errors.AdapterError, match=r"client 'anna', layer 'wide'.*has 3\d\d entries of 5×123"):
        SparseDelta(0, {"wide": SparseLayer(5, 123, 0.5, part.values[1:])}, "anna")
    bad = part.values.clone()
    bad[0] = math.nan
    with pytest.raises(errors.AdapterError, match=r"layer 'wide'.*NaN"):
        SparseDelta(0, {"wide": SparseLayer(5, 123, 0.5, bad)})
    with pytest.raises(errors.AdapterError, match="int64"):
        SparseDelta(0, {"wide": SparseLayer(5, 123, 0.5, part.values.long())})
    with pytest.raises(errors.AdapterError, match=r"shape is \(5,\)"):
        SparseDelta.of(mask, {"wide": torch.ones(5)})
    path = delta.save(tmp_path / "delta")
    with pytest.raises(errors.IncompatibleAdapterError, match="layer 'wide': it has 5×123, the model None"):
        SparseDelta.load(path, shapes={layer: sides for layer, sides in SIDES.items() if layer != "wide"})
    update = initial(delta, CONFIG).save(tmp_path / "update")
    with pytest.raises(errors.AdapterError, match=r"is no flexlora_fast\.sparse_delta/1 file"):
        SparseDelta.load(update)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"7.5"))
    with pytest.raises(errors.AdapterError, match="impossible shapes"):
        SparseDelta.load(path)
    path.write_bytes(path.read_bytes().replace(b"7.5", b'\\"a'))
    with pytest.raises(errors.AdapterError):
        SparseDelta.load(path)


@pytest.mark.parametrize(
    "about", ["[" * 100_000, '{"seed":1e999,"layers":{}}', '{"seed":0,"layers":{"wide":[1e999,4,0.5]}}']
)
def test_a_hostile_description_is_damage(about, tmp_path):
    save_file({"wide": torch.zeros(3)}, tmp_path / "d", {"format": "flexlora_fast.sparse_delta/1", "delta": about})
    with pytest.raises(errors.AdapterError, match=r"client 'mallory'.*is damaged .*; have it sent again"):
        SparseDelta.load(tmp_path / "d", "mallory")


def test_a_start_of_another_model_is_refused_by_layer():
    start = SparseDelta.of(Mask(0, 0.5), {"0": torch.ones(5, 8)})
    tuning = SparseTuning(nn.Sequential(nn.Linear(8, 4)), Mask(0, 0.5), ["0"], start=start)
    with pytest.raises(errors.IncompatibleAdapterError, match=r"layer '0': what to start from is 5×8, its weight 4×8"):
        tuning.__enter__()


def test_a_layer_may_be_given_its_input_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(input=x)

    model = ByName()
    with SparseTuning(model, Mask(0, 0.5), ["fc"]):
        assert torch.equal(model(torch.ones(2, 8)), model.fc(torch.ones(2, 8)))


@pytest.mark.parametrize("seed", [None, 0.5, True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(errors.OptionError, match="the seed is"):
        Mask(seed, 0.5)


# -- the server's average ---


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_the_average_of_mixed_densities_is_the_dense_one(missing):
    masks = [Mask(5, 0.2), Mask(5, 0.7, {"wide": 0.05}), Mask(5, 0.2, {"one": 1.0})]
    weights, dtypes = [3.0, 1.0, 0.5], [torch.float32, torch.bfloat16, torch.float32]
    clients = [
        SparseDelta.of(mask, {k: v for k, v in dense(i, dtypes[i]).items() if (i, k) != (0, "col")}, f"c{i}")
        for i, mask in enumerate(masks)
    ]
    mean = averaged(clients, weights, missing=missing)
    for layer, (m, n) in SIDES.items():
        total, weight = np.zeros((m, n)), np.zeros((m, n))
        for i, mask in enumerate(masks):
            if (i, layer) != (0, "col"):
                total += weights[i] * masked(dense(i, dtypes[i])[layer], mask, layer)
                weight += weights[i] * masked(torch.ones(m, n), mask, layer)
        expected = total / (sum(weights) if missing == "zero" else np.maximum(weight, 1e-9))
        np.testing.assert_allclose(mean[layer].numpy(), expected, rtol=1e-6, atol=1e-7)
        assert len(mean.parts[layer].values) == max(len(c.parts[layer].values) for c in clients if layer in c)
    order = [2, 0, 1]
    again = averaged([clients[i] for i in order], [weights[i] for i in order], missing=missing)
    assert all(torch.equal(again[layer], mean[layer]) for layer in SIDES)
    absent = averaged([*clients, SparseDelta.of(Mask(5, 1), dense(9), "d")], [*weights, 0], missing=missing)
    assert all(torch.equal(absent[layer], mean[layer]) for layer in SIDES)


def test_what_cannot_be_averaged():
    delta = SparseDelta.of(Mask(0, 0.5), dense())
    with pytest.raises(errors.EmptyRoundError):
        averaged([])
    for weights in ([1, 1], [-1], [0], [math.nan]):
        with pytest.raises(errors.WeightError):
            averaged([delta], weights)
    with pytest.raises(errors.IncompatibleAdapterError, match="client 'ben': its mask has seed 1, another 0"):
        averaged([delta, SparseDelta.of(Mask(1, 0.5), dense(), "ben")])
    with pytest.raises(errors.IncompatibleAdapterError, match="client 'ben', layer 'one': it has 2×2"):
        averaged([delta, SparseDelta.of(Mask(0, 0.5), {"one": torch.ones(2, 2)}, "ben")])
    with pytest.raises(errors.OptionError, match="missing 'half'"):
        averaged([delta], missing="half")


# -- the one SVD ---


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e30, 1e-40])
def test_the_initialisation_is_the_truncated_svd(scale):
    """s'·B'·A' is the best approximation of the average, at every client's own rank, with its certificate."""
    mean = averaged([SparseDelta.of(Mask(2, d), dense(i)) for i, d in enumerate((0.3, 0.6))], [2, 1])
    mean = {layer: mean[layer] * scale for layer in mean}
    update = initial(mean, CONFIG, rank=40, extras={"base_model.model.head.weight": torch.ones(3, 2)}, tol=0)
    assert update.method == "slora" and update.layers == sorted(SIDES)
    for layer, (m, n) in SIDES.items():
        D = mean[layer].double().numpy()
        U, S, Vh = np.linalg.svd(D, full_matrices=False)
        norm = max(np.linalg.norm(D), 1e-300)
        slack = 1e-6 if scale > 1e-38 else 0.1  # whole steps of what float32 can still tell from zero
        assert abs(update[layer].norm - np.linalg.norm(D)) <= slack * norm
        for rank in {1, min(2, m, n), min(4, m, n)}:
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            got = update.adapter(rank=rank, alpha=3).delta(layer).double().numpy() if scale < 1e20 else None
            if got is not None:
                assert np.linalg.norm(D - got) <= (1 + 1e-5) * np.linalg.norm(D - best) + slack * norm
            assert update[layer].error(rank) == pytest.approx(np.linalg.norm(D - best), abs=5e-4 * norm)
    assert "slora" in update.report().summary()


def test_an_initialisation_fits_clients_of_any_rank_and_can_be_kept(tmp_path):
    delta = SparseDelta.of(Mask(0, 0.4), dense())
    update = initial(delta, CONFIG, rank=6, extras={"base_model.model.head.weight": torch.ones(3, 2)}, seed=7)
    again = ff.GlobalUpdate.load(update.save(tmp_path / "update"))
    for rank in (1, 3, 6):
        config = peft.LoraConfig(r=rank, lora_alpha=2, target_modules=["up", "down"], rank_pattern={"up": 2})
        one, two = update.adapter(config=config), again.adapter(config=config)
        assert one.layers == ["h.0.down", "h.0.up"] and (one.rank("h.0.down"), one.rank("h.0.up")) == (rank, 2)
        assert all(torch.equal(one.delta(layer), two.delta(layer)) for layer in one.layers)
    assert list(update.adapter(rank=2).extras) == ["base_model.model.head.weight"]
    assert initial(delta, CONFIG)["wide"].rank == 4 and initial(delta, CONFIG)["row"].rank == 1
    zero = initial({"wide": torch.zeros(5, 123)}, CONFIG).adapter(rank=2)
    assert zero.delta("wide").norm() == 0 and zero.factors("wide")[0].norm() > 0  # and can still learn


def test_other_layers_take_their_shapes_from_an_adapter():
    model = models.trained_adapter(0, kind="linear", target_modules=["fc", "embed", "conv2"])
    like = ff.Adapter.from_peft(model)
    generator = torch.Generator().manual_seed(0)
    deltas = {layer: torch.randn(like.delta(layer).shape, generator=generator) for layer in like.layers}
    update = initial(deltas, like, rank=30)
    for layer in like.layers:
        torch.testing.assert_close(update.delta(layer), deltas[layer], rtol=0, atol=1e-4)
    assert update.adapter(rank=2).load_into(model) is True
    transposed = initial({"proj": torch.ones(12, 20)}, {"r": 2, "fan_in_fan_out": True, "target_modules": ["proj"]})
    assert transposed["proj"].spec.weight_transposed
    with pytest.raises(errors.IncompatibleAdapterError, match="layer 'fc'"):
        initial({"fc": torch.ones(2, 2)}, like)


def test_what_cannot_be_initialised():
    for deltas, why, kind in (
        ({}, "no layers", errors.EmptyRoundError),
        ({"wide": torch.full((5, 123), math.nan)}, "layer 'wide'.*NaN", errors.AdapterError),
        ({"wide": torch.full((5, 123), 1e38)}, "layer 'wide'.*1e.38", errors.AdapterError),
        ({"other": torch.ones(3, 3)}, "layer 'other': the config does not adapt it", errors.AdapterError),
        ({"wide": torch.ones(2, 5, 123)}, r"layer 'wide': its shape is \(2, 5, 123\)", errors.AdapterError),
    ):
        with pytest.raises(kind, match=why):
            initial(deltas, CONFIG)
    for rank in (0, True, 2.0):
        with pytest.raises(errors.RankError, match="rank is"):
            initial({"wide": torch.ones(5, 123)}, CONFIG, rank)
    with pytest.raises(errors.UnsupportedAdapterError):
        initial({"wide": torch.ones(5, 123)}, CONFIG | {"use_dora": True})


# -- training in live models ---


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down, self.head = nn.Linear(7, 19), Conv1D(5, 19), nn.Linear(5, 3)
        self.up, self.down = self.up.to(dtype), self.down.to(dtype)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.down(torch.tanh(self.up(x.to(self.up.weight.dtype))))).float())
        return {"logits": logits, "loss": None if labels is None else nn.functional.cross_entropy(logits, labels)}


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 7, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def steps(model, parameters, count=3):
    x, labels = batch()
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(count):
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()


def test_sparse_training_is_dense_training_of_the_masked_entries():
    mask, net, twin = Mask(3, 0.3), Net(), Net()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with SparseTuning(net, mask, ["up", "down"]) as tuning:
        trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
        assert trained == {"up.bias", "up.sparse_values", "down.bias", "down.sparse_values", "head.weight", "head.bias"}
        steps(net, [net.up.sparse_values, net.down.sparse_values])
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in before.items())
    assert net.state_dict().keys() == before.keys() and all(p.requires_grad for p in net.parameters())
    for layer, module in {"up": twin.up, "down": twin.down}.items():
        m, n = (19, 7) if layer == "up" else (5, 19)
        M = torch.from_numpy(masked(torch.ones(m, n), mask, layer)).float()
        module.weight.register_hook((M if layer == "up" else M.T).mul)
    steps(twin, [twin.up.weight, twin.down.weight])
    delta = tuning.delta()
    torch.testing.assert_close(delta["up"], (twin.up.weight - before["up.weight"]).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        delta["down"], (twin.down.weight - before["down.weight"]).T.float(), rtol=1e-4, atol=1e-6
    )
    assert len(delta.parts["up"].values) == len(mask.positions("up", 19, 7)) and delta["up"].norm() > 0.01


def test_training_goes_on_from_the_servers_average_at_any_density():
    start = SparseDelta.of(Mask(0, 0.4), {"up": torch.randn(19, 7, generator=torch.Generator().manual_seed(0))})
    x, _ = batch()
    for density in (0.1, 0.4, 0.9):
        net = Net()
        with SparseTuning(net, Mask(0, density), ["up", "down"], start=start) as tuning, torch.no_grad():
            known = masked(start["up"], Mask(0, density), "up")
            np.testing.assert_array_equal(tuning.delta()["up"].numpy(), known)
            assert tuning.delta()["down"].norm() == 0
            got = net(x)["logits"]
        net.up.weight.data += torch.from_numpy(known).float()
        torch.testing.assert_close(got, net(x)["logits"].detach())
    with pytest.raises(errors.OptionError, match="the mask has seed 1, what to start from 0"):
        SparseTuning(net, Mask(1, 0.1), ["up"], start=start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_peft_model_with_an_ordinary_trainer(dtype, tmp_path):
    """LoRA factors rest, the head trains, the base stays; and the initialised adapter gives the same outputs."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], modules_to_save=["head"])
    model = peft.get_peft_model(Net(dtype), config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x, labels = batch()
    rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=8, learning_rate=0.05, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    with SparseTuning(model, Mask(0, 1.0), client="anna") as tuning:
        first = model(x, labels)["loss"].item()
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
        trained = model(x)["logits"].detach()
        assert model(x, labels)["loss"].item() < first
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if "modules_to_save" in key}
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora" in name}
    delta = tuning.delta()
    assert list(delta) == ["down", "up"] and delta.client == "anna" and delta["up"].norm() > 0
    head = dict(ff.Adapter.from_peft(model).extras)
    update = initial(delta, ff.Adapter.from_peft(model), rank=7, extras=head)
    update.adapter(rank=7).load_into(model)
    slack = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(model(x)["logits"].detach(), trained, **slack)


def test_changes_below_a_bfloat16_weights_rounding_are_kept():
    net = Net(torch.bfloat16)
    with SparseTuning(net, Mask(0, 1.0), ["up"]) as tuning:
        net.up.sparse_values.data.fill_(1e-5)
        assert (net.up.weight.detach() + tuning.delta()["up"].bfloat16() != net.up.weight).float().mean() < 0.1
        zero, few = net.up(torch.zeros(1, 7).bfloat16()), net.up(torch.full((1, 7), 1e3).bfloat16())
    assert bool((tuning.delta()["up"] == torch.tensor(1e-5)).all()) and zero.dtype == few.dtype == torch.bfloat16


def test_a_block_that_fails_leaves_the_model_as_it_was():
    net = Net()
    keys = set(net.state_dict())
    with pytest.raises(ZeroDivisionError), SparseTuning(net, Mask(0, 0.5), "all-linear"):
        raise ZeroDivisionError
    assert set(net.state_dict()) == keys and all(p.requires_grad for p in net.parameters())
    assert not net.up._forward_hooks


def test_what_cannot_be_tuned():
    net = Net()
    model = peft.get_peft_model(models.base_model(), peft.LoraConfig(target_modules=["embed"]))
    mask = Mask(0, 0.5)
    for arguments, why, kind in (
        ((net, mask), "give targets=", errors.OptionError),
        ((net, mask, ["nothing"]), "no layer matches", errors.AdapterError),
        ((models.base_model(), mask, ["norm"]), "layer 'norm': it is a LayerNorm", errors.AdapterError),
        ((model, mask), "layer 'embed': it is a Embedding", errors.AdapterError),
        ((model, mask, ["fc"]), "LoRA layers are the targets", errors.OptionError),
    ):
        with pytest.raises(kind, match=why):
            SparseTuning(*arguments)


def test_the_largest_weights_are_weights_and_heads_are_finite():
    delta = SparseDelta.of(Mask(0, 0.5), {"fc": torch.ones(5, 8)})
    assert torch.equal(averaged([delta, delta], [1e308, 1e308])["fc"], delta["fc"])
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["fc"]}
    with pytest.raises(errors.AdapterError, match=r"head\.weight"):
        initial(delta, config, extras={"head.weight": torch.tensor([math.nan])})
