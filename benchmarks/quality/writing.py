"""Results of a grid, from the folders of its runs: Markdown tables with an honest reading, JSON, and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import picture, pooling, reading
from benchmarks.quality.grid import Cell, Change, Grid, flattened
from flexlora_fast import memory, plots
from flexlora_fast.errors import ResultsError
from flexlora_fast.simulate import comparison, page, page_tables, results, words
from flexlora_fast.simulate.comparison import Arm, Row
from flexlora_fast.tables import count


@dataclass(frozen=True)
class Block:
    """One setting: its arms that have complete runs, and their comparison."""

    setting: Change
    arms: list[Arm]
    rows: list[Row]


def write(grid: Grid, file: Path, cells: Sequence[Cell], folder: Path, runs: Path) -> list[Path]:
    """Write ``folder``/GRID.md, .json and .png, a picture by round for each setting, and beside the runs a page each.

    Returns what was written. Raises ``ResultsError`` where nothing is complete.
    """
    blocks = collect(grid, cells)
    if not blocks:
        raise ResultsError(f"no run of {file} is complete below {runs}; run it first, without --write")
    folder.mkdir(parents=True, exist_ok=True)
    name = file.stem
    written = [folder / f"{name}.md", folder / f"{name}.json", folder / f"{name}.png"]
    written[0].write_text("\n".join(lines(grid, file, cells, blocks)) + "\n", encoding="utf-8")
    document = json.dumps(plain(data(grid, blocks)), indent=1, allow_nan=False)
    written[1].write_text(document + "\n", encoding="utf-8")
    settings = [(block.setting.name, block.rows) for block in blocks]
    plots.save(picture.finals(settings, grid.reference, grid.part), written[2])
    for block in blocks:
        made = plots.save(picture.rounds(block.arms, grid.part), folder / f"{name}-{block.setting.slug}.png")
        folders = [run.folder for arm in block.arms for run in arm.runs]
        html = page.write(folders, runs / f"{block.setting.slug}.html", part=grid.part)
        written += [made, html]
    return written


def collect(grid: Grid, cells: Sequence[Cell]) -> list[Block]:
    """What is complete, by setting; the reference comes first among its arms."""
    blocks = []
    for setting in grid.settings:
        arms = []
        for arm in sorted(grid.arms, key=lambda arm: arm.name != grid.reference):
            own = [cell for cell in cells if (cell.setting, cell.arm) == (setting, arm) and cell.complete]
            if own:
                arms.append(Arm(arm.name, tuple(results.read(c.folder) for c in sorted(own, key=lambda c: c.seed))))
        if arms:
            reference = grid.reference if arms[0].label == grid.reference else None
            blocks.append(Block(setting, arms, comparison.compare(arms, reference, grid.part)))
    return blocks


# -- Markdown ---


def lines(grid: Grid, file: Path, cells: Sequence[Cell], blocks: Sequence[Block]) -> Iterator[str]:
    yield f"# {grid.title}"
    yield ""
    complete = sum(cell.complete for cell in cells)
    yield (
        f"`python -m benchmarks.quality {file}`, then `--write`: {complete} of {len(cells)} runs. torch "
        f"{torch.__version__}, {os.cpu_count()} CPUs{_gpu()}. The experiment is in `{file}`, all figures in "
        f"`{file.stem}.json`."
    )
    yield ""
    if grid.about:
        yield grid.about.strip()
        yield ""
    yield f"![Scores, and differences to {grid.reference}]({file.stem}.png)"
    yield ""
    yield "## Reading"
    yield ""
    for block in blocks:
        for sentence in reading.of_setting(block.setting.name, block.rows, grid.part):
            yield f"- {sentence}"
    pooled = pooling.together([block.rows for block in blocks], grid.part) if len(blocks) > 1 else []
    for sentence in reading.of_all(grid.reference, pooled):
        yield f"- {sentence}"
    yield ""
    yield words.caveat(blocks[0].arms, blocks[0].rows, grid.part)
    for block in blocks:
        yield ""
        yield f"## {block.setting.name}"
        yield ""
        if block.setting.note:
            yield block.setting.note
            yield ""
        yield from score_lines(grid, block.rows)
        yield ""
        yield f"![By round: {block.setting.name}]({file.stem}-{block.setting.slug}.png)"
    if pooled:
        yield ""
        yield "## All settings together"
        yield ""
        yield from pooled_lines(grid, pooled)
    yield ""
    yield "## What a round costs"
    yield ""
    yield (
        f"Means over the rounds and seeds of {blocks[0].setting.name}. Server: reading the uploads, aggregating, and "
        "the new global update on disk, on one thread while other runs of the grid used the other cores."
    )
    yield ""
    yield from cost_lines(blocks[0])
    yield ""
    yield "## What the updates are like"
    yield ""
    yield (
        "Means over seeds. Energy: the share of ‖ΔW‖² that clients of the smallest rank are sent, after the last "
        "round. Effective rank: exp of the entropy of σ/Σσ, after the first round with one and the last. Truncation: "
        "the score of what the largest rank is sent minus that of the smallest, in points."
    )
    for block in blocks:
        yield ""
        yield f"{block.setting.name}:"
        yield ""
        yield from update_lines(grid, block)
    yield ""
    yield "## The methods, and the command of each"
    yield ""
    yield from command_lines(grid, file)


def _gpu() -> str:
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def score_lines(grid: Grid, rows: Sequence[Row]) -> Iterator[str]:
    metric = next(test.metric for row in rows for test in row.arm.tests(grid.part))
    where = " on unseen clients" if grid.part == "unseen" else ""
    yield (
        f"| method | seeds | {metric}{where}, % | − {grid.reference} [95 %] | t-test p | Holm | sign-flip p | Holm "
        "| best, % | in round | loss, nats |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        p = [math.nan] * 4
        if row.difference is not None:
            p = [row.difference.t_p, row.t_holm, row.difference.permutation_p, row.permutation_holm]
        bold = "**" if row.verdict in ("better", "worse") else ""
        cells = [
            row.arm.label,
            str(row.final.n),
            words.spread_of(row.final),
            f"{bold}{words.gap(row.difference)}{bold}",
            *map(words.p_value, p),
            words.spread_of(row.best),
            f"{np.mean(row.best_rounds):.1f}",
            words.plain(row.loss),
        ]
        yield f"| {' | '.join(cells)} |"


def pooled_lines(grid: Grid, pooled: Sequence[pooling.Pooled]) -> Iterator[str]:
    seeds = pooled[0].difference.n
    yield (
        f"Each of {count(seeds, 'seed')} has one difference here, its mean over the settings, which share what it "
        "draws. That a method gains in one setting what it loses in another is hidden. Better and worse count pairs of "
        "setting and seed."
    )
    yield ""
    yield f"| method | − {grid.reference} [95 %] | better in | worse in | t-test p | Holm | sign-flip p | Holm |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in pooled:
        p = map(words.p_value, (each.difference.t_p, each.t, each.difference.permutation_p, each.permuted))
        yield f"| {each.label} | {words.gap(each.difference)} | {each.above} | {each.below} | {' | '.join(p)} |"


def cost_lines(block: Block) -> Iterator[str]:
    yield "| method | server, s | training, s | testing, s | up, MiB | down, MiB |"
    yield "|---|---|---|---|---|---|"
    for cost in page_tables.costs(block.arms):
        seconds = ["–" if x is None else f"{x:.3f}" for x in (cost.aggregate, cost.train, cost.evaluate)]
        sizes = [memory.show(x).removesuffix(" MiB") for x in (cost.up, cost.down)]
        yield f"| {cost.arm.label} | {' | '.join([*seconds, *sizes])} |"


def update_lines(grid: Grid, block: Block) -> Iterator[str]:
    yield "| method | energy at the smallest rank | effective rank | ‖ΔW‖_F | truncation |"
    yield "|---|---|---|---|---|"
    for arm in block.arms:
        found = reading.update(arm, grid.part)
        energy = "–" if found.energy is None else f"{100 * found.energy:.1f} % (r = {found.smallest})"
        ranks = "–" if found.last is None else f"{found.first:.1f} → {found.last:.1f}"
        size = "–" if found.norm is None else f"{found.norm:.2f}"
        cut = "–" if found.truncation is None else words.gap(found.truncation)
        yield f"| {arm.label} | {energy} | {ranks} | {size} | {cut} |"


def command_lines(grid: Grid, file: Path) -> Iterator[str]:
    for setting in grid.settings:
        changes = ", ".join(f"`{part}`" for part in flattened(setting.change))
        yield f"- {setting.name}: {changes or 'as the file has it'}"
    yield ""
    yield "| method | what it is | changes in the experiment | command |"
    yield "|---|---|---|---|"
    for arm in grid.arms:
        changes = ", ".join(f"`{part}`" for part in flattened(arm.change)) or "none"
        command = f"`python -m benchmarks.quality {file} --only '*/{arm.slug}'`"
        yield f"| {arm.name} | {arm.note} | {changes} | {command} |"


# -- JSON ---


def data(grid: Grid, blocks: Sequence[Block]) -> dict[str, Any]:
    """Everything that tables and pictures say, and each run's figures."""
    return {
        "title": grid.title,
        "reference": grid.reference,
        "part": grid.part,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "settings": {block.setting.name: [_row_data(row, grid) for row in block.rows] for block in blocks},
        "together": [
            {
                "method": each.label,
                **dataclasses.asdict(each.difference),
                "t_holm": each.t,
                "permutation_holm": each.permuted,
                "pairs_above": each.above,
                "pairs_below": each.below,
            }
            for each in (pooling.together([block.rows for block in blocks], grid.part) if len(blocks) > 1 else [])
        ],
    }


