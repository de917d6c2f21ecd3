"""Adapters cut to other ranks and scales, against the truncated SVD in float64."""

from __future__ import annotations

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.truncation import truncated
from tests import rounds


def svd_of(dense: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(dense.double(), full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def at(adapter: ff.Adapter, rank: int, scale: float) -> ff.Adapter:
    return truncated(adapter, dict.fromkeys(adapter.layers, rank), dict.fromkeys(adapter.layers, scale))


@pytest.mark.parametrize("model", rounds.MODELS)
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_what_is_cut_is_the_truncated_svd(model: str, rank: int) -> None:
    update = ff.aggregate([client.adapter() for client in rounds.typical(model)], rank=30, tol=0)
    carried = update.adapter(rank=30)
    before = {key: tensor.clone() for key, tensor in carried.state_dict().items()}
    cut = at(carried, rank, -0.7)
    for layer in cut.layers:
        assert (cut.rank(layer), cut.scale(layer)) == (rank, pytest.approx(-0.7))
        whole = carried.delta(layer).double()
        torch.testing.assert_close(
            cut.delta(layer).double(), svd_of(whole, rank), rtol=0, atol=2e-6 * float(whole.norm())
        )
        # Nothing of what is sent to one client is another's memory.
        assert cut.factors(layer)[0].data_ptr() != carried.factors(layer)[0].data_ptr()
    assert all(torch.equal(tensor, before[key]) for key, tensor in carried.state_dict().items())


def test_powers_of_two_lose_no_bit() -> None:
    adapter = rounds.client(rank=4, alpha=8).adapter()
    cut = at(adapter, 2, 0.5)
    for layer in adapter.layers:
        A, B = adapter.factors(layer)
        assert torch.equal(cut.factors(layer)[0], A[:, :2])
        assert torch.equal(cut.factors(layer)[1], B[:, :, :2] * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    cut = at(rounds.client(rank=4, dtype=dtype).adapter(), 6, 3.0)
    assert {tensor.dtype for tensor in cut.state_dict().values()} == {dtype}


def test_columns_beyond_the_rank_hold_nothing_and_can_be_trained() -> None:
    adapter = rounds.client(rank=2).adapter()
    wide = at(adapter, 5, 4.0)
    for layer in adapter.layers:
        A, B = (X[0] for X in wide.factors(layer))
        torch.testing.assert_close(wide.delta(layer), adapter.delta(layer))
        assert not B[:, 2:].any()
        torch.testing.assert_close(A[2:].norm(dim=1), torch.ones(3))
    again = at(adapter, 5, 4.0)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in wide.state_dict().items())


def test_each_layer_has_a_rank_of_its_own_and_heads_stay() -> None:
    adapter = rounds.client(rank=4).but(extras={"head.weight": torch.full((3, 2), 7.0)}).adapter()
    ranks = {layer: 1 + i for i, layer in enumerate(adapter.layers)}
    cut = truncated(adapter, ranks, dict.fromkeys(ranks, 2.0))
    assert {layer: cut.rank(layer) for layer in cut.layers} == ranks
    assert torch.equal(cut.extras["base_model.model.head.weight"], torch.full((3, 2), 7.0))
    assert ff.Adapter.from_state_dict(cut.state_dict(), cut.config).rank(adapter.layers[2]) == 3


def test_the_bias_of_b_goes_with_the_scale() -> None:
    client = rounds.client(rank=4, lora_bias=True)
    adapter = client.but(bias={name: torch.ones(layer.m) for name, layer in client.layers.items()}).adapter()
    cut = at(adapter, 2, 8.0)
    for layer in adapter.layers:
        bias, smaller = adapter.lora_bias(layer), cut.lora_bias(layer)
        assert bias is not None and smaller is not None
        torch.testing.assert_close(cut.scale(layer) * smaller, adapter.scale(layer) * bias)


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ff.errors.OptionError, match="scale is 0"):
        at(rounds.client().adapter(), 2, 0.0)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ff.errors.AdapterError, match="overflows"):
        at(rounds.client(dtype=torch.float16).adapter(), 2, 1e-9)
