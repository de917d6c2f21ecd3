"""A whole securely aggregated round, with clients that drop out: ``python -m examples.secagg``.

The summing protocol is a simulation of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
Learning" (CCS 2017; full version IACR ePrint 2017/281, figure 4) for a server that is honest but curious: X25519, HKDF,
ChaCha20 and Shamir's scheme are PyCryptodome's, what goes between is here. It shows that ``flexlora_fast.secure`` works
through such a protocol. **It is no hardened implementation**: there is no network, no public-key infrastructure, no
check that the server tells all clients the same (round 3 of the paper), and no care for side channels.

Needs PyCryptodome: ``pip install flexlora_fast[test]``.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from Crypto.Cipher import ChaCha20, ChaCha20_Poly1305
from Crypto.Hash import SHA256
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.Protocol.SecretSharing import Shamir

import flexlora_fast as ff

Vector = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 16  # bytes of a secret that Shamir's scheme shares at a time
_SHARE = 2 + 3 * _BLOCK  # the owner's index, and shares of a seed and of a key


@dataclass
class View:
    """All that the server is sent in one summed round: what a curious one could look at."""

    keys: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)  # encrypted, by sender and recipient
    masked: dict[int, Vector] = field(default_factory=dict)
    revealed: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by survivor and owner: seed or key


class Party:
    """A client's secrets for one summed round; ``index`` is its point in Shamir's scheme, from 1."""

    def __init__(self, index: int, threshold: int) -> None:
        self.index, self.threshold = index, threshold
        self._channel, self._pair = secrets.token_bytes(32), secrets.token_bytes(32)  # X25519: any 32 bytes are a key
        self._seed = secrets.token_bytes(_BLOCK)
        self._answered = False

    def advertise(self) -> tuple[bytes, bytes]:
        """Round 0: public keys, for encrypting shares and for pairwise masks."""
        return _public(self._channel), _public(self._pair)

    def share(self, keys: Mapping[int, tuple[bytes, bytes]]) -> dict[int, bytes]:
        """Round 1: shares of the seed of the own mask and of the key of the pairwise ones, encrypted for each."""
        if len(keys) < self.threshold:
            raise RuntimeError(f"{len(keys)} clients are fewer than the threshold {self.threshold}; the round stops")
        self._keys = dict(keys)
        secrets_ = [self._seed, self._pair[:_BLOCK], self._pair[_BLOCK:]]
        split = [dict(Shamir.split(self.threshold, max(keys), secret)) for secret in secrets_]
        letters = {}
        for other, (channel, _) in keys.items():
            text = self.index.to_bytes(2, "big") + b"".join(shares[other] for shares in split)
            cipher = ChaCha20_Poly1305.new(key=_agreed(self._channel, channel, b"share"), nonce=_nonce(self.index))
            letters[other] = b"".join(cipher.encrypt_and_digest(text))
        return letters

    def mask(self, vector: Vector, letters: Mapping[int, bytes]) -> Vector:
        """Round 2: vector + own mask + masks with every client whose shares came, of opposite signs at both ends."""
        if len(letters) < self.threshold:
            raise RuntimeError(f"{len(letters)} clients are fewer than the threshold {self.threshold}; the round stops")
        self._held = {other: self._opened(other, letter) for other, letter in letters.items()}
        masked = vector + _stream(self._seed, vector)
        for other in letters:
            if other != self.index:
                masked = _with_pair(masked, self._pair, self._keys[other][1], self.index, other)
        return masked

    def unmask(self, survivors: Iterable[int]) -> dict[int, bytes]:
        """Round 4: of each survivor the share of its seed, of each that dropped out that of its key; never both."""
        alive = set(survivors)
        if len(alive) < self.threshold:
            raise RuntimeError(f"{len(alive)} clients are fewer than the threshold {self.threshold}; the round stops")
        if self._answered:
            raise RuntimeError("the shares were asked for already; of two answers one might have the seed, one the key")
        self._answered = True
        return {other: text[:_BLOCK] if other in alive else text[_BLOCK:] for other, text in self._held.items()}

    def _opened(self, other: int, letter: bytes) -> bytes:
        key = _agreed(self._channel, self._keys[other][0], b"share")
        text = ChaCha20_Poly1305.new(key=key, nonce=_nonce(other)).decrypt_and_verify(letter[:-16], letter[-16:])
        if int.from_bytes(text[:2], "big") != other or len(text) != _SHARE:
            raise RuntimeError(f"the shares of client {other} are not its own")
        return text[2:]


def secure_sum(
    vectors: Mapping[str, Vector],
    threshold: int,
    *,
    late: Iterable[str] = (),
    early: Iterable[str] = (),
    silent: Iterable[str] = (),
) -> tuple[Vector, View]:
    """Σ of the vectors of all who send a masked one, modulo 2³² or 2⁶⁴, and what the server saw.

    ``early`` drop out before they share secrets, ``late`` after that but before they send their masked vector (so that
    their pairwise masks must be taken out of the others'), and ``silent`` after it (their vector counts).
    Raises ``RuntimeError`` where fewer than ``threshold`` are left at any point.
    """
    view = View()
    index = {name: i for i, name in enumerate(sorted(vectors), start=1)}
    gone_early, gone_late, gone_silent = ({index[name] for name in names} for names in (early, late, silent))
    parties = {i: Party(i, threshold) for i in index.values()}
    named = {i: name for name, i in index.items()}
    view.keys = {i: party.advertise() for i, party in parties.items()}
    present = [i for i in parties if i not in gone_early]
    view.shares = {i: parties[i].share(view.keys) for i in present}
    for i in present:
        if i not in gone_late:
            view.masked[i] = parties[i].mask(vectors[named[i]], {j: view.shares[j][i] for j in present})
    helpers = [i for i in view.masked if i not in gone_silent]
    view.revealed = {i: parties[i].unmask(view.masked) for i in helpers}
    if len(helpers) < threshold:
        raise RuntimeError(f"{len(helpers)} clients are fewer than the threshold {threshold}; the round stops")
    return _unmasked(view, present, threshold), view


def _unmasked(view: View, present: Iterable[int], threshold: int) -> Vector:
    """The server's last step: the sum without the survivors' own masks and the pairwise masks of who dropped out."""
    total = ff.secure.add(view.masked.values())
    helpers = list(view.revealed)[:threshold]
    for owner in present:
        shares = [(i, view.revealed[i][owner]) for i in helpers]
        if owner in view.masked:
            total = total - _stream(Shamir.combine(shares), total)
            continue
        halves = [Shamir.combine([(i, text[at : at + _BLOCK]) for i, text in shares]) for at in (0, _BLOCK)]
        for other in view.masked:
            total = _with_pair(total, b"".join(halves), view.keys[other][1], owner, other)
    return total


# -- primitives ---


def _public(private: bytes) -> bytes:
    return bytes(import_x25519_private_key(private).public_key().export_key(format="raw"))


def _agreed(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """32 bytes that both ends of an X25519 exchange derive."""
    return key_agreement(
        static_priv=import_x25519_private_key(private),
        static_pub=import_x25519_public_key(public),
        kdf=lambda secret: HKDF(secret, 32, b"", SHA256, context=b"flexlora_fast example: " + purpose),
    )


def _nonce(sender: int) -> bytes:
    """Each key encrypts one letter each way, so the sender is nonce enough."""
    return sender.to_bytes(12, "big")


def _stream(key: bytes, like: Vector) -> Vector:
    """A mask: ChaCha20's stream as integers of the vector's length and dtype."""
    key = HKDF(key, 32, b"", SHA256, context=b"flexlora_fast example: mask")
    stream = ChaCha20.new(key=key, nonce=bytes(8)).encrypt(bytes(like.nbytes))
    return np.frombuffer(stream, dtype=like.dtype.newbyteorder("<")).astype(like.dtype)


def _with_pair(vector: Vector, private: bytes, public: bytes, own: int, other: int) -> Vector:
    """The vector with the mask of ``own`` and ``other``: added by the lower index, subtracted by the higher."""
    mask = _stream(_agreed(private, public, b"pair"), vector)
    return vector + mask if own < other else vector - mask


# -- the round ---


def toy_adapters(count: int) -> dict[str, ff.Adapter]:
    """Clients of ranks 2, 4 and 8 with two layers, that agree about the leading directions."""
    generator = torch.Generator().manual_seed(0)
    sides = {"up": (192, 64), "down": (64, 192)}
    shared = {name: _factors(m, n, 8, generator) for name, (m, n) in sides.items()}
    adapters = {}
    for i in range(count):
        rank = (2, 4, 8)[i % 3]
        state = {}
        for name, (m, n) in sides.items():
            A, B = _factors(m, n, 8, generator)
            state[f"{name}.lora_A.weight"] = (shared[name][0] + 0.3 * A)[:rank]
            state[f"{name}.lora_B.weight"] = (shared[name][1] + 0.3 * B)[:, :rank] / (1 + torch.arange(rank)) ** 2
        client = f"client-{i}"
        adapters[client] = ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": rank}, client=client)
    return adapters


def _factors(m: int, n: int, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, n, generator=generator) / n**0.5, torch.randn(m, rank, generator=generator)


def main() -> None:
    adapters = toy_adapters(9)
    plan = ff.secure.Plan.from_adapter(adapters["client-2"], rank=4, clients=50, clip=60.0, rounds=4, oversample=4)
    print(f"plan: {len(plan.to_json())} bytes of JSON, vectors of uint{plan.bits}")
    server, members = ff.secure.Server(plan), dict(adapters)
    # In each summed round: who drops out before sharing secrets, before sending a vector, and after it.
    # Two at a time: of one alone the server could work out a part from two sums (see ff.secure).
    drops = {1: ((), (), ("client-1", "client-4")), 3: (("client-0",), ("client-5",), ())}
    while not server.done:
        stage, broadcast = server.stage, server.message
        early, late, silent = drops.get(stage, ((), (), ()))
        vectors = {name: ff.secure.sketch(adapter, plan, broadcast) for name, adapter in members.items()}
        total, view = secure_sum(vectors, threshold=5, early=early, late=late, silent=silent)
        one = next(iter(vectors.values()))
        print(
            f"round {stage}: {len(vectors)} clients, {len(view.masked)} masked vectors of {one.nbytes} bytes, "
            f"{len(broadcast)} bytes to each client"
        )
        server.receive(total)
        members = {name: adapter for name, adapter in members.items() if name not in {*early, *late, *silent}}
    update = server.finish()
    print(update.report())
    plain = ff.aggregate(list(members.values()), rank=4)
    for layer in update:
        exact = sum(adapter.delta(layer).double() for adapter in members.values()) / len(members)
        error, best = (float((exact - u.delta(layer)).norm()) for u in (update, plain))
        told = update[layer].error(4)
        print(f"{layer}: error {error:.5f}, in the clear {best:.5f}, estimated by the server {told:.5f}")


if __name__ == "__main__":
    main()
