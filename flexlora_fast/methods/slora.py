"""SLoRA: clients first train a sparse part of the weights, whose average then initialises everybody's LoRA factors.

Source: Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models" (arXiv 2308.06522):
for the first rounds all clients train the same few entries of the target weights, W + M∘Θ with a random mask M that
does not depend on data, and the server averages Θ̄ = Σ w_i·Θ_i; then one SVD gives B·A ≈ M∘Θ̄, from where LoRA goes on
over the unchanged W. Here a mask is addressed by (seed, layer, entry), so that nobody sends it, and the masks of one
seed are nested: clients of a higher density train all entries of one of a lower density and more, as FlexLoRA's
experiments (arXiv 2402.11505) need for clients of mixed resources.

>>> import torch, flexlora_fast as ff
>>> mask = Mask(seed=0, density=0.5)
>>> one = SparseDelta.of(mask, {"fc": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))})
>>> config = {"r": 2, "lora_alpha": 2, "target_modules": ["fc"]}
>>> update = initial(average([one, one]), config, rank=4)
>>> bool(torch.allclose(update.delta("fc"), one["fc"], atol=1e-5)), update.adapter(config=config).rank("fc")
(True, 2)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_fast import config as configs
from flexlora_fast import devices, live, values
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import describe
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, EmptyRoundError, IncompatibleAdapterError, OptionError, RankError
from flexlora_fast.facts import unwrapped
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.accumulate import Accumulator
from flexlora_fast.lowrank.solve import LARGEST
from flexlora_fast.methods.sparse import Mask, SparseDelta, SparseLayer, average
from flexlora_fast.precision import full_precision
from flexlora_fast.skeleton import Skeleton
from flexlora_fast.update import GlobalUpdate, LayerUpdate

__all__ = ["FLEXLORA_DENSITIES", "Mask", "SparseDelta", "SparseLayer", "SparseTuning", "average", "initial"]

# What FlexLoRA's own code trains in this stage, by the LoRA ranks of the client type that it stands for: (attention,
# feed-forward) to the density of every layer.
FLEXLORA_DENSITIES = {(8, 8): 0.0012, (30, 30): 0.0246, (30, 200): 0.0822, (200, 200): 0.1222}


@full_precision()
def initial(
    deltas: Mapping[str, Tensor],
    config: Any,
    rank: int | None = None,
    *,
    extras: Mapping[str, Tensor] | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> GlobalUpdate:
    """The one SVD of SLoRA: dense changes of weights as an update, whose adapters initialise everybody's LoRA factors.

    ``update.adapter(config=…)`` or ``adapter(rank=…)`` is then ΔW truncated, with the usual certificate
    (``update[layer].error(rank)``). Layers are solved one by one, so that a :class:`SparseDelta` is never dense whole.

    Args:
        deltas: (m, n) by layer name (the module path without ``base_model.model.``), (E, m, n) for MoE layers of an
            adapter; computed in float32.
        config: the ``peft.LoraConfig`` (or dict) that adapters start from, or an :class:`Adapter` whose layers and
            config they share (needed for layers other than linear ones).
        rank: columns to keep in each layer (default: the rank that ``config`` gives it).
        extras: averages of heads and the like that were trained beside, by state-dict key.
        tol, seed, device: as for ``ff.aggregate``; the solver is "dense".

    Raises:
        EmptyRoundError: no layers. RankError: a rank below 1.
        AdapterError: NaN, infinities or values beyond float32, or a layer that ``config`` does not adapt.
        IncompatibleAdapterError: a shape that is not the adapter's.
    """
    if not deltas:
        raise EmptyRoundError("there are no layers to initialise; give the sparse updates of at least one")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RankError(f"rank is {rank!r}; give an integer ≥ 1, or None for that of the config")
    here, layers = devices.usable(device), dict[str, LayerUpdate]()
    template = config.config if isinstance(config, Adapter) else configs.normalize(config)
    configs.refuse_unsupported(template)
    for layer in sorted(deltas):
        D = deltas[layer].detach()
        spec = _spec(layer, tuple(D.shape), config, template)
        wanted = min(configs.rank_for(template, spec.pattern_name) if rank is None else rank, spec.m, spec.n)
        D, exponent = _scaled(D.to(here, torch.float32).reshape(spec.experts, spec.m, spec.n), layer)
        total = Accumulator(spec.m, spec.n, spec.experts, here)
        total.settle(exponent)
        total.matrix.copy_(D)
        f = total.solve(wanted, tol=tol, seed=seed, name=layer)
        f = dataclasses.replace(f, U=f.U.cpu(), S=f.S.cpu(), V=f.V.cpu(), energy=f.energy.cpu())
        layers[layer] = LayerUpdate(spec, f, min(spec.m, spec.n))
    kept = {key: tensor.detach().cpu().clone() for key, tensor in sorted((extras or {}).items())}
    for key, tensor in kept.items():
        values.check_finite(tensor, key)
    return GlobalUpdate(layers, extras=kept, method="slora", seed=seed, template=template)


def _scaled(D: Tensor, layer: str) -> tuple[Tensor, int]:
    """D = 2^e·(what is returned first), so that its largest entry is about 1 and no product of floats overflows."""
    values.check_finite(D, "the sparse update", layer=layer)
    largest = max(abs(float(x)) for x in torch.aminmax(D)) if D.numel() else 0.0
    if not largest < LARGEST:
        raise AdapterError(f"its largest entry is {largest:.3g}, beyond what float32 adapters can hold", layer=layer)
    exponent = min(max(math.frexp(largest)[1], -126), 126) if largest else 0  # those that float32 has both powers of
    return D * math.ldexp(1.0, -exponent), exponent


def _spec(layer: str, shape: tuple[int, ...], like: Any, template: Config) -> LayerSpec:
    """Where adapters keep the factors of this layer."""
    if isinstance(like, Adapter):
        spec = like.spec(layer)
        if shape != ((spec.experts, spec.m, spec.n) if spec.kind == "moe" else (spec.m, spec.n)):
            what = f"its shape is {shape}, but the adapter has a {describe(spec)}; give ΔW as Adapter.delta does"
            raise IncompatibleAdapterError(what, layer=layer)
        return spec
    if len(shape) != 2:
        what = f"its shape is {shape}; give a matrix (m, n), or an Adapter in place of the config"
        raise AdapterError(what, layer=layer)
    if not configs.targets(template, unwrapped(layer)):
        wanted = template.get("target_modules")
        raise AdapterError(f"the config does not adapt it (target_modules={wanted!r}); leave it out", layer=layer)
    rank = configs.rank_for(template, unwrapped(layer))
    A, B = torch.empty(rank, shape[1], device="meta"), torch.empty(shape[0], rank, device="meta")
    tensors = {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    return Skeleton.of(tensors, template, None).specs[layer]


class SparseTuning:
    """Within a ``with`` block only the masked entries of the target weights train, and the optimizer sees only those.

    Each target linear layer gets one float32 parameter ``sparse_values`` (nnz,), and its output x·(M∘Θ)ᵀ beside
    that of the frozen weight, computed in float32 (or as autocast says): changes are far below the rounding of a
    bfloat16 weight. Any training loop that makes its optimizer from ``requires_grad`` inside the block will do, such as
    an ordinary ``Trainer``. Target weights, and a PEFT model's LoRA factors, are frozen until the block ends; whatever
    else trains, such as a head, goes on. At the end the model is as it was before.

    Args:
        model: a ``PeftModel``, whose linear LoRA layers of ``adapter_name`` are the targets, or any module.
        mask: the server's, at this client's density.
        targets: of a module that is no ``PeftModel``, as PEFT's ``target_modules`` (names, a regex, "all-linear").
        start: what to go on from, such as the last average, at any density of the same seed (default: zeros). What
            lies outside ``mask`` is left away.

    Raises ``OptionError`` for a mask of another seed than ``start``, ``AdapterError`` for targets that are none or no
    linear layers.

    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> with SparseTuning(net, Mask(0, 0.25), ["0"]) as tuning:
    ...     net(torch.ones(2, 8)).sum().backward()
    ...     [name for name, p in net.named_parameters() if p.requires_grad and p.grad is not None]
    ['0.bias', '0.sparse_values']
    >>> tuning.delta()["0"].shape
    torch.Size([4, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        targets: str | Iterable[str] | None = None,
        *,
        start: SparseDelta | None = None,
        adapter_name: str = "default",
        client: str | None = None,
    ) -> None:
        if start is not None and start.seed != mask.seed:
            raise OptionError(f"the mask has seed {mask.seed}, what to start from {start.seed}; give them one seed")
        self.mask, self.start, self.client = mask, start, client
        self.modules, self._frozen = _targets(model, targets, adapter_name)
        self._trained: dict[str, Tensor] | None = None  # once the block has ended
        self._undo: list[Any] = []

    def __enter__(self) -> SparseTuning:
        self._trained = None
        with torch.inference_mode(False):
            for layer, module in self.modules.items():
                m, n = _sides(module)
                at = self.mask.positions(layer, m, n).to(module.weight.device)
                first = torch.zeros(len(at))
                if self.start is not None and layer in self.start:
                    part = self.start.parts[layer]
                    if (part.m, part.n) != (m, n):
                        what = f"what to start from is {part.m}×{part.n}, its weight {m}×{n}; take that of this model"
                        raise IncompatibleAdapterError(what, client=self.client, layer=layer)
                    first = self.start.at(layer, self.mask.density_of(layer)).float()
                module.register_parameter("sparse_values", nn.Parameter(first.to(at.device, copy=True)))
                self._undo.append(module.register_forward_hook(_Addition(at, m, n), with_kwargs=True))
        self._before = [(parameter, parameter.requires_grad) for parameter in self._frozen]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trained = self._values()
        for hook in self._undo:
            hook.remove()
        for module in self.modules.values():
            del module.sparse_values
        for parameter, trains in self._before:
            parameter.requires_grad_(trains)
        self._undo, self._before = [], []

    def delta(self) -> SparseDelta:
        """What the masked entries have become: of the block's end, or so far. Raises ``AdapterError`` for NaN."""
        trained = self._values() if self._trained is None else self._trained
        parts = {}
        for layer, module in self.modules.items():
            parts[layer] = SparseLayer(*_sides(module), self.mask.density_of(layer), trained[layer])
        return SparseDelta(self.mask.seed, parts, self.client)

    def _values(self) -> dict[str, Tensor]:
        return {layer: module.sparse_values.detach().cpu().clone() for layer, module in self.modules.items()}


class _Addition:
    """A forward hook: the layer's output and x·(M∘Θ)ᵀ."""

    def __init__(self, positions: Tensor, m: int, n: int) -> None:
        self.positions, self.m, self.n = positions, m, n

    def __call__(
        self, module: Any, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        x = arguments[0] if arguments else named["input"]
        theta: Tensor = module.sparse_values
        dense = theta.new_zeros(self.m * self.n).index_copy(0, self.positions, theta).view(self.m, self.n)
        return output + nn.functional.linear(x.to(theta.dtype), dense).to(output.dtype)


def _sides(module: Any) -> tuple[int, int]:
    """m outputs and n inputs of a linear layer; Conv1D of transformers keeps its weight (n, m)."""
    m, n = module.weight.shape
    return (m, n) if isinstance(module, nn.Linear) else (n, m)


def _targets(
    model: nn.Module, targets: str | Iterable[str] | None, adapter_name: str
) -> tuple[dict[str, Any], list[nn.Parameter]]:
    """Linear layers by name, and what is frozen meanwhile."""
    if hasattr(model, "peft_config"):
        if targets is not None:
            raise OptionError("targets= is for models without adapters; a PeftModel's LoRA layers are the targets")
        layers = live.lora_layers(model, adapter_name)
        found = {layer: module.get_base_layer() for layer, module in layers.items()}
        frozen = [parameter for module in layers.values() for parameter in module.parameters()]
    elif targets is None:
        raise OptionError("the model has no adapter; give targets=, the names of the layers to train")
    else:
        rule = {"target_modules": targets if isinstance(targets, str) else list(targets)}
        linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
        every = dict(model.named_modules()) if targets != "all-linear" else linear
        found = {name: module for name, module in every.items() if configs.targets_module(rule, name)}
        frozen = [module.weight for module in found.values() if _is_linear(module)]
    for layer, module in found.items():
        if not _is_linear(module):
            raise AdapterError(f"it is a {type(module).__name__}; sparse tuning is for linear layers", layer=layer)
    if not found:
        raise AdapterError(f"there is nothing to train: no layer matches {targets!r}")
    return dict(sorted(found.items())), frozen


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
