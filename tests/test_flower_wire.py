"""Tensors as Flower's arrays: bit for bit, and strangers' arrays refused before anything is built of them."""

from __future__ import annotations

import io
import re
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")

from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

import flexlora_fast as ff
from flexlora_fast.integrations.flower import from_record, to_record, wire
from tests import flower, rounds

A, B = rounds.LINEAR[0].keys()  # (r, 12) and (29, r)


def sent(record: ArrayRecord) -> ArrayRecord:
    """Through Flower's own serialization, in chunks, as between machines."""
    contents = {key: value.deflate() for key, value in get_all_nested_objects(record).items()}
    return inflate_object_from_contents(record.object_id, contents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(5, 3), (7,), (), (2, 3, 4), (0, 3), (1, 1)])
def test_tensors_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    X = (torch.randn(shape) * 10).to(dtype)
    back = from_record(sent(to_record({"x": X, "y": X})))
    assert list(back) == ["x", "y"]
    assert back["x"].dtype == dtype
    assert back["x"].shape == X.shape
    assert torch.equal(back["x"], X)


def test_all_bfloat16_numbers_come_back_bit_for_bit() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    X = bits.view(torch.bfloat16)  # NaNs of every payload, infinities, denormals, both zeros
    back = from_record(sent(to_record({"x": X, "turned": X.T})))
    assert torch.equal(back["x"].view(torch.int16), bits)
    assert torch.equal(back["turned"].contiguous().view(torch.int16), bits.T)


def test_flower_itself_has_no_bfloat16() -> None:
    with pytest.raises(TypeError):
        ArrayRecord({"x": torch.ones(2, dtype=torch.bfloat16)})


def test_what_flower_writes_is_read() -> None:
    state = {"plain": torch.randn(3, 4), "turned": torch.randn(3, 4).T, "scalar": torch.tensor(2.5)}
    back = from_record(sent(ArrayRecord(state)))
    assert all(torch.equal(back[key], x) for key, x in state.items())
    fortran = from_record(ArrayRecord([np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))]))
    assert torch.equal(fortran["0"], torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4))


def test_an_upload_is_what_the_gate_takes() -> None:
    state = flower.reference().state_dict()
    upload = wire.upload_of(to_record({key: x.bfloat16() for key, x in state.items()}), flower.policy())
    adapter = flower.policy().admit(upload, client="node-1")
    assert all(torch.equal(adapter.state_dict()[key], x.bfloat16()) for key, x in state.items())


def npy(X: np.ndarray, *, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, X, version=version, allow_pickle=True)
    return stream.getvalue()


VALUES = np.ones((4, 12), np.float32)
GOOD = npy(VALUES)


