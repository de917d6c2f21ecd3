"""Grids of simulated runs: what is in them, that they go on where they stopped, and what is written about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import grid as grids
from benchmarks.quality import picture, pooling, running, writing
from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import results, words
from tests import made_runs
from tests.simulations import colours, document  # noqa: F401 - a fixture

FILES = sorted(Path(grids.__file__).parent.glob("*.toml"))
GRID = """
title = "Made up"
about = "What is measured."
reference = "FlexLoRA"
seeds = [0, 1]

[[settings]]
name = "even"
change = { clients.alpha = 10.0 }

[[settings]]
name = "skewed"
note = "Few labels each."
change = { clients.alpha = 0.5 }

[[arms]]
name = "FedIT, smallest rank"
note = "A and B apart."
change = { method.name = "fedit", ranks.everyone = "smallest" }

[[arms]]
name = "FlexLoRA"
"""


def made_grid(folder: Path) -> Path:
    """A grid of 2 settings × 2 arms × 2 seeds of the made-up task, a round each: runs of a second."""
    file = folder / "made.toml"
    file.write_text(GRID + "\n[experiment]\n" + toml(document(rounds=1, evaluation__by_rank="last"), "experiment"))
    return file


def toml(table: dict, prefix: str) -> str:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items())
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    return text + "".join(f"[{prefix}.{key}]\n{toml(value, f'{prefix}.{key}')}" for key, value in inner.items())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_grids_here_make_sense(file):
    grid = grids.read(file)
    cells = grids.cells(grid, Path("out"))
    assert len(cells) == len(grid.settings) * len(grid.arms) * len(grid.seeds)
    assert len({cell.folder for cell in cells}) == len(cells)
    assert {cell.experiment.method.label for cell in cells} == {arm.name for arm in grid.arms}
    # Pairs are alike in all but the method: same clients, and who has which data.
    for one in cells:
        for other in cells[:1]:
            assert one.experiment.clients.number == other.experiment.clients.number
            assert one.experiment.training.steps == other.experiment.training.steps


@pytest.mark.usefixtures("colours")
def test_a_grid_runs_goes_on_and_is_written(tmp_path, capsys):
    file, out = made_grid(tmp_path), tmp_path / "runs"
    call = [str(file), "--out", str(out), "--workers", "0"]
    assert command.main([*call, "--only", "skewed/flexlora", "skewed/*/seed-1"]) == 0
    done = sorted(path.parent.relative_to(out).as_posix() for path in out.glob("*/*/*/summary.json"))
    assert done == ["skewed/fedit-smallest-rank/seed-1", "skewed/flexlora/seed-0", "skewed/flexlora/seed-1"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/metrics.jsonl")}
    (out / "skewed/flexlora/seed-0/summary.json").unlink()  # as if it had been stopped
    capsys.readouterr()
    call += ["--only", "skewed"]
    assert command.main(call) == 0
    told = capsys.readouterr().err
    assert "4 runs, 2 complete" in told and "[2/2]" in told
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert command.main([*call, "--list"]) == 0
    assert capsys.readouterr().out.count("complete ") == 4

    assert command.main([*call, "--write", "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results/made.md").read_text()
    assert "4 of 4 runs" in text and "## skewed" in text and "Few labels each." in text
    assert re.search(r"\| FedIT, smallest rank \| 2 \| [\d.]+ ± [\d.]+ \| [−+\d]", text)
    assert "--only '*/fedit-smallest-rank'" in text and "`ranks.everyone = smallest`" in text
    assert str(tmp_path) not in text.replace(str(file), "")
    for name in ("made.png", "made-skewed.png"):
        assert (tmp_path / "results" / name).stat().st_size > 1000
    assert "FedIT, smallest rank" in (out / "skewed.html").read_text()


@pytest.mark.usefixtures("colours")
def test_a_run_that_fails_is_told_and_stops_no_other(tmp_path, capsys, monkeypatch):
    cells = grids.cells(grids.read(made_grid(tmp_path)), tmp_path / "runs", seeds=[0])[:2]
    play_one = running.play_one

    def broken(cell):
        if cell.arm.name == "FlexLoRA":
            return play_one(cell)
        raise ValueError("no luck")

    monkeypatch.setattr(running, "play_one", broken)
    assert running.play(cells, 0) == ["even/fedit-smallest-rank/seed-0"]
    told = capsys.readouterr().err
    assert "failed: " in told and "no luck" in told and "[2/2] even/flexlora/seed-0: accuracy 0." in told


@pytest.mark.usefixtures("colours")
def test_figures_are_those_of_the_runs(tmp_path):
    grid = grids.read(made_grid(tmp_path))
    cells = grids.cells(grid, tmp_path / "runs", seeds=range(4))
    for cell in cells:
        gain = 0.5 if cell.arm.name == "FlexLoRA" else 0.3
        made_runs.make(cell.folder, method=cell.arm.name, seed=cell.seed, gain=gain, rounds=3)
        made_runs.write(cell.folder / "experiment.json", cell.experiment.to_dict())
    blocks = writing.collect(grid, cells)
    assert [row.arm.label for row in blocks[0].rows] == ["FlexLoRA", "FedIT, smallest rank"]
    assert blocks[0].rows[1].verdict == "worse"
    (found,) = pooling.together([block.rows for block in blocks], "test")
    pooled = found.difference
    assert (found.label, pooled.n, found.below, found.above) == ("FedIT, smallest rank", 4, 8, 0)
    assert found.permuted == pooled.permutation_p == pooled.least_p and found.t < 0.01
    gaps = []
    for setting in ("even", "skewed"):
        for seed in range(4):
            folder = tmp_path / "runs" / setting
            ours, theirs = (
                results.read(folder / arm / f"seed-{seed}").last().value for arm in ("fedit-smallest-rank", "flexlora")
            )
            gaps.append(ours - theirs)
    assert pooled.mean == pytest.approx(sum(gaps) / len(gaps))
    text = "\n".join(writing.lines(grid, tmp_path / "made.toml", cells, blocks))
    assert f"| {words.gap(pooled)} | 0 | 8 |" in text
    assert "even. Worse than FlexLoRA: FedIT, smallest rank (" in text
    assert "No method has a higher mean than FlexLoRA" in text
    assert (
        f"All settings together. Worse than FlexLoRA: FedIT, smallest rank ({words.gap(pooled)}, in 8 of 8 pairs of "
        f"setting and seed, p {words.p_value(found.t)})" in text
    )
    data = writing.plain(writing.data(grid, blocks))
    assert data["settings"]["even"][0]["runs"][0]["value"][-1] == results.read(cells[1].folder).last().value
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('reference = "FlexLoRA"', 'reference = "FedAvg"'), "reference 'FedAvg' is none of the arms"),
        (("seeds = [0, 1]", "seeds = []"), "seeds is"),
        (('name = "skewed"', 'name = "Even"'), "same name"),
        (("title =", "titel ="), "titel"),
        (("[[arms]]", "[[arms"), "not a TOML file"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(tmp_path, change, message):
    file = made_grid(tmp_path)
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(OptionError, match=message):
        grids.read(file)


@pytest.mark.usefixtures("colours")
def test_runs_of_a_grid_that_was_changed_are_replaced(tmp_path, capsys):
    file = made_grid(tmp_path)
    call = [str(file), "--out", str(tmp_path / "runs"), "--workers", "0", "--only", "even/flexlora/seed-0"]
    assert command.main(call) == 0
    file.write_text(file.read_text().replace("lr = 0.01", "lr = 0.02"))
    capsys.readouterr()
    assert command.main([*call, "--list"]) == 0 and capsys.readouterr().out.startswith("replaced")
    assert command.main([*call, "--write", "--results", str(tmp_path)]) == 1
    assert command.main(call) == 0
    assert "1 of an earlier grid" in capsys.readouterr().err
    assert results.read(tmp_path / "runs/even/flexlora/seed-0").experiment["training"]["lr"] == 0.02


@pytest.mark.usefixtures("colours")
def test_runs_that_are_not_there_are_named(tmp_path, capsys):
    file = made_grid(tmp_path)
    assert command.main([str(file), "--only", "odd"]) == 1
    assert "no run fits 'odd'; they are called like 'even/fedit-smallest-rank/seed-0'" in capsys.readouterr().err
    assert command.main([str(file), "--write", "--out", str(tmp_path / "none")]) == 1
    assert "run it first" in capsys.readouterr().err
    assert command.main([str(file), "--list", "--set", "rounds"]) == 1
    assert "not key=value" in capsys.readouterr().err


@pytest.mark.usefixtures("colours")
def test_a_grid_about_unseen_clients_goes_by_them_everywhere(tmp_path):
    """Tests say the opposite of what unseen clients say, in every run."""
    file = made_grid(tmp_path)
    file.write_text(file.read_text().replace('reference = "FlexLoRA"', 'reference = "FlexLoRA"\npart = "unseen"', 1))
    grid = grids.read(file)
    cells = grids.cells(grid, tmp_path / "runs", seeds=range(3))
    for cell in cells:
        good = cell.arm.name == "FlexLoRA"
        made_runs.make(cell.folder, method=cell.arm.name, seed=cell.seed, gain=0.1 if good else 0.7, rounds=2)
        made_runs.write(cell.folder / "experiment.json", cell.experiment.to_dict())
        rounds = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
        for line in rounds:
            line["unseen"] = line["test"] | {"value": (0.5 if good else 0.3) + 0.01 * cell.seed}
        (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    blocks = writing.collect(grid, cells)
    (found,) = pooling.together([block.rows for block in blocks], "unseen")
    assert found.difference.mean == pytest.approx(-0.2) and (found.above, found.below) == (0, 6)
    drawn = picture.finals([("even", blocks[0].rows)], "FlexLoRA", "unseen")
    dots = [value for line in drawn.axes[0].lines for value in line.get_xdata()]
    assert dots and min(dots) >= 25 and max(dots) <= 60
    writing.write(grid, file, cells, tmp_path / "results", tmp_path / "runs")
    assert "51.0" in (tmp_path / "runs/even.html").read_text()
