"""``convert``: pickles of one's own become safetensors; what is no plain tensor is refused before it takes memory."""

from __future__ import annotations

import json
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.conversion import convert
from flexlora_fast.errors import AdapterError, OptionError
from tests import models, rounds
from tests.command import run
from tests.test_gate import assert_same_adapter

A = "base_model.model.h.0.up.lora_A.weight"


def pickled(path: Path, state: Any, name: str = "adapter_model.bin", c: rounds.Client | None = None) -> Path:
    path.mkdir(parents=True)
    torch.save(state, path / name)
    (path / "adapter_config.json").write_text(json.dumps((c or rounds.client()).config))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", ["linear", "mixed", "weird"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_what_was_pickled_is_the_adapter(name: str, model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    c = rounds.client("a", model, dtype=dtype)
    source = pickled(tmp_path / "old", c.state_dict(), name, c)
    before = sorted((x.name, x.read_bytes()) for x in source.iterdir())
    assert_same_adapter(convert(source, tmp_path / "deep" / "new"), c.adapter())
    assert_same_adapter(ff.Adapter.load(tmp_path / "deep" / "new"), c.adapter())
    assert sorted((x.name, x.read_bytes()) for x in source.iterdir()) == before


@pytest.mark.parametrize("kind", ["linear", "mixed"])
def test_what_peft_saved_without_safetensors(kind: str, tmp_path: Path) -> None:
    model = models.trained_adapter(1, 4, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "old", safe_serialization=False, save_embedding_layers=False)
    assert (tmp_path / "old" / "adapter_model.bin").is_file()
    assert_same_adapter(convert(tmp_path / "old", tmp_path / "new"), ff.Adapter.from_peft(model))
    torch.testing.assert_close(models.outputs(models.reload(tmp_path / "new")), models.outputs(model))


def test_the_protocol_of_old_versions_and_parameters(tmp_path: Path) -> None:
    """Before zip files (torch 1.5), and with ``nn.Parameter`` in the place of tensors, not contiguous."""
    c = rounds.client("a")
    state = {key: torch.nn.Parameter(tensor.mT.contiguous().mT) for key, tensor in c.state_dict().items()}
    source = pickled(tmp_path / "old", {})
    torch.save(state, source / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert_same_adapter(convert(source, tmp_path / "new"), c.adapter())


class _Runs:
    def __reduce__(self) -> Any:
        return open, ("/tmp/flexlora-convert-was-here", "w")


def _state(**change: Any) -> dict[Any, Any]:
    return rounds.client().state_dict() | {A: change["A"]}


def _aliased() -> dict[str, Any]:
    state = rounds.client().state_dict()
    return state | {A: state[A.replace("h.0", "h.1")]}


BAD: dict[str, tuple[Any, str]] = {
    "a list": (lambda: [1], "holds a list"),
    "nothing": (dict, "holds no tensor"),
    "a number": (lambda: _state(A=3), "is a int, not a tensor"),
    "a name of numbers": (lambda: rounds.client().state_dict() | {3: torch.ones(1)}, "is no name"),
    "terabytes of stride 0": (lambda: _state(A=torch.ones(2).as_strided((10**6, 10**6), (0, 0))), "claims 4,000,000,"),
    "meta": (lambda: _state(A=torch.empty(10**6, 10**6, device="meta")), "meta device"),
    "sparse": (lambda: _state(A=torch.eye(4).to_sparse()), "not dense"),
    "CSR": (lambda: _state(A=torch.eye(4).to_sparse_csr()), "not dense"),
    "quantized": (lambda: _state(A=torch.quantize_per_tensor(torch.ones(4, 12), 0.1, 0, torch.qint8)), "quantized"),
    "complex128": (lambda: _state(A=torch.ones(4, 12, dtype=torch.complex128)), "complex128"),
    "aliases": (_aliased, "shares its memory with"),
    "a pickle that runs": (lambda: _state(A=_Runs()), "not a file of plain tensors"),
    "other shapes": (lambda: _state(A=torch.ones(3, 12)), "rank"),
    "NaN in the name of a variant": (
        lambda: rounds.client().state_dict() | {A.replace("A.weight", "magnitude_vector"): torch.ones(29)},
        "DoRA",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "says"), BAD.values(), ids=BAD.keys())
def test_what_is_no_plain_tensor_is_refused(make: Any, says: str, tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", make())
    with pytest.raises(AdapterError) as caught:
        convert(source, tmp_path / "new")
    assert says in str(caught.value) and str(caught.value).isprintable()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["old"]
    assert not Path("/tmp/flexlora-convert-was-here").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"junk" * 100, pickle.dumps([1]), b"\x80\x02}"], ids=repr)
def test_a_file_that_is_no_pickle_of_torch(content: bytes, tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", {})
    (source / "adapter_model.bin").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        convert(source, tmp_path / "new")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["old"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_told_as_such(zipped: bool, tmp_path: Path) -> None:
    """A few bytes of the first thousand are others: the unpickler raises whatever comes."""
    source = pickled(tmp_path / "old", {})
    torch.save(rounds.client("a").state_dict(), source / "whole", _use_new_zipfile_serialization=zipped)
    whole, chance, causes = (source / "whole").read_bytes(), random.Random(0), set[type | None]()
    for i in range(300):
        bent = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            bent[chance.randrange(1000)] = chance.choice(b"()]}tRu.qrKJMNsabcde\x80\x85\x86\x87\x88\x94\xff")
        (source / "adapter_model.bin").write_bytes(bent)
        try:
            convert(source, tmp_path / str(i))
        except AdapterError as error:
            causes.add(type(error.__cause__))
    assert {x.name for x in tmp_path.iterdir()} <= {"old", *map(str, range(300))}
    assert {AssertionError, IndexError, TypeError} & causes


def test_which_folders_are_taken(tmp_path: Path) -> None:
    c = rounds.client("a")
    good = pickled(tmp_path / "good", c.state_dict())
    both = pickled(tmp_path / "both", c.state_dict())
    torch.save(c.state_dict(), both / "adapter_model.pt")
    safe = pickled(tmp_path / "safe", c.state_dict())
    (safe / "adapter_model.safetensors").touch()
    bare = pickled(tmp_path / "bare", c.state_dict())
    (bare / "adapter_config.json").unlink()
    (tmp_path / "empty").mkdir()
    for source, says in (
        (both, "adapter_model.bin and adapter_model.pt"),
        (safe, "safetensors"),
        (bare, "no adapter_c"),
    ):
        with pytest.raises(AdapterError, match=says):
            convert(source, tmp_path / "new")
    with pytest.raises(AdapterError, match="has no weights"):
        convert(tmp_path / "empty", tmp_path / "new")
    for target in (tmp_path / "empty", good / "adapter_model.bin"):
        with pytest.raises(OptionError, match="exists"):
            convert(good, target)


def test_the_command(tmp_path: Path) -> None:
    c = rounds.client("a")
    source = pickled(tmp_path / "old", c.state_dict())
    done = run("convert", source, tmp_path / "new")
    assert done.exit_code == 0 and "4 layers, 8 tensors" in done.output
    assert_same_adapter(ff.Adapter.load(tmp_path / "new"), c.adapter())
    again = run("convert", source, tmp_path / "new")
    assert again.exit_code == 2 and "exists" in again.output
    bad = run("convert", pickled(tmp_path / "bad", [1]), tmp_path / "other")
    assert bad.exit_code == 1 and "holds a list" in bad.output and not (tmp_path / "other").exists()
    assert "never a client's" in " ".join(run("convert", "--help").output.split())
