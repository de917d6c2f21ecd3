"""Reports: numbers against dense float64, tables that fit, JSON that parses, images that show something."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import flexlora_fast as ff
from flexlora_fast import tables
from flexlora_fast.report import Report, effective_rank, energy_curve, grouped
from flexlora_fast.tables import natural, spread
from tests import rounds


def client(layers, rank, seed, *, m=9, n=13, scale=0.3, name=None):
    """An adapter of random factors; ``rank`` is one number, or one by layer."""
    generator = torch.Generator().manual_seed(seed)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(layers, rank)
    state = {}
    for layer in layers:
        state[f"base_model.model.{layer}.lora_A.weight"] = scale * torch.randn(ranks[layer], n, generator=generator)
        state[f"base_model.model.{layer}.lora_B.weight"] = scale * torch.randn(m, ranks[layer], generator=generator)
    r = max(ranks.values())
    config = {"r": r, "lora_alpha": 2 * r, "rank_pattern": {k: v for k, v in ranks.items() if v != r}}
    return ff.Adapter.from_state_dict(state, config, name)


def moe_client(rank, seed, experts=3, m=7, n=12):
    generator = torch.Generator().manual_seed(seed)
    state = {
        "base_model.model.experts.lora_A.weight": torch.randn(experts * rank, n, generator=generator),
        "base_model.model.experts.lora_B.weight": torch.randn(m, rank * experts, generator=generator),
    }
    config = {"r": rank, "lora_alpha": 4, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    return ff.Adapter.from_state_dict(state, config)


def decoder(blocks):
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    return [f"model.layers.{i}.{part}" for i in range(blocks) for part in parts]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def assert_plotted(report: Report, folder: Path) -> None:
    for name, draw in (("energy.png", report.plot_energy), ("spectrum.png", report.plot_spectrum)):
        path = draw(folder / name)
        assert path == folder / name
        image = pixels(path)
        assert min(image.shape[:2]) >= 500
        assert len(np.unique((255 * image[..., :3]).astype(int) @ [1 << 16, 1 << 8, 1])) > 50  # antialiased text
    assert sorted(item.name for item in folder.iterdir()) == ["energy.png", "spectrum.png"]


def assert_json(report: Report) -> dict:
    document = report.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return document


def test_rows_against_dense_float64():
    adapters = [client(["a.fc", "b.fc"], 2, 0), client(["a.fc", "b.fc"], 5, 1)]
    report = ff.aggregate(adapters, weights=[1, 3]).report()
    assert [row["layer"] for row in report.rows] == ["a.fc", "b.fc"]
    assert report.ranks == [2, 5]
    for row in report.rows:
        total = 0.25 * adapters[0].delta(row["layer"]).double() + 0.75 * adapters[1].delta(row["layer"]).double()
        S = torch.linalg.svdvals(total)
        assert (row["kind"], row["m"], row["n"], row["clients"]) == ("linear", 9, 13, 2)
        assert (row["clients_rank_total"], row["kept_rank"]) == (7, 5)
        assert row["norm"] == pytest.approx(float(total.norm()), rel=1e-6)
        assert row["stable_rank"] == pytest.approx(float((total.norm() / S[0]) ** 2), rel=1e-5)
        assert row["effective_rank"] is None  # two of seven directions were cut off
        for rank in (2, 5):
            lost = float(S[rank:].square().sum())
            assert row["error"][rank] == pytest.approx(lost**0.5, rel=1e-4)
            assert row["energy_kept"][rank] == pytest.approx(1 - lost / float(S.square().sum()), abs=1e-6)
    energies = [row["norm"] ** 2 for row in report.rows]
    kept = sum(row["norm"] ** 2 * row["energy_kept"][2] for row in report.rows) / sum(energies)
    assert report.total["energy_kept"][2] == pytest.approx(kept)
    assert report.total["norm"] == pytest.approx(math.sqrt(sum(energies)))


def test_ranks_beyond_what_is_kept_are_none_and_print_as_a_dash():
    layers = ["wide", "narrow"]
    a = client(layers, {"wide": 8, "narrow": 2}, 0)
    b = client(layers, {"wide": 4, "narrow": 2}, 1)
    report = ff.aggregate([a, b]).report()
    rows = {row["layer"]: row for row in report.rows}
    assert report.ranks == [2, 4, 8]
    assert rows["narrow"]["kept_rank"] == 2
    assert rows["narrow"]["error"][4] is None and rows["narrow"]["energy_kept"][8] is None
    assert rows["wide"]["error"][8] is not None
    assert report.total["energy_kept"][8] is None
    assert "–" in str(report)
    assert_json(report)


def test_a_complete_update_answers_for_any_rank():
    report = Report(ff.aggregate([client(["fc"], 3, 0)]), ranks=[1, 3, 100])
    (row,) = report.rows
    assert row["energy_kept"][3] == pytest.approx(1) and row["energy_kept"][100] == pytest.approx(1)
    assert row["error"][100] == pytest.approx(0, abs=1e-6 * row["norm"])
    assert 1 <= row["effective_rank"] <= 3


def test_energy_curve_is_energy_kept_for_every_method():
    for method in ff.methods.METHODS:
        clients = rounds.fitted(
            method, [rounds.client(f"c{i}", [rounds.Layer("fc", 9, 13)], rank=r) for i, r in enumerate((2, 6))]
        )
        layer = ff.aggregate([c.adapter() for c in clients], method=method)["fc"]
        curve = energy_curve(layer)
        assert curve.shape == (layer.rank + 1,)
        for rank in range(layer.rank + 1):
            assert float(curve[rank]) == pytest.approx(layer.energy_kept(rank), abs=1e-9)


def test_effective_rank():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.tensor([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx(1.5)  # mean over experts
    assert effective_rank(torch.zeros(2, 0)) == 0


@pytest.mark.parametrize("method", ["fedit", "hetlora"])
def test_averaged_methods(method, tmp_path):
    report = ff.aggregate([client(["fc"], 2, 0), client(["fc"], 6, 1)], method=method).report()
    assert all(math.isfinite(share) for share in report.rows[0]["energy_kept"].values())
    assert report.rows[0]["energy_kept"][6] == pytest.approx(1)
    assert assert_json(report)["method"] == method
    assert_plotted(report, tmp_path)


def test_moe(tmp_path):
    adapters = [moe_client(2, 0), moe_client(3, 1)]
    report = ff.aggregate(adapters).report()
    (row,) = report.rows
    assert (row["kind"], row["experts"], row["m"], row["n"]) == ("moe", 3, 7, 12)
    total = (adapters[0].delta("experts").double() + adapters[1].delta("experts").double()) / 2
    S = torch.linalg.svdvals(total)
    assert row["error"][2] == pytest.approx(float(S[:, 2:].square().sum().sqrt()), rel=1e-4)
    stable = (S.square().sum(dim=1) / S[:, 0] ** 2).mean()
    assert row["stable_rank"] == pytest.approx(float(stable), rel=1e-5)
    assert "3×7×12" in str(report)
    assert_json(report)
    assert_plotted(report, tmp_path)


def test_all_zero_updates(tmp_path):
    zero = client(["a", "b"], 3, 0, scale=0.0)
    report = ff.aggregate([zero]).report()
    assert [row["norm"] for row in report.rows] == [0, 0]
    assert all(row["energy_kept"] == {3: 1.0} and row["error"] == {3: 0.0} for row in report.rows)
    assert report.total == {"norm": 0.0, "energy_kept": {3: 1.0}}
    assert_json(report)
    report.plot_energy(tmp_path / "energy.png")
    assert len(np.unique(pixels(report.plot_spectrum(tmp_path / "spectrum.png")))) > 10  # says so in words


def test_wide_rounds_are_summarised_and_full_lists_all(tmp_path):
    layers = decoder(60)  # 300
    report = ff.aggregate([client(layers, 2, 0, scale=0.1), client(layers, 4, 1)]).report()
    text = str(report)
    assert len(text.splitlines()) < 60
    assert "model.layers.*.self_attn.q_proj" in text
    assert text.index("model.layers.*.mlp.down_proj") < text.index("The 8 layers that keep least, of 300")
    worst = min(report.rows, key=lambda row: row["energy_kept"][2])["layer"]
    assert worst in text
    full = tables.plain(report.view(full=True))
    assert all(layer in full for layer in layers)
    assert full.index("model.layers.2.mlp") < full.index("model.layers.10.mlp")
    document = report.markdown()
    assert all(layer in document for layer in layers)
    assert max(map(len, text.splitlines())) <= 160
    assert_plotted(report, tmp_path)
    assert pixels(tmp_path / "energy.png").shape[0] < 2500  # still one screen, however many layers


def test_one_layer_few_layers_and_long_odd_names(tmp_path):
    assert_plotted(ff.aggregate([client(["fc"], 1, 0)]).report(), tmp_path / "one")
    names = ["very.long." * 12 + "name", "money$tex$_^", "umlaut.ü", "esc\x1b[2J[red]", "a|b"]
    report = ff.aggregate([client(names, 3, 0, name="evil\x1b]0;title\x07[bold]")]).report()
    text = str(report)
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[2J[red]" in text and "[bold]" in text
    assert "a\\|b" in report.markdown()
    assert_plotted(report, tmp_path / "odd")


def test_tables_are_markdown_tables():
    report = ff.aggregate([client(["a.fc", "b.fc"], 2, 0)]).report()
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines[:4]} == {7}
    assert set(lines[1]) <= set("|-: ")


def test_rich_prints_it():
    report = ff.aggregate([client(["a.fc"], 2, 0)]).report()
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "a.fc" in console.export_text()


def test_refused_clients_are_shown_with_their_reason():
    round_ = ff.Aggregator()
    round_.add(client(["fc"], 2, 0), client="good")
    with pytest.raises(ff.errors.WeightError):
        round_.add(client(["fc"], 2, 1), weight=-1, client="bad")
    report = round_.finish().report()
    assert "1 client (1 refused)" in str(report)
    assert "weight is -1" in str(report)
    assert "weight is -1" in report.markdown()
    assert [entry["client"] for entry in report.to_dict()["refused"]] == ["bad"]
    assert [entry["name"] for entry in report.to_dict()["clients"]] == ["good"]


def test_a_loaded_update_reports_the_same(tmp_path):
    update = ff.aggregate([client(["a.fc", "b.fc"], 2, 0), client(["a.fc", "b.fc"], 4, 1)])
    again = ff.GlobalUpdate.load(update.save(tmp_path / "update.safetensors"))
    assert again.report().to_dict() == update.report().to_dict()
    assert str(again.report()) == str(update.report())


def test_non_finite_numbers_never_reach_json():
    update = ff.aggregate([client(["fc"], 2, 0)])
    update.seconds["odd"] = float("nan")
    assert assert_json(update.report())["seconds"]["odd"] is None


def test_groups_by_module_or_by_shape():
    rows = [{"layer": layer, "kind": "linear", "m": 2, "n": 3} for layer in decoder(10)]
    assert [len(group) for group in grouped(rows).values()] == [10] * 5
    unique = [{"layer": f"block{i}x.fc", "kind": "linear", "m": 2, "n": 3} for i in range(100)]
    assert list(grouped(unique)) == ["linear 2×3"]


def test_small_helpers():
    assert sorted(["l.10", "l.2", "l.x", "l"], key=natural) == ["l", "l.2", "l.10", "l.x"]
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(100)), 3)[0] == 0 and spread(list(range(100)), 3)[-1] == 99


def test_importing_the_package_stays_light():
    code = "import sys, flexlora_fast; print([m for m in ('rich', 'typer', 'matplotlib', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