def _row_data(row: Row, grid: Grid) -> dict[str, Any]:
    difference = None if row.difference is None else dataclasses.asdict(row.difference)
    if difference is not None:
        difference |= {"t_holm": row.t_holm, "permutation_holm": row.permutation_holm, "over": row.over}
    return {
        "method": row.arm.label,
        "final": dataclasses.asdict(row.final),
        "loss": None if row.loss is None else dataclasses.asdict(row.loss),
        "best": dataclasses.asdict(row.best),
        "difference": difference,
        "runs": [_run_data(run, grid) for run in row.arm.runs],
    }


def _run_data(run: results.Run, grid: Grid) -> dict[str, Any]:
    tests, updates, last = run.tests(grid.part), run.updates(), run.last(grid.part)
    return {
        "seed": run.seed,
        "rounds": [number for number, _ in tests],
        "value": [test.value for _, test in tests],
        "loss": [test.loss for _, test in tests],
        "by_rank": {} if last is None else {rank: score.value for rank, score in last.by_rank.items()},
        "energy_kept": updates[-1][1].energy_kept if updates else {},
        "effective_rank": [update.effective_rank for _, update in updates],
        "norm": [update.norm for _, update in updates],
        "seconds": {part: run.seconds(part) for part in ("train", "aggregate", "evaluate", "total")},
        "bytes": run.traffic().model_dump(),
        "refused": sum(len(line.refused) for line in run.rounds),
    }


def plain(value: Any) -> Any:
    """JSON has no NaN: a figure that is not known is null there."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
