"""What every kernel here does with a table of columns: find a layer's columns, load a tile, multiply two tiles.

Both sides of a stack are read in the same way: entry (i, c) of P, and of Qᵀ, lies at ``address[c] + i·stride[c]``,
counted in elements. For P the columns of one client are neighbours in memory (a tile of B is one contiguous chunk);
for Qᵀ the stride is one. Four constants say what the host knows of a side, so that loads become wide:

    ELEMENT  its element type
    INDEX    int32 where no offset inside a factor needs more, else int64
    UNIT     whether stride is one everywhere (Q)
    RUN      columns that come in runs of this many neighbours, strides being multiples of it (P)
    BYTES    what every run's address is a multiple of
"""

from __future__ import annotations

from flexlora_fast.kernels._triton import tl, triton


@triton.jit
def layer_columns(offset_ptr, layer, RUN: tl.constexpr):
    """The first column of a layer and its number of columns R."""
    first = tl.load(offset_ptr + layer)
    R = (tl.load(offset_ptr + layer + 1) - first).to(tl.int32)
    return first, tl.multiple_of(R, RUN)


@triton.jit
def column_pointers(
    address_ptr, stride_ptr, columns, inside, ELEMENT: tl.constexpr, INDEX: tl.constexpr, RUN: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Pointers to the first entries of ``columns``, and their strides; null where not ``inside``."""
    pointers = tl.load(address_ptr + columns, mask=inside, other=0).to(tl.pointer_type(ELEMENT))
    strides = tl.load(stride_ptr + columns, mask=inside, other=0).to(INDEX)
    pointers = tl.max_contiguous(tl.multiple_of(pointers, BYTES), RUN)
    return pointers, tl.max_constancy(tl.multiple_of(strides, RUN), RUN)


@triton.jit
def load_factor(pointers, strides, rows, inside, INDEX: tl.constexpr, UNIT: tl.constexpr):
    """Entries (rows, columns), zero where not ``inside``; pointers and rows are expanded to broadcast."""
    if UNIT:
        return tl.load(pointers + rows.to(INDEX), mask=inside, other=0.0)
    return tl.load(pointers + rows.to(INDEX) * strides, mask=inside, other=0.0)


@triton.jit
def rounded_to_tf32(x):
    """x in TF32's 10 bits, rounded to nearest: the tensor cores would cut the others off, which is biased."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # The sum would carry a NaN of all ones into the sign: it would come out as −0.
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, x, rounded)
    return x.to(tl.float32)


@triton.jit
def three_bfloat16(x):
    """Three bfloat16 numbers whose sum is the float32 x, largest first."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, SPLIT_A: tl.constexpr):
    """total + a·b in float32.

    "bf16x3": one operand (a where SPLIT_A, else b) becomes the sum of three bfloat16 numbers, which holds all 24 bits
    of a float32; the other is bfloat16 already. All products are exact, the smallest are added first. They start from
    zero and not from ``total``: Triton to 3.7 at least miscompiles loops whose steps put several products into the
    accumulator that the next step starts from, for Blackwell (https://github.com/triton-lang/triton/issues/10821).
    """
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "bf16x3" and SPLIT_A:
        high, middle, low = three_bfloat16(a)
        total += tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))
    elif PRECISION == "bf16x3":
        high, middle, low = three_bfloat16(b)
        total += tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))
    elif PRECISION == "tf32":
        total = tl.dot(rounded_to_tf32(a), rounded_to_tf32(b), total, input_precision="tf32")
    else:
        # Raised as loaded: exact, and Triton's interpreter gets bfloat16 arithmetic silently wrong
        # (https://github.com/triton-lang/triton/issues/10945).
        exact: tl.constexpr = "tf32x3" if PRECISION == "tf32x3" else "ieee"
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=exact)
    return total
