"""Client-level differential privacy: clipped sums, Gaussian noise on every entry before the SVD, and its accounting."""

from __future__ import annotations

from flexlora_fast.privacy.accounting import Charge, epsilon
from flexlora_fast.privacy.guarantee import Privacy, Spent
from flexlora_fast.privacy.ledger import Ledger

__all__ = ["Charge", "Ledger", "Privacy", "Spent", "epsilon"]
