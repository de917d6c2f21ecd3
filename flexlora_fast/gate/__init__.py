"""Untrusted bytes in, an ``Adapter`` out, or a refusal with a code and a sentence.

A ``RoundPolicy`` says what a client may send; nothing that a client sends is believed beside it. Data goes one way:
``intake`` opens and copies, ``manifest`` holds the header against the layers that the policy expects, ``claims`` does
the same with the config, ``norms`` looks at the values.
"""

from __future__ import annotations

from flexlora_fast.gate.policy import RoundPolicy
from flexlora_fast.gate.reasons import Reason

__all__ = ["Reason", "RoundPolicy"]
