"""``flexlora-fast round``: look at a journalled round, and take it up after its server died."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from flexlora_fast import outputs, tables
from flexlora_fast.cli_common import DTYPES, Full, Json, failures, one_of, parse_ranks, print_json, show, usage
from flexlora_fast.errors import OptionError
from flexlora_fast.factors import SPLITS
from flexlora_fast.journal import Round, examine
from flexlora_fast.report import Report

app = typer.Typer(name="round", help="Journalled rounds: look at one, or take it up.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the round, as given to ff.Round.open.")]


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Say what a round holds, whom it refused, what is damaged and what to do.

    Nothing is changed, and the round may be in use. Every upload is read. The exit code is 1 where there is damage.
    """
    with failures():
        found = examine(folder)
        if as_json:
            print_json(found.to_dict())
        else:
            show(found.view())
    raise typer.Exit(int(found.state == "damaged"))


@app.command()
def resume(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write what aggregate writes: adapters, report and plots. Whole or not at all."
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="CLIENT", help="Go on without this client, whose upload is lost (or not wanted)."),
    ] = None,
    without_line: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Go on without this line of the manifest, which is lost.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="LIST", help="In OUT: one adapter for each of these ranks.")
    ] = None,
    per_client: Annotated[
        bool,
        typer.Option(
            "--per-client", help="In OUT: every client an adapter of its own ranks (the default without --ranks)."
        ),
    ] = False,
    split: Annotated[str, typer.Option(help="Where singular values go: B, balanced (√S in each) or A.")] = "B",
    dtype: Annotated[str, typer.Option(help=f"Of the factors written: {', '.join(DTYPES)}.")] = "keep",
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="As for aggregate; for the same bytes, what the server had.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier round in OUT.")] = False,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Take a round up and finish it.

    Its update is DIR/global_update.safetensors: the same bytes as if nothing had happened.
    """
    with failures(), usage():
        wanted = parse_ranks(ranks)
        layout = one_of("--split", split, SPLITS)
        kind = DTYPES[one_of("--dtype", dtype, DTYPES)]
        if out is None and (ranks or per_client or force):
            raise OptionError("--ranks, --per-client and --force are about --out; say where to write")
        if out is not None:
            outputs.check(out, [folder], force)
    with failures(), Round.open(folder, memory_limit=memory_limit) as round_:
        left_out = dict.fromkeys(without or [])
        strangers = sorted(left_out.keys() - {*round_.clients})
        if strangers:  # before any of the others is dropped, whose upload that removes
            raise OptionError(f"--without {strangers[0]!r} is not in the round; `round status` tells who is")
        for client in left_out:
            round_.drop(client, "by the command line")
        for line in without_line or []:
            round_.forgo(line, "by the command line")
        update = round_.finish()
        target = round_.path / outputs.UPDATE_NAME
        document = Report(update).to_dict()
        if out is not None:
            with outputs.staged(out) as made:
                shutil.copyfile(target, made / outputs.UPDATE_NAME)
                document = outputs.write(
                    update, made, ranks=wanted, per_client=per_client or not wanted, split=layout, dtype=kind
                )
        if as_json:
            print_json(document | {"update": str(target), "out": None if out is None else str(out)})
            return
        show(Report(update).view(full or None))
        print(f"written to {tables.clean(target if out is None else out)}")
