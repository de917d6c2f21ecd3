"""The compiled extension: materialize against float64, what it refuses, and what is said when it is missing."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlora_fast import _native

needs_extension = pytest.mark.skipif(_native.extension is None, reason=f"no native extension: {_native.reason}")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def clients(m, n, ranks, dtypes, generator):
    """Factors B_i (m, r_i) and A_i (r_i, n), and the coefficients d (R,) float64."""
    B = [torch.randn(m, r, generator=generator).to(dtype) for r, dtype in zip(ranks, dtypes, strict=True)]
    A = [torch.randn(r, n, generator=generator).to(dtype) for r, dtype in zip(ranks, dtypes, strict=True)]
    return B, A, torch.randn(sum(ranks), generator=generator, dtype=torch.float64)


def twin(B, A, d, dtype=torch.float64):
    """Σ_i (B_i · diag(d_i)) · A_i as one product of packed factors in ``dtype``."""
    P = torch.cat([b.to(dtype) for b in B], dim=1)  # [m, R]
    Q = torch.cat([a.to(dtype) for a in A], dim=0)  # [R, n]
    return (P * d.to(dtype)) @ Q


def assert_as_good_as_float32(B, A, d):
    """The result is at most twice as far from float64 as torch's own float32 product of the packed factors."""
    result = _native.extension.materialize(B, A, d)
    exact = twin(B, A, d)
    assert result.dtype == torch.float32 and result.shape == exact.shape and result.is_contiguous()
    allowed = 2 * (twin(B, A, d, torch.float32) - exact).norm() + 1e-7 * exact.norm()
    assert (result - exact).norm() <= allowed


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "ranks"),
    [
        (5, 123, [1]),
        (123, 5, [3, 1, 7]),
        (64, 64, [8, 8]),
        (1, 1, [1]),
        (33, 65, [4, 0, 2]),  # a client of rank 0
        (20, 31, [500, 30, 600]),  # clients cut by the edges of the panels
    ],
)
def test_materialize_matches_float64(m, n, ranks, dtype, generator):
    assert_as_good_as_float32(*clients(m, n, ranks, [dtype] * len(ranks), generator))


@needs_extension
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    pairs=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(DTYPES)), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_materialize_matches_float64_for_any_clients(m, n, pairs, seed):
    ranks, dtypes = zip(*pairs, strict=True)
    assert_as_good_as_float32(*clients(m, n, ranks, dtypes, torch.Generator().manual_seed(seed)))


@needs_extension
def test_a_clients_factors_may_differ_in_dtype_and_be_strided(generator):
    B, A, d = clients(9, 14, [4, 4], [torch.float32] * 2, generator)
    B = [B[0].t().contiguous().t(), B[1].half().repeat_interleave(2, dim=1)[:, ::2]]
    A = [A[0].bfloat16(), A[1].t().contiguous().t()]
    assert not any(t.is_contiguous() for t in (*B, A[1]))
    assert_as_good_as_float32(B, A, d)
    assert_as_good_as_float32(B, A, d.repeat_interleave(3)[::3])


@needs_extension
def test_total_rank_zero_is_a_zero_update():
    result = _native.extension.materialize([torch.ones(3, 0)], [torch.ones(0, 4)], torch.ones(0, dtype=torch.float64))
    assert torch.equal(result, torch.zeros(3, 4))


@needs_extension
@pytest.mark.parametrize(("m", "n"), [(0, 4), (4, 0)])
def test_an_empty_side_gives_an_empty_update(m, n):
    result = _native.extension.materialize([torch.ones(m, 2)], [torch.ones(2, n)], torch.ones(2, dtype=torch.float64))
    assert result.shape == (m, n)


@needs_extension
def test_coefficients_are_applied_in_float32_not_in_the_factors_dtype():
    # 1.001 is no bfloat16: folded into B it would come back as 1.0.
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    result = _native.extension.materialize([one], [one], torch.tensor([1.001], dtype=torch.float64))
    assert result.item() == pytest.approx(1.001, rel=1e-6)


@needs_extension
def test_inputs_are_left_alone_and_no_graph_is_kept(generator):
    B, A, d = clients(6, 8, [2, 3], [torch.float32] * 2, generator)
    before = [t.clone() for t in (*B, *A, d)]
    B[0].requires_grad_()
    result = _native.extension.materialize(B, A, d)
    assert not result.requires_grad
    assert all(torch.equal(t, kept) for t, kept in zip((*B, *A, d), before, strict=True))


@needs_extension
def test_the_result_is_the_same_every_time(generator):
    B, A, d = clients(70, 90, [8] * 80, [torch.float16] * 80, generator)
    first = _native.extension.materialize(B, A, d)
    assert all(torch.equal(first, _native.extension.materialize(B, A, d)) for _ in range(3))


