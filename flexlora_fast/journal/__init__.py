"""A round that survives its server: every upload is on disk before it is acknowledged.

``Round`` puts a journal in front of an ``Aggregator``. A folder holds all there is to know: ``round.json`` (how the
round was begun, written once), ``manifest.jsonl`` (what was acknowledged, a line each, ``lines``), ``spool/`` (the
uploads) and ``quarantine/`` (what refused ones looked like, ``evidence``). ``ledger`` says what the lines mean,
``examination`` holds the folder against them, ``writing`` changes it.
"""

from __future__ import annotations

from flexlora_fast.journal.evidence import Quarantine
from flexlora_fast.journal.examination import Damage, Status, examine
from flexlora_fast.journal.round import Receipt, Round

__all__ = ["Damage", "Quarantine", "Receipt", "Round", "Status", "examine"]
