"""A drop-in for PEFT's merge of adapters, ``LoraModel.add_weighted_adapter``: one sum, one truncation, no dense SVD.

PEFT 0.21 (``peft/tuners/lora/model.py``) forms every adapter's ΔW in the dtype of its factors, adds them up and takes a
full SVD. Its result is wrong where the adapters use rsLoRA (√r too large), where there is but one adapter (``svd_rank``
is ignored), where ``svd_rank`` is larger than a side of the layer, for Conv1d and Conv3d, for ``lora_bias``, and where
adapters restrict their layers differently. Here it is s'·B'·A' = SVD_r'(Σ w·s·B·A) for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from flexlora_fast import config as configs
from flexlora_fast import live
from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import AdapterError, OptionError, RankError, UnsupportedAdapterError, WeightError

CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
# What says which of the modules that target_modules names are adapted.
_RESTRICTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@torch.inference_mode(False)  # the caller's is left for the call: parameters made in it could never be trained
def add_weighted_adapter(
    model: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: CombinationType = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> None:
    """Add to a live PEFT model the adapter that is the weighted sum of some of its adapters.

    Arguments and effect are those of ``model.add_weighted_adapter``, and the new adapter is frozen until
    ``set_adapter``, as there.

    Args:
        model: a ``PeftModel`` or its ``LoraModel``. adapters: names, each as often as you like.
        weights: one finite number for each, of any sign; they are not normalised. adapter_name: of the sum, a new one.
        combination_type: "svd", the best adapter of rank ``svd_rank``. Every other is PEFT's own computation with the
            same arguments, put right in two things: the result is applied at the scale that it was computed for, 1,
            also where the adapters use rsLoRA, and its config says the ranks that it has. "cat" is the whole sum.
        svd_rank: of every layer of the result; default: the largest of the adapters' configs. Where it is more than
            Σw·s·B·A has, the rest of the columns is zero in B.
        svd_clamp: a quantile, 0…1, of the entries of B' and A' together, beyond which they are clamped, as in PEFT. The
            result is then not the best of its rank, and depends on the signs of the singular vectors.
        svd_full_matrices, svd_driver: without effect on "svd", which takes no dense SVD.
        density, majority_sign_method: for the types that PEFT computes.

    The result of "svd" has alpha = rank, no rsLoRA and no patterns, adapts every layer that one of the adapters does,
    and has their dtype (float32 where they differ). A layer that an adapter does not have counts as zero there. It is
    computed from float64 Grams of the factors, on their GPU where all are on one.

    Raises:
        AdapterError: no such adapter, none at all, values that are not finite; ``adapter_name`` exists
            (PEFT returns silently, and a loop would go on with the sum of an earlier round): ``delete_adapter`` first.
        UnsupportedAdapterError: DoRA, PiSSA … (as everywhere here); ``modules_to_save`` and trainable tokens, of which
            a sum with arbitrary weights makes no sense (``aggregate`` averages them); ``lora_bias``, but for "svd".
        WeightError, RankError, OptionError: what is no finite number, rank or quantile; an unknown type.
        ValueError: what PEFT raises for the types that it computes.
        The model is then as it was.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_rslora=True)
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 4)), config, "first")
    >>> model.add_adapter("second", config)
    >>> add_weighted_adapter(model, ["first", "second"], [0.7, -0.2], "sum", svd_rank=4)
    >>> layer = model.get_submodule("base_model.model.0")
    >>> expected = 0.7 * layer.get_delta_weight("first") - 0.2 * layer.get_delta_weight("second")
    >>> torch.allclose(layer.get_delta_weight("sum"), expected, atol=1e-6)
    True
    """
    lora = _lora_model(model)
    holder = _Holder(lora)
    shares = _shares(adapters, weights)
    if adapter_name in lora.peft_config:
        raise AdapterError(
            f"the model has an adapter {adapter_name!r}; give another name, or delete_adapter() it first"
        )
    for name in shares:
        _check_mergeable(lora, name, combination_type)
    if combination_type != "svd":
        options = (combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        with _undone_on_error(lora, adapter_name):
            lora.add_weighted_adapter(adapters, weights, adapter_name, *options)
            _put_right(lora, adapter_name)
        return
    rank = max(_config_rank(lora.peft_config[name]) for name in shares) if svd_rank is None else svd_rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RankError(f"svd_rank is {svd_rank!r}; give an integer ≥ 1, or None for the largest of the adapters")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise OptionError(f"svd_clamp is {svd_clamp!r}; it is a quantile, 0…1, or None")

    sources = {name: Adapter.from_peft(holder, name, client=name) for name in shares}
    merged = _merged(sources, shares, rank)
    if svd_clamp is not None:
        merged = _clamped(merged, svd_clamp)
    dtypes = _dtypes(sources.values())
    with _undone_on_error(lora, adapter_name):
        lora.peft_config[adapter_name] = _result_config(lora, sources, rank)
        with torch.random.fork_rng(devices=[]):  # the values come next: leave the training's random numbers alone
            lora.inject_adapter(lora.model, adapter_name)
        for layer, module in live.lora_layers(holder, adapter_name).items():
            for parameter in live.parameters(module, adapter_name):
                if parameter is not None:
                    parameter.data = parameter.data.to(dtypes[layer])
                    parameter.requires_grad_(False)
        merged.load_into(holder, adapter_name)


# -- the model ---


class _Holder(nn.Module):
    """Gives a ``LoraModel`` the names that it has inside a ``PeftModel``."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.base_model, self.peft_config = lora, lora.peft_config


