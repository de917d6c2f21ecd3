"""FlexLoRA as an aggregator for APPFL (1.12), without depending on it.

APPFL's server takes any object that has its ``BaseAggregator``'s methods (https://appfl.ai, developer guide).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError
from flexlora_fast.integrations.served import Served
from flexlora_fast.integrations.states import at_rank
from flexlora_fast.update import GlobalUpdate, Refusal


class FlexLoRAAggregator:
    """``aggregator_path`` / ``aggregator: "FlexLoRAAggregator"`` in the server's YAML, with ``aggregator_kwargs``:

        policy: the path of a policy that ``RoundPolicy.save`` wrote (in Python also a ``RoundPolicy``).
        initial: the adapter folder that clients start from, at ``rank``.
        rank: of the global state dict; default: the largest that the policy allows.
        options: what else a round takes (``Aggregator``): ``{"defence": "clip", "min_clients": 3}``.

    Synchronous rounds: ``aggregate`` takes the local state dicts of all clients. One that is not in order is refused,
    logged with its code, and left out. Weights are the sample sizes that clients gave (``set_client_sample_size``), 1
    where none did. All clients are sent one state dict, at the largest rank: they cut it with ``at_rank(state, policy,
    rank)``, or, in the server's process, ``get_parameters(rank=8)`` does.

    Attributes:
        update: the last round's ``GlobalUpdate``. refused: its refusals. metrics: its numbers, see ``Served``.

    Raises ``OptionError`` and ``AdapterError`` for a policy, rank or initial adapter that do not fit.
    """

    def __init__(
        self, model: Any = None, aggregator_configs: Mapping[str, Any] | None = None, logger: Any = None
    ) -> None:
        given = dict(aggregator_configs or {})
        missing = [name for name in ("policy", "initial") if name not in given]
        if missing:
            raise OptionError(f"aggregator_kwargs has no {missing[0]!r}; give 'policy' and 'initial'")
        self.model, self.aggregator_configs, self.logger = model, aggregator_configs, logger
        self._served = Served(given["policy"], given.get("rank"), given.get("options"))
        initial = Adapter.load(given["initial"]).state_dict()
        # At the rank that is sent, with what the policy lists there; loud where it is of another model.
        self._state = at_rank(initial, self._served.policy, self._served.rank)
        self.client_sample_size: dict[str | int, Any] = {}

    @property
    def update(self) -> GlobalUpdate | None:
        return self._served.update

    @property
    def refused(self) -> list[Refusal]:
        return self._served.refused

    @property
    def metrics(self) -> dict[str, float]:
        return self._served.metrics

    def set_client_sample_size(self, client_id: str | int, sample_size: int) -> None:
        """A client's number of examples: its weight, as far as the policy allows it."""
        self.client_sample_size[client_id] = sample_size

    def aggregate(self, local_models: Mapping[str | int, Any], **_: Any) -> dict[str, Tensor]:
        """The global state dict after a round of these local ones, by client; as it was, where too few are in order."""
        self._served.begin()
        for client, state in local_models.items():
            refusal = self._served.take(state, self.client_sample_size.get(client, 1), str(client))
            if refusal is not None and self.logger is not None:
                self.logger.info(f"FlexLoRA refused ({refusal.code}): {refusal.reason}")
        state = self._served.finish()
        if state is not None:
            self._state = state
        return self.get_parameters()

    def get_parameters(self, rank: int | None = None, **_: Any) -> dict[str, Tensor]:
        """A copy of the global state dict; cut to ``rank`` where one is given."""
        if rank is not None:
            return at_rank(self._state, self._served.policy, rank)
        return {key: tensor.clone() for key, tensor in self._state.items()}
