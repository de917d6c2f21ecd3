"""A round of very many uploads, one in ten of them hostile: ``python -m tests.many COUNT FOLDER READ``.

Prints as JSON what came of it and what it took. It is a program so that its memory is its own.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

import flexlora_fast as ff
from flexlora_fast.errors import RefusedError
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from flexlora_fast.gate import RoundPolicy
from tests import hostile, rounds
from tests.footprint import Footprint

LARGE = 1 << 20  # bytes; hostile files of more come once each


def policy() -> RoundPolicy:
    bounds = {"max_layer_norm": 1e3, "max_norm": 1e4, "max_extra_norm": 1e3, "max_weight": 100.0}
    return RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(2, 4), **bounds)


def honest(count: int, folder: Path) -> Iterator[tuple[Path, float, dict[str, torch.Tensor]]]:
    """Path, weight and tensors of clients no two of which sent the same: ranks 2 and 4, three dtypes, files and
    folders.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for rank, dtype in itertools.product((2, 4), (torch.float32, torch.float16, torch.bfloat16)):
        c = rounds.client("ref", rank=rank, alpha=8, dtype=dtype).but(extras={"head.weight": torch.ones(3, 2)})
        kinds.append((c.adapter().state_dict(), json.dumps(c.config | {"peft_type": "LORA"}).encode()))
    for i in range(count):
        like, config = kinds[i % len(kinds)]
        state = {k: torch.randn(x.shape, generator=generator).to(x.dtype) for k, x in like.items()}
        path = folder / f"c{i:05d}"
        if i % 2:
            path.mkdir()
            (path / CONFIG_NAME).write_bytes(config)
            (path / WEIGHTS_NAME).write_bytes(save(state))
        else:
            path = path.with_suffix(".safetensors")
            path.write_bytes(save(state))
        yield path, float(1 + i % 100), state


def attacks(count: int, folder: Path) -> Iterator[tuple[Any, str]]:
    """Uploads and the codes they must be refused with, all of the corpus in turn."""
    good, made = save(hostile.tensors()), 0
    kinds = [("w", *x) for x in hostile.WEIGHTS.values()]
    kinds += [("c", *x) for x in hostile.CONFIGS.values()]  # type: ignore[misc]
    kinds += [("p", *x) for x in hostile.PATHS.values()]
    for i, (kind, make, code) in enumerate(itertools.cycle(kinds)):
        if made == count:
            return
        path = folder / f"x{i:05d}"
        if kind == "p":
            path.mkdir()
            upload: Any = make(path / "client")
        elif kind == "c":
            path.mkdir()
            (path / WEIGHTS_NAME).write_bytes(good)
            (path / CONFIG_NAME).write_bytes(make)  # type: ignore[arg-type]
            upload = path
        else:
            content = make()
            if len(content) > LARGE and i >= len(kinds):
                continue
            path.write_bytes(content)
            upload = path
        made += 1
        yield upload, code


def oracle(sent: list[tuple[float, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Σ w·s·B·A by layer and the average head, in float64."""
    total = sum(weight for weight, _ in sent)
    result = {"head": torch.zeros(3, 2, dtype=torch.float64)}
    for weight, state in sent:
        for layer in _LAYERS:
            A, B = (state[f"{rounds.PREFIX}{layer}.lora_{x}.weight"].double() for x in "AB")
            result[layer] = result.get(layer, 0) + weight / total * 8 / A.shape[0] * (B @ A)
        result["head"] += weight / total * state[f"{rounds.PREFIX}head.weight"].double()
    return result


_LAYERS = [layer.name for layer in rounds.LINEAR]


def main(count: int, folder: Path, read: Any) -> dict[str, Any]:
    bad = count // 10
    uploads: list[tuple[Any, float, str]] = []
    sent = []
    for path, weight, state in honest(count - bad, folder):
        uploads.append((path, weight, ""))
        sent.append((weight, state))
    expected = oracle(sent)
    del sent
    uploads += [(upload, 1.0, code) for upload, code in attacks(bad, folder)]
    random.Random(0).shuffle(uploads)
    spool = folder / "spool"
    spool.mkdir()
    agg = ff.Aggregator(rank=16, policy=policy(), spool=spool, read=read, tol=0, progress=False)
    load(save(hostile.tensors()))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # a usual soft limit is 1024
    footprint, start, wrong = Footprint(), time.perf_counter(), []
    for i, (upload, weight, code) in enumerate(uploads):
        try:
            agg.add(upload, weight, client=f"n{i:05d}")
            said = ""
        except RefusedError as error:
            said = error.code
        if said != code:
            wrong.append((str(upload), said, code))
    added = time.perf_counter()
    update = agg.finish()
    finished = time.perf_counter()
    errors = {
        layer: float((update.delta(layer).double() - dense).norm() / dense.norm())
        for layer, dense in expected.items()
        if layer != "head"
    }
    head = next(iter(update.extras.values())).double()
    errors["head"] = float((head - expected["head"]).norm() / expected["head"].norm())
    report = update.report()
    return {
        "accepted": len(update.clients),
        "refused": len(update.refused),
        "wrong": wrong,
        "worst": max(errors.values()),
        "copies": len(list(spool.iterdir())),
        "bytes": sum(file.stat().st_size for file in spool.iterdir()),
        "growth": footprint.rise(),
        "add": added - start,
        "finish": finished - added,
        "report": len(json.dumps(report.to_dict())) + len(report.markdown()),
        "telling": time.perf_counter() - finished,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
