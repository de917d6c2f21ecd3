"""The command line ``flexlora-fast``: arguments in, exit code out. 0 is fine, 1 an error, 2 a wrong call."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flexlora_fast import __version__, cli_gate, cli_methods, cli_simulate, inputs, methods, outputs, tables
from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import MISSING, Aggregator
from flexlora_fast.cli_common import DTYPES, Full, Json, failures, note, one_of, parse_ranks, print_json, show, usage
from flexlora_fast.cli_round import app as round_app
from flexlora_fast.defence import RULES
from flexlora_fast.distributed import TIMEOUT, command
from flexlora_fast.errors import AdapterError, EmptyRoundError, FlexLoRAError
from flexlora_fast.factors import SPLITS
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.inputs import Source
from flexlora_fast.inspection import Inspection
from flexlora_fast.lowrank.plan import SOLVERS
from flexlora_fast.progress import track
from flexlora_fast.report import Report
from flexlora_fast.update import GlobalUpdate, Refusal
from flexlora_fast.verdicts import refusal_table

app = typer.Typer(
    name="flexlora-fast",
    help="Aggregate LoRA adapters of mixed ranks into one exact, certified global update.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # errors quote names from clients, which are not markup
    pretty_exceptions_enable=False,  # their tracebacks show local variables: whole tensors
)

app.add_typer(round_app)


def main() -> None:
    """The console script's entry."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # σ and × in an ASCII locale become ?, not an exception
            stream.reconfigure(errors="replace")
    # A scheduler's SIGTERM must not leave half a folder behind: exceptions clean up, the default action does not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself; ``--version`` is done by the time this runs."""


