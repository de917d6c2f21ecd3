"""Arrays of other libraries: taken in and handed out over the same memory, or refused by name."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError
from tests import rounds
from tests.checks import assert_identical
from tests.dlpack import Producer

A, B = "base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def factors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    made = {A: torch.randn(3, 17, generator=g), B: torch.randn(29, 3, generator=g)}
    return {key: X.to(device, dtype) for key, X in made.items()}


def taken(state: Mapping[str, Any], **options: Any) -> ff.Adapter:
    return ff.Adapter.from_state_dict(state, {"r": 3, "lora_alpha": 6}, **options)


def mapped(state: Mapping[str, Tensor], call: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {key: call(X) for key, X in state.items()}


# -- in ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_arrays_of_numpy_are_taken_where_they_are(dtype: torch.dtype) -> None:
    state = factors(dtype)
    arrays = mapped(state, lambda X: X.numpy().copy())
    adapter = taken(arrays)
    for key, tensor in adapter.state_dict().items():
        assert tensor.data_ptr() == arrays[key].ctypes.data
        assert torch.equal(tensor, state[key]) and tensor.dtype == dtype
    for X, key in zip(adapter.factors("fc"), (A, B), strict=True):
        assert X.data_ptr() == arrays[key].ctypes.data
    assert torch.equal(adapter.delta("fc"), taken(state).delta("fc"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_producer_is_taken_where_it_is_and_let_go_in_the_end(dtype: torch.dtype) -> None:
    state = factors(dtype)
    producers = mapped(state, Producer)
    adapter = taken(producers)
    assert all(adapter.state_dict()[key].data_ptr() == X.data_ptr() for key, X in state.items())
    assert torch.equal(adapter.delta("fc"), taken(state).delta("fc"))
    # A CPU has no streams: none is passed. Each array is asked once, and let go once.
    assert [producer.streams for producer in producers.values()] == [[None], [None]]
    gc.collect()
    assert [producer.deleted for producer in producers.values()] == [0, 0]
    del adapter
    gc.collect()
    assert [producer.deleted for producer in producers.values()] == [1, 1]


def test_an_adapter_keeps_the_memory_of_arrays_that_nobody_else_holds() -> None:
    expected = taken(factors()).delta("fc")
    producers = list(factors().values())
    adapter = taken(dict(zip((A, B), map(Producer, producers), strict=True)))
    views = adapter.factors("fc")
    update = ff.aggregate([adapter])
    del producers, adapter
    gc.collect()
    scratch = [torch.full((3, 17), 7.0) for _ in range(50)]  # would land in memory that was let go
    assert torch.equal(2.0 * (views[1] @ views[0])[0], expected)
    torch.testing.assert_close(update.delta("fc"), expected)
    assert len(scratch) == 50


def test_tensors_and_arrays_may_be_mixed() -> None:
    state = factors()
    expected = taken(state).delta("fc")
    for mix in ({A: state[A].numpy(), B: state[B]}, {A: Producer(state[A]), B: state[B].numpy()}):
        adapter = taken(mix)
        assert torch.equal(adapter.delta("fc"), expected)
        assert all(X.data_ptr() == state[key].data_ptr() for key, X in adapter.state_dict().items())


def test_read_only_arrays_are_taken_and_never_written_to(tmp_path: Path) -> None:
    """Neither copied nor warned of: nothing here writes to what a client sent."""
    arrays = mapped(factors(), lambda X: X.numpy().copy())
    before = {key: X.copy() for key, X in arrays.items()}
    for X in arrays.values():
        X.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = taken(arrays)
        update = ff.aggregate([adapter, taken(factors())])
        update.adapter(rank=2).state_dict()[A].zero_()  # what is handed out is a copy
        adapter.save(tmp_path)
    assert adapter.state_dict()[A].data_ptr() == arrays[A].ctypes.data
    assert all(np.array_equal(before[key], X) and not X.flags.writeable for key, X in arrays.items())


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda X: np.repeat(X, 2, axis=1)[:, ::2],
        lambda X: np.broadcast_to(X[:, :1], X.shape),
        lambda X: np.frombuffer(b"\1" + X.tobytes(), np.uint8)[1:].view(X.dtype).reshape(X.shape),
    ],
    ids=["columns first", "every second", "broadcast", "off its alignment"],
)
def test_views_of_any_strides_are_taken_as_they_are(view: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = mapped(factors(), lambda X: view(X.numpy()))
    adapter = taken(arrays)
    for key, tensor in adapter.state_dict().items():
        assert tensor.data_ptr() == arrays[key].ctypes.data
        assert np.array_equal(tensor.numpy(), arrays[key])
    copied = {key: torch.tensor(np.array(X)) for key, X in arrays.items()}
    torch.testing.assert_close(adapter.delta("fc"), taken(copied).delta("fc"))


@pytest.mark.parametrize("read_only", [False, True])
def test_bfloat16_of_numpy_is_taken_where_it_is(read_only: bool) -> None:
    """As safetensors, Flax and JAX hand it out; NumPy itself cannot export it by DLPack."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    state = factors(torch.bfloat16)
    arrays = mapped(state, lambda X: X.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16))
    for X in arrays.values():
        X.setflags(write=not read_only)
    adapter = taken(arrays)
    for key, tensor in adapter.state_dict().items():
        assert tensor.data_ptr() == arrays[key].ctypes.data
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, state[key])


