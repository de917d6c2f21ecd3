"""``flexlora-fast simulate``: a federated run on this machine, or the comparison of several that were."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora_fast import tables
from flexlora_fast.cli_common import Json, fail, failures, note, print_json, usage
from flexlora_fast.errors import OptionError

if TYPE_CHECKING:
    from flexlora_fast.simulate.spec import Experiment


def simulate(
    file: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, help="A TOML or YAML file, such as configs/trec.toml."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write (default: runs/NAME-METHOD-SEED).")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Instead of the file's method.name.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the file's seed.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Instead of what the file has there: clients.alpha=0.1"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes (default: one a core, or a GPU); 0: all in this one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, if there is one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove an earlier run in DIR.")] = False,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="No run, but a page about these (repeatable)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run federated fine-tuning on this machine, start to end.

    DIR gets the numbers of each round (metrics.jsonl), a summary and report.html. Stopped in any way, even by Ctrl-C or
    a power cut, a run goes on with --resume, to the same numbers.
    """
    with failures(), usage():
        if compare:
            given = {"FILE": file, "--method": method, "--seed": seed, "--set": changes, "--workers": workers}
            given |= {"--resume": resume or None, "--force": force or None}
            if others := [name for name, value in given.items() if value is not None]:
                raise OptionError(f"--compare is about runs that were; leave {', '.join(others)} out")
            _compare(compare, out or Path("comparison.html"), as_json)
            return
        if file is None:
            raise OptionError("give a FILE, such as configs/trec.toml, or --compare DIR")
        if resume and force:
            raise OptionError("--resume goes on with a run, and --force removes it; give one of them")
        wanted = list(changes or [])
        if method is not None:  # a label in the file is that of its own method
            wanted += [f"method.name={method!r}", *(["method.label="] if not _labelled(wanted) else [])]
        wanted += [f"seed={seed}"] if seed is not None else []
        experiment = _read(file, wanted)
    label = experiment.method.label or experiment.method.name
    target = out or Path("runs") / f"{experiment.name}-{label}-{experiment.seed}"
    _run(experiment, target, workers, resume, force, as_json)


def _read(file: Path, changes: list[str]) -> Experiment:
    try:
        from flexlora_fast.simulate.spec import Experiment
    except ImportError as error:
        fail(f"{error}; simulations need `pip install 'flexlora_fast[simulate]'`")
    return Experiment.read(file, changes)


def _labelled(changes: list[str]) -> bool:
    return any(change.partition("=")[0].strip() == "method.label" for change in changes)


def _compare(folders: list[Path], out: Path, as_json: bool) -> None:
    from flexlora_fast.simulate import page

    if out.is_dir():
        raise OptionError(f"--out {out} is a folder; give the page to write, such as {out / 'comparison.html'}")
    page.write(folders, out)
    if as_json:
        print_json({"out": str(out)})
        return
    print(f"written to {tables.clean(out)}")


def _run(experiment: Experiment, out: Path, workers: int | None, resume: bool, force: bool, as_json: bool) -> None:
    from flexlora_fast.simulate import page
    from flexlora_fast.simulate.run import run
    from flexlora_fast.simulate.watching import Terminal

    started = time.perf_counter()
    watcher = Terminal(quiet=as_json)
    try:
        with failures(), watcher:
            summary = run(experiment, out, workers=workers, resume=resume, force=force, watcher=watcher)
            page.write([out], out / "report.html")
    except KeyboardInterrupt:
        note(f"stopped; what was done is kept: the same command with --resume --out {out} goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print_json(summary | {"out": str(out)})
        return
    print(
        f"{summary['metric']} {summary['final']:.3f} after {tables.count(summary['rounds'], 'round')} "
        f"({time.perf_counter() - started:.0f} s): {tables.clean(out / 'report.html')}"
    )
    sys.stdout.flush()