def headed(text: str, data: bytes = VALUES.tobytes()) -> bytes:
    """A .npy file of this header."""
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def array(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (4, 12), stype: str = wire.NUMPY) -> Array:
    return Array(dtype, shape, stype, data)


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
BF16 = bytes(2 * 4 * 12)
HOSTILE: dict[str, tuple[Array, str]] = {
    "nothing": (array(b""), "content"),
    "no magic": (array(b"NUMPY" + GOOD[5:]), "content"),
    "half a header": (array(GOOD[:40]), "content"),
    "a later version": (array(GOOD[:6] + b"\x03\x00" + GOOD[8:]), "content"),
    "a header of 5 kB": (array(headed("{" + " " * 5_000)), "content"),
    "code": (array(headed("__import__('os').system('true')")), "content"),
    "deep": (array(headed("(" * 900)), "content"),
    "more keys": (array(headed(HUGE[:-1] + "'x': 1, }")), "content"),
    "a header of 20 digits": (array(headed(HUGE.replace("1000000000,", "9" * 20 + ","))), "content"),
    "a negative side": (array(headed(HUGE.replace("(1", "(-1"))), "content"),
    "a pickle": (array(npy(np.array([{}, None], dtype=object)), "object", (2,)), "dtype"),
    "text": (array(npy(np.array(["ab"])), "<U2", (1,)), "dtype"),
    "a record": (array(npy(np.zeros(2, [("a", "f4"), ("b", "f4")])), "void", (2,)), "content"),
    "complex": (array(npy(np.ones((4, 12), np.complex64)), "complex64"), "dtype"),
    "big-endian": (array(npy(VALUES.astype(">f4"))), "dtype"),
    "long double": (array(npy(np.ones((4, 12), np.longdouble)), "float128"), "dtype"),
    "claims 4 EB": (array(headed(HUGE), shape=(10**9, 10**9)), "shape"),
    "another dtype than said": (array(GOOD, dtype="float16"), "dtype"),
    "another shape than said": (array(GOOD, shape=(12, 4)), "shape"),
    "a byte too many": (array(GOOD + b"\0"), "shape"),
    "cut short": (array(GOOD[:-1]), "shape"),
    "an unknown serialization": (array(GOOD, stype="pickle"), "content"),
    "bfloat16 said to be float32": (array(BF16, stype=wire.BFLOAT16), "dtype"),
    "bfloat16 of another size": (array(BF16[:-2], "bfloat16", stype=wire.BFLOAT16), "shape"),
    "bfloat16 of 100,000 sides": (array(b"\0\0", "bfloat16", (1,) * 100_000, wire.BFLOAT16), "shape"),
    "nothing, of sides beyond 2^63": (array(b"", "bfloat16", (0, 2**70), wire.BFLOAT16), "shape"),
    "nothing, of sides whose product is": (array(b"", "bfloat16", (0, 2**40, 2**40), wire.BFLOAT16), "shape"),
    "nothing, as .npy": (array(headed(HUGE.replace("(1", "(0, 1" + "0" * 9), b""), shape=(0, 10**18, 10**9)), "shape"),
    "bfloat16 of negative sides": (array(BF16, "bfloat16", (-4, -12), wire.BFLOAT16), "shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_refused(name: str) -> None:
    bad, code = HOSTILE[name]
    with pytest.raises(ff.errors.RefusedError, match=re.escape(repr(A))) as caught:
        wire.upload_of(ArrayRecord({A: bad}), flower.policy())
    assert caught.value.code == code
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_of_the_format_are_read(version: tuple[int, int]) -> None:
    back = from_record(ArrayRecord({A: array(npy(VALUES, version=version))}))
    assert torch.equal(back[A], torch.from_numpy(VALUES))


def test_unknown_names_and_too_much_data_are_refused_before_they_are_read() -> None:
    policy = flower.policy()
    record: dict[str, Any] = {f"t{i}": array(b"never read") for i in range(100)}
    with pytest.raises(ff.errors.RefusedError, match="'t0' is not expected") as caught:
        wire.upload_of(ArrayRecord(record), policy)
    assert caught.value.code == "unknown-tensor"
    with pytest.raises(ff.errors.RefusedError, match="the policy takes") as caught:
        wire.upload_of(ArrayRecord({A: array(bytes(policy.max_bytes + 2000))}), policy)
    assert caught.value.code == "file-size"


def bytes_of() -> st.SearchStrategy[bytes]:
    """Files that are nearly right: a byte changed, cut, put together; and any others."""
    good = st.sampled_from([GOOD, npy(VALUES, version=(2, 0)), npy(np.asfortranarray(VALUES)), headed(HUGE), BF16])

    def bent(content: bytes, at: int, byte: int, cut: int) -> bytes:
        at %= len(content)
        return (content[:at] + bytes([byte]) + content[at + 1 :])[: len(content) - cut]

    counts = st.integers(0, 400)
    return st.one_of(
        good, st.builds(bent, good, counts, st.integers(0, 255), st.integers(0, 9)), st.binary(max_size=300)
    )


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    bytes_of(),
    st.sampled_from(["float32", "bfloat16", "float16", "object", ""]),
    st.one_of(st.just((4, 12)), st.lists(st.integers(-(2**80), 2**80), max_size=9).map(tuple)),
    st.sampled_from([wire.NUMPY, wire.BFLOAT16, "x"]),
)
def test_any_array_is_admitted_or_refused(data: bytes, dtype: str, shape: tuple[int, ...], stype: str) -> None:
    policy = flower.policy()
    record = to_record(rounds.client(rank=4, alpha=flower.ALPHA).state_dict())
    record[A] = Array(dtype, shape, stype, data)
    try:
        adapter = policy.admit(wire.upload_of(record, policy), client="node-1")
    except ff.errors.RefusedError as refusal:
        assert str(refusal).isprintable()
    else:
        adapter.validate_finite()
