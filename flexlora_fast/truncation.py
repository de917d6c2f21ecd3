"""An adapter at other ranks and scales, from its leading columns: what a server sends to clients of mixed ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError
from flexlora_fast.factors import check_representable, copy_as, pad
from flexlora_fast.lowrank.random import stream
from flexlora_fast.precision import full_precision


@full_precision()
def truncated(adapter: Adapter, ranks: Mapping[str, int], scales: Mapping[str, float], *, seed: int = 0) -> Adapter:
    """The adapter cut to ``ranks``, at ``scales``: s'·B'·A' = s·B[:, :r']·A[:r'] in every layer.

    What ``GlobalUpdate.adapter`` made has its singular triplets in descending order, so that this is ΔW truncated to
    r' (Eckart–Young) without another SVD. Where r' is above the layer's rank, columns are added that hold no update but
    stay trainable; ``seed`` addresses their random numbers. What is no low-rank pair stays as it is, and so do the
    dtypes. The factors are new tensors.

    Args:
        ranks, scales: r' and s' of every layer.

    Raises:
        OptionError: s' = 0. AdapterError: a value that its dtype cannot hold at the new scale.

    >>> state = {"fc.lora_A.weight": torch.eye(2, 3), "fc.lora_B.weight": torch.tensor([[4.0, 0.0], [0.0, 2.0]])}
    >>> adapter = Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 2})
    >>> smaller = truncated(adapter, {"fc": 1}, {"fc": 2.0})
    >>> smaller.factors("fc")[1].flatten(), smaller.scale("fc")
    (tensor([2., 0.]), 2.0)
    """
    factors, biases = {}, {}
    for layer in adapter.layers:
        if scales[layer] == 0:
            raise OptionError("the scale is 0 at this rank, so no adapter can hold the update", layer=layer)
        A, B, bias = adapter.factors_and_bias(layer)
        dtypes = A.dtype, B.dtype
        ratio = adapter.scale(layer) / scales[layer]
        A, B = A[:, : ranks[layer]], B[:, :, : ranks[layer]]
        A, B = (X if X.dtype == torch.float64 else X.float() for X in (A, B))
        A, B = pad(A, B * ratio, ranks[layer], "B", stream(seed, layer))
        factors[layer] = copy_as(A, dtypes[0]), copy_as(B, dtypes[1])
        named = dict(zip("AB", factors[layer], strict=True))
        if bias is not None:
            named["lora_B.bias"] = biases[layer] = copy_as(bias.double() * ratio, bias.dtype)
        check_representable(named, layer)
    return Adapter.from_factors(
        factors,
        {layer: adapter.spec(layer) for layer in adapter.layers},
        scales,
        adapter.config,
        client=adapter.client,
        lora_bias=biases,
        extras=dict(adapter.extras),
    )