@pytest.mark.parametrize("model", ["mixed", "weird"])
def test_a_round_of_arrays_is_that_of_tensors_bit_for_bit(model: str) -> None:
    clients = [rounds.client(f"c{i}", model, rank=2 + i, weight=i + 1) for i in range(3)]
    clients = [
        c.but(extras={"head.weight": torch.randn(4, 3), "steps": torch.tensor(i)}) for i, c in enumerate(clients)
    ]
    agg, expected = ff.Aggregator(rank=4), ff.Aggregator(rank=4)
    for c in clients:
        adapter = c.adapter()
        arrays = mapped(adapter.state_dict(), lambda X: X.numpy())
        agg.add(ff.Adapter.from_state_dict(arrays, adapter.config), c.weight, client=c.name)
        expected.add(adapter, c.weight, client=c.name)
    assert_identical(agg.finish(), expected.finish())


def test_initial_factors_may_be_arrays() -> None:
    config = {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}
    first, last = factors(), mapped(factors(), lambda X: X * 2)
    initial = taken(mapped(first, Tensor.numpy))
    found = ff.Adapter.from_state_dict(mapped(last, Tensor.numpy), config, initial=initial)
    assert torch.equal(found.delta("fc"), ff.Adapter.from_state_dict(last, config, initial=taken(first)).delta("fc"))


class Broken:
    """A producer that fails."""

    dtype = "float32"

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("buffer was donated")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", r"is a str, not a tensor; .*__dlpack__ \(CuPy, NumPy, JAX\), or remove it"),
        ([[1.0]], "is a list, not a tensor"),
        (None, "is a NoneType, not a tensor"),
        (np.ones((3, 17), "f4")[::-1], r"numpy.ndarray of float32, whose strides \(-68, 4\) run backwards.*copy it"),
        (np.ones((3, 17), ">f4"), r"numpy.ndarray of >f4, which torch cannot share.*BufferError.*byte order.*float32"),
        (np.full((3, 17), "x"), r"numpy.ndarray of <U1, which torch cannot share"),
        (np.ones((3, 17), object), "numpy.ndarray of object, which torch cannot share"),
        (np.ones((3, 17), "i4"), r"is torch.int32; factors must be float32"),
        (Broken(), r"tests.Broken of float32, which torch cannot share.*RuntimeError: buffer was donated"),
    ],
    ids=["text", "list", "None", "backwards", "byte order", "strings", "objects", "integers", "raises"],
)
def test_what_cannot_be_shared_is_refused_by_name(value: Any, text: str) -> None:
    """A tensor that runs backwards would end the whole process inside torch."""
    with pytest.raises(AdapterError, match=text) as caught:
        taken(factors() | {A: value}, client="c7")
    assert A in str(caught.value) and (caught.value.client, caught.value.layer) == ("c7", "fc")


def test_what_is_no_state_dict_and_what_is_no_factor() -> None:
    with pytest.raises(AdapterError, match=r"client 'c7'.*must map names to tensors"):
        taken([np.ones(3)], client="c7")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="must map names to tensors"):
        taken({3: np.ones(3)})  # type: ignore[dict-item]
    with pytest.raises(AdapterError, match=r"'head.bias' is a list") as caught:
        taken(factors() | {"head.bias": [1.0]})
    assert caught.value.layer is None
    with pytest.raises(AdapterError, match=r"lora_A.weight' holds 1 NaN"):
        spoilt = factors()[A].numpy()
        spoilt[1, 2] = np.nan
        taken(factors() | {A: spoilt}).validate_finite()


# -- out ---


def assert_shared(tensor: Tensor) -> None:
    """NumPy sees the tensor's own memory, and the same numbers."""
    array = np.from_dlpack(tensor)
    assert array.ctypes.data == tensor.data_ptr() and np.array_equal(array, tensor.numpy())


