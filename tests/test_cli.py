"""`flexlora-fast aggregate`: what it writes, whom it refuses, what stops it, and its files of weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import inputs, outputs
from flexlora_fast.errors import WeightError
from flexlora_fast.inputs import Source
from tests.command import LAYERS, M, N, adapter, run, start, three_clients

WRITTEN = {"global_update.safetensors", "report.json", "report.md", "energy.png", "spectrum.png"}


@pytest.fixture
def clients(tmp_path):
    return three_clients(tmp_path / "clients")


def mean_update(folders, weights, layer):
    """Σ w·s·B·A in float64, weights normalised."""
    shares = [weight / sum(weights) for weight in weights]
    total = torch.zeros(M, N, dtype=torch.float64)
    for folder, share in zip(folders, shares, strict=True):
        loaded = ff.Adapter.load(folder)
        A, B = (X[0].double() for X in loaded.factors(layer))
        total += share * loaded.scale(layer) * B @ A
    return total


def assert_truncated(folder, total, layer, rank=None):
    """s'·B'·A' of the adapter in ``folder`` is the truncated SVD of ``total``."""
    loaded = ff.Adapter.load(folder)
    A, B = (X[0].double() for X in loaded.factors(layer))
    rank = loaded.rank(layer) if rank is None else rank
    assert loaded.rank(layer) == rank == A.shape[0]
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(loaded.scale(layer) * B @ A, best, rtol=0, atol=3e-6 * float(S[0]))


def no_leftovers(folder):
    return not [item.name for item in folder.iterdir() if item.name.startswith(".")]


# -- as users start it ---