@app.command(no_args_is_help=True)
@command.on_all_ranks
def aggregate(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            exists=True,
            file_okay=False,
            help="PEFT adapter folders, or folders that hold such folders (one level down, sorted by name).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; it appears whole or not at all.")],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="LIST|FILE",
            help="Numbers in the order of the clients (1200,300), or a JSON object or CSV table from client name, "
            "folder name or path to its weight. Default: all equal. A client of weight 0 counts as absent.",
        ),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="LIST", help="Write one adapter for each of these ranks: OUT/rank-8/ …")
    ] = None,
    per_client: Annotated[
        bool,
        typer.Option(
            "--per-client",
            help="Write every client an adapter of its own config and ranks: OUT/clients/NAME/ (the default without "
            "--ranks). Clients with the same config and ranks share one weights file by hard links.",
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Columns to keep of each layer. Default: the most that --ranks or, per client, any client needs.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(methods.METHODS)}, settings behind a colon (florist:tau=0.95); `flexlora-fast "
            "methods` says what each is for."
        ),
    ] = "flexlora",
    solver: Annotated[str, typer.Option(help=f"auto, or one of {', '.join(SOLVERS)}.")] = "auto",
    tol: Annotated[float, typer.Option(help="Bound on the excess error of iterative solvers; 0: exact.")] = 1e-3,
    missing: Annotated[
        str, typer.Option(help="A client without a layer: 'zero' counts it as zero there, 'renormalize' leaves it out.")
    ] = "zero",
    defence: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help=f"Against hostile clients: one of {', '.join(RULES)}, settings behind a colon (krum:byzantine=2). "
            "Default: none, all clients are trusted.",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A policy that `flexlora-fast policy` wrote. With it the folders may come from anybody: nothing of "
            "them is opened but through the gate. Default: none, folders are believed as far as they are consistent.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Where singular values go: B, balanced (√S in each) or A.")] = "B",
    dtype: Annotated[
        str, typer.Option(help=f"Of the factors written: {', '.join(DTYPES)} (per client its own, else float32).")
    ] = "keep",
    seed: Annotated[int, typer.Option(help="Of the iterative solvers' test matrices.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1 … Default: cpu.")] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory that the round works in, such as 2GiB. Default: half the machine's."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="On several ranks: how long one may be silent until it is lost.")
    ] = TIMEOUT,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail, and write nothing, if any client is refused.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier round in OUT.")] = False,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Aggregate a round of client adapters.

    OUT gets the adapters, global_update.safetensors, report.json, report.md, energy.png and spectrum.png. A client
    that cannot be used is refused with its reason, and the round goes on without it.

    On several devices or hosts: torchrun --nproc-per-node N -m flexlora_fast aggregate ...
    """
    with failures(), usage():
        rules = None if policy is None else RoundPolicy.load(policy)
        sources, skipped = inputs.find(folders, trusted=rules is None)
        outputs.check(out, [source.path for source in sources], force)
        shares, unknown = inputs.read_weights(weights, sources) if weights else ([1.0] * len(sources), [])
        wanted = parse_ranks(ranks)
        writing = {"split": one_of("--split", split, SPLITS), "dtype": DTYPES[one_of("--dtype", dtype, DTYPES)]}
        gap = one_of("--missing", missing, MISSING)
    for what, names in (("holds no adapter, passed over", skipped), ("weight of no client, unused", unknown)):
        if names:
            note(f"{what}: {', '.join(map(str, names[:5]))}{' …' if len(names) > 5 else ''}")
    per_client = per_client or not wanted
    with failures():
        clients: list[tuple[str, Adapter | Path, float]]
        if rules is None:
            clients, refused, sent = _load(sources, shares)
        else:
            clients = [(source.name, source.path, share) for source, share in zip(sources, shares, strict=True)]
            refused, sent = [], set(rules.ranks)
        keep = rank if rank is not None else _needed(wanted, sent if per_client else set())

        def fresh(read: Any) -> Aggregator:
            limited = {"memory_limit": memory_limit, "read": read, "missing": gap, "defence": defence}
            limited |= {"policy": rules}
            round_ = command.Aggregator(keep, method, solver, tol, device, seed, **limited)
            return _filled(round_, clients, refused, strict)

        with usage():
            round_ = fresh("finish")
        absent = [name for name, _, weight in clients if weight == 0 and name in round_.clients]
        if absent:
            note(f"weight 0, so absent from the round and without an adapter: {', '.join(absent)}")
        if not command.first():
            _finished(round_, fresh, out)  # the first rank writes
            return
        with outputs.staged(out) as folder:
            update = _finished(round_, fresh, folder / outputs.UPDATE_NAME)
            document = outputs.write(update, folder, ranks=wanted, per_client=per_client, **writing)
            report = Report(update, document["ranks"])
    if as_json:
        print_json(document | {"out": str(out)})
        return
    show(report.view(full or None))
    print(f"written to {tables.clean(out)}")


@app.command(no_args_is_help=True)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            exists=True, help="A PEFT adapter folder, a global_update.safetensors, or the folder of a round."
        ),
    ],
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Show layers, ranks, scales, norms and spectrum of an adapter or a global update."""
    with failures():
        if path.is_dir() and not inputs.is_adapter(path) and (path / outputs.UPDATE_NAME).is_file():
            path = path / outputs.UPDATE_NAME
        seen: Report | Inspection
        if path.is_file():
            seen = Report(GlobalUpdate.load(path))
        else:
            seen = Inspection(Adapter.load(path, client=inputs.distinct_names([path])[0]))
        if as_json:
            print_json(seen.to_dict())
        else:
            show(seen.view(full or None))


