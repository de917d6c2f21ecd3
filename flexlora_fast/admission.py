"""Who may join a round: each client is checked against itself and against those that came before it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from flexlora_fast import values
from flexlora_fast.adapter import Adapter
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, WeightError, shown
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.skeleton import Skeleton

if TYPE_CHECKING:
    from flexlora_fast.gate.reference import Reference


class Admission:
    """What the clients of a round have settled, and the checks that each next one must pass.

    ``reference``: settles all of it instead, so that no client has a say in who else may join.
    """

    def __init__(self, reference: Reference | None = None) -> None:
        self._names: set[str] = set()
        # What the round has settled, and who did.
        self._specs: dict[str, tuple[LayerSpec, str]] = {}
        self._agreed: dict[str, tuple[Any, str]] = {}
        self._reference = reference
        if reference is not None:
            self._settle("the policy", reference)

    def check_client(self, name: str, weight: Any) -> None:
        """What can refuse a client before its adapter is looked at.

        Raises ``WeightError`` for a weight that is no finite number ≥ 0, ``IncompatibleAdapterError`` for a name that
        was already taken.
        """
        if name in self._names:
            raise IncompatibleAdapterError("this client is already in the round; give each client its own name")
        if not is_weight(weight):
            raise WeightError(f"weight is {shown(weight)}; give a finite number ≥ 0")

    def check(self, name: str, adapter: Adapter) -> None:
        """Raise ``IncompatibleAdapterError`` for layers, extras or a config that do not fit those of the round."""
        for layer, spec in adapter.skeleton.specs.items():
            known, first = self._specs.get(layer, (spec, ""))
            if geometry(spec) != geometry(known):
                raise IncompatibleAdapterError(
                    f"its {describe(spec)} does not fit the {describe(known)} of {first}; "
                    "all clients of a round must adapt the same base model",
                    layer=layer,
                )
        for fact, (value, remedy) in _common_facts(adapter.skeleton).items():
            agreed, first = self._agreed.get(fact, (value, ""))
            if value != agreed:
                raise IncompatibleAdapterError(f"its {fact} is {value!r}, that of {first} is {agreed!r}; {remedy}")

    def accept(self, name: str, adapter: Adapter) -> None:
        """Let a client that passed ``check`` settle what was still open."""
        self._names.add(name)
        if self._reference is None:
            self._settle(f"client {name!r}", adapter.skeleton)

    def accept_all(self, adapters: Mapping[str, Adapter]) -> None:
        """The same for many: each skeleton settles what it can once, however many have it."""
        self._names.update(adapters)
        if self._reference is None:
            first: dict[int, str] = {}
            for name, adapter in adapters.items():
                if first.setdefault(id(adapter.skeleton), name) == name:
                    self._settle(f"client {name!r}", adapter.skeleton)

    def _settle(self, who: str, skeleton: Skeleton | Reference) -> None:
        for layer, spec in skeleton.specs.items():
            self._specs.setdefault(layer, (spec, who))
        for fact, (value, _) in _common_facts(skeleton).items():
            self._agreed.setdefault(fact, (value, who))


def check_values(name: str, adapter: Adapter) -> None:
    """Read every tensor of a client once, layer by layer, and raise ``AdapterError`` for values no sum may take up."""
    if _settled_on_device(adapter):
        return
    for layer in adapter.layers:
        A, B, bias = adapter.factors_and_bias(layer)
        keys = adapter.skeleton.keys_of(layer)
        values.check_layer(A, B, bias, adapter.scale(layer), keys=keys, client=name, layer=layer)
    for key, tensor in adapter.extras.items():
        values.check_finite(tensor, key, client=name)


def _settled_on_device(adapter: Adapter) -> bool:
    """Whether tensors on a GPU are all harmless, by one number that is waited for instead of two a tensor."""
    tensors = [] if adapter.on_disk else [X for X in adapter.state_dict().values() if X.is_floating_point()]
    if not tensors or not all(X.is_cuda for X in tensors):
        return False
    largest = float(torch.nn.utils.get_total_norm(tensors, norm_type=torch.inf))
    entries = max(X.numel() for X in tensors)
    scale = max(abs(adapter.scale(layer)) for layer in adapter.layers) if adapter.layers else 0.0
    return values.harmless(largest, entries, scale)


def check_name(name: Any) -> None:
    """Raise ``AdapterError`` for a client name that is no string: names are sorted, and keys in JSON.

    >>> check_name(3)
    Traceback (most recent call last):
    flexlora_fast.errors.AdapterError: its name is 3; give a non-empty string
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"its name is {name!r}; give a non-empty string")


