"""A server's rounds: in memory, or each in a folder that survives its server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flexlora_fast import files, methods
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.update import GlobalUpdate

_FOLDER = re.compile(r"round-(\d{4,})(\.nothing)?")
_UPDATE = "global_update.safetensors"


class Rounds:
    """One round after another, under one policy.

    Args:
        directory: None keeps nothing. options: as for ``Aggregator`` or ``Round.open``.
    """

    def __init__(self, policy: RoundPolicy, directory: str | Path | None, options: dict[str, Any]) -> None:
        taken = sorted({"policy", "rank", "spool"} & options.keys())
        if taken:
            raise OptionError(f"option {taken[0]!r} is the strategy's own; leave it away")
        if methods.get(options.get("method", "flexlora")).merges:
            raise OptionError(
                f"method {options['method']!r} has clients add to their frozen weights, which no message of this "
                "framework carries; use 'flexlora', or ff.Aggregator and GlobalUpdate.merge_into"
            )
        self.policy, self.options = policy, options
        self.directory = None if directory is None else Path(directory)
        self._round: Any = None

    @property
    def is_open(self) -> bool:
        return self._round is not None

    @property
    def clients(self) -> list[str]:
        """Names of those in the open round, sorted."""
        return sorted(self._round.clients) if self.is_open else []

    def last(self) -> tuple[int, GlobalUpdate | None]:
        """The number of the last round that is over, and the last update that one made; 0 and None where there is
        none.
        """
        if self.directory is None or not self.directory.is_dir():
            return 0, None
        found = [(int(name[1]), path) for path in self.directory.iterdir() if (name := _FOLDER.fullmatch(path.name))]
        nothing = {number for number, path in found if path.suffix}
        done = {number: path / _UPDATE for number, path in found if not path.suffix and (path / _UPDATE).is_file()}
        made = max(done.keys() - nothing, default=0)
        return max([0, *done, *nothing]), GlobalUpdate.load(done[made]) if made else None

    def nothing(self, number: int) -> None:
        """Note that a round is over and changes nothing. Else it would be taken up again by a server that is started
        anew, with uploads that were trained from an older update than those of the rounds after it.
        """
        if self.directory is not None:
            files.replace(self.directory / f"round-{number:04d}.nothing", lambda _: None)

    def open(self, number: int, rank: int) -> list[str]:
        """Begin a round, or take it up; returns the clients that are in it. One that was open is left as it is."""
        self.close()
        if self.directory is None:
            self._round = Aggregator(rank, policy=self.policy, **self.options)
        else:
            from flexlora_fast.journal import Round

            folder = self.directory / f"round-{number:04d}"
            self._round = Round.open(folder, policy=self.policy, rank=rank, **self.options)
        return list(self._round.clients)

    def add(self, upload: bytes, weight: Any, client: str) -> None:
        """Raises what ``Aggregator.add`` and ``Round.add`` raise."""
        self._round.add(upload, weight, client=client)

    def finish(self) -> GlobalUpdate:
        """The update; the round is closed, whatever comes of it. Raises what ``Aggregator.finish`` raises."""
        try:
            while True:
                clients = set(self._round.clients)
                try:
                    return self._round.finish()
                except AdapterError as error:
                    if error.client not in clients:  # else it is out of the round now
                        raise
        finally:
            self.close()

    def close(self) -> None:
        """Let others take up the round that is open, if there is one."""
        if self.directory is not None and self._round is not None:
            self._round.close()
        self._round = None
