"""The commands that only look: `inspect`, `doctor`, `bench`, `--help` and `--version`."""

from __future__ import annotations

import json

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import bench, doctor
from flexlora_fast.errors import OptionError
from tests.command import LAYERS, M, N, adapter, run, three_clients


@pytest.fixture
def clients(tmp_path):
    return three_clients(tmp_path / "clients")


def test_inspect_an_adapter(clients):
    done = run("inspect", clients / "ben", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    loaded = ff.Adapter.load(clients / "ben")
    assert document["config"]["use_rslora"] is True and document["client"] == "ben"
    for row in document["layers"]:
        delta = loaded.delta(row["layer"]).double()
        S = torch.linalg.svdvals(delta)[:4]
        assert (row["m"], row["n"], row["rank"], row["scale"]) == (M, N, 4, 3.0)
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert row["spectrum"] == pytest.approx(S.tolist(), rel=1e-5)
        share = S / S.sum()
        assert row["effective_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-5)
    table = run("inspect", clients / "ben").stdout
    assert "use_rslora" in table and LAYERS[2] in table and "eff. rank" in table


def test_inspect_wide_and_with_extras(tmp_path):
    layers = [f"model.layers.{i}.fc" for i in range(60)]
    wide = adapter(2, 0, layers=layers)
    state = wide.state_dict() | {"base_model.model.head.weight": torch.ones(3, 2)}
    ff.Adapter.from_state_dict(state, wide.config | {"modules_to_save": ["head"]}).save(tmp_path / "wide")
    short, full = run("inspect", tmp_path / "wide").stdout, run("inspect", tmp_path / "wide", "--full").stdout
    assert "model.layers.*.fc" in short and len(short.splitlines()) < 40
    assert all(layer in full for layer in layers)
    assert "head.weight" in short and "3×2" in short


def test_inspect_a_global_update_and_a_round(clients, tmp_path):
    run("aggregate", clients, "--out", tmp_path / "out")
    file = run("inspect", tmp_path / "out" / "global_update.safetensors", "--json")
    folder = run("inspect", tmp_path / "out", "--json")
    assert file.exit_code == 0 and file.stdout == folder.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(file.stdout) == {key: value for key, value in report.items() if key != "adapters"}
    wrong = run("inspect", tmp_path / "out" / "report.md")
    assert wrong.exit_code == 1 and "cannot be read as a global update" in wrong.stderr
    assert run("inspect", tmp_path / "gone").exit_code == 2


def test_inspect_refuses_what_is_no_plain_lora(clients):
    config = json.loads((clients / "anna" / "adapter_config.json").read_text())
    (clients / "anna" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    done = run("inspect", clients / "anna")
    assert done.exit_code == 1 and "DoRA" in done.stderr


def test_doctor(monkeypatch):
    done = run("doctor", "--json")
    document = json.loads(done.stdout)
    assert {"python", "torch"} <= {check["name"] for check in document["checks"]}
    assert done.exit_code == (0 if document["healthy"] else 1)
    found = [
        doctor.Check("torch", "ok", "2.13"),
        doctor.Check("gpu", "absent", "no driver", "optional"),
        doctor.Check("extension", "broken", "wrong torch [abi]", "build it again"),
    ]
    monkeypatch.setattr(doctor, "checks", lambda: found)
    broken = run("doctor")
    assert broken.exit_code == 1
    assert "✗ broken" in broken.stdout and "build it again" in broken.stdout and "[abi]" in broken.stdout
    monkeypatch.setattr(doctor, "checks", lambda: found[:2])
    assert run("doctor").exit_code == 0


def test_bench():
    done = run("bench", "--shape", "40x30", "--ranks", "2,2,5", "--layers", 2, "--repeats", 1, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    ways = {entry["way"]: entry for entry in document["results"]}
    assert set(ways) == {"flexlora_fast", "dense float32", "dense float64"}
    assert ways["flexlora_fast"]["ratio"] == 1 and ways["dense float64"]["relative_error"] == 0
    assert all(entry["seconds"] > 0 for entry in ways.values())
    assert ways["flexlora_fast"]["relative_error"] < 1e-5 and ways["dense float32"]["relative_error"] < 1e-4
    assert ways["flexlora_fast"]["excess"] <= document["tol"]
    assert "time ratio" in run("bench", "--shape", "40x30", "--ranks", "2,5", "--repeats", 1).stdout
    for arguments in (["--shape", "40"], ["--shape", "0x3"], ["--ranks", "a"]):
        assert run("bench", *arguments).exit_code == 2
    with pytest.raises(OptionError):
        bench.compare(8, 8, [9])


def test_help_and_version():
    assert run("--version").stdout.strip() == ff.__version__
    for command in ("aggregate", "inspect", "doctor", "bench"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0
