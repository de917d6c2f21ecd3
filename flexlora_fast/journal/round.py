"""A journalled round: what it has acknowledged, a server that dies does not lose."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from flexlora_fast import storage
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import is_weight
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import (
    AdapterError,
    JournalError,
    OptionError,
    QuorumError,
    RefusedError,
    UnreadableError,
    WeightError,
    shown,
)
from flexlora_fast.folder import content_of
from flexlora_fast.gate import Reason, RoundPolicy, intake
from flexlora_fast.gate.entrance import Source
from flexlora_fast.journal import examination, ledger, options, place
from flexlora_fast.journal.entrance import Journalled, SpoolEntrance
from flexlora_fast.journal.evidence import Arriving
from flexlora_fast.journal.examination import Status
from flexlora_fast.journal.ledger import Accepted
from flexlora_fast.journal.options import Options
from flexlora_fast.journal.place import Place
from flexlora_fast.journal.writing import Journal
from flexlora_fast.tensorfile import Opened
from flexlora_fast.update import GlobalUpdate

_LONGEST_NAME = 256


@dataclass(frozen=True)
class Receipt:
    """An upload is on disk and in the round.

    Attributes:
        client: whose. digest: the SHA-256 of its weights, hexadecimal. bytes: of its weights.
        new: False where the round had it already, and nothing was written.
    """

    client: str
    digest: str
    bytes: int
    new: bool


class Round:
    """One round in a folder, made or taken up by ``open``. Its methods may be called from several threads.

    The folder is the round's own; remove it when its update is where you want it.

    Attributes:
        path: of the folder. policy: what clients may send.

    >>> import tempfile, torch, safetensors.torch
    >>> policy = RoundPolicy.from_config({"r": 2, "lora_alpha": 4}, {"fc": (4, 3)}, ranks=(2,), max_weight=100)
    >>> upload = safetensors.torch.save({"base_model.model.fc.lora_A.weight": torch.ones(2, 3),
    ...                                  "base_model.model.fc.lora_B.weight": torch.ones(4, 2)})
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Round.open(folder.name, policy=policy) as round_:
    ...     round_.add(upload, weight=10, client="hospital-3").new
    True
    >>> with Round.open(folder.name) as round_:  # after a crash, say
    ...     round_.add(upload, weight=10, client="hospital-3").new, round_.finish().layers
    (False, ['fc'])
    """

    def __init__(self, journal: Journal, held: Opened, head: dict[str, Any], how: dict[str, Any]) -> None:
        self.policy = RoundPolicy.from_json(head["policy"])
        self._journal: Journal | None = journal
        self._held: Opened | None = held
        self.path, self._replaces = journal.place.path, head["options"]["duplicate"] == "replace"
        self._first = head["options"]["quarantine"]["first"]
        self._options = options.of_aggregator(head["options"]) | how
        self._round: Journalled | None = None
        self._mutex = threading.RLock()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        policy: RoundPolicy | None = None,
        memory_limit: int | str | None = None,
        read: Literal["add", "finish"] = "add",
        progress: bool | None = None,
        **given: Unpack[Options],
    ) -> Round:
        """Begin a round, or take up the one that is there.

        Args:
            path: of its folder. policy: what clients may send; needed to begin.
            memory_limit, read, progress: as for ``Aggregator``, of this process alone. A layer that does not fit
                ``memory_limit`` comes out with other bytes: for the same ones give the same limit.
            rank, method, solver, tol, device, seed, missing, certificate, defence, min_clients, min_weight: as for
                ``Aggregator``. Methods and defences go by their names.
            duplicate: what becomes of another upload of a client that is in the round: "refuse", or "replace".
            quarantine: how much to keep of what is refused, a ``journal.Quarantine``.

        All but ``memory_limit``, ``read`` and ``progress`` are written down. When a round is taken up they need not be
        given; those that are must be the same.

        Raises:
            OptionError: an option or policy that the round was not begun with, or none to begin one.
            JournalError: the folder is in use, is something else, or cannot be written or read.
        """
        where, wanted = Place(path), options.recorded(given)
        how = {"memory_limit": memory_limit, "read": read, "progress": progress}
        begun, rules = options.complete(wanted), None if policy is None else policy.to_json()
        with _disk(where.path):
            if not os.path.lexists(where.head):
                if policy is None:
                    raise OptionError(f"{str(path)!r} is no round yet; give the policy to begin one with")
                # What no round can be begun with leaves no folder behind.
                Aggregator(policy=policy, **options.of_aggregator(begun) | how)
                place.make(where.path)
            place.check_folder(where.path)
            held = where.locked()
            try:
                if rules is not None and not os.path.lexists(where.head):
                    where.check_foreign()
                    where.create(begun, rules)
                head = where.read_head()
                options.check_same(wanted, head["options"], where.path)
                if rules is not None and rules != RoundPolicy.from_json(head["policy"]).to_json():
                    raise OptionError(
                        f"the policy is another than the round at {str(path)!r} was begun with; leave it away, or "
                        "begin another round"
                    )
                return cls(Journal(where, head), held, head, how)
            except BaseException:
                place.let_go(held)
                raise

    def add(self, upload: Source, weight: float = 1.0, *, client: str, config: bytes | None = None) -> Receipt:
        """Take one client's upload into the round. It is on disk for good when this returns.

        The same upload again (weights, config and ``weight``) changes nothing, and has the same receipt but for
        ``new``. So whoever got no receipt sends again.

        Args:
            upload: the path of a PEFT folder or of a safetensors file, its bytes, or an ``Adapter``, which is held
                against the policy and written down as its weights alone.
            weight: as for ``Aggregator.add``. client: its name, at most 256 characters.
            config: the content of the client's ``adapter_config.json``, for uploads that are no folder.

        Raises:
            AdapterError (RefusedError), WeightError: it is refused, which is recorded together with its first bytes, as
                far as ``quarantine`` has room; the round goes on. "duplicate": the client has sent another one before.
                "closed": the round is finished.
            JournalError: it could not be written. It is not acknowledged, nothing else is lost, and it may be sent
                again once there is room.
        """
        with self._writing(client) as journal, contextlib.ExitStack() as stack:
            arriving = None
            try:
                _check_name(client)
                arriving = self._opened(upload, weight, client, config, stack)
                return self._add(journal, arriving, weight, client)
            except UnreadableError as error:
                raise JournalError(f"it cannot be read: {error.message}", client=client) from error
            except (AdapterError, WeightError) as error:
                name = client if _is_name(client) else shown(client)
                error.at(client=name)
                journal.turn_away(error, name, arriving)
                raise

    def finish(self) -> GlobalUpdate:
        """The update, also in the folder as ``global_update.safetensors``; asked again, the same one.

        Its bytes do not depend on how often the server died meanwhile, nor on the order in which clients came. Wall
        times are in ``seconds`` of what is returned, and not in the file.

        Raises:
            QuorumError, EmptyRoundError: there are not enough clients yet.
            DamagedRoundError: uploads that were acknowledged are not there any more, or are others now. Have them sent
                again, or go on without them (``drop``, ``forgo``).
            JournalError: it cannot be written; and what ``Aggregator.finish`` raises.
        """
        with self._writing() as journal:
            target, done = journal.place.update, journal.ledger.finished
            if done is not None and place.is_file(target, done["sha256"], done["bytes"]):
                return dataclasses.replace(storage.load(target), seconds=done["seconds"])
            round_ = self._aggregator(journal)
            journal.look_around()
            journal.check_whole()
            round_.refused[:] = journal.ledger.refused()
            try:
                update = round_.finish(target)
            except QuorumError:
                raise
            except UnreadableError as error:
                self._round = None
                journal.take_up()
                journal.check_whole()
                raise JournalError(f"{error.message}; finish again", client=error.client) from error
            except BaseException:
                self._round = None
                raise
            self._round = None
            _record(journal, update)
            return update

    def drop(self, client: str, reason: str) -> None:
        """Take an acknowledged client out of the round, until it sends again. Its upload is removed.

        Raises ``AdapterError`` for a client that is not in it, ``JournalError`` where this cannot be written.
        """
        with self._writing(client) as journal:
            self._check_open(journal)
            entry = journal.ledger.accepted.get(client)
            if entry is None:
                raise AdapterError(f"it is not in the round; it has {len(self.clients)} clients", client=client)
            round_, self._round = self._round, None  # until it is sure what is in it
            journal.append(ledger.drop(client, reason))
            journal.settle(client=client)
            journal.remove([entry])
            if round_ is not None and round_.holds(client):
                round_.withdraw(client)
            self._round = round_

    def forgo(self, line: int, reason: str) -> None:
        """Go on without a line of the manifest that is lost, and what it may have acknowledged.

        Raises ``OptionError`` for a line that is not, ``JournalError`` where this cannot be written.
        """
        with self._writing() as journal:
            self._check_open(journal)
            if line not in journal.lost:
                raise OptionError(f"line {line} is not lost; these are: {sorted(journal.lost) or 'none'}")
            journal.append(ledger.forgo(line, reason))
            journal.settle(line=line)

    def status(self) -> Status:
        """What is there, as ``journal.examine`` finds it; all uploads are read for it."""
        with self._mutex:
            return examination.examine(self.path)

    @property
    def clients(self) -> list[str]:
        """Names of the clients whose uploads were acknowledged, sorted."""
        with self._writing() as journal:
            return sorted(journal.ledger.accepted)

    def close(self) -> None:
        """Let others open the round. What is acknowledged stays; more than once does no harm."""
        with self._mutex:
            held, self._round, self._journal, self._held = self._held, None, None, None
            if held is not None:
                place.let_go(held)

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- its parts ---

    @contextlib.contextmanager
    def _writing(self, client: Any = None) -> Iterator[Journal]:
        """The journal, to one thread at a time; after a flush that failed, what is on disk is found out first."""
        with self._mutex, _disk(self.path, client):
            if self._journal is None:
                raise JournalError(f"the round at {str(self.path)!r} was closed; open it again")
            if self._journal.doubtful:
                self._round = None
                self._journal.take_up()
            yield self._journal

    def _check_open(self, journal: Journal) -> None:
        if journal.ledger.finished is not None:
            raise OptionError(f"the round at {str(self.path)!r} is finished, and stays as it is")

    def _aggregator(self, journal: Journal) -> Journalled:
        """The round in memory; made from the spool where there is none, whoever came first."""
        if self._round is None:

            def lost(client: str) -> list[int]:
                """Of the others those that are not in the round here, where they would be counted."""
                names = {x.client for x in journal.damage if x.client is not None and not made.holds(x.client)}
                return [journal.ledger.accepted[x].bytes for x in names - {client}]

            entrance = SpoolEntrance(self.policy, journal.new_file, journal.commit, lost)
            made = Journalled(self.policy, entrance, **self._options)
            for client in sorted(journal.ledger.accepted):
                if not journal.is_damaged(client):
                    self._put_in(made, journal, journal.ledger.accepted[client])
            self._round = made
        return self._round

    def _put_in(self, round_: Journalled, journal: Journal, entry: Accepted) -> None:
        try:
            adapter = self.policy.admitted(journal.place.upload(entry.n), client=entry.client)
            round_.add(adapter, entry.weight, entry.client)
        except AdapterError as error:  # it was whole a moment ago
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in intake.SHORTAGES:
                raise error.__cause__ from None
            journal.note(entry, error.message)

    def _opened(
        self, upload: Source, weight: float, client: str, config: bytes | None, stack: contextlib.ExitStack
    ) -> Arriving:
        if isinstance(upload, Adapter):
            self.policy.check(upload, client=client, weight=weight)
            upload = content_of(upload.state_dict())
        opened = stack.enter_context(intake.opened(upload, self.policy.max_config_bytes))
        if opened.config is None and config is not None:
            opened = dataclasses.replace(opened, config=bytes(config))
        return Arriving(opened, self._first)

    def _add(self, journal: Journal, arriving: Arriving, weight: float, client: str) -> Receipt:
        known, finished = journal.ledger.accepted.get(client), journal.ledger.finished is not None
        if known is not None:
            same = arriving.upload.size == known.bytes and is_weight(weight)
            same = same and known.same(float(weight), arriving.read_all(), arriving.config)
            if same and (finished or self._is_intact(journal, known)):
                return Receipt(client, known.sha256, known.bytes, new=False)
        if finished:
            raise RefusedError("the round is finished", code=Reason.CLOSED, remedy="send it to the next one")
        if known is not None and not same and not self._replaces:
            raise RefusedError(
                f"it has sent another upload before, of SHA-256 {known.sha256[:16]}… and weight {known.weight:g}",
                code=Reason.DUPLICATE,
                value=client,
                remedy="send the same again, or have the server drop it first",
            )
        self._take(journal, arriving, weight, client)
        return Receipt(client, arriving.sha256, arriving.upload.size, new=True)

    def _take(self, journal: Journal, arriving: Arriving, weight: float, client: str) -> None:
        round_ = self._aggregator(journal)
        known, number = journal.ledger.accepted.get(client), journal.next
        there = round_.holds(client)
        self._round = None  # until it is sure what is in it: an interrupt may come anywhere
        try:
            if there:
                round_.withdraw(client)
            with journal.receiving(arriving):
                round_.add(arriving.upload, weight, client)
        except Exception:
            if journal.next == number and not journal.doubtful:
                if there and known is not None:
                    self._put_in(round_, journal, known)
                self._round = round_
            raise
        else:
            self._round = round_
        finally:
            round_.refused.clear()

    def _is_intact(self, journal: Journal, entry: Accepted) -> bool:
        """Whether an acknowledged upload is still there; otherwise the same may come again."""
        if journal.is_damaged(entry.client):
            return False
        return self._aggregator(journal).holds(entry.client) and self._aggregator(journal).intact(entry.client)


def _record(journal: Journal, update: GlobalUpdate) -> None:
    """Write down that the round is finished, and what it gave; what is made again must be the same."""
    path, done = journal.place.update, journal.ledger.finished
    size = os.stat(path).st_size
    digest = place.sha256(path, size)
    if digest is None:
        raise JournalError(f"{str(path)!r} changed while it was written; finish again")
    if done is None:
        journal.append(ledger.finish(digest, size, update.seconds))
    elif (digest, size) != (done["sha256"], done["bytes"]):
        os.unlink(path)
        raise JournalError(
            f"the update came out with SHA-256 {digest[:16]}…, and had {done['sha256'][:16]}… when the round was "
            "finished; finish it with the same versions and memory_limit, on the same kind of machine"
        )
    journal.damage = []


@contextlib.contextmanager
def _disk(path: os.PathLike[str], client: Any = None) -> Iterator[None]:
    """What the file system refuses, as a ``JournalError``."""
    try:
        yield
    except OSError as error:
        where = os.fspath(path) if error.filename is None else error.filename
        raise JournalError(
            f"{where!r} cannot be written or read ({error.strerror}); {place.remedy(error)}: what was acknowledged is "
            "not lost, what was not may be sent again",
            client=client if _is_name(client) else None,
        ) from error


def _is_name(client: Any) -> bool:
    return isinstance(client, str) and 0 < len(client) <= _LONGEST_NAME


def _check_name(client: Any) -> None:
    if not _is_name(client):
        raise RefusedError(
            f"its name is {shown(client)}", code=Reason.NAME, value=client, remedy="give a text of 1 to 256 characters"
        )
