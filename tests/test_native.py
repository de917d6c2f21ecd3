"""What is said of the compiled extension when it is missing, broken or of another torch."""

from __future__ import annotations

import json

import pytest
import torch

from flexlora_fast import _native


def write(tmp_path, **info):
    path = tmp_path / "_build_info.json"
    path.write_text(json.dumps(info))
    return path


def test_a_failed_build_is_reported_with_its_reason(tmp_path):
    missing = _native.load(_native.build_info(write(tmp_path, built=False, reason="no compiler", torch="2.13.0")))
    assert missing == _native.Missing("it was not built: no compiler", broken=False)


def test_an_extension_of_another_torch_is_not_loaded(tmp_path):
    missing = _native.load(_native.build_info(write(tmp_path, built=True, reason=None, torch="2.4.1+cpu")))
    assert missing.broken
    assert "built for torch 2.4.1" in missing.reason and torch.__version__.partition("+")[0] in missing.reason
    assert "pip install --no-build-isolation" in missing.reason


@pytest.mark.parametrize(
    ("error", "info", "broken", "words"),
    [
        (ModuleNotFoundError("no _C"), {"built": True}, True, "its file is gone"),
        (ModuleNotFoundError("no _C"), {}, False, "never built"),
        (ImportError("undefined symbol: x"), {"built": True}, True, "does not load: undefined symbol: x"),
    ],
)
def test_an_extension_that_does_not_load_is_reported(monkeypatch, error, info, broken, words):
    def fail(name):
        assert name == "flexlora_fast._C"
        raise error

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    missing = _native.load(info)
    assert missing.broken == broken and words in missing.reason


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_unreadable_build_info_counts_as_none(tmp_path, content):
    path = tmp_path / "_build_info.json"
    path.write_text(content)
    assert _native.build_info(path) == {}
    assert _native.build_info(tmp_path / "absent.json") == {}
