"""The kernels compiled at run time: what is read from their sources, asked of CuPy, and made of them by NVRTC."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flexlora_fast import _native
from flexlora_fast.backends import nvrtc

ROOT = Path(__file__).parents[1]
SIGNS = "flexlora_signs"
X = torch.zeros(3, 2, dtype=torch.int64)
OUT = torch.zeros(8)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Nothing remembered of the CuPy that another test made up."""
    cached = (nvrtc.obstacle, nvrtc._module, nvrtc._compiled, nvrtc.kernels)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


# -- the sources ---


def test_every_kernel_is_in_the_table_and_its_file_included() -> None:
    headers = {path.name: path.read_text() for path in nvrtc.folder().glob("*.cuh")}
    table = headers.pop("kernels.cuh")
    assert sorted(re.findall(r"kernel\((\w+)\)", table)) == sorted(nvrtc.kernels())
    # No kernel that is written so differently that it is not found: by a macro, say, or with a type unknown here.
    assert sum(text.count("__global__") for text in headers.values()) == len(nvrtc.kernels())
    with_kernels = sorted(name for name, text in headers.items() if "__global__" in text)
    assert re.findall(r'#include "(.+)"', table) == with_kernels


def test_parameters_are_read_from_the_sources() -> None:
    assert nvrtc.kernels()[SIGNS] == ("int64*", "int32", "int32", "float32*")
    assert nvrtc._parameter("const flexlora::flag* __restrict__ only") == "uint8*"
    assert [nvrtc._parameter(x) for x in ("double shift", " long long  n", "float x")] == [
        "float64",
        "int64",
        "float32",
    ]
    with pytest.raises(KeyError, match="short"):
        nvrtc._parameter("short n")


def test_the_program_changes_with_any_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CuPy looks for what it compiled before by the text that it is given, and not by what that includes."""
    for header in nvrtc.folder().glob("*.cuh"):
        (tmp_path / header.name).write_bytes(header.read_bytes())
    here = nvrtc.program()
    monkeypatch.setattr(nvrtc, "folder", lambda: tmp_path)
    assert nvrtc.program() == here
    (tmp_path / "signs.cuh").write_text((tmp_path / "signs.cuh").read_text() + "\n")
    assert nvrtc.program() != here and '#include "kernels.cuh"' in here


# -- arguments ---

WRONG: list[tuple[tuple[Any, ...], str]] = [
    ((), r"takes 4 arguments \(int64\*, int32, int32, float32\*\), got 0"),
    ((X, 1, 1, OUT, 1), "takes 4 arguments .*, got 5"),
    ((OUT, 1, 1, OUT), r"argument 1 of 4: expected int64\*, got a tensor of float32$"),
    ((X.int(), 1, 1, OUT), r"argument 1 of 4: expected int64\*, got a tensor of int32$"),
    ((X.half(), 1, 1, OUT), r"argument 1 of 4: expected int64\*, got a tensor of float16$"),
    ((X, X, 1, OUT), r"argument 2 of 4: expected int32, got a tensor of int64$"),
    ((X, 1.5, 1, OUT), r"argument 2 of 4: expected int32, got the float 1\.5$"),
    ((X, 1, True, OUT), "argument 3 of 4: expected int32, got a bool$"),
    ((X, 1, None, OUT), "argument 3 of 4: expected int32, got None$"),
    ((X, 1, 1 << 31, OUT), "argument 3 of 4: expected int32, got the int 2147483648$"),
    ((X, 1, -(1 << 31) - 1, OUT), "argument 3 of 4: expected int32, got the int -2147483649$"),
    ((X, 1 << 70, 1, OUT), "argument 2 of 4: expected int32, got the int 1180591620717411303424$"),
    ((X, 1, 1, 7), r"argument 4 of 4: expected float32\*, got the int 7$"),
    ((X, 1, 1, "out"), r"argument 4 of 4: expected float32\*, got a str$"),
    ((X, 1, 1, OUT.to("meta")), r"argument 4 of 4: expected float32\*, got a tensor of float32 on meta$"),
]


def compiled_slots(name: str, arguments: tuple[Any, ...]) -> list[bytes]:
    if _native.extension is None:
        pytest.skip(f"no native extension: {_native.reason}")
    return _native.extension.emulated.slots(name, nvrtc.kernels()[name], arguments)


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_arguments_that_do_not_fit_are_quoted(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=f"^kernel '{SIGNS}'.*{words}") as here:
        nvrtc._slots(SIGNS, -1, arguments)
    with pytest.raises(ValueError, match="kernel") as there:
        compiled_slots(SIGNS, arguments)
    assert str(here.value) == str(there.value)


def test_arguments_become_the_same_bytes_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    types = ("float64", "float32", "int64", "int32", "int32", "float64*", "float32*", "uint8*", "uint8*", "int32*")
    monkeypatch.setattr(nvrtc, "kernels", lambda: {"made_up": types})
    tensors = [torch.ones(2, dtype=getattr(torch, t)) for t in ("float64", "float32", "bool", "uint8")]
    arguments = (0.1, 0.1, -(1 << 62), -(1 << 31), (1 << 31) - 1, *tensors, None)
    slots = nvrtc._slots("made_up", -1, arguments)
    assert [slot.itemsize for slot in slots] == [8, 4, 8, 4, 4, 8, 8, 8, 8, 8]
    there = compiled_slots("made_up", arguments)
    for slot, found in zip(slots, there, strict=True):
        assert found[: slot.itemsize] == slot.tobytes() and not any(found[slot.itemsize :])
    assert [int(slot) for slot in slots[5:]] == [*(tensor.data_ptr() for tensor in tensors), 0]
    assert struct.unpack("<d", slots[0].tobytes()) == (0.1,)


def test_an_unknown_kernel_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=f"there is no kernel 'signs', only flexlora_apply_right, .*{SIGNS}"):
        nvrtc._slots("signs", -1, ())


# -- CuPy ---


class Cupy(ModuleType):
    """What of CuPy is used, without a GPU; ``calls`` has what happened."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("cupy")
        self.calls: list[Any] = []
        self.error = error
        self.cuda = SimpleNamespace(Device=self._scope("device"), ExternalStream=self._scope("stream"))

    def _scope(self, what: str) -> Any:
        @contextlib.contextmanager
        def scope(*arguments: int) -> Any:
            self.calls.append((what, *arguments))
            yield
            self.calls.append(f"end of {what}")

        return scope

    def RawModule(self, **options: Any) -> Any:
        self.calls.append(options)
        return SimpleNamespace(get_function=lambda name: Kernel(self, name))


