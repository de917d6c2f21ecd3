"""The commands around clients that nobody has to trust: ``policy`` writes what a round takes, ``convert`` makes of a
pickle of your own what the gate takes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexlora_fast import conversion, tables
from flexlora_fast.cli_common import Json, failures, note, one_of, parse_ranks, print_json, usage
from flexlora_fast.errors import OptionError
from flexlora_fast.gate import RoundPolicy

FACTORS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCALES = ("alpha", "constant")


def policy(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE_DIR",
            exists=True,
            file_okay=False,
            help="A PEFT adapter folder of your own: clients send these layers, at this base model.",
        ),
    ],
    ranks: Annotated[str, typer.Option(metavar="LIST", help="Ranks that clients may have: 8,16,64.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The policy to write, JSON; an earlier one is replaced.")],
    scale: Annotated[
        str,
        typer.Option(
            help="What s is at a rank: 'alpha', as PEFT scales the reference's alpha, or 'constant', the reference's s."
        ),
    ] = "alpha",
    dtypes: Annotated[str, typer.Option(metavar="LIST", help="Of the factors.")] = "float32,float16,bfloat16",
    max_weight: Annotated[float, typer.Option(help="The largest weight of a client.")] = 1.0,
    max_layer_norm: Annotated[float, typer.Option(help="Of ‖s·B·A‖_F of each layer. Default: none.")] = math.inf,
    max_norm: Annotated[float, typer.Option(help="Of ‖s·B·A‖_F over all layers. Default: none.")] = math.inf,
    max_extra_norm: Annotated[float, typer.Option(help="Of each head or other tensor. Default: none.")] = math.inf,
    max_bytes: Annotated[int | None, typer.Option(help="Of one weights file. Default: what its tensors take.")] = None,
    max_clients: Annotated[int | None, typer.Option(help="Of a round. Default: any number.")] = None,
    max_round_bytes: Annotated[int | None, typer.Option(help="Of a round's weights files. Default: no limit.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Clients may leave layers out.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a round takes, for `aggregate --policy`."""
    with failures(), usage():
        named = [one_of("--dtypes", name.strip(), FACTORS) for name in dtypes.split(",")]
        rules: Any = {
            "ranks": parse_ranks(ranks),
            "scale": one_of("--scale", scale, SCALES),
            "dtypes": [FACTORS[name] for name in named],
            "max_weight": max_weight,
            "max_layer_norm": max_layer_norm,
            "max_norm": max_norm,
            "max_extra_norm": max_extra_norm,
            "max_bytes": max_bytes,
            "max_clients": max_clients,
            "max_round_bytes": max_round_bytes,
            "partial": partial,
        }
        if out.is_dir():
            raise OptionError(f"--out {str(out)!r} is a folder; give a file")
        made = RoundPolicy.from_adapter(reference, **rules)
        made.save(out)
    unbounded = [name for name in ("max_layer_norm", "max_norm", "max_extra_norm") if math.isinf(rules[name])]
    if unbounded:
        note(f"no bound but what float32 can hold: {', '.join(unbounded)}")
    if as_json:
        print_json(made.to_json())
        return
    print(
        f"{len(made.specs)} layers, {len(made.reference.extras)} other tensors, files up to {made.max_bytes:,} bytes; "
        f"written to {tables.clean(out)}"
    )


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", exists=True, file_okay=False, help="A PEFT folder of your own with adapter_model.bin."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write, which must not exist yet.")],
) -> None:
    """Turn an adapter_model.bin that you trust into safetensors.

    A .bin or .pt file is a pickle. It is read by torch's restricted unpickler, which is no boundary: convert files of
    your own only, never a client's.
    """
    with failures(), usage():
        adapter = conversion.convert(source, target)
    print(f"{len(adapter.layers)} layers, {len(adapter.skeleton.forms)} tensors; written to {tables.clean(target)}")
