"""`flexlora-fast simulate`: what the command line says and where, without a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flexlora_fast import cli_simulate, files
from flexlora_fast.cli import app
from flexlora_fast.simulate import pool
from flexlora_fast.simulate.watching import Terminal
from tests import made_runs
from tests.simulations import colours, document  # noqa: F401 - a fixture


def simulate(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_a_comparison_is_one_json_document_and_takes_no_options_of_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made_runs.make(tmp_path / name, method=name, rounds=2)
    both = ["--compare", tmp_path / "a", "--compare", tmp_path / "b"]
    code, out, _ = simulate(*both, "--out", tmp_path / "page.html", "--json")
    assert code == 0 and json.loads(out) == {"out": str(tmp_path / "page.html")}
    for options in (
        ["--resume"],
        ["--force"],
        ["--seed", 0],
        ["--workers", 0],
        ["--set", "rounds=2"],
        ["--method", "x"],
    ):
        code, _, said = simulate(*both, *options)
        assert code == 2 and f"leave {options[0]} out" in " ".join(said.replace("│", "").split())
    code, _, said = simulate(*both, "--out", tmp_path)
    assert code == 2 and "is a folder; give the page to write" in " ".join(said.replace("│", "").split())


@pytest.mark.usefixtures("colours")
def test_another_method_does_not_keep_the_label_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(document(method={"name": "flexlora", "label": "FlexLoRA"})))
    played: list[tuple[str | None, str]] = []
    monkeypatch.setattr(cli_simulate, "_run", lambda e, out, *_: played.append((e.method.label, out.name)))
    simulate(file)
    simulate(file, "--method", "flora")
    simulate(file, "--method", "flora", "--set", "method.label=Stacked")
    name = document()["name"]
    assert played == [
        ("FlexLoRA", f"{name}-FlexLoRA-0"),
        (None, f"{name}-flora-0"),
        ("Stacked", f"{name}-Stacked-0"),
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("piped", [True, False])
def test_rounds_go_into_a_pipe_even_where_bars_are_shown(piped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out, bars = io.StringIO() if piped else _Terminal(), _Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", bars)
    with Terminal() as watcher:
        watcher.print("round 1")
    assert ("round 1" in out.getvalue(), "round 1" in bars.getvalue()) == (piped, not piped)


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        (None, 2, ["0", "1"]),
        ("1", 1, ["1"]),
        ("-1", 0, []),
        ("0", 0, []),
        ("", 0, []),
        ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b"]),
    ],
)
def test_gpus_that_are_named_and_not_there_count_for_none(
    named: str | None, there: int, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(pool.torch.cuda, "device_count", lambda: there)
    assert pool.gpus() == found
    assert pool.default_workers() == (len(found) or pool.cores())


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def full(_: str) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as told:
        files.replace(tmp_path / "a.safetensors", full)
    assert told.value.filename == str(tmp_path / "a.safetensors") and not list(tmp_path.iterdir())
