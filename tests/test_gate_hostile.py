"""Every hostile file is refused with its code, in milliseconds and little memory, and leaves nothing behind."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast.errors import RefusedError
from flexlora_fast.gate import Reason, RoundPolicy
from tests import hostile

# A refusal takes about 1 ms; a busy machine must not fail a test for its time alone.
SECONDS = 0.5
MEMORY = (
    4 << 20
)  # bytes beside the upload; twice the files of the reference would be 4 KiB, a header's JSON some 100 KiB


@pytest.fixture(scope="module")
def policy() -> RoundPolicy:
    return RoundPolicy.from_adapter(
        hostile.reference().adapter(), ranks=(2, 4), max_layer_norm=1e3, max_norm=1e4, max_extra_norm=1e3
    )


@pytest.fixture(autouse=True)
def spool(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "spool"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir()), "a copy of a refused client stayed"
    assert not Path("/tmp/flexlora-was-here").exists(), "a client's code ran"


def refused(policy: RoundPolicy, upload: Any, code: str, **options: Any) -> RefusedError:
    assert code in list(Reason)
    with pytest.raises(RefusedError):  # once before, so that imports and caches do not count
        policy.admit(b"", client="warm")
    tracemalloc.start()
    before = time.perf_counter()
    with pytest.raises(RefusedError) as caught:
        policy.admit(upload, client="mallory", **options)
    seconds, (_, peak) = time.perf_counter() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    error = caught.value
    assert error.code == code, str(error)
    assert error.client == "mallory" and error.remedy and str(error).endswith(error.remedy)
    assert len(str(error)) < 1500 and str(error).isprintable() and len(error.value) <= 100
    assert seconds < SECONDS and peak < MEMORY, f"{seconds:.3f} s, {peak} bytes"
    return error


def test_the_valid_file_that_they_are_bent_from_is_admitted(policy: RoundPolicy) -> None:
    adapter = policy.admit(save(hostile.tensors()), client="a", config=hostile.config())
    assert adapter.layers == hostile.reference().adapter().layers


@pytest.mark.parametrize(("make", "code"), hostile.WEIGHTS.values(), ids=hostile.WEIGHTS.keys())
def test_weights(make: Any, code: str, policy: RoundPolicy, spool: Path, tmp_path: Path) -> None:
    content = make()
    refused(policy, content, code, spool=spool)
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(policy, tmp_path / "x.safetensors", code, spool=spool)


@pytest.mark.parametrize(("content", "code"), hostile.CONFIGS.values(), ids=hostile.CONFIGS.keys())
def test_configs(content: bytes, code: str, policy: RoundPolicy, spool: Path) -> None:
    refused(policy, save(hostile.tensors()), code, config=content, spool=spool)


@pytest.mark.parametrize(("make", "code"), hostile.PATHS.values(), ids=hostile.PATHS.keys())
def test_paths(make: Any, code: str, policy: RoundPolicy, spool: Path, tmp_path: Path) -> None:
    refused(policy, make(tmp_path / "client"), code, spool=spool)


def test_norms_are_joint_over_layers_and_do_not_depend_on_the_split(policy: RoundPolicy) -> None:
    """‖s·B·A‖_F itself, not the product of norms: (B·M, M⁻¹·A) passes or fails as (B, A) does."""
    c = hostile.reference()
    squares = [c.adapter().delta(layer).double().norm() ** 2 for layer in c.layers]
    norm = float(torch.stack(squares).sum().sqrt())
    largest = float(torch.stack(squares).max().sqrt())
    split = c.mapped(lambda _, A, B: (A * torch.tensor([1e3, 1, 1, 1])[:, None], B * torch.tensor([1e-3, 1, 1, 1])))
    for bound, code in (({"max_norm": norm}, "norm"), ({"max_layer_norm": largest}, "norm")):
        for sent in (c, split):
            just = {key: value * 1.001 for key, value in bound.items()}
            RoundPolicy.from_adapter(c.adapter(), ranks=(4,), **just).check(sent.adapter(), client="a")
            less = {key: value * 0.999 for key, value in bound.items()}
            with pytest.raises(RefusedError) as caught:
                RoundPolicy.from_adapter(c.adapter(), ranks=(4,), **less).check(sent.adapter(), client="a")
            assert caught.value.code == code


def test_the_bias_of_b_counts_as_an_update() -> None:
    c = hostile.reference()
    c = c.but(config=c.config | {"lora_bias": True}, bias={"h.0.up": torch.full((29,), 1e5)})
    policy = RoundPolicy.from_adapter(c.adapter(), ranks=(4,), max_layer_norm=1e3)
    with pytest.raises(RefusedError, match=r"lora_B\.bias") as caught:
        policy.check(c.adapter(), client="a")
    assert (caught.value.code, caught.value.layer) == ("norm", "h.0.up")


def test_a_client_that_peft_could_not_hold_is_refused(tmp_path: Path) -> None:
    """MultiheadAttention's two layers go by one name in PEFT, so they have one rank."""
    c = hostile.rounds.client("a", "mha", rank=2)
    state = {key: tensor.contiguous() for key, tensor in c.state_dict().items()}
    key = "base_model.model.mha.base_layer.out_proj.lora_{}.weight"
    state |= {key.format("A"): torch.ones(4, 12), key.format("B"): torch.ones(12, 4)}
    with pytest.raises(RefusedError) as caught:
        RoundPolicy.from_adapter(c.adapter(), ranks=(2, 4)).admit(save(state), client="a")
    assert caught.value.code == Reason.RANK


def test_an_adapter_of_other_layers_is_refused_in_process_too(policy: RoundPolicy) -> None:
    for c, code in (
        (hostile.reference().without("h.0.up"), "missing-tensor"),
        (hostile.rounds.client("a", "conv"), "unknown-tensor"),
        (hostile.reference().but(extras={"head.weight": torch.ones(3, 3)}), "shape"),
    ):
        with pytest.raises(RefusedError) as caught:
            policy.check(c.adapter(), client="a")
        assert caught.value.code == code


@pytest.mark.parametrize("read", ["add", "finish"])
def test_a_round_of_nothing_but_hostile_files_and_one_good_one(policy: RoundPolicy, read: Any) -> None:
    alone, agg = ff.Aggregator(policy=policy, read=read), ff.Aggregator(policy=policy, read=read)
    alone.add(save(hostile.tensors()), client="good")
    for name, (make, _) in hostile.WEIGHTS.items():
        with pytest.raises(RefusedError):
            agg.add(make(), client=name)
    agg.add(save(hostile.tensors()), client="good")
    assert {r.client: r.code for r in agg.refused} == {name: code for name, (_, code) in hostile.WEIGHTS.items()}
    hostile_update, update = agg.finish(), alone.finish()
    assert all(torch.equal(hostile_update[layer].S, update[layer].S) for layer in update.layers)
