"""Secret Gaussian numbers, each addressed by (key, name, place): any part of a tensor's noise can be made again.

An entry is 64 bits of AES-256 in counter mode, from a library made for it: the noise of a released update must not be
predictable, which the generators of torch and NumPy do not promise. One bit is the sign, the other 63 are the place in
the lower half of the distribution: Φ⁻¹ of (k + ½)·2⁻⁶⁴. So magnitudes end at 9.1 standard deviations; a true Gaussian
goes beyond with a probability of 5e-20 an entry.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.errors import PrivacyError

_WORD, _BLOCK = 8, 16  # bytes of an entry, and of AES's blocks
_CHUNK = 1 << 16  # entries at a time: what they go through stays in cache
_ZEROS = bytes(_WORD * _CHUNK + _BLOCK)
KEY_BYTES = 32


def fresh_key() -> bytes:
    """A key from the operating system's generator. Tests that need the same noise twice put another in its place."""
    return os.urandom(KEY_BYTES)


class Noise:
    """The noise of one tensor: independent standard Gaussians, as many as it has entries.

    Args:
        key: secret, of ``KEY_BYTES``. name: of the tensor; other names give independent noise.
    """

    def __init__(self, key: bytes, name: str) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}")
        self._subkey = hmac.digest(key, name.encode(), "sha256")

    def __repr__(self) -> str:
        return "Noise(secret)"

    def normal(self, start: int, count: int) -> Tensor:
        """Entries ``start`` … ``start + count``, (count,) float64 on the CPU.

        Each is the same whatever is asked for beside it, in any order and on any number of threads.
        """
        result = torch.empty(count, dtype=torch.float64)
        for lo in range(0, count, _CHUNK):
            hi = min(lo + _CHUNK, count)
            words = self._words(start + lo, hi - lo)
            magnitude = (words >> 1 & 0x7FFFFFFFFFFFFFFF).double().add_(0.5).mul_(2.0**-64)
            sign = (words & 1).mul_(2).sub_(1)
            torch.mul(torch.special.ndtri(magnitude), sign, out=result[lo:hi])
        return result

    def _words(self, start: int, count: int) -> Tensor:
        """64 random bits for each entry, (count,) int64."""
        first, skipped = divmod(start * _WORD, _BLOCK)
        nbytes = skipped + count * _WORD
        stream = _cipher(self._subkey, first)
        out = bytearray(nbytes + _BLOCK)
        stream.update_into(memoryview(_ZEROS)[:nbytes], out)
        return torch.from_numpy(np.frombuffer(out, dtype="<i8", count=count, offset=skipped))


def _cipher(key: bytes, counter: int) -> Any:
    """A stream of AES blocks from number ``counter`` on."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError as error:
        raise PrivacyError(f"privacy takes its noise from cryptography ({error}); {INSTALL}") from error
    return Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(_BLOCK, "big"))).encryptor()


INSTALL = "install it with `pip install 'flexlora_fast[privacy]'`"
