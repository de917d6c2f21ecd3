"""What the server and all clients of a securely aggregated round agree on. None of it is secret."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Required, TypedDict, Unpack

import numpy as np

from flexlora_fast import config as configs
from flexlora_fast.adapter import Adapter
from flexlora_fast.config import Config
from flexlora_fast.errors import OptionError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.gate.reference import Reference
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.skeleton import Form, Skeleton

FORMAT = "flexlora_fast.secure.plan/1"
# Columns beyond the rank: 5 to 10 are enough (Halko, Martinsson, Tropp 2011, section 4.2).
OVERSAMPLE = 8
# Sides of the sketch that certifies a layer: two-sided, so 32 cost 1024 entries where 32 probes of krylov.py cost 32·m.
PROBES = 32
# Side of the core of a one-round sketch in widths of its range. At 2 (and k = 2R + 1) the error was 1.44 to 1.67 of the
# best for flat and slowly decaying spectra at ranks 8 to 32 of 768×768 and 768×3072, at 4 it is 1.12 to 1.31.
CORE = 4
# Bounds are proven for exact arithmetic and exactly orthonormal columns; this much more room is for rounding of both.
HEADROOM = 1 + 2.0**-10
_FEWEST_LEVELS = 1 << 16
_MOST_LEVELS = 1 << 52  # integers beyond 2⁵³ are no float64
_LONGEST = 1 << 31  # entries of a vector
_LIMITS = (1e-30, 1e30)  # of clip, max_weight and extra_bound: quanta and sums stay far from the ends of float64


class Options(TypedDict, total=False):
    """What a :class:`Plan` fixes beyond the layers; see there."""

    rank: Required[int]
    clients: Required[int]
    clip: Required[float]
    rounds: int
    oversample: int | None
    max_weight: float
    extra_bound: float | None
    bits: int
    seed: int


@dataclass(frozen=True)
class Segment:
    """A run of entries of a client's vector: a tensor whose values are integers times ``quantum``.

    ``kind``: "clients" (each counts 1), "agreed" (what all must add alike, see ``message.mark``), "weight", "right"
    (ΔW·W), "left" (ΔWᵀ·W), "core" and "probes" (Φᵀ·ΔW·Ψ), "whole" (ΔW itself), "bias" (s·b), "extra" (w·t of another
    tensor) and "share" (the weight of clients that have it).
    ``name``: the layer, or the key of the extra.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    quantum: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Layers, sizes and the fixed-point code of a round. ``to_json`` is what clients get; it holds nothing secret.

    Made by ``from_adapter`` or ``from_policy``, which say what the layers are (``layers``, ``biases``, ``extras``,
    ``config``); then:

    Args:
        rank: R, the largest rank that the update keeps.
        clients: the most that take part. The modulus is divided among them.
        clip: C > 0. A client shortens its w·ΔW, jointly over all layers (and s·b of ``lora_bias``), to
            ‖w·s·B·A‖_F ≤ C. Everything is coded in steps of C, so choose the largest norm that honest clients have, or
            somewhat more, not a thousand times as much. It bounds what one client can move the sum by, which is the
            sensitivity that differential privacy goes by.
        rounds: how many sums are taken. 1: one-round. 2: two-round (range, projection). 3, 4, …: with 1, 2, … half
            power steps; so 4 is two-round with one power step.
        oversample: columns beyond R; default 8, with ``rounds=1`` R + 1.
        max_weight: the largest weight of a client; weights are coded in steps of it.
        extra_bound: the largest magnitude in other trained tensors (heads, biases, token rows); needed where there are
            some. Clients with larger ones are refused by their own software, since shortening a head would break it.
        bits: 32 or 64; sums are taken modulo M = 2**bits.
        seed: of the test matrices, which every client makes itself (``lowrank.random``).

    Code: an integer x stands for x·q, with q = C·(1 + 2⁻¹⁰)/L and L = ⌊(M/2 − 1)/clients⌋ levels each way (at most
    2⁵²). A client's entries are at most C in magnitude (``sketch`` has the proof), so its integers are at most L and a
    sum of ``clients`` of them stays below M/2: nothing saturates or wraps, whatever the updates are. Rounding errs by
    at most q/2 an entry and client, which with 32 bits is 2⁻³²·clients of C.

    A layer of which the sketches would be as large as ΔW itself is sent as ΔW, and comes out exact.

    Raises:
        OptionError: what cannot be meant, more clients than ``bits`` have room for, or an ``extra_bound`` missing.
    """

    layers: tuple[LayerSpec, ...]
    biases: tuple[str, ...]
    extras: Mapping[str, Form]
    config: Config
    rank: int
    clients: int
    clip: float
    rounds: int = 4
    oversample: int | None = None
    max_weight: float = 1.0
    extra_bound: float | None = None
    bits: int = 32
    seed: int = 0

    # -- ways to make one ---

    @classmethod
    def from_adapter(cls, reference: Adapter | str | os.PathLike[str], **options: Unpack[Options]) -> Plan:
        """The layers, other tensors and config of an adapter of the server's own (or its trusted folder)."""
        adapter = reference if isinstance(reference, Adapter) else Adapter.load(reference)
        return cls._of(adapter.skeleton, options)

    @classmethod
    def from_policy(cls, policy: RoundPolicy, **options: Unpack[Options]) -> Plan:
        """Those that a policy expects. Its bounds are not the plan's: nobody can hold hidden uploads against them."""
        return cls._of(policy.reference, options)

    @classmethod
    def _of(cls, of: Skeleton | Reference, options: Options) -> Plan:
        return cls(tuple(of.specs.values()), tuple(of.bias_keys), of.extras, dict(of.config), **options)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote. Raises ``ProtocolError`` for anything else: it may come from a stranger."""
        from flexlora_fast.secure import plan_json

        return plan_json.parse(text)

    def to_json(self) -> str:
        """The plan as text; the same plan gives the same text."""
        from flexlora_fast.secure import plan_json

        return plan_json.written(self)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of ``to_json``."""
        return hashlib.sha256(self.to_json().encode()).digest()

    # -- the code ---

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a client's vector: uint32 or uint64. Sums in it wrap at M by themselves."""
        return np.dtype(np.uint32 if self.bits == 32 else np.uint64)

    @property
    def levels(self) -> int:
        """L, the largest integer that a client sends."""
        return min(_MOST_LEVELS, ((1 << self.bits - 1) - 1) // self.clients)

    def quantum(self, bound: float) -> float:
        """The step of entries that are at most ``bound``."""
        return bound * HEADROOM / self.levels

    # -- the vectors ---

    @property
    def width(self) -> int:
        """Columns of a sketch: R and the oversampling."""
        if self.oversample is None:
            return self.rank + (self.rank + 1 if self.rounds == 1 else OVERSAMPLE)
        return self.rank + self.oversample

    def dense(self, spec: LayerSpec) -> bool:
        """Whether a layer is sent as ΔW: where the sketches of all rounds would be no smaller."""
        probes = PROBES**2
        if self.rounds == 1:
            sketches = self.width * (spec.m + spec.n) + (CORE * self.width) ** 2 + probes
        else:
            sketches = self.width * sum((spec.n, spec.m)[t % 2] for t in range(1, self.rounds + 1)) + probes
        return spec.m * spec.n <= sketches

    @cached_property
    def stages(self) -> list[list[Segment]]:
        """What a client's vector holds in each summed round, in order. All that makes the update is in the last, so
        that it is of one set of clients, those that came that far.

        There are ``rounds`` of them, or one where every layer is sent as ΔW.
        """
        count = 1 if all(self.dense(spec) for spec in self.layers) else self.rounds
        return [self._segments(stage, last=stage == count) for stage in range(1, count + 1)]

    def length(self, stage: int) -> int:
        """Entries of a client's vector in summed round ``stage`` (1, 2, …): they depend on the plan alone."""
        return sum(segment.size for segment in self.stages[stage - 1])

    def basis_shape(self, spec: LayerSpec, stage: int) -> tuple[int, int, int]:
        """(E, n, width) or (E, m, width) of the W that a layer is multiplied by in a round after the first."""
        return (spec.experts, spec.n if stage % 2 else spec.m, self.width)

    def _segments(self, stage: int, last: bool) -> list[Segment]:
        unit, weight = self.quantum(self.clip), self.quantum(self.max_weight)
        found = [Segment("clients", "", (1,), 1.0), Segment("agreed", "", (1,), 1.0)]
        for spec in self.layers:
            E, m, n, k = spec.experts, spec.m, spec.n, self.width
            if self.dense(spec):
                shapes: dict[str, tuple[int, ...]] = {"whole": (E, m, n)} if last else {}
            else:
                shapes = {"right": (E, m, k)} if stage % 2 else {"left": (E, n, k)}
                if self.rounds == 1:
                    shapes |= {"left": (E, n, k), "core": (E, CORE * k, CORE * k)}
                if last:
                    shapes["probes"] = (E, PROBES, PROBES)
            if last and spec.name in self.biases:
                shapes["bias"] = (m,)
            found += [Segment(kind, spec.name, shape, unit) for kind, shape in shapes.items()]
        if last:
            found.append(Segment("weight", "", (1,), weight))
            for key, form in self.extras.items():
                bound = self.max_weight * (self.extra_bound or 0.0)
                found.append(Segment("share", key, (1,), weight))
                found.append(Segment("extra", key, form.shape, self.quantum(bound)))
        return found

    # -- checks ---

    def __post_init__(self) -> None:
        counts = {"rank": (1, 1 << 20), "clients": (1, 1 << 40), "rounds": (1, 16)}
        counts |= {"oversample": (0, 1 << 20)} if self.oversample is not None else {}
        for name, (low, high) in counts.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise OptionError(f"{name} is {value!r}; give an integer from {low} to {high}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not abs(self.seed) < 1 << 64:
            raise OptionError(f"seed is {self.seed!r}; give an integer of at most 64 bits")
        if type(self.bits) is not int or self.bits not in (32, 64):
            raise OptionError(f"bits is {self.bits!r}; give 32 or 64")
        if self.extras and self.extra_bound is None:
            raise OptionError(
                f"extra_bound is missing, but {', '.join(map(repr, list(self.extras)[:3]))} … are averaged; give the "
                "largest magnitude that these tensors may hold"
            )
        bounds = ["clip", "max_weight"] + (["extra_bound"] if self.extra_bound is not None else [])
        for name in bounds:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not _LIMITS[0] <= value <= _LIMITS[1]:
                raise OptionError(f"{name} is {value!r}; give a number from {_LIMITS[0]:g} to {_LIMITS[1]:g}")
        if self.levels < _FEWEST_LEVELS:
            most = ((1 << self.bits - 1) - 1) // _FEWEST_LEVELS
            raise OptionError(
                f"{self.clients} clients leave {self.levels} levels for each in {self.bits} bits, fewer than "
                f"{_FEWEST_LEVELS}; take bits=64, or plan for at most {most} clients"
            )
        names = [spec.name for spec in self.layers]
        if not names or len(set(names)) != len(names):
            raise OptionError("a plan needs layers, each of them once; take them from a reference adapter")
        for stage in range(1, len(self.stages) + 1):
            if self.length(stage) > _LONGEST:
                raise OptionError(
                    f"a vector would have {self.length(stage)} entries, more than {_LONGEST}; lower the rank"
                )


def template(plan: Plan) -> Config:
    """The config that adapters of the update start from.

    Raises ``AdapterError`` where it is none.
    """
    return configs.normalize(plan.config)