def tensors_of(update: ff.GlobalUpdate) -> list[Tensor]:
    """Every tensor of an update, and of adapters made from it."""
    found = list(update.extras.values())
    for layer in update.values():
        f = layer.factorization
        found += [layer.S, f.U, f.S, f.V, f.energy, *(layer.averaged or ())]
        found += [layer.bias] if layer.bias is not None else []
        found += [update.delta(layer.name)]
    for split in ("B", "balanced", "A"):
        found += update.adapter(rank=6, split=split).state_dict().values()  # wider than some layers: padded
    return found


@pytest.mark.parametrize("method", ["flexlora", "fedit"])
def test_results_go_to_numpy_without_a_copy(method: str, tmp_path: Path) -> None:
    clients = [rounds.client(f"c{i}", "mixed", rank=3, lora_bias=True) for i in range(2)]
    biased = {layer.name: torch.ones(layer.m) for layer in rounds.MODELS["linear"][:2]}
    clients = [c.but(bias=biased, extras={"head.weight": torch.randn(4, 3)}) for c in clients]
    update = ff.aggregate([c.adapter() for c in clients], rank=6, method=method)
    stored = ff.GlobalUpdate.load(update.save(tmp_path / "u.safetensors"))
    for tensor in (*tensors_of(update), *tensors_of(stored)):
        assert_shared(tensor)


# -- on a GPU ---


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arrays_of_cupy_are_taken_where_they_are(dtype: torch.dtype) -> None:
    cupy = pytest.importorskip("cupy")
    state = factors(dtype, "cuda")
    arrays = mapped(state, cupy.from_dlpack)
    adapter = taken(arrays)
    for key, tensor in adapter.state_dict().items():
        assert tensor.data_ptr() == arrays[key].data.ptr == state[key].data_ptr()
        assert tensor.device == state[key].device and tensor.dtype == dtype
    assert torch.equal(adapter.delta("fc"), taken(state).delta("fc"))


@pytest.mark.gpu
@needs_gpu
def test_arrays_of_cupy_and_numpy_and_tensors_may_be_mixed() -> None:
    cupy = pytest.importorskip("cupy")
    here, there = factors(), factors(device="cuda")
    expected = ff.aggregate([taken(here), taken(here), taken(here)], device="cuda").delta("fc")
    mixed = [{A: cupy.asarray(here[A].numpy()), B: here[B].numpy()}, mapped(there, cupy.from_dlpack), here]
    torch.testing.assert_close(ff.aggregate([taken(x) for x in mixed], device="cuda").delta("fc"), expected)


@pytest.mark.gpu
@needs_gpu
def test_the_stream_of_a_producer_is_waited_for() -> None:
    """The producer is told torch's current stream, which then sees what the producer's was still to write."""
    own, current = torch.cuda.Stream(), torch.cuda.Stream()
    state = factors(device="cuda")
    late = mapped(state, torch.zeros_like)
    torch.cuda.synchronize()

    def order(stream: int) -> None:
        (torch.cuda.default_stream() if stream == 1 else torch.cuda.ExternalStream(stream)).wait_stream(own)

    with torch.cuda.stream(own):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for key, X in late.items():
            X.copy_(state[key], non_blocking=True)
    producers = mapped(late, lambda X: Producer(X, order))
    with torch.cuda.stream(current):
        delta = taken(producers).delta("fc")
    current.synchronize()
    assert torch.equal(delta, taken(state).delta("fc"))
    assert {stream for producer in producers.values() for stream in producer.streams} == {current.cuda_stream}
    assert taken(mapped(state, lambda X: Producer(X, order))).delta("fc").is_cuda  # the default stream, which is 1


@pytest.mark.gpu
@needs_gpu
def test_results_on_a_gpu_go_to_cupy_without_a_copy() -> None:
    cupy = pytest.importorskip("cupy")
    clients = [rounds.client(f"c{i}", "linear", rank=3, lora_bias=True) for i in range(2)]
    bias = {layer.name: torch.ones(layer.m) for layer in rounds.MODELS["linear"]}
    agg = ff.Aggregator(rank=6, device="cuda", results="device")
    for c in clients:
        agg.add(c.but(bias=bias, extras={"head.weight": torch.randn(4, 3)}).adapter(), client=c.name)
    update = agg.finish()
    tensors = [X for layer in update.values() for X in (layer.factorization.U, layer.factorization.V)]
    for split in ("B", "balanced", "A"):
        state = update.adapter(rank=6, split=split).state_dict()
        assert any(key.endswith("lora_B.bias") for key in state) and any("head" in key for key in state)
        tensors += state.values()
    for tensor in tensors:
        assert tensor.is_cuda and cupy.from_dlpack(tensor).data.ptr == tensor.data_ptr()
