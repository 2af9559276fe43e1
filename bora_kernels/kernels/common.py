"""Device functions that several kernels share: rounding, splitting, the dropout mask, masked loads."""

import triton
import triton.language as tl


@triton.jit
def round_with_dither(value, offs_m, offs_c, dtype: tl.constexpr):
    """float32 -> dtype with a fixed dither for each element (m, c), unbiased and exact on exact values.

    The dither is the two-dimensional R2 sequence, which fills [0, 1) evenly along rows, columns and both.
    """
    if dtype == tl.float32:
        return value
    dropped: tl.constexpr = 16 if dtype == tl.bfloat16 else 13  # bits of a float32 mantissa that dtype lacks
    noise = offs_m.to(tl.uint32)[:, None] * 0xC13FA9A9 + offs_c.to(tl.uint32)[None, :] * 0x91E10DA5
    bits = value.to(tl.uint32, bitcast=True) + (noise >> (32 - dropped))
    rounded = (bits >> dropped << dropped).to(tl.float32, bitcast=True)
    return tl.where(value == value, rounded, value).to(dtype)


@triton.jit
def two_terms(value, dtype: tl.constexpr):
    """float32 as a sum of two numbers of a half-precision dtype."""
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype)


@triton.jit
def dot_split(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b for a float32 b; a half-precision a meets b as two terms, so that no small update of b is lost."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    high, low = two_terms(b, a.dtype)
    acc = tl.dot(a, high, acc)
    return tl.dot(a, low, acc)


@triton.jit
def add_product(acc, t, projection_ptr, offs_m, end, R: tl.constexpr, PRECISION: tl.constexpr):
    """acc + tᵀ·projection over the tokens offs_m, of a projection [M, R], contiguous; acc where R is 0."""
    if R > 0:
        offs_r = tl.arange(0, acc.shape[1])
        projection = load_matrix(projection_ptr, offs_m, offs_r, end, R, R, 1).to(t.dtype)
        acc = tl.dot(tl.trans(t), projection, acc, input_precision=PRECISION)
    return acc


@triton.jit
def keep_mask(seed, offs_m, offs_c, dropout_p):
    """Which elements (m, c) dropout keeps: the same in every kernel that draws them."""
    rows = tl.broadcast_to(offs_m.to(tl.uint32)[:, None], offs_m.shape[0], offs_c.shape[0])
    cols = tl.broadcast_to(offs_c.to(tl.uint32)[None, :], offs_m.shape[0], offs_c.shape[0])
    zeros = tl.zeros_like(rows)
    bits, _, _, _ = tl.philox(seed, rows, cols, zeros, zeros)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def load_vector(ptr, offs, size):
    return tl.load(ptr + offs, mask=offs < size, other=0.0).to(tl.float32)


@triton.jit
def any_set(ptr, COUNT: tl.constexpr):
    """Whether one of COUNT numbers is not 0."""
    found = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(COUNT):
        found += tl.load(ptr + i)
    return found != 0.0


@triton.jit
def word_of(ptr, HAS: tl.constexpr):
    """Whether there is word of cancelled lines; False where there is no such tensor."""
    word = False
    if HAS:
        word = any_set(ptr, 2)
    return word


@triton.jit
def choose(word_ptr, one, other):
    """one where there is word of cancelled lines, else the other."""
    if any_set(word_ptr, 2):
        other = one
    return other


@triton.jit
def load_matrix(ptr, offs_i, offs_j, size_i, size_j, stride_i, stride_j):
    """A masked tile [i, j] as stored; offsets are int64 before they meet a stride."""
    ptrs = ptr + offs_i.to(tl.int64)[:, None] * stride_i + offs_j.to(tl.int64)[None, :] * stride_j
    return tl.load(ptrs, mask=(offs_i < size_i)[:, None] & (offs_j < size_j)[None, :], other=0.0)


@triton.jit
def store_matrix(ptr, values, offs_i, offs_j, size_i, size_j, stride_i, stride_j):
    """The reverse."""
    ptrs = ptr + offs_i.to(tl.int64)[:, None] * stride_i + offs_j.to(tl.int64)[None, :] * stride_j
    tl.store(ptrs, values, mask=(offs_i < size_i)[:, None] & (offs_j < size_j)[None, :])


@triton.jit
def sum_parts(ptr, stride, parts, offs_i, offs_r, size, R: tl.constexpr):
    """Σ of parts [size, R], contiguous and ``stride`` apart, in their order; several are on their way at a time."""
    elements: tl.constexpr = offs_i.shape[0] * offs_r.shape[0]
    at_once: tl.constexpr = 16 if elements <= 256 else 8 if elements <= 512 else 4
    offs = offs_i.to(tl.int64)[:, None] * R + offs_r[None, :]
    mask_r = (offs_r < R)[None, :]
    acc = tl.zeros((offs_i.shape[0], offs_r.shape[0]), dtype=tl.float32)
    for first in range(0, parts, at_once):
        for i in tl.static_range(at_once):
            end = tl.where(first + i < parts, size, 0)  # Triton 3.9's interpreter takes no mask of a block and a scalar
            acc += tl.load(ptr + i * stride + offs, mask=(offs_i < end)[:, None] & mask_r, other=0.0)
        ptr += at_once * stride
    return acc


@triton.jit
def sum_vectors(ptr, stride, parts, offs, size):
    """The same of vectors [size]."""
    acc = tl.zeros((offs.shape[0],), dtype=tl.float32)
    for first in range(0, parts, 8):
        for i in tl.static_range(8):
            end = tl.where(first + i < parts, size, 0)
            acc += tl.load(ptr + i * stride + offs, mask=offs < end, other=0.0)
        ptr += 8 * stride
    return acc


@triton.jit
def live_magnitude(scale_ptr, norm_ptr, magnitude_ptr, offs, size, stand_in):
    """The magnitude that a sum was made with: a zero one had a stand-in, see ``plan.zero_stand_in``."""
    scale = load_vector(scale_ptr, offs, size)
    return tl.where(scale == 0.0, stand_in * load_vector(norm_ptr, offs, size), load_vector(magnitude_ptr, offs, size))