def test_aggregate_as_a_program(clients, tmp_path):
    out = tmp_path / "out"
    done = start("aggregate", clients, "--out", out, "--weights", "1,2,3", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar in a pipe
    assert "3 layers, 3 clients" in done.stdout and "Traceback" not in done.stdout
    assert {item.name for item in out.iterdir()} == {*WRITTEN, "clients"}
    folders = [clients / name for name in ("anna", "ben", "carl")]
    for layer in LAYERS:
        total = mean_update(folders, [1, 2, 3], layer)
        for folder in folders:
            assert_truncated(out / "clients" / folder.name, total, layer, ff.Adapter.load(folder).rank(layer))
    assert ff.Adapter.load(out / "clients" / "ben").config["use_rslora"] is True
    report = json.loads((out / "report.json").read_text())
    assert [client["weight"] for client in report["clients"]] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert (out / "report.md").read_text().startswith("# Round")
    assert no_leftovers(tmp_path)


def test_json_is_all_there_is_on_stdout_and_errors_have_no_traceback(clients, tmp_path):
    adapter(4, 7, bad=True).save(clients / "dora")
    done = start("aggregate", clients, "--out", tmp_path / "out", "--ranks", "1,3", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(r["client"], "NaN" in r["reason"]) for r in document["refused"]] == [("dora", True)]
    failed = start("inspect", clients / "dora", "--json")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: client 'dora', layer 'model.layers.0.fc'")
    assert len(failed.stderr.splitlines()) == 1


# -- aggregate: what it writes ---


def test_ranks(clients, tmp_path):
    out = tmp_path / "deep" / "out"
    done = run("aggregate", clients, "--ranks", "8, 1,8", "--out", out, "--weights", "3,1,1", "--tol", 0)
    assert done.exit_code == 0, done.output
    assert {item.name for item in out.iterdir()} == {*WRITTEN, "rank-1", "rank-8"}
    folders = sorted(clients.iterdir())
    for layer in LAYERS:
        total = mean_update(folders, [3, 1, 1], layer)
        assert_truncated(out / "rank-1", total, layer, 1)
        assert_truncated(out / "rank-8", total, layer, 8)
    update = ff.GlobalUpdate.load(out / "global_update.safetensors")
    assert update[LAYERS[0]].rank == 8  # more than any client has, since it was asked for
    report = json.loads((out / "report.json").read_text())
    assert report["ranks"] == [1, 8]
    assert report["adapters"] == {"ranks": {"1": "rank-1", "8": "rank-8"}, "clients": {}}


def test_ranks_and_per_client_together(clients, tmp_path):
    out = tmp_path / "out"
    done = run("aggregate", clients, "--ranks", "3", "--per-client", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["ranks"] == [2, 3, 4]
    assert set(document["adapters"]["clients"]) == {"anna", "ben", "carl"}
    total = mean_update(sorted(clients.iterdir()), [1, 1, 1], LAYERS[1])
    assert_truncated(out / "rank-3", total, LAYERS[1], 3)
    assert_truncated(out / "clients" / "carl", total, LAYERS[1], 4)


def test_clients_of_the_same_config_share_one_file_that_others_may_read(clients, tmp_path):
    adapter(4, 3).save(clients / "dora")
    out = tmp_path / "out"
    assert run("aggregate", clients, "--out", out).exit_code == 0
    files = {name: (out / "clients" / name / "adapter_model.safetensors").stat() for name in ("ben", "carl", "dora")}
    assert files["carl"].st_ino == files["dora"].st_ino != files["ben"].st_ino
    config = (out / "clients" / "dora" / "adapter_config.json").read_text()
    assert config == (out / "clients" / "carl" / "adapter_config.json").read_text()
    mask = os.umask(0o022)
    os.umask(mask)
    for item in [out, *out.rglob("*")]:
        assert item.stat().st_mode & 0o777 == (0o777 if item.is_dir() else 0o666) & ~mask


def test_dtype_and_split(clients, tmp_path):
    adapter(3, 4, dtype=torch.bfloat16).save(clients / "half")
    run("aggregate", clients, "--out", tmp_path / "own")
    own = {name: ff.Adapter.load(tmp_path / "own" / "clients" / name) for name in ("anna", "half")}
    assert own["half"].factors(LAYERS[0])[0].dtype == torch.bfloat16
    assert own["anna"].factors(LAYERS[0])[0].dtype == torch.float32
    run("aggregate", clients, "--ranks", 2, "--dtype", "float16", "--split", "A", "--out", tmp_path / "half")
    A, B = ff.Adapter.load(tmp_path / "half" / "rank-2").factors(LAYERS[0])
    assert A.dtype == torch.float16
    torch.testing.assert_close(B[0].float().T @ B[0].float(), torch.eye(2), atol=2e-3, rtol=0)


def test_missing_layers(tmp_path):
    adapter(2, 0).save(tmp_path / "in" / "a")
    adapter(2, 1, layers=LAYERS[:2]).save(tmp_path / "in" / "b")
    for missing, factor in (("zero", 0.5), ("renormalize", 1.0)):
        done = run("aggregate", tmp_path / "in", "--out", tmp_path / missing, "--missing", missing)
        assert done.exit_code == 0, done.output
        delta = ff.Adapter.load(tmp_path / missing / "clients" / "a").delta(LAYERS[2])
        expected = factor * ff.Adapter.load(tmp_path / "in" / "a").delta(LAYERS[2])
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=0)


def test_names_of_folders_with_the_same_name(tmp_path):
    folders = [tmp_path / who / "adapter" for who in ("anna", "ben")] + [tmp_path / "x y" / "adapter.", tmp_path / "AD"]
    for seed, folder in enumerate(folders):
        adapter(seed + 1, seed).save(folder)
    out = tmp_path / "out"
    done = run("aggregate", *folders, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)["adapters"]["clients"]
    assert written == {
        "AD": "clients/AD",
        "adapter.": "clients/adapter",
        "anna/adapter": "clients/anna-adapter",
        "ben/adapter": "clients/ben-adapter",
    }
    ranks = [ff.Adapter.load(out / path).rank(LAYERS[0]) for path in written.values()]
    assert ranks == [4, 3, 1, 2]


def test_the_result_does_not_depend_on_the_order_of_folders(clients, tmp_path):
    names = sorted(clients.iterdir())
    run("aggregate", *names, "--weights", "1,2,3", "--ranks", 2, "--out", tmp_path / "a")
    run("aggregate", *reversed(names), "--weights", "3,2,1", "--ranks", 2, "--out", tmp_path / "b")
    one, two = ((tmp_path / x / "rank-2" / "adapter_model.safetensors").read_bytes() for x in "ab")
    assert one == two


# -- aggregate: who is refused, what stops it ---


def test_bad_clients_are_refused_and_the_round_goes_on(clients, tmp_path):
    adapter(4, 7, bad=True).save(clients / "nan")
    (clients / "corrupt").mkdir()
    (clients / "corrupt" / "adapter_config.json").write_text("{}")
    (clients / "corrupt" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    (clients / "logs").mkdir()
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    done = run("aggregate", clients, tmp_path / "empty", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert "passed over" in done.stderr and "logs" in done.stderr
    document = json.loads(done.stdout)
    assert [client["name"] for client in document["clients"]] == ["anna", "ben", "carl"]
    assert [refusal["client"] for refusal in document["refused"]] == ["corrupt", "empty", "nan"]
    total = mean_update([clients / name for name in ("anna", "ben", "carl")], [1, 1, 1], LAYERS[0])
    assert_truncated(out / "clients" / "carl", total, LAYERS[0], 4)
    table = run("aggregate", clients, "--out", out, "--force")
    assert table.exit_code == 0 and "Refused" in table.stdout and "NaN" in table.stdout

    strict = run("aggregate", clients, "--out", tmp_path / "strict", "--strict")
    assert strict.exit_code == 1 and strict.stdout == ""
    assert "corrupt" in strict.stderr and "nothing was written" in strict.stderr
    assert not (tmp_path / "strict").exists() and no_leftovers(tmp_path)


def test_no_client_left(tmp_path):
    adapter(4, 7, bad=True).save(tmp_path / "nan")
    done = run("aggregate", tmp_path / "nan", "--out", tmp_path / "out")
    assert done.exit_code == 1 and "no client is left" in done.stderr and "NaN" in done.stderr
    assert not (tmp_path / "out").exists()


def test_weight_zero_is_absent(clients, tmp_path):
    done = run("aggregate", clients, "--weights", "1,0,1", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0 and "weight 0" in done.stderr and "ben" in done.stderr
    assert set(json.loads(done.stdout)["adapters"]["clients"]) == {"anna", "carl"}
    nothing = run("aggregate", clients, "--weights", "0,0,0", "--out", tmp_path / "none")
    assert nothing.exit_code == 1 and "must sum to > 0" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,2"], "2 weights for 3 clients; give one for each, in the order anna, ben, carl"),
        (["--weights", "1,2,x"], "item 3 is 'x', not a number"),
        (["--weights", "no-such.json"], "cannot be read"),
        (["--ranks", "4,0"], "--ranks has '0'"),
        (["--ranks", "4,-1"], "--ranks has '-1'"),
        (["--ranks", ""], "--ranks has ''"),
        (["--method", "magic"], "not one of flexlora"),
        (["--solver", "magic"], "not one of auto"),
        (["--split", "C"], "one of B, balanced, A"),
        (["--dtype", "int8"], "one of keep"),
        (["--missing", "guess"], "one of zero"),
        (["--tol", "-1"], "≥ 0"),
        (["--rank", "0"], "rank"),
    ],
)
def test_wrong_calls_exit_with_2(clients, tmp_path, arguments, message):
    done = run("aggregate", clients, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["clients"]


def test_folders_that_are_none(clients, tmp_path):
    gone = run("aggregate", clients, tmp_path / "gone", "--out", tmp_path / "out")
    assert gone.exit_code == 2 and "does not exist" in gone.stderr
    twice = run("aggregate", clients, clients / "ben", "--out", tmp_path / "out")
    assert twice.exit_code == 2 and "is given 2 times" in twice.stderr


def test_failures_while_writing_leave_nothing(clients, tmp_path, monkeypatch):
    too_high = run("aggregate", clients, "--rank", 2, "--out", tmp_path / "out")
    assert too_high.exit_code == 1 and "aggregate again with rank=4" in too_high.stderr

    def full(*_):
        raise OSError(28, "No space left on device")

    assert run("aggregate", clients, "--out", tmp_path / "out").exit_code == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    monkeypatch.setattr(outputs.Report, "plot_spectrum", full)
    failed = run("aggregate", clients, "--out", tmp_path / "out", "--force", "--weights", "1,2,3")
    assert failed.exit_code == 1 and "No space left" in failed.stderr
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["clients", "out"]


def test_out_is_protected(clients, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert run("aggregate", clients, "--out", out, "--ranks", 1).exit_code == 0  # empty folders are fine
    again = run("aggregate", clients, "--out", out)
    assert again.exit_code == 2 and "--force replaces it" in again.stderr
    assert not (out / "clients").exists()
    assert run("aggregate", clients, "--out", out, "--force").exit_code == 0
    assert {item.name for item in out.iterdir()} == {*WRITTEN, "clients"}

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "final.tex").write_text("years of work")
    for arguments in ([other], [tmp_path, "--force"], [clients / "anna", "--force"], [clients, "--force"]):
        refused = run("aggregate", clients, "--out", *arguments)
        assert refused.exit_code == 2
    forced = run("aggregate", clients, "--out", other, "--force")
    assert forced.exit_code == 2 and "replaces only folders with" in " ".join(forced.stderr.split())
    assert (other / "final.tex").read_text() == "years of work"
    assert run("aggregate", clients, "--out", other / "final.tex").exit_code == 2


# -- weights files, names ---


def sources(tmp_path, *paths):
    for path in paths:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    found = [tmp_path / path for path in paths]
    return [Source(path, name) for path, name in zip(found, inputs.distinct_names(found), strict=True)]


def test_weights_files(tmp_path, monkeypatch):
    given = sources(tmp_path, "in/anna", "in/ben", "in/carl")
    table = tmp_path / "weights.json"
    table.write_text(json.dumps({"ben": 2, "anna": 1.5, str(tmp_path / "in" / "carl"): 3, "zoe": 9}))
    assert inputs.read_weights(str(table), given) == ([1.5, 2, 3], ["zoe"])
    rows = tmp_path / "weights.csv"
    rows.write_text("\ufeffclient,examples\nanna,1\n\nin/ben, 2\n./in/carl/,3e0\n", encoding="utf-8")
    assert inputs.read_weights(str(rows), given) == ([1, 2, 3], [])
    monkeypatch.chdir(tmp_path / "in")
    rows.write_text("anna,1\n./ben,2\n../in/carl,3")
    assert inputs.read_weights("../weights.csv", given) == ([1, 2, 3], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.json", "{", "is not JSON"),
        ("w.json", "[1, 2]", "holds a list"),
        ("w.json", '{"a/x": true, "b/x": 1}', "is True, not a number"),
        ("w.json", '{"a/x": 1}', "has no weight for 'b/x'"),
        ("w.json", '{"x": 1, "b/x": 1}', "'x' could be 'a/x' or 'b/x'"),
        ("w.csv", "a/x,1\nb/x,many\n", "line 2 is 'many'"),
        ("w.csv", "a/x,1,2\n", "line 1 has 3 columns"),
        ("w.csv", "a/x,1\na/x,1\nb/x,1\n", "a weight twice"),
    ],
)
def test_weights_files_that_are_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightError) as error:
        inputs.read_weights(str(tmp_path / name), sources(tmp_path, "a/x", "b/x"))
    assert message in str(error.value)


def test_a_weights_file_on_the_command_line(clients, tmp_path):
    (tmp_path / "weights.json").write_text('{"carl": 3, "anna": 1, "ben": NaN, "zoe": 1}')
    out = tmp_path / "out"
    done = run("aggregate", clients, "--out", out, "--weights", tmp_path / "weights.json", "--json")
    assert done.exit_code == 0 and "zoe" in done.stderr
    document = json.loads(done.stdout)
    assert [(c["name"], c["weight"]) for c in document["clients"]] == [("anna", 0.25), ("carl", 0.75)]
    assert "weight is nan" in document["refused"][0]["reason"]


def test_names():
    assert inputs.distinct_names([Path("/a/b"), Path("/x/a/b"), Path("/x/c/b")]) == ["a/b", "x/a/b", "c/b"]
    assert inputs.distinct_names([Path("/a/../b/")]) == ["b"]
    assert inputs.distinct_names([Path("/")]) == ["root"]
    safe = inputs.folder_names(["..", "a/b", "a b", "A-B", "x" * 400, "x" * 400 + "y", "\x1b[2J", "日本"])
    assert list(safe.values())[:4] == ["client", "a-b", "a-b-2", "A-B-3"]
    assert len({name.casefold() for name in safe.values()}) == len(safe)
    assert all(len(name.encode()) < 255 and not set(name) & set("/\x1b") for name in safe.values())
    assert safe["日本"] == "日本"


# -- against hostile clients ---


def test_a_defence_is_asked_for_and_reported(clients, tmp_path):
    loaded = ff.Adapter.load(clients / "ben").state_dict()
    config = ff.Adapter.load(clients / "ben").config
    hostile = {key: 100 * value if "lora_B" in key else value for key, value in loaded.items()}
    ff.Adapter.from_state_dict(hostile, config).save(clients / "zed")
    done = run("aggregate", clients, "--out", tmp_path / "out", "--defence", "clip:zeroing=20")
    assert done.exit_code == 0, done.output
    assert "defence clip:zeroing=20" in done.output and "rejected" in done.output
    verdicts = {v["client"]: v for v in json.loads((tmp_path / "out" / "report.json").read_text())["verdicts"]}
    assert verdicts["zed"]["status"] == "rejected" and verdicts["zed"]["share"] == 0
    assert "Defence clip" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "clients" / "zed").is_dir()  # it may train on, from what the others agree on


@pytest.mark.parametrize(
    ("rule", "message"), [("kram", "is not one of clip"), ("krum:byzantine=x", "byzantine is 'x'")]
)
def test_a_wrong_defence_is_a_wrong_call(clients, tmp_path, rule, message):
    done = run("aggregate", clients, "--out", tmp_path / "out", "--defence", rule)
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
