"""A round from start to end: clients in, in any order, one global update out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Literal, TypeVar

import torch
from torch import Tensor

from flexlora_fast import defence as defences
from flexlora_fast import devices, finishing, memory, methods, weighing
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import Admission, check_name, check_values, is_weight
from flexlora_fast.backends import cpu
from flexlora_fast.defence import Coordinates, Defence, Verdict, judging
from flexlora_fast.defence.gram import gram_of
from flexlora_fast.errors import (
    AdapterError,
    FlexLoRAError,
    OptionError,
    RankError,
)
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.gate.entrance import Entrance, Source
from flexlora_fast.gate.intake import Upload
from flexlora_fast.incremental import GramTable, KeptGrams
from flexlora_fast.kernels import obstacle
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank import plan
from flexlora_fast.methods import Method
from flexlora_fast.planning import Settings
from flexlora_fast.precision import full_precision
from flexlora_fast.privacy import Privacy, mechanism
from flexlora_fast.refusals import Refusals
from flexlora_fast.resident import Resident
from flexlora_fast.stored import Stored
from flexlora_fast.update import GlobalUpdate
from flexlora_fast.work import Client, Work

MISSING = ("zero", "renormalize")
READ = ("add", "finish")
RESULTS = ("cpu", "device")
T = TypeVar("T")


class Aggregator:
    """One round, fed as clients arrive.

    Args:
        rank: columns to keep in each layer; None keeps the largest rank any client sent there.
        method: a name of ``methods.METHODS`` (`flexlora-fast methods` lists them; with settings
            "florist:tau=0.95"), or a :class:`~flexlora_fast.methods.Method`.
        solver: "auto" lets the planner choose for each layer; or one of ``lowrank.plan.SOLVERS``.
        tol: bound on the excess of iterative solvers; 0 asks for exact ones.
        device: where to compute ("cpu", "cuda", …; default: CPU).
        results: where U and V of the update are: "cpu", or "device" for where they were computed. Adapters made from
            them are there too. All else of the update is on the CPU.
        seed: of the test matrices, whose entries are addressed by (seed, layer, row).
        missing: a client without a layer counts as zero there ("zero"), or its weight is shared out
            ("renormalize").
        certificate: "exact" computes ‖ΔW‖_F; "estimate" lets solvers measure what lies outside their subspace with
            random probes, and state the standard error: 2.4 times faster on the benchmarks' *wide*, of R = 8,000.
        memory_limit: bound on the memory that the round works in: bytes, or a text such as "2GiB" (default: half of
            the machine's). It covers tensors read from files, stacks and the solvers' scratch; not the interpreter,
            adapters that came in memory, or a result that stays in memory. On a GPU it bounds what the round takes of
            its memory as well (default: 9/10 of what is free), beside factors that lie there already. A layer that does
            not fit is summed up from blocks of clients as a dense ΔW, with solver "dense", whatever ``solver`` and
            ``tol`` say; its certificate holds as well.
        read: when files are read. "add": as clients come, so that one with bad values is refused at once; tensors
            stay in memory as far as half the limit goes, the others are read again in ``finish``. "finish": once,
            layer by layer, while earlier layers are solved; a client with bad values is found only then.
        policy: what clients may send. With it, uploads may come from anybody: each is copied, and held against the
            policy, before it is used. Without it they are believed as far as they do not contradict themselves.
        spool: a folder of your own for the copies, which stay there (default: one that goes with the aggregator, where
            temporary files go).
        progress: a bar on stderr: None shows it on a terminal only.
        defence: against hostile or broken clients: a name of ``defence.RULES`` ("clip" to start with; with settings
            "krum:byzantine=2"), a :class:`~flexlora_fast.defence.Defence`, or None, which trusts all clients. It judges
            the low-rank updates of all layers together, from their Gram matrix: files are read once more for it. What
            it bounds is each s·B·A: methods that average factors can still be moved by badly balanced ones, and with
            ``missing="renormalize"`` whoever alone has a layer has all of it, however small its share. The rules
            "median" and "trimmed-mean" take each entry of the dense updates by itself instead, tile by tile, with
            solver "dense" whatever ``solver`` says; they give no verdicts.
        min_clients, min_weight: how many clients of positive weight, and what sum of their weights as given, ``finish``
            asks for; those that a defence rejects do not count.
        privacy: client-level differential privacy: a noised sum of clipped updates over a public denominator. Needs a
            ``policy`` and a ``rank``, takes weights of 0 to 1, and no defence: whatever would let one client change how
            others count is refused. Noise is secret and has nothing to do with ``seed``. ``agg.clients`` and
            ``agg.refused`` are the server's; adapters of the update may go out.
        reference: in a private round whose policy has heads or other tensors that are no low-rank pairs, an adapter (or
            its folder) with the values that clients started from.

    >>> import torch, flexlora_fast as ff
    >>> agg = ff.Aggregator(rank=2)
    >>> for name in ("a", "b"):
    ...     state = {"base_model.model.fc.lora_A.weight": torch.ones(1, 6),
    ...              "base_model.model.fc.lora_B.weight": torch.ones(5, 1)}
    ...     agg.add(ff.Adapter.from_state_dict(state, {"r": 1, "lora_alpha": 1}), weight=10, client=name)
    >>> round(agg.finish()["fc"].norm, 3)
    5.477
    """

    def __init__(
        self,
        rank: int | None = None,
        method: str | Method = "flexlora",
        solver: str = "auto",
        tol: float = 1e-3,
        device: str | torch.device | None = None,
        seed: int = 0,
        *,
        missing: Literal["zero", "renormalize"] = "zero",
        certificate: Literal["exact", "estimate"] = "exact",
        memory_limit: int | str | None = None,
        read: Literal["add", "finish"] = "add",
        results: Literal["cpu", "device"] = "cpu",
        policy: RoundPolicy | None = None,
        spool: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        defence: str | Defence | Coordinates | None = None,
        privacy: Privacy | None = None,
        reference: Adapter | str | os.PathLike[str] | None = None,
        min_clients: int = 1,
        min_weight: float = 0.0,
    ) -> None:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise RankError(f"rank is {rank!r}; give an integer ≥ 1, or None for the largest that clients send")
        if not (isinstance(tol, (int, float)) and tol >= 0):
            raise OptionError(f"tol is {tol!r}; give a number ≥ 0 (0 asks for an exact solver)")
        if missing not in MISSING:
            raise OptionError(f"missing {missing!r} is neither 'zero' nor 'renormalize'")
        if read not in READ:
            raise OptionError(f"read {read!r} is neither 'add' nor 'finish'")
        self.rank, self.method, self.solver, self.tol = rank, methods.get(method), plan.check_solver(solver), tol
        self.device, self.seed, self.missing = devices.usable(device), seed, missing
        self.certificate = plan.check_certificate(certificate)
        self.memory_limit, self._room = memory.parse_limit(memory_limit), memory_limit
        if results not in RESULTS:
            raise OptionError(f"results {results!r} is neither 'cpu' nor 'device'")
        self.read, self.results, self.progress = read, results, progress
        self.policy, self._entrance = policy, Entrance(policy, spool)
        self.defence = defences.get(defence)
        if isinstance(min_clients, bool) or not isinstance(min_clients, int) or min_clients < 1:
            raise OptionError(f"min_clients is {min_clients!r}; give an integer ≥ 1")
        if not is_weight(min_weight):
            raise OptionError(f"min_weight is {min_weight!r}; give a finite number ≥ 0")
        self.min_clients, self.min_weight = min_clients, min_weight
        if isinstance(self.defence, Coordinates) and not self.method.uniform:
            raise OptionError(
                f"defence {self.defence.name!r} takes the place of the sum over clients, and method "
                f"{self.method.name!r} is not made from such a sum alone; use method 'flexlora', or another rule"
            )
        quorum = min_clients > 1 or min_weight > 0
        summed = mechanism.Summed(rank, self.method, self.solver, missing, self.defence, quorum)
        self._private = mechanism.of_round(privacy, policy, reference, summed)
        self.refused = Refusals()
        self._clients: dict[str, Client] = {}
        self._admission = self._fresh_admission()
        self._kept = 0  # bytes of tensors from files
        self._grams = self._gram_table()
        kernels = self.device.type == "cuda" and obstacle() is None
        self._resident = Resident(self.device) if kernels else None
        self._stored = Stored() if kernels else None
        self._timed = True  # whether wall times go into the file of ``finish(out=…)``
        self._suspicious = False  # whether a client's values turned out bad in ``finish``
        self._started = time.perf_counter()

    @property
    def clients(self) -> list[str]:
        """Names of the accepted clients, sorted."""
        return sorted(self._clients)

    def name_for(self, adapter: Source) -> str:
        """The name a client gets when none is given: the adapter's own, its path, or a running number."""
        if isinstance(adapter, Adapter | bytes | Upload):
            number = len(self._clients) + self.refused.total
            while (name := f"client-{number:04d}") in self._clients:  # somebody is called so
                number += 1
            return (adapter.client if isinstance(adapter, Adapter) else None) or name
        return PurePath(os.path.normpath(adapter)).as_posix()

    @torch.inference_mode(False)  # the caller's is left: what is made in it could not be written outside it
    def add(self, adapter: Source, weight: float = 1.0, client: str | None = None) -> None:
        """Take one client into the round.

        Args:
            adapter: an :class:`Adapter`, or the path of a PEFT adapter folder; with a policy, also that of a
                safetensors file, or its bytes.
            weight: its weight before normalisation, finite and ≥ 0 (usually its number of examples).
            client: its name, a non-empty string of its own (default: ``name_for``); results do not depend on the
                order of arrival of named clients.

        Raises:
            AdapterError (UnsupportedAdapterError, IncompatibleAdapterError, with a policy RefusedError), WeightError:
            the client is refused, noted in ``refused``, and the round is as if it had never come. OSError: its copy
            cannot be written (a full disk), or there are no descriptors left; the same, but not noted, as it is none of
            the client's doing.

        Without a policy a folder must stay as it is until the round is finished; an adapter's tensors always must.

        With ``read="add"`` this is where most of the round's work happens: files are read, values checked, and the
        Grams of the factors grow with every 128 columns, as far as a quarter of ``memory_limit`` goes.
        """
        name = self.name_for(adapter) if client is None else client
        try:
            check_name(name)
            self._admission.check_client(name, weight)
            if self._private is not None:
                self._private.check_weight(weight)
            source = self._entrance.take(adapter, name, weight)
            try:
                self._admission.check(name, source)
                held = self._kept_if_room(source) if self.read == "add" else source
                if self.read == "add" and self.policy is None:
                    check_values(name, held)
                factor = 1.0 if self._private is None else self._private.factor(held, float(weight))
            except BaseException:
                self._entrance.drop(source)
                raise
        except FlexLoRAError as error:
            error.at(client=str(name))  # str: a name may be refused for being none
            self.refused.note(str(name), error)
            raise
        try:
            self._entrance.keep(source, name, float(weight))
        except BaseException:
            self._entrance.drop(source)
            raise
        checked = self.read == "add" or self.policy is not None
        self._clients[name] = Client(name, held, float(weight), source, checked=checked, factor=factor)
        self._kept += held.skeleton.nbytes if held is not source else 0
        self._admission.accept(name, source)
        if self._resident is not None:
            self._resident.take(name, held)
        if self._stored is not None:
            self._stored.take(name, held)
        if self._grams is not None and not held.on_disk:
            with full_precision():
                self._grams.take(name, held)

    @torch.inference_mode(False)
    def finish(self, out: str | os.PathLike[str] | None = None) -> GlobalUpdate:
        """Aggregate what was added.

        Args:
            out: a file to write the update to, each layer as soon as it is solved, instead of holding it in memory;
                the update returned reads from it. It appears whole or not at all, and is what ``GlobalUpdate.save``
                writes.

        Raises:
            EmptyRoundError: no client was accepted, or the defence rejects all. WeightError: all weights are zero.
            QuorumError: less than ``min_clients`` or ``min_weight``; add more clients, and call it again.
            OptionError: a layer that does not fit ``memory_limit`` in any way, before anything is computed.
            PrivacyError: the round would exceed its privacy budget.
            AdapterError: a client whose values are bad (``read="finish"``), or whose file cannot be read any more. It
                is refused; call ``finish`` again to go on without it, then all others are checked first. Without a
                client: a layer whose ΔW overflows.

        With a defence, clients whose values are bad are refused, and the round goes on without them.

        A private round is charged before its noise is drawn. It may be empty: that nobody came is a secret as well.
        Each ``finish`` is another release, with noise of its own, and charged again; so is one that fails half-way.
        """

        def solve(work: Work, frame: GlobalUpdate, budget: int) -> GlobalUpdate:
            if out is None:
                return finishing.to_memory(work, frame, budget, self.progress)
            return finishing.to_file(work, frame, budget, self.progress, Path(out), self._timed)

        return self._finished(solve)

    def _finished(self, solve: Callable[[Work, GlobalUpdate, int], T]) -> T:
        """What ``solve`` makes of the round's work, an update without layers, and bytes to read ahead."""
        if self._suspicious:
            self._check_the_others()
        there = self._kept + (0 if self._grams is None else self._grams.nbytes)
        grams = KeptGrams(self._grams, (self.memory_limit - there) // 4)
        judged, verdicts = self._judged(grams)
        clients = [client for client in judged if client.share > 0]
        if self._private is None:  # of nobody, noise is released
            weighing.check_quorum(clients, self.min_clients, self.min_weight)
        work = Work(clients, self._settings(), grams, self._resident, self._stored)
        if self._private is not None:  # planned by now, so that what cannot be solved costs nothing
            work = dataclasses.replace(work, release=self._private.open())
        frame = GlobalUpdate(
            layer_updates={},
            clients=[finishing.record(client) for client in judged],
            refused=list(self.refused),
            method=str(self.method),
            seed=self.seed,
            template=finishing.template(clients) if self._private is None else dict(self._private.config),
            seconds={"collect": time.perf_counter() - self._started},
            defence=None if self.defence is None else str(self.defence),
            verdicts=verdicts,
            privacy=None if work.release is None else work.release.spent,
            weight=sum(client.weight for client in clients),
            missing=self.missing,
        )
        budget = self._make_room(work, grams)
        try:
            update = solve(work, frame, budget)
        except AdapterError as error:
            if error.client in self._clients:
                self._refuse(error.client, error)
                self._suspicious = True
            raise
        for client in clients:
            client.checked = True
        return update

    def _settings(self) -> Settings:
        return Settings(
            self.rank,
            self.method,
            self.solver,
            self.tol,
            self.device,
            self.seed,
            self.missing,
            self.memory_limit,
            self.certificate,
            self.results,
            memory.room(self.device, self._room),
            self.defence if isinstance(self.defence, Coordinates) else None,
            self._private,
        )

    def _fresh_admission(self) -> Admission:
        return Admission() if self._private is None else Admission(self._private.outline)

    def _gram_table(self) -> GramTable | None:
        """Grams are worth growing where clients come one by one and their factors go into the sum as they are."""
        if self.read != "add" or not self.method.folds or self.device.type != "cpu" or not cpu.usable("float32"):
            return None
        if self._private is not None:
            return None

        def wanted(spec: LayerSpec, columns: int, sixteen: bool) -> bool:
            # Which rank the round will keep is not known yet where none was given; a usual one stands for it.
            shape = plan.Shape(spec.m, spec.n, columns, self.rank or 16, self.tol, 1, self.certificate, sixteen)
            return (plan.choose(shape) if self.solver == "auto" else self.solver) == "krylov"

        return GramTable(self.memory_limit // 4, wanted)

    # -- memory ---

    def _kept_if_room(self, adapter: Adapter) -> Adapter:
        """The adapter with its tensors in memory, while there is room: then they are read once."""
        room = self.memory_limit // 2 - self._kept
        return adapter.in_memory() if adapter.on_disk and adapter.skeleton.nbytes <= room else adapter

    def _make_room(self, work: Work, grams: KeptGrams) -> int:
        """Let go of tensors in memory that solving leaves no room for; they are read again. Bytes to read ahead."""
        room = self.memory_limit - work.scratch
        if self._grams is not None:
            # The table holds on to the factors it was made from: none can be let go while it is there.
            if self._grams.nbytes + self._kept > room - work.held:
                self._grams.drop()
            room -= self._grams.nbytes
        if grams.nbytes + self._kept > room - work.held:
            grams.drop()
        room -= grams.nbytes
        for name in self.clients:
            client = self._clients[name]
            if client.adapter is not client.source and self._kept > room - work.held:
                client.adapter = client.source
                if self._stored is not None:
                    self._stored.take(name, client.source)
                self._kept -= client.source.skeleton.nbytes
        return min(room - self._kept, work.ahead)

    # -- clients ---

    def _weighted(self) -> list[Client]:
        """The clients of positive weight with their shares. In a private round those are the weights as they are."""
        return weighing.weighted(self._clients, self.refused, normalised=self._private is None)

    def _judged(self, grams: KeptGrams) -> tuple[list[Client], list[Verdict]]:
        """``_weighted`` after the defence: a client that it rejects has share 0. Bad values are refused on the way."""
        if isinstance(self.defence, Coordinates):
            self._check_the_others()
        clients = self._weighted()
        if self.defence is None or isinstance(self.defence, Coordinates):
            return clients, []
        self._make_room(Work(clients, self._settings()), grams)
        try:
            return clients, judging.judge(
                self.defence, clients, self._settings(), grams, self._admission, self._gram_of
            )
        except AdapterError as error:
            if error.client not in self._clients:
                raise
            self._refuse(error.client, error)
        self._check_the_others()
        grams.drop()
        return self._judged(grams)

    def _gram_of(self, work: Work, pairs: bool) -> Tensor:
        return gram_of(work, pairs)

    def _check_the_others(self) -> None:
        """Look at all values not seen yet: with one bad client found, the round shall not start once for each."""
        for client in [client for client in self._clients.values() if not client.checked]:
            try:
                check_values(client.name, client.adapter)
                client.checked = True
            except AdapterError as error:
                error.at(client=client.name)
                self._refuse(client.name, error)
        self._suspicious = False

    def _refuse(self, name: str, error: AdapterError) -> None:
        """Refuse an accepted client after all."""
        self.refused.note(name, error)
        self._take_out(name)

    def _take_out(self, name: str) -> None:
        """Let an accepted client be one that never came; what it settled is open."""
        gone = self._clients.pop(name)
        self._kept -= gone.source.skeleton.nbytes if gone.adapter is not gone.source else 0
        if self._resident is not None:
            self._resident.drop(name)
        if self._stored is not None:
            self._stored.drop(name)
        if self._grams is not None:
            self._grams.forget(name)
        self._entrance.drop(gone.source)
        self._admission = self._fresh_admission()
        self._admission.accept_all({client.name: client.source for client in self._clients.values()})