def is_weight(weight: Any) -> bool:
    """A number, finite and ≥ 0; NumPy's numbers count, as dataset sizes often are."""
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        return False
    try:
        return math.isfinite(weight) and float(weight) >= 0
    except OverflowError:  # an int beyond float
        return False


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights ≥ 0, of which one is positive, as shares that sum to 1."""
    # A power of two is taken out first, which is exact: the sum of weights may overflow.
    _, exponent = math.frexp(max(weights))
    scaled = [math.ldexp(weight, -exponent) for weight in weights]
    total = math.fsum(scaled)
    return [weight / total for weight in scaled]


def geometry(spec: LayerSpec) -> tuple[Any, ...]:
    """What of a layer all clients of a round must share."""
    return spec.kind, spec.m, spec.n, spec.experts, spec.a_shape_tail


def describe(spec: LayerSpec) -> str:
    """The same in words."""
    experts = f" × {spec.experts} experts" if spec.experts > 1 else ""
    return f"{spec.kind} weight of {spec.m} outputs and {spec.n} inputs{experts}"


def _common_facts(skeleton: Skeleton | Reference) -> dict[str, tuple[Any, str]]:
    """What all clients of a round must agree about, as far as this one says anything of it: value and remedy."""
    facts = facts_of(skeleton.config)
    for key, form in skeleton.extras.items():
        facts[f"shape of tensor {key!r}"] = (form.shape, "tensors that are averaged must have one shape")
    return facts


def facts_of(config: Config) -> dict[str, tuple[Any, str]]:
    """What all clients of a round must agree about in their configs: value and remedy by key."""
    facts: dict[str, tuple[Any, str]] = {
        key: (config.get(key), remedy)
        for key, remedy in (
            ("trainable_token_indices", "averaged token rows must be the same tokens on every client"),
            ("alora_invocation_tokens", "activated LoRA must be activated by the same tokens on every client"),
        )
    }
    base = PurePath(str(config.get("base_model_name_or_path") or "")).name  # a local copy has another parent folder
    if base:
        facts["base_model_name_or_path"] = (base, "all clients of a round must adapt the same base model")
    return facts


def check_configs(named: Iterable[tuple[str, Config]]) -> None:
    """Raise ``IncompatibleAdapterError`` for configs, by whose they are, that disagree in ``facts_of`` with the first
    that says anything of it.
    """
    agreed: dict[str, tuple[Any, str]] = {}
    for name, config in named:
        for fact, (value, remedy) in facts_of(config).items():
            known, first = agreed.setdefault(fact, (value, name))
            if value != known:
                raise IncompatibleAdapterError(f"{fact} of {name} is {value!r}, that of {first} is {known!r}; {remedy}")


def check_geometries(named: Iterable[tuple[str, LayerSpec]]) -> None:
    """Raise ``IncompatibleAdapterError`` for layers of one name, by whose they are, of different geometry."""
    known: dict[str, tuple[LayerSpec, str]] = {}
    for name, spec in named:
        before, first = known.setdefault(spec.name, (spec, name))
        if geometry(spec) != geometry(before):
            raise IncompatibleAdapterError(
                f"the {describe(spec)} of {name} does not fit the {describe(before)} of {first}; "
                "all must adapt the same base model",
                layer=spec.name,
            )
