"""Random test matrices whose entries are addressed by (seed, layer, row), never drawn in order of arrival."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.backends import cuda, launcher
from flexlora_fast.backends.transfer import moved

# splitmix64's increment and multipliers as signed 64-bit integers (torch has no unsigned arithmetic to speak of).
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def stream(seed: int, name: str) -> int:
    """A signed 64-bit key for one layer of one round: the first 8 bytes of SHA-256("seed:name")."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), wrapping in int64."""
    x = x * _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def signs(
    rows: int,
    cols: int,
    key: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """A (batch, rows, cols) matrix of independent ±1: ``signs_of`` the addresses (key, 0 … batch-1)."""
    return signs_of([(key, b) for b in range(batch)], rows, cols, dtype=dtype, device=device)


def signs_of(
    addresses: Sequence[tuple[int, int]],
    rows: int,
    cols: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Matrices (len(addresses), rows, cols) of independent ±1, one for each address (key, b).

    Entry (i, j) is bit j mod 64 of a counter hash of (key, b, i, j // 64): it depends on its address alone, so it
    is the same on every device, for any number of threads and whatever else is drawn. Signs serve a range finder as
    well as Gaussians do (Halko, Martinsson, Tropp, SIAM Review 53, 2011, section 4.6) and need no transcendental
    function, whose last bit would differ between devices.

    >>> signs(2, 3, key=stream(0, "layer")).shape
    torch.Size([1, 2, 3])
    """
    if device is not None and dtype == torch.float32 and launcher.usable(device):
        return cuda.signs(addresses, rows, cols, device=device)
    words = -(-cols // 64)
    places = torch.tensor(list(addresses), dtype=torch.int64).reshape(-1, 2)
    key, b = (places if device is None else moved(places, device)).unsqueeze(2).unbind(dim=1)
    row = ((b << 32) + torch.arange(rows, device=device)) ^ key  # (addresses, rows)
    word = torch.arange(words, dtype=torch.int64, device=device)
    # Two rounds: the first decorrelates the key and row from the word, so that streams cannot run into each other.
    hashed = _splitmix64(_splitmix64(row.unsqueeze(2)) + word + 1)  # (addresses, rows, words)
    bits = (hashed.unsqueeze(3) >> torch.arange(64, dtype=torch.int64, device=device)) & 1
    return bits.reshape(len(addresses), rows, words * 64)[:, :, :cols].to(dtype).mul_(2).sub_(1)


def numbers(key: int, start: int, stop: int) -> Tensor:
    """Numbers ``start`` … ``stop`` of a stream, (stop-start,) int64, independent and uniform on [0, 2^53).

    Number i is that of the generator splitmix64 begun at the key, and depends on (key, i) alone.

    >>> bool(torch.equal(numbers(7, 2, 5), numbers(7, 0, 5)[2:]))
    True
    """
    return _shift_right(_splitmix64(torch.arange(start, stop, dtype=torch.int64) + key), 11)
