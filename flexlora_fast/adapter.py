"""One client's LoRA factors for all its layers: read, check, convert, write."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flexlora_fast import arrays, folder, layouts, values, variants
from flexlora_fast import config as configs
from flexlora_fast.arrays import Array
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError
from flexlora_fast.facts import LayerFacts
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.precision import full_precision
from flexlora_fast.skeleton import Skeleton
from flexlora_fast.tensorfile import TensorFile


class Adapter:
    """The LoRA factors of one client, with the config that gives them their scale.

    Made by ``load`` (a PEFT folder), ``from_peft`` (a live model), ``from_state_dict`` or ``from_factors``;
    never changed afterwards. ``layers`` are module paths without the leading ``base_model.model.``, sorted.
    For each of them ΔW = s·B·A with A (r, n), B (m, r) and s as PEFT scales it: alpha/r, or alpha/√r with
    rsLoRA.

    >>> import torch
    >>> state = {"base_model.model.fc.lora_A.weight": torch.ones(2, 3),
    ...          "base_model.model.fc.lora_B.weight": torch.ones(4, 2)}
    >>> adapter = Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 8})
    >>> adapter.layers, adapter.rank("fc"), adapter.scale("fc")
    (['fc'], 2, 4.0)
    >>> adapter.delta("fc")[0]
    tensor([8., 8., 8.])
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: Any,
        *,
        client: str | None = None,
        facts: Mapping[str, LayerFacts] | None = None,
        initial: bool = False,
    ) -> None:
        self.client = client
        self._tensors: Mapping[str, Tensor]
        if isinstance(tensors, TensorFile) and facts is None:
            self.skeleton = Skeleton.of_file(tensors, config, client, initial)
            self._tensors = tensors.renamed(self.skeleton.names)
        else:
            shared = arrays.as_tensors(tensors, client)
            self.skeleton = Skeleton.of(shared, config, client, facts, initial)
            self._tensors = {key: shared[name].detach() for key, name in self.skeleton.names.items()}

    # -- ways in ---

    @classmethod
    def of_skeleton(cls, skeleton: Skeleton, tensors: Mapping[str, Tensor], client: str | None = None) -> Adapter:
        """Tensors, by the skeleton's names, that are known to have its shapes: nothing is inferred or checked."""
        adapter = cls.__new__(cls)
        adapter.client, adapter.skeleton, adapter._tensors = client, skeleton, tensors
        return adapter

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        client: str | None = None,
        *,
        initial: Adapter | str | os.PathLike[str] | None = None,
    ) -> Adapter:
        """The adapter in a folder that PEFT's ``save_pretrained`` wrote (safetensors).

        Only the header is read now; the tensors are read from the file whenever they are used, so it must stay
        as it is until then (``in_memory`` reads them all). ``initial``: for PiSSA, OLoRA, CorDA and LoRA-GA,
        the same adapter as it was before training, see ``from_state_dict``.

        Raises ``AdapterError`` for a missing or unreadable file (``.bin`` files are never opened: they are
        pickles, which can run code), and what ``from_state_dict`` raises. So does every later use of the tensors
        of a file that has changed.
        """
        tensors, config = folder.read(path, client)
        return cls.from_state_dict(tensors, config, client, initial=initial)

    @classmethod
    def from_peft(cls, model: Any, adapter_name: str = "default", client: str | None = None) -> Adapter:
        """A snapshot of a live PEFT model's adapter (needs ``peft``).

        Tensors are copied, so training on changes nothing here. The scale each layer has now is the truth:
        where ``set_scale`` moved it, the config's alphas are rewritten to match.
        """
        from flexlora_fast import live

        tensors, config, facts = live.snapshot(model, adapter_name, client)
        return cls(tensors, config, client=client, facts=facts)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Array],
        config: Any,
        client: str | None = None,
        *,
        initial: Adapter | str | os.PathLike[str] | None = None,
    ) -> Adapter:
        """An adapter from what ``peft.get_peft_model_state_dict`` returns and its config (``LoraConfig`` or
        dict).

        Values are torch tensors, or arrays with ``__dlpack__`` (CuPy, NumPy, JAX) on any device that torch sees, mixed
        as they come. They are kept where they are, alive, not copied, and never written to; so read-only arrays are
        taken as well, but torch has no such tensors: do not write to what ``factors`` or ``state_dict`` give back.
        ``initial``: PiSSA, OLoRA, CorDA and LoRA-GA
        take s·B0·A0 out of the base weight before training, so their update is s(BA − B0A0); given the
        adapter as it was before training, that update is represented exactly by the factors [B, −B0] and [A;
        A0] of rank 2r at the same scale, over the *original* base weight (as PEFT's
        ``LoraModel.subtract_mutated_init``).

        Raises ``AdapterError`` for tensors or a config that contradict themselves or each other, and
        ``UnsupportedAdapterError`` where ΔW is not s·B·A.

        >>> import numpy as np
        >>> A, B = np.ones((2, 3), dtype="f4"), np.ones((4, 2), dtype="f4")
        >>> state = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}
        >>> adapter = Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 8})
        >>> adapter.factors("fc")[0].data_ptr() == A.ctypes.data
        True
        """
        if initial is None:
            return cls(state_dict, config, client=client)
        trained = cls(state_dict, config, client=client, initial=True)
        if not isinstance(initial, Adapter):
            initial = cls(*folder.read(initial, client), client=client, initial=True)
        return _subtract_initial(trained, initial)

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        specs: Mapping[str, LayerSpec],
        scales: Mapping[str, float],
        config: Any,
        *,
        client: str | None = None,
        lora_bias: Mapping[str, Tensor] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """An adapter from A (E, r, n) and B (E, m, r) by layer, each at its scale.

        ``config`` says everything else; its ranks and alphas are rewritten to match (``config.with_ranks``).
        """
        tensors: dict[str, Tensor] = dict(extras or {})
        for layer, (a, b) in factors.items():
            spec = specs[layer]
            tensors[spec.a_key], tensors[spec.b_key] = layouts.from_factors(spec, a, b)
        for layer, bias in (lora_bias or {}).items():
            tensors[specs[layer].b_key.removesuffix("weight") + "bias"] = bias
        ranks = {layer: a.shape[1] for layer, (a, _) in factors.items()}
        names = {layer: specs[layer].pattern_name for layer in factors}
        facts = {
            layer: LayerFacts(specs[layer].pattern_name, specs[layer].experts, specs[layer].weight_transposed)
            for layer in factors
        }
        config = configs.with_ranks(configs.normalize(config, client), ranks, scales, names)
        return cls(tensors, config, client=client, facts=facts)

    # -- what it holds ---

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers, sorted."""
        return list(self.skeleton.specs)

    @property
    def config(self) -> Config:
        """A copy of the config, JSON-able, as in ``adapter_config.json``."""
        return copy.deepcopy(self.skeleton.config)

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """What is not a low-rank pair (biases, ``modules_to_save``, trainable tokens), by state-dict key."""
        return _Part(self)

    def spec(self, layer: str) -> LayerSpec:
        """Shapes, kind and names of a layer."""
        self._check_layer(layer)
        return self.skeleton.specs[layer]

    def rank(self, layer: str) -> int:
        """The rank r of a layer (of each expert's factors in MoE layers)."""
        self._check_layer(layer)
        return self.skeleton.ranks[layer]

    def scale(self, layer: str) -> float:
        """The scale s of a layer."""
        self._check_layer(layer)
        return self.skeleton.scales[layer]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (E, r, n) and B (E, m, r), E = 1 but for MoE, in their stored dtype; views of the tensors in memory, or
        fresh ones from the file.
        """
        spec = self.spec(layer)
        tensors = self._read((spec.a_key, spec.b_key), layer)
        return layouts.to_factors(spec, tensors[spec.a_key], tensors[spec.b_key])

    def lora_bias(self, layer: str) -> Tensor | None:
        """The bias (m,) of B where the config has ``lora_bias``; its effect on the output is scale·bias."""
        self._check_layer(layer)
        key = self.skeleton.bias_keys.get(layer)
        return None if key is None else self._read((key,), layer)[key]

    def factors_and_bias(self, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the bias of B, as ``factors`` and ``lora_bias`` give them, in one read."""
        spec = self.spec(layer)
        tensors = self._read(self.skeleton.keys_of(layer), layer)
        A, B = layouts.to_factors(spec, tensors[spec.a_key], tensors[spec.b_key])
        return A, B, tensors.get(self.skeleton.bias_keys.get(layer, ""))

    def flat_extra(self, key: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` … ``stop`` of one of the ``extras``, flattened."""
        if not isinstance(self._tensors, TensorFile):
            return self._tensors[key].reshape(-1)[start:stop]
        try:
            return self._tensors.read_flat(key, start, stop)
        except AdapterError as error:
            raise error.at(client=self.client) from None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by state-dict key, as they are kept: those of a ``TensorFile`` are read at each access."""
        return self._tensors

    @property
    def on_disk(self) -> bool:
        """Whether tensors are read from a file at each use."""
        return isinstance(self._tensors, TensorFile)

    def in_memory(self) -> Adapter:
        """The same adapter with all its tensors in memory, read in one go; itself if they are there."""
        if not self.on_disk:
            return self
        other = copy.copy(self)
        other._tensors = self._read(self.skeleton.names, None, keep=True)
        return other

    @full_precision()
    def delta(self, layer: str, layout: str = "matrix") -> Tensor:
        """The dense update s·B·A, float32 (float64 for float64 factors), whatever the caller's autocast.

        ``layout="matrix"``: (m, n), or (E, m, n) for MoE. ``layout="weight"``: as the weight itself is
        stored, what PEFT's ``get_delta_weight`` returns. A state dict does not tell whether a MoE parameter
        is stored (E, n, m); an adapter made by ``from_peft`` knows, any other takes (E, m, n).
        """
        if layout not in ("matrix", "weight"):
            raise AdapterError(
                f"layout is {layout!r}; it must be 'matrix' or 'weight'", client=self.client, layer=layer
            )
        spec = self.spec(layer)
        a, b = self.factors(layer)
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        update = torch.bmm(b.to(dtype), a.to(dtype)).mul_(self.scale(layer))
        if layout == "weight":
            return layouts.to_weight_layout(spec, update)
        return update if spec.kind == "moe" else update[0]

    def validate_finite(self) -> None:
        """Raise ``AdapterError`` naming the first tensor with a NaN or an infinity, and how many it has."""
        for layer in self.layers:
            keys = self.skeleton.keys_of(layer)
            for key, tensor in self._read(keys, layer).items():
                values.check_finite(tensor, key, client=self.client, layer=layer)
        for key, tensor in self.extras.items():
            values.check_finite(tensor, key, client=self.client)

    # -- ways out ---

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by PEFT's checkpoint keys, ready for ``peft.set_peft_model_state_dict``; not copied, or fresh
        from the file. ``from_dlpack`` of CuPy, NumPy and JAX takes each of them as it is, without a copy.

        >>> import numpy as np
        >>> state = {"fc.lora_A.weight": torch.ones(2, 3), "fc.lora_B.weight": torch.ones(4, 2)}
        >>> tensors = Adapter.from_state_dict(state, {"r": 2}).state_dict()
        >>> A = np.from_dlpack(tensors["base_model.model.fc.lora_A.weight"])
        >>> A.shape, A.ctypes.data == state["fc.lora_A.weight"].data_ptr()
        ((2, 3), True)
        """
        return self._read(self.skeleton.names, None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that ``peft.PeftModel.from_pretrained`` and ``Adapter.load`` read.

        Each of the two files appears complete or not at all, so it is safe to save over the folder read from.
        """
        folder.write(path, self.state_dict(), self.skeleton.config)
        if isinstance(self._tensors, TensorFile) and folder.holds(path, self._tensors.path):
            self._tensors = TensorFile(self._tensors.path)  # the same tensors in a new file

    def load_into(self, model: Any, adapter_name: str = "default") -> bool:
        """Put this adapter into a live PEFT model (needs ``peft``).

        Where the rank of a layer stays, its parameters are written in place and an optimizer keeps them.
        Where it changes, new parameters replace them, with the dtype, device and trainable flags of the old.
        Each layer gets exactly this adapter's scale, and ``model.peft_config`` is corrected, so that
        ``save_pretrained`` reproduces it.

        Returns ``True`` where a rank changed: **rebuild the optimizer then**, the old one holds parameters
        that the model no longer uses. ``False``: the optimizer can stay (its moments still belong to the old
        factors).

        Raises ``AdapterError`` or a subclass, before anything is written, for layers or extras that only one
        side has, other shapes, values that are not finite (or overflow the model's dtype), a merged adapter,
        and a model whose adapter is no plain LoRA.
        """
        from flexlora_fast import live

        return live.load(self, model, adapter_name)

    def __repr__(self) -> str:
        ranks = sorted(set(self.skeleton.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        who = f"client={self.client!r}, " if self.client is not None else ""
        return f"Adapter({who}{len(self.layers)} layers, rank {shown}, {len(self.extras)} extras)"

    # -- checks ---

    def _check_layer(self, layer: str) -> None:
        if layer not in self.skeleton.specs:
            near = difflib.get_close_matches(layer, self.layers, n=3) or self.layers[:3]
            raise AdapterError(
                f"this adapter has no such layer; it has {len(self.layers)}, such as {near}",
                client=self.client,
                layer=layer,
            )

    def _read(self, keys: Iterable[str], layer: str | None, *, keep: bool = False) -> dict[str, Tensor]:
        if not isinstance(self._tensors, TensorFile):
            return {key: self._tensors[key] for key in keys}
        try:
            return self._tensors.read(keys, keep=keep)
        except AdapterError as error:
            raise error.at(client=self.client, layer=layer) from None


class _Part(Mapping[str, Tensor]):
    """The extras of an adapter, each read when it is asked for."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._adapter.skeleton.extra_keys:
            raise KeyError(key)
        return self._adapter._read((key,), None)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.skeleton.extra_keys)

    def __len__(self) -> int:
        return len(self._adapter.skeleton.extra_keys)


def _subtract_initial(trained: Adapter, initial: Adapter) -> Adapter:
    """s(BA − B0A0) as plain LoRA of rank 2r: [B, −B0] and [A; A0]."""
    if variants.mutating_init(trained.skeleton.config) is None:
        raise AdapterError(
            f"initial factors are given, but init_lora_weights={trained.skeleton.config['init_lora_weights']!r} "
            "does not change the base weight, so that nothing is to be subtracted; load it without initial=",
            client=trained.client,
        )
    if trained.layers != initial.layers or trained.skeleton.bias_keys:
        odd = sorted(set(trained.layers) ^ set(initial.layers)) or sorted(trained.skeleton.bias_keys)
        raise AdapterError(
            f"the initial adapter does not match: {odd[:3]} (lora_bias, or layers only one of them has); "
            "save it from the same model right before training",
            client=trained.client,
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in trained.layers:
        (a, b), (a0, b0) = trained.factors(layer), initial.factors(layer)
        same = a.shape == a0.shape and b.shape == b0.shape and trained.scale(layer) == initial.scale(layer)
        if not same:
            raise AdapterError(
                f"A {tuple(a.shape)}, B {tuple(b.shape)} at scale {trained.scale(layer):g}, but the initial "
                f"adapter has A {tuple(a0.shape)}, B {tuple(b0.shape)} at scale {initial.scale(layer):g}; "
                "save it from the same model right before training",
                client=trained.client,
                layer=layer,
            )
        # cat promotes to the wider dtype, which holds both exactly
        factors[layer] = (torch.cat([a, a0], dim=1), torch.cat([b, -b0], dim=2))
    config = trained.config | {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None}
    return Adapter.from_factors(
        factors, trained.skeleton.specs, trained.skeleton.scales, config, client=trained.client, extras=trained.extras
    )
