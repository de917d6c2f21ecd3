"""FlexLoRA aggregation for federated LoRA: right, certified and fast.

>>> import flexlora_fast as ff
>>> ff.methods.get("flexlora").name
'flexlora'
"""

from __future__ import annotations

from flexlora_fast import defence, errors, journal, methods, privacy, secure
from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.combining import combine
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.journal import Receipt, Round
from flexlora_fast.merging import merge
from flexlora_fast.methods import fedbuff as _fedbuff  # noqa: F401 (has ff.methods.fedbuff there)
from flexlora_fast.methods import fedopt as _fedopt  # noqa: F401
from flexlora_fast.methods import slora as _slora  # noqa: F401
from flexlora_fast.oneshot import aggregate
from flexlora_fast.privacy import Privacy
from flexlora_fast.update import ClientRecord, GlobalUpdate, LayerUpdate, Refusal

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Aggregator",
    "ClientRecord",
    "GlobalUpdate",
    "LayerUpdate",
    "Privacy",
    "Receipt",
    "Refusal",
    "Round",
    "RoundPolicy",
    "aggregate",
    "combine",
    "defence",
    "errors",
    "journal",
    "merge",
    "methods",
    "privacy",
    "secure",
]
