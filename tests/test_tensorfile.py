"""Safetensors files read by position: the same tensors as safetensors itself reads, and every lie of a header named."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError
from flexlora_fast.tensorfile import DTYPES, TensorFile, TensorWriter
from tests import rounds


def tensors() -> dict[str, Tensor]:
    """One of each dtype, with the shapes that index arithmetic gets wrong."""
    shapes = [(3, 4), (5,), (), (0, 3), (1, 1, 7), (2, 3, 1, 5)]
    made = {}
    for i, (code, dtype) in enumerate(DTYPES.items()):
        shape = shapes[i % len(shapes)]
        raw = torch.randint(0, 2, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        made[f"t.{code}"] = raw.to(dtype)
    return made


def same(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, shape and dtype included."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "t.safetensors", {"format": "pt"})
    return tmp_path / "t.safetensors"


def test_reads_what_safetensors_reads(path: Path) -> None:
    file, expected = TensorFile(path), load_file(path)
    assert set(file) == set(expected) and len(file) == len(expected) and file.metadata == {"format": "pt"}
    together, kept = file.read(expected), file.read(expected, keep=True)
    for name, tensor in expected.items():
        assert same(file[name], tensor) and same(together[name], tensor) and same(kept[name], tensor)
        assert (file.entry(name).dtype, file.entry(name).shape) == (tensor.dtype, tuple(tensor.shape))
        assert kept[name].data_ptr() % 64 == 0 or not tensor.numel()
    flat = expected["t.F64"].reshape(-1)
    for start, stop in ((0, 0), (1, 3), (0, flat.numel())):
        assert same(file.read_flat("t.F64", start, stop), flat[start:stop])
    assert "nothing" not in file and file.get("nothing") is None


def test_every_read_is_fresh_and_each_byte_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, calls, preadv = TensorFile(path), [], os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(preadv(descriptor, buffers, offset))
        return calls[-1]

    monkeypatch.setattr(os, "preadv", counted)
    file["t.F32"].fill_(7)
    assert not bool((file["t.F32"] == 7).any())
    calls.clear()
    file.read(file)
    assert len(calls) == 1 and sum(calls) == sum(file.entry(name).nbytes for name in file)  # neighbours, in one go


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    expected = load_file(path)
    assert all(same(tensor, expected[name]) for name, tensor in TensorFile(path).read(expected).items())


def test_files_of_one_header_share_it(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"x": torch.rand(3)}, tmp_path / name)
    one, two = TensorFile(tmp_path / "a"), TensorFile(tmp_path / "b")
    assert one.index is two.index and not torch.equal(one["x"], two["x"])


def test_adapters_of_one_kind_share_their_skeleton(tmp_path: Path) -> None:
    made = [rounds.client(name) for name in ("a", "b")] + [rounds.client("c", rank=3)]
    for c in made:
        c.adapter().save(tmp_path / c.name)
    a, b, c = (Adapter.load(tmp_path / name) for name in "abc")
    assert a.skeleton is b.skeleton is not c.skeleton
    assert all(torch.equal(a.state_dict()[k], v) for k, v in made[0].adapter().state_dict().items())


# -- files that lie ---


def raw(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "half a length": (b"\1\0\0", "3 bytes"),
    "a huge header": ((2**63).to_bytes(8, "little") + b"{}", "its header would have"),
    "a header beyond the end": (
        (100).to_bytes(8, "little") + b"{}",
        "its header would have 100 bytes, the file has 10",
    ),
    "no JSON": (raw(b"{nothing"), "not JSON"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "deep JSON": (raw(b'{"x":' + b"[" * 10**5), "not JSON"),
    "a list": (raw([]), "no JSON object"),
    "spaces first": (raw(b' {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "no JSON object"),
    "a name twice": (raw(b'{"x": 1, "x": 2}'), "a name occurs twice"),
    "metadata as numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "no entry": (raw({"x": 3}), "'x' lacks"),
    "no offsets": (raw({"x": {"dtype": "F32", "shape": [2]}}), "'x' lacks"),
    "an unknown dtype": (raw({"x": entry("F7")}), "'F7', which is not supported"),
    "a dtype as list": (raw({"x": entry() | {"dtype": ["F32"]}}), "not supported"),
    "a negative side": (raw({"x": entry(shape=(-2,))}), r"shape \[-2\]"),
    "a side of true": (raw({"x": entry(shape=(True, 2))}), "shape"),
    "a fractional side": (raw({"x": entry(shape=(2.0,))}), "shape"),
    "a side beyond any file": (raw({"x": entry(shape=(2**63,))}), "shape"),
    "a shape of overflow": (raw({"x": entry(shape=(2**40, 2**40))}), "8 bytes of data, but F32"),
    "one offset": (raw({"x": entry(offsets=(0,))}), "data_offsets"),
    "offsets backwards": (raw({"x": entry(offsets=(8, 0))}), "-8 bytes of data"),
    "offsets of another size": (raw({"x": entry(offsets=(0, 4))}), "4 bytes of data, but F32"),
    "overlap": (raw({"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12), "'y' at byte 4.*overlaps"),
    "the same bytes twice": (raw({"x": entry(), "y": entry()}), "overlaps"),
    "a gap": (raw({"x": entry(), "y": entry(offsets=(12, 20))}, b"\0" * 20), "leaves a gap"),
    "a gap at the start": (raw({"x": entry(offsets=(4, 12))}, b"\0" * 12), "leaves a gap"),
    "data cut short": (raw({"x": entry()}, b"\0" * 7), "the file has"),
    "data too long": (raw({"x": entry()}, b"\0" * 9), "the file has"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES.keys())
def test_headers_that_lie_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(AdapterError, match=rf"not a readable safetensors file \(.*{message}.*; have it sent again"):
        TensorFile(tmp_path / "x")


@given(st.data())
def test_a_damaged_file_is_refused_or_as_safetensors_reads_it(data: st.DataObject) -> None:
    """Bytes of the header changed or cut: never another result than safetensors' own, and no other exception."""
    content = bytearray(save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"damaged-{os.getpid()}"
    path.write_bytes(content)
    try:
        got = dict(TensorFile(path))
    except AdapterError:
        return
    finally:
        path.unlink()
    expected = load(bytes(content))
    assert got.keys() == expected.keys() and all(same(got[name], expected[name]) for name in got)


# -- files that change ---

CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rewritten": (lambda p: save_file({"x": torch.rand(5)}, p), "has changed"),
    "replaced by the same": (
        lambda p: (p.with_name("y").write_bytes(p.read_bytes()), p.with_name("y").replace(p)),
        "has",
    ),
    "cut short": (lambda p: os.truncate(p, p.stat().st_size - 1), "has changed"),
    "removed": (lambda p: p.unlink(), "cannot be read any more"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "has changed|cannot be read any more"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_files_that_change_are_noticed(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"x": torch.rand(5)}, path)
    os.utime(path, (1, 1))
    file = TensorFile(path)
    change(path)
    with pytest.raises(AdapterError, match=message):
        _ = file["x"]


def test_a_file_that_is_held_may_go(tmp_path: Path) -> None:
    save_file({"x": torch.arange(5)}, tmp_path / "x")
    gc.collect()  # what tests before this one left
    before = len(os.listdir("/proc/self/fd"))
    file = TensorFile(tmp_path / "x", hold=True)
    part = file.renamed({"y": "x"})
    (tmp_path / "x").unlink()
    del file
    assert torch.equal(part["y"], torch.arange(5)) and list(part) == ["y"]
    del part
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# -- writing ---


def test_what_is_written_safetensors_reads(tmp_path: Path) -> None:
    made = dict(sorted(tensors().items(), key=lambda item: -item[1].dtype.itemsize))
    writer = TensorWriter(tmp_path / "x", room=5001)
    for name, tensor in made.items():
        writer.add(name, tensor)
    writer.finish({"format": "pt", "quote": '"σ"'})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "quote": '"σ"'}
    for read in (load_file(tmp_path / "x"), dict(TensorFile(tmp_path / "x"))):
        assert read.keys() == made.keys() and all(same(read[name], tensor) for name, tensor in made.items())


def test_a_header_without_room_is_an_error(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x", room=40)
    writer.add("x", torch.ones(3))
    with pytest.raises(ValueError, match="40 were left"):
        writer.finish({})
    writer.close()
