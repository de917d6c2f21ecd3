"""What the server sends to every client before a round: which round it is, and the bases that the last sums gave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from flexlora_fast.errors import ProtocolError
from flexlora_fast.secure.plan import HEADROOM, Plan

_PREFIX = "basis/"
_HEADER = 512  # bytes of a header for one tensor, and for the rest; generous
# WᵀW may differ from 1 by this much, of which float32 takes a thousandth: half of the room that a plan leaves.
_SKEW = (HEADROOM - 1) / 2
_STAGE, _DIGEST = ("torch.int64", (1,)), ("torch.uint8", (32,))


def pack(plan: Plan, stage: int, bases: Mapping[str, Tensor]) -> bytes:
    """The message of round ``stage``; ``bases``: (E, side, width) float32 by layer, none in the first round."""
    tensors = {_PREFIX + layer: basis.contiguous() for layer, basis in bases.items()}
    tensors["stage"] = torch.tensor([stage])
    tensors["plan"] = torch.frombuffer(bytearray(plan.digest), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def mark(plan: Plan, message: bytes) -> int:
    """A number modulo M that depends on every bit of the plan and the message.

    Each client adds it, so that the server sees in a sum of k of them whether it is k times its own: a client that has
    another plan or an older message would spoil the sum otherwise, and nobody could tell.
    """
    return int.from_bytes(hashlib.sha256(plan.digest + message).digest()[: plan.bits // 8], "little")


def unpack(plan: Plan, message: bytes) -> tuple[int, dict[str, Tensor]]:
    """The round (from 1) and the bases by layer.

    Raises ``ProtocolError`` for a message of another plan, and for bases of other shapes, with NaN, or that are not
    orthonormal: the bound of a client's entries rests on that.
    """
    sizes = {
        _PREFIX + spec.name: max(4 * spec.experts * plan.width * side for side in (spec.m, spec.n))
        for spec in plan.layers
    }
    longest = _HEADER + sum(size + _HEADER + len(json.dumps(name)) for name, size in sizes.items())
    if not isinstance(message, bytes) or len(message) > longest:
        raise ProtocolError(f"the message is no bytes object of at most {longest} bytes; give what Server.message is")
    try:
        tensors = safetensors.torch.load(message)
        number, signature = tensors.pop("stage"), tensors.pop("plan")
        # Forms first: bytes() of one large number would fill the memory with zeros.
        if _form(number) != _STAGE or _form(signature) != _DIGEST:
            raise ValueError(f"its stage is {_form(number)} and its plan {_form(signature)}")
        stage, digest = int(number), bytes(signature.tolist())
    except (KeyError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ProtocolError(f"the message cannot be read ({error}); give what Server.message is") from None
    if digest != plan.digest:
        raise ProtocolError("the message belongs to another plan; fetch the plan of this round again")
    if not 1 <= stage <= len(plan.stages):
        raise ProtocolError(f"the message is of round {stage}, this plan has {len(plan.stages)}; have it sent again")
    expected = [] if stage == 1 else [spec for spec in plan.layers if not plan.dense(spec)]
    if set(tensors) != {_PREFIX + spec.name for spec in expected}:
        raise ProtocolError(f"the message of round {stage} has not the bases of all layers; have it sent again")
    bases = {spec.name: tensors[_PREFIX + spec.name] for spec in expected}
    for spec in expected:
        _check(bases[spec.name], plan.basis_shape(spec, stage), spec.name)
    return stage, bases


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype), tuple(tensor.shape)


def _check(basis: Tensor, shape: tuple[int, ...], layer: str) -> None:
    if basis.dtype != torch.float32 or tuple(basis.shape) != shape:
        raise ProtocolError(
            f"its basis is {basis.dtype} {tuple(basis.shape)}, expected torch.float32 {shape}; have it sent again",
            layer=layer,
        )
    W = basis.double()
    skew = float((W.mT @ W - torch.eye(shape[2], dtype=torch.float64)).abs().max())
    if not skew <= _SKEW:  # NaN as well
        raise ProtocolError(
            f"its basis is not orthonormal (off by {skew:.3g}); a server that sends this is broken or hostile",
            layer=layer,
        )
