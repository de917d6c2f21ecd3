"""Files that a hostile client would send, each with the code it must be refused with.

The list is that of what safetensors 0.8, PEFT 0.21 and torch.load were found to accept, and of what fuzzers of such
formats begin with. Every file is made for the policy of ``reference``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from tests import rounds

A, B = rounds.LINEAR[0].keys()  # (r, 12) and (29, r)


def reference() -> rounds.Client:
    return rounds.client("ref", rank=4).but(extras={"head.weight": torch.ones(3, 2)})


def tensors() -> dict[str, torch.Tensor]:
    return {key: tensor.contiguous() for key, tensor in reference().state_dict().items()}


def header() -> dict[str, Any]:
    """The header of the valid file, to be bent."""
    content = save(tensors())
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def raw(document: Any, data: int | bytes | None = None) -> bytes:
    """A file of this header (text as it is) and so many bytes of zeros, by default those of the valid file."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    if data is None:
        data = max(entry["data_offsets"][1] for entry in header().values())
    return len(text).to_bytes(8, "little") + text + (data if isinstance(data, bytes) else bytes(data))


def bent(name: str = A, **fields: Any) -> bytes:
    """The valid file with other fields in the entry of one tensor."""
    document = header()
    document[name] |= fields
    return raw(document)


def with_tensors(**changes: Any) -> bytes:
    """The valid tensors with changes by name (A, B or the name itself); None takes one away."""
    state: dict[str, Any] = tensors() | {{"A": A, "B": B}.get(k, k): v for k, v in changes.items()}
    return save({key: tensor for key, tensor in state.items() if tensor is not None})


def twice() -> bytes:
    """A tensor key twice, over the same bytes: safetensors takes the last, others the first."""
    text = json.dumps(header())
    return raw((text[:-1] + ", " + text[1:]).encode())


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2).as_strided((10**6, 10**6), (0, 0))}, buffer)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(10**8))
    return buffer.getvalue()


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/flexlora-was-here",)


FULL = float("inf")
ELSEWHERE = "base_model.model.h.9.up.lora_A.weight"
MANY = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}

