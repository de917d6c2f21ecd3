"""What the clients of a round may send, as the server says it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, Unpack
from weakref import WeakValueDictionary

import torch

from flexlora_fast import config as configs
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import check_name, is_weight
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, OptionError, RefusedError, shown
from flexlora_fast.gate import claims, intake, norms, stored
from flexlora_fast.gate.intake import Spool, Upload
from flexlora_fast.gate.manifest import Manifest
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.gate.reference import Reference
from flexlora_fast.layouts import FACTOR_DTYPES, LayerSpec
from flexlora_fast.skeleton import Form, Skeleton
from flexlora_fast.tensorfile import Index, TensorFile

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CONFIG = 16_384  # bytes of a config apart from what grows with the layers; PEFT's own defaults take 1,400

ScaleRule = Literal["alpha", "constant"] | Callable[[str, int], float]
ClientRanks = Mapping[str, Collection[int]] | Callable[[str], Collection[int]]


class Rules(TypedDict, total=False):
    """What a :class:`RoundPolicy` allows beyond the layers; see there."""

    ranks: Required[Collection[int]]
    scale: ScaleRule
    dtypes: Collection[torch.dtype]
    max_weight: float
    max_bytes: int | None
    max_layer_norm: float
    max_norm: float
    max_extra_norm: float
    max_clients: int | None
    max_round_bytes: int | None
    client_ranks: ClientRanks | None
    partial: bool


class RoundPolicy:
    """The only source of truth about a round: what is admitted agrees with it in everything but the numbers.

    Made by ``from_adapter``, ``from_model`` or ``from_config``, which say what the layers are. The rules:

    Args:
        ranks: allowed for any layer, such as ``(8, 16, 64)`` or ``range(1, 65)``.
        scale: what s is at a rank. "alpha": the reference's alpha (and rsLoRA) of each layer, as PEFT scales it;
            "constant": the reference's s of each layer at every rank; or a function from layer and rank to s.
            A client whose config says otherwise is refused, since it trained another update.
        dtypes: of factors, and of other tensors (which may also keep the reference's dtype).
        max_weight: the largest weight that a client may have.
        max_bytes: of a weights file (default: what the expected tensors take at the largest rank in the widest dtype).
        max_layer_norm: of ‖s·B·A‖_F of each layer (and of ‖s·b‖ with ``lora_bias``). max_norm: of the root of the
            sum of their squares. max_extra_norm: of each other tensor. Default: what float32 can hold.
        max_clients: how many clients a round takes; max_round_bytes: the bytes of weights that it takes in all.
            Default: any number. A round refuses those that come when it is full.
        client_ranks: for clients that may have fewer ranks than ``ranks``: those, by client name, or a function from
            name to them. Clients that a mapping does not name have all of ``ranks``.
        partial: an upload may leave layers out, each with all its tensors (and a module's layers together, where it
            has several). Otherwise every layer of the reference must be there, as every other tensor always must.

    >>> import safetensors.torch
    >>> policy = RoundPolicy.from_config({"r": 8, "lora_alpha": 16}, {"fc": (4, 3)}, ranks=(2, 8), max_layer_norm=100)
    >>> state = {"base_model.model.fc.lora_A.weight": torch.ones(2, 3),
    ...          "base_model.model.fc.lora_B.weight": torch.ones(4, 2)}
    >>> policy.admit(safetensors.torch.save(state), client="a").scale("fc")
    8.0
    >>> state["base_model.model.fc.lora_B.weight"] *= 1e9
    >>> policy.admit(safetensors.torch.save(state), client="b")
    Traceback (most recent call last):
    flexlora_fast.errors.RefusedError: client 'b', layer 'fc': ‖s·B·A‖_F is 5.543e+10, the policy allows 100; ...
    """

    def __init__(self, reference: Reference, **rules: Unpack[Rules]) -> None:
        self.reference = reference
        self.ranks = rules["ranks"] if isinstance(rules["ranks"], range) else frozenset(rules["ranks"])
        self.scale_rule = rules.get("scale", "alpha")
        self.dtypes = frozenset(rules.get("dtypes", _DTYPES))
        self.max_weight = rules.get("max_weight", 1.0)
        self.max_layer_norm = rules.get("max_layer_norm", math.inf)
        self.max_norm = rules.get("max_norm", math.inf)
        self.max_extra_norm = rules.get("max_extra_norm", math.inf)
        self.max_clients, self.max_round_bytes = rules.get("max_clients"), rules.get("max_round_bytes")
        self.client_ranks, self.partial = rules.get("client_ranks"), rules.get("partial", False)
        self._check_rules()
        self._manifest = Manifest(
            reference.specs, reference.bias_keys, reference.extras, self.ranks, self.dtypes, self.partial
        )
        wanted = rules.get("max_bytes")
        needed = 8 + self._manifest.longest_header + self._manifest.longest_data
        if wanted is not None and (not _is_count(wanted) or wanted < 8):
            raise OptionError(f"max_bytes is {wanted!r}; give a number of bytes, or None for what the layers take")
        self.max_bytes = needed if wanted is None else min(wanted, needed)
        # Names of modules come up to three times: in both patterns, escaped, and in target_modules.
        self.max_config_bytes = _CONFIG + sum(8 * (len(spec.pattern_name) + 16) for spec in reference.specs.values())
        self._skeletons: WeakValueDictionary[Any, Skeleton] = WeakValueDictionary()

    # -- ways to make one ---

    @classmethod
    def from_adapter(cls, reference: Adapter | str | os.PathLike[str], **rules: Unpack[Rules]) -> RoundPolicy:
        """The layers, other tensors and config of an adapter of the server's own (or its trusted folder)."""
        adapter = reference if isinstance(reference, Adapter) else Adapter.load(reference)
        return cls(Reference.of(adapter.skeleton), **rules)

    @classmethod
    def from_model(cls, model: Any, adapter_name: str = "default", **rules: Unpack[Rules]) -> RoundPolicy:
        """Those of a live PEFT model's adapter (needs ``peft``); the scale each layer has now is the reference's."""
        return cls(Reference.of(Adapter.from_peft(model, adapter_name).skeleton), **rules)

    @classmethod
    def from_config(
        cls,
        config: Any,
        layers: Mapping[str, Sequence[int]],
        extras: Mapping[str, Sequence[int]] | None = None,
        *,
        embeddings: Mapping[str, Sequence[int]] | None = None,
        **rules: Unpack[Rules],
    ) -> RoundPolicy:
        """From a ``LoraConfig`` (or its dict) and the shapes of the weights it adapts.

        Args:
            layers: by module path, (m, n), outputs and inputs, of linear layers (``fan_in_fan_out`` or not), and
                (m, in, k…) of convolutions. embeddings: (m, n), width and number of rows. extras: shapes of other
                tensors (heads, biases) by module path and name, such as ``{"classifier.weight": (2, 768)}``; float32.

        Raises ``OptionError`` for shapes that are none, and for experts (``target_parameters``): use ``from_adapter``
        or ``from_model``.
        """
        return cls(Reference.of_shapes(config, layers, extras or {}, embeddings or {}), **rules)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoundPolicy:
        """The policy that ``save`` wrote.

        Raises ``OptionError`` for a file that cannot be read, or has anything in it that ``save`` does not write.
        """
        return cls.from_json(stored.read(path))

    @classmethod
    def from_json(cls, document: Any) -> RoundPolicy:
        """The policy of a ``to_json`` document; raises ``OptionError`` for any other."""
        reference, rules = stored.from_json(document)
        return cls(reference, **rules)

    # -- what it says ---

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able, versioned (``"format"``); a scale function becomes a table of all layers and ranks.

        >>> policy = RoundPolicy.from_config({"r": 8}, {"fc": (4, 3)}, ranks=(2, 8))
        >>> RoundPolicy.from_json(policy.to_json()) == policy
        True
        """
        return stored.to_json(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``to_json`` to a file, whole or not at all; ``load`` reads it. Returns its path."""
        return stored.save(self, path)

    def __eq__(self, other: object) -> bool:
        """Whether both admit the same: that is whether their documents are equal. Raises as ``to_json`` does."""
        return self is other or (isinstance(other, RoundPolicy) and self.to_json() == other.to_json())

    def __hash__(self) -> int:
        return hash((self.max_bytes, frozenset(self.ranks), frozenset(self.reference.specs)))

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """The expected layers."""
        return dict(self.reference.specs)

    @property
    def config(self) -> Config:
        """The config that admitted adapters get, but for their ranks and alphas."""
        return dict(self.reference.config)

    @property
    def names(self) -> list[str]:
        """The state-dict keys of all tensors that an upload may have."""
        return list(self._manifest.names)

    def scale(self, layer: str, rank: int) -> float:
        """The scale s of a layer at a rank."""
        if callable(self.scale_rule):
            return float(self.scale_rule(layer, rank))
        if self.scale_rule == "constant":
            return self.reference.scales[layer]
        return configs.scale_for(self.reference.config, self.reference.specs[layer].pattern_name, rank)

    # -- the gate ---

    def admit(
        self,
        upload: str | os.PathLike[str] | bytes | Upload,
        *,
        client: str,
        weight: float = 1.0,
        spool: Spool = None,
        config: bytes | None = None,
        room: int | None = None,
    ) -> Adapter:
        """The adapter in an upload, or a refusal.

        Args:
            upload: the path of a PEFT folder or of a safetensors file, or the bytes of one. Opened once, without
                following links, and copied before its values are looked at: what happens to it later has no effect.
            weight: checked only.
            spool: a folder of the server's own to keep the copy in (or a function that makes the file there, and
                returns its descriptor and path); it stays there until the caller removes it (of a refused client
                nothing stays). The adapter reads its tensors from it. None: they are kept in memory.
            config: the content of the client's ``adapter_config.json``, for uploads that are no folder. Without it
                the client is taken to have trained at the policy's scales.
            room: bytes that are left of the round's ``max_round_bytes``.

        Returns:
            An adapter with the client's tensors, and with the policy's layers, scales and config.

        Raises:
            RefusedError: its ``code`` is one of ``gate.Reason``. OSError: the copy cannot be written, or no
                descriptor is left to open the upload with.
        """
        try:
            self._check_client(client, weight)
            with intake.opened(upload, self.max_config_bytes) as opened:
                index = intake.index_of(opened, self.max_bytes, self._manifest.longest_header)
                self._check_room(opened.size, room)
                forms, ranks = self._forms_and_ranks(index)
                self._check_client_ranks(client, ranks)
                claimed = opened.config if opened.config is not None else config
                if claimed is not None:
                    self._check_claims(claimed, ranks)
                skeleton = self._skeleton(index, forms, ranks)
                file = intake.copied(opened, index, spool)
            adapter = Adapter.of_skeleton(skeleton, file.renamed(skeleton.names), client)
            adapter = adapter if spool is not None else adapter.in_memory()
            try:
                self._check_values(adapter, client)
            except BaseException:
                discard(adapter)
                raise
            return adapter
        except RefusedError as error:
            error.at(client=shown_name(client))
            raise

    def admitted(self, copy: str | os.PathLike[str], *, client: str) -> Adapter:
        """The adapter in a copy that ``admit`` has left in its ``spool``, without another look at its values: the
        caller knows that they are the same.

        Raises ``AdapterError`` (``RefusedError``) where the copy is gone, or holds other tensors.
        """
        file = TensorFile(copy)
        forms, ranks = self._forms_and_ranks(file.index)
        skeleton = self._skeleton(file.index, forms, ranks)
        return Adapter.of_skeleton(skeleton, file.renamed(skeleton.names), client)

    def check(self, adapter: Adapter, *, client: str, weight: float = 1.0, room: int | None = None) -> None:
        """Hold an adapter that was made in this process against the policy; ``room`` as for ``admit``.

        Raises ``RefusedError`` as ``admit`` does.
        """
        skeleton = adapter.skeleton
        try:
            self._check_client(client, weight)
            self._check_room(skeleton.nbytes, room)
            ranks = self._manifest.ranks_of(skeleton.forms)
            self._check_client_ranks(client, ranks)
            for layer, spec in skeleton.specs.items():
                known = self.reference.specs[layer]
                if (spec.kind, spec.experts) != (known.kind, known.experts):
                    raise RefusedError(
                        f"its {spec.kind} weight of {spec.experts} experts is not the policy's {known.kind} weight "
                        f"of {known.experts}",
                        code=Reason.SHAPE,
                        layer=layer,
                        value=spec.kind,
                        remedy="train on the base model of this round",
                    )
                claims.check_scale(skeleton.scales[layer], self.scale(layer, ranks[layer]), layer)
            claims.check_base(skeleton.config, self.reference.config)
            self._check_values(adapter, client)
        except RefusedError as error:
            error.at(client=shown_name(client))
            raise

    # -- its parts ---

    def _check_client(self, client: Any, weight: Any) -> None:
        try:
            check_name(client)
        except AdapterError:
            raise RefusedError(
                f"its name is {shown(client)}", code=Reason.NAME, value=client, remedy="give a non-empty string"
            ) from None
        if not is_weight(weight) or weight > self.max_weight:
            raise RefusedError(
                f"its weight is {shown(weight)}, the policy allows 0 to {self.max_weight:g}",
                code=Reason.WEIGHT,
                value=weight,
                remedy="give a smaller one, or the policy another max_weight",
            )

    def _forms_and_ranks(self, index: Index) -> tuple[dict[str, Form], dict[str, int]]:
        forms = {name: Form(entry.shape, entry.dtype) for name, entry in index.entries.items()}
        return forms, self._manifest.ranks_of(forms)

    def _check_room(self, size: int, room: int | None) -> None:
        if room is not None and size > room:
            raise RefusedError(
                f"its weights have {size} bytes, and {max(room, 0)} are left of the round's {self.max_round_bytes}",
                code=Reason.ROUND_BYTES,
                value=size,
                remedy="take it into the next round, or give the policy another max_round_bytes",
            )

    def _check_client_ranks(self, client: str, ranks: Mapping[str, int]) -> None:
        given = self.client_ranks
        allowed = given(client) if callable(given) else (given or {}).get(client, self.ranks)
        for layer, rank in ranks.items():
            if rank not in allowed:
                raise RefusedError(
                    f"its rank is {rank}, the policy allows this client {shown(sorted(allowed))}",
                    code=Reason.RANK,
                    layer=layer,
                    value=rank,
                    remedy="train at a rank that the policy allows this client",
                )

    def _check_claims(self, claimed: bytes, ranks: Mapping[str, int]) -> None:
        config = claims.parse(claimed, self.max_config_bytes)
        claims.check(config, self.reference.config, self.reference.specs, ranks, self.scale)

    def _check_values(self, adapter: Adapter, client: str) -> None:
        norms.check(adapter, client, self.max_layer_norm, self.max_norm, self.max_extra_norm)

    def _skeleton(self, index: Index, forms: Mapping[str, Form], ranks: dict[str, int]) -> Skeleton:
        """What the adapter is apart from its numbers, none of it the client's but ranks and dtypes; one for all
        uploads of the same header.
        """
        known = self._skeletons.get(index.digest)
        if known is None:
            of = self.reference.narrowed(ranks)
            scales = {layer: self.scale(layer, rank) for layer, rank in ranks.items()}
            paths = {layer: spec.pattern_name for layer, spec in of.specs.items()}
            try:
                config = configs.with_ranks(of.config, ranks, scales, paths)
            except AdapterError as error:  # layers that PEFT gives one rank (MultiheadAttention's two)
                raise RefusedError(
                    error.message.rpartition("; ")[0],
                    code=Reason.RANK,
                    layer=error.layer,
                    value=ranks.get(error.layer or ""),
                    remedy="use one rank for all of them",
                ) from None
            names = {key: key for key in sorted(forms)}
            forms = {key: forms[key] for key in names}
            known = Skeleton(config, of.specs, of.bias_keys, list(of.extras), dict(ranks), scales, names, forms)
            self._skeletons[index.digest] = known
        return known

    def _check_rules(self) -> None:
        """Raise ``OptionError`` for a rule that the server cannot mean."""
        if not self.ranks or not all(_is_count(rank) for rank in self.ranks):
            raise OptionError(f"ranks is {shown(self.ranks)}; give the ranks that are allowed, integers ≥ 1")
        if not (callable(self.scale_rule) or self.scale_rule in ("alpha", "constant")):
            raise OptionError(f"scale {self.scale_rule!r} is neither 'alpha', 'constant' nor a function")
        if not self.dtypes or not self.dtypes <= set(FACTOR_DTYPES):
            raise OptionError(f"dtypes is {shown(set(self.dtypes))}; give some of {', '.join(map(str, FACTOR_DTYPES))}")
        for name in ("max_clients", "max_round_bytes"):
            quota = getattr(self, name)
            if quota is not None and not _is_count(quota):
                raise OptionError(f"{name} is {quota!r}; give a whole number ≥ 1, or None for any number")
        if not isinstance(self.partial, bool):
            raise OptionError(f"partial is {self.partial!r}; give True or False")
        if isinstance(self.client_ranks, Mapping):
            for client, ranks in self.client_ranks.items():
                if not isinstance(client, str):
                    raise OptionError(f"client_ranks has {shown(client)}, which is no client's name; give texts")
                if not isinstance(ranks, Collection) or not ranks or not set(ranks) <= set(self.ranks):
                    raise OptionError(f"client_ranks[{client!r}] is {shown(ranks)}; give some of {shown(self.ranks)}")
        elif not (self.client_ranks is None or callable(self.client_ranks)):
            raise OptionError(f"client_ranks is {shown(self.client_ranks)}; give a mapping or a function")
        for name in stored.BOUNDS:
            bound = getattr(self, name)
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
                raise OptionError(f"{name} is {bound!r}; give a number > 0")


def discard(adapter: Adapter) -> None:
    """Remove the copy that an admitted adapter reads from, if it has one."""
    if isinstance(adapter.tensors, TensorFile):
        with contextlib.suppress(FileNotFoundError):  # gone already, which may be why it is to go
            os.unlink(adapter.tensors.path)


def shown_name(client: Any) -> str:
    """A client's name, for an error that may be about its being none."""
    return client if isinstance(client, str) else shown(client)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
