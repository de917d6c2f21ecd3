"""The extension's products of tables against float64, on shapes, layouts and values that blocks do not fit."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlora_fast import _native

if _native.extension is None:
    pytest.skip(f"no native extension: {_native.reason}", allow_module_level=True)
E = _native.extension
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PRECISIONS = [p for p in ("float32", "bfloat16") if E.can_multiply(p)]
if not PRECISIONS:
    pytest.skip(E.obstacle("float32"), allow_module_level=True)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)

# (M, K, N): beside each, what it is there for. The order of loops depends on M and N, and 512 is its edge.
SHAPES = [
    (1, 1, 1),
    (5, 123, 7),
    (5, 7, 123),
    (65, 63, 257),
    (257, 123, 5),
    (64, 256, 64),  # exactly one block
    (33, 5001, 65),  # more than is packed at once, and odd
    (65, 5001, 33),
    (513, 40, 700),  # more than one group of columns and of rows
    (700, 40, 513),
    (600, 300, 17),
    (17, 300, 600),
]


@pytest.fixture
def threads():
    """Sets the number of threads; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cut(X, axis, parts, generator, dtypes=(torch.float32,), layouts=("rows",)):
    """X as a table of ``parts`` pieces along ``axis``, of unequal sizes, dtypes and layouts in turn."""
    edges = sorted(torch.randint(0, X.shape[axis] + 1, (parts - 1,), generator=generator).tolist())
    pieces = [
        X.narrow(axis, lo, hi - lo).to(dtype) for (lo, hi), dtype in zip(
            itertools.pairwise([0, *edges, X.shape[axis]]), itertools.cycle(dtypes), strict=False
        )
    ]  # fmt: skip
    lay = {
        "rows": lambda t: t.contiguous(),
        "columns": lambda t: t.t().contiguous().t(),
        "strided": lambda t: t.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3],
    }
    return [lay[layout](t) for t, layout in zip(pieces, itertools.cycle(layouts), strict=False)]


def tables(shape, generator, dtypes=(torch.float32,), layouts=("rows", "rows"), parts=(3, 3), axes=(1, 0)):
    """Random A and B as tables."""
    M, K, N = shape
    A, B = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    return (
        cut(A, axes[0], parts[0], generator, dtypes, layouts[:1]),
        cut(B, axes[1], parts[1], generator, dtypes, layouts[1:]),
    )


def check(A, B, axes=(1, 0), precision="float32", scale=None, symmetric=False, out=None):
    """The product, at most twice as far from float64 as torch's own in float32, of the operands as they are rounded."""
    # Coefficients that change often, or within a pair of bfloat16, are multiplied in float32.
    changes = [] if scale is None else (scale[1:] != scale[:-1]).nonzero().flatten().tolist()
    long = all(k % 2 for k in changes) and (scale is None or len(scale) >= 12 * (1 + len(changes)))
    rounded = (lambda t: t.bfloat16()) if precision == "bfloat16" and long else (lambda t: t)
    left, right = (torch.cat([rounded(t).double() for t in X], dim=axis) for X, axis in zip((A, B), axes, strict=True))
    start = torch.zeros(()) if out is None else out.clone()
    d = torch.ones(left.shape[1], dtype=torch.float64) if scale is None else scale
    truth = start.double() + (left * d) @ right
    plain = start + (left.float() * d.float()) @ right.float()
    result = E.matmul(A, axes[0], B, axes[1], precision, symmetric, scale, out)
    assert result.dtype == torch.float32 and result.shape == truth.shape
    assert result.is_contiguous() if out is None else result.data_ptr() == out.data_ptr()
    assert (result - truth).norm() <= 2 * (plain - truth).norm() + 1e-7 * truth.norm()
    return result


