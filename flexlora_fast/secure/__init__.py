"""Rounds in which the server sees sums alone: linear sketches for any secure summation protocol.

FlexLoRA's mean update is no mean of factors, so factors cannot be summed under encryption. Products ΔW·W with a matrix
W that everybody knows can: they are linear in ΔW, they add up, their size does not depend on the client's rank, and a
few of them hold the leading directions of the sum. Clients encode them as integers modulo 2³² or 2⁶⁴ (``Plan``,
``sketch``); whatever protocol adds these vectors up, ``Server`` makes an ordinary ``GlobalUpdate`` of the sums.

With ``rounds=2`` (range, then projection) the server learns the range of ΔW·Ω and has ΔW projected onto it; every
further round is half a power step; ``rounds=1`` recovers ΔW from three sketches of one round.

Edge servers that sum up their own clients hand their sums on with ``part``, and the centre's update is that of one flat
round, bit for bit.

**Defences that compare clients (those of ``ff.defence``, which need all ⟨ΔW_i, ΔW_j⟩) and the checks of a
``RoundPolicy`` on values cannot be combined with secure aggregation: both look at single updates, which it hides.**
Nothing here takes a ``defence`` or a policy's bounds, and ``Aggregator`` takes no sums. What is left against a hostile
client is what the client's own software does (``Plan.clip``), and whatever proofs of norms the summing protocol offers.

**What several rounds reveal**: sums over sets of clients that differ by one client differ by that client's part. Where
a single one drops out between two summed rounds, the server, which knows Qᵀ·ΣΔW·Ω of both sets, knows Qᵀ·ΔW·Ω of it.
``rounds=1`` takes all that it needs in one sum. A sum that was refused and is taken again without one client gives the
same difference, of all that is summed up in that round, whatever ``rounds`` is.

Source of the sketches: see ``secure.server``.

>>> import torch, flexlora_fast as ff
>>> state = {"base_model.model.fc.lora_A.weight": torch.eye(2, 3),
...          "base_model.model.fc.lora_B.weight": torch.tensor([[3., 0.], [0., 4.]])}
>>> adapters = [ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": alpha}) for alpha in (1, 3)]
>>> plan = Plan.from_adapter(adapters[0], rank=2, clients=10, clip=20.0)
>>> server = Server(plan)
>>> while not server.done:
...     server.receive(add(sketch(adapter, plan, server.message) for adapter in adapters))
>>> server.finish().delta("fc").round(decimals=4)
tensor([[3., 0., 0.],
        [0., 4., 0.]])
"""

from __future__ import annotations

from flexlora_fast.secure.client import sketch
from flexlora_fast.secure.encoding import add
from flexlora_fast.secure.plan import Plan
from flexlora_fast.secure.server import Server
from flexlora_fast.secure.sums import Part, part

__all__ = ["Part", "Plan", "Server", "add", "part", "sketch"]