def _lora_model(model: Any) -> Any:
    from peft import LoraModel

    model = getattr(model, "_orig_mod", model)  # torch.compile
    for candidate in (model, getattr(model, "base_model", None)):
        if isinstance(candidate, LoraModel):
            return candidate
    raise AdapterError(
        f"{type(model).__name__} is no model with LoRA adapters; pass what peft.get_peft_model returned "
        "(of a DistributedDataParallel model, its .module)"
    )


@contextmanager
def _undone_on_error(lora: Any, adapter_name: str) -> Iterator[None]:
    """Take a half-made adapter out again where adding it fails."""
    try:
        yield
    except BaseException:
        if adapter_name in lora.peft_config:
            lora.delete_adapter(adapter_name)
        raise


def _put_right(lora: Any, adapter_name: str) -> None:
    """PEFT computes factors for scale 1, but forgets that rsLoRA divides by √r, and that ranks may differ by layer."""
    lora.peft_config[adapter_name].use_rslora = False
    holder = _Holder(lora)
    for module in live.lora_layers(holder, adapter_name).values():
        live.set_scale(module, adapter_name, 1.0)
    Adapter.from_peft(holder, adapter_name).load_into(holder, adapter_name)  # which writes ranks and scales as they are


# -- what may be merged ---


def _shares(adapters: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The weight of each adapter, in the order given; those of one that comes twice add up."""
    if isinstance(adapters, str) or not adapters:
        raise AdapterError(f"adapters is {adapters!r}; give the names of at least one adapter")
    if len(adapters) != len(weights):
        raise WeightError(f"{len(weights)} weights for {len(adapters)} adapters; give one for each")
    shares: dict[str, float] = {}
    for name, weight in zip(adapters, weights, strict=True):
        try:
            value = float(weight)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise WeightError(f"weight is {weight!r}; give a finite number", client=name)
        shares[name] = shares.get(name, 0.0) + value
    return shares


def _check_mergeable(lora: Any, name: str, combination_type: str) -> None:
    if name not in lora.peft_config:
        raise AdapterError(f"the model has no adapter {name!r}; it has {sorted(lora.peft_config)}")
    config = configs.normalize(lora.peft_config[name], name)
    configs.refuse_unsupported(config, name)
    if combination_type not in get_args(CombinationType):
        known = ", ".join(map(repr, get_args(CombinationType)))
        raise OptionError(f"combination_type {combination_type!r} is not one of {known}")
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            raise UnsupportedAdapterError(
                f"{key}={config[key]!r}: these are whole weights, not updates, and a sum with weights that need not "
                "add up to 1 makes no sense of them; average them with flexlora_fast.aggregate, or train without",
                client=name,
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"bias={config['bias']!r}: PEFT keeps one set of biases for all adapters of a model, so there is none to "
            "add up; train with bias='none', or lora_bias=True",
            client=name,
        )
    if config.get("lora_bias") and combination_type != "svd":
        raise UnsupportedAdapterError(
            f"lora_bias: PEFT drops the biases with combination_type={combination_type!r}; use 'svd', with "
            "svd_rank=Σr for the exact sum",
            client=name,
        )


def _config_rank(config: Any) -> int:
    """What PEFT takes for an adapter's rank: the largest that its config gives to any layer."""
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r


# -- the sum ---


def _merged(sources: Mapping[str, Adapter], shares: Mapping[str, float], rank: int) -> Adapter:
    """The best adapter of that rank for Σw·s·B·A, at scale 1, float32."""
    devices = {X.device for source in sources.values() for X in source.state_dict().values()}
    gpu = devices.pop() if len(devices) == 1 else None
    round_ = Aggregator(rank, tol=0, device=gpu if gpu is not None and gpu.type == "cuda" else None, progress=False)
    biased = any(source.skeleton.bias_keys for source in sources.values())
    for name, source in sources.items():
        # The weights of a round are shares, ≥ 0 and of sum 1: these go into the scales, and 1/K is multiplied out.
        round_.add(_rescaled(source, shares[name] * len(sources), biased), client=name)
    return round_.finish().adapter(rank=rank, alpha=rank)


def _rescaled(source: Adapter, factor: float, biased: bool) -> Adapter:
    """The adapter with another scale, without rsLoRA; ``biased``: with a bias of B, of zeros where it has none."""
    specs = {layer: source.spec(layer) for layer in source.layers}
    biases = {}
    for layer in source.layers if biased else []:
        bias = source.lora_bias(layer)
        biases[layer] = torch.zeros(specs[layer].m) if bias is None else bias
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": biased}
    factors = {layer: source.factors(layer) for layer in source.layers}
    scales = {layer: factor * source.scale(layer) for layer in source.layers}
    # All of them adapt the model that they are in, whatever they were loaded from.
    config = source.config | plain | {"base_model_name_or_path": None}
    try:
        return Adapter.from_factors(factors, specs, scales, config, client=source.client, lora_bias=biases)
    except AdapterError as error:
        raise error.at(client=source.client) from None


def _clamped(adapter: Adapter, quantile: float) -> Adapter:
    """Entries beyond a quantile of those of A and B together (values, not magnitudes, as in PEFT) are cut to it."""
    factors = {}
    for layer in adapter.layers:
        A, B = adapter.factors(layer)
        # NumPy's: torch.quantile takes no more than 2²⁴ entries, fewer than a large embedding's factors have.
        entries = torch.cat([B.flatten(), A.flatten()]).cpu().numpy()
        highest = float(np.quantile(entries, quantile))
        factors[layer] = (A.clamp(-highest, highest), B.clamp(-highest, highest))
    skeleton = adapter.skeleton
    biases = {layer: bias for layer in adapter.layers if (bias := adapter.lora_bias(layer)) is not None}
    return Adapter.from_factors(factors, skeleton.specs, skeleton.scales, adapter.config, lora_bias=biases)


# -- the result ---


def _dtypes(sources: Iterable[Adapter]) -> dict[str, torch.dtype]:
    """By layer, the dtype that holds the factors of all adapters that have it."""
    found: dict[str, torch.dtype] = {}
    for source in sources:
        for layer in source.layers:
            for X in source.factors(layer):
                found[layer] = torch.promote_types(found.get(layer, X.dtype), X.dtype)
    return found


def _result_config(lora: Any, sources: Mapping[str, Adapter], rank: int) -> Any:
    """The first adapter's config with one rank, scale 1, and the layers of all."""
    given = [lora.peft_config[name] for name in sources]
    fields: dict[str, Any] = dict.fromkeys(_RESTRICTIONS)
    alike = all(getattr(c, key, None) == getattr(given[0], key, None) for c in given for key in _RESTRICTIONS)
    wanted = [config.target_modules for config in given]
    if alike and all(isinstance(names, set) for names in wanted):
        fields = {"target_modules": set().union(*wanted)}
    elif alike and all(names == wanted[0] for names in wanted):
        fields = {}
    else:
        fields["target_modules"] = _module_names(lora, sources)
    parameters = next((config.target_parameters for config in given if config.target_parameters), None)
    return replace(
        given[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        lora_bias=any(config.lora_bias for config in given),
        init_lora_weights=True,
        eva_config=None,
        target_parameters=parameters,
        **fields,
    )


def _module_names(lora: Any, sources: Mapping[str, Adapter]) -> set[str]:
    """The modules (not parameters) that the adapters adapt, by their whole paths."""
    from peft.tuners.lora.layer import ParamWrapper

    return {
        source.spec(layer).pattern_name
        for name, source in sources.items()
        for layer, module in live.lora_layers(_Holder(lora), name).items()
        if not isinstance(module, ParamWrapper)
    }