@each_precision
@pytest.mark.parametrize("layouts", [*itertools.product(["rows", "columns"], repeat=2)], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_matches_float64(shape, layouts, precision, generator):
    check(*tables(shape, generator, layouts=layouts), precision=precision)


@each_precision
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", [*itertools.product([0, 1], repeat=2)], ids=str)
def test_pieces_may_be_joined_along_either_axis(axes, dtype, precision, generator):
    for shape in ((70, 90, 130), (130, 90, 70)):
        A, B = tables(shape, generator, [dtype], parts=(9, 7), axes=axes)
        check(A, B, axes, precision)
        scale = torch.randn(shape[1], generator=generator, dtype=torch.float64)
        check(A, B, axes, precision, scale)


@given(
    shape=st.tuples(*[st.integers(0, 80)] * 3),
    parts=st.tuples(*[st.integers(1, 6)] * 2),
    axes=st.tuples(*[st.integers(0, 1)] * 2),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "strided"])] * 2),
    precision=st.sampled_from(PRECISIONS),
    run=st.integers(0, 9),
    add=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matmul_matches_float64_for_any_tables(shape, parts, axes, dtypes, layouts, precision, run, add, seed):
    """Mixed types and layouts, pieces of no rows or columns; coefficients in runs (0: none)."""
    generator = torch.Generator().manual_seed(seed)
    A, B = tables(shape, generator, dtypes, layouts, parts, axes)
    scale = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    scale = scale[torch.arange(shape[1]) // run] if run else None
    out = torch.randn(shape[0], shape[2], generator=generator) if add else None
    check(A, B, axes, precision, scale, out=out)


@each_precision
@pytest.mark.parametrize("shape", [(30, 900, 40), (600, 900, 520)], ids=str)
@pytest.mark.parametrize("run", [1, 3, 8, 12, 64, 300, 900])
def test_scale_in_runs(run, shape, precision, generator):
    A, B = tables(shape, generator, [torch.bfloat16], parts=(20, 20))
    scale = torch.randn(900, generator=generator, dtype=torch.float64)[torch.arange(900) // run]
    scale[: 2 * run] = 0
    kept = scale.repeat_interleave(2)[::2].clone()
    check(A, B, precision=precision, scale=scale)
    assert torch.equal(scale, kept)
    assert not E.matmul(A, 1, B, 0, precision, False, torch.zeros_like(scale)).any()


@each_precision
def test_scale_is_applied_in_float32_not_in_the_operands_dtype(precision):
    # 1.001 is no bfloat16: folded into A it would come back as 1.0.
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    result = E.matmul([one], 1, [one], 0, precision, False, torch.tensor([1.001], dtype=torch.float64))
    assert result.item() == pytest.approx(1.001, rel=1e-6)


@each_precision
@pytest.mark.parametrize("shape", [(3, 2, 5), (70, 5001, 90), (90, 5001, 70), (600, 40, 550)], ids=str)
@pytest.mark.parametrize("layouts", [("rows", "rows"), ("columns", "columns")], ids="-".join)
def test_out_is_added_to(layouts, shape, precision, generator):
    """Also where its rows lie apart, and what lies between them stays."""
    A, B = tables(shape, generator, layouts=layouts)
    wide = torch.randn(shape[0], shape[2] + 3, generator=generator)
    before = wide.clone()
    check(A, B, precision=precision, out=wide[:, 2:-1])
    assert torch.equal(wide[:, :2], before[:, :2]) and torch.equal(wide[:, -1], before[:, -1])


@each_precision
@pytest.mark.parametrize(("clients", "rank", "m"), [(1, 1, 1), (7, 9, 123), (20, 8, 5001), (50, 13, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_symmetric_product_is(scaled, dtype, clients, rank, m, precision, generator):
    """A Gram of factors, bit for bit; and where the clients stand in the table changes its places, not its entries."""
    B = [torch.randn(m, rank, generator=generator).to(dtype) for _ in range(clients)]
    scale = torch.rand(m, generator=generator, dtype=torch.float64) if scaled else None
    G = check([b.t() for b in B], B, (0, 1), precision, scale, symmetric=True)
    assert torch.equal(G, G.t())
    if scaled:
        return
    order = torch.randperm(clients, generator=generator)
    moved = E.matmul([B[i].t() for i in order], 0, [B[i] for i in order], 1, precision, True)
    columns = (order[:, None] * rank + torch.arange(rank)).flatten()
    assert torch.equal(moved, G[columns][:, columns])


@each_precision
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(70, 5001, 130), (700, 333, 530), (530, 333, 100)], ids=str)
def test_an_entry_is_the_same_wherever_it_stands(shape, scaled, precision, generator):
    """Alone, in other company or in another place: the order of summation depends on K and ``scale`` alone."""
    A, B = torch.randn(shape[:2], generator=generator), torch.randn(shape[1:], generator=generator)
    scale = torch.randn(shape[1], generator=generator, dtype=torch.float64) if scaled else None
    whole = E.matmul([A], 0, [B], 0, precision, False, scale)
    rows, columns = (torch.randperm(size, generator=generator) for size in (shape[0], shape[2]))
    for count in (1, 5, 64, 100):
        i, j = rows[:count], columns[-count:]
        part = E.matmul([A[i]], 0, [B[:, j]], 0, precision, False, scale)
        assert torch.equal(part, whole[i][:, j])


@each_precision
@pytest.mark.parametrize("run", [0, 3, 40])
@pytest.mark.parametrize("shape", [(70, 333, 900), (900, 333, 70), (600, 333, 530)], ids=str)
def test_how_tables_are_cut_and_laid_out_does_not_show(shape, run, precision, generator):
    A, B = (X[0] for X in tables(shape, generator, [torch.bfloat16], parts=(1, 1)))
    scale = torch.randn(333, generator=generator, dtype=torch.float64)[torch.arange(333) // run] if run else None
    whole = E.matmul([A], 1, [B], 0, precision, False, scale)
    for layouts in itertools.product(["rows", "columns", "strided"], repeat=2):
        for axes in itertools.product([0, 1], repeat=2):
            a, b = (cut(X, axis, 9, generator, DTYPES[::2], [layout])
                    for X, axis, layout in zip((A, B), axes, layouts, strict=True))  # fmt: skip
            assert torch.equal(E.matmul(a, axes[0], b, axes[1], precision, False, scale), whole)


@each_precision
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_number_of_threads_does_not_show(symmetric, precision, generator, threads):
    for shape in ((700, 900, 700), (70, 5001, 1000), (1000, 300, 70)):
        A, B = tables(shape, generator, DTYPES)
        if symmetric:
            A = [b.t() for b in B]
        results = []
        for count in (1, 2, 7):
            threads(count)
            results += [E.matmul(A, 1, B, 0, precision, symmetric) for _ in range(2)]
        assert all(torch.equal(result, results[0]) for result in results)


@each_precision
@pytest.mark.parametrize(("M", "K", "N"), [(0, 3, 4), (4, 3, 0), (4, 0, 3), (0, 0, 0)])
def test_empty_sides(M, K, N, precision):
    A, B = torch.ones(M, K), torch.ones(K, N)
    assert torch.equal(E.matmul([A], 1, [B], 0, precision), torch.zeros(M, N))
    out = torch.ones(M, N)
    assert torch.equal(E.matmul([A], 1, [B], 0, precision, False, None, out), torch.ones(M, N))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_sixteen_bit_number_is_read_exactly(dtype):
    """Subnormal, huge and infinite ones too: times one, all 65536 come back."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for A in (x[:, None], x[None].expand(2, -1).t()[:, :1]):
        result = E.matmul([A], 1, [torch.ones(1, 1)], 0)
        torch.testing.assert_close(result[:, 0], x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("bfloat16" not in PRECISIONS, reason="no products in bfloat16 here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_are_rounded_as_torch_rounds_them(dtype, generator):
    """To nearest, ties to even, over all exponents. (The dot-product instructions take subnormals as zeros.)"""
    x = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    ties = (torch.arange(4096, dtype=torch.int32) << 15 | 0x3F000000).view(torch.float32)
    x = torch.cat([x, ties, torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38])]).to(dtype)
    expected = x.bfloat16().float()
    expected[expected.abs() < torch.finfo(torch.bfloat16).tiny] = 0
    one = torch.ones(1, 1)
    for result in (E.matmul([x[:, None]], 1, [one], 0, "bfloat16"), E.matmul([one], 1, [x[None]], 0, "bfloat16").t()):
        torch.testing.assert_close(result[:, 0], expected, rtol=0, atol=0, equal_nan=True)


@each_precision
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_where_it_counts_and_nowhere_else(value, precision, generator):
    for shape in ((65, 33, 700), (700, 33, 65), (9, 33, 5)):
        A, B = (X[0] for X in tables(shape, generator, parts=(1, 1)))
        A[3, 32], B[7, 4] = value, value
        expected = A.double() @ B.double()
        for scale in (None, torch.ones(33, dtype=torch.float64)):
            result = E.matmul([A], 1, [B], 0, precision, False, scale)
            assert torch.equal(result.isnan(), expected.isnan())
            assert torch.equal(result.isinf(), expected.isinf())
        # What was packed before must not come back in the padding of odd sizes.
        A, B = (X[0] for X in tables((shape[0] - 1, 31, shape[2] - 1), generator, parts=(1, 1)))
        assert E.matmul([A], 1, [B], 0, precision).isfinite().all()


@each_precision
@pytest.mark.parametrize("place", [0, 7, 8, 299])
def test_a_coefficient_that_is_not_a_number_shows(place, precision):
    scale = torch.ones(300, dtype=torch.float64)
    scale[place] = float("nan")
    for M, N in ((3, 5), (5, 3)):
        assert E.matmul([torch.ones(M, 300)], 1, [torch.ones(300, N)], 0, precision, False, scale).isnan().all()


@each_precision
def test_inputs_are_left_alone_and_no_graph_is_kept(precision, generator):
    A, B = tables((60, 80, 70), generator, DTYPES)
    scale = torch.randn(80, generator=generator, dtype=torch.float64)
    before = [t.clone() for t in (*A, *B, scale)]
    for t in (*A, *B):
        t.requires_grad_()
    assert not E.matmul(A, 1, B, 0, precision, False, scale).requires_grad
    assert all(torch.equal(t, kept) for t, kept in zip((*A, *B, scale), before, strict=True))


@each_precision
def test_pieces_may_be_views_of_one_element(precision):
    A, B = torch.full((1, 1), 3.0).expand(20, 30), torch.full((1, 1), 2.0).expand(30, 40)
    assert torch.equal(E.matmul([A], 1, [B], 0, precision), torch.full((20, 40), 180.0))


@each_precision
def test_python_threads_may_multiply_at_the_same_time(precision, generator):
    jobs = [tables(shape, generator, DTYPES) for shape in SHAPES * 2]
    alone = [E.matmul(A, 1, B, 0, precision) for A, B in jobs]
    together = [None] * len(jobs)

    def work(first):
        for i in range(first, len(jobs), 4):
            together[i] = E.matmul(jobs[i][0], 1, jobs[i][1], 0, precision)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


def test_the_gil_is_released(generator):
    """While one thread computes, another one keeps running: its longest pause is far below the computation."""
    A, B = tables((2048, 1024, 2048), generator)

    def longest_pause_share() -> float:
        thread = threading.Thread(target=E.matmul, args=(A, 1, B, 0))
        begin = last = time.perf_counter()
        longest = 0.0
        thread.start()
        while thread.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest / (time.perf_counter() - begin)

    # The best of several, because a busy machine may pause any thread.
    assert min(longest_pause_share() for _ in range(5)) < 0.5


X, Y, D = torch.ones(3, 2), torch.ones(2, 4), torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, [Y], 0), "A is empty: without a piece it has no shape"),
        (([X], 1, [], 0), "B is empty"),
        (([X], 2, [Y], 0), "A is joined along axis 2: expected 0 or 1"),
        (([X], 1, [Y], -1), "B is joined along axis -1"),
        (([X, X[:2]], 1, [Y], 0), r"A\[1\] has shape \[2, 2\], A\[0\] has \[3, 2\]: .* joined along axis 1"),
        (([X], 1, [Y, Y[:, :3]], 0), r"B\[1\] has shape \[2, 3\], B\[0\] has \[2, 4\]: .* joined along axis 0"),
        (([X], 1, [X], 0), r"A is \(3, 2\) and B is \(3, 2\): they cannot be multiplied"),
        (([X.int()], 1, [Y], 0), r"A\[0\] is Int: expected Half, BFloat16 or Float"),
        (([X], 1, [Y.double()], 0), r"B\[0\] is Double"),
        (([X[0]], 1, [Y], 0), r"A\[0\] has shape \[2\]: expected two dimensions"),
        (([X.to_sparse()], 1, [Y], 0), r"A\[0\] is a Sparse tensor on cpu"),
        (([X], 1, [Y.to("meta")], 0), r"B\[0\] is a Strided tensor on meta: pass dense CPU tensors"),
        (([X], 1, [Y], 0, "float64"), "precision is 'float64': expected 'float32' or 'bfloat16'"),
        (([X], 1, [Y], 0, "float32", True), r"a symmetric product cannot be \(3, 4\)"),
        (([X], 1, [Y], 0, "float32", False, D.float()), r"scale is Float of shape \[2\]: expected Double \[2\]"),
        (([X], 1, [Y], 0, "float32", False, D[:1]), r"scale is Double of shape \[1\]: expected Double \[2\]"),
        (([X], 1, [Y], 0, "float32", False, D[:, None]), r"scale is Double of shape \[2, 1\]"),
        (([X], 1, [Y], 0, "float32", False, D.to("meta")), "scale is on meta"),
        (([X], 1, [Y], 0, "float32", False, None, torch.ones(3, 3)), r"out is Float of shape \[3, 3\]"),
        (([X], 1, [Y], 0, "float32", False, None, torch.ones(3, 4).double()), r"out is Double .*: expected Float"),
        (([X], 1, [Y], 0, "float32", False, None, torch.ones(4, 3).t()), r"out .* and strides \[1, 3\]: expected"),
        (([X], 1, [Y], 0, "float32", False, None, torch.ones(1, 4).expand(3, 4)), r"strides \[0, 1\]: expected"),
        (([X], 1, [Y], 0, "float32", False, None, torch.ones(3, 4, device="meta")), "out is on meta"),
        (([X], 1, [X.t()], 0, "float32", True, None, torch.ones(3, 3)), "a symmetric product takes no out"),
    ],
)
def test_what_does_not_fit_is_quoted(arguments, message):
    with pytest.raises(ValueError, match=message):
        E.matmul(*arguments)


@pytest.mark.parametrize("A", [[None], [3.0], torch.ones(3), None])
def test_what_is_no_list_of_matrices_is_refused(A):
    with pytest.raises((TypeError, ValueError)):
        E.matmul(A, 1, [Y], 0)


def test_without_onednn_there_is_a_reason():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not E.can_multiply("float32") and "oneDNN is switched off" in E.obstacle("bfloat16")
        with pytest.raises(ValueError, match="oneDNN is switched off"):
            E.matmul([X], 1, [Y], 0)
    assert E.can_multiply("float32") and E.obstacle("float32") is None
    with pytest.raises(ValueError, match="precision is 'int8'"):
        E.obstacle("int8")
