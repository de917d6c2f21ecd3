"""Which tensors a policy expects, and whether a header has these and no others."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch

from flexlora_fast import layouts
from flexlora_fast.errors import RefusedError, shown
from flexlora_fast.facts import unwrapped
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.skeleton import Form

_METADATA = 4096  # bytes of a header for ``__metadata__``, of which PEFT writes 17
_FIELDS = 192  # bytes of a header for dtype, shape and offsets of one tensor: five sides and two offsets of 19 digits


class Manifest:
    """The names, shapes and dtypes that an upload may have.

    Args:
        specs: by layer. biases: keys of ``lora_B.bias``, by layer. extras: form of every other tensor, by key.
        ranks: allowed. dtypes: allowed; those of integer extras are those of ``extras``.
        partial: whether layers may be left out.
    """

    def __init__(
        self,
        specs: Mapping[str, LayerSpec],
        biases: Mapping[str, str],
        extras: Mapping[str, Form],
        ranks: Collection[int],
        dtypes: Collection[torch.dtype],
        partial: bool = False,
    ) -> None:
        self.specs, self.biases, self.extras, self.ranks, self.dtypes = specs, biases, extras, ranks, dtypes
        self.partial = partial
        self.layer_of = {key: layer for layer, spec in specs.items() for key in (spec.a_key, spec.b_key)}
        self.layer_of |= {key: layer for layer, key in biases.items()}
        self.names = [*self.layer_of, *extras]
        # What PEFT makes at one module's place it makes together: the two layers of a MultiheadAttention, and the
        # parameters of a block of experts, whose names tell only together which is which.
        self._module_of = {
            layer: unwrapped(layer) if spec.kind == "moe" else spec.pattern_name for layer, spec in specs.items()
        }
        self.longest_header = _METADATA + sum(len(json.dumps(name)) + _FIELDS for name in self.names)
        self.longest_data = self._longest_data()

    def _longest_data(self) -> int:
        """Bytes at the largest rank in the widest dtype."""
        width = max(dtype.itemsize for dtype in self.dtypes)
        count = sum(spec.m for layer, spec in self.specs.items() if layer in self.biases)
        count += sum(spec.experts * max(self.ranks) * (spec.m + spec.n) for spec in self.specs.values())
        return width * count + sum(
            form.nbytes // form.dtype.itemsize * max(width, form.dtype.itemsize) for form in self.extras.values()
        )

    def ranks_of(self, forms: Mapping[str, Form]) -> dict[str, int]:
        """The rank of each layer that is there.

        Raises ``RefusedError``: unknown-tensor, missing-tensor, shape, rank, dtype.
        """
        for name in forms:
            if name not in self.layer_of and name not in self.extras:
                raise RefusedError(
                    f"tensor {shown(name)} is not expected",
                    code=Reason.UNKNOWN_TENSOR,
                    value=name,
                    remedy="send what peft.get_peft_model_state_dict(model, save_embedding_layers=False) gives, alone",
                )
        layers = self._layers_of(forms)
        for name in self.names:
            if name not in forms and self.layer_of.get(name, "") in layers:
                raise RefusedError(
                    f"tensor {name!r} is missing",
                    code=Reason.MISSING_TENSOR,
                    layer=self.layer_of.get(name),
                    value=name,
                    remedy="send all tensors of each layer"
                    if self.partial
                    else f"send all {len(self.names)} tensors of the adapter",
                )
        ranks = {layer: self._rank_of(layer, self.specs[layer], forms) for layer in self.specs if layer in layers}
        for name, form in self.extras.items():
            self._check_shape(name, forms[name].shape, form.shape)
        for name, form in forms.items():
            self._check_dtype(name, form.dtype)
        return ranks

    def _layers_of(self, forms: Mapping[str, Form]) -> set[str]:
        """The layers that must be there, and ``""``, which stands for what belongs to none."""
        if not self.partial:
            return {*self.specs, ""}
        modules = {self._module_of[self.layer_of[name]] for name in forms if name in self.layer_of}
        if not modules:
            raise RefusedError(
                "it has no layer",
                code=Reason.MISSING_TENSOR,
                value=f"{len(forms)} tensors",
                remedy=f"send some of the {len(self.specs)} layers",
            )
        return {layer for layer in self.specs if self._module_of[layer] in modules} | {""}

    def _rank_of(self, layer: str, spec: LayerSpec, forms: Mapping[str, Form]) -> int:
        first = forms[spec.a_key].shape
        rank = first[0] // spec.experts if first else 0
        for name, expected in zip((spec.a_key, spec.b_key), layouts.stored_shapes(spec, rank), strict=True):
            self._check_shape(name, forms[name].shape, expected)
        if layer in self.biases:
            self._check_shape(self.biases[layer], forms[self.biases[layer]].shape, (spec.m,))
        if rank not in self.ranks:
            raise RefusedError(
                f"its rank is {rank}, the policy allows {shown(sorted(self.ranks))}",
                code=Reason.RANK,
                layer=layer,
                value=rank,
                remedy="train at a rank that the policy allows",
            )
        return rank

    def _check_shape(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise RefusedError(
                f"{name!r} has shape {shown(shape)}, expected {expected}",
                code=Reason.SHAPE,
                layer=self.layer_of.get(name),
                value=shape,
                remedy="train on the base model of this round",
            )

    def _check_dtype(self, name: str, dtype: torch.dtype) -> None:
        if dtype in self.dtypes or (name in self.extras and dtype == self.extras[name].dtype):
            return
        allowed = ", ".join(sorted(str(x).removeprefix("torch.") for x in self.dtypes))
        raise RefusedError(
            f"{name!r} is {str(dtype).removeprefix('torch.')}, the policy allows {allowed}",
            code=Reason.DTYPE,
            layer=self.layer_of.get(name),
            value=str(dtype),
            remedy="cast it before sending",
        )
