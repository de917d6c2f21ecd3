"""The report: what it says of one run and of several, that it needs nothing else, and what damaged folders do."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from flexlora_fast import memory
from flexlora_fast.errors import OptionError, ResultsError
from flexlora_fast.simulate import charts, comparison, page, results, svg, words
from tests import made_runs

HOSTILE = "<script>alert(1)</script>\x1b[2J $x^2$"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask of a page, and checks that elements are closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[key] for key in ("src", "href", "xlink:href", "action") if given.get(key)]
        self.labels += [given.get("aria-label", "")] if tag == "svg" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def written(folders, tmp_path, **options) -> tuple[str, Page]:
    text = page.write(folders, tmp_path / "page.html", **options).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[str, Page, results.Run]:
    """The page of one run, in which a client's name is hostile."""
    folder = tmp_path_factory.mktemp("one")
    run = made_runs.make(folder / "run", name="questions", rounds=3)
    people = json.loads((run / "clients.json").read_text())
    people[0]["name"] = HOSTILE
    made_runs.write(run / "clients.json", people)
    return *written([run], folder), results.read(run)


def test_one_run_is_told_with_its_limits(one):
    _, found, run = one
    last = run.last()
    assert last is not None and last.stderr is not None
    assert f"{words.share(last.value)} ± {words.share(last.stderr)}" in found.text
    assert "One seed is one split" in found.text and "proves little" in found.text
    for title in ("Accuracy by round", "Loss by round", "Energy kept by rank", "Effective rank", "Spectrum", "Seconds"):
        assert any(label.startswith(title) for label in found.labels), title
    assert "client-8" in found.text and "abbreviation" in found.text and "training.lr" in found.text
    assert "Comparison" not in found.text


def test_it_needs_nothing_else_and_follows_the_readers_colours(one):
    text, found, _ = one
    assert all(address.startswith("#") for address in found.addresses)
    assert {address[1:] for address in found.addresses} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    # Marks that figures are drawn with have all become variables of the page.
    assert "var(--s0)" in text and "#0a0" not in text


def test_what_clients_are_called_cannot_write_into_the_page(one):
    text, found, _ = one
    assert text.count("<script>") == 1 and "\x1b" not in text
    assert "alert(1)" in found.text
    assert "‖ΔW‖_F is 1e9 <b>" in found.text  # why a client was refused


def test_methods_are_compared_with_flexlora_over_seeds(tmp_path):
    folders = [
        made_runs.make(tmp_path / f"{method}-{seed}", method=method, seed=seed, gain=gain, rounds=3)
        for method, gain in (("fedit", 0.3), ("flexlora", 0.5), ("hetlora", 0.495))
        for seed in range(5)
    ]
    _, found = written(folders, tmp_path)
    arms = comparison.arms([results.read(folder) for folder in folders])
    assert [arm.label for arm in arms] == ["fedit", "flexlora", "hetlora"]
    rows = {row.arm.label: row for row in comparison.compare(arms)}
    assert rows["flexlora"].verdict == "reference"
    assert rows["fedit"].verdict == "worse" and rows["fedit"].difference.n == 5
    assert rows["fedit"].t_holm >= rows["fedit"].difference.t_p
    assert rows["hetlora"].verdict == "undecided"
    assert "Worse than flexlora: fedit (" in found.text
    assert "Not told from flexlora by these runs: hetlora (" in found.text
    assert "its corrected p cannot be below 0.125" in found.text
    assert words.gap(rows["fedit"].difference) in found.text
    assert "method.name" in found.text  # what differs between them


def test_one_seed_is_compared_over_the_rows_and_decides_nothing(tmp_path):
    gains = {"flexlora": 0.5, "fedit": 0.2}
    found = comparison.arms(
        [results.read(made_runs.make(tmp_path / method, method=method, gain=gain)) for method, gain in gains.items()]
    )
    rows = comparison.compare(found)
    assert rows[1].over == "rows" and rows[1].difference.n == 200 and rows[1].verdict == "undecided"
    (told,) = words.findings(rows)
    assert "200 rows of the test, paired" in told
    assert "proves little" in words.caveat(found, rows)


def test_many_methods_get_panels_of_their_own(tmp_path):
    runs = [
        results.read(made_runs.make(tmp_path / f"{i}-{seed}", method=f"method {i}", seed=seed, rounds=3))
        for i in range(7)
        for seed in (0, 1)
    ]
    found = comparison.arms(runs)
    for figure in (charts.score(found, svg.PRINT), charts.loss(found, svg.PRINT), charts.by_rank(found, svg.PRINT)):
        assert figure is not None
        assert [axes.get_title(loc="left") for axes in figure.axes] == [f"method {i}" for i in range(1, 7)]
        assert all(len(axes.lines) >= 2 for axes in figure.axes)
    together = charts.score(found[:3], svg.PRINT)
    assert len(together.axes) == 1 and len(together.axes[0].collections) == 3  # bands


