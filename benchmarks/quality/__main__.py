"""Runs a grid of simulations and writes what came out.

``python -m benchmarks.quality GRID.toml`` runs what is not complete yet, resumably: stopped in any way, the same
command goes on. ``--write`` then writes ``benchmarks/results/quality/GRID.md``, ``.json`` and ``.png`` from what is
complete. Runs go to ``runs/GRID``, or to ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import grid as grids
from benchmarks.quality import running, writing
from flexlora_fast.errors import FlexLoRAError
from flexlora_fast.simulate.pool import default_workers

RESULTS = Path("benchmarks/results/quality")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("grid", type=Path, help="a file such as benchmarks/quality/trec.toml")
    add("--workers", type=int, help="processes (default: one a core, or a GPU); 0: all in this one")
    add("--only", nargs="+", default=[], metavar="RUN", help="SETTING[/ARM[/seed-N]], with * for any; default: all")
    add("--seeds", type=int, nargs="+", help="instead of the file's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="in all runs: task.path=FILE, rounds=2")
    add("--out", type=Path, help="folder of the runs (default: runs/GRID)")
    add("--list", action="store_true", help="only say which runs there are, and which are complete")
    add("--write", action="store_true", help="run nothing; write the results of what is complete")
    add("--results", type=Path, default=RESULTS, help="folder for --write (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers cannot be {options.workers}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or write; returns the exit status."""
    options = parse(arguments)
    try:
        grid = grids.read(options.grid)
        out = options.out or Path("runs") / options.grid.stem
        cells = grids.chosen(grids.cells(grid, out, options.set, options.seeds), options.only)
        if options.list:
            for cell in cells:
                state = "complete" if cell.complete else "replaced" if cell.stale else "to run  "
                print(f"{state} {cell.name}")
            return 0
        if options.write:
            for path in writing.write(grid, options.grid, cells, options.results, out):
                print(path)
            return 0
        failed = running.play(cells, default_workers() if options.workers is None else options.workers)
    except FlexLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
