"""FlexLoRA in NVFlare (2.9): an aggregator for FedAvg recipes, and a filter that gives each site its own rank.

NVFlare sends all sites one model. Here that is the global adapter at the largest rank, and each site's filter cuts it
to the site's own, with the scale kept. What comes back is held against a ``RoundPolicy``.
Needs ``flexlora_fast[nvflare]``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.fl_constant import FLMetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
except ImportError as error:
    raise ImportError(
        "flexlora_fast.integrations.nvflare needs NVFlare; install it with pip install 'flexlora_fast[nvflare]'"
    ) from error

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError, RefusedError, shown
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.integrations.served import UNREADABLE, Served, policy_of
from flexlora_fast.integrations.states import at_rank, checked_rank
from flexlora_fast.update import GlobalUpdate, Refusal

Policy = RoundPolicy | Mapping[str, Any] | str | Path

log = logging.getLogger(__name__)

_MOST_METRICS = 10_000  # of one site
_LONGEST = 256  # characters of a metric's name
_META = "flexlora"  # key in the meta of the global model


class FlexLoRAAggregator(ModelAggregator):
    """``FlexLoRARecipe(aggregator=FlexLoRAAggregator(policy), server_expected_format="pytorch", …)``.

    Results are taken in as they arrive, each copied, so that NVFlare's can go. One that is not in order (NaN, a wrong
    shape, a weight above the policy's …) is refused, logged with its code, and left out; the run goes on. So it does,
    with the global model as it was, after a round that nobody joined or that missed its quorum. Sites train at the
    policy's scale for their rank; with ``server_expected_format="pytorch"`` bfloat16 factors travel as they are.

    Args:
        policy: what sites may send: a ``RoundPolicy`` or its ``to_json`` document, which the job then holds (NVFlare
            warns of its names "a_key" and "b_key", which are no secrets), or the path of its file, which must be there
            wherever the job runs. A site's weight is what its result has under ``weight_key`` in ``FLModel.meta`` (1
            without it, as in NVFlare's FedAvg): set ``max_weight``.
        rank: of the global model; default: the largest that the policy allows.
        options: what else a round takes (``Aggregator``): ``{"defence": "clip", "min_clients": 3}``.

    Attributes:
        update: the last round's ``GlobalUpdate``. refused: the round's refusals.

    The global model has in ``metrics`` the averages of the accepted sites' own, by weight (finite numbers alone), and
    in ``meta["flexlora"]`` the round's numbers: see ``Served.metrics``. Both go to all sites with it. A site whose
    script raises never comes here: see ``FlexLoRARecipe``.
    """

    def __init__(
        self,
        policy: Policy,
        rank: int | None = None,
        options: Mapping[str, Any] | None = None,
        weight_key: str = FLMetaKey.NUM_STEPS_CURRENT_ROUND,
    ) -> None:
        super().__init__()
        if options and "privacy" in options:
            raise OptionError(
                "a private round is none in NVFlare: the sites' own metrics and the round's counts go out with the "
                "global model; use ff.Aggregator"
            )
        # NVFlare writes a job down from the attributes that are called as the arguments.
        self.policy = _written(policy)
        self.rank, self.options, self.weight_key = rank, None if options is None else dict(options), weight_key
        self._served = Served(policy, rank, options)
        self._metrics: dict[str, dict[str, float]] = {}

    @property
    def update(self) -> GlobalUpdate | None:
        return self._served.update

    @property
    def refused(self) -> list[Refusal]:
        return self._served.refused

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """A result as controllers like ScatterAndGather give it; NVFlare says whose it is, not the result itself."""
        self.fl_ctx = fl_ctx
        peer = fl_ctx.get_peer_context()
        name = "" if peer is None else peer.get_identity_name()
        try:
            model = FLModelUtils.from_shareable(shareable, fl_ctx)
        except Exception as error:  # whatever a stranger's object makes of it
            what = f"its result is no model ({type(error).__name__}: {shown(str(error), 200)})"
            self._served.refuse(name, RefusedError(what, code=UNREADABLE, value=type(error).__name__))
            return False
        return self._take(model, name)

    def accept_model(self, model: FLModel) -> None:
        """One site's result. What it holds never raises; ``OSError`` where this server's own disk fails."""
        meta = model.meta if isinstance(model.meta, dict) else {}
        name = meta.get("client_name")  # the controller's word, not the site's
        self._take(model, name if isinstance(name, str) else "")

    def aggregate_model(self) -> FLModel:
        """The global model at the largest rank; after a round that changes nothing, a difference of nothing."""
        state = self._served.finish()
        meta = {_META: dict(self._served.metrics)}
        if state is None or self.update is None:
            return FLModel(params_type=ParamsType.DIFF, params={}, meta=meta)
        shares = {client.name: client.weight for client in self.update.clients if client.weight > 0}
        metrics = self._averaged(shares)
        log.info("The sites' own metrics, averaged over those accepted: %s", metrics)
        return FLModel(params_type=ParamsType.FULL, params=state, metrics=metrics, meta=meta)

    def reset_stats(self) -> None:
        """Begin a round."""
        self._served.begin()
        self._metrics = {}

    def _take(self, model: FLModel, name: str) -> bool:
        meta = model.meta if isinstance(model.meta, dict) else {}
        try:
            if model.params_type != ParamsType.FULL:
                raise RefusedError(
                    f"its params_type is {shown(str(model.params_type))}, and differences of factors give none of B·A",
                    code="params-type",
                    value=model.params_type,
                    remedy="send the factors themselves (params_transfer_type FULL)",
                )
            metrics = _numbers(model.metrics)
        except RefusedError as error:
            self._served.refuse(name, error)
            return False
        if self._served.take(model.params, meta.get(self.weight_key, 1.0), name) is not None:
            return False
        self._metrics[name] = metrics
        return True

    def _averaged(self, shares: Mapping[str, float]) -> dict[str, float] | None:
        """By weight over the sites that have a metric."""
        found: dict[str, float] = {}
        for key in sorted({key for name in shares for key in self._metrics.get(name, {})}):
            having = [(shares[name], self._metrics[name][key]) for name in shares if key in self._metrics.get(name, {})]
            total = math.fsum(share for share, _ in having)
            found[key] = math.fsum(share / total * value for share, value in having)
        return found or None


class FlexLoRAFilter(DXOFilter):
    """``recipe.add_client_input_filter(FlexLoRAFilter(policy, rank=8), tasks=["train"], clients=["site-1"])``.

    The global adapter comes at this site's rank, and at the scale that goes with it, ready for
    ``peft.set_peft_model_state_dict``. It is the same update cut to that rank, exactly: the global model's columns are
    singular triplets in descending order.

    Args:
        policy: the server's: a ``RoundPolicy``, its ``to_json`` document, or its file. rank: the site's own.

    Raises ``OptionError`` for a rank that the policy does not allow, and for tensors ``AdapterError`` as ``at_rank``.
    """

    def __init__(self, policy: Policy, rank: int) -> None:
        super().__init__(supported_data_kinds=[DataKind.WEIGHTS], data_kinds_to_filter=None)
        self._policy_object = policy_of(policy)
        self.policy, self.rank = _written(policy), rank
        checked_rank(rank, self._policy_object)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """The same with other factors: arrays of NumPy where it has those, else tensors."""
        state = at_rank(dxo.data, self._policy_object, self.rank)
        if all(isinstance(value, np.ndarray) for value in dxo.data.values()):
            return DXO(dxo.data_kind, {key: tensor.numpy() for key, tensor in state.items()}, dict(dxo.meta))
        return DXO(dxo.data_kind, state, dict(dxo.meta))


class FlexLoRARecipe(FedAvgRecipe):
    """NVFlare's ``FedAvgRecipe``, with all its arguments, but a run goes on without sites that fail.

    NVFlare's own ends for one of them, and has no argument for it, as its ``FedAvg`` controller has
    (``ignore_result_error``). Quorum is the aggregator's: ``FlexLoRAAggregator(policy, options={"min_clients": 2})``.
    """

    def _get_controller_kwargs(self) -> dict[str, Any]:
        return {**super()._get_controller_kwargs(), "ignore_result_error": True}


class GlobalAdapter(torch.nn.Module):
    """The initial global model: a PEFT adapter folder (at the largest rank), its tensors by their state-dict keys.

    For ``FlexLoRARecipe(model={"class_path": "flexlora_fast.integrations.nvflare.GlobalAdapter", "args": {"folder":
    …}})``: the base model stays with the sites. Raises what ``Adapter.load`` raises.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.folder = str(folder)
        for key, tensor in Adapter.load(folder).state_dict().items():
            *path, name = key.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(name, tensor)


def _written(policy: Policy) -> str | dict[str, Any]:
    """What a job's JSON has for a policy: the path that was given, else the whole document."""
    return str(policy) if isinstance(policy, str | Path) else policy_of(policy).to_json()


def _numbers(metrics: Any) -> dict[str, float]:
    """The finite numbers among a site's metrics; the others are left out, as NVFlare does."""
    if metrics is None:
        return {}
    if not isinstance(metrics, dict) or len(metrics) > _MOST_METRICS:
        what = f"its metrics are a {shown(type(metrics).__name__)}, or over {_MOST_METRICS}"
        raise RefusedError(what, code="metrics", value=type(metrics).__name__, remedy="send fewer, in a dict")
    found = {}
    for key, value in metrics.items():
        named = isinstance(key, str) and len(key) <= _LONGEST
        if not named or isinstance(value, bool) or not isinstance(value, numbers.Real):
            continue
        with contextlib.suppress(OverflowError):  # an int beyond float
            if math.isfinite(number := float(value)):
                found[key] = number
    return found