app.command(no_args_is_help=True)(cli_gate.policy)
app.command(no_args_is_help=True)(cli_gate.convert)
app.command("methods")(cli_methods.show_methods)
app.command(no_args_is_help=True)(cli_simulate.simulate)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works here, and what to do about what does not."""
    from flexlora_fast import doctor as examination

    checks = examination.checks()
    broken = any(check.status == "broken" for check in checks)
    if as_json:
        names = ("name", "status", "detail", "remedy")
        found = [{name: getattr(check, name) for name in names} for check in checks]
        print_json({"format": "flexlora_fast.doctor/1", "healthy": not broken, "checks": found})
    else:
        show(_doctor_table(checks))
    raise typer.Exit(int(broken))


@app.command()
def bench(
    shape: Annotated[str, typer.Option(metavar="MxN", help="Outputs × inputs of each layer.")] = "1024x1024",
    ranks: Annotated[str, typer.Option(metavar="LIST", help="The clients' ranks, one client each.")] = "8,8,16,16,64",
    layers: Annotated[int, typer.Option(min=1, help="How many layers of that shape.")] = 2,
    tol: Annotated[float, typer.Option(help="As for aggregate.")] = 1e-3,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way; the fastest counts.")] = 3,
    as_json: Json = False,
) -> None:
    """Compare speed and errors with the dense loop, here and now.

    On synthetic adapters. The dense loop is the plain way: Σ w·s·B·A as one matrix per layer,
    torch.linalg.svd(full_matrices=False) of it, cut to each client's rank.
    """
    from flexlora_fast import bench as trial

    with usage():
        m, n = trial.parse_shape(shape)
        wanted = parse_ranks(ranks, distinct=False)
    with failures():
        result = trial.compare(m, n, wanted, layers=layers, tol=tol, repeats=repeats)
        if as_json:
            print_json(result)
        else:
            show(trial.view(result))


def _load(
    sources: Sequence[Source], weights: Sequence[float]
) -> tuple[list[tuple[str, Adapter | Path, float]], list[Refusal], set[int]]:
    """The adapters that can be read, the refusals of the others, and the ranks sent. Tensors stay in their files."""
    loaded, refused, ranks = list[tuple[str, Adapter | Path, float]](), [], set[int]()
    for i, source in enumerate(track(sources, "clients")):
        try:
            adapter = Adapter.load(source.path, client=source.name)
            loaded.append((source.name, adapter, weights[i]))
            ranks |= set(adapter.skeleton.ranks.values())
        except FlexLoRAError as error:
            refused.append(Refusal(source.name, str(error.at(client=source.name)), error.code))
    return loaded, refused, ranks


def _filled(
    round_: Aggregator, clients: list[tuple[str, Adapter | Path, float]], refused: list[Refusal], strict: bool
) -> Aggregator:
    """The round with every client in it that can be used."""
    round_.refused.extend(refused)
    # Under a policy a client is copied and checked as it comes, which takes a while.
    for name, adapter, weight in track(clients, "clients", False if round_.policy is None else None):
        with contextlib.suppress(FlexLoRAError):  # noted in round_.refused
            round_.add(adapter, weight, client=name)
    round_.refused.sort(key=lambda refusal: refusal.client)
    if round_.refused and (strict or not round_.clients):
        show(refusal_table(round_.refused), sys.stderr)
        why = "--strict was asked for" if strict else "no client is left"
        raise EmptyRoundError(
            f"{len(round_.refused)} of {len(clients) + len(refused)} clients refused and {why}; nothing was written"
        )
    return round_


def _finished(round_: Aggregator, fresh: Callable[[str], Aggregator], path: Path) -> GlobalUpdate:
    """The update, written to ``path``. Files are read once; only where a client's values turn out bad are those of all
    looked at first and the round starts again, as if the bad ones had never come.
    """
    try:
        return round_.finish(path)
    except AdapterError as error:
        if error.client is None:
            raise
    round_ = fresh("add")
    while True:
        clients = round_.clients
        try:
            return round_.finish(path)
        except AdapterError as error:
            if error.client not in clients:  # else it is out of the round now: its values do not fit the others'
                raise


def _needed(ranks: Sequence[int], sent: set[int]) -> int | None:
    """Columns to keep so that all adapters can be written; None leaves it to the round (each layer's largest)."""
    return max([*ranks, *sent]) if ranks else None


def _doctor_table(checks: Sequence[Any]) -> Any:
    from rich.text import Text

    marks = {"ok": Text("✓ ok", "green"), "absent": Text("– absent", "yellow"), "broken": Text("✗ broken", "bold red")}
    rows = [[marks[c.status], c.name, c.detail, c.remedy or ""] for c in checks]
    columns = ["status", "what", "found", "what to do"]
    return tables.table("", columns, rows, left=columns)
