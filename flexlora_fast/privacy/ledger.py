"""The rounds that a population of clients has taken part in, on disk: what they cost together is the total ε."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from flexlora_fast import files
from flexlora_fast.errors import PrivacyError
from flexlora_fast.gate import strict
from flexlora_fast.privacy.accounting import ADJACENCY, Charge, epsilon

FORMAT = "flexlora_fast.ledger/1"


class Ledger:
    """Every private round over one population of clients: one line a round, never taken back.

    Args:
        path: of a JSON file, which the first round makes. Several processes may charge it: each locks it (a file beside
            it, ``.lock``), reads it anew, and swaps it in whole and flushed to disk. Where it leads is settled at
            once: links, and later changes of the working directory, make no second ledger. None: in memory, gone with
            the process, and with it what the rounds so far have cost.

    A file that no ledger has written is refused, never begun anew, and so is one that lacks rounds that this object has
    seen there. Without the file all rounds count as not run: keep it as you keep the data.

    >>> ledger = Ledger()
    >>> total, rounds = ledger.charge(Charge(noise_multiplier=1.0, rate=1.0), delta=1e-6)
    >>> round(total, 2), rounds, total == ledger.epsilon(1e-6)
    (4.89, 1, True)
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path).resolve()
        self._rounds: list[Charge] = []  # all, or those that were in the file when it was last read
        self._mutex = threading.RLock()

    def __repr__(self) -> str:
        return f"Ledger({str(self.path) if self.path else None!r})"

    @property
    def rounds(self) -> list[Charge]:
        """The rounds so far, first to last. Raises ``PrivacyError`` for a file that is none, or has lost some."""
        with self._mutex:
            if self.path is not None:
                found = _read(self.path)
                if found[: len(self._rounds)] != self._rounds:
                    lost = f"it has {len(found)} rounds, and not all of the {len(self._rounds)} that it had before"
                    raise _damaged(self.path, lost)
                self._rounds = found
            return list(self._rounds)

    def epsilon(self, delta: float) -> float:
        """ε of all rounds so far at ``delta``."""
        return epsilon(self.rounds, delta)

    def check(self, charge: Charge, delta: float, most: float | None) -> float:
        """ε at ``delta`` with one more round. Raises ``PrivacyError`` where that is more than ``most``."""
        rounds = self.rounds
        total = epsilon([*rounds, charge], delta)
        if most is not None and total > most:
            raise PrivacyError(
                f"after {len(rounds)} rounds at epsilon {epsilon(rounds, delta):.4g} one more would make it "
                f"{total:.4g} (delta {delta:g}), and max_epsilon is {most:g}; stop here, or plan with more noise from "
                "the start"
            )
        return total

    def charge(self, charge: Charge, delta: float, most: float | None = None) -> tuple[float, int]:
        """Write a round down, before anything of it is released.

        Returns ε of all rounds at ``delta``, this among them, and how many they are.

        Raises ``PrivacyError`` where that is more than ``most``, or for a file that is no ledger; nothing is written
        then.
        """
        with self._mutex, self._locked():
            total, rounds = self.check(charge, delta, most), [*self.rounds, charge]
            if self.path is not None:
                _write(self.path, rounds)
            self._rounds = rounds
        return total, len(rounds)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the file, among all processes of this machine."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(self.path.name + ".lock"), "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> list[Charge]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _damaged(path, str(error)) from error
    try:
        document = strict.loads(data)
        if document["format"] != FORMAT or document["adjacency"] != ADJACENCY:
            raise ValueError(f"it is {document['format']!r} of {document['adjacency']!r}")
        if not isinstance(document["rounds"], list):
            raise ValueError("its rounds are no list")
        rounds = [Charge(**line) for line in document["rounds"]]
        for charge in rounds:
            numbers = all(type(value) in (int, float) for value in (charge.noise_multiplier, charge.rate))
            if not (numbers and charge.noise_multiplier > 0 and 0 < charge.rate <= 1):
                raise ValueError(f"no round can have been {charge}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return rounds


def _write(path: Path, rounds: list[Charge]) -> None:
    document = {"format": FORMAT, "adjacency": ADJACENCY, "rounds": [asdict(charge) for charge in rounds]}
    text = json.dumps(document, indent=1, allow_nan=False)
    files.replace(path, lambda to: Path(to).write_text(text, encoding="utf-8"))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power cut could bring the old file back, after the update went out
    finally:
        os.close(folder)


def _damaged(path: Path, why: str) -> PrivacyError:
    return PrivacyError(
        f"{path} cannot be read as a {FORMAT} file ({why}), and without it nobody knows what was spent; restore it "
        "from a backup"
    )
