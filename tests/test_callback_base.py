"""What a received update asks of the model around the factors: frozen weights, DistributedDataParallel, stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, RankError
from flexlora_fast.integrations.transformers import receive
from tests.test_callback import adam_after_steps, language_model, rows, same

LAYER = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weight(model: torch.nn.Module) -> torch.Tensor:
    return model.get_submodule(f"base_model.model.{LAYER}").base_layer.weight.detach().clone()


def sent(method: str, *seeds: int) -> ff.GlobalUpdate:
    adapters = [ff.Adapter.from_peft(language_model(seed)) for seed in seeds]
    return ff.aggregate(adapters, method=method, clients=[f"c{seed}" for seed in seeds])


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_what_goes_into_the_frozen_weights_goes_there(method: str) -> None:
    """Base and adapter together are then what the round made of all clients."""
    update, model = sent(method, 3, 4), language_model(1)
    optimizer, before = adam_after_steps(model), weight(model)
    assert receive(model, update, optimizer=optimizer) is False
    base = update.base_delta(LAYER)
    assert base is not None and torch.allclose(weight(model), before + base, atol=1e-6)
    whole = weight(model) - before + ff.Adapter.from_peft(model).delta(LAYER)
    means = [ff.Adapter.from_peft(language_model(seed)).delta(LAYER) for seed in (3, 4)]
    assert torch.allclose(whole, sum(means) / 2, atol=1e-5)
    assert not any("lora_" in name and p in optimizer.state for name, p in model.named_parameters())


def test_others_leave_the_frozen_weights_alone() -> None:
    model = language_model(1)
    before = weight(model)
    receive(model, sent("flexlora", 3, 4))
    assert torch.equal(weight(model), before)


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    update, model = sent("flora", 3, 4), language_model(1)
    weights = weight(model)
    other = adam_after_steps(language_model(2))
    with pytest.raises(AdapterError, match="the optimizer does not hold its factors"):
        receive(model, update, optimizer=other)
    with pytest.raises(RankError):
        receive(model, update, rank=3, optimizer=adam_after_steps(model))
    assert torch.equal(weight(model), weights)


@pytest.mark.usefixtures("one_process")
def test_a_new_rank_under_distributed_data_parallel_is_refused() -> None:
    """It would go on summing up the gradients of parameters that are not there any more: processes would drift apart,
    and none would say so.
    """
    model = language_model()
    wrapped = DistributedDataParallel(model)
    before = ff.Adapter.from_peft(model)
    larger = ff.Adapter.from_peft(language_model(5, rank=4))
    for given in (wrapped, torch.compile(wrapped)):
        with pytest.raises(RankError, match="whose parameters the DistributedDataParallel already holds"):
            receive(given, larger)
    assert same(before, model)
    equal = ff.Adapter.from_peft(language_model(5))
    assert receive(wrapped, equal) is False and same(equal, model)
    wrapped(input_ids=rows(1)[0]["input_ids"][None], labels=rows(1)[0]["labels"][None]).loss.backward()
    assert receive(model, larger) is True  # the bare one, to be wrapped anew


def test_a_stand_in_for_an_optimizer_is_refused() -> None:
    """DeepSpeed's are made later, of parameters of their own."""
    with pytest.raises(AdapterError, match="FSDP or DeepSpeed shard them"):
        receive(language_model(), ff.Adapter.from_peft(language_model(5)), optimizer=SimpleNamespace(params=[]))
