"""The host functions of the CUDA kernels: on the CPU with emulated kernels, and on a GPU both ways to them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import cuda, eigen, launcher, nvrtc, reference, small
from flexlora_fast.lowrank.random import signs_of, stream

if _native.extension is None:
    pytest.skip(f"no native extension: {_native.reason}", allow_module_level=True)
E = _native.extension.emulated
CPU = torch.device("cpu")
H100 = 227 * 1024  # bytes of shared memory that a block can have there

ADDRESSES = [(stream(3, "layer"), b) for b in (0, 1, 7, 1 << 31)] + [(-1, 0), (1 << 62, 5)]
WEIRD = [(1, 1), (300, 80), (7, 130), (3, 63), (5, 64), (123, 65), (2, 2), (0, 4), (4, 0)]


class Emulated:
    """Launches, for tensors on the CPU: the arguments' types are checked, the geometry kept, the kernel emulated."""

    def __init__(self) -> None:
        self.geometry: dict[str, tuple[Any, Any, int]] = {}

    def __call__(self, name: str, grid: Any, block: Any, arguments: Any, *, device: Any, shared_bytes: int = 0) -> None:
        nvrtc._slots(name, -1, arguments)
        launcher._extents(name, grid)
        assert block[0] <= 1024 and device == CPU
        self.geometry[name] = grid, block, shared_bytes
        getattr(self, name.removeprefix("flexlora_"))(*arguments)

    def signs(self, pairs: Tensor, rows: int, cols: int, out: Tensor) -> None:
        out.copy_(E.signs(pairs, rows, cols))

    def whiten(self, gram: Tensor, T: Any, T32: Any, shifted: Tensor, workspace: Any, l: int) -> None:  # noqa: E741
        *found, where = E.whiten(gram, workspace=workspace is not None)
        for to, what in zip((T, T32), found, strict=True):
            if to is not None:
                to.copy_(what)
        shifted.copy_(where)

    def condition(self, gram: Tensor, T: Tensor, workspace: Any, l: int) -> None:  # noqa: E741
        T.copy_(E.condition(gram, workspace=workspace is not None))

    def ritz(self, gram: Tensor, core: Tensor, T: Tensor, small: Tensor, *rest: Any) -> None:
        for to, what in zip((T, small, *rest[:2]), E.ritz(gram, core, workspace=rest[2] is not None), strict=True):
            to.copy_(what)

    def rotate(self, T: Tensor, rows: Tensor, values: Tensor, spoiled: Tensor, *rest: Any) -> None:
        rotation, scaled, found, _, k = rest
        results = E.rotate(T, rows, values, spoiled, k, scaled is not None)
        for to, what in zip((rotation, scaled, found), results, strict=True):
            if to is not None:
                to.copy_(what)

    def gram64(self, X: Tensor, Y: Tensor, parts: Tensor, only: Any, *rest: int) -> None:
        *strides, _m, _w, _v, rows, symmetric = rest
        assert strides == [X.stride(0), X.stride(1), Y.stride(0), Y.stride(1)]
        for s in range(parts.shape[1]):
            piece = slice(s * rows, (s + 1) * rows)
            parts[:, s] = E.gram64(X[:, piece], Y[:, piece], symmetric=bool(symmetric), only=only)

    def gram64_sum(self, parts: Tensor, out: Tensor, only: Any, w: int, v: int, slices: int, symmetric: int) -> None:
        assert (slices, w, v) == parts.shape[1:]
        out.copy_(parts.sum(dim=1))

    def jacobi_eigh(self, C: Tensor, values: Tensor, rows: Tensor, converged: Tensor, workspace: Any, l: int) -> None:  # noqa: E741
        results = E.jacobi_eigh(C, workspace=workspace is not None)
        for to, what in zip((values, rows, converged), results, strict=True):
            to.copy_(what)

    def jacobi_svd(self, A: Tensor, U: Tensor, S: Tensor, V: Tensor, converged: Tensor, workspace: Any, l: int) -> None:  # noqa: E741
        results = E.jacobi_svd(A, workspace=workspace is not None)
        for to, what in zip((U, S, V, converged), results, strict=True):
            to.copy_(what)

    def root(self, gram: Tensor, T: Tensor, rank: Tensor, again: Tensor, only: Any, workspace: Any, l: int) -> None:  # noqa: E741
        results = E.root(gram, only, workspace=workspace is not None)
        for to, what in zip((T, rank, again), results, strict=True):
            to.copy_(what)

    def apply_right(self, Y: Tensor, T: Tensor, out: Tensor, only: Any, *rest: int) -> None:
        assert list(rest) == [Y.stride(0), Y.stride(1), out.stride(0), out.stride(1), *Y.shape[1:]]
        E.apply_right(Y, T, out, only)

    def norms(self, G: Tensor, M: Tensor, d: Tensor, p: Tensor, r: Tensor, bad: Tensor, d_layer: int, W: int) -> None:
        assert d_layer == d.stride(0) and d.shape[1] == W
        for to, what in zip((p, r, bad), E.scale_grams(G.clone(), M.clone(), d)[:3], strict=True):
            to.copy_(what)

    def scale(self, G: Tensor, M: Tensor, p: Tensor, r: Tensor, parts: Tensor, W: int) -> None:
        G.copy_(G / p.unsqueeze(2) / p.unsqueeze(1))
        M.mul_(r.unsqueeze(2)).mul_(r.unsqueeze(1))
        parts.zero_()[:, 0] = (G.double() * M.double()).sum(dim=(1, 2))

    def energy(self, parts: Tensor, energy: Tensor, count: int) -> None:
        assert count == parts.shape[1]
        energy.copy_(parts.sum(dim=1))

    def chebyshev(self, product: Tensor, now: Tensor, before: Any, out: Tensor, *rest: Any) -> None:
        out.copy_(E.chebyshev(product, now, before, *rest[:3]))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    made = Emulated()
    monkeypatch.setattr(cuda, "launch", made)
    monkeypatch.setattr(cuda, "_most_shared", lambda device: H100)
    monkeypatch.setattr(eigen, "on_cuda", lambda: ("torch", torch.linalg.eigh))
    return made


