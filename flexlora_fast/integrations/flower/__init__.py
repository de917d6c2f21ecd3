"""FlexLoRA in Flower (1.41, Message API): a strategy for the ServerApp and a mod for the ClientApp.

``strategy`` runs rounds: it sends each node factors of its own rank, and holds what comes back against a
``RoundPolicy``. ``mod`` is the client's side, ``note`` what one tells the other, ``replies`` what may be wrong with a
reply, ``wire`` tensors as Flower's arrays. Needs ``flexlora_fast[flower]``.
"""

from __future__ import annotations

try:
    import flwr  # noqa: F401 - whether it is there
except ImportError as error:
    raise ImportError(
        "flexlora_fast.integrations.flower needs Flower; install it with pip install 'flexlora_fast[flower]'"
    ) from error

from flexlora_fast.gate import RoundPolicy
from flexlora_fast.integrations.flower.mod import flexlora_mod, rank_mod
from flexlora_fast.integrations.flower.replies import ReplyReason
from flexlora_fast.integrations.flower.strategy import FlexLoRAStrategy
from flexlora_fast.integrations.flower.wire import from_record, to_record

__all__ = [
    "FlexLoRAStrategy",
    "ReplyReason",
    "RoundPolicy",
    "flexlora_mod",
    "from_record",
    "rank_mod",
    "to_record",
]