@needs_extension
def test_a_client_that_is_not_a_number_shows(generator):
    B, A, d = clients(4, 5, [2, 2], [torch.float32] * 2, generator)
    A[1][0, 3] = float("nan")
    assert _native.extension.materialize(B, A, d)[:, 3].isnan().all()


F32 = torch.ones(3, 2), torch.ones(2, 4), torch.ones(2, dtype=torch.float64)


@needs_extension
@pytest.mark.parametrize(
    ("B", "A", "d", "message"),
    [
        ([], [], F32[2], "B is empty"),
        ([F32[0]], [], F32[2], "B holds 1 clients and A holds 0"),
        ([F32[0]], [torch.ones(3, 4)], F32[2], r"client 0: B is \[3, 2\] and A is \[3, 4\]: their ranks differ"),
        ([F32[0], torch.ones(5, 0)], [F32[1], torch.ones(0, 4)], F32[2], "client 1: B has 5 rows, client 0 has 3"),
        ([F32[0], torch.ones(3, 0)], [F32[1], torch.ones(0, 6)], F32[2], "client 1: A has 6 columns, client 0 has 4"),
        ([F32[0].int()], [F32[1]], F32[2], r"B\[0\] is Int: expected Half, BFloat16 or Float"),
        ([F32[0]], [F32[1].double()], F32[2], r"A\[0\] is Double"),
        ([F32[0][0]], [F32[1]], F32[2], r"B\[0\] has shape \[2\]: expected two dimensions"),
        ([F32[0].to_sparse()], [F32[1]], F32[2], r"B\[0\] is a Sparse tensor on cpu"),
        ([F32[0]], [F32[1].to("meta")], F32[2], r"A\[0\] is a Strided tensor on meta: pass dense CPU tensors"),
        ([F32[0]], [F32[1]], F32[2].float(), r"d is Float: expected Double \(float64\)"),
        ([F32[0]], [F32[1]], torch.ones(3, dtype=torch.float64), r"d has shape \[3\] for a total rank of 2"),
        ([F32[0]], [F32[1]], F32[2][:, None], r"d has shape \[2, 1\]"),
    ],
)
def test_what_does_not_fit_is_quoted(B, A, d, message):
    with pytest.raises(ValueError, match=message):
        _native.extension.materialize(B, A, d)


@needs_extension
@pytest.mark.parametrize("B", [[None], [3.0], torch.ones(3)])
def test_what_is_no_list_of_matrices_is_refused(B):
    with pytest.raises((TypeError, ValueError)):
        _native.extension.materialize(B, [F32[1]], F32[2])


@needs_extension
def test_the_gil_is_released(generator):
    """While one thread computes, another one keeps running: its longest pause is far below the computation."""
    B, A, d = clients(2048, 2048, [64] * 24, [torch.float32] * 24, generator)

    def longest_pause_share() -> float:
        thread = threading.Thread(target=_native.extension.materialize, args=(B, A, d))
        begin = last = time.perf_counter()
        longest = 0.0
        thread.start()
        while thread.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest / (time.perf_counter() - begin)

    # The best of several, because a busy machine may pause any thread.
    assert min(longest_pause_share() for _ in range(5)) < 0.5


def write(tmp_path, **info):
    path = tmp_path / "_build_info.json"
    path.write_text(json.dumps(info))
    return path


def test_a_failed_build_is_reported_with_its_reason(tmp_path):
    missing = _native.load(_native.build_info(write(tmp_path, built=False, reason="no compiler", torch="2.13.0")))
    assert missing == _native.Missing("it was not built: no compiler", broken=False)


def test_an_extension_of_another_torch_is_not_loaded(tmp_path):
    missing = _native.load(_native.build_info(write(tmp_path, built=True, reason=None, torch="2.4.1+cpu")))
    assert missing.broken
    assert "built for torch 2.4.1" in missing.reason and torch.__version__.partition("+")[0] in missing.reason
    assert "pip install --no-build-isolation" in missing.reason


@pytest.mark.parametrize(
    ("error", "info", "broken", "words"),
    [
        (ModuleNotFoundError("no _C"), {"built": True}, True, "its file is gone"),
        (ModuleNotFoundError("no _C"), {}, False, "never built"),
        (ImportError("undefined symbol: x"), {"built": True}, True, "does not load: undefined symbol: x"),
    ],
)
def test_an_extension_that_does_not_load_is_reported(monkeypatch, error, info, broken, words):
    def fail(name):
        assert name == "flexlora_fast._C"
        raise error

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    missing = _native.load(info)
    assert missing.broken == broken and words in missing.reason


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_unreadable_build_info_counts_as_none(tmp_path, content):
    path = tmp_path / "_build_info.json"
    path.write_text(content)
    assert _native.build_info(path) == {}
    assert _native.build_info(tmp_path / "absent.json") == {}