def shared_bytes(name: str, size: int) -> int:
    """What a kernel asks for on an H100: its packed matrices in shared memory, where they fit."""
    inside, outside = (E.shared_bytes(size, workspace=workspace)[name] for workspace in (False, True))
    return inside if inside <= H100 else outside


def grams(count: int, size: int, generator: torch.Generator) -> Tensor:
    X = torch.randn(count, 2 * size + 3, size, dtype=torch.float64, generator=generator)
    return X.mT @ X


@pytest.mark.parametrize(("rows", "cols"), WEIRD)
def test_signs_are_the_addressed_ones_bit_for_bit(emulated: Emulated, rows: int, cols: int) -> None:
    found = cuda.signs(ADDRESSES, rows, cols, device=CPU)
    assert torch.equal(found, signs_of(ADDRESSES, rows, cols))
    if found.numel():
        (count, blocks), (threads,), _ = emulated.geometry["flexlora_signs"]
        assert count == len(ADDRESSES) and blocks * threads >= rows * -(-cols // 4)
    assert cuda.signs([], rows, cols, device=CPU).shape == (0, rows, cols)


def test_signs_of_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2147483648 rows and 4 columns"):
        cuda.signs(ADDRESSES, 1 << 31, 4, device=CPU)
    with pytest.raises(ValueError, match=r"expected contiguous int64 \(count, 2\)"):
        E.signs(torch.zeros(3), 1, 1)
    with pytest.raises(ValueError, match="rows is -1"):
        E.signs(torch.zeros(3, 2, dtype=torch.int64), -1, 1)


@pytest.mark.parametrize(("m", "w", "v"), [(0, 3, 2), (1, 1, 1), (97, 80, 81), (2500, 9, 170)])
def test_products_are_the_twins(emulated: Emulated, m: int, w: int, v: int, generator: torch.Generator) -> None:
    X, Y = torch.randn(2, m, w + 3, generator=generator)[:, :, 1 : 1 + w], torch.randn(2, m, v, generator=generator)
    assert torch.allclose(cuda.gram64(X, Y), small.gram64(X, Y), rtol=1e-12, atol=1e-12)
    (tiles, slices, layers), _, _ = emulated.geometry["flexlora_gram64"]
    assert (tiles, slices, layers) == (-(-w // 80) * -(-v // 80), max(1, -(-m // 1024)), 2)
    gram = cuda.gram64(Y, Y)
    assert torch.equal(gram, gram.mT) and torch.allclose(gram, small.gram64(Y, Y), rtol=1e-12, atol=1e-12)
    side = -(-v // 80)
    assert emulated.geometry["flexlora_gram64"][0][0] == side * (side + 1) // 2


@pytest.mark.parametrize("size", [1, 7, 33, 160, 240])
def test_small_problems_are_the_twins(emulated: Emulated, size: int, generator: torch.Generator) -> None:
    G, C = grams(2, size, generator), grams(2, size, generator)
    eye = torch.eye(size, dtype=torch.float64)
    T, shifted = cuda.whiten(G)
    assert (T.mT @ G @ T - eye).abs().max() < 1e-10 and not shifted.any()
    T32, again = cuda.whiten(G, torch.float32)
    assert torch.equal(T32, T.float()) and torch.equal(shifted, again)
    assert torch.allclose(cuda.condition(G).double(), small.condition(G).double(), rtol=1e-4, atol=1e-6)
    values, rotation, _ = cuda.ritz(G, C)
    assert torch.allclose(values, small.ritz(G, C)[0], rtol=1e-9)
    turned = rotation.double().mT @ C @ rotation.double()
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-3 * values.max()
    k = -(-size // 3)
    T, core, _, spoiled = cuda.ritz_begin(G, C)
    S, leading, scaled = cuda.ritz_end(T, *torch.linalg.eigh(core), spoiled, k, last=True)
    assert torch.allclose(S, values[:, :k].sqrt()) and torch.equal(leading, rotation[:, :, :k])
    assert scaled is not None and torch.allclose(scaled * S.unsqueeze(1).float(), leading, atol=1e-5)
    for name in ("flexlora_whiten", "flexlora_condition", "flexlora_ritz"):
        assert emulated.geometry[name] == ((2,), (256,), shared_bytes(name, size))
    squares = -(-size // 32) * -(-k // 32)
    assert emulated.geometry["flexlora_rotate"] == ((squares, 2), (256,), shared_bytes("flexlora_rotate", size))


@pytest.mark.parametrize("size", [1, 5, 44, 130, 180])
def test_rotations_are_the_twins(emulated: Emulated, size: int, generator: torch.Generator) -> None:
    C, A = grams(2, size, generator), torch.randn(2, size, size, dtype=torch.float64, generator=generator)
    values, vectors, converged = cuda.jacobi_eigh(C)
    assert converged.all() and torch.allclose(values, torch.linalg.eigvalsh(C), rtol=1e-9, atol=1e-9)
    assert torch.allclose((vectors * values.unsqueeze(1)) @ vectors.mT, C, rtol=1e-9, atol=1e-9)
    U, S, V, converged = cuda.jacobi_svd(A)
    assert converged.all() and torch.allclose(S, torch.linalg.svdvals(A), rtol=1e-9, atol=1e-9)
    assert torch.allclose((U * S.unsqueeze(1)) @ V.mT, A, rtol=1e-9, atol=1e-9)
    for name in ("flexlora_jacobi_eigh", "flexlora_jacobi_svd"):
        (layers,), (threads,), found = emulated.geometry[name]
        assert (layers, found) == (2, shared_bytes(name, size))
        wanted = 8 * -(-size // 2)
        assert threads % 32 == 0 and (threads == 512 <= wanted or 0 <= threads - wanted < 32)


@pytest.mark.parametrize("size", [1, 5, 44, 250])
def test_cholesky_qr_is_the_twins(emulated: Emulated, size: int, generator: torch.Generator) -> None:
    Y = torch.randn(2, size + 60, size, generator=generator)
    Y[1, :, size // 2] = 0
    before = Y.clone()
    Q = cuda.orthonormalize(Y)
    gram = small.gram64(Q, Q)
    assert (gram[0] - torch.eye(size)).abs().max() < 1e-5 and not Q[1, :, size // 2].any()
    twin = reference.orthonormalize(Y[:1])
    assert (Q[:1] - twin @ (twin.mT @ Q[:1])).abs().max() < 1e-4 and torch.equal(Y, before)
    assert emulated.geometry["flexlora_root"] == ((2,), (256,), shared_bytes("flexlora_root", size))
    panels = -(-(size + 60) // 64)
    apply = E.shared_bytes(size, workspace=False)["flexlora_apply_right"]
    assert emulated.geometry["flexlora_apply_right"] == ((panels, 2), (128,), apply)


@pytest.mark.parametrize(("layers", "size"), [(0, 4), (2, 0), (1, 1), (3, 77)])
def test_scaled_grams_are_the_twins(emulated: Emulated, layers: int, size: int, generator: torch.Generator) -> None:
    P, Q = torch.randn(2, layers, size, size + 2, generator=generator)
    d = torch.randn(layers, size, dtype=torch.float64, generator=generator)
    mine, twins = (P @ P.mT, Q @ Q.mT), (P @ P.mT, Q @ Q.mT)
    found, expected = cuda.scale_grams(*mine, d), small.scale_grams(*twins, d)
    for x, y in zip((*mine, *found[:2]), (*twins, *expected[:2]), strict=True):
        assert x.dtype == y.dtype and torch.allclose(x.double(), y.double(), rtol=1e-6)
    assert torch.allclose(found[2], expected[2], rtol=1e-6)
    if layers * size:
        shared = E.shared_bytes(size, workspace=False)
        assert emulated.geometry["flexlora_scale"] == ((-(-size // 8), layers), (256,), shared["flexlora_scale"])
        assert emulated.geometry["flexlora_energy"] == ((layers,), (256,), shared["flexlora_energy"])


@pytest.mark.parametrize(("layers", "size", "width"), [(0, 4, 3), (1, 1, 1), (3, 77, 33)])
def test_the_recurrence(emulated: Emulated, layers: int, size: int, width: int, generator: torch.Generator) -> None:
    product, now, before = torch.randn(3, layers, size, width, generator=generator).unbind()
    a, b, c = torch.randn(3, layers, width, generator=generator).unbind()
    expected = a.unsqueeze(1) * product + b.unsqueeze(1) * now
    out = torch.empty_like(now)
    assert torch.allclose(cuda.chebyshev(product, now, None, a, b, None, out=out), expected, atol=1e-5)
    expected = expected + c.unsqueeze(1) * before
    assert torch.allclose(cuda.chebyshev(product, now, before, a, b, c, out=before), expected, atol=1e-5)
    if layers:
        assert emulated.geometry["flexlora_chebyshev"] == ((-(-size * width // 1024), layers), (256,), 0)


G3 = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).contiguous()
Y3 = torch.zeros(2, 5, 3)
HUGE = torch.empty(1, 1 << 21, 1 << 10, device="meta")  # 2³¹ entries


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cuda.whiten(G3.float()), r"gram is torch.float32 \(2, 3, 3\) .*expected contiguous torch.float64"),
        (lambda: cuda.whiten(G3[:, :2].contiguous()), r"\(2, 2, 3\): expected square matrices"),
        (lambda: cuda.condition(G3[0]), "gram is .*expected contiguous"),
        (lambda: cuda.ritz_begin(G3, G3[:1]), r"gram and core have shapes \(2, 3, 3\) and \(1, 3, 3\)"),
        (lambda: cuda.ritz_begin(G3, G3.expand(2, 3, 3).mT[:, ::2]), "core is"),
        (lambda: cuda.ritz_end(G3, G3[0], G3, G3[:, 0, 0], 3, last=False), "have shapes"),
        (lambda: cuda.ritz_end(G3, G3[:, 0].contiguous(), G3, G3[:, 0, 0], 4, last=False), "k = 4"),
        (lambda: cuda.gram64(Y3, Y3[:1]), "X and Y have shapes"),
        (lambda: cuda.gram64(Y3, Y3[:, :, :2], symmetric=True), "X and Y have shapes"),
        (lambda: cuda.gram64(Y3.mT, Y3.mT), "expected rows of torch.float32"),
        (lambda: cuda.apply_right(Y3, G3[:1]), "Y, T, out have shapes"),
        (lambda: cuda.apply_right(Y3, G3, only=torch.ones(2).bool()), "`only` leaves layers"),
        (lambda: cuda.scale_grams(G3.float(), G3.float(), G3[:, 0]), "d is .*contiguous"),
        (lambda: cuda.scale_grams(G3.float(), G3[:1].float(), G3[:, 0].contiguous()), "G, M, d have shapes"),
        (lambda: cuda.chebyshev(Y3, Y3, Y3, Y3[:, 0].clone(), Y3[:, 0].clone(), None, out=Y3), "c goes with before"),
        (lambda: cuda.chebyshev(Y3, Y3, None, Y3[:, :, 0].clone(), Y3[:, 0].clone(), None, out=Y3), "a, b and c"),
        (lambda: cuda.chebyshev(HUGE, HUGE, None, HUGE[:, 0], HUGE[:, 0], None, out=HUGE), "2147483648 entries a"),
        (lambda: cuda.whiten(torch.zeros(1, 3000, 3000, dtype=torch.float64)), "bytes of shared memory a block"),
    ],
)
def test_what_does_not_fit_is_refused(emulated: Emulated, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    assert not emulated.geometry


# -- on a GPU ---


def ways() -> dict[str, Any]:
    compiled = launcher.not_compiled()
    return {"compiled": compiled or _native.extension.cuda, "NVRTC through CuPy": nvrtc}  # type: ignore[union-attr]


@pytest.fixture(params=["compiled", "NVRTC through CuPy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen = ways()[request.param]
    reason = chosen if isinstance(chosen, str) else chosen.obstacle(0)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(launcher, "_ways", lambda device: ({request.param: chosen}, {}))
    return request.param


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("rows", "cols"), [*WEIRD, (4096, 80)])
def test_signs_on_a_gpu_either_way(way: str, rows: int, cols: int) -> None:
    found = cuda.signs(ADDRESSES, rows, cols, device=torch.device("cuda"))
    assert torch.equal(found.cpu(), signs_of(ADDRESSES, rows, cols))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", [1, 33, 80, 160, 240])
def test_small_problems_on_a_gpu_either_way(way: str, size: int, generator: torch.Generator) -> None:
    G, C = grams(5, size, generator), grams(5, size, generator)
    G[3, 0, 0] = float("nan")
    there = G.cuda(), C.cuda()
    T, shifted = (x.cpu() for x in cuda.whiten(there[0]))
    expected, where = small.whiten(G)
    good = [0, 1, 2, 4]
    assert torch.allclose(T[good], expected[good], rtol=1e-8, atol=1e-10) and torch.equal(shifted, where)
    assert torch.allclose(cuda.condition(there[0]).cpu()[good], small.condition(G)[good], rtol=1e-4, atol=1e-6)
    for found, matrix in zip(cuda.jacobi_eigh(there[1])[:1] + cuda.jacobi_svd(there[1])[1:2], (C, C), strict=True):
        expected = torch.linalg.eigvalsh(matrix)
        assert torch.allclose(found.cpu().sort().values, expected, rtol=1e-9, atol=1e-9)
    values = cuda.ritz(*there)[0].cpu()
    assert torch.allclose(values[good], small.ritz(G, C)[0][good].clamp_min(0), rtol=1e-8)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = cuda.ritz(*there)[0]
    torch.cuda.synchronize()
    assert torch.equal(again.cpu()[good], values[good])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_panels_on_a_gpu_either_way(way: str, generator: torch.Generator) -> None:
    for m, w in itertools.product((0, 5, 3000), (1, 33, 80, 200)):
        Y = torch.randn(3, m, w, generator=generator)
        assert torch.allclose(cuda.gram64(Y.cuda(), Y.cuda()).cpu(), small.gram64(Y, Y), rtol=1e-11, atol=1e-9)
        Q = cuda.orthonormalize(Y.cuda()).cpu()
        kept = (Q != 0).any(dim=1).double()
        assert (small.gram64(Q, Q) - torch.diag_embed(kept)).abs().max() < 1e-5 and kept.sum() == 3 * min(m, w)
    P, Q, product = torch.randn(3, 4, 77, 77, generator=generator)
    d = torch.randn(4, 77, dtype=torch.float64, generator=generator)
    mine, twins = (P @ P.mT, Q @ Q.mT), (P @ P.mT, Q @ Q.mT)
    found, expected = cuda.scale_grams(*(x.cuda() for x in mine), d.cuda()), small.scale_grams(*twins, d)
    assert torch.allclose(found[0].cpu(), expected[0]) and torch.allclose(found[2].cpu(), expected[2], rtol=1e-6)
    a, b, c = torch.randn(3, 4, 77, generator=generator)
    exact = a.unsqueeze(1) * product + b.unsqueeze(1) * P + c.unsqueeze(1) * Q
    there = [x.cuda() for x in (product, P, Q, a, b, c)]
    assert torch.allclose(cuda.chebyshev(*there, out=torch.empty_like(there[0])).cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    reasons = {name: way if isinstance(way, str) else way.obstacle(0) for name, way in ways().items()}
    if any(reasons.values()):
        pytest.skip(f"only one way here: {reasons}")
    G, C = grams(9, 80, generator).cuda(), grams(9, 80, generator).cuda()
    found = []
    for name, way in ways().items():
        monkeypatch.setattr(launcher, "_ways", lambda device, name=name, way=way: ({name: way}, {}))
        found.append(cuda.ritz(G, C))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_cuda_refuses_on_a_gpu_is_quoted(way: str) -> None:
    X = torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    out = torch.zeros(1, 1, 1, device="cuda")
    with pytest.raises(launcher.BackendError, match=r"block \(2048, 1, 1\) .*refused on cuda:0: .*invalid"):
        launcher.launch("flexlora_signs", (1,), (2048,), (X, 1, 1, out), device=X.device)
    with pytest.raises(launcher.BackendError, match="300000 bytes of shared memory was refused"):
        launcher.launch("flexlora_signs", (1,), (256,), (X, 1, 1, out), device=X.device, shared_bytes=300000)
    with pytest.raises(ValueError, match=r"argument 4 of 4: expected float32\*, got a tensor of float32 on cpu"):
        launcher.launch("flexlora_signs", (1,), (256,), (X, 1, 1, out.cpu()), device=X.device)
    launcher.launch("flexlora_signs", (1,), (256,), (X, 1, 1, out), device=X.device)  # nothing is left over
    assert out.item() in (-1.0, 1.0)