# name -> (bytes of the weights, code)
WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "header"),
    "half a length": (lambda: b"\1\0\0", "header"),
    "a header of 2^63 bytes": (lambda: (2**63).to_bytes(8, "little") + b"{}", "header"),
    "a header beyond the end": (lambda: (100).to_bytes(8, "little") + b"{}", "header"),
    "no JSON": (lambda: raw(b"{nothing"), "header"),
    "no UTF-8": (lambda: raw(b'{"\xff": 1}'), "header"),
    "deep JSON": (lambda: raw(b'{"x":' + b"[" * 4000), "header"),
    "long integers": (lambda: raw(b'{"x":' + b"9" * 4500), "header"),
    "polyglot: spaces first": (lambda: raw(b"  " + json.dumps(header()).encode()), "header"),
    "a list": (lambda: raw([]), "header"),
    "keys twice": (twice, "header"),
    "metadata nested": (lambda: raw(header() | {"__metadata__": {"a": {}}}), "header"),
    "metadata of empty text": (lambda: raw(header() | {"__metadata__": ""}), "header"),
    "100,000 empty tensors": (lambda: raw(MANY), "file-size"),
    "a header of spaces": (lambda: raw(json.dumps(header()).encode() + b" " * 6000, 0), "header-size"),
    "much metadata": (lambda: raw(header() | {"__metadata__": {"a": "b" * 6000}}, 0), "header-size"),
    "99 MB of spaces": (lambda: raw(b"{" + b" " * 99_000_000), "file-size"),
    "overlap": (lambda: bent(data_offsets=[8, 200]), "header"),
    "offsets backwards": (lambda: bent(data_offsets=[192, 0]), "header"),
    "offsets of 2^63": (lambda: bent(data_offsets=[2**63, 2**63 + 192]), "header"),
    "a gap": (lambda: raw({A: header()[A] | {"data_offsets": [8, 200]}}, 200), "header"),
    "trailing bytes": (lambda: save(tensors()) + b"\0", "header"),
    "cut short": (lambda: save(tensors())[:-1], "header"),
    "a shape of overflow": (lambda: bent(shape=[2**32, 2**32]), "header"),
    "a negative shape": (lambda: bent(shape=[-4, -12]), "header"),
    "a float shape": (lambda: bent(shape=[4.0, 12]), "header"),
    "a shape of NaN": (lambda: bent(shape=[float("nan"), 12]), "header"),
    "a shape of escapes": (lambda: bent(shape="\x1b[2J"), "header"),
    "a shape of true": (lambda: bent(shape=[True, 48]), "header"),
    "a shape of 100,000 ones": (lambda: raw({A: header()[A] | {"shape": [1] * 1500}}, 192), "header"),
    "a shape of 16 sides": (lambda: bent(shape=[4, 12] + [1] * 14), "shape"),
    "an empty shape of 2^61": (
        lambda: raw({"x": {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}}, 0),
        "unknown-tensor",
    ),
    "one number": (lambda: with_tensors(A=torch.tensor(1.0)), "shape"),
    "no rank": (lambda: with_tensors(A=torch.ones(0, 12), B=torch.ones(29, 0)), "rank"),
    "rank of the config's only": (lambda: with_tensors(A=torch.ones(3, 12)), "shape"),
    "rank not allowed": (lambda: with_tensors(A=torch.ones(7, 12), B=torch.ones(29, 7)), "rank"),
    "transposed": (lambda: with_tensors(A=torch.ones(12, 4)), "shape"),
    "factors swapped": (lambda: with_tensors(A=torch.ones(29, 4), B=torch.ones(4, 12)), "shape"),
    "another base model": (lambda: with_tensors(A=torch.ones(4, 13)), "shape"),
    "another head": (lambda: with_tensors(**{"base_model.model.head.weight": torch.ones(2, 3)}), "shape"),
    "dtype F4": (lambda: bent(dtype="F4"), "header"),
    "dtype F8": (lambda: with_tensors(A=torch.ones(4, 12).to(torch.float8_e4m3fn)), "dtype"),
    "dtype C64": (lambda: with_tensors(A=torch.ones(4, 12, dtype=torch.complex64)), "dtype"),
    "dtype I64": (lambda: with_tensors(A=torch.ones(4, 12, dtype=torch.int64)), "dtype"),
    "dtype BOOL": (lambda: with_tensors(A=torch.ones(4, 12, dtype=torch.bool)), "dtype"),
    "dtype F64": (lambda: with_tensors(A=torch.ones(4, 12, dtype=torch.float64)), "dtype"),
    "a name of paths": (lambda: with_tensors(**{"../../etc/passwd\0x": torch.ones(1)}), "unknown-tensor"),
    "a name of escapes": (lambda: with_tensors(**{"\x1b[2J\u202e": torch.ones(1)}), "unknown-tensor"),
    "half a surrogate": (
        lambda: raw(b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        "unknown-tensor",
    ),
    "a name of another layer": (lambda: with_tensors(**{ELSEWHERE: torch.ones(4, 12)}), "unknown-tensor"),
    "a name without its prefix": (
        lambda: with_tensors(A=None, **{A.removeprefix(rounds.PREFIX): torch.ones(4, 12)}),
        "unknown-tensor",
    ),
    "DoRA's magnitudes": (
        lambda: with_tensors(**{A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(29)}),
        "unknown-tensor",
    ),
    "a factor missing": (lambda: with_tensors(B=None), "missing-tensor"),
    "a head missing": (lambda: with_tensors(**{"base_model.model.head.weight": None}), "missing-tensor"),
    "nothing": (lambda: save({}), "missing-tensor"),
    "NaN": (lambda: with_tensors(A=torch.full((4, 12), float("nan"))), "not-finite"),
    "infinity": (lambda: with_tensors(B=torch.full((29, 4), FULL)), "not-finite"),
    "one infinity in fp16": (lambda: with_tensors(B=torch.tensor([FULL] + [0] * 115).half().view(29, 4)), "not-finite"),
    "NaN in the head": (
        lambda: with_tensors(**{"base_model.model.head.weight": torch.full((3, 2), -FULL)}),
        "not-finite",
    ),
    "finite, but not their product": (
        lambda: with_tensors(A=torch.full((4, 12), 1e30), B=torch.full((29, 4), 1e30)),
        "norm",
    ),
    "scaled up": (lambda: with_tensors(A=torch.full((4, 12), 1e4)), "norm"),
    "a head scaled up": (lambda: with_tensors(**{"base_model.model.head.weight": torch.full((3, 2), 1e9)}), "norm"),
    "a pickle that runs": (lambda: pickle.dumps(_Runs()), "pickle"),
    "torch.save": (torch_file, "pickle"),
    "a zip bomb": (zip_bomb, "file-size"),
}


def config(**changes: Any) -> bytes:
    return json.dumps(reference().config | {"peft_type": "LORA"} | changes).encode()


