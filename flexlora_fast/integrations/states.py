"""State dicts of strangers as uploads for the gate, and the server's own cut to a client's rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast.adapter import Adapter
from flexlora_fast.arrays import Array, as_tensors
from flexlora_fast.errors import AdapterError, OptionError, RefusedError, shown
from flexlora_fast.gate import Reason, RoundPolicy
from flexlora_fast.truncation import truncated

_HEADER = 4096  # bytes of the header of a file that holds one tensor


def upload_of(state: Any, policy: RoundPolicy) -> bytes:
    """A state dict of a stranger as the safetensors file that ``RoundPolicy.admit`` and ``Aggregator.add`` take.

    Values are torch tensors, NumPy arrays, or references to tensors on disk (what has ``materialize``, as NVFlare's
    with ``enable_tensor_disk_offload``), which are read one by one. The gate checks names, shapes, dtypes and values of
    that file. Here it is made sure that nothing is built, and little read, of what the policy has no room for.

    Raises ``RefusedError``: content, unknown-tensor, file-size, dtype.
    """
    if not isinstance(state, Mapping):
        raise _refusal(f"it sent a {shown(type(state).__name__)}", Reason.CONTENT, type(state).__name__)
    known = set(policy.names)
    for key in state:
        if not isinstance(key, str) or key not in known:
            raise _refusal(f"tensor {shown(key)} is not expected", Reason.UNKNOWN_TENSOR, key)
    size = _referenced(state, policy)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        tensor = _tensor(key, value, policy)
        size += tensor.numel() * tensor.itemsize
        if size > policy.max_bytes:
            raise _too_large(size, policy)
        tensors[key] = tensor.contiguous().clone()  # safetensors takes no tensors that share memory
    return safetensors.torch.save(tensors)


def at_rank(state: Mapping[str, Array], policy: RoundPolicy, rank: int) -> dict[str, Tensor]:
    """The server's global factors cut to a client's rank: s'·B'·A' = s·B[:, :r']·A[:r'], with the policy's s and s'.

    It is ΔW truncated to r', as the global factors are singular triplets in descending order; before the first round,
    where B = 0, they are the first rows of A. What is no low-rank pair stays as it is.

    Raises ``OptionError`` for a rank that the policy does not allow, ``AdapterError`` for other tensors than its own.
    """
    checked_rank(rank, policy)
    tensors, specs = as_tensors(state, None), policy.specs
    missing = [name for name in policy.names if name not in tensors]
    if missing:
        raise AdapterError(
            f"the state dict has no {missing[0]!r}, which the policy lists; give all that "
            "peft.get_peft_model_state_dict(model, save_embedding_layers=False) does"
        )
    ranks = {layer: len(tensors[spec.a_key]) // spec.experts for layer, spec in specs.items()}
    scales = {layer: policy.scale(layer, own) for layer, own in ranks.items()}
    config = configs.with_ranks(policy.config, ranks, scales, {x: spec.pattern_name for x, spec in specs.items()})
    adapter = Adapter.from_state_dict(tensors, config)
    return truncated(
        adapter, dict.fromkeys(specs, rank), {layer: policy.scale(layer, rank) for layer in specs}
    ).state_dict()


def checked_rank(rank: Any, policy: RoundPolicy) -> int:
    """A rank that somebody configured; raises ``OptionError`` for one that the policy does not allow."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank not in policy.ranks:
        raise OptionError(f"rank {rank!r} is none that the policy allows: {shown(sorted(policy.ranks))}")
    return rank


def _referenced(state: Mapping[str, Any], policy: RoundPolicy) -> int:
    """0, if what the files behind references hold can be what the policy expects: whole files, before any is read."""
    paths = [getattr(value, "file_path", None) for value in state.values() if hasattr(value, "materialize")]
    size = sum(os.path.getsize(path) for path in {path for path in paths if isinstance(path, str)})
    if size > policy.max_bytes + _HEADER * len(paths):
        raise _too_large(size, policy)
    return 0


def _tensor(key: str, value: Any, policy: RoundPolicy) -> Tensor:
    value = value.materialize() if hasattr(value, "materialize") else value
    if isinstance(value, np.ndarray):
        if value.nbytes > policy.max_bytes:  # as it claims: what is broadcast has less, until it is copied
            raise _too_large(value.nbytes, policy)
        try:
            if any(stride < 0 for stride in value.strides) or not value.flags.writeable:
                value = value.copy()
            return as_tensors({key: value}, None)[key]
        except AdapterError as error:
            raise _refusal(error.message.partition(";")[0], Reason.DTYPE, value.dtype) from None
    # What is a tensor only by name (sparse, quantized, without memory) has no bytes to be written.
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise _refusal(f"{shown(key)} is a {shown(type(value).__name__)}, no plain tensor", Reason.CONTENT, type(value))
    if value.is_complex():
        raise _refusal(f"{shown(key)} has dtype {value.dtype}", Reason.DTYPE, value.dtype)
    return value.detach().cpu()


def _too_large(size: int, policy: RoundPolicy) -> RefusedError:
    return _refusal(f"its tensors have {size} bytes, the policy takes {policy.max_bytes}", Reason.FILE_SIZE, size)


def _refusal(what: str, code: Reason, value: object) -> RefusedError:
    remedy = "send what peft.get_peft_model_state_dict(model, save_embedding_layers=False) gives, alone"
    return RefusedError(what, code=code, value=value, remedy=remedy)