class Kernel:
    def __init__(self, cupy: Cupy, name: str) -> None:
        object.__setattr__(self, "cupy", cupy)
        object.__setattr__(self, "name", name)

    def __setattr__(self, name: str, value: int) -> None:
        self.cupy.calls.append((name, value))

    @property
    def num_regs(self) -> int:
        if self.cupy.error:
            raise self.cupy.error
        self.cupy.calls.append(("loaded", self.name))
        return 32

    def __call__(self, grid: Any, block: Any, arguments: Any, shared_mem: int) -> None:
        if self.cupy.error:
            raise self.cupy.error
        self.cupy.calls.append((self.name, grid, block, tuple(map(int, arguments)), shared_mem))


def install(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> Any:
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: cupy if name == "cupy" else real(name))
    return cupy


@pytest.mark.parametrize("shared", [0, 48 * 1024, 48 * 1024 + 1])
def test_a_launch_through_cupy(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    cupy = install(monkeypatch, Cupy())
    monkeypatch.setattr(nvrtc, "_slots", lambda name, device, arguments: (X.data_ptr(), 3, 2, 0))
    for _ in range(2):
        nvrtc.launch(SIGNS, (2, 3, 1), (256, 1, 1), shared, 1, 77, (X, 3, 2, None))
    module = next(call for call in cupy.calls if isinstance(call, dict))
    assert module["code"] == nvrtc.program() and module["backend"] == "nvrtc"
    assert module["options"] == ("-std=c++17", f"-I{nvrtc.folder()}")
    assert sum(isinstance(call, dict) for call in cupy.calls) == 1
    assert cupy.calls[:2] == [("device", 1), ("stream", 77, 1)]
    launch = (SIGNS, (2, 3, 1), (256, 1, 1), (X.data_ptr(), 3, 2, 0), shared)
    assert cupy.calls.count(launch) == 2 and cupy.calls[-2:] == ["end of stream", "end of device"]
    assert cupy.calls.count(("max_dynamic_shared_size_bytes", shared)) == (2 if shared > 48 * 1024 else 0)


def test_what_cuda_refuses_is_quoted_with_the_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Cupy(RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")))
    monkeypatch.setattr(nvrtc, "_slots", lambda name, device, arguments: ())
    words = rf"kernel '{SIGNS}' with grid \(1, 1, 1\), block \(2, 1, 1\) and 9 bytes of shared memory was refused on "
    with pytest.raises(RuntimeError, match=words + "cuda:0: CUDA_ERROR_INVALID_VALUE"):
        nvrtc.launch(SIGNS, (1, 1, 1), (2, 1, 1), 9, 0, 0, ())


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cupy = install(monkeypatch, Cupy())
    assert nvrtc.obstacle(0) is None
    assert all(("loaded", name) in cupy.calls for name in nvrtc.kernels())
    nvrtc.obstacle.cache_clear()
    nvrtc._module.cache_clear(), nvrtc._compiled.cache_clear()
    install(monkeypatch, Cupy(ValueError("signs.cuh(3): error")))
    assert nvrtc.obstacle(0) == "CuPy cannot compile them (ValueError: signs.cuh(3): error)"
    nvrtc.obstacle.cache_clear()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert re.match(r"CuPy cannot be imported \(\w+: .*cupy", str(nvrtc.obstacle(0)))
    nvrtc.obstacle.cache_clear()
    monkeypatch.setattr(nvrtc, "folder", lambda: tmp_path)
    assert "the CUDA sources are not in" in str(nvrtc.obstacle(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_real_cupy_says_why_not() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    assert "CuPy cannot compile them (" in str(nvrtc.obstacle(0))


# -- NVRTC itself ---

# The types of a kernel's parameters in PTX.
PTX = {"float64": "f64", "float32": "f32", "int64": "u64", "int32": "u32"}


class Compiler:
    """NVRTC, which compiles for GPUs that are not here (https://docs.nvidia.com/cuda/nvrtc)."""

    def __init__(self) -> None:
        folders = [Path(path, "nvidia") for path in sys.path]
        found = [library for folder in folders for library in folder.glob("c*/lib/libnvrtc.so.1?")]
        if not found:
            pytest.skip("NVRTC is not installed: `pip install nvidia-cuda-nvrtc`")
        for library in (*found[0].parent.glob("libnvrtc-builtins.so.*"), found[0]):
            self.library = ctypes.CDLL(str(library))

    def __call__(self, *options: str) -> tuple[bytes, bytes]:
        """PTX and machine code (empty for a virtual architecture) of ``nvrtc.program()``; its errors fail the test."""
        program = ctypes.c_void_p()
        source = nvrtc.program().encode()
        assert self.library.nvrtcCreateProgram(ctypes.byref(program), source, b"all.cu", 0, None, None) == 0
        given = [option.encode() for option in (*nvrtc.OPTIONS, f"-I{nvrtc.folder()}", *options)]
        status = self.library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = self.text(program, "ProgramLog")
        assert status == 0 and not log.strip(b"\0\n"), log.decode()
        return self.text(program, "PTX"), self.text(program, "CUBIN")

    def text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        assert getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        content = ctypes.create_string_buffer(max(size.value, 1))
        assert getattr(self.library, f"nvrtcGet{what}")(program, content) == 0 or size.value == 0
        return content.raw[: size.value]


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_nvrtc_compiles_every_kernel_as_it_was_parsed(architecture: str) -> None:
    # As CuPy calls it, for its two kinds of architecture.
    options = ("-ftz=true", "--device-as-default-execution-space")
    ptx, machine_code = Compiler()(*options, f"-arch=sm_{architecture}")
    assert machine_code.startswith(b"\x7fELF")
    entries = dict(re.findall(rb"\.entry (\w+)\((.*?)\)", ptx, flags=re.DOTALL))
    assert {name.decode() for name in entries} == set(nvrtc.kernels())
    for name, parameters in nvrtc.kernels().items():
        types = re.findall(r"\.param \.(\w+)", entries[name.encode()].decode())
        assert types == ["u64" if p.endswith("*") else PTX[p] for p in parameters], name
