"""HetLoRA's clients: the penalty on their last columns, and the rank that they go on with."""

from __future__ import annotations

import math

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, OptionError
from flexlora_fast.methods.hetlora import pruned_rank, pruning_penalty
from tests import rounds
from tests.models import base_model, trained_adapter
from tests.rounds import Layer

LAYERS = [Layer("fc", 14, 9), Layer("up", 7, 5)]


@pytest.mark.parametrize("kind", ["linear", "conv2", "embedding", "moe", "mixed"])
def test_the_penalty_is_the_published_one(kind: str) -> None:
    """Cho et al. 2024: Σ ‖B[:, γr:]‖·‖A[γr:]‖, and its gradient goes to those columns alone."""
    model = trained_adapter(3, 5, kind=kind)
    adapter = ff.Adapter.from_peft(model)
    expected = 0.0
    for layer in adapter.layers:
        A, B = (X.double() for X in adapter.factors(layer))
        expected += float(A[:, 3:].norm() * B[:, :, 3:].norm())
    penalty = pruning_penalty(model, 0.7)
    assert float(penalty) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for name, parameter in model.named_parameters():
        if "lora_A.default" in name and kind == "linear":
            assert not parameter.grad[:3].any() and parameter.grad[3:].all()


def test_the_penalty_where_there_is_nothing_to_prune() -> None:
    one = trained_adapter(3, 1)
    assert float(pruning_penalty(one, 0.5)) == 0
    zero = trained_adapter(3, 4)
    for name, parameter in zero.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    penalty = pruning_penalty(zero, 0.5)
    penalty.backward()  # a first round: B = 0, whose norm has no gradient
    grads = [p.grad for name, p in zero.named_parameters() if "lora_" in name]
    assert float(penalty) == 0 and all(g is None or torch.isfinite(g).all() for g in grads)


def test_a_rank_is_pruned_where_its_last_columns_have_shrunk() -> None:
    before = rounds.client("a", LAYERS, rank=5)
    shrunk = before.mapped(lambda _, A, B: (A, torch.cat([2 * B[:, :, :2], 0.9 * B[:, :, 2:]], dim=2)))
    grown = before.mapped(lambda _, A, B: (A, torch.cat([0.1 * B[:, :, :2], 1.1 * B[:, :, 2:]], dim=2)))
    assert pruned_rank(shrunk.adapter(), 0.5, before.adapter()) == 2
    assert pruned_rank(grown.adapter(), 0.5, before.adapter()) == 5
    assert pruned_rank(before.adapter(), 0.5, before.adapter()) == 5
    assert pruned_rank(shrunk.adapter(), 0.99, before.adapter()) == 4
    assert pruned_rank(shrunk.adapter(), 0.01, before.adapter()) == 5  # its second column has grown
    single = rounds.client("a", LAYERS, rank=1)
    half = single.mapped(lambda _, A, B: (A, B / 2))
    assert pruned_rank(half.adapter(), 0.5, single.adapter()) == 1


@pytest.mark.parametrize("gamma", [0, 1, -0.5, 2, math.nan, True, "half"])
def test_a_gamma_that_is_no_share(gamma: object) -> None:
    adapter = rounds.client("a", LAYERS, rank=4).adapter()
    with pytest.raises(OptionError, match=r"gamma is .*; give a number > 0 and < 1"):
        pruned_rank(adapter, gamma, adapter)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="gamma is"):
        pruning_penalty(trained_adapter(1, 4), gamma)  # type: ignore[arg-type]


def test_adapters_that_cannot_be_pruned() -> None:
    mixed = rounds.client("a", LAYERS, rank=4, rank_pattern={"up": 2}).adapter()
    with pytest.raises(OptionError, match=r"ranks \[2, 4\]; prune adapters of one rank"):
        pruned_rank(mixed, 0.5, mixed)
    one, other = (rounds.client("a", LAYERS[:n], rank=4).adapter() for n in (2, 1))
    with pytest.raises(IncompatibleAdapterError, match="client 'a', layer 'up': rank 4 after training and None before"):
        pruned_rank(one, 0.5, other)
    with pytest.raises(AdapterError, match="is not a model with PEFT adapters"):
        pruning_penalty(base_model(), 0.5)
