"""Counter-based Gumbel noise as Triton device functions: g(seed, stream, position, token).

    words = Philox4x32-10(counter = (token // 4, position, stream, 0), key = (low, high word of seed))
    v     = (words[token % 4] + 1/2) / 2^32          in fp32, at most 1 - 2^-24
    g     = -log(-log1p(-v))

The integers are those of `reference.philox`, bit for bit. The logarithms are written out in multiplies and adds, with
every fused multiply-add spelled out: no compiler can round them differently in two kernels, so a token's
noise is the same bits wherever it is made. It is within 2 ulp (of numbers from 1 to 2, or of its own magnitude where
that is larger) of `reference.gumbel`. About 15 instructions a token for the integers and 40 for the logarithms: made
where it is used, it costs no memory traffic. Nothing here is launched by itself: kernels of choose, lm_head and
grow_tree call it.
"""

import triton
import triton.language as tl

# Philox4x32's multipliers and key increments (Salmon et al., SC 2011).
_MULTIPLY_0 = tl.constexpr(0xD2511F53)
_MULTIPLY_1 = tl.constexpr(0xCD9E8D57)
_KEY_0 = tl.constexpr(0x9E3779B9)
_KEY_1 = tl.constexpr(0xBB67AE85)
_LN2 = tl.constexpr(0.6931471805599453)
_TWO_THIRDS = tl.constexpr(0x3F2AAAAB)  # the bits of 2/3 in fp32
_EXPONENT = tl.constexpr(-0x800000)  # the bits of sign and exponent, as int32


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors of one shape (keys may broadcast) -> four uint32 words."""
    for _ in tl.static_range(10):
        low = c0.to(tl.uint64) * _MULTIPLY_0
        high = c2.to(tl.uint64) * _MULTIPLY_1
        c0 = (high >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (low >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = high.to(tl.uint32)
        c3 = low.to(tl.uint32)
        k0 += _KEY_0
        k1 += _KEY_1
    return c0, c1, c2, c3


@triton.jit
def log_of(f, exponent):
    """log(2^exponent * (1 + f)) for f in [-1/3, 1/3]: a minimax polynomial, relative error below 2^-27."""
    q = tl.fma(f, -0.12949426472187042, 0.14005446434020996)
    q = tl.fma(q, f, -0.12167061120271683)
    q = tl.fma(q, f, 0.1400103121995926)
    q = tl.fma(q, f, -0.1668231189250946)
    q = tl.fma(q, f, 0.20010754466056824)
    q = tl.fma(q, f, -0.24999716877937317)
    q = tl.fma(q, f, 0.3333320915699005)
    q = tl.fma(q, f, -0.5)
    return tl.fma(exponent, _LN2, tl.fma(f * f, q, f))


@triton.jit
def gumbel(words):
    """Uniform 32-bit words (uint32) to standard Gumbel noise, fp32, always finite. See `reference.gumbel`."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    # 1 - v = 2^e * (1 + f) with 2/3 <= 1 + f < 4/3: f comes from v itself, so small v keep all their bits.
    e = ((1.0 - v).to(tl.int32, bitcast=True) - _TWO_THIRDS) & _EXPONENT
    scale = (0x3F800000 - e).to(tl.float32, bitcast=True)
    exponential = -log_of(tl.fma(-v, scale, scale - 1.0), e.to(tl.float32) * 1.1920928955078125e-07)
    bits = exponential.to(tl.int32, bitcast=True)
    e = (bits - _TWO_THIRDS) & _EXPONENT
    f = (bits - e).to(tl.float32, bitcast=True) - 1.0
    return -log_of(f, e.to(tl.float32) * 1.1920928955078125e-07)


@triton.jit
def key_words(seeds):
    """int64 seeds -> the two uint32 words of the key."""
    return (seeds & 0xFFFFFFFF).to(tl.uint32), ((seeds >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def gumbel_at(tokens, seeds, streams, positions):
    """Noise of single tokens: int32 tokens; seeds int64, streams and positions int32 broadcast to them."""
    k0, k1 = key_words(seeds)
    c0 = (tokens // 4).to(tl.uint32)
    zero = c0 ^ c0
    w0, w1, w2, w3 = philox(c0, zero + positions.to(tl.uint32), zero + streams.to(tl.uint32), zero, k0, k1)
    lane = tokens % 4
    return gumbel(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def gumbel_fours(firsts, seed, stream, position):
    """Noise of four tokens in a row from each of firsts [F], divisible by 4, in one row: [F, 4] fp32."""
    k0, k1 = key_words(seed)
    c0 = (firsts // 4).to(tl.uint32)
    zero = c0 ^ c0
    w0, w1, w2, w3 = philox(c0, zero + position.to(tl.uint32), zero + stream.to(tl.uint32), zero, k0, k1)
    return gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (firsts.shape[0], 4)))


@triton.jit
def gumbel_tile(first, seeds, streams, positions, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Noise of tokens first .. first + TOKENS (first divisible by 4) for ROWS rows: [TOKENS, ROWS] fp32.

    One Philox call serves four tokens. seeds, streams, positions: [ROWS].
    """
    k0, k1 = key_words(seeds)
    quads = (first // 4 + tl.arange(0, TOKENS // 4)).to(tl.uint32)
    zero = tl.full((TOKENS // 4, ROWS), 0, tl.uint32)
    c0, c1, c2 = zero + quads[:, None], zero + positions.to(tl.uint32)[None, :], zero + streams.to(tl.uint32)[None, :]
    w0, w1, w2, w3 = philox(c0, c1, c2, zero, k0[None, :], k1[None, :])
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [TOKENS / 4, ROWS, 2, 2]
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (TOKENS, ROWS))
    return gumbel(words)