# name -> (bytes of the config beside valid weights, code)
CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "config"),
    "no UTF-8": (b'{"r": "\xff"}', "config"),
    "a list": (b"[]", "config"),
    "too large": (config(note="x" * 100_000), "config"),
    "deep": (b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "config"),
    "13 deep": (config(note=json.loads("[" * 13 + "]" * 13)), "config"),
    "r twice": (config()[:-1] + b', "r": 4}', "config"),
    "r of 4,301 digits": (config()[:-1] + b', "x": ' + b"9" * 4301 + b"}", "config"),
    "alpha of NaN": (config(lora_alpha=float("nan")), "config"),
    "alpha of infinity": (config(lora_alpha=float("-inf")), "config"),
    "alpha of 1e999": (config()[:-1] + b', "x": 1e999}', "config"),
    "alpha as text": (config(lora_alpha="16"), "config"),
    "alpha of true": (config(lora_alpha=True), "config"),
    "alpha of −1e30": (config(lora_alpha=-1e30), "scale"),
    "alpha of 1e308": (config(lora_alpha=1e308), "scale"),
    "alpha of 0": (config(lora_alpha=0), "scale"),
    "alpha by pattern": (config(alpha_pattern={"h.0.up": 1e6}), "scale"),
    "rsLoRA": (config(use_rslora=True), "scale"),
    "rsLoRA as text": (config(use_rslora="false"), "config"),
    "r of −8": (config(r=-8), "config"),
    "r of 0": (config(r=0), "config"),
    "r of 8.5": (config(r=8.5), "config"),
    "r of true": (config(r=True), "config"),
    "r of 10^12": (config(r=10**12), "config-rank"),
    "r of another rank": (config(r=2), "config-rank"),
    "rank by pattern": (config(rank_pattern={"up": 2}), "config-rank"),
    "rank_pattern as list": (config(rank_pattern=["up"]), "config"),
    "rank_pattern of text": (config(rank_pattern={"up": "4"}), "config"),
    "a pattern that backtracks": (config(rank_pattern={"(a+)+$": 4}), "pattern"),
    "a pattern that matches all": (config(alpha_pattern={".*": 8}), "pattern"),
    "a long pattern": (config(alpha_pattern={"(" * 3000: 8}), "pattern"),
    "peft_type IA3": (config(peft_type="IA3"), "peft-type"),
    "peft_type unheard of": (config(peft_type="x" * 5000), "peft-type"),
    "peft_type as list": (config(peft_type=["LORA"]), "peft-type"),
    "DoRA": (config(use_dora=True), "unsupported"),
    "PiSSA": (config(init_lora_weights="pissa"), "unsupported"),
    "LoftQ": (config(init_lora_weights="loftq"), "unsupported"),
    "a variant of tomorrow": (config(use_xlora="x" * 5000), "unsupported"),
    "a variant of half a surrogate": (config()[:-1] + b', "use_\\ud800": true}', "unsupported"),
    "a variant of escapes": (config(**{"use_\x1b[2J\u202e": True}), "unsupported"),
    "layer replication": (config(layer_replication=[[0, 4]]), "unsupported"),
    "another base": (config(base_model_name_or_path="elsewhere/other"), "base"),
    "a base of lists": (config(base_model_name_or_path=[[1]]), "base"),
    "other tokens": (config(trainable_token_indices=[1, 2]), "base"),
}


def _folder(path: Path, weights: bytes | None = None, about: bytes | None = None) -> Path:
    path.mkdir()
    if weights is not None:
        (path / WEIGHTS_NAME).write_bytes(weights)
    if about is not None:
        (path / CONFIG_NAME).write_bytes(about)
    return path


def _good(path: Path) -> Path:
    return _folder(path, save(tensors()), config())


def _linked(path: Path, name: str) -> Path:
    good, bad = _good(path.with_name("good")), _good(path)
    (bad / name).unlink()
    (bad / name).symlink_to(good / name)
    return bad


def _pipe(path: Path, name: str) -> Path:
    _good(path)
    (path / name).unlink()
    os.mkfifo(path / name)
    return path


def _named(path: Path, name: str) -> Path:
    (_folder(path) / name).write_bytes(torch_file())
    return path


def _link_to_folder(path: Path) -> Path:
    path.symlink_to(_good(path.with_name("good")))
    return path


def _sparse(path: Path) -> Path:
    """A terabyte that takes no room on disk."""
    _good(path)
    os.truncate(path / WEIGHTS_NAME, 2**40)
    return path


def _folder_inside(path: Path) -> Path:
    (_folder(path, None, config()) / WEIGHTS_NAME).mkdir()
    return path


# name -> (makes it at a path and says what to upload, code)
PATHS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda p: p, "not-found"),
    "a zero byte": (lambda p: f"{p}\0x", "not-found"),
    "an empty folder": (_folder, "not-found"),
    "no config": (lambda p: _folder(p, save(tensors())), "not-found"),
    "no weights": (lambda p: _folder(p, None, config()), "not-found"),
    "weights are a link": (lambda p: _linked(p, WEIGHTS_NAME), "not-a-file"),
    "config is a link": (lambda p: _linked(p, CONFIG_NAME), "not-a-file"),
    "the folder is a link": (_link_to_folder, "not-a-file"),
    "a loop of links": (lambda p: p.symlink_to(p) or p, "not-a-file"),
    "weights are a pipe": (lambda p: _pipe(p, WEIGHTS_NAME), "not-a-file"),
    "config is a pipe": (lambda p: _pipe(p, CONFIG_NAME), "not-a-file"),
    "weights are a folder": (_folder_inside, "not-a-file"),
    "a device": (lambda _: "/dev/zero", "not-a-file"),
    "adapter_model.bin": (lambda p: _named(p, "adapter_model.bin"), "pickle"),
    "a .pt file": (lambda p: _named(p, "x.pt") / "x.pt", "pickle"),
    "a .PKL file": (lambda p: _named(p, "x.PKL") / "x.PKL", "pickle"),
    "a terabyte": (_sparse, "file-size"),
    "an object": (lambda _: {"weights": 1}, "content"),
    "a number": (lambda _: 3, "content"),
}