def test_a_run_that_goes_on_is_told_as_far_as_it_is(tmp_path):
    run = made_runs.make(tmp_path / "run", finished=False, labels=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "test"')  # being written
    read = results.read(run)
    assert not read.finished and read.rounds[-1].round == 4
    _, found = written([run], tmp_path)
    assert "has ended 4 of 6 rounds" in found.text
    # These clients have no labels.
    assert "3 categories of clients" in found.text and "kind 2" in found.text
    assert "How the labels are spread" not in found.text


def test_a_run_before_its_first_round_has_a_page(tmp_path):
    run = made_runs.make(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").unlink()
    assert "has ended 0 of 6 rounds" in written([run], tmp_path)[1].text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"round": 0}\n{"round": 1\n', "line 2: no JSON"),
        ("metrics.jsonl", '{"round": 1}\n{"round": 1}\n', "line 2: round 1 after round 1"),
        ("metrics.jsonl", '{"round": "one"}\n', "line 1: round is 'one'"),
        ("metrics.jsonl", '{"round": 1, "test": {"metric": "accuracy"}}\n', "line 1: test.value"),
        ("clients.json", '[{"name": "a"}]', "0.train"),
        ("clients.json", "[", "no JSON"),
        ("summary.json", "[]", "summary.json"),
        ("scores.npz", "PK", "cannot be read"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, file, content, message):
    run = made_runs.make(tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(ResultsError, match=re.escape(message)):
        results.read(run)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ResultsError, match=r"has no experiment\.json"):
        page.write([tmp_path], tmp_path / "page.html")
    with pytest.raises(OptionError, match="at least one"):
        page.write([], tmp_path / "page.html")


def test_one_experiment_with_one_seed_cannot_be_there_twice(tmp_path):
    folders = [made_runs.make(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(ResultsError, match="same experiment with the same seed 0"):
        page.write(folders, tmp_path / "page.html")


def test_an_unknown_reference_is_refused(tmp_path):
    with pytest.raises(OptionError, match="'fedavg' to compare with; there are made"):
        page.write([made_runs.make(tmp_path / "run")], tmp_path / "page.html", reference="fedavg")


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_runs_that_were_tested_on_other_rows_or_by_another_metric_are_not_compared(tmp_path, seeds):
    folders = [
        made_runs.make(tmp_path / f"{method}-{seed}", method=method, seed=seed, rounds=2)
        for method in ("flexlora", "fedit")
        for seed in seeds
    ]
    for folder in folders:
        made_runs.write(folder / "data/about.json", {"labels": [], "tested": {"test": folder.name[:3]}})
    with pytest.raises(ResultsError, match=r"fedit-0 and .*flexlora-0 were tested on different rows; compare runs of"):
        page.write(folders, tmp_path / "page.html")
    for folder in folders:
        made_runs.write(folder / "data/about.json", {"labels": [], "tested": {"test": "alike"}})
    page.write(folders, tmp_path / "page.html")
    lines = folders[-1] / "metrics.jsonl"
    lines.write_text(lines.read_text().replace('"accuracy"', '"f1"'))
    with pytest.raises(ResultsError, match="were scored by f1 and by accuracy"):
        page.write(folders, tmp_path / "page.html")


def test_several_seeds_are_told_by_their_means_and_sums(tmp_path):
    for seed in range(3):
        made_runs.make(tmp_path / str(seed), seed=seed, rounds=2)
    found = [results.read(tmp_path / str(seed)) for seed in range(3)]
    text = page.html(found)
    ends = [sum(run.tests()[i][1].value for run in found) / 3 for i in (0, -1)]
    assert f"From {words.share(ends[0])} % (round 0) to {words.share(ends[1])} % (round 2). Mean of 3 seeds" in text
    assert f"{words.share(ends[0])} before training" in text
    assert memory.show(sum(run.traffic().up for run in found)) in text


def test_arms_with_fewer_seeds_are_told(tmp_path):
    folders = [made_runs.make(tmp_path / f"a{seed}", seed=seed, rounds=2) for seed in range(3)]
    folders.append(made_runs.make(tmp_path / "b", method="fedit", seed=1, rounds=2))
    text = page.html([results.read(folder) for folder in folders])
    assert "over 1 to 3 seeds" in text and "One seed is one split" not in text


def test_a_setting_that_only_one_run_has_names_both(tmp_path):
    folders = [made_runs.make(tmp_path / name, rounds=2) for name in ("a", "b")]
    spec = json.loads((folders[1] / "experiment.json").read_text())
    made_runs.write(folders[1] / "experiment.json", spec | {"task": {"name": "trec", "draw": 0}})
    arms = comparison.arms([results.read(folder) for folder in folders])
    assert [arm.label for arm in arms] == ["draw default", "draw 0"]
